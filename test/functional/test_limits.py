"""Full sets: what does not fit is neither let in nor shut out by that, and those inside notice nothing."""

from __future__ import annotations

import itertools
import socket
from typing import Any, Callable

import pytest

from mailfwlib import elements, nft, parse, sockets
from support.firewall import Firewall
from support.net import PATIENCE, Client, Host, until

PORT = 143
PORTS = 7  # a login trusts so many
BURST = 4
#: Sources that do not fit share the bucket of this many.
CROWD = 10
BASE = {"ipv4": "10.9.0.0", "ipv6": "2001:db8:9::"}


def load(firewall: Firewall, mode: str = "autoban", networks: Any = False, burst: int = BURST, **sizes: int) -> str:
    """Load rules with small sets and buckets that do not refill; who is refused is told so."""
    return firewall.load(
        protection={"type": mode},
        autoban={"rate": "1/hour", "burst": burst, "networks": networks},
        reaction={"banned": "reject", "blocked": "reject", "untrusted": "reject"},
        sizes=sizes,
    )


def stuffing(family: str, count: int) -> list[str]:
    """Return sources that nobody has."""
    step = {"ipv4": 1, "ipv6": 1 << 64}[family]
    return [str(parse.address(BASE[family]) + number * step) for number in range(count)]


def stuff(firewall: Firewall, name: str, count: int, port: int = 0) -> None:
    """Add elements of nobody to a set, which is full then."""
    values = [value + (f" . {port}" if port else "") for value in stuffing(name.rpartition("_")[2], count)]
    firewall.run(f"add element inet mailfw {name} {{ {', '.join(values)} }}")
    with pytest.raises(nft.NftError) as raised:
        firewall.run(f"add element inet mailfw {name} {{ {one_more(name, port)} }}")
    assert raised.value.full


def one_more(name: str, port: int = 0) -> str:
    return str(parse.address(BASE[name.rpartition("_")[2]]) - 1) + (f" . {port}" if port else "")


def empty(firewall: Firewall, name: str, count: int) -> None:
    """Remove the elements of nobody, as if their time were over."""
    firewall.run(f"delete element inet mailfw {name} {{ {', '.join(stuffing(name.rpartition('_')[2], count))} }}")


def connect(client: Client, source: str, times: int, port: int = PORT) -> list[str]:
    """Connect some times, one after the other."""
    return [client.connect(port, source) for _ in range(times)]


def newcomers(alice: Client, mallory: Client, family: str) -> list[tuple[Client, str]]:
    """Return three sources that are not alice's first one."""
    return [
        (alice, alice.addresses(family)[2]),
        (mallory, mallory.addresses(family)[0]),
        (mallory, mallory.addresses(family)[2]),
    ]


# The meter of sources


def test_sources_that_do_not_fit_share_one_limit(
    firewall: Firewall, alice: Client, mallory: Client, family: str
) -> None:
    load(firewall, burst=2, rates=3)
    stuff(firewall, f"rate_dovecot_{family}", 3)
    turns = itertools.cycle(newcomers(alice, mallory, family))
    served = [client.connect(PORT, source) for client, source in itertools.islice(turns, CROWD * 2)]
    assert served == ["open"] * CROWD * 2
    assert firewall.counter("meter_full") == CROWD * 2
    assert firewall.counter("over_common_rate") == 0

    refused = [client.connecting(PORT, source) for client, source in itertools.islice(turns, 6)]
    assert [each.result() for each in refused] == ["silent"] * 6
    assert firewall.counter("over_common_rate") == 6
    assert firewall.counter("meter_full") == CROWD * 2 + 6
    assert firewall.counter("over_rate") == 0
    assert not firewall.elements(f"banned_dovecot_{family}")

    # The other role has a meter of its own.
    assert [client.connect(587, source) for client, source in itertools.islice(turns, 3)] == ["open"] * 3


def test_source_above_the_common_limit_leaves_no_socket(
    firewall: Firewall, host: Host, alice: Client, family: str
) -> None:
    load(firewall, burst=1, rates=2)
    stuff(firewall, f"rate_dovecot_{family}", 2)
    source = alice.addresses(family)[0]
    assert connect(alice, source, CROWD) == ["open"] * CROWD
    server = Host.ipv6 if family == "ipv6" else Host.ipv4
    with alice.call(socket.create_connection, (server, PORT), PATIENCE, (source, 0)) as connection:
        until(lambda: firewall.counter("over_common_rate") == 1, "refused")
        name = (parse.address(source), connection.getsockname()[1], PORT)
        until(lambda: name not in host.call(sockets.connections, [PORT]), "the server's socket is gone")
        with pytest.raises(TimeoutError):
            connection.recv(100)


def test_families_share_the_common_limit(firewall: Firewall, alice: Client) -> None:
    load(firewall, burst=1, rates=2)
    for family in ("ipv4", "ipv6"):
        stuff(firewall, f"rate_dovecot_{family}", 2)
        assert connect(alice, alice.addresses(family)[0], CROWD // 2) == ["open"] * (CROWD // 2)
    above = [alice.connecting(PORT, source) for source in (alice.ipv4[1], alice.ipv6[1])]
    assert [each.result() for each in above] == ["silent"] * 2


def test_source_in_a_full_meter_has_exactly_its_burst(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, rates=3)
    source, stranger = alice.addresses(family)[0], alice.addresses(family)[2]
    assert connect(alice, source, 1) == ["open"]
    stuff(firewall, f"rate_dovecot_{family}", 2)
    for _ in range(BURST - 1):  # others in between cost it nothing, nor it them
        assert connect(alice, stranger, 5) == ["open"] * 5
        assert connect(alice, source, 1) == ["open"]
    assert firewall.counter("meter_full") == 5 * (BURST - 1)
    assert connect(alice, source, 2) == ["silent", "refused"]
    assert firewall.counter("over_rate") == 1
    assert len(firewall.elements(f"banned_dovecot_{family}")) == 1
    assert connect(alice, stranger, 1) == ["open"]


def test_crowd_above_its_limit_takes_nothing_from_sources_in_the_meter(
    firewall: Firewall, alice: Client, mallory: Client, family: str
) -> None:
    load(firewall, burst=2, rates=2)
    source = alice.addresses(family)[0]
    assert connect(alice, source, 1) == ["open"]
    stuff(firewall, f"rate_dovecot_{family}", 1)
    assert connect(mallory, mallory.addresses(family)[0], 2 * CROWD + 1) == ["open"] * 2 * CROWD + ["silent"]
    assert connect(alice, source, 3) == ["open", "silent", "refused"]


@pytest.mark.parametrize("kind", ["earned", "network", "exempt"])
def test_who_is_not_counted_is_not_in_the_crowd(firewall: Firewall, alice: Client, family: str, kind: str) -> None:
    source, *_, stranger = alice.addresses(family)
    lists = {f"networks_{family}": [source]}
    firewall.load(
        autoban={"rate": "1/hour", "burst": 1},
        sizes={"rates": 2},
        trusted=lists if kind == "network" else {},
        exempt=lists if kind == "exempt" else {},
    )
    stuff(firewall, f"rate_dovecot_{family}", 2)
    assert connect(alice, stranger, CROWD + 1) == ["open"] * CROWD + ["silent"]
    if kind == "earned":
        firewall.trust(source)
    full = firewall.counter("meter_full")
    assert connect(alice, source, 2 * CROWD) == ["open"] * 2 * CROWD
    assert firewall.counter("meter_full") == full


def test_login_out_of_the_crowd_is_served_at_once(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, burst=1, rates=2)
    stuff(firewall, f"rate_dovecot_{family}", 2)
    source = alice.addresses(family)[0]
    assert connect(alice, source, CROWD + 1) == ["open"] * CROWD + ["silent"]
    firewall.trust(source)
    assert connect(alice, source, 2 * CROWD) == ["open"] * 2 * CROWD


def test_newcomers_fit_when_there_is_room_again(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, burst=1, rates=2)
    stuff(firewall, f"rate_dovecot_{family}", 2)
    source = alice.addresses(family)[0]
    assert connect(alice, source, CROWD + 1) == ["open"] * CROWD + ["silent"]
    empty(firewall, f"rate_dovecot_{family}", 1)
    full = firewall.counter("meter_full")
    assert connect(alice, source, 3) == ["open", "silent", "refused"]
    assert firewall.counter("meter_full") == full


# The meter of networks


def test_full_network_meter_leaves_the_limit_of_each_source(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, networks={"rate": "2/hour"}, rates=2)
    stuff(firewall, f"network_rate_dovecot_{family}", 2)
    first, *_, second = alice.addresses(family)
    for source in (first, second):
        assert connect(alice, source, BURST + 2) == ["open"] * BURST + ["silent", "refused"]
    assert not firewall.elements(f"banned_networks_dovecot_{family}")
    assert firewall.counter("meter_full") == 0


# The sets of bans


def test_full_ban_set_still_refuses(firewall: Firewall, alice: Client, mallory: Client, family: str) -> None:
    load(firewall, banned=2)
    banned, stranger = mallory.addresses(family)[0], mallory.addresses(family)[2]
    source = alice.addresses(family)[0]
    assert connect(mallory, banned, BURST + 1) == ["open"] * BURST + ["silent"]
    stuff(firewall, f"banned_dovecot_{family}", 1)
    assert firewall.counter("ban_set_full") == 0

    assert connect(alice, source, BURST) == ["open"] * BURST
    above = [alice.connecting(PORT, source) for _ in range(3)]
    assert [each.result() for each in above] == ["silent"] * 3
    assert firewall.counter("ban_set_full") == 3
    assert firewall.counter("over_rate") == 1 + 3
    assert connect(mallory, banned, 1) == ["refused"]
    assert connect(mallory, stranger, BURST) == ["open"] * BURST
    assert connect(alice, source, 1, port=587) == ["open"]

    empty(firewall, f"banned_dovecot_{family}", 1)
    assert connect(alice, source, 2) == ["silent", "refused"]


def test_full_set_of_banned_networks_still_refuses(
    firewall: Firewall, alice: Client, mallory: Client, family: str
) -> None:
    load(firewall, networks={"rate": "3/hour"}, banned=2)
    stuff(firewall, f"banned_networks_dovecot_{family}", 2)
    first, *_, second = alice.addresses(family)
    assert [alice.connect(PORT, source) for source in (first, second, first)] == ["open"] * 3
    above = [alice.connecting(PORT, source) for source in (first, second)]
    assert [each.result() for each in above] == ["silent"] * 2
    assert firewall.counter("ban_set_full") == 2
    assert not firewall.elements(f"banned_dovecot_{family}")
    assert connect(mallory, mallory.addresses(family)[0], 1) == ["open"]


# Trust and blocks


def through_the_command(firewall: Firewall, host: Host, script: str) -> None:
    firewall.run(script)


def through_the_library(firewall: Firewall, host: Host, script: str) -> None:
    host.call(lambda: nft.Library().run(script))


@pytest.mark.parametrize("run", [through_the_command, through_the_library])
def test_full_trust_set_takes_no_new_trust(
    firewall: Firewall, host: Host, alice: Client, family: str, run: Callable[[Firewall, Host, str], None]
) -> None:
    load(firewall, "private", trusted=PORTS)
    source, *_, newcomer = alice.addresses(family)
    firewall.trust(source, 100)
    before = firewall.elements(f"trusted_{family}")
    assert len(before) == PORTS
    script = elements.trust(parse.address(newcomer), {587: 100}, firewall.settings)
    with pytest.raises(nft.NftError, match="mailfw:sizes") as raised:
        run(firewall, host, script)
    assert raised.value.full
    assert firewall.elements(f"trusted_{family}").keys() == before.keys()
    assert alice.connect_many([587, 993], newcomer) == {587: "refused", 993: "refused"}
    assert alice.connect_many([587, 993], source) == {587: "open", 993: "open"}

    # Those inside are renewed, and room that one leaves is another's.
    run(firewall, host, elements.trust(parse.address(source), {587: 900}, firewall.settings))
    renewed = firewall.elements(f"trusted_{family}")
    assert renewed.keys() == before.keys()
    assert sum(left > 100 for left in renewed.values()) == 1
    firewall.untrust(source, [993])
    run(firewall, host, script)
    assert alice.connect_many([587, 993], newcomer) == {587: "open", 993: "refused"}


def test_trust_that_fits_in_part_is_not_given_at_all(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, "private", trusted=PORTS + 2)
    source, *_, newcomer = alice.addresses(family)
    firewall.trust(source)
    with pytest.raises(nft.NftError, match="mailfw:sizes"):
        firewall.trust(newcomer)
    assert len(firewall.elements(f"trusted_{family}")) == PORTS
    assert alice.connect(587, newcomer) == "refused"


def test_full_block_set_takes_no_new_block(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, blocked=2)
    source, *_, newcomer = alice.addresses(family)
    firewall.block(source, 100)
    stuff(firewall, f"blocked_{family}", 1)
    with pytest.raises(nft.NftError, match="mailfw:sizes") as raised:
        firewall.block(newcomer)
    assert raised.value.full
    assert connect(alice, newcomer, 1) == ["open"]
    assert connect(alice, source, 1) == ["refused"]
    firewall.block(source, 900)
    assert sum(100 < left <= 900 for left in firewall.elements(f"blocked_{family}").values()) == 1
    assert connect(alice, source, 1) == ["refused"]


# Hold


@pytest.mark.parametrize("mode", ["protected", "private"])
def test_full_waiting_set_opens_nothing(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    firewall.load(protection={"type": mode}, reaction={"untrusted": "hold"}, sizes={"waiting": 2})
    stuff(firewall, f"waiting_{family}", 2, port=587)
    source = alice.addresses(family)[0]
    assert [alice.connect(587, source, 0.1) for _ in range(6)] == ["silent"] * 6
    assert firewall.counter("held") == 6
    assert firewall.counter("untrusted") == 0
    firewall.trust(source)
    assert alice.connect(587, source) == "open"


# Other sizes


KEPT = {"trusted": "trusted", "banned": "banned_dovecot", "blocked": "blocked"}


@pytest.mark.parametrize("key", KEPT)
def test_size_below_what_is_inside_changes_nothing(firewall: Firewall, alice: Client, family: str, key: str) -> None:
    load(firewall, **{key: 8})
    stuff(firewall, f"{KEPT[key]}_{family}", 8, port=587 if key == "trusted" else 0)
    source = alice.addresses(family)[0]
    assert connect(alice, source, 1) == ["open"]
    before = firewall.ruleset("-a")
    with pytest.raises(nft.NftError, match="mailfw:sizes") as raised:
        load(firewall, "private", **{key: 7})
    assert raised.value.full
    assert firewall.ruleset("-a") == before
    assert connect(alice, source, BURST) == ["open"] * (BURST - 1) + ["silent"]


@pytest.mark.parametrize("size", [8, 1000])
@pytest.mark.parametrize("key", KEPT)
def test_size_that_is_large_enough_keeps_what_is_inside(firewall: Firewall, family: str, key: str, size: int) -> None:
    load(firewall, **{key: 10})
    name = f"{KEPT[key]}_{family}"
    port = " . 587" if key == "trusted" else ""
    values = {f"{value}{port}": 1000 + 100 * place for place, value in enumerate(stuffing(family, 8))}
    timed = ", ".join(f"{value} timeout {left}s" for value, left in values.items())
    firewall.run(f"add element inet mailfw {name} {{ {timed} }}")
    assert load(firewall, **{key: size})
    found = firewall.elements(name)
    assert found.keys() == values.keys()
    assert all(left - 20 < found[value] <= left for value, left in values.items())
    assert load(firewall, **{key: size}) == ""


def test_shrinking_meters_starts_with_full_bursts(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, rates=4)
    source = alice.addresses(family)[0]
    assert connect(alice, source, BURST) == ["open"] * BURST
    stuff(firewall, f"rate_dovecot_{family}", 3)
    assert load(firewall, rates=2)
    assert connect(alice, source, BURST + 1) == ["open"] * BURST + ["silent"]
