"""Nothing is lost: what is flushed, altered or unloaded comes back, with all who were trusted, banned and blocked."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mailfwlib import breakglass, files, keeper, netlink, nft, ruleset, snapshot
from support.agent import KEY, Agent, snapshots_that_hang
from support.firewall import Firewall
from support.net import Client, Host, until

PILLAR: dict[str, Any] = {
    "protection": {"type": "protected"},
    "reaction": {"untrusted": "reject", "banned": "reject"},
    "trusted": {"networks_ipv4": ["192.0.2.200"]},
    "fleet": {"keys": [KEY]},
}
KEY_OF = {"ipv4": "198.51.100.10", "ipv6": "2001:db8:a::"}


def install(firewall: Firewall, host: Host, **pillar: Any) -> str:
    """Load the rules for a pillar and put their file on disk, as the state does; return the diff."""
    script = firewall.script(**{**PILLAR, **pillar})
    return host.call(ruleset.install, {"base.nft": script})[0]


@pytest.fixture
def installed(firewall: Firewall, host: Host) -> Iterator[Firewall]:
    install(firewall, host)
    yield firewall
    for path in host.call(lambda: list(ruleset.RULES.glob("*"))):
        host.call(path.unlink)


@pytest.fixture
def agent(installed: Firewall, host: Host, tmp_path: Path) -> Iterator[Agent]:
    with contextlib.closing(Agent(host, tmp_path, PILLAR)) as made:
        until(lambda: made.status()["last_snapshot"], "the first snapshot")
        yield made


def flush(firewall: Firewall) -> None:
    firewall.run("flush ruleset")


def tool(host: Host, verb: str) -> str:
    return host.run("/usr/lib/mailfw/mailfw-rules", verb).stdout


DAMAGE = {
    "flush": "flush ruleset",
    "table": "delete table inet mailfw",
    "rules": "flush chain inet mailfw guarded",
    "base chain": "flush chain inet mailfw input; delete chain inet mailfw input",
    "verdicts": "flush map inet mailfw services",
    "port": "delete element inet mailfw services { 587 }",
    "added rule": "insert rule inet mailfw guarded accept",
    "static set": "flush set inet mailfw trusted_networks_ipv4",
}

#: What a repair finds altered where it is not the whole table.
ALTERED = {
    "rules": ["chain guarded"],
    "base chain": ["chain input"],
    "verdicts": ["map services"],
    "port": ["map services"],
    "added rule": ["chain guarded"],
    "static set": ["set trusted_networks_ipv4"],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_agent_repairs_what_somebody_did(
    agent: Agent, installed: Firewall, alice: Client, mallory: Client, family: str, damage: str
) -> None:
    source, stranger = alice.addresses(family)[0], mallory.addresses(family)[0]
    agent.login(source)
    session = alice.open(993, source)
    before = installed.nft("-s", "-t", "list", "table", "inet", "mailfw")
    installed.run(DAMAGE[damage])
    until(lambda: agent.status()["heals"] == 1, "repaired")
    after = installed.nft("-s", "-t", "list", "table", "inet", "mailfw")
    assert sorted(after.splitlines()) == sorted(before.splitlines())
    until(lambda: alice.connect(587, source) == "open", "who has logged in since the snapshot is trusted again")
    assert mallory.connect(587, stranger) == "refused"
    assert session.talks()
    session.close()
    (event,) = until(lambda: [one for one in agent.events() if one["tag"] == "mailfw/healed"], "the event")
    assert event["data"]["host"] == "mx1.example"
    altered = event["data"]["altered"]
    assert altered == ALTERED[damage] if damage in ALTERED else {"chain input", "map services"} < set(altered)
    assert "repaired" in agent.log()


def test_repair_brings_back_what_was_known_last(agent: Agent, installed: Firewall, host: Host, family: str) -> None:
    """Who was banned and blocked comes from the snapshot; who logged in or was trusted since, from the agent."""
    addresses = {"ipv4": "203.0.113.{}", "ipv6": "2001:db8:{}::"}[family]
    banned, blocked, forgotten, logged_in, given = (addresses.format(number) for number in range(1, 6))
    installed.ban(banned)
    installed.block(blocked)
    installed.trust(forgotten, seconds=7200)
    agent.restart()
    until(lambda: agent.status()["last_snapshot"], "a snapshot")
    agent.login(logged_in)
    agent.remember(given, 30 * 86400, 587, note="root")
    installed.untrust(forgotten)
    agent.ask("forget", forgotten)
    flush(installed)
    until(lambda: agent.status()["heals"] == 1, "repaired")
    until(lambda: f"{given} . 587" in installed.elements(f"trusted_{family}"), "trusted again")
    trusted = installed.elements(f"trusted_{family}")
    assert len([one for one in trusted if one.startswith(f"{logged_in} ")]) == 7
    assert trusted[f"{given} . 587"] > 29 * 86400
    assert not [one for one in trusted if one.startswith(f"{forgotten} ")]
    assert banned in installed.elements(f"banned_dovecot_{family}")
    assert 3500 < installed.elements(f"banned_postfix_{family}")[banned] <= 3600
    assert installed.elements(f"blocked_{family}") == {blocked: float("inf")}


def test_load_by_the_service_forgets_no_login(agent: Agent, installed: Firewall, host: Host, family: str) -> None:
    """It may be sooner than the agent, and has the last snapshot only."""
    agent.login(KEY_OF[family])
    host.run("sh", "-c", "nft flush ruleset; /usr/lib/mailfw/mailfw-rules load")
    until(lambda: f"{KEY_OF[family]} . 587" in installed.elements(f"trusted_{family}"), "trusted again")
    agent.restart()  # with a last snapshot
    flush(installed)
    until(lambda: agent.status()["heals"] == 1, "repaired")
    assert f"{KEY_OF[family]} . 587" in installed.elements(f"trusted_{family}")


def test_what_an_operator_does_is_soon_in_a_snapshot(agent: Agent, installed: Firewall, host: Host) -> None:
    """The next one would be a minute later, and a flush before that would take it away."""
    for address in ("203.0.113.1", "203.0.113.2"):
        installed.block(address)
        agent.ask("save")
        until(lambda one=address: one in host.call(snapshot.PATH.read_text), "it is in there")


@pytest.mark.slow
def test_what_an_operator_does_is_in_a_snapshot_although_the_first_fails(
    agent: Agent, installed: Firewall, host: Host
) -> None:
    """Tried again before the next one is due."""
    host.run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(snapshot.PATH.parent))
    try:
        installed.block("203.0.113.1")
        agent.ask("save")
        until(lambda: "no snapshot: " in agent.log(), "said")
    finally:
        host.run("umount", str(snapshot.PATH.parent))
    until(lambda: "203.0.113.1" in host.call(snapshot.PATH.read_text), "it is in there", keeper.SNAPSHOT / 2)


@pytest.fixture
def hanging_snapshots(installed: Firewall, host: Host, tmp_path: Path) -> Iterator[None]:
    """The tool does all but snapshots."""
    with snapshots_that_hang(host, tmp_path):
        yield


def test_repair_does_not_wait_for_a_snapshot_that_hangs(
    installed: Firewall, hanging_snapshots: None, host: Host, tmp_path: Path
) -> None:
    agent = Agent(host, tmp_path, PILLAR)
    try:
        (hanging,) = until(lambda: [one for one in agent.children() if "sleep" in command_of(one)], "it hangs")
        flush(installed)
        until(lambda: agent.status()["heals"] == 1, "repaired")
        until(lambda: not command_of(hanging), "it was ended")
        assert "no snapshot: mailfw-rules save did not come to its end" in agent.log()
    finally:
        agent.close()


def command_of(process: Path) -> str:
    """Return the command of a process; empty when it has ended."""
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_text()
    return ""


@pytest.mark.slow
def test_repair_that_fails_is_said_once_and_tried_again(agent: Agent, installed: Firewall, host: Host) -> None:
    broken = ruleset.RULES / "broken.nft"
    host.call(broken.write_text, "no rule")
    flush(installed)
    until(lambda: "the rules cannot be kept: they were altered, and the repair fails: " in agent.log(), "said")
    time.sleep(keeper.PATIENCE + 2 * keeper.LOOK)
    assert agent.log().count("the repair fails") == 1
    host.call(broken.unlink)
    until(lambda: agent.status()["heals"] == 1, "repaired")
    until(lambda: "the rules cannot be kept: that is over" in agent.log(), "said")


def test_repair_that_failed_is_soon_tried_again(agent: Agent, installed: Firewall, host: Host) -> None:
    broken = ruleset.RULES / "broken.nft"
    host.call(broken.write_text, "no rule")
    flush(installed)
    until(lambda: "the repair fails: " in agent.log(), "said")
    time.sleep(1.5 * keeper.LOOK)
    host.call(broken.unlink)
    until(lambda: agent.status()["heals"] == 1, "repaired", keeper.PATIENCE - 1)


def test_agent_sees_to_rules_that_nft_alone_has_loaded(
    agent: Agent, installed: Firewall, host: Host, family: str
) -> None:
    """As mailfw.service does where Python is broken."""
    source = KEY_OF[family]
    agent.login(source)
    tool(host, "unload")
    host.call(ruleset.UNLOADED.replace, ruleset.LOADED)
    installed.run(ruleset.joined(host.call(ruleset.present)))
    until(lambda: agent.status()["heals"] == 1, "seen to")
    assert f"{source} . 587" in installed.elements(f"trusted_{family}")
    flush(installed)
    until(lambda: agent.status()["heals"] == 2, "repaired")


def test_agent_that_has_started_before_elements_were_there_learns_of_them(
    agent: Agent, installed: Firewall, host: Host, family: str
) -> None:
    source = KEY_OF[family]
    installed.trust(source, 30 * 86400, [587], note="root")
    agent.restart()
    tool(host, "save")
    tool(host, "unload")
    host.call(ruleset.UNLOADED.replace, ruleset.LOADED)
    agent.stop()
    installed.run(ruleset.joined(host.call(ruleset.present)))
    agent.start()
    until(lambda: agent.status()["heals"] == 1, "seen to")
    until(lambda: f"{source} . 587" in installed.elements(f"trusted_{family}"), "trusted again")
    until(lambda: [one for one in agent.events() if one["tag"] == "mailfw/healed"], "the event")
    agent.status()  # By then it has learned of them.
    agent.login(source)
    assert installed.elements(f"trusted_{family}")[f"{source} . 587"] > 29 * 86400


def test_agent_leaves_an_unloaded_table_alone(agent: Agent, installed: Firewall, host: Host) -> None:
    tool(host, "unload")
    time.sleep(2.5)  # the agent looks every second
    assert installed.nft("list", "tables") == ""
    assert agent.status()["heals"] == 0


def test_agent_leaves_others_tables_alone(agent: Agent, installed: Firewall) -> None:
    installed.run("add table inet other")
    installed.run("delete table inet other")
    time.sleep(2.5)
    assert agent.status()["heals"] == 0


def test_applying_is_no_damage(agent: Agent, installed: Firewall, host: Host) -> None:
    for mode in ("private", "autoban", "protected") * 5:
        install(installed, host, protection={"type": mode})
    time.sleep(1.5)
    assert agent.status()["heals"] == 0


def ends(firewall: Firewall, name: str) -> dict[str, float]:
    """Return when each element of a set ends, in Unix time."""
    now = time.time()
    return {element: now + left for element, left in firewall.elements(name).items()}


def test_unload_and_load_keep_everything_with_the_time_left(
    installed: Firewall, host: Host, alice: Client, family: str
) -> None:
    source = alice.addresses(family)[0]
    installed.trust(source, seconds=7200)
    installed.ban("203.0.113.1" if family == "ipv4" else "2001:db8:1::", seconds=600)
    installed.block("203.0.113.2" if family == "ipv4" else "2001:db8:2::")
    sets = [f"trusted_{family}", f"banned_dovecot_{family}", f"banned_postfix_{family}", f"blocked_{family}"]
    before = {name: ends(installed, name) for name in sets}
    tool(host, "unload")
    assert installed.nft("list", "tables") == ""
    tool(host, "load")
    for name in sets:
        assert ends(installed, name) == pytest.approx(before[name], abs=3)
    assert alice.connect(587, source) == "open"


def test_downtime_counts(installed: Firewall, host: Host) -> None:
    ends = round(time.time())
    elements = {
        "trusted_ipv4": [
            snapshot.Element("192.0.2.1 . 587", 86400, ends + 600),
            snapshot.Element("192.0.2.2 . 587", 86400, ends - 1),
        ],
        "banned_dovecot_ipv6": [snapshot.Element("2001:db8::", None, ends + 300)],
        "blocked_ipv4": [snapshot.Element("192.0.2.9", None, None)],
    }
    flush(installed)
    host.call(files.replace, snapshot.PATH, snapshot.text(elements))
    tool(host, "load")
    assert list(installed.elements("trusted_ipv4")) == ["192.0.2.1 . 587"]
    assert 590 < installed.elements("trusted_ipv4")["192.0.2.1 . 587"] <= 600
    assert 290 < installed.elements("banned_dovecot_ipv6")["2001:db8::"] <= 300
    assert list(installed.elements("blocked_ipv4")) == ["192.0.2.9"]


def test_shortened_periods_are_kept_to(installed: Firewall, host: Host) -> None:
    installed.ban("192.0.2.1")
    tool(host, "unload")
    install(installed, host, autoban={"period": "5m"})
    assert 290 < installed.elements("banned_dovecot_ipv4")["192.0.2.1"] <= 300


BAD = {
    "empty": "",
    "torn": None,
    "foreign": "table inet mailfw {\n}\n",
    "older": snapshot.text({}).replace("snapshot 1", "snapshot 0"),
    "altered": snapshot.text({"trusted_ipv4": [snapshot.Element("192.0.2.1 . 587", 1, None)]}).replace("2.1", "2.2"),
    "hostile": snapshot.text({"trusted_ipv4": [snapshot.Element("192.0.2.1 . 587 }; flush ruleset", 1, None)]}),
    "hostile comment": snapshot.text(
        {"blocked_ipv4": [snapshot.Element("192.0.2.1", None, None, 'x" }; flush ruleset')]}
    ),
    "unknown set": snapshot.text({"services": [snapshot.Element("192.0.2.1", None, None)]}),
    "wrong type": snapshot.text({"blocked_ipv4": [snapshot.Element("2001:db8::", None, None)]}),
    "not text": "\xff\xfe",
}


def test_snapshot_has_what_nft_lists(installed: Firewall, host: Host) -> None:
    for source in ("192.0.2.1", "2001:db8:1::1", "::ffff:0:1", "2001:db8::"):
        installed.trust(source, 90)
    installed.run("add element inet mailfw trusted_ipv4 { 255.255.255.255 . 65535, 0.0.0.1 . 25 timeout 366d }")
    installed.ban("192.0.2.2")
    installed.ban("2001:db8:2::", seconds=77)
    installed.block("192.0.2.3")
    installed.block("2001:db8:3::", 3600)
    found = host.call(snapshot.current)
    for name, listed in found.items():
        left = installed.elements(name)
        now = time.time()
        assert sorted(one.value for one in listed) == sorted(left)
        for one in listed:
            ends = float("inf") if one.ends is None else one.ends
            assert ends == pytest.approx(now + left[one.value], abs=3)
    assert len([name for name, listed in found.items() if listed]) == 8
    (own,) = found["banned_dovecot_ipv6"]
    assert own.timeout == 77
    assert found["blocked_ipv4"][0].ends is None


def test_snapshot_comes_to_an_end_where_people_log_in_all_the_time(installed: Firewall, host: Host) -> None:
    """Each login makes whoever lists a set with nft begin anew."""
    many = ", ".join(f"10.{n >> 8}.{n & 255}.1 . 587 timeout 1d" for n in range(20_000))
    installed.run(f"add element inet mailfw trusted_ipv4 {{ {many} }}")
    over = threading.Event()

    def log_in() -> int:
        library, last = nft.Library(), 0
        while not over.is_set():
            last += 1
            library.run(f"add element inet mailfw trusted_ipv4 {{ 192.0.2.{last % 250} . 587 timeout 1d }}")
            time.sleep(0.002)
        return last

    logins = host.start(log_in)
    try:
        assert "written, 20" in host.run("timeout", "20", "/usr/lib/mailfw/mailfw-rules", "save").stdout
    finally:
        over.set()
    assert logins.result(10) > 20
    assert len(host.call(snapshot.load)["trusted_ipv4"]) >= 20_000


@pytest.mark.parametrize("kind", BAD)
def test_snapshot_that_cannot_be_believed_is_set_aside(installed: Firewall, host: Host, kind: str) -> None:
    installed.trust("192.0.2.1")
    flush(installed)
    content = BAD[kind]
    if content is None:
        content = snapshot.text({"trusted_ipv4": [snapshot.Element(f"192.0.2.{n} . 587", 600, None) for n in range(9)]})
        content = content[: len(content) // 2]
    host.call(snapshot.PATH.write_bytes, content.encode("latin-1"))
    done = host.run("/usr/lib/mailfw/mailfw-rules", "load")
    aside = snapshot.PATH.with_name("snapshot.rejected")
    assert f"set aside as {aside}" in done.stderr
    assert host.call(aside.read_bytes) == content.encode("latin-1")
    assert not host.call(snapshot.PATH.exists)
    assert installed.elements("trusted_ipv4") == {}
    assert installed.nft("list", "map", "inet", "mailfw", "services").count("goto dovecot_") == 5


def test_snapshot_of_another_user_is_not_believed(installed: Firewall, host: Host) -> None:
    installed.trust("192.0.2.1")
    tool(host, "unload")
    host.run("chown", "nobody", str(snapshot.PATH))
    assert "belongs to uid" in host.run("/usr/lib/mailfw/mailfw-rules", "load").stderr
    assert installed.elements("trusted_ipv4") == {}


def test_snapshot_is_written_only_when_something_changed(installed: Firewall, host: Host) -> None:
    installed.trust("192.0.2.1")
    assert "written, 7 elements" in tool(host, "save")
    inode = host.call(snapshot.PATH.stat).st_ino
    assert "unchanged, 7 elements" in tool(host, "save")
    assert host.call(snapshot.PATH.stat).st_ino == inode
    installed.trust("192.0.2.1", seconds=7200)
    assert "written, 7 elements" in tool(host, "save")


def test_snapshot_is_kept_while_no_rules_are_loaded(installed: Firewall, host: Host) -> None:
    installed.trust("192.0.2.1")
    tool(host, "save")
    flush(installed)
    done = host.run("/usr/lib/mailfw/mailfw-rules", "save", check=False)
    assert (done.returncode, done.stderr) == (1, "mailfw-rules save: no rules are loaded\n")
    tool(host, "unload")
    tool(host, "load")
    assert "192.0.2.1 . 587" in installed.elements("trusted_ipv4")


def test_snapshot_is_readable_by_root_only(installed: Firewall, host: Host) -> None:
    tool(host, "save")
    assert host.call(snapshot.PATH.stat).st_mode & 0o777 == 0o600


def test_set_that_became_smaller_keeps_what_ends_last(installed: Firewall, host: Host) -> None:
    for number, seconds in enumerate((100, 300, 200), start=1):
        installed.block(f"192.0.2.{number}", seconds)
    tool(host, "unload")
    install(installed, host, sizes={"blocked": 2})
    assert set(installed.elements("blocked_ipv4")) == {"192.0.2.2", "192.0.2.3"}


def opened(host: Host, *arguments: str) -> str:
    return host.run("/usr/lib/mailfw/mailfw-open", *arguments).stdout


def test_way_out_opens_everything_and_closes_by_itself(
    installed: Firewall, host: Host, mallory: Client, family: str
) -> None:
    source = mallory.addresses(family)[0]
    installed.block(source)
    installed.ban(source)
    assert mallory.connect(587, source) == "silent"
    assert "open for everyone until" in opened(host, "1h", "on call at 3")
    assert mallory.connect_many([587, 993, 25], source) == {587: "open", 993: "open", 25: "open"}
    assert "on call at 3" in opened(host)
    opened(host, "1s")
    until(lambda: mallory.connect(587, source) == "silent", "closed again")
    until(lambda: "not open" in opened(host), "it says so")


def test_way_out_survives_applies_repairs_and_reboots(
    agent: Agent, installed: Firewall, host: Host, mallory: Client
) -> None:
    source = mallory.ipv4[0]
    opened(host, "2h", "test")
    install(installed, host, protection={"type": "private"})
    assert mallory.connect(993, source) == "open"
    flush(installed)
    until(lambda: agent.status()["heals"] == 1, "repaired")
    assert mallory.connect(993, source) == "open"
    agent.stop()
    flush(installed)
    host.call(ruleset.LOADED.unlink)
    tool(host, "load")
    assert mallory.connect(993, source) == "open"
    opened(host, "close")
    assert mallory.connect(993, source) == "refused"
    assert "not open" in opened(host)


@pytest.mark.parametrize("wrong", ["2", "h", "2x", "8d", "0s", "-1h", "2h;reboot", "1h 2h", "99999999h", "08", "é"])
def test_way_out_refuses_what_is_no_duration(installed: Firewall, host: Host, wrong: str) -> None:
    done = host.run("/usr/lib/mailfw/mailfw-open", wrong, check=False)
    assert done.returncode == 1
    assert f"'{wrong}': expected a duration such as 2h" in done.stderr
    assert installed.elements("break_glass") == {}


def test_way_out_takes_a_reason_as_it_is(installed: Firewall, host: Host) -> None:
    reason = "$(touch /run/x) `id` %s \\n '\"; nft flush ruleset"
    opened(host, "1h30m", reason)
    assert reason in opened(host)
    assert not host.call(Path("/run/x").exists)
    assert 5390 < installed.elements("break_glass")["tcp"] <= 5400
    opened(host, "close")


def test_way_out_on_a_full_disk(installed: Firewall, host: Host, mallory: Client) -> None:
    """It opens all the same, and says that only the kernel knows of it."""
    directory = str(breakglass.STATE.parent)
    host.run("mount", "-t", "tmpfs", "-o", "size=64k", "disk", directory)
    opened(host, "2h", "of yesterday")
    host.run("sh", "-c", f"cat /dev/zero >{directory}/filler || true")
    said = opened(host, "1h", "locked out")
    assert "but not over a reboot or a repair (cat: write error: No space left on device): locked out" in said
    assert mallory.connect(587, mallory.ipv4[0]) == "open"
    found = host.call(lambda: breakglass.opening(time.time(), netlink.Kernel()))
    assert found
    assert found.ends == pytest.approx(time.time() + 3600, abs=10)
    assert found.reason == breakglass.UNKNOWN
    assert re.fullmatch(f"open for everyone for another (59m\\d+s|1h): {breakglass.UNKNOWN}\n", opened(host))
    host.run("umount", directory)
    opened(host, "close")
    assert host.call(lambda: breakglass.sentence(time.time(), netlink.Kernel())) == ""


def test_way_out_says_that_there_are_no_rules(host: Host) -> None:
    done = host.run("/usr/lib/mailfw/mailfw-open", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("mailfw-open: no rules can be read (systemctl status mailfw): Error: No such file")


@pytest.mark.parametrize("loader", ["mailfw-rules", "mailfw-open"])
@pytest.mark.parametrize(
    ("written", "longest"),
    [(-7200, 7200), (-63_000_000, 604_800), (5, 0)],
    ids=["opened for 2h", "for years", "after its end"],
)
def test_a_clock_far_behind_keeps_nothing_open_for_long(
    installed: Firewall, host: Host, loader: str, written: int, longest: int
) -> None:
    """As at boot on a host whose clock needs NTP; ``written``: seconds from the end at which the opening began."""
    ends = int(time.time()) + 63_000_000
    host.call(breakglass.STATE.write_text, f"{ends} locked out\n")
    host.call(os.utime, breakglass.STATE, (ends + written, ends + written))
    if loader == "mailfw-rules":
        flush(installed)
        done = host.run("/usr/lib/mailfw/mailfw-rules", "load")
    else:
        done = host.run("/usr/lib/mailfw/mailfw-open", "resume")
    assert installed.elements("break_glass").get("tcp", 0) == pytest.approx(longest, abs=60 * bool(longest))
    assert f"{breakglass.STATE}: until {ends} is too long from now" in done.stderr
    opened(host, "close")
