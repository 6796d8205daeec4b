"""``enforce: false``: nobody is refused, and the host says who would have been, where and how often."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mailfwlib import elements, nft, parse
from mailfwlib.settings import MODES
from support.firewall import Firewall
from support.mail import MailServer
from support.net import Client, until

BURST = 3
REJECT = {"banned": "reject", "blocked": "reject", "untrusted": "reject"}
#: Which of two ports each mode closes to strangers, and which it limits.
CLOSED = {"autoban": [], "protected": [587], "private": [587, 993], "public": []}
LIMITED = {"autoban": [587, 993], "protected": [993], "private": [], "public": []}


def load(firewall: Firewall, mode: str = "autoban", enforce: bool = False, **pillar: Any) -> str:
    """Load rules with small buckets that do not refill."""
    networks = pillar.pop("networks", False)
    return firewall.load(
        protection={"type": mode},
        enforce=enforce,
        autoban={"rate": "1/hour", "burst": BURST, "networks": networks},
        **{"reaction": REJECT, **pillar},
    )


def key(source: str) -> str:
    """Return what sets call a source: IPv6 sources are prefixes."""
    return str(elements.prefix_base(parse.address(source), 64))


def observed(firewall: Firewall, family: str) -> dict[str, int]:
    """Return who would have been refused: address and port -> packets."""
    printed = json.loads(firewall.nft("-j", "list", "set", *nft.TABLE.split(), f"observed_{family}"))
    found = next(entry["set"] for entry in printed["nftables"] if "set" in entry)
    listed = (entry["elem"] for entry in found.get("elem", []))
    return {" . ".join(map(str, one["val"]["concat"])): one["counter"]["packets"] for one in listed}


class AtLeast(int):
    """A number of connections as packets count them: a straggler of one that has ended may come on top."""

    def __eq__(self, found: object) -> bool:
        return isinstance(found, int) and self <= found <= self + 2

    __hash__ = int.__hash__


def counters(firewall: Firewall, *names: str) -> dict[str, int]:
    return {name: firewall.counter(name) for name in names}


def connect(client: Client, source: str, times: int, port: int) -> list[str]:
    """Connect some times, one after the other."""
    return [client.connect(port, source) for _ in range(times)]


@pytest.mark.parametrize("untrusted", ["hold", "drop", "reject"])
@pytest.mark.parametrize("mode", MODES)
def test_untrusted(firewall: Firewall, alice: Client, family: str, mode: str, untrusted: str) -> None:
    """Hold lets nobody wait."""
    load(firewall, mode, reaction={"untrusted": untrusted})
    source, *_, stranger = alice.addresses(family)
    for port in (587, 993):
        assert connect(alice, source, 3, port) == ["open"] * 3
    assert alice.connect(587, stranger) == "open"
    expected = {f"{key(source)} . {port}": AtLeast(3) for port in CLOSED[mode]}
    if 587 in CLOSED[mode]:
        expected[f"{key(stranger)} . 587"] = AtLeast(1)
    assert observed(firewall, family) == expected
    assert counters(firewall, "untrusted", "held") == {"untrusted": AtLeast(sum(expected.values())), "held": 0}
    assert not firewall.elements(f"waiting_{family}")


def test_trusted_sources_are_not_observed(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall, "private")
    firewall.trust(source)
    assert connect(alice, source, 3, 587) == ["open"] * 3
    assert observed(firewall, family) == {}
    assert firewall.counter("untrusted") == 0


@pytest.mark.parametrize("kind", ["operator", "network"])
@pytest.mark.parametrize("mode", MODES)
def test_blocked(firewall: Firewall, alice: Client, family: str, mode: str, kind: str) -> None:
    source, *_, stranger = alice.addresses(family)
    load(firewall, mode, blocked={f"networks_{family}": [source]} if kind == "network" else {})
    if kind == "operator":
        firewall.block(source)
    assert alice.connect_many([25, 587, 993], source) == {25: "open", 587: "open", 993: "open"}
    assert alice.connect(993, stranger) == "open"
    assert firewall.counter("blocked") >= 2
    found = observed(firewall, family)
    assert {f"{key(source)} . {port}" for port in (587, 993)} <= found.keys()
    assert f"{key(source)} . 25" not in found
    # The other one is a stranger where strangers would be refused, but it is not blocked.
    assert (f"{key(stranger)} . 993" in found) is (993 in CLOSED[mode])


@pytest.mark.parametrize("mode", MODES)
def test_session_of_a_blocked_source_goes_on(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, mode: str
) -> None:
    source = alice.addresses(family)[0]
    load(firewall, mode)
    session = alice.open(993, source)
    before = observed(firewall, family).get(f"{key(source)} . 993", 0)
    firewall.block(source)
    assert [session.talks() for _ in range(3)] == [True] * 3
    mail.say(session.name)
    assert session.hears()
    assert firewall.counter("blocked") >= 3
    assert observed(firewall, family)[f"{key(source)} . 993"] >= before + 3
    session.close()


@pytest.mark.parametrize("mode", ["autoban", "protected"])
def test_source_above_the_rate(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    """It is banned, and what it does then is what a banned source would not have been allowed to."""
    load(firewall, mode)
    source = alice.addresses(family)[0]
    assert connect(alice, source, BURST, 993) == ["open"] * BURST
    assert firewall.counter("over_rate") == 0
    assert connect(alice, source, 1, 993) == ["open"]
    assert counters(firewall, "over_rate", "banned") == {"over_rate": 1, "banned": AtLeast(0)}
    bans = firewall.elements(f"banned_dovecot_{family}")
    assert list(bans) == [key(source)]
    assert 3590 < bans[key(source)] <= 3600
    assert not firewall.elements(f"banned_postfix_{family}")

    assert connect(alice, source, 5, 993) == ["open"] * 5
    assert connect(alice, source, 2, 143) == ["open"] * 2
    assert counters(firewall, "over_rate", "banned") == {"over_rate": 8, "banned": AtLeast(7)}
    assert observed(firewall, family) == {f"{key(source)} . 993": AtLeast(5), f"{key(source)} . 143": AtLeast(2)}
    assert firewall.elements(f"banned_dovecot_{family}")[key(source)] <= bans[key(source)]


@pytest.mark.parametrize("mode", ["private", "public"])
def test_nobody_is_counted_where_nothing_is_limited(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    load(firewall, mode)
    assert connect(alice, alice.addresses(family)[0], 2 * BURST, 993) == ["open"] * 2 * BURST
    assert counters(firewall, "counted", "over_rate", "banned") == {"counted": 0, "over_rate": 0, "banned": 0}
    assert not firewall.elements(f"banned_dovecot_{family}")


def test_operators_ban(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall)
    source = alice.addresses(family)[0]
    firewall.ban(source)
    assert connect(alice, source, 2, 587) == ["open"] * 2
    assert firewall.counter("banned") == AtLeast(2)
    assert observed(firewall, family) == {f"{key(source)} . 587": AtLeast(2)}


def test_network_above_the_rate(firewall: Firewall, alice: Client, mallory: Client, family: str) -> None:
    load(firewall, networks={"rate": "2/hour"})
    first, *_, second = alice.addresses(family)
    assert [alice.connect(143, source) for source in (first, second, first)] == ["open"] * 3
    assert counters(firewall, "over_rate", "banned") == {"over_rate": 1, "banned": AtLeast(0)}
    assert len(firewall.elements(f"banned_networks_dovecot_{family}")) == 1
    assert not firewall.elements(f"banned_dovecot_{family}")
    assert alice.connect(993, second) == "open"
    assert firewall.counter("banned") == AtLeast(1)
    assert observed(firewall, family)[f"{key(second)} . 993"] == AtLeast(1)
    stranger = mallory.addresses(family)[0]
    assert mallory.connect(143, stranger) == "open"
    assert f"{key(stranger)} . 143" not in observed(firewall, family)


def test_crowd_above_its_limit(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, sizes={"rates": 1})
    source, *_, stranger = alice.addresses(family)
    assert connect(alice, stranger, 1, 993) == ["open"]
    assert connect(alice, source, 10 * BURST + 4, 993) == ["open"] * (10 * BURST + 4)
    assert counters(firewall, "over_common_rate", "over_rate") == {"over_common_rate": 4, "over_rate": 0}
    assert not firewall.elements(f"banned_dovecot_{family}")


@pytest.mark.parametrize("kind", ["untrusted", "banned", "blocked"])
def test_full_set_of_observed_sources_refuses_nobody(firewall: Firewall, alice: Client, family: str, kind: str) -> None:
    load(firewall, "private" if kind == "untrusted" else "autoban", sizes={"observed": 1})
    source = alice.addresses(family)[0]
    if kind == "banned":
        firewall.ban(source)
    if kind == "blocked":
        firewall.block(source)
    assert alice.connect(993, source) == "open"
    before = firewall.counter(kind)
    assert connect(alice, source, 3, 587) == ["open"] * 3
    assert firewall.counter(kind) >= before + 3
    assert observed(firewall, family).keys() == {f"{key(source)} . 993"}
    assert alice.connect(993, source) == "open"
    assert observed(firewall, family)[f"{key(source)} . 993"] >= 2


def test_full_ban_set(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, sizes={"banned": 1})
    source, *_, other = alice.addresses(family)
    firewall.ban(other)
    assert connect(alice, source, BURST + 3, 993) == ["open"] * (BURST + 3)
    assert counters(firewall, "over_rate", "ban_set_full") == {"over_rate": 3, "ban_set_full": 3}
    assert list(firewall.elements(f"banned_dovecot_{family}")) == [key(other)]


@pytest.mark.parametrize("mode", MODES)
def test_from_observing_to_enforcing_and_back(
    firewall: Firewall, mail: MailServer, alice: Client, mallory: Client, family: str, mode: str
) -> None:
    load(firewall, mode)
    source, blocked = alice.addresses(family)[0], mallory.addresses(family)[0]
    firewall.block(blocked)
    sessions = [alice.open(993, source) for _ in range(2 * BURST)]
    held = mallory.open(993, blocked)
    assert alice.connect(587, source) == "open"

    assert load(firewall, mode, enforce=True)
    assert f"observed_{family}" not in firewall.nft("list", "sets")
    refused = {587: "refused" if 587 in CLOSED[mode] else "open", 993: "open" if mode == "public" else "refused"}
    assert alice.connect_many([587, 993], source) == refused
    assert all(session.talks() for session in sessions)  # what was let in goes on
    assert mallory.connect_many([587, 993], blocked) == {587: "refused", 993: "refused"}
    held.say()
    until(lambda: held.name not in mail.sessions, "a blocked source's session ends")

    assert load(firewall, mode)
    assert alice.connect_many([587, 993], source) == {587: "open", 993: "open"}
    assert mallory.connect_many([587, 993], blocked) == {587: "open", 993: "open"}
    assert all(session.talks() for session in sessions)
    found = observed(firewall, family)
    assert {f"{key(blocked)} . {port}" for port in (587, 993)} <= found.keys()
    assert (f"{key(source)} . 993" in found) is (mode != "public")
    for session in [*sessions, held]:
        session.close()


def test_other_size_of_the_observed_set_goes_on_counting(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall, "private", sizes={"observed": 4})
    assert connect(alice, source, 2, 993) == ["open"] * 2
    assert load(firewall, "private", sizes={"observed": 8})
    before = observed(firewall, family).get(f"{key(source)} . 993", 0)
    assert connect(alice, source, 2, 993) == ["open"] * 2
    assert observed(firewall, family) == {f"{key(source)} . 993": AtLeast(before + 2)}
