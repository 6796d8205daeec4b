"""Who may connect to which service in each mode: the table of the specification, tried with packets."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given, settings

from mailfwlib import nft, ruleset
from mailfwlib.settings import MODES, SERVICES, resolve
from support.firewall import Firewall, render
from support.mail import MailServer
from support.net import LIMIT, PATIENCE, Client, Host
from unit.rendering import pillars

FAMILY = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
PORTS = {name: service.port for name, service in SERVICES.items()}
SUBMISSION = {"submission", "submissions"}
ACCESS = {"imap", "imaps", "pop3", "pop3s", "sieve"}
#: The services that a mode opens to trusted sources only.
TRUSTED_ONLY = {"autoban": set(), "protected": SUBMISSION, "private": SUBMISSION | ACCESS, "public": set()}
REJECT = {"untrusted": "reject"}


def tried(client: Client, source: str) -> dict[str, str]:
    """Return what a client finds on each service."""
    found = client.connect_many(list(PORTS.values()), source)
    return {name: found[port] for name, port in PORTS.items()}


def expected(closed: set[str], answer: str = "refused") -> dict[str, str]:
    return {name: answer if name in closed else "open" for name in PORTS}


@pytest.mark.parametrize("mode", MODES)
def test_untrusted_source(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    firewall.load(protection={"type": mode}, reaction=REJECT)
    assert tried(alice, alice.addresses(family)[0]) == expected(TRUSTED_ONLY[mode])


@pytest.mark.parametrize("mode", MODES)
def test_trusted_source(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    firewall.load(protection={"type": mode}, reaction=REJECT)
    firewall.trust(alice.addresses(family)[0])
    assert tried(alice, alice.addresses(family)[0]) == expected(set())


@pytest.mark.parametrize("mode", MODES)
def test_source_in_a_trusted_network(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    source = alice.addresses(family)[0]
    firewall.load(protection={"type": mode}, reaction=REJECT, trusted={f"networks_{family}": [source]})
    assert tried(alice, source) == expected(set())


@pytest.mark.parametrize("mode", ["protected", "private"])
def test_trust_is_for_one_source(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    trusted, *_, stranger = alice.addresses(family)
    firewall.load(protection={"type": mode}, reaction=REJECT)
    firewall.trust(trusted)
    assert tried(alice, stranger) == expected(TRUSTED_ONLY[mode])


def test_trust_is_for_one_port(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    firewall.load(protection={"type": "private"}, reaction=REJECT)
    firewall.trust(source, ports=[PORTS["imaps"]])
    assert tried(alice, source) == expected((SUBMISSION | ACCESS) - {"imaps"})


def test_trusted_ipv6_source_is_its_prefix(firewall: Firewall, alice: Client) -> None:
    source, neighbour, stranger = alice.ipv6
    firewall.load(protection={"type": "private"}, reaction=REJECT)
    firewall.trust(source)
    assert alice.connect(587, neighbour) == "open"
    assert alice.connect(587, stranger) == "refused"


def test_trusted_ipv6_source_can_be_one_address(firewall: Firewall, alice: Client) -> None:
    source, neighbour, _ = alice.ipv6
    firewall.load(protection={"type": "private"}, reaction=REJECT, trusted={"ipv6_prefix": 128})
    firewall.trust(source)
    assert alice.connect(587, source) == "open"
    assert alice.connect(587, neighbour) == "refused"


@pytest.mark.parametrize("reaction", ["drop", "hold"])
def test_reactions_that_do_not_answer(firewall: Firewall, alice: Client, family: str, reaction: str) -> None:
    firewall.load(protection={"type": "protected"}, reaction={"untrusted": reaction})
    assert tried(alice, alice.addresses(family)[0]) == expected(SUBMISSION, "silent")


@pytest.mark.parametrize(("role", "closed"), [("postfix", SUBMISSION), ("dovecot", ACCESS)])
def test_host_with_one_role(firewall: Firewall, alice: Client, family: str, role: str, closed: set[str]) -> None:
    firewall.load(roles=[role], protection={"type": "private"}, reaction=REJECT)
    assert tried(alice, alice.addresses(family)[0]) == expected(closed)


@pytest.mark.parametrize("port", [25, 587, 993])
def test_outgoing_connections_are_left_alone(
    firewall: Firewall, host: Host, alice: Client, family: str, port: int
) -> None:
    address = alice.addresses(family)[0]
    firewall.load(protection={"type": "private"}, reaction=REJECT)
    with alice.call(socket.create_server, (address, port), family=FAMILY[family]):
        host.call(socket.create_connection, (address, port), PATIENCE).close()


def test_other_ports_are_left_alone(firewall: Firewall, host: Host, alice: Client, family: str) -> None:
    address = getattr(host, family)
    firewall.load(protection={"type": "private"}, reaction=REJECT)
    with host.call(socket.create_server, (address, 8080), family=FAMILY[family]):
        alice.call(socket.create_connection, (address, 8080), PATIENCE).close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", Host.ipv4, Host.ipv6])
def test_host_itself_is_left_alone(firewall: Firewall, host: Host, mail: MailServer, address: str) -> None:
    firewall.load(protection={"type": "private"}, reaction=REJECT)
    with host.call(socket.create_connection, (address, 587), LIMIT) as connection:
        assert connection.recv(100)


@given(pillar=pillars)
@settings(max_examples=60, deadline=None)
def test_rules_of_every_pillar_load(pillar: dict[str, Any]) -> None:
    """And those of any other can take their place."""
    script = render(resolve(pillar))
    found = ruleset.wanted(script)
    assert {("chain", "input"), ("chain", "output"), ("map", "services")} <= found.keys()
    default = render(resolve({}))
    there = ruleset.wanted(default)
    change = ruleset.transaction(there, found, script, "")
    changed = nft.in_scratch_namespace(default, "-f - <<'END'\n" + change + "\nEND", "-s list table inet mailfw")
    assert ruleset.difference(ruleset._objects(changed), found) == ""
