"""Whatever kills an apply, a snapshot or a restore, and whenever: what is left is the old or the new, all of it.

So it is with a full disk. And the next one that nothing interrupts finds nothing in its way, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mailfwlib import netlink, nft, ruleset, settings, snapshot
from support.agent import KEPT, KEY, Agent, signed
from support.firewall import Firewall, element_text, rule_files
from support.net import LIMIT, Host, until
from support.steps import Step, Steps, kill, processes

TOOL = "/usr/lib/mailfw/mailfw-rules"
#: What Salt's module does with the rules that it has rendered.
INSTALL = """
import json, sys
sys.path.insert(0, "/usr/lib/mailfw")
from mailfwlib import ruleset
ruleset.install(json.load(open(sys.argv[1])))
"""
RULES, RUN, STATE = ruleset.RULES.parent, ruleset.LOADED.parent, snapshot.PATH.parent
#: Two pillars. Between them, the sets of who is trusted have to be made anew.
OLD: dict[str, Any] = {"roles": ["dovecot"], "trusted": {"timeout": "5h"}}
NEW: dict[str, Any] = {**OLD, "trusted": {"timeout": "6h"}, "protection": {"type": "private"}}
#: Seconds within which deadlines are the same: the kernel lists whole ones, and to carry elements takes a moment.
CARRYING = 5
#: Who is killed: every process of the command, the first one, or that whose step it is.
VICTIMS: dict[str, Callable[[list[int], Step], list[int]]] = {
    "all": lambda running, step: running,
    "the first": lambda running, step: running[:1],
    "its own": lambda running, step: [step.pid],
}


class Known(NamedTuple):
    """What the kernel has: the rules in one form, and when those who are trusted, banned or blocked no longer are."""

    rules: list[tuple[str, str, str]]
    ends: dict[str, float]


def known(host: Host) -> Known:
    """Return what the kernel has."""
    listed, now = json.loads(host.call(nft.command, "-j", "list", "ruleset"))["nftables"], time.time()
    rules, ends = [], {}
    for kind, found in (entry.popitem() for entry in listed if "metainfo" not in entry):
        del found["handle"]
        elements = found.pop("elem", [])
        if snapshot.KEPT.fullmatch(found.get("name", "")):
            for one in (one["elem"] if isinstance(one, dict) else {"val": one} for one in elements):
                ends[f"{found['name']} {element_text(one)}"] = now + one.get("expires", float("inf"))
        else:
            found["elem"] = sorted(map(json.dumps, elements))
        rules.append((found.get("chain", ""), kind, json.dumps(found)))
    # Rules stay in the order that they have in their chain.
    return Known(sorted(rules, key=lambda rule: rule[:2] if rule[1] == "rule" else rule), ends)


class Version(NamedTuple):
    """Rule files, and the rules that they make."""

    files: dict[str, str]
    rules: list[tuple[str, str, str]]


class Site:
    """A mail host with the old one of two versions of its rules, and some who are trusted, banned and blocked."""

    def __init__(self, firewall: Firewall, host: Host, directory: Path):
        self._host, self._path = host, directory / "files"
        self.new, self.old = self._version(NEW), self._version(OLD)
        firewall.load(**OLD)
        for address in ("198.51.100.10", "2001:db8:a::10"):
            firewall.trust(address, 7200)
            firewall.trust(address, 300, [993])
        for address in ("203.0.113.10", "2001:db8:c::10"):
            firewall.ban(address, ("dovecot",), 600)
            firewall.block(address)
        firewall.block("203.0.113.11", 900)
        host.run(TOOL, "save")
        self.names = self.listed()

    def _version(self, pillar: dict[str, Any]) -> Version:
        files = rule_files(settings.resolve(pillar))
        # A part that was cut off in here would be a script, too.
        files["base.nft"] += "\n" * 5000
        self._host.call(ruleset.install, files)
        return Version(files, known(self._host).rules)

    def installing(self) -> list[str]:
        """Return the command that installs the new version."""
        self._path.write_text(json.dumps(self.new.files))
        return ["/usr/bin/python3", "-IBc", INSTALL, str(self._path)]

    def files(self) -> dict[str, str]:
        """Return the rule files."""
        return self._host.call(lambda: {path.name: path.read_text() for path in ruleset.RULES.iterdir()})

    def listed(self) -> set[Path]:
        """Return what is in mailfw's directories, but for what the agent keeps of logins, or is about to."""
        found = self._host.call(lambda: {path for top in (RULES, RUN, STATE) for path in top.iterdir()})
        return {path for path in found if path.parent != STATE or path.name.partition(".")[0] not in KEPT}

    def is_recorded(self) -> bool:
        """Return whether the agent takes the rules for those that were loaded last."""
        record = self._host.call(ruleset.loaded)
        fingerprint = self._host.call(lambda: netlink.Kernel().fingerprint(record["static"])) if record else None
        return bool(record) and record["fingerprint"] == fingerprint

    def swap(self) -> None:
        """Take the new version for the old one from now on, and the other way round."""
        self.new, self.old = self.old, self.new

    def assert_whole(self, version: Version, ends: dict[str, float]) -> None:
        """Check that everything is of one version, and nothing is left of attempts."""
        found = known(self._host)
        assert found.rules == version.rules
        assert found.ends == pytest.approx(ends, abs=CARRYING)
        assert self.files() == version.files
        assert self.is_recorded()
        assert self.listed() == self.names


@pytest.fixture
def site(firewall: Firewall, host: Host, tmp_path: Path) -> Iterator[Site]:
    yield Site(firewall, host, tmp_path)
    host.call(shutil.rmtree, ruleset.RULES)


def interruptions(host: Host, command: Callable[[], list[str]]) -> Iterator[str]:
    """Run a command again and again, killed at another one of its steps each time; yield what was killed."""
    for number in itertools.count():
        for whom in VICTIMS:
            step, running = interrupt(host, command(), number, whom)
            if not step:
                return
            yield f"{whom} killed before step {number}: {step}"
            if len(running) == 1:
                break


def interrupt(host: Host, command: list[str], number: int, whom: str) -> tuple[Step | None, list[int]]:
    """Run a command, killed before one of its steps; return that, if there are so many, and what ran then."""
    found, running = None, []
    with Steps(host, *command) as steps:
        for place, step in enumerate(steps):
            if place == number:
                found, running = step, processes(steps.process.pid)
                kill(VICTIMS[whom](running, step))
    assert found or steps.process.returncode == 0, steps.output
    return found, running


def test_killed_apply(site: Site, host: Host) -> None:
    ends, seen = known(host).ends, set()
    for what in interruptions(host, site.installing):
        left, files = known(host), site.files()
        assert left.rules in (site.old.rules, site.new.rules), what
        assert left.ends == pytest.approx(ends, abs=CARRYING), what
        assert files in (site.old.files, site.new.files), what
        # What is loaded and what is on disk differ only where the agent sees it, and repairs it.
        assert (left.rules == site.new.rules) == (files == site.new.files) or not site.is_recorded(), what
        seen.add((left.rules == site.new.rules, files == site.new.files))
        host.call(ruleset.install, site.new.files)
        site.assert_whole(site.new, ends)
        site.swap()
        ends = known(host).ends
    assert seen == {(False, False), (True, False), (True, True)}


def test_next_apply_waits_for_the_nft_of_a_killed_one(site: Site, host: Host) -> None:
    """Otherwise it would reckon with rules that this nft is about to replace."""
    ends, lock = known(host).ends, host.call(os.stat, ruleset.LOCK)
    waiting = re.compile(rf"-> FLOCK .*:{lock.st_ino} ")
    with Steps(host, *site.installing()) as steps:
        next(sending := (step for step in steps if step.call == "sendmsg"))
        steps.process.kill()
        following = host.start(ruleset.install, site.old.files)
        until(lambda: following.done() or waiting.search(Path("/proc/locks").read_text()), "it waits")
        assert not following.done()
        assert list(sending) == []
    following.result(LIMIT)
    site.assert_whole(site.old, ends)


def test_killed_snapshot(site: Site, host: Host, firewall: Firewall) -> None:
    firewall.trust("198.51.100.20")
    before, seen = host.call(snapshot.load), set()
    for what in interruptions(host, lambda: [TOOL, "save"]):
        left, now = host.call(snapshot.load), host.call(snapshot.current)
        seen.add(is_new := snapshot.same(left, now))
        assert is_new or left == before, what
        assert host.run(TOOL, "save").stdout.startswith("snapshot unchanged" if is_new else "snapshot written"), what
        before = host.call(snapshot.load)
        assert snapshot.same(before, now), what
        assert site.listed() == site.names, what
        firewall.trust(f"198.51.100.{20 + len(before['trusted_ipv4'])}")
    assert seen == {False, True}


def test_killed_restore(site: Site, host: Host, firewall: Firewall) -> None:
    ends, saved, seen = known(host).ends, host.call(snapshot.PATH.read_text), set()

    def loading() -> list[str]:
        firewall.run("flush ruleset")
        return [TOOL, "load"]

    for what in interruptions(host, loading):
        left = known(host)
        seen.add(loaded := left.rules != [])
        assert left.rules == (site.old.rules if loaded else []), what
        assert left.ends == pytest.approx(ends if loaded else {}, abs=CARRYING), what
        assert host.call(snapshot.PATH.read_text) == saved, what
        host.run(TOOL, "load")
        site.assert_whole(site.old, ends)
    assert seen == {False, True}


@pytest.mark.parametrize("recorded", [True, False], ids=["after a flush", "after an unload"])
def test_flush_during_a_load_is_seen(site: Site, host: Host, firewall: Firewall, recorded: bool) -> None:
    """Whoever takes the rules away while they are loaded, the agent does not take that for what was loaded."""
    seen = set()
    for number in itertools.count():
        firewall.run("flush ruleset")
        if not recorded:
            host.run(TOOL, "unload")
        with Steps(host, TOOL, "load") as steps:
            flushed = [firewall.run("flush ruleset") for place, _ in enumerate(steps) if place == number]
        assert steps.process.returncode == 0, steps.output
        if not flushed:
            break
        seen.add(loaded := known(host).rules == site.old.rules)
        assert host.call(ruleset.loaded), number
        assert loaded or not site.is_recorded(), number
    assert seen == {False, True}


def test_flush_while_a_load_looks_at_the_rules(site: Site, host: Host, firewall: Firewall) -> None:
    """The same, swept over the time that a load takes: it lists the rules one by one."""
    ends = known(host).ends
    for pause in itertools.count(0, 0.02):
        host.run(TOOL, "unload")
        loading = host.call(subprocess.Popen, [TOOL, "load"], stderr=subprocess.PIPE, text=True)
        time.sleep(pause)
        over = loading.poll() is not None
        firewall.run("flush ruleset")
        assert (loading.communicate(timeout=LIMIT)[1], loading.returncode) == ("", 0), pause
        assert host.call(ruleset.loaded), pause
        assert known(host).rules or not site.is_recorded(), pause
        host.run(TOOL, "load")
        site.assert_whole(site.old, ends)
        if over:
            break


#: How mailfw-rules runs when the agent has it run, which may make no namespaces.
AGENT = ("setpriv", "--bounding-set", "-all,+net_admin", "--inh-caps", "-all,+net_admin")
#: Who sees to rules that nft alone has loaded.
LOADERS = {"service": (TOOL, "load"), "agent": (*AGENT, TOOL, "repair")}


@pytest.mark.parametrize("loader", LOADERS)
def test_load_after_one_that_knew_nobody(site: Site, host: Host, firewall: Firewall, loader: str) -> None:
    """Where Python is broken, nft alone loads the rules; what the snapshot knows comes with the next load."""
    ends = known(host).ends
    host.run(TOOL, "load")
    host.run(TOOL, "unload")
    host.call(ruleset.UNLOADED.replace, ruleset.LOADED)
    firewall.run(ruleset.joined(site.old.files))
    assert known(host).ends == {}
    assert not site.is_recorded()
    host.run(*LOADERS[loader])
    site.assert_whole(site.old, ends)


def test_load_after_one_that_nobody_knows_of(site: Site, host: Host, firewall: Firewall) -> None:
    """The same since the host has booted: the agent says so, and takes nothing away."""
    ends = known(host).ends
    host.run(TOOL, "unload")
    host.call(ruleset.UNLOADED.unlink)
    host.call(ruleset.LOADED.touch)
    firewall.run(ruleset.joined(site.old.files))
    firewall.trust("198.51.100.30")
    done = host.run(*LOADERS["agent"], check=False)
    assert "`systemctl reload mailfw`" in done.stderr
    assert "trusted_ipv4 198.51.100.30 . 993" in known(host).ends
    firewall.untrust("198.51.100.30")
    host.run(*LOADERS["service"])
    site.assert_whole(site.old, ends)


def test_repair_after_an_upgrade_of_nft(site: Site, host: Host, firewall: Firewall) -> None:
    """Another nft may list the same rules in another way, and the agent cannot find out how."""
    ends = known(host).ends
    host.run(TOOL, "load")
    record = host.call(ruleset.loaded)
    host.call(ruleset.LOADED.write_text, json.dumps({**record, "key": "of another nft"}))
    firewall.run("flush ruleset")
    host.run(*LOADERS["agent"])
    site.assert_whole(site.old, ends)


def test_apply_after_rules_that_nft_alone_has_loaded(site: Site, host: Host, firewall: Firewall) -> None:
    """Somebody stops mailfw, and loads its rules by hand."""
    ends = known(host).ends
    host.run(TOOL, "unload")
    firewall.run(ruleset.joined(site.old.files))
    host.call(ruleset.install, site.old.files)
    site.assert_whole(site.old, ends)


def test_recall_goes_on_after_a_set_that_is_full(site: Site, host: Host, firewall: Firewall) -> None:
    few = {**OLD, "sizes": {"banned": 2}}
    host.call(ruleset.install, rule_files(settings.resolve(few)))
    firewall.ban("203.0.113.20", ("dovecot",))
    host.run(TOOL, "unload")
    firewall.run(ruleset.joined(host.call(ruleset.present)))
    firewall.ban("203.0.113.21", ("dovecot",))
    done = host.run(TOOL, "load")
    assert "not all that there was is loaded: " in done.stderr
    assert {"trusted_ipv4 198.51.100.10 . 993", "blocked_ipv4 203.0.113.10"} <= known(host).ends.keys()
    assert host.call(snapshot.load)["blocked_ipv4"]


def test_last_snapshot_is_not_one_of_a_table_that_knows_nobody(site: Site, host: Host, firewall: Firewall) -> None:
    ends = known(host).ends
    firewall.run("flush ruleset")
    firewall.run(ruleset.joined(site.old.files))
    host.run(TOOL, "unload")
    host.run(TOOL, "load")
    site.assert_whole(site.old, ends)


def test_repair_of_rules_that_were_unloaded(site: Site, host: Host) -> None:
    """As where somebody flushes them first: what the agent has begun then loads nothing."""
    host.run(TOOL, "unload")
    host.run(TOOL, "repair")
    assert known(host).rules == []
    assert host.call(ruleset.loaded) == {}


@pytest.fixture
def disk(site: Site, host: Host, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory that is a small disk, with what was in there before."""
    host.run("sh", "-c", 'cp -a "$0" "$1" && mount -t tmpfs -o size=256k disk "$0"', str(request.param), "/run/kept")
    host.run("sh", "-c", 'cp -a /run/kept/. "$0" && rm -r /run/kept', str(request.param))
    yield request.param
    host.run("umount", str(request.param))


def fill(disk: Path, room: int) -> None:
    """Fill a disk up, but for some kilobytes."""
    with open(disk / "filler", "wb", buffering=0) as filler:
        with contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        filler.truncate(filler.tell() - room * 1024)


@pytest.fixture
def agent(site: Site, host: Host, tmp_path: Path) -> Iterator[Agent]:
    with contextlib.closing(Agent(host, tmp_path, OLD)) as made:
        until(lambda: made.status()["last_snapshot"], "the first snapshot")
        yield made


@pytest.mark.parametrize("disk", [RULES, RUN], indirect=True, ids=str)
def test_apply_on_a_full_disk(site: Site, host: Host, disk: Path, agent: Agent) -> None:
    for room in range(0, 100, 4):
        host.call(fill, disk, room)
        site.names = site.listed()
        source = f"198.51.100.{20 + room}"
        assert agent.login(source) == f"{source} is trusted"
        ends = known(host).ends
        assert f"trusted_ipv4 {source} . 993" in ends
        done = host.run(*site.installing(), check=False)
        if not done.returncode:
            break
        assert f"OSError: [Errno 28] No space left on device: '{disk}/" in done.stderr
        site.assert_whole(site.old, ends)
    assert room > 8
    site.assert_whole(site.new, ends)


@pytest.mark.parametrize("disk", [STATE], indirect=True, ids=str)
def test_snapshot_on_a_full_disk(site: Site, host: Host, disk: Path, agent: Agent, firewall: Firewall) -> None:
    firewall.run(f"add element inet mailfw blocked_ipv4 {{ {', '.join(f'10.0.0.{n}' for n in range(256))} }}")
    before = host.call(snapshot.load)
    for room in range(0, 100, 4):
        host.call(fill, disk, room)
        site.names = site.listed()
        source = f"198.51.100.{20 + room}"
        assert agent.login(source) == f"{source} is trusted"
        done = host.run(TOOL, "save", check=False)
        if not done.returncode:
            break
        assert done.stderr == f"mailfw-rules save: [Errno 28] No space left on device: '{snapshot.PATH}'\n"
        assert host.call(snapshot.load) == before
        assert site.listed() == site.names
    assert room > 4
    assert site.listed() == site.names
    assert snapshot.same(host.call(snapshot.load), host.call(snapshot.current))


@pytest.mark.parametrize("room", [0, 10], ids=["no room", "room for a part of a line"])
@pytest.mark.parametrize("disk", [STATE], indirect=True, ids=str)
def test_what_a_full_disk_did_not_take_is_kept_once_there_is_room(
    site: Site, host: Host, disk: Path, agent: Agent, room: int
) -> None:
    agent.configure({**OLD, "fleet": {"keys": [KEY]}})
    first, second, before = "198.51.100.30", "198.51.100.31", time.time()
    host.call((disk / "ended").write_text, "x" * (4096 - room - 1) + "\n")  # It has one page of the disk.
    host.call(fill, disk, 0)
    agent.ask("forget", first)
    until(lambda: "ended: No space left on device" in agent.log(), "it says so")
    host.call(fill, disk, 100)
    agent.ask("forget", second)
    agent.kill()
    agent.start()
    assert agent.ask("receive", signed({first: before, second: before})) == "0"
    assert agent.ask("receive", signed({first: time.time(), second: time.time()})) == "2"


@pytest.mark.parametrize("disk", [STATE], indirect=True, ids=str)
def test_a_line_that_was_cut_off_is_none_and_swallows_no_other(
    site: Site, host: Host, disk: Path, agent: Agent
) -> None:
    """As a power failure leaves it."""
    agent.configure({**OLD, "fleet": {"keys": [KEY]}})
    agent.kill()
    first, second, before = "198.51.100.30", "198.51.100.31", time.time()
    host.call((disk / "ended").write_text, f"{first} {before:.3f}\n{first} 17")
    agent.start()
    assert agent.ask("receive", signed({first: before - 1})) == "0"
    agent.ask("forget", second)
    agent.kill()
    agent.start()
    assert agent.ask("receive", signed({first: before - 1, second: before})) == "0"


@pytest.mark.parametrize("disk", [RULES, RUN, STATE], indirect=True, ids=str)
def test_restore_with_a_full_disk(site: Site, host: Host, disk: Path, firewall: Firewall) -> None:
    """That the agent cannot be told what is loaded is no reason to do without it."""
    ends = known(host).ends
    host.call(fill, disk, 0)
    site.names = site.listed()
    firewall.run("flush ruleset")
    done = host.run(TOOL, "load", check=False)
    assert done.stderr == (
        "mailfw-rules load: [Errno 28] No space left on device: '/run/mailfw/loading'\n" * (disk == RUN)
    )
    assert known(host).rules == site.old.rules
    assert known(host).ends == pytest.approx(ends, abs=CARRYING)
    host.call(fill, disk, 100)
    host.run(TOOL, "load")
    site.assert_whole(site.old, ends)


@pytest.mark.parametrize("with_children", [True, False])
def test_agent_that_is_killed_during_a_repair(
    site: Site, host: Host, agent: Agent, firewall: Firewall, with_children: bool
) -> None:
    """Killed alone as by the kernel that is out of memory; with its children as by systemd."""
    before, site.names = known(host), site.listed()
    for moment in (0.0, 0.1, 0.2):
        until(lambda: caught_repairing(agent, firewall), "the repair begins", LIMIT)
        time.sleep(moment)
        kill(processes(agent.pid) if with_children else [agent.pid])
        until(lambda: not agent.running(), "it is dead")
        agent.start()
        until(lambda: site.is_recorded() and site.listed() == site.names, "repaired")
        after = known(host)
        assert after.rules == before.rules == site.old.rules
        assert after.ends == pytest.approx(before.ends, abs=CARRYING)


def caught_repairing(agent: Agent, firewall: Firewall) -> bool:
    """Take the rules away; return whether the agent is seen at their repair: a quick one may go unseen."""
    heals = agent.status()["heals"]
    firewall.run("flush ruleset")
    until(lambda: repairing(agent) or agent.status()["heals"] > heals, "a repair")
    return repairing(agent)


def repairing(agent: Agent) -> bool:
    """Return whether the agent has a process that repairs the rules."""
    shown = subprocess.run(["ps", "-o", "args=", *map(str, processes(agent.pid))], capture_output=True, text=True)
    return f"{TOOL} repair" in shown.stdout
