"""The agent's socket: who is answered, and who is dropped."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mailfwlib import agent

PATIENCE = 1.0


class Slow:
    """Answers requests; ``slow`` takes longer than the server's patience with who says nothing."""

    def __init__(self) -> None:
        self.busy = threading.Event()

    def handle(self, request: bytes, uid: int) -> str:
        if request == b"slow":
            self.busy.set()
            time.sleep(1.5 * PATIENCE)
        return request.decode()


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def server(tmp_path: Path, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> Iterator[agent.Server]:
    """A server that runs."""
    monkeypatch.setattr(agent, "PATIENCE", PATIENCE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        server = agent.Server(listener, slow.handle)
        thread = threading.Thread(target=server.serve, args=(lambda: None,))
        thread.start()
        yield server
        server.stopping = True
        thread.join()


@pytest.fixture
def path(server: agent.Server, tmp_path: Path) -> str:
    return str(tmp_path / "socket")


def connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(10)
    connection.connect(path)
    return connection


def test_who_has_spoken_in_time_is_answered_however_long_others_take(
    server: agent.Server, path: str, slow: Slow
) -> None:
    with connect(path) as first, connect(path) as second:
        while len(server._deadlines) < 2:
            time.sleep(0.01)
        first.send(b"slow")
        assert slow.busy.wait(10)
        second.send(b"a login")
        assert second.recv(100) == b"ok\0a login"
        assert first.recv(100) == b"ok\0slow"


def test_who_says_nothing_is_dropped(path: str) -> None:
    began = time.monotonic()
    with connect(path) as connection:
        assert connection.recv(100) == b""
        assert time.monotonic() - began >= PATIENCE
