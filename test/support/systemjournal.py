"""What a host's journal is given: the socket that journald has, in the host's own /run."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from mailfwlib import audit
from support.net import Host


class SystemJournal:
    """Takes entries of the native protocol, as journald would."""

    def __init__(self, host: Host):
        self._host = host
        self._socket: socket.socket = host.call(self._listen)
        self._entries: list[dict[str, str]] = []

    @staticmethod
    def _listen() -> socket.socket:
        os.makedirs(os.path.dirname(audit.SOCKET), exist_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(audit.SOCKET)
        listener.setblocking(False)
        return listener

    def entries(self, action: str = "") -> list[dict[str, str]]:
        """Return the entries so far, of all actions or of one."""
        while True:
            try:
                lines = self._socket.recv(65536).decode().splitlines()
            except BlockingIOError:
                break
            self._entries.append(dict(line.split("=", 1) for line in lines))
        return [one for one in self._entries if not action or one["MAILFW_ACTION"] == action]

    def close(self) -> None:
        """Close and remove the socket."""
        self._socket.close()
        self._host.call(Path(audit.SOCKET).unlink)
