"""Bans: from which roles a source is banned; and noticing what the rules ban, in a thread that looks each second.

The kernel says nothing of elements that rules add. But whenever a rule bans a source, the counter ``over_rate`` moves:
only then the sets are listed.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from mailfwlib import elements, netlink
from mailfwlib.parse import Address
from mailfwlib.settings import ROLES, Settings
from mailfwlib.worker import Worker

#: Seconds between two looks, and how many times the processor time of a look the pause after it is at least.
LOOK, REST = 1.0, 10
#: Bans of one look that are told one by one.
MOST_TOLD = 200
#: Deadlines of the same ban, read at different moments, differ by no more seconds.
_ROUNDING = 2.0

_BANNED = re.compile(r"banned_(networks_)?([a-z]+)_(ipv[46])")

log = logging.getLogger("mailfw-agent")


class Ban(NamedTuple):
    """A ban: from which role, what of (``source`` or ``network``), by which address, until when in Unix time."""

    role: str
    of: str
    address: str
    until: float


def banned_from(address: Address, settings: Settings, kernel: netlink.Kernel) -> list[str]:
    """Return the roles that an address's source is banned from. Raises OSError when the kernel does not answer."""
    key = netlink.key(elements.source_key(address, settings))
    return [role for role in ROLES if kernel.element(f"banned_{role}_{elements.family(address)}", key)]


class Bans:
    """Tells of each new ban that the rules have made. ``tell`` is called in a thread of its own."""

    def __init__(self, tell: Callable[[Ban], None]):
        self._tell = tell
        self._kernel = netlink.Kernel()
        #: The table and how often its rules had found a source above the rate, at the last look.
        self._counted: tuple[bytes | None, int] | None = None
        self._known: dict[tuple[str, str, str], float] = {}
        self._worker = Worker("bans", "bans cannot be looked at", self._tell_new, self._pause)

    def start(self) -> None:
        """Start the thread. Bans that there are already are no news."""
        self._worker.attempts.make(self._new)
        self._worker.start()

    def stop(self) -> None:
        """End the thread."""
        self._worker.stop()

    def _pause(self) -> float:
        return max(LOOK, REST * self._worker.took)

    def _tell_new(self) -> None:
        found = self._new()
        for ban in found[:MOST_TOLD]:
            self._tell(ban)
        if len(found) > MOST_TOLD:
            log.warning("%s more sources were banned within a second", len(found) - MOST_TOLD)

    def _new(self) -> list[Ban]:
        """Return the bans that were not there at the last look."""
        table, count = self._kernel.table(), self._kernel.counter("over_rate")
        if count is None or (table, count) == self._counted:
            return []
        seen = self._seen()
        new = {key: ends for key, ends in seen.items() if ends > self._known.get(key, 0.0) + _ROUNDING}
        found = [Ban(*key, time.time() + ends - time.monotonic()) for key, ends in new.items()]
        self._counted, self._known = (table, count), seen
        return found

    def _seen(self) -> dict[tuple[str, str, str], float]:
        """Return the bans that there are now: role, of what, address -> until when. Operators' have a comment.

        Until when by the monotonic clock: a step of the other one makes no ban new.
        """
        seen = {}
        for name in self._kernel.sets():
            match = _BANNED.fullmatch(name)
            for one in self._kernel.elements(name) if match else ():
                if match and not one.note and one.left is not None:
                    of = "network" if match[1] else "source"
                    seen[match[2], of, one.value] = time.monotonic() + one.left
        return seen
