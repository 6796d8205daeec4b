"""The master that mailfw.reactor configures, and what mail hosts may ask of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from integration.fleet import Fleet, MailHost, wait_until_trusted
from integration.hosts import wait_for
from mailfwlib import messages, parse

NO_AGENT = "there is no mailfw-agent on this host"
NO_NEWS = "0 addresses are newly trusted"


@contextlib.contextmanager
def off(host: MailHost) -> Iterator[None]:
    """Have a mail host without agent and socket for a while: what is sent to it then is lost."""
    host.agent.stop()
    host.agent.close()
    try:
        yield
    finally:
        host.agent.start()


def ask_for_logins(fleet: Fleet, host: MailHost, request: Any) -> Any:
    """Return what the master answers a minion that asks for the fleet's logins."""
    return fleet.call(host, "publish.runner", "mailfw.trusts", [request])


def test_its_configuration_is_the_main_files_and_mailfws(fleet: Fleet) -> None:
    path = Path(fleet.master.config_dir) / "master.d" / "mailfw.conf"
    assert yaml.safe_load(path.read_text()) == {
        "reactor": [
            {"own/event": ["salt://own/reactor.sls"]},
            {"mailfw/login": [f"{fleet.master.config_dir}/mailfw/login.sls"]},
        ],
        "peer_run": {"mx2": ["test.arg"], ".*": ["mailfw.trusts"]},
        "reactor_refresh_interval": 3600,
        "mailfw": {"keys": [fleet.key]},
    }
    assert path.stat().st_mode & 0o777 == 0o600


def test_configuring_it_again_changes_nothing(fleet: Fleet) -> None:
    again = fleet.configure_master()
    assert not again.failed
    assert not again.changed


def test_an_interval_that_is_set_elsewhere_holds(fleet: Fleet) -> None:
    directory = Path(fleet.master.config_dir) / "master.d"
    own = directory / "own.conf"
    own.write_text("reactor_refresh_interval: 30\n")
    try:
        assert not fleet.configure_master().failed
        assert "reactor_refresh_interval" not in yaml.safe_load((directory / "mailfw.conf").read_text())
    finally:
        own.unlink()
        assert not fleet.configure_master().failed
    assert "reactor_refresh_interval: 3600" in (directory / "mailfw.conf").read_text()


def test_a_test_run_shows_a_new_key_but_neither_writes_nor_tells_it(fleet: Fleet) -> None:
    path = Path(fleet.master.config_dir) / "master.d" / "mailfw.conf"
    before, key = path.read_text(), "another" * 9
    fleet.write_pillar("master", fleet={"keys": [key, fleet.key]})
    try:
        tested = fleet.configure_master("test=True")
    finally:
        fleet.write_pillar("master")
    assert tested["mailfw master knows the fleet"]["result"] is None
    assert tested["mailfw master knows the fleet"]["changes"] == {"master configuration": "replaced"}
    assert key not in str(tested.states)
    assert path.read_text() == before


def test_without_keys_it_says_what_it_needs(fleet: Fleet) -> None:
    fleet.write_pillar("master", fleet={})
    try:
        applied = fleet.configure_master()
    finally:
        fleet.write_pillar("master")
    assert "mailfw:fleet:keys" in applied.failed["mailfw master knows the fleet"]


def test_the_main_files_own_reactor_still_runs(fleet: Fleet, mx1: MailHost) -> None:
    touched = mx1.host.path("/run/own-reactor-has-run")
    assert not touched.exists()
    fleet.call(mx1, "event.send", "own/event")
    wait_for("the master's own reactor", touched.exists)
    touched.unlink()


def test_the_main_files_own_peer_run_still_holds(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    assert fleet.call(mx2, "publish.runner", "test.arg", "hello")["args"] == ["hello"]
    assert not fleet.call(mx1, "publish.runner", "test.arg", "hello")


def test_minions_may_run_nothing_else_of_mailfw(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()
    assert not fleet.call(mx1, "publish.runner", "mailfw.announce", [fleet.sign(address)])
    other = fleet.new_address()
    mx1.agent.login(other)
    wait_until_trusted(other, mx2)
    assert not mx2.trusts(address)


def test_a_host_that_was_off_catches_up(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address, moment = fleet.new_address(), time.time()
    with off(mx2):
        mx1.agent.login(address)
        wait_for("the echo", lambda: mx1.agent.status()["outbox"] == 0)
        wait_for("mx2 to miss it", lambda: NO_AGENT in fleet.returned_since(moment, mx2, "mailfw.receive"))
    assert not mx2.trusts(address)
    said = fleet.call(mx2, "mailfw.catch_up")
    assert mx2.trusts(address), (said, mx2.agent.status())
    here, there = (host.host.trusted()[address] for host in (mx1, mx2))
    assert here.keys() == there.keys()
    assert all(abs(here[port] - there[port]) <= 10 for port in here)


def test_what_a_host_has_is_no_news(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()
    mx1.agent.login(address)
    wait_until_trusted(address, mx2)
    fleet.call(mx2, "mailfw.catch_up")
    assert fleet.call(mx2, "mailfw.catch_up") == NO_NEWS


def test_catching_up_does_not_undo_what_an_operator_did(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()
    mx1.agent.login(address)
    wait_until_trusted(address, mx2)
    fleet.call_all([mx1, mx2], "mailfw.untrust", address)
    fleet.call_all([mx1, mx2], "mailfw.catch_up")
    assert not mx1.trusts(address)
    assert not mx2.trusts(address)
    mx1.agent.login(address)
    wait_until_trusted(address, mx1, mx2)


def test_only_who_has_the_key_gets_the_logins(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()
    mx1.agent.login(address)
    wait_until_trusted(address, mx2)
    answer = ask_for_logins(fleet, mx1, fleet.sign())
    assert any(address in message for message in answer)
    for request in (
        fleet.sign(key="0" * 64),
        fleet.sign(now=time.time() - 600),
        fleet.sign().partition(" ")[2],
        "",
        None,
        {"keys": []},
    ):
        assert ask_for_logins(fleet, mx1, request) == [], request


def test_nobody_gets_the_logins_with_a_message_that_it_has_overheard(
    fleet: Fleet, mx1: MailHost, mx2: MailHost
) -> None:
    """Every accepted minion can listen to what the master publishes: here mx2 stands for one without the key."""
    moment = time.time()
    mx1.agent.login(fleet.new_address())
    overheard, *_ = wait_for("the announcement", lambda: fleet.announcements_since(moment))
    assert ask_for_logins(fleet, mx2, overheard) == []
    assert ask_for_logins(fleet, mx1, overheard) != []


def test_a_login_of_the_future_spoils_no_answer_and_is_of_now_for_good(fleet: Fleet, mx1: MailHost) -> None:
    """The clocks of the master and of a host were a day ahead for a while."""
    address = fleet.new_address()
    fleet.note_login(address, time.time() + 86400)

    def told() -> float:
        answers = [messages.verify(text, [fleet.key]) for text in ask_for_logins(fleet, mx1, fleet.sign())]
        (at,) = [one.logins[parse.address(address)] for one in answers if parse.address(address) in one.logins]
        return at

    began, at = time.time(), told()
    assert began <= at
    assert told() == at, "its trust would never end"


def test_a_host_with_another_key_gets_and_gives_nothing(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    theirs, ours = fleet.new_address(), fleet.new_address()
    with fleet.pillar(mx2, fleet={"keys": ["another" * 9]}):
        assert not fleet.apply(mx2).failed
        mx2.agent.login(theirs)
        mx1.agent.login(ours)
        wait_for("the echo", lambda: mx1.agent.status()["outbox"] == 0)
        assert fleet.call(mx2, "mailfw.catch_up") == NO_NEWS
        assert not mx2.trusts(ours)
        assert not mx1.trusts(theirs)
        assert mx2.agent.status()["outbox"] == 1
        wait_for("mx2 to refuse a message", lambda: mx2.agent.status()["refused"] > 0)
    # With the fleet's key again, what it could not tell is told.
    assert not fleet.apply(mx2, "caught_up").failed
    wait_until_trusted(theirs, mx1)


def test_an_old_key_goes_on_while_hosts_change_to_a_new_one(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()
    with fleet.pillar(mx2, fleet={"keys": ["another" * 9, fleet.key]}):
        assert not fleet.apply(mx2).failed
        mx1.agent.login(address)
        wait_until_trusted(address, mx2)


def test_a_login_during_an_outage_of_the_master_is_announced_afterwards(
    fleet: Fleet, mx1: MailHost, mx2: MailHost
) -> None:
    address = fleet.new_address()
    fleet.master.terminate()
    try:
        mx1.agent.login(address)
        assert mx1.trusts(address)
        assert mx1.agent.status()["outbox"] == 1
    finally:
        fleet.master.start()
    wait_for("the echo", lambda: mx1.agent.status()["outbox"] == 0, limit=60)
    # A job that was published before a minion had come back is lost: what catching up is for.
    said = fleet.salt_call(mx2, "mailfw.catch_up")
    assert mx2.trusts(address), (said, mx2.agent.status())
    fleet.wait_for_minions()


def test_a_restarted_agent_knows_who_is_trusted(fleet: Fleet, mx1: MailHost) -> None:
    address, moment = fleet.new_address(), time.time()
    mx1.agent.login(address)
    wait_for("the echo", lambda: mx1.agent.status()["outbox"] == 0)
    mx1.agent.stop()
    mx1.agent.start()
    mx1.agent.login(address)
    assert mx1.agent.status()["outbox"] == 0
    fleet.ran_since(moment)
    assert len(fleet.told_since(moment, address)) == 1


@pytest.mark.parametrize("kept", ["trust", "block"])
def test_what_an_operator_did_survives_a_restart_of_the_agent(fleet: Fleet, mx1: MailHost, kept: str) -> None:
    address = fleet.new_address()
    fleet.call(mx1, f"mailfw.{kept}", address, period="30d")
    mx1.agent.stop()
    mx1.agent.start()
    mx1.agent.login(address)
    if kept == "trust":
        assert min(mx1.host.trusted()[address].values()) > 29 * 86400
    else:
        assert fleet.call(mx1, "mailfw.list", "blocked", network=address)["of"] == 1
