"""Connections that are older than the table, those that are not tracked, and the end that an operator makes of some."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mailfwlib import nft, parse, ruleset, sockets
from support.firewall import Firewall
from support.mail import MailServer
from support.net import LIMIT, PATIENCE, Client, Host, Session, greeting, until

BURST = 2
MANY = 3 * BURST
#: A port of a server that listens on one socket for both families, and of one that is no mail service.
DUAL_STACK, OTHER_PORT = 4191, 8143
#: Another program's rules, from which conntrack knows connections before mailfw does.
TRACKING = "table inet other { chain input { type filter hook input priority 0; ct state established accept; }; }"
#: A port for each client's connection that is made again: conntrack knows those of earlier tests.
_own_ports = itertools.count(22000)
UNTRACKED = """
table inet raw {
	chain prerouting { type filter hook prerouting priority raw; notrack; }
	chain output { type filter hook output priority raw; notrack; }
}
"""


def load(firewall: Firewall, mode: str = "autoban", **pillar: Any) -> None:
    """Load rules with small buckets that do not refill; who is refused is told so."""
    reaction = {"banned": "reject", "blocked": "reject", "untrusted": "reject"}
    autoban = {"rate": "1/hour", "burst": BURST}
    firewall.load(protection={"type": mode}, autoban=autoban, **{"reaction": reaction, **pillar})


def connected(client: Client, source: str, port: int, own_port: int = 0, patience: float = LIMIT) -> socket.socket:
    """Return a connection, from a port of the client's choice, on which the server has spoken."""
    server = Host.ipv6 if ":" in source else Host.ipv4

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.settimeout(patience)
        connection.bind((source, own_port))
        connection.connect((server, port))
        assert greeting(connection)
        connection.settimeout(PATIENCE)
        return connection

    return client.call(connect)


def name(connection: socket.socket) -> str:
    """Return what the mail server calls a connection."""
    return "{}:{}".format(*connection.getsockname()[:2])


def abort(connection: socket.socket) -> None:
    """Close a connection with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def go_on(mail: MailServer, sessions: list[Session], speaks_first: str) -> bool:
    """Return whether data gets through on each of some sessions, in both directions."""
    if speaks_first == "server":
        for session in sessions:
            mail.say(session.name)
        if not all(session.hears() for session in sessions):
            return False
    return all(session.talks() for session in sessions * 2)


@pytest.fixture
def dual_stack(host: Host) -> Iterator[None]:
    """A server that greets and echoes, to which IPv4 clients are v4-mapped IPv6 addresses."""
    listener = host.call(socket.create_server, ("::", DUAL_STACK), family=socket.AF_INET6, dualstack_ipv6=True)
    made: list[socket.socket] = []

    def echo(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.sendall(b"hello\r\n")
            while data := connection.recv(1000):
                connection.sendall(data)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                made.append(connection)
                threading.Thread(target=echo, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for connection in made:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def _nothing_is_left_of_earlier_connections(mail: MailServer, host: Host, firewall: Firewall) -> None:
    """Neither the host's sockets nor conntrack know what earlier tests did, for ports of clients come again."""
    host.run("ss", "-HtnK", "state", "connected")
    until(lambda: not mail.sessions, "no session is left")
    host.call(_flush_conntrack)


def _flush_conntrack() -> None:
    """Do what ``conntrack -F`` does, which need not be installed: <linux/netfilter/nfnetlink_conntrack.h>."""
    netfilter, delete, request_and_answer = 12, 1 << 8 | 2, 1 | 4
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netfilter) as kernel:
        kernel.send(struct.pack("IHHIIBBH", 20, delete, request_and_answer, 0, 0, socket.AF_UNSPEC, 0, 0))
        assert struct.unpack_from("i", kernel.recv(1000), 16) == (0,)


# Older than the table


@pytest.mark.parametrize("speaks_first", ["client", "server"])
@pytest.mark.parametrize(("port", "before"), [(143, ""), (587, TRACKING)], ids=["untracked before", "tracked before"])
def test_many_older_sessions_of_one_source(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, port: int, before: str, speaks_first: str
) -> None:
    if before:
        firewall.run(before)
    source = alice.addresses(family)[0]
    sessions = [alice.open(port, source) for _ in range(MANY)]
    load(firewall)
    assert len(firewall.elements(f"older_{family}")) == MANY
    assert go_on(mail, sessions, speaks_first)
    assert firewall.counter("counted") == 0

    # The burst is still there for new ones.
    assert [alice.connect(port, source) for _ in range(BURST + 2)] == ["open"] * BURST + ["silent", "refused"]
    assert firewall.counter("counted") == BURST + 1
    assert go_on(mail, sessions, speaks_first)
    for session in sessions:
        session.close()


@pytest.mark.parametrize("speaks_first", ["client", "server"])
@pytest.mark.parametrize("untrusted", ["hold", "reject"])
@pytest.mark.parametrize("mode", ["protected", "private"])
def test_older_sessions_to_ports_that_are_closed(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, mode: str, untrusted: str, speaks_first: str
) -> None:
    source = alice.addresses(family)[0]
    sessions = [alice.open(port, source) for port in (587, 465, 993, 143)]
    load(firewall, mode, reaction={"untrusted": untrusted})
    assert go_on(mail, sessions, speaks_first)
    assert counters(firewall, "counted", "held", "untrusted") == {"counted": 0, "held": 0, "untrusted": 0}
    assert alice.connect(587, source, 0.2) == {"reject": "refused"}.get(untrusted, "silent")
    for session in sessions:
        session.close()


def counters(firewall: Firewall, *names: str) -> dict[str, int]:
    return {each: firewall.counter(each) for each in names}


@pytest.mark.parametrize("speaks_first", ["client", "server"])
@pytest.mark.parametrize("removal", ["flush ruleset", "delete table inet mailfw"])
def test_table_that_comes_back(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, removal: str, speaks_first: str
) -> None:
    source = alice.addresses(family)[0]
    load(firewall)
    sessions = [alice.open(143, source) for _ in range(BURST)]
    firewall.run(removal)
    sessions += [alice.open(143, source) for _ in range(MANY - BURST)]
    load(firewall)
    assert go_on(mail, sessions, speaks_first)
    assert firewall.counter("counted") == 0
    assert [alice.connect(143, source) for _ in range(BURST + 1)] == ["open"] * BURST + ["silent"]
    for session in sessions:
        session.close()


def test_rules_that_are_loaded_again_know_no_more_older_ones(firewall: Firewall, alice: Client, family: str) -> None:
    """Those that were opened under the table have been counted when they were opened."""
    source = alice.addresses(family)[0]
    load(firewall)
    session = alice.open(143, source)
    load(firewall, "protected")
    assert firewall.elements(f"older_{family}") == {}
    assert session.talks()
    session.close()


@pytest.mark.parametrize("before", ["", TRACKING], ids=["untracked before", "tracked before"])
def test_source_port_of_an_older_session_is_counted_when_used_again(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, before: str
) -> None:
    if before:
        firewall.run(before)
    source, own_port = alice.addresses(family)[0], next(_own_ports)
    connection = connected(alice, source, 143, own_port)
    load(firewall)
    connection.sendall(b"noop\r\n")
    assert connection.recv(100)
    assert firewall.counter("counted") == 0
    for count in range(BURST):
        abort(connection)
        connection = connected(alice, source, 143, own_port)
        assert firewall.counter("counted") == count + 1
    abort(connection)
    with pytest.raises(TimeoutError):
        connected(alice, source, 143, own_port, PATIENCE)
    assert len(firewall.elements(f"banned_dovecot_{family}")) == 1


@pytest.mark.parametrize("mode", ["autoban", "private"])
def test_older_session_whose_tuple_conntrack_knows_from_an_earlier_one(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, mode: str
) -> None:
    """The earlier one has ended under the table, and the table was away when the older session began."""
    source, own_port = alice.addresses(family)[0], next(_own_ports)
    load(firewall)
    earlier = connected(alice, source, 993, own_port)
    mail._loop.call_soon_threadsafe(mail.sessions[name(earlier)].close)
    assert earlier.recv(100) == b""
    earlier.close()
    firewall.run("flush ruleset")
    connection = connected(alice, source, 993, own_port)
    load(firewall, mode)
    assert [talks(connection), talks(connection)] == [True, True]
    connection.close()


ENDS = "a FIN or RST that is the first packet of an older session is not taken for one of that session"


@pytest.mark.parametrize("how", [socket.socket.close, abort])
@pytest.mark.parametrize("mode", ["autoban", "private"])
def test_older_session_that_its_client_ends(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, mode: str, how: Any
) -> None:
    connection = connected(alice, alice.addresses(family)[0], 993)
    ended = name(connection)
    load(firewall, mode)
    how(connection)
    until(lambda: ended not in mail.sessions, "the server knows that it has ended")


def test_older_sessions_that_the_server_ends(firewall: Firewall, mail: MailServer, alice: Client, family: str) -> None:
    """Such as those of a Dovecot that is restarted: nobody is banned for that."""
    source = alice.addresses(family)[0]
    connections = [connected(alice, source, 143) for _ in range(MANY)]
    load(firewall)
    for connection in connections:
        mail._loop.call_soon_threadsafe(mail.sessions[name(connection)].close)
    try:
        assert [connection.recv(100) for connection in connections] == [b""] * MANY
        assert firewall.counter("counted") == 0
        assert not firewall.elements(f"banned_dovecot_{family}")
    finally:
        for connection in connections:
            connection.close()


@pytest.fixture
def other_server(host: Host) -> Iterator[None]:
    with host.call(socket.create_server, ("0.0.0.0", OTHER_PORT)):
        yield


def test_only_sessions_to_limited_ports_are_recorded(
    firewall: Firewall, mail: MailServer, alice: Client, other_server: None
) -> None:
    source = alice.ipv4[0]
    other = alice.call(socket.create_connection, (Host.ipv4, OTHER_PORT), PATIENCE, (source, 0))
    sessions = {port: alice.open(port, source) for port in (25, 587, 143, 993)}
    own_ports = {port: session.name.rpartition(":")[2] for port, session in sessions.items()}
    load(firewall, "protected")
    assert firewall.elements("older_ipv4").keys() == {f"{source} . {own_ports[port]} . {port}" for port in (143, 993)}
    assert firewall.elements("older_ipv6") == {}
    other.close()
    for session in sessions.values():
        session.close()


def test_client_of_a_listener_for_both_families_is_recorded_as_what_it_is(
    firewall: Firewall, alice: Client, family: str, dual_stack: None
) -> None:
    source = alice.addresses(family)[0]
    connections = [connected(alice, source, DUAL_STACK) for _ in range(MANY)]
    load(firewall, services={"sieve": {"port": DUAL_STACK}})
    own_ports = [connection.getsockname()[1] for connection in connections]
    found = {f"older_{each}": set(firewall.elements(f"older_{each}")) for each in ("ipv4", "ipv6")}
    expected = {f"{source} . {own_port} . {DUAL_STACK}" for own_port in own_ports}
    assert found == {"older_ipv4": set(), "older_ipv6": set(), f"older_{family}": expected}
    for connection in connections:
        connection.sendall(b"echo")
        assert connection.recv(100) == b"echo"
        connection.close()
    assert firewall.counter("counted") == 0


@pytest.mark.parametrize("mode", ["autoban", "protected"])
@pytest.mark.parametrize("before", ["", TRACKING], ids=["untracked before", "tracked before"])
def test_older_session_of_a_banned_source_goes_on(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, before: str, mode: str
) -> None:
    """An office whose sessions are idle at the first load may be banned when they speak again."""
    if before:
        firewall.run(before)
    source = alice.addresses(family)[0]
    session = alice.open(143, source)
    load(firewall, mode)
    firewall.ban(source)
    assert [session.talks(), session.talks()] == [True, True]
    assert alice.connect(143, source) == "refused"
    session.close()


# Not tracked


def test_limited_ports_serve_untracked_connections(firewall: Firewall, alice: Client, family: str) -> None:
    """They cannot be told apart, so they are not counted."""
    firewall.run(UNTRACKED)
    load(firewall)
    source = alice.addresses(family)[0]
    sessions = [alice.open(143, source) for _ in range(MANY)]
    assert [session.talks() for session in sessions * 2] == [True] * 2 * MANY
    assert counters(firewall, "counted", "over_rate") == {"counted": 0, "over_rate": 0}
    assert not firewall.elements(f"banned_dovecot_{family}")
    for session in sessions:
        session.close()


@pytest.mark.parametrize("untrusted", ["hold", "reject", "drop"])
@pytest.mark.parametrize("mode", ["protected", "private"])
def test_closed_ports_serve_untracked_connections_of_trusted_sources_only(
    firewall: Firewall, mail: MailServer, alice: Client, mallory: Client, family: str, mode: str, untrusted: str
) -> None:
    firewall.run(UNTRACKED)
    source, *_, other = alice.addresses(family)
    load(firewall, mode, reaction={"untrusted": untrusted}, trusted={f"networks_{family}": [other]})
    firewall.trust(source)
    for each in (source, other):
        session = alice.open(587, each)
        assert go_on(mail, [session], "client")
        assert go_on(mail, [session], "server")
        session.close()
        until(lambda session=session: session.name not in mail.sessions, "the server knows that it has ended")
    stranger = mallory.addresses(family)[0]
    assert mallory.connect(587, stranger, 0.2) == {"reject": "refused"}.get(untrusted, "silent")
    assert firewall.counter("untrusted") + firewall.counter("held") == 1


def test_untracked_session_outlives_its_trust(firewall: Firewall, alice: Client, family: str) -> None:
    """As a tracked one does."""
    firewall.run(UNTRACKED)
    load(firewall, "private")
    source = alice.addresses(family)[0]
    firewall.trust(source)
    session = alice.open(587, source)
    firewall.untrust(source)
    assert [session.talks(), session.talks()] == [True, True]
    assert alice.connect(587, source) == "refused"
    session.close()


@pytest.mark.parametrize("mode", ["autoban", "private"])
def test_block_ends_untracked_sessions_too(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, mode: str
) -> None:
    firewall.run(UNTRACKED)
    load(firewall, mode)
    source = alice.addresses(family)[0]
    firewall.trust(source)
    session = alice.open(993, source)
    firewall.block(source)
    session.say()
    until(lambda: session.name not in mail.sessions, "the server's socket is gone")
    assert alice.connect(993, source) == "refused"
    session.close()


# The end that an operator makes


def was_reset(connection: socket.socket) -> bool:
    """Return whether the client is told, within its patience, that its connection has ended."""
    try:
        assert not connection.recv(100)
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return False


def talks(connection: socket.socket) -> bool:
    connection.sendall(b"noop\r\n")
    return bool(connection.recv(100))


def network(source: str) -> parse.Network:
    return parse.network(source)


@pytest.mark.parametrize("rules", ["none", "limited", "blocked"])
def test_end_of_an_idle_session(
    firewall: Firewall, mail: MailServer, host: Host, alice: Client, mallory: Client, family: str, rules: str
) -> None:
    source, *_, neighbour = alice.addresses(family)
    others = [
        connected(alice, source, 587),
        connected(alice, neighbour, 143),
        connected(mallory, mallory.addresses(family)[0], 143),
        connected(alice, alice.addresses({"ipv4": "ipv6", "ipv6": "ipv4"}[family])[0], 143),
    ]
    ended = [connected(alice, source, port) for port in (143, 993, 143)]
    names = [name(connection) for connection in ended]
    if rules != "none":
        load(firewall)
    if rules == "blocked":
        firewall.block(source)
    assert host.call(sockets.end, network(source), [143, 993]) == len(ended)
    assert [was_reset(connection) for connection in ended] == [True] * len(ended)
    until(lambda: not mail.sessions.keys() & names, "the server's sessions are gone")
    if rules == "blocked":  # a blocked source's other session would end by its next packet
        firewall.unblock(source)
    assert [talks(connection) for connection in others] == [True] * len(others)
    assert host.call(sockets.end, network(source), [143, 993]) == 0
    for connection in ended + others:
        connection.close()


def test_connections_that_are_over_are_not_counted(host: Host, mail: MailServer, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    connection = connected(alice, source, 143)
    over = mail.sessions[name(connection)]
    mail._loop.call_soon_threadsafe(over.close)
    assert connection.recv(100) == b""
    connection.close()
    until(lambda: "TIME-WAIT" in host.run("ss", "-Htan", "sport = :143").stdout, "over")
    assert host.call(sockets.end, network(source), [143]) == 0


@pytest.mark.parametrize("prefix", [{"ipv4": 24, "ipv6": 64}, {"ipv4": 29, "ipv6": 48}])
def test_end_of_the_sessions_of_a_network(
    mail: MailServer, host: Host, alice: Client, mallory: Client, family: str, prefix: dict[str, int]
) -> None:
    connections = [connected(alice, source, 143) for source in alice.addresses(family)]
    stranger = connected(mallory, mallory.addresses(family)[0], 143)
    inside = parse.network(str(network(connections[0].getsockname()[0]).supernet(new_prefix=prefix[family])))
    expected = [parse.address(connection.getsockname()[0]) in inside for connection in connections]
    assert expected.count(True) >= 2
    assert host.call(sockets.end, inside, [143]) == expected.count(True)
    assert [was_reset(connection) for connection in connections] == expected
    assert talks(stranger)
    for connection in [*connections, stranger]:
        connection.close()


def test_end_spares_some(mail: MailServer, host: Host, alice: Client, family: str) -> None:
    connections = [connected(alice, source, 143) for source in alice.addresses(family)]
    inside = network(connections[0].getsockname()[0]).supernet(new_prefix={"ipv4": 24, "ipv6": 48}[family])
    spared = [str(network(connections[1].getsockname()[0])), "192.0.2.0/24", "2001:db8:ffff::/48"]
    assert host.call(sockets.end, inside, [143, 587], spared) == 2
    assert [was_reset(connection) for connection in connections] == [True, False, True]
    assert talks(connections[1])
    for connection in connections:
        connection.close()


def test_end_of_a_session_with_a_listener_for_both_families(
    host: Host, alice: Client, mallory: Client, family: str, dual_stack: None
) -> None:
    source, *_, other = alice.addresses(family)
    ended = [connected(alice, source, DUAL_STACK) for _ in range(2)]
    others = [connected(alice, other, DUAL_STACK), connected(mallory, mallory.addresses(family)[0], DUAL_STACK)]
    assert host.call(sockets.end, network(source), [143, DUAL_STACK]) == 2
    assert [was_reset(connection) for connection in ended] == [True] * 2
    assert [talks(connection) for connection in others] == [True] * 2
    spared = [str(network(other))]
    everybody = parse.network({"ipv4": "0.0.0.0/0", "ipv6": "::/0"}[family])
    assert host.call(sockets.end, everybody, [DUAL_STACK], spared) == 1
    assert [was_reset(connection) for connection in others] == [False, True]
    assert talks(others[0])
    for connection in ended + others:
        connection.close()


def test_end_does_not_end_the_listeners(host: Host, mail: MailServer, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    everybody = parse.network({"ipv4": "0.0.0.0/0", "ipv6": "::/0"}[family])
    connection = connected(alice, source, 143)
    host.call(sockets.end, everybody, [143])
    assert was_reset(connection)
    connection.close()
    assert alice.connect(143, source) == "open"
    assert 143 in host.call(sockets.listening)


def test_older_sessions_of_unreadable_sockets_go_on(
    firewall: Firewall, mail: MailServer, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules are loaded although ss fails; then older sessions count as new ones, and a log line says so."""

    def fail(*_: Any) -> list[Any]:
        raise sockets.SocketsError("ss: not installed")

    session = alice.open(143, alice.ipv4[0])
    warnings: list[str] = []
    monkeypatch.setattr(sockets, "connections", fail)
    monkeypatch.setattr(ruleset.log, "warning", lambda text, *values: warnings.append(text % values))
    load(firewall)
    assert [text.rpartition(": ss:")[2] for text in warnings] == [" not installed"]
    assert session.talks()
    assert nft.TABLE in firewall.nft("list", "tables")
    assert firewall.counter("counted") == 1
    session.close()
