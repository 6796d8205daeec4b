#!/usr/bin/env python3
"""Measure what a login costs who logs in, and how soon every mail host of the fleet trusts where that was.

Run it as root: ``test/bench/login.py`` with the Python of the tests; ``--help`` says what can be chosen.

A Salt master and two mail hosts run in namespaces of this machine, with the product as its states install it. Each part
of what is measured is one of ``--part``:

acknowledgement
    What the hook waits for: from the connection to the agent's socket to its reply. Of addresses that are new, which
    the fleet is told of, and of known ones; one after the other, and several at once ("at once") without a pause.
client
    A whole login over IMAP, from the client's connection to its tagged OK, at Dovecots that differ in what they run
    after a login: no script, one that only starts the session, mailfw's hook, one that runs ``salt-call event.send``.
fleet
    From the moment a login is reported to the first host's agent to the element in the second host's kernel, which
    tells of it. Reported as the hook does it, at random moments, ``--rates`` a second, and one after a quiet minute;
    with how far the master is until then.

All take turns: in each round each number of trusted elements, and with each of those every kind of login, in a random
order. "More" and ratios are of the medians of one round and number of elements; shown is the median of all rounds, and
in brackets the lowest and the highest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "test"), str(REPOSITORY / "_utils")]

from saltfactories.plugins.event_listener import EventListener  # noqa: E402

from bench.arrivals import Arrivals  # noqa: E402
from bench.cost import hosts, trust  # noqa: E402
from bench.logins import EXEC_ONLY, MAILFW, NOTHING, SALT_CALL, Dovecots, at_once, user_of  # noqa: E402
from bench.scale import machine  # noqa: E402
from bench.wires import OTHER_NETWORK  # noqa: E402
from integration.fleet import NETWORK, Fleet, factories, masters_host, running_mail_hosts, running_master  # noqa: E402
from integration.hosts import ip, wait_for  # noqa: E402

#: Nobody is banned at this rate, whether or not a login makes him trusted.
PILLAR = {"autoban": {"rate": "100000/second", "burst": 10000}}
NEW, KNOWN, AT_ONCE, NEW_MAILFW = "new address", "known address", "known, at once", "mailfw, new address"
RATE, PROCESSOR, MESSAGES = "acknowledgements a second", "agent's processor time, µs each", "messages, "
#: salt-call is so slow that a few logins will do, and so is telling the fleet.
SALT_CALLS, NEW_ADDRESSES = 2, 6
#: Seconds until what a start of the agent sets off has ended, and what a message to the fleet does after its echo.
SETTLED, ECHOED = 5.0, 0.3
#: A pace: one login after so many seconds without, which is longer than Salt's reactor keeps a runner by default.
LONE, QUIET = "after a quiet minute", 65.0
ADDRESS = re.compile(r'"([0-9.]+)\\"')
#: Seconds after which the master has told of everything.
EVENTS = 30.0
#: What the master tells of a login on its way: event's tag and function -> what it means.
STAGES = {
    ("mailfw/login", None): "event on the master",
    ("salt/run/*/new", "runner.mailfw.announce"): "runner starts",
    ("salt/job/*/new", "mailfw.receive"): "job published",
}


class Figure(NamedTuple):
    """What logins of one kind took in one round: seconds of each, or what else a kind's name says."""

    part: str
    kind: str
    elements: int
    values: list[float]


class Subject:
    """The fleet, and what is done to its first host."""

    def __init__(self, fleet: Fleet, directory: Path):
        self.fleet = fleet
        self.mx1, self.mx2 = fleet.hosts["mx1"], fleet.hosts["mx2"]
        self._strangers = itertools.cycle(hosts(OTHER_NETWORK, 100_000))
        self.known = [self.stranger() for _ in range(256)]
        ip("route", "add", "local", OTHER_NETWORK, "dev", "lo")
        self.mx1.host.run("ip", "route", "add", OTHER_NETWORK, "via", f"{NETWORK}.1")
        fleet.write_pillar("mx1", **PILLAR)
        assert not fleet.apply(self.mx1).failed
        salt_call = fleet.salt_call_command(self.mx1.minion.config_dir)
        self.dovecots = Dovecots(self.mx1, directory, salt_call)
        self.dovecots.wait(self.known[0])

    def stranger(self) -> str:
        """Return the address of a client that nobody knows yet."""
        return next(self._strangers)

    def trust(self, count: int) -> None:
        """Have so many elements in the first host's trusted sets, and a fleet that knows of no login."""
        self.mx1.agent.stop()
        self.fleet.forget_logins()
        sets = "".join(f"flush set inet mailfw trusted_{family}\n" for family in ("ipv4", "ipv6"))
        self.mx1.host.run("nft", "-f", "-", input=sets + (trust(count) if count else ""))
        self.mx1.agent.start()
        wait_for("the agent's first snapshot and echo", self._has_settled)
        time.sleep(SETTLED)
        self.report(self.known)
        self.wait_for_echo()

    def _has_settled(self) -> bool:
        status = self.mx1.agent.status()
        return bool(status["last_snapshot"] and status["last_echo"])

    def wait_for_echo(self) -> None:
        """Wait until the fleet has heard of all logins."""
        wait_for("the echo", lambda: self.mx1.agent.status()["outbox"] == 0, 120)
        time.sleep(ECHOED)

    def log_in(self, kind: str) -> float:
        """Log in over IMAP; return the seconds that it took."""
        if kind != NEW_MAILFW:
            return self.dovecots.log_in(kind, random.choice(self.known))
        took = self.dovecots.log_in(MAILFW, self.stranger())
        self.wait_for_echo()
        return took

    def report(self, addresses: list[str]) -> list[float]:
        """Report logins to the agent one after the other; return the seconds that each waited."""
        waits = []
        for address in addresses:
            began = time.perf_counter()
            self.mx1.agent.login(address, user_of(address))
            waits.append(time.perf_counter() - began)
        return waits

    def processor(self) -> float:
        """Return the seconds that the agent has run so far."""
        pid = self.mx1.agent.status()["pid"]
        tasks = self.mx1.host.path(f"/proc/{pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def acknowledgements(subject: Subject, asked: argparse.Namespace) -> Iterator[tuple[str, list[float]]]:
    """Yield what logins wait for that are reported to the agent: kind of login, seconds of each."""
    yield KNOWN, subject.report([random.choice(subject.known) for _ in range(asked.reports)])
    yield NEW, subject.report([subject.stranger() for _ in range(asked.reports)])
    subject.wait_for_echo()
    before = subject.processor()
    waits = at_once(subject.mx1, subject.known, asked.connections, asked.at_once)
    yield AT_ONCE, waits
    yield RATE, [len(waits) / asked.at_once]
    yield PROCESSOR, [(subject.processor() - before) / len(waits)]


def client_logins(subject: Subject, asked: argparse.Namespace) -> Iterator[tuple[str, list[float]]]:
    """Yield what logins of real clients take: kind of login, seconds of each."""
    times = dict.fromkeys((NOTHING, EXEC_ONLY, MAILFW), asked.logins)
    turns = [
        kind
        for kind, count in {**times, NEW_MAILFW: NEW_ADDRESSES, SALT_CALL: SALT_CALLS}.items()
        for _ in range(count)
    ]
    before, found = subject.mx1.agent.status()["logins"], defaultdict(list)
    for kind in random.sample(turns, len(turns)):
        found[kind].append(subject.log_in(kind))
    noted = subject.mx1.agent.status()["logins"] - before
    assert noted == asked.logins + NEW_ADDRESSES, f"the agent has heard of {noted} logins"
    yield from found.items()


def paces(asked: argparse.Namespace) -> dict[str, list[float]]:
    """Return when logins are reported, in seconds after the start: name of a pace -> moments."""
    found = {
        f"{rate:g} a second": [(number + random.random()) / rate for number in range(round(rate * asked.seconds))]
        for rate in sorted(asked.rates)
    }
    return {**({LONE: [QUIET]} if asked.lone else {}), **found}


def spread(subject: Subject, pace: str, moments: list[float]) -> Iterator[tuple[str, list[float]]]:
    """Yield what it takes until the second host trusts addresses that log in at the first, and how many messages."""
    subject.wait_for_echo()
    messages, arrivals = subject.mx1.agent.status()["received"], Arrivals(subject.mx2.host)
    start, began = time.time(), time.monotonic()
    reported: dict[str, float] = {}
    try:
        for moment in moments:
            time.sleep(max(0.0, began + moment - time.monotonic()))
            address = subject.stranger()
            reported[address] = time.monotonic()
            subject.report([address])
        arrived = wait_for("the last arrival", lambda: reported.keys() <= arrivals.at.keys() and arrivals.at, 60)
    finally:
        arrivals.close()
    subject.wait_for_echo()
    yield pace, [arrived[address] - at for address, at in reported.items()]
    yield MESSAGES + pace, [subject.mx1.agent.status()["received"] - messages]
    for stage, seconds in stages(subject.fleet, {address: start + at - began for address, at in reported.items()}):
        yield f"{stage}, {pace}", seconds


def stages(fleet: Fleet, logins: dict[str, float]) -> Iterator[tuple[str, list[float]]]:
    """Yield when the master came to each stage of logins' messages: address -> Unix time of the login."""
    since = min(logins.values())
    for (pattern, function), stage in STAGES.items():
        wait_for(
            f"each {stage}", lambda its=(pattern, function): logins.keys() <= heard(fleet, since, *its).keys(), EVENTS
        )
        first = heard(fleet, since, pattern, function)
        yield stage, [first[address] - at for address, at in logins.items()]


def heard(fleet: Fleet, since: float, pattern: str, function: str | None) -> dict[str, float]:
    """Return which addresses the master's events of a kind have named since a moment, and when first."""
    found: dict[str, float] = {}
    events = fleet.events.get_events({("master", pattern)}, after_time=since)
    for event in sorted(events, key=lambda event: event.stamp):
        if event.data.get("fun") == function:
            for address in ADDRESS.findall(json.dumps(event.data)):
                found.setdefault(address, event.stamp.timestamp())
    return found


def measured(subject: Subject, asked: argparse.Namespace) -> Iterator[Figure]:
    """Yield all figures."""
    on_one_host = {"acknowledgement": acknowledgements, "client": client_logins}
    parts = {part: measure for part, measure in on_one_host.items() if part in asked.part}
    for done in range(asked.rounds):
        for count in random.sample(asked.elements, len(asked.elements)) if parts else ():
            say(f"round {done + 1} of {asked.rounds}: {count:,} elements")
            subject.trust(count)
            for part, measure in parts.items():
                yield from (Figure(part, kind, count, seconds) for kind, seconds in measure(subject, asked))
        if "fleet" not in asked.part:
            continue
        subject.trust(0)
        for pace, moments in random.sample([*paces(asked).items()], len(paces(asked))):
            say(f"round {done + 1} of {asked.rounds}: {pace}")
            yield from (Figure("fleet", kind, 0, values) for kind, values in spread(subject, pace, moments))
    say("done\n")


def say(what: str) -> None:
    """Tell whoever waits how far it is."""
    print(f"\r{what:60}", end="", file=sys.stderr, flush=True)


#: Kind of login -> number of elements -> the values of each round.
Found = dict[str, dict[int, list[list[float]]]]


def gathered(figures: list[Figure], part: str) -> Found:
    """Return a part's figures, in a table's order."""
    found: Found = defaultdict(lambda: defaultdict(list))
    for figure in figures:
        if figure.part == part:
            found[figure.kind][figure.elements].append(figure.values)
    return found


def milliseconds(rounds: list[list[float]]) -> str:
    """Return median and 99th percentile of all rounds together; of a hundred or fewer, the highest."""
    ordered = sorted(itertools.chain(*rounds))
    return f"{statistics.median(ordered) * 1000:.2f} {ordered[int(len(ordered) * 0.99)] * 1000:9.2f}"


def spread_of(values: list[float], digits: int) -> str:
    """Return the median, the lowest and the highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    """Return a table as text."""
    lines, width = {title: columns, **rows}, max(map(len, itertools.chain(columns, *rows.values()))) + 2
    return "\n" + "\n".join(
        f"{name:32}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in lines.items()
    )


def compared(found: Found, kind: str, other: str, counts: list[int]) -> Iterator[tuple[list[float], list[float]]]:
    """Yield for each number of elements the medians of two kinds of login, a pair for each round."""
    for count in counts:
        yield tuple([statistics.median(values) for values in found[one][count]] for one in (kind, other))


def report_acknowledgements(figures: list[Figure], asked: argparse.Namespace) -> None:
    """Print the agent's tables."""
    found, counts = gathered(figures, "acknowledgement"), sorted(asked.elements)
    columns = [f"{count:,}" for count in counts]
    waits = {kind: [milliseconds(found[kind][count]) for count in counts] for kind in (KNOWN, NEW, AT_ONCE)}
    print(table("acknowledgement, ms: p50, p99", columns, waits))
    rows = {
        kind: [spread_of([factor * value for (value,) in found[kind][count]], 0) for count in counts]
        for kind, factor in ((RATE, 1), (PROCESSOR, 1e6))
    }
    print(table(f"{asked.connections} connections at once", columns, rows))


def report_clients(figures: list[Figure], asked: argparse.Namespace) -> None:
    """Print the tables of logins over IMAP."""
    found, counts = gathered(figures, "client"), sorted(asked.elements)
    columns, kinds = [f"{count:,}" for count in counts], (NOTHING, EXEC_ONLY, MAILFW, NEW_MAILFW, SALT_CALL)
    waits = {kind: [milliseconds(found[kind][count]) for count in counts] for kind in kinds}
    print(table("login over IMAP, ms: p50, p99", columns, waits))
    more, ratios = {}, {}
    for kind in kinds:
        pairs = list(compared(found, kind, EXEC_ONLY, counts))
        more[kind] = [spread_of([1000 * (mine - other) for mine, other in zip(*pair)], 1) for pair in pairs]
        ratios[kind] = [spread_of([mine / other for mine, other in zip(*pair)], 2) for pair in pairs]
    print(table("more than exec only, ms", columns, more))
    print(table("against exec only", columns, ratios))


def report_fleet(figures: list[Figure], asked: argparse.Namespace) -> None:
    """Print the tables of what other hosts hear."""
    found = {kind: of_count[0] for kind, of_count in gathered(figures, "fleet").items()}
    rows = {
        pace: [
            milliseconds(found[pace]),
            *(
                f"{statistics.median(itertools.chain(*found[f'{stage}, {pace}'])) * 1000:.2f}"
                for stage in STAGES.values()
            ),
            str(sum(map(len, found[pace]))),
            f"{sum(map(sum, found[MESSAGES + pace])):g}",
        ]
        for pace in paces(asked)
    }
    columns = ["p50, p99", *(f"{stage}, p50" for stage in STAGES.values()), "logins", "messages"]
    print(table("trusted on the other host, ms", columns, rows))


REPORTS = {"acknowledgement": report_acknowledgements, "client": report_clients, "fleet": report_fleet}


def options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=REPORTS, default=list(REPORTS), help="only these")
    parser.add_argument(
        "--elements", type=int, nargs="+", default=[0, 10_000, 100_000], help="numbers of trusted elements"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--reports", type=int, default=300, help="acknowledgements of each kind in a round (300)")
    parser.add_argument("--connections", type=int, default=8, help="to the agent at once (8)")
    parser.add_argument("--at-once", type=float, default=2, help="seconds of that in a round (2)")
    parser.add_argument("--logins", type=int, default=40, help="over IMAP, of each kind in a round (40)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 10, 100], help="logins a second (1 10 100)")
    parser.add_argument(
        "--no-lone", dest="lone", action="store_false", help="no login after a minute without, which takes a minute"
    )
    parser.add_argument("--seconds", type=float, default=20, help="at each rate in a round (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    return parser.parse_args()


@contextlib.contextmanager
def subject() -> Iterator[Subject]:
    """A fleet to measure."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mailfw-", dir="/tmp")))
        directory.chmod(0o755)  # for the users of the mail servers
        host = stack.enter_context(masters_host())
        listener = stack.enter_context(EventListener())
        (directory / "salt").mkdir()
        fleet = stack.enter_context(running_master(factories(directory / "salt", listener), host))
        stack.enter_context(running_mail_hosts(fleet))
        yield Subject(fleet, directory)


def main() -> None:
    """Measure and print."""
    asked = options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    logging.basicConfig(level=logging.ERROR)
    # pytest-salt-factories would set it: each of a minion's jobs would compile the product's modules anew.
    os.environ["PYTHONDONTWRITEBYTECODE"] = ""
    print(json.dumps({"machine": machine()}), flush=True)
    with subject() as measured_one:
        figures = list(measured(measured_one, asked))
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")
    for part in asked.part:
        REPORTS[part](figures, asked)
    if asked.json:
        asked.json.write_text(json.dumps([figure._asdict() for figure in figures]) + "\n")


if __name__ == "__main__":
    main()
