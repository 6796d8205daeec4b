"""A few facts of the agent on disk: an address and a time on each line, the last line of an address counts.

A line is appended without waiting for the disk, so that it costs a login some microseconds: it outlives the agent,
killed or not; a power failure may take the last seconds of it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

from mailfwlib import files, parse
from mailfwlib.parse import Address

DIRECTORY = Path("/var/lib/mailfw")

log = logging.getLogger("mailfw-agent")


class Journal:
    """A file of addresses and times, for one writer. What cannot be written is logged, and lost with the agent."""

    def __init__(self, path: Path, most: int):
        """``most``: lines after which the file is written anew, with what is still worth keeping."""
        self._path, self._most = path, most
        self._lines = 0
        self._broken = False

    def load(self) -> dict[Address, float]:
        """Return what was kept: address -> Unix time. Lines that are cut off or make no sense are left out."""
        found: dict[Address, float] = {}
        try:
            lines = self._path.read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            return {}
        self._lines = len(lines)
        for line in lines:
            try:
                address, at = line.split(" ")
                if math.isfinite(float(at)):
                    found[parse.address(address)] = float(at)
            except ValueError:
                continue
        return found

    def append(self, address: Address, at: float, all_of_it: Callable[[], dict[Address, float]]) -> None:
        """Keep a line more; ``all_of_it`` gives what is worth keeping when the file has become too long."""
        self._lines += 1
        if self._lines > self._most:
            self.replace(all_of_it())
            return
        try:
            with open(
                os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w", encoding="ascii"
            ) as file:
                file.write(_line(address, at))
            self._broken = False
        except OSError as err:
            self._complain(err)

    def clear(self) -> None:
        """Keep nothing."""
        if self._lines:
            self.replace({})

    def replace(self, entries: dict[Address, float]) -> None:
        """Keep these and nothing else."""
        try:
            files.replace(self._path, "".join(_line(address, at) for address, at in entries.items()))
            self._lines = len(entries)
            self._broken = False
        except OSError as err:
            self._complain(err)

    def _complain(self, err: OSError) -> None:
        if not self._broken:
            log.error("%s: %s; what it should keep is lost if the agent ends now", self._path, err.strerror)
        self._broken = True


def _line(address: Address, at: float) -> str:
    return f"{address} {at:.3f}\n"
