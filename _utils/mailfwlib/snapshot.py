"""Snapshots: who is trusted, banned and blocked, on disk, so that nothing is lost when the table is.

A snapshot is text, a line for each element: its set, its value, its timeout and the Unix time at which it ends, so
that time goes on while the host is down; and its comment, percent-encoded, if it has one. The last line has the
number of lines and their checksum: a snapshot is believed as a whole, or not at all.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Optional
from urllib.parse import quote, unquote

from mailfwlib import audit, files, netlink, nft

PATH = Path("/var/lib/mailfw/snapshot")
FIRST_LINE = "mailfw snapshot 1"

#: The sets whose elements are worth keeping.
KEPT = re.compile(r"(trusted|blocked|banned_[a-z]+|banned_networks_[a-z]+)_ipv[46]")
_LINE = re.compile(rf"({KEPT.pattern}) ([0-9a-f.:]+(?: \. \d+)?) (\d+|-) (\d+|-)(?: (\S+))?")
#: Deadlines are whole seconds, read at different moments: two that differ by no more are the same.
_ROUNDING = 2


class SnapshotError(ValueError):
    """A snapshot that is not to be believed; the message says why."""


class Element(NamedTuple):
    """An element: its value as nft writes it, its own timeout in seconds, when it ends in Unix time, its comment."""

    value: str
    timeout: Optional[int]
    ends: Optional[int]
    note: str = ""


#: Set -> its elements.
Elements = dict[str, list[Element]]


def current(wanted: re.Pattern[str] = KEPT) -> Elements:
    """Return the elements that are loaded now of the sets with such names, by default those worth keeping.

    Raises NftError, also when no table is loaded: that nobody is trusted is not what such a host knows.
    """
    kernel = netlink.Kernel()
    try:
        found = {
            # It takes seconds to list very many: each is as the kernel says it at its own moment.
            name: [_element(one, time.time()) for one in kernel.elements(name)]
            for name in kernel.sets()
            if wanted.fullmatch(name)
        }
    except OSError as err:
        raise nft.NftError(f"the sets cannot be listed: {err.strerror}") from err
    if not found:
        raise nft.NftError("no rules are loaded")
    return found


def _element(listed: netlink.SetElement, now: float) -> Element:
    timeout = None if listed.timeout is None else max(1, round(listed.timeout))
    ends = None if listed.left is None else round(now + listed.left)
    # Somebody may have written a comment of which a snapshot would not be believed.
    return Element(listed.value, timeout, ends, listed.note if audit.is_note(listed.note) else "")


def text(elements: Elements) -> str:
    """Return a snapshot of some elements."""
    lines = [FIRST_LINE]
    for name, listed in sorted(elements.items()):
        lines += [f"{name} {_line(one)}" for one in listed]
    body = "\n".join(lines) + "\n"
    return f"{body}{len(lines)} {hashlib.sha256(body.encode()).hexdigest()}\n"


def _line(one: Element) -> str:
    line = f"{one.value} {_field(one.timeout)} {_field(one.ends)}"
    return f"{line} {quote(one.note, safe='')}" if one.note else line


def _field(number: int | None) -> str:
    return "-" if number is None else str(number)


def parse(snapshot: str) -> Elements:
    """Return the elements of a snapshot. Raises SnapshotError."""
    body, _, last = snapshot.removesuffix("\n").rpartition("\n")
    lines = body.split("\n")
    if lines[0] != FIRST_LINE:
        raise SnapshotError(f"does not begin with {FIRST_LINE!r}: empty, or of another version or program")
    if last != f"{len(lines)} {hashlib.sha256((body + chr(10)).encode()).hexdigest()}":
        raise SnapshotError("its last line does not match the others: it is cut off or was changed")
    found: Elements = {}
    for line in lines[1:]:
        match = _LINE.fullmatch(line)
        if not match:
            raise SnapshotError(f"a line is not an element: {line!r:.80}")
        name, value, timeout, ends, note = match[1], match[3], match[4], match[5], unquote(match[6] or "")
        if not audit.is_note(note):
            raise SnapshotError(f"a comment is none: {note!r:.80}")
        found.setdefault(name, []).append(Element(value, _number(timeout), _number(ends), note))
    return found


def _number(field: str) -> int | None:
    return None if field == "-" else int(field)


def same(one: Elements, other: Elements) -> bool:
    """Return whether two snapshots say the same, apart from rounding."""
    first, second = _flat(one), _flat(other)
    return first.keys() == second.keys() and all(
        first[key] == second[key] or abs(first[key] - second[key]) <= _ROUNDING for key in first
    )


def _flat(elements: Elements) -> dict[tuple[str, str, str], float]:
    return {(name, one.value, one.note): _end(one) for name, listed in elements.items() for one in listed}


def save(path: Path = PATH, is_whole: Callable[[], bool] = lambda: True) -> str:
    """Write the loaded elements to disk, unless the snapshot there says the same; return what was done.

    The file is replaced at once: a reader, or a power failure, finds the old or the new one. ``is_whole`` says whether
    the table that was listed has all that it should have. Raises NftError, OSError.
    """
    elements = current()
    if not is_whole():
        raise nft.NftError("the table that is loaded may lack what the last snapshot has")
    count = sum(map(len, elements.values()))
    try:
        if same(parse(path.read_text(encoding="ascii")), elements):
            return f"unchanged, {count} elements"
    except (OSError, ValueError):
        pass
    files.replace(path, text(elements))
    return f"written, {count} elements"


def load(path: Path = PATH) -> Elements:
    """Return the elements of the snapshot on disk, none when there is none. Raises SnapshotError."""
    try:
        owner = path.stat().st_uid
        content = path.read_text(encoding="ascii")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise SnapshotError(str(err)) from err
    if owner:
        raise SnapshotError(f"belongs to uid {owner}, not to root")
    return parse(content)


def set_aside(path: Path = PATH) -> Path:
    """Rename a snapshot that is not to be believed, so that it can be looked at; return its new path."""
    aside = path.with_name(f"{path.name}.rejected")
    path.replace(aside)
    return aside


def fitting(elements: Elements, sizes: dict[str, int]) -> Elements:
    """Return elements without those for which sets that became smaller have no room: those that end first."""
    return {
        name: sorted(listed, key=_end, reverse=True)[: sizes[name]]
        for name, listed in elements.items()
        if name in sizes
    }


def under(elements: Elements, masks: dict[str, int]) -> Elements:
    """Return elements under their addresses' bits that rules look up, for sets that are looked up by a part of them.

    Of those that fall together the one that ends last is left.
    """
    return {name: _under(listed, masks[name]) if name in masks else listed for name, listed in elements.items()}


def _under(elements: Iterable[Element], mask: int) -> list[Element]:
    found: dict[str, Element] = {}
    for one in elements:
        value = _masked(one.value, mask)
        if value not in found or _end(found[value]) < _end(one):
            found[value] = one._replace(value=value)
    return list(found.values())


def _masked(value: str, mask: int) -> str:
    address, dot, port = value.partition(" . ")
    whole = ipaddress.ip_address(address)
    part = int(whole) & mask
    return value if part == int(whole) else f"{type(whole)(part)}{dot}{port}"


def _end(one: Element) -> float:
    return float("inf") if one.ends is None else one.ends


def script(elements: Elements, timeouts: dict[str, Optional[int]], now: float) -> str:
    """Return the nft script that adds elements again with the time that they have left; what is over stays out.

    ``timeouts``: the default timeout of each set that there is. An element that lived by the default lives no longer
    than the new one; kernels refuse more time left than the timeout (c0f38a8c6017).
    """
    lines = []
    for name, default in timeouts.items():
        alive = [one for one in elements.get(name, []) if one.ends is None or one.ends > now]
        if alive:
            lines.append(f"add element {nft.TABLE} {name} {{ {', '.join(_timed(alive, default, now))} }}\n")
    return "".join(lines)


def _timed(elements: Iterable[Element], default: int | None, now: float) -> Iterable[str]:
    for one in elements:
        yield one.value + _lifetime(one, default, now) + (f' comment "{one.note}"' if one.note else "")


def _lifetime(one: Element, default: int | None, now: float) -> str:
    if one.ends is None:
        return ""
    left = max(1, round(one.ends - now))
    if one.timeout is not None:
        return f" timeout {one.timeout}s expires {min(left, one.timeout)}s"
    if default is not None:
        return f" timeout {default}s expires {min(left, default)}s"
    return f" timeout {left}s"
