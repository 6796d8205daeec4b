"""Loading rules: what changes, what stays, and what is told."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from mailfwlib import nft, ruleset
from mailfwlib.settings import MODES
from support.firewall import Firewall
from support.net import Client, Host, until

#: A pillar with something in everything.
FULL: dict[str, Any] = {
    "protection": {"type": "protected", "services": {"sieve": "private", "pop3": "public"}},
    "autoban": {"networks": {"rate": "100/minute"}, "ipv6_prefix": 56},
    "trusted": {
        "networks_ipv4": ["10.1.0.0/16", "192.0.2.128/25", "198.51.100.200"],
        "networks_ipv6": ["2001:db8:1::/48", "2001:db8:2::1"],
        "ipv6_prefix": 128,
    },
    "exempt": {"networks_ipv4": ["10.2.0.0/24"], "networks_ipv6": ["2001:db8:3::/64"]},
    "blocked": {"networks_ipv4": ["10.3.0.0/24"], "networks_ipv6": ["2001:db8:4::/64"]},
}
PILLARS = {mode: {"protection": {"type": mode}} for mode in MODES} | {
    "everything": FULL,
    "observed": {**FULL, "enforce": False},
    "postfix": {"roles": ["postfix"]},
    "tuned": {
        "services": {"pop3": False, "submission": {"port": 2587}},
        "log": {"rate": "3/second", "group": 7},
        "sizes": {"trusted": 1000, "banned": 100, "blocked": 100, "rates": 100, "waiting": 100, "observed": 100},
        "mark": 0x80000001,
    },
    "silent": {"log": False, "reaction": {"banned": "reject", "blocked": "reject", "untrusted": "drop"}},
}
ADDRESS = {"ipv4": "198.51.100.10", "ipv6": "2001:db8:a::10"}
KEY = {"ipv4": "198.51.100.10", "ipv6": "2001:db8:a::"}


def mode(name: str) -> dict[str, Any]:
    return {"protection": {"type": name}, "reaction": {"untrusted": "reject"}}


@pytest.mark.parametrize("name", PILLARS)
def test_second_apply_changes_nothing(firewall: Firewall, alice: Client, family: str, name: str) -> None:
    """The rules have not even been loaded again, for then their handles, the kernel's numbers, would be new ones."""
    script = firewall.script(**PILLARS[name])
    assert firewall.apply(script)
    firewall.trust(ADDRESS[family])
    firewall.ban(ADDRESS[family])
    firewall.block("198.51.100.11")
    alice.connect_many([143, 587], alice.addresses(family)[-1])
    before = firewall.ruleset("-a")
    assert firewall.apply(script) == ""
    assert firewall.ruleset("-a") == before


@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("after", MODES)
def test_mode_switch_keeps_elements_and_sessions(
    firewall: Firewall, alice: Client, family: str, before: str, after: str
) -> None:
    trusted, *_, stranger = alice.addresses(family)
    firewall.load(**mode("public"))
    session = alice.open(993, stranger)
    firewall.load(**mode(before))
    for port, left in ((587, 100), (993, 3000)):
        firewall.run(
            f"add element inet mailfw trusted_{family} {{ {KEY[family]} . {port} timeout 3600s expires {left}s }}"
        )
    firewall.ban("203.0.113.99", seconds=500)
    firewall.block("203.0.113.98")
    own = alice.open(587, trusted)
    assert (firewall.load(**mode(after)) == "") is (before == after)
    found = firewall.elements(f"trusted_{family}")
    assert 90 < found[f"{KEY[family]} . 587"] <= 100
    assert 2990 < found[f"{KEY[family]} . 993"] <= 3000
    assert 490 < firewall.elements("banned_dovecot_ipv4")["203.0.113.99"] <= 500
    assert "203.0.113.98" in firewall.elements("blocked_ipv4")
    assert session.talks()
    assert own.talks()
    assert alice.connect_many([25, 587, 993], trusted) == {25: "open", 587: "open", 993: "open"}
    assert alice.connect(587, stranger) == ("open" if after in ("autoban", "public") else "refused")
    session.close()
    own.close()


def test_switch_has_no_open_and_no_closed_moment(firewall: Firewall, host: Host, alice: Client) -> None:
    trusted, stranger, _ = alice.ipv4
    scripts = [firewall.script(**mode(name)) for name in ("private", "protected")]
    firewall.apply(scripts[0])
    firewall.trust(trusted)
    switching = host.start(lambda: [ruleset.apply(script) for script in scripts * 8])
    found: dict[str, set[str]] = {trusted: set(), stranger: set()}
    while not switching.done():
        for source, results in found.items():
            results.add(alice.connect(587, source))
    assert all(switching.result()[1:])
    assert found == {trusted: {"open"}, stranger: {"refused"}}


def test_diff_says_what_changes(firewall: Firewall) -> None:
    firewall.load(**mode("autoban"))
    changed = firewall.load(**mode("protected"), trusted={"networks_ipv4": ["198.51.100.0/24"]}).splitlines()
    assert "--- loaded set trusted_networks_ipv4" in changed
    assert "+++ wanted set trusted_networks_ipv4" in changed
    assert "+\t\telements = { 198.51.100.0/24 }" in changed
    assert "+\tchain postfix_protected {" in changed
    assert "-\tchain postfix_autoban {" in changed
    assert any(re.match(r"-\t\t.*587 : goto postfix_autoban", line) for line in changed)
    assert any(re.match(r"\+\t\t.*587 : goto postfix_protected", line) for line in changed)
    limited = ("", "_count", "_ban", "_refuse", "_crowded")
    assert set(ruleset.altered("\n".join(changed))) == {
        *("set trusted_networks_ipv4", "chain guarded", "chain answered", "map services", "map counting"),
        *(f"chain dovecot_{name}{part}" for name in ("autoban", "protected") for part in limited),
        *(f"chain postfix_autoban{part}" for part in limited),
        *("chain postfix_protected", "set rate_postfix_ipv4", "set rate_postfix_ipv6"),
    }


def test_compare_tells_and_changes_nothing(firewall: Firewall, host: Host) -> None:
    firewall.load(**mode("autoban"))
    before = firewall.ruleset()
    script = firewall.script(**mode("private"))
    told = host.call(ruleset.compare, script)
    assert firewall.ruleset() == before
    assert told == firewall.apply(script)
    assert host.call(ruleset.compare, script) == ""


BROKEN = {
    "table inet mailfw { chain input { nonsense } }": "syntax error",
    "add rule inet mailfw input jump nowhere": "No such file",
    "add element inet mailfw services { 587 : accept }": "File exists",
    "add set inet mailfw trusted_ipv4 { type ipv6_addr; }": "File exists",
    'include "/nonexistent"\n': "not found",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_rules_that_do_not_load_change_nothing(firewall: Firewall, alice: Client, broken: str) -> None:
    firewall.load(**mode("autoban"))
    firewall.trust(ADDRESS["ipv4"])
    before = firewall.ruleset("-a")
    script = firewall.script(**mode("private")) + "\n" + broken
    with pytest.raises(nft.NftError, match=BROKEN[broken]):
        firewall.apply(script)
    assert firewall.ruleset("-a") == before
    assert alice.connect(587, alice.ipv4[1]) == "open"


def test_rules_that_load_only_once_change_nothing(firewall: Firewall) -> None:
    """The scratch namespace takes them, the live table does not: it is one transaction."""
    once = "\ncreate chain inet mailfw other\n"
    firewall.apply(firewall.script(**mode("autoban")) + once)
    firewall.trust(ADDRESS["ipv4"])
    before = firewall.ruleset("-a")
    with pytest.raises(nft.NftError, match="File exists"):
        firewall.apply(firewall.script(**mode("private")) + once)
    assert firewall.ruleset("-a") == before


def test_rules_that_do_not_load_leave_nothing_when_there_was_nothing(firewall: Firewall) -> None:
    with pytest.raises(nft.NftError):
        firewall.apply(firewall.script() + "\nnonsense")
    assert firewall.ruleset() == ""


def test_changed_ban_period_keeps_bans(firewall: Firewall, family: str) -> None:
    firewall.load(autoban={"period": "1h"})
    firewall.ban(ADDRESS[family], ("dovecot",))
    firewall.ban(ADDRESS[family], ("postfix",), 90)
    assert firewall.load(autoban={"period": "2h"})
    assert 3590 < firewall.elements(f"banned_dovecot_{family}")[KEY[family]] <= 3600
    assert 80 < firewall.elements(f"banned_postfix_{family}")[KEY[family]] <= 90
    firewall.ban(ADDRESS[family])
    assert 7190 < firewall.elements(f"banned_dovecot_{family}")[KEY[family]] <= 7200


def test_shortened_ban_period_shortens_bans(firewall: Firewall, family: str) -> None:
    firewall.load(autoban={"period": "1h"})
    firewall.ban(ADDRESS[family], ("dovecot",))
    firewall.load(autoban={"period": "10m"})
    assert 590 < firewall.elements(f"banned_dovecot_{family}")[KEY[family]] <= 600


@pytest.mark.parametrize("timeout", ["1h", "9h"])
def test_changed_timeout_of_the_trusted_sets_keeps_trust(firewall: Firewall, family: str, timeout: str) -> None:
    firewall.load(trusted={"timeout": "5h"})
    firewall.trust(ADDRESS[family], 86400, [587])
    firewall.trust(ADDRESS[family], 60, [465])
    own, default = f"{KEY[family]} . 110 timeout 1d expires 500s", f"{KEY[family]} . 993"
    firewall.run(f"add element inet mailfw trusted_{family} {{ {own}, {default} }}")
    assert firewall.load(trusted={"timeout": timeout})
    found = firewall.elements(f"trusted_{family}")
    assert 490 < found[f"{KEY[family]} . 110"] <= 500
    assert 86390 < found[f"{KEY[family]} . 587"] <= 86400
    assert 50 < found[f"{KEY[family]} . 465"] <= 60
    left = 3600 if timeout == "1h" else 18000  # by the set's default, which has become shorter in one case
    assert left - 10 < found[f"{KEY[family]} . 993"] <= left
    assert firewall.load(trusted={"timeout": timeout}) == ""


def test_many_elements_are_carried(firewall: Firewall) -> None:
    firewall.load(trusted={"timeout": "5h"})
    some = ", ".join(f"10.0.{high}.{low} . 587 timeout 600s" for high in range(20) for low in range(250))
    firewall.run(f"add element inet mailfw trusted_ipv4 {{ {some} }}")
    firewall.load(trusted={"timeout": "6h"})
    assert len(firewall.elements("trusted_ipv4")) == 5000


@pytest.mark.parametrize("rate", ["1/minute", "3/minute"])
def test_changed_rate_starts_with_full_bursts(firewall: Firewall, alice: Client, family: str, rate: str) -> None:
    """With the slower rate the meters are kept for another time, and so are made anew; with the other they stay."""
    source = alice.addresses(family)[0]
    firewall.load(autoban={"rate": rate, "burst": 3})
    assert [alice.connect(143, source) for _ in range(3)] == ["open"] * 3
    firewall.load(autoban={"rate": rate, "burst": 2})
    assert [alice.connect(143, source) for _ in range(3)] == ["open", "open", "silent"]


def test_networks_of_pillar_follow_the_pillar(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    for networks in ([], [source], []):
        firewall.load(**mode("private"), trusted={f"networks_{family}": networks})
        assert alice.connect(587, source) == ("open" if networks else "refused")


@pytest.mark.parametrize("name", ["autoban", "protected", "private"])
def test_observing_refuses_nobody_and_counts(firewall: Firewall, alice: Client, family: str, name: str) -> None:
    source, *_, blocked = alice.addresses(family)
    firewall.load(protection={"type": name}, enforce=False, autoban={"rate": "1/minute", "burst": 2})
    session = alice.open(993, blocked)
    firewall.block(blocked)
    assert [alice.connect(993, source) for _ in range(6)] == ["open"] * 6
    assert [alice.connect(587, source) for _ in range(6)] == ["open"] * 6
    assert alice.connect_many([587, 993], blocked) == {587: "open", 993: "open"}
    assert session.talks()
    session.close()
    counters = {one: firewall.counter(one) for one in ("over_rate", "banned", "untrusted", "blocked", "held")}
    assert counters["blocked"] > 0
    assert counters["held"] == 0
    assert (counters["untrusted"] > 0) is (name != "autoban")
    assert (counters["over_rate"] > 0) is (counters["banned"] > 0) is (name != "private")


def test_foreign_tables_are_left_alone(firewall: Firewall, alice: Client) -> None:
    firewall.run(
        "add table inet filter; add set inet filter mailfw { type ipv4_addr; }\n"
        "add element inet filter mailfw { 192.0.2.1 }\n"
        "add chain inet filter input { type filter hook input priority 0; }\n"
        "add rule inet filter input tcp dport 587 accept\n"
        "add table ip mailfw; add chain ip mailfw services; add rule ip mailfw services accept\n"
    )
    foreign = [("inet", "filter"), ("ip", "mailfw")]
    before = [firewall.nft("-a", "list", "table", *table) for table in foreign]
    for name in ("autoban", "private", "autoban"):
        assert firewall.load(**mode(name))
    assert [firewall.nft("-a", "list", "table", *table) for table in foreign] == before


def test_concurrent_appliers_take_turns(firewall: Firewall, host: Host) -> None:
    scripts = [firewall.script(**mode(name)) for name in ("private", "protected")]
    for _ in range(5):
        applying = [host.start(ruleset.apply, script) for script in scripts * 3]
        for one in applying:
            one.result()
        assert "" in [host.call(ruleset.compare, script) for script in scripts]


def test_counters_keep_their_values(firewall: Firewall, alice: Client) -> None:
    firewall.load(**mode("protected"))
    for _ in range(3):
        alice.connect(587, alice.ipv4[0])
    assert firewall.load(**mode("private"))
    assert firewall.counter("untrusted") == 3


DAMAGE = {
    "rule added": "add rule inet mailfw guarded accept",
    "chain emptied": "flush chain inet mailfw input",
    "port opened": "delete element inet mailfw services { 587 }",
    "set deleted": "flush chain inet mailfw untrusted; delete set inet mailfw waiting_ipv4",
    "network added": "add element inet mailfw trusted_networks_ipv4 { 198.51.100.0/24 }",
    "chain and set added": "add chain inet mailfw other; add set inet mailfw mine { type ipv4_addr; }",
    "table deleted": "delete table inet mailfw",
    "ruleset flushed": "flush ruleset",
    "table emptied": "flush table inet mailfw",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_apply_repairs_what_others_changed(firewall: Firewall, alice: Client, damage: str) -> None:
    script = firewall.script(**mode("private"))
    firewall.apply(script)
    before = firewall.nft("-s", "list", "ruleset")
    firewall.run(DAMAGE[damage])
    assert firewall.apply(script)
    assert sorted(firewall.nft("-s", "list", "ruleset").splitlines()) == sorted(before.splitlines())
    assert firewall.apply(script) == ""
    assert alice.connect(587, alice.ipv4[0]) == "refused"


@pytest.mark.parametrize("name", MODES)
def test_session_older_than_the_table_goes_on(firewall: Firewall, alice: Client, family: str, name: str) -> None:
    firewall.load(**mode("public"))
    session = alice.open(993, alice.addresses(family)[0])
    firewall.unload()
    assert session.talks()
    firewall.load(**mode(name))
    assert session.talks()
    assert session.talks()
    session.close()


def test_apply_waits_for_its_turn(firewall: Firewall, host: Host) -> None:
    script = firewall.script(**mode("private"))

    def hold_the_lock() -> float:
        with ruleset.turn():
            applying = host.start(lambda: (ruleset.apply(script), time.monotonic()))
            time.sleep(0.5)
            assert not applying.done()
            released = time.monotonic()
        return applying.result()[1] - released

    assert host.call(hold_the_lock) > 0
    until(lambda: "postfix_private" in firewall.ruleset(), "loaded")
