#!/usr/bin/env python3
"""Measure what mailfw's rules cost: what a connection and a packet take with them, with a minimal ruleset, with none.

Run it as root: ``test/bench/cost.py`` with the Python of the tests; ``--help`` says what can be chosen.

One network namespace has a Dovecot, a Postfix and all rulesets, of which one at a time is in force; "none" has a
namespace of its own, since connections are tracked in the other one. The arms take turns of some milliseconds, a fixed
number of connections or packets, in a new random order in each round, so that a machine that slows down slows all.
Figures are processor time, see measures.py, and "a second" is one of it:

dovecot_tls_connection, dovecot_connection, dovecot_login, postfix_connection
    What a connection takes with a real server, from the SYN to the last FIN; but for the first one without TLS.
dovecot_noop, dovecot_fetch
    What packets of an open connection take with a real server: an exchange of lines, and a full packet of a message.
connection, round_trip, bulk_in, bulk_out
    The kernel's part of it: of a connection, an exchange of lines, a full packet.

A figure is a low quantile of all rounds. "against minimal" is a ratio of figures: above 1 is slower; in brackets is the
interval in which it is with a confidence of 95%. ``minimal again`` is the same ruleset once more, in another table: how
far it is from 1 is what the figures are not good for.
``minimal`` accepts established connections and new ones to the ports: what any stateful firewall costs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import ipaddress
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "test"), str(REPOSITORY / "_utils")]

from bench import measures  # noqa: E402
from bench.measures import Arm, Batch, Measure  # noqa: E402
from bench.wires import OTHER_IPV6, OTHER_NETWORK, TRUSTED_IPV6, TRUSTED_NETWORK, Server, Wires  # noqa: E402
from mailfwlib import settings  # noqa: E402
from support.firewall import render  # noqa: E402

#: Clients and servers share it: see measures.py.
CORE = 1
MINIMAL = """table inet filter {
  chain input {
    type filter hook input priority filter; policy accept;
    ct state established accept
    tcp dport { 143, 587, 993 } accept
  }
}
"""
#: Elements of trusted_ipv4 in each table with mailfw's rules.
ELEMENTS = {"mailfw 0": 0, "mailfw 60k": 60_000, "mailfw 1M": 1_000_000}
#: Nobody is banned at this rate.
PILLAR = {"autoban": {"rate": "100000/second", "burst": 10000}}
#: Clients of an arm, by default: so many that neither the element of one nor its bucket stays in the processor's cache,
#: and that most are new to the meter whenever they come.
SOURCES = 8192
#: Of many rounds, the one at this quantile is taken: those above it were disturbed.
QUANTILE = 0.1
#: Draws of a confidence interval.
RESAMPLES = 500
#: The ruleset of a name is the only one of its namespace, which does not track connections.
UNTRACKED = "none"


def hosts(network: str, count: int) -> list[str]:
    """Return the first addresses of a network, one of each /64 over IPv6."""
    base = ipaddress.ip_network(network)
    step = 1 if base.version == 4 else 1 << 64
    return [str(base[step * place + 1]) for place in range(1, count + 1)]


def trust(elements: int) -> str:
    """Return the script that fills the trusted sets: as logins do, with every login port of an address."""
    ports = settings.login_ports(settings.resolve(PILLAR))
    found = {
        "ipv4": hosts(TRUSTED_NETWORK, max(1, elements // len(ports))),
        "ipv6": [address.removesuffix("1") for address in hosts(TRUSTED_IPV6, 1)],  # the /64 is trusted
    }
    return "".join(
        f"add element inet mailfw trusted_{family} {{ "
        + ", ".join(f"{address} . {port} timeout 1d" for address in addresses for port in ports)
        + " }\n"
        for family, addresses in found.items()
    )


def rulesets(scripts: dict[str, str]) -> dict[str, str]:
    """Return the script of each ruleset: its rules and elements."""
    mailfw = render(settings.resolve(PILLAR))
    return {
        UNTRACKED: "",
        "minimal": MINIMAL,
        "minimal again": MINIMAL,
        **{name: mailfw + trust(elements) for name, elements in ELEMENTS.items()},
        **{name: script + (trust(0) if "set trusted_ipv4" in script else "") for name, script in scripts.items()},
    }


def table_name(ruleset: str) -> str:
    """Return the name of a ruleset's table."""
    return re.sub(r"\W", "_", ruleset) if ruleset != UNTRACKED else ""


def families(ruleset: str) -> tuple[int, ...]:
    """Return the IP versions to measure a ruleset with: only trusted IPv4 addresses are there in numbers."""
    return (4,) if ELEMENTS.get(ruleset) else (4, 6)


def connecting(server: Server, ruleset: str, script: str, count: int) -> Iterator[Arm]:
    """Yield the arms that open connections under a ruleset: one for each kind of client that its rules tell apart.

    What many clients cost the rest of the kernel is not mailfw's: an arm with one client is compared with another one.
    """
    for version in families(ruleset):
        suffix = " IPv6" if version == 6 else ""
        many = count if ELEMENTS.get(ruleset) else 1
        trusted = hosts(TRUSTED_NETWORK if version == 4 else TRUSTED_IPV6, many)
        others = hosts(OTHER_NETWORK if version == 4 else OTHER_IPV6, count)
        if "set trusted_ipv4" in script:
            sources = {f"{ruleset} untrusted": others, f"{ruleset} trusted": trusted}
        else:
            sources = {ruleset: others, f"{ruleset} 1 client": others[:1]}
        for arm, clients in sources.items():
            yield Arm(arm + suffix, server, table_name(ruleset), tuple(clients))


def staying(server: Server, ruleset: str) -> Iterator[Arm]:
    """Yield the arms with an open connection: who has opened it makes no difference any more."""
    for version in families(ruleset):
        source = hosts(TRUSTED_NETWORK if version == 4 else TRUSTED_IPV6, 1)
        yield Arm(ruleset + (" IPv6" if version == 6 else ""), server, table_name(ruleset), tuple(source))


def prepared(measure: Measure, chosen: list[Arm], settling: str) -> dict[Arm, Batch]:
    """Return the batch of each arm. Those of a server share one connection, let in under the ruleset ``settling``."""
    batches: dict[tuple[str, int], Batch] = {}
    for arm in chosen:
        key = (arm.server.name, arm.version)
        if key not in batches:
            arm.server.enforce(settling if arm.rules else "")
            batches[key] = measure.prepare(arm.server, arm.version, arm.sources[0])
    return {arm: batches[arm.server.name, arm.version] for arm in chosen}


def measured(name: str, batches: dict[Arm, Batch], rounds: int, turn: int) -> dict[Arm, list[float]]:
    """Return the figures of each arm, one of each round: nanoseconds for one operation, the median of a turn."""
    found: dict[Arm, list[float]] = {arm: [] for arm in batches}
    for done in range(rounds):
        print(f"\r{name}: round {done + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
        for arm in random.sample(list(batches), len(batches)):
            found[arm].append(statistics.median(measures.turn(arm, measures.MEASURES[name], batches[arm], turn)))
    print(file=sys.stderr)
    return found


def base(arm: Arm) -> str:
    """Return the name of the arm that an arm is compared with."""
    single = " 1 client" if re.search(r" trusted| 1 client", arm.name) and len(arm.sources) == 1 else ""
    return f"minimal{single}{' IPv6' if arm.version == 6 else ''}"


def undisturbed(rounds: Sequence[float]) -> float:
    """Return a low quantile of an arm's rounds: those above it were disturbed."""
    return sorted(rounds)[int(QUANTILE * (len(rounds) - 1))]


def interval(mine: list[float], other: list[float]) -> tuple[float, float]:
    """Return the 95% confidence interval of the ratio of two arms: a bootstrap over the rounds."""
    ratios = []
    for _ in range(RESAMPLES):
        drawn = random.choices(range(len(mine)), k=len(mine))
        ratios.append(undisturbed([mine[one] for one in drawn]) / undisturbed([other[one] for one in drawn]))
    return sorted(ratios)[int(0.025 * RESAMPLES)], sorted(ratios)[int(0.975 * RESAMPLES)]


def summary(figures: dict[str, dict[Arm, list[float]]]) -> dict[str, dict[str, Any]]:
    """Return for each measure and arm: its figure, and its ratio to the minimal ruleset with confidence interval."""
    found: dict[str, dict[str, Any]] = {}
    for name, of_arm in figures.items():
        by_name = {arm.name: rounds for arm, rounds in of_arm.items()}
        for arm, rounds in of_arm.items():
            minimal = by_name[base(arm)]
            nanoseconds, least = undisturbed(rounds), undisturbed(minimal)
            low, high = interval(rounds, minimal)
            found.setdefault(name, {})[arm.name] = {
                "nanoseconds": round(nanoseconds, 1),
                "per_second": round(1e9 / nanoseconds, 1),
                "more_than_minimal": round(nanoseconds - least, 1),
                "ratio": round(nanoseconds / least, 4),
                "interval": [round(low, 4), round(high, 4)],
                "rounds": [round(figure, 1) for figure in rounds],
            }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the summary as text."""
    lines = []
    for name, of_arm in found.items():
        width = max(map(len, of_arm))
        lines.append(f"\n{name:{width}}  {'ns each':>9}  {'a second':>9}  {'ns more':>8}  against minimal")
        for arm, figure in of_arm.items():
            low, high = figure["interval"]
            lines.append(
                f"{arm:{width}}  {figure['nanoseconds']:9.0f}  {figure['per_second']:9.0f}"
                f"  {figure['more_than_minimal']:8.0f}  {figure['ratio']:.3f} ({low:.3f}-{high:.3f})"
            )
    return "\n".join(lines)


def workers() -> float:
    """Return the seconds that the kernel's workers have run: among others, they look for elements that have expired."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text().startswith("kworker"):
                total += int((process / "schedstat").read_text().split()[0])
        except OSError:
            continue
    return total / 1e9


def background(seconds: float) -> float:
    """Return the milliseconds per second that the kernel's workers run."""
    before = workers()
    time.sleep(seconds)
    return 1000 * (workers() - before) / seconds


def options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="of each measure (200)")
    parser.add_argument("--turn", type=int, default=5, help="batches of each arm in each round (5)")
    parser.add_argument("--measure", action="append", choices=measures.MEASURES, help="only this one; repeatable")
    parser.add_argument("--sources", type=int, default=SOURCES, help=f"clients of an arm ({SOURCES})")
    parser.add_argument(
        "--rulesets", default="", help="only minimal and those with one of these in their names: none,1M"
    )
    parser.add_argument("--arms", default="", metavar="REGEX", help="only minimal and the arms whose names match")
    parser.add_argument(
        "--script", action="append", default=[], metavar="NAME=FILE", help="one more ruleset, of one table; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    return parser.parse_args()


def chosen_scripts(asked: argparse.Namespace) -> dict[str, str]:
    """Return the rulesets that are needed for the arms that were asked for."""
    extra = dict(pair.split("=", 1) for pair in asked.script)
    found = rulesets({name: Path(file).read_text() for name, file in extra.items()})
    words = asked.rulesets.split(",") if asked.rulesets else found
    return {
        name: script
        for name, script in found.items()
        if name.startswith("minimal") or name in extra or any(word in name for word in words)
    }


def serving(wires: Wires, scripts: dict[str, str]) -> dict[str, Server]:
    """Return the server of each ruleset, with all of them loaded and asleep."""
    servers = {name: wires.servers[name == UNTRACKED] for name in scripts}
    for name, script in scripts.items():
        if name != UNTRACKED:
            servers[name].load(table_name(name), script)
    return servers


def main() -> None:
    """Measure and print."""
    asked = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scripts = chosen_scripts(asked)
    settling = table_name(next(name for name, script in reversed(scripts.items()) if script))
    gc.disable()
    os.sched_setaffinity(0, {CORE})
    figures: dict[str, dict[Arm, list[float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)  # for the users of the mail servers
        with contextlib.closing(Wires(1 + (UNTRACKED in scripts), Path(directory), CORE)) as wires:
            found: dict[str, Any] = {"background_before": background(5)}
            servers = serving(wires, scripts)
            time.sleep(2)
            found["background_with_elements"] = background(5)
            for name in asked.measure or measures.MEASURES:
                measure = measures.MEASURES[name]
                chosen = [
                    arm
                    for ruleset, script in scripts.items()
                    for arm in (
                        connecting(servers[ruleset], ruleset, script, asked.sources)
                        if measure.opens
                        else staying(servers[ruleset], ruleset)
                    )
                    if ruleset.startswith("minimal") or re.search(asked.arms, arm.name)
                ]
                figures[name] = measured(name, prepared(measure, chosen, settling), asked.rounds, asked.turn)
    found["measures"] = summary(figures)
    print(table(found["measures"]))
    print(
        "\nkernel workers, ms a second: {background_before:.1f} without elements, "
        "{background_with_elements:.1f} with".format(**found)
    )
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
