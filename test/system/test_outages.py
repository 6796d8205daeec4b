"""Outages on the way from one mail host to the others: nobody is refused meanwhile, and every host learns of everybody.

People log in at Dovecot on both hosts, before the outage, in it and at its end. Recovery is when what was stopped has
been told to start again: the time that Salt takes to be of use is part of the fifteen seconds.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from lab.lablib.topology import SWITCH
from support import lab
from support.lab import ADDRESSES, elements
from support.mailclient import HOOK_WAITS

from .conftest import ENVIRONMENTS, HOSTS

#: Seconds from the recovery until every host must trust everybody, and what of them it takes to start something. When
#: that takes longer, the machine is busy, and everybody has as much longer.
LATEST, START = 15.0, 2.0
#: How many people of a test may be trusted after their OK: the agent was late, and the hook has not waited for it.
LATE = 1
#: What the lab's minions have for the sake of other tests is as Salt has it by default.
DEFAULTS = """
acceptance_wait_time: 10
random_reauth_delay: 10
recon_default: 1000
recon_max: 10000
recon_randomize: true
tcp_keepalive_idle: 300
tcp_keepalive_cnt: -1
tcp_keepalive_intvl: -1
"""
OVERRIDE = "/etc/salt/minion.d/outages.conf"
MASTERS_DISK = "/var/cache/salt/master"


@pytest.fixture(scope="module", autouse=True)
def protected(fleet: object) -> Iterator[None]:
    """Both hosts in protected mode, their minions as patient as Salt's are."""
    for host in HOSTS:
        lab.set_pillar(
            ENVIRONMENTS[host],
            protection={"type": "protected"},
            reaction={"untrusted": "reject"},
            trusted={"per_user": 1000},
        )
        lab.run(host, "tee", OVERRIDE, text=DEFAULTS)
        lab.run(host, "systemctl", "restart", "salt-minion")
    lab.wait_for_minions(*HOSTS)
    lab.all_states(HOSTS, "state.apply", "mailfw")
    yield
    for host in HOSTS:
        lab.run(host, "rm", OVERRIDE)
        lab.run(host, "systemctl", "restart", "salt-minion")
    lab.wait_for_minions(*HOSTS)


class People:
    """People who log in, each from an address of their own."""

    def __init__(self) -> None:
        self._addresses = lab.neighbourhood()
        #: Whoever has logged in: address, as hosts know it -> Unix time of the last login.
        self.at: dict[str, float] = {}
        #: What came of logins that took as long as the hook waits.
        self.late: list[str] = []

    def come(self, host: str, count: int = 2) -> None:
        """Have new people log in at a host, which trusts each by the time of the OK."""
        for _ in range(count):
            self.log_in(host, next(self._addresses))

    def come_while_the_agent_restarts(self, host: str) -> None:
        """Have somebody log in at a host, which trusts them once it has an agent again."""
        address = next(self._addresses)
        done = lab.client("town", "login", address=ADDRESSES[host][":" in address], source=address)
        self.at[address] = done["at"]
        lab.wait_until(lambda: address not in self.unknown(host), "trusted by the next agent", LATEST)

    def come_to_both(self) -> None:
        """Have the same people log in at one host and then at the other, which does not know them yet."""
        for first, then in (HOSTS, HOSTS[::-1]):
            address = next(self._addresses)
            self.log_in(first, address)
            time.sleep(3)
            self.log_in(then, address)

    def log_in(self, host: str, address: str) -> None:
        to = ADDRESSES[host][":" in address]
        done = lab.client("town", "login_then_connect", address=to, protocol="imap", source=address)
        self.at[address] = done["at"]
        if done["submission"] != "open":
            self.late.append(f"{address} logged in on {host}: {done}")
            assert done["seconds"] >= HOOK_WAITS, self.late
            assert len(self.late) <= LATE, self.late

    def unknown(self, host: str) -> dict[str, str]:
        """Return who is not trusted on a host, or not as long as the last login allows."""
        found = {**elements(host, "trusted_ipv4"), **elements(host, "trusted_ipv6")}
        wrong, now = {}, time.time()
        for address, at in self.at.items():
            left, due = found.get(f"{address} . 587"), at + 86400 - now
            if left is None or abs(left - due) > 3:
                wrong[address] = f"{left} s left instead of {due:.0f}"
        return wrong

    def are_known_everywhere(self) -> bool:
        return not any(self.unknown(host) for host in HOSTS)


@pytest.fixture
def people() -> Iterator[People]:
    """People whom both hosts know; in the end nothing waits to be told, and an echo has come."""
    everybody, began = People(), time.time()
    for host in HOSTS:
        everybody.come(host)
    lab.wait_until(everybody.are_known_everywhere, "both hosts know everybody before the outage")
    yield everybody
    # After a cut the master's kernel may wait as long again before it tries the minion's connection: then echoes come.
    lab.wait_until(lambda: not any(lab.agent_status(host)["outbox"] for host in HOSTS), "nothing waits", 120)
    for host in HOSTS:
        status = lab.agent_status(host)
        assert status["dropped"] == 0
        assert status["seconds_since_echo"] <= time.time() - began


@contextlib.contextmanager
def recovers(people: People, outage: str) -> Iterator[None]:
    """What happens here is the recovery; within the limit both hosts must know everybody."""
    began = time.monotonic()
    yield
    back = time.monotonic()
    limit = LATEST + max(0.0, back - began - START)
    for host in HOSTS:
        people.come(host, 1)
    took, unknown = 0.0, {}

    def everybody_is_known() -> bool:
        nonlocal took, unknown
        took = time.monotonic() - began  # A look takes its time.
        unknown = {host: people.unknown(host) for host in HOSTS}
        return not any(unknown.values())

    with contextlib.suppress(lab.LabError):
        lab.wait_until(everybody_is_known, "", limit + began - time.monotonic())
    print(f"{outage}: {took:.1f} s, {took - back + began:.1f} s after it was back")
    assert unknown == {host: {} for host in HOSTS}
    assert took <= limit + 1


def wait_in_outage(began: float, seconds: float) -> None:
    time.sleep(max(0.0, began + seconds - time.monotonic()))


def on_both(*command: str) -> None:
    lab.on_each(HOSTS, lambda host: lab.run(host, *command))


def test_master_stopped_for_a_minute_and_agents_killed(people: People) -> None:
    began = time.monotonic()
    lab.run("master", "systemctl", "stop", "salt-master")
    people.come("mx1")
    people.come("mx2")
    people.come_to_both()
    wait_in_outage(began, 30)
    on_both("systemctl", "kill", "-s", "KILL", "mailfw-agent")
    for host in HOSTS:
        people.come_while_the_agent_restarts(host)
    wait_in_outage(began, 60)
    with recovers(people, "master stopped"):
        lab.run("master", "systemctl", "start", "salt-master")


def test_master_restarted(people: People) -> None:
    lab.run("master", "systemctl", "stop", "salt-master")
    people.come("mx1")
    people.come("mx2")
    with recovers(people, "master restarted"):
        lab.run("master", "systemctl", "start", "salt-master")


def test_minions_stopped(people: People) -> None:
    began = time.monotonic()
    on_both("systemctl", "stop", "salt-minion")
    people.come("mx1")
    people.come("mx2")
    wait_in_outage(began, 12)
    with recovers(people, "minions stopped"):
        on_both("systemctl", "start", "salt-minion")


def test_minions_restarted(people: People) -> None:
    people.come("mx1")
    with recovers(people, "minions restarted"):
        on_both("systemctl", "restart", "salt-minion")


def test_agents_killed(people: People) -> None:
    people.come("mx1")
    people.come("mx2")
    with recovers(people, "agents killed"):
        on_both("systemctl", "kill", "-s", "KILL", "mailfw-agent")
        for host in HOSTS:
            people.come_while_the_agent_restarts(host)


def port_of_master(state: str) -> None:
    """Have the switch forward what comes from and goes to the master, or swallow it: 3 or 0, as bridge(8) has it."""
    subprocess.run(["bridge", "-n", SWITCH.namespace, "link", "set", "dev", "master", "state", state], check=True)


def cut_the_network(people: People, seconds: int) -> None:
    """Cut the master off, have people log in, and look how long it takes to recover."""
    began = time.monotonic()
    port_of_master("0")
    try:
        people.come("mx1")
        people.come("mx2")
        people.come_to_both()
        wait_in_outage(began, seconds)
    finally:
        with recovers(people, f"network cut for {seconds} s"):
            port_of_master("3")


def test_network_cut(people: People) -> None:
    """For a minute it is cut by the soak tests."""
    cut_the_network(people, 25)


@pytest.fixture
def small_disk() -> Iterator[Callable[[str], None]]:
    """Give the master's cache a small file system of its own; it can be filled."""
    script = f"""
set -e
systemctl stop salt-master
mkdir /root/kept
cp -a {MASTERS_DISK}/. /root/kept
mount -t tmpfs -o size=64m tmpfs {MASTERS_DISK}
chmod 755 {MASTERS_DISK}
cp -a /root/kept/. {MASTERS_DISK}
systemctl start salt-master
"""
    lab.run("master", "sh", "-c", script)
    lab.wait_for_minions(*HOSTS)
    yield lambda script: lab.run("master", "sh", "-c", script) and None
    lab.run("master", "sh", "-c", f"systemctl stop salt-master; umount {MASTERS_DISK}; systemctl start salt-master")
    lab.wait_for_minions(*HOSTS)


def test_masters_disk_full(small_disk: Callable[[str], None], people: People) -> None:
    began = time.monotonic()
    small_disk(f"cat /dev/zero >{MASTERS_DISK}/zeros 2>/dev/null || true; df {MASTERS_DISK}")
    people.come("mx1")
    people.come("mx2")
    people.come_to_both()
    wait_in_outage(began, 12)
    with recovers(people, "disk full"):
        small_disk(f"rm {MASTERS_DISK}/zeros")
