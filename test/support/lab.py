"""The lab from the point of view of a test or the demo: commands on hosts, clients in their namespaces, Salt."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
LAB = REPOSITORY / "test/lab/lab"
MAILCLIENT = REPOSITORY / "test/support/mailclient.py"

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


class LabError(RuntimeError):
    """A command in the lab failed."""


def lab(*arguments: str, check: bool = True, text: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(LAB), *arguments], input=text, capture_output=True, text=True, timeout=300, check=False)
    if check and done.returncode:
        raise LabError(f"lab {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run(host: str, *command: str, check: bool = True, text: str | None = None) -> str:
    """Run a command on a host; return what it printed."""
    return lab("exec", host, "--", *command, check=check, text=text).stdout


def client(name: str, do: str, **arguments: Any) -> Any:
    """Have a client do something (a function of mailclient.py) and return what came of it."""
    request = json.dumps({"do": do, **arguments})
    answer = json.loads(run(name, sys.executable, str(MAILCLIENT), request))
    if "error" in answer:
        raise LabError(f"{name}: {do}: {answer['error']}")
    return answer["result"]


class Session:
    """An IMAP session that a client holds from here until :meth:`answers` asks whether it still works."""

    def __init__(self, name: str, address: str):
        request = json.dumps({"do": "hold_session", "address": address})
        command = [str(LAB), "exec", name, "--", sys.executable, str(MAILCLIENT), request]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            raise LabError(f"{name}: no IMAP session with {address}")

    def answers(self) -> bool:
        output, _ = self._process.communicate("\n", timeout=30)
        return json.loads(output) == {"result": True}


def salt(target: str, function: str, *arguments: str, timeout: int = 120) -> dict[str, Any]:
    """Run a function on minions from the master; return minion -> what it returned."""
    command = ["salt", "--out=json", "--static", f"--timeout={timeout}", "-L", target, function, *arguments]
    done = lab("exec", "master", "--", *command, check=False)
    try:
        return json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError as err:
        raise LabError(f"{' '.join(command)}: no JSON came\n{done.stdout}\n{done.stderr}") from err


def states(host: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """Apply states to a host from the master, by default the highstate; return the results by state ID and name."""
    return _results(host, salt(host, *(arguments or ("state.highstate",)))[host])


def configure_master() -> dict[str, dict[str, Any]]:
    """Apply mailfw.reactor to the master, on the master itself, since it restarts when its configuration changes."""
    command = ["salt-call", "--out=json", "state.apply", "mailfw.reactor"]
    output = lab("exec", "master", "--", *command, check=False).stdout
    results = _results("master", json.loads(output[output.index("{") :])["local"])
    wait_until(lambda: len(answering()) == 3, "the minions answer the master")
    return results


def answering() -> list[str]:
    """Return the minions that answer."""
    return [host for host, answer in salt("mx1,mx2,master", "test.ping", timeout=5).items() if answer is True]


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


#: Empties the sets that rules and logins fill, then has the agent forget the addresses that it is given.
FORGET = """
for set in $(nft -t list sets | awk '/^\\tset (trusted|banned|rate|waiting)_/ && !/networks/ { print $2 }'); do
  nft flush set inet mailfw $set
done
exec python3 -IB -c '
import sys
sys.path.insert(0, "/usr/lib/mailfw")
from mailfwlib import client
for address in sys.argv[1:]:
    client.ask("forget", address)
' "$@"
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


@contextmanager
def slow_logins(host: str, seconds: float) -> Iterator[None]:
    """Have a host's Dovecot take its time over each password: PAM, which is asked first, waits and knows nobody."""
    path, version = "/etc/dovecot/conf.d/94-lab-slow.conf", run(host, "dovecot", "--version")[:3]
    run(host, "tee", "/etc/pam.d/lab-slow", text=SLOW_PAM.format(seconds=seconds))
    run(host, "tee", path, text=SLOW_PASSDB[version])
    try:
        run(host, "doveadm", "reload")
        yield
    finally:
        run(host, "rm", path)
        run(host, "doveadm", "reload")


def trusted(host: str) -> dict[str, dict[str, str]]:
    """Return the addresses that a host trusts, as its execution module lists them."""
    return salt(host, "mailfw.list_trusted")[host]
