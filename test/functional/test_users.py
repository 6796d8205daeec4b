"""Which user has earned which trust: revoking what one has, and one that comes from more addresses than are trusted."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from mailfwlib import journal, messages, people
from mailfwlib.client import AgentError
from support.agent import HOST_ID, KEY, LOGIN_USER, REPORT_SECRET, Agent, signed
from support.firewall import Firewall
from support.net import Host, until

LOGIN_PORTS = (587, 465, 143, 993, 110, 995, 4190)
DAY = 86400
HOME, CAFE, OFFICE = "198.51.100.10", "203.0.113.10", "2001:db8:a::"
ALICE, BOB = "alice@example.org", "bob@example.org"
LIMIT = 3
PILLAR: dict[str, Any] = {"fleet": {"keys": [KEY]}, "trusted": {"per_user": LIMIT}}


def pillar(**trusted: Any) -> dict[str, Any]:
    return {**PILLAR, "trusted": {**PILLAR["trusted"], **trusted}}


def trusted(firewall: Firewall) -> dict[str, set[int]]:
    """Return who is trusted in the kernel: address -> ports."""
    found: dict[str, set[int]] = {}
    for element in firewall.elements("trusted_ipv4") | firewall.elements("trusted_ipv6"):
        address, port = element.split(" . ")
        found.setdefault(address, set()).add(int(port))
    return found


def revoke(agent: Agent, user: str) -> dict[str, Any]:
    return json.loads(agent.ask("revoke", user))


def whose(user: str, *addresses: str, at: float | None = None) -> dict[str, Any]:
    """Return the arguments with which another host tells of a user's logins."""
    at = time.time() if at is None else at
    return {"logins": dict.fromkeys(addresses, at), "users": {one: {people.hashed(user, KEY): at} for one in addresses}}


def announced(agent: Agent) -> dict[str, set[str]]:
    """Return what was announced: address -> users' keys."""
    found: dict[str, set[str]] = {}
    for event in agent.events():
        if event["tag"] == "mailfw/login":
            message = messages.verify(event["data"]["message"], [KEY])
            for address in message.logins:
                found.setdefault(str(address), set()).update(message.users.get(address, {}))
    return found


# Revoking


def test_revoking_ends_what_only_this_user_has_earned(agent: Agent, loaded: Firewall) -> None:
    for address in (HOME, CAFE, OFFICE):
        agent.login(address, ALICE)
    for address in (OFFICE, "198.51.100.66"):
        agent.login(address, BOB)
    assert revoke(agent, ALICE) == {"revoked": [HOME, CAFE], "shared": [OFFICE], "given": [], "more": False}
    assert trusted(loaded).keys() == {OFFICE, "198.51.100.66"}
    assert revoke(agent, ALICE) == {"revoked": [], "shared": [], "given": [], "more": False}
    assert revoke(agent, BOB)["revoked"] == [OFFICE, "198.51.100.66"], "nobody shares it any more"
    assert not trusted(loaded)


def test_what_an_operator_gave_stays(agent: Agent, loaded: Firewall) -> None:
    loaded.trust(HOME, 30 * DAY, [587], "root")
    agent.remember(HOME, 30 * DAY, 587, note="root")
    agent.login(HOME, ALICE)
    assert trusted(loaded) == {HOME: set(LOGIN_PORTS)}
    assert revoke(agent, ALICE)["given"] == [HOME]
    assert trusted(loaded) == {HOME: {587}}


def test_what_an_operator_gave_once_and_is_over_does_not_stay(agent: Agent, loaded: Firewall) -> None:
    agent.remember(HOME, -1, 587, note="root")
    agent.login(HOME, ALICE)
    assert revoke(agent, ALICE)["revoked"] == [HOME]
    assert not trusted(loaded)


@pytest.mark.parametrize("login", ["alice@example.org", "ALICE@Example.org"])
def test_the_same_user_in_other_letters_is_the_same_user(agent: Agent, loaded: Firewall, login: str) -> None:
    agent.login(HOME, login)
    assert revoke(agent, "Alice@example.ORG")["revoked"] == [HOME]


def test_users_outlive_the_agent_and_a_new_key(agent: Agent, loaded: Firewall) -> None:
    agent.login(HOME, ALICE)
    agent.login(OFFICE, ALICE)
    agent.login(OFFICE, BOB)
    agent.kill()
    agent.configure({**PILLAR, "fleet": {"keys": ["another" * 9, KEY]}})
    agent.start()
    assert agent.status()["users"] == 2
    assert revoke(agent, ALICE) == {"revoked": [HOME], "shared": [OFFICE], "given": [], "more": False}


@pytest.mark.parametrize("restarted", [False, True])
def test_what_is_revoked_is_not_brought_back_by_earlier_logins(agent: Agent, loaded: Firewall, restarted: bool) -> None:
    """Nor from addresses that this host hears of only now, while other users' count as ever."""
    before = time.time()
    agent.login(HOME, ALICE)
    revoke(agent, ALICE)
    if restarted:
        agent.kill()
        agent.start()
    assert agent.ask("receive", signed(**whose(ALICE, HOME, CAFE, at=before))) == "0"
    assert agent.ask("receive", signed(**whose(BOB, OFFICE, at=before))) == "1"
    assert trusted(loaded).keys() == {OFFICE}
    assert agent.ask("receive", signed(**whose(ALICE, CAFE))) == "1"
    agent.login(HOME, ALICE)
    assert trusted(loaded).keys() == {OFFICE, CAFE, HOME}


def test_of_an_address_that_others_share_their_login_counts(agent: Agent, loaded: Firewall) -> None:
    before = time.time()
    revoke(agent, ALICE)
    users = {CAFE: {people.hashed(ALICE, KEY): before, people.hashed(BOB, KEY): before - 3600}}
    assert agent.ask("receive", signed({CAFE: before}, users=users)) == "1"
    assert all(left < DAY - 3590 for left in loaded.elements("trusted_ipv4").values()), (
        "bob's login counts, not alice's"
    )
    assert revoke(agent, BOB)["revoked"] == [CAFE]


@pytest.mark.parametrize("how", ["hash", "plain"])
def test_what_other_hosts_tell_of_is_revoked_as_well(agent: Agent, loaded: Firewall, how: str) -> None:
    agent.configure(pillar(users=how))
    plainly = {"logins": {CAFE: time.time()}, "users": {CAFE: {people.plain(ALICE): time.time() - 1}}}
    agent.ask("receive", signed(**whose(ALICE, HOME)))
    agent.ask("receive", signed(**plainly))
    assert sorted(revoke(agent, ALICE)["revoked"]) == [HOME, CAFE]
    assert not trusted(loaded)


def test_a_user_with_very_many_addresses_is_revoked_in_steps(agent: Agent, loaded: Firewall) -> None:
    addresses = [f"10.1.{n // 250}.{n % 250}" for n in range(700)]
    for some in (addresses[:350], addresses[350:]):
        assert agent.ask("receive", signed(**whose(ALICE, *some))) == "350"
    first, second = revoke(agent, ALICE), revoke(agent, ALICE)
    assert (first["more"], second["more"]) == (True, False)
    assert first["revoked"] + second["revoked"] == addresses
    assert not trusted(loaded)


def test_an_operators_end_is_not_undone_by_an_old_sharer(agent: Agent, loaded: Firewall) -> None:
    """Who logged in before an operator ended the trust has not earned the one of now."""
    agent.login(HOME, BOB)
    loaded.untrust(HOME)
    agent.ask("forget", HOME)
    agent.login(HOME, ALICE)
    assert revoke(agent, ALICE)["revoked"] == [HOME]


def test_with_users_off_nothing_is_kept_or_told(agent: Agent, loaded: Firewall, host: Host) -> None:
    agent.login(HOME, ALICE)
    agent.configure(pillar(users="off"))
    until(lambda: agent.status()["users"] == 0, "what was kept is forgotten")
    for number in range(LIMIT + 2):
        assert agent.login(f"203.0.113.{number}", ALICE).endswith("is trusted")
    assert revoke(agent, ALICE)["revoked"] == []
    until(lambda: "203.0.113.4" in announced(agent), "announced")
    assert announced(agent)["203.0.113.4"] == set()
    assert host.call((journal.DIRECTORY / "users").read_text) == ""


@pytest.mark.parametrize("user", ["", "*", "a?", "a\nb", "x" * 300])
def test_strange_users_are_refused(agent: Agent, loaded: Firewall, user: str) -> None:
    agent.login(HOME, ALICE)
    with pytest.raises(AgentError, match="expected a user's name"):
        agent.ask("revoke", user)
    assert trusted(loaded)


def test_only_root_may_revoke(agent: Agent, loaded: Firewall) -> None:
    agent.login(HOME, ALICE)
    assert "not allowed" in agent.ask_as(LOGIN_USER, "revoke", ALICE)
    assert trusted(loaded)


# Telling the fleet


def test_logins_are_announced_with_the_users_key(agent: Agent) -> None:
    agent.login(HOME, ALICE)
    agent.login(HOME, BOB)
    agent.login(CAFE, "")
    keys = {people.hashed(ALICE, KEY), people.hashed(BOB, KEY)}
    until(lambda: announced(agent) == {HOME: keys, CAFE: set()}, "each user is announced")
    assert "alice" not in str(agent.events())


def test_a_users_login_that_was_told_of_is_no_news(agent: Agent) -> None:
    agent.ask("receive", signed(**whose(ALICE, HOME)))
    agent.login(HOME, ALICE)
    agent.login(CAFE, ALICE)
    until(lambda: CAFE in announced(agent), "announced")
    assert HOME not in announced(agent)


def test_after_an_operators_end_the_next_login_is_news(agent: Agent, loaded: Firewall) -> None:
    for times in (1, 2):
        agent.login(HOME, ALICE)
        until(lambda times=times: len(agent.events()) == times, "announced")
        loaded.untrust(HOME)
        agent.ask("forget", HOME)


def test_whose_logins_wait_for_their_echo_outlives_the_agent(agent: Agent) -> None:
    agent.login(HOME, ALICE)
    agent.login(HOME, BOB)
    agent.kill()
    agent.forget_events()
    agent.start()
    assert agent.status()["outbox"] == 2
    until(lambda: announced(agent) == {HOME: {people.hashed(one, KEY) for one in (ALICE, BOB)}}, "announced again")


def test_a_user_who_logs_in_all_the_time_is_announced_again(agent: Agent) -> None:
    """Elsewhere the trust would end, although the user is here."""
    agent.configure(pillar(period="10s"))
    began = time.monotonic()
    while len([event for event in agent.events() if event["tag"] == "mailfw/login"]) < 3:
        agent.login(HOME, ALICE)
        assert time.monotonic() - began < 10
        time.sleep(0.1)


# One address too many


def use_up(agent: Agent, user: str = ALICE) -> None:
    for number in range(LIMIT):
        assert agent.login(f"203.0.113.{number}", user).endswith("is trusted")


def roaming(agent: Agent) -> list[dict[str, Any]]:
    return [event["data"] for event in agent.events() if event["tag"] == "mailfw/roaming"]


def test_one_address_too_many_is_not_trusted(agent: Agent, loaded: Firewall) -> None:
    use_up(agent)
    loaded.ban(HOME)
    for _ in range(2):
        assert "is not trusted: mailfw:trusted:per_user" in agent.login(HOME, "Alice@example.org")
    assert HOME not in trusted(loaded)
    assert loaded.elements("banned_dovecot_ipv4"), "this login lifts no ban"
    assert agent.log().count("has logged in from 3 others within a day") == 1
    until(lambda: roaming(agent), "the event")
    agent.login(OFFICE, ALICE)
    agent.login(OFFICE, BOB)
    until(lambda: OFFICE in announced(agent), "what comes after the event")
    assert roaming(agent) == [{"host": HOST_ID, "user": people.hashed(ALICE, KEY), "addresses": LIMIT}]
    assert HOME not in announced(agent)
    assert "alice" not in agent.log()


def refused(agent: Agent, user: str) -> dict[str, str]:
    """Return where logins of a user have earned no trust, and why."""
    found = json.loads(agent.ask("places", user))["refused"]
    assert all(time.time() - 10 < at <= time.time() for at, _ in found.values())
    return {address: reason for address, (_, reason) in found.items()}


def test_why_a_login_earns_no_trust_is_remembered(agent: Agent, loaded: Firewall) -> None:
    """By the network's address over IPv6, until one there earns some; a user's own only."""
    agent.configure(pillar(never=[CAFE]))
    agent.login(CAFE, ALICE)
    use_up(agent)
    agent.login("2001:db8:a::10", "Alice@example.org")
    enough = "mailfw:trusted:per_user: this user has enough addresses for today"
    assert refused(agent, ALICE) == {CAFE: "is in mailfw:trusted:never", OFFICE: enough}
    assert refused(agent, BOB) == {}
    agent.configure(pillar(never=[CAFE], per_user=50))
    agent.login(OFFICE, ALICE)
    assert refused(agent, ALICE) == {CAFE: "is in mailfw:trusted:never"}
    agent.configure({**PILLAR, "protection": {"type": "private"}})
    agent.login(HOME, BOB)
    assert refused(agent, BOB) == {HOME: "no mailfw:trusted network admits it, and the mode is private"}
    agent.configure(pillar(users="off"))
    until(lambda: refused(agent, ALICE) == refused(agent, BOB) == {}, "what was kept is forgotten")


def test_known_addresses_and_other_users_go_on(agent: Agent, loaded: Firewall) -> None:
    use_up(agent)
    agent.login(HOME, ALICE)
    loaded.run("flush set inet mailfw trusted_ipv4")
    assert agent.login("203.0.113.1", ALICE).endswith("is trusted")
    assert agent.login(HOME, BOB).endswith("is trusted")
    assert trusted(loaded).keys() == {"203.0.113.1", HOME}


def test_an_operator_may_trust_one_address_too_many(agent: Agent, loaded: Firewall) -> None:
    use_up(agent)
    loaded.trust(HOME, DAY, LOGIN_PORTS)
    agent.remember(HOME, DAY, *LOGIN_PORTS, note="root")
    agent.login(HOME, ALICE)
    assert HOME in trusted(loaded)


def test_logins_on_other_hosts_count_but_are_theirs_to_decide(agent: Agent, loaded: Firewall) -> None:
    addresses = [f"203.0.113.{number}" for number in range(LIMIT + 2)]
    assert agent.ask("receive", signed(**whose(ALICE, *addresses))) == str(len(addresses))
    assert trusted(loaded).keys() == set(addresses)
    assert "is not trusted" in agent.login(HOME, ALICE)


@pytest.mark.parametrize("restarted", [False, True])
def test_after_a_day_there_is_room_again(agent: Agent, loaded: Firewall, restarted: bool) -> None:
    agent.configure(pillar(period="30d"))
    yesterday = time.time() - DAY - 60
    agent.ask("receive", signed(**whose(ALICE, *(f"198.51.100.{n}" for n in range(LIMIT)), at=yesterday)))
    if restarted:
        agent.restart()
    use_up(agent)
    assert "is not trusted" in agent.login(HOME, ALICE)
    assert agent.login("198.51.100.1", ALICE).endswith("is trusted"), "it is known, if of yesterday"


def test_reports_of_dovecot_are_logins_of_the_same_user(agent: Agent, loaded: Firewall, host: Host) -> None:
    report = {"remote": HOME, "login": "Alice@example.org", "success": True, "protocol": "smtp"}
    agent.status()
    until(lambda: "4145" in host.run("ss", "-Htnl").stdout, "the agent takes reports")
    text = json.dumps(report)
    request = (
        f"POST /?command=report HTTP/1.1\r\nX-Mailfw-Secret: {REPORT_SECRET}\r\nConnection: close\r\n"
        f"Content-Length: {len(text)}\r\n\r\n{text}"
    )
    script = "import socket, sys; s = socket.create_connection(('127.0.0.1', 4145)); s.sendall(sys.argv[1].encode())"
    host.run("python3", "-c", f"{script}; print(s.recv(1000))", request)
    assert revoke(agent, ALICE)["revoked"] == [HOME]
