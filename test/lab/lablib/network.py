"""The lab's network: a switch namespace that bridges the hosts and routes to each client's own link.

Clients have links of their own rather than ports of the bridge, so that no router ever sends redirects.
The machine's own network namespace is never touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from ipaddress import IPv4Interface
from pathlib import Path

from .shell import LabError, run
from .topology import CLIENTS, HOSTS, PREFIX, SWITCH, Client, Host, Interface, Node

NAMESPACES = Path("/run/netns")
BRIDGE = "br0"
LINK = "eth0"

# Addresses are usable at once (no duplicate address detection), and nothing is learnt from the wire.
SYSCTLS = {
    "net.ipv4.conf.all.accept_redirects": 0,
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.all.send_redirects": 0,
    "net.ipv4.conf.default.accept_redirects": 0,
    "net.ipv4.conf.default.rp_filter": 0,
    "net.ipv4.conf.default.send_redirects": 0,
    "net.ipv6.conf.all.accept_dad": 0,
    "net.ipv6.conf.all.accept_ra": 0,
    "net.ipv6.conf.all.accept_redirects": 0,
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv6.conf.default.accept_ra": 0,
    "net.ipv6.conf.default.accept_redirects": 0,
    "net.ipv6.conf.default.dad_transmits": 0,
}
FORWARDING = {"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1}
# A client may connect from all addresses of its networks.
NETWORKS = {"net.ipv6.ip_nonlocal_bind": 1}


def namespace_path(node: Node) -> Path:
    return NAMESPACES / node.namespace


def exists() -> bool:
    return all(namespace_path(node).exists() for node in (SWITCH, *HOSTS, *CLIENTS))


def create() -> None:
    """Make every namespace and link of the lab, hosts' ones included, whether or not those get booted."""
    for node in (SWITCH, *HOSTS, *CLIENTS):
        add_namespace(node)
    set_sysctls(SWITCH, FORWARDING)
    batch(SWITCH, switch_commands())
    for host in HOSTS:
        attach(host)
    for client in CLIENTS:
        batch(SWITCH, [*cable(client), *give(client.name, client.gateways)])
        batch(client, [*link_up(client), *default_routes(client, client.gateways)])
        for whole in client.networks:
            batch(SWITCH, [f"route add {whole} via {first(client.addresses, whole.version)}"])
            batch(client, [f"route add local {whole} dev lo"])
            set_sysctls(client, NETWORKS)


def add_namespace(node: Node) -> None:
    run(["ip", "netns", "add", node.namespace])
    set_sysctls(node, SYSCTLS)


def attach(host: Host) -> None:
    """Connect a host's fresh namespace to the bridge."""
    batch(SWITCH, cable(host, f"master {BRIDGE}"))
    batch(host, [*link_up(host), *default_routes(host, SWITCH.addresses)])


def renew(host: Host) -> None:
    """Give a stopped host a fresh namespace: as on a real machine, no packet filter outlives a boot."""
    batch(SWITCH, [f"link delete dev {host.name}"])
    run(["ip", "netns", "delete", host.namespace])
    add_namespace(host)
    attach(host)


def remove() -> None:
    """Delete the lab's namespaces, and the mount point of `ip netns` if nobody else uses it."""
    if not NAMESPACES.is_dir():
        return
    for path in sorted(NAMESPACES.glob(PREFIX + "*")):
        run(["ip", "netns", "delete", path.name])
    if not any(NAMESPACES.iterdir()):
        # Made by the first `ip netns add`; it is made anew when somebody needs it.
        with contextlib.suppress(LabError):
            run(["umount", str(NAMESPACES)])
        with contextlib.suppress(OSError):
            NAMESPACES.rmdir()


def batch(node: Node, commands: Iterable[str]) -> None:
    run(["ip", "-netns", node.namespace, "-batch", "-"], "\n".join(commands) + "\n")


def set_sysctls(node: Node, values: dict[str, int]) -> None:
    settings = [f"{name}={value}" for name, value in values.items()]
    run(["nsenter", f"--net={namespace_path(node)}", "sysctl", "--quiet", "--write", *settings])


def switch_commands() -> list[str]:
    return [
        "link set lo up",
        f"link add name {BRIDGE} type bridge forward_delay 0 mcast_snooping 0",
        *give(BRIDGE, SWITCH.addresses),
        f"link set {BRIDGE} up",
    ]


def cable(node: Host | Client, options: str = "") -> list[str]:
    """A veth pair whose end in the switch has the node's name, and the other one, in the node, is LINK."""
    return [
        f"link add name {node.name} type veth peer name {LINK} address {mac(node)} netns {node.namespace}",
        f"link set dev {node.name} {options} up",
    ]


def mac(node: Node) -> str:
    """A hardware address of the node's own, which stays over reboots as neighbours remember it."""
    return "02:00:" + node.addresses[0].ip.packed.hex(":")


def link_up(node: Node) -> list[str]:
    return ["link set lo up", *give(LINK, node.addresses), f"link set {LINK} up"]


def give(device: str, addresses: tuple[Interface, ...]) -> list[str]:
    return [
        f"address add {address} dev {device}" + ("" if isinstance(address, IPv4Interface) else " nodad")
        for address in addresses
    ]


def default_routes(node: Node, gateways: tuple[Interface, ...]) -> list[str]:
    """One default route a family; the source of connections that bind to none is the node's first address."""
    return [
        f"route add {all_of_it} via {first(gateways, version)} src {first(node.addresses, version)}"
        for version, all_of_it in ((4, "0.0.0.0/0"), (6, "::/0"))
    ]


def first(addresses: tuple[Interface, ...], version: int) -> str:
    return str(next(address.ip for address in addresses if address.version == version))
