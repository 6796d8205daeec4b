"""The TCP connections that the host's own services have open, through ``ss`` of iproute2; and its own addresses."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

from mailfwlib import parse, routes
from mailfwlib.parse import Address, Network

#: ss can hang only on a kernel that does not answer; no caller waits longer than this many seconds for it.
TIMEOUT = 60


class SocketsError(RuntimeError):
    """ss failed; the message is its own."""


def connections(ports: Iterable[int]) -> list[tuple[Address, int, int]]:
    """Return the connections to some local ports, each as the client's address and port, and the local port.

    Raises SocketsError.
    """
    ports, found = list(ports), []
    if not ports:
        return []
    for line in ss("-Htn", "state", "established", "state", "close-wait", *_to(ports)).splitlines():
        local, client = line.split()[-2:]
        address, _, client_port = client.rpartition(":")
        found.append((parse.address(address.strip("[]")), int(client_port), int(local.rpartition(":")[2])))
    return found


def listening() -> set[int]:
    """Return the local ports that somebody listens on, for more than the host itself. Raises SocketsError."""
    found = set()
    for line in ss("-Htnl").splitlines():
        address, _, port = line.split()[3].rpartition(":")
        if not address.startswith(("127.", "[::1]", "[::ffff:127.")):
            found.add(int(port))
    return found


def end(network: Network, ports: Iterable[int], spared: Iterable[str] = ()) -> int:
    """End the connections of a network to some local ports at once, and tell the clients; return how many there were.

    Idle connections end too; those of the networks in ``spared`` stay. Raises SocketsError. A kernel without
    CONFIG_INET_DIAG_DESTROY ends none.
    """
    ports = list(ports)
    if not ports:
        return 0
    others = [word for other in spared for word in ("and", "not", "dst", other)]
    return len(
        ss(
            "-HtnK", "state", "connected", "exclude", "time-wait", "dst", str(network), *others, "and", *_to(ports)
        ).splitlines()
    )


def own_address(address: Address) -> str:
    """Return a reason when an address is this host's own: the kernel reaches only those from themselves."""
    try:
        return "is this host's own" if routes.is_own(address) else ""
    except OSError:
        return ""


def _to(ports: Iterable[int]) -> list[str]:
    """Return ss's filter for local ports."""
    return ["(", *" or ".join(f"sport = :{port}" for port in ports).split(), ")"]


def ss(*arguments: str) -> str:
    """Return what ss prints. Raises SocketsError."""
    try:
        done = subprocess.run(["ss", *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise SocketsError(f"ss: {err}") from err
    if done.returncode or done.stderr:
        raise SocketsError(done.stderr.strip().partition("\n")[0] or f"ss: exit status {done.returncode}")
    return done.stdout
