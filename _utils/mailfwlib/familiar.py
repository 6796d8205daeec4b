"""Familiar addresses: those that have logged in within 30 days, and which of them are refused now.

That one is refused means, more often than anything else, that somebody who belongs here is shut out.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mailfwlib import breakglass, elements, netlink, parse, rules
from mailfwlib.journal import DIRECTORY, Journal
from mailfwlib.parse import Address
from mailfwlib.settings import FAMILIES, Settings

#: Seconds for which a login is remembered.
PERIOD = 30 * 86400.0
#: An IPv6 address is familiar with its /64: privacy addresses change inside it.
PREFIX = {"ipv4": 32, "ipv6": 64}
#: Addresses that are remembered; beyond that the one whose last login is the oldest is forgotten.
MOST = 200_000
#: A login within so many seconds of the one that is remembered is no news.
NEWS = 3600.0
#: With ``enforce: false``: who was last seen within so many seconds is one who would be refused now.
RECENT = 300.0
#: How long an element of the sets ``observed`` lives since it was last seen.
OBSERVED = 7 * 86400.0

REASONS = ("banned", "blocked", "untrusted")


class Refusal(NamedTuple):
    """A familiar address that is refused, why (:data:`REASONS`), and where: a role, a service or ``everywhere``."""

    address: Address
    reason: str
    where: str


class Familiar:
    """Who has logged in within 30 days. Logins are noted in one thread, and kept on disk by another one."""

    def __init__(self, path: Path = DIRECTORY / "familiar"):
        self._journal = Journal(path, 2 * MOST, parse.address)
        self._lock = threading.Lock()
        #: Address -> Unix time of its last login; the last noted is the last.
        self._seen = dict(sorted(self._journal.load().items(), key=lambda one: one[1]))
        self._news: dict[Address, float] = {}
        self._forgotten = False
        self._drop_old()

    def note(self, address: Address, at: float) -> None:
        """Remember a login. Waits for no disk."""
        known = _known(address)
        with self._lock:
            if at - self._seen.get(known, 0.0) < NEWS:
                return
            self._seen.pop(known, None)
            self._seen[known] = self._news[known] = at

    def forget(self, address: Address) -> None:
        """Take an address for one that never logged in."""
        known = _known(address)
        with self._lock:
            self._news.pop(known, None)
            self._forgotten = self._seen.pop(known, None) is not None or self._forgotten

    def save(self) -> None:
        """Put on disk what was noted since the last time."""
        with self._lock:
            self._drop_old()
            news, self._news = self._news, {}
            forgotten, self._forgotten = self._forgotten, False
        if forgotten:
            self._journal.replace(self._copy())
            return
        for address, at in news.items():
            self._journal.append(address, at, self._copy)

    def last(self, address: Address) -> float:
        """Return the Unix time of the last login of an address that is familiar."""
        return self._seen.get(address, 0.0)

    def __len__(self) -> int:
        return len(self._seen)

    def among(self, keys: Iterable[bytes], family: str, prefix: int) -> Iterator[tuple[Address, Address]]:
        """Yield the familiar addresses that some elements are about, and for each the address that was looked at.

        ``keys``: the elements' addresses (see netlink.key), which stand for their prefixes of length ``prefix``. The
        second address is the element's own where it tells more than the one that is remembered.
        """
        if prefix < PREFIX[family]:
            yield from self._inside(keys, prefix)
            return
        for key in keys:
            address = ipaddress.ip_address(key)
            known = _known(address)
            if known in self._seen:
                yield known, address

    def _inside(self, keys: Iterable[bytes], prefix: int) -> Iterator[tuple[Address, Address]]:
        wanted = set(keys)
        bits = 8 * len(next(iter(wanted), b""))
        networks = {int.from_bytes(key, "big") >> (bits - prefix) for key in wanted}
        for address in self._copy() if networks else ():
            if address.max_prefixlen == bits and int(address) >> (bits - prefix) in networks:
                yield address, address

    def _copy(self) -> dict[Address, float]:
        with self._lock:
            return dict(self._seen)

    def _drop_old(self) -> None:
        oldest = time.time() - PERIOD
        while self._seen and (len(self._seen) > MOST or next(iter(self._seen.values())) < oldest):
            del self._seen[next(iter(self._seen))]


def _known(address: Address) -> Address:
    return address if address.version == 4 else ipaddress.IPv6Address(address.packed[:8] + bytes(8))


def refused(kernel: netlink.Kernel, familiar: Familiar, settings: Settings, now: float) -> set[Refusal]:
    """Return the familiar addresses that the rules refuse now; with ``enforce: false``, those that they would.

    Lists the sets of banned, blocked and waiting sources: for a timer. Raises OSError when no rules are loaded.
    """
    if breakglass.opening(now, kernel):
        return set()
    # The lists are read to their ends first: the kernel answers one question at a time.
    candidates = [one for family in FAMILIES for one in _candidates(kernel, familiar, settings, family)]
    return {refusal for refusal, address, ports in candidates if not _let_in(kernel, address, ports, settings)}


def _candidates(kernel: netlink.Kernel, familiar: Familiar, settings: Settings, family: str) -> Iterator[Any]:
    """Yield what a set says: the refusal, the address it is about, and the ports where trust would win over it."""
    prefix = settings["autoban"]["ipv6_prefix"] if family == "ipv6" else 32
    listed = (key for key, _ in kernel.keys(f"blocked_{family}"))
    for known, address in familiar.among(listed, family, prefix):
        yield Refusal(known, "blocked", "everywhere"), address, []
    for role, ports in _ports(settings, "limited").items():
        for name, length in _bans(settings, role, family, prefix):
            listed = (key for key, _ in kernel.keys(name))
            for known, address in familiar.among(listed, family, length):
                yield Refusal(known, "banned", role), address, ports
    tried: dict[int, list[bytes]] = {}
    for key in _untrusted(kernel, settings, family):
        tried.setdefault(int.from_bytes(key[-4:-2], "big"), []).append(key[:-4])
    for service in settings["services"]:
        if _access(service) == "trusted only":
            for known, address in familiar.among(tried.get(service["port"], []), family, prefix):
                yield Refusal(known, "untrusted", service["name"]), address, [service["port"]]


def _access(service: dict[str, Any]) -> str:
    return rules.access(service["role"], service["mode"]) if service["login"] else ""


def _ports(settings: Settings, access: str) -> dict[str, list[int]]:
    """Return the ports that are treated in a way: role -> ports."""
    found: dict[str, list[int]] = {}
    for service in settings["services"]:
        if _access(service) == access:
            found.setdefault(service["role"], []).append(service["port"])
    return found


def _bans(settings: Settings, role: str, family: str, prefix: int) -> list[tuple[str, int]]:
    """Return the sets of a role's bans, and the length of the prefixes in them."""
    networks = settings["autoban"]["networks"]
    more = [(f"banned_networks_{role}_{family}", networks[f"{family}_prefix"])] if networks else []
    return [(f"banned_{role}_{family}", prefix), *more]


def _untrusted(kernel: netlink.Kernel, settings: Settings, family: str) -> Iterator[bytes]:
    """Yield the sources, and the ports, that are refused without trust: an element lives for a minute after a try."""
    if settings["enforce"]:
        yield from (key for key, _ in kernel.keys(f"waiting_{family}"))
        return
    for key, left in kernel.keys(f"observed_{family}"):
        if left is None or left > OBSERVED - RECENT:
            yield key


def _let_in(kernel: netlink.Kernel, address: Address, ports: list[int], settings: Settings) -> bool:
    """Return whether a candidate is let in all the same: by a network of the pillar, or by its trust on some ports."""
    family = elements.family(address)
    if elements.in_networks(address, settings["trusted"][f"networks_{family}"]):
        return True
    trusted = elements.trusted_key(address, settings)
    return bool(ports) and all(kernel.element(f"trusted_{family}", netlink.key(trusted, port)) for port in ports)


class Watch:
    """What is made of refusals: who is refused for more than a moment, how often that began, what to log."""

    def __init__(self, familiar: Familiar):
        self._familiar = familiar
        self._before: set[Refusal] = set()
        self._logged: dict[Address, float] = {}
        #: Those that were refused at the last two looks: a client whose login is still under way is none of them.
        self.now: set[Refusal] = set()
        #: How often that began: reason -> times.
        self.times = dict.fromkeys(REASONS, 0)

    def look(self, found: set[Refusal], enforcing: bool, now: float) -> list[str]:
        """Take in who is refused at this look; return what to log, a sentence for each address and day."""
        lasting = found & self._before
        began = {(one.address, one.reason) for one in lasting} - {(one.address, one.reason) for one in self.now}
        for _, reason in began:
            self.times[reason] += 1
        self._before, self.now = found, lasting
        self._logged = {address: at for address, at in self._logged.items() if now - at < 86400}
        sentences = []
        for one in sorted(lasting, key=str):
            if one.address not in self._logged:
                self._logged[one.address] = now
                sentences.append(self._sentence(one, enforcing, now))
        return sentences

    def _sentence(self, one: Refusal, enforcing: bool, now: float) -> str:
        days = (now - self._familiar.last(one.address)) / 86400
        verb = "is" if enforcing else "would be"
        return (
            f"familiar address {one.address} {verb} refused: {one.reason}, {one.where}; logged in {days:.1f} days ago"
        )

    def addresses(self, reason: str) -> set[Address]:
        """Return who is refused for a reason."""
        return {one.address for one in self.now if one.reason == reason}
