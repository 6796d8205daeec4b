"""Nothing is lost on booted hosts: restarts, reloads, flushes, reboots, power failures, and a way out at night."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from support import lab
from support.lab import ADDRESSES, changed, elements, wait_until

from .conftest import ENVIRONMENTS, HOSTS, on_both_hosts

BOTH = ",".join(HOSTS)
TRUSTED, BANNED, BLOCKED, ENDING = "192.0.2.101", "2001:db8:77::", "192.0.2.103", "192.0.2.104"
#: Keeps a minion from starting.
OFF = "/etc/systemd/system/salt-minion.service.d/off.conf"


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


@pytest.fixture(scope="module", autouse=True)
def somebody(fleet: object) -> Iterator[None]:
    """Both hosts are in protected mode, and trust, have banned and have blocked somebody."""
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, protection={"type": "protected"})
    lab.all_states(HOSTS)
    know_somebody(BOTH)
    yield
    for verb, address in (("untrust", TRUSTED), ("unban", BANNED), ("unblock", BLOCKED)):
        lab.salt(BOTH, f"mailfw.{verb}", address)


def know_somebody(hosts: str) -> None:
    for verb, address in (("trust", TRUSTED), ("ban", BANNED), ("block", BLOCKED)):
        lab.salt(hosts, f"mailfw.{verb}", address)


@pytest.fixture(autouse=True)
def guarded(somebody: None) -> Iterator[None]:
    """Everything is there before each test, and a highstate has nothing to do after it."""
    assert lab.on_each(HOSTS, is_guarded) == dict.fromkeys(HOSTS, True)
    yield
    assert [changed(results) for results in lab.all_states(HOSTS).values()] == [[], []]


#: More often than systemd starts a service by default.
AGAIN_AND_AGAIN = "for n in 1 2 3 4 5 6 7; do systemctl restart mailfw; done"
#: The second flush comes while mailfw.service loads the rules after the first.
TWICE = "systemctl restart nftables; sleep 0.1; nft -f /etc/nftables.conf"
SOMEBODY = {
    "restart of nftables": ("systemctl", "restart", "nftables"),
    "another restart of nftables": ("systemctl", "restart", "nftables"),
    "reload of nftables": ("systemctl", "reload", "nftables"),
    "stock rules": ("nft", "-f", "/etc/nftables.conf"),
    "flush": ("nft", "flush", "ruleset"),
    "restart of mailfw": ("systemctl", "restart", "mailfw"),
    "restart of nftables and stock rules": ("sh", "-c", TWICE),
    "restarts of mailfw": ("sh", "-c", AGAIN_AND_AGAIN),
    "restart of both": ("systemctl", "restart", "mailfw", "nftables", "mailfw-agent"),
}


@on_both_hosts
def test_whatever_flushes_the_rules_takes_nothing_away(host: str) -> None:
    before = rules(host)
    left, began = elements(host, "trusted_ipv4")[f"{TRUSTED} . 587"], time.monotonic()
    for what, command in SOMEBODY.items():
        session = lab.Session("home", ADDRESSES[host][0])
        lab.run(host, *command)
        flushed = time.monotonic()
        wait_until(lambda: is_guarded(host), f"everything is back after {what}", 30)
        print(f"{host}: everything is back {time.monotonic() - flushed:.1f} s after {what}")
        assert rules(host) == before, what
        assert session.answers(), what
    passed = time.monotonic() - began
    assert left - passed - 5 < elements(host, "trusted_ipv4")[f"{TRUSTED} . 587"] <= left
    assert lab.salt(host, "mailfw.status")[host]["rules"] == "loaded"


@pytest.fixture
def minions_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep Salt's minions from starting with their hosts."""
    for host in HOSTS:
        lab.run(host, "tee", OFF, text="[Unit]\nConditionPathExists=/nowhere\n")
    monkeypatch.setenv("LAB_PING_LIMIT", "1")
    yield
    for host in HOSTS:
        lab.run(host, "rm", OFF)
        lab.run(host, "systemctl", "daemon-reload")
        lab.run(host, "systemctl", "start", "salt-minion")
    lab.wait_for_minions(*HOSTS)


def test_reboot_keeps_everything_and_downtime_counts_without_salt(minions_off: None) -> None:
    lab.salt(BOTH, "mailfw.trust", ENDING, "period=4s")
    left = lab.on_each(HOSTS, lambda host: elements(host, "trusted_ipv4")[f"{TRUSTED} . 587"])
    began = time.monotonic()
    lab.lab("reboot", *HOSTS, check=False)

    def is_as_before(host: str) -> None:
        assert is_guarded(host)
        passed = time.monotonic() - began
        now = elements(host, "trusted_ipv4")
        assert left[host] - passed - 3 < now[f"{TRUSTED} . 587"] <= left[host] - 1
        assert passed > 4
        assert f"{ENDING} . 587" not in now
        assert lab.run(host, "systemctl", "is-active", "salt-minion", check=False).strip() == "inactive"
        assert lab.client("home", "login", address=ADDRESSES[host][0])
        entered = ("show", "-p", "ActiveEnterTimestampMonotonic", "--value", "mailfw", "network-pre.target")
        rules_at, network_at = map(int, lab.run(host, "systemctl", *entered).split())
        assert 0 < rules_at <= network_at

    lab.on_each(HOSTS, is_as_before)


def test_power_failure_loses_no_more_than_a_minute() -> None:
    """The agent takes a snapshot each minute, and one when it starts."""

    def fail(host: str) -> None:
        lab.run(host, "systemctl", "restart", "mailfw-agent")
        wait_until(lambda: TRUSTED in lab.run(host, "cat", "/var/lib/mailfw/snapshot", check=False), "a snapshot")
        lab.fail_power(host)

    lab.on_each(HOSTS, fail)
    lab.lab("up")
    assert lab.on_each(HOSTS, is_guarded) == dict.fromkeys(HOSTS, True)


@on_both_hosts
def test_stopping_opens_and_is_not_repaired(host: str) -> None:
    lab.run(host, "systemctl", "stop", "mailfw")
    try:
        time.sleep(3)
        assert rules(host) == []
    finally:
        lab.run(host, "systemctl", "start", "mailfw")
    assert is_guarded(host)


@on_both_hosts
def test_highstate_after_stopping_brings_everything_back(host: str) -> None:
    lab.run(host, "systemctl", "stop", "mailfw")
    assert "mailfw rules are kept mailfw" in changed(lab.states(host))
    assert is_guarded(host)


@on_both_hosts
def test_without_python_the_rules_are_loaded_and_logins_go_on(host: str) -> None:
    """As in the middle of a distribution's upgrade. Once it is back, so is the agent, and all that was known."""
    real = lab.run(host, "readlink", "-f", "/usr/bin/python3").strip()
    lab.run(host, "mailfw-open", "1h", "python is broken")
    lab.run(host, "systemctl", "restart", "mailfw-agent")
    with lab.logins(host) as people:
        lab.run(host, "mv", real, f"{real}.away")
        began = time.time()
        try:
            assert lab.quickest_login("home", ADDRESSES[host][0], 3) < 3
            lab.run(host, "systemctl", "stop", "mailfw")
            assert rules(host) == []
            lab.run(host, "systemctl", "start", "mailfw")
            assert any("chain guarded" in line for line in rules(host))
            assert "tcp" in elements(host, "break_glass")
            lab.run(host, "mailfw-open", "close")
            lab.run(host, "systemctl", "kill", "-s", "KILL", "mailfw-agent")
            wait_until(lambda: time.time() > began + 8, "people have logged in")
        finally:
            ended = time.time()
            lab.run(host, "mv", f"{real}.away", real)
        back = time.time()
        wait_until(lambda: is_guarded(host), "what was known comes back from the snapshot", 30)
        print(f"{host}: what was known is back {time.time() - back:.1f} s after python3")
        time.sleep(1)
        visits = people.end()
    assert [one for one in visits if "error" in one] == []
    # Of the logins from one address, the quickest: a busy machine only adds to them.
    quickest: dict[str, float] = {}
    for one in visits:
        quickest[one["source"]] = min(one["seconds"], quickest.get(one["source"], one["seconds"]))
    assert max(quickest.values()) < 3
    for address in ADDRESSES[host]:
        assert len([one for one in visits if one["at"] == address and began < one["began"] < ended]) >= 3
    since = {f"{one['source']} . 587" for one in visits if one["began"] > back and "." in one["source"]}
    wait_until(lambda: since and since <= elements(host, "trusted_ipv4").keys(), "who logged in since is trusted", 5)


def test_way_out_outlives_a_reboot_and_highstates() -> None:
    said = lab.on_each(HOSTS, lambda host: lab.run(host, "mailfw-open", "2h", "nobody can log in"))
    lab.lab("reboot", *HOSTS)
    results, status = lab.all_states(HOSTS), lab.salt(BOTH, "mailfw.status")

    def is_open_until_it_is_closed(host: str) -> None:
        assert "open for everyone until" in said[host]
        assert changed(results[host]) == []
        assert any("nobody can log in" in one["comment"] for one in results[host].values())
        assert "nobody can log in" in status[host]["warnings"][0]
        assert 7000 < elements(host, "break_glass")["tcp"] < 7200
        lab.run(host, "mailfw-open", "close")
        assert elements(host, "break_glass") == {}
        assert lab.salt(host, "mailfw.status")[host]["warnings"] == []

    lab.on_each(HOSTS, is_open_until_it_is_closed)


@on_both_hosts
def test_way_out_through_salt(host: str) -> None:
    done = lab.salt(host, "mailfw.open", "1h", "reason=asked by Salt")[host]
    assert "asked by Salt" in done["open"]
    assert "tcp" in elements(host, "break_glass")
    check = lab.salt(host, "mailfw.check", BLOCKED)[host]["services"]["imap"]
    assert "open for everyone" in check
    lab.salt(host, "mailfw.close")
    assert elements(host, "break_glass") == {}


def test_way_out_of_the_whole_fleet() -> None:
    said = lab.run("master", "salt-run", "mailfw.open", "2h", "nobody can log in")
    try:
        assert said.count("nobody can log in") == len(HOSTS)
        for host in HOSTS:
            assert host in said
            assert 7000 < elements(host, "break_glass")["tcp"] < 7200
    finally:
        lab.run("master", "salt-run", "mailfw.close")
    assert [elements(host, "break_glass") for host in HOSTS] == [{}, {}]
