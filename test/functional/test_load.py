"""Nothing is lost under load: what clients find while the rules change again and again, or are damaged."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from functional.test_keeping import DAMAGE
from functional.test_modes import PORTS, TRUSTED_ONLY
from mailfwlib import elements, netlink, parse, ruleset, settings
from support.agent import KEY, Agent
from support.firewall import Firewall, rule_files
from support.load import Load, Record
from support.net import FAMILIES, LIMIT, Client, Host, until

#: New connections a second that are asked for, of both clients together, and that there must have been at least.
RATE, ENOUGH = 200, 150
#: Seconds from one answer of a session to its next one, at most, however slow the machine is.
STALLED = 10.0
#: Seconds between two logins of each of two users, who connect again and again meanwhile.
PAUSE = 0.1
#: Seconds that a race of appliers takes at most.
RACE = 120
LOGIN_PORTS = [587, 465, 143, 993, 110, 995, 4190]
TOOL = "/usr/lib/mailfw/mailfw-rules"
#: What is in every pillar here. Nobody who is let in is counted to the end of this burst.
COMMON: dict[str, Any] = {
    "reaction": {"untrusted": "reject", "banned": "reject"},
    "autoban": {"rate": "1000/second", "burst": 10000},
    "fleet": {"keys": [KEY]},
}
#: Changes for which sets are made anew, and one for which rules are written in another way.
CHANGES: list[dict[str, Any]] = [
    {},
    {"trusted": {"timeout": "6h"}},
    {"sizes": {"trusted": 100_000, "banned": 1000, "blocked": 1000}},
    {"autoban": {**COMMON["autoban"], "period": "2h", "ipv6_prefix": 56}},
]
#: An applier: installs rule files, one set of them after the other, until it has changed the rules so many times.
APPLIER = """
import itertools, json, sys
sys.path.insert(0, "/usr/lib/mailfw")
from mailfwlib import ruleset
plans, switches = json.load(sys.stdin)
for files in itertools.cycle(plans):
    if not switches:
        break
    switches -= bool(ruleset.install(files)[0])
"""


@pytest.fixture(autouse=True)
def _rule_files_are_removed(host: Host) -> Iterator[None]:
    yield
    host.call(shutil.rmtree, ruleset.RULES, ignore_errors=True)


def pillar(mode: str, change: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"protection": {"type": mode}, **COMMON, **(change or {})}


def changed_again_and_again(modes: tuple[str, str]) -> list[dict[str, str]]:
    """Return the rule files of two modes in turn, each with every change."""
    return [rule_files(settings.resolve(pillar(mode, change))) for change in CHANGES for mode in modes]


def install(firewall: Firewall, host: Host, pillar: dict[str, Any]) -> None:
    """Load the rules for a pillar and put their files on disk, as the state does."""
    firewall.settings = settings.resolve(pillar)
    host.call(ruleset.install, rule_files(firewall.settings))


def remember(firewall: Firewall, host: Host, trusted: list[str]) -> None:
    """Trust some addresses, ban and block others, and take the rules away for now: what is loaded next knows them."""
    install(firewall, host, pillar("public"))
    for source in trusted:
        firewall.trust(source)
    for number, address in itertools.product(range(1, 6), ("192.0.2.{}", "2001:db8:{}::")):
        firewall.ban(address.format(number))
        firewall.block(address.format(number + 100))
    host.run(TOOL, "unload")


def everywhere(client: Client, ports: list[int]) -> list[tuple[str, int]]:
    """Return all of a client's addresses, of both families in turn, with some ports."""
    sources = [source for pair in zip(client.ipv4, client.ipv6) for source in pair]
    return [(source, port) for port in ports for source in sources]


def in_turn(first: list[Any], second: list[Any]) -> list[Any]:
    """Return one of the first after each of the second, for as long as there are any."""
    return [one for pair in zip(second, itertools.cycle(first)) for one in pair] if first else second


def outcomes(records: list[Record]) -> dict[str, int]:
    return dict(Counter(one.outcome for one in records))


def others(outcome: str, records: list[Record]) -> list[Record]:
    """Return the connections that came to something else."""
    return [one for one in records if one.outcome != outcome]


def stalled(load: Load, begin: float, end: float) -> list[str]:
    """Return what is wrong with a load's sessions between two times; they must have been open before and after."""
    found = []
    for (source, own_port), lines in load.sessions().items():
        times = [begin, *(one.ended for one in lines if begin <= one.ended <= end), end]
        name = f"session of {source}:{own_port} to {lines[0].port}"
        for one in others("answered", [one for one in lines if one.ended >= begin and one.began <= end]):
            found.append(f"{name}: {one.outcome} {one.ended - begin:.2f} s after the beginning")
        longest, at = max((after - before, before) for before, after in zip(times, times[1:]))
        if longest > STALLED:
            found.append(f"{name}: no answer for {longest:.2f} s, {at - begin:.2f} s after the beginning")
    return found


# Rules that change


def race(host: Host, plans: list[dict[str, str]], switches: int) -> list[Future[Any]]:
    """Start two appliers that each change the rules so often without a pause, and one that loads what is on disk."""

    def apply(plans: list[dict[str, str]]) -> None:
        command = ["/usr/bin/python3", "-IB", "-c", APPLIER]
        subprocess.run(command, input=json.dumps([plans, switches]), text=True, check=True, timeout=RACE)

    def reload() -> list[str]:
        changes = []
        while not all(one.done() for one in appliers):
            changes.append(subprocess.run([TOOL, "load"], capture_output=True, text=True, check=True).stdout.strip())
        return changes

    appliers = [host.start(apply, some) for some in (plans, plans[::-1])]
    return [*appliers, host.start(reload)]


def finished(racers: list[Future[Any]]) -> list[str]:
    """Wait for the appliers; return what the one has changed that had nothing to change. Fail as they do."""
    wait(racers, timeout=RACE)
    for one in racers[:-1]:
        one.result()
    reloads = racers[-1].result()
    assert len(reloads) >= 3
    return list(filter(None, reloads))


def assert_one_of(plans: list[dict[str, str]], host: Host) -> None:
    """Check that one of some rules is on disk and loaded, the whole of it and nothing else."""
    present = host.call(ruleset.present)
    assert present in plans
    assert host.call(ruleset.compare, ruleset.joined(present)) == ""
    assert host.call(lambda: [path.name for path in ruleset.RULES.parent.iterdir()]) == [ruleset.RULES.name]
    record = host.call(ruleset.loaded)
    assert host.call(lambda: netlink.Kernel().fingerprint(record["static"])) == record["fingerprint"]


def known(firewall: Firewall) -> dict[str, set[str]]:
    """Return who is trusted, banned and blocked."""
    names = ("trusted", "blocked", "banned_dovecot", "banned_postfix")
    return {name: set(firewall.elements(name)) for name in (f"{one}_{family}" for one in names for family in FAMILIES)}


@pytest.mark.parametrize("modes", [("private", "protected"), ("autoban", "public")], ids="-".join)
def test_racing_appliers_refuse_and_let_in_nobody_by_mistake(
    firewall: Firewall, host: Host, alice: Client, mallory: Client, tmp_path: Path, modes: tuple[str, str]
) -> None:
    """Untrusted clients try only what is the same in both modes."""
    plans = changed_again_and_again(modes)
    closed, varying = (how(*(TRUSTED_ONLY[mode] for mode in modes)) for how in (set.intersection, set.union))
    never = [PORTS[name] for name in sorted(closed)]
    always = [PORTS[name] for name in sorted(PORTS.keys() - varying)]
    remember(firewall, host, alice.ipv4 + alice.ipv6)
    sessions = [993, 587]
    strangers = in_turn(everywhere(mallory, never), everywhere(mallory, always))
    with (
        closing(Load(alice, tmp_path, everywhere(alice, LOGIN_PORTS), RATE / 2, everywhere(alice, sessions))) as alices,
        closing(Load(mallory, tmp_path, strangers, RATE / 2, everywhere(mallory, sessions))) as mallorys,
    ):
        install(firewall, host, pillar(modes[0]))
        before = known(firewall)
        begin = time.monotonic()
        changed_by_loads = finished(race(host, plans[1:] + plans[:1], 10))
        end = time.monotonic()

    trusted, untrusted = (one.connections(begin, end) for one in (alices, mallorys))
    refused = [one for one in untrusted if one.port in never]
    welcome = [one for one in untrusted if one.port in always]
    rate = (len(trusted) + len(untrusted)) / (end - begin)
    print(f"{end - begin:.1f} s, {rate:.0f}/s: {outcomes(trusted)}, {outcomes(refused)}, {outcomes(welcome)}")
    assert others("served", trusted + welcome) == []
    assert others("refused", refused) == []
    assert min(len(trusted), len(welcome)) > 100
    assert len(refused) > 100 or not never
    assert stalled(alices, begin, end) + stalled(mallorys, begin, end) == []
    assert rate > ENOUGH
    assert changed_by_loads == []
    assert_one_of(plans, host)
    assert known(firewall) == before


@pytest.fixture
def crowd(alice: Client, host: Host) -> Iterator[dict[str, str]]:
    """Many addresses that alice has as well, in the form of a template for a number."""
    via = {"ipv4": ("198.18.0.0/16", alice.ipv4[0]), "ipv6": ("2001:db8:b::/48", alice.ipv6[0])}
    setting = "net.ipv6.ip_nonlocal_bind"
    alice.run("sysctl", "-qw", f"{setting}=1")
    for network, gateway in via.values():
        alice.ip(f"route add local {network} dev lo")
        host.ip(f"route add {network} via {gateway} dev eth0 onlink")
    yield {"ipv4": "198.18.{0}.{1}", "ipv6": "2001:db8:b:{0:x}{1:02x}::1"}
    for network, _ in via.values():
        alice.ip(f"route del local {network} dev lo")
        host.ip(f"route del {network}")
    alice.run("sysctl", "-qw", f"{setting}=0")


@pytest.fixture(params=[0, LIMIT])
def wait_seconds(host: Host, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    """Have the agent's logins wait for appliers for so long. What they really may is too short on a slow machine."""
    program = Path("/usr/lib/mailfw/mailfw-agent")
    patched = tmp_path / program.name
    patched.write_text(
        host.call(program.read_text).replace(
            "\nfrom mailfwlib.agent import main\n",
            f"\nfrom mailfwlib import agent\nfrom mailfwlib.agent import main\n\nagent.WAIT = {request.param}\n",
        )
    )
    assert "agent.WAIT" in patched.read_text()
    patched.chmod(0o755)
    host.run("mount", "--bind", str(patched), str(program))
    yield request.param
    host.run("umount", str(program))


def test_logins_while_appliers_race_are_trusted_at_once_and_stay(
    firewall: Firewall, host: Host, alice: Client, crowd: dict[str, str], tmp_path: Path, wait_seconds: int
) -> None:
    """Those that do not wait may be refused until the applier has asked for them again."""
    plans = changed_again_and_again(("private", "protected"))
    install(firewall, host, pillar("private"))
    found: dict[str, set[str]] = {}

    def log_in(number: int, racers: list[Future[Any]]) -> None:
        for count, template in itertools.product(range(1, 255), crowd.values()):
            if all(one.done() for one in racers):
                return
            source = template.format(number, count)
            agent.login(source)
            found[source], until_next = set(), time.monotonic() + PAUSE
            while time.monotonic() < until_next:
                found[source].add(alice.connect(587, source))

    with closing(Agent(host, tmp_path, pillar("protected"))) as agent:
        until(lambda: agent.status()["last_snapshot"], "the first snapshot")
        begin = time.monotonic()
        racers = race(host, plans, 8)
        with ThreadPoolExecutor() as users:
            logins = [users.submit(log_in, number, racers) for number in range(2)]
            changed_by_loads = finished(racers)
            end = time.monotonic()
        for one in logins:
            one.result()
        lost = not_trusted(firewall, found)
        heals = agent.status()["heals"]
    refused = {source: results for source, results in found.items() if results != {"open"}}
    print(f"{end - begin:.1f} s, {len(found)} logins, of which {len(refused)} were refused and {len(lost)} lost")
    assert len(found) > 40
    assert lost == []
    assert refused == {} or not wait_seconds
    assert heals == 0
    assert changed_by_loads == []
    assert_one_of(plans, host)


def not_trusted(firewall: Firewall, sources: Iterable[str]) -> list[str]:
    """Return which of some sources are not trusted on all login ports."""
    present = set().union(*(firewall.elements(f"trusted_{family}") for family in FAMILIES))
    keys = {source: elements.trusted_key(parse.address(source), settings.resolve({})) for source in sources}
    return [source for source, key in keys.items() if not {f"{key} . {port}" for port in LOGIN_PORTS} <= present]


# Rules that somebody damages

#: A damage whose script has to be made, from the rule's handle.
DELETED_RULE = "rule"
#: Who logs in after the snapshot.
LATE = {"ipv4": "192.0.2.77", "ipv6": "2001:db8:77::1"}


def strike(firewall: Firewall, damage: str) -> None:
    script = DAMAGE.get(damage)
    if damage == DELETED_RULE:
        handle = firewall.nft("-a", "list", "chain", "inet", "mailfw", "guarded").rpartition("handle ")[2].split()[0]
        script = f"delete rule inet mailfw guarded handle {handle}"
    firewall.run(script)


def test_damage_is_repaired_while_everybody_goes_on(
    firewall: Firewall, host: Host, alice: Client, mallory: Client, tmp_path: Path
) -> None:
    """While a table is damaged it may let in and refuse new connections by mistake, but no open one notices.

    More of the untrusted sessions are on limited ports than may be opened at once, so they must not be counted again.
    """
    networks = {"trusted": {"networks_ipv4": ["192.0.2.200"]}}
    few_at_once = pillar("protected", {"autoban": {"rate": "1/hour", "burst": 2}, **networks})
    rules = rule_files(settings.resolve(few_at_once))
    remember(firewall, host, alice.ipv4 + alice.ipv6)
    own, strange = everywhere(alice, [143, 587]), everywhere(mallory, [143, 143, 143, 993, 587, 465])
    peace = []
    with (
        closing(Load(alice, tmp_path, everywhere(alice, LOGIN_PORTS), RATE / 2, own)) as alices,
        closing(Load(mallory, tmp_path, everywhere(mallory, [587, 465]), RATE / 2, strange)) as mallorys,
    ):
        install(firewall, host, few_at_once)
        with closing(Agent(host, tmp_path, few_at_once)) as agent:
            until(lambda: agent.status()["last_snapshot"], "the first snapshot")
            for late in LATE.values():
                agent.login(late)
            begin = healed = time.monotonic()
            for heals, damage in enumerate([*DAMAGE, DELETED_RULE, None], start=1):
                wait_for_connections([alices, mallorys], healed, more_than=70)
                peace.append((healed, time.monotonic()))
                # What began before these has been decided on: a load's first packets go out in order.
                wait_for_connections([alices, mallorys], peace[-1][1])
                assert firewall.counter("counted") == 0, f"before {damage}"
                if damage is None:
                    break
                healed = repaired(firewall, agent, damage, heals)
                assert host.call(ruleset.compare, ruleset.joined(rules)) == "", damage
            assert agent.status()["heals"] == len(DAMAGE) + 1
            end = time.monotonic()

    rate = sum(len(one.connections(begin, end)) for one in (alices, mallorys)) / (end - begin)
    trusted, untrusted = ([one for times in peace for one in load.connections(*times)] for load in (alices, mallorys))
    print(f"{end - begin:.1f} s, {rate:.0f}/s; in times of peace {outcomes(trusted)}, {outcomes(untrusted)}")
    assert others("served", trusted) == []
    assert others("refused", untrusted) == []
    assert min(len(trusted), len(untrusted)) > 100
    assert stalled(alices, begin, end) + stalled(mallorys, begin, end) == []
    assert rate > ENOUGH
    assert_one_of([rules], host)


def repaired(firewall: Firewall, agent: Agent, damage: str, heals: int) -> float:
    """Damage the rules; return when the agent has repaired them, and those that logged in last are trusted again."""
    struck = time.monotonic()
    strike(firewall, damage)
    until(lambda: agent.status()["heals"] == heals, f"{damage}: repaired")
    healed = time.monotonic()
    print(f"{damage}: repaired after {healed - struck:.2f} s")
    until(lambda: not not_trusted(firewall, LATE.values()), f"{damage}: the last logins are trusted again")
    return healed


def wait_for_connections(loads: list[Load], since: float, more_than: int = 0) -> None:
    until(
        lambda: all(len(one.connections(since, time.monotonic())) > more_than for one in loads),
        f"more than {more_than} connections of each",
    )
