"""A host in one row: what an operator looks at first, of one host or of hundreds."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Optional

from mailfwlib import netlink, parse
from mailfwlib.settings import FAMILIES, ROLES, Settings

#: Seconds that count as lately.
HOUR = 3600.0


def counts(kernel: netlink.Kernel) -> dict[str, str]:
    """Return how many addresses are trusted, banned and blocked, and how many of them since an hour ago.

    An address counts once, however many ports or roles it has; over IPv6 it is a prefix. A renewed trust is a new one.
    Raises OSError when the kernel does not answer.
    """
    present = set(kernel.sets())
    found = {}
    for kind, names in (
        ("trusted", ["trusted"]),
        ("banned", [f"banned_{role}" for role in ROLES]),
        ("blocked", ["blocked"]),
    ):
        everyone, lately = set(), set()
        for name in (f"{one}_{family}" for one in names for family in FAMILIES):
            if name not in present:
                continue
            default = kernel.timeout(name)
            for element in kernel.elements(name):
                address = element.value.partition(" ")[0]
                everyone.add(address)
                age = element.age(default)
                if age is not None and age < HOUR:
                    lately.add(address)
        found[kind] = f"{len(everyone)} (+{len(lately)})" if lately else str(len(everyone))
    return found


def ago(at: Optional[float], now: Optional[float] = None) -> str:
    """Return how long ago a Unix time was: ``34s``, ``never`` for None."""
    return "never" if at is None else parse.duration_text(max(0.0, (time.time() if now is None else now) - at))


def modes(settings: Settings) -> str:
    """Return a host's mode, and that of services that have another one: ``protected; sieve: private``."""
    mode = settings["protection"]["type"]
    others = [f"{one['name']}: {one['mode']}" for one in settings["services"] if one["login"] and one["mode"] != mode]
    return "; ".join([mode, *others])


def in_force(loaded: bool, is_open: str, settings: Settings) -> str:
    """Return whether the rules are in force: ``enforcing``, ``observing``, ``open`` or ``NOT LOADED``."""
    if not loaded:
        return "NOT LOADED"
    if is_open:
        return "OPEN"
    return "enforcing" if settings["enforce"] else "observing"


def differing(rows: dict[str, dict[str, Any]], columns: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Return the columns in which hosts differ: column -> value -> hosts."""
    found: dict[str, dict[str, list[str]]] = {}
    for column in columns:
        by_value: dict[str, list[str]] = {}
        for host, row in sorted(rows.items()):
            by_value.setdefault(str(row.get(column, "")), []).append(host)
        if len(by_value) > 1:
            found[column] = by_value
    return found
