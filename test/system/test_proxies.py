"""Logins that come through a proxy or from a webmail: the client's address is trusted, theirs is not."""

from __future__ import annotations

import itertools
import re
from contextlib import contextmanager

import pytest
import yaml

from mailfwlib.settings import FAMILIES
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
#: The document's pillar, Postfix's and Dovecot's configuration: what operators read is what is run.
DOCUMENT = (lab.REPOSITORY / "docs/proxies.md").read_text()
SHOWN, BEHIND_A_PROXY, FOR_POSTFIX, WITH_A_WEBMAIL = re.findall(r"^```(?:yaml)?\n(.*?)^```$", DOCUMENT, re.M | re.S)
#: Each mail host is one of Dovecot's proxies for the other.
EACH_OTHER = {
    f"networks_{family}": [to[version] for to in ADDRESSES.values()] for version, family in enumerate(FAMILIES)
}
PILLAR = {
    "protection": {"type": "protected"},
    "reaction": {"untrusted": "reject"},
    "autoban": {"rate": "1/hour", "burst": 5},
    **yaml.safe_load(SHOWN)["mailfw"],
}
for family in FAMILIES:
    PILLAR["exempt"][f"networks_{family}"] += EACH_OTHER[f"networks_{family}"]
    PILLAR["trusted"]["never"] += EACH_OTHER[f"networks_{family}"]
CONF, USERS = "/etc/dovecot/conf.d/96-lab-proxy.conf", "/etc/dovecot/users"
#: Who is served by the other host, when a host's Dovecot is asked.
PASSED_ON = {"mx1": "bob", "mx2": "alice"}
SUBMISSION = {587: "submission", 465: "submissions"}


@pytest.fixture(scope="module", autouse=True)
def protected(fleet):
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, **PILLAR)
    lab.all_states(HOSTS, "state.apply", "mailfw")


@pytest.fixture(autouse=True)
def nobody_is_known():
    lab.forget(*HOSTS)


def configure(text: str) -> None:
    """Give Dovecot of both hosts more configuration."""

    def one(host: str) -> None:
        lab.run(host, "tee", CONF, text=text)
        lab.restart_dovecot(host)

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


@pytest.fixture(params=["not told", "told"])
def proxies(request, protected):
    """The Dovecot of each host is a proxy for a user of the other's, which believes it about its clients when told."""
    before = {host: lab.run(host, "cat", USERS) for host in HOSTS}
    for host, users in before.items():
        (backend,) = set(HOSTS) - {host}
        user = f"{PASSED_ON[host]}:{{PLAIN}}secret"
        assert user in users
        passed_on = f"{user}::::::proxy=y host={ADDRESSES[backend][0]}"
        lab.run(host, "tee", USERS, text=users.replace(user, passed_on))
    told = request.param == "told"
    try:
        with configured(
            f"login_trusted_networks = {' '.join(itertools.chain(*EACH_OTHER.values()))}\n" if told else ""
        ):
            yield told
    finally:
        for host, users in before.items():
            lab.run(host, "tee", USERS, text=users)


@pytest.fixture
def proxy_of_postfix(protected, tmp_path):
    """HAProxy in front of submission of both hosts, with the document's pillar for that, which stays."""
    more = yaml.safe_load(FOR_POSTFIX)["mailfw"]
    pillar = {**PILLAR, "protection": {**PILLAR["protection"], **more["protection"]}}
    pillar["trusted"] = {**PILLAR["trusted"], **more["trusted"]}
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, **pillar)
    lab.all_states(HOSTS, "state.apply", "mailfw")
    settings = [f"{service}/inet/smtpd_upstream_proxy_protocol" for service in SUBMISSION.values()]
    lab.on_each(HOSTS, lambda host: lab.run(host, "postconf", "-P", *(f"{one}=haproxy" for one in settings)))
    fronts = {front: to for host in HOSTS for front, to in zip(FRONTS[host], ADDRESSES[host])}
    try:
        lab.on_each(HOSTS, lambda host: lab.run(host, "postfix", "reload"))
        with haproxy("town", fronts, list(SUBMISSION), tmp_path):
            yield
    finally:
        lab.on_each(HOSTS, lambda host: lab.run(host, "postconf", "-PX", *settings))
        lab.on_each(HOSTS, lambda host: lab.run(host, "postfix", "reload"))


@pytest.fixture
def webmail(protected):
    """Dovecot believes the client town for whom it logs in."""
    with configured(WITH_A_WEBMAIL):
        yield


def trusted(host: str) -> set[str]:
    found = {**lab.elements(host, "trusted_ipv4"), **lab.elements(host, "trusted_ipv6")}
    return {element.partition(" . ")[0] for element in found}


def banned(host: str) -> set[str]:
    sets = [f"banned_{role}_{family}" for role in ("postfix", "dovecot") for family in FAMILIES]
    return {element for name in sets for element in lab.elements(host, name)}


@pytest.mark.parametrize("port", PORTS)
@on_both_hosts
def test_login_through_the_proxy_opens_submission_to_the_client_and_not_to_the_proxy(host, proxy, port):
    client, (other,) = CLIENTS[host], set(HOSTS) - {host}
    for front, address in zip(FRONTS[host], ADDRESSES[host]):
        assert lab.client(client, "probe", targets=[[address, 587]]) == ["refused"]
        assert lab.login_then_connect(client, host, front, port=port, to=address) == "open"
        assert lab.client("town", "probe", targets=[[address, 587]]) == ["refused"]
    wait_until(lambda: set(KEYS[client]) <= trusted(other), f"{other} trusts the client as well")
    assert trusted(other) <= {key for keys in KEYS.values() for key in keys}


@on_both_hosts
def test_proxys_connections_are_not_counted(host, proxy):
    for front in FRONTS[host]:
        assert lab.client("cafe", "probe", targets=[[front, 143]] * 12) == ["open"] * 12


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
        done = lab.client("town", "login_then_connect", address=address, protocol="imap")
        assert done["submission"] == "refused"
    assert not set(TOWN) & trusted(host)


@on_both_hosts
def test_login_through_a_dovecot_that_is_a_proxy_is_trusted_there_and_the_proxy_nowhere(host, proxies):
    """The proxy's Dovecot runs no script after the login: its report tells of the client."""
    client, user, (backend,) = CLIENTS[host], PASSED_ON[host], set(HOSTS) - {host}
    for address, key in zip(ADDRESSES[host], KEYS[client]):
        with lab.Session(client, address, user) as session:
            seen = lab.run(backend, "doveadm", "who", user)
            assert ((ADDRESSES[host][0] if not proxies else key.rstrip(":")) in seen) is True, seen
            for one in HOSTS:
                wait_until(lambda one=one, key=key: key in trusted(one), f"{one} trusts {key}", 15)
            assert session.answers()
        for _ in range(6):
            lab.client(client, "login", address=address, user=user)
    for one in HOSTS:
        assert trusted(one) <= {key for keys in KEYS.values() for key in keys}
        assert not banned(one)


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


@on_both_hosts
def test_login_to_postfix_through_the_proxy_is_the_clients(host, proxy_of_postfix):
    """Last in this file: the pillar stays. Nobody but the proxy reaches Postfix, which believes every header."""
    client = CLIENTS[host]
    for front, address, key in zip(FRONTS[host], ADDRESSES[host], KEYS[client]):
        for port in SUBMISSION:
            lab.forget(host)
            lab.client(client, "send", address=front, port=port, subject=f"through {front}")
            wait_until(lambda key=key: key in trusted(host), f"{host} trusts who has sent", 15)
            assert lab.client(client, "probe", targets=[[address, port]]) == ["refused"]
        assert lab.client("bot", "probe", targets=[[front, 587]] * 12) == ["open"] * 12
    assert trusted(host) <= {key for keys in KEYS.values() for key in keys}
    assert not banned(host)
