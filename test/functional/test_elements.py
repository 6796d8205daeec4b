"""What trusting, banning and blocking do to the live sets."""

from __future__ import annotations

import time
from typing import Any, Callable

import pytest

from mailfwlib import netlink
from mailfwlib.settings import login_ports
from support.firewall import Firewall
from support.net import Client, Host, until

ADDRESS = {"ipv4": "198.51.100.10", "ipv6": "2001:db8:a::10"}
#: How the sources appear in the sets: an IPv6 source is its /64.
KEY = {"ipv4": "198.51.100.10", "ipv6": "2001:db8:a::"}
#: What is in force by default.
PILLAR: dict[str, Any] = {}
LOGIN_PORTS = (587, 465, 143, 993, 110, 995, 4190)


def test_trust_adds_an_element_for_each_login_port(loaded: Firewall, family: str) -> None:
    loaded.trust(ADDRESS[family], 600)
    found = loaded.elements(f"trusted_{family}")
    assert set(found) == {f"{KEY[family]} . {port}" for port in LOGIN_PORTS}
    assert all(590 < left <= 600 for left in found.values())


@pytest.mark.parametrize(("role", "ports"), [("postfix", LOGIN_PORTS[:2]), ("dovecot", LOGIN_PORTS[2:])])
def test_trust_is_for_the_ports_of_the_hosts_roles(
    firewall: Firewall, family: str, role: str, ports: tuple[int, ...]
) -> None:
    firewall.load(roles=[role])
    firewall.trust(ADDRESS[family])
    assert set(firewall.elements(f"trusted_{family}")) == {f"{KEY[family]} . {port}" for port in ports}


def test_untrust_ends_trust_on_some_ports(loaded: Firewall, family: str) -> None:
    loaded.trust(ADDRESS[family])
    loaded.untrust(ADDRESS[family], [587, 465])
    assert set(loaded.elements(f"trusted_{family}")) == {f"{KEY[family]} . {port}" for port in LOGIN_PORTS[2:]}
    loaded.untrust(ADDRESS[family])
    assert not loaded.elements(f"trusted_{family}")


def test_ports_can_be_trusted_for_different_times(loaded: Firewall, family: str) -> None:
    loaded.trust(ADDRESS[family], 600, [587])
    loaded.trust(ADDRESS[family], 60, [465])
    found = loaded.elements(f"trusted_{family}")
    assert 590 < found[f"{KEY[family]} . 587"] <= 600
    assert 50 < found[f"{KEY[family]} . 465"] <= 60


@pytest.mark.parametrize("roles", [("postfix",), ("dovecot",), ("postfix", "dovecot")])
def test_ban_and_unban(loaded: Firewall, alice: Client, family: str, roles: tuple[str, ...]) -> None:
    loaded.ban(ADDRESS[family], roles)
    for role in ("postfix", "dovecot"):
        assert set(loaded.elements(f"banned_{role}_{family}")) == ({KEY[family]} if role in roles else set())
    loaded.unban(ADDRESS[family], roles)
    for role in roles:
        assert not loaded.elements(f"banned_{role}_{family}")
    assert alice.connect(587, ADDRESS[family]) == "open"


def test_ban_lasts_for_the_sets_period_or_its_own(firewall: Firewall, family: str) -> None:
    firewall.load(autoban={"period": "30m"})
    firewall.ban(ADDRESS[family], ("postfix",))
    firewall.ban(ADDRESS[family], ("dovecot",), 90)
    assert 1790 < firewall.elements(f"banned_postfix_{family}")[KEY[family]] <= 1800
    assert 80 < firewall.elements(f"banned_dovecot_{family}")[KEY[family]] <= 90


def test_block_and_unblock(loaded: Firewall, family: str) -> None:
    loaded.block(ADDRESS[family])
    assert loaded.elements(f"blocked_{family}") == {KEY[family]: float("inf")}
    loaded.unblock(ADDRESS[family])
    assert not loaded.elements(f"blocked_{family}")


def test_block_ends_by_itself(firewall: Firewall, alice: Client, family: str) -> None:
    firewall.load(reaction={"blocked": "reject"})
    firewall.block(ADDRESS[family], 1)
    assert alice.connect(587, ADDRESS[family]) == "refused"
    deadline = time.monotonic() + 5
    while alice.connect(587, ADDRESS[family]) != "open":
        assert time.monotonic() < deadline


#: Sets, and how their elements get a time.
TIMED: dict[str, Callable[[Firewall, str, int], None]] = {
    "trusted": lambda firewall, address, seconds: firewall.trust(address, seconds),
    "banned_dovecot": lambda firewall, address, seconds: firewall.ban(address, ("dovecot",), seconds),
    "blocked": lambda firewall, address, seconds: firewall.block(address, seconds),
}


@pytest.mark.parametrize(("before", "after"), [(60, 600), (600, 60)])
@pytest.mark.parametrize("name", TIMED)
def test_adding_again_sets_the_time_anew(loaded: Firewall, family: str, name: str, before: int, after: int) -> None:
    TIMED[name](loaded, ADDRESS[family], before)
    TIMED[name](loaded, ADDRESS[family], after)
    left = loaded.elements(f"{name}_{family}").values()
    assert left
    assert all(after - 10 < seconds <= after for seconds in left)


def test_adding_again_with_the_same_time_starts_it_anew(loaded: Firewall, family: str) -> None:
    name, element = f"trusted_{family}", f"{KEY[family]} . 587"
    loaded.run(f"add element inet mailfw {name} {{ {element} timeout 600s expires 60s }}")
    assert loaded.elements(name)[element] <= 60
    loaded.trust(ADDRESS[family], 600, [587])
    assert 590 < loaded.elements(name)[element] <= 600


def test_block_can_become_permanent_and_temporary_again(loaded: Firewall, family: str) -> None:
    for seconds, least, most in ((60, 50, 60), (None, float("inf"), float("inf")), (60, 50, 60)):
        loaded.block(ADDRESS[family], seconds)
        assert least <= loaded.elements(f"blocked_{family}")[KEY[family]] <= most


def test_removing_what_is_absent_succeeds(loaded: Firewall, family: str) -> None:
    other = {"ipv4": "198.51.100.11", "ipv6": "2001:db8:b::10"}[family]
    loaded.trust(other)
    loaded.ban(other)
    loaded.block(other)
    loaded.untrust(ADDRESS[family])
    loaded.unban(ADDRESS[family])
    loaded.unblock(ADDRESS[family])
    assert len(loaded.elements(f"trusted_{family}")) == len(login_ports(loaded.settings))
    for name in ("banned_postfix", "banned_dovecot", "blocked"):
        assert len(loaded.elements(f"{name}_{family}")) == 1


def test_trust_of_a_mapped_address_is_trust_of_the_ipv4_address(loaded: Firewall) -> None:
    loaded.trust("::ffff:198.51.100.10", ports=[587])
    assert list(loaded.elements("trusted_ipv4")) == ["198.51.100.10 . 587"]
    assert not loaded.elements("trusted_ipv6")


def test_ipv6_prefixes_of_trust_and_bans_are_separate(firewall: Firewall) -> None:
    firewall.load(trusted={"ipv6_prefix": 128}, autoban={"ipv6_prefix": 48})
    firewall.trust("2001:db8:a:1::10", ports=[587])
    firewall.ban("2001:db8:a:1::10", ("dovecot",))
    firewall.block("2001:db8:a:1::10")
    assert list(firewall.elements("trusted_ipv6")) == ["2001:db8:a:1::10 . 587"]
    assert list(firewall.elements("banned_dovecot_ipv6")) == ["2001:db8:a::"]
    assert list(firewall.elements("blocked_ipv6")) == ["2001:db8:a::"]


@pytest.mark.parametrize("mode", ["autoban", "protected"])
def test_a_shorter_prefix_lets_in_and_refuses_whom_the_longer_one_did(
    firewall: Firewall, alice: Client, mallory: Client, mode: str
) -> None:
    """Trust, bans and blocks of single addresses become those of their /64."""
    friend, neighbour, stranger = alice.ipv6
    banned, beside, blocked = mallory.ipv6
    pillar: dict[str, Any] = {"protection": {"type": mode}, "reaction": {"untrusted": "reject"}}
    firewall.load(trusted={"ipv6_prefix": 128}, autoban={"ipv6_prefix": 128}, **pillar)
    firewall.trust(friend, 3600)
    firewall.ban(banned, seconds=600)
    firewall.block(blocked)
    firewall.load(**pillar)
    assert [alice.connect(587, source) for source in (friend, neighbour)] == ["open", "open"]
    assert alice.connect(587, stranger) == ("refused" if mode == "protected" else "open")
    assert [mallory.connect(993, source, 0.2) for source in (banned, beside, blocked)] == ["silent"] * 3
    assert firewall.elements("trusted_ipv6")["2001:db8:a:: . 587"] > 3500
    assert 500 < firewall.elements("banned_dovecot_ipv6")["2001:db8:c::"] <= 600
    assert firewall.elements("blocked_ipv6") == {"2001:db8:c:1::": float("inf")}


def test_refill_gives_a_source_its_burst_again(firewall: Firewall, alice: Client, family: str) -> None:
    firewall.load(autoban={"rate": "1/minute", "burst": 3})
    for _ in range(3):
        assert [alice.connect(143, ADDRESS[family]) for _ in range(3)] == ["open"] * 3
        firewall.refill(ADDRESS[family])


def test_a_list_that_is_not_read_to_its_end_is_in_nobodys_way(firewall: Firewall, host: Host) -> None:
    firewall.load()
    values = [f"10.0.{one // 250}.{one % 250} . 587" for one in range(5000)]
    firewall.run(f"add element inet mailfw trusted_ipv4 {{ {', '.join(values)} }}")

    def ask() -> tuple[int | None, int]:
        kernel = netlink.Kernel()
        next(kernel.elements("trusted_ipv4"))
        counted = kernel.counter("over_rate")
        next(kernel.elements("trusted_ipv4"))
        return counted, kernel.count("trusted_ipv4")

    # Just after a set was filled, a list may lack some.
    until(lambda: host.call(ask) == (0, 5000), "all are counted")
