"""Whether somebody has changed the rules, asked of the kernel directly and without listing a set.

The kernel gives each object of a table a handle, and never one twice. ``nft`` is no tool for looking every second:
it reads the elements of every set before it lists anything (1.0.6: a second for 100,000 of them).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator

from mailfwlib import nft

# <linux/netlink.h>, <linux/netfilter/nfnetlink.h>, <linux/netfilter/nf_tables.h>
_NETLINK_NETFILTER, _SUBSYSTEM, _INET = 12, 10 << 8, 1
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_GET_TABLE, _GET_CHAIN, _GET_RULE, _GET_SET, _GET_ELEMENTS, _GET_OBJECT, _GET_GENERATION = 1, 4, 7, 10, 13, 19, 16
#: Where each kind of object keeps the name of its table and its handle: NFTA_CHAIN_TABLE, NFTA_CHAIN_HANDLE and so on.
_KINDS = {_GET_CHAIN: (1, 2), _GET_RULE: (1, 3), _GET_SET: (1, 16), _GET_OBJECT: (1, 6)}
_TABLE_NAME, _TABLE_HANDLE = 1, 4
_ELEMENTS_TABLE, _ELEMENTS_SET, _ELEMENTS_LIST = 1, 2, 3
_GENERATION_ID = 1

_NAME = nft.TABLE.split()[1].encode() + b"\0"

Attributes = dict[int, bytes]


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
            attributes = _attribute(_ELEMENTS_TABLE, _NAME) + _attribute(_ELEMENTS_SET, name.encode() + b"\0")
            digest.update(name.encode() + b":")
            with contextlib.suppress(FileNotFoundError):
                for found in self._ask(_GET_ELEMENTS, attributes=attributes):
                    digest.update(found.get(_ELEMENTS_LIST, b""))
        return digest.hexdigest()

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
    found, place = {}, 0
    while place + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, place)
        found[kind & 0x3FFF] = data[place + 4 : place + length]
        place += (max(length, 4) + 3) & ~3
    return found
