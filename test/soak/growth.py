"""What processes hold while something goes on for long: memory, descriptors, threads; and how that grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression


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
    """Looks at a process now and then."""

    name: str
    process: Path
    #: Logins so far -> what the process held.
    seen: list[tuple[int, Holding]] = field(default_factory=list)

    def look(self, logins: int) -> None:
        """Look at the process after so many logins."""
        self.seen.append((logins, holding(self.process)))

    @property
    def slope(self) -> float:
        """KiB for each thousand logins, over the second half, when all caches are full."""
        half = self.seen[len(self.seen) // 2 :]
        return linear_regression([logins / 1000 for logins, _ in half], [one.memory for _, one in half]).slope

    def report(self) -> str:
        """Return a line for people."""
        first, middle, last = self.seen[0][1], self.seen[len(self.seen) // 2][1], self.seen[-1][1]
        return (
            f"{self.name:<14} memory {first.memory} -> {middle.memory} -> {last.memory} KiB, "
            f"{self.slope:+.1f} KiB per 1000 logins in the second half; "
            f"descriptors {first.descriptors} -> {last.descriptors}, threads {first.threads} -> {last.threads}"
        )

    def check(self, most: float) -> None:
        """Insist that memory grows by less than ``most`` KiB for each thousand logins, and nothing else does."""
        first, last = self.seen[len(self.seen) // 4][1], self.seen[-1][1]
        assert self.slope < most, self.report()
        assert last.threads <= first.threads, self.report()
        assert last.descriptors <= first.descriptors + 2, self.report()  # connections that are just served


def children(process: Path) -> list[Path]:
    """Return the processes that any thread of a process has started."""
    found = [pid for task in process.glob("task/*/children") for pid in task.read_text().split()]
    return [process.with_name(pid) for pid in found]
