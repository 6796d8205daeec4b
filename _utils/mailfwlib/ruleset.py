"""Loading the rules: what the kernel makes of the files, how that differs from what is loaded, and the change.

The kernel is the canonicaliser: the files are loaded into a scratch network namespace and listed, and two
listings are compared. The change is one nft transaction, so there is no moment without rules, and a file that
does not load changes nothing. A table that was not there comes with the elements of the last snapshot.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import fcntl
import hashlib
import ipaddress
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mailfwlib import breakglass, client, elements, files, netlink, nft, parse, snapshot, sockets
from mailfwlib.rules import OLDER

log = logging.getLogger(__name__)

#: Appliers take turns on this file: two at once would double the rules of a chain.
LOCK = "/run/mailfw/apply.lock"

#: The rule files, one for what all roles share and one for each role.
RULES = Path("/etc/nftables.d/mailfw")
#: Shared by whoever adds elements; an applier has it alone while it carries elements over.
ELEMENTS = "/run/mailfw/elements.lock"
#: That it is there says that rules are wanted. It tells what was loaded last since the host has booted.
LOADED = Path("/run/mailfw/loaded")
#: The same of rules that were taken away on purpose: what the kernel makes of the files is known all the same.
UNLOADED = Path("/run/mailfw/unloaded")

#: In the place of a fingerprint and of a table that are not known, and as long: nothing that is loaded has them.
_UNKNOWN, _NO_TABLE = "0" * 64, "0" * 16

#: How often the rules are listed when somebody takes them away in the middle of it.
_ATTEMPTS = 3

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>

#: The objects of a table: (kind, name) -> its text as nft lists it.
Objects = dict[tuple[str, str], str]

_OBJECT = re.compile(r"^\t(set|map|chain|counter) (\S+) \{\n.*?^\t\}$", re.M | re.S)
_ELEMENTS = re.compile(r"^\t\telements = \{.*?\}\n", re.M | re.S)
_HOOK = re.compile(r"^\t\ttype .*$", re.M)
#: How a rule looks a prefix of a packet's source up in a set: mask, set.
_LOOK_UP = re.compile(r"\bip6? saddr & (\S+)(?: \. tcp dport)? (?:[!=]= )?@(\S+)")
_TRUSTED_IPV6 = "trusted_ipv6"
#: Buckets of sources: each element keeps the rate it was made with, so a new ruleset starts with empty ones.
_METERS = ("rate_", "network_rate_", "waiting_")


def wanted(script: str) -> Objects:
    """Return what the kernel makes of a script. Raises NftError with nft's message when it does not load."""
    return _objects(nft.in_scratch_namespace(script, f"-s list table {nft.TABLE}"))


def live() -> Objects:
    """Return what is loaded now, without the elements that rules and logins add; ``{}`` when nothing is."""
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(nft.NftError):
            return _live()
    return _live()


def _live() -> Objects:
    objects = _objects(nft.table())
    for kind, name in [key for key in objects if _is_static(key, objects)]:
        objects.update(_objects(nft.command("-s", "list", kind, *nft.TABLE.split(), name)))
    return objects


def _objects(listing: str) -> Objects:
    return {(match[1], match[2]): match[0] for match in _OBJECT.finditer(listing)}


def _is_static(key: tuple[str, str], objects: Objects) -> bool:
    """Return whether the elements come from the files alone: maps, and sets that no rule and no login adds to."""
    return key[0] == "map" or (key[0] == "set" and "dynamic" not in objects[key])


def sizes(objects: Objects) -> dict[str, int]:
    """Return how many elements each set takes that rules and logins add to: name -> size.

    Those whose size is nobody's concern are left out.
    """
    return {
        key[1]: int(match[1])
        for key, text in objects.items()
        if key[0] == "set"
        and not key[1].startswith(("older_", "break_glass"))
        and (match := re.search(r"\n\t\tsize (\d+)", text))
    }


def difference(old: Objects, new: Objects) -> str:
    """Return a unified diff of each object that differs in two rulesets, empty when they are equal."""
    lines: list[str] = []
    for key in list(new) + [key for key in old if key not in new]:
        before, after = (side.get(key, "").splitlines() for side in (old, new))
        name = " ".join(key)
        lines += difflib.unified_diff(before, after, f"loaded {name}", f"wanted {name}", lineterm="", n=2)
    return "\n".join(lines)


def altered(diff: str) -> list[str]:
    """Return the objects that a diff is about, such as ``chain guarded``."""
    return re.findall(r"^\+\+\+ wanted (.*)$", diff, re.M)


def transaction(old: Objects, new: Objects, script: str, carried: str) -> str:
    """Return the nft script that turns the loaded ruleset ``old`` into what ``script`` declares, ``new``.

    Elements that rules and logins have added stay. ``carried`` adds those again whose set has to be made anew.
    """
    if not old:  # What a killed nft may have loaded meanwhile goes first.
        return f"table {nft.TABLE}\ndelete table {nft.TABLE}\n{script}\n{carried}"
    lines = [f"flush chain {nft.TABLE} {name}" for kind, name in old if kind == "chain"]
    for kind, name in old:
        if _is_static((kind, name), old) or (kind == "set" and name.startswith(_METERS)):
            lines.append(f"flush {kind} {nft.TABLE} {name}")
    doomed = [key for key in old if key not in new or _definition(key, old) != _definition(key, new)]
    lines += [f"flush set {nft.TABLE} {name}" for name in remade(old, new) if ("set", name) not in doomed]
    for kind in ("chain", "map", "set", "counter"):
        lines += [f"delete {kind} {nft.TABLE} {name}" for found, name in doomed if found == kind]
    return "\n".join(lines) + "\n" + script + "\n" + carried


def remade(old: Objects, new: Objects) -> list[str]:
    """Return the sets of elements worth keeping whose elements a transaction has to add again."""
    before, after = masks(old), masks(new)
    return [
        name
        for kind, name in old
        if kind == "set"
        and (kind, name) in new
        and snapshot.KEPT.fullmatch(name)
        and (
            _definition((kind, name), old) != _definition((kind, name), new)
            or after.get(name, before.get(name)) != before.get(name)
        )
    ]


def masks(objects: Objects) -> dict[str, int]:
    """Return which bits of an address the rules look up in each set, where that is not the whole address."""
    chains = "".join(text for (kind, _), text in objects.items() if kind == "chain")
    return {name: int(ipaddress.ip_address(mask)) for mask, name in _LOOK_UP.findall(chains)}


def _definition(key: tuple[str, str], objects: Objects) -> str:
    """Return what cannot be changed in place: a set's type, flags, size and timeout; a chain's hook and priority."""
    text = objects[key]
    if key[0] == "chain":
        return "".join(_HOOK.findall(text))
    return _ELEMENTS.sub("", text)


def restored(elements: snapshot.Elements, new: Objects) -> str:
    """Return the script that adds elements again, with the time they have left, to the sets that there are.

    They stand there under the addresses that the rules look up: by shorter prefixes than before, if pillar says so.
    """
    timeouts = {name: _default_timeout(new["set", name]) for name in sizes(new) if snapshot.KEPT.fullmatch(name)}
    return snapshot.script(snapshot.under(elements, masks(new)), timeouts, time.time())


def _default_timeout(text: str) -> int | None:
    match = re.search(r"\n\t\ttimeout (\S+)", text)
    return parse.duration(match[1]) if match else None


def older(new: Objects) -> str:
    """Return the script that remembers the connections to counted ports that are open while a table is made.

    They are not new, so they must not be counted as such.
    """
    ports = re.findall(r"(\d+) : goto", new["map", "counting"])
    found: dict[str, list[str]] = {}
    try:
        for address, client_port, port in sockets.connections(map(int, ports)) if ports else []:
            found.setdefault(elements.family(address), []).append(f"{address} . {client_port} . {port}")
    except sockets.SocketsError as err:
        log.warning("open connections cannot be listed, so they will be counted as new ones: %s", err)
    return "".join(
        f"add element {nft.TABLE} older_{family} {{ {', '.join(lines[:OLDER])} }}\n" for family, lines in found.items()
    )


@contextlib.contextmanager
def adding(patience: float) -> Iterator[bool]:
    """Keep appliers from replacing the sets meanwhile; true unless that could not be had within some seconds.

    Then elements are added all the same: a login does not wait for long, and what an applier misses it asks for again.
    """
    with contextlib.ExitStack() as stack:
        got, deadline = False, time.monotonic() + patience
        try:
            lock = stack.enter_context(open(ELEMENTS, "a", encoding="ascii"))
            while not (got := _try_to_share(lock)) and time.monotonic() < deadline:
                time.sleep(0.005)
        except OSError as err:
            log.error("%s: %s", ELEMENTS, err.strerror)
        yield got


def _try_to_share(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def turn(path: str = LOCK) -> Iterator[None]:
    """Wait for this applier's turn."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with open(path, "a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The nft of an applier that is killed works on, so it holds the lock, too.
        os.set_inheritable(lock.fileno(), True)
        yield


def compare(script: str) -> str:
    """Return how the loaded rules differ from what ``script`` declares, as a diff; empty when they do not."""
    return difference(live(), _known(script))


def apply(script: str) -> str:
    """Make the loaded rules what ``script`` declares, in one transaction; return the diff, empty when nothing changed.

    Raises NftError with nft's message, and then the loaded rules are what they were.
    """
    new = _known(script)
    with turn():
        return _apply_and_record(script, new)


def reload(directory: Path = RULES) -> str:
    """Make the loaded rules what the files on disk say, as :func:`apply` does; nobody changes the files meanwhile.

    From here on rules are wanted: whatever goes wrong, the agent tries again.
    """
    with turn():
        if not LOADED.exists():
            _want()
        script = joined(present(directory))
        return _apply_and_record(script, _known(script))


def _want() -> None:
    with contextlib.suppress(OSError):  # A full disk is no reason to do without rules.
        if UNLOADED.exists():
            UNLOADED.replace(LOADED)
        else:
            LOADED.touch(mode=0o600)


def repair(directory: Path = RULES) -> str:
    """Do the same if rules are wanted. Raises NftError.

    For the agent, which may make no namespaces: it has to go by what is known already.
    """
    with turn():
        if not LOADED.exists():
            return ""
        script, record = joined(present(directory)), loaded()
        try:
            return _apply_and_record(script, _known(script))
        except nft.NftError as err:
            if record.get("script") != _hash(script) or live():
                raise nft.NftError(f"{err}\nIf that is no mistake in {directory}: `systemctl reload mailfw`") from err
        # It is the same script, and another nft than then: nothing is lost by loading it.
        _create(script, _objects_of(record))
        if not (new := live()):
            raise nft.NftError("the rules were taken away again")
        return _apply_and_record(script, new)


def _apply_and_record(script: str, new: Objects) -> str:
    done = _apply(script, new)
    _record(script, new, done)
    return done.changed


class Applied(NamedTuple):
    """What was done: the diff; the fingerprint (see netlink) and the table's handle of what is loaded then."""

    changed: str
    fingerprint: str
    table: str


def _apply(script: str, new: Objects) -> Applied:
    """Make the loaded rules ``new``."""
    table, fingerprint, old = _table(), _fingerprint(new), live()
    changed = difference(old, new)
    if not old:
        _create(script, new)
    elif changed:
        _change(script, old, new)
    if old and not _has_made(table):
        _recall(new, table)
    if not changed:
        return Applied("", fingerprint, table)
    table, fingerprint = _table(), _fingerprint(new)
    # Somebody may have taken them away again before they were looked at: that is not to pass for what was loaded.
    return Applied(changed, _UNKNOWN if difference(live(), new) else fingerprint, table)


def _table() -> str:
    handle = netlink.Kernel().table()
    return handle.hex() if handle else _NO_TABLE


def is_ours() -> bool:
    """Return whether it is mailfw that has made the table, with all elements. Without any record, it has."""
    return _has_made(_table())


def _has_made(table: str) -> bool:
    record = loaded()
    return bool(record.get("table", table) == table) if record else not UNLOADED.exists()


def _fingerprint(objects: Objects) -> str:
    return netlink.Kernel().fingerprint(_static(objects))


def _static(objects: Objects) -> list[str]:
    return sorted(name for kind, name in objects if _is_static((kind, name), objects))


def _change(script: str, old: Objects, new: Objects) -> None:
    """Turn the table that is loaded into another one."""
    names, since = remade(old, new), time.time()
    with turn(ELEMENTS):
        kept = {name: found for name, found in snapshot.current().items() if name in names} if names else {}
        nft.run(transaction(old, new, script, restored(kept, new)))
    if names and masks(old).get(_TRUSTED_IPV6) == masks(new).get(_TRUSTED_IPV6):
        # A login that did not wait for that long may not be among the elements that were carried. With another prefix
        # the agent adds them once it has its new settings.
        with contextlib.suppress(client.AgentError):
            client.ask("again", str(since))


def _recall(new: Objects, table: str) -> None:
    """Add what there was to a table that mailfw has not made: nft alone did, as where Python is broken."""
    found = _always(new)
    try:
        found += _last_snapshot(new)
    except snapshot.SnapshotError as err:
        _set_aside(err)
    for line in found.splitlines():  # One set after the other: there may be no room left in one.
        try:
            nft.run(line)
        except nft.NftError as err:
            if isinstance(err, nft.NftKilledError) or _table() != table:
                raise
            log.error("not all that there was is loaded: %s", err)


def _set_aside(err: Exception) -> None:
    with contextlib.suppress(OSError):
        log.error("the snapshot was set aside as %s: %s", snapshot.set_aside(), err)


def _always(new: Objects) -> str:
    """Return the script that adds what is known without a snapshot: open connections, and the way out."""
    return older(new) + breakglass.resumed(time.time())


def _last_snapshot(new: Objects) -> str:
    """Return the script that adds what the last snapshot knows. Raises SnapshotError."""
    return restored(snapshot.fitting(snapshot.load(), sizes(new)), new)


def _create(script: str, new: Objects) -> None:
    """Load a table that is not there, with what the last snapshot knows."""
    always = _always(new)
    try:
        recalled = _last_snapshot(new)
        try:
            nft.run(transaction({}, new, script, always + recalled))
        except nft.NftKilledError:  # The snapshot need not be at fault.
            nft.run(transaction({}, new, script, always + recalled))
    except (snapshot.SnapshotError, nft.NftError) as err:
        nft.run(transaction({}, new, script, always))
        _set_aside(err)


def install(texts: dict[str, str], directory: Path = RULES) -> tuple[str, list[str]]:
    """Load rule files, name -> text, and put them on disk once the kernel has taken them.

    Returns the diff and the names of the files that were written or removed. Whatever interrupts it, the directory has
    the old files or the new ones, all of them. Raises NftError and OSError, and then nothing has changed.
    """
    script = joined(texts)
    new = _known(script)
    staged, draft = directory.with_name(f"{directory.name}.new"), LOADED.with_name("loading")
    with turn():
        stale = stale_files(texts, directory)
        try:
            if stale:
                _stage(texts, staged)
            _draft(draft, script, new)
            done = _apply(script, new)
            if stale:
                _exchange(staged, directory)
            _confirm(draft, done)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            draft.unlink(missing_ok=True)
    return done.changed, stale


def joined(texts: dict[str, str]) -> str:
    """Return rule files as one script, in the order in which nft's include reads them."""
    return "\n".join(texts[name] for name in sorted(texts))


def present(directory: Path = RULES) -> dict[str, str]:
    """Return the rule files on disk: name -> text."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.nft"))}


def stale_files(texts: dict[str, str], directory: Path = RULES) -> list[str]:
    """Return the names of the files that differ from those on disk."""
    there = present(directory)
    return sorted(name for name in there.keys() | texts.keys() if there.get(name) != texts.get(name))


def _stage(texts: dict[str, str], staged: Path) -> None:
    """Write files into a new directory, in place of what an interrupted applier has left."""
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(mode=0o755, parents=True)
    for name, content in texts.items():
        files.replace(staged / name, content, mode=0o644)


def _exchange(staged: Path, directory: Path) -> None:
    """Give a directory's name to another one, at once (renameat2(2))."""
    if not directory.exists():
        staged.rename(directory)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, bytes(staged), _AT_FDCWD, bytes(directory), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))


def unload() -> None:
    """Take the table away, and say that this is on purpose, after a last snapshot."""
    with turn():
        try:
            log.info("snapshot %s", snapshot.save(is_whole=is_ours))
        except (nft.NftError, OSError) as err:
            log.error("no last snapshot: %s", err)
        with contextlib.suppress(FileNotFoundError):
            LOADED.replace(UNLOADED)
        nft.run(f"table {nft.TABLE}\ndelete table {nft.TABLE}")


def _known(script: str) -> Objects:
    """Return what the kernel makes of a script; of the one that is loaded this is known already."""
    record = loaded()
    if record and record["key"] == _key(script):
        return _objects_of(record)
    return wanted(script)


def _objects_of(record: dict[str, Any]) -> Objects:
    return {(kind, name): text for kind, name, text in record["objects"]}


def _key(script: str) -> str:
    """Return what tells a script from others, and from itself under another kernel or nft: they list it differently."""
    where = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
    stamp = os.stat(where).st_mtime_ns if where else 0
    return _hash(f"{os.uname().release} {stamp}\n{script}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _record(script: str, new: Objects, done: Applied) -> None:
    """Leave on this boot's disk what is loaded, for :func:`loaded`."""
    draft = LOADED.with_name("loading")
    _draft(draft, script, new)
    _confirm(draft, done)


def _draft(path: Path, script: str, new: Objects) -> None:
    """Write a record of what is to be loaded, without what comes of it: a full disk shows before the rules change."""
    objects = [[*key, text] for key, text in new.items()]
    applies = loaded().get("applies", 0) + 1
    record = {"applies": applies, "fingerprint": _UNKNOWN, "key": _key(script), "objects": objects}
    record |= {"script": _hash(script), "static": _static(new), "table": _NO_TABLE}
    files.replace(path, json.dumps(record))


def _confirm(draft: Path, done: Applied) -> None:
    """Make a draft the record of what is loaded. Takes no more room."""
    with draft.open("r+", encoding="utf-8") as stream:
        text = stream.read()
        stream.seek(0)
        stream.write(text.replace(_UNKNOWN, done.fingerprint, 1).replace(f'"{_NO_TABLE}"', f'"{done.table}"', 1))
        stream.truncate()
    draft.replace(LOADED)
    UNLOADED.unlink(missing_ok=True)


def loaded() -> dict[str, Any]:
    """Return what the last applier has left: ``fingerprint``, ``static`` (see netlink) and more.

    ``table``: the handle of the table that it made. ``applies``: how often rules were applied since they were first
    loaded. ``{}`` when no rules are wanted. Where it is not known what was loaded, nothing that is loaded is like it.
    """
    try:
        found: dict[str, Any] = json.loads(LOADED.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        nothing = {"fingerprint": _UNKNOWN, "table": _NO_TABLE, "key": "", "objects": [], "static": []}
        return {"applies": 0, **nothing}
    return found
