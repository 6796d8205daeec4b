"""What monitoring is told: figures of real decisions, and familiar addresses that are refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mailfwlib import breakglass, elements, familiar, netlink, parse, ruleset
from mailfwlib.metrics import METRICS, NO_ROOM, PLAIN
from mailfwlib.monitor import COUNT
from mailfwlib.rules import TALLIED
from mailfwlib.settings import METRICS_DIRECTORY
from support.agent import HOST_ID, KEY, Agent, signed
from support.firewall import Firewall
from support.net import LIMIT, REPOSITORY, Client, Host, until
from support.prometheus import Prometheus, promtool

MONITORING = REPOSITORY / "mailfw/monitoring"
FILE = Path(METRICS_DIRECTORY) / "mailfw.prom"
PILLAR: dict[str, Any] = {
    "protection": {"type": "protected"},
    "reaction": {"untrusted": "reject", "banned": "reject", "blocked": "reject"},
    "autoban": {"rate": "1/hour", "burst": 2},
    "fleet": {"keys": [KEY]},
    "metrics": {"interval": "1s"},
}
#: Seconds in which a set's elements are counted, also where the kernel does not say how many there are.
COUNTED = COUNT + LIMIT
WAY_OUT = "/usr/lib/mailfw/mailfw-open"
#: How the clients' addresses are remembered.
KNOWN = {"ipv4": "198.51.100.10", "ipv6": "2001:db8:a::"}


@pytest.fixture
def textfiles(host: Host) -> Iterator[Path]:
    """Where node_exporter looks, as its package makes it."""
    host.call(FILE.parent.mkdir, parents=True)
    yield FILE.parent
    host.run("rm", "-r", str(FILE.parent))


@pytest.fixture
def agent(textfiles: Path, agent: Agent) -> Agent:
    """An agent that finds node_exporter's directory when it starts."""
    return agent


def figures(host: Host) -> dict[str, float]:
    """Return what is written: a metric with its labels -> its value."""
    try:
        lines = host.call(FILE.read_text).splitlines()
    except FileNotFoundError:
        return {}
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def figures_after(host: Host, moment: float) -> dict[str, float]:
    """Return what is written of a look after a moment."""
    until(lambda: figures(host).get("mailfw_written_timestamp_seconds", 0) > moment, "written again")
    return figures(host)


def decided(found: dict[str, float], verdict: str) -> dict[str, float]:
    """Return the decisions of a verdict that are not nothing: ``role service family`` -> packets."""
    form = rf'mailfw_decisions_total\{{verdict="{verdict}",role="(\w+)",service="(\w+)",family="(\w+)"\}}'
    return {
        " ".join(match.groups()): found[match[0]]
        for match in (re.fullmatch(form, one) for one in found)
        if match and found[match[0]]
    }


def test_decisions_are_told_by_role_service_and_family(
    agent: Agent, loaded: Firewall, host: Host, alice: Client, mallory: Client, family: str
) -> None:
    source, stranger = alice.addresses(family)[0], mallory.addresses(family)[0]
    assert [mallory.connect(993, stranger) for _ in range(4)] == ["open", "open", "silent", "refused"]
    assert mallory.connect(143, stranger) == "refused"
    assert mallory.connect(587, stranger) == "refused"
    loaded.block(source)
    assert alice.connect(465, source) == "refused"
    found = figures_after(host, time.time())
    assert found['mailfw_decisions_total{verdict="opened"}'] == 3
    assert decided(found, "counted") == {f"dovecot imaps {family}": 3}
    assert decided(found, "over_rate") == {f"dovecot imaps {family}": 1}
    assert decided(found, "untrusted") == {f"postfix submission {family}": 1}
    assert decided(found, "blocked") == {f"postfix submissions {family}": 1}
    # Packets of the connection that was over the rate may come after the ban.
    banned = decided(found, "banned")
    assert banned[f"dovecot imap {family}"] == 1
    assert banned.keys() == {f"dovecot imap {family}", f"dovecot imaps {family}"}
    for verdict in TALLIED:
        assert sum(decided(found, verdict).values()) == loaded.counter(verdict)


def test_held_packets_are_told_too(firewall: Firewall, host: Host, alice: Client, family: str) -> None:
    firewall.load(protection={"type": "private"})
    assert alice.connect(465, alice.addresses(family)[0], patience=0.1) == "silent"
    counters = host.call(lambda: netlink.Kernel().counters())
    assert counters[f"held/submissions/{family}"] == counters["held"] == 1


def test_every_counter_of_the_rules_is_told(agent: Agent, host: Host) -> None:
    names = {name.partition("/")[0] for name in host.call(lambda: netlink.Kernel().counters())}
    assert names == {*TALLIED, *PLAIN, *NO_ROOM}


def test_what_is_written_is_what_the_table_of_metrics_says(agent: Agent, loaded: Firewall, host: Host) -> None:
    agent.login("203.0.113.7")
    found = figures_after(host, time.time())
    assert {name.partition("{")[0] for name in found} == METRICS.keys()
    assert found[f'mailfw_agent_info{{version="{agent.status()["version"]}",mode="protected"}}'] == 1
    assert found['mailfw_set_elements{set="trusted_ipv4"}'] == len(loaded.elements("trusted_ipv4")) == 7
    assert found['mailfw_set_size{set="trusted_ipv4"}'] == 2_000_000
    assert [found[f"mailfw_{one}"] for one in ("logins_total", "logins_announced_total", "rules_loaded")] == [1, 1, 1]
    assert [found[f"mailfw_{one}"] for one in ("rules_wanted", "rules_altered", "open_for_everyone")] == [1, 0, 0]
    assert found["mailfw_rules_applies_total"] == 1
    loaded.load(**PILLAR)
    assert figures_after(host, time.time())["mailfw_rules_applies_total"] == 2
    assert host.call(FILE.stat).st_mode & 0o777 == 0o644
    checked = promtool("check", "metrics", text=host.call(FILE.read_text))
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_rules_that_are_gone_or_open_are_told(agent: Agent, loaded: Firewall, host: Host) -> None:
    loaded.run("flush chain inet mailfw guarded")
    assert figures_after(host, time.time())["mailfw_rules_altered"] == 1
    host.run(WAY_OUT, "1h", "locked out")
    found = figures_after(host, time.time())
    host.run(WAY_OUT, "close")
    assert found["mailfw_open_for_everyone"] == 1
    assert found["mailfw_open_until_timestamp_seconds"] == pytest.approx(time.time() + 3600, abs=60)
    host.call(ruleset.LOADED.unlink)
    loaded.run("delete table inet mailfw")
    found = figures_after(host, time.time())
    assert [found[f"mailfw_rules_{one}"] for one in ("wanted", "loaded", "altered")] == [0, 0, 0]
    assert not [name for name in found if name.startswith(("mailfw_decisions", "mailfw_set"))]


def openings(agent: Agent) -> list[dict[str, Any]]:
    return [one["data"] for one in agent.events() if one["tag"] == "mailfw/open"]


def await_look(agent: Agent, host: Host) -> None:
    """Wait until the agent has made a whole look: an opening is told by one, and its end by the next."""
    before = len(openings(agent))
    host.run(WAY_OUT, "1h", "locked out")
    try:
        until(lambda: len(openings(agent)) == before + 1, "an opening is told")
    finally:
        host.run(WAY_OUT, "close")
    until(lambda: len(openings(agent)) == before + 2, "its end is told")


def test_nothing_is_written_where_nobody_looks(loaded: Firewall, host: Host, tmp_path: Path) -> None:
    """And as soon as somebody does, it is."""
    with closing(Agent(host, tmp_path, PILLAR)) as agent:
        await_look(agent, host)
        assert not host.call(FILE.parent.exists)
        assert "metrics" not in agent.log()
        host.call(FILE.parent.mkdir, parents=True)
        try:
            until(lambda: figures(host), "written")
            agent.configure({**PILLAR, "metrics": False})
            agent.ask("status")  # by then it has read them
            host.call(FILE.unlink)
            time.sleep(1.5)
            assert host.call(lambda: list(FILE.parent.iterdir())) == []
        finally:
            host.run("rm", "-r", str(FILE.parent))


def test_agent_that_cannot_write_to_a_new_directory_starts_again(loaded: Firewall, host: Host, tmp_path: Path) -> None:
    """Systemd has shown it the disk as it was before; a directory that was always read-only is no reason."""
    with closing(Agent(host, tmp_path, PILLAR)) as agent:
        await_look(agent, host)
        host.call(FILE.parent.mkdir, parents=True)
        host.run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(FILE.parent))
        try:
            until(lambda: not agent.running(), "it ends")
            agent.start()
            until(lambda: "Read-only file system" in agent.log(), "a complaint")
            await_look(agent, host)
            assert agent.running()
            assert agent.log().count("Read-only file system") == 1
        finally:
            host.run("umount", str(FILE.parent))
            host.run("rm", "-r", str(FILE.parent))


def test_elements_are_counted_where_the_kernel_does_not_say(loaded: Firewall, host: Host, family: str) -> None:
    base = {"ipv4": "10.0.{}.{} . 587", "ipv6": "2001:db8:{:x}:{:x}:: . 587"}[family]
    values = [base.format(one // 100, one % 100) for one in range(2100)]
    loaded.run(f"add element inet mailfw trusted_{family} {{ {', '.join(values)} }}")
    kernel = host.call(netlink.Kernel)
    # Just after a set was filled, a list may lack some.
    until(lambda: kernel.count(f"trusted_{family}") == 2100, "all are counted")
    assert kernel.levels()[f"trusted_{family}"].elements in (2100, None)


# Familiar addresses


class People:
    """Who is familiar, and which of them the loaded rules refuse."""

    def __init__(self, host: Host, firewall: Firewall, path: Path, *addresses: str):
        self._host, self._firewall = host, firewall
        self._familiar = familiar.Familiar(path)
        for address in addresses:
            self._familiar.note(parse.address(address), time.time())

    def refused(self) -> dict[str, str]:
        """Return who is refused, and why."""

        def look() -> set[familiar.Refusal]:
            return familiar.refused(netlink.Kernel(), self._familiar, self._firewall.settings, time.time())

        return {str(one.address): f"{one.reason}, {one.where}" for one in self._host.call(look)}


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "ban": ({}, "banned, dovecot"),
    "ban of a network": ({"autoban": {"rate": "100/hour", "networks": {}}}, "banned, dovecot"),
    "ban of a short prefix": ({"autoban": {"rate": "1/hour", "burst": 2, "ipv6_prefix": 56}}, "banned, dovecot"),
    "ban of an address": ({"autoban": {"rate": "1/hour", "burst": 2, "ipv6_prefix": 128}}, "banned, dovecot"),
    "block": ({}, "blocked, everywhere"),
    "hold": ({"reaction": {"untrusted": "hold"}}, "untrusted, submission"),
    "reject": ({"reaction": {"untrusted": "reject"}}, "untrusted, submission"),
    "drop": ({"reaction": {"untrusted": "drop"}}, "untrusted, submission"),
    "observing": ({"enforce": False}, "untrusted, submission"),
}


def refuse(firewall: Firewall, client: Client, family: str, kind: str) -> None:
    source = client.addresses(family)[0]
    if kind == "ban of a network":
        network = elements.counted_network(parse.address(source), firewall.settings).network_address
        firewall.run(f"add element inet mailfw banned_networks_dovecot_{family} {{ {network} }}")
    elif kind == "block":
        firewall.block(source)
    elif kind.startswith("ban"):
        assert [client.connect(993, source) for _ in range(2)] == ["open", "open"]
        client.connect(993, source, patience=0.1)
    else:
        client.connect(587, source, patience=0.1)


@pytest.mark.parametrize("kind", REFUSALS)
def test_familiar_address_that_is_refused_is_known(
    firewall: Firewall, host: Host, tmp_path: Path, alice: Client, mallory: Client, family: str, kind: str
) -> None:
    changed, why = REFUSALS[kind]
    firewall.load(**{**PILLAR, **changed})
    people = People(host, firewall, tmp_path / "familiar", alice.addresses(family)[0], "192.0.2.99", "2001:db8:99::")
    refuse(firewall, mallory, family, kind)
    assert people.refused() == {}
    refuse(firewall, alice, family, kind)
    assert people.refused() == {KNOWN[family]: why}


def test_who_is_let_in_after_all_is_not_refused(
    firewall: Firewall, host: Host, tmp_path: Path, alice: Client, family: str
) -> None:
    """An address is in a set of refused ones, and is not refused."""
    source = alice.addresses(family)[0]
    network = {"ipv4": "198.51.100.0/24", "ipv6": "2001:db8:a::/64"}[family]
    people = People(host, firewall, tmp_path / "familiar", source)
    banned = {KNOWN[family]: "banned, dovecot"}
    firewall.load(**PILLAR)
    firewall.ban(source)
    assert people.refused() == banned
    firewall.trust(source, ports=[143, 993])
    firewall.ban(source)
    assert people.refused() == banned  # from the other ports
    firewall.trust(source)
    firewall.ban(source)
    assert people.refused() == {}
    firewall.untrust(source)
    host.run(WAY_OUT, "1h", "locked out")
    assert people.refused() == {}
    host.run(WAY_OUT, "close")
    assert people.refused() == banned
    for pillar in ({"trusted": {f"networks_{family}": [network]}}, {"protection": {"type": "public"}}):
        firewall.load(**{**PILLAR, **pillar})
        assert people.refused() == {}
    firewall.load(**{**PILLAR, "protection": {"type": "private"}})
    assert people.refused() == {}
    firewall.block(source)
    firewall.trust(source)
    assert people.refused() == {KNOWN[family]: "blocked, everywhere"}


def come_once(agent: Agent, loaded: Firewall, source: str) -> None:
    """Have somebody log in; then the trust of that is over."""
    agent.login(source)
    loaded.untrust(source)


def test_refused_familiar_addresses_are_in_status_metrics_and_log(
    agent: Agent, loaded: Firewall, host: Host, alice: Client, mallory: Client
) -> None:
    """For each once; who is refused until the login is through is none of them."""
    source, *_, other = alice.ipv6
    come_once(agent, loaded, source)
    agent.ask("receive", signed({other: time.time()}))
    loaded.untrust(other)
    assert alice.connect(587, source) == "refused"
    agent.login(source)
    loaded.block(mallory.ipv6[0])
    loaded.block(other)
    known = "2001:db8:a:1::"
    shown = until(lambda: agent.status()["refused_addresses"], "noticed")
    assert shown == {known: "blocked, everywhere"}
    found = figures_after(host, time.time())
    told = {name: value for name, value in found.items() if name.startswith("mailfw_familiar_ref") and value}
    assert told == {
        'mailfw_familiar_refused{reason="blocked"}': 1,
        'mailfw_familiar_refusals_total{reason="blocked"}': 1,
    }
    assert found["mailfw_familiar_addresses"] == 2
    lines = [line for line in agent.log().splitlines() if line.startswith("familiar address")]
    assert lines == [f"familiar address {known} is refused: blocked, everywhere; logged in 0.0 days ago"]
    agent.ask("forget", known)
    until(lambda: agent.status()["familiar_refused"] == 0, "forgotten")
    assert host.call(Path("/var/lib/mailfw/familiar").stat).st_mode & 0o777 == 0o600
    agent.restart()
    assert agent.status()["familiar"] == 1


# Prometheus


def test_alert_fires_when_a_familiar_address_is_banned(
    agent: Agent, loaded: Firewall, host: Host, textfiles: Path, tmp_path: Path, alice: Client, mallory: Client
) -> None:
    with closing(Prometheus(host, host.ipv4, str(textfiles), host, tmp_path)) as prometheus:
        until(lambda: prometheus.query("mailfw_rules_loaded"), "the series are there", 10)
        come_once(agent, loaded, alice.ipv4[0])
        for client in (mallory, alice):
            assert [client.connect(993, client.ipv4[0]) for _ in range(3)] == ["open", "open", "silent"]
        until(lambda: "MailfwFamiliarRefused" in prometheus.firing(), "it pages", 15)
        assert prometheus.query("mailfw_familiar_refused > 0") == {"reason=banned": 1}
        over = 'mailfw_decisions_total{verdict="over_rate"} > 0'
        assert prometheus.query(over) == {"family=ipv4 role=dovecot service=imaps verdict=over_rate": 2}
        assert [name for name in METRICS if not prometheus.query(name)] == []
        assert prometheus.firing() == {"MailfwFamiliarRefused"}


def test_alert_rules_fire_when_they_should() -> None:
    tested = promtool("test", "rules", str(MONITORING / "alerts_test.yml"))
    assert tested.returncode == 0, tested.stdout + tested.stderr
    checked = promtool("check", "rules", "--lint-fatal", str(MONITORING / "alerts.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_understands_the_dashboards_queries(tmp_path: Path) -> None:
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert len(queries) > 20
    records = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries)
    ]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": records}]}))
    checked = promtool("check", "rules", str(path))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def told(agent: Agent, tag: str) -> list[dict[str, Any]]:
    return [event["data"] for event in agent.events() if event["tag"] == tag]


def test_an_opening_is_told_when_it_begins_and_when_it_ends(agent: Agent, host: Host) -> None:
    host.run(WAY_OUT, "1h", "locked out")
    ends = int(host.call(breakglass.STATE.read_text).split()[0])
    begun = {"host": HOST_ID, "until": ends, "reason": "locked out"}
    until(lambda: told(agent, "mailfw/open") == [begun], "the opening was told")
    host.call(breakglass.STATE.unlink)  # As on a full disk.
    figures_after(host, time.time() + 3)
    assert figures(host)["mailfw_open_for_everyone"] == 1
    unknown = {**begun, "until": pytest.approx(ends, abs=1), "reason": breakglass.UNKNOWN}
    assert told(agent, "mailfw/open") == [begun, unknown]
    host.run(WAY_OUT, "close")
    ended = {"host": HOST_ID, "until": 0, "reason": ""}
    until(lambda: told(agent, "mailfw/open") == [begun, unknown, ended], "its end was told")


def test_a_full_set_is_told_once(firewall: Firewall, host: Host, textfiles: Path, tmp_path: Path) -> None:
    small = {**PILLAR, "sizes": {"blocked": 1}}
    firewall.load(**small)
    with closing(Agent(host, tmp_path, small)) as agent:
        firewall.block("192.0.2.66")
        full = {"host": HOST_ID, "set": "blocked_ipv4", "size": 1}
        until(lambda: told(agent, "mailfw/full") == [full], "the full set was told", COUNTED)
        firewall.nft("delete", "element", "inet", "mailfw", "blocked_ipv4", "{ 192.0.2.66 }")
        # That there is room again is no news, and is noticed.
        figure = 'mailfw_set_elements{set="blocked_ipv4"}'
        until(lambda: figures_after(host, time.time()).get(figure) == 0, "the empty set was seen", COUNTED)
        firewall.block("192.0.2.67")
        until(lambda: told(agent, "mailfw/full") == [full, full], "it was told again", COUNTED)
