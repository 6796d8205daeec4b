"""When addresses come into a host's trusted sets, told by the kernel: nothing looks for them again and again."""

from __future__ import annotations

import ipaddress
import socket
import struct
import threading
import time
from collections.abc import Iterator

from integration.hosts import Host, network_of
from mailfwlib.netlink import _attributes, _each, _text

# <linux/netlink.h>, <linux/netfilter/nfnetlink.h>, <linux/netfilter/nf_tables.h>
_NETLINK_NETFILTER, _OPTIONS, _JOIN, _NFTABLES = 12, 270, 1, 7
_NEW_ELEMENTS, _SET, _ELEMENTS, _KEY, _VALUE = 10 << 8 | 12, 2, 3, 1, 1
#: The kernel's queue for this socket, in bytes: what does not fit is lost, and reading says so.
_QUEUE = 1 << 25


class Arrivals:
    """Notes when each address first comes into a trusted set of a host; times are those of ``time.monotonic``."""

    def __init__(self, host: Host):
        self._at: dict[str, float] = {}
        self._ended: OSError | None = None
        with network_of(host):
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.setsockopt(socket.SOL_SOCKET, 33, _QUEUE)  # SO_RCVBUFFORCE
        self._socket.bind((0, 0))
        self._socket.setsockopt(_OPTIONS, _JOIN, _NFTABLES)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                received, now = self._socket.recv(1 << 18), time.monotonic()
                for address in _trusted(received):
                    self._at.setdefault(address, now)
        except OSError as err:  # it was closed, or the kernel had to drop something
            self._ended = err

    @property
    def at(self) -> dict[str, float]:
        """When each address has come: IPv4 address -> time. Raises OSError when some may have been missed."""
        if self._ended:
            raise self._ended
        return self._at

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()


def _trusted(received: bytes) -> Iterator[str]:
    """Yield the IPv4 addresses that come into the trusted set."""
    place = 0
    while place + 16 <= len(received):
        length, kind = struct.unpack_from("=IH", received, place)
        if kind == _NEW_ELEMENTS:
            found = _attributes(received[place + 20 : place + length])
            if _text(found[_SET]) == "trusted_ipv4":
                for element in map(_attributes, _each(found[_ELEMENTS])):
                    yield str(ipaddress.IPv4Address(_attributes(element[_KEY])[_VALUE][:4]))
        place += (length + 3) & ~3
