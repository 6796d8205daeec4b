"""A listener for what ``log group N`` in a rule says: the kernel's NFLOG, as <linux/netfilter/nfnetlink_log.h> has it.

Lines for the kernel's own log are not shown outside the initial network namespace; nflog is there in each.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from support.net import Host

NETLINK_NETFILTER, NLM_F_REQUEST, NLM_F_ACK, NLMSG_ERROR, NLMSG_DONE = 12, 1, 4, 2, 3
PACKET, CONFIG = 4 << 8, 4 << 8 | 1
CMD_BIND, COPY_PACKET = 1, 2
CFG_CMD, CFG_MODE, CFG_QTHRESH = 1, 2, 5
PAYLOAD, PREFIX = 9, 10
NLA_TYPE_MASK = 0x3FFF


class Line(NamedTuple):
    """What a rule has logged: its prefix, and the TCP packet."""

    prefix: str
    source: str
    source_port: int
    destination: str
    port: int


class Nflog:
    """Hears what the host's rules log to a group."""

    def __init__(self, host: Host, group: int):
        self._group, self._lines = group, list[Line]()
        self._socket = host.call(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._configure(CFG_CMD, struct.pack("B", CMD_BIND))
        self._configure(CFG_MODE, struct.pack("!IBx", 128, COPY_PACKET))
        self._configure(CFG_QTHRESH, struct.pack("!I", 1))  # tell each at once
        self._socket.setblocking(False)

    def _configure(self, attribute: int, value: bytes) -> None:
        content = struct.pack("!BBH", 0, 0, self._group) + struct.pack("HH", 4 + len(value), attribute)
        content += value + bytes(-len(value) % 4)
        self._socket.send(struct.pack("IHHII", 16 + len(content), CONFIG, NLM_F_REQUEST | NLM_F_ACK, 0, 0) + content)
        kind, answer = next(_messages(self._socket.recv(1 << 16)))
        (error,) = struct.unpack_from("i", answer)
        assert kind == NLMSG_ERROR
        if error:
            raise OSError(-error, f"nflog group {self._group}: {os.strerror(-error)}")

    @property
    def lines(self) -> list[Line]:
        """What has been logged so far."""
        while True:
            try:
                received = self._socket.recv(1 << 16)
            except BlockingIOError:
                return self._lines
            self._lines += [_line(content) for kind, content in _messages(received) if kind == PACKET]

    def said(self, prefix: str) -> list[Line]:
        """Return the lines with a prefix."""
        return [line for line in self.lines if line.prefix == prefix]

    def close(self) -> None:
        """Close the socket, which unbinds the group."""
        self._socket.close()


def _messages(received: bytes) -> Iterator[tuple[int, bytes]]:
    while received:
        length, kind = struct.unpack_from("IH", received)
        yield kind, received[16:length]
        received = received[(length + 3) & ~3 :]


def _line(content: bytes) -> Line:
    attributes, rest = {}, content[4:]
    while rest:
        length, kind = struct.unpack_from("HH", rest)
        attributes[kind & NLA_TYPE_MASK] = rest[4:length]
        rest = rest[(length + 3) & ~3 :]
    packet = attributes[PAYLOAD]
    ends, tcp = (slice(12, 20), (packet[0] & 15) * 4) if packet[0] >> 4 == 4 else (slice(8, 40), 40)
    addresses = packet[ends]
    half = len(addresses) // 2
    source, destination = (str(ipaddress.ip_address(one)) for one in (addresses[:half], addresses[half:]))
    source_port, port = struct.unpack_from("!HH", packet, tcp)
    return Line(attributes[PREFIX].rstrip(b"\0").decode(), source, source_port, destination, port)
