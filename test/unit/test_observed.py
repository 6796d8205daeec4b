"""The tally of who would have been refused: what is counted, kept on disk, dropped and said."""

import contextlib
import ipaddress
import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import netlink, nft, observed, parse, settings
from mailfwlib.familiar import OBSERVED, Familiar
from mailfwlib.listing import Wanted

NOW = 1_700_000_000.0
DEFAULT = settings.resolve({"enforce": False})
HOME, CAFE, NET = "192.0.2.1", "192.0.2.2", "2001:db8:0:1::"


class Kernel:
    """What the look asks of the kernel: the sets' elements, and whether somebody has changed them meanwhile."""

    def __init__(self, **sets):
        self.sets, self.disturbed, self._generation = sets, False, 0

    def generation(self):
        self._generation += self.disturbed
        return self._generation

    def tallies(self, name):
        for (address, port), (ago, packets) in self.sets.get(name, {}).items():
            yield netlink.key(parse.address(address), port), OBSERVED - ago, packets


@pytest.fixture
def path(tmp_path):
    return tmp_path / "observed"


@pytest.fixture
def familiar(tmp_path):
    return Familiar(tmp_path / "familiar")


def counts_of(tally):
    return {(str(observed.address_of(key)), observed.port_of(key)): one for key, one in tally.counts.items()}


def counts(tally):
    return {where: (NOW - one.first, NOW - one.last, one.times) for where, one in counts_of(tally).items()}


def look(tally, now=NOW, disturbed=False, **sets):
    kernel = Kernel(**sets)
    kernel.disturbed = disturbed
    return tally.look(kernel, now)


def test_tries_add_up_over_looks(path):
    tally = observed.Tally(path)
    assert look(tally, observed_ipv4={(HOME, 587): (5, 3)}, observed_ipv6={(NET, 993): (0, 1)}) == {
        "observed_ipv4": 1,
        "observed_ipv6": 1,
    }
    look(tally, NOW + 60, observed_ipv4={(HOME, 587): (2, 7), (CAFE, 587): (1, 1)}, observed_ipv6={(NET, 993): (60, 1)})
    assert counts(tally) == {
        (HOME, 587): (NOW, -58, 7),
        (CAFE, 587): (-59, -59, 1),
        (NET, 993): (0, 0, 1),
    }
    assert (tally.since, tally.until) == (NOW, NOW + 60)


def test_first_time_is_said_only_where_it_is_known(path):
    tally = observed.Tally(path)
    look(tally, observed_ipv4={(HOME, 587): (0, 9), (HOME, 993): (60, 1)})
    look(tally, NOW + 60, observed_ipv4={(CAFE, 587): (10, 9)})
    look(tally, NOW + 60 + 86400, observed_ipv4={(CAFE, 25): (10, 9), (CAFE, 587): (10, 12)})
    assert {where: one.first for where, one in (counts_of(tally)).items()} == {
        (HOME, 587): 0,
        (HOME, 993): NOW - 60,
        (CAFE, 587): NOW + 50,
        (CAFE, 25): 0,
    }
    tally.save()
    assert counts(observed.Tally(path)) == counts(tally)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("packets", [1, 3, 4, 9])
def test_set_that_was_emptied_counts_from_its_beginning(path, packets, restarted):
    tally = observed.Tally(path)
    look(tally, observed_ipv4={(HOME, 587): (0, 3)})
    look(tally, NOW + 60)
    if restarted:
        tally.save()
        tally = observed.Tally(path)
    look(tally, NOW + 120, observed_ipv4={(HOME, 587): (0, packets)})
    assert counts(tally)[HOME, 587] == (NOW, -120, 3 + packets)


def test_what_the_kernel_leaves_out_of_a_disturbed_list_is_not_counted_twice(path):
    tally = observed.Tally(path)
    look(tally, observed_ipv4={(HOME, 587): (0, 3)})
    look(tally, NOW + 60, disturbed=True)
    look(tally, NOW + 120, observed_ipv4={(HOME, 587): (120, 3)})
    assert counts(tally)[HOME, 587] == (NOW, 0, 3)


def test_restart_loses_nothing_and_counts_nothing_twice(path):
    tally = observed.Tally(path)
    look(tally, observed_ipv4={(HOME, 587): (0, 3)})
    tally.save()
    look(tally, NOW + 60, observed_ipv4={(HOME, 587): (0, 5)})  # killed before it was saved
    again = observed.Tally(path)
    look(again, NOW + 120, observed_ipv4={(HOME, 587): (60, 5), (CAFE, 25): (0, 1)})
    assert counts(again) == {(HOME, 587): (NOW, -60, 5), (CAFE, 25): (-120, -120, 1)}
    assert again.since == NOW


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\n",
        b"rubbish\n",
        b"mailfw observed 1 x y z\n",
        b"mailfw observed 1 1 1 1\n",
        b"mailfw observed 1 nan 1 1 0 0 0\n",
        b"mailfw observed 1 1 1 1 0 0 nan\n",
        b"\xff\xfe\n",
        b"mailfw observed 2 1 1 0 0 0 0\n",
    ],
)
def test_file_that_is_none_is_begun_anew(path, damage, monkeypatch):
    monkeypatch.setattr(logging.root.manager, "disable", logging.WARNING)
    path.write_bytes(damage + b"192.0.2.1 587 1 1 1 1\n")
    assert (len(tally := observed.Tally(path)), tally.until) == (0, 0.0)


def test_lines_that_make_no_sense_are_left_out(path):
    lines = [
        "",
        "x",
        "192.0.2.1 587 1 1 1",
        "192.0.2.1 587 inf 1 1 1",
        "a.b 587 1 1 1 1",
        f"{HOME} 587 1 2 3 3",
        "192.0.2.1 5",
    ]
    path.write_text("\n".join([f"mailfw observed 1 {NOW} {NOW} 7 2 {NOW} {NOW}", *lines]))
    tally = observed.Tally(path)
    assert [str(observed.address_of(key)) for key in tally.counts] == [HOME]
    assert (tally.dropped, tally.full) == (7, (2, NOW, NOW))


@given(st.lists(st.tuples(st.ip_addresses(), st.integers(0, 65535), st.integers(1, 2**40))))
def test_what_is_saved_is_read(tmp_path_factory, tries):
    path = tmp_path_factory.mktemp("kept") / "observed"
    tally = observed.Tally(path)
    for address, port, packets in tries:
        mapped = getattr(address, "ipv4_mapped", None) or address
        look(tally, **{f"observed_ipv{mapped.version}": {(str(mapped), port): (3, packets)}})
    tally.until = tally.until or NOW
    tally.save()
    assert counts(observed.Tally(path)) == counts(tally)


def tidy(tally, familiar, now=NOW, pillar=DEFAULT, **levels):
    emptied = []
    tally.tidy(levels, pillar, familiar, emptied.append, now)
    return emptied


def test_nearly_full_set_is_emptied_once_it_was_taken_over(path, familiar):
    pillar = settings.resolve({"enforce": False, "sizes": {"observed": 4}})
    tally = observed.Tally(path)
    several = {(f"192.0.2.{n}", 587): (0, 5) for n in range(3)}
    levels = look(tally, observed_ipv4=several, observed_ipv6={(NET, 993): (0, 1)})
    assert tidy(tally, familiar, pillar=pillar, **levels) == ["observed_ipv4"]
    look(tally, NOW + 1, disturbed=True, observed_ipv4={("192.0.2.0", 587): (0, 6)}, observed_ipv6={(NET, 993): (0, 1)})
    assert counts(tally)["192.0.2.0", 587][2] == 11
    assert counts(tally)[NET, 993][2] == 1
    assert tally.full.looks == 0, "nobody was hidden"


@pytest.mark.parametrize("crash", ["before it", "after it"])
def test_crash_at_the_emptying_of_a_set_loses_nothing_and_counts_nothing_twice(path, familiar, crash):
    pillar = settings.resolve({"enforce": False, "sizes": {"observed": 2}})
    kernel = {"observed_ipv4": {(HOME, 587): (0, 5), (CAFE, 587): (0, 3)}}
    on_disk = []

    def empty(name):
        on_disk.append({where: one.times for where, one in counts_of(observed.Tally(path)).items()})
        if crash == "before it":
            raise nft.NftError("killed")
        kernel[name] = {}

    tally = observed.Tally(path)
    levels = look(tally, **kernel)
    with contextlib.suppress(nft.NftError):
        tally.tidy(levels, pillar, familiar, empty, NOW)
    assert on_disk == [{(HOME, 587): 5, (CAFE, 587): 3}]
    new = 5 if crash == "after it" else 0
    kernel["observed_ipv4"][HOME, 587] = (0, 5)  # the same number, whether or not it was emptied
    again = observed.Tally(path)
    look(again, NOW + 60, **kernel)
    assert counts_of(again)[HOME, 587].times == 5 + new
    assert counts_of(again)[CAFE, 587].times == 3


def test_set_that_cannot_be_put_on_disk_is_not_emptied(path, familiar):
    pillar = settings.resolve({"enforce": False, "sizes": {"observed": 1}})
    tally = observed.Tally(path / "not a directory")
    path.write_text("")
    levels, emptied = look(tally, observed_ipv4={(HOME, 587): (0, 5)}), []
    with pytest.raises(OSError, match="File exists"):
        tally.tidy(levels, pillar, familiar, emptied.append, NOW)
    assert emptied == []


def test_how_often_a_set_was_full_is_kept_and_said(path, familiar):
    pillar = settings.resolve({"enforce": False, "sizes": {"observed": 2}})
    tally = observed.Tally(path)
    assert observed.missing(tally, NOW) == []
    full = {(HOME, 587): (0, 1), (CAFE, 587): (0, 1)}
    for now, found in ((NOW, full), (NOW + 60, {(HOME, 587): (0, 2)}), (NOW + 120, full)):
        tidy(tally, familiar, now, pillar, **look(tally, now, observed_ipv4=found, observed_ipv6={}))
    tally.save()
    again = observed.Tally(path)
    assert again.full == (2, NOW, NOW + 120)
    assert observed.missing(again, NOW + 180) == [
        "a set was full at 2 looks of the agent, first 3m ago, last 1m ago: who was new then may be missing"
    ]
    look(again, NOW + 120 + OBSERVED + 1)
    assert again.full.looks == 0, "other observing"


def test_strangers_are_dropped_first_then_who_tried_the_least(path, familiar, monkeypatch):
    monkeypatch.setattr(observed, "MOST", 4)
    familiar.note(parse.address(CAFE), time.time())
    tally = observed.Tally(path)
    levels = look(tally, observed_ipv4={(f"192.0.2.{n}", 587): (0, n) for n in range(1, 7)})
    assert tidy(tally, familiar, **levels) == ["observed_ipv4"]
    assert {address for address, _ in counts(tally)} == {CAFE, "192.0.2.5", "192.0.2.6"}
    assert tally.dropped == 3
    assert observed.Tally(path).dropped == 3, "it is on disk before the set is emptied"
    assert "3 times a source and port was dropped" in observed.missing(tally, NOW)[0]
    levels = look(tally, NOW + 60, observed_ipv4={(HOME, 25): (0, 1)})
    assert tidy(tally, familiar, **levels) == [], "there is room for new ones"
    assert (len(tally), tally.dropped) == (4, 3)


def test_what_is_old_is_dropped(path, familiar):
    tally = observed.Tally(path)
    look(tally, observed_ipv4={(HOME, 587): (0, 1)})
    look(tally, NOW + 86400, observed_ipv4={(CAFE, 587): (0, 1)})
    tidy(tally, familiar, NOW + observed.PERIOD + 1)
    assert {address for address, _ in counts(tally)} == {CAFE}
    tally.save()
    tally.expire(NOW + observed.PERIOD)
    assert path.exists()
    tally.expire(NOW + 86400 + observed.PERIOD + 1)
    assert (path.exists(), len(tally), tally.until) == (False, 0, 0.0)


def test_other_observing_after_more_than_a_week_begins_anew(path):
    tally = observed.Tally(path)
    look(tally, observed_ipv4={(HOME, 587): (0, 1)})
    look(tally, NOW + OBSERVED + 1, observed_ipv4={(CAFE, 587): (0, 1)})
    assert {address for address, _ in counts(tally)} == {CAFE}
    assert tally.since == NOW + OBSERVED + 1


def test_forgotten_sources_are_dropped(path):
    tally = observed.Tally(path)
    look(tally, observed_ipv4={(HOME, 587): (0, 1), (HOME, 993): (0, 1), (CAFE, 587): (0, 1)})
    assert not tally.drop_forgotten()
    tally.forget(parse.address(HOME))
    assert tally.drop_forgotten()
    assert counts(tally).keys() == {(CAFE, 587)}


def test_report_says_who_has_logged_in_first(path, familiar):
    now = time.time()
    familiar.note(parse.address(CAFE), now - 3600)
    familiar.note(parse.address("2001:db8:0:1::77"), now - 7200)
    pairs = [(parse.address(CAFE), "user:bob"), (parse.address(CAFE), "0" * 16), (parse.address("10.0.0.1"), "1" * 16)]
    tally = observed.Tally(path)
    sets = {
        "observed_ipv4": {(HOME, 587): (0, 99), (CAFE, 587): (60, 2), (CAFE, 143): (0, 1), (CAFE, 999): (0, 1)},
        "observed_ipv6": {(NET, 587): (0, 1)},
    }
    look(tally, now, **sets)
    found = observed.seen(tally, Wanted(), familiar, pairs, DEFAULT)
    rows = [observed.said(one, "", now, DEFAULT) for one in found]
    assert rows[0] == {
        "address": CAFE,
        "service": "submission",
        "times": 2,
        "first": None,
        "last": "1m ago",
        "logged in": "1h ago",
        "users": ["0" * 16, "user:bob"],
        "trusted": "",
    }
    assert [(row["address"], row["service"]) for row in rows[3:]] == [
        ("2001:db8:0:1::/64", "submission"),
        (HOME, "submission"),
    ]
    assert (rows[4]["logged in"], rows[4]["users"]) == (None, [])
    assert observed.by_service(found, DEFAULT) == {
        "submission": {"role": "postfix", "sources": 3, "times": 102, "logged in": 2},
        "imap": {"role": "dovecot", "sources": 1, "times": 1, "logged in": 1},
        "999": {"role": "", "sources": 1, "times": 1, "logged in": 1},
    }
    wanted = Wanted(ports=frozenset({587}), networks=([parse.network("192.0.2.0/31")],))
    assert [str(one.network) for one in observed.seen(tally, wanted, familiar, pairs, DEFAULT)] == [f"{HOME}/32"]


@pytest.mark.parametrize(
    ("source", "trusted", "address", "user"),
    [
        (48, 64, "2001:db8:0:1::", "2001:db8:0:1::"),
        (128, 64, "2001:db8:0:1::77", "2001:db8:0:1::"),
        (64, 128, NET, "2001:db8:0:1::5"),
    ],
)
def test_logins_are_found_whatever_the_prefixes_are(path, familiar, source, trusted, address, user):
    now = time.time()
    pillar = settings.resolve({"autoban": {"ipv6_prefix": source}, "trusted": {"ipv6_prefix": trusted}})
    familiar.note(parse.address("2001:db8:0:1::77"), now)
    base = str(ipaddress.ip_network((address, source), strict=False).network_address)
    tally = observed.Tally(path)
    look(tally, now, observed_ipv6={(base, 587): (0, 1), ("2001:db8:ffff::", 587): (0, 1)})
    first, second = observed.seen(tally, Wanted(), familiar, [(parse.address(user), "0" * 16)], pillar)
    assert (first.login, first.users) == (now, ("0" * 16,))
    assert (second.login, second.users) == (0.0, ())
