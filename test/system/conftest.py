"""The lab's hosts, booted anew for these tests, with mailfw applied by a highstate from the master."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import testinfra.host
from testinfra.backend.base import BaseBackend, CommandResult

from support import lab

HOSTS = ("mx1", "mx2")
ENVIRONMENTS = {"mx1": "prod", "mx2": "staging"}


@dataclass(frozen=True)
class Beginning:
    """What the first states said and did on hosts that had never seen mailfw: host -> results by state ID."""

    preview: dict[str, Any]
    first: dict[str, Any]


@pytest.fixture(scope="session")
def fleet() -> Iterator[Beginning]:
    """A lab booted anew, the master configured, and both mail hosts guarded."""
    lab.lab("down")
    try:
        lab.lab("up")
        lab.configure_master()
        preview = {host: lab.states(host, "state.apply", "mailfw", "test=True") for host in HOSTS}
        yield Beginning(preview, {host: lab.states(host, "state.apply", "mailfw") for host in HOSTS})
    finally:
        lab.lab("down")


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
