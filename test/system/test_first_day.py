"""The first day: a host observes, says who would have been refused, and trusts who is logged in before it enforces."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from support import lab
from support.lab import ADDRESSES, Ongoing

from .conftest import ENVIRONMENTS, HOSTS

TOWN, BOT = "198.19.0.10", "198.18.0.66"
PILLAR = {"protection": {"type": "protected"}, "reaction": {"untrusted": "reject"}}


def apply(**pillar: Any) -> None:
    for host in HOSTS:
        lab.set_pillar(ENVIRONMENTS[host], **pillar)
    lab.all_states(HOSTS, "state.apply", "mailfw")


def submission(client: str) -> list[str]:
    return lab.client(client, "probe", targets=[[ADDRESSES[host][0], 587] for host in HOSTS])


@pytest.fixture(autouse=True)
def _as_before(fleet):
    yield
    apply(protection={"type": "autoban"})


def test_observe_seed_and_enforce(fleet):
    """Town's sessions are as if they were older than mailfw: their logins have earned nothing."""
    apply(**PILLAR, enforce=False, trusted={"never": [f"{TOWN}/32"]})
    with ExitStack() as sessions:
        for host in HOSTS:
            sessions.enter_context(Ongoing("town", "hold_session", address=ADDRESSES[host][0]))
        assert submission("town") + submission("bot") == ["open"] * 4
        for host in HOSTS:
            rows = lab.salt(host, "mailfw.observed", "service=submission")[host]["rows"]
            assert {TOWN, BOT} <= {row["address"] for row in rows}
            seeded = lab.salt(host, "mailfw.seed")[host]
            assert {row["address"]: row["result"] for row in seeded["rows"]}[TOWN] == "is in mailfw:trusted:never"
        apply(**PILLAR)
        assert submission("town") + submission("bot") == ["refused"] * 4
        for host in HOSTS:
            seeded = lab.salt(host, "mailfw.seed")[host]
            again = lab.salt(host, "mailfw.seed")[host]
            assert seeded["problems"] == again["problems"] == []
            # Other tests have ended the trust of some addresses; they stay so.
            assert not [row for row in again["rows"] if "an operator has ended" not in row["result"]]
        assert submission("town") == ["open"] * 2
        assert submission("bot") == ["refused"] * 2
