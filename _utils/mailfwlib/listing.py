"""Who is trusted, banned, blocked, or would be refused: the elements of the sets as rows for operators to look through.

The sets are read as a snapshot reads them, which comes to an end where people log in all the time.
"""

from __future__ import annotations

import bisect
import heapq
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Optional, Union

from mailfwlib import elements, parse, snapshot
from mailfwlib.familiar import OBSERVED
from mailfwlib.parse import Address, Network
from mailfwlib.settings import ROLES, Settings

KINDS = ("trusted", "banned", "blocked", "observed")
#: What rows can be sorted by: what is left, most or least of it first; or the address.
SORTS = ("remaining", "ending", "address")
#: Rows of an answer at most: Salt's master cuts what is larger than a megabyte (max_event_size), and says so nowhere.
MOST = 3000
#: Deadlines of elements that were made together are read at different moments, and rounded.
_TOGETHER = 2

#: Kind -> what the names of its sets are like, without the family; of a ban: whether of a network, and its role.
_NAMES = {"trusted": "trusted", "banned": "banned(_networks)?_([a-z]+)", "blocked": "blocked", "observed": "observed"}
_SET = re.compile(rf"(?:{'|'.join(_NAMES.values())})_ipv[46]")


class Row(NamedTuple):
    """A source and what it is. ``where``: ports, or a role; empty for everywhere. ``ends``: Unix time, or None."""

    kind: str
    network: Network
    where: tuple[Union[int, str], ...]
    ends: Optional[int]
    note: str


class Wanted(NamedTuple):
    """What is asked for: these kinds, on these ports (None: all) and roles, within each of some lists of networks."""

    kinds: frozenset[str] = frozenset(KINDS)
    ports: Optional[frozenset[int]] = None
    roles: frozenset[str] = frozenset(ROLES)
    networks: tuple[list[Network], ...] = ()

    def sets(self) -> re.Pattern[str]:
        """Return what the names of the sets are like that say so."""
        return re.compile("|".join(rf"{_NAMES[kind]}_ipv[46]" for kind in sorted(self.kinds)))


class Spans:
    """Some networks, to be asked which others overlap them."""

    def __init__(self, networks: Iterable[Network]):
        spans = sorted({_span(network) for network in networks}, key=lambda span: (span[0], span[1], -span[2]))
        #: Those that lie in no other one: neither beginning nor end of one comes before that of the one before.
        self._spans: list[tuple[int, int, int]] = []
        for span in spans:
            if not self._spans or self._spans[-1][0] != span[0] or self._spans[-1][2] < span[2]:
                self._spans.append(span)

    def overlap(self, network: Network) -> bool:
        """Return whether one of them has an address of a network."""
        version, first, last = _span(network)
        place = bisect.bisect_right(self._spans, (version, last, 2**128))
        return place > 0 and self._spans[place - 1][0] == version and self._spans[place - 1][2] >= first


def _span(network: Network) -> tuple[int, int, int]:
    return network.version, int(network.network_address), int(network.broadcast_address)


def rows(found: snapshot.Elements, wanted: Wanted, settings: Settings) -> Iterator[Row]:
    """Yield the rows of some sets' elements: what a source is on several ports alike is one row."""
    within = [Spans(networks) for networks in wanted.networks]
    for name, listed in found.items():
        kind, match = name.partition("_")[0], _SET.fullmatch(name)
        role = match and match[2]
        if not match or kind not in wanted.kinds or (role and role not in wanted.roles):
            continue
        for address, ports, one in _sources(listed, wanted.ports):
            network = _network(parse.address(address), kind, bool(match[1]), settings)
            if all(spans.overlap(network) for spans in within):
                yield Row(kind, network, (role,) if role else ports, one.ends, one.note)


def _sources(
    listed: Iterable[snapshot.Element], ports: Optional[frozenset[int]]
) -> Iterator[tuple[str, tuple[int, ...], snapshot.Element]]:
    """Yield each address with the ports on which its elements are alike, and that of them which ends first."""
    by_address: dict[str, list[tuple[int, snapshot.Element]]] = {}
    for one in listed:
        address, _, port = one.value.partition(" . ")
        if not port or ports is None or int(port) in ports:
            by_address.setdefault(address, []).append((int(port or 0), one))
    for address, several in by_address.items():
        for alike in _alike(several):
            yield address, tuple(sorted(port for port, _ in alike if port)), alike[0][1]


def _alike(several: list[tuple[int, snapshot.Element]]) -> Iterator[list[tuple[int, snapshot.Element]]]:
    """Yield the elements of a source in groups that end together and have the same comment."""
    together: list[tuple[int, snapshot.Element]] = []
    for port, one in sorted(several, key=lambda each: (each[1].note, _end(each[1].ends))):
        if together and not _is_like(together[-1][1], one):
            yield together
            together = []
        together.append((port, one))
    yield together


def _is_like(one: snapshot.Element, other: snapshot.Element) -> bool:
    if one.note != other.note or one.ends is None or other.ends is None:
        return one.note == other.note and one.ends == other.ends
    return other.ends - one.ends <= _TOGETHER


def _end(ends: Optional[int]) -> float:
    return math.inf if ends is None else ends


def _network(address: Address, kind: str, counted: bool, settings: Settings) -> Network:
    """Return all that an address in a set stands for."""
    if counted and settings["autoban"]["networks"]:
        return elements.counted_network(address, settings)
    return (elements.trusted_network if kind == "trusted" else elements.source_network)(address, settings)


def in_order(found: Iterable[Row], by: str, limit: int) -> list[Row]:
    """Return the first rows by one of :data:`SORTS`."""
    return heapq.nsmallest(limit, found, key=lambda row: (*_order(row, by), row.kind, row.where))


def _order(row: Row, by: str) -> tuple[float, ...]:
    address = (row.network.version, int(row.network.network_address))
    return address if by == "address" else ({"remaining": -1, "ending": 1}[by] * _end(row.ends), *address)


def said(row: Row, now: float) -> dict[str, Any]:
    """Return a row as people read it."""
    left = math.inf if row.ends is None else max(0, row.ends - now)
    return {
        "kind": row.kind,
        "address": elements.text(row.network),
        "where": list(row.where),
        "left": "forever" if row.ends is None else parse.duration_text(left),
        "by": row.note or _by(row.kind, left),
    }


def _by(kind: str, left: float) -> str:
    """Return what has made an element without a comment."""
    if kind == "observed":
        return f"a try {parse.duration_text(max(0, OBSERVED - left))} ago"
    return {"trusted": "a login", "banned": "the rate"}.get(kind, "an operator")
