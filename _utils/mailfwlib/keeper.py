"""Keeping the rules: a thread that notices what somebody has taken away, puts it back, and takes snapshots.

What takes long runs in processes of its own (``mailfw-rules``), so that neither delays a login's acknowledgement.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from mailfwlib import netlink, ruleset
from mailfwlib.worker import Attempts, Worker, WorkError

TOOL = "/usr/lib/mailfw/mailfw-rules"
#: Seconds between two looks at the rules.
LOOK = 1.0
#: Seconds between two snapshots, and how many times as long as a snapshot took the pause after it is at least.
SNAPSHOT, REST = 60.0, 50
#: Seconds at most after a repair that failed until the next one; it begins with LOOK, and doubles.
PATIENCE = 10.0
#: A process of its own that takes longer than this many seconds hangs.
LONGEST = 120.0

log = logging.getLogger("mailfw-agent")


class Keeper:
    """Looks after the rules.

    Calls ``renewed`` with since when elements may be missing, and with what was altered; None where mailfw.service has
    loaded the rules anew.
    """

    def __init__(self, renewed: Callable[[float, Optional[list[str]]], None], tool: str = TOOL):
        self._renewed = renewed
        self._tool = tool
        self._kernel = netlink.Kernel()
        self._seen: tuple[int, Any] = (-1, None)
        #: The table that has all elements.
        self._table = self._kernel.table()
        self._snapshot_at = 0.0
        self._next_snapshot = time.monotonic()
        self._pause = LOOK
        #: What the pause after the next repair that fails will be.
        self._patience = LOOK
        #: Since when elements may be missing, while a repair is not known to be done.
        self._unfinished: float | None = None
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

    def _work(self) -> None:
        self._pause = LOOK
        self._look()
        if time.monotonic() >= self._next_snapshot:
            self._snapshot()

    def _look(self) -> None:
        """Repair the rules if they are not those that were loaded last."""
        seen = (self._kernel.generation(), _stamp(ruleset.LOADED))
        if seen == self._seen:
            return
        if self._is_damaged():
            self._repair()
        elif self._unfinished is not None:  # It was done, but ended before it could say so.
            self._finish([])
        elif (table := self._kernel.table()) not in (None, self._table):
            self._table = table
            self._renewed(self._snapshot_at, None)
        else:
            self._seen = seen

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
        if self._unfinished is None:
            self._unfinished = self._snapshot_at
        done = self._run("load", lambda: True)
        if done.returncode:
            # Somebody may have altered them again in the middle of it.
            self._pause, self._patience = self._patience, min(2 * self._patience, PATIENCE)
            raise WorkError(f"they were altered, and the repair fails: {done.stderr.strip()}")
        self._patience = LOOK
        self.heals += 1
        log.warning("the rules were altered by somebody and are repaired:\n%s", done.stdout.strip())
        self._finish([line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("altered: ")])

    def _finish(self, altered: list[str]) -> None:
        since, self._unfinished = self._unfinished, None
        self._table = self._kernel.table()
        if since is not None:
            self._renewed(since, altered)

    def _snapshot(self) -> None:
        if ruleset.loaded() and self._kernel.table() == self._table and not self._differs():
            began = time.monotonic()
            self._snapshots.make(self._save)
            now = time.monotonic()
            self._next_snapshot = now + max(SNAPSHOT, REST * (now - began))

    def _save(self) -> None:
        clock = time.time()
        done = self._run("save", lambda: not self._is_damaged())
        if done.returncode:
            raise WorkError(done.stderr.strip())
        if self._kernel.table() == self._table:  # Otherwise it may be one of a table that lacks elements.
            self._snapshot_at = clock

    def _run(self, verb: str, goes_on: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
        """Run the tool to its end, unless ``goes_on`` says meanwhile that there is something else to do."""
        command, end = [self._tool, verb], time.monotonic() + LONGEST
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while True:
                try:
                    output, errors = process.communicate(timeout=LOOK)
                    return subprocess.CompletedProcess(command, process.returncode, output, errors)
                except subprocess.TimeoutExpired:
                    if time.monotonic() > end or not goes_on():
                        process.kill()
                        raise WorkError(f"mailfw-rules {verb} did not come to its end, and was ended") from None


def _stamp(path: Path) -> Any:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
