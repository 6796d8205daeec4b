"""The audit: one line in the journal for each change of trust, bans and blocks, whoever or whatever made it.

``journalctl -t mailfw`` shows them, ``journalctl MAILFW_ADDRESS=198.51.100.10`` those of an address. A line is
``action=block address=198.51.100.10 until=forever by=root why="ticket 17"``; the same fields, in capitals and with
``MAILFW_`` before them, are the journal's own. ``until`` is in UTC.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterable
from typing import Any

#: Where journald takes entries, a datagram for each (https://systemd.io/JOURNAL_NATIVE_PROTOCOL).
SOCKET = "/run/systemd/journal/socket"
IDENTIFIER = "mailfw"
_NOTICE, _AUTHPRIV = 5, 10  # <syslog.h>

#: Bytes of a reason and of who gives it: an element's comment, which holds both, has at most 127.
LONGEST_REASON, LONGEST_NAME = 90, 30

log = logging.getLogger(__name__)


def reason(value: Any) -> str:
    """Return a reason as it is kept: one line of printable text, without the quotes that nft ends a comment at.

    Raises ValueError.
    """
    text = " ".join(str(value).split()).replace('"', "'")
    if not isinstance(value, (str, int, float)) or not text.isprintable() or len(text.encode()) > LONGEST_REASON:
        raise ValueError(f"expected text of at most {LONGEST_REASON} bytes")
    return text


def name(value: Any) -> str:
    """Return who does something as it is kept: what is not a plain character becomes ``_``."""
    text = "".join(one if one.isascii() and (one.isalnum() or one in "-_.@") else "_" for one in str(value))
    return text[:LONGEST_NAME] or "_"


def note(by: str, why: str) -> str:
    """Return the comment of an element that somebody makes."""
    return f"{by}: {why}" if why else by


def is_note(text: str) -> bool:
    """Return whether a text can be an element's comment."""
    return text.isprintable() and '"' not in text and len(text.encode()) <= 127


def moment(at: float) -> str:
    """Return a Unix time as the audit writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def record(
    action: str, address: str, by: str, where: Iterable[Any] = (), until: float | None = None, why: str = ""
) -> None:
    """Put a change into the journal. What the journal does not take is a warning in the caller's log.

    ``where``: the ports or roles; ``until``: Unix time, infinite for what has no end, None for what ends.
    """
    found = fields(action, address, by, where, until, why)
    entry = {
        "MESSAGE": line(found),
        "PRIORITY": _NOTICE,
        "SYSLOG_FACILITY": _AUTHPRIV,
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        **{f"MAILFW_{key.upper()}": value for key, value in found.items()},
    }
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            journal.setblocking(False)  # A login does not wait for the journal.
            journal.sendto("".join(f"{key}={value}\n" for key, value in entry.items()).encode(), SOCKET)
    except OSError as err:
        log.warning("%s (not in the journal: %s)", entry["MESSAGE"], err.strerror)


def fields(
    action: str, address: str, by: str, where: Iterable[Any] = (), until: float | None = None, why: str = ""
) -> dict[str, str]:
    """Return the fields of an entry, those that say something: each is one line of printable text."""
    found = {"action": action, "address": address, "where": ",".join(map(str, where))}
    if until is not None:
        found["until"] = "forever" if until == float("inf") else moment(until)
    found.update(by=by, why=why)
    return {key: _printable(value) for key, value in found.items() if value}


def line(found: dict[str, str]) -> str:
    """Return the fields of an entry as people read it."""
    return " ".join(f"{key}={_quoted(value)}" for key, value in found.items())


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else " " for one in text)


def _quoted(text: str) -> str:
    plain = all(one not in ' "\\=' for one in text)
    return text if plain else json.dumps(text, ensure_ascii=False)
