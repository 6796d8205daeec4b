"""Server namespaces, each on a wire of its own to one client namespace: veth pairs without a bridge.

A server has any number of rulesets, each in a table of its own, and enforces one: the others sleep (nft: dormant). All
are measured with the same processes, sockets and memory, for two servers that do the same differ by several percent.

Everything ends with the program, however it ends: a caretaker process kills what is left in the server namespaces and
deletes all namespaces when the program's end of its pipe closes.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench import servers
from support.net import CLONE_NEWNET, _system_call, until

#: Where this program listens: next to Dovecot, on another address.
PORT = servers.IMAP_PORT
#: Trusted clients have addresses of 100.64.0.0/10 (RFC 6598), others of 198.18.0.0/15 (RFC 2544), as many as they like.
TRUSTED_NETWORK, OTHER_NETWORK = "100.64.0.0/10", "198.18.0.0/15"
TRUSTED_IPV6, OTHER_IPV6 = "fd64::/32", "fd18::/32"

_CARETAKER = """
read _
for name; do
  ip netns pids "$name" | xargs -r kill -KILL
  ip netns del "$name"
done
ip netns del "$0"
"""


def run(*command: str, script: str | None = None) -> str:
    """Return what a command prints; raise RuntimeError with what it says when it fails."""
    done = subprocess.run(command, input=script, text=True, capture_output=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Be in a network namespace for a while: the sockets made there stay there."""
    with open("/proc/thread-self/ns/net", "rb") as before, open(f"/run/netns/{namespace}", "rb") as there:
        _system_call("setns", there.fileno(), CLONE_NEWNET)
        try:
            yield
        finally:
            _system_call("setns", before.fileno(), CLONE_NEWNET)


class Server:
    """A server namespace. The mail servers have a pair of addresses, this program another."""

    def __init__(self, number: int, name: str, client: str):
        self.name = name
        self._enforced = ""
        self.processes: list[subprocess.Popen[bytes]] = []
        self.mail = {4: f"10.{number}.0.1", 6: f"fd00:{number}::1"}
        self.address = {4: f"10.{number}.0.3", 6: f"fd00:{number}::3"}
        run("ip", "netns", "add", name)
        sysctls = {
            # Else a connection's entry outlives it by 2 minutes, and the machine's limit is soon reached.
            "netfilter/nf_conntrack_tcp_timeout_time_wait": "1",
            # The timers of thousands of sockets in TIME-WAIT would run in the middle of a batch.
            "ipv4/tcp_max_tw_buckets": "0",
            "ipv6/conf/all/accept_dad": "0",
            "ipv6/conf/default/accept_dad": "0",
        }
        with inside(name):
            for key, value in sysctls.items():
                Path(f"/proc/sys/net/{key}").write_text(value)
        wire = f"wire{number}"
        run("ip", "-n", client, "link", "add", wire, "type", "veth", "peer", "eth0", "netns", name)
        for namespace, device in ((client, wire), (name, "eth0")):
            # Every packet passes the rules on its own, also on the way out.
            run("ip", "-n", namespace, "link", "set", device, "up", "gso_max_segs", "1")
            run("ip", "netns", "exec", namespace, "ethtool", "-K", device, "tso", "off", "gso", "off", "gro", "off")
        self._ip("link set lo up")
        for last in (1, 3):
            self._ip(f"addr add 10.{number}.0.{last}/24 dev eth0")
            self._ip(f"addr add fd00:{number}::{last}/64 dev eth0")
        run("ip", "-n", client, "addr", "add", f"10.{number}.0.2/24", "dev", wire)
        run("ip", "-n", client, "addr", "add", f"fd00:{number}::2/64", "dev", wire)
        for network in (TRUSTED_NETWORK, OTHER_NETWORK):
            self._ip(f"route add {network} via 10.{number}.0.2")
        for network in (TRUSTED_IPV6, OTHER_IPV6):
            self._ip(f"route add {network} via fd00:{number}::2")
        self.listeners = {}
        with inside(name):
            for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
                listener = socket.socket(family)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((self.address[version], PORT))
                listener.listen(64)
                self.listeners[version] = listener

    def _ip(self, command: str) -> None:
        run("ip", "-n", self.name, *command.split())

    def load(self, rules: str, script: str) -> None:
        """Load a ruleset, of the one table inet mailfw or inet filter, under a name of its own; it sleeps."""
        script = re.sub(r"\binet (mailfw|filter)\b", f"inet {rules}", script)
        self._nft("-f", "-", script=script)
        self._nft(f"add table inet {rules} {{ flags dormant; }}")

    def enforce(self, rules: str) -> None:
        """Let a ruleset be in force, and no other; none if the name is empty."""
        if rules == self._enforced:
            return
        change = [f"add table inet {self._enforced} {{ flags dormant; }}"] if self._enforced else []
        self._nft("; ".join(change + ([f"add table inet {rules}"] if rules else [])))
        self._enforced = rules

    def _nft(self, *arguments: str, script: str | None = None) -> None:
        run("ip", "netns", "exec", self.name, "nft", *arguments, script=script)

    def serve(self, directory: Path, core: int) -> None:
        """Start the mail servers on one core."""
        directory.mkdir()
        self.processes = [
            servers.dovecot(self.name, self.mail, directory / "dovecot", core),
            servers.postfix(self.name, self.mail, directory / "postfix", core),
        ]

    def serves(self) -> bool:
        """Return whether its mail servers take connections, seen from the client namespace."""
        try:
            for address in self.mail.values():
                for port in (servers.IMAP_PORT, servers.SUBMISSION_PORT):
                    with socket.create_connection((address, port), 5) as client:
                        if not client.recv(100):
                            return False
        except OSError:
            return False
        return True

    def processor_time(self) -> dict[int, int]:
        """Return the nanoseconds that each process of the mail servers has run so far."""
        found = {}
        for first in self.processes:
            children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text()
            for pid in (first.pid, *map(int, children.split())):
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    found[pid] = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
        return found

    def close(self) -> None:
        """End the mail servers, and listen no more."""
        for listener in self.listeners.values():
            listener.close()
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()


class Wires:
    """The client namespace, in which this program is from now on, and its servers."""

    def __init__(self, count: int, directory: Path, core: int):
        prefix = f"mailfwb-{os.getpid()}"
        self.client = f"{prefix}-client"
        namespaces = [f"{prefix}-{number}" for number in range(1, count + 1)]
        self._caretaker = subprocess.Popen(
            ["sh", "-c", _CARETAKER, self.client, *namespaces],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.servers: list[Server] = []
        try:
            self._make_client()
            for number, name in enumerate(namespaces, 1):
                self.servers.append(Server(number, name, self.client))
                self.servers[-1].serve(directory / str(number), core)
            with open(f"/run/netns/{self.client}", "rb") as there:
                _system_call("setns", there.fileno(), CLONE_NEWNET)
            until(lambda: all(server.serves() for server in self.servers), "the mail servers answer")
        except BaseException:
            self.close()
            raise

    def _make_client(self) -> None:
        run("ip", "netns", "add", self.client)
        run("ip", "-n", self.client, "link", "set", "lo", "up")
        for network in (TRUSTED_NETWORK, OTHER_NETWORK, TRUSTED_IPV6, OTHER_IPV6):
            run("ip", "-n", self.client, "route", "add", "local", network, "dev", "lo")
        with inside(self.client):
            Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("1024 65535")
            Path("/proc/sys/net/ipv6/ip_nonlocal_bind").write_text("1")
            for conf in ("all", "default"):
                Path(f"/proc/sys/net/ipv6/conf/{conf}/accept_dad").write_text("0")

    def close(self) -> None:
        """Remove everything."""
        for server in self.servers:
            server.close()
        self._caretaker.communicate(timeout=60)
