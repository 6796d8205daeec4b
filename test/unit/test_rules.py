import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import parse, rules, settings
from unit.rendering import KEY, ROLES, Rules, pillars

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
END = {"open": "goto settled", "limited": "goto opening", "trusted only": "goto untrusted"}
OVERRIDES = [{}, {"sieve": "private"}, {"submission": "public", "imap": "protected", "imaps": "autoban"}]


def of_mode(mode, services=None, **pillar):
    return settings.resolve(
        {"protection": {"type": mode, "services": services or {}}, "fleet": {"keys": [KEY]}, **pillar}
    )


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
    wanted = {25: "goto settled"} if "postfix" in roles else {}
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
    assert re.findall(r"[ds]port vmap @(\w+)", rendered.text) == ["services", "counting"]
    assert not re.findall(r"[ds]port (?:[=!<>]+ *)?[\d{]", rendered.text)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", settings.LOGIN_SERVICES)
def test_changed_service_is_changed_in_every_map(name, mode, root):
    before = Rules(of_mode(mode), root)
    port = SERVICES[name].port
    for change, new_port in ((False, None), ({"port": 2587}, 2587)):
        changed = settings.resolve({"protection": {"type": mode}, "services": {name: change}})
        rendered = Rules(changed, root)
        for kind in ("services", "counting"):
            wanted = before.verdicts(kind)
            verdict = wanted.pop(port, None)
            if new_port and verdict:
                wanted[new_port] = verdict
            assert rendered.verdicts(kind) == wanted


def test_role_whose_services_are_all_switched_off_has_an_empty_file(root):
    found = settings.resolve({"services": {"submission": False, "submissions": False}})
    assert rules.files(found)["postfix.nft"] == []
    rendered = Rules(found, root)
    assert rendered.files["postfix.nft"].strip() == ""
    assert set(rendered.verdicts("services")) == {25, 143, 993, 110, 995, 4190}


@pytest.mark.parametrize("mode", MODES)
def test_port_25_is_never_guarded(mode, root):
    rendered = Rules(of_mode(mode), root)
    assert rendered.verdicts("services")[25] == "goto settled"
    assert rendered.statements("settled")[-1] == "accept"
    assert 25 not in rendered.verdicts("counting")


@given(pillar=pillars)
def test_rendered_rules_name_nothing_that_is_not_there(root, pillar):
    rendered = Rules(settings.resolve(pillar), root)
    assert rendered.text.count("{") == rendered.text.count("}")
    assert set(re.findall(r"(?:goto|jump) (\w+)", rendered.text)) <= rendered.objects["chain"].keys()
    assert set(re.findall(r"counter name (?!meta )(\w+)", rendered.text)) <= rendered.counters
    assert set(re.findall(r'"(\w+/\w+/\w+)"', rendered.text)) <= rendered.counters
    used = set(re.findall(r"@(\w+)\b(?!,\d)", rendered.text))  # "@ih,0,8" is a place in a packet
    assert used <= rendered.objects["set"].keys() | rendered.objects["map"].keys()
    assert "None" not in rendered.text
    assert "False" not in rendered.text


@given(pillar=pillars)
def test_nothing_is_refused_when_not_enforced(root, pillar):
    text = Rules(settings.resolve({**pillar, "enforce": False}), root).text
    text = re.sub("#.*", "", text)
    assert not re.findall(r"\b(drop|reject)\b", text)
    assert "flags set" not in text, "packets become resets"
    assert not re.findall(r'"mailfw (?!would |full )', text)


@given(pillar=pillars)
def test_everything_that_is_not_open_can_refuse(root, pillar):
    found = settings.resolve({**pillar, "enforce": True})
    rendered = Rules(found, root)
    for chain in ("blocked", "banned", "refused", "opening"):
        assert re.search(r"\b(drop|reject with tcp reset)$", rendered.statements(chain)[-1])
    assert rendered.statements("untrusted")[-1] in ("counter name held drop", "goto refused")
    for chain in rendered.objects["chain"]:
        if chain.endswith(("_ban", "_ban_network")):
            assert rendered.statements(chain)[-1] == f"goto {chain.rpartition('_ban')[0]}_refuse"
        if chain.endswith("_refuse"):
            assert rendered.statements(chain)[-1].endswith("reject with tcp reset")
        if chain.endswith("_crowded"):
            assert rendered.statements(chain)[-2].endswith("reject with tcp reset")
    assert "would" not in re.sub("#.*", "", rendered.text)
    assert "@observed" not in rendered.text


@given(pillar=pillars)
def test_rules_log_nothing_or_at_a_limited_rate(root, pillar):
    found = settings.resolve(pillar)
    logged = re.findall(r"^\t\t(.*)\blog\b(.*)$", re.sub("#.*", "", Rules(found, root).text), re.M)
    if not found["log"]:
        assert not logged
        return
    limit = f"limit rate {parse.rate_text(found['log']['rate'])} burst 5 packets "
    group = found["log"]["group"]
    end = "level info" if group is None else f"group {group}"
    assert logged
    for before, after in logged:
        assert before.endswith(limit)
        assert re.fullmatch(rf' prefix "mailfw [a-z_ ]+: " {end}', after)


@given(pillar=pillars)
def test_only_the_bits_of_the_pillar_are_touched(root, pillar):
    """Other rules may use the other bits of a connection's mark, so it is never set as a whole."""
    found = settings.resolve(pillar)
    low = found["mark"] & -found["mark"]
    counting, settled, both = (f"{bits:#010x}" for bits in (low, found["mark"] - low, found["mark"]))
    others = f"{0xFFFFFFFF - found['mark']:#010x}"
    text = re.sub("#.*", "", Rules(found, root).text)
    assert set(re.findall(r"ct mark set (ct mark & \S+(?: \| \S+)?)", text)) <= {
        f"ct mark & {others}",
        f"ct mark & {others} | {counting}",
        f"ct mark & {others} | {settled}",
    }
    assert set(re.findall(r"(?<!set )ct mark (?!set)(\S+ \S+ \S+)", text)) <= {
        f"& {counting} !=",
        f"& {settled} !=",
        f"& {both} !=",
        f"& {both} ==",
    }


@given(pillar=pillars)
def test_a_packet_without_a_mark_is_not_counted_for_that(root, pillar):
    """A rule that asks for the mark of a packet that conntrack knows nothing of goes no further."""
    rendered = Rules(settings.resolve(pillar), root)
    for chain in ("opened", "settled"):
        assert rendered.statements(chain)[-1] == "accept"
        assert rendered.statements(chain)[-2].startswith("ct mark set ")


@given(pillar=pillars)
def test_sets_have_the_sizes_of_the_pillar(root, pillar):
    found = settings.resolve(pillar)
    for name, body in Rules(found, root).objects["set"].items():
        size = re.search(r"^\t\tsize (\d+)$", body, re.M)
        if "flags interval" in body:
            assert size is None
        elif name.startswith("older_"):
            assert size[1] == str(rules.OLDER)
        elif name == "break_glass":
            assert size[1] == "1"
        else:
            assert size[1] == str(found["sizes"][rules.size_key(name)])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("trusted_ipv4", "trusted"),
        ("blocked_ipv6", "blocked"),
        ("banned_dovecot_ipv4", "banned"),
        ("banned_networks_postfix_ipv6", "banned"),
        ("rate_dovecot_ipv4", "rates"),
        ("network_rate_postfix_ipv6", "rates"),
        ("waiting_ipv4", "waiting"),
        ("observed_ipv6", "observed"),
    ],
)
def test_size_key(name, key):
    assert rules.size_key(name) == key
    assert key in settings.SCHEMA["sizes"]


@pytest.mark.parametrize(
    ("reaction", "chain", "end"),
    [
        ({"banned": "drop"}, "banned", "counter name banned drop"),
        ({"banned": "reject"}, "banned", "counter name banned reject with tcp reset"),
        ({"blocked": "drop"}, "blocked", "counter name blocked drop"),
        ({"blocked": "reject"}, "blocked", "counter name blocked reject with tcp reset"),
        ({"untrusted": "hold"}, "untrusted", "counter name held drop"),
        ({"untrusted": "hold"}, "refused", "counter name untrusted reject with tcp reset"),
        ({"untrusted": "drop"}, "untrusted", "goto refused"),
        ({"untrusted": "drop"}, "refused", "counter name untrusted drop"),
        ({"untrusted": "reject"}, "untrusted", "goto refused"),
        ({"untrusted": "reject"}, "refused", "counter name untrusted reject with tcp reset"),
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
    assert "update @rate_dovecot_ipv4 { ip daddr limit rate 7/hour burst 3 packets }" in count
    assert "{ ip6 daddr & ffff:ffff:ffff:ff00:: limit rate 7/hour burst 3 packets }" in count
    assert "{ ip daddr & 255.255.255.0 limit rate over 100/minute burst 100 packets }" in count
    assert "{ ip6 daddr & ffff:ffff:ffff:: limit rate over 100/minute burst 100 packets }" in count
    assert "ip6 saddr . tcp dport @trusted_ipv6 counter name trusted goto settled" in rendered.statements("guarded")
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
    """Break-glass, trusted networks, then blocks, then earned trust; each for both families."""
    families = [("ip saddr", "ipv4"), ("ip6 saddr", "ipv6")]
    trusted = {"networks_ipv4": ["192.0.2.0/24"], "networks_ipv6": ["2001:db8::/48"]}
    blocked = {"networks_ipv4": ["198.51.100.0/24"], "networks_ipv6": ["2001:db8:1::/48"]}
    pillar = {"trusted": {"ipv6_prefix": 128, **trusted}, "autoban": {"ipv6_prefix": 128}, "blocked": blocked}
    assert Rules(settings.resolve(pillar), root).statements("guarded") == [
        "meta l4proto @break_glass counter name break_glass goto settled",
        *(
            f"{saddr} @trusted_networks_{family} counter name trusted_network goto settled"
            for saddr, family in families
        ),
        *(
            f"{saddr} @{name}_{family} goto blocked"
            for saddr, family in families
            for name in ("blocked_networks", "blocked")
        ),
        *(f"{saddr} . tcp dport @trusted_{family} counter name trusted goto settled" for saddr, family in families),
    ]


@pytest.mark.parametrize("blocked", [[], ["ipv4"], ["ipv6"], ["ipv4", "ipv6"]])
def test_open_connections_pass_unless_their_source_is_blocked(root, blocked):
    networks = {"ipv4": "192.0.2.0/24", "ipv6": "2001:db8::/48"}
    lists = {f"networks_{family}": [networks[family]] for family in blocked}
    rendered = Rules(settings.resolve({"blocked": lists, "autoban": {"ipv6_prefix": 128}}), root)
    assert rendered.statements("open") == [
        "ct mark & 0x02000000 != 0 ct mark set ct mark & 0xfcffffff",
        "ct mark & 0x01000000 != 0 tcp window 0 tcp flags & rst == 0 counter name unanswerable drop",
        "socket wildcard 1 return",
        "goto passing",
    ]
    assert rendered.statements("passing") == [
        f"{saddr} != @blocked_networks_{family} " * (family in blocked) + f"{saddr} != @blocked_{family} accept"
        for family, saddr in (("ipv4", "ip saddr"), ("ipv6", "ip6 saddr"))
    ]


def test_hooks_are_in_order(root):
    """Open connections first, since most packets are theirs; the host itself before any port."""
    rendered = Rules(settings.resolve({"mark": 0x14, "autoban": {"ipv6_prefix": 128}}), root)
    settled = "ct mark & 0x00000010 != 0"
    assert rendered.statements("input") == [
        "type filter hook input priority filter - 10; policy accept;",
        f"{settled} @th,104,8 & 0x06 == 0x00 jump passing",
        "ct state established tcp flags & (fin | syn | rst | ack) != syn jump open",
        'iif "lo" accept',
        "tcp dport vmap @services",
    ]
    assert rendered.statements("output") == [
        "type filter hook output priority filter - 10; policy accept;",
        f"{settled} @th,104,8 & 0x07 == 0x00 accept",
        "ct mark & 0x00000014 == 0 ct state established @th,104,8 & 0x02 == 0x00 accept",
        "ct mark & 0x00000004 != 0 @th,104,8 & 0x06 == 0x02 accept",
        f"{settled} goto ended",
        'oif "lo" accept',
        "tcp sport vmap @counting",
    ]


def test_bans_are_between_guarded_and_opening(root):
    found = settings.resolve({"autoban": {"networks": {}, "ipv6_prefix": 128}})
    for role in settings.ROLES:
        assert Rules(found, root).statements(f"{role}_autoban") == [
            "jump guarded",
            f"ip saddr @banned_{role}_ipv4 goto banned",
            f"ip saddr & 255.255.255.0 @banned_networks_{role}_ipv4 goto banned",
            f"ip6 saddr @banned_{role}_ipv6 goto banned",
            f"ip6 saddr & ffff:ffff:ffff:: @banned_networks_{role}_ipv6 goto banned",
            "goto opening",
        ]


def test_a_connection_is_settled_after_the_meter(root):
    """Below the rate it is. What is above it, or did not fit, goes on to be refused; nothing falls out of the chain."""
    rendered = Rules(settings.resolve({"autoban": {"networks": {}, "ipv6_prefix": 128}}), root)
    for role in settings.ROLES:
        chain = f"{role}_autoban"
        counting = rendered.statements(f"{chain}_count")
        assert counting[0] == "jump answering"
        assert counting[-6:] == [
            f"update @rate_{role}_ipv4 {{ ip daddr limit rate 10/minute burst 20 packets }} goto settled",
            f"update @rate_{role}_ipv6 {{ ip6 daddr limit rate 10/minute burst 20 packets }} goto settled",
            "meta l4proto @break_glass goto settled",
            f"ip daddr != @rate_{role}_ipv4 goto {chain}_crowded",
            f"ip6 daddr != @rate_{role}_ipv6 goto {chain}_crowded",
            f"goto {chain}_ban",
        ]
        assert all(line.startswith("update @network_rate_") for line in counting[1:-6])


def test_who_is_not_counted(root):
    """Earned trust, trusted networks and exempt ones, in both families."""
    networks = {"networks_ipv4": ["192.0.2.0/24"], "networks_ipv6": ["2001:db8::/48"]}
    pillar = {"trusted": {"ipv6_prefix": 128, **networks}, "exempt": networks}
    rendered = Rules(settings.resolve(pillar), root)
    families = [("ip daddr", "ipv4"), ("ip6 daddr", "ipv6")]
    *statements, last = rendered.statements("answered")
    assert sorted(line for line in statements if line.endswith("goto settled")) == sorted(
        line
        for daddr, family in families
        for line in (
            f"{daddr} . tcp sport @trusted_{family} goto settled",
            f"{daddr} @trusted_networks_{family} goto settled",
            f"{daddr} @exempt_networks_{family} counter name exempted goto settled",
        )
    )
    assert last.startswith("counter name meta nfproto . tcp sport map {")
    assert '"counted/imap/ipv4"' in last


def test_nobody_above_the_rate_is_refused_while_everything_is_open(root):
    rendered = Rules(settings.resolve({"autoban": {"networks": {}}}), root)
    for role in settings.ROLES:
        assert rendered.statements(f"{role}_autoban_ban_network")[0] == "meta l4proto @break_glass goto settled"


@pytest.mark.parametrize(
    ("rate", "burst", "common"),
    [("10/minute", 20, "100/minute burst 200"), ("100000/day", 10_000, "1000000/day burst 100000")],
)
def test_sources_that_do_not_fit_share_the_rate_of_ten(root, rate, burst, common):
    rendered = Rules(settings.resolve({"autoban": {"rate": rate, "burst": burst}}), root)
    assert rendered.statements("dovecot_autoban_crowded")[-2:] == [
        f"limit rate over {common} packets counter name over_common_rate reject with tcp reset",
        "goto settled",
    ]


@pytest.mark.parametrize(
    ("log", "enforce", "ban", "refuse"),
    [
        ({}, True, "ban dovecot", "refuse banned"),
        ({}, False, "would ban dovecot", "would refuse banned"),
        ({"rate": "2/hour", "group": 0}, True, "ban dovecot", "refuse banned"),
    ],
)
def test_log_statements(root, log, enforce, ban, refuse):
    found = settings.resolve({"log": log, "enforce": enforce})
    rendered = Rules(found, root)
    rate = log.get("rate", "10/minute")
    target = "group 0" if "group" in log else "level info"
    for chain, prefix in (("dovecot_autoban_ban", ban), ("banned", refuse)):
        lines = [line for line in rendered.statements(chain) if " log " in line]
        assert lines
        assert all(
            line.endswith(f'limit rate {rate} burst 5 packets log prefix "mailfw {prefix}: " {target}')
            for line in lines
        )


@given(pillar=pillars)
def test_log_prefixes_fit(root, pillar):
    """The kernel takes up to 127 characters (nf_log.h, NF_LOG_PREFIXLEN)."""
    found = Rules(settings.resolve({**pillar, "log": {}}), root)
    prefixes = re.findall(r'log prefix "([^"]*)"', found.text)
    assert prefixes
    assert all(prefix.startswith("mailfw ") and prefix.endswith(": ") and len(prefix) < 60 for prefix in prefixes)


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
