"""Hosts for the tests: each has its own network, processes and files on top of this machine's, and leaves nothing.

A host lives as long as its first process. That one dies with pytest, however pytest ends, and the kernel then ends
every other process of the host and removes its network, mounts and files.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

CLONE_NEWNET = 0x40000000
#: Seconds after which something that should happen has not happened.
LIMIT = 30.0
#: How often a set is listed at most, where elements come all the time.
MOST_LISTS = 4

#: What is written below these directories stays in the host; everything else of the machine is shared with it.
START = """
set -e
mount -t tmpfs tmpfs /run
for directory in /etc /usr/lib /usr/sbin /var/lib; do
  layer=/run/layers$directory
  mkdir -p $layer $layer.work
  mount -t overlay -o lowerdir=$directory,upperdir=$layer,workdir=$layer.work overlay $directory
done
ip link set lo up
echo ready
# A shell that waits also reaps what others leave.
while :; do sleep 1000; done
"""


def wait_for(what: str, found: Callable[[], Any], limit: float = LIMIT) -> Any:
    """Return what ``found`` returns as soon as that is true; fail when it takes longer than ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not (result := found()):
        assert time.monotonic() < deadline, f"waited {limit} s for {what}"
        time.sleep(0.05)
    return result


class Host:
    """A host in namespaces of its own."""

    def __init__(self, name: str):
        self.name = name
        namespaces = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._unshare = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "sh", "-c", START],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._unshare.stdout
        if self._unshare.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name}: its namespaces could not be made")
        pid = self._unshare.pid
        self.pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def remove(self) -> None:
        """End every process of the host, and with them the host."""
        self._unshare.kill()
        self._unshare.wait()
        wait_for(f"the end of {self.name}", lambda: not Path(f"/proc/{self.pid}/ns/net").exists())

    @property
    def enter(self) -> list[str]:
        """The command that runs another one in the host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", "--"]

    def path(self, path: str) -> Path:
        """Return a path of the host as pytest sees it."""
        return Path(f"/proc/{self.pid}/root{path}")

    def run(self, *command: str, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in the host."""
        done = subprocess.run([*self.enter, *command], capture_output=True, text=True, timeout=120, check=False, **more)
        assert not check or done.returncode == 0, f"{command} on {self.name}: {done.stdout}{done.stderr}"
        return done

    def nft(self, *arguments: str) -> str:
        """Return what ``nft`` prints on the host."""
        return self.run("nft", *arguments).stdout

    def elements(self, name: str) -> list[Any]:
        """Return the elements of one of mailfw's sets, as the kernel has them.

        A list may leave some out while others come and go: so many lists as it takes until one has nothing new.
        """
        found: dict[str, Any] = {}
        for _ in range(MOST_LISTS):
            before = len(found)
            for element in self._listed(name):
                value = element["elem"]["val"] if isinstance(element, dict) and "elem" in element else element
                found.setdefault(json.dumps(value), element)
            if len(found) == before:
                break
        return list(found.values())

    def _listed(self, name: str) -> list[Any]:
        listing = json.loads(self.nft("-j", "list", "set", "inet", "mailfw", name))
        return next(entry["set"] for entry in listing["nftables"] if "set" in entry).get("elem", [])

    def trusted(self) -> dict[str, dict[int, int]]:
        """Return who is trusted, as the kernel has it: address -> port -> seconds left."""
        found: dict[str, dict[int, int]] = {}
        for family in ("ipv4", "ipv6"):
            for element in self.elements(f"trusted_{family}"):
                address, port = element["elem"]["val"]["concat"]
                found.setdefault(address, {})[port] = element["elem"]["expires"]
        return found

    @contextlib.contextmanager
    def journal(self) -> Iterator[Callable[[], list[dict[str, str]]]]:
        """Take what journald would be given meanwhile; gives a function that returns the entries so far."""
        path = self.path("/run/systemd/journal/socket")
        path.parent.mkdir(parents=True, exist_ok=True)
        found: list[dict[str, str]] = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(path))
            listener.setblocking(False)

            def entries() -> list[dict[str, str]]:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        lines = listener.recv(65536).decode().splitlines()
                        found.append(dict(line.split("=", 1) for line in lines))
                return found

            try:
                yield entries
            finally:
                path.unlink()

    def ruleset(self) -> str:
        """Return the loaded ruleset without elements that come and go; empty when nothing is loaded."""
        return self.nft("-s", "-t", "list", "ruleset")

    def tables(self) -> str:
        """Return the loaded tables."""
        return self.nft("list", "tables")


@contextlib.contextmanager
def network_of(host: Host) -> Iterator[None]:
    """Put this thread, and what it starts, into a host's network."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as own, open(f"/proc/{host.pid}/ns/net") as other:

        def enter(namespace: Any) -> None:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

        enter(other)
        try:
            yield
        finally:
            enter(own)


def ip(*arguments: str) -> None:
    """Run ``ip`` in this thread's network."""
    subprocess.run(["ip", *arguments], check=True)
