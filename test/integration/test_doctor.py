"""mailfw.doctor through Salt: of one host, and of the fleet from its master."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.fleet import Fleet, MailHost
from integration.hosts import network_of, wait_for
from integration.test_way_out import PATIENTLY, WITH_ONE_SILENT
from mailfwlib import files, messages

APPLY = "run `salt-call state.apply mailfw`"
#: Of Dovecot's and Postfix's configuration: this machine may have some of both, which the hosts share. See the lab.
OF_MAIL_SERVERS = ("dovecot runs the hook", "dovecot has read its configuration", "dovecot reports logins")
#: The tests of this folder run where nothing is started by systemd.
OF_SYSTEMD = ("units are enabled",)


@pytest.fixture(scope="module", autouse=True)
def _two_hosts(fleet: Fleet) -> None:
    """The master knows mx1 and mx2 only."""
    fleet.forget_hosts("id NOT IN ('mx1', 'mx2')")
    fleet.call_all(list(fleet.hosts.values()), "mailfw.catch_up")


def doctor(fleet: Fleet, host: MailHost) -> dict[str, Any]:
    found = fleet.call(host, "mailfw.doctor")
    assert isinstance(found, dict), found
    return found


def failed(fleet: Fleet, host: MailHost) -> dict[str, dict[str, str]]:
    return without_mail_servers(doctor(fleet, host)["failed"])


def without_mail_servers(found: dict[str, Any]) -> dict[str, Any]:
    return {name: wrong for name, wrong in found.items() if name not in OF_MAIL_SERVERS + OF_SYSTEMD}


def test_a_host_in_order_is_well(fleet: Fleet, mx1: MailHost) -> None:
    found = doctor(fleet, mx1)
    assert without_mail_servers(found["failed"]) == {}
    assert {"pillar is valid", "rules are loaded", "agent is current", "dovecot can run the hook"} <= {*found["ok"]}
    assert found["host"]["keys"] == [messages.fingerprint(fleet.key)]
    assert fleet.key not in str(found)


def give_pillar(fleet: Fleet, host: MailHost, save: bool, /, **mailfw: Any) -> None:
    """Have a host know what its pillar says now; ``save``: and go by it, as far as its settings are concerned."""
    fleet.write_pillar(host.name, **mailfw)
    assert fleet.call(host, "saltutil.refresh_pillar", wait=True) is True
    if save:
        assert isinstance(fleet.call(host, "mailfw.save_settings"), bool)


@contextlib.contextmanager
def settings(fleet: Fleet, host: MailHost, /, **mailfw: Any) -> Iterator[None]:
    """Have a host go by other settings for a while."""
    give_pillar(fleet, host, True, **mailfw)
    try:
        yield
    finally:
        give_pillar(fleet, host, True)


def test_pillar_that_is_wrong_or_not_applied(fleet: Fleet, mx1: MailHost) -> None:
    try:
        give_pillar(fleet, mx1, False, enforce=False)
        wrong = {"found": "not applied yet: mailfw:enforce", "do": APPLY}
        assert failed(fleet, mx1) == {"what pillar says is applied": wrong}
        give_pillar(fleet, mx1, False, enforce="maybe")
        found = failed(fleet, mx1)
        assert found.keys() == {"pillar is valid"}
        assert found["pillar is valid"]["found"] == "mailfw:enforce: 'maybe': expected true or false"
    finally:
        give_pillar(fleet, mx1, False)


def test_a_host_that_has_got_another_name(fleet: Fleet, mx1: MailHost) -> None:
    path = mx1.host.path("/etc/mailfw/settings.json")
    saved = json.loads(path.read_text())
    saved["host"]["id"] = "mx9"
    files.replace(path, json.dumps(saved))
    try:
        wrong = {"found": "this minion is mx1, and its agent goes by mx9: nothing of the fleet reaches it", "do": APPLY}
        assert failed(fleet, mx1) == {"minion id is applied": wrong}
    finally:
        assert not fleet.apply(mx1).failed
    assert failed(fleet, mx1) == {}


def test_a_host_without_the_fleets_key(fleet: Fleet, mx2: MailHost) -> None:
    with settings(fleet, mx2, fleet={"keys": []}):
        wrong = failed(fleet, mx2)
    assert wrong.keys() == {"fleet key is there"}
    assert "mailfw:fleet:keys" in wrong["fleet key is there"]["do"]


def test_without_a_master_its_pillar_is_not_missed(fleet: Fleet, mx1: MailHost) -> None:
    found = fleet.salt_call(mx1, "--local", "mailfw.doctor")
    assert without_mail_servers(found["failed"]) == {}
    assert "without a master" in found["skipped"]["pillar is valid"]


def test_a_login_port_that_is_not_guarded(fleet: Fleet, mx1: MailHost) -> None:
    with network_of(mx1.host):
        listener = socket.create_server(("0.0.0.0", 110))
    with listener, settings(fleet, mx1, roles=["postfix"]):
        wrong = failed(fleet, mx1)
        assert wrong.keys() == {"every login port is guarded"}
        assert "port 110 (pop3)" in wrong["every login port is guarded"]["found"]
        # A service that pillar switches off is nobody's mistake.
        give_pillar(fleet, mx1, True, services={"pop3": False})
        assert failed(fleet, mx1) == {}


@contextlib.contextmanager
def other_mode(path: Path, mode: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.mark.parametrize(
    ("place", "mode", "do"),
    [
        ("/usr/lib/mailfw", 0o700, "run `chmod a+rx /usr/lib/mailfw`"),
        ("/usr/lib/mailfw/login-hook", 0o644, "run `chmod a+rx /usr/lib/mailfw/login-hook`"),
        ("/usr/lib/mailfw/login_hook.py", 0o600, "run `chmod a+rx /usr/lib/mailfw/login_hook.py`"),
    ],
)
def test_a_hook_that_dovecots_user_cannot_reach(fleet: Fleet, mx1: MailHost, place: str, mode: int, do: str) -> None:
    with other_mode(mx1.host.path(place), mode):
        wrong = failed(fleet, mx1)
        assert "dovecot can run the hook" in wrong
        assert wrong["dovecot can run the hook"]["do"] == do
        mx1.host.run("sh", "-c", re.findall("`(.*)`", do)[0])
        assert failed(fleet, mx1) == {}


def test_a_hook_that_is_gone_or_breaks(fleet: Fleet, mx1: MailHost) -> None:
    hook = mx1.host.path("/usr/lib/mailfw/login_hook.py")
    text = hook.read_text()
    hook.write_text("import nonsense\n")
    try:
        assert "No module named 'nonsense'" in failed(fleet, mx1)["dovecot can run the hook"]["found"]
        hook.unlink()
        wrong = failed(fleet, mx1)
        assert wrong == {
            "dovecot can run the hook": {"found": "/usr/lib/mailfw/login_hook.py is not there", "do": APPLY}
        }
    finally:
        hook.write_text(text)
    assert failed(fleet, mx1) == {}


def test_an_agent_from_before_an_upgrade(fleet: Fleet, mx1: MailHost) -> None:
    library = mx1.host.path("/usr/lib/mailfw/mailfwlib/agent.py")
    text = library.read_text()
    library.write_text(text)
    wrong = failed(fleet, mx1)
    assert wrong.keys() == {"agent is current"}
    assert "since before its programs were replaced" in wrong["agent is current"]["found"]
    mx1.agent.stop()
    mx1.agent.start()
    assert failed(fleet, mx1) == {}
    library.write_text(text + "# altered\n")
    try:
        assert failed(fleet, mx1)["agent is current"]["do"] == APPLY
    finally:
        library.write_text(text)
        mx1.agent.stop()
        mx1.agent.start()


def test_all_of_the_fleet(fleet: Fleet) -> None:
    status, said = fleet.salt_run(*PATIENTLY, "mailfw.doctor")
    assert said["master"].startswith("all is well"), said
    assert said["hosts"].keys() == {"mx1", "mx2"}
    assert (said["failed"], said["no answer"]) == ({}, [])
    for found in said["hosts"].values():
        assert isinstance(found, str) or without_mail_servers(found) == {}
    assert status == int(any(isinstance(found, dict) for found in said["hosts"].values()))


def test_what_is_wrong_is_named_by_host(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    fleet.call(mx1, "mailfw.open", "1h", reason="ticket 17")
    moment = time.time()
    try:
        with settings(fleet, mx2, fleet={"keys": ["another" * 9]}):
            status, said = fleet.salt_run(*PATIENTLY, "mailfw.doctor")
    finally:
        fleet.call(mx1, "mailfw.close")
    assert status == 1

    def retcodes() -> list[int]:
        returned = fleet.events.get_events({("master", "salt/job/*/ret/mx1")}, after_time=moment)
        return [event.data["retcode"] for event in returned if event.data["fun"] == "mailfw.doctor"]

    assert wait_for("the event", retcodes) == [1]
    assert without_mail_servers(said["hosts"]["mx1"]).keys() == {"rules are in force"}
    assert without_mail_servers(said["hosts"]["mx2"]).keys() == {"its keys are the master's"}
    assert "neither believes the other" in said["hosts"]["mx2"]["its keys are the master's"]["found"]


def test_hosts_that_do_not_answer_are_named(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    with mx2.frozen():
        status, said = fleet.salt_run(*WITH_ONE_SILENT, "mailfw.doctor")
    assert (status, said["no answer"]) == (1, ["mx2"])
    assert said["hosts"].keys() == {"mx1"}
    wait_for("mx2 to be back", lambda: fleet.call(mx2, "test.ping"))


def test_a_master_that_does_not_serve_the_fleet(fleet: Fleet) -> None:
    path = Path(fleet.master.config_dir) / "master.d" / "mailfw.conf"
    text = path.read_text()
    path.write_text("mailfw: {}\nreactor: []\npeer_run: {}\n")
    try:
        status, said = fleet.salt_run(*PATIENTLY, "mailfw.doctor")
    finally:
        path.write_text(text)
    assert status == 1
    assert {"fleet keys are there", "reactor hears logins", "hosts may ask for logins"} <= said["master"].keys()
    do = {wrong["do"] for name, wrong in said["master"].items() if name != "master has read its configuration"}
    assert do == {"on the master, run `salt-call state.apply mailfw.reactor`"}


def test_a_master_that_knows_no_mail_host(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    fleet.forget_hosts("true")
    status, said = fleet.salt_run(*PATIENTLY, "mailfw.doctor")
    assert (status, said["hosts"]) == (1, {})
    assert "mail hosts are known" in said["master"]
    for host in (mx1, mx2):  # It is what it says to do.
        fleet.salt_call(host, "mailfw.catch_up")
    assert fleet.salt_run(*PATIENTLY, "mailfw.doctor")[1]["hosts"].keys() == {"mx1", "mx2"}


#: Debian's libfaketime, where test/install-packages has put it.
FAKETIME = Path(os.environ.get("MAILFW_CACHE", "/var/cache/mailfw"), "faketime")


def test_a_host_whose_clock_is_not_the_masters(fleet: Fleet, tmp_path: Path) -> None:
    """Its minion, and the jobs of that, see the time that libfaketime reads in a file."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    (library,) = FAKETIME.glob("usr/lib/*/faketime/libfaketimeMT.so.1")
    options = (f"FAKETIME_TIMESTAMP_FILE={clock}", "FAKETIME_NO_CACHE=1", "DONT_FAKE_MONOTONIC=1")

    def said_of_its_clock() -> str:
        found = fleet.salt_run(*PATIENTLY, "mailfw.doctor")[1]["hosts"]["astray"]
        return found.get("its clock is the master's", {"found": "right"})["found"]

    with fleet.mail_host("astray", "env", f"LD_PRELOAD={library}", *options) as host:
        fleet.call(host, "saltutil.sync_all")
        fleet.salt_run("mailfw.announce", fleet.sign(sender="astray"))
        try:
            assert said_of_its_clock() == "right"
            clock.write_text("-600")
            assert re.match(r"its clock is (5\d\d|600) s behind the master's", said_of_its_clock())
            clock.write_text("+600")
            assert re.match(r"its clock is (5\d\d|600) s ahead of the master's", said_of_its_clock())
        finally:
            clock.write_text("+0")
            fleet.forget_hosts("id = 'astray'")
