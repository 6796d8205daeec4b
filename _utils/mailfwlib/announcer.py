"""Telling the fleet of logins: a thread that signs them, and a helper process with Salt's Python that fires events.

``event.send`` returns True even when the event is lost, so a message counts as delivered only when its echo comes
back: the master publishes every message to all mail hosts, its sender included. Until then it is sent again, and kept
in a journal that outlives the agent. The next message waits for that echo, too, so that a fleet that is slow gets fewer
messages with more logins in each.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import subprocess
import threading
import time
from collections.abc import Callable
from typing import IO, Any, cast

from mailfwlib import messages
from mailfwlib.journal import DIRECTORY, Journal, Pair, pair, pair_text
from mailfwlib.link import Link
from mailfwlib.parse import Address
from mailfwlib.settings import Settings
from mailfwlib.worker import Attempts

TAG = "mailfw/login"
#: The minion's scheduled job that asks the master for what this host has missed.
CATCH_UP = "mailfw agent catches up with the fleet"
#: Seconds in which logins are collected into one message, once the first of a quiet period has gone out: at least.
WINDOW = 0.25
#: Seconds after which a message without an echo is sent again: doubled each time, until one comes back. The next
#: message waits half as long for it.
FIRST_WAIT = 5.0
LONGEST_WAIT = 7.0
#: Logins that may wait for their echo; beyond that the oldest is dropped, and counted.
MOST_WAITING = 100_000
#: One in so many that are dropped is logged.
DROPPED_LOGGED = 1000
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
        self._newest = ""
        self._wait = FIRST_WAIT
        self._helper: subprocess.Popen[str] | None = None
        self._link = Link()
        self._stopping = False
        self._dropped = 0
        self._last_echo: float | None = None
        self._journal = Journal(DIRECTORY / "outbox", 2 * MOST_WAITING, pair, pair_text)
        for who, at in self._journal.load().items():
            if at > time.time() - messages.OLDEST_LOGIN:
                self._put(who, at)
        self._journal.replace(self._waiting)
        # A line in the log is enough: logins are trusted on this host whether or not the fleet hears of them.
        self._attempts = Attempts("logins could not be announced")
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
                self._link.echoed(time.monotonic())
                self._wake.notify()

    def status(self) -> dict[str, Any]:
        """Return how many logins have had no echo so far, when the oldest was, how many were dropped, the last echo.

        And how many seconds ago that was, and whether minion and master can be reached.
        """
        with self._wake:
            waiting = self._unanswered()
            return {
                "outbox": len(waiting),
                "oldest": min(waiting.values(), default=None),
                "dropped": self._dropped,
                "last_echo": self._last_echo,
                "seconds_since_echo": round(time.time() - self._last_echo) if self._last_echo else None,
                "reachable": self._link.up,
            }

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
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            self._dropped += 1
            if self._dropped % DROPPED_LOGGED == 1:
                log.warning(
                    "%s is not announced: %s logins wait already (%s dropped)", oldest[0], MOST_WAITING, self._dropped
                )

    def _run(self) -> None:
        if self._settings()["fleet"]["keys"]:
            # Salt takes a second to load: not in the way of the first login.
            self._attempts.make(self._running_helper)
        while self._work_to_do():
            self._attempts.make(self._send_waiting)
            self._collect()

    def _work_to_do(self) -> bool:
        """Wait until there is something to tell or to ask, and return True; or False when it is time to end."""
        with self._wake:
            while not self._something_to_tell() and not self._stopping:
                self._wake.wait(timeout=1.0)
                self._take_back_unanswered(time.monotonic())
                if not self._waiting and not self._sent:
                    self._journal.clear()
            return self._something_to_tell()

    def _something_to_tell(self) -> bool:
        if self._events or not self._settings()["fleet"]["keys"]:
            return bool(self._events or self._waiting)
        to_prove = self._link.unproven and not self._sent and not self._stopping
        return bool(self._link.up and (self._waiting or to_prove or self._link.must_ask(time.monotonic())))

    def _collect(self) -> None:
        """Let logins gather until the fleet has what went out last, or for half the time after which it goes again."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping, WINDOW)
            self._wake.wait_for(lambda: self._stopping or self._newest not in self._sent, self._wait / 2 - WINDOW)

    def _take_back_unanswered(self, now: float) -> None:
        late = [nonce for nonce, (_, due) in self._sent.items() if due < now]
        for nonce in late:
            for who, at in self._sent.pop(nonce)[0].items():
                self._put(who, at)
        if late:
            self._wait = min(self._wait * 2, LONGEST_WAIT)
            self._link.missed()

    def _send_waiting(self) -> None:
        """Send what waits, as many logins as one message takes; without a key the fleet is not told of them."""
        settings, nonce = self._settings(), messages.new_nonce()
        keys = settings["fleet"]["keys"]
        with self._wake:
            events, self._events = self._events, []
            fitting = messages.fitting(self._waiting) if self._link.up or not keys else 0
            logins = {who: self._waiting.pop(who) for who in list(self._waiting)[:fitting]}
            tells = keys and self._link.up and (logins or self._link.unproven)
            if tells:
                self._sent[nonce] = (logins, time.monotonic() + self._wait)
                self._newest = nonce
            if keys and self._link.must_ask(time.monotonic()):
                self._link.asked(time.monotonic())
                events.append({"run": CATCH_UP})
        for event in events:
            self._fire(event)
        if tells:
            now = time.time()
            last, users = messages.split(logins, now)
            text = messages.sign(settings["host"]["id"], nonce, last, keys[0], now, users)
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
            self._helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._ear = threading.Thread(target=self._listen, args=(self._helper.stdout,), daemon=True)
            self._ear.start()
        return self._helper

    def _listen(self, said: IO[str]) -> None:
        """Hear from a helper whether the master can be reached, until it ends; then try it with another helper."""
        with said:
            for line in said:
                self._hear(line.strip())
        with self._wake:
            self._link = Link()

    def _hear(self, line: str) -> None:
        with self._wake:
            was_up = self._link.up
            self._link.told(line, time.monotonic())
            if self._link.up and not was_up:
                log.info("minion and master are back")
                self._take_back_unanswered(math.inf)
                self._wait = FIRST_WAIT
            elif was_up and not self._link.up:
                log.warning("the minion is off, or the master cannot be reached: logins wait to be announced")
            self._wake.notify()

    def _end_helper(self) -> None:
        if self._helper is None:
            return
        with contextlib.suppress(OSError):
            cast(IO[str], self._helper.stdin).close()
        try:
            self._helper.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._helper.kill()
            self._helper.wait()
        self._ear.join(timeout=2)
        self._helper = None
