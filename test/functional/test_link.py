"""How the agent tells the fleet when the fleet is slow, and when minion or master are away for a while."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Callable

import pytest

from mailfwlib import journal, messages
from support.agent import KEY, Agent
from support.firewall import Firewall
from support.net import LIMIT, Host, until
from support.steps import kill

PILLAR: dict[str, Any] = {"protection": {"type": "protected"}, "fleet": {"keys": [KEY]}}
#: What the agent has the minion's scheduler do, so that the host learns what it has missed.
CATCH_UP = {"run": "mailfw agent catches up with the fleet"}
#: Seconds that the next message waits at least for the echo of the one before, and seconds by which that does not wait.
UNECHOED, AT_ONCE = 2.0, 1.5
#: Logins that wait at most.
BOUND = 100_000


class Helper:
    """What the agent's helper says is up to the test; what it is told goes where the agent's events go."""

    def __init__(self, agent: Agent, host: Host, directory: Path):
        fifo = directory / "said"
        os.mkfifo(fifo)
        agent.stop()
        settings = json.loads(host.settings_file.read_text())
        command = settings["host"]["salt_helper"]
        settings["host"]["salt_helper"] = [
            "sh",
            "-c",
            'setpriv --pdeathsig KILL cat "$1" & exec cat >>"$0"',
            command[-1],
            str(fifo),
        ]
        host.settings_file.write_text(json.dumps(settings))
        agent.forget_events()
        agent.start()
        self._agent, self._said = agent, fifo.open("w", encoding="ascii")

    def say(self, word: str) -> None:
        """Say that the master can be reached, or not, and wait until the agent has heard it."""
        print(word, file=self._said, flush=True)
        until(lambda: self._agent.status()["reachable"] == (word == "up"), f"the agent hears {word!r}")

    def close(self) -> None:
        self._said.close()


@pytest.fixture
def helper(agent: Agent, host: Host, tmp_path: Path) -> Iterator[Helper]:
    made = Helper(agent, host, tmp_path)
    yield made
    made.close()


def announced(agent: Agent) -> list[messages.Message]:
    return [messages.verify(event["data"]["message"], [KEY]) for event in agent.events() if "tag" in event]


def echo(agent: Agent) -> None:
    """Have the newest message come back."""
    agent.ask("receive", [event for event in agent.events() if "tag" in event][-1]["data"]["message"])


def stays(condition: Callable[[], Any], seconds: float) -> bool:
    """Return whether a condition holds for some seconds."""
    end = time.monotonic() + seconds
    while condition():
        if time.monotonic() > end:
            return True
        time.sleep(0.02)
    return False


def test_the_next_message_waits_for_the_echo_of_the_one_before(agent: Agent) -> None:
    began = time.monotonic()
    agent.login("203.0.113.1")
    until(lambda: announced(agent), "the first is announced")
    for number in range(2, 6):
        agent.login(f"203.0.113.{number}")
    assert stays(lambda: len(announced(agent)) == 1 or time.monotonic() - began > UNECHOED, 0.5)
    echo(agent)
    (_, second) = until(lambda: len(found := announced(agent)) == 2 and found, "the others are announced", AT_ONCE)
    assert len(second.logins) == 4


def test_without_an_echo_the_next_message_goes_out_all_the_same(agent: Agent) -> None:
    agent.login("203.0.113.1")
    until(lambda: announced(agent), "the first is announced")
    agent.login("203.0.113.2")
    until(lambda: len(announced(agent)) == 2, "the second is announced")
    assert [len(one.logins) for one in announced(agent)] == [1, 1], "not when the first one goes again"


def test_after_an_echo_the_next_login_is_announced_at_once(agent: Agent) -> None:
    for number in (1, 2):
        agent.login(f"203.0.113.{number}")
        until(lambda number=number: len(announced(agent)) == number, "announced at once", AT_ONCE)
        echo(agent)
        time.sleep(0.3)  # a quiet period


def test_what_the_master_cannot_hear_waits_until_it_is_back(agent: Agent, firewall: Firewall, helper: Helper) -> None:
    helper.say("down")
    for number in (1, 2, 3):
        agent.login(f"203.0.113.{number}")
    assert "203.0.113.3 . 587" in firewall.elements("trusted_ipv4")
    assert stays(lambda: not agent.events(), 0.7)
    assert agent.status()["outbox"] == 3
    helper.say("up")
    (message,) = until(lambda: announced(agent), "announced when it is back", AT_ONCE)
    assert len(message.logins) == 3


def test_what_went_out_just_before_goes_out_again(agent: Agent, helper: Helper) -> None:
    agent.login("203.0.113.1")
    until(lambda: announced(agent), "announced")
    helper.say("down")
    helper.say("up")
    (before, after) = until(lambda: len(found := announced(agent)) == 2 and found, "announced again", AT_ONCE)
    assert before.logins.keys() == after.logins.keys()
    assert before.nonce != after.nonce


def test_a_host_that_can_be_reached_again_asks_for_what_it_has_missed_until_it_hears_itself(
    agent: Agent, helper: Helper
) -> None:
    """And once more then: the master may have told others in between."""
    helper.say("down")
    helper.say("up")
    until(lambda: CATCH_UP in agent.events(), "asks at once", AT_ONCE)
    (hello,) = until(lambda: announced(agent), "says hello")
    assert hello.logins == {}
    until(lambda: agent.events().count(CATCH_UP) == 2, "asks again")
    assert len(until(lambda: len(found := announced(agent)) == 2 and found, "says hello again")) == 2
    asked = agent.events().count(CATCH_UP)
    echo(agent)
    until(lambda: agent.events().count(CATCH_UP) == asked + 1, "asks once more", AT_ONCE)
    assert stays(lambda: agent.events().count(CATCH_UP) == asked + 1 and len(announced(agent)) == 2, 1)


def test_a_host_that_has_heard_nothing_for_a_while_asks_for_what_it_has_missed(agent: Agent) -> None:
    """The master was restarted, say, too fast for the helper to see it: then what others told is missing as well."""
    agent.login("203.0.113.1")
    until(lambda: len(announced(agent)) == 2, "announced again", LIMIT)
    assert CATCH_UP not in agent.events()
    echo(agent)
    until(lambda: CATCH_UP in agent.events(), "asks when it hears again")
    assert stays(lambda: agent.events().count(CATCH_UP) == 1 and len(announced(agent)) == 2, 1)


def test_a_helper_that_has_ended_is_no_reason_to_wait(agent: Agent, helper: Helper) -> None:
    helper.say("down")
    agent.login("203.0.113.1")
    kill(int(child.name) for child in agent.children())  # A snapshot may be taken as well.
    helper.close()
    until(lambda: announced(agent), "announced by another helper")


def test_the_outbox_is_bounded_and_says_what_it_dropped(agent: Agent, host: Host) -> None:
    agent.kill()
    now, first = time.time(), int(ip_address("10.0.0.1"))
    kept = "".join(f"{ip_address(first + number)} {now:.3f}\n" for number in range(BOUND + 3))
    host.call((journal.DIRECTORY / "outbox").write_text, kept)
    agent.start()
    status = agent.status()
    assert (status["outbox"], status["dropped"]) == (BOUND, 3)
    assert "10.0.0.1 is not announced" in agent.log()


def test_status_tells_how_long_ago_the_last_echo_came(agent: Agent) -> None:
    assert agent.status()["seconds_since_echo"] is None
    agent.login("203.0.113.1")
    until(lambda: announced(agent), "announced")
    began = time.time()
    echo(agent)

    def told() -> int:
        said = agent.status()["seconds_since_echo"]
        assert said <= round(time.time() - began)
        return said

    until(told, "a second later")
