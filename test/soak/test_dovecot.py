"""Five thousand logins at real Dovecots, of both versions."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lab.lablib.hosts import init_pid
from lab.lablib.topology import host as lab_host
from soak.growth import Growth, helper
from support import lab
from support.lab import ADDRESSES
from system.conftest import ENVIRONMENTS, HOSTS, fleet

__all__ = ["fleet"]

LOGINS, LOOKS = 2500, 25
#: So short that each address is announced again and again.
PERIOD = "60s"
#: Bytes for each login. In these minutes tables still fill: of each message, 350 bytes are kept for four minutes. What
#: is kept of each login for ever is for test_agent to see.
MOST = 500


def agent_process(host: str) -> Path:
    pid = lab.run(host, "systemctl", "show", "-P", "MainPID", "mailfw-agent").strip()
    return Path(f"/proc/{init_pid(lab_host(host))}/root/proc/{pid}")


@pytest.fixture
def short_period(fleet: object) -> None:
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, trusted={"period": PERIOD, "timeout": PERIOD, "per_user": 1000})
    lab.all_states(HOSTS, "state.apply", "mailfw")


def soak(host: str) -> list[Growth]:
    """Have people log in again and again, and look at agent and helper now and then; print what came of it."""
    agent = agent_process(host)
    lab.wait_until(lambda: helper(agent), "the helper")
    growths = [Growth(f"{host} agent", agent), Growth(f"{host} helper", helper(agent))]
    sources, began = lab.neighbourhood(), time.monotonic()
    targets = [(ADDRESSES[host][":" in source], source) for source, _ in zip(sources, range(50))]
    for look in range(LOOKS):
        for growth in growths:
            growth.look(look * LOGINS // LOOKS)
        lab.client("town", "log_in_often", targets=targets, times=LOGINS // LOOKS)
    for growth in growths:
        growth.look(LOGINS)
    took = time.monotonic() - began
    lab.wait_until(lambda: all(one.is_at_rest() for one in growths), "no more descriptors and threads than before")
    status = lab.salt(host, "mailfw.agent_status")[host]
    print(f"\n{host}: {LOGINS} logins in {took:.0f} s, {status['logins']} of hook and reports")
    print(*(growth.report() for growth in growths), sep="\n")
    assert status["logins"] > 1.99 * LOGINS  # Each twice, but for reports that Dovecot gives up under load.
    return growths


def test_five_thousand_logins_leave_nothing_behind(short_period: None) -> None:
    growths = [growth for found in lab.on_each(HOSTS, soak).values() for growth in found]
    assert max(growth.slope for growth in growths) < MOST
