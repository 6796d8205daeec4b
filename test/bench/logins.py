"""Logins at real Dovecots of a mail host, which differ in what they run after one; and at its agent, many at once."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import subprocess
import time
from pathlib import Path

from bench import servers
from integration.fleet import LOGIN_USER, NETWORK, SOCKET, MailHost
from integration.hosts import wait_for

#: What Dovecot runs after a login: the arms of the comparison.
NOTHING, EXEC_ONLY, MAILFW, SALT_CALL = "no script", "exec only", "mailfw", "salt-call"
PORT = 143
#: As mailfw's file of Dovecot's configuration sets it.
_SCRIPT = """
service imap {{
  executable = imap bench-login
}}
service bench-login {{
  executable = script-login {script}
  user = {user}
  process_limit = 1024
  unix_listener bench-login {{
  }}
}}
"""
#: Reports logins one after the other for some seconds, each as Dovecot's hook does; prints how long each waited.
_REPORTER = """
import json, socket, sys, time
path, seconds, addresses, waits = sys.argv[1], float(sys.argv[2]), sys.argv[3:], []
sys.stdin.read(1)
ends = time.monotonic() + seconds
while (began := time.monotonic()) < ends:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        connection.connect(path)
        address = addresses[len(waits) % len(addresses)]
        connection.send(f"login\\0{address}\\0{address}@example.org".encode())
        assert connection.recv(4096).startswith(b"ok\\0")
    waits.append(time.monotonic() - began)
print(json.dumps(waits))
"""


def user_of(source: str) -> str:
    """Return the user who logs in from an address, and from no other."""
    return f"{source}@example.org"


class Dovecots:
    """One Dovecot for each arm, all on one mail host, each on an address of its own."""

    def __init__(self, host: MailHost, directory: Path, salt_call: list[str]):
        self._processes = []
        self._addresses = {}
        event = [*salt_call, "--log-level=quiet", "event.send", "bench/login"]
        scripts = {
            NOTHING: None,
            EXEC_ONLY: _script(directory / "exec-only", ""),
            MAILFW: Path("/usr/lib/mailfw/login-hook"),
            SALT_CALL: _script(directory / "salt-call", f"{shlex.join(event)} ip=$IP >/dev/null 2>&1 </dev/null"),
        }
        for number, (arm, script) in enumerate(scripts.items(), 101):
            address = self._addresses[arm] = f"{NETWORK}.{number}"
            host.host.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
            # salt-call reads the minion's key.
            user = "root" if arm == SALT_CALL else LOGIN_USER[0]
            services = _SCRIPT.format(script=script, user=user) if script else ""
            command = servers.configured_dovecot(directory / f"dovecot-{number}", [address], PORT, services)
            self._processes.append(subprocess.Popen([*host.host.enter, *command]))

    def log_in(self, arm: str, source: str) -> float:
        """Log in over IMAP; return the seconds from the connection to the tagged OK."""
        began = time.perf_counter()
        with socket.create_connection((self._addresses[arm], PORT), 30, (source, 0)) as connection:
            said = connection.recv(4096)
            connection.sendall(f"a LOGIN {user_of(source)} {servers.PASSWORD}\r\n".encode())
            while b"\na OK" not in b"\n" + said:
                received = connection.recv(4096)
                assert received, f"{arm}: the login was refused: {said!r}"
                said += received
            took = time.perf_counter() - began
            connection.sendall(b"b LOGOUT\r\n")
            while connection.recv(4096):
                pass
        return took

    def wait(self, source: str) -> None:
        """Wait until they all take logins."""
        for arm in self._addresses:
            wait_for(f"the Dovecot of {arm}", lambda arm=arm: self._takes_logins(arm, source))

    def _takes_logins(self, arm: str, source: str) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.log_in(arm, source))
        return False


def _script(path: Path, line: str) -> Path:
    path.write_text(f'#!/bin/sh\n{line}\nexec "$@"\n')
    path.chmod(0o755)
    return path


def at_once(host: MailHost, addresses: list[str], connections: int, seconds: float) -> list[float]:
    """Report logins of some addresses to a host's agent over several connections; return how long each waited."""
    share = len(addresses) // connections
    command = ["/usr/bin/python3", "-ISc", _REPORTER, str(host.host.path(SOCKET)), str(seconds)]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        reporters = [
            stack.enter_context(subprocess.Popen([*command, *addresses[place * share :][:share]], **options))
            for place in range(connections)
        ]
        time.sleep(0.3)  # Until each Python is there; they begin when there is something to read.
        for reporter in reporters:
            reporter.stdin.write("go")
            reporter.stdin.flush()
        return [wait for reporter in reporters for wait in json.loads(reporter.communicate()[0])]
