"""What is measured of an arm: one function for each figure, which returns samples.

A figure is the processor time that one operation takes anywhere: in the kernel, the server and the client, which share
one core and take turns. It is what those processes have run, by the kernel's account, not what a clock says: that is
the least noisy, for it leaves out whatever else the machine does and how long cores take to wake each other up, and
nothing that the rules do is lost on the client's core. Samples are batches of some milliseconds; a low quantile of
many batches leaves out those whose caches were disturbed.

``dovecot_...`` and ``postfix_...`` talk to real servers. For the others this thread is client and server alternately:
nothing but the kernel's work is left.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from dataclasses import dataclass
from typing import Any, Callable

from bench.servers import IMAP_PORT, PASSWORD, SUBMISSION_PORT, USER
from bench.wires import PORT, Server

CONNECTIONS, ROUND_TRIPS, BULK = 5, 50, 256 * 1024
LOGIN, LOGOUT = f"a LOGIN {USER} {PASSWORD}\r\n".encode(), b"b LOGOUT\r\n"
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


def _client(arm: Arm, source: str, address: str, port: int) -> socket.socket:
    client = socket.socket(socket.AF_INET6 if arm.version == 6 else socket.AF_INET)
    client.settimeout(5)
    client.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.bind((source, 0))
    client.connect((address, port))
    return client


def _connect(arm: Arm, source: str) -> tuple[socket.socket, socket.socket]:
    client = _client(arm, source, arm.server.address[arm.version], PORT)
    served, _ = arm.server.listeners[arm.version].accept()
    served.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(None)
    return client, served


def _none() -> dict[int, int]:
    return {}


def _timed(
    operation: Callable[[], Any], operations: int, seconds: float, servers: Callable[[], dict[int, int]] = _none
) -> list[float]:
    """Return the nanoseconds for one operation, of each batch that fits into some seconds of processor time.

    The servers' time is given by process; a batch during which one has started or ended is left out.
    """
    samples: list[float] = []
    while sum(samples) * operations < seconds * 1e9:
        before, start = servers(), time.thread_time_ns()
        operation()
        own, after = time.thread_time_ns() - start, servers()
        if before.keys() == after.keys():
            samples.append((own + sum(after.values()) - sum(before.values())) / operations)
    return samples


def _hear(client: socket.socket, expected: bytes) -> None:
    heard = client.recv(4096)
    if not heard.startswith(expected):
        raise RuntimeError(f"the server said {heard!r} instead of {expected!r}")


def _sessions(arm: Arm, seconds: float, port: int, banner: bytes, lines: dict[bytes, bytes]) -> list[float]:
    """Connect, say lines and hear the answers until the server closes: each from another source of the arm."""

    def batch() -> None:
        for source in random.choices(arm.sources, k=CONNECTIONS):
            with _client(arm, source, arm.server.mail[arm.version], port) as client:
                _hear(client, banner)
                for line, answer in lines.items():
                    client.send(line)
                    _hear(client, answer)
                while client.recv(4096):
                    pass

    return _timed(batch, CONNECTIONS, seconds, arm.server.processor_time)


def dovecot_connection(arm: Arm, seconds: float) -> list[float]:
    """Connect to Dovecot, hear the banner, log out."""
    return _sessions(arm, seconds, IMAP_PORT, b"* OK", {LOGOUT: b"* BYE"})


def dovecot_login(arm: Arm, seconds: float) -> list[float]:
    """Connect to Dovecot, log in, log out."""
    return _sessions(arm, seconds, IMAP_PORT, b"* OK", {LOGIN: b"a OK", LOGOUT: b"* BYE"})


def dovecot_noop(arm: Arm, seconds: float) -> list[float]:
    """Say NOOP to Dovecot and hear OK in one session: one packet each way."""
    with _client(arm, arm.sources[0], arm.server.mail[arm.version], IMAP_PORT) as client:
        _hear(client, b"* OK")
        client.send(LOGIN)
        _hear(client, b"a OK")

        def batch() -> None:
            for _ in range(ROUND_TRIPS):
                client.send(b"c NOOP\r\n")
                _hear(client, b"c OK")

        batch()
        return _timed(batch, ROUND_TRIPS, seconds, arm.server.processor_time)


def postfix_connection(arm: Arm, seconds: float) -> list[float]:
    """Connect to Postfix, hear the banner, quit."""
    return _sessions(arm, seconds, SUBMISSION_PORT, b"220", {b"QUIT\r\n": b"221"})


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


MEASURES = {
    measure.__name__: measure
    for measure in (
        dovecot_connection,
        dovecot_login,
        dovecot_noop,
        postfix_connection,
        connection,
        round_trip,
        bulk_in,
        bulk_out,
    )
}
