"""Fifty thousand logins through an agent, its Salt helper, a real minion and master; after as many that fill caches."""

from __future__ import annotations

import time
from pathlib import Path

from integration.fleet import Fleet, MailHost
from integration.hosts import wait_for
from soak.growth import Growth, helper

LOGINS, ADDRESSES, LOOKS = 100_000, 1000, 100
#: So short that each address is announced again and again.
PERIOD = "60s"
#: Bytes for each login: half of what the smallest leak of interest is.
MOST = 50


def agent_process(host: MailHost) -> Path:
    return host.host.path(f"/proc/{host.agent.status()['pid']}")


def test_logins_leave_nothing_behind(fleet: Fleet) -> None:
    mx1 = fleet.hosts["mx1"]
    with fleet.pillar(mx1, trusted={"period": PERIOD, "timeout": PERIOD}):
        assert not fleet.apply(mx1).failed
        addresses = [fleet.new_address() for _ in range(ADDRESSES)]
        agent = agent_process(mx1)
        growths = [Growth("agent", agent), Growth("Salt helper", wait_for("the helper", lambda: helper(agent)))]
        before, began = mx1.agent.status(), time.monotonic()
        for number in range(LOGINS):
            if number % (LOGINS // LOOKS) == 0:
                for growth in growths:
                    growth.look(number)
            mx1.agent.login(addresses[number % ADDRESSES])
        took = time.monotonic() - began
        wait_for("the last echo", lambda: mx1.agent.status()["outbox"] == 0)
        status = mx1.agent.status()
        for growth in growths:
            growth.look(LOGINS)
        messages = status["received"] - before["received"]
        print(f"\n{LOGINS} logins in {took:.0f} s, {messages} messages came back, {status['dropped']} dropped")
        print(*(growth.report() for growth in growths), sep="\n")
        assert status["logins"] - before["logins"] == LOGINS
        assert messages > 100
        wait_for("no more descriptors and threads than before", lambda: all(one.is_at_rest() for one in growths))
        assert max(growth.slope for growth in growths) < MOST
