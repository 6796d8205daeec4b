"""Who is trusted and banned is in the journal, whoever or whatever has made it so, and soon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from mailfwlib import audit, elements, parse
from mailfwlib.bans import Bans
from mailfwlib.client import AgentError
from support.agent import KEY, Agent, signed
from support.firewall import Firewall
from support.net import Client, Host, until
from support.systemjournal import SystemJournal

#: Seconds within which a ban that the rules make is in the journal, unless the machine is busy.
SOON = 2.0
PILLAR: dict[str, Any] = {
    "autoban": {"rate": "1/hour", "burst": 2},
    "reaction": {"banned": "reject"},
    "reports": False,
    "fleet": {"keys": [KEY]},
}
PORTS = "587,465,143,993,110,995,4190"


@pytest.fixture
def journal(host: Host) -> Iterator[SystemJournal]:
    made = SystemJournal(host)
    yield made
    made.close()


@pytest.fixture
def agent(journal: SystemJournal, agent: Agent) -> Agent:
    agent.status()  # it has started
    return agent


def exceed(client: Client, source: str, port: int = 143) -> None:
    for _ in range(3):
        client.connect(port, source)


def told_after(journal: SystemJournal, client: Client, source: str, port: int) -> float:
    """Have a source banned; return after how many seconds the journal has that."""
    before = len(journal.entries("ban"))
    exceed(client, source, port)
    began = time.monotonic()
    until(lambda: len(journal.entries("ban")) > before, "the ban in the journal")
    return time.monotonic() - began


def bans_told(agent: Agent) -> list[dict[str, Any]]:
    return [one["data"] for one in agent.events() if one["tag"] == "mailfw/ban"]


def test_ban_by_the_rate_is_told_soon(
    agent: Agent, journal: SystemJournal, alice: Client, mallory: Client, family: str
) -> None:
    source, other = alice.addresses(family)[0], mallory.addresses(family)[0]
    name = source if family == "ipv4" else "2001:db8:a::/64"
    took = [told_after(journal, alice, source, 143)]
    (entry,) = journal.entries("ban")
    assert entry["MESSAGE"].startswith(f"action=ban address={name} where=dovecot until=20")
    assert entry["MESSAGE"].endswith("Z by=rate")
    assert entry["SYSLOG_IDENTIFIER"] == "mailfw"
    assert entry["MAILFW_ADDRESS"] == name
    (event,) = until(lambda: bans_told(agent), "the event")
    assert {key: event[key] for key in ("host", "role", "address")} == {
        "host": "mx1.example",
        "role": "dovecot",
        "address": name,
    }
    assert event["until"] == pytest.approx(time.time() + 3600, abs=10)
    assert entry["MAILFW_UNTIL"] in {audit.moment(event["until"] + second) for second in (-1, 0, 1)}

    took += [told_after(journal, alice, source, 587), told_after(journal, mallory, other, 143)]
    assert len(journal.entries("ban")) == 3
    assert min(took) < SOON
    assert {one["MAILFW_WHERE"] for one in journal.entries("ban") if one["MAILFW_ADDRESS"] == name} == {
        "dovecot",
        "postfix",
    }


def test_only_new_bans_of_the_rules_are_told(
    agent: Agent, loaded: Firewall, journal: SystemJournal, alice: Client, family: str
) -> None:
    """Not an operator's, which the verb tells, nor those from before."""
    source, *_, third = alice.addresses(family)
    exceed(alice, source)
    until(lambda: journal.entries("ban"), "the ban in the journal")
    agent.restart()
    agent.status()
    loaded.run(elements.ban(parse.address("192.0.2.77"), ["dovecot"], 600, loaded.settings, audit.note("alice", "")))
    exceed(alice, third)
    until(lambda: len(journal.entries("ban")) == 2, "the second ban")
    assert journal.entries()[1]["MAILFW_ADDRESS"] == (third if family == "ipv4" else "2001:db8:a:1::/64")
    assert len(journal.entries()) == 2


def test_network_is_told_as_one(agent: Agent, loaded: Firewall, journal: SystemJournal, alice: Client) -> None:
    pillar = {**PILLAR, "autoban": {"burst": 100, "networks": {"rate": "2/hour"}}}
    agent.configure(pillar)
    loaded.load(**pillar)
    exceed(alice, alice.ipv4[0])
    (entry,) = until(lambda: journal.entries("ban"), "the ban in the journal")
    assert entry["MAILFW_ADDRESS"] == "198.51.100.0/24"


def test_nothing_is_listed_while_nobody_is_banned(host: Host, loaded: Firewall, alice: Client) -> None:
    """A second's look costs next to nothing, also with many bans there."""
    many = ", ".join(f"10.{n >> 8}.{n & 255}.1" for n in range(60_000))
    loaded.run(f"add element inet mailfw banned_dovecot_ipv4 {{ {many} }}")
    bans = host.call(Bans, print)

    def look() -> tuple[int, float]:
        began = time.monotonic()
        return len(host.call(bans._new)), time.monotonic() - began

    count, took = look()
    assert count == 60_000
    assert min(look()[1] for _ in range(3)) < took / 10
    exceed(alice, alice.ipv4[0])
    assert look()[0] == 1


def test_ban_in_a_table_that_is_new_is_told(host: Host, loaded: Firewall, alice: Client, mallory: Client) -> None:
    """Its counters may be where those of the last one were."""
    bans = host.call(Bans, print)
    exceed(alice, alice.ipv4[0])
    assert [one.address for one in host.call(bans._new)] == [alice.ipv4[0]]
    loaded.unload()
    loaded.load(**PILLAR)
    exceed(mallory, mallory.ipv4[0])
    assert [one.address for one in host.call(bans._new)] == [mallory.ipv4[0]]


def test_a_step_of_the_clock_makes_no_ban_news(
    host: Host, loaded: Firewall, alice: Client, mallory: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    bans, clock = host.call(Bans, print), time.time
    exceed(alice, alice.ipv4[0])
    assert [one.address for one in host.call(bans._new)] == [alice.ipv4[0]]
    exceed(mallory, mallory.ipv4[0])
    monkeypatch.setattr(time, "time", lambda: clock() + 86400)
    (told,) = host.call(bans._new)
    assert told.address == mallory.ipv4[0]
    assert told.until == pytest.approx(clock() + 86400 + 3600, abs=10)


def test_trust_is_told_when_it_is_news(agent: Agent, journal: SystemJournal, family: str) -> None:
    source, other = {"ipv4": ("192.0.2.1", "192.0.2.2"), "ipv6": ("2001:db8:1::1", "2001:db8:2::1")}[family]
    names = [source, other] if family == "ipv4" else ["2001:db8:1::/64", "2001:db8:2::/64"]
    for _ in range(3):
        agent.login(source, "alice@example.org")
    assert agent.ask("receive", signed({other: time.time()})) == "1"
    found = [one["MESSAGE"].split() for one in journal.entries("trust")]
    assert [line[1] for line in found] == [f"address={name}" for name in names]
    assert [line[2] for line in found] == [f"where={PORTS}"] * 2
    assert [line[4] for line in found] == ["by=login", "by=fleet"]
    assert "alice" not in str(journal.entries())


def test_bans_that_a_login_lifts_are_told(agent: Agent, loaded: Firewall, journal: SystemJournal, family: str) -> None:
    """Those that there were, and none else."""
    source, other = {"ipv4": ("192.0.2.1", "192.0.2.2"), "ipv6": ("2001:db8:1::1", "2001:db8:2::1")}[family]
    names = [source, other] if family == "ipv4" else ["2001:db8:1::/64", "2001:db8:2::/64"]
    loaded.ban(source, ("dovecot",))
    loaded.ban(other)
    for _ in range(2):
        agent.login(source)
    assert agent.ask("receive", signed({other: time.time()})) == "1"
    assert [one["MESSAGE"] for one in journal.entries("unban")] == [
        f"action=unban address={names[0]} where=dovecot by=login",
        f"action=unban address={names[1]} where=postfix,dovecot by=fleet",
    ]


def test_bans_that_a_login_lifts_are_told_where_its_trust_has_no_room(
    agent: Agent, loaded: Firewall, journal: SystemJournal
) -> None:
    loaded.unload()
    loaded.load(**PILLAR, sizes={"trusted": 7})
    agent.login("192.0.2.1")
    loaded.ban("192.0.2.2", ("dovecot",))
    with pytest.raises(AgentError, match="A set is full"):
        agent.login("192.0.2.2")
    assert [one["MESSAGE"] for one in journal.entries("unban")] == [
        "action=unban address=192.0.2.2 where=dovecot by=login"
    ]


def test_login_does_not_wait_for_the_journal(agent: Agent, journal: SystemJournal, host: Host) -> None:
    """Nobody reads it, so that a login which waited would have no answer: what does not fit is in the agent's log."""
    for number in range(1500):
        agent.login(f"10.1.{number >> 8}.{number & 255}")
    assert "action=trust address=10.1.5." in agent.log()
    assert "not in the journal" in agent.log()
