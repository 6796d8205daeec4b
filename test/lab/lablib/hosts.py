"""Booting, entering and stopping the hosts: systemd-nspawn on an overlay of an image, one for each host."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from . import images
from .network import namespace_path
from .shell import LabError, run, tail, wait_until
from .topology import CLIENTS, DOMAIN, HOSTS, PREFIX, Host

LAB = Path(__file__).resolve().parent.parent
REPOSITORY = LAB.parent.parent
STATE = Path("/run/mailfw-lab")
NSPAWN_STATE = Path("/run/systemd/nspawn")
BOOT_LIMIT = 60.0
STOP_LIMIT = 30.0
SWITCH_OFF_LIMIT = 3.0
KILL_LIMIT = 10.0
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/salt/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
# Hosts may set net.* sysctls, and see cgroups as Debian does, also where the machine's are of both versions.
NSPAWN_ENVIRONMENT = {"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
# The overlay, and what nspawn keeps in /run, are mounted in a mount namespace of nspawn's own: they end with
# the host, and the machine never sees them. Each exec keeps the process id: nspawn has the child's.
BOOT = """
set -eu
cgroup=$1 overlay=$2 directory=$3
shift 3
[ "$cgroup" = - ] || echo $$ > "$cgroup/cgroup.procs"
exec unshare --mount --propagation private sh -c '
    overlay=$1 directory=$2
    shift 2
    mount --bind "$directory/nspawn" /run/systemd/nspawn
    mount -t overlay mailfw-lab -o "$overlay" "$directory/root"
    exec systemd-nspawn "$@"' sh "$overlay" "$directory" "$@"
"""


def directory(host: Host) -> Path:
    return STATE / host.name


def root(host: Host) -> Path:
    """Where a host's root directory is, for processes in its mount namespace; for others it is empty."""
    return directory(host) / "root"


def machine(host: Host) -> str:
    return PREFIX + host.name


# -- Starting ---------------------------------------------------------------------------------------------


def prepare(host: Host) -> None:
    """Lay out a clean host: an empty upper directory over its image, with what is its own."""
    for part in ("upper", "work", "root", "nspawn"):
        (directory(host) / part).mkdir(parents=True)
    upper = directory(host) / "upper"
    (directory(host) / "image").write_text(str(images.path(host.suite)))
    write(upper / "etc/hostname", host.name + "\n")
    write(upper / "etc/hosts", hosts_file())
    # Neither a first boot (which would enable every unit) nor a new identity at each reboot.
    write(upper / "etc/machine-id", hashlib.md5(machine(host).encode()).hexdigest() + "\n")
    images.copy_tree(LAB / "hosts/all", upper)
    with (upper / "etc/salt/minion").open("a") as minion:
        minion.write(f"\nid: {host.name}\npillarenv: {host.pillarenv}\n")
    own = LAB / "hosts" / host.name
    if own.is_dir():
        images.copy_tree(own, upper)
    if "salt-master.service" in host.enabled:
        (upper / "srv/formula").mkdir()
        (upper / "srv/pillar").mkdir()
        images.copy_tree(LAB / "pillar", upper / "srv/pillar")
    switch_units(host, upper / "etc/systemd/system")


def switch_units(host: Host, units: Path) -> None:
    for unit in host.enabled:
        link(units / "multi-user.target.wants" / unit, f"/etc/systemd/system/{unit}")
    for unit in host.masked:
        link(units / unit, "/dev/null")


def hosts_file() -> str:
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    for host in HOSTS:
        lines += [f"{address.ip} {host.name}.{DOMAIN} {host.name}" for address in host.addresses]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o644)


def link(path: Path, target: str) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.symlink_to(target)


def boot(host: Host) -> None:
    """Start a prepared host; `wait_booted` waits until it is up."""
    NSPAWN_STATE.mkdir(parents=True, exist_ok=True)
    image = Path((directory(host) / "image").read_text())
    layers = f"lowerdir={image},upperdir={directory(host)}/upper,workdir={directory(host)}/work"
    command = [*scope(host), "sh", "-c", BOOT, "sh", cgroup_to_join(host), layers, str(directory(host))]
    with (directory(host) / "console.log").open("w") as console:
        process = subprocess.Popen(
            [*command, *nspawn_options(host)],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env={**ENVIRONMENT, **NSPAWN_ENVIRONMENT},
            start_new_session=True,
        )
    (directory(host) / "nspawn.pid").write_text(f"{process.pid} {start_time(process.pid)}\n")


def nspawn_options(host: Host) -> list[str]:
    options = [
        "--quiet",
        "--boot",
        "--register=no",
        "--keep-unit",
        f"--machine={machine(host)}",
        f"--hostname={host.name}",
        f"--directory={root(host)}",
        f"--network-namespace-path={namespace_path(host)}",
        "--capability=CAP_NET_ADMIN",
        "--console=pipe",
        "--resolv-conf=off",
        "--timezone=off",
        "--link-journal=no",
    ]
    if "salt-master.service" in host.enabled:
        # Not the whole repository: Salt would walk through all of it again and again.
        for part in (REPOSITORY / "mailfw", *sorted(REPOSITORY.glob("_*"))):
            options.append(f"--bind-ro={str(part).replace(':', chr(92) + ':')}:/srv/formula/{part.name}")
    return options


def wait_booted(host: Host) -> str:
    """Wait until systemd has started everything; return `running` or `degraded`."""

    def booted() -> bool:
        if not alive(host):
            raise LabError(f"{host.name} ended while booting")
        return system_state(host) in ("running", "degraded")

    try:
        wait_until(f"{host.name} has booted", booted, BOOT_LIMIT, pause=0.1)
    except LabError as err:
        raise LabError(f"{err}\n{diagnosis(host)}") from err
    return system_state(host)


DIAGNOSTICS = (
    "systemctl list-jobs",
    "systemctl --failed --plain",
    "journalctl -n 25 --no-pager -p notice",
)


def diagnosis(host: Host) -> str:
    """What a person would look at first when a host does not come up."""
    parts = [f"  console of {host.name}:", tail(directory(host) / "console.log", 12)]
    if init_pid(host):
        for command in DIAGNOSTICS:
            parts.append(f"  {host.name}: {command}")
            parts.append(indent(output(host, ["sh", "-c", f"{command} 2>&1"])))
    return "\n".join(parts)


def indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


# -- Looking and entering ---------------------------------------------------------------------------------


def nspawn_pid(host: Host) -> int:
    """The process id of a host's running systemd-nspawn, or 0."""
    try:
        pid, started = (directory(host) / "nspawn.pid").read_text().split()
    except (OSError, ValueError):
        return 0
    # Ids are used again: only a process that started when the host's did is the host's.
    return int(pid) if start_time(int(pid)) == started else 0


def start_time(pid: int) -> str:
    """When a process started, in ticks since boot; empty when it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def init_pid(host: Host) -> int:
    """The process id, on the machine, of a host's systemd; 0 before it is there."""
    pid = nspawn_pid(host)
    with suppress(OSError):
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                return child
    return 0


def alive(host: Host) -> bool:
    return nspawn_pid(host) != 0


def enter_node(name: str, command: Sequence[str]) -> list[str]:
    """The command line that runs a command in the host of that name, or on this machine in that client's network."""
    for host in HOSTS:
        if host.name == name:
            return enter(host, command)
    for client in CLIENTS:
        if client.name == name and namespace_path(client).exists():
            return ["nsenter", f"--net={namespace_path(client)}", *command]
    raise LabError(f"{name}: not in the lab, or the lab is down; `lab up` makes the clients' networks")


def enter(host: Host, command: Sequence[str]) -> list[str]:
    """The command line that runs a command in a host, with a plain environment."""
    pid = init_pid(host)
    if not pid:
        raise LabError(f"{host.name} is not up; `lab up` boots it")
    settings = {**ENVIRONMENT, "TERM": os.environ.get("TERM", "dumb")}
    namespaces = ["-m", "-u", "-i", "-n", "-p", "-C", "--root", "--wd"]
    variables = [f"{name}={value}" for name, value in settings.items()]
    return ["nsenter", "-t", str(pid), *namespaces, "env", "-i", *variables, *command]


def output(host: Host, command: Sequence[str]) -> str:
    """What a command in a host prints, whatever its exit status; empty if the host cannot be entered."""
    with suppress(LabError, OSError, subprocess.TimeoutExpired):
        entered = enter(host, command)
        return subprocess.run(
            entered, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False
        ).stdout
    return ""


def system_state(host: Host) -> str:
    return output(host, ["systemctl", "is-system-running"]).strip()


# -- Stopping ---------------------------------------------------------------------------------------------


def shut_down(stopping: Sequence[Host]) -> list[Host]:
    """Shut hosts down in order, their services first; return those that had to be killed."""
    for pid in filter(None, map(nspawn_pid, stopping)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    with suppress(LabError):
        wait_until("the hosts have stopped", lambda: not any(map(alive, stopping)), STOP_LIMIT)
    return [host for host in stopping if kill(host)]


def switch_off(host: Host) -> bool:
    """Stop a host at once, as if its power had failed; True if it had to be killed."""
    if alive(host):
        output(host, ["systemctl", "--force", "--force", "poweroff"])
        with suppress(LabError):
            wait_until(f"{host.name} is off", lambda: not alive(host), SWITCH_OFF_LIMIT)
    return kill(host)


def kill(host: Host) -> bool:
    """Kill what is left of a host, by the process ids that are its own; True if there was anything."""
    pids = {nspawn_pid(host), init_pid(host), *cgroup_pids(host)} - {0}
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if pids:
        wait_until(f"{host.name} is gone", lambda: not (alive(host) or cgroup_pids(host)), KILL_LIMIT)
    return bool(pids)


def clean(host: Host) -> None:
    """Remove a stopped host's control groups, of each hierarchy that nspawn made some in."""
    for mount in cgroup_mounts("cgroup", "cgroup2"):
        remove_cgroup(mount / cgroup(host).name)


# -- Control groups ---------------------------------------------------------------------------------------


def cgroup_mounts(*kinds: str) -> list[Path]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(place) for _, place, kind, *_ in mounts if kind in kinds]


def cgroup_mount() -> Path:
    """Where version 2 is mounted: /sys/fs/cgroup, or `unified` below it where both versions are in use."""
    found = cgroup_mounts("cgroup2")
    if not found:
        raise LabError("this machine has no cgroup2 mount, which booted hosts need")
    return found[0]


def under_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


def scope(host: Host) -> list[str]:
    """On a machine that runs systemd, control groups are its to give out."""
    if not under_systemd():
        return []
    unit = f"--unit={machine(host)}"
    return ["systemd-run", "--quiet", "--scope", "--collect", unit, "--property=Delegate=yes"]


def cgroup(host: Host) -> Path:
    if under_systemd():
        return cgroup_mount() / "system.slice" / f"{machine(host)}.scope"
    return cgroup_mount() / machine(host)


def cgroup_to_join(host: Host) -> str:
    if under_systemd():
        return "-"
    cgroup(host).mkdir(exist_ok=True)
    return str(cgroup(host))


def cgroup_pids(host: Host) -> set[int]:
    found: set[int] = set()
    for procs in cgroup(host).rglob("cgroup.procs"):
        with suppress(OSError):
            found.update(map(int, procs.read_text().split()))
    return found


def remove_cgroup(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            if child.is_dir():
                remove_cgroup(child)
        with suppress(OSError):
            path.rmdir()


# -- The lab's directory ----------------------------------------------------------------------------------


def open_state() -> None:
    """Hold the lab's state and the hosts' files in memory: fast, and gone with one unmount."""
    STATE.mkdir(exist_ok=True)
    if not os.path.ismount(STATE):
        run(["mount", "-t", "tmpfs", "-o", "mode=0755", "mailfw-lab", str(STATE)])
    (STATE / "repository").write_text(f"{REPOSITORY}\n")


def close_state() -> None:
    if os.path.ismount(STATE):
        run(["umount", str(STATE)])
    for empty in (STATE, NSPAWN_STATE):
        with suppress(OSError):
            empty.rmdir()


def repository_in_use() -> Path | None:
    """The repository that the lab was brought up from, or None when it is down."""
    try:
        return Path((STATE / "repository").read_text().strip())
    except OSError:
        return None
