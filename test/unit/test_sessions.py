"""Who is logged in, as Dovecot says it; what the agent makes of that is in functional/test_sessions.py."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import sessions, settings
from mailfwlib.parse import address
from mailfwlib.sessions import SessionsError

#: What Dovecot 2.3.19 and 2.4.1 say of users with strange names, who are all at 198.51.100.10.
STRANGE_NAMES = {
    "2.3": r"""[{"username":"sl/ash/198.51.100.99/x","service":"imap","pid":"198","ip":"198.51.100.10"},
{"username":"fake\timap\t1\t203.0.113.99\nfoo","service":"imap","pid":"200","ip":"198.51.100.10"},
{"username":"back\\slash","service":"imap","pid":"202","ip":"198.51.100.10"},
{"username":"q'uo\"te","service":"imap","pid":"196","ip":"198.51.100.10"},
{"username":"üml","service":"imap","pid":"204","ip":"198.51.100.10"}]""",
    "2.4": r"""[{"username":"back\\slash","service":"imap","pid":"214","ip":"198.51.100.10","dest_ip":""},
{"username":"fake\timap\t1\t203.0.113.99\nfoo","service":"imap","pid":"212","ip":"198.51.100.10","dest_ip":""},
{"username":"sl/ash/198.51.100.99/x","service":"imap","pid":"210","ip":"198.51.100.10","dest_ip":""},
{"username":"new\nline","service":"imap","pid":"206","ip":"198.51.100.10","dest_ip":""},
{"username":"üml","service":"imap","pid":"216","ip":"198.51.100.10","dest_ip":""}]""",
}
#: What they say of ordinary ones: a user with two sessions from one address, another over POP3.
ORDINARY = {
    "2.3": """[{"username":"alice","service":"imap","pid":"194","ip":"2001:db8:0:2::10"},
{"username":"alice","service":"imap","pid":"186","ip":"198.51.100.10"},
{"username":"alice","service":"imap","pid":"166","ip":"198.51.100.10"},
{"username":"bob","service":"pop3","pid":"199","ip":"2001:db8:0:4::10"}]""",
    "2.4": """[{"username":"alice","service":"imap","pid":"199","ip":"2001:db8:0:2::10","dest_ip":""},
{"username":"alice","service":"imap","pid":"194","ip":"198.51.100.10","dest_ip":""},
{"username":"bob","service":"pop3","pid":"206","ip":"2001:db8:0:4::10","dest_ip":""},
{"username":"alice","service":"imap","pid":"197","ip":"198.51.100.10","dest_ip":""}]""",
}
DEFAULT = settings.resolve({})

Tool = Callable[[str], str]


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    """Make a program that stands in doveadm's place, from a shell script."""

    def make(script: str) -> str:
        made = tmp_path / "doveadm"
        made.write_text(f"#!/bin/sh\n{script}\n")
        made.chmod(0o755)
        return str(made)

    return make


def listing(tool: Tool, text: str) -> str:
    """Make a doveadm that says a text when it is asked as the product asks it."""
    Path(tool("").removesuffix("doveadm") + "said").write_text(text, encoding="utf-8")
    return tool('[ "$*" = "-f json who -1" ] && exec cat "${0%doveadm}said"')


def found(text: str) -> set[str]:
    return {str(one) for one, _ in sessions.clients(json.loads(text))}


def where(tool: str) -> set[Any]:
    return {one for one, _ in sessions.logged_in(tool)}


@pytest.mark.parametrize("version", ORDINARY)
def test_every_address_comes_once(tool: Tool, version: str) -> None:
    expected = {address(one) for one in ("198.51.100.10", "2001:db8:0:2::10", "2001:db8:0:4::10")}
    assert where(listing(tool, ORDINARY[version])) == expected


@pytest.mark.parametrize("version", STRANGE_NAMES)
def test_user_names_do_not_become_addresses(tool: Tool, version: str) -> None:
    assert where(listing(tool, STRANGE_NAMES[version])) == {address("198.51.100.10")}


@given(st.text(), st.ip_addresses(), st.ip_addresses())
def test_no_user_name_hides_anybody_or_becomes_an_address(name: str, mine: Any, other: Any) -> None:
    listed = [
        {"username": f"{name}{other}", "service": "imap", "pid": "1", "ip": str(mine)},
        {"username": "alice", "service": "imap", "pid": "2", "ip": str(other)},
    ]
    assert found(json.dumps(listed)) == {str(address(str(mine))), str(address(str(other)))}


@pytest.mark.parametrize(("service", "counts"), [("imap", 1), ("pop3", 1), ("sieve", 1), ("lmtp", 0), ("doveadm", 0)])
def test_a_session_is_one_that_began_with_a_password(service: str, counts: int) -> None:
    assert len(found(json.dumps([{"username": "alice", "service": service, "ip": "192.0.2.1"}]))) == counts


@pytest.mark.parametrize("ip", ["", "fe80::1%eth0", "0", "/run/x", "192.0.2.0/24", None, 3325256714])
def test_a_session_without_a_clients_address_hides_no_other(ip: Any) -> None:
    listed = [{"service": "imap", "ip": ip}, {"service": "imap", "ip": "192.0.2.1"}, {"service": "imap"}]
    assert found(json.dumps(listed)) == {"192.0.2.1"}


def test_a_mapped_address_is_the_one_it_carries() -> None:
    assert found('[{"service": "imap", "ip": "::ffff:192.0.2.1"}]') == {"192.0.2.1"}


@pytest.mark.parametrize("said", ["", "[", "null", "1", '["alice"]', "username proto pid ip", "[" * 100_000])
def test_what_is_no_list_is_an_error(tool: Tool, said: str) -> None:
    with pytest.raises(SessionsError, match="says what is no list of sessions"):
        sessions.logged_in(listing(tool, said))


def test_bytes_that_are_no_text_hide_nobody(tool: Tool) -> None:
    said = r"""printf '[{"username":"\377\001","service":"imap","ip":"192.0.2.1"}]'"""
    assert where(tool(said)) == {address("192.0.2.1")}


NAMES = {"alice": "alice", "n\u00fcl\0": "", "\ud800x": "?x", "u" * 300: "u" * 256, "\u00fc" * 200: "\u00fc" * 128}


@pytest.mark.parametrize("name", [*NAMES, None, 5, ["alice"]], ids=repr)
def test_a_user_is_named_as_the_hook_would(name: Any) -> None:
    listed = json.dumps([{"service": "imap", "ip": "192.0.2.1", "username": name}])
    expected = NAMES.get(name, "") if isinstance(name, str) else ""
    assert list(sessions.clients(json.loads(listed))) == [(address("192.0.2.1"), expected)]


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 75", "exit status 75"),
        ("exec sleep 60", "no answer in 2 s"),
        ("echo '['; exec sleep 60", "no answer in 2 s"),
        ("exec yes", "says more than 100000 bytes"),
        ("exec yes >&2", "no answer in 2 s"),
    ],
)
def test_a_doveadm_out_of_its_mind_is_ended(tool: Tool, monkeypatch: pytest.MonkeyPatch, script: str, why: str) -> None:
    monkeypatch.setattr(sessions, "TIMEOUT", 2.0)
    monkeypatch.setattr(sessions, "LONGEST", 100_000)
    began = time.monotonic()
    with pytest.raises(SessionsError, match=why):
        sessions.logged_in(tool('echo $$ >"${0}.pid"\n' + script))
    assert time.monotonic() - began < 30
    pid = int(Path(tool("") + ".pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def looking(tool: str, **pillar: Any) -> tuple[sessions.Sessions, list[list[sessions.Client]]]:
    renewed: list[list[sessions.Client]] = []
    return sessions.Sessions(lambda: settings.resolve(pillar), renewed.append, tool), renewed


def test_the_agent_is_asked_for_a_few_at_a_time(tool: Tool) -> None:
    everybody = [f"10.0.{number >> 8}.{number & 255}" for number in range(1000)]
    said = json.dumps([{"service": "imap", "ip": one, "username": "alice"} for one in everybody])
    made, renewed = looking(listing(tool, said))
    made.look()
    assert sorted(one for few in renewed for one in few) == sorted((one, "alice") for one in everybody)
    assert max(map(len, renewed)) == sessions.AT_ONCE


@pytest.mark.parametrize("roles", [["postfix"], []])
def test_a_host_without_the_role_is_not_asked(tool: Tool, roles: list[str]) -> None:
    made, renewed = looking(tool('touch "$0.asked"'), roles=roles)
    made.look()
    assert not renewed
    assert not Path(tool("") + ".asked").exists()


def test_a_host_without_dovecot_is_no_error() -> None:
    made, renewed = looking("/nonexistent/doveadm")
    for _ in range(3):
        made.look()
    assert not renewed


def test_a_dovecot_that_stays_away_is_an_error(tool: Tool) -> None:
    made, _ = looking(tool("exit 75"))
    for _ in range(2):
        made.look()  # It may only be restarting.
        for _ in range(2):
            with pytest.raises(SessionsError, match="doveadm who: exit status 75"):
                made.look()
        tool("echo []")
        made.look()
        tool("exit 75")


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where logins are remembered, at most ten of them."""
    monkeypatch.setattr(sessions, "DIRECTORY", tmp_path)
    monkeypatch.setattr(sessions, "MOST_LOGINS", 10)
    return tmp_path / "logins"


def test_the_memory_of_logins_is_bounded(memory: Path) -> None:
    logins, now = sessions.LastLogins({}), time.time()
    for number in range(100):
        logins.note(address(f"192.0.2.{number}"), now)
        assert len(memory.read_text().splitlines()) <= 20
    for one in (logins, sessions.LastLogins({})):
        assert [number for number in range(100) if one.count(address(f"192.0.2.{number}"))] == [*range(90, 100)]


def test_logins_within_the_hour_are_one_line(memory: Path) -> None:
    logins, now = sessions.LastLogins({}), time.time()
    for minutes in range(0, 121, 10):
        logins.note(address("192.0.2.1"), now - 7200 + 60 * minutes)
    assert len(memory.read_text().splitlines()) == 3


def test_what_no_longer_counts_is_not_kept(memory: Path) -> None:
    """Logins of long ago, and those before an operator has ended the trust."""
    now = time.time()
    logins = {"192.0.2.1": now - 8 * 86400, "192.0.2.2": now - 60, "192.0.2.3": now - 60}
    memory.write_text("".join(f"{one} {at}\n" for one, at in logins.items()))
    sessions.LastLogins({address("192.0.2.2"): now - 30, address("192.0.2.3"): now - 90})
    assert [line.split()[0] for line in memory.read_text().splitlines()] == ["192.0.2.3"]


@pytest.mark.parametrize(("period", "seconds"), [("1s", 2), ("20s", 2), ("1m", 6), ("30m", 180), ("1d", 300)])
def test_looks_are_a_tenth_of_the_period_apart(period: str, seconds: int) -> None:
    assert sessions.pause(settings.resolve({"trusted": {"period": period}})) == seconds
