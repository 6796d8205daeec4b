"""Events from a minion that somebody has taken over, but without the fleet's key: nothing comes of them.

That nothing happened shows once a login that came after the event has reached the other host.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

from integration import hostile
from integration.fleet import Fleet, MailHost, wait_until_trusted
from integration.hosts import wait_for

#: What the master publishes and runs for logins, for hosts that catch up, and for the tests' own look at it.
EXPECTED = {"mailfw.receive", "runner.mailfw.announce", "runner.mailfw.trusts", "test.echo"}


class Intruder:
    """A process on a mail host that fires what it likes on the minion's event bus."""

    def __init__(self, host: MailHost):
        script = str(Path(__file__).with_name("fire.py"))
        self._process = subprocess.Popen(
            [*host.host.enter, sys.executable, script, str(host.minion.config_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def fire(self, data: Any, tag: str = "mailfw/login", **more: Any) -> None:
        """Fire an event at the master."""
        load = {"tag": tag, "data": data, "events": None, "pretag": None, **more}
        print(json.dumps(load), file=self._process.stdin, flush=True)
        assert self._process.stdout
        assert self._process.stdout.readline() == "fired\n"

    def leave(self) -> None:
        """End the process."""
        self._process.communicate(timeout=10)


@pytest.fixture(scope="module")
def intruder(fleet: Fleet) -> Iterator[Intruder]:
    """An intruder on mx1."""
    process = Intruder(fleet.hosts["mx1"])
    yield process
    process.leave()


@pytest.fixture
def nothing_comes_of(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> Callable[[Callable[[], None]], None]:
    """Do something, and check that nobody is trusted, nothing is kept and nothing has run because of it."""

    def check(act: Callable[[], None]) -> None:
        moment = time.time()
        before, known = [host.host.trusted().keys() for host in (mx1, mx2)], fleet.known()
        address = fleet.new_address()
        act()
        mx1.agent.login(address)
        wait_until_trusted(address, mx1, mx2)
        assert [host.host.trusted().keys() - {address} for host in (mx1, mx2)] == before
        assert {**fleet.known(), "waiting": set()} == {**known, "trusts": known["trusts"] | {address}}
        assert {job["fun"] for job in fleet.ran_since(moment)} <= EXPECTED
        assert not any(host.path(hostile.MARK).exists() for host in (mx1.host, mx2.host, fleet.host))

    return check


def test_the_intruder_can_fire(fleet: Fleet, mx1: MailHost, mx2: MailHost, intruder: Intruder) -> None:
    """With the key it would be believed: the other tests of this file rest on that."""
    address = fleet.new_address()
    intruder.fire({"message": fleet.sign(address, sender="mx3")})
    wait_until_trusted(address, mx1, mx2)


@pytest.mark.parametrize("name", hostile.DATA)
def test_hostile_data(fleet: Fleet, intruder: Intruder, nothing_comes_of: Any, name: str) -> None:
    data = hostile.DATA[name](fleet.sign(fleet.new_address()))
    nothing_comes_of(lambda: intruder.fire(data))


@pytest.mark.parametrize(
    ("key", "age"), [("0" * 64, 0), (None, 600), (None, -600)], ids=["another key", "stale", "from the future"]
)
def test_a_message_that_must_not_be_believed(
    fleet: Fleet, intruder: Intruder, nothing_comes_of: Any, key: str | None, age: int
) -> None:
    message = fleet.sign(fleet.new_address(), key=key, now=time.time() - age)
    nothing_comes_of(lambda: intruder.fire({"message": message}))


def test_a_replay_trusts_nobody_again(
    fleet: Fleet, mx1: MailHost, mx2: MailHost, intruder: Intruder, nothing_comes_of: Any
) -> None:
    address, moment = fleet.new_address(), time.time()
    mx1.agent.login(address)
    wait_until_trusted(address, mx2)
    overheard, *_ = wait_for(
        "the announcement", lambda: [told for told in fleet.announcements_since(moment) if address in told]
    )
    fleet.call_all([mx1, mx2], "mailfw.untrust", address)
    nothing_comes_of(lambda: intruder.fire({"message": overheard}))
    jobs = [job for job in fleet.ran_since(moment) if job["fun"] == "mailfw.receive"]
    assert sum(overheard in job["arg"][0] for job in jobs) == 1


def test_ids_and_lists_of_events_are_no_authority(fleet: Fleet, intruder: Intruder, nothing_comes_of: Any) -> None:
    unsigned = {"message": fleet.sign(fleet.new_address(), key="f" * 64)}
    event = {"tag": "mailfw/login", "data": {"id": "mx2", "cmd": "_minion_event", "data": unsigned}}
    nothing_comes_of(lambda: intruder.fire(None, events=[event], id="mx2"))
    nothing_comes_of(lambda: intruder.fire(unsigned, id="mx2"))


def test_a_flood_of_junk_does_not_keep_logins_away(
    fleet: Fleet, mx1: MailHost, mx2: MailHost, intruder: Intruder, nothing_comes_of: Any
) -> None:
    """The login comes after the flood; what is not signed costs the master little, and its reactor starts nothing."""

    def flood() -> None:
        for number in range(200):
            intruder.fire({"message": f"{number:064x} junk"})

    moment = time.time()
    nothing_comes_of(flood)
    assert sum(job["fun"] == "runner.mailfw.announce" for job in fleet.ran_since(moment)) < 10


def test_a_flood_of_replays_starts_nothing_and_keeps_no_login_away(
    fleet: Fleet, mx1: MailHost, mx2: MailHost, intruder: Intruder
) -> None:
    """The intruder fires what it has heard, five hundred times; hosts go on telling each other of logins meanwhile."""
    addresses = [fleet.new_address() for _ in range(5)]
    overheard = [fleet.sign(address, sender="mx3") for address in addresses]
    for message in overheard:
        intruder.fire({"message": message})
    wait_for("all to be trusted", lambda: mx1.trusts(*addresses) and mx2.trusts(*addresses))
    moment, waited = time.time(), []
    with ThreadPoolExecutor(1) as pool:
        flood = pool.submit(lambda: [intruder.fire({"message": message}) for message in overheard * 100])
        while not flood.done() or len(waited) < 5:
            address, logged_in = fleet.new_address(), time.monotonic()
            mx1.agent.login(address)
            wait_until_trusted(address, mx2)
            waited.append(time.monotonic() - logged_in)
    wait_for("the whole flood", lambda: sum(one in overheard for one in fleet.announcements_since(moment)) == 500)
    last = fleet.new_address()
    mx1.agent.login(last)
    wait_until_trusted(last, mx2)  # The reactor is through with the flood.
    calls = [job for job in fleet.ran_since(moment) if job["fun"] == "runner.mailfw.announce"]
    print(f"{len(calls)} calls of the runner; {len(waited)} logins were trusted after {sorted(waited)} s")
    announced = [call["fun_args"][0]["message"] for call in calls]
    assert not set(announced) & set(overheard)
    assert len(announced) == len(set(announced)), "nor does a message of the hosts start two"
    assert sorted(waited)[len(waited) // 2] < 5


def test_many_believable_messages_become_few_jobs(
    fleet: Fleet, mx1: MailHost, mx2: MailHost, intruder: Intruder
) -> None:
    addresses, moment = [fleet.new_address() for _ in range(40)], time.time()
    sent = [fleet.sign(address, sender="mx3") for address in addresses]
    for message in sent:
        intruder.fire({"message": message})
    for host in (mx1, mx2):
        wait_for(f"{host.name} to trust all", lambda host=host: host.trusts(*addresses))
    jobs = [set(job["arg"][0]) & set(sent) for job in fleet.ran_since(moment) if job["fun"] == "mailfw.receive"]
    assert sum(map(bool, jobs)) <= 20
    assert sum(map(len, jobs)) == 40
