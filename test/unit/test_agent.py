"""The agent's socket: who is answered, and who is dropped."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mailfwlib import agent

PATIENCE = 0.2


class Slow:
    """Answers requests; ``slow`` takes longer than the server's patience with who says nothing."""

    def __init__(self) -> None:
        self.busy = threading.Event()

    def handle(self, request: bytes, uid: int) -> str:
        if request == b"slow":
            self.busy.set()
            time.sleep(3 * PATIENCE)
        return request.decode()


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def path(tmp_path: Path, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The socket of a server that runs."""
    monkeypatch.setattr(agent, "PATIENCE", PATIENCE)
    name = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(name)
        listener.listen()
        server = agent.Server(listener, slow.handle)
        thread = threading.Thread(target=server.serve, args=(lambda: None,))
        thread.start()
        yield name
        server.stopping = True
        thread.join()


def connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(10)
    connection.connect(path)
    return connection


def test_who_has_spoken_in_time_is_answered_however_long_others_take(path: str, slow: Slow) -> None:
    with connect(path) as first, connect(path) as second:
        time.sleep(PATIENCE / 2)  # both are connected
        first.send(b"slow")
        assert slow.busy.wait(10)
        second.send(b"a login")
        assert second.recv(100) == b"ok\0a login"
        assert first.recv(100) == b"ok\0slow"


def test_who_says_nothing_is_dropped(path: str) -> None:
    with connect(path) as connection:
        began = time.monotonic()
        assert connection.recv(100) == b""
        assert time.monotonic() - began >= PATIENCE / 2
