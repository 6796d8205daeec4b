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

from mailfwlib import nft, parse
from mailfwlib.parse import Address

# <linux/netlink.h>, <linux/netfilter/nfnetlink.h>, <linux/netfilter/nf_tables.h>
_NETLINK_NETFILTER, _SUBSYSTEM, _INET = 12, 10 << 8, 1
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_GET_TABLE, _GET_CHAIN, _GET_RULE, _GET_SET, _GET_ELEMENTS, _GET_OBJECT, _GET_GENERATION = 1, 4, 7, 10, 13, 19, 16
#: Where each kind of object keeps the name of its table and its handle: NFTA_CHAIN_TABLE, NFTA_CHAIN_HANDLE and so on.
_KINDS = {_GET_CHAIN: (1, 2), _GET_RULE: (1, 3), _GET_SET: (1, 16), _GET_OBJECT: (1, 6)}
_TABLE_NAME, _TABLE_HANDLE = 1, 4
_SET_TABLE, _SET_NAME, _SET_FLAGS, _SET_DESCRIPTION, _SET_TIMEOUT, _SET_COUNT = 1, 2, 3, 9, 11, 20
_SET_IS_TIMED, _DESCRIPTION_SIZE = 0x10, 1
_ELEMENTS_TABLE, _ELEMENTS_SET, _ELEMENTS_LIST, _LIST_MEMBER = 1, 2, 3, 1
_ELEMENT_KEY, _ELEMENT_DATA, _ELEMENT_TIMEOUT, _ELEMENT_EXPIRATION, _ELEMENT_USERDATA = 1, 2, 4, 5, 6
_ELEMENT_EXPRESSION, _EXPRESSION_DATA = 7, 2
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CHAIN = 1, 2, 2
_OBJECT_TABLE, _OBJECT_NAME, _OBJECT_TYPE, _OBJECT_DATA = 1, 2, 3, 4
_COUNTER, _COUNTER_PACKETS = 1, 2
_GENERATION_ID = 1
#: The kind of attribute that has others in it, and what nft(8) keeps an element's comment under (libnftnl, udata.h).
_NESTED, _COMMENT = 0x8000, 0

_NAME = nft.TABLE.split()[1].encode() + b"\0"
#: How often a set is listed at most, beside changes that come to no end.
ATTEMPTS = 4

Attributes = dict[int, bytes]


class SetElement(NamedTuple):
    """An element: its value as nft writes it; its own timeout, and what is left of it, in seconds, None without one.

    ``note``: its comment. Only operators' elements have one.
    """

    value: str
    timeout: Optional[float]
    left: Optional[float]
    note: str = ""

    def age(self, default: Optional[float]) -> Optional[float]:
        """Return the seconds since it was added, None where that cannot be told.

        ``default``: the timeout of its set (see :meth:`Kernel.timeout`).
        """
        timeout = default if self.timeout is None else self.timeout
        return max(0.0, timeout - self.left) if timeout and self.left is not None else None


class Level(NamedTuple):
    """How full a set is: its elements, None where the kernel is too old to say, and how many it takes."""

    elements: Optional[int]
    size: int


class Kernel:
    """A conversation with the kernel about its packet filter. Raises OSError when the kernel refuses."""

    def __init__(self) -> None:
        self._socket = _connect()
        self._questions = 0

    def generation(self) -> int:
        """Return the number of the ruleset: every transaction of anybody makes it another one."""
        found = next(iter(self._ask(_GET_GENERATION, _REQUEST, 0)), {})
        return int.from_bytes(found.get(_GENERATION_ID, b""), "big")

    def table(self) -> Optional[bytes]:
        """Return the handle of the table, another one each time that it is made anew; None when there is none."""
        found = self._get(_GET_TABLE, _attribute(_TABLE_NAME, _NAME))
        return None if found is None else found[_TABLE_HANDLE]

    def fingerprint(self, static: Iterable[str]) -> str:
        """Return what changes when chains, rules, sets or counters do, or the elements of the ``static`` maps and sets.

        It does not change with the elements that logins and rules add and remove. Empty when there is no table.
        """
        table_handle = self.table()
        if table_handle is None:
            return ""
        digest = hashlib.sha256(table_handle)
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
        return [_text(one[_SET_NAME]) for one in found]

    def levels(self) -> dict[str, Level]:
        """Return how full each set is whose elements end: name -> level; none when there is no table."""
        return {
            _text(one[_SET_NAME]): _level(one)
            for one in self._ask(_GET_SET)
            if one.get(_SET_TABLE) == _NAME and int.from_bytes(one[_SET_FLAGS], "big") & _SET_IS_TIMED
        }

    def counters(self) -> dict[str, int]:
        """Return the packets that each named counter has counted; none when there is no table."""
        return {
            _text(one[_OBJECT_NAME]): int.from_bytes(_attributes(one[_OBJECT_DATA])[_COUNTER_PACKETS], "big")
            for one in self._ask(_GET_OBJECT)
            if one.get(_OBJECT_TABLE) == _NAME
        }

    def count(self, name: str) -> int:
        """Return about how many elements a set has, by listing it once. Raises OSError when there is no such set."""
        return sum(sum(1 for _ in _pairs(listed)) for listed in self._elements(name))

    def keys(self, name: str) -> Iterator[tuple[bytes, Optional[float]]]:
        """Yield the key of each element (see :func:`key`), and the seconds that are left of it, None without an end.

        In less time than :meth:`elements`, as the set is listed once: if it changes meanwhile, elements may be missing
        or come twice.
        """
        for listed in self._elements(name):
            for data in _each(listed):
                element = _attributes(data)
                # The key is an attribute that holds one other.
                yield element[_ELEMENT_KEY][4:], _seconds(element.get(_ELEMENT_EXPIRATION))

    def tallies(self, name: str) -> Iterator[tuple[bytes, Optional[float], int]]:
        """Yield what :meth:`elements` does of a set whose elements count packets: key, seconds left and packets."""
        for element in self._all(name):
            counter = _attributes(_attributes(element.get(_ELEMENT_EXPRESSION, b"")).get(_EXPRESSION_DATA, b""))
            packets = int.from_bytes(counter.get(_COUNTER_PACKETS, b""), "big")
            yield element[_ELEMENT_KEY][4:], _seconds(element.get(_ELEMENT_EXPIRATION)), packets

    def elements(self, name: str) -> Iterator[SetElement]:
        """Yield the elements of a set of addresses, or of addresses and ports: all of them, each once.

        Those that come or go meanwhile may be missing. Raises OSError when there is no such set.
        """
        for element in self._all(name):
            yield _element(_value(_attributes(element[_ELEMENT_KEY])[_DATA_VALUE]), element)

    def _all(self, name: str) -> Iterator[Attributes]:
        """Yield each element of a set, in as many lists of it as it takes until one has nothing new.

        The kernel makes a list in parts, and begins each by counting those that it has given. It leaves elements out
        whenever their order changes between two parts: when others come or go, and when a set that has grown gets
        more room, which is at an arbitrary moment (6.18: of 60,000 that were just added, up to 3,400 of them).
        """
        seen = set[bytes]()
        for _ in range(ATTEMPTS):
            before = len(seen)
            for listed in self._elements(name):
                for data in _each(listed):
                    element = _attributes(data)
                    if element[_ELEMENT_KEY] not in seen:
                        seen.add(element[_ELEMENT_KEY])
                        yield element
            if len(seen) == before:
                return

    def _elements(self, name: str) -> Iterator[bytes]:
        for found in self._ask(_GET_ELEMENTS, attributes=_named(name)):
            yield found.get(_ELEMENTS_LIST, b"")

    def element(self, name: str, key: bytes) -> Optional[SetElement]:
        """Return a set's element of a key (see :func:`key`), None when there is none or no such set.

        Of a set of networks: the one that the key's address is in. Takes the same time however many elements there are.
        """
        found = self._element(name, key)
        return None if found is None else _element("", found)

    def holds(self, name: str, value: str) -> bool:
        """Return whether a set may have an element, an address or an address and a port as nft writes it.

        True as well when there is no such set, or when that cannot be told.
        """
        address, _, port = value.partition(" . ")
        try:
            found = self.element(name, key(parse.address(address), int(port) if port else None))
            return found is not None or not self.has(name)
        except OSError:
            return True

    def chain(self, name: str, port: int) -> str:
        """Return the chain that a verdict map has for a port; empty when there is none or no such map."""
        data = _attributes((self._element(name, struct.pack("!H", port)) or {}).get(_ELEMENT_DATA, b""))
        return _text(_attributes(data.get(_DATA_VERDICT, b"")).get(_VERDICT_CHAIN, b""))

    def _element(self, name: str, key: bytes) -> Optional[Attributes]:
        element = _attribute(_NESTED | _ELEMENT_KEY, _attribute(_DATA_VALUE, key))
        listed = _attribute(_NESTED | _ELEMENTS_LIST, _attribute(_NESTED | _LIST_MEMBER, element))
        found = self._get(_GET_ELEMENTS, _named(name) + listed)
        return found and next(map(_attributes, _each(found.get(_ELEMENTS_LIST, b""))), None)

    def has(self, name: str) -> bool:
        """Return whether there is such a set."""
        return self._get(_GET_SET, _named(name)) is not None

    def timeout(self, name: str) -> Optional[float]:
        """Return the timeout in seconds of a set's elements that have none of their own, None when there is none."""
        return _seconds((self._get(_GET_SET, _named(name)) or {}).get(_SET_TIMEOUT))

    def counter(self, name: str) -> Optional[int]:
        """Return the packets that a named counter has counted, None when there is no such counter."""
        wanted = _attribute(_OBJECT_TABLE, _NAME) + _attribute(_OBJECT_NAME, name.encode() + b"\0")
        found = self._get(_GET_OBJECT, wanted + _attribute(_OBJECT_TYPE, struct.pack("!I", _COUNTER)))
        if found is None:
            return None
        return int.from_bytes(_attributes(found[_OBJECT_DATA])[_COUNTER_PACKETS], "big")

    def _get(self, kind: int, attributes: bytes) -> Optional[Attributes]:
        """Return the one object that is asked for, None when there is none."""
        try:
            return next(self._ask(kind, _REQUEST, attributes=attributes), None)
        except FileNotFoundError:
            return None

    def _ask(
        self, kind: int, flags: int = _REQUEST | _DUMP, family: int = _INET, attributes: bytes = b""
    ) -> Iterator[Attributes]:
        """Yield the attributes of each object that the kernel answers with."""
        body = struct.pack("=BBH", family, 0, 0) + attributes
        self._questions = question = (self._questions + 1) & 0xFFFFFFFF
        self._socket.send(struct.pack("=IHHII", 16 + len(body), _SUBSYSTEM | kind, flags, question, 0) + body)
        whole = False
        try:
            for answered, answer in self._answers(question):
                whole = answered in (_DONE, _ERROR) or not flags & _DUMP
                if answered == _DONE:
                    return
                if answered == _ERROR:
                    error = -struct.unpack_from("=i", answer)[0]
                    raise OSError(error, os.strerror(error))
                yield _attributes(answer[4:])
                if whole:
                    return
        finally:
            if not whole:  # To a socket that has not read a list to its end, the kernel gives no other one: EBUSY.
                given_up, self._socket = self._socket, _connect()
                given_up.close()

    def _answers(self, question: int) -> Iterator[tuple[int, bytes]]:
        """Yield the kind and the body of each answer; those to a question that was given up before are left out."""
        while True:
            received, place = self._socket.recv(1 << 18), 0
            while place < len(received):
                length, kind, _, answers, _ = struct.unpack_from("=IHHII", received, place)
                if answers == question:
                    yield kind, received[place + 16 : place + length]
                place += (length + 3) & ~3


def _connect() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    made.settimeout(5)
    made.bind((0, 0))
    return made


def key(address: Address, port: Optional[int] = None) -> bytes:
    """Return the key of an address, or of an address and a port, in a set."""
    return address.packed + (b"" if port is None else struct.pack("!HH", port, 0))


def _named(name: str) -> bytes:
    """Return what names a set of the table: the same in requests for sets and for elements."""
    return _attribute(_ELEMENTS_TABLE, _NAME) + _attribute(_ELEMENTS_SET, name.encode() + b"\0")


def _element(value: str, element: Attributes) -> SetElement:
    timeout, left = _seconds(element.get(_ELEMENT_TIMEOUT)), _seconds(element.get(_ELEMENT_EXPIRATION))
    return SetElement(value, timeout, left, _comment(element.get(_ELEMENT_USERDATA, b"")))


def _comment(data: bytes) -> str:
    """Return the comment among an element's user data: kind, length and value of each, a byte for the first two."""
    place = 0
    while place + 2 <= len(data):
        kind, length = data[place], data[place + 1]
        if kind == _COMMENT:
            return _text(data[place + 2 : place + 2 + length])
        place += 2 + length
    return ""


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "replace")


def _level(found: Attributes) -> Level:
    count, description = found.get(_SET_COUNT), _attributes(found.get(_SET_DESCRIPTION, b""))
    size = int.from_bytes(description.get(_DESCRIPTION_SIZE, b""), "big")
    return Level(None if count is None else int.from_bytes(count, "big"), size)


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
