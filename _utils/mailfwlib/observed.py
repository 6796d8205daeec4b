"""Observed: with ``enforce: false``, who would have been refused, where, how often and since when.

The rules put each source and port into the sets ``observed``, with a counter. These are bounded, lose what was not seen
for a week, and all of it with the table: the agent takes them over into a tally on disk, which is bounded as well. When
a set is nearly full it is emptied after that; of a tally that is full those go first who have never logged in, and were
seen the least. Whoever fills a set with forged packets, which takes seconds, hides new sources for as long as he goes
on, and may have sources dropped that never logged in, by trying more: how often a set was full is kept as well.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import queue
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mailfwlib import elements, files, netlink, nft, overview, parse
from mailfwlib.familiar import OBSERVED, Familiar
from mailfwlib.journal import DIRECTORY, Pair
from mailfwlib.listing import Spans, Wanted
from mailfwlib.parse import Address, Network
from mailfwlib.settings import FAMILIES, Settings
from mailfwlib.worker import Worker

#: A set that is there when the rules observe.
SET = "observed_ipv4"
PATH = DIRECTORY / "observed"
FIRST_LINE = "mailfw observed 1"
#: Sources times ports that are remembered, and the seconds since they were last seen.
MOST, PERIOD = 50_000, 30 * 86400.0
#: The part that is kept of a tally that has become too much: otherwise each new source would make it so again.
KEPT = 0.9
#: Seconds between two looks, and how many times the processor time of a look the pause after it is at least.
LOOK, REST = 30.0, 50
#: Seconds between two times that it is written to disk: what was seen meanwhile is in the kernel's sets.
SAVE = 600.0
#: Seconds without a look after which the first time of what was seen more than once is not known.
AWAY = 3600.0
#: A part of a set that is filled, from which on it is emptied.
NEARLY_FULL = 0.75

#: Users that are named of a source.
MOST_USERS = 5
#: Bytes of a key.
KEY = {"ipv4": 8, "ipv6": 20}

log = logging.getLogger("mailfw-agent")


class Full(NamedTuple):
    """How many looks have found a set full, which hides new sources; the first and last of them in Unix time."""

    looks: int = 0
    first: float = 0.0
    last: float = 0.0


class Count:
    """What a source would have been refused on a port: first and last time in Unix time, and how often in packets.

    ``first``: 0 where it is not known. ``kernel``: the packets that the set's own counter had at the last look.
    """

    __slots__ = ("first", "kernel", "last", "times")

    def __init__(self, first: float, last: float, times: int, kernel: int):
        self.first, self.last, self.times, self.kernel = first, last, times, kernel


class Tally:
    """Who would have been refused: a source's key with its port (see netlink.key) -> how often and when.

    It is one thread's, but for :meth:`forget`.
    """

    def __init__(self, path: Path = PATH):
        self._path = path
        self._forgotten: queue.SimpleQueue[Address] = queue.SimpleQueue()
        self.counts: dict[bytes, Count] = {}
        #: Since when this was observed, and the last look, in Unix time, 0 for never.
        self.since = self.until = 0.0
        #: How many times a source and port was dropped for want of room.
        self.dropped = 0
        self.full = Full()
        self._load()

    def __len__(self) -> int:
        """Return how many sources and ports there are."""
        return len(self.counts)

    def _load(self) -> None:
        try:
            first, *lines = self._path.read_text(encoding="ascii", errors="replace").splitlines() or [""]
        except OSError:
            return
        try:
            beginning, since, until, dropped, looks, began, last = first.rsplit(" ", 6)
            if beginning != FIRST_LINE:
                raise ValueError(f"does not begin with {FIRST_LINE!r}")
            full = Full(int(looks), _time(began), _time(last))
            self.since, self.until, self.dropped, self.full = _time(since), _time(until), int(dropped), full
        except ValueError as err:
            log.warning("%s is not what was observed: %s", self._path, err)
            return
        for line in lines:
            try:
                address, port, began, last, times, kernel = line.split(" ")
                key = netlink.key(parse.address(address), int(port) & 0xFFFF)
                self.counts[key] = Count(_time(began), _time(last), int(times), int(kernel))
            except ValueError:
                continue

    def save(self) -> None:
        """Put all of it on disk. Raises OSError."""
        full = f"{self.full.looks} {self.full.first:.0f} {self.full.last:.0f}"
        lines = [f"{FIRST_LINE} {self.since:.0f} {self.until:.0f} {self.dropped} {full}"]
        for key, one in self.counts.items():
            where = f"{address_of(key)} {port_of(key)}"
            lines.append(f"{where} {one.first:.0f} {one.last:.0f} {one.times} {one.kernel}")
        files.replace(self._path, "\n".join(lines) + "\n")

    def look(self, kernel: netlink.Kernel, now: float) -> dict[str, int]:
        """Take over what the sets have; return how many elements each has: name -> elements. Raises OSError."""
        before = self.until
        if now - before > OBSERVED:  # Not the same observing any more.
            self.counts, self.since, self.dropped, self.full = {}, now, 0, Full()
        self.until, levels = now, {}
        for family in FAMILIES:
            name = f"observed_{family}"
            generation = kernel.generation()
            found = {key: (left, packets) for key, left, packets in kernel.tallies(name)}
            undisturbed = kernel.generation() == generation
            levels[name] = len(found)
            self._take(found, before, now)
            if undisturbed:  # Otherwise the kernel may have left some out.
                self._begin_anew(family, found)
        return levels

    def _take(self, found: dict[bytes, tuple[Optional[float], int]], before: float, now: float) -> None:
        """Add what a set has. ``before``: when it was looked at before this look."""
        for key, (left, packets) in found.items():
            last = now if left is None else min(now, now - OBSERVED + left)
            one = self.counts.get(key)
            if one is None:
                # The kernel keeps the last time only, which may be days after the first that nobody has looked at.
                known = packets == 1 or now - before <= AWAY
                self.counts[key] = Count(last if known else 0.0, last, packets, packets)
                continue
            # A set that was made anew, or emptied, counts from the beginning.
            one.times += packets - one.kernel if packets >= one.kernel else packets
            one.kernel, one.last = packets, max(one.last, last)

    def _begin_anew(self, family: str, known: Collection[bytes] = ()) -> None:
        """Have the counters of a set's elements that are not known (any more) begin at 0."""
        length = KEY[family]
        for key, one in self.counts.items():
            if len(key) == length and key not in known:
                one.kernel = 0

    def tidy(
        self, levels: dict[str, int], settings: Settings, familiar: Familiar, empty: Callable[[str], None], now: float
    ) -> None:
        """Drop what is old or too much, and have sets emptied that are nearly full, or have made it too much.

        ``levels``: what the look has returned; ``empty`` is called with the name of a set, and may raise NftError.
        Raises OSError when it cannot be put on disk: then no set is emptied.
        """
        size = settings["sizes"]["observed"]
        for key in [key for key, one in self.counts.items() if now - one.last > PERIOD]:
            del self.counts[key]
        if max(levels.values(), default=0) >= size:
            self.full = Full(self.full.looks + 1, self.full.first or now, now)
        too_much = len(self.counts) > MOST
        if too_much:
            self._drop(familiar, settings["autoban"]["ipv6_prefix"])
        self._empty(
            [name for name, count in levels.items() if count and (too_much or count >= NEARLY_FULL * size)], empty
        )

    def _empty(self, names: list[str], empty: Callable[[str], None]) -> None:
        """Have sets emptied; what is on disk has first what was in them, then that they count from the beginning."""
        if names:
            self.save()
        for name in names:
            empty(name)
            self._begin_anew(name.rpartition("_")[2])
            self.save()

    def _drop(self, familiar: Familiar, prefix: int) -> None:
        """Drop those first who have never logged in, and were seen the least."""
        known = last_logins(familiar, self.counts, prefix)

        def worth(item: tuple[bytes, Count]) -> tuple[bool, int, float]:
            return item[0][:-4] in known, item[1].times, item[1].last

        kept = sorted(self.counts.items(), key=worth, reverse=True)[: int(KEPT * MOST)]
        self.dropped += len(self.counts) - len(kept)
        self.counts = dict(kept)

    def expire(self, now: float) -> None:
        """Remove a tally of long ago from disk."""
        if self.until and now - self.until > PERIOD:
            self.counts, self.since, self.until, self.dropped, self.full = {}, 0.0, 0.0, 0, Full()
            self._path.unlink(missing_ok=True)

    def forget(self, address: Address) -> None:
        """Take a source for one that was never seen, soon: any thread may ask for it, and waits for nothing."""
        self._forgotten.put(address)

    def drop_forgotten(self) -> bool:
        """Drop those that are to be forgotten; return whether there were any."""
        gone = set()
        while not self._forgotten.empty():
            gone.add(self._forgotten.get().packed)
        before = len(self.counts)
        if gone:
            self.counts = {key: one for key, one in self.counts.items() if key[:-4] not in gone}
        return len(self.counts) < before


class Observer:
    """A thread of the agent: with ``enforce: false``, takes over who would be refused."""

    def __init__(self, settings: Callable[[], Settings], familiar: Familiar):
        self._settings, self._familiar = settings, familiar
        self._kernel = netlink.Kernel()
        self._next_save = 0.0
        self.tally = Tally()
        failing = "who would be refused is not known"
        self._worker = Worker("observer", failing, self._look, self._pause, self._save)

    def start(self) -> None:
        """Start the thread."""
        self._worker.start()

    def stop(self) -> None:
        """End the thread; what it knows is on disk then."""
        self._worker.stop()

    def _pause(self) -> float:
        return max(LOOK, REST * self._worker.took)

    def _look(self) -> None:
        settings, now = self._settings(), time.time()
        if self.tally.drop_forgotten():
            self._save()
        self.tally.expire(now)
        if settings["enforce"] or not self._kernel.has(SET):
            return
        levels = self.tally.look(self._kernel, now)
        self.tally.tidy(levels, settings, self._familiar, _empty, now)
        if time.monotonic() >= self._next_save:
            self._save()
            self._next_save = time.monotonic() + SAVE

    def _save(self) -> None:
        if self.tally.until:
            self.tally.save()


def _empty(name: str) -> None:
    nft.run(f"flush set {nft.TABLE} {name}\n")


def _time(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{text!r:.40} is no time")
    return found


def address_of(key: bytes) -> Address:
    """Return the source of a key."""
    return ipaddress.IPv4Address(key[:-4]) if len(key) == KEY["ipv4"] else ipaddress.IPv6Address(key[:-4])


def port_of(key: bytes) -> int:
    """Return the port of a key."""
    return int.from_bytes(key[-4:-2], "big")


def last_logins(familiar: Familiar, keys: Iterable[bytes], prefix: int) -> dict[bytes, float]:
    """Return when somebody has last logged in from some sources, those of keys: source's bytes -> Unix time."""
    sources: dict[int, set[bytes]] = {}
    for key in keys:
        sources.setdefault(len(key), set()).add(key[:-4])
    found: dict[bytes, float] = {}
    for listed in sources.values():
        family = "ipv4" if len(next(iter(listed))) == 4 else "ipv6"
        length = 32 if family == "ipv4" else prefix
        for known, address in familiar.among(listed, family, length):
            source = elements.prefix_base(address, length).packed
            found[source] = max(found.get(source, 0.0), familiar.last(known))
    return found


class Seen(NamedTuple):
    """A source that would have been refused on a port; when somebody last logged in from there, 0 for never; who."""

    network: Network
    port: int
    tries: Count
    login: float
    users: tuple[str, ...]


def seen(tally: Tally, wanted: Wanted, familiar: Familiar, pairs: Iterable[Pair], settings: Settings) -> list[Seen]:
    """Return who would have been refused: first those who have logged in, then those who have tried the most.

    ``pairs``: who has logged in from where.
    """
    logins = last_logins(familiar, tally.counts, settings["autoban"]["ipv6_prefix"])
    whose, within = _whose(pairs, settings), [Spans(networks) for networks in wanted.networks]
    found = []
    for key, count in tally.counts.items():
        address, port = address_of(key), port_of(key)
        network = elements.source_network(address, settings)
        if (wanted.ports is None or port in wanted.ports) and all(spans.overlap(network) for spans in within):
            users = tuple(sorted(whose.get(_coarse(address, settings), ())))
            found.append(Seen(network, port, count, logins.get(key[:-4], 0.0), users))
    return sorted(found, key=lambda one: (not (one.login or one.users), -one.tries.times, -one.tries.last))


def _whose(pairs: Iterable[Pair], settings: Settings) -> dict[Address, set[str]]:
    found: dict[Address, set[str]] = {}
    for address, user in pairs:
        found.setdefault(_coarse(address, settings), set()).add(user)
    return found


def _coarse(address: Address, settings: Settings) -> Address:
    """Return what both a source and a trusted address in it lie in."""
    return elements.prefix_base(address, min(settings["autoban"]["ipv6_prefix"], settings["trusted"]["ipv6_prefix"]))


def by_service(found: Iterable[Seen], settings: Settings) -> dict[str, dict[str, Any]]:
    """Return for each service of how many sources how many tries would have been refused; of those who log in, too."""
    names = {service["port"]: service for service in settings["services"]}
    said: dict[str, dict[str, Any]] = {}
    for one in found:
        service = names.get(one.port, {"name": str(one.port), "role": ""})
        empty = {"role": service["role"], "sources": 0, "times": 0, "logged in": 0}
        row = said.setdefault(service["name"], empty)
        row["sources"] += 1
        row["times"] += one.tries.times
        row["logged in"] += bool(one.login or one.users)
    return said


def trust(one: Seen, kernel: netlink.Kernel, settings: Settings) -> Optional[str]:
    """Return for how long a source is trusted on its port now, empty when it is not. Raises OSError.

    None where trust is for less than the whole source, over IPv6: who tried may be trusted, and others of it not.
    """
    address = elements.trusted_key(one.network.network_address, settings)
    if one.network.prefixlen < elements.trusted_network(address, settings).prefixlen:
        return None
    found = kernel.element(f"trusted_{elements.family(address)}", netlink.key(address, one.port))
    if found is None:
        return ""
    return "forever" if found.left is None else parse.duration_text(found.left)


def missing(tally: Tally, now: float) -> list[str]:
    """Return what keeps a tally from being all that would have been refused."""
    found = []
    if tally.full.looks:
        between = f"first {overview.ago(tally.full.first, now)} ago, last {overview.ago(tally.full.last, now)} ago"
        found.append(
            f"a set was full at {tally.full.looks} looks of the agent, {between}: who was new then may be missing"
        )
    if tally.dropped:
        times = f"{tally.dropped} times a source and port was dropped for want of room"
        found.append(f"{times}, those first that had not logged in and tried the least")
    return found


def said(one: Seen, trusted: Optional[str], now: float, settings: Settings) -> dict[str, Any]:
    """Return a row as people read it. ``trusted``: for how long the source is now, None where that is not known."""
    names = {service["port"]: service["name"] for service in settings["services"]}
    return {
        "address": elements.text(one.network),
        "service": names.get(one.port, str(one.port)),
        "times": one.tries.times,
        "first": f"{overview.ago(one.tries.first, now)} ago" if one.tries.first else None,
        "last": f"{overview.ago(one.tries.last, now)} ago",
        "logged in": f"{overview.ago(one.login, now)} ago" if one.login else None,
        "users": list(one.users[:MOST_USERS]),
        "trusted": trusted,
    }
