"""Which addresses are this host's own, asked of the kernel's routing table: no packet is sent, and nothing is bound."""

from __future__ import annotations

import socket
import struct

from mailfwlib.parse import Address

# <linux/netlink.h>, <linux/rtnetlink.h>
_NETLINK_ROUTE, _REQUEST = 0, 0x1
_GET_ROUTE, _NEW_ROUTE, _DESTINATION, _LOCAL = 26, 24, 1, 2
_HEADER, _ROUTE = "=IHHII", "=8BI"


def is_own(address: Address) -> bool:
    """Return whether packets to an address stay on this host, as those to its own do, secondary ones included.

    Binding would lie where ip_nonlocal_bind is set, and the source that the kernel picks towards a secondary IPv4
    address is the primary one. Raises OSError when the kernel does not answer.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    route = struct.pack(_ROUTE, family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    wanted = struct.pack("=HH", 4 + len(address.packed), _DESTINATION) + address.packed
    length = struct.calcsize(_HEADER) + len(route) + len(wanted)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE) as kernel:
        kernel.settimeout(5)
        kernel.send(struct.pack(_HEADER, length, _GET_ROUTE, _REQUEST, 0, 0) + route + wanted)
        answer = kernel.recv(1 << 16)
    kind = struct.unpack_from(_HEADER, answer)[1]
    if kind != _NEW_ROUTE:  # An error: there is no route, so it is no address of this host.
        return False
    return bool(struct.unpack_from(_ROUTE, answer, struct.calcsize(_HEADER))[7] == _LOCAL)
