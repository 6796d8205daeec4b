"""A crowd behind one address is not an attacker: it may be kept waiting until its first login, and then never again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from support import lab
from support.lab import ADDRESSES

from .conftest import ENVIRONMENTS, HOSTS

#: 30 mail clients behind one address, each with two connections. A client waits that long, then it tries again: longer
#: than a busy Dovecot takes to start a process for each connection, 25 ms here.
CONNECTIONS = 60
PATIENCE = 6.0
#: No crowd takes longer than this many seconds and two logins until all of it is in.
LIMIT = 25
#: What one source may open at once: the default of mailfw:autoban:burst.
BURST = 20
SOURCES = {"home": ("198.51.100.10", "2001:db8:0:2::"), "cafe": ("203.0.113.10", "2001:db8:0:3::")}
BOT = ("198.18.0.66", "2001:db8:0:66::")


@pytest.fixture(scope="module", autouse=True)
def autoban(fleet):
    for host in HOSTS:
        lab.set_pillar(ENVIRONMENTS[host], protection={"type": "autoban"})
    lab.all_states(HOSTS, "state.apply", "mailfw")
    yield
    lab.all_states(HOSTS)


@pytest.fixture(autouse=True)
def nobody_is_known():
    lab.forget(*HOSTS)


def all_at_once(address: str) -> tuple[list[dict[str, Any]], dict[str, int], list[str]]:
    """Have cafe's crowd, bot's attack and home's discovery of the services start in the same moment."""
    with ThreadPoolExecutor(3) as pool:
        crowd = pool.submit(
            lab.client, "cafe", "crowd", address=address, connections=CONNECTIONS, patience=PATIENCE, limit=40
        )
        attack = pool.submit(lab.client, "bot", "guess", address=address, tries=60, patience=3)
        discovery = pool.submit(lab.client, "home", "discover", address=address)
        return crowd.result(), attack.result(), discovery.result()


@pytest.mark.parametrize("seconds", [0.5, 2])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("host", HOSTS)
def test_nobody_is_refused_after_the_first_login(host, version, seconds):
    address = ADDRESSES[host][version == 6]
    with lab.slow_logins(host, seconds):
        crowd, attack, discovery = all_at_once(address)

    tries = [one for member in crowd for one in member["tries"]]
    began = min(one["began"] for one in tries)
    logins = sorted(one["ended"] - began for one in tries if one["outcome"] == "up")
    print(
        f"{host} IPv{version}, logins of {seconds} s: {len(logins)} sessions with {len(tries)} tries,"
        f" at most {max(len(member['tries']) for member in crowd)} of one; the first login was done after"
        f" {logins[0]:.1f} s, the last after {logins[-1]:.1f} s; the attacker was served {attack['served']} times"
    )
    assert logins[0] >= seconds
    assert [one for one in tries if one["began"] > began + logins[0] and one["outcome"] != "up"] == []
    # Whoever was let in, in the end or before the ban, finished the login that was begun.
    assert [one for one in tries if one["outcome"] == "broken"] == []
    assert sum(member["works"] for member in crowd) == CONNECTIONS
    assert logins[-1] < LIMIT + 2 * seconds

    assert discovery == ["served"] * 14
    assert attack["served"] <= BURST
    banned = lab.run(host, "nft", "list", "set", "inet", "mailfw", f"banned_dovecot_ipv{version}")
    assert BOT[version == 6] in banned
    assert [source for pair in SOURCES.values() for source in pair if source in banned] == []
    assert lab.client("bot", "probe", targets=[[address, 143]], patience=1) == ["silent"]
    assert lab.quickest_login("home", address, 5) < 5


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("host", HOSTS)
def test_connection_from_before_the_login_is_answered_after_it(host, version):
    address = ADDRESSES[host][version == 6]
    served = lab.client("cafe", "answered_late", address=address, connections=CONNECTIONS)
    assert served == ["served"] * CONNECTIONS
