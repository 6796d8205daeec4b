import contextlib
import fcntl
import os
import re
import time
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import nft, parse, rules, ruleset, settings, snapshot, sockets
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
    assert [line for line in diff if line[0] in "+-"] == [
        "--- loaded set trusted_networks_ipv4",
        "+++ wanted set trusted_networks_ipv4",
        "-\t\telements = { 10.0.0.0/8, 192.0.2.0/24 }",
        "+\t\telements = { 192.0.2.0/24 }",
        "--- loaded chain dovecot_autoban",
        "+++ wanted chain dovecot_autoban",
        "-\t\tjump guarded",
    ]
    assert ruleset.altered("\n".join(diff)) == ["set trusted_networks_ipv4", "chain dovecot_autoban"]


def changes(diff):
    """Return the lines of a diff that are on one side only."""
    return [line for line in diff.splitlines() if line[0] in "+-" and not line.startswith(("---", "+++"))]


def test_difference_of_what_is_only_on_one_side():
    new = dict(OLD)
    gone = new.pop(("chain", "dovecot_autoban")).splitlines()
    assert changes(ruleset.difference(OLD, new)) == [f"-{line}" for line in gone]
    assert changes(ruleset.difference(new, OLD)) == [f"+{line}" for line in gone]
    first = ruleset.difference({}, OLD)
    assert changes(first) == ["+" + line for text in OLD.values() for line in text.splitlines()]
    assert ruleset.altered(first) == [" ".join(key) for key in OLD]


@given(st.sets(st.sampled_from(list(OLD))), st.sets(st.sampled_from(list(OLD))))
def test_difference_is_empty_only_for_equal_rulesets(old, new):
    diff = ruleset.difference({key: OLD[key] for key in old}, {key: OLD[key] for key in new})
    assert (diff == "") == (old == new)
    assert set(ruleset.altered(diff)) == {" ".join(key) for key in old ^ new}


def test_first_load_is_the_files_and_what_is_carried():
    assert ruleset.transaction({}, OLD, "SCRIPT", "CARRIED") == (
        "table inet mailfw\ndelete table inet mailfw\nSCRIPT\nCARRIED"
    )


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


def test_sizes_are_those_of_sets_that_rules_and_logins_add_to():
    assert ruleset.sizes(OLD) == {"trusted_ipv4": 2_000_000, "rate_dovecot_ipv4": 65536}
    assert ruleset.sizes({}) == {}


def test_sizes_have_a_key_in_the_pillar(root):
    """What shows in the status can be changed."""
    sets = Rules(settings.resolve({"enforce": False, "autoban": {"networks": {}}}), root).objects["set"]
    found = ruleset.sizes({("set", name): f"\tset {name} {{\n{body}\t}}" for name, body in sets.items()})
    assert {rules.size_key(name) for name in found} == set(settings.SCHEMA["sizes"])
    assert sets.keys() - found.keys() == {
        "break_glass",
        *(f"{kind}_{family}" for kind in ("older", *NETWORKS) for family in settings.FAMILIES),
    }


NETWORKS = ("trusted_networks", "blocked_networks", "exempt_networks")


def test_elements_are_restored_to_the_sets_that_there_are(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000)
    kept = {
        "trusted_ipv4": [
            snapshot.Element("192.0.2.1 . 143", 86400, 5000),
            snapshot.Element("192.0.2.2 . 143", None, 1000 + 6 * 3600),
            snapshot.Element("192.0.2.3 . 143", 60, 999),
        ],
        "banned_dovecot_ipv4": [snapshot.Element("192.0.2.4", None, 5000)],
        "rate_dovecot_ipv4": [snapshot.Element("192.0.2.5", None, 5000)],
    }
    assert ruleset.restored(kept, OLD) == (
        "add element inet mailfw trusted_ipv4 "
        "{ 192.0.2.1 . 143 timeout 86400s expires 4000s, 192.0.2.2 . 143 timeout 18000s expires 18000s }\n"
    )
    assert ruleset.restored(kept, {}) == ""


@pytest.mark.parametrize(
    ("before", "after", "again"),
    [
        (128, 64, True),
        (64, 56, True),
        (64, 64, False),
        (64, 128, False),  # There the addresses behind the /64s are not known.
    ],
)
def test_sets_whose_sources_have_a_shorter_prefix_are_filled_again(root, before, after, again):
    def rendered(prefix):
        pillar = {"trusted": {"ipv6_prefix": prefix}, "autoban": {"ipv6_prefix": prefix, "networks": {}}}
        objects = Rules(settings.resolve(pillar), root).objects
        return {(kind, name): text for kind, named in objects.items() for name, text in named.items()}

    old, new = rendered(before), rendered(after)
    names = {"trusted_ipv6", "blocked_ipv6", "banned_dovecot_ipv6", "banned_postfix_ipv6"}
    assert set(ruleset.remade(old, new)) == (names if again else set())
    flushed = {line for line in ruleset.transaction(old, new, "", "").splitlines() if line.startswith("flush set")}
    assert {f"flush set inet mailfw {name}" for name in names} <= flushed or not again


def test_elements_are_restored_under_the_prefix_that_rules_look_up(monkeypatch, root):
    """Of those that fall together the one that ends last is left, an operator's without an end before all."""
    monkeypatch.setattr(time, "time", lambda: 1000)
    objects = Rules(settings.resolve({"trusted": {"ipv6_prefix": 56}, "autoban": {"networks": {}}}), root).objects
    new = {(kind, name): text for kind, named in objects.items() for name, text in named.items()}
    kept = {
        "trusted_ipv6": [
            snapshot.Element("2001:db8:0:1:: . 587", 9000, 2000),
            snapshot.Element("2001:db8:0:2::7 . 587", 9000, 3000, "alice"),
            snapshot.Element("2001:db8:0:2:: . 993", 9000, 2500),
            snapshot.Element("2001:db8:0:100:: . 587", 9000, 2600),
        ],
        "blocked_ipv6": [
            snapshot.Element("2001:db8::", None, None, "bob"),
            snapshot.Element("2001:db8::5", 9000, 4000),
        ],
        "banned_networks_dovecot_ipv4": [snapshot.Element("192.0.2.7", 3600, 1500)],
    }
    assert sorted(ruleset.restored(kept, new).splitlines()) == [
        "add element inet mailfw banned_networks_dovecot_ipv4 { 192.0.2.0 timeout 3600s expires 500s }",
        'add element inet mailfw blocked_ipv6 { 2001:db8:: comment "bob" }',
        'add element inet mailfw trusted_ipv6 { 2001:db8:: . 587 timeout 9000s expires 2000s comment "alice", '
        "2001:db8:: . 993 timeout 9000s expires 1500s, 2001:db8:0:100:: . 587 timeout 9000s expires 1600s }",
    ]


@pytest.fixture
def open_connections(monkeypatch):
    """Return a function that says which connections the host has open; ports that were asked for are in ``asked``."""

    def set_connections(found):
        asked = []

        def connections(ports):
            asked.append(list(ports))
            if isinstance(found, Exception):
                raise found
            return [(parse.address(address), client_port, port) for address, client_port, port in found]

        monkeypatch.setattr(sockets, "connections", connections)
        return asked

    return set_connections


COUNTING = {("map", "counting"): "\tmap counting {\n\t\telements = { 143 : goto a_count, 2587 : goto b_count }\n\t}"}


def test_open_connections_to_counted_ports_are_remembered(open_connections):
    asked = open_connections(
        [("192.0.2.1", 40000, 143), ("2001:db8::1", 40001, 2587), ("192.0.2.1", 2, 2587), ("192.0.2.9", 1, 143)]
    )
    assert ruleset.older(COUNTING) == (
        "add element inet mailfw older_ipv4 { 192.0.2.1 . 40000 . 143, 192.0.2.1 . 2 . 2587, 192.0.2.9 . 1 . 143 }\n"
        "add element inet mailfw older_ipv6 { 2001:db8::1 . 40001 . 2587 }\n"
    )
    assert asked == [[143, 2587]]


def test_nothing_is_remembered_when_nothing_is_counted(open_connections):
    asked = open_connections([("192.0.2.1", 40000, 143)])
    assert ruleset.older({("map", "counting"): "\tmap counting {\n\t\ttype inet_service : verdict\n\t}"}) == ""
    assert asked == []


def test_no_open_connections(open_connections):
    open_connections([])
    assert ruleset.older(COUNTING) == ""


def test_sockets_that_cannot_be_listed_are_logged(open_connections, monkeypatch):
    open_connections(sockets.SocketsError("ss: not found"))
    monkeypatch.setattr(ruleset, "log", mock.Mock())
    assert ruleset.older(COUNTING) == ""
    ((text, error), _) = ruleset.log.warning.call_args
    assert text % error == "open connections cannot be listed, so they will be counted as new ones: ss: not found"


def test_no_more_are_remembered_than_fit(open_connections, monkeypatch):
    monkeypatch.setattr(ruleset, "OLDER", 2)
    open_connections([("192.0.2.1", port, 143) for port in (1, 2, 3)])
    assert ruleset.older(COUNTING) == (
        "add element inet mailfw older_ipv4 { 192.0.2.1 . 1 . 143, 192.0.2.1 . 2 . 143 }\n"
    )


@pytest.mark.parametrize("mode", settings.MODES)
def test_counted_ports_are_found_in_the_rules(root, open_connections, mode):
    """As nft lists a map: elements on several lines, the braces at the same places."""
    rendered = Rules(settings.resolve({"protection": {"type": mode}, "services": {"imap": {"port": 2143}}}), root)
    asked = open_connections([])
    counted = rendered.verdicts("counting")
    ruleset.older({("map", "counting"): rendered.objects["map"]["counting"]})
    assert asked == [list(counted)] * bool(counted)


def test_meters_are_those_that_the_rules_have(root):
    """Elements of a meter keep the rate they were made with, so it is emptied; what is lasting must not be."""
    pillar = {"autoban": {"networks": {}}, "enforce": False}
    sets = Rules(settings.resolve(pillar), root).objects["set"]
    dynamic = {name for name, body in sets.items() if "dynamic" in body}
    meters = {name for name in dynamic if name.startswith(ruleset._METERS)}
    texts = [Rules(settings.resolve({**pillar, "enforce": enforce}), root).text for enforce in (True, False)]
    limited = set(re.findall(r"update @(\w+) \{[^}]*limit rate", "\n".join(texts)))
    assert limited == meters
    assert {re.sub("_ipv[46]$", "", name) for name in dynamic - meters} == {
        "break_glass",
        "older",
        "observed",
        "trusted",
        "blocked",
        "banned_postfix",
        "banned_dovecot",
        "banned_networks_postfix",
        "banned_networks_dovecot",
    }


def test_snapshot_keeps_what_is_lasting(root):
    """Of what rules and logins add, all but meters, what is older than the table, and what is only observed."""
    sets = Rules(settings.resolve({"autoban": {"networks": {}}, "enforce": False}), root).objects["set"]
    kept = {name for name in sets if snapshot.KEPT.fullmatch(name)}
    assert all("dynamic" in sets[name] for name in kept)
    assert {re.sub("_ipv[46]$", "", name) for name in kept} == {
        "trusted",
        "blocked",
        *(f"{kind}_{role}" for kind in ("banned", "banned_networks") for role in settings.ROLES),
    }


@pytest.mark.parametrize(("timeout", "seconds"), [("5h", 18000), ("23h32m47s", 84767), ("366d", 31622400), ("1s", 1)])
def test_default_timeout_of_a_set(timeout, seconds):
    assert ruleset._default_timeout(f"\tset a {{\n\t\tflags dynamic,timeout\n\t\ttimeout {timeout}\n\t}}") == seconds


def test_set_without_a_default_timeout():
    text = "\tset a {\n\t\tflags dynamic,timeout\n\t\telements = { 192.0.2.1 timeout 1h }\n\t}"
    assert ruleset._default_timeout(text) is None


@given(st.integers(1, parse.LONGEST))
def test_default_timeout_of_any_length(seconds):
    """nft lists timeouts as it takes them."""
    assert ruleset._default_timeout(f"\tset a {{\n\t\ttimeout {parse.duration_text(seconds)}\n\t}}") == seconds


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


FILES = {"base.nft": "table inet mailfw { }\n", "dovecot.nft": "# dovecot\n"}


def test_files_are_joined_in_the_order_of_include():
    assert ruleset.joined({"postfix.nft": "c", "base.nft": "a", "dovecot.nft": "b"}) == "a\nb\nc"
    assert ruleset.joined({}) == ""


def test_files_on_disk(tmp_path):
    assert ruleset.present(tmp_path / "rules") == {}
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "base.nft.old").write_text("not a rule file")
    assert ruleset.present(tmp_path) == FILES
    assert ruleset.stale_files(FILES, tmp_path) == []
    assert ruleset.stale_files({"base.nft": "other", "postfix.nft": ""}, tmp_path) == [
        "base.nft",
        "dovecot.nft",
        "postfix.nft",
    ]


DONE = ruleset.Applied("diff", "0123456789abcdef" * 4, "00000000000000ff")


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A kernel that takes every script, or none when ``refuses`` is set; ``taken`` has the scripts."""

    class Kernel:
        def __init__(self):
            self.taken, self.refuses = [], False

        def apply(self, script, new):
            if self.refuses:
                raise nft.NftError("syntax error")
            self.taken.append(script)
            return DONE

    made = Kernel()
    monkeypatch.setattr(ruleset, "_apply", made.apply)
    monkeypatch.setattr(ruleset, "_known", lambda script: {})
    monkeypatch.setattr(ruleset, "turn", contextlib.nullcontext)
    monkeypatch.setattr(ruleset, "LOADED", tmp_path / "run" / "loaded")
    monkeypatch.setattr(ruleset, "UNLOADED", tmp_path / "run" / "unloaded")
    return made


def test_install_writes_what_the_kernel_has_taken(kernel, tmp_path):
    rules_directory = tmp_path / "nftables.d" / "mailfw"
    assert ruleset.install(FILES, rules_directory) == ("diff", ["base.nft", "dovecot.nft"])
    assert ruleset.present(rules_directory) == FILES
    assert kernel.taken == [ruleset.joined(FILES)]
    fewer = {"base.nft": "other\n"}
    assert ruleset.install(fewer, rules_directory) == ("diff", ["base.nft", "dovecot.nft"])
    assert ruleset.present(rules_directory) == fewer
    assert [path.name for path in rules_directory.parent.iterdir()] == ["mailfw"]
    assert ruleset.install(fewer, rules_directory) == ("diff", [])


def test_install_leaves_the_files_that_the_kernel_has(kernel, tmp_path):
    rules_directory = tmp_path / "nftables.d" / "mailfw"
    ruleset.install(FILES, rules_directory)
    kernel.refuses = True
    with pytest.raises(nft.NftError):
        ruleset.install({"base.nft": "wrong"}, rules_directory)
    assert ruleset.present(rules_directory) == FILES
    assert [path.name for path in rules_directory.parent.iterdir()] == ["mailfw"]
    assert [path.name for path in ruleset.LOADED.parent.iterdir()] == ["loaded"]


def test_install_clears_up_after_an_interrupted_one(kernel, tmp_path):
    left = tmp_path / "mailfw.new"
    left.mkdir()
    (left / "postfix.nft").write_text("half")
    ruleset.install(FILES, tmp_path / "mailfw")
    assert ruleset.present(tmp_path / "mailfw") == FILES
    assert not left.exists()


def test_files_are_readable_by_all(kernel, tmp_path):
    ruleset.install(FILES, tmp_path / "mailfw")
    assert (tmp_path / "mailfw").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "mailfw").iterdir()} == {0o644}


def test_without_a_record_no_rules_are_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(ruleset, "LOADED", tmp_path / "loaded")
    assert ruleset.loaded() == {}


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 5])
def test_a_record_of_no_use_is_of_nothing_that_is_loaded(tmp_path, monkeypatch, text):
    monkeypatch.setattr(ruleset, "LOADED", tmp_path / "loaded")
    monkeypatch.setattr(ruleset, "wanted", lambda script: {("chain", "new"): script})
    (tmp_path / "loaded").write_bytes(text.encode("latin-1"))
    assert ruleset.loaded()["fingerprint"] == "0" * 64
    assert ruleset.loaded()["static"] == []
    assert ruleset._known("SCRIPT") == {("chain", "new"): "SCRIPT"}


def test_record_tells_what_the_kernel_makes_of_the_same_script(tmp_path, monkeypatch):
    monkeypatch.setattr(ruleset, "LOADED", tmp_path / "loaded")
    monkeypatch.setattr(ruleset, "UNLOADED", tmp_path / "unloaded")
    monkeypatch.setattr(ruleset, "wanted", lambda script: {("chain", "new"): script})
    ruleset._record("SCRIPT", OLD, DONE)
    assert ruleset._known("SCRIPT") == OLD
    assert ruleset._known("OTHER") == {("chain", "new"): "OTHER"}
    assert ruleset.loaded()["static"] == ["services", "trusted_networks_ipv4"]
    assert (ruleset.loaded()["fingerprint"], ruleset.loaded()["table"]) == DONE[1:]
    monkeypatch.setattr(os, "uname", lambda: mock.Mock(release="another kernel"))
    assert ruleset._known("SCRIPT") == {("chain", "new"): "SCRIPT"}


@pytest.mark.parametrize(
    ("message", "full"),
    [
        ("Error: Could not process rule: Too many open files in system\nadd element inet mailfw a { 1 }", True),
        ("Error: Could not process rule: Too many open files", False),
        ("Error: Could not process rule: No such file or directory", False),
        ("Error: syntax error, unexpected newline", False),
        ("", False),
    ],
)
def test_error_of_a_full_set_says_what_to_change(message, full):
    error = nft.NftError(message)
    assert error.full == full
    assert str(error).startswith(message)
    assert ("see mailfw:sizes" in str(error)) == full
