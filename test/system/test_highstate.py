"""Highstates from the master, on hosts that have never seen mailfw and on hosts that have."""

from __future__ import annotations

import json

import pytest

from support import lab
from support.lab import changed

from .conftest import ENVIRONMENTS, HOSTS, on_both_hosts

#: mailfw's file of Dovecot's configuration, and what it is made from.
OURS, TEMPLATE = "/etc/dovecot/conf.d/99-mailfw.conf", "mailfw/dovecot/files/99-mailfw.conf.jinja"


def rules(host):
    """Return the host's rules with what pillar has in their sets: the others' elements come and go."""
    lists = [
        "map inet mailfw services",
        "set inet mailfw trusted_networks_ipv4",
        "set inet mailfw trusted_networks_ipv6",
    ]
    return [lab.run(host, "nft", "-s", "-t", "list", "ruleset")] + [
        lab.run(host, "nft", "-s", "list", *one.split()) for one in lists
    ]


@pytest.mark.parametrize("host", HOSTS)
def test_before_the_first_run_test_mode_says_what_it_cannot_know(fleet, host):
    (one,) = fleet.preview[host].values()
    assert "not known yet" in one["comment"]
    assert not one["changes"]


def test_first_state_apply_brings_everything_at_once(fleet):
    for host in HOSTS:
        ids = " ".join(changed(fleet.first[host]))
        assert "mailfw extension modules are synced" in ids
        assert "mailfw ruleset is loaded" in ids
        assert "mailfw login hook is known to Dovecot" in ids


@pytest.mark.parametrize("arguments", [(), ("state.highstate", "test=True")], ids=["real", "test"])
def test_second_highstate_changes_nothing(fleet, arguments):
    assert [changed(results) for results in lab.all_states(HOSTS, *arguments).values()] == [[], []]


def test_master_state_changes_nothing_the_second_time(fleet):
    assert changed(lab.configure_master()) == []


def test_masters_own_reactor_and_peers_still_work(fleet):
    lab.run("master", "salt-call", "event.send", "lab/own")
    lab.wait_until(
        lambda: lab.run("master", "ls", "/run/lab-own-reacted", check=False), "the operator's own reactor reacts"
    )
    assert json.loads(lab.run("mx1", "salt-call", "--out=json", "publish.runner", "manage.up"))["local"]


@on_both_hosts
def test_wrong_pillar_is_reported_as_a_whole_and_changes_nothing(fleet, host):
    before = rules(host)
    lab.set_pillar(
        ENVIRONMENTS[host],
        protection={"type": "closed"},
        autoban={"rate": "10/fortnight", "periode": "1h"},
        trusted={"networks_ipv4": ["10.0.0.1/8", "2001:db8::/32"]},
    )
    try:
        results = lab.salt(host, "state.apply", "mailfw")[host].values()
        said = next(one["comment"] for one in results if one["__id__"] == "mailfw settings are valid")
        for path in (
            "mailfw:protection:type: 'closed'",
            "mailfw:autoban:rate: '10/fortnight'",
            "mailfw:autoban:periode",
            "mailfw:trusted:networks_ipv4[0]",
            "mailfw:trusted:networks_ipv4[1]",
        ):
            assert path in said
        assert [one["__id__"] for one in results if one["changes"]] == []
        assert rules(host) == before
    finally:
        lab.set_pillar(ENVIRONMENTS[host], protection={"type": "autoban"})
        lab.states(host)


def test_a_mode_switch_shows_a_diff_that_test_mode_has_shown(mode):
    lab.set_pillar("prod", protection={"type": "private"})
    try:
        before = rules("mx1")
        preview = lab.states("mx1", "state.apply", "mailfw", "test=True")
        assert rules("mx1") == before
        name = next(name for name in preview if name.startswith("mailfw ruleset is loaded"))
        real = mode("mx1", "private")
        assert real[name]["changes"] == preview[name]["changes"]
        assert "+\tchain dovecot_private {" in real[name]["changes"]["diff"]
    finally:
        mode("mx1", "autoban")


def there(host, path):
    return lab.lab("exec", host, "--", "test", "-e", path, check=False).returncode == 0


@on_both_hosts
def test_a_configuration_that_dovecot_refuses_is_said_and_left_as_it_is(fleet, host):
    broken = "/etc/dovecot/conf.d/98-broken.conf"
    lab.run(host, "tee", broken, text="nonsense = yes\n")
    try:
        with pytest.raises(lab.LabError, match="nonsense"):
            lab.states(host)
        assert there(host, OURS)
    finally:
        lab.run(host, "rm", broken)


def test_a_configuration_that_dovecot_refuses_because_of_mailfw_does_not_stay(fleet):
    text, copy = (lab.REPOSITORY / TEMPLATE).read_text(), f"/srv/next/{TEMPLATE}"
    lab.run("master", "mkdir", "-p", copy.rpartition("/")[0])
    lab.run("master", "tee", copy, text=f"{text}nonsense = yes\n")
    try:
        with pytest.raises(lab.LabError, match="mailfw login hook is known to Dovecot"):
            lab.all_states(HOSTS)
        assert lab.on_each(HOSTS, lambda host: there(host, OURS)) == {"mx1": False, "mx2": False}
    finally:
        lab.run("master", "rm", "-r", "/srv/next")
        lab.all_states(HOSTS)
    assert lab.on_each(HOSTS, lambda host: there(host, OURS)) == {"mx1": True, "mx2": True}


def test_a_host_without_dovecot_is_told_which_pillar_it_needs(fleet):
    doveconf = lab.run("mx1", "which", "doveconf").strip()
    lab.run("mx1", "mv", doveconf, "/root/doveconf")
    try:
        with pytest.raises(lab.LabError, match=r"roles: \[postfix\]"):
            lab.states("mx1", "state.apply", "mailfw.dovecot")
    finally:
        lab.run("mx1", "mv", "/root/doveconf", doveconf)
    assert changed(lab.states("mx1", "state.apply", "mailfw.dovecot")) == []


@on_both_hosts
def test_what_nft_lists_loads_again_as_the_same(fleet, host):
    """Operators save what is loaded; nft 1.1.3 lists some ways to ask for flags as something else."""
    listed = lab.run(host, "nft", "-s", "-t", "list", "table", "inet", "mailfw")
    again = "nft -f - && nft -s -t list table inet mailfw"
    assert lab.run(host, "unshare", "--net", "sh", "-c", again, text=listed) == listed


def test_rules_are_there_after_a_reboot(fleet):
    def services(host):
        return lab.run(host, "nft", "-s", "list", "map", "inet", "mailfw", "services")

    before = lab.on_each(HOSTS, services)
    lab.lab("reboot", *HOSTS)
    assert lab.on_each(HOSTS, services) == before
    assert [changed(results) for results in lab.all_states(HOSTS).values()] == [[], []]
