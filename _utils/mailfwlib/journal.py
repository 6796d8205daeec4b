"""A few facts of the agent on disk: a thing and a time on each line, the last line of a thing counts.

A thing is an address, or who has logged in from where. It is written without white space.

A line is appended without waiting for the disk, so that it costs a login some microseconds: it outlives the agent,
killed or not; a power failure may take the last seconds of it. What a full disk does not take goes with the next line
that it takes.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from mailfwlib import files, parse
from mailfwlib.parse import Address

DIRECTORY = Path("/var/lib/mailfw")

Thing = TypeVar("Thing")
#: Who has logged in from where: the trusted address and the user's key, which is empty when no user is known.
Pair = tuple[Address, str]

log = logging.getLogger("mailfw-agent")


def pair(text: str) -> Pair:
    """Return who has logged in from where, from what :func:`pair_text` has written. Raises ValueError."""
    address, comma, key = text.partition(",")
    return parse.address(address), parse.user_key(key) if comma else ""


def pair_text(who: Pair) -> str:
    """Return who has logged in from where as a line of a journal has it."""
    return ",".join(filter(None, (str(who[0]), who[1])))


class Journal(Generic[Thing]):
    """A file of things and times, for one writer. What cannot be written is logged, and kept until it can."""

    def __init__(self, path: Path, most: int, read: Callable[[str], Thing], text: Callable[[Thing], str] = str):
        """``most``: lines after which the file is written anew, with what is still worth keeping.

        ``read`` and ``text`` turn a line's text into a thing, or raise ValueError, and a thing into text.
        """
        self._path, self._most, self._read, self._text = path, most, read, text
        self._lines = 0
        self._unwritten: list[str] = []
        self._broken = False

    def load(self) -> dict[Thing, float]:
        """Return what was kept: thing -> Unix time. Lines that are cut off or make no sense are left out."""
        found: dict[Thing, float] = {}
        try:
            *lines, cut_off = self._path.read_text(encoding="ascii", errors="replace").split("\n")
        except OSError:
            return {}
        # What is cut off would go on with the next line: then that has everything written anew.
        self._lines = self._most if cut_off else len(lines)
        for line in lines:
            try:
                text, at = line.split(" ")
                if math.isfinite(float(at)):
                    found[self._read(text)] = float(at)
            except ValueError:
                continue
        return found

    def append(self, thing: Thing, at: float, all_of_it: Callable[[], dict[Thing, float]]) -> None:
        """Keep a line more; ``all_of_it`` gives what is worth keeping when the file has become too long."""
        self._lines += 1
        self._unwritten.append(self._line(thing, at))
        if self._lines > self._most:
            self.replace(all_of_it())
            return
        try:
            self._write("".join(self._unwritten).encode("ascii"))
            self._all_is_written()
        except OSError as err:
            self._complain(err)

    def _write(self, lines: bytes) -> None:
        """Append lines, all or none. Raises OSError."""
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            before = os.fstat(file).st_size
            if os.write(file, lines) < len(lines):
                os.ftruncate(file, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)

    def _all_is_written(self) -> None:
        self._unwritten.clear()
        self._broken = False

    def clear(self) -> None:
        """Keep nothing. That does not wait for the disk either: a power failure may bring back what was there."""
        if not self._lines:
            return
        try:
            if self._path.exists():
                os.truncate(self._path, 0)
            self._lines = 0
            self._all_is_written()
        except OSError as err:
            self._complain(err)

    def replace(self, entries: dict[Thing, float]) -> None:
        """Keep these and nothing else."""
        try:
            files.replace(self._path, "".join(self._line(thing, at) for thing, at in entries.items()))
            self._lines = len(entries)
            self._all_is_written()
        except OSError as err:
            self._complain(err)

    def _complain(self, err: OSError) -> None:
        if not self._broken:
            log.error("%s: %s; what it should keep is lost if the agent ends now", self._path, err.strerror)
        self._broken = True

    def _line(self, thing: Thing, at: float) -> str:
        return f"{self._text(thing)} {at:.3f}\n"
