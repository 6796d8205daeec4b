import fcntl
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import parse, ruleset, settings
from unit.rendering import Rules

#: What `nft -s list table inet mailfw` prints, one object or two of each kind, without the spaces that align elements.
LISTING = """\
table inet mailfw {
	counter trusted {
	}

	set trusted_ipv4 {
		type ipv4_addr . inet_service
		size 2000000
		flags dynamic,timeout
		timeout 5h
		elements = { 192.0.2.1 . 143 timeout 1d,
				192.0.2.1 . 993 }
	}

	set rate_dovecot_ipv4 {
		type ipv4_addr
		size 65536
		flags dynamic,timeout
		timeout 2m
	}

	set trusted_networks_ipv4 {
		type ipv4_addr
		flags interval
		elements = { 10.0.0.0/8, 192.0.2.0/24 }
	}

	map services {
		type inet_service : verdict
		elements = { 25 : accept, 143 : goto dovecot_autoban,
				4190 : goto dovecot_private }
	}

	chain input {
		type filter hook input priority filter - 10; policy accept;
		iif "lo" accept
		tcp dport vmap @services
	}

	chain banned {
		counter name "banned" drop
	}

	chain dovecot_autoban {
		jump guarded
		update @rate_dovecot_ipv4 { ip daddr limit rate over 10/minute burst 20 packets } goto banned
	}
}
"""
OLD = ruleset._objects(LISTING)


def changed(**replaced):
    """Return the objects of the listing with some texts replaced, each by one that must be there."""
    new = LISTING
    for text, by in replaced.values():
        assert text in new
        new = new.replace(text, by)
    return ruleset._objects(new)


def transaction(new, script="SCRIPT", carried="CARRIED"):
    return ruleset.transaction(OLD, new, script, carried).splitlines()


def test_listing_is_split_into_its_objects():
    assert list(OLD) == [
        ("counter", "trusted"),
        ("set", "trusted_ipv4"),
        ("set", "rate_dovecot_ipv4"),
        ("set", "trusted_networks_ipv4"),
        ("map", "services"),
        ("chain", "input"),
        ("chain", "banned"),
        ("chain", "dovecot_autoban"),
    ]
    assert OLD["chain", "banned"] == '\tchain banned {\n\t\tcounter name "banned" drop\n\t}'
    assert OLD["counter", "trusted"] == "\tcounter trusted {\n\t}"
    assert OLD["map", "services"].endswith("4190 : goto dovecot_private }\n\t}")


def test_nothing_of_a_listing_is_lost():
    assert "table inet mailfw {\n" + "\n\n".join(OLD.values()) + "\n}\n" == LISTING


@pytest.mark.parametrize(
    "listing", ["", "table inet mailfw {\n}\n", "table inet mailfw {\n\tchain cut {\n\t\taccept\n"]
)
def test_listing_without_objects(listing):
    assert ruleset._objects(listing) == {}


def test_empty_chain_is_an_object():
    assert ruleset._objects("table inet mailfw {\n\tchain a {\n\t}\n\n\tchain b {\n\t\taccept\n\t}\n}\n") == {
        ("chain", "a"): "\tchain a {\n\t}",
        ("chain", "b"): "\tchain b {\n\t\taccept\n\t}",
    }


def test_what_comes_from_the_files_alone_is_static():
    assert [name for kind, name in OLD if ruleset._is_static((kind, name), OLD)] == [
        "trusted_networks_ipv4",
        "services",
    ]


def test_equal_rulesets_do_not_differ():
    assert ruleset.difference(OLD, dict(OLD)) == ""
    assert ruleset.difference(OLD, dict(reversed(OLD.items()))) == ""
    assert ruleset.difference({}, {}) == ""


def test_difference_is_a_diff():
    new = changed(network=("10.0.0.0/8, ", ""), rule=("\t\tjump guarded\n", ""))
    diff = ruleset.difference(OLD, new).splitlines()
    assert diff[:2] == ["--- loaded", "+++ wanted"]
    assert [line for line in diff[2:] if line[0] in "+-"] == [
        "-\t\telements = { 10.0.0.0/8, 192.0.2.0/24 }",
        "+\t\telements = { 192.0.2.0/24 }",
        "-\t\tjump guarded",
    ]


def test_difference_of_what_is_only_on_one_side():
    new = dict(OLD)
    gone = new.pop(("chain", "dovecot_autoban")).splitlines()
    assert [line for line in ruleset.difference(OLD, new).splitlines()[2:] if line[0] in "+-"] == [
        f"-{line}" for line in gone
    ]
    assert [line for line in ruleset.difference(new, OLD).splitlines()[2:] if line[0] in "+-"] == [
        f"+{line}" for line in gone
    ]
    first = [line for line in ruleset.difference({}, OLD).splitlines()[2:] if line[0] in "+-"]
    assert first == ["+" + line for text in OLD.values() for line in text.splitlines()]


@given(st.sets(st.sampled_from(list(OLD))), st.sets(st.sampled_from(list(OLD))))
def test_difference_is_empty_only_for_equal_rulesets(old, new):
    diff = ruleset.difference({key: OLD[key] for key in old}, {key: OLD[key] for key in new})
    assert (diff == "") == (old == new)


def test_first_load_is_the_files_alone():
    assert ruleset.transaction({}, OLD, "SCRIPT", "") == "SCRIPT"


def test_transaction_empties_what_the_files_fill():
    """Chains, verdict map and interval sets; meters too. Trust, and what else is dynamic, stays."""
    assert transaction(changed(rule=("\t\tjump guarded\n", ""))) == [
        "flush chain inet mailfw input",
        "flush chain inet mailfw banned",
        "flush chain inet mailfw dovecot_autoban",
        "flush set inet mailfw rate_dovecot_ipv4",
        "flush set inet mailfw trusted_networks_ipv4",
        "flush map inet mailfw services",
        "SCRIPT",
        "CARRIED",
    ]


def test_transaction_deletes_what_is_gone_users_first():
    """A chain names sets, maps and counters, so it goes before them; all are flushed by then."""
    lines = transaction({("chain", "input"): OLD["chain", "input"]})
    deletions = [line for line in lines if line.startswith("delete")]
    assert deletions == [
        "delete chain inet mailfw banned",
        "delete chain inet mailfw dovecot_autoban",
        "delete map inet mailfw services",
        "delete set inet mailfw trusted_ipv4",
        "delete set inet mailfw rate_dovecot_ipv4",
        "delete set inet mailfw trusted_networks_ipv4",
        "delete counter inet mailfw trusted",
    ]
    assert lines.index("flush map inet mailfw services") < lines.index(deletions[0])
    assert lines[-2:] == ["SCRIPT", "CARRIED"]
    assert lines.index(deletions[-1]) == len(lines) - 3


@pytest.mark.parametrize(
    ("change", "deleted"),
    [
        (("timeout 5h", "timeout 6h"), "set inet mailfw trusted_ipv4"),
        (("size 2000000", "size 1000000"), "set inet mailfw trusted_ipv4"),
        (("timeout 2m", "timeout 3m"), "set inet mailfw rate_dovecot_ipv4"),
        (("priority filter - 10", "priority filter - 20"), "chain inet mailfw input"),
        (("policy accept", "policy drop"), "chain inet mailfw input"),
    ],
)
def test_what_cannot_be_changed_in_place_is_made_anew(change, deleted):
    lines = transaction(changed(one=change))
    assert [line for line in lines if line.startswith("delete")] == [f"delete {deleted}"]


@pytest.mark.parametrize(
    "change",
    [
        ("10.0.0.0/8, ", ""),
        ("\t\telements = { 10.0.0.0/8, 192.0.2.0/24 }\n", ""),
        ("143 : goto dovecot_autoban,\n\t\t\t\t", ""),
        ("192.0.2.1 . 143 timeout 1d,\n\t\t\t\t", ""),
        ("\t\tjump guarded\n", ""),
        ('iif "lo" accept', 'iif "eth0" accept'),
    ],
)
def test_elements_and_rules_are_changed_in_place(change):
    assert not [line for line in transaction(changed(one=change)) if line.startswith("delete")]
    assert ruleset.remade(OLD, changed(one=change)) == []


def test_sets_of_elements_worth_keeping_are_carried_over():
    assert ruleset.remade(OLD, changed(timeout=("timeout 5h", "timeout 6h"))) == ["trusted_ipv4"]
    assert ruleset.remade(OLD, changed(meter=("timeout 2m", "timeout 3m"))) == []
    assert ruleset.remade(OLD, changed(static=("flags interval", "flags constant,interval"))) == []
    assert ruleset.remade(OLD, {}) == []
    assert ruleset.remade(OLD, OLD) == []
    assert ruleset.remade({}, OLD) == []


def test_meters_are_those_that_the_rules_have(root):
    """Elements of a meter keep the rate they were made with, so it is emptied; what is lasting must not be."""
    sets = Rules(settings.resolve({"autoban": {"networks": {}}}), root).objects["set"]
    dynamic = {name for name, body in sets.items() if "dynamic" in body}
    meters = {name for name in dynamic if name.startswith(ruleset._METERS)}
    limited = set(re.findall(r"update @(\w+) \{[^}]*limit rate", Rules(settings.resolve({}), root).text))
    assert limited <= meters
    assert {name.rsplit("_", 1)[0] for name in dynamic - meters} == {
        "trusted",
        "blocked",
        "banned_postfix",
        "banned_dovecot",
        "banned_networks_postfix",
        "banned_networks_dovecot",
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5h", 18000),
        ("1d", 86400),
        ("23h32m47s", 84767),
        ("23h32m47s316ms", 84767),
        ("1d1h1m1s", 90061),
        ("366d", 31622400),
        ("45ms", 0),
        ("1m45ms", 60),
        ("1s500ms", 1),
    ],
)
def test_seconds_of_what_nft_prints(text, seconds):
    assert ruleset._seconds(text) == seconds


@given(st.integers(1, parse.LONGEST), st.integers(0, 999))
def test_seconds_of_any_timeout(seconds, milliseconds):
    text = parse.duration_text(seconds)
    assert ruleset._seconds(text) == seconds
    assert ruleset._seconds(f"{text}{milliseconds}ms") == seconds


def test_appliers_take_turns(tmp_path):
    path = str(tmp_path / "run" / "apply.lock")
    with ruleset.turn(path), open(path, encoding="ascii") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(path, encoding="ascii") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_turn_ends_when_an_applier_fails(tmp_path):
    path = str(tmp_path / "apply.lock")
    with pytest.raises(KeyError), ruleset.turn(path):
        raise KeyError
    with open(path, encoding="ascii") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
