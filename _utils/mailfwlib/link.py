"""The way to the master and back, as the announcer goes by it: the helper says when it is broken, and when it is back.

That the master can be reached does not say that this host hears it: for seconds after a restart the master has no
minion to publish to, and after a network was cut the kernel takes its time to send again what it could not. So once
it is back a message goes out, an empty one when there is nothing to tell, until one has come back; and meanwhile, and
once more then, the minion asks the master for what this host has missed. It asks as well when a message has come back
after one that has not: the master may have been restarted between two looks of the helper, and others' are lost, too.
"""

from __future__ import annotations

import math

#: Seconds between two questions for what was missed, while nothing has come back: doubled each time.
FIRST_PAUSE = 3.0


class Link:
    """Whether the master can be reached, whether its jobs are heard, and when to ask for what was missed.

    All times are those of ``time.monotonic``. Until the helper says something, all is well.
    """

    def __init__(self) -> None:
        self.up = True
        #: Nothing has come back since the master could be reached again.
        self.unproven = False
        self._has_missed = False
        self._ask_at = math.inf
        self._pause = FIRST_PAUSE

    def told(self, line: str, now: float) -> None:
        """Take what the helper says: ``up`` or ``down``."""
        self.up = line == "up"
        self.unproven = self.up
        self._ask_at = now if self.up else math.inf
        self._pause = FIRST_PAUSE

    def echoed(self, now: float) -> None:
        """Note that a message has come back."""
        if self.unproven or self._has_missed:
            self.unproven = self._has_missed = False
            self._ask_at = now

    def missed(self) -> None:
        """Note that a message has not come back in time."""
        self._has_missed = True

    def must_ask(self, now: float) -> bool:
        """Return whether it is time to ask for what was missed."""
        return self._ask_at <= now

    def asked(self, now: float) -> None:
        """Note that the minion was made to ask."""
        self._ask_at = now + self._pause if self.unproven else math.inf
        self._pause *= 2
