import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import parse, rules, settings
from unit.rendering import Rules

MODES = settings.MODES
SERVICES = settings.SERVICES

#: The table of the specification: how the login ports of a role are treated in each mode.
ACCESS = {
    ("postfix", "autoban"): "limited",
    ("postfix", "protected"): "trusted only",
    ("postfix", "private"): "trusted only",
    ("postfix", "public"): "open",
    ("dovecot", "autoban"): "limited",
    ("dovecot", "protected"): "limited",
    ("dovecot", "private"): "trusted only",
    ("dovecot", "public"): "open",
}
#: How a chain ends that gives this access.
END = {"open": "accept", "limited": "goto opening", "trusted only": "goto untrusted"}
ROLES = [["postfix", "dovecot"], ["postfix"], ["dovecot"], []]
OVERRIDES = [{}, {"sieve": "private"}, {"submission": "public", "imap": "protected", "imaps": "autoban"}]


def of_mode(mode, services=None, **pillar):
    return settings.resolve({"protection": {"type": mode, "services": services or {}}, **pillar})


def service(name, mode):
    known = SERVICES[name]
    return {"name": name, "port": known.port, "role": known.role, "login": known.login, "mode": mode}


@pytest.mark.parametrize("mode", MODES)
def test_files_of_a_mode(mode):
    assert rules.files(of_mode(mode)) == {
        "base.nft": [{"source": "ruleset/nftables/base.nft.jinja"}],
        "postfix.nft": [
            {"source": f"postfix/nftables/{mode}.nft.jinja", "role": "postfix", "mode": mode, "ports": [587, 465]}
        ],
        "dovecot.nft": [
            {
                "source": f"dovecot/nftables/{mode}.nft.jinja",
                "role": "dovecot",
                "mode": mode,
                "ports": [143, 993, 110, 995, 4190],
            }
        ],
    }


def test_files_of_overridden_services():
    found = rules.files(of_mode("autoban", {"sieve": "private", "pop3": "private", "imap": "public"}))
    assert list(found) == ["base.nft", "postfix.nft", "dovecot.nft"]
    assert [(part["mode"], part["ports"]) for part in found["postfix.nft"]] == [("autoban", [587, 465])]
    assert [(part["mode"], part["ports"]) for part in found["dovecot.nft"]] == [
        ("autoban", [993, 995]),
        ("public", [143]),
        ("private", [110, 4190]),
    ]


def test_mode_that_no_service_is_left_in_makes_nothing():
    found = rules.files(of_mode("autoban", {"submission": "private", "submissions": "private"}))
    assert [(part["mode"], part["ports"]) for part in found["postfix.nft"]] == [("private", [587, 465])]


@pytest.mark.parametrize("roles", ROLES)
def test_files_of_the_roles(roles):
    assert list(rules.files(of_mode("autoban", roles=roles))) == ["base.nft", *(f"{role}.nft" for role in roles)]


def test_every_role_has_a_template_for_every_mode_and_no_other(root):
    expected = {f"mailfw/{role}/nftables/{mode}.nft.jinja" for role in settings.ROLES for mode in MODES}
    there = {str(path.relative_to(root)) for role in settings.ROLES for path in root.glob(f"mailfw/{role}/nftables/*")}
    assert there == expected
    for mode in MODES:
        sources = [part["source"] for parts in rules.files(of_mode(mode)).values() for part in parts]
        assert all((root / "mailfw" / source).is_file() for source in sources)


@pytest.mark.parametrize(("role", "mode"), ACCESS)
def test_access_is_that_of_the_specification(role, mode):
    assert rules.access(role, mode) == ACCESS[role, mode]


@pytest.mark.parametrize(("role", "mode"), ACCESS)
def test_access_agrees_with_the_template_that_the_role_includes(role, mode, root):
    text = (root / f"mailfw/{role}/nftables/{mode}.nft.jinja").read_text()
    included = re.findall(r'include "mailfw/ruleset/nftables/(\w+)\.nft\.jinja"', text)
    assert included == [rules.access(role, mode).replace(" ", "_")]


@pytest.mark.parametrize("overrides", OVERRIDES)
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("mode", MODES)
def test_rendered_rules_send_each_port_where_its_mode_says(mode, roles, overrides, root):
    found = of_mode(mode, overrides, roles=roles)
    rendered = Rules(found, root)
    wanted = {25: "accept"} if "postfix" in roles else {}
    counted = {}
    for one in found["services"]:
        if not one["login"]:
            continue
        chain = f"{one['role']}_{overrides.get(one['name'], mode)}"
        access = ACCESS[one["role"], one["mode"]]
        wanted[one["port"]] = f"goto {chain}"
        assert rendered.statements(chain)[0] == "jump guarded"
        assert rendered.statements(chain)[-1] == END[access]
        if access == "limited":
            counted[one["port"]] = f"goto {chain}_count"
    assert rendered.verdicts("services") == wanted
    assert rendered.verdicts("counting") == counted


@pytest.mark.parametrize("mode", MODES)
def test_only_known_ports_are_mentioned(mode, root):
    rendered = Rules(of_mode(mode), root)
    named = {int(port) for port in re.findall(r"\b(\d+) :", rendered.text)}
    assert named == {25, 587, 465, 143, 993, 110, 995, 4190}
    assert not re.findall(r"(?:dport|sport) (?!vmap @|@)\S", rendered.text.replace("tcp dport limit", ""))


@pytest.mark.parametrize("mode", MODES)
def test_port_25_is_never_guarded(mode, root):
    rendered = Rules(of_mode(mode), root)
    assert rendered.verdicts("services")[25] == "accept"
    assert 25 not in rendered.verdicts("counting")


#: Settings that change what the rules say.
pillars = st.fixed_dictionaries(
    {
        "protection": st.fixed_dictionaries(
            {
                "type": st.sampled_from(MODES),
                "services": st.dictionaries(st.sampled_from(settings.LOGIN_SERVICES), st.sampled_from(MODES)),
            }
        ),
        "roles": st.sampled_from(ROLES),
        "enforce": st.booleans(),
        "autoban": st.fixed_dictionaries(
            {
                "ipv6_prefix": st.sampled_from([56, 64, 128]),
                "networks": st.sampled_from([False, {}, {"rate": "5/hour", "ipv4_prefix": 20, "ipv6_prefix": 44}]),
            }
        ),
        "trusted": st.fixed_dictionaries(
            {
                "ipv6_prefix": st.sampled_from([64, 128]),
                "networks_ipv4": st.sampled_from([[], ["192.0.2.0/24"]]),
                "networks_ipv6": st.sampled_from([[], ["2001:db8::/48", "2001:db8:2::/48"]]),
            }
        ),
        "reaction": st.fixed_dictionaries(
            {
                "banned": st.sampled_from(["drop", "reject"]),
                "blocked": st.sampled_from(["drop", "reject"]),
                "untrusted": st.sampled_from(["hold", "reject", "drop"]),
            }
        ),
    }
)


@given(pillar=pillars)
def test_rendered_rules_name_nothing_that_is_not_there(root, pillar):
    rendered = Rules(settings.resolve(pillar), root)
    assert rendered.text.count("{") == rendered.text.count("}")
    assert set(re.findall(r"(?:goto|jump) (\w+)", rendered.text)) <= rendered.objects["chain"].keys()
    assert set(re.findall(r"counter name (\w+)", rendered.text)) <= rendered.counters
    used = set(re.findall(r"@(\w+)", rendered.text))
    assert used <= rendered.objects["set"].keys() | rendered.objects["map"].keys()
    assert "None" not in rendered.text
    assert "False" not in rendered.text


@given(pillar=pillars)
def test_nothing_is_refused_when_not_enforced(root, pillar):
    text = Rules(settings.resolve({**pillar, "enforce": False}), root).text
    assert not re.findall(r"\b(drop|reject)\b", re.sub("#.*", "", text))


@given(pillar=pillars)
def test_everything_that_is_not_open_can_refuse(root, pillar):
    found = settings.resolve({**pillar, "enforce": True})
    rendered = Rules(found, root)
    for chain in ("blocked", "banned", "untrusted", "opening"):
        assert re.search(r"\b(drop|reject with tcp reset)$", rendered.statements(chain)[-1])
    for chain in rendered.objects["chain"]:
        if chain.endswith(("_ban", "_ban_network")):
            assert rendered.statements(chain)[-1].endswith("reject with tcp reset")


@pytest.mark.parametrize(
    ("reaction", "chain", "end"),
    [
        ({"banned": "drop"}, "banned", "counter name banned drop"),
        ({"banned": "reject"}, "banned", "counter name banned reject with tcp reset"),
        ({"blocked": "drop"}, "blocked", "counter name blocked drop"),
        ({"blocked": "reject"}, "blocked", "counter name blocked reject with tcp reset"),
        ({"untrusted": "hold"}, "untrusted", "counter name held drop"),
        ({"untrusted": "drop"}, "untrusted", "counter name untrusted drop"),
        ({"untrusted": "reject"}, "untrusted", "counter name untrusted reject with tcp reset"),
    ],
)
def test_reactions(reaction, chain, end, root):
    assert Rules(settings.resolve({"reaction": reaction}), root).statements(chain)[-1] == end


def test_rendered_rules_carry_the_numbers_of_the_pillar(root):
    found = settings.resolve(
        {
            "autoban": {"rate": "7/hour", "burst": 3, "period": "2h", "ipv6_prefix": 56, "networks": {}},
            "trusted": {"timeout": "90m", "ipv6_prefix": 128, "networks_ipv4": ["192.0.2.0/24", "10.0.0.0/8"]},
            "exempt": {"networks_ipv6": ["2001:db8::/48"]},
            "blocked": {"networks_ipv4": ["198.51.100.7"]},
        }
    )
    rendered = Rules(found, root)
    sets = rendered.objects["set"]
    count = "\n".join(rendered.statements("dovecot_autoban_count"))
    assert "update @rate_dovecot_ipv4 { ip daddr limit rate over 7/hour burst 3 packets }" in count
    assert "{ ip6 daddr & ffff:ffff:ffff:ff00:: limit rate over 7/hour burst 3 packets }" in count
    assert "{ ip daddr & 255.255.255.0 limit rate over 100/minute burst 100 packets }" in count
    assert "{ ip6 daddr & ffff:ffff:ffff:: limit rate over 100/minute burst 100 packets }" in count
    assert "ip6 saddr . tcp dport @trusted_ipv6 counter name trusted accept" in rendered.statements("guarded")
    assert "timeout 7200s" in sets["banned_postfix_ipv4"]
    assert "timeout 7200s" in sets["banned_networks_dovecot_ipv6"]
    assert "timeout 5400s" in sets["trusted_ipv4"]
    assert "timeout 5400s" in sets["trusted_ipv6"]
    assert f"timeout {math.ceil(3 * 3600 / 7)}s" in sets["rate_dovecot_ipv6"]
    assert "elements = { 10.0.0.0/8, 192.0.2.0/24 }" in sets["trusted_networks_ipv4"]
    assert "elements = { 2001:db8::/48 }" in sets["exempt_networks_ipv6"]
    assert "elements = { 198.51.100.7/32 }" in sets["blocked_networks_ipv4"]
    assert "elements" not in sets["trusted_networks_ipv6"]


def test_guarded_is_in_the_order_of_who_wins(root):
    """Trusted networks, then blocks, then what is open already, then earned trust; each for both families."""
    families = [("ip saddr", "ipv4"), ("ip6 saddr", "ipv6")]
    pillar = {"trusted": {"ipv6_prefix": 128}, "autoban": {"ipv6_prefix": 128}}
    assert Rules(settings.resolve(pillar), root).statements("guarded") == [
        *(f"{saddr} @trusted_networks_{family} counter name trusted_network accept" for saddr, family in families),
        *(f"{saddr} @blocked_networks_{family} goto blocked" for saddr, family in families),
        *(f"{saddr} @blocked_{family} goto blocked" for saddr, family in families),
        "ct state established tcp flags & (fin | syn | rst | ack) != syn accept",
        *(f"{saddr} . tcp dport @trusted_{family} counter name trusted accept" for saddr, family in families),
    ]


@pytest.mark.parametrize(
    ("rate", "burst", "seconds"),
    [
        ("10/minute", 20, 120),
        ("10/minute", 1, 60),
        ("1/second", 59, 60),
        ("1/second", 61, 61),
        ("7/hour", 3, 1543),
        ("1/hour", 20, 72000),
        ("100000/second", 1, 60),
        ("1/day", 20, 20 * 86400),
        ("1/day", 10_000, parse.LONGEST),
    ],
)
def test_refill(rate, burst, seconds):
    assert rules.refill(parse.rate(rate), burst) == seconds


@given(st.integers(1, 100_000), st.sampled_from(sorted(parse.RATE_UNITS)), st.integers(1, 10_000))
def test_bucket_is_kept_until_it_is_full_again(count, unit, burst):
    seconds = rules.refill({"count": count, "unit": unit}, burst)
    full = burst * parse.RATE_UNITS[unit] / count
    assert 60 <= seconds <= 99_999_999, "nft takes eight digits"
    assert isinstance(seconds, int)
    assert full <= seconds < max(60, full) + 1 or seconds == parse.LONGEST


PILLAR = {"trusted": {"networks_ipv4": ["192.0.2.0/25"]}, "blocked": {"networks_ipv4": ["192.0.2.0/24"]}}
#: Addresses by the networks of the pillar that they are in.
ADDRESSES = {
    (True, True): "192.0.2.1",
    (False, True): "192.0.2.129",
    (False, False): "198.51.100.1",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SERVICES)
def test_decision_follows_who_wins(name, mode):
    """Trusted networks, then blocks, then earned trust, then bans; for every service and mode."""
    one = service(name, mode)
    found = settings.resolve(PILLAR)
    access = ACCESS[one["role"], mode]
    for (in_trusted, in_blocked), address in ADDRESSES.items():
        for trust, ban, block in itertools.product([{}, {one["port"]: "1h"}, {1: "1h"}], [None, "2h"], [None, "3h"]):
            if name == "smtp":
                wanted = "accepted: mail between servers is always open"
            elif in_trusted:
                wanted = "accepted: in mailfw:trusted:networks_ipv4"
            elif in_blocked:
                wanted = "refused: in mailfw:blocked:networks_ipv4"
            elif block:
                wanted = "refused: blocked by an operator, for 3h"
            elif one["port"] in trust:
                wanted = "accepted: trusted for 1h"
            elif access == "trusted only":
                wanted = f"refused: not trusted, and the mode is {mode}"
            elif access == "limited" and ban:
                wanted = "refused: banned for 2h; a login on another service or 'unban' lifts it"
            else:
                wanted = f"accepted: {access}, the mode is {mode}"
            assert rules.decision(parse.address(address), one, trust, ban, block, found) == wanted


def test_decision_knows_the_networks_of_each_family():
    found = settings.resolve({"trusted": {"networks_ipv6": ["2001:db8::/48"]}})
    imap = service("imap", "private")
    assert rules.decision(parse.address("2001:db8::1"), imap, {}, None, None, found) == (
        "accepted: in mailfw:trusted:networks_ipv6"
    )
    assert rules.decision(parse.address("192.0.2.1"), imap, {}, None, None, found).startswith("refused: not trusted")


def test_a_refusal_is_only_observed_when_nothing_is_enforced():
    lax, strict = settings.resolve({"enforce": False}), settings.resolve({})
    assert rules.observed("refused: banned", lax) == "accepted: mailfw:enforce is false; it would be refused: banned"
    assert rules.observed("accepted: trusted", lax) == "accepted: trusted"
    assert rules.observed("refused: banned", strict) == "refused: banned"
