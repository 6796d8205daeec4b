"""Who has logged in from where: an operator can end what one user's logins have earned, and none roams without end.

A user is kept as a key: a keyed hash of the name, or the name itself where pillar says so. The hash is under the
fleet's newest key, so that all mail hosts mean the same user by it; a key that was newest before still finds what it
has hashed, as long as pillar has it.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable, NamedTuple
from urllib.parse import quote, unquote

from mailfwlib import parse
from mailfwlib.elements import trusted_key
from mailfwlib.journal import DIRECTORY, Journal, Pair, pair, pair_text
from mailfwlib.parse import Address
from mailfwlib.settings import Settings

#: How a key begins that says the name; parse.USER_KEY has the form of all keys.
_PLAIN = "user:"
_SAFE = "@+"
#: A longer name is kept as its hash even where names are plain.
LONGEST_PLAIN = 100
#: The hook hands on so many bytes of a name.
LONGEST_NAME = 256
#: Users times addresses that are remembered; of one user at most so many, so that none pushes out all the others.
MOST = 100_000
MOST_OF_ONE = 10_000
DAY = 86400
#: Seconds between two looks at what is over.
TIDY = 3600.0
#: Users of whom refused logins are remembered, and addresses of one.
MOST_REFUSED, MOST_REFUSED_OF_ONE = 10_000, 10
#: Revocations that are remembered, and for how many seconds: no older login is told of.
MOST_REVOKED = 10_000
LONGEST_REVOKED = 7 * DAY


def name(user: Any) -> str:
    """Return the user that an operator names. Raises ValueError for what cannot be one, or would mean several."""
    form = "expected a user's name as Dovecot logs it, such as alice@example.org, without * and ?"
    if isinstance(user, int) and not isinstance(user, bool):
        user = str(user)  # What Salt makes of a name that consists of digits.
    if not isinstance(user, str) or not user.strip() or not user.isprintable() or set("*?") & set(user):
        raise ValueError(form)
    try:
        if len(user.encode()) > LONGEST_NAME:
            raise ValueError(f"{form}, of at most {LONGEST_NAME} bytes")
    except UnicodeEncodeError as err:
        raise ValueError(form) from err
    return user


def fold(user: str) -> str:
    """Return a name as Dovecot compares it: by default without upper case, of ASCII (auth_username_format, %L)."""
    return user.encode("utf-8", "replace").lower()[:LONGEST_NAME].decode("utf-8", "ignore")


def hashed(user: str, secret: str) -> str:
    """Return the key of a user under a secret."""
    return hmac.new(secret.encode(), b"mailfw user " + fold(user).encode(), hashlib.sha256).hexdigest()[:16]


def plain(user: str) -> str:
    """Return the key that says the name; empty when that is too long."""
    text = quote(fold(user), safe=_SAFE)
    return _PLAIN + text if len(text) <= LONGEST_PLAIN else ""


def hashes(key: str, secrets: Iterable[str]) -> list[str]:
    """Return the hashes that mean the same user as a key: itself, or those of the name that it says."""
    return [hashed(unquote(key[len(_PLAIN) :]), one) for one in secrets] if key.startswith(_PLAIN) else [key]


def every_key(user: str, secrets: Iterable[str]) -> list[str]:
    """Return every key under which a user may be kept, whatever pillar said when it was."""
    return [*filter(None, [plain(user)]), *(hashed(user, one) for one in secrets)]


def is_renewed(who: Pair, before: float, at: float, period: float) -> bool:
    """Return whether a login is news for others: the first, or the first in one of the tenths of a period (seconds).

    ``before`` is when the last one was, or 0. Each address and user have their own tenths, so that not all of them are
    news at the same time.
    """
    tenth = period / 10
    shift = zlib.crc32(pair_text(who).encode()) % 997 / 997 * tenth
    return (at + shift) // tenth > (before + shift) // tenth


def known(directory: Path = DIRECTORY) -> dict[Pair, float]:
    """Return who has logged in from where lately and when last (Unix time), as the agent keeps it on disk."""
    return {who: at for who, at in _journal(directory).load().items() if at}


def _journal(directory: Path) -> Journal[Pair]:
    return Journal(directory / "users", 2 * MOST, pair, pair_text)


class Refusal(NamedTuple):
    """A login that has earned no trust: its Unix time, and why."""

    at: float
    reason: str


class People:
    """The users that have logged in lately: a user's key -> the trusted address -> Unix time of the last login.

    It outlives the agent, but for the logins that have earned no trust. What is too much pushes out the addresses of
    whoever has been away for longest.
    """

    def __init__(self, settings: Callable[[], Settings], directory: Path = DIRECTORY):
        self._settings = settings
        self._users: dict[str, dict[Address, float]] = {}
        self._count = 0
        #: Logins that have earned no trust: a user's key -> the address -> Unix time of the last one, and why.
        self._refused: dict[str, dict[Address, Refusal]] = {}
        self._tidied = 0.0
        self._journal = _journal(directory)
        self._revocations = Journal(directory / "revoked", MOST_REVOKED, parse.user_key)
        #: When an operator has ended what a user had earned: hash -> Unix time.
        self._revoked = self._revocations.load()
        for (address, key), at in self._journal.load().items():
            trusted = trusted_key(address, settings())
            self._put(key, trusted, max(at, self.last(key, trusted)))
        self.tidy(time.time())

    def __len__(self) -> int:
        """Return how many users are known."""
        return len(self._users)

    def key(self, user: str) -> str:
        """Return the key under which a user's login is kept; empty when nobody's is, or nobody logged in by name."""
        if not user or not self.keeps():
            return ""
        return (self._how() == "plain" and plain(user)) or hashed(user, self._secrets()[0])

    def keys(self, user: str) -> list[str]:
        """Return every key under which a user may be kept."""
        return every_key(user, self._secrets())

    def _secrets(self) -> list[str]:
        settings = self._settings()
        return [*settings["fleet"]["keys"], settings["host"].get("report_secret", "")]

    def places(self, user: str) -> dict[Address, float]:
        """Return the addresses from which a user has logged in lately, and when last (Unix time)."""
        found: dict[Address, float] = {}
        for key in self.keys(user):
            for address, at in self._users.get(key, {}).items():
                found[address] = max(at, found.get(address, 0.0))
        return found

    def last(self, key: str, address: Address) -> float:
        """Return when the user with this key logged in last from an address; 0 when that is not known."""
        return self._users.get(key, {}).get(address, 0.0)

    def others(self, user: str, since: dict[Address, float]) -> set[Address]:
        """Return the addresses from which somebody else has logged in, each since a Unix time of its own."""
        own = set(self.keys(user))
        found: set[Address] = set()
        for key, places in self._users.items():
            if key not in own:
                found.update(address for address, at in places.items() if at > since.get(address, math.inf))
        return found

    def note(self, key: str, address: Address, at: float) -> None:
        """Remember a login (Unix time) of the user with a key; of none when that is empty."""
        before = self.last(key, address)
        if not key or at <= before:
            return
        self._put(key, address, at)
        self._refused.get(key, {}).pop(address, None)
        if is_renewed((address, key), before, at, self._period()):
            self._journal.append((address, key), at, self._pairs)

    def refuse(self, user: str, address: Address, at: float, reason: str) -> None:
        """Remember why a user's login (Unix time) has earned no trust."""
        if not (key := self.key(user)):
            return
        refused = self._refused.pop(key, {})
        self._refused[key] = refused
        refused.pop(address, None)
        refused[address] = Refusal(at, reason)
        if len(refused) > MOST_REFUSED_OF_ONE:
            del refused[next(iter(refused))]
        if len(self._refused) > MOST_REFUSED:
            del self._refused[next(iter(self._refused))]

    def refusals(self, user: str) -> dict[Address, Refusal]:
        """Return the addresses from where a user's last login has earned no trust, and why."""
        return {address: one for key in self.keys(user) for address, one in self._refused.get(key, {}).items()}

    def admitted(self, logins: dict[str, float]) -> dict[str, float]:
        """Return those of some logins, key -> Unix time, that no operator has revoked, under the keys of this host."""
        secrets = self._secrets()
        return {
            self._own(key): at
            for key, at in logins.items()
            if at > max(self._revoked.get(one, 0.0) for one in hashes(key, secrets))
        }

    def _own(self, key: str) -> str:
        """Return the key that another host, or other pillar, has given a user as this host's pillar wants it."""
        return key if self._how() == "plain" else hashes(key, self._secrets()[:1])[0]

    def _how(self) -> str:
        return str(self._settings()["trusted"].get("users", "hash"))

    def keeps(self) -> bool:
        """Return whether pillar has users remembered."""
        return self._how() != "off"

    def revoke(self, user: str, addresses: Iterable[Address], now: float) -> None:
        """Forget that a user has logged in from some addresses; logins up to ``now`` (Unix time) count no more."""
        for address, key in itertools.product(addresses, self.keys(user)):
            if self.last(key, address):
                self._drop(address, key)
                self._journal.append((address, key), 0.0, self._pairs)
        for one in hashes(_PLAIN + quote(fold(user), safe=_SAFE), self._secrets()):
            self._revoked[one] = now
            self._revocations.append(one, now, lambda: self._revoked)
        while len(self._revoked) > MOST_REVOKED:
            del self._revoked[next(iter(self._revoked))]

    def _put(self, key: str, address: Address, at: float) -> None:
        places = self._users.pop(key, {})
        self._users[key] = places
        self._count += address not in places
        places.pop(address, None)
        places[address] = at
        if len(places) > MOST_OF_ONE or self._count > MOST:
            # Of this user's, or of whoever has been away for longest, the address that was not used for longest.
            oldest = key if len(places) > MOST_OF_ONE else next(iter(self._users))
            self._drop(next(iter(self._users[oldest])), oldest)

    def _drop(self, address: Address, key: str) -> None:
        del self._users[key][address]
        self._count -= 1
        if not self._users[key]:
            del self._users[key]

    def tidy(self, now: float) -> None:
        """Forget what is over, on disk too; and at once everything when pillar says that no user is kept."""
        if now - self._tidied < TIDY and (self.keeps() or not (self._users or self._refused)):
            return
        self._tidied = now
        self._revoked = {key: at for key, at in self._revoked.items() if at > now - LONGEST_REVOKED}
        before, since = self._pairs(), now - max(self._period(), DAY)
        self._refused = {
            key: late
            for key, refused in self._refused.items()
            if self.keeps() and (late := {address: one for address, one in refused.items() if one.at > since})
        }
        kept = {(address, self._own(key)): at for (address, key), at in before.items() if at > since and self.keeps()}
        if kept.keys() != before.keys():
            self._users, self._count = {}, 0
            for (address, key), at in kept.items():
                self._put(key, address, at)
            self._journal.replace(self._pairs())

    def _pairs(self) -> dict[Pair, float]:
        return {(address, key): at for key, places in self._users.items() for address, at in places.items()}

    def _period(self) -> float:
        return float(self._settings()["trusted"]["period"])
