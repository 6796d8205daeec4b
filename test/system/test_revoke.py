"""A user who is revoked, an address that is blocked or trusted no more: what ends on both hosts, and nothing else."""

from __future__ import annotations

import json

import pytest

from support import lab
from support.lab import ADDRESSES, elements, wait_until

from .conftest import ENVIRONMENTS, HOSTS

#: As which the hosts see the clients.
HOME, HOME_IPV6, CAFE = "198.51.100.10", "2001:db8:0:2::", "203.0.113.10"


@pytest.fixture(autouse=True)
def nobody_is_known(fleet):
    for host in HOSTS:
        lab.set_pillar(ENVIRONMENTS[host], protection={"type": "autoban"})
    lab.all_states(HOSTS, "state.apply", "mailfw")
    for host in HOSTS:
        for user in ("alice", "bob"):
            lab.salt(host, "mailfw.revoke", user)
    lab.forget(*HOSTS)


def known_users(host: str) -> int:
    return lab.salt(host, "mailfw.agent_status")[host]["users"]


def trusted(host: str) -> set[str]:
    """Return who may submit."""
    return {
        element.partition(" ")[0]
        for name in ("trusted_ipv4", "trusted_ipv6")
        for element in elements(host, name)
        if element.endswith(" 587")
    }


def test_a_user_is_revoked_whatever_the_login_was_like():
    """Dovecot says `alice` to the hook and in its reports, whichever way she wrote it."""
    strangers = {host: known_users(host) for host in HOSTS}
    alices = {host: lab.Session("home", ADDRESSES[host][0]) for host in HOSTS}
    bobs = {host: lab.Session("cafe", ADDRESSES[host][0], user="bob") for host in HOSTS}
    lab.client("home", "login", address=ADDRESSES["mx1"][0], user="Alice@lab.test")
    lab.client("home", "send", address=ADDRESSES["mx2"][1], subject="reported by Dovecot")
    for host in HOSTS:
        wait_until(lambda host=host: trusted(host) == {HOME, HOME_IPV6, CAFE}, f"{host} knows all logins")
        assert known_users(host) == strangers[host] + 2
    said = lab.salt(",".join(HOSTS), "mailfw.revoke", "ALICE")
    for host in HOSTS:
        assert sorted(said[host].pop("revoked")) == [HOME, f"{HOME_IPV6}/64"]
        assert said[host] == {"shared": [], "given": [], "sessions_ended": 1}
        assert trusted(host) == {CAFE}
        assert not alices[host].answers()
        assert bobs[host].answers()


@pytest.mark.parametrize("verb", ["block", "untrust"])
def test_dovecots_part_of_the_sessions_of_an_address_ends_too(verb):
    """Those with TLS as well, which a process of their own has for the one that reads mail; and no others."""
    for place, of in enumerate((HOME, HOME_IPV6)):
        held = {host: [lab.Session("home", ADDRESSES[host][place], port=port) for port in (143, 993)] for host in HOSTS}
        others = {host: lab.Session("cafe", ADDRESSES[host][place], user="bob") for host in HOSTS}
        try:
            said = lab.salt(",".join(HOSTS), f"mailfw.{verb}", of)
            for host in HOSTS:
                wait_until(lambda host=host: logged_in(host) == ["bob"], f"{host} has but the other's session")
                assert said[host]["sessions_ended"] == 2
                assert not any(session.answers() for session in held[host])
                assert others[host].answers()
        finally:
            lab.salt(",".join(HOSTS), "mailfw.unblock", of)


def logged_in(host: str) -> list[str]:
    return [one["username"] for one in json.loads(lab.run(host, "doveadm", "-f", "json", "who", "-1"))]


def test_a_user_who_is_not_there_is_no_error():
    for user in ("alice", "-f", "--help"):
        for said in lab.salt(",".join(HOSTS), "mailfw.revoke", user).values():
            assert said == {"revoked": [], "shared": [], "given": [], "sessions_ended": 0}


def test_a_name_that_doveadm_would_misread_is_said():
    for said in lab.salt(",".join(HOSTS), "mailfw.revoke", "10").values():
        assert said["problems"] == [
            "the user's sessions: doveadm takes this name for an address: end its sessions by hand, see 'doveadm who'"
        ]
