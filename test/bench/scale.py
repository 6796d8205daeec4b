#!/usr/bin/env python3
"""Measure what applying rules and keeping elements take, by the number of elements, and how long logins wait meanwhile.

Run it as root: ``test/bench/scale.py`` with the Python of the tests; ``--help`` says what can be chosen.

In a throw-away network namespace, each operation as the host does it:

no-op apply     the rules that are loaded are applied again
mode switch     from autoban to protected, or back: no set of elements is touched
remade sets     another size for the trusted sets: they are made anew, and their elements added again
snapshot        ``mailfw-rules save``, as the agent runs it each minute, after another login
restore         ``mailfw-rules load`` after ``nft flush ruleset``, as the agent runs it
agent start     until it answers

"Elements" are those of the trusted sets, half of them IPv4, with different times left; with each hundred of them come
a ban and a block. *processor* is the time that the processor spent on an operation, which hardly moves when the machine
is busy with other things; *seconds* are those of the clock.

Then the agent runs, and a process reports logins to it, ``--rate`` a second at random moments, while an operation is
done again and again. *longest_login* is the longest that one of them waited; Dovecot's login hook waits 250 ms at most.
*beside_logins* are the seconds of one operation.

Each round does everything for each number of elements, both in a new random order. A table has the median of all
rounds, and in brackets the lowest and the highest. Each figure is a line of JSON, too.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "test"), str(REPOSITORY / "_utils")]

from bench import picture  # noqa: E402
from bench.cost import hosts  # noqa: E402
from bench.wires import OTHER_NETWORK, TRUSTED_IPV6, TRUSTED_NETWORK  # noqa: E402
from mailfwlib import client, elements, files, nft, parse, ruleset, settings, snapshot  # noqa: E402
from support.agent import KEY, Agent  # noqa: E402
from support.firewall import rule_files  # noqa: E402
from support.net import Host, Net, until  # noqa: E402

PILLAR: dict[str, Any] = {"fleet": {"keys": [KEY]}}
#: The rules that are switched between: mode and size of the trusted sets.
MODES, SIZES = ("autoban", "protected"), (2_000_000, 1_999_999)
DAY = 86400
#: What logins wait for is compared with when nothing is done.
NOTHING = "nothing"
#: The agent's start, and its first snapshot, take no longer than this many seconds.
LIMIT = 600
#: Reports logins at random moments until its standard input ends; then prints how long each waited.
LOGINS = """
import json, random, sys, threading, time
sys.path.insert(0, "/usr/lib/mailfw")
from mailfwlib import client
ended, waits = threading.Event(), []
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
while not ended.wait(random.expovariate(float(sys.argv[1]))):
    began = time.monotonic()
    number = random.randrange(1, 255)
    client.ask("login", f"198.51.100.{number}", f"user{number}@example.org", timeout=600)
    waits.append(time.monotonic() - began)
print(json.dumps(waits))
"""


class Figure(NamedTuple):
    """One measurement; its value is None when the operation did not end while logins went on."""

    measure: str
    operation: str
    elements: int
    value: Optional[float]


def earlier(count: int) -> snapshot.Elements:
    """Return the elements of a host on which people have logged in, with so many in its trusted sets."""
    found, now = {}, round(time.time())
    resolved = settings.resolve(PILLAR)
    for family, network in (("ipv4", TRUSTED_NETWORK), ("ipv6", TRUSTED_IPV6)):
        sources = [elements.trusted_key(parse.address(text), resolved) for text in hosts(network, count // 2)]
        values = (f"{source} . {port}" for source in sources for port in settings.login_ports(resolved))
        trusted = itertools.islice(values, count // 2)
        found[f"trusted_{family}"] = [
            snapshot.Element(value, DAY, now + random.randrange(DAY // 2, DAY)) for value in trusted
        ]
        few = [snapshot.Element(str(source), DAY, now + DAY // 2) for source in sources[: count // 200]]
        found.update({f"{kind}_{family}": few for kind in ("banned_postfix", "banned_dovecot", "blocked")})
    return found


class Subject:
    """The mail host, and what is done to it."""

    def __init__(self, host: Host):
        self._host = host
        self._strangers = itertools.cycle(hosts(OTHER_NETWORK, 100_000))
        self._files = {
            (mode, size): rule_files(
                settings.resolve({**PILLAR, "protection": {"type": mode}, "sizes": {"trusted": size}})
            )
            for mode in MODES
            for size in SIZES
        }
        self._loaded = (MODES[0], SIZES[0])
        self._install(*self._loaded)

    def inside(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return what a function returns on the host, however long it takes."""
        return self._host.start(function, *arguments, **options).result()

    def _install(self, mode: str, size: int) -> list[str]:
        """Apply rules as the state does; return the objects that were altered."""
        self._loaded = (mode, size)
        return ruleset.altered(self.inside(ruleset.install, self._files[self._loaded])[0])

    def _tool(self, verb: str) -> str:
        tool = ["/usr/lib/mailfw/mailfw-rules", verb]
        return str(self.inside(subprocess.run, tool, check=True, capture_output=True, text=True).stdout)

    def no_op(self) -> None:
        """Apply the rules that are loaded."""
        assert self._install(*self._loaded) == []

    def switch(self) -> None:
        """Apply those of the other mode."""
        mode, size = self._loaded
        altered = self._install(MODES[1 - MODES.index(mode)], size)
        assert "map services" in altered
        assert "set trusted_ipv4" not in altered

    def remake(self) -> None:
        """Apply those with another size of the trusted sets."""
        mode, size = self._loaded
        assert {"set trusted_ipv4", "set trusted_ipv6"} <= set(self._install(mode, SIZES[1 - SIZES.index(size)]))

    def save(self) -> int:
        """Take a snapshot; return its number of elements."""
        return int(self._tool("save").split()[-2])

    def restore(self) -> None:
        """Load what was flushed."""
        assert "altered: set trusted_ipv4\n" in self._tool("load")

    def flush(self, count: int) -> None:
        """Take the rules away, and leave a snapshot with so many elements."""
        self.inside(nft.run, "flush ruleset")
        self.inside(files.replace, snapshot.PATH, snapshot.text(earlier(count)))

    def login(self) -> None:
        """Trust one more address."""
        resolved = settings.resolve(PILLAR)
        ports = dict.fromkeys(settings.login_ports(resolved), DAY)
        self.inside(nft.run, elements.trust(parse.address(next(self._strangers)), ports, resolved))

    def operations(self) -> dict[str, Callable[[], Any]]:
        """Return what is done to a loaded host: name -> function."""
        return {
            "no-op apply": self.no_op,
            "mode switch": self.switch,
            "remade sets": self.remake,
            "snapshot": self.save,
        }


def processor() -> float:
    """Return the seconds that the processor has spent on this process and those that it has started and seen end."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(name: str, operation: Callable[[], Any], count: int) -> Iterator[Figure]:
    """Yield what one operation takes."""
    spent, began = processor(), time.monotonic()
    operation()
    seconds, busy = time.monotonic() - began, processor() - spent
    yield Figure("processor", name, count, busy)
    yield Figure("seconds", name, count, seconds)


def alone(subject: Subject, count: int) -> Iterator[Figure]:
    """Yield what each operation takes while the agent does not run; switches and the like go there and back."""
    subject.flush(count)
    yield from timed("restore", subject.restore, count)
    operations = list(subject.operations().items()) * 2
    for name, operation in random.sample(operations, len(operations)):
        subject.login()
        yield from timed(name, operation, count)
    assert subject.save() >= count, "elements were lost"


def again_and_again(operation: Callable[[], Any], seconds: float) -> float:
    """Do an operation until some seconds are over; return the seconds that one took."""
    began, times = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        operation()
        times += 1
    return (time.monotonic() - began) / times


def meanwhile(
    subject: Subject, name: str, operation: Callable[[], Any], count: int, asked: argparse.Namespace
) -> Iterator[Figure]:
    """Yield how long logins wait while an operation is done again and again, and what it takes then."""
    command = ["/usr/bin/python3", "-I", "-c", LOGINS, str(asked.rate)]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        with subject.inside(subprocess.Popen, command, **options) as logins:
            doing = thread.submit(again_and_again, operation, asked.seconds)
            concurrent.futures.wait([doing], timeout=asked.patience)
            took = doing.result() if doing.done() else None
            waits = json.loads(logins.communicate()[0])
        doing.result()
    yield Figure("longest_login", name, count, max(waits))
    yield Figure("median_login", name, count, statistics.median(waits))
    if name != NOTHING:
        yield Figure("beside_logins", name, count, took)


def with_agent(subject: Subject, agent: Agent, count: int, asked: argparse.Namespace) -> Iterator[Figure]:
    """Yield how long the agent's start takes, and logins wait, but for when the agent takes a snapshot of its own."""
    began = time.monotonic()
    subject.inside(client.ask, "status", timeout=LIMIT)
    yield Figure("seconds", "agent start", count, time.monotonic() - began)
    until(lambda: agent.status()["last_snapshot"], "the agent's first snapshot", LIMIT)
    operations = {NOTHING: lambda: time.sleep(asked.seconds), **subject.operations()}
    for name, operation in random.sample(list(operations.items()), len(operations)):
        before = agent.status()["last_snapshot"]
        figures = list(meanwhile(subject, name, operation, count, asked))
        if agent.status()["last_snapshot"] == before:
            yield from figures


def measure(host: Host, directory: Path, asked: argparse.Namespace) -> Iterator[Figure]:
    """Yield all figures."""
    subject = Subject(host)
    for done in range(asked.rounds):
        for count in random.sample(asked.elements, len(asked.elements)):
            print(f"\rround {done + 1} of {asked.rounds}: {count:,} elements ", end="", file=sys.stderr, flush=True)
            yield from alone(subject, count)
            of_agent = directory / f"agent-{done}-{count}"
            of_agent.mkdir()
            agent = Agent(host, of_agent, PILLAR)
            try:
                yield from with_agent(subject, agent, count, asked)
            finally:
                agent.close()
    print(file=sys.stderr)


#: Measure -> operation -> elements -> values.
Summary = dict[str, dict[str, dict[int, list[Optional[float]]]]]


def summary(figures: list[Figure]) -> Summary:
    """Return the values of all rounds together."""
    found: Summary = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for figure in sorted(figures, key=lambda one: one.elements):
        found[figure.measure][figure.operation][figure.elements].append(figure.value)
    return found


def cell(values: list[Optional[float]]) -> str:
    """Return the median, the lowest and the highest of some values."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"no end ({len(values) - len(known)} of {len(values)})"
    if not known:
        return "-"
    return f"{statistics.median(known):.3f} ({min(known):.3f}-{max(known):.3f})"


def table(found: Summary) -> str:
    """Return the summary as text."""
    lines = []
    for measure, of_operation in found.items():
        counts = sorted({count for of_count in of_operation.values() for count in of_count})
        lines.append(f"\n{measure:15}" + "".join(f"{count:>24,}" for count in counts))
        for operation, of_count in sorted(of_operation.items()):
            lines.append(f"{operation:15}" + "".join(f"{cell(of_count.get(count, [])):>24}" for count in counts))
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Return where this was measured."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0].partition(": ")[2] if models else platform.machine(),
        "processors_used": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
        "nft": nft.command("--version").strip(),
    }


def options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--elements", type=int, nargs="+", default=[0, 1000, 10_000, 100_000], help="numbers of elements"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--rate", type=float, default=5, help="logins a second (5)")
    parser.add_argument("--seconds", type=float, default=6, help="of logins beside each operation (6)")
    parser.add_argument(
        "--patience", type=float, default=20, help="seconds after which logins wait no more for its end (20)"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the figures into this SVG file")
    parser.add_argument(
        "--figures", type=Path, metavar="FILE", help="measure nothing: take what an earlier run has printed"
    )
    return parser.parse_args()


def measured(asked: argparse.Namespace) -> Iterator[Figure]:
    """Yield all figures, each printed as a line of JSON."""
    print(json.dumps({"machine": machine()}), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        net = Net(Path(directory))
        try:
            for figure in measure(net.host, Path(directory), asked):
                print(json.dumps(figure._asdict()), flush=True)
                yield figure
        finally:
            net.close()


def recalled(path: Path) -> Iterator[Figure]:
    """Yield the figures among the lines that an earlier run has printed."""
    for line in path.read_text().splitlines():
        if line.startswith('{"measure"'):
            yield Figure(**json.loads(line))


def main() -> None:
    """Measure, print and draw."""
    asked = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = summary(list(recalled(asked.figures) if asked.figures else measured(asked)))
    print(table(found))
    if asked.picture:
        picture.draw(asked.picture, found)


if __name__ == "__main__":
    main()
