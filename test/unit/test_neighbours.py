import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import kernel_settings, matching, neighbours, packets, settings
from mailfwlib.foreign import Table, merged, tables, translatable

SETTINGS = settings.resolve({"services": {"pop3": False, "pop3s": False, "sieve": False, "imap": False}})
PORTS = {"smtp": 25, "submission": 587, "submissions": 465, "imaps": 993}
NOT_OVERRIDDEN = "accepting in mailfw does not override another table's drop"
BITS = SETTINGS["mark"]
BIT = BITS & -BITS
MARK = {"ct": {"key": "mark"}}

DPORT = {"payload": {"protocol": "tcp", "field": "dport"}}
SADDR = {"payload": {"protocol": "ip", "field": "saddr"}}
STATE = {"ct": {"key": "state"}}
FLAGS = {"payload": {"protocol": "tcp", "field": "flags"}}
L4PROTO = {"meta": {"key": "l4proto"}}
FROM_SOMEONE = {"match": {"op": "==", "left": SADDR, "right": "198.51.100.1"}}
ACCEPT, DROP, RETURN = {"accept": None}, {"drop": None}, {"return": None}
REJECT = {"reject": {"type": "icmpx", "expr": "admin-prohibited"}}


def match(left, right, op="=="):
    return {"match": {"op": op, "left": left, "right": right}}


def dport(*ports):
    return match(DPORT, {"set": list(ports)} if len(ports) > 1 else ports[0])


def jump(target, kind="jump"):
    return {kind: {"target": target}}


ESTABLISHED = [match(STATE, ["established", "related"], "in"), ACCEPT]


def foreign(chains, sets=(), family="inet", name="filter", hook="input", policy="accept", **table):
    """The tables of a ruleset with a table whose first chain is a base chain: chain -> its rules."""
    base = {"type": "filter", "hook": hook, "prio": 0, "policy": policy}
    entries = [{"metainfo": {"version": "1.0.6"}}, {"table": {"family": family, "name": name, **table}}]
    entries += [{"set": {"family": family, "table": name, **one}} for one in sets]
    for chain, rules in chains.items():
        entries.append({"chain": {"family": family, "table": name, "name": chain, **base}})
        base = {}
        entries += [{"rule": {"family": family, "table": name, "chain": chain, "expr": rule}} for rule in rules]
    return tables(json.loads(json.dumps({"nftables": entries})))


def refused(*rules, policy="accept", **chains):
    """Port -> what an inet table's chain does to it over both families: None, or the sentence without its services."""
    found = foreign({"input": list(rules), **chains}, policy=policy)
    said = {}
    for name, port in PORTS.items():
        service = {"name": name, "port": port}
        sentences = neighbours.refusals(found, {"services": [service]})
        assert len(sentences) <= 1
        said[port] = sentences[0].partition("chain ")[2].replace(f"{name} ({port})", "it") if sentences else None
    return said


def drops(*places):
    return f"input ({', '.join(places)}) drops it: {NOT_OVERRIDDEN}"


BOTH_IPV4_AND_IPV6 = {"ip": True, "ip6": True}
ONLY_IPV4, ONLY_IPV6, NEVER = {"ip": True, "ip6": False}, {"ip": False, "ip6": True}, {"ip": False, "ip6": False}


def depends(on, **other):
    return {"ip": on, "ip6": on, **other}


@pytest.mark.parametrize(
    ("left", "op", "right", "expected"),
    [
        (DPORT, "==", 993, BOTH_IPV4_AND_IPV6),
        (DPORT, "==", 22, NEVER),
        (DPORT, "!=", 22, BOTH_IPV4_AND_IPV6),
        (DPORT, "!=", 993, NEVER),
        (DPORT, ">", 992, BOTH_IPV4_AND_IPV6),
        (DPORT, "<=", 992, NEVER),
        (DPORT, "==", {"range": [900, 993]}, BOTH_IPV4_AND_IPV6),
        (DPORT, "!=", {"range": [900, 993]}, NEVER),
        (DPORT, "==", {"range": [994, 995]}, NEVER),
        (DPORT, "==", {"set": [{"range": [1, 2]}, 993]}, BOTH_IPV4_AND_IPV6),
        (DPORT, "==", {"set": [22, {"range": [1, 2]}]}, NEVER),
        (DPORT, "!=", {"set": [22, {"range": [1, 2]}]}, BOTH_IPV4_AND_IPV6),
        (DPORT, "==", "@ports", BOTH_IPV4_AND_IPV6),
        (DPORT, "==", "@others", NEVER),
        (DPORT, "==", "@unread", depends("tcp dport")),
        ({"payload": {"protocol": "th", "field": "dport"}}, "==", 993, BOTH_IPV4_AND_IPV6),
        ({"payload": {"protocol": "tcp", "field": "sport"}}, "==", 40000, depends("tcp sport")),
        ({"payload": {"protocol": "tcp", "field": "sport"}}, "==", 993, NEVER),
        ({"&": [{"payload": {"protocol": "tcp", "field": "sport"}}, 1]}, "==", 1, depends("tcp sport")),
        ({"payload": {"protocol": "udp", "field": "dport"}}, "!=", 22, NEVER),
        ({"payload": {"protocol": "icmp", "field": "type"}}, "==", "echo-request", NEVER),
        ({"payload": {"base": "th", "offset": 0, "len": 8}}, "==", 1, depends("raw payload")),
        (STATE, "in", ["established", "related"], NEVER),
        (STATE, "in", "new", BOTH_IPV4_AND_IPV6),
        (STATE, "in", ["established", "new"], BOTH_IPV4_AND_IPV6),
        (STATE, "==", {"set": ["established", "new"]}, BOTH_IPV4_AND_IPV6),
        (STATE, "!=", "invalid", BOTH_IPV4_AND_IPV6),
        ({"ct": {"key": "status"}}, "in", "dnat", NEVER),
        ({"ct": {"key": "direction"}}, "==", "original", BOTH_IPV4_AND_IPV6),
        ({"ct": {"key": "mark"}}, "==", 1, depends("ct mark")),
        (FLAGS, "in", "syn", BOTH_IPV4_AND_IPV6),
        (FLAGS, "!", "syn", NEVER),
        (FLAGS, "==", {"set": ["syn", "ack"]}, BOTH_IPV4_AND_IPV6),
        ({"&": [FLAGS, ["fin", "syn", "rst", "ack"]]}, "==", "syn", BOTH_IPV4_AND_IPV6),
        ({"&": [FLAGS, {"|": ["fin", "syn", "rst", "ack"]}]}, "!=", "syn", NEVER),
        ({"&": [FLAGS, {"|": ["syn", "ack"]}]}, "==", {"|": ["syn", "ack"]}, NEVER),
        ({"&": [FLAGS, ["fin", "ack"]]}, "==", 0, BOTH_IPV4_AND_IPV6),
        (L4PROTO, "==", "tcp", BOTH_IPV4_AND_IPV6),
        (L4PROTO, "==", 6, BOTH_IPV4_AND_IPV6),
        (L4PROTO, "==", {"set": ["icmp", "ipv6-icmp"]}, NEVER),
        (L4PROTO, "!=", "tcp", NEVER),
        ({"payload": {"protocol": "ip", "field": "protocol"}}, "==", "tcp", ONLY_IPV4),
        ({"payload": {"protocol": "ip", "field": "protocol"}}, "!=", "icmp", ONLY_IPV4),
        ({"payload": {"protocol": "ip6", "field": "nexthdr"}}, "==", "tcp", ONLY_IPV6),
        ({"meta": {"key": "nfproto"}}, "==", "ipv4", ONLY_IPV4),
        ({"meta": {"key": "protocol"}}, "==", "ip6", ONLY_IPV6),
        ({"meta": {"key": "iif"}}, "==", "lo", NEVER),
        ({"meta": {"key": "iifname"}}, "!=", "lo", BOTH_IPV4_AND_IPV6),
        ({"meta": {"key": "iifname"}}, "==", {"set": ["lo", "eth0"]}, depends("iifname")),
        ({"meta": {"key": "iiftype"}}, "==", "loopback", NEVER),
        ({"meta": {"key": "pkttype"}}, "==", {"set": ["broadcast", "multicast"]}, NEVER),
        ({"meta": {"key": "skuid"}}, "==", 0, depends("meta skuid")),
        (SADDR, "==", "198.51.100.1", depends("ip saddr", ip6=False)),
        (SADDR, "!=", "198.51.100.1", depends("ip saddr", ip6=False)),
        (SADDR, "==", {"prefix": {"addr": "10.0.0.0", "len": 8}}, NEVER),
        (SADDR, "==", {"prefix": {"addr": "8.0.0.0", "len": 6}}, depends("ip saddr", ip6=False)),
        (SADDR, "==", {"range": ["192.168.1.1", "192.168.1.9"]}, NEVER),
        (SADDR, "==", {"range": ["192.168.1.1", "193.0.0.1"]}, depends("ip saddr", ip6=False)),
        (SADDR, "!=", {"prefix": {"addr": "127.0.0.0", "len": 8}}, ONLY_IPV4),
        (SADDR, "==", {"set": ["127.0.0.1", "198.51.100.1"]}, depends("ip saddr", ip6=False)),
        (SADDR, "==", {"set": ["198.51.100.1", "127.0.0.1"]}, depends("ip saddr", ip6=False)),
        ({"&": [{"payload": {"protocol": "udp", "field": "dport"}}, 1]}, "!=", 0, NEVER),
        ({"payload": {"protocol": "ip6", "field": "saddr"}}, "==", {"prefix": {"addr": "fe80::", "len": 10}}, NEVER),
        ({"fib": {"result": "type", "flags": ["daddr"]}}, "==", {"set": ["local", "broadcast"]}, BOTH_IPV4_AND_IPV6),
        ({"fib": {"result": "type", "flags": ["daddr", "iif"]}}, "!=", "local", NEVER),
        ({"fib": {"result": "oif", "flags": ["saddr", "iif"]}}, "==", False, NEVER),
        ({"exthdr": {"name": "frag"}}, "==", True, NEVER),
        ({"tcp option": {"name": "fastopen"}}, "==", True, depends("tcp option")),
        ({"concat": [L4PROTO, DPORT]}, "==", {"set": [{"concat": ["tcp", 993]}]}, BOTH_IPV4_AND_IPV6),
        ({"concat": [L4PROTO, DPORT]}, "==", {"set": [{"concat": ["udp", 993]}, {"concat": ["tcp", 25]}]}, NEVER),
        ({"concat": [SADDR, DPORT]}, "==", {"concat": ["198.51.100.1", 993]}, depends("ip saddr", ip6=False)),
        ({"concat": [SADDR, DPORT]}, "==", {"concat": ["198.51.100.1", 25]}, NEVER),
        ({"concat": [SADDR, DPORT]}, "==", "@unread", depends("@unread", ip6=False)),
    ],
)
def test_match(left, op, right, expected):
    table = Table("inet", "filter", elements={"ports": [{"elem": {"val": 993, "timeout": 9}}], "others": [22]})
    content = match(left, right, op)["match"]
    found = {family: matching.matches(content, packets.opening(family, 993), table) for family in ("ip", "ip6")}
    assert found == expected


def test_policy_drop_refuses_what_no_rule_accepts():
    said = refused(ESTABLISHED, [dport(22), ACCEPT], [dport(25, 587), ACCEPT], policy="drop")
    assert said == {25: None, 587: None, 465: drops("policy drop"), 993: drops("policy drop")}


def test_policy_accept_refuses_nothing():
    assert set(refused(ESTABLISHED, [dport(22), DROP]).values()) == {None}


def test_rules_refuse():
    said = refused([dport(25), DROP], [dport(587), REJECT], [dport(993), {"xt": {"type": "target", "name": "REJECT"}}])
    assert said[465] is None
    assert said[25] == drops("by a rule")
    assert said[587] == said[993] == f"input (by a rule) rejects it: {NOT_OVERRIDDEN}"


def test_first_verdict_counts():
    assert set(refused([dport(25), DROP], [ACCEPT], [DROP]).values()) == {drops("by a rule"), None}


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (match(MARK, 1), "ct mark"),
        ({"limit": {"rate": 10, "burst": 5, "per": "second"}}, "limit"),
        ({"ct count": {"val": 10, "inv": True}}, "ct count"),
        ({"set": {"op": "add", "elem": SADDR, "set": "@dyn", "stmt": [{"limit": {"rate": 1}}]}}, "limit"),
        ({"xt": {"type": "match", "name": "tcp"}}, "xt match tcp"),
        ({"xt": None}, "xt match of iptables"),
        ({"something": {"new": 1}}, "something"),
    ],
)
@pytest.mark.parametrize(
    ("verdict", "policy", "place"), [(ACCEPT, "drop", "policy drop"), (DROP, "accept", "by a rule")]
)
def test_what_depends_is_said_mildly(statement, reason, verdict, policy, place):
    said = refused([dport(25), statement, verdict], policy=policy)
    assert said[25] == f"input ({place}) may drop it: depends on {reason}"
    assert said[993] == (drops("policy drop") if policy == "drop" else None)


def test_reasons_add_up():
    said = refused([match(MARK, 1), ACCEPT], [{"limit": {}}, DROP])
    assert said[25] == "input (by a rule) may drop it: depends on ct mark, limit"


def test_what_depends_does_not_matter_when_all_ways_end_alike():
    assert refused([FROM_SOMEONE, ACCEPT], [dport(25), ACCEPT], policy="accept")[25] is None
    assert refused([{"limit": {}}, DROP], policy="drop")[25] == drops("by a rule", "policy drop")


@pytest.mark.parametrize(
    "statement",
    [
        {"counter": {"packets": 0, "bytes": 0}},
        {"log": {"prefix": "x"}},
        {"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}},
        {"set": {"op": "add", "elem": SADDR, "set": "@seen"}},
        {"xt": {"type": "match", "name": "comment"}},
        {"xt": {"type": "target", "name": "LOG"}},
    ],
)
def test_statements_that_decide_nothing(statement):
    assert refused([statement, DROP])[25] == drops("by a rule")
    assert refused([statement], [ACCEPT], policy="drop")[25] is None


@pytest.mark.parametrize("statement", [{"queue": {"num": 1}}, {"xt": {"type": "target", "name": "NFQUEUE"}}])
def test_programs_decide_of_what_is_queued(statement):
    said = refused([dport(25), statement])
    assert said[25].startswith("input (by a rule) may drop it: depends on ")
    assert said[993] is None


def test_nat_lets_in():
    assert refused([dport(25), {"redirect": {"port": 2525}}], policy="drop") == {
        25: None,
        **dict.fromkeys((587, 465, 993), drops("policy drop")),
    }


@pytest.mark.parametrize(
    ("sub", "kind", "expected"),
    [
        ([[dport(25), ACCEPT], [DROP]], "jump", {25: None, 587: drops("in chain sub")}),
        ([[dport(25), RETURN], [DROP]], "jump", {25: None, 587: drops("in chain sub")}),
        ([[dport(25), RETURN], [DROP]], "goto", {25: drops("policy drop"), 587: drops("in chain sub")}),
        ([], "jump", {25: None, 587: None}),
        ([], "goto", {25: drops("policy drop"), 587: drops("policy drop")}),
        ([[{"continue": None}, DROP]], "jump", {25: None, 587: None}),
    ],
)
def test_chains(sub, kind, expected):
    said = refused([jump("sub", kind)], [ACCEPT], policy="drop", sub=sub)
    assert {port: said[port] for port in expected} == expected


def test_goto_in_a_chain_returns_to_the_caller_of_that_chain():
    said = refused([jump("one")], [dport(25), ACCEPT], one=[[jump("two", "goto")], [ACCEPT]], two=[], policy="drop")
    assert said[25] is None
    assert said[993] == drops("policy drop")


def test_both_branches_alike_are_certain():
    zones = [[match({"meta": {"key": "iifname"}}, "eth0"), jump("zone", "goto")], [jump("zone", "goto")]]
    said = refused([jump("zones")], [REJECT], zones=zones, zone=[[dport(25), ACCEPT]])
    assert said[25] is None
    assert said[993] == f"input (by a rule) rejects it: {NOT_OVERRIDDEN}"


def test_conditional_jump_to_a_chain_that_does_nothing_changes_nothing():
    assert refused([FROM_SOMEONE, jump("sub")], [DROP], sub=[[RETURN]])[25] == drops("by a rule")
    said = refused([match(MARK, 1), jump("sub")], [{"limit": {}}, DROP], sub=[[RETURN]])
    assert said[25] == "input (by a rule) may drop it: depends on limit"


def vmap(key, *pairs):
    return [{"vmap": {"key": key, "data": {"set": [list(pair) for pair in pairs]}}}]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (vmap(STATE, ("established", ACCEPT), ("invalid", DROP)), [None, None]),
        (vmap(STATE, ("established", ACCEPT), ("new", DROP)), [drops("by a rule")] * 2),
        (vmap(DPORT, (22, ACCEPT), ({"range": [20, 30]}, DROP)), [drops("by a rule"), None]),
        (vmap(DPORT, ("*", DROP), (25, ACCEPT)), [None, drops("by a rule")]),
        (vmap(DPORT, (25, jump("sub")), (993, RETURN)), [drops("in chain sub"), None]),
        (vmap(L4PROTO, ("udp", DROP), ("tcp", jump("sub"))), [drops("in chain sub")] * 2),
        (vmap({"payload": {"protocol": "udp", "field": "dport"}}, ("*", DROP)), [None, None]),
        (
            vmap({"meta": {"key": "iifname"}}, ("lo", ACCEPT), ("eth0", DROP)),
            ["input (by a rule) may drop it: depends on iifname"] * 2,
        ),
        (
            [{"vmap": {"key": DPORT, "data": "@unread"}}],
            ["input (by a rule) may drop it: depends on @unread"] * 2,
        ),
    ],
)
def test_verdict_maps(rule, expected):
    said = refused(rule, sub=[[DROP]])
    assert [said[25], said[993]] == expected


def test_elements_of_named_sets():
    found = foreign(
        {"input": [[match(DPORT, "@ports"), ACCEPT], [{"vmap": {"key": DPORT, "data": "@verdicts"}}]]},
        sets=[
            {"name": "ports", "type": "inet_service", "elem": [{"range": [1, 30]}]},
            {"name": "verdicts", "type": "inet_service", "elem": [[587, ACCEPT], [993, DROP]]},
        ],
        policy="drop",
    )
    assert neighbours.refusals(found, SETTINGS) == [
        f"table inet filter, chain input (policy drop) drops submissions (465): {NOT_OVERRIDDEN}",
        f"table inet filter, chain input (by a rule) drops imaps (993): {NOT_OVERRIDDEN}",
    ]


def test_services_are_grouped():
    assert neighbours.refusals(foreign({"input": [[dport(25), ACCEPT]]}, policy="drop"), SETTINGS) == [
        "table inet filter, chain input (policy drop) drops submission (587), submissions (465) and imaps (993): "
        + NOT_OVERRIDDEN
    ]


def test_families_are_told_apart():
    found = foreign({"input": [[dport(25), FROM_SOMEONE, ACCEPT], [dport(587, 465, 993), ACCEPT]]}, policy="drop")
    assert neighbours.refusals(found, SETTINGS) == [
        "table inet filter, chain input (policy drop) may drop smtp (25) over IPv4: depends on ip saddr",
        f"table inet filter, chain input (policy drop) drops smtp (25) over IPv6: {NOT_OVERRIDDEN}",
    ]


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_tables_of_one_family(family):
    (sentence,) = neighbours.refusals(
        foreign({"INPUT": [[dport(25, 587, 465), ACCEPT]]}, (), family, policy="drop"), SETTINGS
    )
    assert sentence == f"table {family} filter, chain INPUT (policy drop) drops imaps (993): {NOT_OVERRIDDEN}"


@pytest.mark.parametrize(
    "options",
    [
        {"hook": "forward"},
        {"hook": "output"},
        {"family": "bridge"},
        {"flags": ["dormant"]},
        {"name": "mailfw"},
    ],
)
def test_chains_that_refuse_no_connection_to_this_host(options):
    assert neighbours.refusals(foreign({"input": [[DROP]]}), SETTINGS)
    assert neighbours.refusals(foreign({"input": [[DROP]]}, **options), SETTINGS) == []


def test_long_lists_are_cut():
    rules = [[dport(25), match({"meta": {"key": key}}, 1), ACCEPT] for key in ("mark", "skuid", "skgid", "cpu")]
    assert refused(*rules, policy="drop")[25].endswith(": depends on meta mark, meta skuid, meta skgid, ...")


# ---- iptables


def test_listing_becomes_a_script_that_loads():
    listing = (
        "table ip filter {\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy drop;\n"
        "\t\tct state established counter packets 0 bytes 0 accept\n"
        '\t\tmeta l4proto tcp xt match "recent" counter packets 0 bytes 0 drop\n'
        "\t\tcounter packets 0 bytes 0 ct mark set ct mark xor 0x1 and 0xffffff00\n\t}\n}\n"
    )
    assert translatable(listing) == (
        "table ip filter {\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy drop;\n"
        "\t\tct state established counter packets 0 bytes 0 accept\n\t\tcounter\n\t\tcounter\n\t}\n}\n"
    )


def test_translation_replaces_opaque_rules_only():
    counter, opaque = {"counter": {"packets": 0, "bytes": 0}}, {"xt": {"type": "match", "name": "x"}}
    before = [[dport(22), ACCEPT], [opaque, counter, ACCEPT], [opaque, counter, DROP]]
    after = [[dport(23), ACCEPT], [dport(25), counter, ACCEPT], [counter]]
    assert merged({"INPUT": before}, {"INPUT": after}) == {"INPUT": [before[0], after[1], before[2]]}
    assert merged({"INPUT": before}, {"INPUT": after[:2]}) == {"INPUT": before}
    assert merged({"INPUT": before}, {}) == {"INPUT": before}


# ---- marks


def set_mark(value):
    return {"mangle": {"key": MARK, "value": value}}


def marked(*rules, hook="prerouting", **options):
    return neighbours.marks(foreign({"chain1": list(rules)}, hook=hook, **options), SETTINGS)


def verb(sentences):
    return [sentence.partition("chain1 ")[2].partition(" bits ")[0] for sentence in sentences]


@pytest.mark.parametrize("hook", ["prerouting", "input", "output", "postrouting", "forward"])
def test_mark_that_is_overwritten(hook):
    assert marked([set_mark(1)], hook=hook) == [
        f"table inet filter, chain chain1 changes bits {BITS:#010x} of the connection mark of submission (587), "
        "submissions (465) and imaps (993): mailfw remembers there what it has to count, so its limits fail open; keep "
        f"these bits in that rule (ct mark set ct mark & {BITS:#010x} | ...), or give mailfw:mark others"
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"|": [MARK, 1]}, []),
        ({"|": [{"&": [MARK, 0xFFFFFF0F]}, 0x10]}, []),
        ({"^": [MARK, 0x00F0]}, []),
        (MARK, []),
        (0, ["changes"]),
        ({"|": [MARK, BIT]}, ["changes"]),
        ({"|": [{"&": [MARK, 0xFF00FFFF]}, {"meta": {"key": "mark"}}]}, ["may change"]),
        ({"|": [MARK, 1 << BITS.bit_length() - 1]}, ["changes"]),
        ({"&": [MARK, 0xFFFF]}, ["changes"]),
        ({"^": [MARK, BIT]}, ["changes"]),
        ({"&": [{"meta": {"key": "mark"}}, 0xFF]}, ["changes"]),
        ({"meta": {"key": "mark"}}, ["may change"]),
        ({"|": [MARK, {"meta": {"key": "mark"}}]}, ["may change"]),
        ({"map": {"key": DPORT, "data": {"set": [[25, 1]]}}}, ["may change"]),
    ],
)
def test_what_becomes_of_the_bit(value, expected):
    assert verb(marked([set_mark(value)])) == expected


def test_the_bits_are_a_setting():
    found = foreign({"chain1": [[set_mark({"&": [MARK, 0xFFFF]})]]})
    assert neighbours.marks(found, {**SETTINGS, "mark": 0x11}) == []
    assert len(neighbours.marks(found, {**SETTINGS, "mark": 0x10000})) == 1
    assert len(neighbours.marks(found, {"services": SETTINGS["services"]})) == 1


@given(
    st.recursive(
        st.sampled_from([MARK, 0, BIT, 0xFFFFFFFF]) | st.integers(0, 2**32 - 1),
        lambda operands: st.builds(lambda op, *values: {op: list(values)}, st.sampled_from("&|^"), operands, operands),
        max_leaves=6,
    )
)
def test_bit_of_an_expression_is_what_arithmetic_says(value):
    def result(value, mark):
        if isinstance(value, int):
            return value
        if value == MARK:
            return mark
        ((op, (one, two)),) = value.items()
        one, two = result(one, mark), result(two, mark)
        return {"&": one & two, "|": one | two, "^": one ^ two}[op]

    unset, is_set = (bool(result(value, mark) & BIT) for mark in (0, BIT))
    said = neighbours._bit_of(value, BIT)
    possible = {(False, False): "0", (True, True): "1", (False, True): "same", (True, False): "other"}[unset, is_set]
    assert said in (possible, "unknown")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ([dport(993), set_mark(1)], ["changes"]),
        ([FROM_SOMEONE, set_mark(1)], ["may change"]),
        ([match(STATE, "new", "in"), set_mark(1)], ["may change"]),
        ([dport(25), set_mark(1)], []),  # nobody logs in there, so it is never counted
        ([match({"payload": {"protocol": "udp", "field": "dport"}}, 53), set_mark(1)], []),
        ([{"mangle": {"key": {"meta": {"key": "mark"}}, "value": MARK}}], []),
        ([{"xt": {"type": "target", "name": "CONNMARK"}}], ["may change"]),
        ([{"xt": {"type": "target", "name": "MARK"}}], []),
    ],
)
def test_rules_that_set_the_mark(rule, expected):
    assert verb(marked(rule)) == expected


@pytest.mark.parametrize(
    ("field", "hook"),
    [
        *(("sport", hook) for hook in ("output", "postrouting", "forward")),
        *(("dport", hook) for hook in ("prerouting", "input", "forward")),
    ],
)
def test_mark_is_found_in_both_directions(field, hook):
    rule = [match({"payload": {"protocol": "tcp", "field": field}}, 993), set_mark(1)]
    (sentence,) = marked(rule, hook=hook)
    assert f"changes bits {BITS:#010x} of the connection mark of imaps (993):" in sentence


def test_mark_in_a_chain_that_is_not_reached():
    assert neighbours.marks(foreign({"chain1": [[ACCEPT], [set_mark(1)]], "unused": [[set_mark(1)]]}), SETTINGS) == []


def vmap_rules(condition):
    """A verdict map that leads to chain1, only from one interface if there is a condition."""
    interface = {"meta": {"key": "iifname"}}
    return [vmap(interface, ("eth0", jump("chain1"))) if condition else vmap(L4PROTO, ("tcp", jump("chain1")))]


@pytest.mark.parametrize(("condition", "expected"), [([], ["changes"]), ([FROM_SOMEONE], ["may change"])])
def test_mark_in_a_chain_that_is_jumped_to(condition, expected):
    found = foreign({"base": [[*condition, jump("chain1")]], "chain1": [[set_mark(1)]]})
    assert verb(neighbours.marks(found, SETTINGS)) == expected
    found = foreign({"base": vmap_rules(condition), "chain1": [[set_mark(1)]]})
    assert verb(neighbours.marks(found, SETTINGS)) == expected
    found = foreign({"chain1": [[*condition, ACCEPT], [set_mark(1)]]}, family="ip")
    assert verb(neighbours.marks(found, SETTINGS)) == (expected if condition else [])


@pytest.mark.parametrize("family", ["ip", "ip6", "bridge", "netdev"])
def test_mark_in_any_family(family):
    hook = "ingress" if family == "netdev" else "prerouting"
    assert verb(marked([set_mark(1)], family=family, hook=hook)) == ["changes"]


# ---- notrack, fast open


def untracked(*rules, pillar=SETTINGS, **chains):
    """What is said of the chain ``pre`` with some rules for what comes in, and others: name -> family, hook, rules."""
    found = foreign({"pre": list(rules)}, hook="prerouting", name="raw") if rules else []
    for name, (family, hook, others) in chains.items():
        found += foreign({name: others}, hook=hook, name="other", family=family)
    return neighbours.untracked(found, pillar)


NOTRACK = {"notrack": None}
NOT_COUNTED = (
    "from being tracked (notrack): mailfw cannot count connections that are not tracked, so its limits do not apply to "
    "them"
)
EACH_ANSWER = (
    "from being tracked (notrack), but not the answers: mailfw still counts connections, but a ban ends those that are "
    "open, too; let both directions be tracked"
)
ONLY_TRUSTED = (
    "from being tracked (notrack), but not what clients send: mailfw takes that for packets of no connection, and "
    "serves only who is trusted; let both directions be tracked"
)
ALL = "submission (587), submissions (465) and imaps (993)"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ([NOTRACK], [f"keeps what clients send to {ALL}"]),
        ([dport(993, 53), NOTRACK], ["keeps what clients send to imaps (993)"]),
        ([dport(993), FROM_SOMEONE, NOTRACK], ["may keep what clients send to imaps (993)"]),
        ([dport(993), {"xt": {"type": "target", "name": "CT"}}], ["may keep what clients send to imaps (993)"]),
        ([dport(25), NOTRACK], []),
        ([match({"payload": {"protocol": "udp", "field": "dport"}}, 993), NOTRACK], []),
        ([dport(993), {"counter": None}], []),
    ],
)
def test_untracked_on_the_way_in(rule, expected):
    assert untracked(rule) == [f"table inet raw, chain pre {what} {EACH_ANSWER}" for what in expected]


@pytest.mark.parametrize("hook", ["output", "postrouting"])
def test_untracked_on_the_way_out(hook):
    rule = [match({"payload": {"protocol": "tcp", "field": "sport"}}, 587), NOTRACK]
    assert untracked(out=("inet", hook, [rule])) == [
        f"table inet other, chain out keeps the answers of submission (587) {ONLY_TRUSTED}"
    ]


def test_untracked_both_ways():
    assert untracked([dport(993), NOTRACK], out=("inet", "output", [[NOTRACK]])) == [
        f"table inet raw, chain pre keeps imaps (993) {NOT_COUNTED}",
        f"table inet other, chain out keeps imaps (993) {NOT_COUNTED}",
        "table inet other, chain out keeps the answers of submission (587) and submissions (465) " + ONLY_TRUSTED,
    ]


def test_what_follows_is_no_more_certain_than_both_directions():
    assert untracked([NOTRACK], out=("inet", "output", [[match(MARK, 1), NOTRACK]])) == [
        f"table inet raw, chain pre may keep {ALL} {NOT_COUNTED}",
        f"table inet other, chain out may keep {ALL} {NOT_COUNTED}",
    ]


def test_families_that_are_not_tracked_in_other_directions_are_told_apart():
    assert untracked([dport(993), NOTRACK], out=("ip", "output", [[NOTRACK]])) == [
        f"table inet raw, chain pre keeps imaps (993) over IPv4 {NOT_COUNTED}",
        f"table ip other, chain out keeps imaps (993) over IPv4 {NOT_COUNTED}",
        f"table inet raw, chain pre keeps what clients send to imaps (993) over IPv6 {EACH_ANSWER}",
        "table ip other, chain out keeps the answers of submission (587) and submissions (465) " + ONLY_TRUSTED,
    ]


@pytest.mark.parametrize(
    ("pillar", "limited"),
    [({"type": "public"}, []), ({"type": "private"}, []), ({"type": "protected"}, ["imaps (993)"])],
)
def test_only_of_limited_services_is_said_what_becomes_of_counting(pillar, limited):
    others = settings.resolve(
        {"protection": pillar, "services": dict.fromkeys(("pop3", "pop3s", "sieve", "imap"), False)}
    )
    said = untracked([NOTRACK], pillar=others) + neighbours.marks(foreign({"chain1": [[set_mark(1)]]}), others)
    assert len(said) == 2 * len(limited)
    assert all(name in sentence and "submission" not in sentence for sentence in said for name in limited)


def test_certain_and_possible_services_are_told_apart():
    rules = [[dport(993), NOTRACK], [FROM_SOMEONE, NOTRACK]]
    found = neighbours.untracked(foreign({"pre": rules}, hook="prerouting", family="ip"), SETTINGS)
    assert [sentence.partition("pre ")[2].partition(" from")[0] for sentence in found] == [
        "keeps what clients send to imaps (993)",
        "may keep what clients send to submission (587) and submissions (465)",
    ]


@pytest.mark.parametrize("setting", ["0\n", "1", "4", "1024"])
def test_no_fast_open_for_servers(setting):
    assert kernel_settings.fast_open(setting) == []


@pytest.mark.parametrize(("setting", "instead"), [("2", 0), ("3\n", 1), ("1027", 1025)])
def test_fast_open_for_servers(setting, instead):
    (sentence,) = kernel_settings.fast_open(setting)
    assert sentence.startswith(f"net.ipv4.tcp_fastopen is {int(setting)}: ")
    assert sentence.endswith(f"; set net.ipv4.tcp_fastopen = {instead}")


def test_no_tables_no_sentences():
    nothing = tables({"nftables": [{"metainfo": {}}]})
    found = [find(nothing, SETTINGS) for find in (neighbours.refusals, neighbours.marks, neighbours.untracked)]
    assert list(itertools.chain(*found)) == []
