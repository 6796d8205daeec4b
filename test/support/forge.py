"""TCP packets with somebody else's source address."""

from __future__ import annotations

import ipaddress
import random
import socket
import struct
from collections.abc import Iterable, Iterator

from support.net import Host

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32


def packet(source: str, port: int, flags: int, sender_port: int, sequence: int, data: bytes = b"") -> bytes:
    """Return a TCP packet to the mail host with its IP header; what it acknowledges is made up."""
    acknowledged = random.getrandbits(32) if flags & ACK else 0
    return wrapped(segment(source, port, flags, sender_port, sequence, acknowledged, data), source)


def segment(
    source: str,
    port: int,
    flags: int,
    sender_port: int,
    sequence: int,
    ack: int = 0,
    data: bytes = b"",
    window: int = 65535,
    options: bytes = b"",
    urgent: int = 0,
) -> bytes:
    """Return a TCP segment to the mail host; the length of its options is a multiple of four."""
    offset = (20 + len(options)) // 4 << 4
    tcp = struct.pack("!HHIIBBHHH", sender_port, port, sequence, ack, offset, flags, window, 0, urgent) + options
    checksum = _checksum(_pseudo_header(source, len(tcp) + len(data)) + tcp + data)
    return tcp[:16] + struct.pack("!H", checksum) + tcp[18:] + data


def _pseudo_header(source: str, length: int) -> bytes:
    return b"".join(_addresses(source)) + struct.pack("!II", length, socket.IPPROTO_TCP)


def _addresses(source: str) -> tuple[bytes, bytes]:
    address = ipaddress.ip_address(source)
    return address.packed, ipaddress.ip_address(Host.ipv4 if address.version == 4 else Host.ipv6).packed


def wrapped(
    payload: bytes,
    source: str,
    protocol: int = socket.IPPROTO_TCP,
    options: bytes = b"",
    fragment: tuple[int, int] = (0, 0),
) -> bytes:
    """Return an IP packet to the mail host; ``options`` and ``fragment`` (identification, offset) are IPv4's."""
    addresses = b"".join(_addresses(source))
    if ":" in source:
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + addresses + payload
    # The kernel fills in the length and the checksum: raw(7).
    start = 4 << 4 | (20 + len(options)) // 4
    return struct.pack("!BBHHHBBH", start, 0, 0, *fragment, 64, protocol, 0) + addresses + options + payload


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


def sweep(source: str, port: int, flags: int, sender_port: int, sequence: int, count: int) -> Iterator[bytearray]:
    """Return packets that differ in what they acknowledge, spread evenly over the number space. Fast: one buffer."""
    made = bytearray(packet(source, port, flags & ~ACK, sender_port, sequence))
    start = len(made) - 20
    struct.pack_into("!B", made, start + 13, flags)
    struct.pack_into("!H", made, start + 16, 0)
    rest = ~_checksum(_pseudo_header(source, 20) + made[start:]) & 0xFFFF
    pack, first = struct.Struct("!I").pack_into, random.getrandbits(32)
    for turn in range(count):
        ack = (first + turn * 2**32 // count) % 2**32
        total = rest + (ack >> 16) + (ack & 0xFFFF)
        total = (total & 0xFFFF) + (total >> 16)
        pack(made, start + 8, ack)
        made[start + 16 : start + 18] = (~((total & 0xFFFF) + (total >> 16)) & 0xFFFF).to_bytes(2, "big")
        yield made


def send(packets: Iterable[bytes | bytearray], family: int) -> int:
    """Send packets to the mail host from the calling thread's namespace; return how many."""
    destination = Host.ipv6 if family == socket.AF_INET6 else Host.ipv4
    sent = 0
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for one in packets:
            raw.sendto(one, (destination, 0))
            sent += 1
    return sent
