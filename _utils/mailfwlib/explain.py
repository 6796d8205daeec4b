"""Why a host accepts or refuses an address: the rules' own walk, over what the kernel has of that address.

:func:`standing` asks the kernel, a fixed number of elements by their keys, so that it takes the same few milliseconds
however many there are; :func:`verdict` is the rules' decision over a new connection: the order of the chains input,
guarded and the role's own. Tests compare it with real connections.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from mailfwlib import breakglass, elements, netlink, parse, rules, sockets
from mailfwlib.parse import Address
from mailfwlib.settings import ROLES, Settings, login_ports

ACCEPTED, LIMITED, REFUSED = "accepted", "limited", "refused"
_NETWORK_SETS = ("trusted", "blocked", "exempt")


class Entry(NamedTuple):
    """An element: since when, where its set has timeouts, and until when it is there, in Unix time; and its comment."""

    since: Optional[float]
    until: Optional[float]
    note: str


@dataclass(frozen=True)
class Standing:
    """What the kernel has of an address at a moment."""

    address: Address
    at: float
    loaded: bool
    enforcing: bool
    #: Why the address is never restricted, when it is this host's own.
    own: str
    #: Until when and why everyone may connect; empty when that is not so.
    open: str
    #: The kinds of pillar's networks that it is in: trusted, blocked, exempt.
    networks: frozenset[str]
    blocked: Optional[Entry]
    #: By port.
    trusted: dict[int, Entry]
    held: dict[int, Entry]
    observed: dict[int, Entry]
    chains: dict[int, str]
    #: By role.
    banned: dict[str, Entry]
    banned_networks: dict[str, Entry]
    counted: dict[str, Entry]


class Verdict(NamedTuple):
    """What a new connection finds: accepted, limited or refused; why; and the set or chain that decides."""

    word: str
    why: str
    rule: str

    def __str__(self) -> str:
        return f"{self.word}: {self.why}"


class _Look:
    """A look at the kernel's sets for one family at one moment."""

    def __init__(self, kernel: netlink.Kernel, family: str, at: float):
        self._kernel, self._family, self._at = kernel, family, at
        self._timeouts: dict[str, Optional[float]] = {}

    def entry(self, name: str, key: bytes) -> Optional[Entry]:
        """Return the entry of a key in a set without the family in its name, None when there is none."""
        full = f"{name}_{self._family}"
        found = self._kernel.element(full, key)
        if found is None:
            return None
        if found.left is None:
            return Entry(None, None, found.note)
        if full not in self._timeouts:
            self._timeouts[full] = self._kernel.timeout(full)
        age = found.age(self._timeouts[full])
        return Entry(None if age is None else self._at - age, self._at + found.left, found.note)

    def by_port(self, name: str, address: Address, ports: Iterable[int]) -> dict[int, Entry]:
        """Return the entries of an address with each of some ports."""
        found = {port: self.entry(name, netlink.key(address, port)) for port in ports}
        return {port: one for port, one in found.items() if one}

    def by_role(self, name: str, address: Address, roles: Iterable[str]) -> dict[str, Entry]:
        """Return the entries of an address in each role's set."""
        found = {role: self.entry(f"{name}_{role}", netlink.key(address)) for role in roles}
        return {role: one for role, one in found.items() if one}


def standing(address: Address, settings: Settings, kernel: netlink.Kernel) -> Standing:
    """Return what the kernel has of an address. Raises OSError when it does not answer."""
    at, family = time.time(), elements.family(address)
    look = _Look(kernel, family, at)
    trusted, source = elements.trusted_key(address, settings), elements.source_key(address, settings)
    ports, roles = [service["port"] for service in settings["services"]], settings["roles"]
    network = elements.counted_network(address, settings).network_address if settings["autoban"]["networks"] else None
    return Standing(
        address=address,
        at=at,
        loaded=kernel.has(breakglass.SET),
        enforcing=not kernel.has(f"observed_{family}"),
        own="is loopback" if address.is_loopback else sockets.own_address(address),
        open=breakglass.sentence(at, kernel),
        networks=frozenset(
            kind for kind in _NETWORK_SETS if kernel.element(f"{kind}_networks_{family}", netlink.key(address))
        ),
        blocked=look.entry("blocked", netlink.key(source)),
        trusted=look.by_port("trusted", trusted, ports),
        held=look.by_port("waiting", source, ports),
        observed=look.by_port("observed", source, ports),
        chains={port: kernel.chain("services", port) for port in ports},
        banned=look.by_role("banned", source, roles),
        banned_networks=look.by_role("banned_networks", network, roles) if network else {},
        counted=look.by_role("rate", source, roles),
    )


def verdict(service: dict[str, Any], found: Standing, settings: Settings) -> Verdict:
    """Return what a new connection of an address to a service finds."""
    decided = _unrestricted(service, found) or _guarded(service, found) or _by_access(service, found, settings)
    if found.enforcing or decided.word == ACCEPTED:
        return decided
    return Verdict(ACCEPTED, f"mailfw:enforce is false; it would be {decided}", decided.rule)


def _unrestricted(service: dict[str, Any], found: Standing) -> Optional[Verdict]:
    """Return the verdict of what comes before the services' own chains."""
    if not found.loaded:
        return Verdict(ACCEPTED, "no rules are loaded", "no table inet mailfw")
    if found.own:
        return Verdict(ACCEPTED, f"the address {found.own}, and a host is open to itself", "chain input")
    if found.open:
        return Verdict(ACCEPTED, found.open, f"set {breakglass.SET}")
    if not service["login"]:
        return Verdict(ACCEPTED, "mail between servers is always open", "map services")
    if not found.chains[service["port"]]:
        return Verdict(ACCEPTED, "the loaded rules do not guard this port: see mailfw.drift", "map services")
    return None


def _guarded(service: dict[str, Any], found: Standing) -> Optional[Verdict]:
    """Return the verdict of the chain guarded, which every mode has: trusted networks, blocks, earned trust."""
    family, port = elements.family(found.address), service["port"]
    if "trusted" in found.networks:
        return Verdict(ACCEPTED, f"in mailfw:trusted:networks_{family}", f"set trusted_networks_{family}")
    if "blocked" in found.networks:
        return Verdict(REFUSED, f"in mailfw:blocked:networks_{family}", f"set blocked_networks_{family}")
    if found.blocked:
        return Verdict(REFUSED, f"blocked {blocked_text(found.blocked, found.at)}", f"set blocked_{family}")
    if port in found.trusted:
        return Verdict(ACCEPTED, f"trusted {trusted_text(port, found)}", f"set trusted_{family}")
    return None


def _by_access(service: dict[str, Any], found: Standing, settings: Settings) -> Verdict:
    """Return the verdict of a role's own chain, by its mode."""
    family, chain = elements.family(found.address), found.chains[service["port"]]
    role, _, mode = chain.partition("_")
    access = rules.access(role, mode)
    if access == "open":
        return Verdict(ACCEPTED, f"open to everyone, the mode is {mode}", f"chain {chain}")
    if access == "trusted only":
        return Verdict(REFUSED, f"not trusted, and the mode is {mode}{_reaction(settings)}", "chain untrusted")
    if role in found.banned:
        return Verdict(REFUSED, f"banned {banned_text(role, found)}", f"set banned_{role}_{family}")
    if role in found.banned_networks:
        why = f"its network is banned {_lasting(found.banned_networks[role], found.at)}"
        return Verdict(REFUSED, why, f"set banned_networks_{role}_{family}")
    if "exempt" in found.networks:
        return Verdict(ACCEPTED, f"not counted: in mailfw:exempt:networks_{family}", f"set exempt_networks_{family}")
    return Verdict(LIMITED, f"{rate_text(role, found, settings)}; the mode is {mode}", f"chain {chain}_count")


def _reaction(settings: Settings) -> str:
    said = {
        "hold": "; the first tries get no answer, so that a client that logs in meanwhile gets in",
        "drop": "; it gets no answer",
        "reject": "",
    }
    return said[settings["reaction"]["untrusted"]]


def _time(entry: Entry, at: float) -> str:
    if entry.until is None:
        return "without an end"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.until))
    return f"until {when} ({parse.duration_text(max(0, entry.until - at))} left)"


def _lasting(entry: Entry, at: float) -> str:
    since = f", for {parse.duration_text(max(0, at - entry.since))} so far" if entry.since else ""
    return _time(entry, at) + since


def blocked_text(entry: Entry, at: float) -> str:
    """Return until when an address is blocked, and by whom."""
    return f"{_lasting(entry, at)}, by {entry.note or 'an operator'}"


def banned_text(role: str, found: Standing) -> str:
    """Return until when an address is banned from a role, and by whom: the rules leave no comment."""
    entry = found.banned[role]
    return f"{_lasting(entry, found.at)}, by {entry.note or 'the rate'}"


def trusted_text(port: int, found: Standing) -> str:
    """Return until when an address is trusted on a port, and by what: a login leaves no comment."""
    entry = found.trusted[port]
    return f"{_time(entry, found.at)}, by {entry.note or 'a login, here or on another host of the fleet'}"


def rate_text(role: str, found: Standing, settings: Settings) -> str:
    """Return how near to the rate an address is.

    The kernel does not tell how many connections are left to it, but when it last counted one: since then some have
    become free.
    """
    autoban = settings["autoban"]
    rate, burst = autoban["rate"], autoban["burst"]
    limit = f"{burst} connections at once, then {parse.rate_text(rate)}"
    entry = found.counted.get(role)
    if not entry or entry.since is None:
        return f"below the rate, nothing counted lately: {limit}"
    ago = max(0.0, found.at - entry.since)
    return (
        f"counted, the last one {parse.duration_text(ago)} ago, so at least {free(role, found, settings)} of {burst} "
        f"are free: {limit}"
    )


def free(role: str, found: Standing, settings: Settings) -> int:
    """Return how many connections an address can open at once at least, before it is above the rate of a role."""
    autoban, entry = settings["autoban"], found.counted.get(role)
    if not entry or entry.since is None:
        return int(autoban["burst"])
    each = parse.RATE_UNITS[autoban["rate"]["unit"]] / autoban["rate"]["count"]
    return min(int(autoban["burst"]), int((found.at - entry.since) / each))


def lately(service: dict[str, Any], found: Standing, settings: Settings) -> str:
    """Return what the mode refused lately on a service, as far as the kernel remembers it; empty when it did nothing.

    Bans and blocks leave nothing that could be asked for.
    """
    port, said = service["port"], []
    refused = "held or refused" if settings["reaction"]["untrusted"] == "hold" else "refused"
    for what, entries in ((refused, found.held), ("would have been refused", found.observed)):
        since = entries[port].since if port in entries else None
        if since is not None:
            said.append(f"{what}, the last time {parse.duration_text(max(0, found.at - since))} ago")
    return "; ".join(said)


def advice(verdicts: dict[str, Verdict], found: Standing, settings: Settings, no_trust: str) -> list[str]:
    """Return what an operator can do about refusals, or where to look when there are none.

    ``no_trust``: why no login makes the address trusted; empty when one does.
    """
    host, family = settings["host"]["id"], elements.family(found.address)
    refused = {one.rule for one in verdicts.values() if one.word != ACCEPTED or not found.enforcing}
    said = []
    if not found.loaded:
        said.append(f"salt {host} mailfw.apply loads the rules")
    if f"set blocked_networks_{family}" in refused:
        said.append(f"take it out of mailfw:blocked:networks_{family} in the pillar, or trust its network there")
    if f"set blocked_{family}" in refused:
        said.append(f"salt {host} mailfw.unblock {found.address} ends the block; a login does not")
    if any(rule.startswith("set banned_") for rule in refused):
        login = "" if no_trust else ", as a login on another service does"
        said.append(f"salt {host} mailfw.unban {found.address} lifts the ban{login}")
    said += _how_to_be_trusted(
        [name for name, one in verdicts.items() if one.rule == "chain untrusted"], found, settings, no_trust
    )
    if not any(one.word == REFUSED for one in verdicts.values()):
        said.append(f"mailfw refuses nothing here: if it cannot connect, see salt {host} mailfw.status")
    return said


def _how_to_be_trusted(names: list[str], found: Standing, settings: Settings, no_trust: str) -> list[str]:
    """Return what opens services that are closed to strangers: a login, if the agent opens them for one."""
    verb = f"salt {settings['host']['id']} mailfw.trust {found.address}"
    ports = [] if no_trust else elements.ports_for_login(found.address, settings)
    opened = {service["name"] for service in settings["services"] if service["port"] in ports}
    by_login, closed = [one for one in names if one in opened], [one for one in names if one not in opened]
    said = []
    if by_login:
        said.append(f"a login opens {', '.join(by_login)}, or {verb}")
    if closed:
        network = f"its network in mailfw:trusted:networks_{elements.family(found.address)} of the pillar"
        why = no_trust or f"{elements.NOT_ADMITTED} (mailfw:trusted:private)"
        said.append(f"no login opens {', '.join(closed)}: {why}; {verb} does, or {network}")
    return said


def explain(
    address: Address, settings: Settings, kernel: netlink.Kernel, services: Iterable[str], no_trust: str = ""
) -> dict[str, Any]:
    """Return all of it as people read it: see ``mailfw.explain``. Raises OSError when the kernel does not answer.

    ``no_trust``: why the login that this is about has earned no trust, where one is known.
    """
    found = standing(address, settings, kernel)
    no_trust = no_trust or elements.never_trusted(address, settings)
    asked = [service for service in settings["services"] if service["name"] in services]
    verdicts = {service["name"]: verdict(service, found, settings) for service in asked}
    return {
        "address": str(address),
        "host": settings["host"]["id"],
        "mode": settings["protection"]["type"],
        "verdicts": {name: str(one) for name, one in verdicts.items()},
        "decided_by": {name: one.rule for name, one in verdicts.items()},
        "networks": [f"mailfw:{kind}:networks_{elements.family(address)}" for kind in sorted(found.networks)],
        "trusted": {
            service["name"]: trusted_text(service["port"], found)
            for service in asked
            if service["port"] in found.trusted
        },
        "banned": {role: banned_text(role, found) for role in found.banned},
        "blocked": blocked_text(found.blocked, found.at) if found.blocked else "",
        "rate": {role: rate_text(role, found, settings) for role in _limited(found)},
        "lately": {service["name"]: said for service in asked if (said := lately(service, found, settings))},
        "advice": advice(verdicts, found, settings, no_trust),
    }


def _limited(found: Standing) -> list[str]:
    """Return the roles that have a limited service."""
    chains = (chain.partition("_") for chain in found.chains.values() if "_" in chain)
    return sorted({role for role, _, mode in chains if rules.access(role, mode) == "limited"})


def remaining(source: elements.Source, settings: Settings, kernel: netlink.Kernel) -> dict[str, Any]:
    """Return how many seconds a source is still ``trusted``, by port, ``banned``, by role, and ``blocked`` by elements.

    What has no end is infinite, what is not so is left out, or None for blocked. Of a network: what all of it still is,
    and 0 where only a part of it is. Raises OSError when the kernel does not answer, ValueError for a large network.
    """
    family = elements.family(source)
    trusted, keys = elements.trusted_keys(source, settings), elements.source_keys(source, settings)
    by_port = {
        port: _shortest(kernel, f"trusted_{family}", [netlink.key(one, port) for one in trusted])
        for port in login_ports(settings)
    }
    plain = [netlink.key(one) for one in keys]
    by_role = {role: _shortest(kernel, f"banned_{role}_{family}", plain) for role in ROLES}
    return {
        "trusted": {port: left for port, left in by_port.items() if left is not None},
        "banned": {role: left for role, left in by_role.items() if left is not None},
        "blocked": _shortest(kernel, f"blocked_{family}", plain),
    }


def _shortest(kernel: netlink.Kernel, name: str, keys: list[bytes]) -> Optional[float]:
    found = [kernel.element(name, key) for key in keys]
    left = [float("inf") if one.left is None else one.left for one in found if one]
    if not left:
        return None
    return min(left) if len(left) == len(found) else 0.0
