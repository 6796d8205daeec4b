"""What the templates of the rules are given: the settings, and what follows from them, in nft's own words."""

from __future__ import annotations

import math
from typing import Any

from mailfwlib import elements, parse
from mailfwlib.settings import ROLES, Settings


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


def context(settings: Settings) -> dict[str, Any]:
    """Return the variables that every template sees.

    ``mailfw``: the settings. ``source_ipv6``, ``destination_ipv6``: how a rule names the client of a packet that comes
    in or goes out, by the prefix that makes an IPv6 source, for bans, blocks and rates; ``trusted_source_ipv6``,
    ``trusted_destination_ipv6``: the same for trust. ``meter_timeout``, also that of ``networks``: seconds that a
    bucket must be kept, since one that is forgotten before it has refilled limits nothing.
    """
    autoban = settings["autoban"]
    networks = autoban["networks"]
    return {
        "mailfw": settings,
        "roles": ROLES,
        "source_ipv6": _masked("ip6 saddr", autoban["ipv6_prefix"]),
        "destination_ipv6": _masked("ip6 daddr", autoban["ipv6_prefix"]),
        "trusted_source_ipv6": _masked("ip6 saddr", settings["trusted"]["ipv6_prefix"]),
        "trusted_destination_ipv6": _masked("ip6 daddr", settings["trusted"]["ipv6_prefix"]),
        "rate": parse.rate_text(autoban["rate"]),
        "burst": autoban["burst"],
        "meter_timeout": refill(autoban["rate"], autoban["burst"]),
        "networks": networks
        and {
            "rate": parse.rate_text(networks["rate"]),
            "burst": networks["rate"]["count"],
            "meter_timeout": refill(networks["rate"], networks["rate"]["count"]),
            "mask_ipv4": _mask_ipv4(networks["ipv4_prefix"]),
            "mask_ipv6": parse.mask(networks["ipv6_prefix"]),
        },
    }


def refill(rate: dict[str, Any], burst: int) -> int:
    """Return the seconds in which an empty bucket of ``burst`` fills again at ``rate``, from a minute to 366 days.

    nft takes no timeout of more than eight digits.
    """
    seconds: int = parse.RATE_UNITS[rate["unit"]]
    count: int = rate["count"]
    return min(max(60, math.ceil(burst * seconds / count)), parse.LONGEST)


def _masked(field: str, prefix: int) -> str:
    return field if prefix == 128 else f"{field} & {parse.mask(prefix)}"


def _mask_ipv4(prefix: int) -> str:
    return str(parse.network(f"0.0.0.0/{prefix}").netmask)


def access(role: str, mode: str) -> str:
    """Return how the login ports of a role are treated in a mode: ``open``, ``limited`` or ``trusted only``."""
    if mode == "public":
        return "open"
    limited = mode == "autoban" or (mode == "protected" and role == "dovecot")
    return "limited" if limited else "trusted only"


def decision(
    address: parse.Address,
    service: dict[str, Any],
    trusted: dict[int, str],
    banned: str | None,
    blocked: str | None,
    settings: Settings,
) -> str:
    """Return what the rules do with a new connection of an address to a service, and why: the order of ``guarded``.

    ``trusted``: port -> time left of the address's trust; ``banned``, ``blocked``: time left, None when it is not.
    """
    networks = f"networks_ipv{address.version}"
    kind = access(service["role"], service["mode"])
    if not service["login"]:
        return "accepted: mail between servers is always open"
    if elements.in_networks(address, settings["trusted"][networks]):
        return f"accepted: in mailfw:trusted:{networks}"
    if elements.in_networks(address, settings["blocked"][networks]):
        return f"refused: in mailfw:blocked:{networks}"
    if blocked:
        return f"refused: blocked by an operator, for {blocked}"
    if service["port"] in trusted:
        return f"accepted: trusted for {trusted[service['port']]}"
    if kind == "limited" and banned:
        return f"refused: banned for {banned}; a login on another service or 'unban' lifts it"
    if kind == "trusted only":
        return f"refused: not trusted, and the mode is {service['mode']}"
    return f"accepted: {kind}, the mode is {service['mode']}"


def observed(decided: str, settings: Settings) -> str:
    """Return a decision as it is carried out: with ``enforce: false`` nobody is refused."""
    if settings["enforce"] or not decided.startswith("refused"):
        return decided
    return f"accepted: mailfw:enforce is false; it would be {decided}"
