"""Trusting who is logged in already, and who was lately, before a host enforces: what the agent makes of them.

What it is told, ``mailfw.seed`` knows of Dovecot and of what the agent has on disk.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from mailfwlib import people, sessions
from support.agent import KEY, LOGIN_USER, Agent
from support.firewall import Firewall
from support.net import Client, Host, until

HOUR, DAY = 3600, 86400
#: One over each family, and how they appear in the sets.
CLIENTS = {"198.51.100.10": "198.51.100.10", "2001:db8:a::10": "2001:db8:a::"}
PILLAR: dict[str, Any] = {
    "protection": {"type": "protected"},
    "reaction": {"untrusted": "reject"},
    "fleet": {"keys": [KEY]},
    "trusted": {"period": "1d", "per_user": 3},
}


def seed(agent: Agent, *sources: str, user: str | None = None) -> dict[str, str]:
    """Say that users are logged in; return for whom that was news, and what came of it."""
    told = [text for source in sources for text in (source, user or f"{source}@example.org")]
    return dict(json.loads(agent.ask("seed", *told)))


def believe(agent: Agent, *sources: str, ago: float) -> dict[str, str]:
    """Say that somebody logged in from somewhere some seconds ago; return the same."""
    told = [text for source in sources for text in (source, str(time.time() - ago))]
    return dict(json.loads(agent.ask("believe", *told)))


def left(firewall: Firewall) -> dict[str, float]:
    found = {**firewall.elements("trusted_ipv4"), **firewall.elements("trusted_ipv6")}
    return {element.partition(" . ")[0]: seconds for element, seconds in found.items()}


def test_who_is_logged_in_is_trusted_as_by_a_login(agent: Agent, loaded: Firewall, alice: Client, host: Host) -> None:
    assert [alice.connect(587, source) for source in CLIENTS] == ["refused", "refused"]
    assert seed(agent, *CLIENTS) == dict.fromkeys(CLIENTS, "")
    assert [alice.connect(587, source) for source in CLIENTS] == ["open", "open"]
    assert left(loaded).keys() == set(CLIENTS.values())
    assert all(DAY - 60 < seconds <= DAY for seconds in left(loaded).values())
    until(lambda: any(event["tag"] == "mailfw/login" for event in agent.events()), "the fleet is told")
    assert len(host.call(people.known)) == 2
    assert seed(agent, *CLIENTS) == {}, "it is no news a second time"
    agent.configure({**PILLAR, "trusted": {"period": "7d"}})
    assert agent.ask("renew", *(text for source in CLIENTS for text in (source, f"{source}@example.org"))) == "2"


def test_earlier_logins_are_trusted_for_what_is_left(agent: Agent, loaded: Firewall, alice: Client) -> None:
    assert believe(agent, *CLIENTS.values(), ago=20 * HOUR) == dict.fromkeys(CLIENTS.values(), "")
    assert [alice.connect(587, source) for source in CLIENTS] == ["open", "open"]
    assert all(4 * HOUR - 60 < seconds <= 4 * HOUR for seconds in left(loaded).values())
    assert believe(agent, *CLIENTS.values(), ago=20 * HOUR) == {}
    assert believe(agent, "203.0.113.9", ago=25 * HOUR) == {}
    assert "203.0.113.9" not in left(loaded)


def test_whom_no_login_would_trust_is_named(agent: Agent, loaded: Firewall, firewall: Firewall) -> None:
    agent.configure({**PILLAR, "trusted": {**PILLAR["trusted"], "never": ["203.0.113.0/24"]}})
    strange = {"127.0.0.1": "is loopback", "fe80::1": "is link-local", "203.0.113.5": "is in mailfw:trusted:never"}
    assert seed(agent, *strange, Host.ipv4).items() >= strange.items()
    assert believe(agent, *strange, ago=HOUR) == strange
    agent.configure({**PILLAR, "protection": {"type": "private"}})
    reason = "no mailfw:trusted network admits it, and the mode is private"
    assert seed(agent, *CLIENTS) == dict.fromkeys(CLIENTS, reason)
    assert believe(agent, *CLIENTS, ago=HOUR) == dict.fromkeys(CLIENTS, reason)
    assert left(loaded) == {}


def test_one_user_is_not_trusted_from_everywhere(agent: Agent, loaded: Firewall) -> None:
    found = seed(agent, *(f"203.0.113.{number}" for number in range(1, 6)), user="mallory")
    assert list(found.values())[:3] == [""] * 3
    assert all("per_user" in reason for reason in list(found.values())[3:])
    assert len(left(loaded)) == 3


@pytest.mark.parametrize("restarted", [False, True])
def test_what_an_operator_has_ended_stays_so(
    agent: Agent, loaded: Firewall, alice: Client, host: Host, restarted: bool
) -> None:
    before = time.time()
    for source, key in CLIENTS.items():
        agent.login(source)
        loaded.untrust(source)
        agent.ask("forget", key)
    if restarted:
        agent.restart()
    found = seed(agent, *CLIENTS)
    reason = "an operator has ended its trust, and nobody has logged in since"
    assert found == dict.fromkeys(CLIENTS, reason)
    kept = set(map(str, host.call(sessions.last_logins)))
    assert kept == (set() if restarted else set(CLIENTS.values())), "until the next start its file has them"
    assert believe(agent, *CLIENTS.values(), ago=time.time() - before) == dict.fromkeys(CLIENTS.values(), reason)
    assert [alice.connect(587, source) for source in CLIENTS] == ["refused", "refused"]
    for source in CLIENTS:
        agent.login(source)
    assert seed(agent, *CLIENTS) == {}, "a login after that counts"


def test_block_stays(agent: Agent, loaded: Firewall, alice: Client) -> None:
    for source in CLIENTS:
        loaded.block(source)
    seed(agent, *CLIENTS)
    assert [alice.connect(587, source, patience=0.2) for source in CLIENTS] == ["silent", "silent"]


def test_full_set_is_said(agent: Agent, firewall: Firewall) -> None:
    firewall.load(**PILLAR, sizes={"trusted": 1})
    for verb in (lambda: seed(agent, "198.51.100.10"), lambda: believe(agent, "198.51.100.10", ago=HOUR)):
        (reason,) = verb().values()
        assert "A set is full" in reason


@pytest.mark.parametrize("verb", ["seed", "believe"])
def test_services_that_are_new_are_opened_for_who_is_trusted_already(
    agent: Agent, firewall: Firewall, alice: Client, verb: str
) -> None:
    only = {**PILLAR, "roles": ["dovecot"]}
    firewall.load(**only)
    agent.configure(only)
    for source in CLIENTS:
        agent.login(source, f"{source}@example.org")
    firewall.load(**PILLAR)
    agent.configure(PILLAR)
    assert [alice.connect(587, source) for source in CLIENTS] == ["refused", "refused"]
    assert (seed(agent, *CLIENTS) if verb == "seed" else believe(agent, *CLIENTS.values(), ago=HOUR)) == {}
    assert [alice.connect(587, source) for source in CLIENTS] == ["open", "open"]


@pytest.mark.parametrize("user", ["", "a\nMAILFW_BY=b", "*", "x" * 300, "\u202eevil", "--help", "203.0.113.1"])
def test_strange_users_are_users(agent: Agent, loaded: Firewall, user: str) -> None:
    assert json.loads(agent.ask("seed", "198.51.100.10", user)) == [["198.51.100.10", ""]]
    assert left(loaded).keys() == {"198.51.100.10"}
    assert not user or user not in agent.log()


def test_only_root_may_seed(agent: Agent, loaded: Firewall) -> None:
    for verb, what in (("seed", "alice"), ("believe", str(time.time()))):
        assert "not allowed" in agent.ask_as(LOGIN_USER, verb, "198.51.100.10", what)
    assert left(loaded) == {}
