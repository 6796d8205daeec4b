"""Logins that come through a proxy or from a webmail: the client's address is trusted, theirs is not."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
import yaml

from support import lab
from support.lab import ADDRESSES, wait_until
from support.proxy import haproxy

from .conftest import ENVIRONMENTS, HOSTS, on_both_hosts

#: Where the proxy, in the client town, stands for a host; where it connects from is in the document.
FRONTS = {"mx1": ("198.19.255.11", "2001:db8:7fff::11"), "mx2": ("198.19.255.12", "2001:db8:7fff::12")}
#: As what the hosts would trust it.
TOWN = ("198.19.0.10", "2001:db8:0:4::")
#: Who logs in at a host, and as what hosts trust them: each host has a client of its own, since hosts tell each other.
CLIENTS = {"mx1": "home", "mx2": "cafe"}
KEYS = {"home": ("198.51.100.10", "2001:db8:0:2::"), "cafe": ("203.0.113.10", "2001:db8:0:3::")}
#: Browsers that log in at a host through its webmail. Each is all of its /64.
BROWSERS = {"mx1": ("198.51.100.81", "2001:db8:81::"), "mx2": ("198.51.100.82", "2001:db8:82::")}
#: What only a liar says.
CLAIMED = ("198.51.100.99", "2001:db8:99::")
FORGED = (
    f"PROXY TCP4 {CLAIMED[0]} 192.0.2.99 999 143\r\n",
    f"PROXY TCP6 {CLAIMED[1]} 2001:db8:0:1::99 999 143\r\n",
)
PORTS = [143, 993]
#: The document's pillar, and its two pieces of Dovecot's configuration: what operators read is what is run.
DOCUMENT = (lab.REPOSITORY / "docs/proxies.md").read_text()
SHOWN, BEHIND_A_PROXY, WITH_A_WEBMAIL = re.findall(r"^```(?:yaml)?\n(.*?)^```$", DOCUMENT, re.M | re.S)
PILLAR = {
    "protection": {"type": "protected"},
    "reaction": {"untrusted": "reject"},
    "autoban": {"rate": "1/hour", "burst": 5},
    **yaml.safe_load(SHOWN)["mailfw"],
}
CONF = "/etc/dovecot/conf.d/96-lab-proxy.conf"


@pytest.fixture(scope="module", autouse=True)
def protected(fleet):
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, **PILLAR)
    lab.all_states(HOSTS, "state.apply", "mailfw")


@pytest.fixture(autouse=True)
def nobody_is_known():
    lab.forget(*HOSTS)


def configure(text: str) -> None:
    """Give Dovecot of both hosts more configuration, until it works by that."""
    greets = "haproxy = yes" not in text  # Dovecot waits for the header first.

    def one(host: str) -> None:
        lab.run(host, "tee", CONF, text=text)
        lab.run(host, "doveadm", "reload")
        direct = [[ADDRESSES[host][0], 143]]
        wait_until(lambda: (lab.client("town", "probe", targets=direct) == ["open"]) is greets, f"{host} is configured")

    lab.on_each(HOSTS, one)


@pytest.fixture(scope="module")
def running_proxy(protected, tmp_path_factory):
    """HAProxy in front of the IMAP services of both hosts."""
    fronts = {front: to for host in HOSTS for front, to in zip(FRONTS[host], ADDRESSES[host])}
    with haproxy("town", fronts, PORTS, tmp_path_factory.mktemp("proxy")):
        yield


@contextmanager
def configured(text):
    try:
        configure(text)
        yield
    finally:
        configure("")


@pytest.fixture
def proxy(running_proxy):
    """Dovecot believes HAProxy from where its clients are."""
    with configured(BEHIND_A_PROXY):
        yield


@pytest.fixture
def webmail(protected):
    """Dovecot believes the client town for whom it logs in."""
    with configured(WITH_A_WEBMAIL):
        yield


def trusted(host: str) -> set[str]:
    found = {**lab.elements(host, "trusted_ipv4"), **lab.elements(host, "trusted_ipv6")}
    return {element.partition(" . ")[0] for element in found}


@on_both_hosts
def test_login_through_the_proxy_opens_submission_to_the_client_and_not_to_the_proxy(host, proxy):
    client, (other,) = CLIENTS[host], set(HOSTS) - {host}
    for port in PORTS:
        lab.forget(host)
        for front, address in zip(FRONTS[host], ADDRESSES[host]):
            assert lab.client(client, "probe", targets=[[address, 587]]) == ["refused"]
            (waited,) = lab.client(client, "login_opens", address=front, port=port, watch=[[address, 587]])["seconds"]
            assert waited < 0.5, "open when the client reads its OK"
            assert lab.client("town", "probe", targets=[[address, 587]]) == ["refused"]
    wait_until(lambda: set(KEYS[client]) <= trusted(other), f"{other} trusts the client as well")
    assert trusted(other) <= {key for keys in KEYS.values() for key in keys}


@on_both_hosts
def test_proxys_connections_are_not_counted(host, proxy):
    for front in FRONTS[host]:
        assert lab.client("cafe", "probe", targets=[[front, 143]] * 12, patience=3) == ["open"] * 12


@on_both_hosts
def test_a_block_ends_the_clients_sessions_and_not_the_proxys(host, proxy):
    client, (other,) = CLIENTS[host], set(CLIENTS.values()) - {CLIENTS[host]}
    for front, address in zip(FRONTS[host], KEYS[client]):
        session, others = lab.Session(client, front), lab.Session(other, front, user="bob")
        try:
            assert lab.salt(host, "mailfw.block", address)[host]["sessions_ended"] == 1
            assert (session.answers(), others.answers()) == (False, True)
        finally:
            lab.salt(host, "mailfw.unblock", address)


@on_both_hosts
def test_header_of_somebody_else_lets_nobody_in(host, proxy):
    for address, header in zip(ADDRESSES[host], FORGED):
        assert not lab.client(CLIENTS[host], "claim", address=address, header=header)
    assert not set(CLAIMED) & trusted(host)


@on_both_hosts
def test_header_earns_nothing_where_no_proxy_is_configured(host):
    for address, header in zip(ADDRESSES[host], FORGED):
        assert lab.client(CLIENTS[host], "claim", address=address, header=header)
    assert set(KEYS[CLIENTS[host]]) <= trusted(host)
    assert not set(CLAIMED) & trusted(host)


@on_both_hosts
def test_login_of_the_proxys_own_trusts_nobody(host):
    for address in ADDRESSES[host]:
        assert lab.client("town", "login_then_connect", address=address, protocol="imap") == "refused"
    assert not set(TOWN) & trusted(host)


@on_both_hosts
def test_webmail_has_the_browsers_address_trusted_and_nobody_else_has(host, webmail):
    def login(client: str, address: str, of: str) -> None:
        identity = f'"x-originating-ip" "{of}" "x-originating-port" "999"'
        assert lab.client(client, "claim", address=address, identity=identity)

    for address, browser, claimed in zip(ADDRESSES[host], BROWSERS[host], CLAIMED):
        login("town", address, browser)
        assert browser in trusted(host)
        login(CLIENTS[host], address, claimed)
    assert set(KEYS[CLIENTS[host]]) <= trusted(host)
    assert not {*CLAIMED, *TOWN} & trusted(host)
