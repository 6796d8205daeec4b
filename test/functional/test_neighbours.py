"""Other people's rules beside mailfw's: what packets meet, what stays as it was, and what mailfw says of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mailfwlib import neighbours, nft
from mailfwlib.settings import SCHEMA, SERVICES
from support.firewall import Firewall
from support.net import Client, Host

BITS = SCHEMA["mark"].default
PORTS = [service.port for service in SERVICES.values()]
NOT_OVERRIDDEN = "accepting in mailfw does not override another table's drop"
#: Reading mail is open and submission is for those who are trusted; others are told so at once.
PROTECTED = {"protection": {"type": "protected"}, "reaction": {"untrusted": "reject"}}
PRIVATE = {"protection": {"type": "private"}, "reaction": {"untrusted": "reject"}}
PUBLIC = {"protection": {"type": "public"}}

#: A host's own firewall that lets in 993 and 587, and drops everything else.
BY_HAND = """
table inet filter {
	chain input {
		type filter hook input priority filter; policy drop;
		ct state established,related accept
		iif "lo" accept
		meta l4proto ipv6-icmp accept
		tcp dport { 993, 587 } accept
	}
}
"""
BY_IPTABLES = [
    "-P INPUT DROP",
    "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-A INPUT -i lo -j ACCEPT",
    "-A INPUT -p tcp -m multiport --dports 587,993 -j ACCEPT",
]


class Foreign:
    """Somebody else's firewall."""

    def __init__(self, kind: str, firewall: Firewall, host: Host):
        self._kind, self._firewall, self._host = kind, firewall, host

    def load(self) -> None:
        if self._kind == "by hand":
            return self._firewall.run(BY_HAND)
        for command, icmp in (("iptables-nft", "icmp"), ("ip6tables-nft", "ipv6-icmp")):
            for rule in [*BY_IPTABLES, f"-A INPUT -p {icmp} -j ACCEPT"]:
                self._host.run(command, *rule.split())
        return None

    def flush(self) -> None:
        if self._kind == "by hand":
            return self._firewall.run("delete table inet filter")
        for command in ("iptables-nft", "ip6tables-nft"):
            self._host.run(command, "-P", "INPUT", "ACCEPT")
            self._host.run(command, "-F")
        return None

    def listing(self) -> str:
        """Return its rules without counters."""
        if self._kind == "by hand":
            return self._firewall.nft("-s", "list", "table", "inet", "filter")
        saved = [self._host.run(f"{command}-nft-save").stdout for command in ("iptables", "ip6tables")]
        return "".join(re.sub(r"^#.*\n| \[\d+:\d+\]", "", text, flags=re.M) for text in saved)


@pytest.fixture(params=["by hand", "iptables"])
def foreign(request: pytest.FixtureRequest, firewall: Firewall, host: Host) -> Foreign:
    return Foreign(request.param, firewall, host)


@pytest.fixture(params=["foreign first", "mailfw first"])
def both(request: pytest.FixtureRequest, firewall: Firewall, foreign: Foreign) -> Foreign:
    """Somebody else's firewall, and mailfw's rules of mode protected, loaded one after the other."""
    if request.param == "foreign first":
        foreign.load()
    firewall.load(**PROTECTED)
    if request.param == "mailfw first":
        foreign.load()
    return foreign


def own(firewall: Firewall) -> str:
    """Return mailfw's rules without counters and elements."""
    return firewall.nft("-s", "-t", "list", "table", "inet", "mailfw")


def test_a_connection_has_to_pass_both(firewall: Firewall, both: Foreign, alice: Client, family: str) -> None:
    trusted, _, stranger = alice.addresses(family)
    firewall.trust(trusted)
    wanted = {993: "open", 587: "open", 995: "silent", 465: "silent", 25: "silent"}
    assert alice.connect_many(list(wanted), trusted) == wanted
    assert alice.connect_many(list(wanted), stranger) == {**wanted, 587: "refused", 465: "refused"}


def test_mode_switch_leaves_the_foreign_rules(firewall: Firewall, both: Foreign, alice: Client, family: str) -> None:
    stranger = alice.addresses(family)[0]
    before = both.listing()
    assert "993" in before
    open_there = {25: "silent", 993: "open", 995: "silent"}
    refused = {25: "silent", 993: "refused", 995: "refused"}
    for pillar, expected in ((PRIVATE, refused), (PUBLIC, open_there), (PROTECTED, open_there)):
        assert firewall.load(**pillar)
        assert both.listing() == before
        assert alice.connect_many([25, 993, 995], stranger) == expected


def test_reload_of_the_foreign_rules_leaves_mailfw(
    firewall: Firewall, both: Foreign, alice: Client, family: str
) -> None:
    trusted = alice.addresses(family)[0]
    firewall.trust(trusted)
    before = own(firewall)
    both.flush()
    assert own(firewall) == before
    assert alice.connect_many([587, 995], trusted) == {587: "open", 995: "open"}
    both.load()
    assert own(firewall) == before
    assert alice.connect_many([587, 995], trusted) == {587: "open", 995: "silent"}


def input_chain(*rules: str, policy: str = "drop", sets: str = "", chains: str = "") -> str:
    """Return a table with an input chain, and what every such chain has."""
    lines = "\n".join(f"\t\t{rule}" for rule in ("ct state established,related accept", *rules))
    return f"""
table inet filter {{
{sets}
{chains}
	chain input {{
		type filter hook input priority filter; policy {policy};
		meta l4proto ipv6-icmp accept
{lines}
	}}
}}
"""


def drops(services: str, where: str = "policy drop", table: str = "inet filter", chain: str = "input") -> str:
    return f"table {table}, chain {chain} ({where}) drops {services}: {NOT_OVERRIDDEN}"


ALL_BUT_IMAPS = "smtp (25), submission (587), submissions (465), imap (143), pop3 (110), pop3s (995) and sieve (4190)"
FIREWALLD = """
table inet firewalld {
	chain filter_PREROUTING {
		type filter hook prerouting priority filter + 10; policy accept;
		icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
		meta nfproto ipv6 fib saddr . mark . iif oif missing drop
	}
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		jump filter_INPUT_ZONES
		reject with icmpx port-unreachable
	}
	chain filter_INPUT_ZONES {
		iifname "eth0" goto filter_IN_public
		goto filter_IN_public
	}
	chain filter_IN_public {
		jump filter_IN_public_allow
		meta l4proto { icmp, ipv6-icmp } accept
	}
	chain filter_IN_public_allow {
		tcp dport 22 accept
		ip6 daddr fe80::/64 udp dport 546 accept
		tcp dport 993 accept
	}
}
"""
#: Rules, and the one sentence about them; they do to packets what it says.
CERTAIN: dict[str, tuple[str, str]] = {
    "a list of ports": (input_chain("tcp dport { ssh, imaps } accept"), drops(ALL_BUT_IMAPS)),
    "a named set": (
        input_chain(
            "tcp dport @mail accept",
            sets="set mail {\n type inet_service\n flags interval\n elements = { 25, 110-995 }\n}",
        ),
        drops("sieve (4190)"),
    ),
    "a verdict map": (
        input_chain("tcp dport vmap { 22 : accept, 25 : drop, 100-600 : accept }", policy="accept"),
        drops("smtp (25)", "by a rule"),
    ),
    "a named verdict map": (
        input_chain(
            "tcp dport vmap @verdicts",
            sets="map verdicts {\n type inet_service : verdict\n elements = { 25 : drop, 993 : accept }\n}",
            policy="accept",
        ),
        drops("smtp (25)", "by a rule"),
    ),
    "chains": (
        input_chain(
            "meta l4proto tcp tcp flags & (fin|syn|rst|ack) == syn ct state new jump TCP",
            "meta l4proto udp ct state new jump UDP",
            chains="chain TCP {\n tcp dport 993 accept\n}\nchain UDP {\n udp dport 53 accept\n}",
            policy="drop",
        ),
        drops(ALL_BUT_IMAPS),
    ),
    "a reject at the end": (
        input_chain("iif lo accept", "tcp dport != { 25, 110-995 } reject with tcp reset", policy="accept"),
        drops("sieve (4190)", "by a rule").replace("drops", "rejects"),
    ),
    "sources that are not on the internet": (
        input_chain("ip saddr 10.0.0.0/8 accept", "ip6 saddr fe80::/10 accept", "tcp dport 993 accept"),
        drops(ALL_BUT_IMAPS),
    ),
    "prerouting": (
        "table inet raw {\n chain pre {\n type filter hook prerouting priority raw; policy accept;\n"
        " fib daddr . iif type local tcp dport 143 drop\n }\n}",
        drops("imap (143)", "by a rule", "inet raw", "pre"),
    ),
    "one family": (
        "table ip6 filter {\n chain input {\n type filter hook input priority 0; policy accept;\n"
        " tcp dport 995 drop\n }\n}",
        drops("pop3s (995)", "by a rule", "ip6 filter"),
    ),
    "one family of two": (
        input_chain("meta nfproto ipv4 tcp dport 995 drop", policy="accept"),
        drops("pop3s (995) over IPv4", "by a rule"),
    ),
    "firewalld": (
        FIREWALLD,
        drops(ALL_BUT_IMAPS, "by a rule", "inet firewalld", "filter_INPUT").replace("drops", "rejects"),
    ),
}
CLIENTS_UNTRACKED = """
table ip raw {
	chain pre {
		type filter hook prerouting priority raw; policy accept;
		udp dport 53 notrack
		tcp dport { 993, 143 } notrack
	}
}
"""
ANSWERS_UNTRACKED = """
table ip raw {
	chain out {
		type filter hook output priority raw; policy accept;
		tcp sport { 993, 143 } notrack
	}
}
"""
#: Rules, and the sentences about them.
OTHER: dict[str, tuple[str, list[str]]] = {
    "accepts": (input_chain("tcp dport 1-65535 accept"), []),
    "an address list": (
        input_chain(
            "tcp dport 25 ip saddr @bad drop",
            sets="set bad {\n type ipv4_addr\n elements = { 203.0.113.200 }\n}",
            policy="accept",
        ),
        ["table inet filter, chain input (by a rule) may drop smtp (25) over IPv4: depends on ip saddr"],
    ),
    "an interface": (
        input_chain('iifname "eth1" accept', "tcp dport != 25 accept"),
        ["table inet filter, chain input (policy drop) may drop smtp (25): depends on iifname"],
    ),
    "a mark that keeps the bit": (
        input_chain("ct mark set ct mark & 0xffffff0f | 0x10", "ct mark set ct mark | 0x1", policy="accept"),
        [],
    ),
    "a mark": (
        "table inet mangle {\n chain pre {\n type filter hook prerouting priority mangle; policy accept;\n"
        " tcp dport 993 ct mark set 0x1\n tcp dport 143 ct mark set meta mark\n }\n}",
        [
            f"table inet mangle, chain pre {verb} bits {BITS:#010x} of the connection mark of {service}: mailfw "
            "remembers there what it has to count, so its limits fail open; keep these bits in that rule (ct mark "
            f"set ct mark & {BITS:#010x} | ...), or give mailfw:mark others"
            for verb, service in (("changes", "imaps (993)"), ("may change", "imap (143)"))
        ],
    ),
    "notrack": (
        CLIENTS_UNTRACKED + ANSWERS_UNTRACKED,
        [
            f"{chain} keeps imap (143) and imaps (993) from being tracked (notrack): mailfw cannot count connections "
            "that are not tracked, so its limits do not apply to them"
            for chain in ("table ip raw, chain pre", "table ip raw, chain out")
        ],
    ),
    "notrack on the way in": (
        CLIENTS_UNTRACKED,
        [
            "table ip raw, chain pre keeps what clients send to imap (143) and imaps (993) from being tracked "
            "(notrack), but not the answers: mailfw still counts connections, but a ban ends those that are open, too; "
            "let both directions be tracked"
        ],
    ),
    "notrack on the way out": (
        ANSWERS_UNTRACKED,
        [
            "table ip raw, chain out keeps the answers of imap (143) and imaps (993) from being tracked (notrack), but "
            "not what clients send: mailfw takes that for packets of no connection, and serves only who is trusted; "
            "let both directions be tracked"
        ],
    ),
}


def said(firewall: Firewall, host: Host) -> list[str]:
    return host.call(neighbours.warnings, firewall.settings)


def refused_ports(alice: Client, family: str) -> set[int]:
    answers = alice.connect_many(PORTS, alice.addresses(family)[0])
    return {port for port, answer in answers.items() if answer != "open"}


def ports_named(sentences: list[str], family: str) -> set[int]:
    """Return the ports that sentences say are refused in a family."""
    found: set[int] = set()
    for sentence in sentences:
        only = re.search(r"^table (ip6?) | over IPv([46]):", sentence)
        version = {None: "", "ip": "4", "ip6": "6"}[only[1]] or only[2] if only else family[-1]
        if version == family[-1]:
            found |= {int(port) for port in re.findall(r"\((\d+)\)", sentence)}
    return found


@pytest.mark.parametrize("name", CERTAIN)
def test_refusals_are_told_and_true(firewall: Firewall, host: Host, alice: Client, name: str) -> None:
    rules, sentence = CERTAIN[name]
    firewall.load(**PUBLIC)
    assert said(firewall, host) == []
    firewall.run(rules)
    assert said(firewall, host) == [sentence]
    for family in ("ipv4", "ipv6"):
        assert refused_ports(alice, family) == ports_named([sentence], family)


@pytest.mark.parametrize("name", OTHER)
def test_warnings(firewall: Firewall, host: Host, name: str) -> None:
    rules, sentences = OTHER[name]
    firewall.run(rules)
    firewall.load()
    assert said(firewall, host) == sentences


def test_nothing_is_said_of_mailfw_itself(firewall: Firewall, host: Host) -> None:
    for pillar in (PRIVATE, PROTECTED, PUBLIC, {}):
        firewall.load(**pillar)
        assert said(firewall, host) == []


def iptables(host: Host, *rules: str) -> None:
    for rule in rules:
        for command in ("iptables-nft", "ip6tables-nft"):
            host.run(command, *rule.split())


#: What ufw makes of "deny incoming", with 25, 465 and 993 allowed.
UFW = [
    *(f"-N ufw-{name}" for name in ("before-input", "user-input", "logging-deny", "not-local")),
    "-A INPUT -j ufw-before-input",
    "-A ufw-before-input -i lo -j ACCEPT",
    "-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-A ufw-before-input -m conntrack --ctstate INVALID -j ufw-logging-deny",
    "-A ufw-before-input -m conntrack --ctstate INVALID -j DROP",
    "-A ufw-before-input -p ipv6-icmp -j ACCEPT",
    "-A ufw-before-input -p udp --sport 67 --dport 68 -j ACCEPT",
    "-A ufw-before-input -j ufw-not-local",
    "-A ufw-before-input -j ufw-user-input",
    "-A ufw-logging-deny -m limit --limit 3/min --limit-burst 10 -j LOG",
    "-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN",
    "-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j ufw-logging-deny",
    "-A ufw-not-local -j DROP",
    "-A ufw-user-input -p tcp --dport 25 -j ACCEPT",
    "-A ufw-user-input -p tcp -m multiport --dports 465,993 -j ACCEPT -m comment --comment dapp_Mail",
    "-P INPUT DROP",
]


def test_refusals_of_ufw_are_told_and_true(firewall: Firewall, host: Host, alice: Client) -> None:
    firewall.load(**PUBLIC)
    iptables(host, *UFW)
    rest = "submission (587), imap (143), pop3 (110), pop3s (995) and sieve (4190)"
    assert said(firewall, host) == [
        drops(rest, table="ip filter", chain="INPUT"),
        drops(rest, table="ip6 filter", chain="INPUT"),
    ]
    for family in ("ipv4", "ipv6"):
        assert refused_ports(alice, family) == {587, 143, 110, 995, 4190}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            "-A INPUT -p tcp --dport 993 -m recent --update --seconds 30 --hitcount 6 -j DROP",
            "table {} filter, chain INPUT (by a rule) may drop imaps (993): depends on xt match recent",
        ),
        (
            "-A INPUT -p tcp --dport 993 -m conntrack --ctstate NEW -m multiport ! --dports 25,143 -j REJECT",
            "table {} filter, chain INPUT (by a rule) rejects imaps (993): " + NOT_OVERRIDDEN,
        ),
        ("-A INPUT -p tcp -m multiport --dports 22,53 -j REJECT", None),
        (
            "-t mangle -A PREROUTING -p tcp --dport 993 -j CONNMARK --set-mark 1",
            f"table {{}} mangle, chain PREROUTING changes bits {BITS:#010x} of the connection mark of imaps (993): ",
        ),
        (
            "-t mangle -A PREROUTING -p tcp --dport 993 -j CONNMARK --set-xmark 0x1/0xff",
            f"table {{}} mangle, chain PREROUTING may change bits {BITS:#010x} of the connection mark of imaps (993): ",
        ),
        ("-t mangle -A PREROUTING -p tcp --dport 993 -j CONNMARK --restore-mark", None),
        (
            "-t mangle -A PREROUTING -p tcp --dport 993 -j CONNMARK --save-mark --nfmask 0xff --ctmask 0xff",
            f"table {{}} mangle, chain PREROUTING may change bits {BITS:#010x} of the connection mark of imaps (993): ",
        ),
        ("-t mangle -A PREROUTING -p tcp --dport 993 -j CONNMARK --or-mark 1", None),
        (
            "-t raw -A PREROUTING -p tcp --dport 993 -j CT --notrack",
            "table {} raw, chain PREROUTING keeps what clients send to imaps (993) from being tracked (notrack), ",
        ),
        (
            "-t raw -A PREROUTING -p tcp --dport 993 -j CT --zone 3",
            "table {} raw, chain PREROUTING may keep what clients send to imaps (993) from being tracked (notrack), ",
        ),
        ("-t raw -A PREROUTING -p udp --dport 53 -j CT --notrack", None),
    ],
)
def test_warnings_of_iptables(firewall: Firewall, host: Host, rule: str, expected: str | None) -> None:
    firewall.load()
    iptables(host, rule)
    found = said(firewall, host)
    assert len(found) == (2 if expected else 0)
    for sentence, family in zip(found, ("ip", "ip6")):
        assert sentence.startswith(str(expected).format(family))


def test_fast_open(firewall: Firewall, host: Host) -> None:
    setting = Path("/proc/sys/net/ipv4/tcp_fastopen")
    before = host.call(setting.read_text)
    firewall.load()
    try:
        host.call(setting.write_text, "1")
        assert said(firewall, host) == []
        host.call(setting.write_text, "3")
        (sentence,) = said(firewall, host)
        assert sentence.startswith("net.ipv4.tcp_fastopen is 3: ")
        assert sentence.endswith("set net.ipv4.tcp_fastopen = 1")
    finally:
        host.call(setting.write_text, before)


LIMITED: dict[str, Any] = {"autoban": {"rate": "2/hour", "burst": 2}}


@pytest.mark.parametrize("name", ["nothing", "a mark", "notrack"])
def test_limits_fail_as_the_warnings_say(firewall: Firewall, host: Host, alice: Client, name: str) -> None:
    firewall.load(**LIMITED)
    if name != "nothing":
        firewall.run(OTHER[name][0])
    assert bool(said(firewall, host)) == (name != "nothing")
    answers = [alice.connect(993, alice.ipv4[0]) for _ in range(6)]
    assert answers[:2] == ["open", "open"]
    assert (answers[-1] == "open") == (name != "nothing")


def test_handshakes_are_not_counted_where_only_answers_are_tracked(firewall: Firewall, alice: Client) -> None:
    """Conntrack finds the SYN/ACK invalid there; it counts for nobody, or forged SYNs would."""
    firewall.load(**LIMITED)
    firewall.run(CLIENTS_UNTRACKED)
    answers = [alice.connect(993, alice.ipv4[0]) for _ in range(4)]
    assert answers[:2] == ["open", "open"]
    assert "open" not in answers[2:]


@pytest.mark.parametrize(("rules", "goes_on"), [("", True), (CLIENTS_UNTRACKED, False)], ids=["tracked", "notrack"])
def test_a_ban_ends_open_sessions_where_only_answers_are_tracked(
    firewall: Firewall, alice: Client, rules: str, goes_on: bool
) -> None:
    """As the warning says: a session counts once, however long it is, and does not outlive the ban of its source."""
    firewall.load(**LIMITED)
    firewall.run(rules)
    stranger = alice.ipv4[1]
    session = alice.open(993, stranger)
    assert [session.talks() for _ in range(4)] == [True] * 4
    assert alice.connect(993, stranger) == "open"
    assert [alice.connect(993, stranger) for _ in range(2)] == ["silent", "silent"]
    assert session.talks() == goes_on
    session.close()


def test_only_who_is_trusted_is_served_where_no_answers_are_tracked(firewall: Firewall, alice: Client) -> None:
    """As the warning says."""
    firewall.load(**LIMITED)
    firewall.run(ANSWERS_UNTRACKED)
    trusted, stranger, _ = alice.ipv4
    firewall.trust(trusted)
    assert alice.connect(993, stranger) == "silent"
    session = alice.open(993, trusted)
    assert [session.talks() for _ in range(4)] == [True] * 4
    session.close()


@pytest.mark.parametrize("name", [name for name in OTHER if name.startswith("notrack")])
def test_nothing_is_said_of_tracking_where_nothing_is_counted(
    firewall: Firewall, host: Host, alice: Client, name: str
) -> None:
    firewall.load(**PRIVATE)
    firewall.run(OTHER[name][0])
    assert said(firewall, host) == []
    trusted, stranger, _ = alice.ipv4
    firewall.trust(trusted)
    assert alice.connect(993, stranger) == "refused"
    session = alice.open(993, trusted)
    firewall.untrust(trusted)
    assert [session.talks() for _ in range(4)] == [True] * 4
    session.close()


def test_big_sets_cost_nothing(firewall: Firewall, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither mailfw's sets nor others' address lists are read."""
    asked: list[tuple[str, ...]] = []
    command = nft.command
    monkeypatch.setattr(nft, "command", lambda *words, **more: asked.append(words) or command(*words, **more))
    firewall.load()
    firewall.run(OTHER["an address list"][0])
    firewall.run("add set inet filter ports { type inet_service; }; add rule inet filter input tcp dport @ports drop")
    asked.clear()
    assert said(firewall, host) == OTHER["an address list"][1]
    assert asked == [("-j", "-t", "list", "ruleset"), ("-j", "list", "set", "inet", "filter", "ports")]
