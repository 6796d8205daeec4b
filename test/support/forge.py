"""TCP packets with somebody else's source address."""

from __future__ import annotations

import ipaddress
import random
import socket
import struct
from collections.abc import Iterable, Iterator

from support.net import Host

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


def packet(source: str, port: int, flags: int, sender_port: int, sequence: int, data: bytes = b"") -> bytes:
    """Return a TCP packet to the mail host with its IP header; what it acknowledges is made up."""
    address = ipaddress.ip_address(source)
    destination = ipaddress.ip_address(Host.ipv4 if address.version == 4 else Host.ipv6)
    acknowledged = random.getrandbits(32) if flags & ACK else 0
    length = 20 + len(data)
    pseudo = address.packed + destination.packed + struct.pack("!II", length, socket.IPPROTO_TCP)
    tcp = struct.pack("!HHIIBBHHH", sender_port, port, sequence, acknowledged, 5 << 4, flags, 65535, 0, 0)
    tcp = tcp[:16] + struct.pack("!H", _checksum(pseudo + tcp + data)) + tcp[18:] + data
    if address.version == 6:
        header = struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_TCP, 64)
    else:  # The kernel fills in the length and the checksum: raw(7).
        header = struct.pack("!BBHHHBBH", 4 << 4 | 5, 0, 0, 0, 0, 64, socket.IPPROTO_TCP, 0)
    return header + address.packed + destination.packed + tcp


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def attempts(source: str, port: int, count: int) -> Iterator[bytes]:
    """Return the packets of some connections that a third party would open: SYN, ACK, data and FIN for each."""
    for _ in range(count):
        sender_port, sequence = random.randrange(1024, 65536), random.getrandbits(32)
        following = (sequence + 1) % 2**32
        yield packet(source, port, SYN, sender_port, sequence)
        yield packet(source, port, ACK, sender_port, following)
        yield packet(source, port, ACK | PSH, sender_port, following, b"a1 NOOP\r\n")
        yield packet(source, port, ACK | FIN, sender_port, following)


def send(packets: Iterable[bytes], family: int) -> int:
    """Send packets to the mail host from the calling thread's namespace; return how many."""
    destination = Host.ipv6 if family == socket.AF_INET6 else Host.ipv4
    sent = 0
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for one in packets:
            raw.sendto(one, (destination, 0))
            sent += 1
    return sent
