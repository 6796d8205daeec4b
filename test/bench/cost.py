#!/usr/bin/env python3
"""Measure what mailfw's rules cost: what a connection and a packet take with them, with a minimal ruleset, with none.

Run it as root: ``test/bench/cost.py`` with the Python of the tests; ``--help`` says what can be chosen.

Each ruleset is loaded in a network namespace of its own, with a Dovecot and a Postfix of its own. They all live at
once, each on a veth pair to one client namespace, and are measured in turn, in a new random order in each round, so
that a machine that slows down slows all. Figures are processor time, see measures.py, and "a second" is one of it:

dovecot_connection, dovecot_login, dovecot_noop, postfix_connection
    What a connection, a login and an exchange of lines take with a real server, without TLS. With it a connection
    takes several times as long, and mailfw's part is smaller.
connection, round_trip, bulk_in, bulk_out
    The kernel's part of it: of a connection, an exchange of lines, a full packet.

"against minimal" is a ratio of times: above 1 is slower. It is the median of the ratios of all rounds, and in brackets
their quartiles. ``minimal again`` is the same ruleset once more: how far it is from 1 is the noise of all others.
``minimal`` accepts established connections and new ones to the ports: what any stateful firewall costs.
"""

from __future__ import annotations

import argparse
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
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "test"), str(REPOSITORY / "_utils")]

from bench import measures  # noqa: E402
from bench.measures import Arm  # noqa: E402
from bench.wires import OTHER_IPV6, OTHER_NETWORK, TRUSTED_IPV6, TRUSTED_NETWORK, Wires  # noqa: E402
from mailfwlib import settings  # noqa: E402
from support.firewall import render  # noqa: E402

#: Clients and servers share it: see measures.py.
CORE = 1
MINIMAL = """table inet filter {
  chain input {
    type filter hook input priority filter; policy accept;
    ct state established accept
    tcp dport { 587, 993 } accept
  }
}
"""
#: Elements of trusted_ipv4 in each server namespace with mailfw's rules.
ELEMENTS = {"mailfw 0": 0, "mailfw 60k": 60_000, "mailfw 1M": 1_000_000}
#: Nobody is banned at this rate.
PILLAR = {"autoban": {"rate": "100000/second", "burst": 10000}}
#: Clients of an arm: so many that neither the element of one nor its bucket stays in the processor's cache.
SOURCES = 8192
#: Of many batches, the one at this quantile is taken: those above it were disturbed.
QUANTILE = 0.1


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
    """Return the script of each server: its rules and elements."""
    mailfw = render(settings.resolve(PILLAR))
    return {
        "none": "",
        "minimal": MINIMAL,
        "minimal again": MINIMAL,
        **{name: mailfw + trust(elements) for name, elements in ELEMENTS.items()},
        **{name: script + (trust(0) if "set trusted_ipv4" in script else "") for name, script in scripts.items()},
    }


def arms(wires: Wires, scripts: dict[str, str]) -> list[Arm]:
    """Return the arms: each server with the clients that its rules tell apart.

    What many clients cost the rest of the kernel is not mailfw's: an arm with one client is compared with another one.
    """
    made = []
    for name, script in scripts.items():
        elements = ELEMENTS.get(name, 0)
        for version in (4, 6) if elements == 0 else (4,):
            suffix = " IPv6" if version == 6 else ""
            trusted = hosts(TRUSTED_NETWORK if version == 4 else TRUSTED_IPV6, SOURCES if elements else 1)
            others = hosts(OTHER_NETWORK if version == 4 else OTHER_IPV6, SOURCES)
            if "set trusted_ipv4" in script:
                sources = {f"{name} untrusted": others, f"{name} trusted": trusted}
            else:
                sources = {name: others, f"{name} 1 client": others[:1]}
            made += [Arm(arm + suffix, wires.servers[name], tuple(clients)) for arm, clients in sources.items()]
    return made


def quantile(samples: list[float], at: float) -> float:
    """Return the sample at a quantile."""
    return sorted(samples)[int(at * (len(samples) - 1))]


def measure(chosen: list[Arm], name: str, rounds: int, seconds: float) -> Iterator[tuple[Arm, float]]:
    """Yield one figure for each round and arm: nanoseconds for one operation."""
    for done in range(rounds):
        print(f"\r{name}: round {done + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
        figures = {
            arm: quantile(measures.MEASURES[name](arm, seconds), QUANTILE) for arm in random.sample(chosen, len(chosen))
        }
        yield from ((arm, figures[arm]) for arm in chosen)
    print(file=sys.stderr)


def base(arm: Arm) -> str:
    """Return the name of the arm that an arm is compared with."""
    single = " 1 client" if len(arm.sources) == 1 else ""
    return f"minimal{single}{' IPv6' if arm.version == 6 else ''}"


def summary(figures: dict[str, dict[Arm, list[float]]]) -> dict[str, dict[str, Any]]:
    """Return for each measure and arm: the median, and its ratio to the minimal ruleset as quartiles of all rounds."""
    found: dict[str, dict[str, Any]] = {}
    for name, of_arm in figures.items():
        by_name = {arm.name: rounds for arm, rounds in of_arm.items()}
        for arm, rounds in of_arm.items():
            minimal = by_name[base(arm)]
            ratios = [mine / other for mine, other in zip(rounds, minimal)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            median = statistics.median(rounds)
            found.setdefault(name, {})[arm.name] = {
                "nanoseconds": round(median, 1),
                "per_second": round(1e9 / median, 1),
                "more_than_minimal": round(statistics.median(m - o for m, o in zip(rounds, minimal)), 1),
                "ratio": round(middle, 4),
                "quartiles": [round(low, 4), round(high, 4)],
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
            low, high = figure["quartiles"]
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
    parser.add_argument("--rounds", type=int, default=60, help="of each measure (60)")
    parser.add_argument(
        "--seconds", type=float, default=0.05, help="of processor time for each arm in each round (0.05)"
    )
    parser.add_argument("--measure", action="append", choices=measures.MEASURES, help="only this one; repeatable")
    parser.add_argument(
        "--rulesets", default="", help="only minimal and those with one of these in their names: none,1M"
    )
    parser.add_argument("--arms", default="", metavar="REGEX", help="only minimal and the arms whose names match")
    parser.add_argument(
        "--script", action="append", default=[], metavar="NAME=FILE", help="one more ruleset; repeatable"
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


def main() -> None:
    """Measure and print."""
    asked = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scripts = chosen_scripts(asked)
    gc.disable()
    os.sched_setaffinity(0, {CORE})
    figures: dict[str, dict[Arm, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)  # for the users of the mail servers
        wires = Wires(list(scripts), Path(directory), CORE)
        try:
            found: dict[str, Any] = {"background_before": background(5)}
            for name, script in scripts.items():
                wires.servers[name].load(script)
            time.sleep(2)
            found["background_with_elements"] = background(5)
            chosen = [a for a in arms(wires, scripts) if a.name.startswith("minimal") or re.search(asked.arms, a.name)]
            for name in asked.measure or measures.MEASURES:
                for arm, figure in measure(chosen, name, asked.rounds, asked.seconds):
                    figures[name][arm].append(figure)
        finally:
            wires.close()
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
