"""What is logged of decisions: what each line says of whom, and that floods neither fill the log nor hide the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from mailfwlib import nft
from support.firewall import Firewall
from support.net import LIMIT, Client, Host, until
from support.nflog import Line, Nflog

GROUP = 7
BURST = 2
REJECT = {"banned": "reject", "blocked": "reject", "untrusted": "reject"}
#: What a log collector may rely on.
PREFIX = re.compile(r"mailfw (would )?(ban|refuse|full) [a-z_]+( network)?: ")
#: Every kind of line: see test_every_kind_is_known.
KINDS = {
    "refuse banned",
    "refuse blocked",
    "refuse untrusted",
    "ban dovecot",
    "ban dovecot network",
    "full rate_dovecot",
    "ban postfix",
    "ban postfix network",
    "full rate_postfix",
}
EVERYTHING: dict[str, Any] = {"autoban": {"networks": {}}}


@pytest.fixture
def log(host: Host) -> Iterator[Nflog]:
    with closing(Nflog(host, GROUP)) as made:
        yield made
        assert [line.prefix for line in made.lines if not PREFIX.fullmatch(line.prefix)] == []


def load(firewall: Firewall, autoban: dict[str, Any] | None = None, rate: str = "1/hour", **pillar: Any) -> None:
    """Load rules with small buckets that do not refill, which log to the group."""
    autoban = {"rate": "1/hour", "burst": BURST, **(autoban or {})}
    firewall.load(autoban=autoban, **{"log": {"rate": rate, "group": GROUP}, "reaction": REJECT, **pillar})


def the_line(log: Nflog, prefix: str) -> Line:
    """Return the one line that was logged."""
    until(lambda: log.lines, prefix)
    assert [line.prefix for line in log.lines] == [prefix]
    return log.lines[0]


def the_ban(log: Nflog, prefix: str) -> Line:
    """Return the one line of a ban; what the banned client still sends may be refused, and logged, afterwards."""
    until(lambda: log.lines, prefix)
    following = {line.prefix for line in log.lines[1:]}
    assert log.lines[0].prefix == prefix
    assert following <= {"mailfw refuse banned: "}
    return log.lines[0]


def server(family: str) -> str:
    return Host.ipv6 if family == "ipv6" else Host.ipv4


@pytest.mark.parametrize("role", ["dovecot", "postfix"])
def test_ban(firewall: Firewall, log: Nflog, alice: Client, family: str, role: str) -> None:
    """The packet is the server's answer to the connection that was one too many."""
    load(firewall)
    source, port = alice.addresses(family)[0], {"dovecot": 143, "postfix": 587}[role]
    assert [alice.connect(port, source) for _ in range(BURST)] == ["open"] * BURST
    assert log.lines == []
    assert alice.connect(port, source) == "silent"
    line = the_ban(log, f"mailfw ban {role}: ")
    assert (line.source, line.source_port, line.destination) == (server(family), port, source)


def test_ban_of_a_network(firewall: Firewall, log: Nflog, alice: Client, family: str) -> None:
    load(firewall, {"networks": {"rate": "2/hour"}})
    first, *_, second = alice.addresses(family)
    assert [alice.connect(143, source) for source in (first, second, second)] == ["open", "open", "silent"]
    line = the_ban(log, "mailfw ban dovecot network: ")
    assert (line.source, line.source_port, line.destination) == (server(family), 143, second)


@pytest.mark.parametrize("reaction", ["drop", "reject"])
@pytest.mark.parametrize("kind", ["banned", "blocked", "blocked network", "untrusted"])
def test_refusal(firewall: Firewall, log: Nflog, alice: Client, family: str, kind: str, reaction: str) -> None:
    source, word = alice.addresses(family)[0], kind.partition(" ")[0]
    networks = {f"networks_{family}": [source]} if kind == "blocked network" else {}
    mode = "private" if kind == "untrusted" else "autoban"
    load(firewall, protection={"type": mode}, reaction={word: reaction}, blocked=networks)
    if kind == "banned":
        firewall.ban(source)
    if kind == "blocked":
        firewall.block(source)
    assert alice.connect(993, source, 0.3) == {"drop": "silent", "reject": "refused"}[reaction]
    line = the_line(log, f"mailfw refuse {word}: ")
    assert (line.source, line.destination, line.port) == (source, server(family), 993)


def test_refusal_of_a_banned_network(firewall: Firewall, log: Nflog, alice: Client, family: str) -> None:
    load(firewall, {"networks": {"rate": "1/hour"}})
    first, *_, second = alice.addresses(family)
    assert [alice.connect(143, source) for source in (first, first, second)] == ["open", "silent", "refused"]
    the_ban(log, "mailfw ban dovecot network: ")
    assert log.lines[-1].prefix == "mailfw refuse banned: "
    assert log.lines[-1].source == second


def test_end_of_a_session_that_is_blocked(firewall: Firewall, log: Nflog, alice: Client, family: str) -> None:
    load(firewall)
    source = alice.addresses(family)[0]
    session = alice.open(993, source)
    firewall.block(source)
    session.say()
    until(lambda: log.lines, "logged")
    line = log.lines[0]
    assert (line.prefix, line.source, line.port) == ("mailfw refuse blocked: ", source, 993)
    session.close()


def test_refusal_after_hold(firewall: Firewall, log: Nflog, alice: Client, family: str) -> None:
    """A client that waits has not been refused."""
    load(firewall, protection={"type": "private"}, reaction={"untrusted": "hold"})
    source = alice.addresses(family)[0]
    assert [alice.connect(587, source, 0.1) for _ in range(3)] == ["silent"] * 3
    assert firewall.counter("held") == 3
    assert log.lines == []
    assert alice.connect(587, source) == "refused"
    line = the_line(log, "mailfw refuse untrusted: ")
    assert (line.source, line.port) == (source, 587)


def test_full_meter(firewall: Firewall, log: Nflog, alice: Client, mallory: Client, family: str) -> None:
    load(firewall, sizes={"rates": 1})
    first, second = mallory.addresses(family)[0], alice.addresses(family)[0]
    assert mallory.connect(143, first) == "open"
    assert log.lines == []
    assert alice.connect(143, second) == "open"
    line = the_line(log, "mailfw full rate_dovecot: ")
    assert (line.source, line.source_port, line.destination) == (server(family), 143, second)


# Observing


def test_ban_that_is_only_observed(firewall: Firewall, log: Nflog, alice: Client, family: str) -> None:
    load(firewall, enforce=False)
    source = alice.addresses(family)[0]
    assert [alice.connect(143, source) for _ in range(BURST + 1)] == ["open"] * (BURST + 1)
    line = the_line(log, "mailfw would ban dovecot: ")
    assert (line.source, line.source_port, line.destination) == (server(family), 143, source)


def test_ban_of_a_network_that_is_only_observed(firewall: Firewall, log: Nflog, alice: Client, family: str) -> None:
    load(firewall, {"networks": {"rate": "1/hour"}}, enforce=False)
    assert [alice.connect(587, alice.addresses(family)[0]) for _ in range(2)] == ["open"] * 2
    the_line(log, "mailfw would ban postfix network: ")


@pytest.mark.parametrize("untrusted", ["hold", "drop", "reject"])
@pytest.mark.parametrize("kind", ["banned", "blocked", "untrusted"])
def test_refusal_that_is_only_observed(
    firewall: Firewall, log: Nflog, alice: Client, family: str, kind: str, untrusted: str
) -> None:
    """There is no waiting, so hold says it of the first try."""
    source, mode = alice.addresses(family)[0], "private" if kind == "untrusted" else "autoban"
    load(firewall, protection={"type": mode}, reaction={"untrusted": untrusted}, enforce=False)
    if kind == "banned":
        firewall.ban(source)
    if kind == "blocked":
        firewall.block(source)
    assert alice.connect(993, source) == "open"
    until(lambda: log.lines, "logged")
    assert {line.prefix for line in log.lines} == {f"mailfw would refuse {kind}: "}
    assert {(line.source, line.destination, line.port) for line in log.lines} == {(source, server(family), 993)}


# Limits


@pytest.mark.parametrize("kind", ["banned", "blocked", "untrusted"])
def test_lines_are_limited_and_refusals_are_not(firewall: Firewall, log: Nflog, alice: Client, kind: str) -> None:
    load(firewall, protection={"type": "private" if kind == "untrusted" else "autoban"})
    source = alice.ipv4[0]
    if kind == "banned":
        firewall.ban(source)
    if kind == "blocked":
        firewall.block(source)
    assert [alice.connect(993, source) for _ in range(50)] == ["refused"] * 50
    assert firewall.counter(kind) == 50
    assert len(log.said(f"mailfw refuse {kind}: ")) == len(log.lines) == 5


def test_flood_of_refusals_hides_no_ban_and_no_other_refusal(
    firewall: Firewall, log: Nflog, alice: Client, mallory: Client, family: str
) -> None:
    load(firewall, protection={"type": "autoban", "services": {"sieve": "private"}}, sizes={"rates": 1})
    source, *_, newcomer = alice.addresses(family)
    flooding, blocked = mallory.ipv4[2], mallory.ipv6[2]
    firewall.ban(flooding)
    firewall.block(blocked)
    assert [mallory.connect(993, flooding) for _ in range(20)] == ["refused"] * 20
    assert [alice.connect(4190, source) for _ in range(20)] == ["refused"] * 20
    assert len(log.lines) == 10
    assert mallory.connect(993, blocked) == "refused"
    assert [alice.connect(143, source) for _ in range(BURST + 1)] == ["open"] * BURST + ["silent"]
    assert [alice.connect(587, source) for _ in range(BURST + 1)] == ["open"] * BURST + ["silent"]
    assert alice.connect(143, newcomer) == "open"
    assert [line.prefix for line in log.lines[10:] if line.prefix != "mailfw refuse banned: "] == [
        "mailfw refuse blocked: ",
        "mailfw ban dovecot: ",
        "mailfw ban postfix: ",
        "mailfw full rate_dovecot: ",
    ]


@pytest.mark.parametrize("enforce", [True, False])
def test_one_source_with_many_connections_hides_no_other_ban(
    firewall: Firewall, log: Nflog, alice: Client, mallory: Client, family: str, enforce: bool
) -> None:
    load(firewall, enforce=enforce)
    flooding, other = mallory.addresses(family)[0], alice.addresses(family)[0]
    if enforce:  # their handshakes are done before the first is banned
        firewall.nft("insert", "rule", *nft.TABLE.split(), "output", "tcp", "flags", "&", "psh", "!=", "0", "drop")
    tries = [mallory.connecting(143, flooding, LIMIT) for _ in range(20)]
    if enforce:
        until(lambda: firewall.counter("opened") == 20, "all are open")
        handle = re.search(r"psh.*handle (\d+)", firewall.nft("-a", "list", "chain", *nft.TABLE.split(), "output"))
        firewall.nft("delete", "rule", *nft.TABLE.split(), "output", "handle", handle[1])
    until(lambda: firewall.counter("over_rate") == 20 - BURST, "all the others are above the rate")
    served = BURST if enforce else 20
    until(lambda: [each.result() for each in tries if each.done()] == ["open"] * served, "all of them that are served")
    for _ in range(BURST + 1):
        alice.connect(143, other)

    def bans() -> list[str]:
        return [line.destination for line in log.lines if " ban " in line.prefix]

    until(lambda: other in bans(), "both bans")
    # Of two answers at the very same moment neither finds the ban that the other makes.
    assert list(dict.fromkeys(bans())) == [flooding, other]
    assert len(bans()) <= 3


def test_limit_ends_with_time(firewall: Firewall, log: Nflog, alice: Client) -> None:
    load(firewall, rate="10/second", protection={"type": "private"})
    for _ in range(10):
        alice.connect(993, alice.ipv4[0])
    until(lambda: alice.connect(993, alice.ipv4[0]) and len(log.lines) > 8, "more than the burst of lines")


# What is loaded


def logs(firewall: Firewall, **pillar: Any) -> list[str]:
    """Return the log statements of the loaded rules."""
    firewall.load(**pillar)
    listing = firewall.nft("-s", "list", "table", *nft.TABLE.split())
    return re.findall(r"\blog\b.*", listing)


@pytest.mark.parametrize("enforce", [True, False])
def test_every_kind_is_known(firewall: Firewall, enforce: bool) -> None:
    """By default the lines go to the kernel's log; the kernel takes every kind of line so."""
    found = [
        re.fullmatch(r'log prefix "(.*)" level info', text) for text in logs(firewall, enforce=enforce, **EVERYTHING)
    ]
    prefixes = [match[1] for match in found if match]
    assert len(prefixes) == len(found)
    assert all(PREFIX.fullmatch(prefix) for prefix in prefixes)
    assert {prefix.removeprefix("mailfw ").removeprefix("would ").removesuffix(": ") for prefix in prefixes} == KINDS
    would = {prefix for prefix in prefixes if prefix.startswith("mailfw would ")}
    assert would == (set() if enforce else {prefix for prefix in prefixes if " full " not in prefix})


def test_every_line_is_limited(firewall: Firewall) -> None:
    firewall.load(log={"rate": "3/hour"}, **EVERYTHING)
    rules = [
        line for line in firewall.nft("-s", "list", "table", *nft.TABLE.split()).splitlines() if "log prefix" in line
    ]
    assert len(rules) >= len(KINDS)
    assert all(re.search(r"\slimit rate 3/hour (burst 5 packets )?log prefix", rule) for rule in rules)


def test_lines_can_go_to_a_group(firewall: Firewall) -> None:
    found = logs(firewall, log={"group": 0}, **EVERYTHING)
    assert len(found) >= len(KINDS)
    assert all(text.endswith(': " group 0') for text in found)


@pytest.mark.parametrize("mode", ["autoban", "protected", "private", "public"])
@pytest.mark.parametrize("enforce", [True, False])
def test_logging_can_be_switched_off(firewall: Firewall, mode: str, enforce: bool) -> None:
    assert logs(firewall, protection={"type": mode}, enforce=enforce, **EVERYTHING)
    assert logs(firewall, protection={"type": mode}, enforce=enforce, log=False, **EVERYTHING) == []
