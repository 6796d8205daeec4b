"""Who has logged in from where: what is kept of it, for how long, and under which keys it is found again."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import parse, people

OLD, NEW, OWN = "old " * 8, "new " * 8, "own " * 8
HOME, CAFE = parse.address("192.0.2.1"), parse.address("2001:db8::")
DAY = 86400
NOW = time.time()
NOWHERE = Path("/nonexistent")


def settings(how="hash", keys=(OLD,), period=DAY):
    return {
        "trusted": {"period": period, "users": how, "ipv6_prefix": 64},
        "fleet": {"keys": keys},
        "host": {"report_secret": OWN},
    }


@pytest.fixture
def start(tmp_path):
    """Start with what is on disk, as the next agent does, under some pillar."""
    return lambda **pillar: people.People(lambda: settings(**pillar), tmp_path)


def log_in(known, user, address, at=NOW):
    known.note(known.key(user), address, at)


def on_disk(tmp_path):
    return "".join(path.read_text() for path in tmp_path.iterdir())


# Keys

users = st.text(min_size=1, max_size=300)


@given(users, st.sampled_from(["hash", "plain"]))
def test_every_user_has_a_key_under_which_it_is_found(user, how):
    known = people.People(lambda: settings(how), NOWHERE)
    assert known.key(user) in known.keys(user)
    assert all(map(parse.user_key, known.keys(user)))


@given(users, users)
def test_no_name_is_taken_for_another_or_for_a_hash(one, other):
    assert (set(people.every_key(one, [OLD])) & set(people.every_key(other, [OLD])) != set()) == (
        people.fold(one) == people.fold(other)
    )


def test_a_user_that_is_called_like_a_hash_is_not_that_user():
    victim = people.hashed("alice", OLD)
    assert victim not in people.every_key(victim, [OLD, NEW])


@pytest.mark.parametrize("typed", ["Alice@Example.org", "ALICE@EXAMPLE.ORG", "alice@example.org"])
def test_upper_and_lower_case_are_one_user(typed):
    """As Dovecot has it by default, which leaves what is beyond ASCII as it is."""
    assert people.every_key(typed, [OLD]) == people.every_key("alice@example.org", [OLD])
    assert people.hashed("\u00c4", OLD) != people.hashed("\u00e4", OLD)


def test_a_plain_key_says_the_same_user_as_its_hashes():
    assert people.hashes(people.plain("J\u00fcrgen, the 1st%"), [OLD, NEW]) == [
        people.hashed("J\u00fcrgen, the 1st%", one) for one in (OLD, NEW)
    ]
    assert people.hashes("a1" * 8, [OLD, NEW]) == ["a1" * 8]


@pytest.mark.parametrize("user", ["alice", "-x", "a b", "J\u00fcrgen", "x" * 256, "10", "$(id)", "a'b"])
def test_names_that_an_operator_may_give(user):
    assert people.name(user) == user


def test_a_name_of_digits_is_a_name():
    assert people.name(1001) == "1001"


STRANGE = ["", " ", "*", "a*", "a?b", "a\nb", "a\0b", "\x1b[1m", "x" * 257, "\u00fc" * 129, "\ud800"]


@pytest.mark.parametrize("user", [*STRANGE, None, True, 1.5, ["alice"], {"a": "b"}, b"alice"], ids=repr)
def test_names_that_no_operator_can_mean(user):
    with pytest.raises(ValueError, match="expected a user's name as Dovecot logs it"):
        people.name(user)


# What is kept


@pytest.mark.parametrize("how", ["hash", "plain"])
def test_logins_outlive_the_agent(start, tmp_path, how):
    known = start(how=how)
    log_in(known, "alice", HOME, NOW - 60)
    log_in(known, "alice", CAFE, NOW - 3600)
    log_in(known, "bob", HOME)
    again = start(how=how)
    assert again.places("alice") == {HOME: pytest.approx(NOW - 60, abs=0.01), CAFE: pytest.approx(NOW - 3600, abs=0.01)}
    assert len(again) == 2
    assert ("alice" in on_disk(tmp_path)) == (how == "plain")
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())


def test_off_keeps_nothing_and_forgets_what_was_kept(start, tmp_path):
    log_in(start(), "alice", HOME)
    known = start(how="off")
    log_in(known, "bob", HOME)
    assert (len(known), known.key("bob"), known.places("alice"), on_disk(tmp_path)) == (0, "", {}, "")


def test_refused_logins_are_kept_as_long_as_others_and_by_the_same_keys(start):
    known = start()
    known.refuse("Alice", HOME, NOW, "it is Monday")
    known.refuse("alice", HOME, NOW + 1, "it is Tuesday")
    known.refuse("", CAFE, NOW, "nobody by name")
    assert known.refusals("ALICE") == {HOME: (NOW + 1, "it is Tuesday")}
    known.tidy(NOW + people.TIDY + 1)
    assert known.refusals("alice")
    assert known.refusals("bob") == known.refusals("") == {}
    log_in(known, "alice", HOME, NOW + 2)
    assert known.refusals("alice") == {}
    known.refuse("alice", HOME, NOW + 3, "it is Wednesday")
    known.tidy(NOW + DAY + 10)
    assert known.refusals("alice") == {}


def test_refused_logins_that_are_remembered_are_bounded(start, monkeypatch):
    monkeypatch.setattr(people, "MOST_REFUSED", 3)
    known = start()
    addresses = [HOME + n for n in range(people.MOST_REFUSED_OF_ONE + 5)]
    for address in addresses:
        known.refuse("alice", address, NOW, "many")
    assert list(known.refusals("alice")) == addresses[5:]
    for user in ("bob", "carol", "dave"):
        known.refuse(user, HOME, NOW, "many")
    assert [len(known.refusals(user)) for user in ("alice", "bob", "dave")] == [0, 1, 1]


def test_nobody_by_name_is_not_kept(start):
    known = start()
    log_in(known, "", HOME)
    assert len(known) == 0


def test_a_login_is_kept_for_the_period_and_at_least_a_day(start):
    for period, kept in ((3600, {HOME}), (3 * DAY, {HOME, CAFE})):
        known = start(period=period)
        log_in(known, "alice", HOME, NOW - DAY / 2)
        log_in(known, "alice", CAFE, NOW - 2 * DAY)
        known.tidy(NOW + people.TIDY + 1)
        assert start(period=period).places("alice").keys() <= kept
        assert HOME in start(period=period).places("alice")
    known.tidy(NOW + 4 * DAY)
    assert len(known) == 0


def test_what_is_over_leaves_the_disk(start, tmp_path):
    known = start()
    log_in(known, "alice", HOME)
    known.tidy(NOW + 2 * DAY)
    assert on_disk(tmp_path) == ""


def test_the_file_does_not_grow_with_every_login(start, tmp_path):
    """Once in a tenth of the period, for each user and address, at most."""
    known = start()
    for seconds in range(0, DAY, 60):
        log_in(known, "alice", HOME, NOW + seconds)
    assert 10 <= len(on_disk(tmp_path).splitlines()) <= 12
    assert known.places("alice") == {HOME: NOW + DAY - 60}


def test_an_earlier_login_that_is_heard_of_later_changes_nothing(start):
    known = start()
    log_in(known, "alice", HOME, NOW)
    log_in(known, "alice", HOME, NOW - 60)
    assert known.places("alice") == {HOME: NOW}


def test_one_user_pushes_out_no_other(start, monkeypatch):
    monkeypatch.setattr(people, "MOST", 20)
    monkeypatch.setattr(people, "MOST_OF_ONE", 10)
    known = start()
    log_in(known, "alice", HOME)
    addresses = [parse.address(f"198.51.100.{n}") for n in range(40)]
    for address in addresses:
        log_in(known, "mallory", address)
    assert known.places("alice") == {HOME: NOW}
    assert list(known.places("mallory")) == addresses[-10:]


def test_what_is_too_much_pushes_out_who_has_been_away_for_longest(start, monkeypatch):
    monkeypatch.setattr(people, "MOST", 20)
    known = start()
    log_in(known, "alice", HOME)
    log_in(known, "bob", HOME)
    log_in(known, "alice", CAFE)
    for number in range(18):
        log_in(known, f"user{number}", HOME)
    assert not known.places("bob")
    assert known.places("alice").keys() == {HOME, CAFE}
    for number in range(500):
        log_in(known, f"user{number}", HOME)
    assert len(known) == 20


@pytest.mark.parametrize("rubbish", [b"\xff\n", b"192.0.2.9,", b"x,y 1\n", b"192.0.2.9,user:a 1 2\n", b"192.0.2.9 5\n"])
def test_a_damaged_file_is_read_as_far_as_it_makes_sense(start, tmp_path, rubbish):
    (tmp_path / "users").write_bytes(rubbish + f"\n{HOME},user:alice {NOW}\n".encode())
    assert start(how="plain").places("alice").keys() == {HOME}


# Another key, other pillar


def test_a_new_key_of_the_fleet_still_finds_what_was_kept_under_the_old_one(start):
    log_in(start(keys=[OLD]), "alice", HOME)
    known = start(keys=[NEW, OLD])
    log_in(known, "alice", CAFE)
    assert known.places("alice").keys() == {HOME, CAFE}
    assert known.others("alice", {HOME: 0.0}) == set()


@pytest.mark.parametrize(("before", "after"), [("hash", "plain"), ("plain", "hash")])
def test_users_are_found_when_pillar_wants_them_kept_otherwise(start, tmp_path, before, after):
    log_in(start(how=before), "alice", HOME)
    known = start(how=after)
    assert known.places("alice").keys() == {HOME}
    assert "alice" not in on_disk(tmp_path)


def test_without_a_key_of_the_fleet_the_hosts_own_secret_serves(start, tmp_path):
    log_in(start(keys=[]), "alice", HOME)
    assert people.hashed("alice", OWN) in on_disk(tmp_path)
    assert start(keys=[NEW]).places("alice").keys() == {HOME}


@pytest.mark.parametrize("told", [people.plain("alice"), people.hashed("alice", OLD), people.hashed("alice", NEW)])
def test_what_other_hosts_tell_is_kept_as_this_hosts_pillar_says(start, tmp_path, told):
    known = start(keys=[NEW, OLD])
    ((key, at),) = known.admitted({told: NOW}).items()
    known.note(key, HOME, at)
    assert known.places("ALICE") == {HOME: NOW}
    assert "alice" not in on_disk(tmp_path)


# Others, and revocation


def test_others_are_those_who_logged_in_since(start):
    known = start()
    log_in(known, "alice", HOME)
    log_in(known, "alice", CAFE)
    log_in(known, "bob", HOME, NOW - 100)
    assert known.others("alice", {HOME: NOW - 101, CAFE: 0.0}) == {HOME}
    assert known.others("alice", {HOME: NOW - 99, CAFE: 0.0}) == set()
    assert known.others("bob", {HOME: 0.0}) == {HOME}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("how", ["hash", "plain", "off"])
def test_a_revoked_users_earlier_logins_are_not_admitted(start, tmp_path, how, restarted):
    known = start(how=how, keys=[NEW, OLD])
    log_in(known, "alice", HOME)
    known.revoke("Alice", [HOME], NOW)
    if restarted:
        known = start(how=how, keys=[NEW, OLD])
    assert known.places("alice") == {}
    for key in people.every_key("alice", [NEW, OLD, OWN]):
        assert known.admitted({key: NOW - 0.01}) == {}
        assert list(known.admitted({key: NOW + 1}).values()) == [NOW + 1]
    assert known.admitted({people.plain("bob"): NOW - 60})
    assert "user:alice" not in (tmp_path / "revoked").read_text()


def test_a_revocation_is_forgotten_when_no_older_login_is_told_of(start):
    known = start()
    known.revoke("alice", [], NOW)
    known.tidy(NOW + people.LONGEST_REVOKED + 1)
    assert known.admitted({people.plain("alice"): NOW - 1})


@pytest.mark.parametrize("period", [60, DAY, 30 * DAY])
def test_a_login_is_news_once_in_a_tenth_of_the_period(period):
    who, told, last = (HOME, "a1" * 8), 0, 0.0
    for step in range(1000):
        at = NOW + step * period / 1000
        told += people.is_renewed(who, last, at, period)
        last = at
    assert 10 <= told <= 12


def test_logins_are_not_all_news_at_the_same_moment():
    pairs = [(parse.address(f"192.0.2.{n}"), "") for n in range(100)]
    renewed = sum(people.is_renewed(pair, NOW, NOW + DAY / 100, DAY) for pair in pairs)
    assert 2 <= renewed <= 30
