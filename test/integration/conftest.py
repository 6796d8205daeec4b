"""A fleet for the tests of this folder: see integration.fleet and integration.hosts."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from salt._logging import shutdown_temp_handler
from saltfactories.manager import FactoriesManager
from saltfactories.plugins.event_listener import EventListener

from integration.fleet import NETWORK, Applied, Fleet, MailHost
from integration.hosts import Host, ip, network_of

# Salt keeps early log records for a stream that pytest has closed by the time Salt writes them.
shutdown_temp_handler()


@pytest.fixture(scope="package")
def master_host() -> Iterator[Host]:
    """The master's host; the tests run in its network."""
    if os.geteuid():
        pytest.fail("the integration tests need root, for namespaces and nft")
    host = Host("master")
    try:
        with network_of(host):
            ip("link", "add", "lan", "type", "bridge")
            ip("address", "add", f"{NETWORK}.1/24", "dev", "lan")
            ip("link", "set", "lan", "up")
            yield host
    finally:
        host.remove()


@pytest.fixture(scope="package")
def event_listener(master_host: Host) -> Iterator[EventListener]:
    """pytest-salt-factories' own, in the master's network instead of the machine's."""
    with EventListener() as listener:
        yield listener


@pytest.fixture(scope="package")
def salt_factories(event_listener: EventListener) -> Iterator[FactoriesManager]:
    """pytest-salt-factories' own, in a directory whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="mailfw-", dir="/tmp") as directory:
        yield FactoriesManager(
            root_dir=Path(directory),
            event_listener=event_listener,
            log_server_host="127.0.0.1",
            log_server_port=0,
            log_server_level="error",
            python_executable=sys.executable,
            slow_stop=False,
        )


@pytest.fixture(scope="package")
def master_only(salt_factories: FactoriesManager, master_host: Host) -> Iterator[Fleet]:
    """A running master that mailfw.reactor has configured, and no mail host."""
    fleet = Fleet(salt_factories, master_host)
    applied = fleet.configure_master()
    assert not applied.failed
    with fleet.master.started():
        yield fleet


@pytest.fixture(scope="package")
def fleet(master_only: Fleet) -> Iterator[Fleet]:
    """Two mail hosts, mx1 and mx2, with mailfw applied and agents that run."""
    with master_only.mail_host("mx1") as mx1, master_only.mail_host("mx2") as mx2:
        for sls in ("host", "caught_up"):
            for returned in master_only.call_all([mx1, mx2], "state.apply", sls).values():
                assert not Applied(returned).failed
            if sls == "host":
                mx1.agent.start()
                mx2.agent.start()
        yield master_only


@pytest.fixture
def mx1(fleet: Fleet) -> MailHost:
    """The first mail host."""
    return fleet.hosts["mx1"]


@pytest.fixture
def mx2(fleet: Fleet) -> MailHost:
    """The second mail host."""
    return fleet.hosts["mx2"]
