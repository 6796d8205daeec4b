"""A fleet for the tests of this folder: see integration.fleet and integration.hosts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from saltfactories.manager import FactoriesManager
from saltfactories.plugins.event_listener import EventListener

from integration.fleet import Fleet, MailHost, factories, masters_host, running_mail_hosts, running_master
from integration.hosts import Host


@pytest.fixture(scope="package")
def master_host() -> Iterator[Host]:
    """The master's host; the tests run in its network."""
    if os.geteuid():
        pytest.fail("the integration tests need root, for namespaces and nft")
    with masters_host() as host:
        yield host


@pytest.fixture(scope="package")
def event_listener(master_host: Host) -> Iterator[EventListener]:
    """pytest-salt-factories' own, in the master's network instead of the machine's."""
    with EventListener() as listener:
        yield listener


@pytest.fixture(scope="package")
def salt_factories(event_listener: EventListener) -> Iterator[FactoriesManager]:
    """pytest-salt-factories' own, in a directory whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="mailfw-", dir="/tmp") as directory:
        yield factories(Path(directory), event_listener)


@pytest.fixture(scope="package")
def master_only(salt_factories: FactoriesManager, master_host: Host) -> Iterator[Fleet]:
    """A running master that mailfw.reactor has configured, and no mail host."""
    with running_master(salt_factories, master_host) as fleet:
        yield fleet


@pytest.fixture(scope="package")
def fleet(master_only: Fleet) -> Iterator[Fleet]:
    """Two mail hosts, mx1 and mx2, with mailfw applied and agents that run."""
    with running_mail_hosts(master_only):
        yield master_only


@pytest.fixture
def mx1(fleet: Fleet) -> MailHost:
    """The first mail host."""
    return fleet.hosts["mx1"]


@pytest.fixture
def mx2(fleet: Fleet) -> MailHost:
    """The second mail host."""
    return fleet.hosts["mx2"]
