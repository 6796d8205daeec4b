"""Loading the rules: what the kernel makes of the files, how that differs from what is loaded, and the change.

The kernel is the canonicaliser: the files are loaded into a scratch network namespace and listed, and two
listings are compared. The change is one nft transaction, so there is no moment without rules, and a file that
does not load changes nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import re
from collections.abc import Iterator

from mailfwlib import nft

#: Appliers take turns on this file: two at once would double the rules of a chain.
LOCK = "/run/mailfw/apply.lock"

#: The objects of a table: (kind, name) -> its text as nft lists it.
Objects = dict[tuple[str, str], str]

_OBJECT = re.compile(r"^\t(set|map|chain|counter) (\S+) \{\n.*?^\t\}$", re.M | re.S)
_ELEMENTS = re.compile(r"^\t\telements = \{.*?\}\n", re.M | re.S)
_HOOK = re.compile(r"^\t\ttype .*$", re.M)
#: Buckets of sources: each element keeps the rate it was made with, so a new ruleset starts with empty ones.
_METERS = ("rate_", "network_rate_", "waiting_")


def wanted(script: str) -> Objects:
    """Return what the kernel makes of a script. Raises NftError with nft's message when it does not load."""
    return _objects(nft.in_scratch_namespace(script, f"-s list table {nft.TABLE}"))


def live() -> Objects:
    """Return what is loaded now, without the elements that rules and logins add; ``{}`` when nothing is."""
    try:
        objects = _objects(nft.command("-s", "-t", "list", "table", *nft.TABLE.split()))
    except nft.NftError as err:
        if "No such file or directory" in str(err):
            return {}
        raise
    for kind, name in [key for key in objects if _is_static(key, objects)]:
        objects.update(_objects(nft.command("-s", "list", kind, *nft.TABLE.split(), name)))
    return objects


def _objects(listing: str) -> Objects:
    return {(match[1], match[2]): match[0] for match in _OBJECT.finditer(listing)}


def _is_static(key: tuple[str, str], objects: Objects) -> bool:
    """Return whether the elements come from the files alone: maps, and sets that no rule and no login adds to."""
    return key[0] == "map" or (key[0] == "set" and "dynamic" not in objects[key])


def difference(old: Objects, new: Objects) -> str:
    """Return a unified diff of two rulesets, empty when they are equal."""
    if old == new:
        return ""
    order = list(new) + [key for key in old if key not in new]
    before, after = ("\n".join(side[key] for key in order if key in side).splitlines() for side in (old, new))
    return "\n".join(difflib.unified_diff(before, after, "loaded", "wanted", lineterm="", n=2))


def transaction(old: Objects, new: Objects, script: str, carried: str) -> str:
    """Return the nft script that turns the loaded ruleset ``old`` into what ``script`` declares, ``new``.

    Elements that rules and logins have added stay. ``carried`` adds those again whose set has to be made anew.
    """
    if not old:
        return script
    lines = [f"flush chain {nft.TABLE} {name}" for kind, name in old if kind == "chain"]
    for kind, name in old:
        if _is_static((kind, name), old) or (kind == "set" and name.startswith(_METERS)):
            lines.append(f"flush {kind} {nft.TABLE} {name}")
    doomed = [key for key in old if key not in new or _definition(key, old) != _definition(key, new)]
    for kind in ("chain", "map", "set", "counter"):
        lines += [f"delete {kind} {nft.TABLE} {name}" for found, name in doomed if found == kind]
    return "\n".join(lines) + "\n" + script + "\n" + carried


def remade(old: Objects, new: Objects) -> list[str]:
    """Return the sets of elements worth keeping that a transaction has to make anew."""
    return [
        name
        for kind, name in old
        if kind == "set"
        and (kind, name) in new
        and not _is_static((kind, name), old)
        and not name.startswith(_METERS)
        and _definition((kind, name), old) != _definition((kind, name), new)
    ]


def _definition(key: tuple[str, str], objects: Objects) -> str:
    """Return what cannot be changed in place: a set's type, flags, size and timeout; a chain's hook and priority."""
    text = objects[key]
    if key[0] == "chain":
        return "".join(_HOOK.findall(text))
    return _ELEMENTS.sub("", text)


def carry(name: str, new: Objects) -> str:
    """Return the script that adds a loaded set's elements again with the time they have left.

    An element that lived by the set's default timeout lives no longer than the new default.
    """
    match = re.search(r"\n\t\ttimeout (\S+)", new["set", name])
    default = _seconds(match[1]) if match else None
    lines = []
    for element in nft.elements(name):
        value = element["val"]
        text = " . ".join(map(str, value["concat"])) if isinstance(value, dict) else str(value)
        if "expires" in element:
            left = max(1, element["expires"])
            if "timeout" in element:
                text += f" timeout {max(element['timeout'], left)}s expires {left}s"
            elif default:
                text += f" timeout {default}s expires {min(left, default)}s"
        lines.append(text)
    return f"add element {nft.TABLE} {name} {{ {', '.join(lines)} }}\n" if lines else ""


def _seconds(text: str) -> int:
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+)([dhms])(?!s)", text))


@contextlib.contextmanager
def turn(path: str = LOCK) -> Iterator[None]:
    """Wait for this applier's turn."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with open(path, "a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compare(script: str) -> str:
    """Return how the loaded rules differ from what ``script`` declares, as a diff; empty when they do not."""
    return difference(live(), wanted(script))


def apply(script: str) -> str:
    """Make the loaded rules what ``script`` declares, in one transaction; return the diff, empty when nothing changed.

    Raises NftError with nft's message, and then the loaded rules are what they were.
    """
    new = wanted(script)
    with turn():
        old = live()
        changed = difference(old, new)
        if changed:
            carried = "".join(carry(name, new) for name in remade(old, new))
            nft.run(transaction(old, new, script, carried))
    return changed
