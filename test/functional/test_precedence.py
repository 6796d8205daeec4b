"""Who wins: trusted networks > blocks > earned trust > rate bans > exempt > counting. Every pair, in every mode."""

from __future__ import annotations

import itertools

import pytest

from mailfwlib import nft
from mailfwlib.settings import MODES
from support.firewall import Firewall
from support.mail import MailServer
from support.net import Client, Host, until

#: Who wins, strongest first; what is in one line is on a par.
ORDER = [
    ["trusted network"],
    ["block", "blocked network"],
    ["earned trust"],
    ["ban", "banned network"],
    ["exempt"],
]
RANK = {kind: rank for rank, kinds in enumerate(ORDER) for kind in kinds}
BLOCKS = {"block", "blocked network"}
#: What a client finds that meets only this, and the counter of the rule that decided. The last ones: nobody special.
DECISIONS = {
    "trusted network": ("open", "trusted_network"),
    "block": ("refused", "blocked"),
    "blocked network": ("refused", "blocked"),
    "earned trust": ("open", "trusted"),
    "ban": ("refused", "banned"),
    "banned network": ("refused", "banned"),
    "exempt": ("open", "exempted"),
    "limited": ("open", "counted"),
    "trusted only": ("refused", "untrusted"),
    "open": ("open", ""),
}
COUNTERS = {counter for _, counter in DECISIONS.values()} - {""}
REACTION = {"banned": "reject", "blocked": "reject", "untrusted": "reject"}
#: Networks of alice's, around each of her addresses.
AROUND = {"ipv4": "198.51.100.0/24", "ipv6": "2001:db8:a::/48"}
#: How a port of each role is treated in each mode, by the specification.
ACCESS = {
    "autoban": {587: "limited", 993: "limited"},
    "protected": {587: "trusted only", 993: "limited"},
    "private": {587: "trusted only", 993: "trusted only"},
    "public": {587: "open", 993: "open"},
}
ROLE = {587: "postfix", 993: "dovecot"}
SERVICE = {587: "submission", 993: "imaps"}


def winner(kinds: set[str], access: str) -> str:
    """Return which of what a source is decides; bans and exemptions are for limited ports only."""
    effective = [kind for kind in kinds if access == "limited" or RANK[kind] < RANK["ban"]]
    return min(effective, key=lambda kind: RANK[kind], default=access)


def pairs(mode: str) -> list[tuple[str, ...]]:
    """Return the pairs in which one wins, and each kind alone, which is its pair with nobody special."""
    kinds = [kind for kind in RANK if kind != "banned network" or "limited" in ACCESS[mode].values()]
    unequal = [pair for pair in itertools.combinations(kinds, 2) if RANK[pair[0]] != RANK[pair[1]]]
    return [(), *((kind,) for kind in kinds), *unequal]


PAIRS = [(mode, pair) for mode in MODES for pair in pairs(mode)]


def load(firewall: Firewall, mode: str, family: str, source: str, kinds: set[str]) -> None:
    """Load rules for which a source is what pillar can make of it."""

    def networks(kind: str, network: str) -> dict[str, list[str]]:
        return {f"networks_{family}": [network] if kind in kinds else []}

    firewall.load(
        protection={"type": mode},
        reaction=REACTION,
        autoban={"burst": 1000, "networks": {"rate": "1000/second"}},
        trusted=networks("trusted network", source),
        blocked=networks("blocked network", AROUND[family]),
        exempt=networks("exempt", source),
    )


def make(firewall: Firewall, mode: str, family: str, source: str, kinds: set[str]) -> None:
    """Make of a source what logins, rules and operators make of it. Trust comes first, since it lifts bans."""
    if "earned trust" in kinds:
        firewall.trust(source)
    if "ban" in kinds:
        firewall.ban(source)
    if "banned network" in kinds:
        base = AROUND[family].partition("/")[0]
        for port in (port for port, access in ACCESS[mode].items() if access == "limited"):
            firewall.run(f"add element inet mailfw banned_networks_{ROLE[port]}_{family} {{ {base} }}")
    if "block" in kinds:
        firewall.block(source)


@pytest.mark.parametrize(("mode", "pair"), PAIRS, ids=[f"{mode}-{' over '.join(pair)}" for mode, pair in PAIRS])
def test_new_connection(
    firewall: Firewall, host: Host, alice: Client, family: str, mode: str, pair: tuple[str, ...]
) -> None:
    source, kinds = alice.addresses(family)[0], set(pair)
    load(firewall, mode, family, source, kinds)
    make(firewall, mode, family, source, kinds)
    decisions = {port: DECISIONS[winner(kinds, access)] for port, access in ACCESS[mode].items()}
    said = firewall.explain(source)["verdicts"]
    refused = {port: said[SERVICE[port]].startswith("refused") for port in decisions}
    assert refused == {port: answer == "refused" for port, (answer, _) in decisions.items()}
    assert alice.connect_many(list(decisions), source) == {port: answer for port, (answer, _) in decisions.items()}
    counted = host.call(nft.counters)
    assert {name for name in COUNTERS if counted[name]} == {counter for _, counter in decisions.values()} - {""}


def test_pairs_are_all_there() -> None:
    """The specification in other words, so that a slip above does not test the wrong order."""
    every = set(RANK)
    assert winner(every, "limited") == "trusted network"
    assert winner(every - {"trusted network"}, "limited") in BLOCKS
    assert winner(every - {"trusted network"} - BLOCKS, "limited") == "earned trust"
    assert winner({"ban", "exempt"}, "limited") == "ban"
    for access in ("trusted only", "open"):
        assert winner({"ban", "exempt"}, access) == access
    assert [sum(len(pair) == 2 for its_mode, pair in PAIRS if its_mode == mode) for mode in MODES] == [19, 19, 14, 14]


#: What a source is when its session begins, and what happens to it meanwhile.
LIVE = [
    (mode, before, meanwhile)
    for mode in MODES
    for before in ("nobody", "trusted network", "earned trust", "exempt")
    for meanwhile in ("block", "blocked network", "ban", "banned network")
    if "limited" in ACCESS[mode].values() or not {before, meanwhile} & {"exempt", "banned network"}
]


@pytest.mark.parametrize(("mode", "before", "meanwhile"), LIVE)
def test_live_session(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, mode: str, before: str, meanwhile: str
) -> None:
    """Blocks end sessions, but for those of trusted networks; bans end none."""
    source, kinds = alice.addresses(family)[0], {before}
    load(firewall, mode, family, source, kinds)
    firewall.trust(source)
    sessions = [alice.open(port, source) for port in ACCESS[mode]]
    if before != "earned trust":
        firewall.untrust(source)
    assert all(session.talks() for session in sessions)

    if meanwhile == "blocked network":
        load(firewall, mode, family, source, kinds | {meanwhile})
    make(firewall, mode, family, source, {meanwhile})
    if meanwhile in BLOCKS and before != "trusted network":
        for session in sessions:
            session.say()
            until(lambda name=session.name: name not in mail.sessions, "the server's socket is gone")
    else:
        assert all(session.talks() for session in sessions * 2)
        assert firewall.counter("blocked") == 0
    for session in sessions:
        session.close()


@pytest.mark.parametrize("reaction", ["drop", "reject"])
def test_block_ends_a_session_whatever_the_reaction(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, reaction: str
) -> None:
    source = alice.addresses(family)[0]
    firewall.load(reaction={"blocked": reaction})
    session = alice.open(993, source)
    firewall.block(source)
    session.say()
    until(lambda: session.name not in mail.sessions, "the server's socket is gone")
    assert alice.connect(993, source) == {"drop": "silent", "reject": "refused"}[reaction]
    session.close()


@pytest.mark.parametrize("mode", MODES)
def test_mail_between_servers_is_open_to_all(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    source = alice.addresses(family)[0]
    server = alice.open(25, source)
    load(firewall, mode, family, source, {"blocked network"})
    make(firewall, mode, family, source, {"block", "ban"})
    assert alice.connect(25, source) == "open"
    assert server.talks()
    server.close()


def test_others_do_not_notice(firewall: Firewall, alice: Client, mallory: Client, family: str) -> None:
    source, *_, neighbour = alice.addresses(family)
    others = [(alice, neighbour), (mallory, mallory.addresses(family)[0])]
    load(firewall, "autoban", family, source, set())
    sessions = [client.open(993, address) for client, address in others]
    make(firewall, "autoban", family, source, {"ban", "block"})
    assert alice.connect(993, source) == "refused"
    assert [client.connect(993, address) for client, address in others] == ["open"] * 2
    for session in sessions:
        assert session.talks()
        session.close()


@pytest.mark.parametrize("mode", ["autoban", "protected"])
def test_exempt_source_is_in_no_bucket(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    source, *_, stranger = alice.addresses(family)
    firewall.load(
        protection={"type": mode},
        reaction=REACTION,
        autoban={"rate": "1/hour", "burst": 2, "networks": {"rate": "2/hour"}},
        exempt={f"networks_{family}": [source]},
    )
    assert [alice.connect(993, source) for _ in range(7)] == ["open"] * 7
    assert firewall.counter("exempted") == 7
    assert firewall.counter("counted") == 0
    assert not firewall.elements(f"rate_dovecot_{family}")
    assert not firewall.elements(f"network_rate_dovecot_{family}")
    assert [alice.connect(993, stranger) for _ in range(3)] == ["open", "open", "silent"]
    # Its network is banned now, and that is a ban like others.
    assert firewall.elements(f"banned_networks_dovecot_{family}")
    assert alice.connect(993, source) == "refused"


def test_login_does_not_lift_a_block(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall, "autoban", family, source, set())
    firewall.block(source)
    firewall.trust(source)
    assert firewall.elements(f"blocked_{family}")
    assert alice.connect(993, source) == "refused"
    firewall.unblock(source)
    assert alice.connect(993, source) == "open"
