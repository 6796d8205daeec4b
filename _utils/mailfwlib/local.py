"""The host's processes, users, files and networks, as they are just now."""

from __future__ import annotations

import ipaddress
import json
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mailfwlib import sockets
from mailfwlib.parse import Network

#: Seconds that a command may take.
TIMEOUT = 5
#: Where programs of the system are, for whoever has another PATH.
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
#: Kinds of links that lead into containers and virtual machines of this host.
VIRTUAL = ("veth", "tun")


class Process(NamedTuple):
    """A process: its name, at most 15 characters long, and when it was started, in Unix time."""

    name: str
    started: float


def output(*command: str) -> str:
    """Return what a command prints, whatever its exit status is. Raises OSError, subprocess.TimeoutExpired."""
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False).stdout.strip()


def has_program(name: str) -> bool:
    """Return whether a program is installed."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{PATH}") is not None


def run_as(user: str, *command: str, env: Optional[dict[str, str]] = None) -> subprocess.CompletedProcess[str]:
    """Run a command as a user with nothing but its own group, in the root directory. Raises OSError, KeyError."""
    found = pwd.getpwnam(user)
    return subprocess.run(
        command,
        user=found.pw_uid,
        group=found.pw_gid,
        extra_groups=[],
        env=env or {"PATH": PATH},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


#: Prints the first of some paths that cannot be passed: directories have to be searched, the last one read.
_WALK = """
for path; do
  if [ -d "$path" ]; then [ -x "$path" ]; elif [ "${path##*/}" = login-hook ]; then [ -r "$path" ] && [ -x "$path" ]
  elif [ -S "$path" ]; then [ -w "$path" ]; else [ -r "$path" ]; fi || { printf %s "$path"; exit; }
done
"""


def obstacle(user: str, path: Path) -> Path | None:
    """Return the first part of a path that a user cannot pass, None if it reaches its end."""
    parts = [str(part) for part in (*reversed(path.parents), path)]
    said = run_as(user, "/bin/sh", "-c", _WALK, "sh", *parts).stdout
    return Path(said) if said else None


def pid_in(file: Path) -> int | None:
    """Return the process that a pid file names, None if there is none."""
    try:
        pid = int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return pid if Path(f"/proc/{pid}").exists() else None


def started(pid: int) -> float:
    """Return when a process was started, in Unix time. Raises OSError."""
    return _process(_stat(pid)).started


def children(pid: int) -> Iterator[Process]:
    """Yield the processes that a process has started."""
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            try:
                found = _stat(int(directory.name))
            except OSError:
                continue
            if int(found[1]) == pid:
                yield _process(found)


def _stat(pid: int) -> list[str]:
    """Return the name of a process, and what follows its state in /proc/PID/stat (proc(5)): 1 is its parent."""
    before, _, after = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")
    return [before.partition("(")[2], *after.split()[1:]]


def _process(stat: list[str]) -> Process:
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[19]) / os.sysconf("SC_CLK_TCK")
    return Process(stat[0], time.time() - age)


def listens(port: int) -> bool:
    """Return whether somebody listens on a TCP port, if only for this host. Raises SocketsError."""
    return bool(listeners([port]))


def listeners(ports: Iterable[int]) -> dict[int, set[str]]:
    """Return who listens on some TCP ports: port -> names of processes. Raises SocketsError."""
    wanted = set(ports)
    found: dict[int, set[str]] = {}
    for line in sockets.ss("-Htnlp").splitlines():
        port = int(line.split()[3].rpartition(":")[2])
        if port in wanted:
            found.setdefault(port, set()).update(re.findall(r'\("([^"]+)",pid=', line))
    return found


def own_networks() -> list[Network]:
    """Return this host's own addresses, and loopback. Raises OSError, ValueError."""
    own = [ipaddress.ip_network(one["local"]) for link in _links() for one in link["addr_info"]]
    return [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1"), *own]


def container_networks() -> list[Network]:
    """Return the networks of bridges that lead to nothing but containers and virtual machines of this host."""
    links = _links()
    return [
        ipaddress.ip_network(f"{one['local']}/{one['prefixlen']}", strict=False)
        for bridge in links
        if _kind(bridge) == "bridge"
        and all(_kind(link) in VIRTUAL for link in links if link.get("master") == bridge["ifname"])
        for one in bridge["addr_info"]
        if one["scope"] == "global"
    ]


def _kind(link: dict[str, Any]) -> str:
    return str(link.get("linkinfo", {}).get("info_kind", ""))


def _links() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(output("ip", "-json", "-details", "address", "show"))
    return found
