"""The product's agent on the mail host, its socket made by the test as systemd would make it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mailfwlib import client, journal, keeper, messages, settings
from mailfwlib.parse import address
from support import steps
from support.net import LIMIT, Host, until

KEY = "0123456789abcdef0123456789abcdef"
#: What Dovecot shows when it reports a login.
REPORT_SECRET = KEY * 2
#: This host's minion id, and the user that Dovecot's login hook runs as.
HOST_ID, LOGIN_USER = "mx1.example", "nobody"
#: What the agent keeps on disk of logins.
KEPT = ("outbox", "ended", "users", "revoked", "familiar", "logins", "observed")
#: The start that systemd gives a service with a socket: sd_listen_fds(3).
_START = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 </dev/null'
#: What a process of another user asks the agent.
_ASK = """
import sys
sys.path.insert(0, "/usr/lib/mailfw")
from mailfwlib import client
print(client.ask(*sys.argv[1:]))
"""


class Agent:
    """The agent, asked as the host's processes ask it. It has the keys and settings that the pillar gives it.

    Where Salt's event bus would be, ``events`` is a file with a line for each event that the agent fires.
    """

    def __init__(self, host: Host, directory: Path, pillar: dict[str, Any]):
        self._host = host
        self._log = directory / "agent.log"
        self._events = directory / "events"
        self.configure(pillar)
        for kept in KEPT:  # of another test's agent
            host.call((journal.DIRECTORY / kept).unlink, missing_ok=True)
        self._listener: socket.socket = host.call(self._listen)
        self.start()

    def configure(self, pillar: dict[str, Any], report_secret: str = REPORT_SECRET) -> None:
        """Replace the settings file, as the state does it."""
        wanted = settings.resolve(pillar)
        wanted["host"] = {
            "id": HOST_ID,
            "login_users": ["there-is-no-such-user", LOGIN_USER],
            "report_secret": report_secret,
            "salt_helper": ["sh", "-c", 'exec cat >>"$0"', str(self._events)],
        }
        fresh = self._host.settings_file.with_suffix(".new")
        fresh.write_text(json.dumps(wanted), encoding="utf-8")
        fresh.replace(self._host.settings_file)

    @staticmethod
    def _listen() -> socket.socket:
        """Make the socket; it is open to everyone, so that the agent itself has to tell users apart."""
        os.makedirs(os.path.dirname(client.SOCKET), exist_ok=True)
        Path(client.SOCKET).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(client.SOCKET)
        os.chmod(client.SOCKET, 0o666)
        listener.listen(4096)
        return listener

    def start(self) -> None:
        """Start the agent."""
        # If the thread that has started it ends, with the test run or without, the agent ends as well.
        command = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", _START, "sh", "/usr/lib/mailfw/mailfw-agent"]
        with self._log.open("ab") as log:
            self._process = self._host.call(subprocess.Popen, command, stdin=self._listener, stderr=log)

    def restart(self) -> None:
        """Stop the agent and start it again; its socket stays, as systemd's does."""
        self.stop()
        self.start()

    def stop(self) -> int:
        """End the agent as systemd does; return its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def kill(self) -> None:
        """End the agent and what it has started at once, as systemd does; its socket stays."""
        killed = steps.processes(self.pid) if self.running() else []
        steps.kill(killed)
        self._process.wait()
        until(lambda: not any(map(_is_alive, killed)), "they are dead")

    def children(self) -> list[Path]:
        """Return the processes that the agent has started, whichever of its threads did: their directories in /proc."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [Path("/proc", pid) for task in tasks for pid in task.read_text().split()]

    @property
    def pid(self) -> int:
        """The agent's process."""
        return self._process.pid

    def running(self) -> bool:
        """Return whether the agent has not ended."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the agent, without waiting for what it has to finish, and its socket."""
        self.kill()
        self._listener.close()

    def ask(self, verb: str, *arguments: str) -> str:
        """Ask as root; return the answer. Raises AgentError."""
        return self._host.call(client.ask, verb, *arguments)

    def ask_as(self, user: str, verb: str, *arguments: str) -> str:
        """Ask as another user; return the answer, or the error as ``AgentError: ...``."""
        drop = ("setpriv", "--reuid", user, "--regid", "nogroup", "--clear-groups")
        done = self._host.run(*drop, "/usr/bin/python3", "-I", "-c", _ASK, verb, *arguments, check=False)
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().rpartition("mailfwlib.client.")[2]

    def remember(self, element: str, seconds: int, *ports: int, note: str) -> None:
        """Tell of a trust that an operator has given, as the module does once the kernel has it."""
        self.ask("remember", element, ",".join(map(str, ports)), str(time.time() + seconds), note)

    def send(self, packet: bytes) -> bytes:
        """Send any packet as root; return the reply, empty when the agent only hangs up."""
        with self.connect() as connection:
            connection.send(packet)
            return connection.recv(client.LONGEST)

    def connect(self) -> socket.socket:
        """Return a connection of root to the agent."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(LIMIT)
        self._host.call(connection.connect, client.SOCKET)
        return connection

    def login(self, source: str, user: str | None = None) -> str:
        """Report a login, by default of a user who logs in from nowhere else."""
        return self.ask("login", source, f"{source}@example.org" if user is None else user)

    def status(self) -> dict[str, Any]:
        """Return the agent's status."""
        return json.loads(self.ask("status"))

    def log(self) -> str:
        """Return what the agent has logged."""
        return self._log.read_text(encoding="utf-8")

    def events(self) -> list[dict[str, Any]]:
        """Return the events that the agent has fired."""
        if not self._events.exists():
            return []
        return [json.loads(line) for line in self._events.read_text(encoding="utf-8").splitlines(keepends=True)]

    def forget_events(self) -> None:
        """Forget the events that were fired so far."""
        self._events.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty once it is dead, whether or not it is reaped
    return False


@contextlib.contextmanager
def snapshots_that_hang(host: Host, directory: Path) -> Iterator[Path]:
    """Have the tool do all but snapshots; a file says which process hangs."""
    real, hanging, pid = (directory / name for name in ("real", "hanging", "pid"))
    real.write_bytes(host.call(Path(keeper.TOOL).read_bytes))
    hanging.write_text(
        f"#!/bin/sh\n[ $1 = save ] && echo $$ >{pid} && exec sleep 600\nexec /usr/bin/python3 -IB {real} $1\n"
    )
    hanging.chmod(0o755)
    host.run("mount", "--bind", str(hanging), keeper.TOOL)
    try:
        yield pid
    finally:
        host.run("umount", keeper.TOOL)


def signed(logins: dict[str, float], sender: str = "mx2.example", key: str = KEY, **options: Any) -> str:
    """Return the message of a mail host that announces logins: address -> Unix time.

    With ``users``, address -> user's key -> Unix time, it says whose they were.
    """
    found = {address(text): at for text, at in logins.items()}
    return messages.sign(sender, options.pop("nonce", messages.new_nonce()), found, key, **options)
