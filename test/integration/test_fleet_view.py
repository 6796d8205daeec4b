"""What an operator on the master sees of all mail hosts, and does on all of them."""

from __future__ import annotations

import time

import pytest

from integration.fleet import NETWORK, Fleet, MailHost, wait_until_trusted
from integration.hosts import wait_for
from integration.test_module import session
from integration.test_way_out import PATIENTLY, WITH_ONE_SILENT
from mailfwlib import __version__, messages


@pytest.fixture(autouse=True)
def _two_hosts(fleet: Fleet) -> None:
    """The master knows mx1 and mx2 only."""
    fleet.forget_hosts("id NOT IN ('mx1', 'mx2')")


def test_status_has_a_row_for_each_host(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    trusted, banned = fleet.new_address(), fleet.new_address()
    # What other tests have begun is over: mx1 has every login, and what follows is all that is new there.
    wait_for("the echoes", lambda: not any(host.agent.status()["outbox"] for host in (mx1, mx2)))
    fleet.call(mx1, "mailfw.catch_up")
    before = fleet.salt_run(*PATIENTLY, "mailfw.status")[1]["hosts"]["mx1"]
    fleet.call(mx1, "mailfw.trust", trusted)
    fleet.call(mx1, "mailfw.ban", banned)
    status, said = fleet.salt_run(*PATIENTLY, "mailfw.status")
    assert (status, said["failed"], said["no answer"], said["differ"]) == (0, {}, [], {})
    assert said["hosts"].keys() == {"mx1", "mx2"}
    row = said["hosts"]["mx1"]
    for what in ("trusted", "banned"):
        total, lately = (int(one.strip("()+")) for one in row[what].split())
        assert total == int(before[what].split()[0]) + 1
        assert 1 <= lately <= total
    assert (row["mode"], row["rules"], row["drift"], row["agent"]) == ("autoban", "enforcing", False, "runs")
    assert row["keys"] == [messages.fingerprint(fleet.key)]
    assert row["versions"].startswith(f"mailfw {__version__}, nft ")
    fleet.call(mx1, "mailfw.untrust", trusted)
    fleet.call(mx1, "mailfw.unban", banned)


def test_status_is_a_table_on_a_terminal(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    status, shown = fleet.salt_run_shows(*PATIENTLY, "mailfw.status")
    heading, *rows = shown.splitlines()
    assert status == 0
    assert heading.split()[:4] == ["host", "mode", "rules", "trusted"]
    assert [row.split()[:3] for row in rows] == [["mx1", "autoban", "enforcing"], ["mx2", "autoban", "enforcing"]]


def test_status_names_who_does_not_answer_and_what_is_wrong(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    mx1.agent.stop()
    try:
        mx1.host.nft("add", "rule", "inet", "mailfw", "guarded", "ip", "saddr", "192.0.2.66", "accept")
        with mx2.frozen():
            status, said = fleet.salt_run(*WITH_ONE_SILENT, "mailfw.status")
    finally:
        fleet.call(mx1, "mailfw.apply")
        mx1.agent.start()
    assert (status, said["no answer"]) == (1, ["mx2"])
    row = said["hosts"]["mx1"]
    assert (row["agent"], row["drift"]) == ("NO ANSWER", True)


def test_explain_says_where_hosts_differ(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()
    fleet.call(mx1, "mailfw.trust", address, services="submission")
    fleet.call(mx2, "mailfw.block", address)
    status, said = fleet.salt_run(*PATIENTLY, "mailfw.explain", address)
    assert status == 0
    assert said["differ"]["submission"] == {"accepted": ["mx1"], "refused": ["mx2"]}
    assert said["differ"]["imap"] == {"limited": ["mx1"], "refused": ["mx2"]}
    assert "smtp" not in said["differ"]
    assert said["hosts"]["mx2"]["verdicts"]["imap"].startswith("refused: blocked")

    said = fleet.salt_run(*PATIENTLY, "mailfw.explain", address, "imaps")[1]
    assert said["hosts"]["mx1"]["verdicts"].keys() == {"imaps"}

    told = fleet.salt_run(*PATIENTLY, "mailfw.who", address)[1]
    assert told["differ"]["submission"] == {"accepted": ["mx1"], "refused": ["mx2"]}
    said = told["hosts"]
    assert said["mx1"]["trusted"].startswith("until ")
    assert (said["mx1"]["refused"], said["mx2"]["trusted"]) == ([], [])
    assert "submission" in said["mx2"]["refused"]
    fleet.call(mx1, "mailfw.untrust", address)
    fleet.call(mx2, "mailfw.unblock", address)


def test_why_a_user_cannot_send_is_one_question(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    home, hotel = fleet.new_address(), fleet.new_address()
    user = f"user-{home}@example.org"
    mx1.agent.login(home, user)
    mx1.agent.login(hotel, user.upper())
    wait_until_trusted(hotel, mx2)
    fleet.call(mx2, "mailfw.block", home, reason="ticket 17")
    status, said = fleet.salt_run(*PATIENTLY, "mailfw.why", user, "submission")
    assert (status, said["failed"], said["no answer"]) == (0, {}, [])
    for host in ("mx1", "mx2"):
        assert said["hosts"][host]["addresses"].keys() == {home, hotel}
        assert said["hosts"][host]["advice"] == []
    assert list(said["hosts"]["mx1"]["addresses"]) == [hotel, home]
    there = said["hosts"]["mx2"]["addresses"]
    assert there[home]["verdicts"]["submission"].startswith("refused: blocked")
    assert "ticket 17" in there[home]["verdicts"]["submission"]
    assert there[home]["advice"]
    assert there[hotel]["verdicts"]["submission"].startswith("accepted: trusted")
    assert there[hotel]["last_login"].endswith("s ago")
    assert said["differ"] == {home: {"submission": {"accepted": ["mx1"], "refused": ["mx2"]}}}
    fleet.call(mx2, "mailfw.unblock", home)


def test_why_a_login_has_earned_no_trust(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    home, office, hotel, webmail = (fleet.new_address() for _ in range(4))
    user = f"user-{home}@example.org"
    with fleet.pillar(mx1, protection={"type": "protected"}, trusted={"per_user": 2, "never": [webmail]}):
        assert not fleet.apply(mx1).failed
        said = [mx1.agent.login(address, user) for address in (home, office, hotel, webmail)]
        assert ["is not trusted" in one for one in said] == [False, False, True, True]
        wait_until_trusted(office, mx2)
        told = fleet.salt_run(*PATIENTLY, "mailfw.why", user, "submission")[1]
        known = fleet.call(mx1, "mailfw.list", "trusted", "submission", user=user)
    places = told["hosts"]["mx1"]["addresses"]
    assert list(places) == [webmail, hotel, office, home]
    assert ["no_trust" in places[address] for address in (home, office)] == [False, False]
    reasons = {hotel: "mailfw:trusted:per_user: this user has enough", webmail: "is in mailfw:trusted:never"}
    for address, reason in reasons.items():
        assert places[address]["no_trust"].startswith(reason)
        assert places[address]["last_login"].endswith("s ago")
        assert places[address]["verdicts"]["submission"].startswith("refused: not trusted")
        (advice,) = places[address]["advice"]
        assert advice.startswith(f"no login opens submission: {reason}")
        assert f"salt mx1 mailfw.trust {address} does" in advice
    assert told["hosts"]["mx2"]["addresses"].keys() == {home, office}
    assert told["differ"] == {address: {"no login known": ["mx2"]} for address in (webmail, hotel)}
    assert {row["address"] for row in known["rows"]} == {home, office}


def test_list_of_all_hosts(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()
    fleet.call(mx1, "mailfw.trust", address, services="submission", reason="ticket 17")
    fleet.call(mx2, "mailfw.block", address)
    asked = ("mailfw.list", f"network={address}")
    status, said = fleet.salt_run(*PATIENTLY, *asked)
    assert (status, said["failed"], said["no answer"]) == (0, {}, [])
    rows = {host: found["rows"] for host, found in said["hosts"].items()}
    assert [(row["kind"], row["where"]) for row in rows["mx1"]] == [("trusted", [587])]
    assert [(row["kind"], row["left"]) for row in rows["mx2"]] == [("blocked", "forever")]

    heading, *shown = fleet.salt_run_shows(*PATIENTLY, *asked)[1].splitlines()
    assert heading.split() == ["host", "kind", "address", "where", "left", "by"]
    assert [row.split()[:3] for row in shown] == [["mx1", "trusted", address], ["mx2", "blocked", address]]
    with mx2.frozen():
        status, said = fleet.salt_run(*WITH_ONE_SILENT, "mailfw.list", "blocked", f"network={address}")
    assert (status, said["no answer"], said["hosts"]["mx1"]) == (1, ["mx2"], {"rows": [], "of": 0})
    status, said = fleet.salt_run(*PATIENTLY, "mailfw.list", "friends")
    assert (status, said["hosts"], said["failed"].keys()) == (1, {}, {"mx1", "mx2"})
    fleet.call(mx1, "mailfw.untrust", address)
    fleet.call(mx2, "mailfw.unblock", address)


def test_a_user_who_is_not_known_comes_with_advice(fleet: Fleet, mx1: MailHost) -> None:
    said = fleet.call(mx1, "mailfw.why", "nobody-of-that-name")
    assert said["addresses"] == {}
    assert "how Dovecot logs it" in said["advice"][0]


def test_verbs_reach_all_hosts(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()

    def tell(*arguments: str) -> None:
        status, said = fleet.salt_run(*PATIENTLY, *arguments)
        assert (status, said["failed"], said["hosts"].keys()) == (0, {}, {"mx1", "mx2"})

    tell("mailfw.trust", address, "period=2h", "services=submission,imap", "reason=ticket=17")
    for host in (mx1, mx2):
        assert {port: 7100 < left <= 7200 for port, left in host.host.trusted()[address].items()} == {
            587: True,
            143: True,
        }
    tell("mailfw.untrust", address, "services=imap")
    assert [host.host.trusted()[address].keys() for host in (mx1, mx2)] == [{587}] * 2
    tell("mailfw.block", address, "period=1h")
    assert all(address in str(host.host.elements("blocked_ipv4")) for host in (mx1, mx2))
    tell("mailfw.unblock", address)
    assert not any(address in str(host.host.elements("blocked_ipv4")) for host in (mx1, mx2))
    for host in (mx1, mx2):
        fleet.call(host, "mailfw.ban", address)
    tell("mailfw.unban", address, "role=postfix")
    assert [address in str(mx1.host.elements(f"banned_{role}_ipv4")) for role in ("postfix", "dovecot")] == [
        False,
        True,
    ]
    tell("mailfw.clear", address)
    for host in (mx1, mx2):
        assert address not in host.host.trusted()
        assert address not in str(host.host.elements("banned_dovecot_ipv4"))


@pytest.mark.parametrize(
    "verb", [["untrust"], ["untrust", "services=imap"], ["clear"]], ids=["untrust", "of a service", "clear"]
)
def test_a_host_that_is_installed_anew_does_not_learn_of_what_was_ended(
    fleet: Fleet, mx1: MailHost, mx2: MailHost, verb: list[str]
) -> None:
    ended, other = fleet.new_address(), fleet.new_address()
    for address in (ended, other):
        mx1.agent.login(address)
    wait_until_trusted(other, mx2)
    wait_for("the echo", lambda: mx1.agent.status()["outbox"] == 0)
    status, said = fleet.salt_run(*PATIENTLY, f"mailfw.{verb[0]}", ended, *verb[1:])
    assert (status, said["hosts"].keys()) == (0, {"mx1", "mx2"})
    mx2.agent.stop()
    mx2.host.path("/var/lib/mailfw/ended").unlink()
    mx2.host.nft("flush", "set", "inet", "mailfw", "trusted_ipv4")
    mx2.agent.start()
    fleet.call(mx2, "mailfw.catch_up")
    assert mx2.trusts(other)
    assert ended not in mx2.host.trusted()


def test_whatever_prefix_stands_for_an_address_the_master_forgets_it(fleet: Fleet) -> None:
    now = time.time()
    of_it = {"2001:db8:77:5500::", "2001:db8:77:55ab::", "2001:db8:77:55ab::17"}
    others = {"2001:db8:77:55ac::", "2001:db8:77:55ab::18", "100.127.0.9"}
    for address in {*of_it, *others}:
        fleet.note_login(address, now)
    fleet.salt_run(*PATIENTLY, "mailfw.untrust", "2001:db8:77:55ab::17")
    assert fleet.known()["trusts"] & {*of_it, *others} == others
    fleet.salt_run(*PATIENTLY, "mailfw.untrust", "100.127.0.0/24")
    fleet.salt_run(*PATIENTLY, "mailfw.clear", "2001:db8:77:55a0::/60")
    assert not fleet.known()["trusts"] & others


def test_untrust_ends_sessions_on_all_hosts(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    source = f"{NETWORK}.1"
    fleet.salt_run(*PATIENTLY, "mailfw.trust", source)
    with session(mx1, 993) as (here, _), session(mx2, 993) as (there, _):
        status, said = fleet.salt_run(*PATIENTLY, "mailfw.untrust", source)
        assert status == 0
        ended = {"untrusted": source, "ports": [110, 143, 465, 587, 993, 995, 4190], "sessions_ended": 1}
        assert said["hosts"] == {"mx1": ended, "mx2": ended}
        for client in (here, there):
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    assert not any(source in host.host.trusted() for host in (mx1, mx2))


def test_what_hosts_refuse_is_said_of_each(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    status, said = fleet.salt_run(*PATIENTLY, "mailfw.block", "mail.example.org")
    assert (status, said["hosts"], said["failed"].keys()) == (1, {}, {"mx1", "mx2"})
    assert "expected an IPv4 or IPv6 address" in str(said["failed"]["mx1"])
