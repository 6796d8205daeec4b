"""Hold: a client that connects to submission in the moment in which it logs in gets in by itself."""

from __future__ import annotations

import time

import pytest

from support.firewall import Firewall
from support.net import Client, until

HOLD = {"protection": {"type": "protected"}, "reaction": {"untrusted": "hold"}}


@pytest.mark.parametrize("mode", ["protected", "private"])
def test_client_that_logs_in_meanwhile_gets_in(firewall: Firewall, alice: Client, family: str, mode: str) -> None:
    firewall.load(protection={"type": mode}, reaction={"untrusted": "hold"})
    source, started = alice.addresses(family)[0], time.monotonic()
    connecting = alice.connecting(587, source, patience=10)
    until(lambda: firewall.counter("held"), "the first try")
    assert not connecting.done()
    firewall.trust(source)
    assert connecting.result() == "open"
    assert time.monotonic() - started < 4


def test_client_that_never_logs_in_is_refused_after_seconds(firewall: Firewall, alice: Client, family: str) -> None:
    firewall.load(**HOLD)
    source, *_, stranger = alice.addresses(family)
    started = time.monotonic()
    assert alice.connect(587, source, patience=12) == "refused"
    assert 1 < time.monotonic() - started < 10
    assert firewall.counter("held") == 3
    assert firewall.counter("untrusted") == 1
    # It has waited: within the minute there is no need to wait again, on this port and for this source.
    assert alice.connect(587, source) == "refused"
    assert alice.connect_many([465], source) == {465: "silent"}
    assert alice.connect(587, stranger) == "silent"


def test_refused_client_gets_in_once_it_has_logged_in(firewall: Firewall, alice: Client, family: str) -> None:
    firewall.load(**HOLD)
    source = alice.addresses(family)[0]
    for _ in range(3):
        alice.connect(587, source, patience=0.1)
    assert alice.connect(587, source) == "refused"
    firewall.trust(source)
    assert alice.connect(587, source) == "open"
