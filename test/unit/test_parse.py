import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import elements, parse
from unit import arbitrary

PARSERS = [
    parse.duration,
    parse.rate,
    parse.address,
    parse.network,
    lambda value: parse.network_of_family(value, 4),
    lambda value: parse.network_of_family(value, 6),
]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1d", 86400),
        ("5h", 18000),
        ("90m", 5400),
        ("1d12h", 129600),
        ("1w", 604800),
        ("1s", 1),
        ("3600", 3600),
        (3600, 3600),
        (" 1h ", 3600),
        ("1h1h", 7200),
        ("366d", parse.LONGEST),
        (parse.LONGEST, parse.LONGEST),
    ],
)
def test_duration(written, seconds):
    assert parse.duration(written) == seconds


@pytest.mark.parametrize(
    "written",
    [
        *("", "0", "0s", "-1", "-1h", "1.5h", "1 d", "1y", "h", "1h30", "30 minutes", "1H", "forever", "367d"),
        *("9" * 12, "9" * 9 + "w", "9" * 5000, "1d\n1h", "\u0663h", "²", "1e3", "0x10"),
        *(0, -1, parse.LONGEST + 1, 10**400, 1.0, float("nan"), float("inf"), True, False, None, [], ["1h"], {}, b"1h"),
    ],
)
def test_duration_refuses(written):
    with pytest.raises(ValueError, match=re.escape(parse.DURATION_FORM)):
        parse.duration(written)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (1, "1s"),
        (60, "1m"),
        (3600, "1h"),
        (84767, "23h32m47s"),
        (84767.9, "23h32m47s"),
        (86400, "1d"),
        (129600, "1d12h"),
        (8 * 86400, "8d"),
    ],
)
def test_duration_text(seconds, text):
    assert parse.duration_text(seconds) == text


@given(st.integers(1, parse.LONGEST))
def test_duration_text_is_read_back(seconds):
    assert parse.duration(parse.duration_text(seconds)) == seconds


@pytest.mark.parametrize(
    ("written", "count", "unit"),
    [
        ("10/minute", 10, "minute"),
        ("1/second", 1, "second"),
        ("100000/day", 100000, "day"),
        (" 3 / hour ", 3, "hour"),
        ("007/hour", 7, "hour"),
    ],
)
def test_rate(written, count, unit):
    assert parse.rate(written) == {"count": count, "unit": unit}


@pytest.mark.parametrize(
    "written",
    [
        *("", "10", "/minute", "10/", "0/minute", "-1/minute", "1.5/minute", "100001/second", "9999999/second"),
        *(
            "10/Minute",
            "10 per minute",
            "\u0661\u0660/minute",
            "10//minute",
            "10/minute; flush ruleset",
            "1/minute\n1/minute",
        ),
        *(10, 10.0, True, None, [], {"count": 10, "unit": "minute"}, b"10/minute"),
    ],
)
def test_rate_refuses(written):
    with pytest.raises(ValueError, match=re.escape(parse.RATE_FORM)):
        parse.rate(written)


@pytest.mark.parametrize("unit", ["fortnight", "week", "minutes", "m"])
def test_rate_refuses_units_that_nft_has_not(unit):
    with pytest.raises(ValueError, match=r"^the unit must be second, minute, hour or day$"):
        parse.rate(f"10/{unit}")


@given(st.integers(1, 100000), st.sampled_from(sorted(parse.RATE_UNITS)))
def test_rate_text_is_read_back(count, unit):
    assert parse.rate(parse.rate_text({"count": count, "unit": unit})) == {"count": count, "unit": unit}


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("192.0.2.1", "192.0.2.1"),
        (" 192.0.2.1\n", "192.0.2.1"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
        ("::FFFF:0.0.0.0", "0.0.0.0"),
        ("::192.0.2.1", "::c000:201"),
        ("64:ff9b::192.0.2.1", "64:ff9b::c000:201"),
    ],
)
def test_address(written, canonical):
    assert str(parse.address(written)) == canonical


@pytest.mark.parametrize(
    "written",
    [
        *("", "mx.example.org", "192.0.2", "192.0.2.256", "192.0.2.01", "192.0.2.1/32", "192.0.2.1:25", "3221225985"),
        *("[2001:db8::1]", "2001:db8::1%eth0", "fe80::1%1", "::ffff:192.0.2.1%1", "2001:db8::/64", "2001:db8:::1"),
        *("192.0.2.1 }; flush ruleset", "192.0.2.1\0", "\u0661\u0669\u0662.0.2.1", "\ud800"),
        *(3221225985, 0, 1.5, True, None, [], ["192.0.2.1"], b"\xc0\0\2\1", b"192.0.2.1"),
        ipaddress.ip_address("192.0.2.1"),
    ],
)
def test_address_refuses(written):
    with pytest.raises(ValueError, match=r"^expected an IPv4 or IPv6 address such as 192\.0\.2\.1 or 2001:db8::1$"):
        parse.address(written)


@given(arbitrary.addresses)
def test_address_is_read_back(address):
    assert parse.address(str(address)) == address


@given(st.ip_addresses(v=4))
def test_mapped_address_is_the_address_it_carries(address):
    assert parse.address(f"::ffff:{address}") == address


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("198.51.100.0/24", "198.51.100.0/24"),
        ("198.51.100.7", "198.51.100.7/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("198.51.100.0/255.255.255.0", "198.51.100.0/24"),
        (" 2001:DB8::/48 ", "2001:db8::/48"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("::/0", "::/0"),
        ("::ffff:198.51.100.7", "198.51.100.7/32"),
        ("::ffff:198.51.100.0/120", "198.51.100.0/24"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
    ],
)
def test_network(written, canonical):
    assert str(parse.network(written)) == canonical


@pytest.mark.parametrize(
    "written",
    [
        *("", "198.51.100.0/33", "2001:db8::/129", "198.51.100.0/-1", "198.51.100/24", "office", "fe80::%1/64"),
        *("198.51.100.0-198.51.100.9", "198.51.100.0/24/24", 3325256704, True, None, [], b"\xc6\x33\x64\0"),
        ("198.51.100.0", 24),
    ],
)
def test_network_refuses(written):
    with pytest.raises(ValueError, match=r"^expected a network such as 198\.51\.100\.0/24 or 2001:db8::/48$"):
        parse.network(written)


@pytest.mark.parametrize(
    ("written", "whole"),
    [("198.51.100.7/24", "198.51.100.0/24"), ("2001:db8::1/48", "2001:db8::/48")],
)
def test_network_with_host_bits_says_what_to_write(written, whole):
    with pytest.raises(ValueError, match=f"^has host bits set: write {re.escape(whole)} for the network$"):
        parse.network(written)


def test_network_of_the_other_family():
    with pytest.raises(ValueError, match=r"^is an IPv6 network in a list for IPv4$"):
        parse.network_of_family("2001:db8::/48", 4)
    with pytest.raises(ValueError, match=r"^is an IPv4 network in a list for IPv6$"):
        parse.network_of_family("::ffff:192.0.2.0/120", 6)
    assert parse.network_of_family("192.0.2.0/24", 4) == ipaddress.ip_network("192.0.2.0/24")


@given(arbitrary.networks(4), arbitrary.networks(6))
def test_network_is_read_back(ipv4, ipv6):
    assert str(parse.network_of_family(ipv4, 4)) == ipv4
    if not ipv6.startswith("::ffff:"):
        assert str(parse.network_of_family(ipv6, 6)) == ipv6


@pytest.mark.parametrize(
    ("prefix", "mask"),
    [
        (64, "ffff:ffff:ffff:ffff::"),
        (48, "ffff:ffff:ffff::"),
        (128, "ffff:" * 7 + "ffff"),
        (63, "ffff:ffff:ffff:fffe::"),
    ],
)
def test_mask(prefix, mask):
    assert parse.mask(prefix) == mask


@given(st.ip_addresses(v=6), st.integers(1, 128))
def test_mask_and_prefix_base_are_the_same_arithmetic(address, prefix):
    """The rules mask a packet's source, the scripts name its prefix: both must mean one element."""
    masked = int(address) & int(ipaddress.IPv6Address(parse.mask(prefix)))
    assert int(elements.prefix_base(address, prefix)) == masked
    assert elements.prefix_base(address, prefix) == ipaddress.ip_network(f"{address}/{prefix}", strict=False)[0]


@given(st.ip_addresses(v=6), st.integers(1, 128))
def test_prefix_base_stands_for_itself(address, prefix):
    base = elements.prefix_base(address, prefix)
    assert elements.prefix_base(base, prefix) == base
    assert elements.prefix_base(base, prefix - 1) == elements.prefix_base(address, prefix - 1)


@given(st.ip_addresses(v=4), st.integers(1, 128))
def test_prefix_base_of_ipv4_is_the_address(address, prefix):
    assert elements.prefix_base(address, prefix) == address


@pytest.mark.parametrize("parser", PARSERS)
@given(value=arbitrary.values)
def test_parsers_raise_nothing_but_value_error(parser, value):
    sentence = ""
    try:
        parser(value)
    except ValueError as err:
        sentence = str(err)
    assert sentence.isprintable()
