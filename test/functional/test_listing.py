"""What operators see of the sets: on a real kernel, of real packets, of very many, beside steady logins."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mailfwlib import elements, listing, netlink, nft, parse, snapshot
from support.firewall import Firewall
from support.net import Client, Host

BURST = 3
SMALL = {"autoban": {"rate": "1/hour", "burst": BURST, "networks": {"rate": "100/minute"}}}


def listed(
    firewall: Firewall, host: Host, sort: str = "address", limit: int = 100, **wanted: Any
) -> list[dict[str, Any]]:
    asked = listing.Wanted(**wanted)
    found = listing.rows(host.call(snapshot.current, asked.sets()), asked, firewall.settings)
    return [listing.said(row, time.time()) for row in listing.in_order(found, sort, limit)]


def name(source: str, firewall: Firewall) -> str:
    return elements.text(elements.source_network(parse.address(source), firewall.settings))


def test_what_packets_and_operators_have_made(firewall: Firewall, host: Host, alice: Client, family: str) -> None:
    firewall.load(**SMALL)
    source, *_, other = alice.addresses(family)
    for _ in range(BURST + 1):
        alice.connect(993, source)
    firewall.trust(other, ports=[587, 993])
    firewall.block(other)
    found = {row["kind"]: row for row in listed(firewall, host)}
    assert {kind: (row["address"], row["where"], row["by"]) for kind, row in found.items()} == {
        "banned": (name(source, firewall), ["dovecot"], "the rate"),
        "trusted": (name(other, firewall), [587, 993], "a login"),
        "blocked": (name(other, firewall), [], "an operator"),
    }
    assert found["blocked"]["left"] == "forever"
    inside = ([parse.network(source)],)
    assert [row["kind"] for row in listed(firewall, host, networks=inside)] == ["banned"]
    assert listed(firewall, host, kinds=frozenset({"banned"}), roles=frozenset({"postfix"})) == []


def test_nothing_is_left_out_just_after_much_was_added(firewall: Firewall, host: Host) -> None:
    """The kernel gives the set more room then, and leaves elements out of its lists meanwhile."""
    name, many = "banned_dovecot_ipv4", [f"10.{n >> 8}.{n & 255}.1" for n in range(60_000)]
    script = f"add element {nft.TABLE} {name} {{ {', '.join(many)} }}"
    kernel = host.call(netlink.Kernel)

    def add() -> list[str]:
        nft.run(script)
        return [one.value for one in kernel.elements(name)]

    for _ in range(5):
        firewall.load()
        assert sorted(host.call(add)) == sorted(many)
        firewall.unload()


def test_who_would_be_refused_is_listed(firewall: Firewall, host: Host, alice: Client, family: str) -> None:
    firewall.load(**SMALL, protection={"type": "private"}, enforce=False)
    source = alice.addresses(family)[0]
    assert alice.connect(587, source) == "open"
    (row,) = listed(firewall, host, networks=([parse.network(source)],))
    assert (row["kind"], row["address"]) == ("observed", name(source, firewall))
    assert 587 in row["where"], "beside it there may be the straggler of a connection of an earlier test"
    assert row["by"] in {f"a try {seconds}s ago" for seconds in range(9)}


def test_banned_networks_are_listed_as_networks(firewall: Firewall, host: Host, family: str) -> None:
    firewall.load(**SMALL)
    base = {"ipv4": "198.51.100.0", "ipv6": "2001:db8:a::"}[family]
    firewall.run(f"add element inet mailfw banned_networks_postfix_{family} {{ {base} }}")
    assert [row["address"] for row in listed(firewall, host)] == [f"{base}/{24 if family == 'ipv4' else 48}"]


def test_comment_that_nobody_can_have_given_is_not_shown(firewall: Firewall, host: Host) -> None:
    firewall.load(**SMALL)
    firewall.run('add element inet mailfw blocked_ipv4 { 192.0.2.1 comment "\x1b]0;root\x07" }')
    firewall.run('add element inet mailfw blocked_ipv4 { 192.0.2.2 comment "root: ticket 17" }')
    assert [row["by"] for row in listed(firewall, host)] == ["an operator", "root: ticket 17"]


@contextmanager
def steady_logins(host: Host, firewall: Firewall) -> Iterator[list[int]]:
    """Somebody logs in all the time; how often until now."""
    done, count = threading.Event(), [0]

    def log_in() -> None:
        library = nft.Library()
        while not done.is_set():
            source = parse.address(f"203.0.113.{count[0] % 250}")
            library.run(elements.trust(source, {587: 3600}, firewall.settings))
            count[0] += 1
            done.wait(0.005)

    running = host.start(log_in)
    try:
        yield count
    finally:
        done.set()
        running.result(10)


@pytest.mark.slow
def test_very_many_beside_steady_logins(firewall: Firewall, host: Host) -> None:
    """nft(8) would begin anew with each of them."""
    firewall.load(**SMALL)
    many = [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(50_000)]
    both = ", ".join(f"{one} . {port}" for one in many for port in (587, 993))
    firewall.run(f"add element inet mailfw trusted_ipv4 {{ {both} }}")
    with steady_logins(host, firewall) as count:
        before = count[0]
        inside = ([parse.network("10.0.0.0/8")],)
        asked = listing.Wanted(kinds=frozenset({"trusted"}), networks=inside)
        current = host.start(snapshot.current, asked.sets()).result(120)
        found = list(listing.rows(current, asked, firewall.settings))
        assert count[0] > before, "logins went on meanwhile"
    assert len(found) == len(many)
    assert {row.where for row in found} == {(587, 993)}
    assert [str(row.network.network_address) for row in listing.in_order(found, "address", 3)] == many[:3]
    assert len(listed(firewall, host, limit=50, ports=frozenset({993}))) == 50
