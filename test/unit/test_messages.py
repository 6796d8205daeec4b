import json
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import client, messages, parse
from unit import arbitrary

KEY = "k" * 32
OTHER = "o" * 32
NOW = 1_700_000_000.25
IPV4 = parse.address("192.0.2.1")
IPV6 = parse.address("2001:db8::")
LOGINS = {IPV4: NOW - 1, IPV6: NOW - 86400}
GOOD = messages.sign("mx1", "n1", LOGINS, KEY, NOW)


def signed(content, key=KEY):
    """Return a message that a host of the fleet that has gone wrong could sign: anything."""
    text = content if isinstance(content, str) else json.dumps(content)
    return f"{messages._signature(text, key)} {text}"


def content(**changes):
    return {"version": 1, "sender": "mx1", "sent": NOW, "nonce": "n1", "logins": {"192.0.2.1": NOW}, **changes}


def refused(text, sentence, keys=(KEY,), now=NOW):
    with pytest.raises(messages.MessageError, match=sentence):
        messages.verify(text, list(keys), now)


def test_message_says_what_was_signed():
    assert messages.verify(GOOD, [KEY], NOW) == messages.Message("mx1", "n1", LOGINS)
    assert messages.verify(signed(content()), [KEY], NOW) == messages.Message("mx1", "n1", {IPV4: NOW})


def test_time_of_today_is_the_default():
    text = messages.sign("mx1", messages.new_nonce(), {IPV4: time.time() - 1}, KEY)
    assert list(messages.verify(text, [KEY]).logins) == [IPV4]
    refused(GOOD, "stale", now=None)


senders = st.text(min_size=1, max_size=255)
times = st.floats(NOW - messages.OLDEST_LOGIN, NOW)


@given(senders, st.text(), st.dictionaries(arbitrary.addresses, times, max_size=20), st.text(min_size=32))
def test_any_message_comes_back_as_it_was(sender, nonce, logins, key):
    key = key.encode("utf-8", "replace").decode()
    text = messages.sign(sender, nonce, logins, key, NOW)
    assert "\n" not in text
    assert messages.verify(text, [key], NOW) == messages.Message(sender, nonce, logins)


def test_fullest_message_fits():
    logins = {parse.address(f"2001:db8:ffff:ffff:ffff:ffff:ffff:{n:x}"): NOW - n / 7 for n in range(1000, 1500)}
    text = messages.sign("m" * 255, messages.new_nonce(), logins, KEY, NOW)
    assert messages.verify(text, [KEY], NOW).logins == logins
    assert len(f"receive\0{text}") < client.LONGEST


ALICE, BOB = "a1" * 8, "user:bob@example.org"
USERS = {IPV4: {ALICE: NOW - 1, BOB: NOW - 60}}
user_keys = st.from_regex(parse.USER_KEY, fullmatch=True)


def test_users_come_back_as_they_were():
    text = messages.sign("mx1", "n1", LOGINS, KEY, NOW, users=USERS)
    assert messages.verify(text, [KEY], NOW) == messages.Message("mx1", "n1", LOGINS, USERS)


def test_a_message_without_users_is_as_it_always_was():
    assert messages.sign("mx1", "n1", LOGINS, KEY, NOW, users={}) == GOOD


@given(st.dictionaries(st.tuples(arbitrary.addresses, st.just("") | user_keys), times, max_size=20))
def test_any_logins_of_users_come_back_as_they_were(logins):
    last, users = messages.split(logins, NOW)
    found = messages.verify(messages.sign("mx1", "n1", last, KEY, NOW, users=users), [KEY], NOW)
    assert (found.logins, found.users) == (last, users)
    assert {(address, key) for address, whose in found.users.items() for key in whose} == {
        pair for pair in logins if pair[1]
    }


@given(st.dictionaries(st.tuples(arbitrary.addresses, st.just("") | user_keys), st.floats(0, 2 * NOW), max_size=20))
def test_whatever_was_kept_a_message_says_what_may_be_told(logins):
    last, users = messages.split(logins, NOW)
    found = messages.verify(messages.sign("mx1", "n1", last, KEY, NOW, users=users), [KEY], NOW)
    assert found.logins.keys() == {pair[0] for pair, at in logins.items() if at >= NOW - messages.OLDEST_LOGIN}


@pytest.mark.parametrize(
    ("key", "least"), [("", 500), (ALICE, 400), ("user:" + "u" * 100, 250)], ids=["nobody", "hash", "plain"]
)
@pytest.mark.parametrize("sender", ["m" * 255, "\U0001f4e7" * 255], ids=["ASCII", "longest"])
def test_as_many_logins_as_are_said_to_fit_do(key, least, sender):
    pairs = [(parse.address(f"2001:db8:ffff:ffff:ffff:ffff:ffff:{n:x}"), key) for n in range(4096, 5096)]
    count = messages.fitting(pairs)
    assert least <= count <= messages.MOST_LOGINS
    last, users = messages.split({pair: NOW - 1 / (n + 7) for n, pair in enumerate(pairs[:count])}, NOW)
    assert (
        len(messages.verify(messages.sign(sender, "n" * 32, last, KEY, NOW, users=users), [KEY], NOW).logins) == count
    )


@pytest.mark.parametrize(
    "users",
    [
        *(None, [], "", 1, True, [ALICE], {"192.0.2.1": None}, {"192.0.2.1": []}, {"192.0.2.1": ALICE}),
        *({"192.0.2.1": {key: NOW}} for key in ("", "alice", "A1" * 8, "a1" * 9, ALICE + "\n", "user:", "user:a b")),
        *({"192.0.2.1": {key: NOW}} for key in ("user:a,b", "user:\u00e9", "user:" + "u" * 101, "user:a;b")),
        *({"192.0.2.1": {ALICE: at}} for at in (None, "", str(NOW), {}, float("nan"), float("inf"), 0, -1, NOW + 200)),
        {"192.0.2.1": {ALICE: NOW - messages.OLDEST_LOGIN - 1}},
        {"192.0.2.2": {ALICE: NOW}},
        {"192.0.2.1": {f"{n:016x}": NOW for n in range(messages.MOST_LOGINS + 1)}},
    ],
    ids=lambda users: repr(users)[:40],
)
def test_users_that_make_no_sense_are_refused(users):
    assert messages.verify(signed(content(users={"192.0.2.1": {ALICE: NOW}})), [KEY], NOW).users
    refused(signed(content(users=users)), "^malformed$")


def test_a_user_cannot_have_logged_in_later_than_anybody():
    refused(signed(content(logins={"192.0.2.1": NOW - 60}, users={"192.0.2.1": {ALICE: NOW}})), "^malformed$")


def test_an_address_of_users_is_one():
    refused(signed(content(users={"localhost": {ALICE: NOW}})), "^address 'localhost': expected")


@given(st.integers(0, len(GOOD) - 1), st.sampled_from(string.printable) | st.characters())
def test_altered_character_is_refused(place, character):
    altered = GOOD[:place] + character + GOOD[place + 1 :]
    if altered != GOOD:
        refused(altered, "malformed|not signed")


def test_every_altered_byte_is_refused():
    for place in range(len(GOOD)):
        for bit in range(7):
            refused(GOOD[:place] + chr(ord(GOOD[place]) ^ 1 << bit) + GOOD[place + 1 :], "malformed|not signed")
        refused(GOOD[:place] + GOOD[place + 1 :], "not signed")
        refused(GOOD[:place], "not signed")
    for longer in (GOOD + " ", " " + GOOD, GOOD + "\n", GOOD + "\0", GOOD.upper(), GOOD + GOOD):
        refused(longer, "not signed")


def test_key_must_be_the_fleets():
    refused(GOOD, "not signed under a key of this fleet", keys=[OTHER])
    refused(GOOD, "not signed under a key of this fleet", keys=[])
    refused(GOOD, "not signed under a key of this fleet", keys=[KEY + " ", KEY[:-1], ""])


def test_keys_can_be_changed_one_host_after_the_other():
    """Newest first: hosts that have both keys understand those that sign with the old one and with the new one."""
    new = messages.sign("mx2", "n2", LOGINS, OTHER, NOW)
    for text in (GOOD, new):
        assert messages.verify(text, [OTHER, KEY], NOW).logins == LOGINS
        assert messages.verify(text, [KEY, OTHER], NOW).logins == LOGINS
    refused(GOOD, "not signed", keys=[OTHER])


@pytest.mark.parametrize("off", [messages.FRESH, -messages.FRESH, 0])
def test_fresh(off):
    assert messages.verify(GOOD, [KEY], NOW + off)


def test_stale_and_ahead():
    refused(GOOD, r"^sent 121 s ago: stale, or a clock is wrong$", now=NOW + messages.FRESH + 1)
    refused(GOOD, r"^sent 121 s ahead: stale, or a clock is wrong$", now=NOW - messages.FRESH - 1)
    refused(GOOD, "stale", now=NOW + messages.FRESH + 0.01)
    refused(GOOD, "stale", now=0.0)


@pytest.mark.parametrize("text", [None, 1, 1.0, True, b"x", GOOD.encode(), [GOOD], {"message": GOOD}, {}, object()])
def test_what_is_not_text_is_refused(text):
    refused(text, "^malformed$")


@pytest.mark.parametrize("text", ["", " ", "x", " {}", "\0", GOOD.split(" ", 1)[0], GOOD.split(" ", 1)[1], "a" * 65536])
def test_text_that_is_no_message_is_refused(text):
    refused(text, "^not signed under a key of this fleet$")


def test_huge_text_is_not_looked_at():
    fits = json.dumps(content())
    fits += " " * (messages.LONGEST - len(fits) - 65)
    assert messages.verify(signed(fits), [KEY], NOW)
    refused(signed(fits + " "), "^malformed$")
    refused("x" * 10_000_000, "^malformed$")


def test_text_beyond_ascii_is_refused():
    refused(signed('{"version": 1, "sender": "é"}'), "^malformed$")
    refused(GOOD.replace(" ", "\u00a0", 1), "^malformed$")
    refused("\ud800" + GOOD, "^malformed$")


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "{", "null", "1", '"x"', "[]", "[1]", "{}", "true", "NaN", '{"version": 1}', '{"version":1}{}'),
        "[" * 60_000,
        "[" * 30_000 + "]" * 30_000,
        '{"version":' * 5_000 + "1" + "}" * 5_000,
        '{"version": 1, "sender": "a", "nonce": "n", "sent": ' + "1" * 5_000 + ', "logins": {}}',
        json.dumps(content(logins={"192.0.2.1": 0}))[:-2] + "1" * 5_000 + "}}",
    ],
    ids=lambda text: text[:14],
)
def test_signed_text_that_says_nothing_is_refused(text):
    refused(signed(text), "^malformed$")


@pytest.mark.parametrize("missing", list(content()))
def test_missing_field(missing):
    refused(signed({key: value for key, value in content().items() if key != missing}), "^malformed$")


@pytest.mark.parametrize("version", [0, 2, "1", None, [], "x" * 60_000, float("nan"), float("inf")])
def test_other_versions_are_refused(version):
    refused(signed(content(version=version)), r"^version .{1,20}: this host speaks 1$")


@pytest.mark.parametrize("field", ["sender", "nonce"])
@pytest.mark.parametrize("value", [None, 1, True, [], ["mx1"], {}, 1.5])
def test_sender_and_nonce_are_text(field, value):
    refused(signed(content(**{field: value})), "^malformed$")


@pytest.mark.parametrize("sender", ["", "m" * 256])
def test_length_of_a_sender(sender):
    refused(signed(content(sender=sender)), "^malformed$")


@pytest.mark.parametrize("value", ["now", "", None, [], {}, "1_7e", 10**400, -(10**400)])
def test_time_of_a_message_is_a_number(value):
    refused(signed(content(sent=value)), "^malformed$")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), "nan", "inf", 0, -1, True, 1e308])
def test_time_of_a_message_is_now(value):
    refused(signed(content(sent=value)), "stale, or a clock is wrong$")


@pytest.mark.parametrize(
    "at",
    [
        *(None, "", "now", str(NOW), [], {}, [NOW], True, float("nan"), float("inf"), float("-inf"), 10**400, 0, -1),
        *(NOW - messages.OLDEST_LOGIN - 1, NOW + messages.FRESH + 1),
    ],
)
def test_time_of_a_login_is_a_time_of_the_last_week(at):
    refused(signed(content(logins={"192.0.2.1": at})), "^malformed$")
    refused(signed(content(logins={"192.0.2.2": NOW, "192.0.2.1": at})), "^malformed$")


@pytest.mark.parametrize(("at", "taken"), [(NOW - messages.OLDEST_LOGIN,) * 2, (NOW + messages.FRESH, NOW)])
def test_oldest_and_newest_login(at, taken):
    assert messages.verify(signed(content(logins={"192.0.2.1": at})), [KEY], NOW).logins == {IPV4: taken}


def test_login_ahead_of_the_clock_was_now():
    found = messages.verify(signed(content(logins={"192.0.2.1": NOW + 60, "192.0.2.2": NOW - 60})), [KEY], NOW)
    assert list(found.logins.values()) == [NOW, NOW - 60]


@pytest.mark.parametrize("logins", [None, 1, "x", "", [], ["192.0.2.1"], [["192.0.2.1", NOW]], True])
def test_logins_are_a_mapping(logins):
    refused(signed(content(logins=logins)), "^malformed$")


def test_message_without_logins_is_a_request():
    assert messages.verify(signed(content(logins={})), [KEY], NOW).logins == {}


@pytest.mark.parametrize(
    "address",
    ["", "x", "192.0.2.0/24", "fe80::1%eth0", "3221225985", "192.0.2.1 }; flush ruleset; {", "\ud800", "9" * 50_000],
)
def test_bad_addresses_are_refused(address):
    refused(signed(content(logins={"192.0.2.9": NOW, address: NOW})), "^address .{2,60}: expected an IPv4 or IPv6 addr")


def test_mapped_address_is_the_address_it_carries():
    assert messages.verify(signed(content(logins={"::ffff:192.0.2.1": NOW})), [KEY], NOW).logins == {IPV4: NOW}


def test_too_many_logins_are_refused():
    logins = {f"10.0.{n // 256}.{n % 256}": NOW for n in range(messages.MOST_LOGINS)}
    assert len(messages.verify(signed(content(logins=logins)), [KEY], NOW).logins) == messages.MOST_LOGINS
    refused(signed(content(logins={**logins, "10.1.0.0": NOW})), "^malformed$")


def believed(text):
    try:
        return messages.verify(text, [KEY], NOW)
    except messages.MessageError:
        return None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(NOW),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=10,
)


@given(json_values | st.fixed_dictionaries({}, optional=dict.fromkeys(content(), json_values)))
def test_signed_nonsense_is_refused_in_words(value):
    assert believed(signed(value)) is None or value["logins"] == {}


@given(st.sampled_from(list(content())), json_values)
def test_nonsense_in_a_field_is_refused_in_words(field, value):
    found = believed(signed(content(**{field: value})))
    if found:
        assert (found.sender, found.nonce) == (content(**{field: value})["sender"], content(**{field: value})["nonce"])
        assert all(NOW - messages.OLDEST_LOGIN - messages.FRESH <= at <= NOW for at in found.logins.values())


@given(arbitrary.values)
def test_anything_unsigned_is_refused_in_words(value):
    assert believed(value) is None


def test_nonces_differ():
    assert len({messages.new_nonce() for _ in range(1000)}) == 1000
    assert len(messages.new_nonce()) == 32


def test_fingerprint_tells_keys_apart_and_not_what_they_are():
    assert messages.fingerprint(KEY) == messages.fingerprint(KEY) != messages.fingerprint(OTHER)
    assert len(messages.fingerprint(KEY)) == 12
    assert messages.fingerprint(KEY) not in GOOD


def message(nonce, sender="mx1"):
    return messages.Message(sender, nonce, {})


def first_time(seen, message, now):
    try:
        seen.remember(message, now)
    except messages.MessageError as err:
        return str(err) != "replayed"
    return True


def test_message_counts_once():
    seen = messages.Seen()
    assert first_time(seen, message("n1"), NOW)
    assert not first_time(seen, message("n1"), NOW)
    assert not first_time(seen, messages.Message("mx1", "n1", LOGINS), NOW + 1)


def test_nonces_are_each_senders_own():
    seen = messages.Seen()
    assert first_time(seen, message("n1"), NOW)
    assert first_time(seen, message("n1", "mx2"), NOW)
    assert first_time(seen, message("n2"), NOW)


def test_message_is_remembered_as_long_as_it_is_fresh():
    """Received as early as can be, from a host whose clock is ahead, and sent again as late as can be."""
    text = messages.sign("mx1", "n1", {}, KEY, NOW)
    first, last = NOW - messages.FRESH, NOW + messages.FRESH
    seen = messages.Seen()
    assert first_time(seen, messages.verify(text, [KEY], first), first)
    assert first_time(seen, message("other"), last)
    assert not first_time(seen, messages.verify(text, [KEY], last), last)


def test_nonces_are_forgotten_when_their_message_is_stale():
    seen = messages.Seen(most=3)
    for number in range(100):
        assert first_time(seen, message(f"n{number}"), NOW + number * messages.FRESH)
    assert len(seen._expiry) <= 3


def test_full_window_refuses_rather_than_forgets():
    seen = messages.Seen(most=2)
    assert first_time(seen, message("n1"), NOW)
    assert first_time(seen, message("n2"), NOW + 1)
    with pytest.raises(messages.MessageError, match=r"^more than 2 messages in 240 s$"):
        seen.remember(message("n3"), NOW + 2)
    assert not first_time(seen, message("n1"), NOW + 2)
    assert first_time(seen, message("n3"), NOW + 2 * messages.FRESH + 0.5)
    assert not first_time(seen, message("n2"), NOW + 2 * messages.FRESH + 0.5)


@pytest.mark.parametrize(
    ("text", "sender"),
    [
        (messages.sign("mx1", "n1", {}, KEY, NOW), "'mx1'"),
        ('0 {"sender": "a\\nb"}', r"'a\nb'"),
        ('0 {"sender": ["x", 7]}', "['x', 7]"),
        (f'0 {{"sender": "{"x" * 100}"}}', "'" + "x" * 59),
        ('0 {"nonce": "x"}', "?"),
        ("0 []", "?"),
        ("0 7", "?"),
        ("", "?"),
        ("0 " + "[" * 10000, "?"),
        ("0 " + '{"sender": "x"' + " " * messages.LONGEST + "}", "?"),
    ],
)
def test_who_a_message_is_from_by_its_own_account(text, sender):
    assert messages.claimed_sender(text) == sender
