"""Real logins: what they open, and where."""

from __future__ import annotations

import pytest

from support import lab
from support.lab import ADDRESSES

from .conftest import ENVIRONMENTS, HOSTS

PROTECTED = {"reaction": {"untrusted": "reject"}}


@pytest.fixture(scope="module", autouse=True)
def protected(fleet):
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, protection={"type": "protected"}, **PROTECTED)
    lab.all_states(HOSTS, "state.apply", "mailfw")


@pytest.fixture(autouse=True)
def nobody_is_trusted():
    """Nor comes back when a host catches up."""
    lab.forget(*HOSTS)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("protocol", ["imap", "pop3", "sieve"])
def test_login_opens_submission_before_the_client_reads_ok(host, protocol, version):
    address = ADDRESSES[host][version == 6]
    assert lab.client("home", "probe", targets=[[address, 587]]) == ["refused"]
    assert lab.login_then_connect("home", host, address, protocol) == "open"


@pytest.mark.parametrize("host", HOSTS)
def test_failed_login_opens_nothing(host):
    address = ADDRESSES[host][0]
    lab.client("cafe", "guess", address=address, tries=1)
    assert lab.client("cafe", "probe", targets=[[address, 587]]) == ["refused"]


@pytest.mark.parametrize(("host", "other"), [("mx1", "mx2"), ("mx2", "mx1")])
@pytest.mark.parametrize("version", [4, 6])
def test_login_opens_submission_on_the_other_host(host, other, version):
    watch = [[ADDRESSES[other][version == 6], 587]]
    (waited,) = lab.client("home", "login_opens", address=ADDRESSES[host][version == 6], watch=watch)["seconds"]
    assert waited is not None


@pytest.mark.parametrize("port", [587, 465])
@pytest.mark.parametrize("host", HOSTS)
def test_message_arrives(host, port):
    address, subject = ADDRESSES[host][0], f"test {host} {port}"
    lab.client("home", "login", address=address)
    assert lab.client("home", "send", address=address, subject=subject, port=port)["refused"] == {}
    assert lab.client("home", "arrived", address=address, subject=subject)


@pytest.mark.parametrize("host", HOSTS)
def test_agent_trusts_without_salt(host):
    lab.run(host, "systemctl", "stop", "salt-minion")
    try:
        assert lab.login_then_connect("cafe", host, ADDRESSES[host][0]) == "open"
    finally:
        lab.run(host, "systemctl", "start", "salt-minion")
        lab.wait_for_minions(host)


@pytest.mark.parametrize("host", HOSTS)
def test_trusted_set_is_as_in_the_specification(host):
    lab.client("home", "login", address=ADDRESSES[host][0])
    listed = lab.run(host, "nft", "list", "set", "inet", "mailfw", "trusted_ipv4")
    assert "type ipv4_addr . inet_service" in listed
    assert "flags dynamic,timeout" in listed
    assert "timeout 5h" in listed
    for port in (587, 465, 143, 993, 995, 4190):
        assert f"198.51.100.10 . {port} timeout 1d expires 23h5" in listed


def test_check_says_who_may_what():
    address = ADDRESSES["mx1"][0]
    said = lab.salt("mx1", "mailfw.check", "203.0.113.10")["mx1"]["services"]
    assert said["imap"].startswith("limited: ")
    assert said["submission"].startswith("refused: not trusted")
    lab.client("cafe", "login", address=address)
    said = lab.salt("mx1", "mailfw.check", "203.0.113.10")["mx1"]["services"]
    assert said["submission"].startswith("accepted: trusted until ")
    assert "(23h5" in said["submission"]
    assert said["submission"].endswith("by a login, here or on another host of the fleet")


@pytest.mark.parametrize("host", HOSTS)
def test_block_ends_a_live_session(host):
    session = lab.Session("cafe", ADDRESSES[host][0])
    lab.salt(host, "mailfw.block", "203.0.113.10")
    try:
        assert not session.answers()
    finally:
        lab.salt(host, "mailfw.unblock", "203.0.113.10")
    assert lab.quickest_login("cafe", ADDRESSES[host][0], 3) < 3
