"""Signed messages: how mail hosts tell each other of logins.

A message is plain data: ``version``, ``sender`` (a minion id), ``sent`` (Unix time), ``nonce``, ``logins`` (address
and Unix time of each) and ``signature``, an HMAC-SHA256 over everything else in canonical JSON under a fleet key.
Whoever carries it (event bus, reactor, master) can neither alter it nor make one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from typing import Any

from mailfwlib import parse
from mailfwlib.parse import Address

VERSION = 1
#: Seconds that a message may be old, or ahead of this host's clock.
FRESH = 120
#: A message bigger than this is not looked at.
MOST_LOGINS = 500
#: A login older than this many seconds is not worth announcing.
OLDEST_LOGIN = 7 * 86400

Message = dict[str, Any]


class MessageError(ValueError):
    """A message that must not be believed."""


def sign(sender: str, logins: dict[Address, float], key: str, now: float | None = None) -> Message:
    """Return a signed message that announces logins: address -> Unix time."""
    message = {
        "version": VERSION,
        "sender": sender,
        "sent": round(time.time() if now is None else now, 3),
        "nonce": secrets.token_hex(16),
        "logins": {str(address): round(at, 3) for address, at in logins.items()},
    }
    return {**message, "signature": _signature(message, key)}


def verify(message: Any, keys: list[str], now: float | None = None) -> dict[Address, float]:
    """Return the logins that a message announces.

    Raises MessageError when it is malformed, stale, or not signed under one of ``keys``. Whether its nonce was
    seen before is for the caller to say: :class:`Seen`.
    """
    if not isinstance(message, dict) or set(message) != {"version", "sender", "sent", "nonce", "logins", "signature"}:
        raise MessageError("malformed")
    logins, signature = message["logins"], message["signature"]
    if not isinstance(logins, dict) or not 1 <= len(logins) <= MOST_LOGINS or not isinstance(signature, str):
        raise MessageError("malformed")
    unsigned = {name: value for name, value in message.items() if name != "signature"}
    try:
        good = any([hmac.compare_digest(_signature(unsigned, key), signature) for key in keys])
    except (TypeError, ValueError, RecursionError) as err:
        raise MessageError("malformed") from err
    if not good:
        raise MessageError("not signed under a key of this fleet")
    return _content(message, time.time() if now is None else now)


def _content(message: Message, now: float) -> dict[Address, float]:
    """Check what a signed message says: a host of the fleet may be wrong, too."""
    sender, sent, nonce = message["sender"], message["sent"], message["nonce"]
    if message["version"] != VERSION:
        raise MessageError(f"version {message['version']!r}: this host speaks {VERSION}")
    if not isinstance(sender, str) or not isinstance(nonce, str) or not _is_number(sent):
        raise MessageError("malformed")
    if abs(now - sent) > FRESH:
        raise MessageError(f"sent {abs(now - sent):.0f} s {'ago' if now > sent else 'ahead'}: stale, or a clock is wrong")
    logins = {}
    for text, at in message["logins"].items():
        if not _is_number(at) or not sent - OLDEST_LOGIN <= at <= sent + FRESH:
            raise MessageError("malformed")
        try:
            logins[parse.address(text)] = min(float(at), now)
        except ValueError as err:
            raise MessageError(f"address {text!r:.60}: {err}") from err
    return logins


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _signature(unsigned: Message, key: str) -> str:
    canonical = json.dumps(unsigned, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key.encode(), canonical.encode(), hashlib.sha256).hexdigest()


def fingerprint(key: str) -> str:
    """Return what may be shown of a key: enough to compare two hosts, too little to use."""
    return hashlib.sha256(b"mailfw fingerprint " + key.encode()).hexdigest()[:12]


class Seen:
    """The nonces of the messages that could still be fresh, so that none counts twice."""

    def __init__(self, most: int = 100_000):
        self._expiry: dict[tuple[str, str], float] = {}
        self._most = most

    def first_time(self, message: Message, now: float) -> bool:
        """Return whether a verified message has not been seen, and remember it."""
        key = (message["sender"], message["nonce"])
        if key in self._expiry:
            return False
        for old in [old for old, expiry in self._expiry.items() if expiry < now]:
            del self._expiry[old]
        if len(self._expiry) >= self._most:
            raise MessageError(f"more than {self._most} messages in {2 * FRESH} s")
        self._expiry[key] = now + 2 * FRESH
        return True
