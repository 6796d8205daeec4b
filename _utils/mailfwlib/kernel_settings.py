"""Settings of the kernel that get in the way of what mailfw promises."""

from __future__ import annotations

from pathlib import Path

FASTOPEN = Path("/proc/sys/net/ipv4/tcp_fastopen")
#: The bit of tcp_fastopen for servers (Documentation/networking/ip-sysctl.rst).
FASTOPEN_SERVER = 2


def warnings() -> list[str]:
    """Return a sentence for each setting of this host that gets in the way."""
    return fast_open(FASTOPEN.read_text(encoding="ascii") if FASTOPEN.exists() else "0")


def fast_open(setting: str) -> list[str]:
    """Return a sentence when servers take TCP fast open; ``setting`` is what tcp_fastopen says."""
    value = int(setting)
    if not value & FASTOPEN_SERVER:
        return []
    return [
        f"net.ipv4.tcp_fastopen is {value}: servers may take data in a connection's first packet (TCP fast open), "
        f"before mailfw can tell its source from a forged one; set net.ipv4.tcp_fastopen = {value & ~FASTOPEN_SERVER}"
    ]
