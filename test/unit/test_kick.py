"""What doveadm is asked, with a script in its place; test/system has the real one."""

from ipaddress import ip_network

import pytest

from mailfwlib import kick

NOBODY = "exit 68"


@pytest.fixture
def doveadm(tmp_path, monkeypatch):
    """Put a script in doveadm's place, and return the requests that it has had."""
    asked = tmp_path / "asked"

    def install(who, kicked=""):
        script = tmp_path / "doveadm"
        script.write_text(
            f'#!/bin/sh\nprintf "%s|" "$@" >>{asked}; echo >>{asked}\n[ "$1" = kick ] || {{ {who}; }}\n{kicked}\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return asked

    return install


TWO = r"printf 'username\tproto\tpid\tip\nalice\timap\t7\t192.0.2.1\nAlice\timap\t8\t192.0.2.1\nalice\tpop3\t9\t::1\n'"


@pytest.mark.parametrize("user", ["ALICE", "-f", "--help", "a b", "$(id)", "a'b", "@10.0.0.1"])
def test_sessions_are_counted_and_ended_by_the_names_that_they_have(doveadm, user):
    asked = doveadm(TWO)
    assert kick.end_sessions(user) == 3
    assert asked.read_text() == f"-f|tab|who|-1|--|{user}|\nkick|--|alice|\nkick|--|Alice|\n"


@pytest.mark.parametrize("who", [NOBODY, r"printf 'username\tproto\tpid\tip\n'", "true"])
def test_nobody_is_kicked_who_is_not_there(doveadm, who):
    asked = doveadm(who)
    assert kick.end_sessions("alice") == 0
    assert "kick" not in asked.read_text()


def test_sessions_that_end_by_themselves_are_no_error(doveadm):
    doveadm(TWO, NOBODY)
    assert kick.end_sessions("alice") == 3


def test_a_host_without_doveadm_has_no_sessions(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert kick.end_sessions("alice") == 0


@pytest.mark.parametrize("user", ["10", "1001", "192.0.2.1", "192.0.2.0/24", "2001:db8::1", "::/0", "0x7f000001"])
def test_a_name_that_doveadm_takes_for_an_address_is_not_given_to_it(doveadm, user):
    asked = doveadm(TWO)
    with pytest.raises(kick.KickError, match="takes this name for an address"):
        kick.end_sessions(user)
    assert not asked.exists()


def test_what_doveadm_says_is_the_error(doveadm):
    doveadm("echo 'Fatal: connect(anvil) failed' >&2; exit 75")
    with pytest.raises(kick.KickError, match=r"^doveadm: Fatal: connect\(anvil\) failed$"):
        kick.end_sessions("alice")


def test_a_doveadm_that_hangs_is_not_waited_for(doveadm, monkeypatch):
    monkeypatch.setattr(kick, "TIMEOUT", 0.2)
    doveadm("exec sleep 30")
    with pytest.raises(kick.KickError, match=r"no answer in 0\.2 s"):
        kick.end_sessions("alice")


#: What `doveadm -f json who -1` says: the last has no client.
EVERYBODY = """[{"username":"alice","service":"imap","pid":"7","ip":"192.0.2.1"},
{"username":"alice","service":"imap","pid":"8","ip":"192.0.2.1"},
{"username":"b\\timap\\t9\\t192.0.2.3\\n","service":"pop3","pid":"9","ip":"192.0.2.2"},
{"username":"bob","service":"imap","pid":"10","ip":"198.51.100.1"},
{"username":"carol","service":"imap","pid":"11","ip":"2001:db8::7"},
{"username":"dave","service":"imap","pid":"12","ip":null}]"""


@pytest.mark.parametrize(
    ("networks", "spared", "kicked"),
    [
        (["192.0.2.1/32"], [], ["192.0.2.1"] * 2),
        (["192.0.2.0/24"], [], ["192.0.2.1", "192.0.2.1", "192.0.2.2"]),
        (["192.0.2.0/24", "2001:db8::/64"], ["192.0.2.1/32"], ["192.0.2.2", "2001:db8::7"]),
        (["192.0.2.3/32"], [], []),
        (["0.0.0.0/0"], ["0.0.0.0/0"], []),
    ],
)
def test_sessions_from_networks_are_ended_by_their_addresses(doveadm, tmp_path, networks, spared, kicked):
    (tmp_path / "everybody").write_text(EVERYBODY)
    asked = doveadm(f"cat {tmp_path}/everybody")
    found = kick.end_sessions_from(map(ip_network, networks), map(ip_network, spared))
    assert [str(one) for one in found] == kicked
    kicks = "".join(f"kick|--|{one}|\n" for one in dict.fromkeys(kicked))
    assert asked.read_text() == f"-f|json|who|-1|\n{kicks}"


def test_of_a_doveadm_that_says_no_list_nobody_is_kicked(doveadm):
    doveadm("echo who are you")
    with pytest.raises(kick.KickError, match="says what is no list of sessions"):
        kick.end_sessions_from([ip_network("0.0.0.0/0")], [])


def test_a_host_without_doveadm_has_no_sessions_from_anywhere(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert kick.end_sessions_from([ip_network("0.0.0.0/0")], []) == []
