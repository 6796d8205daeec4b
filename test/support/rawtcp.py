"""A TCP client that does what no honest kernel does, and a server that shows what such a client was served.

The client's address is on the link but nobody's: the host finds it by a static neighbour entry, and no kernel resets
what arrives for it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Callable

from support import forge
from support.forge import ACK, FIN, RST, SYN
from support.net import LIMIT, Client, Host, Net

ETH_P = {"ipv4": 0x0800, "ipv6": 0x86DD}
#: TCP options. The signature makes the host's TCP drop a packet (RFC 2385) that conntrack has taken.
MSS, SACK_PERMITTED, SIGNATURE = b"\x02\x04\x05\xb4", b"\x04\x02\x01\x01", b"\x13\x12" + bytes(16) + b"\x01\x01"
_WORD = 2**32

#: No test uses a port that an earlier one has used: conntrack and the servers would know it.
_sender_ports = itertools.count(20000)


class Server:
    """A server on one port of the host: ``greeting`` is sent first; then each line gets an answer.

    ``big 5000`` is answered with 5000 bytes, ``bye`` with the end of the connection, and anything else with OK.
    ``addresses``: what it listens on, one of each family.
    """

    def __init__(
        self,
        host: Host,
        port: int,
        greeting: bytes = b"",
        fast_open: bool = False,
        addresses: tuple[str, str] = ("0.0.0.0", "::"),
    ):
        self.port, self._greeting, self._fast_open, self._addresses = port, greeting, fast_open, addresses
        #: What each client has said: its address and port -> lines.
        self.lines: dict[tuple[str, int], list[bytes]] = {}
        self._ready = threading.Event()
        self._running = host.start(asyncio.run, self._serve())
        assert self._ready.wait(LIMIT), self._running

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        for kind, address in zip((socket.AF_INET, socket.AF_INET6), self._addresses):
            listener = socket.socket(kind, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # then asyncio sets TCP_NODELAY
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if kind == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address, self.port))
            if self._fast_open:
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 100)
            await asyncio.start_server(self._speak, sock=listener, backlog=500)
        self._ready.set()
        await self._stopping.wait()

    async def _speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = writer.get_extra_info("peername")[:2]
        try:
            writer.write(self._greeting)
            while (line := await reader.readline()) != b"bye\n" and line:
                self.lines.setdefault(name, []).append(line)
                word, _, size = line.partition(b" ")
                writer.write(b"x" * int(size) if word == b"big" else b"250 OK\r\n")
        except OSError:
            pass
        finally:
            writer.close()

    def close(self) -> None:
        """Stop the server."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._running.result(LIMIT)


class Wire:
    """The attacker's end of the wire in one address family: sends and receives for an address of nobody."""

    def __init__(self, net: Net, family: str):
        self.family = family
        self.source = {"ipv4": "203.0.113.66", "ipv6": "2001:db8:c:66::66"}[family]
        #: What sets call this source: IPv6 sources are prefixes.
        self.element = {"ipv4": self.source, "ipv6": "2001:db8:c:66::"}[family]
        mallory: Client = net.mallory
        net.host.ip(f"neigh replace {self.source} lladdr {_mac(mallory)} dev eth0 nud permanent")
        self._to = (Host.ipv6 if family == "ipv6" else Host.ipv4, 0)
        kind = socket.AF_INET6 if family == "ipv6" else socket.AF_INET
        self._out = mallory.call(socket.socket, kind, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._in = mallory.call(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P[family]))
        self._in.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._in.setblocking(False)
        self._connections: dict[tuple[int, int], Connection] = {}

    def connection(self, port: int, sender_port: int = 0) -> Connection:
        """Return a connection to a port of the host; nothing is sent yet."""
        made = Connection(self, port, sender_port or next(_sender_ports))
        self._connections[port, made.sender_port] = made
        return made

    def crowd(self, port: int, count: int) -> Crowd:
        """Return some connections to a port; nothing is sent yet."""
        return Crowd(self.connection(port) for _ in range(count))

    def send(self, packet: bytes) -> None:
        """Send a packet with its IP header."""
        self._out.sendto(packet, self._to)

    def until(self, condition: Callable[[], Any], seconds: float = 3.0) -> bool:
        """Receive until a condition is true; return whether it is within some seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if select.select([self._in], [], [], min(left, 0.05))[0]:
                self._receive()
        return True

    def _receive(self) -> None:
        while True:
            try:
                packet = self._in.recv(1 << 17)
            except BlockingIOError:
                return
            if self.family == "ipv4":
                start, end, protocol = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big"), packet[9]
            else:
                start, end, protocol = 40, 40 + int.from_bytes(packet[4:6], "big"), packet[6]
            if protocol != socket.IPPROTO_TCP:
                continue
            port, sender_port = struct.unpack_from("!HH", packet, start)
            if found := self._connections.get((port, sender_port)):
                found.hear(packet[start:end])

    def close(self) -> None:
        """Reset all connections and close the sockets."""
        for connection in self._connections.values():
            connection.send(RST)
        self._out.close()
        self._in.close()


def _mac(client: Client) -> str:
    command = ["ip", "-n", client.name, "-j", "link", "show", "eth0"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[0]["address"]


class Connection:
    """One TCP connection whose every packet is made by hand. Nothing is acknowledged unless the attack says so."""

    def __init__(self, wire: Wire, port: int, sender_port: int):
        self.wire, self.port, self.sender_port = wire, port, sender_port
        self.window = 65535
        self.seq = 1_000_000
        self.heard: dict[int, int] = {}
        self._earlier = 0
        self.restart()

    def forget(self) -> None:
        """Forget what was served, since the next connection begins."""
        self._earlier += bool(self.heard)
        self.heard = {}

    @property
    def times_served(self) -> int:
        """How many connections of this tuple were served."""
        return self._earlier + bool(self.heard)

    def restart(self) -> None:
        """Forget the server's side, to use the tuple for another connection with higher sequence numbers."""
        self.forget()
        self.seq = (self.seq + 1_000_000) % _WORD
        self.isn = self.seq
        self.ack = 0
        self.read = 0
        #: Whether the server has sent a SYN/ACK, a FIN, a reset; what it has acknowledged; its data by position: heard.
        self.answered = self.finished = self.reset = False
        self.acknowledged = 0

    @property
    def served(self) -> int:
        """How many bytes of the server's data have arrived."""
        return len(self.heard)

    def hear(self, segment: bytes) -> None:
        """Take a segment from the server."""
        _, _, seq, ack, offset, flags = struct.unpack_from("!HHIIBB", segment)
        data = segment[(offset >> 4) * 4 :]
        self.reset |= bool(flags & RST)
        if flags & SYN:
            if ack == (self.isn + 1) % _WORD:
                self.answered, self.ack = True, (seq + 1) % _WORD
            return
        if flags & ACK and not flags & RST:
            self.acknowledged = ack
        self.finished |= bool(flags & FIN)
        self.heard.update(((seq + index) % _WORD, byte) for index, byte in enumerate(data))

    def send(self, flags: int, data: bytes = b"", move: int = 0, **fields: Any) -> None:
        """Send a segment; ``move`` shifts its sequence number; ``fields`` are those of forge.segment, and ``wrap``.

        Sequence numbers advance only by what is sent at their place.
        """
        wrap: Callable[[bytes, str], Iterable[bytes]] = fields.pop("wrap", whole)
        fields.setdefault("window", self.window)
        fields.setdefault("ack", self.ack if flags & ACK else 0)
        segment = forge.segment(
            self.wire.source, self.port, flags, self.sender_port, (self.seq + move) % _WORD, data=data, **fields
        )
        for packet in wrap(segment, self.wire.source):
            self.wire.send(packet)
        if not move and not flags & RST:
            self.seq = (self.seq + len(data) + bool(flags & (SYN | FIN))) % _WORD

    def acknowledge(self, **fields: Any) -> None:
        """Acknowledge all that has arrived in order."""
        while self.ack in self.heard:
            self.ack = (self.ack + 1) % _WORD
            self.read += 1
        self.send(ACK, **fields)


class Crowd(list[Connection]):
    """Connections that do the same at the same time."""

    def __init__(self, connections: Iterable[Connection]):
        super().__init__(connections)

    def send(self, flags: int, data: bytes = b"", **fields: Any) -> Crowd:
        """Send the same on each."""
        for connection in self:
            connection.send(flags, data, **fields)
        return self

    def wait(self, condition: Callable[[Connection], Any], seconds: float = 3.0) -> Crowd:
        """Receive until a condition is true for each, which has to come true."""
        assert self[0].wire.until(lambda: all(condition(each) for each in self), seconds), "the server does not answer"
        return self

    def open(self, options: bytes = MSS, **fields: Any) -> Crowd:
        """Do what comes before the handshake's last packet."""
        return self.send(SYN, options=options, **fields).wait(lambda each: each.answered)

    def connect(self, **fields: Any) -> Crowd:
        """Do the handshake."""
        return self.open(**fields).send(ACK)

    def restart(self) -> Crowd:
        """Use the same tuples again."""
        for connection in self:
            connection.restart()
        return self


def whole(segment: bytes, source: str) -> Iterator[bytes]:
    """Return a TCP segment as one packet."""
    yield forge.wrapped(segment, source)


def with_extensions(*headers: tuple[int, bytes]) -> Callable[[bytes, str], Iterator[bytes]]:
    """Return what puts a segment behind IPv6 extension headers: each a protocol number and what follows its length."""

    def wrap(segment: bytes, source: str) -> Iterator[bytes]:
        payload, following = segment, socket.IPPROTO_TCP
        for protocol, content in reversed(headers):
            payload = struct.pack("!BB", following, (len(content) + 2) // 8 - 1) + content + payload
            following = protocol
        yield forge.wrapped(payload, source, protocol=following)

    return wrap


def with_ipv4_options(options: bytes) -> Callable[[bytes, str], Iterator[bytes]]:
    """Return what sends a segment with IPv4 options."""

    def wrap(segment: bytes, source: str) -> Iterator[bytes]:
        yield forge.wrapped(segment, source, options=options)

    return wrap


_identification = itertools.count(1)


def in_fragments(size: int = 16) -> Callable[[bytes, str], Iterator[bytes]]:
    """Return what sends a segment in fragments of some bytes; 0 is one fragment for all (atomic: RFC 6946)."""

    def wrap(segment: bytes, source: str) -> Iterator[bytes]:
        name, step = next(_identification), size or len(segment)
        for offset in range(0, len(segment), step):
            piece, more = segment[offset : offset + step], offset + step < len(segment)
            if ":" in source:
                header = struct.pack("!BBHI", socket.IPPROTO_TCP, 0, offset | more, name)
                yield forge.wrapped(header + piece, source, protocol=socket.IPPROTO_FRAGMENT)
            else:
                yield forge.wrapped(piece, source, fragment=(name, offset // 8 | more << 13))

    return wrap
