"""Elements: how trust, bans and blocks stand in the kernel's sets, as nft scripts and as answers to operators.

The scripts only add and delete; none of them lists a set. "Add, delete, add" in one transaction is how an element
gets a new timeout on every kernel: adding one that exists refreshes nothing (before Linux 6.12).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Union

from mailfwlib import nft, sockets
from mailfwlib.parse import Address, Network
from mailfwlib.settings import ROLES, Settings

#: What trust, bans and blocks are for: an address, which stands for its prefix over IPv6, or a network.
Source = Union[Address, Network]
#: Says whether a set may have an element, as :meth:`mailfwlib.netlink.Kernel.holds` does. What it has not need not be
#: removed: where the set is full that would fail, and so would all the rest of the script.
Has = Callable[[str, str], bool]
_BROADCAST = ipaddress.IPv4Address("255.255.255.255")

#: Why a login opens no service that is in private mode: see ports_for_login.
NOT_ADMITTED = "no mailfw:trusted network admits it, and the mode is private"
#: Sources of a network that the sets take one by one: a look-up of networks would cost each packet of everybody.
MOST_SOURCES = 4096


def family(address: Source) -> str:
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


def trusted_keys(source: Source, settings: Settings) -> list[Address]:
    """Return the addresses under which a source is trusted. Raises ValueError when they are too many."""
    return _bases(source, settings["trusted"]["ipv6_prefix"])


def source_keys(source: Source, settings: Settings) -> list[Address]:
    """Return the addresses under which a source is counted, banned and blocked. Raises ValueError for too many."""
    return _bases(source, settings["autoban"]["ipv6_prefix"])


def _bases(source: Source, ipv6_prefix: int) -> list[Address]:
    if isinstance(source, (ipaddress.IPv4Address, ipaddress.IPv6Address)):
        return [prefix_base(source, ipv6_prefix)]
    prefix = 32 if source.version == 4 else ipv6_prefix
    if source.prefixlen >= prefix:
        return [prefix_base(source.network_address, ipv6_prefix)]
    count = 2 ** (prefix - source.prefixlen)
    if count > MOST_SOURCES:
        raise ValueError(
            f"has {count} sources, more than the {MOST_SOURCES} that can be given by a verb: "
            f"expected a smaller network, or a line in the pillar's networks_{family(source)}"
        )
    return [one.network_address for one in source.subnets(new_prefix=prefix)]


def source_network(source: Source, settings: Settings) -> Network:
    """Return all that is counted, banned and blocked together with a source: an address's prefix over IPv6."""
    return _whole(source, settings["autoban"]["ipv6_prefix"])


def trusted_network(source: Source, settings: Settings) -> Network:
    """Return all that trusting a source trusts: an address's prefix over IPv6."""
    return _whole(source, settings["trusted"]["ipv6_prefix"])


def _whole(source: Source, ipv6_prefix: int) -> Network:
    prefix = 32 if source.version == 4 else ipv6_prefix
    given = ipaddress.ip_network(source)
    return given if given.prefixlen <= prefix else given.supernet(new_prefix=prefix)


def text(network: Network) -> str:
    """Return a network as people write it: one address without its prefix length."""
    return str(network.network_address if network.num_addresses == 1 else network)


def counted_network(address: Address, settings: Settings) -> Network:
    """Return the network with which ``address`` is counted and banned (``autoban.networks``)."""
    prefix = settings["autoban"]["networks"][f"{family(address)}_prefix"]
    return ipaddress.ip_network((address, prefix), strict=False)


def in_networks(address: Address, networks: Iterable[str]) -> bool:
    """Return whether an address lies in one of some networks."""
    return any(address in ipaddress.ip_network(network) for network in networks)


def never_trusted(address: Address, settings: Settings) -> str:
    """Return why a login from ``address`` earns no trust, whatever the mode, or an empty string when it may.

    Loopback, link-local, multicast, broadcast and unspecified addresses are no client's, nor are the host's own;
    ``trusted.never`` is the operator's.
    """
    for kind in ("loopback", "link_local", "multicast", "unspecified"):
        if getattr(address, f"is_{kind}"):
            return f"is {kind.replace('_', '-')}"
    if address == _BROADCAST:
        return "is broadcast"
    would_be: Any = trusted_network(address, settings)
    if any(would_be.overlaps(other) for other in _networks(settings["trusted"]["never"], address.version)):
        return "is in mailfw:trusted:never"
    return sockets.own_address(address)


def _networks(texts: Iterable[str], version: int) -> Iterator[Any]:
    """Yield the networks of one family, for which Python compares networks."""
    return (network for network in map(ipaddress.ip_network, texts) if network.version == version)


def ports_for_login(address: Address, settings: Settings) -> list[int]:
    """Return the ports that a login from ``address`` opens.

    A service in private mode is opened only for what pillar's trusted networks admit already, with its whole prefix,
    unless ``mailfw:trusted:private`` says otherwise.
    """
    would_be: Any = trusted_network(address, settings)
    networks = _networks(settings["trusted"][f"networks_{family(address)}"], address.version)
    admitted = any(would_be.subnet_of(network) for network in networks)
    return [
        service["port"]
        for service in settings["services"]
        if service["login"] and (admitted or service["mode"] != "private" or settings["trusted"].get("private"))
    ]


def _refresh(name: str, timeouts: dict[str, int | None], note: str = "") -> str:
    """Return the script that gives elements a new timeout and comment; None stands for the set's default."""
    if not timeouts:
        return ""
    comment = f' comment "{note}"' if note else ""
    plain = ", ".join(timeouts)
    timed = ", ".join(
        value + (f" timeout {timeout}s" if timeout else "") + comment for value, timeout in timeouts.items()
    )
    where = f"element {nft.TABLE} {name}"
    return f"add {where} {{ {timed} }}\ndelete {where} {{ {plain} }}\nadd {where} {{ {timed} }}\n"


def _anything(_name: str, _value: str) -> bool:
    return True


def _remove(name: str, values: Iterable[Any], has: Has) -> str:
    """Deleting what is not there fails; adding it first makes that a success without a change, if there is room."""
    plain = ", ".join(value for value in map(str, values) if has(name, value))
    if not plain:
        return ""
    return f"add element {nft.TABLE} {name} {{ {plain} }}\ndelete element {nft.TABLE} {name} {{ {plain} }}\n"


def trust(source: Source, seconds: dict[int, int], settings: Settings, note: str = "", has: Has = _anything) -> str:
    """Return the script that trusts a source on some ports, port -> seconds, and lifts its rate bans.

    ``note``: who does so and why, unless it is a login. ``has``: see :data:`Has`.
    """
    timeouts: dict[str, int | None] = {
        f"{key} . {port}": left for key in trusted_keys(source, settings) for port, left in seconds.items()
    }
    return _refresh(f"trusted_{family(source)}", timeouts, note) + unban(source, ROLES, settings, has)


def untrust(source: Source, ports: list[int], settings: Settings, has: Has = _anything) -> str:
    """Return the script that ends a source's trust on some ports."""
    keys = trusted_keys(source, settings)
    return _remove(f"trusted_{family(source)}", [f"{key} . {port}" for key in keys for port in ports], has)


def ban(source: Source, roles: Iterable[str], seconds: int | None, settings: Settings, note: str = "") -> str:
    """Return the script that bans a source from the ports of some roles, by default for the sets' own period."""
    timeouts: dict[str, int | None] = dict.fromkeys(map(str, source_keys(source, settings)), seconds)
    return "".join(_refresh(f"banned_{role}_{family(source)}", timeouts, note) for role in roles)


def unban(source: Source, roles: Iterable[str], settings: Settings, has: Has = _anything) -> str:
    """Return the script that lifts a source's rate bans."""
    keys = source_keys(source, settings)
    return "".join(_remove(f"banned_{role}_{family(source)}", keys, has) for role in roles)


def refill(source: Source, meters: Iterable[str], settings: Settings, has: Has = _anything) -> str:
    """Return the script that empties what some meters remember of a source."""
    keys = source_keys(source, settings)
    return "".join(_remove(name, keys, has) for name in meters if name.endswith(family(source)))


def block(source: Source, seconds: int | None, settings: Settings, note: str = "") -> str:
    """Return the script that blocks a source from every login port, for a period or until it is unblocked."""
    timeouts: dict[str, int | None] = dict.fromkeys(map(str, source_keys(source, settings)), seconds)
    return _refresh(f"blocked_{family(source)}", timeouts, note)


def unblock(source: Source, settings: Settings, has: Has = _anything) -> str:
    """Return the script that ends a source's block."""
    return _remove(f"blocked_{family(source)}", source_keys(source, settings), has)


def forget(source: Source, sets: Iterable[str], ports: list[int], settings: Settings, has: Has = _anything) -> str:
    """Return the script that removes a source, on some ports, from some sets of sources and ports."""
    keys = source_keys(source, settings)
    values = [f"{key} . {port}" for key in keys for port in ports]
    return "".join(_remove(name, values, has) for name in sets if name.endswith(family(source)))
