"""How checks are run, and those that need no host to look at."""

import time

import pytest

from mailfwlib import doctor, doctor_mail, doctor_master, mailserver, messages, neighbours, settings
from mailfwlib.doctor import Skipped, Wrong

KEYS = ["0123456789abcdef" * 2, "fedcba9876543210" * 2]


def it_is_right(_):
    """Right."""


def it_is_wrong(_):
    return Wrong("something", "mend it")


def it_has_nothing_to_look_at(_):
    raise Skipped("there is none")


def it_breaks(_):
    raise ValueError("unexpected")


def it_hangs(_):
    time.sleep(60)


def test_every_check_is_ok_failed_or_skipped():
    assert doctor.examine(None, [it_is_right, it_is_wrong, it_has_nothing_to_look_at]) == {
        "ok": ["it is right"],
        "failed": {"it is wrong": {"found": "something", "do": "mend it"}},
        "skipped": {"it has nothing to look at": "there is none"},
    }


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on():
    found = doctor.examine(None, [it_breaks, it_is_right])
    assert found["failed"]["it breaks"]["found"] == "the check itself failed: ValueError: unexpected"
    assert found["ok"] == ["it is right"]


def test_a_check_that_hangs_is_a_failure_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(doctor, "LIMIT", 1.0)
    began = time.monotonic()
    found = doctor.examine(None, [it_hangs, it_is_right])
    assert "no answer within" in found["failed"]["it hangs"]["found"]
    assert found["ok"] == ["it is right"]
    assert time.monotonic() - began < 10


def test_all_checks_together_come_to_an_end(monkeypatch):
    monkeypatch.setattr(doctor, "LONGEST", 0.05)
    found = doctor.examine(None, [it_hangs, it_is_right])
    assert found["failed"].keys() == {"it hangs", "it is right"}
    assert "not looked at" in found["failed"]["it is right"]["found"]


def test_no_two_checks_have_the_same_name_and_each_says_what_has_to_be_right():
    checks = [*doctor.CHECKS, *doctor_mail.CHECKS, *doctor_master.CHECKS]
    assert len({check.__name__ for check in checks}) == len(checks)
    assert all(check.__doc__ for check in checks)


@pytest.mark.parametrize(
    ("sentence", "certain"),
    [
        ("table inet filter, chain input (policy drop) drops imap (143): accepting in mailfw does not override", True),
        ("table inet filter, chain input (by a rule) may drop imap (143): depends on the address", False),
        ("table inet filter, chain input (by a rule, policy drop) may drop or reject imap (143): depends on", False),
        ("table ip mangle, chain pre changes bits 0x03000000 of the connection mark of imap (143): it may", True),
        ("table ip mangle, chain pre may change bits 0x03000000 of the connection mark of imap (143)", False),
        ("table ip raw, chain pre keeps imap (143) from being tracked (notrack)", True),
        ("table ip raw, chain pre may keep imap (143) from being tracked (notrack)", False),
    ],
)
def test_what_may_happen_is_not_certain(sentence, certain):
    assert neighbours.is_certain(sentence) is certain


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("10.0.0.0/8 192.0.2.7", ["10.0.0.0/8", "192.0.2.7/32"]),
        ("192.0.2.1/24, [2001:db8::1]", ["192.0.2.0/24", "2001:db8::1/128"]),
        ("[2001:db8::]/32 !192.0.2.9 webmail.example.org /etc/postfix/proxies static:all", ["2001:db8::/32"]),
    ],
)
def test_lists_of_networks_as_dovecot_and_postfix_write_them(text, found):
    assert list(map(str, mailserver.networks(text))) == found


def test_names_in_pillar():
    names = {"imap": "imap.example.org", "submission": "smtp"}
    assert settings.resolve({"doctor": {"names": names}})["doctor"]["names"] == names


# What the master knows of a host


def said(keys=KEYS, at=1000.0):
    return {"failed": {}, "host": {"keys": [messages.fingerprint(key) for key in keys], "time": at}}


@pytest.mark.parametrize("at", [970.5, 1000.0, 1005.0, 1039.0])
def test_a_host_with_the_masters_keys_and_clock_is_well(at):
    assert doctor_master.of_host(said(at=at), KEYS, 1000.0, 1010.0) == {}


@pytest.mark.parametrize(("at", "words"), [(900.0, "100 s behind"), (1100.0, "90 s ahead of")])
def test_a_clock_that_differs(at, words):
    (found,) = doctor_master.of_host(said(at=at), KEYS, 1000.0, 1010.0).values()
    assert words in found["found"]
    assert "NTP" in found["do"]


@pytest.mark.parametrize("theirs", [["x" * 32], [KEYS[1], "x" * 32]])
def test_keys_under_which_one_does_not_believe_the_other(theirs):
    found = doctor_master.of_host(said(theirs), KEYS, 1000.0, 1000.0)
    assert found.keys() == {"its keys are the master's"}
    assert not any(key in str(found) for key in (*KEYS, *theirs))


def test_keys_may_be_in_the_middle_of_a_change():
    """The new key comes first where it has arrived; the old one is still there."""
    assert doctor_master.of_host(said(["x" * 32, KEYS[0]]), [KEYS[0], "x" * 32], 1000.0, 1000.0) == {}


def test_pillar_is_wrong_or_not_applied():
    host = doctor.Host(settings.resolve({}), "mailfw:x: unknown key")
    assert doctor.pillar_is_valid(host).found == "mailfw:x: unknown key"
    other = settings.resolve({"enforce": False, "trusted": {"networks_ipv4": ["192.0.2.0/24"]}})
    wrong = doctor.what_pillar_says_is_applied(doctor.Host(settings.resolve({}), other))
    assert wrong == Wrong("not applied yet: mailfw:enforce, mailfw:trusted", doctor.APPLY)
    assert doctor.what_pillar_says_is_applied(doctor.Host(None, other)).do == doctor.APPLY
    assert doctor.what_pillar_says_is_applied(doctor.Host(other, other)) is None


def test_a_key_is_missing_only_where_the_master_serves_a_fleet():
    alone = settings.resolve({})
    assert "mailfw:fleet:keys" in doctor.fleet_key_is_there(doctor.Host(alone, alone, master=[])).do
    for answer in (None, "", "Passed invalid arguments", {}):
        with pytest.raises(Skipped):
            doctor.fleet_key_is_there(doctor.Host(alone, alone, master=answer))


@pytest.mark.parametrize(
    ("mode", "lists"),
    [
        ("autoban", {"postfix": "exempt", "dovecot": "exempt"}),
        ("protected", {"postfix": "trusted", "dovecot": "exempt"}),
        ("private", {"postfix": "trusted", "dovecot": "trusted"}),
        ("public", {"postfix": None, "dovecot": None}),
    ],
)
def test_where_to_list_an_address_of_many_people(mode, lists):
    host = doctor.Host(settings.resolve({"protection": {"type": mode}}), None)
    assert {role: host.list_for(role) for role in settings.ROLES} == lists


def test_who_is_trusted_needs_no_exemption():
    pillar = {"exempt": {"networks_ipv6": ["2001:db8::/64"]}, "trusted": {"networks_ipv4": ["192.0.2.0/24"]}}
    host = doctor.Host(settings.resolve(pillar), None)
    assert {*map(str, host.listed("exempt"))} == {"2001:db8::/64", "192.0.2.0/24"}
    assert {*map(str, host.listed("trusted"))} == {"192.0.2.0/24"}
