"""The threads of the agent: each does its work again and again, and nothing that goes wrong ends it.

What goes wrong is tried again. It is logged once, until it goes wrong in another way; and so is that it is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Optional

#: Seconds until the first attempt: soon, so that a restart leaves no gap.
FIRST = 1.0
#: Seconds that a worker which is told to stop may take.
PATIENCE = 10.0

log = logging.getLogger("mailfw-agent")


class WorkError(RuntimeError):
    """Work that cannot be done just now; the message is for people, and says all that they need."""


class Attempts:
    """Attempts at one thing."""

    def __init__(self, failing: str):
        """``failing``: what it means that they fail, as the log has it before the error: ``no metrics``."""
        self._failing = failing
        self._said: Optional[str] = None

    def make(self, step: Callable[[], object]) -> None:
        """Make an attempt. Raises nothing that ``step`` raises."""
        try:
            step()
        except Exception as err:
            error = str(err) or repr(err)
            if error != self._said:
                explained = isinstance(err, (OSError, WorkError))
                log.error("%s: %s", self._failing, error, exc_info=not explained)
            self._said = error
        else:
            if self._said is not None:
                log.info("%s: that is over", self._failing)
            self._said = None


class Worker:
    """A thread that does its work until it is told to stop."""

    def __init__(
        self,
        name: str,
        failing: str,
        work: Callable[[], object],
        pause: Callable[[], float],
        last: Callable[[], object] = lambda: None,
    ):
        """``failing``: see :class:`Attempts`. ``pause`` gives the seconds between two attempts, after each of them.

        ``last`` is done when the thread is told to stop.
        """
        self._failing, self._work, self._pause, self._last = failing, work, pause, last
        self.attempts = Attempts(failing)
        #: Processor time of the last attempt in seconds: waiting for a disk takes nothing from anybody.
        self.took = 0.0
        self._wait = FIRST
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. It ends with the process, if not before."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, as soon as an attempt that is under way has come to its end."""
        self._stopping.set()
        if self._thread.is_alive():  # Otherwise it has not been started yet.
            self._thread.join(timeout=PATIENCE)

    def _run(self) -> None:
        while not self._stopping.wait(self._wait):
            self.attempts.make(self._attempt)
        Attempts(self._failing).make(self._last)

    def _attempt(self) -> None:
        began = time.thread_time()
        try:
            self._work()
        finally:
            self.took = time.thread_time() - began
            self._wait = self._pause()
