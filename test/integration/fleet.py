"""The fleet that the tests work on: a master that the formula configured, mail hosts with minion, rules and agent."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attr
import salt.client
from salt._logging import shutdown_temp_handler
from salt.exceptions import SaltClientError
from saltfactories.daemons.master import SaltMaster
from saltfactories.daemons.minion import SaltMinion
from saltfactories.manager import FactoriesManager
from saltfactories.plugins.event_listener import EventListener

from integration.hosts import Host, ip, network_of, wait_for
from mailfwlib import client, messages

# Salt keeps early log records for a stream that pytest has closed by the time Salt writes them.
shutdown_temp_handler()

REPOSITORY = Path(__file__).parents[2]
STATES = Path(__file__).parent / "states"
NETWORK = "10.99.0"
SOCKET = "/run/mailfw/login.sock"
#: Dovecot's user on the hosts, whether or not this machine has one: name, and number of user and group.
LOGIN_USER = ("dovecot", 990)


@attr.s(kw_only=True, slots=True)
class HostMaster(SaltMaster):
    """A master that runs in a host."""

    host = attr.ib(repr=False)

    def cmdline(self, *args: str) -> list[str]:
        """Return the command that starts it."""
        return [*self.host.enter, *super().cmdline(*args)]


@attr.s(kw_only=True, slots=True)
class HostMinion(SaltMinion):
    """A minion that runs in a host, started through another command where there is one."""

    host = attr.ib(repr=False)
    through = attr.ib(factory=list)

    def cmdline(self, *args: str) -> list[str]:
        """Return the command that starts it."""
        return [*self.host.enter, *self.through, *super().cmdline(*args)]


class Agent:
    """A mail host's agent, which gets its socket as systemd would hand it over."""

    def __init__(self, host: Host, log: Path):
        self._host = host
        self._log = log
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the agent, its socket first if that is not there."""
        if self._socket is None:
            path = self._host.path(SOCKET)
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.bind(str(path))
            self._socket.listen(4096)
            shutil.chown(path, group=LOGIN_USER[1])
            path.chmod(0o660)
        script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec /usr/lib/mailfw/mailfw-agent"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._host.enter, "sh", "-c", script], stdin=self._socket, stdout=log, stderr=log
            )
        self.status()

    def stop(self) -> None:
        """Stop the agent; its socket goes on accepting."""
        assert self._process
        task = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        os.kill(int(task.read_text()), signal.SIGTERM)
        # An agent that went on would share its socket with the next one: a busy machine gets all the time it needs.
        assert self._process.wait(60) == 0, self._log.read_text()

    def close(self) -> None:
        """Close the socket and remove it."""
        assert self._socket
        self._socket.close()
        self._socket = None
        self._host.path(SOCKET).unlink()

    def ask(self, verb: str, *arguments: str) -> str:
        """Ask the agent as root; return its answer."""
        return client.ask(verb, *arguments, path=str(self._host.path(SOCKET)))

    def login(self, address: str, user: str | None = None) -> str:
        """Report a login as the hook does, by default of a user who logs in from nowhere else; return what is said."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(10)
            connection.connect(str(self._host.path(SOCKET)))
            connection.send(f"login\0{address}\0{address if user is None else user}".encode())
            reply = connection.recv(4096)
        assert reply.startswith(b"ok\0"), reply
        return reply.decode().partition("\0")[2]

    def status(self) -> dict[str, Any]:
        """Return what the agent says of itself."""
        return json.loads(self.ask("status"))


class Applied:
    """What a state run said."""

    def __init__(self, returned: Any):
        assert isinstance(returned, dict), f"the states were not run: {returned}"
        self.states = list(returned.values())

    def __getitem__(self, state_id: str) -> dict[str, Any]:
        return next(state for state in self.states if state["__id__"] == state_id)

    @property
    def failed(self) -> dict[str, str]:
        """The states that failed, and what they said."""
        return {state["__id__"]: state["comment"] for state in self.states if state["result"] is False}

    @property
    def changed(self) -> dict[str, Any]:
        """The states that changed something, or would have, and what."""
        return {state["__id__"]: state["changes"] for state in self.states if state["changes"]}


@attr.s(kw_only=True)
class MailHost:
    """A mail host: a minion, and once mailfw is applied there, its agent."""

    name: str = attr.ib()
    host: Host = attr.ib()
    minion: HostMinion = attr.ib()
    agent: Agent = attr.ib()

    def trusts(self, *addresses: str) -> bool:
        """Return whether all of some addresses are trusted here."""
        return set(addresses) <= self.host.trusted().keys()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have the minion hear and say nothing for a while."""
        try:
            wait_for(f"the minion of {self.name} to be frozen", self._freeze)
            yield
        finally:
            self.host.run("kill", "-CONT", *self._minions_processes(), check=False)

    def _freeze(self) -> bool:
        """Stop the minion's processes; return whether they were already. One that was listed may have ended since."""
        found = self._minions_processes()
        running = [pid for pid, state in found.items() if state != "T"]
        if running:
            self.host.run("kill", "-STOP", *running, check=False)
        return bool(found) and not running

    def _minions_processes(self) -> dict[str, str]:
        """Return the minion's processes: id -> state."""
        listed = self.host.run("ps", "-wweo", "pid=,state=,args=").stdout.splitlines()
        processes = [line.split(maxsplit=2) for line in listed]
        return {pid: state for pid, state, command in processes if str(self.minion.config_dir) in command}


class Fleet:
    """The master and its mail hosts."""

    def __init__(self, factories: FactoriesManager, host: Host):
        self.key = secrets.token_hex(32)
        self.events = factories.event_listener
        self._factories = factories
        self.host = host
        self._pillar = factories.root_dir / "pillar"
        self._tree = factories.root_dir / "tree"
        self._addresses = iter(range(2, 250))
        self._clients = iter(range(1, 65000))
        self.hosts: dict[str, MailHost] = {}
        _copy_formula(self._tree)
        self._write_pillar_top()
        self.write_pillar("master")
        self.master = factories.salt_master_daemon(
            "master", factory_class=HostMaster, host=host, overrides=self._master_overrides()
        )
        self._write_masters_own_minion()

    def _master_overrides(self) -> dict[str, Any]:
        return {
            "interface": "0.0.0.0",
            "worker_threads": 3,
            "file_roots": {"base": [str(STATES), str(self._tree)]},
            "pillar_roots": {"base": [str(self._pillar)]},
            "reactor": [{"own/event": ["salt://own/reactor.sls"]}],
            "peer_run": {"mx2": ["test.arg"]},
            "pytest-master": {"log": {"disabled": True}},
        }

    def _write_masters_own_minion(self) -> None:
        """A minion without daemon beside the master: `salt-call --local` there manages the master."""
        directory = Path(self.master.config_dir)
        configuration = {
            "id": "master",
            "file_client": "local",
            "root_dir": str(self._factories.root_dir / "own"),
            "file_roots": {"base": [str(STATES), str(self._tree)]},
            "pillar_roots": {"base": [str(self._pillar)]},
            "enable_fqdns_grains": False,
            "log_level_logfile": "quiet",
        }
        (directory / "minion").write_text(json.dumps(configuration))

    def _write_pillar_top(self) -> None:
        self._pillar.mkdir()
        (self._pillar / "top.sls").write_text("base: {'*': ['{{ grains.id }}']}\n")

    def write_pillar(self, name: str, **mailfw: Any) -> None:
        """Write a minion's pillar: the fleet's key, and ``mailfw`` keys."""
        self.write_whole_pillar(name, {"mailfw": {"fleet": {"keys": [self.key]}, **mailfw}})

    def write_whole_pillar(self, name: str, pillar: dict[str, Any]) -> None:
        """Write a minion's pillar, or what is left of it."""
        (self._pillar / f"{name}.sls").write_text(json.dumps(pillar))

    def configure_master(self, *arguments: str) -> Applied:
        """Apply mailfw.reactor to the master."""
        return Applied(
            self._salt_call(self.host, self.master.config_dir, "--local", "state.apply", "master", *arguments)
        )

    def salt_call(self, target: MailHost, *arguments: str) -> Any:
        """Call a function on a mail host from there; return what it returned."""
        return self._salt_call(target.host, target.minion.config_dir, *arguments)

    def _salt_call(self, host: Host, configuration: str, *arguments: str) -> Any:
        command = self.salt_call_command(configuration)
        done = host.run(*command, "--out=json", "--log-level=error", *arguments, check=False)
        assert done.stdout, done.stderr
        return json.loads(done.stdout)["local"]

    def salt_call_command(self, configuration: str) -> list[str]:
        """Return how salt-call is called with the configuration in a directory."""
        script = self._factories.get_salt_script_path("salt-call")
        return [self._factories.python_executable, str(script), "--config-dir", str(configuration)]

    def salt_run(self, *arguments: str) -> tuple[int, Any]:
        """Run a runner's function as an operator does on the master; return the exit status and what it returned."""
        status, said = self.salt_run_shows("--out=json", *arguments)
        return status, json.loads(said)

    def salt_run_shows(self, *arguments: str) -> tuple[int, str]:
        """The same with what is shown on a terminal."""
        script = str(self._factories.get_salt_script_path("salt-run"))
        options = ["--config-dir", str(self.master.config_dir), "--log-level=error"]
        done = self.host.run(self._factories.python_executable, script, *options, *arguments, check=False)
        assert done.stdout, done.stderr
        return done.returncode, done.stdout

    def wait_for_minions(self) -> None:
        """Wait until the mail hosts hear the master's jobs, as they do not at first after it was off."""

        def heard() -> bool:
            with (
                contextlib.suppress(SaltClientError),  # The master may still be busy, too.
                salt.client.get_local_client(mopts={**self.master.config, "gather_job_timeout": 1}) as master,
            ):
                found = master.cmd(list(self.hosts), "test.ping", tgt_type="list", timeout=1)
                return found.keys() == self.hosts.keys()
            return False

        wait_for("the minions to hear the master", heard, limit=60)

    @contextlib.contextmanager
    def mail_host(self, name: str, *through: str) -> Iterator[MailHost]:
        """A mail host whose minion runs, started through a command, and where mailfw has never been."""
        self.write_pillar(name)
        host = Host(name)
        try:
            self._connect(host)
            minion = self.master.salt_minion_daemon(
                name, factory_class=HostMinion, host=host, through=list(through), overrides=_minion_overrides()
            )
            with minion.started():
                minion.before_terminate(host.remove)
                agent = Agent(host, self._factories.root_dir / f"{name}-agent.log")
                self.hosts[name] = MailHost(name=name, host=host, minion=minion, agent=agent)
                yield self.hosts[name]
        finally:
            self.hosts.pop(name, None)
            host.remove()

    def _connect(self, host: Host) -> None:
        """Put a host on the master's network."""
        ip("link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        ip("link", "set", host.name, "master", "lan", "up")
        host.run("ip", "address", "add", f"{NETWORK}.{next(self._addresses)}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        name, number = LOGIN_USER
        users = host.path("/etc/passwd")
        others = [line for line in users.read_text().splitlines() if not line.startswith(f"{name}:")]
        users.write_text("\n".join([*others, f"{name}:x:{number}:{number}::/nonexistent:/bin/false", ""]))

    def call(self, target: MailHost, function: str, *arguments: Any, **named: Any) -> Any:
        """Call an execution module's function on a mail host through the master; return what it returned."""
        return self.call_all([target], function, *arguments, **named)[target.name]

    def call_all(self, targets: list[MailHost], function: str, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Call a function on some mail hosts with one job; return what each returned."""
        with salt.client.get_local_client(mopts=dict(self.master.config)) as master:
            names = [target.name for target in targets]
            found = master.cmd(names, function, arguments, tgt_type="list", kwarg=named, timeout=60)
        assert found.keys() == set(names), f"{function}: no answer from {set(names) - found.keys()}"
        return found

    def apply(self, target: MailHost, sls: str = "host", **named: Any) -> Applied:
        """Apply states to a mail host through the master."""
        return Applied(self.call(target, "state.apply", sls, **named))

    def forget_hosts(self, which: str) -> None:
        """Have the master forget mail hosts: tests of other files have signed for some that there are not."""
        self._delete(f"hosts WHERE {which}")

    def forget_logins(self) -> None:
        """Have the master forget who has logged in."""
        self._delete("trusts")

    def note_login(self, address: str, at: float) -> None:
        """Have the master know of a login (Unix time) that no host has told of."""
        self._ask(f"INSERT INTO trusts VALUES ('{address}', '', {at})")

    def known(self) -> dict[str, set[str]]:
        """Return what the master has in its tables: those who have logged in, mail hosts, messages that wait."""
        columns = {"trusts": "address", "hosts": "id", "waiting": "message"}
        return {name: self._ask(f"SELECT {column} FROM {name}") for name, column in columns.items()}

    def _delete(self, what: str) -> None:
        self._ask(f"DELETE FROM {what}")

    def _ask(self, query: str) -> set[str]:
        path = Path(self.master.config["cachedir"]) / "mailfw.sqlite"
        with contextlib.closing(sqlite3.connect(path, timeout=10)) as database, database:
            return {found for (found,) in database.execute(query)}

    @contextlib.contextmanager
    def pillar(self, target: MailHost, **mailfw: Any) -> Iterator[None]:
        """Have a mail host's pillar say something for a while, and then what it said before; apply the latter."""
        self.write_pillar(target.name, **mailfw)
        try:
            yield
        finally:
            self.write_pillar(target.name)
            self.apply(target)

    def overlay(self, path: str, text: str) -> contextlib.AbstractContextManager[Path]:
        """Have a file of the state tree be another for a while."""
        return self.master.state_tree.base.temp_file(path, text)

    def ran_since(self, moment: float) -> list[dict[str, Any]]:
        """Return what the master has published or run since a moment: each job's ``fun`` and ``arg``.

        A job of our own comes after all the others, so when its event is there, theirs are.
        """
        marker = secrets.token_hex(8)
        self.call(self.hosts["mx1"], "test.echo", marker)
        new = {("master", "salt/job/*/new"), ("master", "salt/run/*/new")}

        def events() -> list[dict[str, Any]]:
            found = [event.data for event in self.events.get_events(new, after_time=moment)]
            return found if any(event.get("arg") == [marker] for event in found) else []

        return [event for event in wait_for("the master's events", events) if event.get("arg") != [marker]]

    def returned_since(self, moment: float, target: MailHost, function: str) -> list[Any]:
        """Return what a mail host has returned of a function's jobs since a moment."""
        found = self.events.get_events({("master", f"salt/job/*/ret/{target.name}")}, after_time=moment)
        return [event.data["return"] for event in found if event.data["fun"] == function]

    def announcements_since(self, moment: float) -> list[str]:
        """Return the signed messages that hosts have sent to the master since a moment."""
        found = self.events.get_events({("master", "mailfw/login")}, after_time=moment)
        return [event.data["data"]["message"] for event in found]

    def told_since(self, moment: float, address: str) -> set[float]:
        """Return the logins from an address that the master was told of since a moment, each once: Unix times.

        A host that has had no echo tells of the same login again; in milliseconds, as its journal has it.
        """
        contents = [json.loads(message.partition(" ")[2]) for message in self.announcements_since(moment)]
        return {round(one["logins"][address], 3) for one in contents if address in one["logins"]}

    def new_address(self) -> str:
        """Return a client's address that no test has used."""
        number = next(self._clients)
        return f"100.64.{number // 250}.{number % 250 + 1}"

    def sign(self, *addresses: str, sender: str = "mx1", key: str | None = None, now: float | None = None) -> str:
        """Return a message that announces logins, signed under the fleet's key or another."""
        at = time.time() if now is None else now
        return messages.sign(sender, messages.new_nonce(), dict.fromkeys(addresses, at), key or self.key, at)


@contextlib.contextmanager
def masters_host() -> Iterator[Host]:
    """The master's host; this thread is in its network meanwhile."""
    host = Host("master")
    try:
        with network_of(host):
            ip("link", "add", "lan", "type", "bridge")
            ip("address", "add", f"{NETWORK}.1/24", "dev", "lan")
            ip("link", "set", "lan", "up")
            yield host
    finally:
        host.remove()


def factories(directory: Path, listener: EventListener) -> FactoriesManager:
    """Return what starts Salt's daemons; the directory's path has to be short enough for sockets."""
    return FactoriesManager(
        root_dir=directory,
        event_listener=listener,
        log_server_host="127.0.0.1",
        log_server_port=0,
        log_server_level="error",
        python_executable=sys.executable,
        slow_stop=False,
    )


@contextlib.contextmanager
def running_master(made: FactoriesManager, host: Host) -> Iterator[Fleet]:
    """A running master that mailfw.reactor has configured, and no mail host."""
    fleet = Fleet(made, host)
    applied = fleet.configure_master()
    assert not applied.failed
    with fleet.master.started():
        yield fleet


@contextlib.contextmanager
def running_mail_hosts(fleet: Fleet) -> Iterator[None]:
    """Two mail hosts, mx1 and mx2, with mailfw applied and agents that run."""
    with fleet.mail_host("mx1") as mx1, fleet.mail_host("mx2") as mx2:
        for sls in ("host", "caught_up"):
            for returned in fleet.call_all([mx1, mx2], "state.apply", sls).values():
                assert not Applied(returned).failed
            if sls == "host":
                mx1.agent.start()
                mx2.agent.start()
        yield


def _minion_overrides() -> dict[str, Any]:
    return {
        "master": f"{NETWORK}.1",
        "enable_fqdns_grains": False,
        "pytest-minion": {"log": {"disabled": True}, "returner_address": {"host": f"{NETWORK}.1"}},
    }


def _copy_formula(to: Path) -> None:
    """Copy what the formula consists of, so that nobody's edits change it while the tests run."""
    for name in ("_modules", "_output", "_runners", "_states", "_utils", "mailfw"):
        shutil.copytree(REPOSITORY / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))


def wait_until_trusted(address: str, *hosts: MailHost) -> None:
    """Wait until some hosts trust an address."""
    for host in hosts:
        wait_for(f"{host.name} to trust {address}", lambda host=host: host.trusts(address))
