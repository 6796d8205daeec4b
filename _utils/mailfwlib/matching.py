"""Whether a match of somebody else's rule is true of a packet: yes, no, or what that depends on."""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any, Union

from mailfwlib import parse
from mailfwlib.foreign import Table, only
from mailfwlib.packets import Packet

#: Clients connect from ports above the well-known ones: RFC 6335, section 6.
FIRST_CLIENT_PORT = 1024

#: What a match says of a packet: yes, no, or what that depends on.
Answer = Union[bool, str]

#: Protocols whose fields a TCP packet does not have; nft makes a match on one depend on the protocol.
_OTHER_PROTOCOLS = {"udp", "udplite", "sctp", "dccp", "icmp", "icmpv6", "igmp", "ah", "esp", "comp", "arp"}
#: Sources that no client on the internet has: RFC 6890, RFC 6598, RFC 5771, RFC 4291.
_NOT_INTERNET = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.168.0.0/16", "224.0.0.0/3", "::/127", "fc00::/7", "fe80::/10", "ff00::/8"),
    )
]


def name_of(expression: Any) -> str:
    """Return what nft calls the field that an expression reads."""
    if not isinstance(expression, dict):
        return str(expression)
    kind, content = only(expression)
    if kind == "payload":
        return f"{content['protocol']} {content['field']}" if "protocol" in content else "raw payload"
    if kind == "meta":
        return str(content["key"]) if content["key"].startswith(("iif", "oif")) else f"meta {content['key']}"
    if kind == "ct":
        return f"ct {content['key']}"
    if kind == "fib":
        return f"fib {' . '.join(content['flags'])} {content['result']}"
    if kind in ("&", "|", "^", "<<", ">>"):
        return name_of(content[0])
    return str(kind)


def matches(content: dict[str, Any], packet: Packet, table: Table) -> Answer:
    """Return whether a match statement is true of a packet."""
    left, right, op = content["left"], content["right"], content["op"]
    if _cannot_have(left, packet):
        return False
    if op in ("==", "!="):
        answer = _equals(left, right, packet, table)
        return answer if op == "==" else _negated(answer)
    value, other = _value(left, packet), _flags(right)
    if isinstance(value, frozenset) and other is not None:
        return bool(value & other) if op == "in" else not value & other if op == "!" else name_of(left)
    if isinstance(value, int) and isinstance(right, int) and op in _ORDER:
        return bool(_ORDER[op](value, right))
    return name_of(left)


_ORDER: dict[str, Any] = {
    "<": int.__lt__,
    ">": int.__gt__,
    "<=": int.__le__,
    ">=": int.__ge__,
}


def _cannot_have(left: Any, packet: Packet) -> bool:
    """Return whether a packet lacks a field: it is another protocol's or the other family's."""
    if isinstance(left, dict) and "concat" in left:
        return any(_cannot_have(part, packet) for part in left["concat"])
    if isinstance(left, dict) and "&" in left:
        return _cannot_have(left["&"][0], packet)
    protocol = name_of(left).partition(" ")[0] if isinstance(left, dict) and "payload" in left else ""
    return protocol in _OTHER_PROTOCOLS or (protocol in ("ip", "ip6") and protocol != packet["family"])


def _value(left: Any, packet: Packet) -> Any:
    """Return the value of a field, masked if it is; None when it is not known."""
    if isinstance(left, dict) and "&" in left:
        value, mask = _value(left["&"][0], packet), left["&"][1]
        flags = _flags(mask)
        if isinstance(value, frozenset) and flags is not None:
            return value & flags
        return value & mask if isinstance(value, int) and isinstance(mask, int) else None
    return packet.get(name_of(left))


def _flags(right: Any) -> frozenset[str] | None:
    """Return a set of flags from the forms that nft has for one; None when it is something else."""
    if isinstance(right, str):
        return frozenset({right})
    if isinstance(right, dict) and set(right) == {"|"}:
        right = right["|"]
    if isinstance(right, list):
        parts = [_flags(part) for part in right]
        return None if None in parts else frozenset().union(*(part for part in parts if part is not None))
    return frozenset() if right == 0 else None


def equals(left: Any, right: Any, packet: Packet, table: Table) -> Answer:
    """Return whether a packet has a field, and that is a value or in a set of values."""
    return not _cannot_have(left, packet) and _equals(left, right, packet, table)


def _equals(left: Any, right: Any, packet: Packet, table: Table) -> Answer:
    """Return whether a field is a value, or in a set of values."""
    if isinstance(right, str) and right.startswith("@"):
        if right[1:] not in table.elements:
            return name_of(left) if not _is_concatenation(left) else right
        right = {"set": table.elements[right[1:]]}
    if isinstance(right, dict):
        if "set" in right:
            return _any(_equals(left, one, packet, table) for one in right["set"])
        if "elem" in right:
            return _equals(left, right["elem"]["val"], packet, table)
        if "concat" in right and _is_concatenation(left):
            return _all(_equals(*pair, packet, table) for pair in zip(left["concat"], right["concat"]))
    return True if right == "*" else _is(left, right, packet)


def _is_concatenation(left: Any) -> bool:
    return isinstance(left, dict) and "concat" in left


def _is(left: Any, right: Any, packet: Packet) -> Answer:
    """Return whether a field has one value, or one in a range."""
    value, name = _value(left, packet), name_of(left)
    if isinstance(value, frozenset):
        flags = _flags(right)
        return name if flags is None else value == flags
    if value is None:
        return False if _is_strange(left, name, right) else name
    if isinstance(right, dict) and "range" in right:
        low, high = right["range"]
        return low <= value <= high if all(isinstance(each, int) for each in (value, low, high)) else name
    if value == "tcp" and right == socket.IPPROTO_TCP:
        return True  # nft without /etc/protocols
    return bool(value == right) if isinstance(right, (str, int)) else name


def _is_strange(left: Any, name: str, right: Any) -> bool:
    """Return whether a value is one that no connection from the internet has, though its own is not known."""
    if name in ("iif", "iifname", "oif", "oifname"):
        return bool(right == "lo")
    if name in ("iiftype", "oiftype"):
        return bool(right == "loopback")
    if name in ("ip saddr", "ip6 saddr") and "payload" in left:
        return _is_not_internet(right)
    if name in ("tcp sport", "tcp dport", "th sport", "th dport"):
        return "payload" in left and isinstance(right, int) and right < FIRST_CLIENT_PORT
    if name.startswith("fib saddr"):
        return right is False  # no route back to the source
    return "exthdr" in left and right is True


def _is_not_internet(right: Any) -> bool:
    if isinstance(right, dict) and "range" in right:
        first, last = (_special(str(end)) for end in right["range"])
        return first is not None and first == last
    if isinstance(right, dict) and "prefix" in right:
        return _special("{addr}/{len}".format(**right["prefix"])) is not None
    return isinstance(right, str) and _special(right) is not None


@functools.lru_cache(maxsize=65536)
def _special(text: str) -> parse.Network | None:
    """Return the network without internet clients that an address or a network is in."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        return None
    for special in _NOT_INTERNET:
        if network.version == special.version and network.subnet_of(special):  # type: ignore[arg-type]
            return special
    return None


def _any(answers: Iterable[Answer]) -> Answer:
    reason: Answer = False
    for answer in answers:
        if answer is True:
            return True
        reason = reason or answer
    return reason


def _all(answers: Iterable[Answer]) -> Answer:
    return _negated(_any(_negated(answer) for answer in answers))


def _negated(answer: Answer) -> Answer:
    return not answer if isinstance(answer, bool) else answer
