"""Who wins: trusted networks > blocks > earned trust > rate bans > counting."""

from __future__ import annotations

from typing import Any

import pytest

from mailfwlib.settings import MODES
from support.firewall import Firewall
from support.mail import MailServer
from support.net import Client, until

REACTION = {"banned": "drop", "blocked": "reject", "untrusted": "drop"}


def load(firewall: Firewall, mode: str = "autoban", **pillar: Any) -> None:
    """Load rules under which a blocked source is refused, and a banned or untrusted one gets no answer."""
    firewall.load(protection={"type": mode}, reaction=REACTION, **pillar)


@pytest.mark.parametrize("mode", MODES)
def test_trusted_network_wins_over_a_block(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall, mode, trusted={f"networks_{family}": [source]})
    firewall.block(source)
    assert alice.connect(587, source) == "open"
    assert alice.connect(993, source) == "open"


def test_trusted_network_wins_over_a_blocked_network(firewall: Firewall, alice: Client, family: str) -> None:
    source, *_, stranger = alice.addresses(family)
    blocked = {"ipv4": "198.51.100.0/24", "ipv6": "2001:db8:a::/48"}[family]
    load(firewall, trusted={f"networks_{family}": [source]}, blocked={f"networks_{family}": [blocked]})
    assert alice.connect(993, source) == "open"
    assert alice.connect(993, stranger) == "refused"


def test_trusted_network_wins_over_a_ban(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall, trusted={f"networks_{family}": [source]})
    firewall.ban(source)
    assert alice.connect(993, source) == "open"


@pytest.mark.parametrize("mode", MODES)
def test_block_wins_over_earned_trust(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    source, *_, stranger = alice.addresses(family)
    load(firewall, mode)
    firewall.block(source)
    firewall.trust(source)
    firewall.trust(stranger)
    assert alice.connect_many([587, 993], source) == {587: "refused", 993: "refused"}
    assert alice.connect_many([587, 993], stranger) == {587: "open", 993: "open"}
    assert alice.connect(25, source) == "open"


@pytest.mark.parametrize("mode", MODES)
def test_blocked_network_wins_over_earned_trust(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall, mode, blocked={f"networks_{family}": [source]})
    firewall.trust(source)
    assert alice.connect_many([25, 587, 993], source) == {25: "open", 587: "refused", 993: "refused"}


def test_block_wins_over_a_ban(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall)
    firewall.ban(source)
    assert alice.connect(993, source) == "silent"
    firewall.block(source)
    assert alice.connect(993, source) == "refused"


def test_earned_trust_wins_over_a_ban(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall)
    firewall.trust(source)
    firewall.ban(source)
    assert alice.connect_many([587, 993], source) == {587: "open", 993: "open"}


def test_ban_wins_over_counting(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall, autoban={"burst": 1000})
    firewall.ban(source)
    assert alice.connect(993, source) == "silent"
    assert firewall.counter("counted") == 0
    assert firewall.counter("opened") == 0


@pytest.mark.parametrize("blocked", ["drop", "reject"])
@pytest.mark.parametrize("mode", MODES)
def test_block_ends_a_live_session(
    firewall: Firewall, mail: MailServer, alice: Client, family: str, mode: str, blocked: str
) -> None:
    source = alice.addresses(family)[0]
    firewall.load(protection={"type": mode}, reaction={"blocked": blocked})
    firewall.trust(source)
    session = alice.open(993, source)
    assert session.talks()
    assert session.name in mail.sessions
    firewall.block(source)
    session.say()
    until(lambda: session.name not in mail.sessions, "the server's socket is gone", seconds=1)
    session.close()


def test_block_spares_mail_between_servers_and_others(
    firewall: Firewall, alice: Client, mallory: Client, family: str
) -> None:
    source, other = alice.addresses(family)[0], mallory.addresses(family)[0]
    load(firewall)
    server, bystander = alice.open(25, source), mallory.open(993, other)
    firewall.block(source)
    assert server.talks()
    assert bystander.talks()
    server.close()
    bystander.close()


def test_trusted_network_keeps_its_session_when_blocked(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall, trusted={f"networks_{family}": [source]})
    session = alice.open(993, source)
    firewall.block(source)
    assert session.talks()
    session.close()


def test_login_does_not_lift_a_block(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    load(firewall)
    firewall.block(source)
    firewall.trust(source)
    assert firewall.elements(f"blocked_{family}")
    firewall.unblock(source)
    assert alice.connect(993, source) == "open"
