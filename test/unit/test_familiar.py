import ipaddress
import time

import pytest

from mailfwlib import familiar, parse
from mailfwlib.familiar import Familiar, Refusal, Watch

ALICE, BOB = parse.address("192.0.2.1"), parse.address("2001:db8:1:2::")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "familiar"


def test_logins_are_remembered_for_a_month_by_address_and_prefix(path):
    now = time.time()
    path.write_text(f"192.0.2.8 {now - familiar.PERIOD - 60}\n192.0.2.9 {now - familiar.PERIOD + 60}\n192.0.2.7 x\n")
    one = Familiar(path)
    one.note(ALICE, now)
    one.note(parse.address("2001:db8:1:2:3:4:5:6"), now)
    one.note(parse.address("2001:db8:1:2::7"), now)
    one.save()
    again = Familiar(path)
    assert len(again) == len(one) == 3
    assert again.last(BOB) == pytest.approx(now, abs=0.001)
    assert path.read_text().count("2001:db8:1:2::") == 1


def test_a_login_soon_after_the_last_is_no_news(path):
    one, now = Familiar(path), time.time()
    for at in (now, now + 1, now + familiar.NEWS - 1, now + familiar.NEWS, now + familiar.NEWS + 1):
        one.note(ALICE, at)
        one.save()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == f"192.0.2.1 {now:.3f}\n192.0.2.1 {now + familiar.NEWS:.3f}\n"


def test_who_is_forgotten_stays_so(path):
    one = Familiar(path)
    for address in (ALICE, BOB):
        one.note(address, time.time())
    one.save()
    one.forget(ALICE)
    one.save()
    assert len(Familiar(path)) == 1
    one.note(ALICE, time.time())
    one.forget(ALICE)
    one.save()
    assert len(Familiar(path)) == 1


def test_memory_and_file_are_bounded(path, monkeypatch):
    monkeypatch.setattr(familiar, "MOST", 10)
    one, now = Familiar(path), time.time()
    for number in range(100):
        one.note(ipaddress.ip_address(number + 1), now + number)
        one.save()
        assert len(one) <= 10
        assert len(path.read_text().splitlines()) <= 20
    assert one.last(ipaddress.ip_address(91)) == now + 90
    assert one.last(ipaddress.ip_address(90)) == 0.0


PREFIXES = [
    ("192.0.2.1", "192.0.2.1", 32, True),
    ("192.0.2.1", "192.0.2.2", 32, False),
    ("192.0.2.1", "192.0.2.0", 24, True),
    ("192.0.2.1", "192.0.3.0", 24, False),
    ("2001:db8::7", "2001:db8::", 64, True),
    ("2001:db8::7", "2001:db8:0:1::", 64, False),
    ("2001:db8::7", "2001:db8::9", 128, True),
    ("2001:db8:0:ff::7", "2001:db8::", 56, True),
    ("2001:db8:0:100::7", "2001:db8::", 56, False),
    ("192.0.2.1", "2001:db8::", 56, False),
    ("::192.0.2.1", "192.0.2.0", 24, False),
]


@pytest.mark.parametrize(("seen", "element", "prefix", "found"), PREFIXES)
def test_elements_are_about_who_is_in_their_prefix(path, seen, element, prefix, found):
    one = Familiar(path)
    one.note(parse.address(seen), time.time())
    key = parse.address(element)
    assert bool(list(one.among([key.packed], f"ipv{key.version}", prefix))) is found
    assert list(one.among([], f"ipv{key.version}", prefix)) == []


def test_a_refusal_counts_when_it_lasts(path):
    """A client whose login is under way may be refused at one look."""
    people = Familiar(path)
    people.note(ALICE, 0.0)
    watch, banned = Watch(people), Refusal(ALICE, "banned", "dovecot")
    too, blocked = Refusal(ALICE, "banned", "postfix"), Refusal(BOB, "blocked", "everywhere")
    counts, logged = [], []
    for found in (
        {banned},
        set(),
        {banned},
        {banned, blocked},
        {banned, too, blocked},
        {too},
        {too},
        set(),
        {too},
        {too},
    ):
        logged += watch.look(found, True, 3 * 86400.0)
        counts.append((len(watch.addresses("banned")), len(watch.addresses("blocked")), *watch.times.values()))
    assert counts == [
        (0, 0, 0, 0, 0),
        (0, 0, 0, 0, 0),
        (0, 0, 0, 0, 0),
        (1, 0, 1, 0, 0),
        (1, 1, 1, 1, 0),
        (1, 0, 1, 1, 0),
        (1, 0, 1, 1, 0),
        (0, 0, 1, 1, 0),
        (0, 0, 1, 1, 0),
        (1, 0, 2, 1, 0),
    ]
    assert [line.partition(" is refused")[0] for line in logged] == [
        "familiar address 192.0.2.1",
        "familiar address 2001:db8:1:2::",
    ]
    assert logged[0].endswith("is refused: banned, dovecot; logged in 3.0 days ago")


def test_a_refusal_is_logged_once_a_day(path):
    watch, found = Watch(Familiar(path)), {Refusal(ALICE, "untrusted", "submission")}
    logged = [watch.look(found, False, 1e9 + at) for at in (0, 60, 120, 86000, 86400 + 61, 86400 + 120)]
    assert [len(lines) for lines in logged] == [0, 1, 0, 0, 1, 0]
    assert "would be refused" in logged[1][0]
