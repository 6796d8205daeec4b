"""Rows of what is in the sets: how they are made, filtered, sorted and cut."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import listing, parse, settings
from mailfwlib.snapshot import Element

NOW = 1_700_000_000
DEFAULT = settings.resolve({"autoban": {"networks": {"rate": "9/minute"}}})


def element(value, left=3600, note=""):
    return Element(value, 86400, None if left is None else NOW + left, note)


FOUND = {
    "trusted_ipv4": [element("192.0.2.1 . 587", 60), element("192.0.2.1 . 143", 61), element("192.0.2.9 . 587")],
    "trusted_ipv6": [element("2001:db8:0:1:: . 993", 90000)],
    "banned_dovecot_ipv4": [element("192.0.2.1")],
    "banned_postfix_ipv6": [element("2001:db8:0:1::", 7, "root: ticket 17")],
    "banned_networks_dovecot_ipv4": [element("198.51.100.0")],
    "blocked_ipv4": [element("10.0.0.1", None)],
    "observed_ipv4": [element("203.0.113.1 . 587", 7 * 86400 - 90)],
}


def rows(sort="address", limit=100, **wanted):
    found = listing.rows(FOUND, listing.Wanted(**wanted), DEFAULT)
    return [listing.said(row, NOW) for row in listing.in_order(found, sort, limit)]


def names(**wanted):
    return [f"{row['kind']} {row['address']}" for row in rows(**wanted)]


def test_rows_say_what_where_for_how_long_and_by_whom():
    assert rows() == [
        {"kind": "blocked", "address": "10.0.0.1", "where": [], "left": "forever", "by": "an operator"},
        {"kind": "banned", "address": "192.0.2.1", "where": ["dovecot"], "left": "1h", "by": "the rate"},
        {"kind": "trusted", "address": "192.0.2.1", "where": [143, 587], "left": "1m", "by": "a login"},
        {"kind": "trusted", "address": "192.0.2.9", "where": [587], "left": "1h", "by": "a login"},
        {"kind": "banned", "address": "198.51.100.0/24", "where": ["dovecot"], "left": "1h", "by": "the rate"},
        {"kind": "observed", "address": "203.0.113.1", "where": [587], "left": "6d23h58m30s", "by": "a try 1m30s ago"},
        {
            "kind": "banned",
            "address": "2001:db8:0:1::/64",
            "where": ["postfix"],
            "left": "7s",
            "by": "root: ticket 17",
        },
        {
            "kind": "trusted",
            "address": "2001:db8:0:1::/64",
            "where": [993],
            "left": "1d1h",
            "by": "a login",
        },
    ]


def test_what_differs_between_ports_is_a_row_of_its_own():
    several = [
        *(element(f"192.0.2.1 . {port}", left) for port, left in ((143, 100), (993, 102), (587, 200), (465, None))),
        element("192.0.2.1 . 110", 100, "bob: why"),
    ]
    found = listing.rows({"trusted_ipv4": several}, listing.Wanted(), DEFAULT)
    assert [(row.where, row.note) for row in listing.in_order(found, "ending", 9)] == [
        ((110,), "bob: why"),
        ((143, 993), ""),
        ((587,), ""),
        ((465,), ""),
    ]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"kinds": frozenset({"blocked"})}, ["blocked 10.0.0.1"]),
        (
            {"kinds": frozenset({"banned", "blocked"}), "roles": frozenset({"postfix"})},
            ["blocked 10.0.0.1", "banned 2001:db8:0:1::/64"],
        ),
        ({"kinds": frozenset({"trusted"}), "ports": frozenset({993})}, ["trusted 2001:db8:0:1::/64"]),
        ({"networks": ([parse.network("192.0.2.0/29")],)}, ["banned 192.0.2.1", "trusted 192.0.2.1"]),
        ({"networks": ([parse.network("198.51.100.77")],)}, ["banned 198.51.100.0/24"]),
        (
            {"networks": ([parse.network("2001:db8:0:1::77")],)},
            ["banned 2001:db8:0:1::/64", "trusted 2001:db8:0:1::/64"],
        ),
        ({"networks": ([parse.network("192.0.2.0/24")], [parse.network("192.0.2.8/29")])}, ["trusted 192.0.2.9"]),
        (
            {"networks": ([parse.network("192.0.2.9"), parse.network("10.0.0.0/8")],)},
            ["blocked 10.0.0.1", "trusted 192.0.2.9"],
        ),
        ({"networks": ([],)}, []),
    ],
)
def test_filters(wanted, expected):
    assert names(**wanted) == expected


def test_only_the_ports_that_are_asked_for_are_shown():
    (row,) = rows(kinds=frozenset({"trusted"}), ports=frozenset({143, 993}), networks=([parse.network("192.0.2.1")],))
    assert row["where"] == [143]


def test_sorting_and_cutting():
    everything = rows()
    assert [row["left"] for row in rows("remaining", 3)] == ["forever", "6d23h58m30s", "1d1h"]
    assert [row["left"] for row in rows("ending", 2)] == ["7s", "1m"]
    assert rows("address", 2) == everything[:2]
    assert rows("address", 1000) == everything


def test_sets_that_are_read():
    def read(*kinds):
        pattern = listing.Wanted(frozenset(kinds)).sets()
        others = [
            "trusted_networks_ipv4",
            "blocked_networks_ipv6",
            "exempt_networks_ipv4",
            "rate_dovecot_ipv4",
            "older_ipv4",
        ]
        return [name for name in [*FOUND, *others] if pattern.fullmatch(name)]

    assert read(*listing.KINDS) == list(FOUND)
    assert read("banned") == ["banned_dovecot_ipv4", "banned_postfix_ipv6", "banned_networks_dovecot_ipv4"]
    assert read("observed", "blocked") == ["blocked_ipv4", "observed_ipv4"]


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(26, 32))), st.integers(0, 63), st.integers(26, 32))
def test_spans_overlap_as_networks_do(given_networks, first, prefix):
    def network(offset, length):
        return ipaddress.ip_network((int(ipaddress.IPv4Address("192.0.2.0")) + offset, length), strict=False)

    networks, one = [network(*each) for each in given_networks], network(first, prefix)
    spans = listing.Spans([*networks, ipaddress.ip_network("::/0")])
    assert spans.overlap(one) is any(one.overlaps(other) for other in networks)
