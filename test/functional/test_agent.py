"""The agent, asked over its socket, with its effects seen in the kernel."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mailfwlib import client, elements, journal, messages, netlink, parse
from mailfwlib.agent import PATIENCE
from mailfwlib.client import AgentError
from support.agent import HOST_ID, KEY, LOGIN_USER, Agent, signed, snapshots_that_hang
from support.firewall import Firewall
from support.net import Client, Host, until

LOGIN_PORTS = (587, 465, 143, 993, 110, 995, 4190)
DAY = 86400
ADDRESS = {"ipv4": "198.51.100.10", "ipv6": "2001:db8:a::10"}
#: How the sources appear in the sets: an IPv6 source is its /64.
ELEMENT = {"ipv4": "198.51.100.10", "ipv6": "2001:db8:a::"}
PILLAR: dict[str, Any] = {
    "protection": {"type": "protected"},
    "reaction": {"untrusted": "reject"},
    "fleet": {"keys": [KEY]},
    "trusted": {"never": ["198.51.100.77", "2001:db8:7::/48"]},
}


def trusted(firewall: Firewall, family: str) -> dict[str, float]:
    return firewall.elements(f"trusted_{family}")


# Logins


def test_login_is_trusted_when_the_reply_arrives(agent: Agent, loaded: Firewall, alice: Client, family: str) -> None:
    source = ADDRESS[family]
    assert alice.connect(587, source) == "refused"
    assert agent.login(source)
    assert alice.connect(587, source) == "open"
    found = trusted(loaded, family)
    assert set(found) == {f"{ELEMENT[family]} . {port}" for port in LOGIN_PORTS}
    assert all(DAY - 10 < left <= DAY for left in found.values())


def test_login_over_ipv6_trusts_the_prefix(agent: Agent, alice: Client) -> None:
    source, neighbour, stranger = alice.ipv6
    agent.login(source)
    assert [alice.connect(587, one) for one in (source, neighbour, stranger)] == ["open", "open", "refused"]


def test_login_from_a_mapped_address_trusts_the_ipv4_address(agent: Agent, loaded: Firewall, alice: Client) -> None:
    agent.login("::ffff:198.51.100.10")
    assert alice.connect(587, "198.51.100.10") == "open"
    assert not trusted(loaded, "ipv6")


def test_login_lists_no_set(agent: Agent, loaded: Firewall, host: Host) -> None:
    """However many are trusted: the fastest of some logins takes a small part of the time that a list would."""
    many = ", ".join(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255} . 587" for n in range(100_000))
    loaded.run(f"add element inet mailfw trusted_ipv4 {{ {many} }}")

    def seconds(do: Callable[[], Any]) -> float:
        began = time.monotonic()
        do()
        return time.monotonic() - began

    listing = seconds(lambda: host.call(lambda: netlink.Kernel().count("trusted_ipv4")))
    assert min(seconds(lambda one=n: agent.login(f"203.0.113.{one}")) for n in range(10)) < listing / 10


def test_login_lifts_bans_and_no_block(agent: Agent, loaded: Firewall, alice: Client, family: str) -> None:
    loaded.ban(ADDRESS[family])
    agent.login(ADDRESS[family])
    assert not loaded.elements(f"banned_dovecot_{family}")
    loaded.block(ADDRESS[family])
    agent.login(ADDRESS[family])
    assert loaded.elements(f"blocked_{family}")


def test_login_lifts_bans_even_when_there_is_no_room_for_its_trust(
    firewall: Firewall, host: Host, alice: Client, tmp_path: Path, family: str
) -> None:
    pillar = {"sizes": {"trusted": len(LOGIN_PORTS)}, "reaction": {"banned": "reject"}}
    firewall.load(**pillar)
    agent = Agent(host, tmp_path, pillar)
    first, *_, second = alice.addresses(family)
    try:
        agent.login(first)
        firewall.ban(second)
        assert alice.connect(993, second) == "refused"
        with pytest.raises(AgentError, match="A set is full: see mailfw:sizes"):
            agent.login(second)
        assert agent.login(first)
    finally:
        agent.close()
    assert len(trusted(firewall, family)) == len(LOGIN_PORTS)
    assert alice.connect(993, second) == "open"
    assert "A set is full" in agent.log()


def test_login_is_trusted_and_lifts_bans_although_sets_of_bans_are_full(
    firewall: Firewall, host: Host, alice: Client, tmp_path: Path, family: str
) -> None:
    """Whoever has many addresses fills them. Bans of the source are lifted all the same."""
    pillar = {**PILLAR, "sizes": {"banned": 2}}
    others = {"ipv4": ["192.0.2.1", "192.0.2.2"], "ipv6": ["2001:db8:1::1", "2001:db8:2::1"]}[family]
    firewall.load(**pillar)
    source, *_, banned = alice.addresses(family)
    with closing(Agent(host, tmp_path, pillar)) as agent:
        firewall.ban(banned, ("postfix",))
        for other in others:
            firewall.ban(other, ("dovecot",))
        firewall.ban(others[0], ("postfix",))
        for login in (source, banned):
            assert agent.login(login) == f"{login} is trusted"
            assert alice.connect(587, login) == "open"
        assert agent.ask("receive", signed({"203.0.113.9": time.time(), "2001:db8:9::1": time.time()})) == "2"
    names = [elements.text(elements.source_network(parse.address(one), firewall.settings)) for one in others]
    assert {name.partition("/")[0] for name in names} == set(firewall.elements(f"banned_dovecot_{family}"))
    assert len(firewall.elements(f"banned_postfix_{family}")) == 1


def test_login_again_starts_the_period_anew(agent: Agent, loaded: Firewall, family: str) -> None:
    agent.login(ADDRESS[family])
    element = f"{ELEMENT[family]} . 587"
    loaded.run(f"delete element inet mailfw trusted_{family} {{ {element} }}")
    loaded.run(f"add element inet mailfw trusted_{family} {{ {element} timeout {DAY}s expires 60s }}")
    agent.login(ADDRESS[family])
    assert trusted(loaded, family)[element] > DAY - 10


NEVER = ["127.0.0.1", "::1", "169.254.1.1", "fe80::1", "224.0.0.1", "ff02::1", "0.0.0.0", "::"]
NEVER += ["127.255.255.254", "::ffff:169.254.1.1", "::ffff:224.0.0.1", "::ffff:0.0.0.0"]
NEVER += ["198.51.100.77", "2001:db8:7::1", "::ffff:198.51.100.77", "::ffff:127.0.0.1", Host.ipv4, Host.ipv6]


@pytest.mark.parametrize("source", NEVER)
def test_who_is_never_trusted(agent: Agent, loaded: Firewall, source: str) -> None:
    assert "not trusted" in agent.login(source)
    assert not trusted(loaded, "ipv4")
    assert not trusted(loaded, "ipv6")
    assert agent.status()["outbox"] == 0


@pytest.fixture
def more_addresses(host: Host) -> Iterator[list[str]]:
    """Give the host more addresses: for IPv4 a primary and a secondary one of a network."""
    added = ["192.0.2.129/25", "192.0.2.130/25", "2001:db8:26::1/64", "2001:db8:26::2/64"]
    for one in added:
        host.ip(f"address add {one} dev eth0")
    try:
        yield [one.partition("/")[0] for one in added]
    finally:
        for one in reversed(added):
            host.ip(f"address delete {one} dev eth0")


def test_none_of_the_hosts_own_addresses_is_trusted(agent: Agent, loaded: Firewall, more_addresses: list[str]) -> None:
    own = [Host.ipv4, Host.ipv6, *more_addresses]
    for address in own + [f"::ffff:{one}" for one in own if "." in one]:
        assert "is not trusted: is this host's own" in agent.login(address), address
        assert agent.ask("receive", signed({address: time.time()})) == "0"
    assert not trusted(loaded, "ipv4")
    assert not trusted(loaded, "ipv6")
    assert "is trusted" in agent.login("192.0.2.131"), "a neighbour's"


@pytest.mark.parametrize("source", ["203.0.113.1", "2001:db8:9::1"])
def test_a_host_that_may_bind_any_address_still_trusts_logins(
    agent: Agent, loaded: Firewall, host: Host, source: str
) -> None:
    """As hosts with keepalived may."""
    family = "ipv6" if ":" in source else "ipv4"
    setting = f"net.{family}.ip_nonlocal_bind"
    host.run("sysctl", "-qw", f"{setting}=1")
    try:
        assert agent.login(source) == f"{source} is trusted"
        assert trusted(loaded, family)
    finally:
        host.run("sysctl", "-qw", f"{setting}=0")


def test_private_mode_may_be_opened_by_logins(firewall: Firewall, host: Host, tmp_path: Path, family: str) -> None:
    pillar = {"protection": {"type": "private"}, "trusted": {"private": True}}
    firewall.load(**pillar)
    with closing(Agent(host, tmp_path, pillar)) as agent:
        agent.login(ADDRESS[family])
    assert set(trusted(firewall, family)) == {f"{ELEMENT[family]} . {port}" for port in LOGIN_PORTS}


@pytest.mark.parametrize("restarted", [False, True])
def test_private_mode_renews_what_an_operator_has_opened(
    firewall: Firewall, host: Host, tmp_path: Path, family: str, restarted: bool
) -> None:
    """By logins here and by those that other hosts tell of, and no more than that."""
    firewall.load(protection={"type": "private"})
    with closing(Agent(host, tmp_path, {**PILLAR, "protection": {"type": "private"}})) as agent:
        given(agent, firewall, family, 60, [993])
        if restarted:
            agent.restart()
        assert agent.login(ADDRESS[family]) == f"{ADDRESS[family]} is trusted"
        (left,) = trusted(firewall, family).values()
        assert left > DAY - 10
        firewall.untrust(ADDRESS[family])
        agent.ask("forget", ELEMENT[family])
        given(agent, firewall, family, 60, [587])
        assert agent.ask("receive", signed({ADDRESS[family]: time.time()})) == "1"
        ((element, left),) = trusted(firewall, family).items()
        assert (element, left > DAY - 10) == (f"{ELEMENT[family]} . 587", True)


def test_private_mode_trusts_only_whom_pillar_admits(
    firewall: Firewall, host: Host, alice: Client, tmp_path: Path
) -> None:
    pillar = {
        **PILLAR,
        "protection": {"type": "private", "services": {"imaps": "autoban"}},
        "trusted": {"networks_ipv4": ["198.51.100.0/24"]},
    }
    firewall.load(**pillar)
    agent = Agent(host, tmp_path, pillar)
    try:
        agent.login("198.51.100.10")
        agent.login("203.0.113.10")
        agent.login("2001:db8:a::10")
    finally:
        agent.close()
    expected = {f"198.51.100.10 . {port}" for port in LOGIN_PORTS} | {"203.0.113.10 . 993"}
    assert set(firewall.elements("trusted_ipv4")) == expected
    assert set(firewall.elements("trusted_ipv6")) == {"2001:db8:a:: . 993"}


STRANGE = {
    "nothing": b"\0",
    "no address": b"login",
    "no user": b"login\x00198.51.100.10",
    "too many fields": b"login\x00198.51.100.10\0alice\0bob",
    "empty address": b"login\0\0alice",
    "host name": b"login\0localhost\0alice",
    "number": b"login\x003325256714\0alice",
    "network": b"login\x00198.51.100.0/24\0alice",
    "scope": b"login\0fe80::1%eth0\0alice",
    "two addresses": b"login\x00198.51.100.10, 198.51.100.11\0alice",
    "an nft script": b"login\x00198.51.100.10 . 25 }; flush ruleset #\0alice",
    "a script after a newline": b"login\x00198.51.100.10\nflush ruleset\0alice",
    "not UTF-8": b"login\0\xff\xfe\xc3\0alice",
    "not ASCII": "login\0\u0661\u0669\u0668.51.100.10\0alice".encode(),
    "long address": b"login\0" + b"1" * 70000 + b"\0alice",
    "too long": b"login\x00198.51.100.10\0" + b"a" * client.LONGEST,
    "unknown verb": b"flush\0",
    "random bytes": bytes(range(256)) * 16,
    "no message": b"receive\0",
    "two messages": b"receive\0a\0b",
    "status of something": b"status\0x",
    "remember nonsense": b"remember\0x\0y\0z\0root",
    "remember no number": b"remember\x00198.51.100.10\x00587\0soon\0root",
    "remember no port": b"remember\x00198.51.100.10\0\x001e12\0root",
    "remember no comment": b'remember\x00198.51.100.10\x00587\x001e12\0root: a "quote"',
    "remember nobody's": b"remember\x00198.51.100.10\x00587\x001e12",
    "forget nonsense": b"forget\0x",
    "forget no port": b"forget\x00198.51.100.10\0x",
    "renew nonsense": b"renew\0x\0alice",
    "renew nobody": b"renew\x00198.51.100.10",
}


@pytest.mark.parametrize("name", [name for name in STRANGE if name != "no message"])
def test_strange_requests_get_an_error_and_change_nothing(agent: Agent, loaded: Firewall, name: str) -> None:
    before = loaded.ruleset()
    assert agent.send(STRANGE[name]).startswith(b"error\0")
    assert agent.running()
    assert loaded.ruleset() == before
    assert agent.login(ADDRESS["ipv4"])


def test_agent_survives_all_of_them_in_a_row(agent: Agent) -> None:
    for packet in list(STRANGE.values()) * 3:
        agent.send(packet)
    with agent.connect() as connection:
        connection.close()
    assert agent.login(ADDRESS["ipv4"])
    assert agent.running()


def test_long_user_name_is_fine(agent: Agent, loaded: Firewall) -> None:
    assert agent.login(ADDRESS["ipv4"], "ü" * 10000)
    assert trusted(loaded, "ipv4")


def test_login_without_rules_is_trusted_as_soon_as_there_are_some(agent: Agent, loaded: Firewall) -> None:
    script = loaded.script(**PILLAR)
    loaded.unload()
    agent.login(ADDRESS["ipv4"])
    assert "198.51.100.10 cannot be trusted now: " in agent.log()
    until(agent.events, "the fleet is told")
    loaded.apply(script)
    until(lambda: trusted(loaded, "ipv4"), "trusted")


# Who may ask


def test_dovecots_user_may_report_logins(agent: Agent, loaded: Firewall) -> None:
    assert "is trusted" in agent.ask_as(LOGIN_USER, "login", ADDRESS["ipv4"], "alice")
    assert trusted(loaded, "ipv4")


@pytest.mark.parametrize("user", [LOGIN_USER, "daemon"])
@pytest.mark.parametrize(
    "request_",
    [("receive", "x"), ("status",), ("forget", "192.0.2.1"), ("remember", "192.0.2.1", "587", "2e9", "root")],
)
def test_only_root_may_ask_for_the_rest(agent: Agent, user: str, request_: tuple[str, ...]) -> None:
    assert agent.ask_as(user, *request_).startswith("AgentError: ")
    assert "not allowed" in agent.ask_as(user, *request_)


def test_other_users_may_not_report_logins(agent: Agent, loaded: Firewall) -> None:
    assert "not allowed" in agent.ask_as("daemon", "login", ADDRESS["ipv4"], "alice")
    assert not trusted(loaded, "ipv4")


def test_login_hook_waits_a_quarter_of_a_second(host: Host) -> None:
    """For an agent that takes its connection and says nothing; what Python takes is in the fastest of some runs too."""
    listener = host.call(Agent._listen)

    def wait() -> float:
        began = time.monotonic()
        host.run("/usr/bin/python3", "-IS", "/usr/lib/mailfw/login_hook.py", env={"IP": "192.0.2.1", "USER": "x"})
        return time.monotonic() - began

    try:
        assert 0.25 <= min(wait() for _ in range(5)) < 0.4
    finally:
        listener.close()


def test_login_hook_reports_the_login(agent: Agent, loaded: Firewall, host: Host, family: str) -> None:
    drop = ("setpriv", "--reuid", LOGIN_USER, "--regid", "nogroup", "--clear-groups")
    environment = {"IP": ADDRESS[family], "USER": "alice@example.org"}
    agent.ask("status")  # The hook does not wait for an agent that is starting.
    host.run(*drop, "/usr/bin/python3", "-IS", "/usr/lib/mailfw/login_hook.py", env=environment)
    until(lambda: len(trusted(loaded, family)) == len(LOGIN_PORTS), "trusted, if later than the hook waits")


# Messages of other hosts


def test_signed_message_trusts(agent: Agent, loaded: Firewall, alice: Client, family: str) -> None:
    hour_ago = time.time() - 3600
    assert agent.ask("receive", signed({ADDRESS[family]: hour_ago})) == "1"
    found = trusted(loaded, family)
    assert set(found) == {f"{ELEMENT[family]} . {port}" for port in LOGIN_PORTS}
    assert all(DAY - 3610 < left <= DAY - 3600 for left in found.values())
    assert alice.connect(587, ADDRESS[family]) == "open"
    assert agent.status()["outbox"] == 0


def test_message_with_many_logins(agent: Agent, loaded: Firewall) -> None:
    now = time.time()
    logins = {f"203.0.113.{number}": now - number for number in range(1, 201)}
    assert agent.ask("receive", signed(logins)) == "200"
    assert len(trusted(loaded, "ipv4")) == 200 * len(LOGIN_PORTS)


def test_own_period_counts_not_the_senders(agent: Agent, loaded: Firewall) -> None:
    agent.configure({**PILLAR, "trusted": {"period": "1h"}, "roles": ["postfix"]})
    now = time.time()
    assert agent.ask("receive", signed({"203.0.113.1": now, "203.0.113.2": now - 7200})) == "1"
    found = trusted(loaded, "ipv4")
    assert set(found) == {"203.0.113.1 . 587", "203.0.113.1 . 465"}
    assert all(3590 < left <= 3600 for left in found.values())


def test_every_key_of_the_fleet_is_good(agent: Agent) -> None:
    older = KEY[::-1]
    agent.configure({**PILLAR, "fleet": {"keys": [KEY, older]}})
    assert agent.ask("receive", signed({"203.0.113.1": time.time()}, key=older)) == "1"


NOW = time.time()
BAD: dict[str, Any] = {
    "empty": "",
    "garbage": "garbage",
    "unsigned": lambda: signed({"203.0.113.1": time.time()}).partition(" ")[2],
    "signature of nothing": lambda: "0" * 64 + " " + signed({"203.0.113.1": time.time()}).partition(" ")[2],
    "another key": lambda: signed({"203.0.113.1": time.time()}, key="e" * 32),
    "altered": lambda: signed({"203.0.113.1": time.time()}).replace("203.0.113.1", "203.0.113.2"),
    "stale": lambda: signed({"203.0.113.1": time.time()}, now=time.time() - messages.FRESH - 10),
    "ahead": lambda: signed({"203.0.113.1": time.time()}, now=time.time() + messages.FRESH + 10),
    "login from the future": lambda: signed({"203.0.113.1": time.time() + 3600}),
    "login of long ago": lambda: signed({"203.0.113.1": time.time() - messages.OLDEST_LOGIN - 60}),
    "login at no number": lambda: signed({"203.0.113.1": float("nan")}),
    "login at infinity": lambda: signed({"203.0.113.1": float("inf")}),
    "sent at no time": lambda: signed({"203.0.113.1": time.time()}, now="yesterday"),
    "sent at infinity": lambda: signed({"203.0.113.1": time.time()}, now=float("inf")),
    "a sender that is no text": lambda: signed({"203.0.113.1": time.time()}, sender=["mx2"]),
    "no nonce": lambda: signed({"203.0.113.1": time.time()}, nonce=None),
    "too many": lambda: signed({f"10.0.{n >> 8}.{n & 255}": time.time() for n in range(messages.MOST_LOGINS + 1)}),
}


@pytest.mark.parametrize("name", BAD)
def test_message_that_must_not_be_believed_is_dropped(agent: Agent, loaded: Firewall, name: str) -> None:
    message = BAD[name]() if callable(BAD[name]) else BAD[name]
    assert agent.ask("receive", message) == "0"
    assert not trusted(loaded, "ipv4")
    assert agent.status()["refused"] == 1
    assert "by its own account, was dropped: " in agent.log()


def test_what_is_dropped_is_said_once_a_minute_for_each_sender(agent: Agent) -> None:
    messages = [
        signed({"203.0.113.1": time.time()}, sender=sender, key="0" * 32) for sender in ("mx2", "mx3", "mx2", "mx2")
    ]
    for message in messages:
        assert agent.ask("receive", message) == "0"
    assert agent.status()["refused"] == 4
    said = [line.rpartition("a message of ")[2] for line in agent.log().splitlines() if " was dropped: " in line]
    why = "by its own account, was dropped: not signed under a key of this fleet"
    assert said == [f"'mx2', {why}", f"'mx3', {why}"]


def test_replayed_message_counts_once_and_is_said(agent: Agent, loaded: Firewall) -> None:
    message = signed({"203.0.113.1": time.time()})
    assert agent.ask("receive", message) == "1"
    loaded.untrust("203.0.113.1")
    agent.ask("forget", "203.0.113.1")
    assert agent.ask("receive", message) == "0"
    assert not trusted(loaded, "ipv4")
    assert agent.status()["received"] == 1
    assert agent.log().count("a message of 'mx2.example', by its own account, was dropped: replayed") == 1


def test_message_is_no_news_when_the_own_login_is_later(agent: Agent, loaded: Firewall) -> None:
    agent.login("203.0.113.1")
    assert agent.ask("receive", signed({"203.0.113.1": time.time() - 3600})) == "0"
    assert all(left > DAY - 10 for left in trusted(loaded, "ipv4").values())


def test_later_login_of_two_messages_counts(agent: Agent, loaded: Firewall) -> None:
    now = time.time()
    assert agent.ask("receive", signed({"203.0.113.1": now - 60})) == "1"
    assert agent.ask("receive", signed({"203.0.113.1": now - 3600})) == "0"
    assert all(left > DAY - 70 for left in trusted(loaded, "ipv4").values())
    assert agent.ask("receive", signed({"203.0.113.1": now})) == "1"
    assert all(left > DAY - 10 for left in trusted(loaded, "ipv4").values())


@pytest.mark.parametrize("source", [one for one in NEVER if "ffff:" not in one])
def test_message_cannot_make_the_never_trusted_trusted(agent: Agent, loaded: Firewall, source: str) -> None:
    assert agent.ask("receive", signed({source: time.time()})) == "0"
    assert not trusted(loaded, "ipv4")
    assert not trusted(loaded, "ipv6")


def test_without_keys_no_message_is_believed(agent: Agent, loaded: Firewall) -> None:
    agent.configure({**PILLAR, "fleet": {"keys": []}})
    assert agent.ask("receive", signed({"203.0.113.1": time.time()}, key="")) == "0"
    assert not trusted(loaded, "ipv4")


# Trust that an operator has given


NOTE = "root: ticket 17"


def given(agent: Agent, firewall: Firewall, family: str, seconds: int, ports: list[int]) -> None:
    """Trust as the module does it: in the kernel first, then the agent is told."""
    firewall.trust(ADDRESS[family], seconds, ports, NOTE)
    agent.remember(ELEMENT[family], seconds, *ports, note=NOTE)


def noted(firewall: Firewall, family: str) -> list[str]:
    """Return the trust that an operator has given, as the kernel says."""
    assert set(firewall.notes(f"trusted_{family}").values()) <= {NOTE}
    return list(firewall.notes(f"trusted_{family}"))


def test_operators_longer_trust_is_not_shortened(agent: Agent, loaded: Firewall, family: str) -> None:
    given(agent, loaded, family, 30 * DAY, [587])
    agent.login(ADDRESS[family])
    assert noted(loaded, family) == [f"{ELEMENT[family]} . 587"]
    found = trusted(loaded, family)
    assert found.pop(f"{ELEMENT[family]} . 587") > 30 * DAY - 10
    assert len(found) == len(LOGIN_PORTS) - 1
    assert all(DAY - 10 < left <= DAY for left in found.values())


def test_operators_longer_trust_is_not_shortened_by_a_message(agent: Agent, loaded: Firewall, family: str) -> None:
    given(agent, loaded, family, 30 * DAY, [587, 465])
    assert agent.ask("receive", signed({ADDRESS[family]: time.time()})) == "1"
    found = trusted(loaded, family)
    assert found[f"{ELEMENT[family]} . 587"] > 30 * DAY - 10
    assert found[f"{ELEMENT[family]} . 993"] <= DAY


@pytest.mark.parametrize("restarted", [False, True])
def test_operators_shorter_trust_is_not_taken_for_a_logins(
    agent: Agent, loaded: Firewall, family: str, restarted: bool
) -> None:
    """A repair makes it neither longer nor wider; nobody's revocation ends it."""
    agent.login(ADDRESS[family], "alice")
    loaded.untrust(ADDRESS[family])
    agent.ask("forget", ELEMENT[family])
    given(agent, loaded, family, 3600, [587])
    if restarted:
        agent.restart()
    agent.ask("again", str(time.time() - DAY))
    assert json.loads(agent.ask("revoke", "alice"))["revoked"] == []
    ((element, left),) = trusted(loaded, family).items()
    assert (element, left > 3500, left <= 3600) == (f"{ELEMENT[family]} . 587", True, True)
    assert noted(loaded, family) == [element]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_login_that_outlasts_an_operators_trust_takes_it_over(
    agent: Agent, loaded: Firewall, family: str, restarted: bool
) -> None:
    given(agent, loaded, family, 3600, [587])
    agent.login(ADDRESS[family], "alice")
    if restarted:
        agent.restart()
    assert noted(loaded, family) == []
    assert min(trusted(loaded, family).values()) > DAY - 20
    assert json.loads(agent.ask("revoke", "alice"))["revoked"] == [ELEMENT[family]]
    assert trusted(loaded, family) == {}


@pytest.mark.parametrize("restarted", [False, True])
def test_operators_longer_trust_stays_an_operators(
    agent: Agent, loaded: Firewall, family: str, restarted: bool
) -> None:
    given(agent, loaded, family, 30 * DAY, [587])
    agent.login(ADDRESS[family], "alice")
    if restarted:
        agent.restart()
    assert json.loads(agent.ask("revoke", "alice"))["given"] == [ELEMENT[family]]
    assert list(trusted(loaded, family)) == noted(loaded, family) == [f"{ELEMENT[family]} . 587"]


def test_operators_trust_that_is_over_keeps_nothing(agent: Agent, loaded: Firewall, family: str) -> None:
    given(agent, loaded, family, 1, [587])
    until(lambda: not trusted(loaded, family), "the end of it")
    agent.login(ADDRESS[family], "alice")
    assert json.loads(agent.ask("revoke", "alice"))["revoked"] == [ELEMENT[family]]
    assert trusted(loaded, family) == {}


@pytest.mark.parametrize("restarted", [False, True])
def test_what_logins_earned_before_private_mode_no_login_renews(
    agent: Agent, loaded: Firewall, family: str, restarted: bool
) -> None:
    agent.login(ADDRESS[family], "alice")
    before = min(trusted(loaded, family).values())
    loaded.load(**{**PILLAR, "protection": {"type": "private"}})
    agent.configure({**PILLAR, "protection": {"type": "private"}})
    if restarted:
        agent.restart()
    assert agent.login(ADDRESS[family], "alice").endswith("and the mode is private")
    assert agent.ask("receive", signed({ADDRESS[family]: time.time() + 60})) == "0"
    assert not [left for left in trusted(loaded, family).values() if left > before]


def test_forgotten_trust_is_a_logins_again(agent: Agent, loaded: Firewall, family: str) -> None:
    given(agent, loaded, family, 30 * DAY, [587])
    loaded.untrust(ADDRESS[family])
    agent.ask("forget", ELEMENT[family])
    agent.login(ADDRESS[family])
    assert max(trusted(loaded, family).values()) <= DAY


def test_forgotten_trust_on_some_ports_leaves_what_operators_gave_on_others(
    agent: Agent, loaded: Firewall, family: str
) -> None:
    given(agent, loaded, family, 30 * DAY, [587, 4190])
    loaded.untrust(ADDRESS[family], [4190])
    agent.ask("forget", ELEMENT[family], "4190")
    agent.login(ADDRESS[family])
    found = trusted(loaded, family)
    assert found.pop(f"{ELEMENT[family]} . 587") > 30 * DAY - 10
    assert max(found.values()) <= DAY


def test_message_cannot_bring_back_a_trust_that_an_operator_has_ended(agent: Agent, loaded: Firewall) -> None:
    before = time.time()
    agent.login("203.0.113.1")
    loaded.untrust("203.0.113.1")
    agent.ask("forget", "203.0.113.1")
    assert agent.ask("receive", signed({"203.0.113.1": before})) == "0"
    assert not trusted(loaded, "ipv4")
    assert agent.ask("receive", signed({"203.0.113.1": time.time()})) == "1"


def test_an_end_of_trust_is_remembered_over_a_restart(agent: Agent, loaded: Firewall, family: str) -> None:
    before = time.time()
    agent.login(ADDRESS[family])
    loaded.untrust(ADDRESS[family])
    agent.ask("forget", ELEMENT[family])
    agent.kill()
    agent.start()
    assert agent.ask("receive", signed({ELEMENT[family]: before})) == "0"
    assert not trusted(loaded, family)


# Start and settings


def tells_of(agent: Agent, address: str) -> bool:
    return any(parse.address(address) in message.logins for message in announced(agent))


@pytest.mark.parametrize("ending", ["kill", "stop"])
def test_what_had_no_echo_is_announced_again_by_the_next_agent(
    agent: Agent, host: Host, ending: str, family: str
) -> None:
    """As often as it takes: nobody but the echo takes it out of the outbox."""
    agent.login(ADDRESS[family])
    getattr(agent, ending)()
    agent.forget_events()
    for _ in range(2):
        agent.start()
        assert agent.status()["outbox"] == 1
        until(lambda: tells_of(agent, ELEMENT[family]), "announced again")
        agent.kill()
        agent.forget_events()
    agent.start()
    until(agent.events, "announced again")
    for event in agent.events():
        agent.ask("receive", event["data"]["message"])
    until(lambda: host.call((journal.DIRECTORY / "outbox").read_text) == "", "nothing is kept any more")
    agent.restart()
    assert agent.status()["outbox"] == 0


@pytest.mark.slow
def test_a_login_that_may_not_be_told_keeps_no_other_back(agent: Agent, host: Host) -> None:
    """The host's clock was a day ahead; and a login becomes too old while it waits for its echo."""
    agent.kill()
    now = time.time()
    kept = {"198.51.100.7": now - 1, "198.51.100.8": now + DAY, "198.51.100.9": now - messages.OLDEST_LOGIN + 4}
    host.call((journal.DIRECTORY / "outbox").write_text, "".join(f"{one} {at:.3f}\n" for one, at in kept.items()))
    agent.start()

    def told() -> list[set[str]]:
        return [set(map(str, message.logins)) for message in announced(agent)]

    assert until(told, "announced", 3) == [kept.keys()]
    until(lambda: {"198.51.100.7", "198.51.100.8"} in told(), "announced again, without the third", 8)
    for event in agent.events():
        agent.ask("receive", event["data"]["message"])
    assert agent.status()["outbox"] == 0
    until(lambda: host.call((journal.DIRECTORY / "outbox").read_text) == "", "nothing is kept any more")


RUBBISH = {
    "bytes": b"\xff\x00",
    "cut": b"192.0.2.1",
    "no lines": b"192.0.2.1 nan\n192.0.2.2 inf\nx 1\n\n 3 4 5\n",
    "zeros": b"0" * 100000,
}


@pytest.mark.parametrize("rubbish", RUBBISH.values(), ids=RUBBISH)
def test_a_damaged_outbox_is_no_reason_not_to_start(agent: Agent, host: Host, rubbish: bytes) -> None:
    agent.kill()
    kept = f"\n198.51.100.9 {time.time():.3f}\n".encode()
    host.call((journal.DIRECTORY / "outbox").write_bytes, rubbish + kept)
    agent.start()
    assert agent.status()["outbox"] == 1
    until(lambda: tells_of(agent, "198.51.100.9"), "the line that is one is announced")


def test_new_settings_are_read_without_a_request(agent: Agent) -> None:
    """What waits in the outbox goes out under the keys of now."""
    agent.configure({**PILLAR, "protection": {"type": "private"}})
    until(lambda: "settings read: mode private" in agent.log(), "the settings are read")


def test_agent_learns_from_the_kernel_at_start(agent: Agent, loaded: Firewall, family: str) -> None:
    loaded.trust(ADDRESS[family], 30 * DAY, [587], NOTE)
    loaded.trust(ADDRESS[family], DAY, [993])
    agent.restart()
    assert agent.ask("receive", signed({ADDRESS[family]: time.time() - 60})) == "0"
    agent.login(ADDRESS[family], "")
    found = trusted(loaded, family)
    assert found[f"{ELEMENT[family]} . 587"] > 30 * DAY - 10
    assert agent.status()["outbox"] == 0, "a login that was trusted already is no news for the fleet"


def test_logins_wait_while_the_agent_restarts(agent: Agent, host: Host, loaded: Firewall) -> None:
    agent.login("203.0.113.1")
    agent.stop()
    waiting = host.start(client.ask, "login", "203.0.113.2", "bob")
    time.sleep(0.2)
    assert not waiting.done()
    agent.start()
    assert waiting.result(10)
    assert "203.0.113.2 . 587" in trusted(loaded, "ipv4")


def test_no_login_is_lost_while_the_agent_stops(agent: Agent, host: Host, loaded: Firewall) -> None:
    agent.login("203.0.113.1")
    stopping = host.start(agent.stop)
    count = 0
    while not stopping.done():
        count += 1
        with agent.connect() as connection:
            connection.send(f"login\x0010.1.{count >> 8}.{count & 255}\0user{count}".encode())
        time.sleep(0.01)
    agent.start()
    assert count > 5
    until(lambda: len(trusted(loaded, "ipv4")) == (1 + count) * len(LOGIN_PORTS), "all of them are trusted")


def test_logins_are_answered_while_the_agent_takes_its_last_snapshot(
    agent: Agent, host: Host, loaded: Firewall, tmp_path: Path
) -> None:
    until(lambda: agent.status()["last_snapshot"], "the first snapshot")
    with snapshots_that_hang(host, tmp_path) as hanging:
        stopping = host.start(agent.stop)
        pid = int(until(lambda: hanging.exists() and hanging.read_text(), "the last snapshot"))
        for number in range(3):
            assert agent.login(f"203.0.113.{number}") == f"203.0.113.{number} is trusted"
        os.kill(pid, signal.SIGKILL)  # Until now it has hung.
        assert stopping.result() == 0
    assert len(trusted(loaded, "ipv4")) == 3 * len(LOGIN_PORTS)


def test_agent_starts_without_rules(loaded: Firewall, host: Host, tmp_path: Path) -> None:
    loaded.unload()
    agent = Agent(host, tmp_path, PILLAR)
    try:
        assert agent.status()["mode"] == "protected"
    finally:
        agent.close()


def test_agent_stops_cleanly(agent: Agent) -> None:
    agent.login(ADDRESS["ipv4"])
    assert agent.stop() == 0


def test_replaced_settings_are_followed(agent: Agent, loaded: Firewall) -> None:
    agent.login("203.0.113.1")
    agent.configure({**PILLAR, "trusted": {"never": ["203.0.113.2"], "period": "2h"}, "roles": ["dovecot"]})
    assert "not trusted" in agent.login("203.0.113.2")
    agent.login("203.0.113.3")
    found = {element: left for element, left in trusted(loaded, "ipv4").items() if element.startswith("203.0.113.3")}
    assert set(found) == {f"203.0.113.3 . {port}" for port in LOGIN_PORTS[2:]}
    assert all(7190 < left <= 7200 for left in found.values())
    agent.configure({"protection": {"type": "autoban"}})
    assert agent.status()["mode"] == "autoban"


def test_a_shorter_prefix_has_the_agent_start_again_with_what_it_knows(agent: Agent, loaded: Firewall) -> None:
    """What it keeps of single addresses is then of their /64: operators' trust, users, and ends of trust."""
    narrow = {**PILLAR, "trusted": {"ipv6_prefix": 128}}
    agent.status()  # It has started.
    agent.configure(narrow)
    until(lambda: not agent.running(), "a longer prefix")
    agent.start()
    loaded.load(**narrow)
    at_home, at_work, gone = "2001:db8:a::10", "2001:db8:b::10", "2001:db8:d::10"
    loaded.trust(at_home, 30 * DAY, [587], NOTE)
    agent.remember(at_home, 30 * DAY, 587, note=NOTE)
    agent.login(at_work, "alice@example.org")
    before = time.time()
    agent.login(gone, "bob@example.org")
    loaded.untrust(gone)
    agent.ask("forget", gone)
    loaded.load(**PILLAR)
    # A login while the rules changed may not be among the elements that were carried over.
    loaded.nft("delete", "element", "inet", "mailfw", "trusted_ipv6", "{ 2001:db8:b:: . 587 }")
    agent.configure(PILLAR)
    until(lambda: not agent.running(), "a shorter prefix")
    agent.start()
    assert "2001:db8:b:: . 587" in trusted(loaded, "ipv6")
    agent.login("2001:db8:a::11", "carol@example.org")
    assert trusted(loaded, "ipv6")["2001:db8:a:: . 587"] > 30 * DAY - 10
    assert agent.ask("receive", signed({"2001:db8:d::11": before})) == "0"
    revoked = json.loads(agent.ask("revoke", "alice@example.org"))["revoked"]
    assert revoked == ["2001:db8:b::"]
    assert {element.partition(" . ")[0] for element in trusted(loaded, "ipv6")} == {"2001:db8:a::"}


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "{}", None])
def test_unreadable_settings_leave_those_from_before(
    agent: Agent, host: Host, loaded: Firewall, text: str | None
) -> None:
    agent.login("203.0.113.1")
    if text is None:
        host.settings_file.unlink()
    else:
        host.settings_file.write_text(text)
    agent.login("203.0.113.2")
    assert "203.0.113.2 . 587" in trusted(loaded, "ipv4")
    assert agent.status()["mode"] == "protected"
    assert "going on with the settings from before" in agent.log()
    agent.configure({"protection": {"type": "autoban"}})
    assert agent.status()["mode"] == "autoban"


def test_status(agent: Agent) -> None:
    agent.login("203.0.113.1")
    agent.ask("receive", signed({"203.0.113.2": time.time()}))
    agent.ask("receive", "nonsense")
    found = agent.status()
    assert found["mode"] == "protected"
    assert found["ports"] == list(LOGIN_PORTS)
    assert (found["logins"], found["received"], found["refused"]) == (1, 1, 1)
    assert found["keys"] == [messages.fingerprint(KEY)]
    assert KEY not in json.dumps(found) + agent.log()


# Many clients, and slow ones


def test_silent_client_is_dropped_and_delays_nobody(agent: Agent) -> None:
    agent.login("203.0.113.1")
    started = time.monotonic()
    with agent.connect() as silent:
        agent.login("203.0.113.2")
        assert time.monotonic() - started < PATIENCE, "before the silent client is dropped"
        assert silent.recv(100) == b""
        assert time.monotonic() - started >= PATIENCE


def test_client_that_does_not_wait_for_its_answer_is_served(agent: Agent, loaded: Firewall) -> None:
    for number in range(1, 21):
        with agent.connect() as connection:
            connection.send(f"login\x00203.0.113.{number}\0alice".encode())
    until(lambda: len(trusted(loaded, "ipv4")) == 20 * len(LOGIN_PORTS), "all of them are trusted")


def test_many_logins_at_once_are_all_answered(agent: Agent, loaded: Firewall) -> None:
    """More than the agent takes at once: the kernel's queue holds the others."""
    connections: list[socket.socket] = []
    try:
        os.kill(agent.pid, signal.SIGSTOP)  # Whoever is silent for long is dropped.
        for number in range(600):
            connections.append(agent.connect())
            connections[-1].send(f"login\x0010.1.{number >> 8}.{number & 255}\0user{number}".encode())
        os.kill(agent.pid, signal.SIGCONT)
        answers = [connection.recv(1000) for connection in connections]
    finally:
        for connection in connections:
            connection.close()
    assert all(answer.startswith(b"ok\0") for answer in answers)
    assert len(trusted(loaded, "ipv4")) == 600 * len(LOGIN_PORTS)
    assert agent.status()["logins"] == 600


# Telling the fleet


def announced(agent: Agent) -> list[messages.Message]:
    """Return the messages that the agent has announced, signatures checked."""
    events = agent.events()
    assert all(event["tag"] == "mailfw/login" for event in events)
    return [messages.verify(event["data"]["message"], [KEY]) for event in events]


def test_first_login_is_announced_at_once(agent: Agent, family: str) -> None:
    for _ in range(5):  # The fastest counts: the machine may be busy.
        agent.status()
        started = time.time()
        agent.login(ADDRESS[family])
        (message,) = until(lambda: announced(agent), "announced")
        if time.time() - started < 0.5:
            break
        agent.ask("receive", agent.events()[0]["data"]["message"])
        agent.ask("forget", ELEMENT[family])
        agent.stop()
        agent.forget_events()
        agent.start()
    else:
        pytest.fail("not at once")
    assert message.sender == HOST_ID
    ((source, at),) = message.logins.items()
    assert str(source) == ELEMENT[family]
    assert started - 0.001 <= at <= time.time()


def test_logins_that_follow_are_announced_together(agent: Agent) -> None:
    for number in range(1, 51):
        agent.login(f"203.0.113.{number}")
    until(lambda: sum(len(message.logins) for message in announced(agent)) == 50, "all are announced")
    assert len(announced(agent)) <= 4


def test_login_that_is_no_news_is_not_announced(agent: Agent) -> None:
    for _ in range(10):
        agent.login("203.0.113.1")
    agent.login("203.0.113.2")
    until(lambda: sum(len(message.logins) for message in announced(agent)) == 2, "both are announced")


def test_who_logs_in_all_the_time_is_announced_again_and_again(agent: Agent) -> None:
    """When the fleet's own deadline has lost a tenth of the period, however short ago the last login is."""
    agent.configure({**PILLAR, "trusted": {"period": "10s"}})
    began = time.time()

    def announced_twice() -> list[messages.Message]:
        agent.login("203.0.113.1")
        found = announced(agent)
        return found if len(found) == 2 else []

    first, second = until(announced_twice, "announced again", 5)
    ((before,), (after,)) = first.logins.values(), second.logins.values()
    assert began - 0.01 <= before < after


def test_login_of_another_host_is_not_announced(agent: Agent) -> None:
    agent.ask("receive", signed({"203.0.113.1": time.time()}))
    agent.login("203.0.113.1", "")
    agent.login("203.0.113.2")
    found = until(lambda: announced(agent), "announced")
    assert [str(source) for message in found for source in message.logins] == ["203.0.113.2"]


def test_echo_clears_the_outbox(agent: Agent) -> None:
    agent.login("203.0.113.1")
    (event,) = until(agent.events, "announced")
    status = agent.status()
    assert (status["outbox"], status["last_echo"]) == (1, None)
    assert agent.ask("receive", event["data"]["message"]) == "0"
    status = agent.status()
    assert status["outbox"] == 0
    assert abs(status["last_echo"] - time.time()) < 5


def test_another_hosts_message_is_no_echo(agent: Agent) -> None:
    agent.login("203.0.113.1")
    (message,) = until(lambda: announced(agent), "announced")
    agent.ask("receive", signed({"203.0.113.1": time.time()}, nonce=message.nonce))
    assert agent.status()["outbox"] == 1


@pytest.mark.slow
def test_login_without_an_echo_is_announced_again(agent: Agent) -> None:
    for number in (1, 2):
        agent.login(f"203.0.113.{number}")
        first = until(lambda number=number: len(found := announced(agent)) == number and found, "announced")
    agent.ask("receive", agent.events()[0]["data"]["message"])
    (again,) = until(lambda: announced(agent)[len(first) :], "announced again", seconds=10)
    assert [str(source) for source in again.logins] == ["203.0.113.2"]
    assert again.nonce not in {message.nonce for message in first}
    assert again.logins.items() <= first[1].logins.items(), "the time of the login is what it was"
    agent.ask("receive", agent.events()[-1]["data"]["message"])
    assert agent.status()["outbox"] == 0


def test_without_keys_the_fleet_is_not_told(agent: Agent, loaded: Firewall) -> None:
    agent.configure({**PILLAR, "fleet": {"keys": []}})
    agent.login("203.0.113.1")
    until(lambda: agent.status()["outbox"] == 0, "nothing waits")
    assert trusted(loaded, "ipv4")
    assert not agent.events()


def test_broken_helper_costs_no_login(agent: Agent, loaded: Firewall, host: Host) -> None:
    settings = json.loads(host.settings_file.read_text())
    settings["host"]["salt_helper"] = ["/nonexistent"]
    host.settings_file.write_text(json.dumps(settings))
    agent.login("203.0.113.1")
    until(lambda: "could not be announced" in agent.log(), "the log says so")
    agent.login("203.0.113.2")
    assert len(trusted(loaded, "ipv4")) == 2 * len(LOGIN_PORTS)
    assert agent.status()["outbox"] == 2


def test_agents_end_is_the_helpers_end(agent: Agent) -> None:
    for _ in range(2):
        agent.login("203.0.113.1")
    until(agent.events, "announced")
    children = agent.children()
    assert children
    assert agent.stop() == 0
    assert not any(child.exists() for child in children)
