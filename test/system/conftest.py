"""The lab's hosts, booted anew for these tests, with mailfw applied by a highstate from the master."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import testinfra.host
from testinfra.backend.base import BaseBackend, CommandResult

from support import lab

from .inventory import inventory

HOSTS = ("mx1", "mx2")
ENVIRONMENTS = {"mx1": "prod", "mx2": "staging"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Say at once that a host has ended, rather than wait for it in every test."""
    if gone := lab.gone():
        pytest.fail(f"not there any more: {gone}")


@dataclass(frozen=True)
class Beginning:
    """What was on hosts that had never seen mailfw, and what the first states said and did there, by state ID."""

    before: dict[str, dict[str, str]]
    preview: dict[str, Any]
    first: dict[str, Any]


@pytest.fixture(scope="session")
def fleet() -> Iterator[Beginning]:
    """A lab booted anew, the master configured, and both mail hosts guarded."""
    lab.lab("down")
    try:
        lab.lab("up")
        lab.wait_for_minions("master", *HOSTS)
        before = lab.on_each((*HOSTS, "master"), inventory)
        lab.configure_master()
        preview = lab.all_states(HOSTS, "state.apply", "mailfw", "test=True")
        yield Beginning(before, preview, lab.all_states(HOSTS, "state.apply", "mailfw"))
    finally:
        lab.lab("down")


def on_both_hosts(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of one host, ``def test_it(host)``, on both hosts at the same time; report what fails on either."""

    @functools.wraps(test)
    def both(**fixtures: Any) -> None:
        lab.on_each(HOSTS, lambda host: test(host=host, **fixtures))

    others = [one for name, one in inspect.signature(test).parameters.items() if name != "host"]
    both.__signature__ = inspect.Signature(others)  # what pytest asks for
    return both


@pytest.fixture
def mode(fleet: Beginning) -> Any:
    """Give a host other pillar and apply it: ``mode("mx1", "private", trusted=...)``."""

    def change(host: str, mode: str, **others: Any) -> dict[str, Any]:
        lab.set_pillar(ENVIRONMENTS[host], protection={"type": mode}, **others)
        return lab.states(host, "state.apply", "mailfw")

    return change


class LabBackend(BaseBackend):
    """testinfra's way into a host of the lab."""

    NAME = "lab"

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name

    def run(self, command: str, *args: str, **kwargs: Any) -> CommandResult:
        script = self.get_command(command, *args)
        return self.run_local("%s exec %s -- sh -c %s", str(lab.LAB), self.name, script)


@pytest.fixture(scope="session")
def lab_host(fleet: Beginning) -> Callable[[str], testinfra.host.Host]:
    return lambda name: testinfra.host.Host(LabBackend(name))
