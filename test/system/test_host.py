"""What is right on a host after ``state.apply mailfw``. For any host that testinfra reaches: see kitchen.yml."""

from __future__ import annotations

import re

import pytest
import testinfra

PORTS = (25, 587, 465, 143, 993, 110, 995, 4190)


def pytest_generate_tests(metafunc):
    """Each mail host of the lab, or with --hosts the host that it names."""
    named = metafunc.config.getoption("--hosts")
    metafunc.parametrize("where", [f"{named}?sudo=True"] if named else ["mx1", "mx2"], scope="session")


@pytest.fixture(scope="session")
def host(where, request):
    if "://" in where:
        identity = request.config.getoption("--ssh-identity-file")
        return testinfra.get_host(where, ssh_identity_file=identity)
    return request.getfixturevalue("lab_host")(where)


@pytest.mark.parametrize("unit", ["mailfw-agent.socket", "mailfw-agent"])
def test_agent_is_enabled_and_running(host, unit):
    assert host.service(unit).is_enabled
    assert host.service(unit).is_running


def test_rules_are_loaded_at_boot(host):
    assert host.service("mailfw").is_enabled
    assert host.run("nft -c -f /usr/lib/mailfw/load.nft").rc == 0


def test_every_mail_port_has_a_verdict(host):
    verdicts = host.check_output("nft list map inet mailfw services")
    assert [port for port in PORTS if f"{port} : " not in verdicts] == []


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("/etc/mailfw/settings.json", 0o600),
        ("/etc/nftables.d/mailfw/base.nft", 0o644),
        ("/usr/lib/mailfw/login-hook", 0o755),
        ("/etc/dovecot/conf.d/99-mailfw.conf", 0o644),
    ],
)
def test_files_are_root_s_with_their_mode(host, path, mode):
    found = host.file(path)
    assert (found.user, found.mode) == ("root", mode)


def test_only_root_and_dovecot_reach_the_agent(host):
    socket = host.file("/run/mailfw/login.sock")
    assert (socket.user, socket.group, socket.mode) == ("root", "dovecot", 0o660)


def test_dovecot_runs_the_hook(host):
    configuration = host.check_output("doveconf -n")
    assert "executable = imap mailfw-login" in configuration
    assert "executable = pop3 mailfw-login" in configuration
    assert "executable = managesieve mailfw-login" in configuration
    # A storm of 500 logins at once is more than Dovecot's own limit, 100.
    assert re.search(r"^service mailfw-login \{(?:(?!^\}).)*^  process_limit = 1024$", configuration, re.M | re.S)


def test_agent_has_next_to_no_privileges(host):
    unit = host.service("mailfw-agent").systemd_properties
    assert unit["CapabilityBoundingSet"] == "cap_net_admin"
    assert unit["NoNewPrivileges"] == "yes"
    assert unit["ProtectSystem"] == "strict"


def test_systemd_sees_little_that_the_agent_could_do(host):
    """Exposure of 10 is all that a service can do; 2.0 is netlink, sockets, and being root without root's rights."""
    found = host.run("systemd-analyze security --no-pager --threshold=20 mailfw-agent.service")
    assert found.rc == 0, found.stdout
