"""mailfw.doctor on booted hosts: nothing is wrong where all is well, and what is broken is named with what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from support import lab
from support.lab import wait_until

from .conftest import ENVIRONMENTS, HOSTS, on_both_hosts

PRIVATE = {"protection": {"type": "private"}, "trusted": {"networks_ipv4": ["198.51.100.0/24"]}}
NAMES = {"doctor": {"names": {"imap": "imap.lab.test", "submission": "smtp.lab.test"}}}
ADDRESSES = "192.0.2.11 imap.lab.test\n2001:db8:0:1::11 imap.lab.test\n192.0.2.11 smtp.lab.test\n"
#: Not on every host: there is no policy server of others, no proxy, and one host is not private.
OF_DOVECOT = {
    "dovecot can run the hook",
    "dovecot can tell the agent",
    "dovecot runs the hook",
    "dovecot has read its configuration",
    "dovecot reports logins",
    "dovecot believes few hosts",
    "port 25 offers no login",
    "units are enabled",
    "names lead to the same kinds of address",
}


@pytest.fixture(scope="module", autouse=True)
def private(fleet: object) -> Iterator[None]:
    """Both hosts are in private mode, and have names."""
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, **PRIVATE, **NAMES)
    lab.on_each(HOSTS, lambda host: lab.run(host, "sh", "-c", f"printf '{ADDRESSES}' >>/etc/hosts"))
    lab.on_each(HOSTS, lambda host: lab.run(host, "sh", "-c", "echo 2001:db8:0:1::11 smtp.lab.test >>/etc/hosts"))
    lab.all_states(HOSTS, "state.apply", "mailfw")
    yield
    for host, environment in ENVIRONMENTS.items():
        lab.set_pillar(environment, protection={"type": "autoban"})
        lab.run(host, "sh", "-c", "sed '/imap/d; /smtp/d' /etc/hosts >/run/hosts; cat /run/hosts >/etc/hosts")
    lab.all_states(HOSTS, "state.apply", "mailfw")


def doctor(host: str) -> dict[str, Any]:
    said = lab.salt(host, "mailfw.doctor")[host]
    assert isinstance(said, dict), said
    return said


def do_what_it_says(host: str, wrong: dict[str, str]) -> None:
    for command in re.findall(r"`(.*?)`", wrong["do"]):
        lab.run(host, "sh", "-c", command)


def heal(host: str, failed: dict[str, dict[str, str]], *names: str) -> None:
    """Do what the doctor says of some checks, in this order, and see that they are all right."""
    for name in names:
        do_what_it_says(host, failed[name])
    left: dict[str, Any] = {}

    def well() -> bool:
        left.clear()
        left.update(doctor(host)["failed"])
        return not left.keys() & {*names}

    wait_until(well, f"{host}: {names}: {left}", 20)


@on_both_hosts
def test_a_host_in_order_is_well(host: str) -> None:
    found = doctor(host)
    assert found["failed"] == {}
    assert {*found["ok"]} >= OF_DOVECOT


def test_a_fleet_in_order_is_well() -> None:
    said = json.loads(lab.run("master", "salt-run", "--out=json", "mailfw.doctor"))
    assert said["retcode"] == 0, said
    assert said["hosts"].keys() == {*HOSTS}
    assert all(one.startswith("all is well") for one in [said["master"], *said["hosts"].values()])


#: Breaks of the same kind on both hosts: the check, what to do there, and what is said to do.
BROKEN = {
    "units are enabled": (
        "systemctl disable -q mailfw mailfw-agent.socket; systemctl stop mailfw",
        "systemctl enable --now mailfw.service mailfw-agent.socket",
    ),
    "dovecot can run the hook": ("chmod 700 /usr/lib/mailfw", "chmod a+rx /usr/lib/mailfw"),
    "dovecot runs the hook": ("rm /etc/dovecot/conf.d/99-mailfw.conf", "state.apply mailfw"),
    "dovecot reports logins": (
        "true",
        "mend what 'dovecot runs the hook' says",
    ),
    "port 25 offers no login": (
        "postconf smtpd_sasl_auth_enable=yes && postfix reload",
        "postconf -P smtp/inet/smtpd_sasl_auth_enable=no",
    ),
    "dovecot believes few hosts": (
        "echo 'login_trusted_networks = 10.0.0.0/8' >/etc/dovecot/conf.d/96-proxies.conf",
        "login_trusted_networks",
    ),
    "proxies are let in": ("true", "mailfw:trusted (networks_ipv4: [10.0.0.0/8])"),
    "names lead to the same kinds of address": (
        "sed '/2001:.*smtp.lab.test/d' /etc/hosts >/run/hosts; cat /run/hosts >/etc/hosts",
        "add an AAAA record for smtp.lab.test (submission)",
    ),
}
#: What the doctor cannot have somebody's commands do.
BY_HAND = "rm -f /etc/dovecot/conf.d/96-proxies.conf; echo 2001:db8:0:1::11 smtp.lab.test >>/etc/hosts; doveadm reload"
#: What would trouble other tests, whatever has failed.
UNDO = f"""
{BY_HAND}
chmod a+rx /usr/lib/mailfw
systemctl enable -q --now mailfw mailfw-agent.socket
postconf -X smtpd_sasl_auth_enable smtpd_tls_auth_only
postconf -PX smtp/inet/smtpd_sasl_auth_enable
postfix reload
"""


@on_both_hosts
def test_what_is_broken_is_named_and_what_is_said_mends_it(host: str) -> None:
    try:
        for command, _ in BROKEN.values():
            lab.run(host, "sh", "-c", command)
        if host == "mx2":  # AUTH comes after STARTTLS there.
            lab.run(host, "postconf", "smtpd_tls_auth_only=yes")
            lab.run(host, "postfix", "reload")
        failed = doctor(host)["failed"]
        # Rules are not loaded while their service is stopped.
        consequences = {"rules are loaded", "dovecot has read its configuration"}
        assert sorted(failed.keys() - consequences) == sorted(BROKEN)
        for name, (_, do) in BROKEN.items():
            assert do in failed[name]["do"], failed[name]
        assert "after STARTTLS" in failed["port 25 offers no login"]["found"] or host == "mx1"
        assert "imap, pop3, managesieve" in failed["dovecot runs the hook"]["found"]
        lab.run(host, "sh", "-c", BY_HAND)
        commands = ("units are enabled", "dovecot can run the hook", "dovecot runs the hook", "port 25 offers no login")
        heal(host, failed, *commands)
        assert doctor(host)["failed"] == {}
    finally:
        lab.run(host, "sh", "-c", UNDO)


@on_both_hosts
def test_an_agent_that_is_gone_old_or_shut_up(host: str) -> None:
    lab.run(host, "systemctl", "stop", "mailfw-agent.socket", "mailfw-agent.service")
    found = doctor(host)
    assert {"agent answers", "units are enabled"} == found["failed"].keys()
    heal(host, found["failed"], "agent answers")
    lab.run(host, "touch", "/usr/lib/mailfw/mailfwlib/agent.py")
    lab.run(host, "chmod", "0600", "/run/mailfw/login.sock")
    found = doctor(host)
    assert {"agent is current", "dovecot can tell the agent"} == found["failed"].keys()
    heal(host, found["failed"], "agent is current", "dovecot can tell the agent")
    assert doctor(host)["failed"] == {}


@on_both_hosts
def test_a_dovecot_that_has_not_read_its_configuration_or_does_not_run(host: str) -> None:
    lab.restart_dovecot(host)
    lab.client("home", "login", address=lab.ADDRESSES[host][0])
    lab.run(host, "touch", "/etc/dovecot/conf.d/99-mailfw.conf")
    found = doctor(host)
    assert found["failed"].keys() == {"dovecot has read its configuration"}
    heal(host, found["failed"], "dovecot has read its configuration")
    lab.run(host, "sed", "-i", "s/Secret: .*/Secret: 0/", "/etc/mailfw/dovecot-reports.conf")
    found = doctor(host)
    assert "have not the secret" in found["failed"]["dovecot reports logins"]["found"]
    heal(host, found["failed"], "dovecot reports logins")
    lab.run(host, "systemctl", "stop", "dovecot")
    found = doctor(host)
    assert found["failed"].keys() == {"dovecot has read its configuration"}
    heal(host, found["failed"], "dovecot has read its configuration")
    assert doctor(host)["failed"] == {}


def test_the_master_names_what_is_wrong_where() -> None:
    lab.run("mx1", "mailfw-open", "1h", "ticket 17")
    lab.run("master", "touch", "/etc/salt/master.d/mailfw.conf")
    try:
        said = json.loads(lab.run("master", "salt-run", "--out=json", "mailfw.doctor", check=False))
        assert said["retcode"] == 1
        assert said["master"].keys() == {"master has read its configuration"}
        assert said["hosts"]["mx1"].keys() == {"rules are in force"}
        assert said["hosts"]["mx2"].startswith("all is well")
    finally:
        lab.run("mx1", "mailfw-open", "close")
    do_what_it_says("master", said["master"]["master has read its configuration"])
    lab.wait_for_minions("master", *HOSTS)
    test_a_fleet_in_order_is_well()
