"""Many logins at once on both hosts: few jobs, and everybody is trusted everywhere soon after the last."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

from integration.fleet import SOCKET, Fleet, MailHost
from integration.hosts import wait_for

LOGINS, ADDRESSES, SECONDS = 10_000, 1_000, 10
#: Jobs that the fleet may be told of them in: so many a second while people log in, and some.
JOBS_A_SECOND, MORE_JOBS = 4, 20
#: Seconds from the last login until every address is trusted on both hosts, or, on a busy machine, how many times what
#: a single login takes there.
LATEST, TIMES = 2.0, 3


def log_in(host: MailHost, addresses: list[str], logins: int) -> float:
    """Report logins evenly over ten seconds, each as the hook does; return when the last was acknowledged."""
    path, began = str(host.host.path(SOCKET)), time.monotonic()
    for number in range(logins):
        time.sleep(max(0.0, began + number * SECONDS / logins - time.monotonic()))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(10)
            connection.connect(path)
            address = addresses[number * len(addresses) // logins]
            connection.send(f"login\0{address}\0of-{address}".encode())
            assert connection.recv(4096).startswith(b"ok\0")
    return time.monotonic()


def seconds_until_trusted(addresses: list[str], hosts: list[MailHost], since: float) -> float:
    """Wait until some hosts trust all of some addresses; return how long that took."""
    for host in hosts:
        wait_for(f"{host.name} to trust all", lambda host=host: host.trusts(*addresses))
    return time.monotonic() - since


def test_ten_thousand_logins_become_few_jobs(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    """Some of the addresses log in on one host only, some on the other, some on both: each several times in a row."""
    addresses, moment = [fleet.new_address() for _ in range(ADDRESSES)], time.time()
    with ThreadPoolExecutor(2) as pool:
        began = time.monotonic()
        running = [
            pool.submit(log_in, mx1, addresses[:600], LOGINS // 2),
            pool.submit(log_in, mx2, addresses[400:], LOGINS // 2),
        ]
        last = max(one.result() for one in running)
    waited = seconds_until_trusted(addresses, [mx1, mx2], last)
    jobs = [job for job in fleet.ran_since(moment) if job["fun"] == "mailfw.receive"]
    sent = fleet.announcements_since(moment)
    took = last - began
    single, began = fleet.new_address(), time.monotonic()
    mx1.agent.login(single)
    alone = seconds_until_trusted([single], [mx1, mx2], began)
    print(f"{took:.1f} s, {len(jobs)} jobs for {len(sent)} messages")
    print(f"all trusted {waited:.2f} s after the last login, a single one after {alone:.2f} s")
    assert took < 3 * SECONDS, "a busy machine is slower than the ten seconds"
    assert len(jobs) <= JOBS_A_SECOND * took + MORE_JOBS
    assert waited <= max(LATEST, TIMES * alone)
