#!py
"""Reactor for the event mailfw/login. No field of it is authority: only what is signed under a key of the fleet gets to
the runner, which looks closer. In Python, and from a local file, since whoever floods the master with events makes it
render this for each: it takes 0.3 ms, Jinja 6 ms, a file of the file server 17 ms more, and the runner as much again.
"""

import hashlib
import hmac

LONGEST = 65536


def run():
    """Return what to do for an event: ``data`` and ``__opts__`` are Salt's."""
    sent = data.get("data")
    message = sent.get("message") if isinstance(sent, dict) else None
    if not isinstance(message, str) or len(message) > LONGEST or not (message.isascii() and message.isprintable()):
        return {}
    signature, _, signed = message.partition(" ")
    if not any(hmac.compare_digest(_signature(signed, key), signature) for key in _keys()):
        return {}
    announce = {"runner.mailfw.announce": [{"args": [{"message": message}]}]}
    return {"mailfw announces logins to the fleet": announce}


def _keys():
    return (__opts__.get("mailfw") or {}).get("keys") or []


def _signature(signed, key):
    return hmac.new(key.encode(), signed.encode(), hashlib.sha256).hexdigest()
