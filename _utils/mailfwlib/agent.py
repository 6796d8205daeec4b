"""The host's agent: makes the address of a login trusted at once, here and on the other mail hosts.

A small daemon without Salt. It answers requests on a Unix socket one after the other, since each costs a fraction
of a millisecond, and only ever adds elements there. Telling the fleet is :mod:`mailfwlib.announcer`'s, in a
thread of its own.

Requests are packets of fields with NUL between them; replies are ``ok`` or ``error`` and a text:

==================================  ===========  =====================================================
request                             who may      what it does
==================================  ===========  =====================================================
``login`` address user              Dovecot      trusts the address for the period, and announces it
``receive`` message                 root         trusts the addresses that a signed message announces
``remember`` addresses ports        root         never shortens a trust that an operator has given, until when (Unix
until note                                       time), and with which comment
``forget`` addresses [ports]        root         takes addresses for ones that never logged in, and
                                                 forgets what operators gave on ports, or on all
``overlook`` addresses              root         takes sources for ones that were never observed
``revoke`` user                     root         ends what only that user's logins have earned, as JSON
``places`` user                     root         says where that user has logged in from, and why logins there have
                                                 earned no trust, as JSON
``again`` since                     root         trusts again who has logged in since then (Unix time)
``renew`` address user...           root         renews the trust of addresses where users are still logged in
``seed`` address user...            root         trusts addresses where users are logged in, as their logins would
``believe`` address time...         root         trusts addresses of logins at some time (Unix time), as these did
``save``                            root         has a snapshot taken soon
``status``                          root         reports as JSON
==================================  ===========  =====================================================
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pwd
import queue
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

from mailfwlib import __version__, audit, client, elements, messages, netlink, nft, parse, people, ruleset
from mailfwlib.announcer import Announcer
from mailfwlib.bans import Ban, Bans, banned_from
from mailfwlib.journal import DIRECTORY, Journal
from mailfwlib.keeper import Keeper
from mailfwlib.monitor import Monitor
from mailfwlib.observed import Observer
from mailfwlib.parse import Address
from mailfwlib.people import DAY, People, is_renewed
from mailfwlib.reports import Reports
from mailfwlib.sessions import LastLogins, Sessions
from mailfwlib.settings import FAMILIES, ROLES, Settings, login_ports

SETTINGS = Path("/etc/mailfw/settings.json")
#: A client that has connected and says nothing is dropped after this many seconds.
PATIENCE = 2.0
#: Clients that may be connected at once; the kernel's queue holds the others.
MOST_CLIENTS = 512
#: Addresses whose last login is remembered.
MOST_LOGINS = 200_000
#: Deadlines that differ by less are the same: the kernel keeps and lists whole seconds.
WHOLE_SECONDS = 2.0
#: A login waits so many seconds for an applier that replaces the sets; the hook waits for 250 ms in all.
WAIT = 0.15
#: Addresses of a user that are told.
MOST_PLACES = 100
#: Addresses that one request revokes.
MOST_REVOKED = 500
#: Users of whom it is remembered that an event has told of their roaming.
MOST_ROAMING = 10_000
#: A login of the fleet that is heard of so many seconds later is a late one.
LATE = 30.0
#: Seconds until it is tried again to trust who has logged in since rules were loaded.
RETRY = 1.0
#: Seconds before its new settings within which the rules may have changed to another prefix.
SETTINGS_FOLLOW = 60.0
#: The same complaint is logged once in this many seconds.
QUIET = 60.0

_ENDED = "an operator has ended its trust, and nobody has logged in since"

log = logging.getLogger("mailfw-agent")


class RefusedError(Exception):
    """A request that is not granted; the message goes to the caller."""


class Ending(NamedTuple):
    """When an address's trust on a port ends (Unix time), and its comment in the kernel: only operators leave one."""

    until: float
    note: str


#: What an operator has given where none has given anything.
NOTHING = Ending(0.0, "")


class Agent:
    """What the agent knows and does, apart from sockets."""

    def __init__(self, settings_path: Path = SETTINGS):
        self._path = settings_path
        self._stamp: tuple[int, int] | None = None
        self._nft, self._kernel = nft.Library(), netlink.Kernel()
        self._patience = WAIT
        self._seen = messages.Seen()
        self._complained: dict[str, float] = {}
        #: When the trust that logins have earned ends: address -> Unix time.
        self._earned: dict[Address, float] = {}
        #: The trusts that operators gave: a login does not shorten them, and one that outlasts such a trust takes it
        #: over, unless only operators open that port.
        self._given: dict[tuple[Address, int], Ending] = {}
        self._tidied = 0.0
        self.settings: Settings = {}
        self.counts = {"logins": 0, "renewed": 0, "announced": 0, "received": 0, "refused": 0}
        self._reports: Reports | None = None
        self.refresh_settings()
        #: By which prefix IPv6 addresses stand in all that follows.
        self._prefix = self.settings["trusted"]["ipv6_prefix"]
        #: When an operator ended a trust: the master still tells of the logins before that.
        self._ended_journal = Journal(DIRECTORY / "ended", MOST_LOGINS, self._key)
        self._ended = {
            key: at for key, at in self._ended_journal.load().items() if at > time.time() - messages.OLDEST_LOGIN
        }
        self._last_logins = LastLogins(self._ended, self._key)
        self.people = People(lambda: self.settings)
        #: When an event has told that a user logs in from more addresses than are trusted: user's key -> Unix time.
        self._roaming: dict[str, float] = {}
        self.announcer = Announcer(lambda: self.settings)
        #: Since when elements may be missing; addresses whose trust could not be put into the kernel's sets; when it is
        #: tried again to put them there.
        self._missing_since, self._waiting, self._renew_at = math.inf, set[Address](), 0.0
        #: What the keeper has told: since when elements may be missing, and what was altered, None if it was no repair.
        self._renewals: queue.SimpleQueue[tuple[float, list[str] | None]] = queue.SimpleQueue()
        self.keeper = Keeper(lambda since, altered: self._renewals.put((since, altered)))
        self.sessions = Sessions(lambda: self.settings, _still_logged_in)
        self.bans = Bans(self._banned)
        self.monitor = Monitor(lambda: self.settings, self.status, self.announcer.tell)
        self.observer = Observer(lambda: self.settings, self.monitor.familiar)
        self._recall()

    def _recall(self) -> None:
        """Learn from the kernel's sets who is trusted, once: at the start, or as soon as there are some."""
        kernel, now = netlink.Kernel(), time.time()
        self._has_recalled = kernel.table() is not None and ruleset.is_ours()
        for family in FAMILIES:
            found: dict[str, list[tuple[int, Ending]]] = {}
            try:
                for one in kernel.elements(f"trusted_{family}"):
                    address, _, port = one.value.partition(" . ")
                    left = parse.LONGEST if one.left is None else one.left
                    note = one.note if not one.note or audit.is_note(one.note) else "an operator"
                    found.setdefault(address, []).append((int(port), Ending(now + left, note)))
            except OSError as err:
                log.warning("trusted_%s cannot be read: %s", family, err)
            for address, ports in found.items():
                self._note(self._key(address), ports)

    def _key(self, text: str) -> Address:
        """Return the address under which one that was written somewhere is trusted; pillar may have changed since."""
        return elements.trusted_key(parse.address(text), self.settings)

    def _note(self, key: Address, ports: list[tuple[int, Ending]]) -> None:
        for port, ending in ports:
            if ending.note:
                self._given[key, port] = ending
            else:
                self._remember(key, max(ending.until, self._earned.get(key, 0.0)))

    def refresh_settings(self) -> None:
        """Read the settings file again if it was replaced; keep the old settings if it cannot be read."""
        try:
            found = self._path.stat()
            stamp = (found.st_mtime_ns, found.st_ino)
            if stamp != self._stamp:
                fresh = json.loads(self._path.read_text(encoding="utf-8"))
                log.info("settings read: mode %s", fresh["protection"]["type"])
                self.settings, self._stamp = fresh, stamp
        except (OSError, ValueError, KeyError, TypeError) as err:
            if not self.settings:
                raise
            self._complain("settings", f"{self._path}: {err}; going on with the settings from before")

    def handle(self, request: bytes, uid: int) -> str:
        """Carry out one request of a user; return the reply's text. Raises RefusedError."""
        self.refresh_settings()
        verb, *arguments = request.decode("utf-8", "replace").split("\0")
        root = uid == 0
        if verb == "login" and (root or uid in _login_uids(self.settings)) and len(arguments) == 2:
            return self._login(*arguments)
        if verb == "receive" and root and len(arguments) == 1:
            return str(self._receive(arguments[0]))
        if verb == "remember" and root and len(arguments) == 4 and audit.is_note(arguments[3]):
            for key in map(parse.address, arguments[0].split(",")):
                for port in arguments[1].split(","):
                    self._given[key, int(port)] = Ending(float(arguments[2]), arguments[3])
            return ""
        if verb == "forget" and root and 1 <= len(arguments) <= 2:
            ports = set(map(int, arguments[1].split(","))) if len(arguments) == 2 else None
            for key in map(parse.address, arguments[0].split(",")):
                self._forget(key, ports)
            return ""
        if verb == "overlook" and root and len(arguments) == 1:
            for key in map(parse.address, arguments[0].split(",")):
                self.observer.tally.forget(key)
            return ""
        if verb == "revoke" and root and len(arguments) == 1:
            return self._revoke(arguments[0])
        if verb == "places" and root and len(arguments) == 1:
            return self._places(arguments[0])
        if verb == "again" and root and len(arguments) == 1:
            self._trust_again(float(arguments[0]))
            return ""
        if verb == "save" and root and not arguments:
            self.keeper.save_soon()
            return ""
        if verb == "renew" and root and len(arguments) % 2 == 0:
            return str(self._renew(zip(arguments[::2], arguments[1::2])))
        if verb == "seed" and root and len(arguments) % 2 == 0:
            return json.dumps(list(self._seed(zip(arguments[::2], arguments[1::2]))))
        if verb == "believe" and root and len(arguments) % 2 == 0:
            return json.dumps(list(self._seed_earlier(zip(arguments[::2], map(float, arguments[1::2])))))
        if verb == "status" and root and not arguments:
            return json.dumps(self.status())
        self._complain(f"request {uid}", f"uid {uid} asked for {verb!r:.40}, which is not for it or not known")
        raise RefusedError(f"{verb!r:.40}: not allowed, or not known")

    def _login(self, address_text: str, user: str) -> str:
        try:
            address = parse.address(address_text)
        except ValueError as err:
            raise RefusedError(f"{address_text!r:.60}: {err}") from err
        now = time.time()
        if reason := self._earn(address, user, now, "login"):
            self.people.refuse(user, elements.trusted_key(address, self.settings), now, reason)
            return f"{address} is not trusted: {reason}"
        self.counts["logins"] += 1
        self._last_logins.note(elements.trusted_key(address, self.settings), now)
        return f"{address} is trusted"

    def _earn(self, address: Address, user: str, now: float, by: str) -> str:
        """Trust an address where a user is logged in, and tell of it if it is news. Return why not, if it is not.

        Raises RefusedError.
        """
        reason = elements.never_trusted(address, self.settings)
        if not reason:
            self.monitor.familiar.note(address, now)
        until = now + self.settings["trusted"]["period"]
        endings = {} if reason else self._endings(address, until)
        if not endings:
            return reason or elements.NOT_ADMITTED
        key, who = elements.trusted_key(address, self.settings), self.people.key(user)
        if who and self._is_too_much(user, who, key, now):
            return "mailfw:trusted:per_user: this user has enough addresses for today"
        news = self._is_news(key, who, now)
        self._trust(address, endings, until, by)
        self.people.note(who, key, now)
        if news:
            self.announcer.announce(key, now, who)
            self._record_trust(address, list(endings), until, by)
            self.counts["announced"] += 1
        return ""

    def _is_news(self, key: Address, who: str, now: float) -> bool:
        """Return whether that somebody is logged in somewhere is new, or new in this tenth of a period."""
        period = self.settings["trusted"]["period"]
        earned = self._earned.get(key, 0.0)
        known = self.people.last(who, key) if who else earned - period
        if known <= self._ended.get(key, 0.0) or is_renewed((key, who), known, now, period):
            return True
        return bool(now + period - earned >= period / 10)

    def _renew(self, logged_in: Iterable[tuple[str, str]]) -> int:
        """Trust again who has lately logged in on this host and still is; return how many that was news for."""
        now, renewed = time.time(), 0
        for text, user in logged_in:
            address = parse.address(text)
            key = elements.trusted_key(address, self.settings)
            if self._last_logins.count(key) and self._is_news(key, self.people.key(user), now):
                with contextlib.suppress(RefusedError):
                    renewed += not self._earn(address, user, now, "session")
        self.counts["renewed"] += renewed
        return renewed

    def _seed(self, logged_in: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Trust addresses where users are logged in now. Yield those that this was news for, and why not, if not."""
        for text, user in logged_in:
            address, now = parse.address(text), time.time()
            key = elements.trusted_key(address, self.settings)
            if key in self._ended and self._earned.get(key, 0.0) <= now:
                yield text, _ENDED
                continue
            news = self._is_news(key, self.people.key(user), now)
            try:  # Even if it is none: pillar may have got services since the login, which are not opened yet.
                reason = self._earn(address, user, now, "seed")
            except RefusedError as err:
                reason = str(err)
            if not reason:
                self._last_logins.note(key, now)
            if news or reason:
                yield text, reason

    def _seed_earlier(self, logins: Iterable[tuple[str, float]]) -> Iterator[tuple[str, str]]:
        """Trust addresses of earlier logins for what is left of a period. Yield the same."""
        for text, at in logins:
            address, now = parse.address(text), time.time()
            key = elements.trusted_key(address, self.settings)
            known = self._earned.get(key, 0.0)
            until = max(known, at + self.settings["trusted"]["period"])
            endings, reason = self._endings(address, until), elements.never_trusted(address, self.settings)
            if reason or not endings:
                yield text, reason or elements.NOT_ADMITTED
            elif known <= now and at <= self._ended.get(key, 0.0):
                yield text, _ENDED
            elif until > now + 1:
                try:
                    self._trust(address, endings, until, "seed")
                except RefusedError as err:
                    yield text, str(err)
                    continue
                if until > known + WHOLE_SECONDS:
                    self._record_trust(address, list(endings), until, "seed")
                    yield text, ""

    def _record_trust(self, address: Address, ports: list[int], until: float, by: str) -> None:
        """Put a trust that is new, or has lost a tenth of its period, into the journal."""
        network = elements.trusted_network(address, self.settings)
        audit.record("trust", elements.text(network), by, ports, until)

    def _banned(self, ban: Ban) -> None:
        """Put a ban that the rules have made into the journal, and tell of it. Called in another thread."""
        address, settings = parse.address(ban.address), self.settings
        network = elements.source_network(address, settings)
        if ban.of == "network" and settings["autoban"]["networks"]:
            network = elements.counted_network(address, settings)
        name = elements.text(network)
        audit.record("ban", name, "rate", [ban.role], ban.until)
        found = {"host": settings["host"]["id"], "role": ban.role, "address": name, "until": round(ban.until)}
        self.announcer.tell("mailfw/ban", found)

    def _is_too_much(self, user: str, who: str, key: Address, now: float) -> bool:
        """Return whether a user comes from one new address too many, and say so."""
        if any(self.people.last(one, key) for one in self.people.keys(user)):
            return False
        count = sum(at > now - DAY for at in self.people.places(user).values())
        if count < self.settings["trusted"].get("per_user", 50):
            return False
        self._complain(
            f"roaming {who}", f"{key} is not trusted: user {who} has logged in from {count} others within a day"
        )
        if now - self._roaming.get(who, 0.0) >= DAY:
            self._roaming.pop(who, None)
            self._roaming[who] = now
            if len(self._roaming) > MOST_ROAMING:
                del self._roaming[next(iter(self._roaming))]
            found = {"host": self.settings["host"]["id"], "user": who, "addresses": count}
            self.announcer.tell("mailfw/roaming", found)
        return True

    def _endings(self, address: Address, until: float) -> dict[int, Ending]:
        """Return the ports that a login opens until then, and those where it renews what an operator has opened."""
        key, now = elements.trusted_key(address, self.settings), time.time()
        opened = elements.ports_for_login(address, self.settings)
        found = {}
        for port in login_ports(self.settings):
            given = self._given.get((key, port), NOTHING)
            if port in opened:
                found[port] = max(Ending(until, ""), given)
            elif given.until > now:
                found[port] = max(Ending(until, given.note), given)
        return found

    def _trust(self, address: Address, endings: dict[int, Ending], until: float, by: str) -> None:
        """Put a login's trust into the kernel's sets, or as soon as there are rules again. Raises RefusedError."""
        key = elements.trusted_key(address, self.settings)
        try:
            self._put(address, endings, by)
        except nft.NftError as err:
            if err.full:  # A login lifts its source's bans, even if there is no room left for its trust.
                unban = elements.unban(address, ROLES, self.settings, self._kernel.holds)
                self._lift_bans(address, unban, by)
                raise RefusedError(f"{address} cannot be trusted: {err}") from err
            if len(self._waiting) < MOST_LOGINS:
                self._waiting.add(key)
        self._remember(key, until)
        for port, ending in endings.items():
            self._given.pop((key, port), None)
            if ending.note:
                self._given[key, port] = ending

    def _put(self, address: Address, endings: dict[int, Ending], by: str) -> None:
        """Put an address into the kernel's sets. Raises NftError."""
        try:
            with ruleset.adding(self._patience) as in_turn:
                self._lift_bans(address, self._script(address, endings), by)
        except nft.NftError as err:
            self._complain("nft", f"{address} cannot be trusted now: {err}")
            raise
        self._patience = WAIT if in_turn else 0.0  # One login waits for a slow applier, not each.

    def _lift_bans(self, address: Address, script: str, by: str) -> None:
        """Run a script that lifts a source's rate bans; put those that there were into the journal. Raises NftError."""
        banned: list[str] = []
        with contextlib.suppress(OSError):  # No login is lost for want of a line in the journal.
            banned = banned_from(address, self.settings, self._kernel)
        self._nft.run(script)
        if banned:
            audit.record("unban", elements.text(elements.source_network(address, self.settings)), by, banned)

    def _script(self, address: Address, endings: dict[int, Ending]) -> str:
        """Return the script that trusts an address; a trust of an operator keeps its comment."""
        now = time.time()
        seconds: dict[str, dict[int, int]] = {}
        for port, (until, note) in endings.items():
            seconds.setdefault(note, {})[port] = max(1, round(until - now))
        has = self._kernel.holds
        return "".join(elements.trust(address, left, self.settings, note, has) for note, left in seconds.items())

    def _remember(self, key: Address, until: float) -> None:
        self._earned.pop(key, None)
        self._earned[key] = until
        if len(self._earned) > MOST_LOGINS:
            del self._earned[next(iter(self._earned))]

    def now_and_then(self) -> None:
        """Do what no request asks for."""
        self.refresh_settings()
        if is_outdated := self.settings["trusted"]["ipv6_prefix"] != self._prefix:
            log.info("mailfw:trusted:ipv6_prefix has changed: starting again")
            self._prefix = self.settings["trusted"]["ipv6_prefix"]
            self._missing_since = min(self._missing_since, time.time() - SETTINGS_FOLLOW)
        self._listen_for_reports()
        self._after_renewals()
        self.people.tidy(time.time())
        self._tidy(time.time())
        if is_outdated:
            signal.raise_signal(signal.SIGTERM)

    def _tidy(self, now: float) -> None:
        """Forget trusts of operators that are over."""
        if now - self._tidied >= people.TIDY:
            self._tidied = now
            self._given = {one: ending for one, ending in self._given.items() if ending.until > now}

    def _listen_for_reports(self) -> None:
        """Have reports taken on the port of the settings, and on no other."""
        wanted = self.settings.get("reports") or {}
        if self._reports and self._reports.port != wanted.get("port"):
            self._reports.stop()
            self._reports = None
        if wanted and not self._reports:
            try:
                self._reports = Reports(wanted["port"], self._report_secret, _report)
            except OSError as err:
                self._complain("reports", f"port {wanted['port']} of loopback, where Dovecot reports logins: {err}")

    def _report_secret(self) -> str:
        return str(self.settings["host"].get("report_secret", ""))

    def _after_renewals(self) -> None:
        """Trust again who has logged in since the snapshot that rules were loaded with, and tell of repairs."""
        while not self._renewals.empty():
            since, altered = self._renewals.get()
            self._missing_since = min(since, self._missing_since)
            if altered is not None:
                self.announcer.tell("mailfw/healed", {"host": self.settings["host"]["id"], "altered": altered})
        is_renewed = self._missing_since < math.inf
        if not (is_renewed or self._waiting) or time.monotonic() < self._renew_at or not ruleset.LOADED.exists():
            return
        try:
            if is_renewed:
                self._trust_again(self._missing_since)
            self._trust_waiting()
            if not self._has_recalled:  # There was no table when this agent has started, or one that lacked elements.
                self._recall()
        except (nft.NftError, OSError) as err:
            self._renew_at = time.monotonic() + RETRY  # Somebody has taken the rules away again.
            self._complain("renewals", f"logins since the last snapshot wait to be trusted again: {err}")
            return
        self._missing_since = math.inf
        if self._renewals.empty():
            self.keeper.is_whole.set()

    def _trust_again(self, since: float) -> None:
        """Raises NftError, but not if it is that a set is full."""
        now, period = time.time(), self.settings["trusted"]["period"]
        for key, until in list(self._earned.items()):
            if until > now and until - period >= since - 1:
                with _unless_full():
                    self._put(key, self._endings(key, until), "login")
                self._waiting.discard(key)
        for key in [key for key, at in self._ended.items() if at >= since - 1 and key not in self._earned]:
            with _unless_full():
                self._nft.run(elements.untrust(key, login_ports(self.settings), self.settings, self._kernel.holds))
        for (key, port), given in list(self._given.items()):
            if given.until > now:
                with _unless_full():
                    self._nft.run(self._script(key, {port: given}))

    def _trust_waiting(self) -> None:
        """Trust whom logins have earned trust while there were no rules. Raises NftError as above."""
        for key in list(self._waiting):
            if (until := self._earned.get(key, 0.0)) > time.time():
                with _unless_full():
                    self._put(key, self._endings(key, until), "login")
            self._waiting.discard(key)

    def _forget(self, key: Address, ports: set[int] | None) -> None:
        """Have logins until now count no more, nor what operators have given on some ports, None for all of them."""
        self._end(key)
        for port in [port for address, port in self._given if address == key and (ports is None or port in ports)]:
            del self._given[key, port]

    def _end(self, key: Address) -> None:
        """Have what logins have earned for an address until now count no more."""
        self.monitor.familiar.forget(key)
        self._earned.pop(key, None)
        self._last_logins.forget(key)
        self._ended[key] = time.time()
        if len(self._ended) > MOST_LOGINS:
            del self._ended[next(iter(self._ended))]
        self._ended_journal.append(key, self._ended[key], lambda: self._ended)

    def _places(self, user: str) -> str:
        """Return from where a user has logged in lately and when, the last first, as JSON. Raises RefusedError.

        ``refused``: where logins have earned no trust, when the last one was, and why.
        """
        _check_name(user)
        newest = sorted(self.people.places(user).items(), key=lambda place: -place[1])
        refused = {str(address): one for address, one in self.people.refusals(user).items()}
        return json.dumps({"trusted": {str(address): at for address, at in newest[:MOST_PLACES]}, "refused": refused})

    def _revoke(self, user: str) -> str:
        """End what only this user's logins have earned, at the first so many addresses; ``more``: others are left."""
        _check_name(user)
        now, places = time.time(), self.people.places(user)
        some = list(places)[:MOST_REVOKED]
        given: dict[Address, set[int]] = {}
        for (key, port), ending in self._given.items():
            if ending.until > now:
                given.setdefault(key, set()).add(port)
        found = self._earned_by(user, some, given.keys(), now)
        ended = [*found["revoked"], *found["given"]]
        with ruleset.adding(self._patience):
            for key in ended:
                ports = [port for port in login_ports(self.settings) if port not in given.get(key, ())]
                self._nft.run(elements.untrust(key, ports, self.settings, self._kernel.holds))
                self._end(key)
        self.people.revoke(user, some, now)
        answer: dict[str, Any] = {what: list(map(str, keys)) for what, keys in found.items()}
        return json.dumps({**answer, "more": len(places) > len(some)})

    def _earned_by(
        self, user: str, places: list[Address], given: Container[Address], now: float
    ) -> dict[str, list[Address]]:
        """Return which places only this user's logins have earned, which others' have too, which an operator gave."""
        found: dict[str, list[Address]] = {"revoked": [], "shared": [], "given": []}
        since = now - self.settings["trusted"]["period"]
        others = self.people.others(user, {key: max(since, self._ended.get(key, 0.0)) for key in places})
        for key in places:
            if self._earned.get(key, 0.0) > now:
                found["shared" if key in others else "given" if key in given else "revoked"].append(key)
        return found

    def _receive(self, text: str) -> int:
        """Trust what a signed message announces; return how many addresses that was news for.

        A message that must not be believed is dropped, and said: once a minute for each sender.
        """
        try:
            message = messages.verify(text, self.settings["fleet"]["keys"])
            self._seen.remember(message, time.time())
        except messages.MessageError as err:
            self.counts["refused"] += 1
            sender = messages.claimed_sender(text)
            self._complain(f"message {sender}", f"a message of {sender}, by its own account, was dropped: {err}")
            return 0
        self.counts["received"] += 1
        if message.sender == self.settings["host"]["id"]:
            self.announcer.echoed(message.nonce)
            return 0
        return sum(self._hear_of(address, at, message.users.get(address, {})) for address, at in message.logins.items())

    def _hear_of(self, address: Address, at: float, users: dict[str, float]) -> bool:
        """Believe a login of some users on another host, except those that an operator has revoked; see _believe.

        That host has decided already that these are not too many of one user: they count here for those to come.
        """
        admitted = self.people.admitted(users)
        if len(admitted) < len(users):
            at = max(admitted.values(), default=0.0)
        news = self._believe(address, at)
        key = elements.trusted_key(address, self.settings)
        if self._earned.get(key, 0.0) > time.time() and self.people.keeps():
            for who, last in admitted.items():
                if last > self._ended.get(key, 0.0):
                    self.people.note(who, key, last)
        return news

    def _believe(self, address: Address, at: float) -> bool:
        """Trust an address that logged in on another host; return whether that was news. The later login counts."""
        until = at + self.settings["trusted"]["period"]
        key = elements.trusted_key(address, self.settings)
        known = self._earned.get(key, 0.0)
        if until <= max(known + WHOLE_SECONDS, time.time() + 1) or at <= self._ended.get(key, 0.0):
            return False
        if elements.never_trusted(address, self.settings):
            return False
        self.monitor.familiar.note(address, at)
        endings = self._endings(address, until)
        if not endings:
            return False
        try:
            self._trust(address, endings, until, "fleet")
        except RefusedError:
            return False
        if time.time() - at > LATE:  # It would pass for one that the last snapshot has.
            self.keeper.save_soon()
        if until - known >= self.settings["trusted"]["period"] / 10:
            self._record_trust(address, list(endings), until, "fleet")
        return True

    def status(self) -> dict[str, Any]:
        """Return what operators ask of the agent."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "mode": self.settings["protection"]["type"],
            "ports": login_ports(self.settings),
            "keys": [messages.fingerprint(key) for key in self.settings["fleet"]["keys"]],
            **self.counts,
            "users": len(self.people),
            **self.announcer.status(),
            **self.keeper.status(),
            **self.monitor.status(),
            "observed": len(self.observer.tally),
        }

    def _complain(self, about: str, sentence: str) -> None:
        """Log a warning, the same one at most once a minute."""
        now = time.monotonic()
        if now - self._complained.get(about, -QUIET) >= QUIET:
            if len(self._complained) > 1000:
                self._complained.clear()
            self._complained[about] = now
            log.warning("%s", sentence)


@contextlib.contextmanager
def _unless_full() -> Iterator[None]:
    """Log that a set is full, rather than raise that."""
    try:
        yield
    except nft.NftError as err:
        if not err.full:
            raise
        log.error("not every login since the last snapshot is trusted again: %s", err)


def _check_name(user: str) -> None:
    """Raise RefusedError unless this can be a user's name."""
    try:
        people.name(user)
    except ValueError as err:
        raise RefusedError(f"user: {err}") from err


def _login_uids(settings: Settings) -> list[int]:
    """Return the users that may report logins; one that does not exist yet is skipped."""
    uids = []
    for name in settings["host"]["login_users"]:
        try:
            uids.append(pwd.getpwnam(name).pw_uid)
        except KeyError:
            continue
    return uids


class Server:
    """The agent's socket: takes one request from each connection, answers it and closes."""

    def __init__(self, listener: socket.socket, handle: Callable[[bytes, int], str]):
        self._listener = listener
        self._handle = handle
        self._selector = selectors.DefaultSelector()
        self._deadlines: dict[socket.socket, float] = {}
        self._accepting = False
        self.stopping = False
        listener.setblocking(False)
        self._accept(True)

    def serve(self, between: Callable[[], None]) -> None:
        """Serve until :attr:`stopping` is set; call ``between`` every now and then."""
        while not self.stopping:
            between()
            self._step()
        # Whoever is still in the listener's queue is the next agent's.
        self._accept(False)
        while self._deadlines:
            self._step()

    def _step(self) -> None:
        ready = [key.fileobj for key, _ in self._selector.select(timeout=0.5)]
        self._drop_silent(ready)
        for one in ready:
            if one is self._listener:
                self._welcome()
            else:
                self._answer(one)

    def _accept(self, wanted: bool) -> None:
        if wanted and not self._accepting:
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif self._accepting and not wanted:
            self._selector.unregister(self._listener)
        self._accepting = wanted

    def _welcome(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        self._deadlines[connection] = time.monotonic() + PATIENCE
        self._selector.register(connection, selectors.EVENT_READ)
        self._accept(not self.stopping and len(self._deadlines) < MOST_CLIENTS)

    def _answer(self, connection: Any) -> None:
        try:
            request = connection.recv(client.LONGEST + 1)
            if request:
                connection.send(self._reply(request, _peer_uid(connection)))
        except OSError as err:
            log.debug("a client went away: %s", err)
        self._close(connection)

    def _reply(self, request: bytes, uid: int) -> bytes:
        try:
            if len(request) > client.LONGEST:
                raise RefusedError("too long")
            return b"ok\0" + self._handle(request, uid).encode()
        except RefusedError as err:
            return b"error\0" + str(err).encode("utf-8", "replace")
        except Exception:
            # One request must not end the service of all the others.
            log.exception("a request failed")
            return b"error\0internal error; see the agent's log"

    def _close(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._deadlines[connection]
        connection.close()
        self._accept(not self.stopping and len(self._deadlines) < MOST_CLIENTS)

    def _drop_silent(self, ready: Container[Any]) -> None:
        """Drop who has said nothing in time; whoever has, waits for an answer, however long others have taken."""
        now = time.monotonic()
        for connection in [one for one, deadline in self._deadlines.items() if deadline < now and one not in ready]:
            self._close(connection)


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _listener() -> socket.socket:
    """Return the socket that systemd hands over (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        raise SystemExit("mailfw-agent: expected one socket from systemd; start mailfw-agent.socket")
    return socket.socket(fileno=3)


def _report(address: str, user: str) -> None:
    """Have a login that Dovecot has reported trusted, by the same request as any other."""
    with contextlib.suppress(client.AgentError):
        client.ask("login", address, user)


def _still_logged_in(clients: list[tuple[str, str]]) -> None:
    """Have the trust of some sessions, each an address and a user, renewed in turn with logins."""
    with contextlib.suppress(client.AgentError):
        client.ask("renew", *(text for one in clients for text in one))


def _notify(state: str) -> None:
    """Tell systemd (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + path[1:] if path.startswith("@") else path)
            notify.send(state.encode())


def main() -> int:
    """Run the agent until SIGTERM; return its exit status."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    try:
        agent = Agent()
    except Exception:
        log.exception("the agent cannot start")
        time.sleep(1)  # systemd starts it again at once.
        return 1
    server = Server(_listener(), agent.handle)

    def wind_up() -> None:
        try:
            agent.observer.stop()
            agent.monitor.stop()
            agent.bans.stop()
            agent.keeper.stop()
            agent.announcer.stop()
        finally:
            server.stopping = True

    def stop(*_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        # A last snapshot takes a moment, in which logins are still answered.
        threading.Thread(target=wind_up, name="wind-up").start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    agent.announcer.start()
    agent.keeper.start()
    agent.sessions.start()
    agent.bans.start()
    agent.monitor.start()
    agent.observer.start()
    _notify("READY=1")
    log.info("mailfw-agent %s ready", __version__)
    server.serve(agent.now_and_then)
    return 0
