"""What the templates of the rules are given: the settings, and what follows from them, in nft's own words."""

from __future__ import annotations

import math
from typing import Any

from mailfwlib import parse
from mailfwlib.settings import FAMILIES, ROLES, Settings


def files(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Return the rule files of a host: file name -> the templates that make it, each with its own context.

    ``base.nft`` comes first; each role has one file, made of the template of each mode that one of its services
    is in. A template's context has ``role``, ``mode`` and ``ports``, the ports of the role in that mode.
    """
    made: dict[str, list[dict[str, Any]]] = {"base.nft": [{"source": "ruleset/nftables/base.nft.jinja"}]}
    for role in settings["roles"]:
        modes: dict[str, list[int]] = {settings["protection"]["type"]: []}
        for service in settings["services"]:
            if service["role"] == role and service["login"]:
                modes.setdefault(service["mode"], []).append(service["port"])
        made[f"{role}.nft"] = [
            {"source": f"{role}/nftables/{mode}.nft.jinja", "role": role, "mode": mode, "ports": ports}
            for mode, ports in modes.items()
            if ports
        ]
    return made


#: Connections older than the table that are remembered as such, for each family.
OLDER = 262144
#: Sources that do not fit into a full meter share the rate of this many.
CROWD = 10
#: Decisions that are counted for each service and family, and which side of the packet has the service's port.
#: None of them is about a packet of a trusted source or a settled connection: those pay nothing for it.
TALLIED = {
    "counted": "sport",
    "over_rate": "sport",
    "banned": "dport",
    "blocked": "dport",
    "held": "dport",
    "untrusted": "dport",
}


def context(settings: Settings) -> dict[str, Any]:
    """Return the variables that every template sees.

    ``mailfw``: the settings. Dictionaries by family, ``ipv4`` and ``ipv6``: ``ip``, the protocol as rules name it;
    ``saddr`` and ``daddr``, how a rule names the client of a packet that comes in or goes out by the prefix that makes
    an IPv6 source, for bans, blocks and rates; ``trusted_saddr`` and ``trusted_daddr``, the same for trust.
    ``meter_timeout``, also that of ``networks``: seconds that a bucket must be kept, since one that is forgotten before
    it has refilled limits nothing. ``mark``: the bit of the connection mark of a connection that is to be counted, that
    of a settled one, both, and all others. ``tallies``: the names of the counters of single services, and ``tally``:
    for each decision the statement that counts it there; empty on a host without login services.
    """
    autoban = settings["autoban"]
    networks, rate = autoban["networks"], autoban["rate"]
    return {
        "mailfw": settings,
        "roles": ROLES,
        "families": FAMILIES,
        "ip": {"ipv4": "ip", "ipv6": "ip6"},
        "saddr": _client("saddr", autoban["ipv6_prefix"]),
        "daddr": _client("daddr", autoban["ipv6_prefix"]),
        "trusted_saddr": _client("saddr", settings["trusted"]["ipv6_prefix"]),
        "trusted_daddr": _client("daddr", settings["trusted"]["ipv6_prefix"]),
        "sizes": {"older": OLDER},
        "rate": parse.rate_text(rate),
        "burst": autoban["burst"],
        "common_rate": parse.rate_text({**rate, "count": CROWD * rate["count"]}),
        "common_burst": CROWD * autoban["burst"],
        "meter_timeout": refill(rate, autoban["burst"]),
        "networks": networks
        and {
            "rate": parse.rate_text(networks["rate"]),
            "burst": networks["rate"]["count"],
            "meter_timeout": refill(networks["rate"], networks["rate"]["count"]),
            "mask": {"ipv4": _mask_ipv4(networks["ipv4_prefix"]), "ipv6": parse.mask(networks["ipv6_prefix"])},
        },
        "mark": _mark(settings["mark"]),
        "tallies": [name for decision in TALLIED for name in _tallies(decision, settings).values()],
        "tally": {decision: _tally(decision, settings) for decision in TALLIED},
        "log": settings["log"] and _log_statement(settings["log"], settings["enforce"]),
    }


def _tallies(decision: str, settings: Settings) -> dict[str, str]:
    """Return the counters of a decision for single services: family and port as a rule writes them -> name."""
    return {
        f"{family} . {service['port']}": f"{decision}/{service['name']}/{family}"
        for service in settings["services"]
        if service["login"]
        for family in FAMILIES
    }


def _tally(decision: str, settings: Settings) -> str:
    listed = ", ".join(f'{key} : "{name}"' for key, name in _tallies(decision, settings).items())
    return f"counter name meta nfproto . tcp {TALLIED[decision]} map {{ {listed} }}" if listed else ""


def _mark(bits: int) -> dict[str, str]:
    counting = bits & -bits
    parts = {"counting": counting, "settled": bits ^ counting, "both": bits, "others": bits ^ 0xFFFFFFFF}
    return {name: f"{value:#010x}" for name, value in parts.items()}


def _log_statement(log: dict[str, Any], enforce: bool) -> dict[str, str]:
    """Return the parts of a statement that logs at a limited rate, without its prefix, and the verbs of prefixes."""
    target = "level info" if log["group"] is None else f"group {log['group']}"
    would = "" if enforce else "would "
    return {
        "limited": f"limit rate {parse.rate_text(log['rate'])} burst 5 packets log prefix",
        "target": target,
        "ban": f"{would}ban",
        "refuse": f"{would}refuse",
    }


def _client(field: str, ipv6_prefix: int) -> dict[str, str]:
    whole = f"ip6 {field}"
    return {"ipv4": f"ip {field}", "ipv6": whole if ipv6_prefix == 128 else f"{whole} & {parse.mask(ipv6_prefix)}"}


def refill(rate: dict[str, Any], burst: int) -> int:
    """Return the seconds in which an empty bucket of ``burst`` fills again at ``rate``, from a minute to 366 days.

    nft takes no timeout of more than eight digits.
    """
    seconds: int = parse.RATE_UNITS[rate["unit"]]
    count: int = rate["count"]
    return min(max(60, math.ceil(burst * seconds / count)), parse.LONGEST)


def _mask_ipv4(prefix: int) -> str:
    return str(parse.network(f"0.0.0.0/{prefix}").netmask)


def size_key(name: str) -> str:
    """Return the key below ``mailfw:sizes`` that gives the size of a set."""
    if name.startswith(("rate_", "network_rate_")):
        return "rates"
    return name.partition("_")[0]


def access(role: str, mode: str) -> str:
    """Return how the login ports of a role are treated in a mode: ``open``, ``limited`` or ``trusted only``."""
    if mode == "public":
        return "open"
    limited = mode == "autoban" or (mode == "protected" and role == "dovecot")
    return "limited" if limited else "trusted only"
