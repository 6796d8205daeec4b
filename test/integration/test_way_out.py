"""The way out for the whole fleet: salt-run opens all mail hosts, says who did, and minions cannot have it done."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator

import pytest

from integration.fleet import Fleet, MailHost
from integration.hosts import wait_for
from mailfwlib import settings

CLOSED = "closed: mailfw's rules are in force again"
#: A busy machine must not make a test fail.
PATIENTLY = ["--timeout", "60"]
#: The same where a host does not answer: all of that time goes by.
WITH_ONE_SILENT = ["--timeout", "30"]
MARK = "/run/something-foreign-has-run"
HOSTILE = f'it\'s "a" $(touch {MARK}) `touch {MARK}`; touch {MARK} & \\ %s {{{{ 1 + 1 }}}} {{a: [b]}} # é*'


def test_a_new_key_is_one_that_mail_hosts_take(fleet: Fleet) -> None:
    found = [fleet.salt_run("mailfw.genkey") for _ in range(2)]
    assert [status for status, _ in found] == [0, 0]
    keys = [key for _, key in found]
    assert len(set(keys)) == 2
    assert settings.resolve({"fleet": {"keys": keys}})


@pytest.fixture(autouse=True)
def _two_closed_hosts(fleet: Fleet) -> Iterator[None]:
    """The master knows mx1 and mx2 only, and both are closed."""
    others = "id NOT IN ('mx1', 'mx2')"
    fleet.forget_hosts(others)
    yield
    fleet.call_all(list(fleet.hosts.values()), "mailfw.close")
    fleet.forget_hosts(others)


def seconds_open(host: MailHost) -> float:
    """Return for how long the kernel still lets everyone in."""
    return sum(element["elem"]["expires"] for element in host.host.elements("break_glass"))


@contextlib.contextmanager
def unguarded(fleet: Fleet, host: MailHost) -> Iterator[None]:
    """Have no rules on a mail host for a while, so that there is nothing to open."""
    host.agent.stop()  # It would repair that.
    host.host.nft("delete", "table", "inet", "mailfw")
    try:
        yield
    finally:
        fleet.call(host, "mailfw.apply")
        host.agent.start()


def test_all_hosts_open_and_close(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    status, said = fleet.salt_run(*PATIENTLY, "mailfw.open", "2h", "ticket 17")
    assert (status, said["failed"], said["no answer"]) == (0, {}, [])
    assert said["hosts"].keys() == {"mx1", "mx2"}
    for host in (mx1, mx2):
        sentence = said["hosts"][host.name]
        assert re.fullmatch(r"open for everyone until .*\d\d:\d\d:\d\d.*: ticket 17", sentence)
        assert 7100 < seconds_open(host) <= 7200
        assert "ticket 17" in fleet.call(host, "mailfw.opening")

    assert fleet.salt_run(*PATIENTLY, "mailfw.close") == (
        0,
        {"hosts": {"mx1": CLOSED, "mx2": CLOSED}, "failed": {}, "no answer": [], "retcode": 0},
    )
    assert [seconds_open(mx1), seconds_open(mx2)] == [0, 0]


def test_hosts_that_fail_or_are_gone_are_named(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    fleet.salt_run("mailfw.announce", fleet.sign(sender="gone"))
    with unguarded(fleet, mx2):
        status, said = fleet.salt_run(*PATIENTLY, "mailfw.open", "1h", "some of them")
    assert status == 1
    assert said["hosts"].keys() == {"mx1"}
    assert said["failed"].keys() == {"mx2"}
    assert "the rules are not loaded, so nothing is closed" in said["failed"]["mx2"]
    assert said["no answer"] == ["gone"]
    assert seconds_open(mx1) > 3500


def test_hosts_that_do_not_answer_are_named_and_open_when_they_can(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    with mx2.frozen():
        began = time.monotonic()
        status, said = fleet.salt_run(*WITH_ONE_SILENT, "mailfw.open", "1h", "one sleeps")
        assert time.monotonic() - began < 60
        assert (status, said["failed"], said["no answer"]) == (1, {}, ["mx2"])
        assert said["hosts"].keys() == {"mx1"}
        assert [seconds_open(mx1) > 3000, seconds_open(mx2)] == [True, 0]
    wait_for("mx2 to open", lambda: seconds_open(mx2) > 3500)


def test_a_host_with_a_full_disk_is_open_and_says_so(fleet: Fleet, mx1: MailHost) -> None:
    mx1.host.run("mount", "-t", "tmpfs", "-o", "size=4k", "disk", "/var/lib/mailfw")
    mx1.host.run("sh", "-c", "cat /dev/zero >/var/lib/mailfw/filler || true")
    try:
        status, said = fleet.salt_run(*PATIENTLY, "mailfw.open", "1h", "ticket 17")
        assert (status, said["hosts"].keys()) == (0, {"mx1", "mx2"})
        assert "but not over a reboot or a repair (" in said["hosts"]["mx1"]
        is_open = fleet.call(mx1, "mailfw.opening")
        assert is_open.startswith("open for everyone until ")
        assert is_open in fleet.call(mx1, "mailfw.status")["warnings"]
    finally:
        mx1.host.run("umount", "--lazy", "/var/lib/mailfw")
    assert seconds_open(mx1) > 3500


def test_a_host_without_the_tool_says_what_to_do(fleet: Fleet, mx1: MailHost) -> None:
    tool = mx1.host.path("/usr/sbin/mailfw-open")
    away = tool.rename(tool.with_name("away"))
    try:
        said = fleet.call(mx1, "mailfw.open", "1h")
    finally:
        away.rename(tool)
    assert (
        said == f"ERROR: /usr/sbin/{tool.name}: No such file or directory; run 'state.apply mailfw' on this host first"
    )


def test_a_fleet_that_the_master_does_not_know_is_an_error(fleet: Fleet) -> None:
    fleet.forget_hosts("true")
    status, said = fleet.salt_run("mailfw.open", "1h")
    fleet.call_all(list(fleet.hosts.values()), "mailfw.catch_up")
    assert status == 1
    assert "this master knows no mail host" in said


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        (f"reason=a=b: {HOSTILE}", f"a=b: {HOSTILE}"),
        (f"two\nlines:\n- touch {MARK}", f"two lines: - touch {MARK}"),
    ],
    ids=["shell", "YAML"],
)
def test_a_reason_arrives_as_text(fleet: Fleet, mx1: MailHost, mx2: MailHost, argument: str, text: str) -> None:
    status, said = fleet.salt_run(*PATIENTLY, "mailfw.open", "1h", argument)
    assert status == 0, said
    for host in (mx1, mx2):
        assert said["hosts"][host.name].endswith(f": {text}")
        assert fleet.call(host, "mailfw.opening").endswith(f": {text}")
        assert not host.host.path(MARK).exists()
    assert not fleet.host.path(MARK).exists()


def test_nothing_is_sent_when_arguments_are_wrong(fleet: Fleet, mx1: MailHost) -> None:
    moment = time.time()
    for period, reason, sentence in (
        ("8d", "x", "period '8d': expected a duration such as 2h, 90m or 1d12h, at most 7d"),
        ("1h", "x" * 5000, f"reason '{'x' * 79}: expected text of at most 200 bytes"),
        ("1h", "{a: b}", "reason {'a': 'b'}: expected text of at most 200 bytes"),
    ):
        status, said = fleet.salt_run("mailfw.open", period, reason)
        assert status == 1
        assert said.endswith(f"CommandExecutionError: {sentence}\n")
    assert "mailfw.open" not in {job["fun"] for job in fleet.ran_since(moment)}
    assert fleet.call(mx1, "mailfw.open", "1h", {"a": "b"}) == f"ERROR executing 'mailfw.open': {sentence}"


def test_minions_can_neither_open_nor_close_the_fleet(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    moment = time.time()
    assert not fleet.call(mx1, "publish.runner", "mailfw.open", ["2h", "let me in"])
    assert [seconds_open(mx1), seconds_open(mx2)] == [0, 0]
    fleet.call_all([mx1, mx2], "mailfw.open", "1h")
    assert not fleet.call(mx1, "publish.runner", "mailfw.close")
    assert all(seconds_open(host) > 3500 for host in (mx1, mx2))
    of_themselves = {"mailfw.receive", "runner.mailfw.announce", "runner.mailfw.trusts"}
    ran = [job["fun"] for job in fleet.ran_since(moment) if job["fun"] not in of_themselves]
    assert sorted(ran) == ["mailfw.open", "publish.runner", "publish.runner"]
