"""Limited ports: a source above the rate is banned from the ports of the role, and nobody else ever is."""

from __future__ import annotations

import socket
import struct
import time
from typing import Any

import pytest

from support import forge
from support.firewall import Firewall
from support.mail import MailServer
from support.net import PATIENCE, Client, Host, Net, greeting, until

ROLE_PORTS = {"postfix": [587, 465], "dovecot": [143, 993, 110, 995, 4190]}
OTHER = {"postfix": "dovecot", "dovecot": "postfix"}
BURST = 4
REJECT = {"banned": "reject"}


def load(firewall: Firewall, autoban: dict[str, Any] | None = None, **pillar: Any) -> None:
    """Load limited ports with a bucket of four connections that fills slowly; a banned source is told so."""
    autoban = {"rate": "1/minute", "burst": BURST, **(autoban or {})}
    firewall.load(autoban=autoban, **{"reaction": REJECT, **pillar})


def exceed(client: Client, source: str, port: int = 143, burst: int = BURST) -> None:
    """Connect until the source is banned."""
    results = [client.connect(port, source) for _ in range(burst + 1)]
    assert results == ["open"] * burst + ["silent"]


@pytest.mark.parametrize("role", ROLE_PORTS)
def test_source_above_the_rate_is_banned_from_the_role(
    firewall: Firewall, alice: Client, family: str, role: str
) -> None:
    load(firewall)
    source, *_, stranger = alice.addresses(family)
    ports = ROLE_PORTS[role]
    spread = [ports[turn % len(ports)] for turn in range(BURST)]
    assert [alice.connect(port, source) for port in spread] == ["open"] * BURST
    assert not firewall.elements(f"banned_{role}_{family}")

    # The server's answer to the one connection too many is swallowed, and its socket is reset.
    assert alice.connect(ports[0], source) == "silent"
    assert len(firewall.elements(f"banned_{role}_{family}")) == 1
    assert firewall.counter("over_rate") == 1
    assert alice.connect_many(ports, source) == dict.fromkeys(ports, "refused")

    others = [25, *ROLE_PORTS[OTHER[role]]]
    assert [alice.connect(port, source) for port in others[: BURST + 1]] == ["open"] * len(others[: BURST + 1])
    assert [alice.connect(ports[0], stranger) for _ in range(BURST)] == ["open"] * BURST


def test_banned_source_gets_no_answer_by_default(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, reaction={})
    source = alice.addresses(family)[0]
    exceed(alice, source)
    assert alice.connect(143, source) == "silent"
    assert firewall.counter("banned") >= 1


def test_mail_between_servers_is_never_counted(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall)
    source = alice.addresses(family)[0]
    assert [alice.connect(25, source) for _ in range(3 * BURST)] == ["open"] * 3 * BURST
    assert firewall.counter("counted") == 0


def test_ipv6_source_is_a_prefix(firewall: Firewall, alice: Client) -> None:
    load(firewall)
    source, neighbour, stranger = alice.ipv6
    turns = [source, neighbour] * (BURST // 2)
    assert [alice.connect(143, turn) for turn in turns] == ["open"] * BURST
    assert alice.connect(143, neighbour) == "silent"
    assert list(firewall.elements("banned_dovecot_ipv6")) == ["2001:db8:a::"]
    assert alice.connect(143, source) == "refused"
    assert alice.connect(143, stranger) == "open"


def test_ipv6_source_can_be_one_address(firewall: Firewall, alice: Client) -> None:
    load(firewall, {"ipv6_prefix": 128})
    source, neighbour, _ = alice.ipv6
    exceed(alice, source)
    assert alice.connect(143, source) == "refused"
    assert alice.connect(143, neighbour) == "open"


def test_ban_ends_after_the_period(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, {"rate": "60/minute", "period": "2s"})
    source = alice.addresses(family)[0]
    began = time.monotonic()
    until(lambda: alice.connect(143, source, 0.1) == "refused", "banned")
    until(lambda: alice.connect(143, source) == "open", "open again")
    assert time.monotonic() - began > 1.9, "but for a jiffy"


def test_source_below_the_rate_is_never_banned(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, {"rate": "300/minute", "burst": 1})
    source = alice.addresses(family)[0]
    for _ in range(6):
        assert alice.connect(143, source) == "open"
        time.sleep(0.25)  # the client's pace: a fifth of a second earns one connection
    until(lambda: alice.connect(143, source) == "silent", "above the rate")


def test_session_under_way_goes_on_while_its_source_is_banned(
    firewall: Firewall, mail: MailServer, alice: Client, family: str
) -> None:
    load(firewall)
    source = alice.addresses(family)[0]
    session = alice.open(143, source)
    exceed(alice, source, burst=BURST - 1)
    assert session.talks()
    assert alice.connect(143, source) == "refused"
    assert session.talks()
    session.close()


def test_login_lifts_the_ban(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall)
    source = alice.addresses(family)[0]
    exceed(alice, source, 143)
    exceed(alice, source, 587)
    firewall.trust(source)
    assert not firewall.elements(f"banned_dovecot_{family}")
    assert not firewall.elements(f"banned_postfix_{family}")
    for port in (143, 587):
        assert [alice.connect(port, source) for _ in range(3 * BURST)] == ["open"] * 3 * BURST


@pytest.mark.parametrize("kind", ["earned", "network", "exempt"])
def test_who_is_not_counted(firewall: Firewall, alice: Client, family: str, kind: str) -> None:
    source, *_, stranger = alice.addresses(family)
    lists = {f"networks_{family}": [source]}
    load(firewall, trusted=lists if kind == "network" else {}, exempt=lists if kind == "exempt" else {})
    if kind == "earned":
        firewall.trust(source)
    assert [alice.connect(143, source) for _ in range(3 * BURST)] == ["open"] * 3 * BURST
    assert firewall.counter("counted") == 0
    exceed(alice, stranger)


def test_exempt_source_can_be_banned_by_an_operator(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall, exempt={f"networks_{family}": [source]})
    firewall.ban(source)
    assert alice.connect(143, source) == "refused"


def test_exempt_opens_nothing(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    load(
        firewall,
        protection={"type": "protected"},
        exempt={f"networks_{family}": [source]},
        reaction={"untrusted": "reject"},
    )
    assert alice.connect_many([587, 465], source) == {587: "refused", 465: "refused"}


def test_protected_mode_counts_dovecot_only(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, protection={"type": "protected"})
    source = alice.addresses(family)[0]
    exceed(alice, source, 993)
    assert alice.connect(4190, source) == "refused"


@pytest.mark.parametrize("mode", ["private", "public"])
def test_other_modes_count_nobody(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall, protection={"type": mode})
    firewall.trust(source)
    assert [alice.connect(143, source) for _ in range(3 * BURST)] == ["open"] * 3 * BURST
    assert firewall.counter("counted") == 0


@pytest.mark.parametrize("speaks_first", ["client", "server"])
@pytest.mark.parametrize("kind", ["earned", "network", "exempt"])
def test_sessions_older_than_the_table_are_not_counted_either(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, kind: str, speaks_first: str
) -> None:
    """An office has many sessions open while the rules are loaded for the first time."""
    source = alice.addresses(family)[0]
    sessions = [alice.open(143, source) for _ in range(2 * BURST)]
    lists = {f"networks_{family}": [source]}
    load(firewall, trusted=lists if kind == "network" else {}, exempt=lists if kind == "exempt" else {})
    if kind == "earned":
        firewall.trust(source)
    if speaks_first == "server":
        for session in sessions:
            mail.say(session.name)
            assert session.hears()
    assert [session.talks() for session in sessions * 2] == [True] * 4 * BURST
    assert firewall.counter("counted") == 0
    for session in sessions:
        session.close()


def connect_from_port(client: Client, source: str, port: int) -> socket.socket:
    """Return a connection from a port that may have been used before."""

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.settimeout(PATIENCE)
        connection.bind((source, port))
        connection.connect((Host.ipv6 if ":" in source else Host.ipv4, 143))
        return connection

    return client.call(connect)


def test_source_port_used_again_is_counted_again(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall)
    source = alice.addresses(family)[0]
    for _ in range(BURST):
        with connect_from_port(alice, source, 20000) as connection:
            assert greeting(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # end with a reset
    with connect_from_port(alice, source, 20000) as connection, pytest.raises(TimeoutError):
        greeting(connection)
    assert alice.connect(143, source) == "refused"


def test_source_port_used_again_after_a_login_is_not_counted(firewall: Firewall, alice: Client, family: str) -> None:
    """Conntrack still knows the connection that was one too many, and that it had to be counted."""
    load(firewall)
    source = alice.addresses(family)[0]
    assert [alice.connect(143, source) for _ in range(BURST)] == ["open"] * BURST
    with connect_from_port(alice, source, 20001) as connection, pytest.raises(TimeoutError):
        greeting(connection)
    counted = firewall.counter("counted")
    firewall.trust(source)
    with connect_from_port(alice, source, 20001) as connection:
        assert greeting(connection)
    assert firewall.counter("counted") == counted


def test_whole_networks_can_be_counted(firewall: Firewall, alice: Client, mallory: Client, family: str) -> None:
    load(firewall, {"networks": {"rate": "6/minute"}})
    first, second, third = alice.addresses(family)
    turns = [first, third, second] * 2
    assert [alice.connect(143, turn) for turn in turns] == ["open"] * 6
    assert alice.connect(143, third) == "silent"
    assert alice.connect(143, first) == "refused"
    assert mallory.connect(143, mallory.addresses(family)[0]) == "open"
    firewall.trust(first)
    assert alice.connect(143, first) == "open"


@pytest.mark.parametrize("port", [143, 587])
def test_forged_packets_count_nobody(firewall: Firewall, net: Net, alice: Client, family: str, port: int) -> None:
    """One forged address belongs to a bystander, whose kernel resets what it did not open; the other to nobody."""
    load(firewall)
    bystander = alice.addresses(family)[0]
    absent = {"ipv4": "198.51.100.99", "ipv6": "2001:db8:a:9::99"}[family]
    kind = socket.AF_INET6 if family == "ipv6" else socket.AF_INET
    for address in (bystander, absent):
        assert net.mallory.call(forge.send, forge.attempts(address, port, 250), kind) == 1000
    until(lambda: firewall.counter("opened") >= 400, "the forged packets arrive")
    assert firewall.counter("counted") == 0
    for role in ROLE_PORTS:
        assert not firewall.elements(f"banned_{role}_{family}")
        assert not firewall.elements(f"rate_{role}_{family}")
    assert [alice.connect(port, bystander) for _ in range(BURST)] == ["open"] * BURST


@pytest.mark.parametrize("flags", [0, forge.FIN, forge.RST, forge.SYN | forge.ACK, forge.SYN | forge.FIN])
def test_packets_of_no_connection_are_dropped(
    firewall: Firewall, net: Net, alice: Client, family: str, flags: int
) -> None:
    load(firewall)
    source = alice.addresses(family)[0]
    kind = socket.AF_INET6 if family == "ipv6" else socket.AF_INET
    packets = [
        forge.packet(source, 143, flags, port, 0) for port in range(1000, 1010)
    ]  # forged attempts come from above
    net.mallory.call(forge.send, packets, kind)
    # Somebody's connection of a test before may still be ending.
    until(lambda: firewall.counter("reopened") >= len(packets), "all are dropped")
    assert firewall.counter("counted") == 0
