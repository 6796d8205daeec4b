"""Network namespaces to send real packets in: a mail host and its clients, joined by a switch.

They end with the test run, however it ends: a caretaker process deletes them when the run's end of its pipe closes.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CLONE_FS, CLONE_NEWNS, CLONE_NEWNET = 0x200, 0x20000, 0x40000000  # <linux/sched.h>
FAMILIES = ("ipv4", "ipv6")
#: A probe without an answer for this many seconds has found a closed port that says nothing.
PATIENCE = 0.5
#: A call into a namespace, and what a test waits for, take no longer than this many seconds.
LIMIT = 30
#: Seconds within which what a server has said already is at the client.
AT_ONCE = 0.05
#: Each waits until a server has done what it could do at once, had the machine not been slow.
turns: list[Callable[[], None]] = []

_libc = ctypes.CDLL(None, use_errno=True)


def _system_call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def until(condition: Callable[[], Any], what: str, seconds: float = LIMIT) -> Any:
    """Return what a condition returns once that is true; fail when it is not within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    return pytest.fail(f"not within {seconds} s: {what}")


class Namespace:
    """A network namespace, and threads that live in it: what they do, and the processes they start, is in there."""

    def __init__(self, name: str):
        subprocess.run(["ip", "netns", "add", name], check=True)
        self._live_in(name)
        self.ip("link set lo up")
        for conf in ("all", "default"):
            # Addresses are usable at once, and link-local ones, which nobody needs, do not disturb the packets.
            self.call(Path(f"/proc/sys/net/ipv6/conf/{conf}/accept_dad").write_text, "0")

    def _live_in(self, name: str) -> None:
        self.name = name
        self._threads = ThreadPoolExecutor(64, name, self._enter)

    def _enter(self) -> None:
        with open(f"/run/netns/{self.name}", "rb") as file:
            _system_call("setns", file.fileno(), CLONE_NEWNET)
        assert os.readlink("/proc/thread-self/ns/net") != os.readlink("/proc/self/ns/net")

    def start(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
        """Start a function in this namespace."""
        return self._threads.submit(function, *arguments, **options)

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return what a function returns in this namespace."""
        return self.start(function, *arguments, **options).result(LIMIT)

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in this namespace."""
        options = {"check": True, "text": True, "capture_output": True, "timeout": LIMIT, **options}
        return self.call(subprocess.run, command, **options)

    def ip(self, command: str) -> None:
        """Configure this namespace's network: ``ip`` without the word."""
        subprocess.run(["ip", "-n", self.name, *command.split()], check=True)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)


class Elsewhere(Namespace):
    """A network namespace that is there already."""

    def __init__(self, name: str):
        self._live_in(name)


class Host(Namespace):
    """The mail host. It has its own /run and mailfw's own directories too, so that the product runs as it is.

    ``directory`` is where /etc/mailfw is to be found from outside.
    """

    ipv4, ipv6 = "192.0.2.25", "2001:db8:25::25"

    def __init__(self, name: str, directory: Path):
        self.settings_file = directory / "settings" / "settings.json"
        with ThreadPoolExecutor(1) as thread:
            self._mounts = thread.submit(self._make_mounts, directory).result(LIMIT)
        super().__init__(name)

    @staticmethod
    def _make_mounts(directory: Path) -> int:
        """Make a mount namespace; return its file descriptor, with which it ends."""
        for name in (
            "settings",
            "etc/mailfw",
            "etc/nftables.d",
            "rules",
            "lib/mailfw",
            "state",
            "var/mailfw",
            "var/prometheus",
        ):
            (directory / name).mkdir(parents=True)
        (directory / "lib/mailfw/mailfwlib").symlink_to(REPOSITORY / "_utils/mailfwlib")
        tools = ("ruleset/files/mailfw-rules", "ruleset/files/mailfw-open")
        for name in ("agent/files/mailfw-agent", "dovecot/files/login_hook.py", *tools):
            copied = shutil.copy(REPOSITORY / "mailfw" / name, directory / "lib/mailfw")
            os.chmod(copied, 0o755)
        shutil.copy(REPOSITORY / "mailfw/dovecot/files/login-hook.sh", directory / "lib/mailfw/login-hook")
        (directory / "lib/mailfw/login-hook").chmod(0o755)
        _system_call("unshare", CLONE_NEWNS)
        mounts = (
            "mount --make-rprivate /",
            "mount -t tmpfs tmpfs /run",
            f"mount -t overlay -o lowerdir={directory}/etc:/etc overlay /etc",
            f"mount --bind {directory}/settings /etc/mailfw",
            f"mount --bind {directory}/rules /etc/nftables.d",
            f"mount -t overlay -o lowerdir={directory}/lib:/usr/lib overlay /usr/lib",
            f"mount -t overlay -o lowerdir={directory}/var:/var/lib overlay /var/lib",
            f"mount --bind {directory}/state /var/lib/mailfw",
            "mount -t tmpfs tmpfs /var/lib/prometheus",
        )
        for mount in mounts:
            subprocess.run(mount.split(), check=True)
        return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)

    def _enter(self) -> None:
        super()._enter()
        _system_call("unshare", CLONE_FS)
        _system_call("setns", self._mounts, CLONE_NEWNS)

    def close(self) -> None:
        """End the threads, and with them the mounts."""
        super().close()
        os.close(self._mounts)


class Session:
    """An open connection of a client to the mail host."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self.name: str = "{}:{}".format(*connection.getsockname()[:2])

    def say(self) -> None:
        """Send a line."""
        self._connection.sendall(b"noop\r\n")

    def talks(self) -> bool:
        """Send a line; return whether the server answers it."""
        try:
            self.say()
        except OSError:
            return False
        return self.hears()

    def hears(self) -> bool:
        """Return whether the server says something."""
        try:
            return bool(self._connection.recv(1000))
        except OSError:
            return False

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Client(Namespace):
    """A client with addresses of both families.

    The first two IPv6 addresses are in one /64, the third in another one of the same /48.
    """

    def __init__(self, name: str, ipv4: list[str], ipv6: list[str]):
        super().__init__(name)
        self.ipv4, self.ipv6 = ipv4, ipv6

    def addresses(self, family: str) -> list[str]:
        """Return the addresses of a family."""
        return {"ipv4": self.ipv4, "ipv6": self.ipv6}[family]

    def connect(self, port: int, source: str, patience: float = PATIENCE) -> str:
        """Connect from one of the addresses; return ``open`` (the server spoke), ``refused`` or ``silent``."""
        return self.connecting(port, source, patience).result(LIMIT)

    def connecting(self, port: int, source: str, patience: float = PATIENCE) -> Future[str]:
        """Start what :meth:`connect` does."""
        return self.start(_probe, port, source, patience)

    def connect_many(self, ports: list[int], source: str) -> dict[int, str]:
        """Connect to some ports at once; return what :meth:`connect` does for each."""
        probes = {port: self.connecting(port, source) for port in ports}
        return {port: probe.result(LIMIT) for port, probe in probes.items()}

    def open(self, port: int, source: str) -> Session:
        """Return a connection on which the server has spoken."""
        return Session(self.call(_open, port, source, LIMIT))


def _open(port: int, source: str, patience: float) -> socket.socket:
    server = Host.ipv6 if ":" in source else Host.ipv4
    connection = socket.create_connection((server, port), patience, (source, 0))
    try:
        if not greeting(connection):
            raise ConnectionResetError
    except BaseException:
        connection.close()
        raise
    return connection


def greeting(connection: socket.socket) -> bytes:
    """Return what the server says first, as ``recv`` does. The kernel connects, but the server speaks in its turn."""
    try:
        return connection.recv(1000)
    except TimeoutError:
        for take_turn in turns:
            take_turn()
        patience = connection.gettimeout()
        connection.settimeout(AT_ONCE)
        found = connection.recv(1000)
        connection.settimeout(patience)
        return found


def _probe(port: int, source: str, patience: float) -> str:
    try:
        _open(port, source, patience).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return "refused"
    except TimeoutError:
        return "silent"
    return "open"


class Net:
    """The mail host and two clients on one switch, every address on the link."""

    def __init__(self, directory: Path):
        prefix = f"mailfwt-{os.getpid()}"
        names = [f"{prefix}-{name}" for name in ("switch", "host", "alice", "mallory")]
        self._caretaker = subprocess.Popen(
            ["sh", "-c", 'read _; for name; do ip netns del "$name"; done', "sh", *names],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.switch = Namespace(names[0])
        self.switch.ip("link add switch type bridge mcast_snooping 0")
        self.switch.ip("link set switch up")
        self.host = Host(names[1], directory)
        self.alice = Client(
            names[2],
            ["198.51.100.10", "198.51.100.11", "198.51.100.12"],
            ["2001:db8:a::10", "2001:db8:a::11", "2001:db8:a:1::10"],
        )
        self.mallory = Client(
            names[3],
            ["203.0.113.10", "203.0.113.11", "203.0.113.12"],
            ["2001:db8:c::10", "2001:db8:c::11", "2001:db8:c:1::10"],
        )
        self._plug(self.host, Host.ipv4, Host.ipv6)
        for client in (self.alice, self.mallory):
            self._plug(client, *client.ipv4, *client.ipv6)

    def _plug(self, namespace: Namespace, *addresses: str) -> None:
        port = namespace.name.rpartition("-")[2]
        self.switch.ip(f"link add {port} type veth peer eth0 netns {namespace.name}")
        self.switch.ip(f"link set {port} master switch up")
        namespace.ip("link set eth0 up")
        for address in addresses:
            namespace.ip(f"addr add {address} dev eth0")
        namespace.ip("route add default dev eth0")
        namespace.ip("-6 route add default dev eth0")

    def disconnect(self) -> None:
        """End every TCP connection at both ends, so that the next test sees nothing of it."""
        for namespace in (self.alice, self.mallory, self.host):
            namespace.run("ss", "-K", "-t", "state", "connected")

    def close(self) -> None:
        """Remove everything."""
        for namespace in (self.switch, self.host, self.alice, self.mallory):
            namespace.close()
        self._caretaker.communicate(timeout=LIMIT)
