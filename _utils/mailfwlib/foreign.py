"""Tables of other programs, as nft lists them: read, never changed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mailfwlib import nft


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


def read() -> list[Table]:
    """Return the tables of others that are loaded, with what it takes to follow a packet through them.

    Never lists the elements of mailfw's own sets. Raises NftError.
    """
    found = tables(json.loads(nft.command("-j", "-t", "list", "ruleset")))
    for table in found:
        _translate(table)
        _read_elements(table)
    return found


def tables(listing: dict[str, Any]) -> list[Table]:
    """Return the tables of others from what ``nft -j list ruleset`` prints; one that is dormant does nothing.

    nft 1.0.6 gives a table's name as its flags, so there a dormant one is taken for one that works.
    """
    found: dict[tuple[str, str], Table] = {}
    for entry in listing["nftables"]:
        kind, content = only(entry)
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


def only(expression: dict[str, Any]) -> tuple[str, Any]:
    """Return the key of an object of nft's JSON that has one, and what it holds: libnftables-json(5)."""
    return next(iter(expression.items()))
