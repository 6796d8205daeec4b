"""The lab from the point of view of a test or the demo: commands on hosts, clients in their namespaces, Salt."""

from __future__ import annotations

import json
import queue
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ipaddress import ip_network
from pathlib import Path
from typing import Any, TypeVar

from lab.lablib import hosts
from lab.lablib.shell import LabError
from support.mailclient import HOOK_WAITS
from support.net import Elsewhere

REPOSITORY = Path(__file__).resolve().parents[2]
LAB = REPOSITORY / "test/lab/lab"
MAILCLIENT = REPOSITORY / "test/support/mailclient.py"
SALTCLIENT = REPOSITORY / "test/support/saltclient.py"
#: A call that takes longer than this many seconds hangs.
SALT_LIMIT = 240

ADDRESSES = {"mx1": ("192.0.2.11", "2001:db8:0:1::11"), "mx2": ("192.0.2.12", "2001:db8:0:1::12")}
SERVICES = {
    "smtp": 25,
    "submission": 587,
    "submissions": 465,
    "imap": 143,
    "imaps": 993,
    "pop3": 110,
    "pop3s": 995,
    "sieve": 4190,
}

Node = TypeVar("Node")
Result = TypeVar("Result")


def on_each(nodes: Iterable[Node], do: Callable[[Node], Result]) -> dict[Node, Result]:
    """Do something with several hosts or clients at the same time; return host or client -> what came of it.

    Raises AssertionError with what failed on each.
    """
    with ThreadPoolExecutor(20) as pool:
        done = {node: pool.submit(do, node) for node in nodes}
    failed = {node: error for node, future in done.items() if (error := future.exception())}
    if failed:
        raise AssertionError("\n".join(f"{node}: {_told(error)}" for node, error in failed.items()))
    return {node: future.result() for node, future in done.items()}


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def lab(*arguments: str, check: bool = True, text: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(LAB), *arguments], input=text, capture_output=True, text=True, timeout=300, check=False)
    if check and done.returncode:
        raise LabError(f"lab {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run(host: str, *command: str, check: bool = True, text: str | None = None) -> str:
    """Run a command on a host, or on this machine in a client's network; return what it printed."""
    # What `lab exec` becomes: starting that takes longer than most commands.
    entered = hosts.enter_node(host, command)
    done = subprocess.run(entered, input=text, capture_output=True, text=True, timeout=300, check=False)
    if check and done.returncode:
        raise LabError(f"{host}: {' '.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def gone() -> list[str]:
    """Return the hosts of the lab that were booted and have ended."""
    booted = [node for node in hosts.HOSTS if (hosts.directory(node) / "nspawn.pid").exists()]
    return [node.name for node in booted if not hosts.alive(node)]


def fail_power(host: str) -> None:
    """Stop a host at once; `lab up` boots it again."""
    (node,) = (node for node in hosts.HOSTS if node.name == host)
    hosts.switch_off(node)


def client(name: str, do: str, **arguments: Any) -> Any:
    """Have a client do something (a function of mailclient.py) and return what came of it."""
    request = json.dumps({"do": do, **arguments})
    answer = json.loads(run(name, sys.executable, str(MAILCLIENT), request))
    if "error" in answer:
        raise LabError(f"{name}: {do}: {answer['error']}")
    return answer["result"]


def login_then_connect(name: str, host: str, address: str, protocol: str = "imap", **more: Any) -> str:
    """Have a client log in at a host and connect to submission next: open, refused or silent.

    When the hook may not have waited for the agent any longer, the host forgets everybody, and there is another try.
    """
    for _ in range(3):
        done = client(name, "login_then_connect", address=address, protocol=protocol, **more)
        if done["submission"] == "open" or done["seconds"] < HOOK_WAITS:
            break
        print(f"{host}: {name}: {done}")
        forget(host)
    return done["submission"]


def quickest_login(name: str, address: str, enough: float) -> float:
    """Return the seconds that a login takes. A busy machine only adds to them: the fewest of up to three count."""
    seconds = float("inf")
    for _ in range(3):
        seconds = min(seconds, client(name, "login", address=address)["seconds"])
        if seconds < enough:
            break
    return seconds


def network(name: str) -> Elsewhere:
    """Return the network of a host or a client, for programs of this machine."""
    (node,) = (node for node in (*hosts.HOSTS, *hosts.CLIENTS) if node.name == name)
    return Elsewhere(node.namespace)


class Ongoing:
    """Something that a client does (a function of mailclient.py) from here until it is told to end."""

    def __init__(self, name: str, do: str, **arguments: Any):
        request = json.dumps({"do": do, **arguments})
        command = hosts.enter_node(name, [sys.executable, str(MAILCLIENT), request])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        if (said := self._process.stdout.readline()) != "ready\n":
            raise LabError(f"{name}: {do} {arguments}: {said}")

    def end(self) -> Any:
        """Return what came of it."""
        answer = json.loads(self._process.communicate("\n", timeout=60)[0])
        if "error" in answer:
            raise LabError(answer["error"])
        return answer["result"]

    def __enter__(self) -> Ongoing:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class Session(Ongoing):
    """An IMAP session that a client holds from here until :meth:`answers` asks whether it still works."""

    def __init__(self, name: str, address: str, user: str = "alice", port: int = 143):
        super().__init__(name, "hold_session", address=address, user=user, port=port)

    def answers(self) -> bool:
        with suppress(LabError):
            return self.end() is True
        return False


#: Networks of the client town, an IPv4 and an IPv6 one for whoever asks, so that its addresses are nobody else's.
_town = iter([*zip(ip_network("198.19.128.0/17").subnets(4), ip_network("2001:db8:7000::/36").subnets(4))])


def networks_of_town() -> list[str]:
    """Return an IPv4 and an IPv6 network of the client town that nobody has had before."""
    return list(map(str, next(_town)))


def neighbourhood() -> Iterator[str]:
    """Return addresses of the client town that are nobody else's, of both versions of IP in turn, a /64 each."""
    ipv4, ipv6 = next(_town)
    for number, address in enumerate(ipv4.hosts()):
        yield str(address)
        yield str(ipv6.network_address + (number << 64))


def logins(host: str, then: Sequence[int] = ()) -> Ongoing:
    """Have people log in at a host again and again, over both versions of IP, and connect to some ports after their OK.

    Every few logins are from another address. See come_and_go in mailclient.py for what it tells in the end.
    """
    targets = [[address, network] for address, network in zip(ADDRESSES[host], networks_of_town())]
    return Ongoing("town", "come_and_go", targets=targets, then=list(then))


#: What a client hears that is logging in just when Dovecot is told to read its configuration again: with mailfw and
#: without, of 3 clients that log in all the time one in some ten times. The next try gets in.
CUT_OFF = ("BYE Shutting down", "socket error: EOF", "[UNAVAILABLE]")


def got_in(visits: list[dict[str, Any]], reloads: int) -> list[dict[str, Any]]:
    """Return the logins of :func:`logins` that were let in: all but those that Dovecot cut off.

    At each reload that is one over each version of IP at most.
    """
    failed = [one for one in visits if "error" in one]
    assert [one for one in failed if not any(sign in one["error"] for sign in CUT_OFF)] == []
    assert len(failed) <= 2 * reloads, failed
    return [one for one in visits if "error" not in one]


class SaltClient:
    """A Salt client that runs on the master and makes one call after the other: see saltclient.py."""

    def __init__(self) -> None:
        command = hosts.enter_node("master", ["/opt/salt/bin/python", "-c", SALTCLIENT.read_text()])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def runs(self) -> bool:
        return self._process.poll() is None

    def call(self, *request: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answered = select.select([self._process.stdout], [], [], SALT_LIMIT)[0]
        answer = json.loads(self._process.stdout.readline() or '"it has ended"') if answered else "no answer in time"
        if isinstance(answer, dict):
            return answer
        self._process.kill()
        self._process.communicate()
        raise LabError(f"Salt on the master: {request}: {answer}")


#: Salt clients that have nothing to do.
_idle: queue.SimpleQueue[SaltClient] = queue.SimpleQueue()


def _salt_client() -> SaltClient:
    """Return a client that runs; those of a lab that went down do not."""
    with suppress(queue.Empty):
        while True:
            client = _idle.get_nowait()
            if client.runs():
                return client
    return SaltClient()


def salt(target: str, function: str, *arguments: str, timeout: int = 200) -> dict[str, Any]:
    """Run a function on minions from the master; return minion -> what it returned, or that it did not."""
    client = _salt_client()
    answers = client.call(target.split(","), function, arguments, timeout)
    _idle.put(client)
    return answers


def states(host: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """Apply states to a host from the master, by default the highstate; return the results by state ID and name."""
    return all_states([host], *arguments)[host]


def all_states(names: Sequence[str], *arguments: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Apply states to hosts at the same time, in one job; return host -> results by state ID and name."""
    answers = salt(",".join(names), *(arguments or ("state.highstate",)))
    return {host: _results(host, answers.get(host, "no answer")) for host in names}


def configure_master(sls: str = "mailfw.reactor") -> dict[str, dict[str, Any]]:
    """Apply mailfw.reactor to the master, on the master itself, since it restarts when its configuration changes."""
    output = run("master", "salt-call", "--out=json", "state.apply", sls, check=False)
    results = _results("master", json.loads(output[output.index("{") :])["local"])
    run("master", "systemctl", "start", "salt-master")  # Waits for a restart.
    wait_for_minions("master", *ADDRESSES)
    return results


def wait_for_minions(*names: str) -> None:
    """Wait until the master is there and these minions answer it."""

    def answer() -> bool:
        with suppress(LabError):
            return salt(",".join(names), "test.ping", timeout=3) == dict.fromkeys(names, True)
        return False

    wait_until(answer, f"{', '.join(names)} answer")


def wait_until(true: Callable[[], Any], what: str, limit: float = 60) -> None:
    end = time.monotonic() + limit
    while not true():
        if time.monotonic() > end:
            raise LabError(f"not within {limit} s: {what}")
        time.sleep(0.2)


def _results(host: str, answer: Any) -> dict[str, dict[str, Any]]:
    """Raise LabError when a state has failed."""
    if not isinstance(answer, dict):
        raise LabError(f"{host}: {answer}")
    failed = {one["__id__"]: one["comment"] for one in answer.values() if one["result"] is False}
    if failed:
        raise LabError(f"{host}: {json.dumps(failed, indent=1)}")
    return {f"{one['__id__']} {one['name']}": one for one in answer.values()}


def changed(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the state IDs that changed something."""
    return sorted(name for name, one in results.items() if one["changes"])


def set_pillar(environment: str, **mailfw: Any) -> None:
    """Write an environment's mailfw pillar, as an operator would edit it. The fleet's key is in a file of its own."""
    run("master", "tee", f"/srv/pillar/{environment}/mailfw.sls", text=json.dumps({"mailfw": mailfw}, indent=1))


ASK_STATUS = """
import sys
sys.path.insert(0, "/usr/lib/mailfw")
from mailfwlib import client
print(client.ask("status"))
"""


def agent_status(host: str) -> dict[str, Any]:
    """Return what a host's agent says, without Salt."""
    return json.loads(run(host, "python3", "-IB", "-c", ASK_STATUS))


#: Has the agent forget the addresses that it is given, after logins that wait, and empties the sets that rules and
#: logins fill.
FORGET = """
python3 -IB -c '
import sys
sys.path.insert(0, "/usr/lib/mailfw")
from mailfwlib import client
for address in sys.argv[1:]:
    client.ask("forget", address)
' "$@" || exit
for set in $(nft -t list sets | awk '/^\\tset (trusted|banned|rate|waiting)_/ && !/networks/ { print $2 }'); do
  nft flush set inet mailfw $set
done
"""
#: How the agent knows the lab's clients.
CLIENTS = ("198.51.100.10", "2001:db8:0:2::", "203.0.113.10", "2001:db8:0:3::")


def forget(*hosts: str) -> None:
    """Have hosts forget who has logged in, who was counted, and who is banned."""
    for host in hosts:
        run(host, "sh", "-c", FORGET, "sh", *CLIENTS)


SLOW_PAM = """
auth required pam_exec.so quiet /bin/sleep {seconds}
auth required pam_deny.so
"""
#: Dovecot asks the lab's own passdb next, which comes after this one. Version -> its configuration. The limits are so
#: high since Dovecot throws out logins that are under way when it has no process left for a new connection.
SLOW_PASSDB = {
    "2.3": """
auth_worker_max_count = 200
service imap-login {
  process_limit = 500
}
passdb {
  driver = pam
  args = lab-slow
}
""",
    "2.4": """
service auth-worker {
  process_limit = 200
}
service imap-login {
  process_limit = 500
}
passdb pam {
  service_name = lab-slow
}
""",
}


def restart_dovecot(host: str) -> None:
    """Have Dovecot read its configuration, and wait until it has, which no reload does."""
    # So that systemd forgets how often it was started lately.
    run(host, "systemctl", "reset-failed", "dovecot")
    run(host, "systemctl", "restart", "dovecot")


@contextmanager
def slow_logins(host: str, seconds: float) -> Iterator[None]:
    """Have a host's Dovecot take its time over each password: PAM, which is asked first, waits and knows nobody."""
    path, version = "/etc/dovecot/conf.d/94-lab-slow.conf", run(host, "dovecot", "--version")[:3]
    run(host, "tee", "/etc/pam.d/lab-slow", text=SLOW_PAM.format(seconds=seconds))
    run(host, "tee", path, text=SLOW_PASSDB[version])
    try:
        restart_dovecot(host)
        yield
    finally:
        run(host, "rm", path, "/etc/pam.d/lab-slow")
        restart_dovecot(host)


def elements(host: str, name: str) -> dict[str, float]:
    """Return the elements of a set: element -> seconds left.

    The kernel leaves some out of one list while others come or go: there are as many lists until one has nothing new.
    """
    found: dict[str, float] = {}
    while new := {one: left for one, left in _elements(host, name).items() if one not in found}:
        found |= new
    return found


def _elements(host: str, name: str) -> dict[str, float]:
    listed = json.loads(run(host, "nft", "-j", "list", "set", "inet", "mailfw", name))
    found = {}
    for entry in next(one["set"] for one in listed["nftables"] if "set" in one).get("elem", []):
        one = entry["elem"] if isinstance(entry, dict) and "elem" in entry else {"val": entry}
        value = one["val"]
        text = " . ".join(map(str, value["concat"])) if isinstance(value, dict) else str(value)
        found[text] = one.get("expires", float("inf"))
    return found
