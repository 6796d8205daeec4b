"""What is measured of an arm: one function for each figure, which returns samples.

``ab`` is the real thing: nginx on one core, ApacheBench on the other, connections per second of wall clock.

The others run client and server alternately in this one thread, so that the kernel does all work for a packet on this
core before a system call returns. They give nanoseconds for one operation, in batches of some milliseconds: what other
processes disturb is a slow batch, and a low quantile of many batches leaves it out.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Any, Callable

from bench.wires import PORT, Server

CONNECTIONS, ROUND_TRIPS, BULK = 5, 50, 256 * 1024
#: Not in every Python's socket module; <linux/in.h>.
IP_BIND_ADDRESS_NO_PORT = 24


@dataclass(frozen=True)
class Arm:
    """A server with its rules, and the clients that connect to it."""

    name: str
    server: Server
    sources: tuple[str, ...]

    @property
    def version(self) -> int:
        """The IP version."""
        return 6 if ":" in self.sources[0] else 4


def ab(arm: Arm, seconds: float, core: int) -> float:
    """Return the connections per second of one run of ApacheBench."""
    command = (
        f"setpriv --pdeathsig KILL taskset -c {core} ab -q -t {seconds:.0f} -n 100000000 -c 16 -B {arm.sources[0]}"
    )
    done = subprocess.run(
        [*command.split(), arm.server.nginx[arm.version]],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    found = re.search(r"^Requests per second: +([\d.]+)", done.stdout, re.M)
    if not found or not re.search(r"^Failed requests: +0$", done.stdout, re.M) or "Non-2xx" in done.stdout:
        raise RuntimeError(f"ab, {arm.name}: {done.stdout} {done.stderr}")
    return float(found[1])


def _connect(arm: Arm, source: str) -> tuple[socket.socket, socket.socket]:
    client = socket.socket(socket.AF_INET6 if arm.version == 6 else socket.AF_INET)
    client.settimeout(5)
    client.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    client.bind((source, 0))
    client.connect((arm.server.address[arm.version], PORT))
    served, _ = arm.server.listeners[arm.version].accept()
    for end in (client, served):
        end.settimeout(None)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, served


def _timed(operation: Callable[[], Any], operations: int, seconds: float) -> list[float]:
    """Return the nanoseconds for one operation, of each batch that fits into some seconds."""
    samples = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter_ns()
        operation()
        samples.append((time.perf_counter_ns() - start) / operations)
    return samples


def connection(arm: Arm, seconds: float) -> list[float]:
    """Connect, hear a banner, say a line, be closed: each from another source of the arm."""

    def batch() -> None:
        for source in random.choices(arm.sources, k=CONNECTIONS):
            client, served = _connect(arm, source)
            served.send(b"* OK ready\r\n")
            client.recv(100)
            client.send(b"a LOGOUT\r\n")
            served.recv(100)
            served.close()
            client.recv(100)
            client.close()

    return _timed(batch, CONNECTIONS, seconds)


def round_trip(arm: Arm, seconds: float) -> list[float]:
    """Say a line and hear a line on an established connection: one packet each way."""
    client, served = _connect(arm, arm.sources[0])

    def batch() -> None:
        for _ in range(ROUND_TRIPS):
            client.send(b"a NOOP\r\n")
            served.recv(100)
            served.send(b"a OK\r\n")
            client.recv(100)

    batch()
    with client, served:
        return _timed(batch, ROUND_TRIPS, seconds)


def _bulk(arm: Arm, seconds: float, from_client: bool) -> list[float]:
    client, served = _connect(arm, arm.sources[0])
    served.send(b"* OK ready\r\n")
    client.recv(100)
    sender, receiver = (client, served) if from_client else (served, client)
    data, room = memoryview(bytes(BULK)), bytearray(BULK)
    sender.setblocking(False)

    def batch() -> None:
        sent = received = 0
        while received < BULK:
            with contextlib.suppress(BlockingIOError):
                sent += sender.send(data[sent : sent + 32768]) if sent < BULK else 0
            received += receiver.recv_into(room)

    for _ in range(5):
        batch()
    with client, served:
        return _timed(batch, BULK // 1448, seconds)


def bulk_in(arm: Arm, seconds: float) -> list[float]:
    """Send full packets to the server; the time is that of one packet with its share of acknowledgements."""
    return _bulk(arm, seconds, from_client=True)


def bulk_out(arm: Arm, seconds: float) -> list[float]:
    """The same from the server to the client."""
    return _bulk(arm, seconds, from_client=False)


LOCKSTEP = {"connection": connection, "round_trip": round_trip, "bulk_in": bulk_in, "bulk_out": bulk_out}
