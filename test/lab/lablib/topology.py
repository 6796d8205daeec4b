"""Who is in the lab, and under which addresses. Addresses are of the documentation and benchmark ranges."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_interface, ip_network
from typing import Union

Interface = Union[IPv4Interface, IPv6Interface]
Network = Union[IPv4Network, IPv6Network]

DOMAIN = "lab.test"
PREFIX = "mailfw-"


def interfaces(*texts: str) -> tuple[Interface, ...]:
    return tuple(ip_interface(text) for text in texts)


@dataclass(frozen=True)
class Node:
    """Anything with a network namespace. Its first address of each family is the default source."""

    name: str
    addresses: tuple[Interface, ...]

    @property
    def namespace(self) -> str:
        return PREFIX + self.name

    @property
    def addresses_text(self) -> str:
        return " ".join(str(address.ip) for address in self.addresses)


@dataclass(frozen=True)
class Host(Node):
    """A booted system: the image's suite, the Salt environment of its pillar, units to switch on and off."""

    suite: str
    pillarenv: str
    enabled: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Client(Node):
    """A plain network namespace behind the router, which has `gateways` on the client's link.

    All addresses of `networks` are the client's own, too.
    """

    gateways: tuple[Interface, ...]
    networks: tuple[Network, ...] = ()


SWITCH = Node("switch", interfaces("192.0.2.1/24", "2001:db8:0:1::1/64"))

#: What the master runs: trixie has Salt 3008, bookworm Salt 3006.
MASTER = os.environ.get("MAILFW_LAB_MASTER", "trixie")

HOSTS = (
    Host(
        "master",
        interfaces("192.0.2.10/24", "2001:db8:0:1::10/64"),
        suite=MASTER,
        pillarenv="prod",
        enabled=("salt-master.service",),
        masked=("dovecot.service", "postfix.service"),
    ),
    Host("mx1", interfaces("192.0.2.11/24", "2001:db8:0:1::11/64"), suite="bookworm", pillarenv="prod"),
    Host("mx2", interfaces("192.0.2.12/24", "2001:db8:0:1::12/64"), suite="trixie", pillarenv="staging"),
)

CLIENTS = (
    Client(
        "home",
        interfaces("198.51.100.10/24", "2001:db8:0:2::10/64", "2001:db8:0:2::11/64"),
        gateways=interfaces("198.51.100.1/24", "2001:db8:0:2::1/64"),
    ),
    Client(
        "cafe",
        interfaces("203.0.113.10/24", "2001:db8:0:3::10/64"),
        gateways=interfaces("203.0.113.1/24", "2001:db8:0:3::1/64"),
    ),
    Client(
        "bot",
        interfaces(
            "198.18.0.66/24",
            "198.18.0.67/24",
            "198.18.0.68/24",
            "198.18.0.69/24",
            "2001:db8:0:66::66/64",
            "2001:db8:0:66::67/64",
            "2001:db8:0:67::66/64",
        ),
        gateways=interfaces("198.18.0.1/24", "2001:db8:0:66::1/64", "2001:db8:0:67::1/64"),
    ),
    Client(
        "town",
        interfaces("198.19.0.10/24", "2001:db8:0:4::10/64"),
        gateways=interfaces("198.19.0.1/24", "2001:db8:0:4::1/64"),
        networks=(ip_network("198.19.128.0/17"), ip_network("2001:db8:7000::/36")),
    ),
)

SUITES = tuple(sorted({host.suite for host in HOSTS}))


def host(name: str) -> Host:
    return next(host for host in HOSTS if host.name == name)
