"""What other firewall rules and settings of a host do to mailfw's promises.

A packet has to pass every table, so another table's drop ends what mailfw accepts; another table may also change the
mark that mailfw counts with, or keep connections from being tracked. Rules of others are read, never changed: a
three-valued evaluator follows one packet through them, and each match says yes, no, or what it depends on.

What it cannot see: iptables-legacy, whose rules nft does not show; a drop in netdev or bridge tables, in forward and
output chains, in traffic control, in BPF programs and outside the host; ports that another table's NAT changes, and
what depends on which tables load or unload rules later.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from mailfwlib import nft, parse
from mailfwlib.settings import Settings

FASTOPEN = Path("/proc/sys/net/ipv4/tcp_fastopen")
#: The bit of tcp_fastopen for servers (Documentation/networking/ip-sysctl.rst).
FASTOPEN_SERVER = 2

#: Clients connect from ports above the well-known ones: RFC 6335, section 6.
FIRST_CLIENT_PORT = 1024

#: What a match says of a packet: yes, no, or what that depends on.
Answer = Union[bool, str]
Reasons = tuple[str, ...]
#: Where a packet goes: ``accept``, ``policy drop``, ``next`` (rule), ``return``, or ``drop``/``reject`` and the chain.
End = tuple[str, str]
#: The ends that are possible, and what each depends on.
Ends = dict[End, Reasons]
#: What is known of a packet: ``tcp dport`` -> 993. Flags are frozensets; everything else about it is unknown.
Packet = dict[str, Any]

ACCEPT, NEXT, RETURN, POLICY_DROP = ("accept", ""), ("next", ""), ("return", ""), ("policy drop", "")
REFUSED = ("drop", "reject", "policy drop")

#: Protocols whose fields a TCP packet does not have; nft makes a match on one depend on the protocol.
_OTHER_PROTOCOLS = {"udp", "udplite", "sctp", "dccp", "icmp", "icmpv6", "igmp", "ah", "esp", "comp", "arp"}
#: Sources that no client on the internet has: RFC 6890, RFC 6598, RFC 5771, RFC 4291.
_NOT_INTERNET = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.168.0.0/16", "224.0.0.0/3", "::/127", "fc00::/7", "fe80::/10", "ff00::/8"),
    )
]
#: Statements that end a rule but let the packet in, and those that change nothing of where it goes: nft(8).
_ACCEPTING = {"dnat", "snat", "redirect", "masquerade", "fwd", "synproxy"}
_NEUTRAL = {
    *("counter", "log", "mangle", "notrack", "dup", "flow", "tproxy", "secmark", "last"),
    *("ct helper", "ct timeout", "ct expectation"),
}
#: The same for targets of iptables: iptables-extensions(8).
_XT_ACCEPTING = {"DNAT", "SNAT", "REDIRECT", "MASQUERADE", "NETMAP", "SYNPROXY"}
_XT_NEUTRAL = {
    *("AUDIT", "CHECKSUM", "CLASSIFY", "CONNMARK", "CONNSECMARK", "CT", "DSCP", "ECN", "HL", "HMARK", "IDLETIMER"),
    *("LED", "LOG", "MARK", "NFLOG", "RATEEST", "SECMARK", "SET", "TCPMSS", "TCPOPTSTRIP", "TEE", "TOS", "TRACE"),
    *("TTL", "ULOG"),
}


@dataclass
class Table:
    """A table of somebody else: its chains, the expressions of each chain's rules, and the elements of its sets."""

    family: str
    name: str
    chains: dict[str, dict[str, Any]] = field(default_factory=dict)
    rules: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)
    #: What each set and map is: ``set`` or ``map``, and the type of its keys.
    kinds: dict[str, tuple[str, Any]] = field(default_factory=dict)
    #: The elements of those sets and maps that were read.
    elements: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def families(self) -> tuple[str, ...]:
        """The families of the packets that pass this table."""
        return (self.family,) if self.family in ("ip", "ip6") else ("ip", "ip6")

    def base_chains(self, *hooks: str) -> Iterator[dict[str, Any]]:
        """Return the chains that the kernel calls at some hooks; without any, at every hook."""
        for chain in self.chains.values():
            if "hook" in chain and (not hooks or chain["hook"] in hooks):
                yield chain

    def place(self, chain: str) -> str:
        """Return how a sentence names a chain."""
        return f"table {self.family} {self.name}, chain {chain}"


# ---- reading


def warnings(settings: Settings) -> list[str]:
    """Return a sentence for everything outside mailfw that gets in the way of what it promises.

    Reads the rules of all tables, but never the elements of mailfw's sets. Raises NftError.
    """
    found = tables(json.loads(nft.command("-j", "-t", "list", "ruleset")))
    for table in found:
        _translate(table)
        _read_elements(table)
    return [
        *refusals(found, settings),
        *marks(found, settings),
        *untracked(found, settings),
        *fast_open(FASTOPEN.read_text(encoding="ascii") if FASTOPEN.exists() else "0"),
    ]


def tables(listing: dict[str, Any]) -> list[Table]:
    """Return the tables of others from what ``nft -j list ruleset`` prints; one that is dormant does nothing.

    nft 1.0.6 gives a table's name as its flags, so there a dormant one is taken for one that works.
    """
    found: dict[tuple[str, str], Table] = {}
    for entry in listing["nftables"]:
        kind, content = _only(entry)
        if kind == "table":
            if f"{content['family']} {content['name']}" != nft.TABLE and "dormant" not in content.get("flags", ()):
                found[content["family"], content["name"]] = Table(content["family"], content["name"])
            continue
        table = found.get((content.get("family"), content.get("table")))
        if not table:
            continue
        if kind == "chain":
            table.chains[content["name"]] = content
        elif kind == "rule":
            table.rules.setdefault(content["chain"], []).append(content["expr"])
        elif kind in ("set", "map"):
            table.kinds[content["name"]] = (kind, content["type"])
            if "elem" in content:
                table.elements[content["name"]] = content["elem"]
    return list(found.values())


def _read_elements(table: Table) -> None:
    """Read the sets and maps that rules look up, except those with addresses, which may be huge and decide nothing."""
    wanted = set(re.findall(r'"@([^"]+)"', json.dumps(table.rules)))
    for name, (kind, type_) in table.kinds.items():
        if name not in wanted or "addr" in json.dumps(type_):
            continue
        try:
            listing = json.loads(nft.command("-j", "list", kind, table.family, table.name, name))
        except nft.NftError:
            continue  # gone by now: what looks it up stays unknown
        table.elements[name] = next(entry[kind] for entry in listing["nftables"] if kind in entry).get("elem", [])


def _translate(table: Table) -> None:
    """Replace what iptables-nft made of a rule, opaque as JSON, by nft's words for it, where nft has some.

    Text listings have those words; a scratch namespace makes JSON of them.
    """
    if not any(_is_opaque(expressions) for rules in table.rules.values() for expressions in rules):
        return
    name = (table.family, table.name)
    try:
        script = translatable(nft.command("-t", "list", "table", *name))
        listing = nft.in_scratch_namespace(script, "-j -t list ruleset")
    except nft.NftError:
        return  # its matches stay unknown
    for translated in tables(json.loads(listing)):
        table.rules = merged(table.rules, translated.rules)


#: Rules that nft cannot say in its own words, or says wrongly: CONNMARK's masks (libxt_CONNMARK.c, iptables 1.8.9).
_UNTRANSLATED = re.compile(r"^\t\t.*\b(xt (match|target) |xor |ct mark set mark and ).*$", re.M)


def translatable(text: str) -> str:
    """Return a table's listing as a script that loads: what nft cannot say becomes a rule with a counter alone."""
    return _UNTRANSLATED.sub("\t\tcounter", text)


def merged(rules: dict[str, list[Any]], translated: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return rules with the opaque ones replaced by their translation, if there is one."""
    result = {}
    for chain, originals in rules.items():
        others = translated.get(chain, [])
        if len(others) != len(originals):
            others = originals
        result[chain] = [
            other if _is_opaque(original) and any("counter" not in expression for expression in other) else original
            for original, other in zip(originals, others)
        ]
    return result


def _is_opaque(expressions: list[dict[str, Any]]) -> bool:
    return any("xt" in expression for expression in expressions)


# ---- packets


def opening(family: str, port: int) -> Packet:
    """Return what is known of the first packet of a connection from the internet to a port of this host."""
    return {
        **incoming(family, port),
        "tcp flags": frozenset({"syn"}),
        "ct state": frozenset({"new"}),
        "ct direction": "original",
        "ct status": frozenset(),
    }


def incoming(family: str, port: int) -> Packet:
    """Return what is known of all packets to a port of this host."""
    return {
        **_common(family),
        "tcp dport": port,
        "th dport": port,
        "fib daddr type": "local",
        "fib daddr . iif type": "local",
        "meta pkttype": "host",
    }


def outgoing(family: str, port: int) -> Packet:
    """Return what is known of all packets from a port of this host."""
    return {**_common(family), "tcp sport": port, "th sport": port}


def _common(family: str) -> Packet:
    return {
        "family": family,
        "meta l4proto": "tcp",
        "ip protocol": "tcp",
        "ip6 nexthdr": "tcp",
        "meta nfproto": {"ip": "ipv4", "ip6": "ipv6"}[family],
        "meta protocol": family,
    }


def passing(hook: str, family: str, port: int) -> list[Packet]:
    """Return the packets of a port's connections that pass a hook."""
    into, out = incoming(family, port), outgoing(family, port)
    return {"forward": [into, out], "output": [out], "postrouting": [out], "egress": [out]}.get(hook, [into])


# ---- matches


def _only(expression: dict[str, Any]) -> tuple[str, Any]:
    """Return the key of an object of nft's JSON that has one, and what it holds: libnftables-json(5)."""
    return next(iter(expression.items()))


def name_of(expression: Any) -> str:
    """Return what nft calls the field that an expression reads."""
    if not isinstance(expression, dict):
        return str(expression)
    kind, content = _only(expression)
    if kind == "payload":
        return f"{content['protocol']} {content['field']}" if "protocol" in content else "raw payload"
    if kind == "meta":
        return str(content["key"]) if content["key"].startswith(("iif", "oif")) else f"meta {content['key']}"
    if kind == "ct":
        return f"ct {content['key']}"
    if kind == "fib":
        return f"fib {' . '.join(content['flags'])} {content['result']}"
    if kind in ("&", "|", "^", "<<", ">>"):
        return name_of(content[0])
    return str(kind)


def matches(content: dict[str, Any], packet: Packet, table: Table) -> Answer:
    """Return whether a match statement is true of a packet."""
    left, right, op = content["left"], content["right"], content["op"]
    if _cannot_have(left, packet):
        return False
    if op in ("==", "!="):
        answer = _equals(left, right, packet, table)
        return not answer if op == "!=" and isinstance(answer, bool) else answer
    value, other = _value(left, packet), _flags(right)
    if isinstance(value, frozenset) and other is not None:
        return bool(value & other) if op == "in" else not value & other if op == "!" else name_of(left)
    if isinstance(value, int) and isinstance(right, int) and op in _ORDER:
        return bool(_ORDER[op](value, right))
    return name_of(left)


_ORDER: dict[str, Any] = {
    "<": int.__lt__,
    ">": int.__gt__,
    "<=": int.__le__,
    ">=": int.__ge__,
}


def _cannot_have(left: Any, packet: Packet) -> bool:
    """Return whether a packet lacks a field: it is another protocol's or the other family's."""
    if isinstance(left, dict) and "concat" in left:
        return any(_cannot_have(part, packet) for part in left["concat"])
    if isinstance(left, dict) and "&" in left:
        return _cannot_have(left["&"][0], packet)
    protocol = name_of(left).partition(" ")[0] if isinstance(left, dict) and "payload" in left else ""
    return protocol in _OTHER_PROTOCOLS or (protocol in ("ip", "ip6") and protocol != packet["family"])


def _value(left: Any, packet: Packet) -> Any:
    """Return the value of a field, masked if it is; None when it is not known."""
    if isinstance(left, dict) and "&" in left:
        value, mask = _value(left["&"][0], packet), left["&"][1]
        flags = _flags(mask)
        if isinstance(value, frozenset) and flags is not None:
            return value & flags
        return value & mask if isinstance(value, int) and isinstance(mask, int) else None
    return packet.get(name_of(left))


def _flags(right: Any) -> frozenset[str] | None:
    """Return a set of flags from the forms that nft has for one; None when it is something else."""
    if isinstance(right, str):
        return frozenset({right})
    if isinstance(right, dict) and set(right) == {"|"}:
        right = right["|"]
    if isinstance(right, list):
        parts = [_flags(part) for part in right]
        return None if None in parts else frozenset().union(*(part for part in parts if part is not None))
    return frozenset() if right == 0 else None


def _equals(left: Any, right: Any, packet: Packet, table: Table) -> Answer:
    """Return whether a field is a value, or in a set of values."""
    if isinstance(right, str) and right.startswith("@"):
        if right[1:] not in table.elements:
            return name_of(left) if not _is_concatenation(left) else right
        right = {"set": table.elements[right[1:]]}
    if isinstance(right, dict):
        if "set" in right:
            return _any(_equals(left, one, packet, table) for one in right["set"])
        if "elem" in right:
            return _equals(left, right["elem"]["val"], packet, table)
        if "concat" in right and _is_concatenation(left):
            return _all(_equals(*pair, packet, table) for pair in zip(left["concat"], right["concat"]))
    return True if right == "*" else _is(left, right, packet)


def _is_concatenation(left: Any) -> bool:
    return isinstance(left, dict) and "concat" in left


def _is(left: Any, right: Any, packet: Packet) -> Answer:
    """Return whether a field has one value, or one in a range."""
    value, name = _value(left, packet), name_of(left)
    if isinstance(value, frozenset):
        flags = _flags(right)
        return name if flags is None else value == flags
    if value is None:
        return False if _is_strange(left, name, right) else name
    if isinstance(right, dict) and "range" in right:
        low, high = right["range"]
        return low <= value <= high if all(isinstance(each, int) for each in (value, low, high)) else name
    if value == "tcp" and right == socket.IPPROTO_TCP:
        return True  # nft without /etc/protocols
    return bool(value == right) if isinstance(right, (str, int)) else name


def _is_strange(left: Any, name: str, right: Any) -> bool:
    """Return whether a value is one that no connection from the internet has, though its own is not known."""
    if name in ("iif", "iifname", "oif", "oifname"):
        return bool(right == "lo")
    if name in ("iiftype", "oiftype"):
        return bool(right == "loopback")
    if name in ("ip saddr", "ip6 saddr") and "payload" in left:
        return _is_not_internet(right)
    if name in ("tcp sport", "tcp dport", "th sport", "th dport"):
        return "payload" in left and isinstance(right, int) and right < FIRST_CLIENT_PORT
    if name.startswith("fib saddr"):
        return right is False  # no route back to the source
    return "exthdr" in left and right is True


def _is_not_internet(right: Any) -> bool:
    if isinstance(right, dict) and "range" in right:
        first, last = (_special(str(end)) for end in right["range"])
        return first is not None and first == last
    if isinstance(right, dict) and "prefix" in right:
        return _special("{addr}/{len}".format(**right["prefix"])) is not None
    return isinstance(right, str) and _special(right) is not None


@functools.lru_cache(maxsize=65536)
def _special(text: str) -> parse.Network | None:
    """Return the network without internet clients that an address or a network is in."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        return None
    for special in _NOT_INTERNET:
        if network.version == special.version and network.subnet_of(special):  # type: ignore[arg-type]
            return special
    return None


def _any(answers: Iterable[Answer]) -> Answer:
    reason: Answer = False
    for answer in answers:
        if answer is True:
            return True
        reason = reason or answer
    return reason


def _all(answers: Iterable[Answer]) -> Answer:
    reason: Answer = True
    for answer in answers:
        if answer is False:
            return False
        reason = answer if reason is True else reason
    return reason


# ---- chains


class Walk:
    """One packet's ways through the chains of one table, and the statements that it may meet there."""

    def __init__(self, table: Table, packet: Packet):
        self._table, self._packet = table, packet
        self._known: dict[str, Ends] = {}
        #: The statements that change something else than the packet's way: its chain, itself, whether it is certain.
        self.met: list[tuple[str, dict[str, Any], bool]] = []

    def base_chain(self, chain: dict[str, Any]) -> Ends:
        """Return where a packet may end in a base chain: accepted, or refused."""
        ends = dict(self.chain(chain["name"]))
        if RETURN in ends:
            reasons = ends.pop(RETURN)
            ends.setdefault(POLICY_DROP if chain.get("policy") == "drop" else ACCEPT, reasons)
        return ends

    def chain(self, name: str, certain: bool = True) -> Ends:
        """Return where a packet may end in a chain; RETURN is the caller's next rule.

        ``certain``: whether the packet certainly comes here.
        """
        if name not in self._known:
            self._known[name] = self._follow(name, certain)
        return self._known[name]

    def _follow(self, name: str, certain: bool) -> Ends:
        ends: Ends = {}
        so_far: Reasons = ()
        for expressions in self._table.rules.get(name, []):
            ways = self._rule(name, expressions, certain and not so_far)
            for end, reasons in ways.items():
                if end != NEXT:
                    ends.setdefault(end, _together(so_far, reasons))
            if NEXT not in ways:
                return ends
            if len(ways) > 1:
                so_far = _together(so_far, ways[NEXT])
        ends.setdefault(RETURN, so_far)
        return ends

    def _rule(self, chain: str, expressions: list[dict[str, Any]], certain: bool) -> Ends:
        reasons: Reasons = ()
        for expression in expressions:
            kind, content = _only(expression)
            if kind == "vmap":
                return _conditional(self._verdict_map(chain, content, certain and not reasons), reasons)
            ends = self._verdict(chain, kind, content, certain and not reasons)
            if ends is not None:
                return _conditional(ends, reasons)
            answer = self._statement(kind, content)
            if answer is False:
                return {NEXT: ()}
            if isinstance(answer, str):
                reasons = _together(reasons, (answer,))
            elif kind in ("mangle", "notrack", "xt"):
                self.met.append((chain, expression, certain and not reasons))
        return {NEXT: ()}

    def _verdict_map(self, chain: str, content: dict[str, Any], certain: bool) -> Ends:
        left, data = content["key"], content["data"]
        if isinstance(data, str):
            if data[1:] not in self._table.elements:
                return {ACCEPT: (data,), ("drop", chain): (data,), NEXT: (data,)}
            data = {"set": self._table.elements[data[1:]]}
        ways: Ends = {}
        for key, verdict in sorted(data["set"], key=lambda pair: bool(pair[0] == "*")):
            answer: Answer = not _cannot_have(left, self._packet) and _equals(left, key, self._packet, self._table)
            if answer is False:
                continue
            because = () if answer is True else (answer,)
            ends = self._verdict(chain, *_only(verdict), certain and not because) or {NEXT: ()}
            for end, more in ends.items():
                ways.setdefault(end, _together(because, more))
            if answer is True:
                return ways
        ways.setdefault(NEXT, _together(*ways.values()))
        return ways

    def _verdict(self, chain: str, kind: str, content: Any, certain: bool) -> Ends | None:
        """Return where a verdict leads; None for a statement that is none."""
        if kind in ("drop", "reject"):
            return {(kind, chain): ()}
        if kind == "accept" or kind in _ACCEPTING:
            return {ACCEPT: ()}
        if kind in ("return", "continue"):
            return {RETURN if kind == "return" else NEXT: ()}
        if kind in ("jump", "goto"):
            ends = dict(self.chain(content["target"], certain))
            if kind == "jump" and RETURN in ends:
                ends[NEXT] = ends.pop(RETURN)
            return ends
        if kind == "queue":
            return {ACCEPT: ("queue",), ("drop", chain): ("queue",)}
        return self._target(chain, content["name"]) if kind == "xt" and _is_target(content) else None

    def _target(self, chain: str, name: str) -> Ends | None:
        """Return where a target of iptables leads; None for one that leads nowhere."""
        if name in _XT_NEUTRAL:
            return None
        if name in ("REJECT", "TARPIT"):
            return {("reject", chain): ()}
        reason = (f"xt target {name}",)
        return {ACCEPT: ()} if name in _XT_ACCEPTING else {NEXT: reason, ("drop", chain): reason}

    def _statement(self, kind: str, content: Any) -> Answer:
        """Return whether the rule goes on after a statement."""
        if kind == "match":
            return matches(content, self._packet, self._table)
        if kind in ("set", "map"):
            return "limit" if content.get("stmt") and "limit" in json.dumps(content["stmt"]) else True
        if kind == "xt" and not _is_target(content):
            name = (content or {}).get("name", "of iptables")
            return name == "comment" or f"xt match {name}"
        return kind in (*_NEUTRAL, "xt") or kind


def _is_target(content: dict[str, str] | None) -> bool:
    """Return whether an extension of iptables is a target; nft before 1.0.6 does not say what it is."""
    return content is not None and content["type"] == "target"


def _together(*several: Reasons) -> Reasons:
    return tuple(dict.fromkeys(reason for reasons in several for reason in reasons))


def _conditional(ends: Ends, reasons: Reasons) -> Ends:
    """Return ends that are reached only if what ``reasons`` names is so; if not, the next rule is."""
    made = {end: _together(reasons, more) for end, more in ends.items()}
    if reasons:
        made.setdefault(NEXT, reasons)
    return made


# ---- findings


def refusals(found: list[Table], settings: Settings) -> list[str]:
    """Return a sentence for each chain that refuses connections, or may, which mailfw may have accepted."""
    sentences = []
    for table in found:
        if table.family not in ("ip", "ip6", "inet"):
            continue
        for chain in table.base_chains("prerouting", "input"):
            groups: dict[tuple[str, str, str], list[str]] = {}
            for service in settings["services"]:
                for said, families in _refused(table, chain, service["port"]).items():
                    over = "" if families == table.families else " over " + {"ip": "IPv4", "ip6": "IPv6"}[families[0]]
                    groups.setdefault((*said, over), []).append(_service(service))
            for (verb, why, over), services in groups.items():
                sentences.append(f"{table.place(chain['name'])} {verb} {_listed(services)}{over}: {why}")
    return sentences


def _refused(table: Table, chain: dict[str, Any], port: int) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the words for a chain that refuses a port: (verb, why) -> the families of which that is true."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for family in table.families:
        ends = Walk(table, opening(family, port)).base_chain(chain)
        refused = [end for end in ends if end[0] in REFUSED]
        if refused:
            said = _words(chain["name"], refused, ends)
            found[said] = (*found.get(said, ()), family)
    return found


def _words(base: str, refused: list[End], ends: Ends) -> tuple[str, str]:
    """Return the verb and the reason for some refusals, with the places where they are."""
    certain = len(refused) == len(ends)
    verbs = sorted({"reject" if verdict == "reject" else "drop" for verdict, _ in refused})
    places = [
        "policy drop" if end == POLICY_DROP else "by a rule" if end[1] == base else f"in chain {end[1]}"
        for end in refused
    ]
    verb = " or ".join(f"{verb}s" for verb in verbs) if certain else f"may {' or '.join(verbs)}"
    if certain:
        why = "accepting in mailfw does not override another table's drop"
    else:
        why = "depends on " + _shortened(_together(*(ends[end] for end in refused)))
    return f"({_shortened(dict.fromkeys(places))}) {verb}", why


def _shortened(items: Iterable[str]) -> str:
    """Return a list's first items."""
    listed = list(items)
    return ", ".join([*listed[:3], "..."] if len(listed) > 3 else listed)


def _listed(items: list[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def marks(found: list[Table], settings: Settings) -> list[str]:
    """Return a sentence for each chain that changes the bit of the connection mark that mailfw uses, or may."""
    bit: int = settings.get("mark", 0x01000000)
    sentences = []
    for place, services, certain in _met(found, settings, lambda statement: _changes_mark(statement, bit)):
        verb = "changes" if certain else "may change"
        sentences.append(
            f"{place} {verb} bit {bit:#010x} of the connection mark of {_listed(services)}: mailfw remembers there "
            "what it has to count, so its limits fail open; keep the bit in that rule "
            f"(ct mark set ct mark & {bit:#010x} | ...), or give mailfw:mark another one"
        )
    return sentences


def _changes_mark(statement: dict[str, Any], bit: int) -> bool | None:
    """Return whether a statement changes the bit: None when it may."""
    if statement.get("xt", {}).get("name") == "CONNMARK":
        return None
    if "mangle" not in statement or statement["mangle"]["key"] != {"ct": {"key": "mark"}}:
        return False
    made = _bit_of(statement["mangle"]["value"], bit)
    return None if made == "unknown" else made != "same"


def _bit_of(value: Any, bit: int) -> str:
    """Return what an expression makes of one bit: ``0``, ``1``, ``same`` as in the mark, ``other`` or ``unknown``."""
    if isinstance(value, int):
        return "1" if value & bit else "0"
    if value == {"ct": {"key": "mark"}}:
        return "same"
    op = next(iter(value)) if isinstance(value, dict) else ""
    if op not in ("&", "|", "^"):
        return "unknown"
    first, *others = (_bit_of(operand, bit) for operand in value[op])
    for other in others:
        first = _bit_operation(op, first, other)
    return first


def _bit_operation(op: str, one: str, two: str) -> str:
    neutral, absorbing = {"&": ("1", "0"), "|": ("0", "1"), "^": ("0", "")}[op]
    if absorbing in (one, two):
        return absorbing
    if neutral in (one, two):
        return two if one == neutral else one
    return "other" if op == "^" and "1" in (one, two) and "same" in (one, two) else "unknown"


def untracked(found: list[Table], settings: Settings) -> list[str]:
    """Return a sentence for each chain that keeps connections to mailfw's ports from being tracked, or may."""
    return [
        f"{place} {'keeps' if certain else 'may keep'} {_listed(services)} from being tracked (notrack): mailfw cannot "
        "count connections that are not tracked, so its limits do not apply to them"
        for place, services, certain in _met(found, settings, _untracks)
    ]


def _untracks(statement: dict[str, Any]) -> bool | None:
    """Return whether a statement is notrack; None for iptables' CT, which does other things as well."""
    return None if statement.get("xt", {}).get("name") == "CT" else "notrack" in statement


def _met(found: list[Table], settings: Settings, is_meant: Any) -> Iterator[tuple[str, list[str], bool]]:
    """Return where connections to login ports meet a statement: the place, the services, and whether that is certain.

    ``is_meant`` says of a statement whether it does what is looked for: True, False, or None when it may.
    """
    met: dict[str, dict[str, bool]] = {}
    for table in found:
        for chain in table.base_chains():
            for service in filter(lambda service: service["login"], settings["services"]):
                for place, statement, certain in _meetings(table, chain, service["port"]):
                    if (meant := is_meant(statement)) is not False:
                        services = met.setdefault(table.place(place), {})
                        name = _service(service)
                        services[name] = services.get(name, False) or (certain and meant is True)
    for place, services in met.items():
        for wanted in (True, False):
            if names := [name for name, certain in services.items() if certain is wanted]:
                yield place, names, wanted


def _meetings(table: Table, chain: dict[str, Any], port: int) -> Iterator[tuple[str, dict[str, Any], bool]]:
    for family in table.families:
        for packet in passing(chain["hook"], family, port):
            walk = Walk(table, packet)
            walk.base_chain(chain)
            yield from walk.met


def _service(service: dict[str, Any]) -> str:
    return f"{service['name']} ({service['port']})"


def fast_open(setting: str) -> list[str]:
    """Return a sentence when servers take TCP fast open; ``setting`` is what tcp_fastopen says."""
    value = int(setting)
    if not value & FASTOPEN_SERVER:
        return []
    return [
        f"net.ipv4.tcp_fastopen is {value}: servers may take data in a connection's first packet (TCP fast open), "
        f"before mailfw can tell its source from a forged one; set net.ipv4.tcp_fastopen = {value & ~FASTOPEN_SERVER}"
    ]
