"""Sessions that outlive the period of their trust: the address stays trusted, here and elsewhere, until they end."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest

from support import lab
from support.lab import ADDRESSES, Ongoing

from .conftest import ENVIRONMENTS, HOSTS

#: Seconds: the period of a trust, and when the short sessions end.
PERIOD, SHORT = 12, 13
#: How the hosts know the clients, over IPv4 and IPv6.
HOME, CAFE = ("198.51.100.10", "2001:db8:0:2::"), ("203.0.113.10", "2001:db8:0:3::")
TOWN, BOT = ("198.19.0.10", "2001:db8:0:4::"), ("198.18.0.66", "2001:db8:0:66::")


@pytest.fixture(scope="module", autouse=True)
def short_period(fleet):
    for host in HOSTS:
        pillar = {"reaction": {"untrusted": "reject"}, "trusted": {"period": f"{PERIOD}s"}}
        lab.set_pillar(ENVIRONMENTS[host], protection={"type": "protected"}, **pillar)
    lab.all_states(HOSTS, "state.apply", "mailfw")
    lab.forget(*HOSTS)


def trusted(host: str, version: int) -> set[str]:
    found = lab.elements(host, f"trusted_ipv{version}")
    return {element.partition(" . ")[0] for element in found if element.endswith(" . 587")}


def test_trust_lasts_as_long_as_the_session():
    """Long sessions of home on both hosts, of town on one; short ones of cafe; those of bot, which is untrusted."""
    began = time.monotonic()
    seen: list[tuple[float, str, int, set[str]]] = []

    def passed() -> float:
        return time.monotonic() - began

    def watch(until: float) -> None:
        """Look again and again, and once more after that."""
        age = 0.0
        while age < until:
            age = passed()
            for host in HOSTS:
                seen.extend((age, host, version, trusted(host, version)) for version in (4, 6))
            time.sleep(1)

    with ExitStack() as long, ExitStack() as short:
        for host in HOSTS:
            for address in ADDRESSES[host]:
                source = "2001:db8:0:2::10" if ":" in address else None
                long.enter_context(Ongoing("home", "hold_session", address=address, source=source))
                long.enter_context(Ongoing("bot", "hold_session", address=address))
                short.enter_context(Ongoing("cafe", "hold_session", address=address))
        for address in (ADDRESSES["mx1"][0], ADDRESSES["mx2"][1]):
            long.enter_context(Ongoing("town", "hold_session", address=address))
        for address in BOT:
            lab.salt(",".join(HOSTS), "mailfw.untrust", address, "services=submission")
        untrusted_at = passed()
        for host in HOSTS:
            lab.run(host, "systemctl", "restart", "mailfw-agent")
        watch(SHORT)
        closing = passed()
        short.close()
        over = passed() + PERIOD + 3
        watch(over)
        for host in HOSTS:
            for address, source in zip(ADDRESSES[host], ("198.51.100.10", "2001:db8:0:2::11")):
                sent = lab.client("home", "send", address=address, source=source, subject="at the end of a session")
                assert sent["refused"] == {}

    for age, host, version, found in seen:
        home, town, cafe, bot = (client[version == 6] for client in (HOME, TOWN, CAFE, BOT))
        assert {home, town} <= found, f"{host} trusts who is logged in, here or elsewhere, after {age:.0f} s"
        assert cafe in found or age > closing, f"{host} trusts who is logged in for a short time, after {age:.0f} s"
        assert cafe not in found or age < over, f"{host} trusts whose session has ended, after {age:.0f} s"
        assert bot not in found or age < untrusted_at + 1, f"{host} trusts whom an operator untrusts, after {age:.0f} s"
