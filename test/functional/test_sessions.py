"""Sessions that outlive the period of their trust: what the agent makes of the addresses that Dovecot has logged in.

Each test is of a client that is logged in over IPv4 and of one that is over IPv6.
"""

from __future__ import annotations

import itertools
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mailfwlib import client, journal, messages, sessions
from support.agent import KEY, LOGIN_USER, Agent, signed
from support.firewall import Firewall
from support.net import FAMILIES, Client, Host, until

DAY, HOUR = 86400, 3600
ADDRESSES = ("198.51.100.10", "2001:db8:a::10")
#: How they appear in the sets: an IPv6 source is its /64.
ELEMENTS = ("198.51.100.10", "2001:db8:a::")
PILLAR: dict[str, Any] = {
    "protection": {"type": "protected"},
    "reaction": {"untrusted": "reject", "blocked": "reject"},
    "fleet": {"keys": [KEY]},
    "trusted": {"period": "1h"},
}
PRIVATE = {**PILLAR, "protection": {"type": "private"}}


def clients(*sources: str) -> list[str]:
    """Return the sessions of those whom Agent.login logs in, as they are told to the agent."""
    return [text for source in sources for text in (source, f"{source}@example.org")]


def log_in(agent: Agent) -> None:
    for source in ADDRESSES:
        agent.login(source)


def later(agent: Agent, pillar: dict[str, Any] = PILLAR, **trusted: Any) -> None:
    """Have everybody's trust lost most of its period: from now on that is a day."""
    agent.configure({**pillar, "trusted": {"period": "1d", **trusted}})


def renew(agent: Agent) -> int:
    """Say that both clients are still logged in; return how many were renewed."""
    return int(agent.ask("renew", *clients(*ADDRESSES)))


def left(firewall: Firewall) -> list[float]:
    """Return for both clients for how long they are trusted, in seconds; 0 for one that is not."""
    return [min(firewall.elements(f"trusted_{family}").values(), default=0) for family in FAMILIES]


def test_session_renews_the_trust_of_its_login(agent: Agent, loaded: Firewall) -> None:
    log_in(agent)
    assert max(left(loaded)) <= HOUR
    later(agent)
    assert renew(agent) == 2
    assert min(left(loaded)) > DAY - 10
    assert agent.status()["renewed"] == 2


def test_session_brings_back_what_has_run_out(agent: Agent, loaded: Firewall, alice: Client) -> None:
    agent.configure({**PILLAR, "trusted": {"period": "1s"}})
    log_in(agent)
    until(lambda: left(loaded) == [0, 0], "the trust ends")
    agent.configure(PILLAR)
    assert renew(agent) == 2
    assert [alice.connect(587, source) for source in ADDRESSES] == ["open", "open"]


def test_session_at_another_address_of_the_prefix_is_no_news(agent: Agent) -> None:
    log_in(agent)
    later(agent)
    user = f"{ADDRESSES[1]}@example.org"
    sources = ("2001:db8:a::10", "2001:db8:a::11", "2001:db8:a::12", "2001:db8:a:1::10")
    assert agent.ask("renew", *(text for source in sources for text in (source, user))) == "1"


def test_fleet_is_told_as_of_a_login_and_no_more_often(agent: Agent) -> None:
    def told(since: float) -> list[str]:
        """Return whose logins since some time all messages together tell of, and answer all of them."""
        events = [event["data"]["message"] for event in agent.events()]
        for message in events:
            agent.ask("receive", message)
        logins = [login for message in events for login in messages.verify(message, [KEY]).logins.items()]
        return sorted(str(source) for source, at in logins if since - 0.001 <= at <= time.time())

    began = time.time()
    agent.login(ADDRESSES[0])
    until(lambda: told(began) == [ELEMENTS[0]] and agent.status()["outbox"] == 0, "the login is announced")
    assert renew(agent) == 0, "nine tenths of the period are left"
    began = time.time()
    agent.login(ADDRESSES[1])
    until(lambda: told(began) == [ELEMENTS[1]], "the other login is announced")
    later(agent)
    began = time.time()
    assert (renew(agent), renew(agent)) == (2, 0)
    until(lambda: told(began) == sorted(ELEMENTS), "the sessions are announced")
    assert agent.status()["outbox"] == 0


def test_only_a_login_on_this_host_is_renewed(agent: Agent, loaded: Firewall) -> None:
    """What other hosts tell of may itself be a session: two hosts would renew each other for ever."""
    assert renew(agent) == 0
    assert left(loaded) == [0, 0]
    agent.ask("receive", signed(dict.fromkeys(ADDRESSES, time.time())))
    later(agent)
    assert renew(agent) == 0
    assert all(0 < seconds <= HOUR for seconds in left(loaded))


@pytest.mark.parametrize("restarted", [False, True])
def test_what_an_operator_has_ended_is_not_renewed(agent: Agent, loaded: Firewall, restarted: bool) -> None:
    log_in(agent)
    for source, element in zip(ADDRESSES, ELEMENTS):
        loaded.untrust(source)
        agent.ask("forget", element)
    if restarted:
        agent.kill()
        agent.start()
    later(agent)
    assert renew(agent) == 0
    assert left(loaded) == [0, 0]
    agent.configure(PILLAR)
    log_in(agent)
    later(agent)
    assert renew(agent) == 2, "a login after that counts"


@pytest.mark.parametrize("ending", ["kill", "stop"])
def test_login_is_remembered_over_a_restart(agent: Agent, loaded: Firewall, ending: str) -> None:
    log_in(agent)
    getattr(agent, ending)()
    agent.start()
    later(agent)
    assert renew(agent) == 2
    assert min(left(loaded)) > DAY - 10


@pytest.mark.parametrize(("days", "renewed"), [(6.9, 2), (7.1, 0), (-7.1, 0)])
def test_login_counts_for_seven_days(agent: Agent, loaded: Firewall, host: Host, days: float, renewed: int) -> None:
    """Nor does one that a clock gone wrong has dated ahead count for longer."""
    agent.kill()
    lines = "".join(f"{element} {time.time() - days * DAY}\n" for element in ELEMENTS)
    host.call((journal.DIRECTORY / "logins").write_text, lines)
    agent.start()
    assert renew(agent) == renewed
    assert sum(seconds > 0 for seconds in left(loaded)) == renewed
    kept = lines if renewed else ""
    assert host.call((journal.DIRECTORY / "logins").read_text) == kept, "a session is no login"


def test_damaged_memory_is_no_reason_not_to_start(agent: Agent, host: Host) -> None:
    agent.kill()
    now = time.time()
    lines = f"\0\n198.51.100\n{ELEMENTS[0]} {now}\n{ELEMENTS[0]} 1\n{ELEMENTS[1]} {now}\n{ELEMENTS[1]} nan\n2001:db8:"
    host.call((journal.DIRECTORY / "logins").write_text, lines)
    agent.start()
    assert renew(agent) == 1, "the last line that is one counts"


def test_whom_a_login_would_not_trust_no_session_does(agent: Agent, loaded: Firewall) -> None:
    log_in(agent)
    later(agent, never=["198.51.100.0/24", "2001:db8:a::/48"])
    assert renew(agent) == 0
    later(agent, PRIVATE)
    assert renew(agent) == 0
    assert max(left(loaded)) <= HOUR


def test_private_mode_renews_what_an_operator_has_opened(firewall: Firewall, host: Host, tmp_path: Path) -> None:
    firewall.load(**PRIVATE)
    with closing(Agent(host, tmp_path, PRIVATE)) as agent:
        for source, element in zip(ADDRESSES, ELEMENTS):
            firewall.trust(source, 60, [993], "root")
            agent.remember(element, 60, 993, note="root")
        log_in(agent)
        later(agent, PRIVATE)
        assert renew(agent) == 2
    assert min(left(firewall)) > DAY - 10
    assert set(firewall.elements("trusted_ipv4")) == {f"{ELEMENTS[0]} . 993"}


def test_blocked_stays_blocked(agent: Agent, loaded: Firewall, alice: Client) -> None:
    log_in(agent)
    for source in ADDRESSES:
        loaded.block(source)
    later(agent)
    renew(agent)
    assert [alice.connect(587, source) for source in ADDRESSES] == ["refused", "refused"]


def test_only_root_may_renew(agent: Agent) -> None:
    log_in(agent)
    later(agent)
    assert "not allowed" in agent.ask_as(LOGIN_USER, "renew", *clients(*ADDRESSES))
    assert renew(agent) == 2


def test_logins_hardly_wait_for_many_renewals(agent: Agent, host: Host, loaded: Firewall) -> None:
    everybody = [(f"10.1.{number >> 8}.{number & 255}", f"user{number}") for number in range(500)]
    for source, user in everybody:
        agent.login(source, user)
    later(agent)

    def renew_all() -> int:
        few = (everybody[first : first + sessions.AT_ONCE] for first in range(0, len(everybody), sessions.AT_ONCE))
        return sum(int(client.ask("renew", *itertools.chain(*some))) for some in few)

    renewing, waits = host.start(renew_all), []
    while not renewing.done():
        began = time.monotonic()
        agent.login("203.0.113.1")
        waits.append(time.monotonic() - began)
    assert renewing.result() == len(everybody)
    assert len(waits) > 20, "logins come in between"
    assert statistics.median(waits) < 0.25, "the login hook waits no longer"
    assert left(loaded)[0] > DAY - 60
