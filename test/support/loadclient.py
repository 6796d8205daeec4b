"""A program that makes load in a client's namespace, and says what became of every connection. See support.load.

It reads one line of JSON: ``knocks``, the connections to make in turn, at ``rate`` a second, and ``sessions``, those to
open at the start and to talk on, each as [source, server, port]. It ends when its input does. For each connection, and
for each line of a session, it prints a line of JSON, the fields of support.load.Record.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import struct
import sys
import time
from collections.abc import Awaitable
from typing import Any

#: Seconds to wait for a greeting or an answer, and between two lines of a session.
PATIENCE, PAUSE = 10.0, 0.1
_TOTAL_RETRANSMITS = 100  # offset of tcpi_total_retrans: <linux/tcp.h>

Target = tuple[str, str, int]


async def connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    source, server, port = target
    return await asyncio.open_connection(server, port, local_addr=(source, 0))


async def knock(target: Target) -> None:
    """Make a connection, wait for the greeting, and close it."""
    began, own_port = time.monotonic(), 0

    async def greeted() -> str:
        nonlocal own_port
        reader, writer = await connect(target)
        own_port = writer.get_extra_info("sockname")[1]
        try:
            if not await reader.readline():
                return "reset"
            return "late" if _sent_again(writer) else "served"
        finally:
            writer.close()

    outcome = await _outcome(greeted())
    report("connection", target, own_port, began, outcome)


def _sent_again(writer: asyncio.StreamWriter) -> int:
    """Return how many packets of the client were sent again on a connection, as when one is ignored."""
    info = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return struct.unpack_from("I", info, _TOTAL_RETRANSMITS)[0]


async def talk(target: Target) -> None:
    """Open a session and send a line again and again, until one has no answer, however late."""
    reader, writer = await connect(target)
    await reader.readline()
    own_port, outcome = writer.get_extra_info("sockname")[1], "answered"

    async def answered() -> str:
        before = _sent_again(writer)
        writer.write(b"noop\r\n")
        if not await reader.readline():
            return "reset"
        return "late" if _sent_again(writer) > before else "answered"

    await asyncio.sleep(random.uniform(0, PAUSE))  # not all at once: at any moment some have something under way
    while outcome in ("answered", "late"):
        began = time.monotonic()
        outcome = await _outcome(answered())
        report("line", target, own_port, began, outcome)
        await asyncio.sleep(PAUSE)


async def _outcome(step: Awaitable[str]) -> str:
    try:
        async with asyncio.timeout(PATIENCE):
            return await step
    except ConnectionRefusedError:
        return "refused"
    except ConnectionError:
        return "reset"
    except TimeoutError:
        return "silent"
    except OSError as err:
        return str(err)


def report(kind: str, target: Target, own_port: int, began: float, outcome: str) -> None:
    source, _, port = target
    print(json.dumps([kind, source, own_port, port, began, time.monotonic(), outcome]), flush=True)


async def knock_on(targets: list[Target], rate: float, under_way: set[asyncio.Task[None]]) -> None:
    """Begin connections at a steady rate, whatever becomes of them."""
    began = time.monotonic()
    for number, target in enumerate(itertools.cycle(targets)):
        await asyncio.sleep(began + number / rate - time.monotonic())
        task = asyncio.create_task(knock(target))
        under_way.add(task)
        task.add_done_callback(under_way.discard)


async def main() -> None:
    plan: dict[str, Any] = json.loads(sys.stdin.readline())
    under_way: set[asyncio.Task[None]] = set()
    tasks = [asyncio.create_task(talk(tuple(target))) for target in plan["sessions"]]
    tasks.append(asyncio.create_task(knock_on(plan["knocks"], plan["rate"], under_way)))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*under_way, *tasks, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
