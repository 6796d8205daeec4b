"""What is measured: one figure of each, of an arm, which is a ruleset and the clients that connect under it.

A figure is the processor time that one operation takes anywhere: in the kernel, the server and the client, which share
one core and take turns. It is what those processes have run, by the kernel's account, not what a clock says: that is
the least noisy, for it leaves out whatever else the machine does and how long cores take to wake each other up, and
nothing that the rules do is lost on the client's core. Counters of instructions, which virtual machines seldom have,
would not show what a look-up waits for memory.

``dovecot_...`` and ``postfix_...`` talk to real servers. For the others this thread is client and server alternately:
nothing but the kernel's work is left.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

from bench.servers import IMAP_PORT, IMAPS_PORT, MESSAGE, PASSWORD, SUBMISSION_PORT, USER
from bench.wires import PORT, Server

BULK = 256 * 1024
#: What one packet of a transfer takes: an Ethernet frame without headers, TCP's with time stamps.
SEGMENT = 1448
LOGIN, LOGOUT = f"a LOGIN {USER} {PASSWORD}\r\n".encode(), b"b LOGOUT\r\n"
#: Not in every Python's socket module; <linux/in.h>.
IP_BIND_ADDRESS_NO_PORT = 24

#: Does what is measured some times, from any of some addresses.
Batch = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Arm:
    """A ruleset of a server, and the clients that connect to it."""

    name: str
    server: Server
    rules: str
    sources: tuple[str, ...]

    @property
    def version(self) -> int:
        """The IP version."""
        return 6 if ":" in self.sources[0] else 4


@dataclass(frozen=True)
class Measure:
    """What is measured: ``prepare`` returns a batch for a server, an IP version and an address to open a session from.

    ``opens``: whether a batch opens connections, and it matters from where; else it is about one that is open.
    """

    prepare: Callable[[Server, int, str], Batch]
    operations: int
    opens: bool


def turn(arm: Arm, measure: Measure, batch: Batch, batches: int) -> list[float]:
    """Return for each of some batches the nanoseconds that one operation took.

    A batch during which a process of the servers has started or ended is left out; those before are not measured.
    """
    arm.server.enforce(arm.rules)
    batch(arm.sources)  # what the last arm has left to do, and what its caches lack
    samples = []
    while len(samples) < batches:
        before, start = arm.server.processor_time(), time.thread_time_ns()
        batch(arm.sources)
        own, after = time.thread_time_ns() - start, arm.server.processor_time()
        if before.keys() == after.keys():
            samples.append((own + sum(after.values()) - sum(before.values())) / measure.operations)
    return samples


def _client(source: str, address: str, port: int) -> socket.socket:
    client = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
    client.settimeout(5)
    client.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.bind((source, 0))
    client.connect((address, port))
    return client


def _pair(server: Server, source: str) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection on which the server has said its banner."""
    version = 6 if ":" in source else 4
    client = _client(source, server.address[version], PORT)
    served, _ = server.listeners[version].accept()
    served.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(None)
    served.send(b"* OK ready\r\n")
    client.recv(100)
    return client, served


def _hear(client: socket.socket, expected: bytes) -> None:
    heard = client.recv(4096)
    if not heard.startswith(expected):
        raise RuntimeError(f"the server said {heard!r} instead of {expected!r}")


def _plain(client: socket.socket) -> socket.socket:
    return client


def _encrypted() -> Callable[[socket.socket], socket.socket]:
    """Return what does the TLS handshake, as clients do it that keep no session."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket


CONNECTIONS = 5


def _conversations(
    port: int,
    banner: bytes,
    lines: dict[bytes, bytes],
    spoken: Callable[[socket.socket], socket.socket] = _plain,
) -> Measure:
    """Connect, say lines and hear the answers until the server closes: each from another source of the arm."""

    def prepare(server: Server, version: int, _: str) -> Batch:
        def batch(sources: Sequence[str]) -> None:
            for source in random.choices(sources, k=CONNECTIONS):
                with spoken(_client(source, server.mail[version], port)) as client:
                    _hear(client, banner)
                    for line, answer in lines.items():
                        client.send(line)
                        _hear(client, answer)
                    while client.recv(4096):
                        pass

        return batch

    return Measure(prepare, CONNECTIONS, opens=True)


def _prepare_connections(server: Server, version: int, _: str) -> Batch:
    def batch(sources: Sequence[str]) -> None:
        for source in random.choices(sources, k=CONNECTIONS):
            client, served = _pair(server, source)
            client.send(b"a LOGOUT\r\n")
            served.recv(100)
            served.close()
            client.recv(100)
            client.close()

    return batch


def _logged_in(server: Server, version: int, source: str) -> socket.socket:
    client = _client(source, server.mail[version], IMAP_PORT)
    _hear(client, b"* OK")
    client.send(LOGIN)
    _hear(client, b"a OK")
    return client


ROUND_TRIPS = 20


def _prepare_noops(server: Server, version: int, source: str) -> Batch:
    client = _logged_in(server, version, source)

    def batch(_: Sequence[str]) -> None:
        for _ in range(ROUND_TRIPS):
            client.send(b"c NOOP\r\n")
            _hear(client, b"c OK")

    return batch


def _prepare_round_trips(server: Server, version: int, source: str) -> Batch:
    client, served = _pair(server, source)

    def batch(_: Sequence[str]) -> None:
        for _ in range(ROUND_TRIPS):
            client.send(b"a NOOP\r\n")
            served.recv(100)
            served.send(b"a OK\r\n")
            client.recv(100)

    return batch


def _prepare_fetches(server: Server, version: int, source: str) -> Batch:
    client = _logged_in(server, version, source)
    client.send(b"s SELECT INBOX\r\n")
    while b"s OK" not in client.recv(4096):
        pass
    room = bytearray(1 << 16)

    def batch(_: Sequence[str]) -> None:
        client.send(b"f FETCH 1 BODY.PEEK[]\r\n")
        end = b""
        while b"f OK" not in end:
            heard = client.recv_into(room)
            end = end[-100:] + room[max(0, heard - 100) : heard]

    return batch


def _transfers(from_client: bool) -> Measure:
    def prepare(server: Server, version: int, source: str) -> Batch:
        client, served = _pair(server, source)
        sender, receiver = (client, served) if from_client else (served, client)
        data, room = memoryview(bytes(BULK)), bytearray(BULK)
        sender.setblocking(False)

        def batch(_: Sequence[str]) -> None:
            sent = received = 0
            while received < BULK:
                with contextlib.suppress(BlockingIOError):
                    sent += sender.send(data[sent : sent + 32768]) if sent < BULK else 0
                received += receiver.recv_into(room)

        return batch

    return Measure(prepare, BULK // SEGMENT, opens=False)


MEASURES = {
    "dovecot_tls_connection": _conversations(IMAPS_PORT, b"* OK", {LOGOUT: b"* BYE"}, _encrypted()),
    "dovecot_connection": _conversations(IMAP_PORT, b"* OK", {LOGOUT: b"* BYE"}),
    "dovecot_login": _conversations(IMAP_PORT, b"* OK", {LOGIN: b"a OK", LOGOUT: b"* BYE"}),
    "postfix_connection": _conversations(SUBMISSION_PORT, b"220", {b"QUIT\r\n": b"221"}),
    "dovecot_noop": Measure(_prepare_noops, ROUND_TRIPS, opens=False),
    "dovecot_fetch": Measure(_prepare_fetches, MESSAGE // SEGMENT, opens=False),
    "connection": Measure(_prepare_connections, CONNECTIONS, opens=True),
    "round_trip": Measure(_prepare_round_trips, ROUND_TRIPS, opens=False),
    "bulk_in": _transfers(from_client=True),
    "bulk_out": _transfers(from_client=False),
}
