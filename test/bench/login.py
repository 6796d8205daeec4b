#!/usr/bin/env python3
"""Measure what a login waits for: the agent's acknowledgement, and Dovecot's login hook, by the number of elements.

Run it as root: ``test/bench/login.py`` with the Python of the tests; ``--help`` says what can be chosen.

In a throw-away network namespace, with the product's rules, agent and hook:

acknowledgement  from the connection to the agent's socket to its reply: of a new address, and of one that is known
hook             Dovecot's login hook, from its start to the end of the session that it starts, which ends at once
exec only        a hook that only starts the session
salt-call        a hook that runs ``salt-call --local event.send`` first: without a master, which takes longer still

What a hook takes is what the login of a client takes longer: Dovecot says OK after it. All hooks take turns, in each
round anew and in a random order, so that a machine that is busy is as busy for each.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "test"), str(REPOSITORY / "_utils")]

from bench.cost import hosts, trust  # noqa: E402
from bench.wires import OTHER_NETWORK  # noqa: E402
from mailfwlib import client  # noqa: E402
from support.agent import KEY, Agent  # noqa: E402
from support.firewall import Firewall  # noqa: E402
from support.net import Host, Net  # noqa: E402

PILLAR: dict[str, Any] = {"fleet": {"keys": [KEY]}, "sizes": {"trusted": 262144}}
HOOK = str(REPOSITORY / "mailfw/dovecot/files/login-hook.sh")
SALT_CALL = str(Path(sys.executable).with_name("salt-call"))
SESSION = "/bin/true"
KNOWN = "198.51.100.10"
#: salt-call is so slow that a few times will do.
SALT_CALLS_A_ROUND = 2


def quantiles(seconds: list[float]) -> str:
    """Return median and 99th percentile in milliseconds."""
    ordered = sorted(seconds)
    return f"{statistics.median(ordered) * 1000:8.2f} {ordered[int(len(ordered) * 0.99)] * 1000:8.2f}"


def acknowledgements(addresses: list[str]) -> list[float]:
    """Report logins one after the other; return how long each waited."""
    waits = []
    for address in addresses:
        began = time.perf_counter()
        client.ask("login", address, "alice@example.org")
        waits.append(time.perf_counter() - began)
    return waits


def hook(*command: str) -> float:
    """Run a hook as Dovecot does; return how long it took."""
    environment = {"IP": KNOWN, "USER": "alice@example.org", "PATH": "/usr/bin:/bin"}
    began = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def measure(host: Host, count: int, asked: argparse.Namespace, directory: Path) -> None:
    """Print a line for each measure."""
    salt = f"{SALT_CALL} --local --config-dir {directory} --log-level quiet event.send mailfw/login >/dev/null"
    hooks = {
        "exec only": ("/bin/sh", "-c", 'exec "$@"', "sh", SESSION),
        "hook": ("/bin/sh", HOOK, SESSION),
        "salt-call": ("/bin/sh", "-c", f'{salt}; exec "$@"', "sh", SESSION),
    }
    strangers = iter(hosts(OTHER_NETWORK, asked.rounds * asked.logins))
    found: dict[str, list[float]] = defaultdict(list)
    began, acknowledged = 0.0, 0
    for _ in range(asked.rounds):
        news = [next(strangers) for _ in range(asked.logins)]
        for name, addresses in (("ack, new", news), ("ack, known", [KNOWN] * asked.logins)):
            waits = host.call(acknowledgements, addresses)
            found[name] += waits
            began, acknowledged = began + sum(waits), acknowledged + len(waits)
        turns = [name for name in hooks for _ in range(SALT_CALLS_A_ROUND if name == "salt-call" else asked.hooks)]
        for name in random.sample(turns, len(turns)):
            found[name].append(host.call(hook, *hooks[name]))
    for name, seconds in found.items():
        added = (statistics.median(seconds) - statistics.median(found["exec only"])) * 1000
        note = f" {added:8.2f} added" if name in hooks and name != "exec only" else ""
        print(f"{count:>9,} {name:12} {quantiles(seconds)}{note}")
    print(f"{count:>9,} {acknowledged / began:,.0f} acknowledgements a second, one after the other")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, nargs="+", default=[0, 10_000, 100_000], help="numbers of elements")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--logins", type=int, default=500, help="acknowledgements of each kind in a round")
    parser.add_argument("--hooks", type=int, default=40, help="runs of each hook in a round")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mailfw-", dir="/tmp") as directory:
        (Path(directory) / "minion").write_text(
            f"id: bench\nroot_dir: {directory}\nfile_client: local\nenable_fqdns_grains: false\n"
        )
        net = Net(Path(directory) / "host")
        try:
            print(f"load {os.getloadavg()[0]:.1f}; milliseconds\n elements              median      p99")
            for count in asked.elements:
                firewall, of_agent = Firewall(net.host), Path(directory) / str(count)
                of_agent.mkdir()
                firewall.load(**PILLAR)
                if count:
                    firewall.run(trust(count))
                agent = Agent(net.host, of_agent, PILLAR)
                try:
                    net.host.start(client.ask, "status", timeout=60).result()
                    measure(net.host, count, asked, Path(directory))
                finally:
                    agent.close()
                    firewall.unload()
        finally:
            net.close()


if __name__ == "__main__":
    main()
