"""The session starts, whatever Dovecot tells the login hook and whatever is broken, and within a second."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from support import lab
from support.lab import ADDRESSES, elements

from .conftest import ENVIRONMENTS, HOSTS, on_both_hosts

ODD_LOGIN = (lab.REPOSITORY / "test/support/oddlogin.py").read_text()
#: The hook waits so long for the agent, and is ended after so long, in seconds.
WAIT, END = 0.25, 1.0
#: What a login takes besides, at most.
ELSE = 0.6
#: Everybody may log in, and a client on the host itself may say where it is. Version -> Dovecot's configuration.
EVERYBODY = {
    "2.3": """
auth_username_chars =
login_trusted_networks = 127.0.0.0/8
passdb {
  driver = static
  args = password=secret
}
userdb {
  driver = static
  args = uid=alice gid=alice home=/home/alice
}
service imap-login {
  unix_listener imap {
  }
}
""",
    "2.4": """
auth_username_chars =
login_trusted_networks = 127.0.0.0/8
passdb static {
  password = secret
}
userdb static {
  fields {
    uid = alice
    gid = alice
    home = /home/alice
  }
}
service imap-login {
  unix_listener imap {
  }
}
""",
}
FILE = "/etc/dovecot/conf.d/94-lab-everybody.conf"
USERS = ["o'hara", 'a"$(id)`id`;&|', "new\nline", "tab\t, cr\r", "\xff\xfe\x80", "\x01\x7f", "-n", "%s %n", "x" * 300]
IPS = ["::ffff:198.18.0.69", "fe80::1", "fe80::1%lo", "::", "0.0.0.0", "255.255.255.255", "garbage", "1" * 300, ""]
LOGINS = [
    *[("over_tcp", user) for user in USERS],
    *[("from_address", "alice", ip) for ip in IPS],
    ("over_unix", "alice"),
    *[("post_login", user, "198.18.0.69") for user in [*USERS, "x" * 8192, ""]],
    *[("post_login", "alice", ip) for ip in IPS],
]


@pytest.fixture(scope="module", autouse=True)
def protected(fleet: object) -> None:
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, protection={"type": "protected"}, reports=False)
    lab.all_states(HOSTS, "state.apply", "mailfw")


@pytest.fixture(autouse=True)
def nobody_is_known() -> None:
    """No host trusts anybody, and no login of the test before is still on its way to the other host."""
    lab.wait_until(lambda: not any(lab.agent_status(host)["outbox"] for host in HOSTS), "nothing waits")
    time.sleep(0.5)
    lab.forget(*HOSTS)


@pytest.fixture
def everybody() -> Iterator[None]:
    for host in HOSTS:
        lab.run(host, "tee", FILE, text=EVERYBODY[lab.run(host, "dovecot", "--version")[:3]])
        lab.run(host, "systemctl", "restart", "dovecot")
    yield
    for host in HOSTS:
        lab.run(host, "rm", FILE)
        lab.run(host, "systemctl", "restart", "dovecot")


@on_both_hosts
def test_sessions_of_strange_users_from_strange_addresses_start(everybody: None, host: str) -> None:
    cases, began = "".join(json.dumps(one) + "\n" for one in LOGINS), lab.run(host, "date", "+@%s").strip()
    answers = [json.loads(one) for one in lab.run(host, "python3", "-IBc", ODD_LOGIN, text=cases).splitlines()]
    assert [(login, answer) for login, answer in zip(LOGINS, answers) if not answer.startswith("OK")] == []
    assert len(answers) == len(LOGINS)
    # The mapped address is its IPv4 address, and nothing else of all that is a client's.
    assert {element.split(" . ")[0] for element in elements(host, "trusted_ipv4")} == {"198.18.0.69"}
    assert elements(host, "trusted_ipv6") == {}
    assert "Traceback" not in lab.run(host, "journalctl", "-u", "mailfw-agent", "--no-pager", "--since", began)


class Fault(NamedTuple):
    """How something is broken and mended, the seconds that the hook then takes, and whether the login is trusted."""

    broken: str
    mended: str
    least: float = 0.0
    most: float = WAIT
    trusted: bool = False


#: Fills the socket's queue, and holds it.
FILL = """
import resource, socket, subprocess, time
resource.setrlimit(resource.RLIMIT_NOFILE, (9000, 9000))
held = []
try:
    while True:
        one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        one.setblocking(False)
        one.connect("/run/mailfw/login.sock")
        held.append(one)
except BlockingIOError:
    subprocess.run(["systemd-notify", "--ready"])
    time.sleep(600)
"""
LOCK = "/run/mailfw/elements.lock"
STOPPED, GOING_ON = "systemctl kill -s STOP mailfw-agent", "systemctl kill -s CONT mailfw-agent"
FAULTS = {
    "agent stopped": Fault("systemctl stop mailfw-agent.socket mailfw-agent", "systemctl start mailfw-agent"),
    "agent hangs": Fault(STOPPED, GOING_ON, least=WAIT),
    "queue full": Fault(
        f"{STOPPED}; systemd-run -q --unit lab-fill -p Type=notify -p NotifyAccess=all python3 -IBc '{FILL}'",
        f"systemctl stop lab-fill; {GOING_ON}; systemctl restart mailfw-agent",
    ),
    "agent slow": Fault(
        f"systemd-run -q --unit lab-slow flock {LOCK} sleep 600; for _ in $(seq 100); do"
        f" flock -n {LOCK} true || exit 0; sleep 0.1; done; echo {LOCK} is free >&2; exit 1",
        "systemctl stop lab-slow",  # How long the hook waits is not known: the login's report has waited meanwhile.
        trusted=True,
    ),
    "no socket": Fault("mv /run/mailfw/login.sock /run/mailfw/away", "mv /run/mailfw/away /run/mailfw/login.sock"),
    "disk full": Fault(
        "mount -t tmpfs -o size=16k tmpfs /var/lib/mailfw; ! head -c 1M /dev/zero >/var/lib/mailfw/full 2>/dev/null;"
        " systemctl restart mailfw-agent",
        "umount /var/lib/mailfw; systemctl restart mailfw-agent",
        trusted=True,
    ),
    "no python3": Fault("mv /usr/bin/python3 /usr/bin/away", "mv /usr/bin/away /usr/bin/python3"),
    "python3 hangs": Fault(
        "mv /usr/bin/python3 /usr/bin/away; printf '#!/bin/sh\\nexec sleep 600\\n' >/usr/bin/python3;"
        " chmod +x /usr/bin/python3",
        "mv /usr/bin/away /usr/bin/python3",
        least=END,
        most=END,
    ),
    "no hook": Fault(
        "mv /usr/lib/mailfw/login_hook.py /usr/lib/mailfw/away", "mv /usr/lib/mailfw/away /usr/lib/mailfw/login_hook.py"
    ),
}


def is_trusted(host: str) -> bool:
    return "203.0.113.10 . 587" in elements(host, "trusted_ipv4")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@on_both_hosts
def test_session_starts_whatever_is_broken(host: str, fault: Fault) -> None:
    try:
        lab.run(host, "sh", "-ec", fault.broken)
        seconds = lab.quickest_login("cafe", ADDRESSES[host][0], fault.most + ELSE)
        lab.wait_until(lambda: is_trusted(host) is fault.trusted, f"trusted: {fault.trusted}", 10)
    finally:
        lab.run(host, "sh", "-c", fault.mended)
    assert fault.least <= seconds < fault.most + ELSE
