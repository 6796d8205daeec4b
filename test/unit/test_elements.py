import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import elements, parse, settings

IPV4 = parse.address("192.0.2.1")
IPV6 = parse.address("2001:db8::abcd:1")

DEFAULT = settings.resolve({})
WHOLE = settings.resolve({"trusted": {"ipv6_prefix": 128}, "autoban": {"ipv6_prefix": 128}})


def test_trust_ipv4():
    assert elements.trust(IPV4, {587: 86400, 143: 60}, DEFAULT) == (
        "add element inet mailfw trusted_ipv4 { 192.0.2.1 . 587 timeout 86400s, 192.0.2.1 . 143 timeout 60s }\n"
        "delete element inet mailfw trusted_ipv4 { 192.0.2.1 . 587, 192.0.2.1 . 143 }\n"
        "add element inet mailfw trusted_ipv4 { 192.0.2.1 . 587 timeout 86400s, 192.0.2.1 . 143 timeout 60s }\n"
        "add element inet mailfw banned_postfix_ipv4 { 192.0.2.1 }\n"
        "delete element inet mailfw banned_postfix_ipv4 { 192.0.2.1 }\n"
        "add element inet mailfw banned_dovecot_ipv4 { 192.0.2.1 }\n"
        "delete element inet mailfw banned_dovecot_ipv4 { 192.0.2.1 }\n"
    )


def test_trust_ipv6_trusts_the_prefix():
    assert elements.trust(IPV6, {993: 3600}, DEFAULT) == (
        "add element inet mailfw trusted_ipv6 { 2001:db8:: . 993 timeout 3600s }\n"
        "delete element inet mailfw trusted_ipv6 { 2001:db8:: . 993 }\n"
        "add element inet mailfw trusted_ipv6 { 2001:db8:: . 993 timeout 3600s }\n"
        "add element inet mailfw banned_postfix_ipv6 { 2001:db8:: }\n"
        "delete element inet mailfw banned_postfix_ipv6 { 2001:db8:: }\n"
        "add element inet mailfw banned_dovecot_ipv6 { 2001:db8:: }\n"
        "delete element inet mailfw banned_dovecot_ipv6 { 2001:db8:: }\n"
    )


def test_trust_ipv6_of_the_one_address():
    script = elements.trust(IPV6, {993: 3600}, WHOLE)
    assert "trusted_ipv6 { 2001:db8::abcd:1 . 993 timeout 3600s }\n" in script
    assert "banned_dovecot_ipv6 { 2001:db8::abcd:1 }\n" in script


def test_trust_and_bans_have_prefixes_of_their_own():
    mixed = settings.resolve({"trusted": {"ipv6_prefix": 128}, "autoban": {"ipv6_prefix": 48}})
    address = parse.address("2001:db8:0:1::1")
    script = elements.trust(address, {993: 3600}, mixed)
    assert "trusted_ipv6 { 2001:db8:0:1::1 . 993 }" in script
    assert "banned_postfix_ipv6 { 2001:db8:: }" in script
    assert str(elements.trusted_key(address, mixed)) == "2001:db8:0:1::1"
    assert str(elements.source_key(address, mixed)) == "2001:db8::"


def test_trust_without_ports_lifts_bans_only():
    """A host without roles has no login ports; nft does not take an empty list of elements."""
    assert elements.trust(IPV4, {}, DEFAULT) == elements.unban(IPV4, settings.ROLES, DEFAULT)


def test_untrust():
    assert elements.untrust(IPV4, [587, 143], DEFAULT) == (
        "add element inet mailfw trusted_ipv4 { 192.0.2.1 . 587, 192.0.2.1 . 143 }\n"
        "delete element inet mailfw trusted_ipv4 { 192.0.2.1 . 587, 192.0.2.1 . 143 }\n"
    )
    assert elements.untrust(IPV6, [587], DEFAULT) == (
        "add element inet mailfw trusted_ipv6 { 2001:db8:: . 587 }\n"
        "delete element inet mailfw trusted_ipv6 { 2001:db8:: . 587 }\n"
    )
    assert "{ 2001:db8::abcd:1 . 587 }" in elements.untrust(IPV6, [587], WHOLE)
    assert elements.untrust(IPV4, [], DEFAULT) == ""


def test_ban():
    assert elements.ban(IPV4, ["postfix"], 90, DEFAULT) == (
        "add element inet mailfw banned_postfix_ipv4 { 192.0.2.1 timeout 90s }\n"
        "delete element inet mailfw banned_postfix_ipv4 { 192.0.2.1 }\n"
        "add element inet mailfw banned_postfix_ipv4 { 192.0.2.1 timeout 90s }\n"
    )


def test_ban_for_the_period_of_the_set():
    assert elements.ban(IPV6, ["postfix", "dovecot"], None, DEFAULT) == (
        "add element inet mailfw banned_postfix_ipv6 { 2001:db8:: }\n"
        "delete element inet mailfw banned_postfix_ipv6 { 2001:db8:: }\n"
        "add element inet mailfw banned_postfix_ipv6 { 2001:db8:: }\n"
        "add element inet mailfw banned_dovecot_ipv6 { 2001:db8:: }\n"
        "delete element inet mailfw banned_dovecot_ipv6 { 2001:db8:: }\n"
        "add element inet mailfw banned_dovecot_ipv6 { 2001:db8:: }\n"
    )


def test_unban():
    assert elements.unban(IPV6, ["dovecot"], WHOLE) == (
        "add element inet mailfw banned_dovecot_ipv6 { 2001:db8::abcd:1 }\n"
        "delete element inet mailfw banned_dovecot_ipv6 { 2001:db8::abcd:1 }\n"
    )
    assert elements.unban(IPV4, [], DEFAULT) == ""


def test_refill_is_of_the_meters_of_the_family():
    meters = ["rate_postfix_ipv4", "rate_postfix_ipv6", "rate_dovecot_ipv4"]
    assert elements.refill(IPV4, meters, DEFAULT) == (
        "add element inet mailfw rate_postfix_ipv4 { 192.0.2.1 }\n"
        "delete element inet mailfw rate_postfix_ipv4 { 192.0.2.1 }\n"
        "add element inet mailfw rate_dovecot_ipv4 { 192.0.2.1 }\n"
        "delete element inet mailfw rate_dovecot_ipv4 { 192.0.2.1 }\n"
    )
    assert elements.refill(IPV6, meters, DEFAULT) == (
        "add element inet mailfw rate_postfix_ipv6 { 2001:db8:: }\n"
        "delete element inet mailfw rate_postfix_ipv6 { 2001:db8:: }\n"
    )


def test_block_and_unblock():
    assert elements.block(IPV4, None, DEFAULT) == (
        "add element inet mailfw blocked_ipv4 { 192.0.2.1 }\n"
        "delete element inet mailfw blocked_ipv4 { 192.0.2.1 }\n"
        "add element inet mailfw blocked_ipv4 { 192.0.2.1 }\n"
    )
    assert elements.block(IPV6, 3600, DEFAULT).count("blocked_ipv6 { 2001:db8:: timeout 3600s }\n") == 2
    assert elements.block(IPV6, 3600, WHOLE).count("blocked_ipv6 { 2001:db8::abcd:1 timeout 3600s }\n") == 2
    assert elements.unblock(IPV6, DEFAULT) == (
        "add element inet mailfw blocked_ipv6 { 2001:db8:: }\ndelete element inet mailfw blocked_ipv6 { 2001:db8:: }\n"
    )


@given(st.ip_addresses(), st.dictionaries(st.integers(1, 65535), st.integers(1, parse.LONGEST), max_size=8))
def test_scripts_hold_nothing_but_commands_on_elements(address, seconds):
    script = elements.trust(address, seconds, DEFAULT) + elements.block(address, None, DEFAULT)
    for line in script.splitlines():
        command, values = line.rstrip(" }").split(" { ")
        assert command.split()[:4] in (["add", "element", "inet", "mailfw"], ["delete", "element", "inet", "mailfw"])
        assert command.split()[4].endswith(f"ipv{address.version}")
        for value in values.split(", "):
            assert parse.address(value.split(" ")[0]) in {
                parse.address(str(key))
                for key in (elements.trusted_key(address, DEFAULT), elements.source_key(address, DEFAULT))
            }


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1", "is loopback"),
        ("127.255.255.254", "is loopback"),
        ("::1", "is loopback"),
        ("::ffff:127.0.0.1", "is loopback"),
        ("169.254.1.1", "is link-local"),
        ("fe80::1", "is link-local"),
        ("224.0.0.1", "is multicast"),
        ("ff02::1", "is multicast"),
        ("255.255.255.255", "is broadcast"),
        ("::ffff:255.255.255.255", "is broadcast"),
        ("0.0.0.0", "is unspecified"),
        ("::", "is unspecified"),
        ("198.51.100.7", "is in mailfw:trusted:never"),
        ("198.51.100.8", ""),
        ("203.0.113.200", "is in mailfw:trusted:never"),
        ("::ffff:203.0.113.200", "is in mailfw:trusted:never"),
        ("203.0.112.200", ""),
        ("2001:db8::1", "is in mailfw:trusted:never"),
        # Trusting it would trust its whole /64, with the address that must not be.
        ("2001:db8::2", "is in mailfw:trusted:never"),
        ("2001:db8:0:1::2", ""),
        ("2001:db8:5:6::7", "is in mailfw:trusted:never"),
        ("192.0.2.77", "is in mailfw:trusted:never"),
        ("10.10.1.14", ""),
        ("fd00::1", ""),
    ],
)
def test_never_trusted(address, reason):
    never = ["198.51.100.7", "203.0.113.0/24", "2001:db8::1", "2001:db8:5::/48", "::ffff:192.0.2.77"]
    assert elements.never_trusted(parse.address(address), settings.resolve({"trusted": {"never": never}})) == reason


POSTFIX = [587, 465]
DOVECOT = [143, 993, 110, 995, 4190]


@pytest.mark.parametrize(
    ("protection", "roles", "others", "from_trusted_networks"),
    [
        ({}, ["postfix", "dovecot"], POSTFIX + DOVECOT, POSTFIX + DOVECOT),
        ({"type": "protected"}, ["postfix", "dovecot"], POSTFIX + DOVECOT, POSTFIX + DOVECOT),
        ({"type": "public"}, ["postfix", "dovecot"], POSTFIX + DOVECOT, POSTFIX + DOVECOT),
        ({"type": "private"}, ["postfix", "dovecot"], [], POSTFIX + DOVECOT),
        ({"type": "private"}, ["postfix"], [], POSTFIX),
        ({}, ["dovecot"], DOVECOT, DOVECOT),
        ({}, [], [], []),
        ({"services": {"sieve": "private"}}, ["dovecot"], [143, 993, 110, 995], DOVECOT),
        ({"type": "private", "services": {"imaps": "protected"}}, ["postfix", "dovecot"], [993], POSTFIX + DOVECOT),
    ],
)
def test_ports_for_login(protection, roles, others, from_trusted_networks):
    found = settings.resolve(
        {
            "protection": protection,
            "roles": roles,
            "trusted": {"networks_ipv4": ["10.0.0.0/8"], "networks_ipv6": ["fd00::/48"]},
        }
    )
    for address in ("192.0.2.1", "2001:db8::1", "fd00:0:1::1"):
        assert elements.ports_for_login(parse.address(address), found) == others
    for address in ("10.10.1.14", "::ffff:10.10.1.14", "fd00::1"):
        assert elements.ports_for_login(parse.address(address), found) == from_trusted_networks


def test_in_networks_is_of_one_family():
    assert elements.in_networks(IPV4, ["::/0", "192.0.2.0/24"])
    assert not elements.in_networks(IPV4, ["::/0", "198.51.100.0/24"])
    assert not elements.in_networks(IPV6, ["0.0.0.0/0"])
    assert not elements.in_networks(IPV6, [])


def test_network_stands_in_the_sets_source_by_source():
    network = parse.network("192.0.2.0/30")
    assert elements.unblock(network, DEFAULT) == (
        "add element inet mailfw blocked_ipv4 { 192.0.2.0, 192.0.2.1, 192.0.2.2, 192.0.2.3 }\n"
        "delete element inet mailfw blocked_ipv4 { 192.0.2.0, 192.0.2.1, 192.0.2.2, 192.0.2.3 }\n"
    )
    assert elements.trust(network, {587: 60, 993: 60}, DEFAULT).count(" . 587 timeout 60s") == 8
    assert [str(key) for key in elements.source_keys(parse.network("2001:db8::/63"), DEFAULT)] == [
        "2001:db8::",
        "2001:db8:0:1::",
    ]
    assert len(elements.source_keys(parse.network("192.0.0.0/20"), DEFAULT)) == 4096


@pytest.mark.parametrize(("network", "count"), [("10.0.0.0/19", 8192), ("2001:db8::/48", 65536), ("::/0", 2**64)])
def test_larger_networks_are_for_the_pillar(network, count):
    with pytest.raises(ValueError, match=rf"has {count} sources, .* a line in the pillar's networks_ipv[46]$"):
        elements.block(parse.network(network), None, DEFAULT)


@pytest.mark.parametrize("network", ["2001:db8:0:1::/64", "2001:db8:0:1::/80", "2001:db8:0:1::5/128"])
def test_network_within_one_source_is_that_source(network):
    assert [str(key) for key in elements.source_keys(parse.network(network), DEFAULT)] == ["2001:db8:0:1::"]
    assert elements.text(elements.source_network(parse.network(network), DEFAULT)) == "2001:db8:0:1::/64"


def test_names_of_sources():
    assert elements.text(elements.source_network(IPV4, DEFAULT)) == "192.0.2.1"
    assert elements.text(elements.source_network(IPV6, DEFAULT)) == "2001:db8::/64"
    assert elements.text(elements.source_network(IPV6, WHOLE)) == "2001:db8::abcd:1"
    assert elements.text(elements.source_network(parse.network("192.0.2.0/24"), DEFAULT)) == "192.0.2.0/24"


def test_comments_say_who():
    assert elements.block(IPV4, None, DEFAULT, "alice: ticket 17") == (
        'add element inet mailfw blocked_ipv4 { 192.0.2.1 comment "alice: ticket 17" }\n'
        "delete element inet mailfw blocked_ipv4 { 192.0.2.1 }\n"
        'add element inet mailfw blocked_ipv4 { 192.0.2.1 comment "alice: ticket 17" }\n'
    )
    assert '{ 192.0.2.1 timeout 60s comment "bob" }' in elements.ban(IPV4, ["dovecot"], 60, DEFAULT, "bob")


def test_forget_is_of_the_sets_of_the_family():
    assert elements.forget(IPV4, ["waiting_ipv4", "waiting_ipv6"], [587, 993], DEFAULT) == (
        "add element inet mailfw waiting_ipv4 { 192.0.2.1 . 587, 192.0.2.1 . 993 }\n"
        "delete element inet mailfw waiting_ipv4 { 192.0.2.1 . 587, 192.0.2.1 . 993 }\n"
    )


@pytest.mark.parametrize(("network", "ports"), [("2001:db8::/48", 7), ("2001:db8::5/128", 0)])
def test_private_mode_admits_an_ipv6_login_only_with_its_whole_prefix(network, ports):
    pillar = {"protection": {"type": "private"}, "trusted": {"networks_ipv6": [network]}}
    assert len(elements.ports_for_login(parse.address("2001:db8::5"), settings.resolve(pillar))) == ports
