"""Signed messages: how mail hosts tell each other of logins.

A message is one line of text: an HMAC-SHA256 in hex, a space, and the JSON that it signs, byte by byte. Whoever
carries it (event bus, reactor, master) can neither alter it nor make one, and needs to understand nothing of it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mailfwlib import parse
from mailfwlib.parse import Address

VERSION = 1
#: Seconds that a message may be old, or ahead of this host's clock.
FRESH = 120
#: A message that announces more logins than this, or is longer, is not looked at.
MOST_LOGINS = 500
LONGEST = 65536
#: A login older than this many seconds is not worth announcing.
OLDEST_LOGIN = 7 * 86400
#: Characters of a message that are not about logins: above all the sender, of which JSON may make many more.
_FRAME = 4096

One = TypeVar("One")
#: Who has logged in: address -> user's key -> Unix time of the last login. Logins of nobody by name are not in it.
Users = dict[Address, dict[str, float]]


class MessageError(ValueError):
    """A message that must not be believed."""


@dataclass(frozen=True)
class Message:
    """A message that is signed and fresh: who sent it, its nonce, address -> Unix time of the logins, and whose."""

    sender: str
    nonce: str
    logins: dict[Address, float]
    users: Users = field(default_factory=dict)


def new_nonce() -> str:
    """Return a nonce for a message: no other message of the same sender may have it."""
    return secrets.token_hex(16)


def fitting(pairs: Iterable[tuple[Any, str]]) -> int:
    """Return how many logins, address and user's key (or an empty string) each, the first of these fit in a message."""
    count, room = 0, LONGEST - _FRAME
    for address, user in pairs:
        # Each in quotes, with its time and what stands between them, once among the logins and once among the users.
        room -= len(str(address)) + 24 + (len(str(address)) + len(user) + 32 if user else 0)
        if room < 0 or count == MOST_LOGINS:
            break
        count += 1
    return count


def split(logins: dict[tuple[Address, str], float], now: float) -> tuple[dict[Address, float], Users]:
    """Return logins, (address, user's key) -> Unix time, as a message of ``now`` has them: those of all, and by name.

    One that may not be told would spoil it for all: who is too old is left out, and after a clock was set back what was
    in the future is now.
    """
    last: dict[Address, float] = {}
    users: Users = {}
    for (address, user), at in logins.items():
        if at < now - OLDEST_LOGIN:
            continue
        at = min(at, now)
        last[address] = max(at, last.get(address, at))
        if user:
            users.setdefault(address, {})[user] = at
    return last, users


def sign(
    sender: str,
    nonce: str,
    logins: dict[Address, float],
    key: str,
    now: float | None = None,
    users: Users | None = None,
) -> str:
    """Return a signed message from the minion ``sender`` that announces logins: address -> Unix time, and whose."""
    content: dict[str, Any] = {
        "version": VERSION,
        "sender": sender,
        "sent": time.time() if now is None else now,
        "nonce": nonce,
        "logins": {str(address): at for address, at in logins.items()},
    }
    if users:
        content["users"] = {str(address): whose for address, whose in users.items()}
    text = json.dumps(content, separators=(",", ":"))
    return f"{_signature(text, key)} {text}"


def verify(text: Any, keys: list[str], now: float | None = None) -> Message:
    """Return what a message says.

    Raises MessageError when it is malformed, stale, or not signed under one of ``keys``. Whether it was seen before
    is for the caller to say: :class:`Seen`.
    """
    if not isinstance(text, str) or len(text) > LONGEST or not text.isascii():
        raise MessageError("malformed")
    signature, _, signed = text.partition(" ")
    if not any(hmac.compare_digest(_signature(signed, key), signature) for key in keys):
        raise MessageError("not signed under a key of this fleet")
    try:
        return _content(json.loads(signed), time.time() if now is None else now)
    except MessageError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as err:
        raise MessageError("malformed") from err


def _content(content: Any, now: float) -> Message:
    """Check what a signed message says: a host of the fleet may be wrong, too."""
    if content["version"] != VERSION:
        raise MessageError(f"version {content['version']!r:.20}: this host speaks {VERSION}")
    sender, nonce, sent, logins = content["sender"], content["nonce"], float(content["sent"]), content["logins"]
    if not isinstance(sender, str) or not 1 <= len(sender) <= 255 or not isinstance(nonce, str):
        raise MessageError("malformed")
    if len(logins) > MOST_LOGINS:
        raise MessageError("malformed")
    if not abs(now - sent) <= FRESH:
        raise MessageError(
            f"sent {abs(now - sent):.0f} s {'ago' if now > sent else 'ahead'}: stale, or a clock is wrong"
        )
    found = _logins(logins, _address, sent, now)
    users: Users = {}
    for address, whose in content.get("users", {}).items():
        users[_address(address)] = _logins(whose, parse.user_key, sent, now)
    if sum(map(len, users.values())) > MOST_LOGINS:
        raise MessageError("malformed")
    # Hosts that know of no users leave them out. Who is named has logged in from an address of the message.
    if any(max(whose.values(), default=0.0) > found[address] for address, whose in users.items()):
        raise MessageError("malformed")
    return Message(sender, nonce, found, users)


def _logins(logins: Any, parse_one: Callable[[Any], One], sent: float, now: float) -> dict[One, float]:
    """Check logins of addresses or of users: that each is one, and its time one that a message may tell."""
    found: dict[One, float] = {}
    for text, at in logins.items():
        if not sent - OLDEST_LOGIN <= at <= sent + FRESH:
            raise MessageError("malformed")
        found[parse_one(text)] = min(float(at), now)
    return found


def _address(text: Any) -> Address:
    try:
        return parse.address(text)
    except ValueError as err:
        raise MessageError(f"address {text!r:.60}: {err}") from err


def _signature(signed: str, key: str) -> str:
    return hmac.new(key.encode(), signed.encode(), hashlib.sha256).hexdigest()


def fingerprint(key: str) -> str:
    """Return what may be shown of a key: enough to compare two hosts, too little to use."""
    return _signature("mailfw fingerprint", key)[:12]


def claimed_sender(text: str) -> str:
    """Return who has sent a message by its own account, for a line in a log: nothing of it is checked."""
    try:
        return f"{json.loads(text[:LONGEST].partition(' ')[2])['sender']!r:.60}"
    except (KeyError, TypeError, ValueError, RecursionError):
        return "?"


class Seen:
    """The nonces of messages that could still be fresh, so that none counts twice."""

    def __init__(self, most: int = 100_000):
        self._expiry: dict[tuple[str, str], float] = {}
        self._most = most

    def remember(self, message: Message, now: float) -> None:
        """Remember a verified message. Raises MessageError when it was there before, or too many are remembered."""
        key = (message.sender, message.nonce)
        if key in self._expiry:
            raise MessageError("replayed")
        while self._expiry and next(iter(self._expiry.values())) < now:
            del self._expiry[next(iter(self._expiry))]
        if len(self._expiry) >= self._most:
            raise MessageError(f"more than {self._most} messages in {2 * FRESH} s")
        self._expiry[key] = now + 2 * FRESH
