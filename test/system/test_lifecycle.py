"""Nothing is lost on booted hosts: restarts, reloads, flushes, reboots, power failures, and a way out at night."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import lab
from support.lab import ADDRESSES, changed, wait_until

from .conftest import HOSTS

TRUSTED, BANNED, BLOCKED, ENDING = "192.0.2.101", "2001:db8:77::", "192.0.2.103", "192.0.2.104"
#: Keeps a minion from starting.
OFF = "/etc/systemd/system/salt-minion.service.d/off.conf"


def elements(host: str, name: str) -> dict[str, float]:
    """Return the elements of a set: element -> seconds left."""
    listed = json.loads(lab.run(host, "nft", "-j", "list", "set", "inet", "mailfw", name))
    found = {}
    for entry in next(one["set"] for one in listed["nftables"] if "set" in one).get("elem", []):
        one = entry["elem"] if isinstance(entry, dict) and "elem" in entry else {"val": entry}
        value = one["val"]
        text = " . ".join(map(str, value["concat"])) if isinstance(value, dict) else str(value)
        found[text] = one.get("expires", float("inf"))
    return found


def rules(host: str) -> list[str]:
    """Return the loaded rules; empty when there is no table."""
    listed = lab.run(host, "nft", "-s", "-t", "list", "table", "inet", "mailfw", check=False)
    return sorted(listed.splitlines())


def is_guarded(host: str) -> bool:
    """Return whether everything is there: the rules, and who was trusted, banned and blocked."""
    if not rules(host):
        return False
    return (
        f"{TRUSTED} . 587" in elements(host, "trusted_ipv4")
        and BANNED in elements(host, "banned_dovecot_ipv6")
        and elements(host, "blocked_ipv4").get(BLOCKED) == float("inf")
    )


def uptime(host: str) -> float:
    return float(lab.run(host, "cut", "-d ", "-f1", "/proc/uptime"))


@pytest.fixture
def guarded(fleet: object, mode: object, request: pytest.FixtureRequest) -> Iterator[str]:
    """A host that trusts, has banned and has blocked somebody."""
    host = request.param
    lab.salt(host, "mailfw.trust", TRUSTED)
    lab.salt(host, "mailfw.trust", ENDING, "period=4s")
    lab.salt(host, "mailfw.ban", BANNED)
    lab.salt(host, "mailfw.block", BLOCKED)
    assert is_guarded(host)
    yield host
    for verb, address in (("untrust", TRUSTED), ("unban", BANNED), ("unblock", BLOCKED)):
        lab.salt(host, f"mailfw.{verb}", address)
    assert changed(lab.states(host)) == []


on_both_hosts = pytest.mark.parametrize("guarded", HOSTS, indirect=True)

SOMEBODY = {
    "restart of nftables": ("systemctl", "restart", "nftables"),
    "another restart of nftables": ("systemctl", "restart", "nftables"),
    "reload of nftables": ("systemctl", "reload", "nftables"),
    "stock rules": ("nft", "-f", "/etc/nftables.conf"),
    "flush": ("nft", "flush", "ruleset"),
    "restart of mailfw": ("systemctl", "restart", "mailfw"),
    "restart of both": ("systemctl", "restart", "mailfw", "nftables", "mailfw-agent"),
}


@on_both_hosts
def test_whatever_flushes_the_rules_takes_nothing_away(guarded: str) -> None:
    before = rules(guarded)
    left = elements(guarded, "trusted_ipv4")[f"{TRUSTED} . 587"]
    for what, command in SOMEBODY.items():
        session = lab.Session("home", ADDRESSES[guarded][0])
        lab.run(guarded, *command)
        wait_until(lambda: is_guarded(guarded), f"everything is back after {what}", 6)
        assert rules(guarded) == before, what
        assert session.answers(), what
    assert left - 60 < elements(guarded, "trusted_ipv4")[f"{TRUSTED} . 587"] <= left
    assert lab.salt(guarded, "mailfw.status")[guarded]["rules"] == "loaded"


@on_both_hosts
def test_reboot_keeps_everything_and_downtime_counts_without_salt(
    guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_PING_LIMIT", "1")
    left = elements(guarded, "trusted_ipv4")[f"{TRUSTED} . 587"]
    began = time.monotonic()
    lab.run(guarded, "mkdir", "-p", str(Path(OFF).parent))
    lab.run(guarded, "tee", OFF, text="[Unit]\nConditionPathExists=/nowhere\n")
    lab.lab("reboot", guarded, check=False)
    monkeypatch.undo()
    try:
        assert is_guarded(guarded)
        passed = time.monotonic() - began
        now = elements(guarded, "trusted_ipv4")
        assert left - passed - 3 < now[f"{TRUSTED} . 587"] <= left - 1
        assert passed > 4
        assert f"{ENDING} . 587" not in now
        assert lab.run(guarded, "systemctl", "is-active", "salt-minion", check=False).strip() == "inactive"
        assert lab.client("home", "login", address=ADDRESSES[guarded][0])
        order = lab.run(
            guarded,
            "systemctl",
            "show",
            "-p",
            "ActiveEnterTimestampMonotonic",
            "--value",
            "mailfw",
            "network-pre.target",
        ).split()
        assert 0 < int(order[0]) <= int(order[1])
    finally:
        lab.run(guarded, "rm", OFF)
        lab.run(guarded, "systemctl", "daemon-reload")
        lab.run(guarded, "systemctl", "start", "salt-minion")
        wait_until(lambda: len(lab.answering()) == 3, "the minions answer")


@on_both_hosts
def test_power_failure_loses_no_more_than_a_minute(guarded: str) -> None:
    """The agent takes a snapshot each minute, and one when it starts."""
    lab.run(guarded, "systemctl", "restart", "mailfw-agent")
    wait_until(lambda: TRUSTED in lab.run(guarded, "cat", "/var/lib/mailfw/snapshot", check=False), "a snapshot")
    lab.run(guarded, "systemctl", "--force", "--force", "poweroff", check=False)
    lab.lab("up")
    wait_until(lambda: len(lab.answering()) == 3, "the minions answer")
    assert is_guarded(guarded)


@on_both_hosts
def test_stopping_opens_and_is_not_repaired(guarded: str) -> None:
    lab.run(guarded, "systemctl", "stop", "mailfw")
    try:
        time.sleep(3)
        assert rules(guarded) == []
    finally:
        lab.run(guarded, "systemctl", "start", "mailfw")
    assert is_guarded(guarded)


@on_both_hosts
def test_highstate_after_stopping_brings_everything_back(guarded: str) -> None:
    lab.run(guarded, "systemctl", "stop", "mailfw")
    assert "mailfw rules are kept mailfw" in changed(lab.states(guarded))
    assert is_guarded(guarded)


@on_both_hosts
def test_without_python_the_rules_are_loaded_and_logins_go_on(guarded: str) -> None:
    """As in the middle of a distribution's upgrade."""
    real = lab.run(guarded, "readlink", "-f", "/usr/bin/python3").strip()
    lab.run(guarded, "mailfw-open", "1h", "python is broken")
    lab.run(guarded, "systemctl", "restart", "mailfw-agent")
    lab.run(guarded, "mv", real, f"{real}.away")
    try:
        assert lab.client("home", "login", address=ADDRESSES[guarded][0])["seconds"] < 3
        lab.run(guarded, "systemctl", "stop", "mailfw")
        assert rules(guarded) == []
        lab.run(guarded, "systemctl", "start", "mailfw")
        assert any("chain guarded" in line for line in rules(guarded))
        assert "tcp" in elements(guarded, "break_glass")
        lab.run(guarded, "mailfw-open", "close")
    finally:
        lab.run(guarded, "mv", f"{real}.away", real)
    lab.run(guarded, "systemctl", "reset-failed")
    lab.run(guarded, "systemctl", "restart", "mailfw-agent")
    lab.salt(guarded, "mailfw.apply")
    for verb, address in (("trust", TRUSTED), ("ban", BANNED), ("block", BLOCKED)):
        lab.salt(guarded, f"mailfw.{verb}", address)


@on_both_hosts
def test_way_out_outlives_a_reboot_and_highstates(guarded: str, mode: object) -> None:
    said = lab.run(guarded, "mailfw-open", "2h", "nobody can log in")
    assert "open for everyone until" in said
    lab.lab("reboot", guarded)
    wait_until(lambda: len(lab.answering()) == 3, "the minions answer")
    results = lab.states(guarded)
    assert changed(results) == []
    assert any("nobody can log in" in one["comment"] for one in results.values())
    status = lab.salt(guarded, "mailfw.status")[guarded]
    assert "nobody can log in" in status["warnings"][0]
    assert 7000 < elements(guarded, "break_glass")["tcp"] < 7200
    lab.run(guarded, "mailfw-open", "close")
    assert elements(guarded, "break_glass") == {}
    assert lab.salt(guarded, "mailfw.status")[guarded]["warnings"] == []


@on_both_hosts
def test_way_out_through_salt(guarded: str) -> None:
    done = lab.salt(guarded, "mailfw.open", "1h", "reason=asked by Salt")[guarded]
    assert "asked by Salt" in done["open"]
    assert "tcp" in elements(guarded, "break_glass")
    check = lab.salt(guarded, "mailfw.check", BLOCKED)[guarded]["services"]["imap"]
    assert "open for everyone" in check
    lab.salt(guarded, "mailfw.close")
    assert elements(guarded, "break_glass") == {}


def test_way_out_of_the_whole_fleet(fleet: object) -> None:
    said = lab.run("master", "salt-run", "mailfw.open", "2h", "nobody can log in")
    try:
        assert said.count("nobody can log in") == len(HOSTS)
        for host in HOSTS:
            assert host in said
            assert 7000 < elements(host, "break_glass")["tcp"] < 7200
    finally:
        lab.run("master", "salt-run", "mailfw.close")
    assert [elements(host, "break_glass") for host in HOSTS] == [{}, {}]
