"""When a client reads its OK, the host's kernel trusts it: on the very next packet, each time, and in a storm."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

import pytest

from lab.lablib import hosts
from support import lab
from support.lab import ADDRESSES

from .conftest import ENVIRONMENTS, HOSTS, on_both_hosts

#: Six times that many logins on each host: 504. So many of each 84 may wait longer for the agent than the hook does.
TIMES, LATE = 84, 4
STORM = 500
#: Whose client logs in at which host, and as whom the host knows it.
CLIENTS = {"mx1": ("home", "198.51.100.10", "2001:db8:0:2::"), "mx2": ("cafe", "203.0.113.10", "2001:db8:0:3::")}
#: Takes an element out of the kernel's set for each line that comes; the agent is not told.
FORGET = """
import sys
sys.path.insert(0, "/usr/lib/mailfw")
from mailfwlib import nft
family, key = sys.argv[1:]
elements = ", ".join(f"{key} . {port} timeout 1d" for port in (587, 465, 143, 993, 110, 995, 4190))
bare = elements.replace(" timeout 1d", "")
library = nft.Library()
for line in sys.stdin:
    # What is not there cannot be deleted.
    library.run(f"add element inet mailfw trusted_{family} {{ {elements} }}\\n"
                f"delete element inet mailfw trusted_{family} {{ {bare} }}")
    print("done", flush=True)
"""
#: Dovecot's own limits, so that it is the hook that is under test.
LIMITS = """
default_client_limit = 5000
service imap-login {
  process_limit = 1000
}
"""


@pytest.fixture(scope="module", autouse=True)
def only_the_hook(fleet: object) -> Iterator[None]:
    """Nobody but the hook makes a login trusted, nobody is counted, and a miss is not hidden."""
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(
            environment,
            protection={"type": "protected"},
            reaction={"untrusted": "reject"},
            reports=False,
            autoban={"rate": "1000/second", "burst": 1000},
        )
    for host in HOSTS:
        lab.run(host, "tee", "/etc/dovecot/conf.d/94-lab-limits.conf", text=LIMITS)
        lab.run(host, "systemctl", "restart", "dovecot")
    lab.all_states(HOSTS, "state.apply", "mailfw")
    yield
    for host in HOSTS:
        lab.run(host, "rm", "/etc/dovecot/conf.d/94-lab-limits.conf")
        lab.run(host, "systemctl", "restart", "dovecot")


def started(node: str, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        hosts.enter_node(node, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def taking_turns(client: subprocess.Popen[str], forget: subprocess.Popen[str]) -> Any:
    """Have one process forget the client whenever it says so; return what the client says in the end."""
    with client, forget:
        try:
            for line in client.stdout or ():
                if line != "forget\n":
                    return json.loads(line)["result"]
                print(line, end="", file=forget.stdin, flush=True)
                assert forget.stdout
                print(forget.stdout.readline(), end="", file=client.stdin, flush=True)
        finally:
            client.kill()
            forget.kill()
    return "the client has ended"


@on_both_hosts
def test_the_packet_after_the_ok_is_let_in_each_time(host: str) -> None:
    name, *known = CLIENTS[host]
    for version, protocol in itertools.product((4, 6), ("imap", "pop3", "sieve")):
        plan = {"address": ADDRESSES[host][version == 6], "protocol": protocol, "times": TIMES}
        client = started(name, sys.executable, str(lab.MAILCLIENT), json.dumps({"do": "forgotten_each_time", **plan}))
        forget = started(host, "python3", "-IBc", FORGET, f"ipv{version}", known[version == 6])
        outcomes = taking_turns(client, forget)
        late = outcomes.pop("late", 0)
        print(f"{host} IPv{version} {protocol}: {late} times the agent was late")
        assert outcomes == {"before: ConnectionRefusedError": TIMES, "after: open": TIMES - late}, (protocol, version)
        assert late <= LATE


def test_in_a_storm_of_logins_nobody_is_refused_and_everybody_is_trusted() -> None:
    def storm(host: str) -> list[dict[str, Any]]:
        clients = []
        for address, network in zip(ADDRESSES[host], lab.networks_of_town()):
            sources = ip_network(network)
            step = 1 if sources.version == 4 else 1 << 64
            clients += [[address, str(sources.network_address + number * step + 1)] for number in range(STORM // 2)]
        return lab.client("town", "storm", clients=clients, patience=250.0)

    for host, found in lab.on_each(HOSTS, storm).items():
        waited = sorted(one["seconds"] for one in found)
        print(f"{host}: {STORM} logins at once were answered after {waited[0]:.1f} to {waited[-1]:.1f} s")
        assert Counter(one["login"] for one in found) == {"OK": STORM}, host
        assert Counter(one["submission"] for one in found) == {"open": STORM}, host
