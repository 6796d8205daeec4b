"""Dovecot's reports to the agent: HTTP on loopback, believed with the secret only."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from mailfwlib.reports import HEADER, LONGEST, MOST_CONNECTIONS
from support.agent import REPORT_SECRET, Agent
from support.firewall import Firewall
from support.net import Client, Host, until

PORT = 4145
PILLAR: dict[str, Any] = {"protection": {"type": "protected"}, "reaction": {"untrusted": "reject"}}
ADDRESS = {"ipv4": "198.51.100.10", "ipv6": "2001:db8:a::10"}
#: As Dovecot 2.4 sends it for a login to Postfix.
REPORT = {
    "device_id": "",
    "login": "alice@example.org",
    "protocol": "smtp",
    "pwhash": "0459",
    "remote": "198.51.100.10",
    "session_id": "",
    "success": True,
    "policy_reject": False,
    "tls": True,
    "fail_type": "",
}


@pytest.fixture
def agent(agent: Agent, host: Host) -> Agent:
    until(lambda: answers(host), "reports are taken")
    return agent


def answers(host: Host) -> bool:
    try:
        host.call(socket.create_connection, ("127.0.0.1", PORT), 1).close()
    except OSError:
        return False
    return True


def post(host: Host, body: bytes, secret: str | None = REPORT_SECRET, **headers: str) -> int:
    """Post a body as Dovecot does; return the status."""

    def ask() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
        try:
            given = {HEADER: secret} if secret is not None else {}
            connection.request("POST", "/?command=report", body, {**given, **headers})
            return connection.getresponse().status
        finally:
            connection.close()

    status: int = host.call(ask)
    return status


def report(host: Host, secret: str | None = REPORT_SECRET, **changed: Any) -> int:
    return post(host, json.dumps({**REPORT, **changed}).encode(), secret)


def trusted(firewall: Firewall) -> set[str]:
    return {*firewall.elements("trusted_ipv4"), *firewall.elements("trusted_ipv6")}


def test_reported_login_is_trusted(agent: Agent, host: Host, alice: Client, family: str) -> None:
    source = ADDRESS[family]
    assert alice.connect(587, source) == "refused"
    assert report(host, remote=source) == 200
    assert alice.connect(587, source) == "open"
    assert agent.status()["logins"] == 1


@pytest.mark.parametrize("change", [{"success": False}, {"policy_reject": True}, {"success": "true"}, {"success": 1}])
def test_what_is_no_login_trusts_nobody(agent: Agent, host: Host, firewall: Firewall, change: dict[str, Any]) -> None:
    assert report(host, **change) == 200
    assert not trusted(firewall)
    assert agent.status()["logins"] == 0


@pytest.mark.parametrize("secret", [None, "", "0" * 64, REPORT_SECRET[:-1], REPORT_SECRET + "0"])
def test_only_dovecot_can_report(agent: Agent, host: Host, firewall: Firewall, secret: str | None) -> None:
    """Any process of the host can connect to loopback."""
    assert report(host, secret) == 403
    assert not trusted(firewall)


def test_an_agent_without_a_secret_believes_nobody(agent: Agent, host: Host, firewall: Firewall) -> None:
    agent.configure(PILLAR, report_secret="")
    until(lambda: agent.log().count("settings read") == 2, "the settings are read")
    assert report(host, "") == 403
    assert not trusted(firewall)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"success": true}',
        b'{"success": true, "remote": 7, "login": "x"}',
        b'{"success": true, "remote": "192.0.2.1", "login": null}',
        b"[" * 8000,
        b"\xff\xfe",
    ],
)
def test_a_report_that_is_none_is_refused(agent: Agent, host: Host, firewall: Firewall, body: bytes) -> None:
    assert post(host, body) == 400
    assert not trusted(firewall)
    assert report(host) == 200


@pytest.mark.parametrize(
    "remote", ["", "127.0.0.1", "::1", "not an address", "192.0.2.1\0x", "fe80::1%eth0", "9" * 9999]
)
def test_strange_addresses_are_not_trusted(agent: Agent, host: Host, firewall: Firewall, remote: str) -> None:
    assert report(host, remote=remote) == 200
    assert not trusted(firewall)
    assert report(host) == 200
    assert len(trusted(firewall)) == 7


@pytest.mark.parametrize("length", ["-1", "x", str(LONGEST + 1), "9" * 30])
def test_lengths_are_bounded(agent: Agent, host: Host, length: str) -> None:
    assert post(host, b"", **{"Content-Length": length}) == 413
    assert report(host) == 200


def test_silent_connections_are_bounded_and_stop_no_login(agent: Agent, host: Host, firewall: Firewall) -> None:
    """Whoever holds all places keeps reports out for some seconds; logins come by another way."""
    held = [host.call(socket.create_connection, ("127.0.0.1", PORT), 5) for _ in range(3 * MOST_CONNECTIONS)]
    try:
        assert agent.login("203.0.113.1")
        threads = host.call(lambda: len(list(Path(f"/proc/{agent.pid}/task").iterdir())))
        assert threads <= MOST_CONNECTIONS + 8
        until(lambda: reported(host), "a place is free again", 12)
    finally:
        for one in held:
            one.close()


def reported(host: Host) -> bool:
    try:
        return report(host) == 200
    except OSError:
        return False


def test_one_connection_carries_many_reports(agent: Agent, host: Host, firewall: Firewall) -> None:
    def ask() -> list[int]:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
        found = []
        for last in range(1, 21):
            body = json.dumps({**REPORT, "remote": f"203.0.113.{last}"})
            connection.request("POST", "/?command=report", body, {HEADER: REPORT_SECRET})
            answer = connection.getresponse()
            answer.read()
            found.append(answer.status)
        connection.close()
        return found

    assert host.call(ask) == [200] * 20
    assert len(trusted(firewall)) == 20 * 7


def test_reports_follow_the_settings(agent: Agent, host: Host) -> None:
    agent.configure({**PILLAR, "reports": False})
    until(lambda: not answers(host), "no port is listened to")
    agent.configure(PILLAR)
    until(lambda: answers(host), "reports are taken again")


def test_a_port_that_is_taken_is_said_and_tried_again(firewall: Firewall, host: Host, tmp_path: Path) -> None:
    firewall.load(**PILLAR)
    other = host.call(socket.create_server, ("127.0.0.1", PORT))
    agent = Agent(host, tmp_path, PILLAR)
    try:
        until(lambda: "port 4145 of loopback" in agent.log(), "it is said")
        assert agent.login("203.0.113.1")
        other.close()
        until(lambda: reported(host), "reports are taken")
    finally:
        other.close()
        agent.close()
