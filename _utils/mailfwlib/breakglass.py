"""The way out: ``mailfw-open`` opens every guarded port for everyone, for some time. Here is what others need of it."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mailfwlib import netlink, nft, parse

TOOL = "/usr/sbin/mailfw-open"
#: Written by mailfw-open: when it ends, in Unix time, and why.
STATE = Path("/var/lib/mailfw/open")
#: Everything is open while this element is in this set: IPPROTO_TCP.
SET, KEY = "break_glass", b"\x06"
#: Until when an opening lasts that somebody has made by hand, without an end: 9999-12-31.
NEVER = 253402214400
#: Ends of the same opening, by the clock and by the kernel's timer, differ by less: seconds.
ALIKE = 60
#: The reason of an opening that is not written down.
UNKNOWN = "why is not written down, so it lasts neither over a reboot nor over a repair of the rules"
#: What mailfw-open takes at most: seconds, and bytes of a reason.
LONGEST = 7 * parse.DURATION_UNITS["d"]
LONGEST_REASON = 200

log = logging.getLogger(__name__)


class Opening(NamedTuple):
    """Until when everything is open, in Unix time, and why."""

    ends: int
    reason: str


def opening(now: float, kernel: netlink.Kernel) -> Optional[Opening]:
    """Return the opening that is in force, None when there is none. Raises OSError when the kernel does not answer.

    It is open while the kernel says so. The file, which a full disk may lack, says why and to the second until when.
    """
    found = kernel.element(SET, KEY)
    if not found:
        return None
    ends, file = NEVER if found.left is None else round(now + found.left), _written()
    if not file:
        return Opening(ends, UNKNOWN)
    return file if abs(file.ends - ends) < ALIKE else Opening(ends, file.reason)


def _written() -> Optional[Opening]:
    """Return what mailfw-open has written down, None when it has not."""
    try:
        ends, _, reason = STATE.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
        return Opening(int(ends[:12]), reason)
    except (OSError, ValueError):
        return None


def sentence(now: float, kernel: netlink.Kernel) -> str:
    """Return what to tell people of the opening that is in force, empty when there is none. Raises OSError."""
    found = opening(now, kernel)
    if not found:
        return ""
    until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.ends))
    return f"open for everyone until {until}, by mailfw-open: {found.reason}"


def arguments(period: Any, reason: Any) -> tuple[str, str]:
    """Return what mailfw-open is given for a period and a reason; line breaks become blanks. Raises ValueError."""
    text = " ".join(str(reason).split())
    if not isinstance(reason, (str, int, float)) or not text.isprintable() or len(text.encode()) > LONGEST_REASON:
        raise ValueError(f"reason {reason!r:.80}: expected text of at most {LONGEST_REASON} bytes")
    try:
        seconds = parse.duration(period)
    except ValueError:
        seconds = 0
    if not 1 <= seconds <= LONGEST:
        raise ValueError(f"period {period!r:.80}: expected a duration such as 2h, 90m or 1d12h, at most 7d")
    return f"{seconds}s", text


def resumed(now: float) -> str:
    """Return the nft script that opens a fresh table again, for the time that is left."""
    found = _written()
    if not found or found.ends <= now:
        return ""
    left, longest = found.ends - now, _longest(found)
    if left > longest:  # At boot the clock may be years behind.
        log.warning("%s: until %d is too long from now, as the clock has it: %d s instead", STATE, found.ends, longest)
    return f"add element {nft.TABLE} {SET} {{ tcp timeout {round(min(left, longest)) or 1}s }}\n" if longest > 0 else ""


def _longest(found: Opening) -> float:
    """Return for how many seconds everything was opened: since the file was written."""
    try:
        return min(found.ends - STATE.stat().st_mtime, LONGEST)
    except OSError:
        return 0.0
