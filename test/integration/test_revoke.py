"""What one user has earned is ended, on one host and on all of them; and one that logs in from too many addresses."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Iterator

import pytest

from integration.fleet import NETWORK, Fleet, MailHost, wait_until_trusted
from integration.hosts import network_of, wait_for
from mailfwlib import files, people

#: A busy machine must not make a test fail.
PATIENTLY = ["--timeout", "60"]


#: In doveadm's place, since no Dovecot runs here: it writes down what it is asked, and says that nobody is there.
DOVEADM = """#!/bin/sh
printf '%s|' "$@" >>/run/asked-of-doveadm
exit 68
"""


@pytest.fixture(autouse=True)
def _hosts(fleet: Fleet) -> Iterator[None]:
    """The master knows mx1 and mx2 only, and Dovecot has no session."""
    fleet.forget_hosts("id NOT IN ('mx1', 'mx2')")
    tools = [host.host.path("/usr/sbin/doveadm") for host in fleet.hosts.values()]
    for tool in tools:
        tool.write_text(DOVEADM)
        tool.chmod(0o755)
    yield
    for tool in tools:
        tool.unlink()


@pytest.fixture
def user() -> str:
    """A user that no other test knows."""
    return f"user{secrets.token_hex(6)}@example.org"


def outcome(*revoked: str, shared: list[str] | None = None, ended: int = 0) -> dict[str, object]:
    return {"revoked": list(revoked), "shared": shared or [], "given": [], "sessions_ended": ended}


def wait_until_known(address: str, user: str, host: MailHost) -> None:
    """Wait until a host knows that a user has logged in from an address: an echo elsewhere is no proof of that."""
    wait_for(f"{host.name} to know of {user}", lambda: address in json.loads(host.agent.ask("places", user))["trusted"])


def test_a_user_is_revoked_on_one_host(fleet: Fleet, mx1: MailHost, mx2: MailHost, user: str) -> None:
    here, there, office = (fleet.new_address() for _ in range(3))
    mx1.agent.login(here, user)
    mx2.agent.login(there, user)
    mx1.agent.login(office, user)
    mx2.agent.login(office, "another" + user)
    wait_until_trusted(here, mx2)
    wait_until_trusted(there, mx1)
    wait_until_known(office, "another" + user, mx1)
    assert fleet.call(mx1, "mailfw.revoke", user.upper()) == outcome(here, there, shared=[office])
    assert not {here, there} & mx1.host.trusted().keys()
    assert mx1.trusts(office)
    assert mx2.trusts(here, there, office)
    fleet.call(mx1, "mailfw.catch_up")
    assert not {here, there} & mx1.host.trusted().keys(), "the master still tells of them"


def test_what_an_operator_gave_stays(fleet: Fleet, mx1: MailHost, user: str) -> None:
    address = fleet.new_address()
    fleet.call(mx1, "mailfw.trust", address, period="30d", services="submission", reason="ticket 17")
    mx1.agent.login(address, user)
    assert fleet.call(mx1, "mailfw.revoke", user) == {**outcome(), "given": [address]}
    ((port, left),) = mx1.host.trusted()[address].items()
    assert (port, left > 29 * 86400) == (587, True)
    assert fleet.call(mx1, "mailfw.explain", address)["trusted"]["submission"].endswith(": ticket 17")


def test_a_user_is_revoked_on_all_hosts(fleet: Fleet, mx1: MailHost, mx2: MailHost, user: str) -> None:
    address, office = fleet.new_address(), fleet.new_address()
    mx1.agent.login(address, user)
    mx1.agent.login(office, user)
    mx1.agent.login(office, "another" + user)
    wait_until_trusted(address, mx2)
    wait_until_known(office, "another" + user, mx2)
    wait_for("the echo", lambda: mx1.agent.status()["outbox"] == 0)
    status, said = fleet.salt_run(*PATIENTLY, "mailfw.revoke", user)
    expected = outcome(address, shared=[office])
    assert said == {"hosts": {"mx1": expected, "mx2": expected}, "failed": {}, "no answer": [], "retcode": 0}
    assert status == 0
    fleet.call_all([mx1, mx2], "mailfw.catch_up")
    for host in (mx1, mx2):
        assert not host.trusts(address)
        assert host.trusts(office)
    mx2.agent.login(address, user)
    wait_until_trusted(address, mx1, mx2)


def test_a_host_that_was_down_does_not_learn_of_revoked_logins(
    fleet: Fleet, mx1: MailHost, mx2: MailHost, user: str
) -> None:
    address, office = fleet.new_address(), fleet.new_address()
    mx2.agent.stop()
    mx2.agent.close()
    try:
        mx1.agent.login(address, user)
        mx1.agent.login(office, user)
        mx1.agent.login(office, "another" + user)
        wait_for("the echo", lambda: mx1.agent.status()["outbox"] == 0)
        status, said = fleet.salt_run(*PATIENTLY, "mailfw.revoke", user)
        assert (status, said["hosts"].keys(), said["no answer"]) == (1, {"mx1"}, [])
        assert "mailfw-agent" in said["failed"]["mx2"]
    finally:
        mx2.agent.start()
    fleet.call(mx2, "mailfw.catch_up")
    assert mx2.trusts(office)
    assert not mx2.trusts(address)


def test_an_open_submission_is_ended(fleet: Fleet, mx1: MailHost, user: str) -> None:
    source = f"{NETWORK}.1"
    mx1.agent.login(source, user)
    own = mx1.host.run("ip", "-json", "-4", "address", "show", "eth0").stdout
    mail_host = json.loads(own)[0]["addr_info"][0]["local"]
    with network_of(mx1.host):
        listeners = [socket.create_server((mail_host, port)) for port in (587, 993)]
    with (
        listeners[0],
        listeners[1],
        socket.create_connection((mail_host, 587), 5) as submission,
        listeners[0].accept()[0],
        socket.create_connection((mail_host, 993), 5) as reading,
        listeners[1].accept()[0] as server,
    ):
        assert fleet.call(mx1, "mailfw.revoke", user) == outcome(source, ended=1)
        with pytest.raises(ConnectionResetError):
            submission.recv(1)
        server.sendall(b"x")
        assert reading.recv(1) == b"x", "it is for Dovecot to say whose this is"


def test_any_name_arrives_as_it_is(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    user = "-f x' `touch /run/mark` $(touch /run/mark); a=b {c: d}"
    asked = [host.host.path("/run/asked-of-doveadm") for host in (mx1, mx2)]
    for file in asked:
        file.unlink(missing_ok=True)
    address = fleet.new_address()
    mx1.agent.login(address, user)
    wait_until_trusted(address, mx2)
    status, said = fleet.salt_run(*PATIENTLY, "mailfw.revoke", f"user={user}")
    assert (status, said["hosts"]) == (0, {"mx1": outcome(address), "mx2": outcome(address)})
    # An agent asks who is logged in, of itself, into the same file.
    calls = [file.read_text().replace("-f|json|who|-1|", "") for file in asked]
    assert calls == [f"-f|tab|who|-1|--|{user}|"] * 2
    assert not mx1.host.path("/run/mark").exists()


def test_with_users_off_the_answer_says_what_it_cannot_do(fleet: Fleet, mx1: MailHost, user: str) -> None:
    path = mx1.host.path("/etc/mailfw/settings.json")
    before = path.read_text()
    settings = json.loads(before)
    settings["trusted"]["users"] = "off"
    files.replace(path, json.dumps(settings))
    try:
        mx1.agent.login(fleet.new_address(), user)
        said = fleet.call(mx1, "mailfw.revoke", user)
    finally:
        files.replace(path, before)
    assert said.pop("problems") == [
        "mailfw:trusted:users is off: who has earned what is not known, only sessions were ended"
    ]
    assert said == outcome()


@pytest.mark.parametrize("user", ["*", "", "a\nb", ["alice"], True, "x" * 257], ids=repr)
def test_strange_users_are_refused(fleet: Fleet, mx1: MailHost, user: object) -> None:
    said = fleet.call(mx1, "mailfw.revoke", user)
    assert isinstance(said, str)
    assert f"user {user!r:.80}: expected a user's name as Dovecot logs it" in said
    assert "Traceback" not in said


def test_the_runner_refuses_strange_users_before_anybody_is_told(fleet: Fleet) -> None:
    moment = time.time()
    status, said = fleet.salt_run("mailfw.revoke", "*")
    assert status == 1
    assert "CommandExecutionError: user '*': expected a user's name as Dovecot logs it" in said
    assert "mailfw.revoke" not in {job["fun"] for job in fleet.ran_since(moment)}


def test_minions_cannot_revoke_on_the_fleet(fleet: Fleet, mx1: MailHost, mx2: MailHost, user: str) -> None:
    address = fleet.new_address()
    mx1.agent.login(address, user)
    wait_until_trusted(address, mx2)
    assert not fleet.call(mx1, "publish.runner", "mailfw.revoke", [user])
    assert mx1.trusts(address)
    assert mx2.trusts(address)


def test_the_fifty_first_address_of_a_day_is_not_trusted_and_said(
    fleet: Fleet, mx1: MailHost, mx2: MailHost, user: str
) -> None:
    moment = time.time()
    addresses = [fleet.new_address() for _ in range(51)]
    said = [mx1.agent.login(address, user) for address in addresses]
    assert all(one.endswith("is trusted") for one in said[:50])
    assert "is not trusted: mailfw:trusted:per_user" in said[50]
    wait_for("mx2 to trust the others", lambda: mx2.trusts(*addresses[:50]))
    assert not mx1.trusts(addresses[50])
    assert "is not trusted" in mx2.agent.login(fleet.new_address(), user), "they count on the other host, too"
    tag = {("master", "mailfw/roaming")}

    def events() -> dict[str, dict[str, object]]:
        found = [event.data["data"] for event in fleet.events.get_events(tag, after_time=moment)]
        return {event["host"]: event for event in found} if len(found) == 2 else {}

    expected = {"user": people.hashed(user, fleet.key), "addresses": 50}
    assert wait_for("the events", events) == {name: {"host": name, **expected} for name in ("mx1", "mx2")}
