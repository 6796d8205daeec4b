"""Keeping the rules: a thread that notices what somebody has taken away, puts it back, and takes snapshots.

What takes long runs in processes of its own (``mailfw-rules``), so that neither delays a login's acknowledgement.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from mailfwlib import files, netlink, ruleset, snapshot
from mailfwlib.worker import Attempts, Worker, WorkError

TOOL = "/usr/lib/mailfw/mailfw-rules"
#: Seconds between two looks at the rules.
LOOK = 1.0
#: Seconds between two snapshots, and how many times as long as a snapshot took it is until the next one at least; SOON
#: if somebody asks for it, and then that many seconds at least.
SNAPSHOT, REST, SOON, SOONEST = 60.0, 50, 5, 2.0
#: Seconds at most after a repair that failed until the next one; it begins with LOOK, and doubles. Seconds after a
#: snapshot that somebody had asked for and that failed.
PATIENCE = 10.0
#: A process of its own that takes longer than this many seconds hangs.
LONGEST = 120.0

log = logging.getLogger("mailfw-agent")


class Keeper:
    """Looks after the rules.

    Calls ``renewed`` with since when elements may be missing, in Unix time, and with what was altered; None where
    mailfw.service has loaded the rules anew. No snapshot is taken from then on until ``is_whole`` is set again.
    """

    def __init__(self, renewed: Callable[[float, Optional[list[str]]], None], tool: str = TOOL):
        self._renewed = renewed
        self._tool = tool
        self._kernel = netlink.Kernel()
        self._seen: tuple[int, Any] = (-1, None)
        #: The table that was seen last.
        self._table = self._kernel.table()
        #: The table has all elements that it should have.
        self.is_whole = threading.Event()
        self.is_whole.set()
        #: When the last snapshot was taken that has all elements, in Unix time.
        self._known_until = files.modified(snapshot.PATH) or 0.0
        self._snapshot_at = 0.0
        self._next_snapshot = self._rested = time.monotonic()
        #: Somebody has asked for a snapshot.
        self._is_asked = False
        #: A process that was ended, but may not have.
        self._hung: Optional[subprocess.Popen[str]] = None
        self._pause = LOOK
        #: What the pause after the next repair that fails will be.
        self._patience = LOOK
        #: A repair is not known to be done.
        self._is_unfinished = False
        self.heals = 0
        self._snapshots = Attempts("no snapshot")
        self._worker = Worker("keeper", "the rules cannot be kept", self._work, lambda: self._pause, self._snapshot)

    def start(self) -> None:
        """Start the thread."""
        self._worker.start()

    def stop(self) -> None:
        """End the thread, with a last snapshot."""
        self._worker.stop()

    def status(self) -> dict[str, Any]:
        """Return how often the rules were repaired, and when the last snapshot was taken, in Unix time."""
        return {"heals": self.heals, "last_snapshot": self._snapshot_at or None}

    def save_soon(self) -> None:
        """Have a snapshot taken with the next look: something was changed that no login brings back."""
        self._is_asked = True

    def _work(self) -> None:
        self._pause = LOOK
        self._look()
        if time.monotonic() >= (self._rested if self._is_asked else self._next_snapshot):
            self._snapshot()

    def _look(self) -> None:
        """Repair the rules if they are not those that were loaded last."""
        seen = (self._kernel.generation(), _stamp(ruleset.LOADED))
        if seen == self._seen:
            return
        if self._is_damaged():
            self._repair()
        elif self._is_unfinished and ruleset.loaded():  # It was done, but ended before it could say so.
            self._tell([])
        elif (table := self._kernel.table()) not in (None, self._table):
            self._tell(None)
        else:
            self._is_unfinished, self._table, self._seen = False, table, seen

    def _is_damaged(self) -> bool:
        # Without the lock an applier may be between its transaction and its record of it.
        return self._differs() and self._differs_in_turn()

    def _differs_in_turn(self) -> bool:
        with ruleset.turn():
            return self._differs()

    def _differs(self) -> bool:
        record = ruleset.loaded()
        return bool(record) and self._kernel.fingerprint(record["static"]) != record["fingerprint"]

    def _repair(self) -> None:
        self._is_unfinished = True
        done = self._run("repair", lambda: True)
        if done.returncode:
            # Somebody may have altered them again in the middle of it.
            self._pause, self._patience = self._patience, min(2 * self._patience, PATIENCE)
            raise WorkError(f"they were altered, and the repair fails: {done.stderr.strip()}")
        self._patience = LOOK
        if not ruleset.loaded():  # They were unloaded before it could begin.
            return
        self.heals += 1
        log.warning("the rules were altered by somebody and are repaired:\n%s", done.stdout.strip())
        self._tell([line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("altered: ")])

    def _tell(self, altered: Optional[list[str]]) -> None:
        self._is_unfinished, self._table = False, self._kernel.table()
        self.is_whole.clear()
        # A snapshot that could not be read was set aside.
        self._renewed(self._known_until if snapshot.PATH.exists() else 0.0, altered)

    def _snapshot(self) -> None:
        if self.is_whole.is_set() and ruleset.loaded() and self._kernel.table() == self._table and not self._differs():
            self._snapshots.make(self._save)

    def _save(self) -> None:
        if self._hung and self._hung.poll() is None:
            raise WorkError("the last one has still not come to its end")
        clock, began = time.time(), time.monotonic()
        self._next_snapshot, self._rested = began + SNAPSHOT, began + PATIENCE
        asked, self._is_asked = self._is_asked, False
        try:
            done = self._run("save", lambda: not self._is_damaged())
            if done.returncode:
                raise WorkError(done.stderr.strip())
        except BaseException:
            self._is_asked = self._is_asked or asked
            raise
        took = time.monotonic() - began
        self._rested = began + max(SOONEST, SOON * took)
        self._next_snapshot = max(self._next_snapshot, began + REST * took)
        self._snapshot_at = clock
        if self.is_whole.is_set() and self._kernel.table() == self._table:
            self._known_until = clock

    def _run(self, verb: str, goes_on: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
        """Run the tool to its end, unless ``goes_on`` says meanwhile that there is something else to do."""
        command, end = [self._tool, verb], time.monotonic() + LONGEST
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, errors = process.communicate(timeout=LOOK)
                    return subprocess.CompletedProcess(command, process.returncode, output, errors)
                if time.monotonic() > end or not goes_on():
                    raise WorkError(f"mailfw-rules {verb} did not come to its end, and was ended")
        except BaseException:
            process.kill()  # Not waited for: on a dying disk it may not end.
            self._hung = process
            raise


def _stamp(path: Path) -> Any:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
