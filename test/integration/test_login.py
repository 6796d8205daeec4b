"""From a login on one mail host to trust on every mail host."""

import select
import socket
import time
from collections.abc import Container

import pytest

from integration.fleet import LOGIN_USER, NETWORK, Fleet, MailHost, wait_until_trusted
from integration.hosts import wait_for

LOGIN_PORTS = {587, 465, 143, 993, 110, 995, 4190}
HOOK = ["/usr/bin/python3", "-IS", "/usr/lib/mailfw/login_hook.py"]
SCRIPT = "/usr/lib/mailfw/login-hook"


def as_user(user: str, *command: str) -> list[str]:
    """Return the command that runs another one as an unprivileged user."""
    return ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", *command]


def run_as_dovecot(host: MailHost, address: str, *command: str, user: str = "alice@example.com") -> str:
    """Run a command as Dovecot runs its login hook; return what it prints."""
    environment = ["env", "-i", f"IP={address}", f"USER={user}", "PATH=/usr/bin:/bin"]
    return host.host.run(*environment, *as_user(str(LOGIN_USER[1]), *command)).stdout


def test_a_login_is_trusted_here_at_once_and_there_soon(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()
    mx1.agent.login(address)
    assert mx1.host.trusted()[address].keys() == LOGIN_PORTS
    wait_until_trusted(address, mx2)
    here, there = (host.host.trusted()[address] for host in (mx1, mx2))
    assert there.keys() == LOGIN_PORTS
    assert all(86390 <= left <= 86400 for left in [*here.values(), *there.values()])


def test_a_login_over_ipv6_trusts_its_prefix_everywhere(mx1: MailHost, mx2: MailHost) -> None:
    mx1.agent.login("2001:db8:1:2:3:4:5:6")
    wait_until_trusted("2001:db8:1:2::", mx1, mx2)


def test_the_outbox_empties_when_the_echo_comes_back(fleet: Fleet, mx1: MailHost) -> None:
    started = time.time()
    mx1.agent.login(fleet.new_address())
    wait_for("the echo", lambda: mx1.agent.status()["outbox"] == 0)
    assert mx1.agent.status()["last_echo"] > started


def test_a_second_login_is_not_announced_again(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address, other, started = fleet.new_address(), fleet.new_address(), time.time()
    mx1.agent.login(address)
    wait_until_trusted(address, mx2)
    mx1.agent.login(address)
    mx1.agent.login(other)
    wait_until_trusted(other, mx2)
    fleet.ran_since(started)
    assert len(fleet.told_since(started, address)) == 1
    assert len(fleet.told_since(started, other)) == 1


def test_the_hook_of_dovecot_reports_a_login(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()
    run_as_dovecot(mx1, address, *HOOK)
    assert mx1.trusts(address)
    wait_until_trusted(address, mx2)


def test_the_hooks_script_reports_the_login_and_starts_the_session(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    printed = run_as_dovecot(
        mx1, address, SCRIPT, "sh", "-c", 'echo "session of $USER from $IP, $1"', "sh", "two words"
    )
    assert printed == f"session of alice@example.com from {address}, two words\n"
    assert mx1.trusts(address)


def test_the_session_starts_without_an_agent_and_the_login_is_not_lost(fleet: Fleet, mx2: MailHost) -> None:
    addresses, took = [fleet.new_address() for _ in range(3)], []
    mx2.agent.stop()
    try:
        for address in addresses:
            started = time.monotonic()
            assert run_as_dovecot(mx2, address, SCRIPT, "echo", "session") == "session\n"
            took.append(time.monotonic() - started)
        assert min(took) < 2, "the machine may be busy, but not each time"
        assert not mx2.host.trusted().keys() & set(addresses)
    finally:
        mx2.agent.start()
    for address in addresses:
        wait_until_trusted(address, mx2)


def test_the_session_starts_without_a_socket(fleet: Fleet, mx2: MailHost) -> None:
    mx2.agent.stop()
    mx2.agent.close()
    try:
        assert run_as_dovecot(mx2, fleet.new_address(), SCRIPT, "echo", "session") == "session\n"
    finally:
        mx2.agent.start()


def newly_trusted(host: MailHost, before: Container[str]) -> set[str]:
    """Return who is trusted since then, but for logins of tests before: they may still come from the other host."""
    return {one for one in host.host.trusted() if one not in before and not one.startswith("100.64.")}


@pytest.mark.parametrize(
    ("address", "user"),
    [
        ("", ""),
        ("/run/dovecot/login/imap", "alice"),
        ("192.0.2.1%eth0", "alice"),
        ("fe80::1%eth0", "alice"),
        ("::ffff:127.0.0.1", "alice"),
        ("192.0.2.1\n192.0.2.2", "line\nbreak"),
        ("192.0.2.1; reboot", "$(reboot) 'quoted\"'"),
        ("9" * 100_000, "x" * 100_000),
        ("\udcff\udcfe", "\udcff"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_the_session_starts_and_nobody_is_trusted_whatever_the_hook_is_told(
    mx1: MailHost, address: str, user: str
) -> None:
    before = mx1.host.trusted().keys()
    assert run_as_dovecot(mx1, address, SCRIPT, "echo", "session", user=user) == "session\n"
    assert newly_trusted(mx1, before) == set()


@pytest.mark.parametrize("fault", ["import time; time.sleep(60)", "not Python at all", "import os; os._exit(1)"])
def test_the_session_starts_when_the_hook_is_broken(fleet: Fleet, mx2: MailHost, fault: str) -> None:
    hook = mx2.host.path(HOOK[-1])
    whole = hook.read_text()
    hook.write_text(fault)
    try:
        began = time.monotonic()
        assert run_as_dovecot(mx2, fleet.new_address(), SCRIPT, "echo", "session") == "session\n"
        assert time.monotonic() - began < 5
    finally:
        hook.write_text(whole)


def test_other_users_cannot_report_logins(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    report = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        f"s.connect('/run/mailfw/login.sock'); s.send(b'login\\0{address}\\0mallory'); print(s.recv(4096))"
    )
    done = mx1.host.run(*as_user("65534", "/usr/bin/python3", "-c", report), check=False)
    assert "PermissionError" in done.stderr
    # Nor a user who may open the socket but is not Dovecot's.
    as_guest = ["setpriv", "--reuid", "65534", "--regid", str(LOGIN_USER[1]), "--clear-groups"]
    done = mx1.host.run(*as_guest, "/usr/bin/python3", "-c", report)
    assert "error" in done.stdout
    assert not mx1.trusts(address)


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [("receive", ["x"]), ("remember", ["100.64.250.1", "143", "9999999999"]), ("status", [])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_dovecots_user_may_only_report_logins(mx1: MailHost, verb: str, arguments: list[str]) -> None:
    request = "\\0".join([verb, *arguments])
    ask = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        f"s.connect('/run/mailfw/login.sock'); s.send(b'{request}'); print(s.recv(4096))"
    )
    printed = run_as_dovecot(mx1, "", "/usr/bin/python3", "-c", ask)
    assert "not allowed" in printed
    assert not mx1.trusts("100.64.250.1")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "fe80::1", "224.0.0.1", "0.0.0.0", f"{NETWORK}.2"])
def test_a_login_from_no_clients_address_is_not_trusted(mx1: MailHost, address: str) -> None:
    before = mx1.host.trusted().keys()
    assert "is not trusted" in mx1.agent.ask("login", address, "alice")
    assert newly_trusted(mx1, before) == set()


def test_many_logins_become_few_jobs(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    addresses = [fleet.new_address() for _ in range(300)]
    moment, began = time.time(), time.monotonic()
    for first, second in zip(addresses[::2], addresses[1::2]):
        mx1.agent.login(first)
        mx2.agent.login(second)
    took = time.monotonic() - began
    assert took < 10, "no login waits for the fleet"
    for host in (mx1, mx2):
        wait_for(f"{host.name} to trust all", lambda host=host: host.trusts(*addresses))
        wait_for(f"{host.name}'s outbox", lambda host=host: host.agent.status()["outbox"] == 0)
    jobs = [job for job in fleet.ran_since(moment) if job["fun"] == "mailfw.receive"]
    assert 1 <= len(jobs) <= 8 + 4 * took, "one every 250 ms while people log in"
    published = [message for job in jobs for message in job["arg"][0]]
    assert len(published) == len(set(published)), "none is published twice"
    # An agent that another test has restarted may still say something, but not of these.
    told = [message for message in fleet.announcements_since(moment) if any(one in message for one in addresses)]
    assert told
    assert set(told) <= set(published)


def test_a_silent_client_does_not_hold_up_the_others(fleet: Fleet, mx1: MailHost) -> None:
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(100)]
    address = fleet.new_address()
    try:
        for one in silent:
            one.connect(str(mx1.host.path("/run/mailfw/login.sock")))
        mx1.agent.login(address)
        assert select.select(silent, [], [], 0)[0] == [], "before the silent clients are dropped"
    finally:
        for one in silent:
            one.close()
    assert mx1.trusts(address)
