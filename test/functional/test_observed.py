"""What the agent keeps of who would have been refused: real packets, a real kernel's sets, and an agent that ends."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from mailfwlib import elements, familiar, listing, metrics, netlink, observed, parse, people
from mailfwlib.settings import METRICS_DIRECTORY
from support.agent import KEY, LOGIN_USER, Agent
from support.firewall import Firewall
from support.net import LIMIT, Client, Host, until

METRICS = Path(METRICS_DIRECTORY) / metrics.FILE
PILLAR: dict[str, Any] = {
    "protection": {"type": "protected"},
    "enforce": False,
    "fleet": {"keys": [KEY]},
    "trusted": {"users": "plain"},
}


def tally(host: Host) -> dict[tuple[str, int], int]:
    """Return what is on disk: source and port -> times."""
    kept = host.call(observed.Tally)
    return {(str(observed.address_of(key)), observed.port_of(key)): one.times for key, one in kept.counts.items()}


def report(firewall: Firewall, host: Host) -> list[dict[str, Any]]:
    """Return what an operator is told, as of now."""

    def look() -> list[dict[str, Any]]:
        kept, now = observed.Tally(), time.time()
        kept.look(netlink.Kernel(), now)
        found = observed.seen(kept, listing.Wanted(), familiar.Familiar(), people.known(), firewall.settings)
        return [observed.said(one, "", now, firewall.settings) for one in found]

    return host.call(look)


def key(source: str) -> str:
    return str(elements.prefix_base(parse.address(source), 64))


def test_tries_are_kept_over_restarts_and_reloads(
    agent: Agent, loaded: Firewall, host: Host, alice: Client, family: str
) -> None:
    source = alice.addresses(family)[0]
    where = (key(source), 587)
    agent.kill()
    assert [alice.connect(587, source) for _ in range(10)] == ["open"] * 10
    agent.start()
    until(lambda: tally(host).get(where, 0) >= 10, "the first look")
    first = tally(host)[where]
    agent.kill()
    assert alice.connect(587, source) == "open"
    agent.start()
    until(lambda: tally(host).get(where, 0) > first, "the look after a restart")
    agent.kill()
    loaded.unload()  # as a reboot does
    loaded.load(**PILLAR)
    assert alice.connect(587, source) == "open"
    agent.start()
    until(lambda: tally(host).get(where, 0) >= first + 2, "what was counted before the table was gone")
    agent.status()  # It has started: the journal may have said so much already.
    assert agent.stop() == 0
    # A straggler of a connection that has ended may come on top.
    assert tally(host)[where] <= first + 5, "nothing is counted twice"
    (row,) = [row for row in report(loaded, host) if row["service"] == "submission"]
    assert row["times"] == tally(host)[where]
    assert row["logged in"] is None


def test_who_logs_in_is_said_and_comes_first(
    agent: Agent, loaded: Firewall, host: Host, alice: Client, mallory: Client, family: str
) -> None:
    source, stranger = alice.addresses(family)[0], mallory.addresses(family)[0]
    assert [mallory.connect(587, stranger) for _ in range(9)] == ["open"] * 9
    assert alice.connect(587, source) == "open"
    agent.login(source, "Alice@example.org")
    assert alice.connect(587, source) == "open", "trusted now: only a straggler may be counted yet"
    until(lambda: host.call(lambda: len(familiar.Familiar())), "the login is on disk", LIMIT)
    first, second = [row for row in report(loaded, host) if row["service"] == "submission"]
    assert parse.network(first["address"]).network_address == parse.address(key(source))
    assert (1 <= first["times"] <= 3, first["users"]) == (True, ["user:alice@example.org"])
    assert first["logged in"].endswith("s ago")
    assert (second["times"] >= 9, second["logged in"], second["users"]) == (True, None, [])


def test_set_that_somebody_fills_has_room_again(
    agent: Agent, firewall: Firewall, host: Host, alice: Client, family: str
) -> None:
    agent.kill()
    pillar = {**PILLAR, "sizes": {"observed": 8}}
    firewall.load(**pillar)
    agent.configure(pillar)
    base = {"ipv4": "10.9.0.{}", "ipv6": "2001:db8:9:{}::"}[family]
    many = [base.format(number) for number in range(1, 9)]
    for source in many:
        firewall.nft(
            "add", "element", "inet", "mailfw", f"observed_{family}", f"{{ {source} . 587 counter packets 2 bytes 80 }}"
        )
    source = alice.addresses(family)[0]
    assert alice.connect(587, source) == "open"
    assert len(firewall.elements(f"observed_{family}")) == 8, "there is no room"
    agent.start()
    until(lambda: not firewall.elements(f"observed_{family}"), "the set is emptied")
    assert all(tally(host).get((one, 587)) == 2 for one in many), "what was in it is on disk before it is emptied"
    until(lambda: host.call(observed.Tally).full.looks == 1, "that it was full is kept")
    assert alice.connect(587, source) == "open"
    assert f"{key(source)} . 587" in firewall.elements(f"observed_{family}")
    agent.restart()
    until(lambda: tally(host).get((key(source), 587), 0) >= 1, "there was room for another one")
    assert all(tally(host)[one, 587] == 2 for one in many)


def test_more_than_the_agent_keeps_is_dropped_and_said(agent: Agent, loaded: Firewall, host: Host) -> None:
    agent.kill()
    many = [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(observed.MOST + 100)]
    loaded.run(f"add element inet mailfw observed_ipv4 {{ {', '.join(f'{one} . 587' for one in many)} }}")
    agent.start()
    until(lambda: host.call(observed.Tally).dropped >= 100, "some are dropped", 30)
    kept = int(observed.MOST * observed.KEPT)
    assert len(tally(host)) == kept
    until(lambda: not loaded.elements("observed_ipv4"), "the set is emptied")
    assert agent.status()["observed"] == kept


@pytest.mark.parametrize(("lengths", "expected"), [((64, 64), "59m"), ((64, 48), "59m"), ((64, 128), None)])
def test_trust_is_said_where_it_is_for_the_whole_source(
    firewall: Firewall, host: Host, alice: Client, lengths: tuple[int, int], expected: str | None
) -> None:
    """Longer trusted prefixes than sources: one address of a source is trusted, another one may have tried."""
    pillar = {**PILLAR, "autoban": {"ipv6_prefix": lengths[0]}, "trusted": {"ipv6_prefix": lengths[1]}}
    firewall.load(**pillar)
    source = alice.addresses("ipv6")[0]
    assert alice.connect(587, source) == "open"
    firewall.trust(source, ports=[587])

    def look() -> list[str | None]:
        kept, kernel, settings = observed.Tally(), netlink.Kernel(), firewall.settings
        kept.look(kernel, time.time())
        found = observed.seen(kept, listing.Wanted(), familiar.Familiar(), [], settings)
        return [observed.trust(one, kernel, settings) for one in found if one.network.version == 6]

    (said,) = host.call(look)
    assert said is None if expected is None else said and said.startswith(expected), said


def test_enforcing_host_keeps_what_was_observed_and_takes_no_more(
    agent: Agent, loaded: Firewall, host: Host, alice: Client, family: str
) -> None:
    source = alice.addresses(family)[0]
    agent.kill()
    assert alice.connect(587, source) == "open"
    agent.start()
    until(lambda: (key(source), 587) in tally(host), "the first look")
    before = tally(host)
    enforcing = {**PILLAR, "enforce": True, "reaction": {"untrusted": "reject"}}
    loaded.load(**enforcing)
    assert alice.connect(587, source) == "refused"
    agent.kill()
    host.call(METRICS.parent.mkdir, parents=True)
    try:
        agent.configure(enforcing)
        agent.start()
        until(lambda: host.call(METRICS.exists), "the agent has looked")
        assert agent.stop() == 0
    finally:
        host.call(shutil.rmtree, METRICS.parent)
    # The observer may have begun later than the metrics.
    host.call(lambda: observed.Observer(lambda: loaded.settings, familiar.Familiar())._look())
    assert tally(host) == before
    assert "not known" not in agent.log()


def test_operator_may_have_a_source_forgotten(
    agent: Agent, loaded: Firewall, host: Host, alice: Client, family: str
) -> None:
    source = alice.addresses(family)[0]
    agent.kill()
    assert alice.connect(587, source) == "open"
    agent.start()
    until(lambda: (key(source), 587) in tally(host), "the first look")
    loaded.run(f"flush set inet mailfw observed_{family}")
    assert "not allowed" in agent.ask_as(LOGIN_USER, "overlook", key(source))
    agent.restart()
    agent.ask("overlook", key(source))
    until(lambda: (key(source), 587) not in tally(host), "it is forgotten", observed.LOOK + LIMIT)
