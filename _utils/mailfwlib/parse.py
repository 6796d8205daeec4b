"""Parsers for the values that operators write: one for each format.

Each takes what YAML or a command line gives and returns a plain value, or raises :class:`ValueError`
with a sentence that says what would be accepted. The caller adds the pillar path or argument name.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Union

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

#: Seconds in each unit of a duration, as nft writes them (nft(8), "TIME TYPE").
DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
#: Seconds in each unit of a rate that nft's limit statement knows (nft(8), "LIMIT STATEMENT").
RATE_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
#: The kernel holds timeouts in milliseconds; a year is more than any login needs and far from overflow.
LONGEST = 366 * 86400

DURATION_FORM = "a duration such as 90m, 5h, 1d, 1d12h or a number of seconds, from 1s to 366d"
#: A user's key: a keyed hash, or the name in plain, which cannot be taken for a hash. See mailfwlib.people.
USER_KEY = re.compile(r"[0-9a-f]{16}|user:[A-Za-z0-9@.~%_+-]{1,100}")
RATE_FORM = "a rate such as 10/minute: a count from 1 to 100000 and a unit"


def duration(value: Any) -> int:
    """Return the seconds in a duration such as ``1d``, ``5h``, ``1d12h``, ``90m`` or ``3600``.

    Raises ValueError unless it lies between one second and 366 days.
    """
    seconds = 0
    if isinstance(value, int) and not isinstance(value, bool):
        seconds = value
    elif isinstance(value, str) and value.strip().isascii():
        text = value.strip()
        if text.isdigit() and len(text) < 12:
            seconds = int(text)
        elif re.fullmatch(r"(\d{1,9}[smhdw])+", text):
            parts = re.findall(r"(\d+)([smhdw])", text)
            seconds = sum(int(count) * DURATION_UNITS[unit] for count, unit in parts)
    if not 1 <= seconds <= LONGEST:
        raise ValueError(f"expected {DURATION_FORM}")
    return seconds


def duration_text(seconds: float) -> str:
    """Return seconds the way nft and the specification write them, such as ``23h32m47s``."""
    left = int(seconds)
    text = ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            text += f"{count}{unit}"
    return text or "0s"


def rate(value: Any) -> dict[str, Any]:
    """Return ``{"count": 10, "unit": "minute"}`` for ``10/minute``."""
    match = re.fullmatch(r"\s*([0-9]{1,6})\s*/\s*([a-z]+)\s*", value) if isinstance(value, str) else None
    if not match or not 1 <= int(match[1]) <= 100000:
        raise ValueError(f"expected {RATE_FORM}")
    if match[2] not in RATE_UNITS:
        raise ValueError("the unit must be second, minute, hour or day")
    return {"count": int(match[1]), "unit": match[2]}


def rate_text(value: dict[str, Any]) -> str:
    """Return a parsed rate as nft writes it: ``10/minute``."""
    return f"{value['count']}/{value['unit']}"


def address(value: Any) -> Address:
    """Return an address; an IPv4-mapped IPv6 address becomes the IPv4 address it carries (RFC 4291, 2.5.5.2).

    Integers, scope ids, prefixes and host names are refused.
    """
    form = "expected an IPv4 or IPv6 address such as 192.0.2.1 or 2001:db8::1"
    if not isinstance(value, str) or "%" in value:
        raise ValueError(form)
    try:
        parsed = ipaddress.ip_address(value.strip())
    except ValueError as err:
        raise ValueError(form) from err
    mapped = getattr(parsed, "ipv4_mapped", None)
    return mapped or parsed


def user_key(value: Any) -> str:
    """Return a user's key, or raise ValueError for what is none."""
    if not isinstance(value, str) or not USER_KEY.fullmatch(value):
        raise ValueError("expected a user's key: 16 hexadecimal digits, or user:NAME")
    return value


def network(value: Any) -> Network:
    """Return a network such as ``198.51.100.0/24``; an address alone is a network of one.

    IPv4-mapped IPv6 becomes the IPv4 network it carries, as for addresses, or it would never match one.
    """
    form = "expected a network such as 198.51.100.0/24 or 2001:db8::/48"
    if not isinstance(value, str) or "%" in value:
        raise ValueError(form)
    try:
        parsed = ipaddress.ip_network(value.strip())
    except ValueError as err:
        if "host bits" in str(err):
            whole = ipaddress.ip_network(value.strip(), strict=False)
            raise ValueError(f"has host bits set: write {whole} for the network") from err
        raise ValueError(form) from err
    mapped = getattr(parsed.network_address, "ipv4_mapped", None)
    return ipaddress.IPv4Network((mapped, parsed.prefixlen - 96)) if mapped else parsed


def network_of_family(value: Any, version: int) -> Network:
    """Return a network of IP ``version`` 4 or 6."""
    parsed = network(value)
    if parsed.version != version:
        raise ValueError(f"is an IPv{parsed.version} network in a list for IPv{version}")
    return parsed


def mask(prefix: int) -> str:
    """Return the IPv6 netmask of a prefix length, as nft writes it: 64 gives ``ffff:ffff:ffff:ffff::``."""
    return str(ipaddress.IPv6Network(f"::/{prefix}").netmask)
