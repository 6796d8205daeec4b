"""One packet's ways through the chains of somebody else's table: where they end, and what it meets on them."""

from __future__ import annotations

import json
from typing import Any

from mailfwlib import matching
from mailfwlib.foreign import Table, only
from mailfwlib.matching import Answer
from mailfwlib.packets import Packet

Reasons = tuple[str, ...]
#: Where a packet goes: ``accept``, ``policy drop``, ``next`` (rule), ``return``, or ``drop``/``reject`` and the chain.
End = tuple[str, str]
#: The ends that are possible, and what each depends on.
Ends = dict[End, Reasons]

ACCEPT, NEXT, RETURN, POLICY_DROP = ("accept", ""), ("next", ""), ("return", ""), ("policy drop", "")
REFUSED = ("drop", "reject", "policy drop")

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
                    ends.setdefault(end, together(so_far, reasons))
            if NEXT not in ways:
                return ends
            if len(ways) > 1:
                so_far = together(so_far, ways[NEXT])
        ends.setdefault(RETURN, so_far)
        return ends

    def _rule(self, chain: str, expressions: list[dict[str, Any]], certain: bool) -> Ends:
        reasons: Reasons = ()
        for expression in expressions:
            kind, content = only(expression)
            if kind == "vmap":
                return _conditional(self._verdict_map(chain, content, certain and not reasons), reasons)
            ends = self._verdict(chain, kind, content, certain and not reasons)
            if ends is not None:
                return _conditional(ends, reasons)
            answer = self._statement(kind, content)
            if answer is False:
                return {NEXT: ()}
            if isinstance(answer, str):
                reasons = together(reasons, (answer,))
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
            answer = matching.equals(left, key, self._packet, self._table)
            if answer is False:
                continue
            because = () if answer is True else (answer,)
            ends = self._verdict(chain, *only(verdict), certain and not because) or {NEXT: ()}
            for end, more in ends.items():
                ways.setdefault(end, together(because, more))
            if answer is True:
                return ways
        ways.setdefault(NEXT, together(*ways.values()))
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
            return matching.matches(content, self._packet, self._table)
        if kind in ("set", "map"):
            return "limit" if content.get("stmt") and "limit" in json.dumps(content["stmt"]) else True
        if kind == "xt" and not _is_target(content):
            name = (content or {}).get("name", "of iptables")
            return name == "comment" or f"xt match {name}"
        return kind in (*_NEUTRAL, "xt") or kind


def _is_target(content: dict[str, str] | None) -> bool:
    """Return whether an extension of iptables is a target; nft before 1.0.6 does not say what it is."""
    return content is not None and content["type"] == "target"


def together(*several: Reasons) -> Reasons:
    """Return some reasons without those that come again."""
    return tuple(dict.fromkeys(reason for reasons in several for reason in reasons))


def _conditional(ends: Ends, reasons: Reasons) -> Ends:
    """Return ends that are reached only if what ``reasons`` names is so; if not, the next rule is."""
    made = {end: together(reasons, more) for end, more in ends.items()}
    if reasons:
        made.setdefault(NEXT, reasons)
    return made
