"""What is known of the packets of connections to a port of this host, before any rule is looked at."""

from __future__ import annotations

from typing import Any

#: What is known of a packet: ``tcp dport`` -> 993. Flags are frozensets; everything else about it is unknown.
Packet = dict[str, Any]


def opening(family: str, port: int) -> Packet:
    """Return what is known of the first packet of a connection from the internet to a port of this host."""
    return {
        **incoming(family, port),
        "tcp flags": frozenset({"syn"}),
        "ct state": frozenset({"new"}),
        "ct direction": "original",
        "ct status": frozenset(),
    }


def incoming(family: str, port: int) -> Packet:
    """Return what is known of all packets to a port of this host."""
    return {
        **_common(family),
        "tcp dport": port,
        "th dport": port,
        "fib daddr type": "local",
        "fib daddr . iif type": "local",
        "meta pkttype": "host",
    }


def outgoing(family: str, port: int) -> Packet:
    """Return what is known of all packets from a port of this host."""
    return {**_common(family), "tcp sport": port, "th sport": port}


def _common(family: str) -> Packet:
    return {
        "family": family,
        "meta l4proto": "tcp",
        "ip protocol": "tcp",
        "ip6 nexthdr": "tcp",
        "meta nfproto": {"ip": "ipv4", "ip6": "ipv6"}[family],
        "meta protocol": family,
    }


def passing(hook: str, family: str, port: int) -> list[Packet]:
    """Return the packets of a port's connections that pass a hook."""
    into, out = incoming(family, port), outgoing(family, port)
    return {"forward": [into, out], "output": [out], "postrouting": [out], "egress": [out]}.get(hook, [into])
