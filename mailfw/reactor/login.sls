#!py
"""Reactor for the event mailfw/login. No field of it is authority: only what is signed under a key of the fleet, fresh,
and not there before gets to the runner, which looks closer; any minion hears the fleet's messages and can fire them again.
In Python, and from a local file, since whoever floods the master with events makes it render this for each: it takes
0.5 ms, Jinja 6 ms, a file of the file server 17 ms more, and the runner as much again.
"""

import hashlib
import hmac
import json
import logging
import sys
import time
import types

LONGEST = 65536
#: Seconds that a message may be old, or ahead of the master's clock: as for the mail hosts, in mailfwlib.messages.
FRESH = 120
#: Messages that are remembered; beyond that the first are forgotten. Whoever has no key can add none.
MOST = 100_000
#: What is dropped is logged once in this many seconds for each of so many sources: whoever has none of them is not told of.
QUIET, MOST_SOURCES = 60, 100


def run():
    """Return what to do for an event: ``data`` and ``__opts__`` are Salt's."""
    sent = data.get("data")
    message = sent.get("message") if isinstance(sent, dict) else None
    if not isinstance(message, str) or len(message) > LONGEST or not (message.isascii() and message.isprintable()):
        return _dropped("malformed")
    signature, _, signed = message.partition(" ")
    if not any(hmac.compare_digest(_signature(signed, key), signature) for key in _keys()):
        return _dropped("not signed under a key of this fleet")
    if not _is_fresh(signed):
        return _dropped("stale, or a clock is wrong")
    if not _is_first(signature):
        return _dropped("replayed")
    announce = {"runner.mailfw.announce": [{"args": [{"message": message}]}]}
    return {"mailfw announces logins to the fleet": announce}


def _keys():
    return (__opts__.get("mailfw") or {}).get("keys") or []


def _signature(signed, key):
    return hmac.new(key.encode(), signed.encode(), hashlib.sha256).hexdigest()


def _is_fresh(signed):
    try:
        return abs(time.time() - json.loads(signed)["sent"]) <= FRESH
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError):
        return False


def _is_first(signature):
    seen, now = _memory().seen, time.monotonic()
    if signature in seen:
        return False
    seen[signature] = now + 2 * FRESH
    while len(seen) > MOST or seen[next(iter(seen))] < now:
        del seen[next(iter(seen))]
    return True


def _dropped(why):
    said, now, source = _memory().said, time.monotonic(), "%.60r" % (data.get("id"),)
    for old in [one for one, at in said.items() if now - at >= QUIET]:
        del said[old]
    if source not in said and len(said) < MOST_SOURCES:
        said[source] = now
        logging.getLogger(__name__).warning("mailfw: an event mailfw/login, of %s by its own account, was dropped: %s", source, why)
    return {}


def _memory():
    """Return what is kept from event to event: Salt runs this file anew for each, always in one process."""
    if "mailfw_reactor" not in sys.modules:
        sys.modules["mailfw_reactor"] = memory = types.ModuleType("mailfw_reactor")
        memory.seen, memory.said = {}, {}
    return sys.modules["mailfw_reactor"]
