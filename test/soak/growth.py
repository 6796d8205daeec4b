"""What processes hold while something goes on for long: memory, descriptors, threads; and how that grows."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Holding:
    """What a process holds: resident memory in KiB, open descriptors, threads."""

    memory: int
    descriptors: int
    threads: int


def holding(process: Path) -> Holding:
    """Look at a process; ``process`` is its directory of a proc(5)."""
    lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Holding(int(lines["VmRSS"].split()[0]), len(list((process / "fd").iterdir())), int(lines["Threads"].strip()))


@dataclass
class Growth:
    """Looks at a process now and then. The first one is before any login."""

    name: str
    process: Path
    #: Logins so far -> what the process held.
    seen: list[tuple[int, Holding]] = field(default_factory=list)

    def look(self, logins: int) -> None:
        """Look at the process after so many logins."""
        self.seen.append((logins, holding(self.process)))

    @property
    def slope(self) -> float:
        """Bytes for each login, over the second half, when tables and caches are full.

        The median of what any two looks say (Theil and Sen): memory that C's library takes from the system in one step
        now and then, and hands out again and again, is no slope; what is kept of each login is one.
        """
        half = self.seen[len(self.seen) // 2 :]
        pairs = combinations([(logins, 1024 * one.memory) for logins, one in half], 2)
        return median((after - before) / (later - earlier) for (earlier, before), (later, after) in pairs)

    def is_at_rest(self) -> bool:
        """Return whether the process has no more descriptors and threads than before the first login."""
        first, now = self.seen[0][1], holding(self.process)
        return now.descriptors <= first.descriptors and now.threads <= first.threads

    def report(self) -> str:
        """Return a line for people."""
        first, middle, last = (self.seen[place][1] for place in (0, len(self.seen) // 2, -1))
        most, now = max(one.threads for _, one in self.seen), holding(self.process)
        return (
            f"{self.name:<11} memory {first.memory} -> {middle.memory} -> {last.memory} KiB, "
            f"{self.slope:+.1f} bytes for each login of the second half; "
            f"descriptors {first.descriptors} -> {now.descriptors}; "
            f"threads {first.threads} -> at most {most} -> {now.threads}"
        )


def helper(agent: Path) -> Path | None:
    """Return the helper that an agent has started, None while there is none; an agent has other children, too."""
    for task in agent.glob("task/*/children"):
        for child in map(agent.with_name, task.read_text().split()):
            with suppress(OSError):
                if b"salt_helper" in (child / "cmdline").read_bytes():
                    return child
    return None
