"""Elements: how trust, bans and blocks stand in the kernel's sets, as nft scripts and as answers to operators.

The scripts only add and delete; none of them lists a set. "Add, delete, add" in one transaction is how an element
gets a new timeout on every kernel: adding one that exists refreshes nothing (before Linux 6.12).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Any

from mailfwlib import nft, parse
from mailfwlib.parse import Address
from mailfwlib.settings import ROLES, Settings


def family(address: Address) -> str:
    """Return the family as set names have it: ``ipv4`` or ``ipv6``."""
    return f"ipv{address.version}"


def prefix_base(address: Address, ipv6_prefix: int) -> Address:
    """Return the address that stands for a source in a set: an IPv6 address without the bits after its prefix."""
    if address.version == 4:
        return address
    return ipaddress.ip_network((address, ipv6_prefix), strict=False).network_address


def trusted_key(address: Address, settings: Settings) -> Address:
    """Return the address under which ``address`` is trusted."""
    return prefix_base(address, settings["trusted"]["ipv6_prefix"])


def source_key(address: Address, settings: Settings) -> Address:
    """Return the address under which ``address`` is counted, banned and blocked."""
    return prefix_base(address, settings["autoban"]["ipv6_prefix"])


def source_network(address: Address, settings: Settings) -> parse.Network:
    """Return all that is counted, banned and blocked together with an address: its prefix over IPv6."""
    prefix = settings["autoban"]["ipv6_prefix"] if address.version == 6 else 32
    return ipaddress.ip_network((source_key(address, settings), prefix))


def network_key(address: Address, settings: Settings) -> Address:
    """Return the address under which the network of ``address`` is counted and banned (``autoban.networks``)."""
    prefix = settings["autoban"]["networks"][f"{family(address)}_prefix"]
    return ipaddress.ip_network((address, prefix), strict=False).network_address


def in_networks(address: Address, networks: Iterable[str]) -> bool:
    """Return whether an address lies in one of some networks."""
    return any(address in ipaddress.ip_network(network) for network in networks)


def never_trusted(address: Address, settings: Settings) -> str:
    """Return why a login from ``address`` earns no trust, or an empty string when it may.

    Loopback, link-local, multicast and unspecified addresses are no client's; ``trusted.never`` is the operator's.
    """
    for kind in ("loopback", "link_local", "multicast", "unspecified"):
        if getattr(address, f"is_{kind}"):
            return f"is {kind.replace('_', '-')}"
    would_be = _trusted_network(address, settings)
    if any(would_be.overlaps(other) for other in _networks(settings["trusted"]["never"], address.version)):
        return "is in mailfw:trusted:never"
    return ""


def _trusted_network(address: Address, settings: Settings) -> parse.Network:
    """Return all that trusting an address trusts: its prefix over IPv6."""
    prefix = settings["trusted"]["ipv6_prefix"] if address.version == 6 else 32
    return ipaddress.ip_network((trusted_key(address, settings), prefix))


def _networks(texts: Iterable[str], version: int) -> Iterator[Any]:
    """Yield the networks of one family, for which Python compares networks."""
    return (network for network in map(ipaddress.ip_network, texts) if network.version == version)


def ports_for_login(address: Address, settings: Settings) -> list[int]:
    """Return the ports that a login from ``address`` opens.

    A service in private mode is opened only for what pillar's trusted networks admit already, with its whole prefix,
    unless ``mailfw:trusted:private`` says otherwise.
    """
    would_be: Any = _trusted_network(address, settings)
    networks = _networks(settings["trusted"][f"networks_{family(address)}"], address.version)
    admitted = any(would_be.subnet_of(network) for network in networks)
    return [
        service["port"]
        for service in settings["services"]
        if service["login"] and (admitted or service["mode"] != "private" or settings["trusted"].get("private"))
    ]


def _refresh(name: str, timeouts: dict[str, int | None]) -> str:
    """Return the script that gives elements a new timeout; None stands for the set's default."""
    if not timeouts:
        return ""
    plain = ", ".join(timeouts)
    timed = ", ".join(value + (f" timeout {timeout}s" if timeout else "") for value, timeout in timeouts.items())
    where = f"element {nft.TABLE} {name}"
    return f"add {where} {{ {timed} }}\ndelete {where} {{ {plain} }}\nadd {where} {{ {timed} }}\n"


def _remove(name: str, values: list[str]) -> str:
    """Deleting what is not there fails; adding it first makes that a success without a change."""
    if not values:
        return ""
    plain = ", ".join(values)
    return f"add element {nft.TABLE} {name} {{ {plain} }}\ndelete element {nft.TABLE} {name} {{ {plain} }}\n"


def trust(address: Address, seconds: dict[int, int], settings: Settings) -> str:
    """Return the script that trusts an address on some ports, port -> seconds, and lifts its rate bans."""
    key = trusted_key(address, settings)
    timeouts: dict[str, int | None] = {f"{key} . {port}": left for port, left in seconds.items()}
    return _refresh(f"trusted_{family(address)}", timeouts) + unban(address, ROLES, settings)


def untrust(address: Address, ports: list[int], settings: Settings) -> str:
    """Return the script that ends an address's trust on some ports."""
    key = trusted_key(address, settings)
    return _remove(f"trusted_{family(address)}", [f"{key} . {port}" for port in ports])


def ban(address: Address, roles: Iterable[str], seconds: int | None, settings: Settings) -> str:
    """Return the script that bans a source from the ports of some roles, by default for the sets' own period."""
    key = str(source_key(address, settings))
    return "".join(_refresh(f"banned_{role}_{family(address)}", {key: seconds}) for role in roles)


def unban(address: Address, roles: Iterable[str], settings: Settings) -> str:
    """Return the script that lifts a source's rate bans."""
    key = str(source_key(address, settings))
    return "".join(_remove(f"banned_{role}_{family(address)}", [key]) for role in roles)


def refill(address: Address, meters: Iterable[str], settings: Settings) -> str:
    """Return the script that empties what some meters remember of a source."""
    key = str(source_key(address, settings))
    return "".join(_remove(name, [key]) for name in meters if name.endswith(family(address)))


def block(address: Address, seconds: int | None, settings: Settings) -> str:
    """Return the script that blocks a source from every login port, for a period or until it is unblocked."""
    return _refresh(f"blocked_{family(address)}", {str(source_key(address, settings)): seconds})


def unblock(address: Address, settings: Settings) -> str:
    """Return the script that ends a source's block."""
    return _remove(f"blocked_{family(address)}", [str(source_key(address, settings))])


def left(element: dict[str, Any]) -> str:
    """Return how long an element still lives, such as ``23h32m47s``, or ``forever``."""
    return parse.duration_text(element["expires"]) if "expires" in element else "forever"


def by_address(listed: list[dict[str, Any]]) -> dict[str, str]:
    """Return the elements of a set of addresses: address -> how long it still lives."""
    return {str(element["val"]): left(element) for element in listed}


def by_address_and_port(listed: list[dict[str, Any]]) -> dict[str, dict[int, str]]:
    """Return the elements of a set of addresses and ports: address -> port -> how long it still lives."""
    found: dict[str, dict[int, str]] = {}
    for element in listed:
        address, port = element["val"]["concat"]
        found.setdefault(address, {})[port] = left(element)
    return {address: dict(sorted(ports.items())) for address, ports in found.items()}
