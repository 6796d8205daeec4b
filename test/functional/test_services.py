"""Single services: in another mode than the rest, on another port, or switched off."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest

from functional.test_modes import ACCESS, PORTS, SUBMISSION, TRUSTED_ONLY
from mailfwlib.settings import LOGIN_SERVICES, MODES
from support.firewall import Firewall
from support.mail import MailServer
from support.net import FAMILIES, LIMIT, Client, Host, Net, until

MOVED = 2587
BURST = 3
#: The services that a mode limits, by the specification.
LIMITED = {"autoban": SUBMISSION | ACCESS, "protected": ACCESS, "private": set(), "public": set()}
ROLE = {name: SUBMISSION if name in SUBMISSION else ACCESS for name in LOGIN_SERVICES}
REJECT = {"banned": "reject", "blocked": "reject", "untrusted": "reject"}


class OtherServer(MailServer):
    """A mail server on one more port."""

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        await asyncio.start_server(self._speak, ["0.0.0.0", "::"], MOVED)
        self._ready.set()
        await self._stopping.wait()


@pytest.fixture(scope="module")
def moved(net: Net) -> Iterator[MailServer]:
    server = OtherServer(net.host)
    yield server
    server.close()


def load(firewall: Firewall, mode: str = "autoban", burst: int = BURST, **pillar: Any) -> str:
    """Load rules whose buckets do not refill; who is refused is told so."""
    pillar = {"protection": {"type": mode}, "reaction": REJECT, **pillar}
    return firewall.load(autoban={"rate": "1/hour", "burst": burst}, **pillar)


def tried(clients: dict[str, tuple[Client, str]], ports: dict[str, int]) -> dict[str, dict[str, str]]:
    """Return what each client finds on each service, all at the same time."""
    probes = {
        who: {name: client.connecting(port, source) for name, port in ports.items()}
        for who, (client, source) in clients.items()
    }
    return {who: {name: probe.result(LIMIT) for name, probe in found.items()} for who, found in probes.items()}


def found_by(refused: set[str]) -> dict[str, str]:
    return {name: "refused" if name in refused else "open" for name in PORTS}


def verdicts(firewall: Firewall, name: str) -> dict[int, str]:
    """Return a verdict map of the kernel: port -> verdict."""
    listed = firewall.nft("list", "map", "inet", "mailfw", name)
    return {int(port): verdict for port, verdict in re.findall(r"(\d+) : (accept|goto \w+)", listed)}


# Another mode


@pytest.mark.parametrize("base", ["autoban", "private"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOGIN_SERVICES)
def test_service_in_another_mode(
    firewall: Firewall, alice: Client, mallory: Client, name: str, mode: str, base: str
) -> None:
    """The service is treated as in that mode, all others as in the base mode; both families at once."""
    firewall.load(protection={"type": base, "services": {name: mode}}, reaction=REJECT, autoban={"burst": 100})
    clients = {}
    for family in FAMILIES:
        clients[f"stranger {family}"] = (alice, alice.addresses(family)[0])
        clients[f"trusted {family}"] = trusted = (alice, alice.addresses(family)[2])
        clients[f"banned {family}"] = banned = (mallory, mallory.addresses(family)[0])
        clients[f"blocked {family}"] = blocked = (mallory, mallory.addresses(family)[2])
        firewall.trust(trusted[1])
        firewall.ban(banned[1])
        firewall.block(blocked[1])
    closed = (TRUSTED_ONLY[base] - {name}) | (TRUSTED_ONLY[mode] & {name})
    limited = (LIMITED[base] - {name}) | (LIMITED[mode] & {name})
    expected = {
        "stranger": found_by(closed),
        "trusted": found_by(set()),
        "banned": found_by(closed | limited),
        "blocked": found_by(SUBMISSION | ACCESS),
    }
    assert tried(clients, PORTS) == {who: expected[who.split()[0]] for who in clients}
    assert firewall.counter("counted") == len(limited) * len(FAMILIES)
    assert verdicts(firewall, "counting").keys() == {PORTS[one] for one in limited}


@pytest.mark.parametrize(("base", "mode"), [("autoban", "protected"), ("protected", "autoban")])
def test_limited_services_of_a_role_share_a_bucket(
    firewall: Firewall, alice: Client, family: str, base: str, mode: str
) -> None:
    """Whatever the mode that limits them, and so the ban of one is a ban of the other."""
    load(firewall, protection={"type": base, "services": {"imap": mode}})
    source = alice.addresses(family)[0]
    ports = [PORTS["imap"], PORTS["imaps"]]
    assert [alice.connect(ports[turn % 2], source) for turn in range(BURST)] == ["open"] * BURST
    assert alice.connect(ports[BURST % 2], source) == "silent"
    assert alice.connect_many(ports, source) == dict.fromkeys(ports, "refused")


def test_open_service_of_a_limited_role(firewall: Firewall, alice: Client, family: str) -> None:
    """It fills no bucket, and no ban closes it."""
    load(firewall, protection={"type": "autoban", "services": {"imap": "public"}})
    source = alice.addresses(family)[0]
    assert [alice.connect(143, source) for _ in range(BURST + 2)] == ["open"] * (BURST + 2)
    assert [alice.connect(993, source) for _ in range(BURST + 1)] == ["open"] * BURST + ["silent"]
    assert alice.connect_many([143, 993], source) == {143: "open", 993: "refused"}


# Another port


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOGIN_SERVICES)
def test_moved_service(
    firewall: Firewall, moved: MailServer, alice: Client, mallory: Client, name: str, mode: str
) -> None:
    """It is guarded as its mode says where it is now, and nothing is where it was; both families at once."""
    load(firewall, mode, burst=100, services={name: {"port": MOVED}})
    clients = {}
    for family in FAMILIES:
        clients[f"stranger {family}"] = (alice, alice.addresses(family)[0])
        clients[f"trusted {family}"] = (alice, alice.addresses(family)[2])
        clients[f"blocked {family}"] = (mallory, mallory.addresses(family)[0])
        firewall.trust(alice.addresses(family)[2])
        firewall.block(mallory.addresses(family)[0])
    expected = {
        "stranger": {**found_by(TRUSTED_ONLY[mode]), "old port": "open"},
        "trusted": {**found_by(set()), "old port": "open"},
        "blocked": {**found_by(SUBMISSION | ACCESS), "old port": "open"},
    }
    ports = {**PORTS, name: MOVED, "old port": PORTS[name]}
    assert tried(clients, ports) == {who: expected[who.split()[0]] for who in clients}

    assert firewall.counter("counted") == len(LIMITED[mode]) * len(FAMILIES)
    assert verdicts(firewall, "counting").keys() == {ports[one] for one in LIMITED[mode]}
    assert verdicts(firewall, "services").keys() == set(ports.values()) - {PORTS[name]}
    for family in FAMILIES:
        trusted_ports = {int(element.split(" . ")[1]) for element in firewall.elements(f"trusted_{family}")}
        assert trusted_ports == {ports[one] for one in LOGIN_SERVICES}


@pytest.mark.parametrize(("exceeded", "other"), [(MOVED, 465), (465, MOVED)])
def test_bans_follow_a_moved_service(
    firewall: Firewall, mail: MailServer, moved: MailServer, alice: Client, family: str, exceeded: int, other: int
) -> None:
    load(firewall, services={"submission": {"port": MOVED}})
    source = alice.addresses(family)[0]
    assert [alice.connect(587, source) for _ in range(2 * BURST)] == ["open"] * 2 * BURST
    assert [alice.connect(other, source)] + [alice.connect(exceeded, source) for _ in range(BURST)] == (
        ["open"] * BURST + ["silent"]
    )
    assert firewall.elements(f"banned_postfix_{family}")
    assert alice.connect_many([MOVED, 465, 587, 993], source) == {
        MOVED: "refused",
        465: "refused",
        587: "open",
        993: "open",
    }
    firewall.trust(source)
    assert alice.connect_many([MOVED, 465], source) == {MOVED: "open", 465: "open"}


def test_blocks_follow_a_moved_service(
    firewall: Firewall, moved: MailServer, mail: MailServer, alice: Client, family: str
) -> None:
    load(firewall, services={"submission": {"port": MOVED}})
    source = alice.addresses(family)[0]
    session, at_the_old_port = alice.open(MOVED, source), alice.open(587, source)
    firewall.block(source)
    session.say()
    until(lambda: session.name not in moved.sessions, "the server's socket is gone")
    assert at_the_old_port.talks()
    session.close()
    at_the_old_port.close()


def test_hold_follows_a_moved_service(firewall: Firewall, moved: MailServer, alice: Client, family: str) -> None:
    load(firewall, "protected", reaction={"untrusted": "hold"}, services={"submission": {"port": MOVED}})
    source = alice.addresses(family)[0]
    connecting = alice.connecting(MOVED, source, patience=10)
    until(lambda: firewall.counter("held"), "the first try gets no answer")
    firewall.trust(source)
    assert connecting.result(LIMIT) == "open"


@pytest.mark.parametrize("mode", ["autoban", "private"])
def test_service_moves_while_the_rules_are_loaded(
    firewall: Firewall, mail: MailServer, moved: MailServer, alice: Client, family: str, mode: str
) -> None:
    """Sessions on both ports go on, trust that was earned is for the old port, and the next login opens the new one."""
    load(firewall, mode)
    stranger, *_, source = alice.addresses(family)
    firewall.trust(source)
    sessions = [alice.open(port, source) for port in (587, MOVED)]
    assert load(firewall, mode, services={"submission": {"port": MOVED}})
    assert [session.talks() for session in sessions * 2] == [True] * 4
    expected = {"autoban": "open", "private": "refused"}[mode]
    assert alice.connect_many([587, MOVED], source) == {587: "open", MOVED: expected}
    firewall.trust(source)
    assert alice.connect(MOVED, source) == "open"
    assert alice.connect_many([587, MOVED], stranger) == {587: "open", MOVED: expected}

    assert load(firewall, mode)
    assert alice.connect_many([587, MOVED], stranger) == {587: expected, MOVED: "open"}
    assert [session.talks() for session in sessions * 2] == [True] * 4
    for session in sessions:
        session.close()


def test_two_services_change_places(firewall: Firewall, alice: Client, family: str) -> None:
    """Each takes its mode along."""
    load(
        firewall,
        protection={"type": "private", "services": {"submission": "public"}},
        services={"submission": {"port": 465}, "submissions": {"port": 587}},
    )
    assert alice.connect_many([465, 587], alice.addresses(family)[0]) == {465: "open", 587: "refused"}


# Switched off


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOGIN_SERVICES)
def test_service_that_is_switched_off(firewall: Firewall, alice: Client, mallory: Client, name: str, mode: str) -> None:
    """Its port is nobody's: open to all, even to a blocked source, and never counted; both families at once."""
    load(firewall, mode, burst=100, services={name: False})
    clients = {}
    for family in FAMILIES:
        clients[f"stranger {family}"] = (alice, alice.addresses(family)[0])
        clients[f"blocked {family}"] = (mallory, mallory.addresses(family)[0])
        firewall.trust(alice.addresses(family)[2])
        firewall.block(mallory.addresses(family)[0])
    expected = {
        "stranger": found_by(TRUSTED_ONLY[mode] - {name}),
        "blocked": found_by((SUBMISSION | ACCESS) - {name}),
    }
    assert tried(clients, PORTS) == {who: expected[who.split()[0]] for who in clients}

    left = [one for one in LOGIN_SERVICES if one != name]
    assert firewall.counter("counted") == len(LIMITED[mode] - {name}) * len(FAMILIES)
    assert verdicts(firewall, "counting").keys() == {PORTS[one] for one in LIMITED[mode] - {name}}
    assert verdicts(firewall, "services").keys() == {PORTS["smtp"], *(PORTS[one] for one in left)}
    for family in FAMILIES:
        trusted_ports = {int(element.split(" . ")[1]) for element in firewall.elements(f"trusted_{family}")}
        assert trusted_ports == {PORTS[one] for one in left}


def test_role_without_services(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, "private", services=dict.fromkeys(SUBMISSION, False))
    assert tried({"stranger": (alice, alice.addresses(family)[0])}, PORTS) == {"stranger": found_by(ACCESS)}


def test_host_without_services(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, "private", services=dict.fromkeys(LOGIN_SERVICES, False))
    assert tried({"stranger": (alice, alice.addresses(family)[0])}, PORTS) == {"stranger": found_by(set())}
    assert load(firewall, "private", services=dict.fromkeys(LOGIN_SERVICES, False)) == ""


def test_session_goes_on_when_its_service_is_switched_off(
    firewall: Firewall, host: Host, alice: Client, family: str
) -> None:
    load(firewall)
    source = alice.addresses(family)[0]
    session = alice.open(110, source)
    load(firewall, services={"pop3": False})
    assert session.talks()
    firewall.block(source)
    assert session.talks()
    session.close()
