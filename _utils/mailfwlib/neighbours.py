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
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mailfwlib import foreign, kernel_settings, rules
from mailfwlib.foreign import Table
from mailfwlib.packets import Packet, opening, passing
from mailfwlib.settings import SCHEMA, Settings
from mailfwlib.walk import POLICY_DROP, REFUSED, End, Ends, Walk, together

_FAMILIES = {"ip": "IPv4", "ip6": "IPv6"}


def warnings(settings: Settings) -> list[str]:
    """Return a sentence for everything outside mailfw that gets in the way of what it promises.

    Reads the rules of all tables, but never the elements of mailfw's sets. Raises NftError.
    """
    found = foreign.read()
    return [
        *refusals(found, settings),
        *marks(found, settings),
        *untracked(found, settings),
        *kernel_settings.warnings(),
    ]


def is_certain(sentence: str) -> bool:
    """Return whether one of these sentences is about what happens, and not about what may."""
    return not re.search(r" may (drop|reject|change|keep) ", sentence)


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
                    over = "" if families == table.families else f" over {_FAMILIES[families[0]]}"
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
        why = "depends on " + _shortened(together(*(ends[end] for end in refused)))
    return f"({_shortened(dict.fromkeys(places))}) {verb}", why


def _shortened(items: Iterable[str]) -> str:
    """Return a list's first items."""
    listed = list(items)
    return ", ".join([*listed[:3], "..."] if len(listed) > 3 else listed)


def _listed(items: list[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def marks(found: list[Table], settings: Settings) -> list[str]:
    """Return a sentence for each chain that changes the bits of the connection mark that mailfw uses, or may."""
    bits: int = settings.get("mark", SCHEMA["mark"].default)
    changes = functools.partial(_changes_mark, bits=bits)
    sentences = []
    for place, services, certain in _by_place(_meetings(found, settings, changes)):
        verb = "changes" if certain else "may change"
        sentences.append(
            f"{place} {verb} bits {bits:#010x} of the connection mark of {_listed(services)}: mailfw remembers there "
            "what it has to count, so its limits fail open; keep these bits in that rule "
            f"(ct mark set ct mark & {bits:#010x} | ...), or give mailfw:mark others"
        )
    return sentences


def _changes_mark(statement: dict[str, Any], bits: int) -> bool | None:
    """Return whether a statement changes any of some bits: None when it may."""
    if statement.get("xt", {}).get("name") == "CONNMARK":
        return None
    if "mangle" not in statement or statement["mangle"]["key"] != {"ct": {"key": "mark"}}:
        return False
    made = {_bit_of(statement["mangle"]["value"], 1 << place) for place in range(32) if bits >> place & 1}
    return bool(made - {"same", "unknown"}) or (None if "unknown" in made else False)


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


#: The directions that are not tracked: what that is, and what the rules make of it.
_UNTRACKED = {
    frozenset({"in", "out"}): (
        "{} from being tracked (notrack): mailfw cannot count connections that are not tracked, so its limits do not "
        "apply to them"
    ),
    frozenset({"in"}): (
        "what clients send to {} from being tracked (notrack), but not the answers: mailfw still counts connections, "
        "but a ban ends those that are open, too; let both directions be tracked"
    ),
    frozenset({"out"}): (
        "the answers of {} from being tracked (notrack), but not what clients send: mailfw takes that for packets of "
        "no connection, and serves only who is trusted; let both directions be tracked"
    ),
}


def untracked(found: list[Table], settings: Settings) -> list[str]:
    """Return a sentence for each chain that keeps connections to limited ports from being tracked, or may."""
    meetings = list(_meetings(found, settings, _untracks))
    directions: _Directions = {}
    for one in meetings:
        certain = directions.setdefault((one.service, one.family), {})
        certain[one.direction] = certain.get(one.direction, False) or one.certain
    sentences = []
    for these, what in _UNTRACKED.items():
        some = [
            replace(one, service=_where(one, directions), certain=one.certain and all(certain.values()))
            for one in meetings
            if (certain := directions[one.service, one.family]).keys() == these
        ]
        sentences += [
            f"{place} {'keeps' if certain else 'may keep'} {what.format(_listed(services))}"
            for place, services, certain in _by_place(some)
        ]
    return sentences


def _where(one: _Meeting, directions: _Directions) -> str:
    """Return a service's name, with the family if other directions of it are not tracked in the other family."""
    ways = {family: directions[service, family].keys() for service, family in directions if service == one.service}
    alike = all(way == ways[one.family] for way in ways.values())
    return one.service if alike else f"{one.service} over {_FAMILIES[one.family]}"


def _untracks(statement: dict[str, Any]) -> bool | None:
    """Return whether a statement is notrack; None for iptables' CT, which does other things as well."""
    return None if statement.get("xt", {}).get("name") == "CT" else "notrack" in statement


@dataclass(frozen=True)
class _Meeting:
    """Packets of a service, of a family, that come ``in`` or go ``out``, meet a statement; whether that is certain."""

    place: str
    service: str
    family: str
    direction: str
    certain: bool


#: Service and family -> the directions that are not tracked, and whether that is certain.
_Directions = dict[tuple[str, str], dict[str, bool]]


def _meetings(found: list[Table], settings: Settings, is_meant: Callable[[Any], bool | None]) -> Iterator[_Meeting]:
    """Return where connections to limited ports meet a statement.

    ``is_meant`` says of a statement whether it does what is looked for: True, False, or None when it may.
    """
    for table, service in itertools.product(found, _limited(settings)):
        for packet, chain, statement, certain in _met(table, service["port"]):
            if (meant := is_meant(statement)) is not False:
                direction = "in" if "tcp dport" in packet else "out"
                certain = certain and meant is True
                yield _Meeting(table.place(chain), _service(service), packet["family"], direction, certain)


def _met(table: Table, port: int) -> Iterator[tuple[Packet, str, dict[str, Any], bool]]:
    """Return what a port's packets meet in a table: the packet, the chain, the statement, and whether certainly."""
    for chain in table.base_chains():
        for family in table.families:
            for packet in passing(chain["hook"], family, port):
                walk = Walk(table, packet)
                walk.base_chain(chain)
                yield from ((packet, *met) for met in walk.met)


def _by_place(meetings: Iterable[_Meeting]) -> Iterator[tuple[str, list[str], bool]]:
    """Return where statements are met: the place, the services, and whether that is certain."""
    met: dict[str, dict[str, bool]] = {}
    for one in meetings:
        services = met.setdefault(one.place, {})
        services[one.service] = services.get(one.service, False) or one.certain
    for place, services in met.items():
        for wanted in (True, False):
            if names := [name for name, certain in services.items() if certain is wanted]:
                yield place, names, wanted


def _limited(settings: Settings) -> list[dict[str, Any]]:
    """Return the services whose connections are counted."""
    return [
        service
        for service in settings["services"]
        if service["login"] and rules.access(service["role"], service["mode"]) == "limited"
    ]


def _service(service: dict[str, Any]) -> str:
    return f"{service['name']} ({service['port']})"
