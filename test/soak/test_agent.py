"""Fifty thousand logins through an agent, its Salt helper, a real minion and master."""

from __future__ import annotations

import time
from pathlib import Path

from integration.fleet import Fleet, MailHost
from integration.hosts import wait_for
from soak.growth import Growth, children

LOGINS, ADDRESSES, LOOKS = 50_000, 1000, 50
#: So short that each address is announced again and again.
PERIOD = "60s"
#: KiB for each thousand logins.
MOST = 16


def agent_process(host: MailHost) -> Path:
    return host.host.path(f"/proc/{host.agent.status()['pid']}")


def test_fifty_thousand_logins_leave_nothing_behind(fleet: Fleet) -> None:
    mx1 = fleet.hosts["mx1"]
    with fleet.pillar(mx1, trusted={"period": PERIOD, "timeout": PERIOD}):
        assert not fleet.apply(mx1).failed
        addresses = [fleet.new_address() for _ in range(ADDRESSES)]
        agent = agent_process(mx1)
        (helper,) = wait_for("the helper", lambda: children(agent))
        growths = [Growth("agent", agent), Growth("Salt helper", helper)]
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
        for growth in growths:
            print(growth.report())
        assert status["logins"] - before["logins"] == LOGINS
        assert messages > 10
        for growth in growths:
            growth.check(MOST)
