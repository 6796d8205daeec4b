"""Telling the fleet of logins: a thread that signs them, and a helper process with Salt's Python that fires events.

``event.send`` returns True even when the event is lost, so a message counts as delivered only when its echo comes
back: the master publishes every message to all mail hosts, its sender included. Until then it is sent again, and kept
in a journal that outlives the agent.
"""

from __future__ import annotations

import json
import logging
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from mailfwlib import messages
from mailfwlib.journal import DIRECTORY, Journal, Pair, pair, pair_text
from mailfwlib.parse import Address
from mailfwlib.settings import Settings

TAG = "mailfw/login"
#: Seconds in which logins are collected into one message, once the first of a quiet period has gone out.
WINDOW = 0.25
#: Seconds after which a message without an echo is sent again: doubled each time, until one comes back.
FIRST_WAIT = 5.0
LONGEST_WAIT = 60.0
#: Logins that may wait for their echo; beyond that the oldest is dropped, and counted.
MOST_WAITING = 100_000
#: Events of other kinds that may wait to be fired.
MOST_EVENTS = 100

log = logging.getLogger("mailfw-agent")


class Announcer:
    """Collects logins and announces them until their echo has come back."""

    def __init__(self, settings: Callable[[], Settings]):
        self._settings = settings
        self._wake = threading.Condition()
        self._waiting: dict[Pair, float] = {}
        self._events: list[dict[str, Any]] = []
        self._sent: dict[str, tuple[dict[Pair, float], float]] = {}
        self._wait = FIRST_WAIT
        self._helper: subprocess.Popen[str] | None = None
        self._stopping = False
        self._dropped = 0
        self._last_echo: float | None = None
        self._journal = Journal(DIRECTORY / "outbox", 2 * MOST_WAITING, pair, pair_text)
        for who, at in self._journal.load().items():
            if at > time.time() - messages.OLDEST_LOGIN:
                self._put(who, at)
        self._journal.replace(self._waiting)
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Send what waits, and end the thread and its helper."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=2)
        self._end_helper()

    def announce(self, address: Address, at: float, user: str = "") -> None:
        """Have a login announced, of the user with this key if that is known. Returns at once."""
        with self._wake:
            self._put((address, user), at)
            self._journal.append((address, user), at, self._unanswered)
            self._wake.notify()

    def tell(self, tag: str, data: dict[str, Any]) -> None:
        """Have an event fired for whoever listens, once and without an echo. Returns at once."""
        with self._wake:
            self._events = [*self._events[-MOST_EVENTS + 1 :], {"tag": tag, "data": data}]
            self._wake.notify()

    def echoed(self, nonce: str) -> None:
        """Note that a message has come back."""
        with self._wake:
            if self._sent.pop(nonce, None):
                self._last_echo = time.time()
                self._wait = FIRST_WAIT

    def status(self) -> dict[str, Any]:
        """Return how many logins have had no echo so far, when the oldest was, how many were dropped, the last echo."""
        with self._wake:
            waiting = self._unanswered()
            oldest = min(waiting.values(), default=None)
            return {"outbox": len(waiting), "oldest": oldest, "dropped": self._dropped, "last_echo": self._last_echo}

    def _unanswered(self) -> dict[Pair, float]:
        """Return the logins that have had no echo so far."""
        found: dict[Pair, float] = {}
        for logins, _ in self._sent.values():
            found.update(logins)
        return {**found, **self._waiting}

    def _put(self, who: Pair, at: float) -> None:
        at = max(at, self._waiting.pop(who, 0.0))
        self._waiting[who] = at
        if len(self._waiting) > MOST_WAITING:
            del self._waiting[next(iter(self._waiting))]
            self._dropped += 1

    def _run(self) -> None:
        if self._settings()["fleet"]["keys"]:
            # Salt takes a second to load: not in the way of the first login.
            self._attempt(self._running_helper)
        while self._work_to_do():
            self._attempt(self._send_waiting)
            if not self._stopping:
                time.sleep(WINDOW)

    @staticmethod
    def _attempt(step: Callable[[], Any]) -> None:
        """Log what goes wrong: logins are trusted on this host whether or not the fleet hears of them."""
        try:
            step()
        except Exception:
            log.exception("logins could not be announced")

    def _work_to_do(self) -> bool:
        """Wait until logins have to be announced, and return True; or False when it is time to end."""
        with self._wake:
            while not self._waiting and not self._events and not self._stopping:
                self._wake.wait(timeout=1.0)
                self._take_back_unanswered()
                if not self._waiting and not self._sent:
                    self._journal.clear()
            return bool(self._waiting or self._events)

    def _take_back_unanswered(self) -> None:
        now = time.monotonic()
        late = [nonce for nonce, (_, due) in self._sent.items() if due < now]
        for nonce in late:
            for who, at in self._sent.pop(nonce)[0].items():
                self._put(who, at)
        if late:
            self._wait = min(self._wait * 2, LONGEST_WAIT)

    def _send_waiting(self) -> None:
        """Send what waits, as many logins as one message takes; without a key the fleet is not told of them."""
        settings, nonce = self._settings(), messages.new_nonce()
        keys = settings["fleet"]["keys"]
        with self._wake:
            events, self._events = self._events, []
            logins = {who: self._waiting.pop(who) for who in list(self._waiting)[: messages.fitting(self._waiting)]}
            if keys and logins:
                self._sent[nonce] = (logins, time.monotonic() + self._wait)
        for event in events:
            self._fire(event)
        if keys and logins:
            last, users = messages.split(logins)
            text = messages.sign(settings["host"]["id"], nonce, last, keys[0], users=users)
            self._fire({"tag": TAG, "data": {"message": text}})

    def _fire(self, event: dict[str, Any]) -> None:
        helper = self._running_helper()
        try:
            print(json.dumps(event), file=helper.stdin, flush=True)
        except OSError as err:
            log.warning("the helper that fires Salt events is gone (%s); the logins are announced again", err)

    def _running_helper(self) -> subprocess.Popen[str]:
        """Return the helper; start it first if it is not running."""
        if self._helper is None or self._helper.poll() is not None:
            self._end_helper()
            command = self._settings()["host"]["salt_helper"]
            self._helper = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        return self._helper

    def _end_helper(self) -> None:
        if self._helper is None:
            return
        try:
            self._helper.communicate(timeout=2)
        except (subprocess.TimeoutExpired, OSError, ValueError):
            self._helper.kill()
            self._helper.wait()
        self._helper = None
