"""Another version of the formula comes, and goes again, while people log in all the time: nobody notices."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mailfwlib import __version__, parse
from mailfwlib.elements import trusted_key
from mailfwlib.settings import resolve
from support import lab
from support.lab import elements
from support.watch import Watch

from .conftest import ENVIRONMENTS, HOSTS

BOTH = ",".join(HOSTS)
#: Where the master looks before it looks into the formula.
NEXT = "/srv/next"
#: Where the next version's runner says so, and with which package.
LOG, SAID = "/var/log/salt/master", "mailfw: a job is published by version"
PUBLISHES = "def _publish(some):\n"
#: What is another in the next version: file -> what stands there, and what then does. The master's runner, sets, which
#: have to be made anew, the agent and its unit, the hook, and the file for which Dovecot reloads.
CHANGES = {
    "_runners/mailfw.py": (
        PUBLISHES,
        f"{PUBLISHES}    from mailfwlib import __version__\n    log.warning('{SAID} %s', __version__)\n",
    ),
    "mailfw/ruleset/nftables/base.nft.jinja": ("timeout {{ mailfw.trusted.timeout }}s", "timeout 6h"),
    "_utils/mailfwlib/__init__.py": (f'"{__version__}"', '"99.0"'),
    "mailfw/agent/files/mailfw-agent.service": ("MemoryMax=1G", "MemoryMax=900M"),
    "mailfw/dovecot/files/login-hook.sh": ("timeout 1 ", "timeout 2 "),
    "mailfw/dovecot/files/login_hook.py": ("LONGEST_USER = 256", "LONGEST_USER = 255"),
    "mailfw/dovecot/files/99-mailfw.conf.jinja": ("process_limit = 1024", "process_limit = 1023"),
}
CHANGED = {
    "mailfw ruleset is loaded",
    "mailfw library is installed",
    "mailfw agent can be started",
    "mailfw agent is running",
    "mailfw login hook is there",
    "mailfw login hook is installed",
    "mailfw login hook is run by Dovecot",
    "mailfw login hook is known to Dovecot",
}
#: Changes where a job was lost while the master restarted.
CATCHES_UP = "mailfw agent catches up with the fleet"


class Version(NamedTuple):
    """How a version shows on a host."""

    number: str
    timeout: str
    memory: int


CURRENT, FOLLOWING = Version(__version__, "timeout 5h", 1 << 30), Version("99.0", "timeout 6h", 900 << 20)
#: Who is trusted, banned and blocked before: verb, address, set, element.
KNOWN = (
    ("trust", "192.0.2.101", "trusted_ipv4", "192.0.2.101 . 587"),
    ("trust", "2001:db8:77::1", "trusted_ipv6", "2001:db8:77:: . 587"),
    ("ban", "192.0.2.102", "banned_dovecot_ipv4", "192.0.2.102"),
    ("block", "192.0.2.103", "blocked_ipv4", "192.0.2.103"),
)


@pytest.fixture
def protected(fleet: object) -> Iterator[None]:
    """Both hosts in protected mode, and people whom they know."""
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, protection={"type": "protected"})
    lab.all_states(HOSTS)
    for verb, address, *_ in KNOWN:
        lab.salt(BOTH, f"mailfw.{verb}", address)
    yield
    lab.run("master", "rm", "-rf", NEXT)
    lab.configure_master()
    lab.all_states(HOSTS)
    for verb, address, *_ in KNOWN:
        lab.salt(BOTH, f"mailfw.un{verb}", address)


def bring_next_version() -> None:
    for path, (now, then) in CHANGES.items():
        text = (lab.REPOSITORY / path).read_text()
        assert text.count(now) == 1, path
        place = Path(NEXT, path)
        lab.run("master", "mkdir", "-p", str(place.parent))
        lab.run("master", "tee", str(place), text=text.replace(now, then))


def take_it_back() -> None:
    lab.run("master", "rm", "-r", NEXT)


def known(host: str) -> dict[str, float]:
    """Return who is known: element -> seconds left."""
    return {element: elements(host, name).get(element, 0.0) for _, _, name, element in KNOWN}


def upgrade_master() -> None:
    changed = {one["__id__"] for one in lab.configure_master().values() if one["changes"]}
    assert {"mailfw runner is synced", "mailfw master is restarted"} <= changed


def published_by_next() -> list[str]:
    """Return by which versions of the package the next version's runner has published."""
    lines = lab.run("master", "grep", SAID, LOG, check=False).splitlines()
    return [line.rpartition(" ")[2] for line in lines]


def is_on(host: str, version: Version) -> None:
    assert lab.salt(host, "mailfw.agent_status")[host]["version"] == version.number
    assert version.timeout in lab.run(host, "nft", "-t", "list", "set", "inet", "mailfw", "trusted_ipv4")
    assert lab.run(host, "systemctl", "show", "-P", "MemoryMax", "mailfw-agent").strip() == str(version.memory)


def test_nobody_notices_the_next_version_coming_and_going(protected: None) -> None:
    steps: list[tuple[float, float]] = []
    before, began = lab.on_each(HOSTS, known), time.time()
    hooks = {host: Watch(host, "/usr/lib/mailfw") for host in HOSTS}
    with contextlib.ExitStack() as stack:
        people = {host: stack.enter_context(lab.logins(host, then=[587])) for host in HOSTS}
        for version, change in ((FOLLOWING, bring_next_version), (CURRENT, take_it_back)):
            change()
            since = time.time()
            upgrade_master()
            results = lab.all_states(HOSTS)
            steps.append((since, time.time()))
            for host in HOSTS:
                changed = {one["__id__"] for one in results[host].values() if one["changes"]}
                assert changed - {CATCHES_UP} == CHANGED
                is_on(host, version)
            if version is FOLLOWING:
                lab.wait_until(published_by_next, "the next version's runner publishes")
            published = published_by_next()
        visits = {host: lab.got_in(people[host].end(), reloads=2) for host in HOSTS}
    after, passed = lab.on_each(HOSTS, known), time.time() - began

    for host in HOSTS:
        nobody_was_refused(host, visits[host], steps)
        for element, left in before[host].items():
            assert left - passed - 3 <= after[host][element] <= left, element
        assert unknown(host, visits[host]) == []
        # There is no moment in which Dovecot may not run the hook.
        assert [one for one in hooks[host].seen() if "hook" in one[0]] == [
            ("login-hook", "moved here"),
            ("login_hook.py", "moved here"),
        ] * 2
    assert set(published) == {FOLLOWING.number}, "nothing mixes the two versions"
    assert published_by_next() == published, "the current version's runner is back"
    everybody = visits["mx1"] + visits["mx2"]
    lab.wait_until(lambda: not any(unknown(host, everybody) for host in HOSTS), "both hosts know all logins")


def nobody_was_refused(host: str, visits: list[dict[str, Any]], steps: list[tuple[float, float]]) -> None:
    """Check that all logins and submissions right after them went well, some of each in each step."""
    assert [one for one in visits if one["ports"]["587"]["outcome"] != "open"] == []
    for (began, ended), address in itertools.product(steps, lab.ADDRESSES[host]):
        during = [one for one in visits if one["at"] == address and began < one["began"] < ended]
        assert len(during) >= 5
        print(
            f"{host} {address}: {len(during)} logins in {ended - began:.0f} s, the slowest answered after"
            f" {max(one['seconds'] for one in during):.2f} s; submission then connected after at most"
            f" {max(one['ports']['587']['seconds'] for one in during):.2f} s"
        )


def unknown(host: str, visits: list[dict[str, Any]]) -> list[str]:
    """Return whose login a host does not trust."""
    trusted = elements(host, "trusted_ipv4") | elements(host, "trusted_ipv6")
    sources = {one["source"]: trusted_key(parse.address(one["source"]), resolve({})) for one in visits}
    return [source for source, key in sources.items() if f"{key} . 587" not in trusted]
