"""The monitor: a thread of the agent that looks at what operators want to be told of, and writes the metrics.

It asks the kernel over netlink, since ``nft`` would read every element first; no login waits for it.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from mailfwlib import breakglass, familiar, files, metrics, netlink, ruleset, snapshot
from mailfwlib.settings import Settings
from mailfwlib.worker import Worker

#: Seconds between two looks where the settings do not say, and how many times the processor time of a look the pause
#: after it is at least.
LOOK, REST = 15.0, 50
#: Seconds between two countings of the elements, on kernels that do not say how many there are.
COUNT = 60.0
#: Refused addresses that the status names.
MOST_SHOWN = 20

log = logging.getLogger("mailfw-agent")


class Monitor:
    """Looks at the host every now and then. ``tell`` fires an event: its tag and its data."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        status: Callable[[], dict[str, Any]],
        tell: Callable[[str, dict[str, Any]], None],
    ):
        self._settings, self._status, self._tell = settings, status, tell
        self._full: set[str] = set()
        self._opening: Optional[breakglass.Opening] = None
        self.familiar = familiar.Familiar()
        self._watch = familiar.Watch(self.familiar)
        self._started = time.time()
        self._counted: dict[str, int] = {}
        self._next_count = 0.0
        #: Whether the directory of the metrics was seen in another state than that nothing can be written there.
        self._was_otherwise = False
        self._kernel = netlink.Kernel()
        self._worker = Worker("monitor", "no metrics", self._look, self._pause, self.familiar.save)

    def start(self) -> None:
        """Start the thread."""
        self._worker.start()

    def stop(self) -> None:
        """End the thread; what is known of familiar addresses is on disk then."""
        self._worker.stop()

    def status(self) -> dict[str, Any]:
        """Return how many addresses are familiar, how many of them are refused now, and of some of these why."""
        refused: dict[str, str] = {}
        for one in sorted(self._watch.now, key=str):
            refused.setdefault(str(one.address), f"{one.reason}, {one.where}")
        shown = dict(list(refused.items())[:MOST_SHOWN])
        return {"familiar": len(self.familiar), "familiar_refused": len(refused), "refused_addresses": shown}

    def _pause(self) -> float:
        wanted = (self._settings().get("metrics") or {}).get("interval", LOOK)
        return float(max(wanted, REST * self._worker.took))

    def _look(self) -> None:
        self.familiar.save()
        settings, now = self._settings(), time.time()
        if self._kernel.sets():
            found = familiar.refused(self._kernel, self.familiar, settings, now)
            for sentence in self._watch.look(found, settings["enforce"], now):
                log.warning("%s", sentence)
        levels = self._levels()
        self._tell_news(settings["host"]["id"], levels, breakglass.opening(now, self._kernel))
        if settings.get("metrics"):
            self._write(Path(settings["metrics"]["directory"]), self._facts(settings, levels, now))

    def _tell_news(self, host: str, levels: dict[str, netlink.Level], opening: Optional[breakglass.Opening]) -> None:
        """Tell of sets that have become full, and of an opening that has begun, changed or ended."""
        full = {
            name
            for name, (elements, size) in levels.items()
            if not name.startswith(metrics.NOT_SHOWN) and elements is not None and elements >= size
        }
        for name in sorted(full - self._full):
            self._tell("mailfw/full", {"host": host, "set": name, "size": levels[name].size})
        self._full = full
        (ends, reason), (ended, why) = opening or (0, ""), self._opening or (0, "")
        if abs(ends - ended) >= breakglass.ALIKE or reason != why:
            self._tell("mailfw/open", {"host": host, "until": ends, "reason": reason})
            self._opening = opening

    def _facts(self, settings: Settings, levels: dict[str, netlink.Level], now: float) -> metrics.Facts:
        agent, record = self._status(), ruleset.loaded()
        return metrics.Facts(
            now=now,
            seconds=self._worker.took,
            started=self._started,
            settings=settings,
            agent=agent,
            counters=self._kernel.counters(),
            levels=levels,
            altered=bool(record) and self._kernel.fingerprint(record["static"]) != record["fingerprint"],
            applies=record.get("applies", 0),
            applied=files.modified(ruleset.LOADED),
            opening=self._opening,
            snapshot=agent["last_snapshot"] or files.modified(snapshot.PATH),
            familiar=len(self.familiar),
            refused={reason: len(self._watch.addresses(reason)) for reason in familiar.REASONS},
            refusals=self._watch.times,
        )

    def _levels(self) -> dict[str, netlink.Level]:
        """Return how full the sets are; where the kernel does not say, their elements are counted now and then."""
        levels = self._kernel.levels()
        if all(level.elements is not None for level in levels.values()):
            return levels
        if time.monotonic() >= self._next_count:
            began = time.thread_time()
            self._counted = {name: self._kernel.count(name) for name in levels}
            self._next_count = time.monotonic() + max(COUNT, REST * (time.thread_time() - began))
        return {name: level._replace(elements=self._counted.get(name)) for name, level in levels.items()}

    def _write(self, directory: Path, facts: metrics.Facts) -> None:
        if not directory.is_dir():  # Nobody wants to read them.
            self._was_otherwise = True
            return
        try:
            files.replace(directory / metrics.FILE, metrics.render(metrics.samples(facts)), mode=0o644)
        except OSError as err:
            if err.errno == errno.EROFS and self._was_otherwise:
                # It was made after systemd has given this process its view of the disk. No login is lost by a restart.
                log.info("%s is there now: starting again, to write to it", directory)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            raise
        self._was_otherwise = True
