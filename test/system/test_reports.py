"""Dovecot's reports: a client that only sends is trusted by its login to Postfix."""

from __future__ import annotations

import pytest

from support import lab
from support.lab import ADDRESSES, wait_until

from .conftest import ENVIRONMENTS, HOSTS, on_both_hosts

#: As which the hosts see the client home.
HOME = ("198.51.100.10", "2001:db8:0:2::")
CONF = "/etc/mailfw/dovecot-reports.conf"


@pytest.fixture(scope="module", autouse=True)
def autoban(fleet):
    for host in HOSTS:
        lab.set_pillar(ENVIRONMENTS[host], protection={"type": "autoban"})
    lab.all_states(HOSTS, "state.apply", "mailfw")


@pytest.fixture(autouse=True)
def nobody_is_known():
    lab.forget(*HOSTS)


def trusted(host: str, version: int) -> bool:
    listed = lab.run(host, "nft", "list", "set", "inet", "mailfw", f"trusted_ipv{version}")
    return f"{HOME[version == 6]} . 587" in listed


@pytest.mark.parametrize("port", [587, 465])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("host", HOSTS)
def test_who_only_sends_is_trusted_here_and_on_the_other_host(host, version, port):
    assert not trusted(host, version)
    lab.client("home", "send", address=ADDRESSES[host][version == 6], port=port, subject=f"report {port}")
    for one in HOSTS:
        wait_until(lambda one=one: trusted(one, version), f"{one} trusts who has sent")


@pytest.mark.parametrize("host", HOSTS)
def test_a_wrong_password_is_no_login(host):
    lab.client("home", "guess", address=ADDRESSES[host][0], tries=1)
    lab.client("home", "send", address=ADDRESSES[host][1], subject="after the guess")
    wait_until(lambda: trusted(host, 6), "the later report has arrived")
    assert not trusted(host, 4)


@pytest.mark.parametrize("host", HOSTS)
def test_the_secret_is_for_root_and_others_can_read_the_rest(host):
    """Dovecot's own tools read its configuration as whoever starts them."""
    assert lab.run(host, "stat", "-c", "%a %U", CONF).split() == ["600", "root"]
    seen_by_nobody = lab.run(host, "setpriv", "--reuid=nobody", "--clear-groups", "doveconf", "-n")
    assert "mailfw-login" in seen_by_nobody
    assert "server_api_header" not in seen_by_nobody
    assert "server_api_header = X-Mailfw-Secret: " in lab.run(host, "doveconf", "-n")


@on_both_hosts
def test_another_policy_server_is_left_alone(host):
    """Dovecot has one policy server at most."""
    other = "/etc/dovecot/conf.d/50-policy.conf"
    lab.run(host, "tee", other, text="auth_policy_server_url = http://192.0.2.99:4001/\nauth_policy_hash_nonce = x\n")
    lab.run(host, "rm", CONF)
    try:
        lab.states(host, "state.apply", "mailfw")
        assert "server_url = http://192.0.2.99:4001/" in lab.run(host, "doveconf", "-n")
        assert lab.run(host, "ls", "/etc/mailfw").split() == ["settings.json"]
    finally:
        lab.run(host, "rm", other)
        lab.states(host, "state.apply", "mailfw")
    assert "server_url = http://127.0.0.1:4145/" in lab.run(host, "doveconf", "-n")
