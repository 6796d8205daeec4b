"""Load from a client: many new connections, and sessions that talk, with a record of each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from support.net import LIMIT, Client, Host, until

_PROGRAM = Path(__file__).with_name("loadclient.py")


class Record(NamedTuple):
    """What became of a new connection (``kind`` connection) or of one line of a session (``line``).

    ``began`` and ``ended`` are times of the monotonic clock. Outcome of a connection: ``served``, with the greeting;
    ``late``, the same after a packet that was ignored; ``refused``, ``reset``, ``silent``. Of a line: ``answered``,
    ``late``, ``reset``, ``silent``. Else it is the error that the client had.
    """

    kind: str
    source: str
    own_port: int
    port: int
    began: float
    ended: float
    outcome: str


class Load:
    """A process in a client's namespace that makes ``rate`` connections a second and keeps sessions talking.

    ``knocks`` and ``sessions`` are pairs of a source and a port.
    """

    def __init__(
        self,
        client: Client,
        directory: Path,
        knocks: list[tuple[str, int]],
        rate: float,
        sessions: list[tuple[str, int]],
    ):
        self._records: list[Record] = []
        self._output, self._read = directory / f"load-{client.name}", 0
        # If the thread that has started it ends, with the test run or without, the load ends as well.
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-I", str(_PROGRAM)]
        with self._output.open("wb") as file:
            self._process = client.call(subprocess.Popen, command, stdin=subprocess.PIPE, stdout=file)
        plan = {"knocks": _targets(knocks), "rate": rate, "sessions": _targets(sessions)}
        self._process.stdin.write(json.dumps(plan).encode() + b"\n")
        self._process.stdin.flush()
        until(lambda: len(self.sessions()) == len(sessions), "all sessions talk")

    def records(self) -> list[Record]:
        """Return what has happened until now."""
        with self._output.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if line.endswith(b"\n"):
                    self._records.append(Record(*json.loads(line)))
                    self._read += len(line)
        return self._records

    def connections(self, begin: float, end: float) -> list[Record]:
        """Return the connections that began between two times and have ended until now."""
        return [one for one in self.records() if one.kind == "connection" and begin <= one.began <= end]

    def sessions(self) -> dict[tuple[str, int], list[Record]]:
        """Return the lines of each session: the client's address and port -> what became of its lines."""
        found = defaultdict(list)
        for one in self.records():
            if one.kind == "line":
                found[one.source, one.own_port].append(one)
        return found

    def close(self) -> None:
        """End the load; connections under way are waited for, so that they have their record as well."""
        self._process.stdin.close()
        try:
            assert self._process.wait(LIMIT) == 0
        finally:
            self._process.kill()
            self._process.wait()


def _targets(pairs: list[tuple[str, int]]) -> list[tuple[str, str, int]]:
    return [(source, Host.ipv6 if ":" in source else Host.ipv4, port) for source, port in pairs]
