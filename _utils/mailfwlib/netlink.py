"""Whether somebody has changed the rules, and which elements a set has, asked of the kernel directly.

The kernel gives each object of a table a handle, and never one twice. ``nft`` is no tool for looking every second:
it reads the elements of every set before it lists anything (1.0.6: a second for 100,000 of them), and begins anew
whenever somebody has changed any table meanwhile: where people log in all the time it comes to no end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Optional

from mailfwlib import nft

# <linux/netlink.h>, <linux/netfilter/nfnetlink.h>, <linux/netfilter/nf_tables.h>
_NETLINK_NETFILTER, _SUBSYSTEM, _INET = 12, 10 << 8, 1
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_GET_TABLE, _GET_CHAIN, _GET_RULE, _GET_SET, _GET_ELEMENTS, _GET_OBJECT, _GET_GENERATION = 1, 4, 7, 10, 13, 19, 16
#: Where each kind of object keeps the name of its table and its handle: NFTA_CHAIN_TABLE, NFTA_CHAIN_HANDLE and so on.
_KINDS = {_GET_CHAIN: (1, 2), _GET_RULE: (1, 3), _GET_SET: (1, 16), _GET_OBJECT: (1, 6)}
_TABLE_NAME, _TABLE_HANDLE = 1, 4
_SET_TABLE, _SET_NAME = 1, 2
_ELEMENTS_TABLE, _ELEMENTS_SET, _ELEMENTS_LIST = 1, 2, 3
_ELEMENT_KEY, _ELEMENT_TIMEOUT, _ELEMENT_EXPIRATION, _DATA_VALUE = 1, 4, 5, 1
_GENERATION_ID = 1

_NAME = nft.TABLE.split()[1].encode() + b"\0"

Attributes = dict[int, bytes]


class SetElement(NamedTuple):
    """An element: its value as nft writes it; its own timeout, and what is left of it, in seconds, None without one."""

    value: str
    timeout: Optional[float]
    left: Optional[float]


class Kernel:
    """A conversation with the kernel about its packet filter. Raises OSError when the kernel refuses."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.settimeout(5)
        self._socket.bind((0, 0))

    def generation(self) -> int:
        """Return the number of the ruleset: every transaction of anybody makes it another one."""
        found = next(iter(self._ask(_GET_GENERATION, _REQUEST, 0)), {})
        return int.from_bytes(found.get(_GENERATION_ID, b""), "big")

    def fingerprint(self, static: Iterable[str]) -> str:
        """Return what changes when chains, rules, sets or counters do, or the elements of the ``static`` maps and sets.

        It does not change with the elements that logins and rules add and remove. Empty when there is no table.
        """
        tables = [found for found in self._ask(_GET_TABLE) if found.get(_TABLE_NAME) == _NAME]
        if not tables:
            return ""
        digest = hashlib.sha256(tables[0][_TABLE_HANDLE])
        for kind, (table, handle) in _KINDS.items():
            handles = sorted(found[handle] for found in self._ask(kind) if found.get(table) == _NAME)
            digest.update(b"%d:" % kind + b"".join(handles))
        for name in static:
            digest.update(name.encode() + b":")
            with contextlib.suppress(FileNotFoundError):
                for listed in self._elements(name):
                    digest.update(listed)
        return digest.hexdigest()

    def sets(self) -> list[str]:
        """Return the names of the table's sets and maps; none when there is no table."""
        found = (one for one in self._ask(_GET_SET) if one.get(_SET_TABLE) == _NAME)
        return [one[_SET_NAME].rstrip(b"\0").decode() for one in found]

    def elements(self, name: str) -> Iterator[SetElement]:
        """Yield the elements of a set of addresses, or of addresses and ports.

        An element may be missing or come twice if the set changes meanwhile. Raises OSError when there is no such set.
        """
        for listed in self._elements(name):
            for data in _each(listed):
                element = _attributes(data)
                value = _attributes(element[_ELEMENT_KEY])[_DATA_VALUE]
                yield SetElement(
                    _value(value), _seconds(element.get(_ELEMENT_TIMEOUT)), _seconds(element.get(_ELEMENT_EXPIRATION))
                )

    def _elements(self, name: str) -> Iterator[bytes]:
        attributes = _attribute(_ELEMENTS_TABLE, _NAME) + _attribute(_ELEMENTS_SET, name.encode() + b"\0")
        for found in self._ask(_GET_ELEMENTS, attributes=attributes):
            yield found.get(_ELEMENTS_LIST, b"")

    def _ask(
        self, kind: int, flags: int = _REQUEST | _DUMP, family: int = _INET, attributes: bytes = b""
    ) -> Iterator[Attributes]:
        """Yield the attributes of each object that the kernel answers with."""
        body = struct.pack("=BBH", family, 0, 0) + attributes
        self._socket.send(struct.pack("=IHHII", 16 + len(body), _SUBSYSTEM | kind, flags, 0, 0) + body)
        while True:
            answer = self._socket.recv(1 << 18)
            place = 0
            while place < len(answer):
                length, answered, *_ = struct.unpack_from("=IHHII", answer, place)
                if answered == _DONE:
                    return
                if answered == _ERROR:
                    error = -struct.unpack_from("=i", answer, place + 16)[0]
                    raise OSError(error, os.strerror(error))
                yield _attributes(answer[place + 20 : place + length])
                place += (length + 3) & ~3
            if not flags & _DUMP:
                return


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _attributes(data: bytes) -> Attributes:
    return dict(_pairs(data))


def _each(data: bytes) -> Iterator[bytes]:
    """Yield the members of a list, which are attributes of one kind."""
    return (value for _, value in _pairs(data))


def _pairs(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, place)
        yield kind & 0x3FFF, data[place + 4 : place + length]
        place += (max(length, 4) + 3) & ~3


def _value(key: bytes) -> str:
    """Return an address, or an address and a port, each of which fills four bytes, as nft writes it."""
    length = 4 if len(key) < 16 else 16
    address = socket.inet_ntop(socket.AF_INET if length == 4 else socket.AF_INET6, key[:length])
    return f"{address} . {int.from_bytes(key[length : length + 2], 'big')}" if len(key) > length else address


def _seconds(milliseconds: bytes | None) -> float | None:
    return None if milliseconds is None else int.from_bytes(milliseconds, "big") / 1000
