"""Functional tests: the product's rules and agent on a real kernel, with real packets between namespaces."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from support.agent import Agent
from support.firewall import Firewall
from support.mail import MailServer
from support.net import FAMILIES, Client, Host, Net


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than five seconds")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    if os.geteuid():
        pytest.skip("needs root, for network namespaces")
    previous = signal.signal(signal.SIGTERM, _interrupt)
    made = Net(tmp_path_factory.mktemp("host"))
    yield made
    made.close()
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture(scope="session")
def mail(net: Net) -> Iterator[MailServer]:
    server = MailServer(net.host)
    yield server
    server.close()


@pytest.fixture
def host(net: Net) -> Host:
    return net.host


@pytest.fixture
def alice(net: Net, mail: MailServer) -> Client:
    return net.alice


@pytest.fixture
def mallory(net: Net, mail: MailServer) -> Client:
    return net.mallory


@pytest.fixture
def firewall(net: Net) -> Iterator[Firewall]:
    """A firewall with nothing loaded yet."""
    made = Firewall(net.host)
    yield made
    made.unload()
    net.disconnect()


@pytest.fixture
def loaded(firewall: Firewall, request: pytest.FixtureRequest) -> Firewall:
    """The rules for the PILLAR of the test's module."""
    firewall.load(**request.module.PILLAR)
    return firewall


@pytest.fixture
def agent(loaded: Firewall, host: Host, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Agent]:
    """An agent for the PILLAR of the test's module."""
    with closing(Agent(host, tmp_path, request.module.PILLAR)) as made:
        yield made


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param
