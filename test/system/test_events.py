"""What an operator hears and sees on the master of booted hosts: events, one of them mailed; the table of all hosts."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest

from lab.lablib import hosts
from support import lab
from support.lab import ADDRESSES, wait_until

from .conftest import ENVIRONMENTS, HOSTS

#: A stranger, as mx1 sees it, and enough connections to have it banned.
CAFE, TOO_MANY = "203.0.113.10", 40
MAILDROP = "/var/spool/postfix/maildrop"


@pytest.fixture(scope="module", autouse=True)
def telling_soon(fleet) -> Iterator[None]:
    """Hosts that look each second, and take one block."""
    pillar = {"protection": {"type": "autoban"}, "metrics": {"interval": "1s"}, "sizes": {"blocked": 1}}
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, **pillar)
    lab.all_states(HOSTS, "state.apply", "mailfw")
    lab.forget(*HOSTS)
    yield
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, protection={"type": "autoban"})
    lab.all_states(HOSTS, "state.apply", "mailfw")


class Listener:
    """Salt's own runner, which shows the events as they come to the master's bus."""

    def __init__(self) -> None:
        command = hosts.enter_node("master", ["salt-run", "state.event", "mailfw/*"])
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout
        os.set_blocking(self._process.stdout.fileno(), False)
        self._said = b""

    def of(self, tag: str) -> list[dict]:
        """Return the data of the events with a tag so far."""
        assert self._process.stdout
        self._said += self._process.stdout.read() or b""
        lines = [line.split("\t", 1) for line in self._said.decode().splitlines() if "\t" in line]
        return [json.loads(event)["data"] for found, event in lines if found == tag]

    def end(self) -> None:
        self._process.terminate()
        self._process.communicate()


@pytest.fixture
def listener(telling_soon) -> Iterator[Listener]:
    listening = Listener()
    # Its own start shows in nothing: something is fired until it hears that.
    wait_until(lambda: lab.salt("mx1", "event.send", "mailfw/test") and listening.of("mailfw/test"), "it listens")
    yield listening
    listening.end()


def test_events_reach_the_master_and_one_is_mailed(listener):
    now = time.time()
    lab.run("master", "sh", "-c", f"rm -f {MAILDROP}/*")
    try:
        lab.salt("mx1", "mailfw.block", "192.0.2.66", "period=1h", "reason=ticket 17")
        lab.salt("mx1", "mailfw.open", "1h", "reason=locked out")
        wait_until(lambda: listener.of("mailfw/open"), "the opening is told")
        lab.salt("mx1", "mailfw.close")
        lab.client("cafe", "probe", targets=[[ADDRESSES["mx1"][0], 143]] * TOO_MANY, patience=3)
        for tag in ("mailfw/block", "mailfw/full", "mailfw/ban"):
            wait_until(lambda tag=tag: listener.of(tag), f"{tag} is told")
        told = {tag: listener.of(f"mailfw/{tag}")[0] for tag in ("block", "full", "open", "ban")}
        for tag in ("block", "open", "ban"):
            assert abs(told[tag].pop("until") - now - 3600) < 60
        assert told == {
            "block": {"host": "mx1", "address": "192.0.2.66", "by": "root", "reason": "ticket 17"},
            "full": {"host": "mx1", "set": "blocked_ipv4", "size": 1},
            "open": {"host": "mx1", "reason": "locked out"},
            "ban": {"host": "mx1", "role": "dovecot", "address": CAFE},
        }
        wait_until(lambda: mails(), "a mail is handed to Postfix")
        assert re.search(r"^Subject: mailfw/open$", mails(), re.M)
        assert re.search(r'^host: "mx1"$', mails(), re.M)
        assert "recipient: operator@example.org" in mails()
    finally:
        lab.salt("mx1", "mailfw.close")
        lab.salt("mx1", "mailfw.unblock", "192.0.2.66")
        lab.forget("mx1")


def mails() -> str:
    """Return what the master's Postfix, which does not run, has been given to deliver."""
    return lab.run("master", "sh", "-c", f"find {MAILDROP} -type f -exec postcat {{}} +", check=False)


@pytest.mark.parametrize("columns", [80, 120, 400])
def test_the_table_of_all_hosts_fits_the_terminal(telling_soon, columns):
    status, shown = on_a_terminal(columns, "salt-run", "mailfw.status")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert status == 0
    assert "Traceback" not in shown
    assert max(map(len, lines)) <= columns
    tables = [part.splitlines() for part in "\n".join(lines).split("\n\n") if part.startswith("host ")]
    assert len(tables) > 1 or columns == 400
    for heading, *rows in tables:
        starts = [found.start() for found in re.finditer(r"(?<=  )\S|^\S", heading)]
        for row in rows:
            assert all(at >= len(row) or at == 0 or row[at - 2 : at] == "  " for at in starts), "columns are aligned"
    assert {row.split()[0] for _, *rows in tables for row in rows if not row.startswith(" ")} == set(HOSTS)


def test_in_a_pipe_it_is_one_table_without_colours(telling_soon):
    shown = lab.run("master", "salt-run", "mailfw.status")
    assert "\x1b" not in shown
    heading, *rows = shown.split("\n\n")[0].splitlines()
    assert heading.split()[0] == "host"
    assert [row.split()[0] for row in rows] == list(HOSTS)


def on_a_terminal(columns: int, *command: str) -> tuple[int, str]:
    """Run a command on the master as somebody at a terminal does; return its exit status and what is shown."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    # Not its standard error: Salt 3008 has long warnings of its own there.
    entered = hosts.enter_node("master", command)
    process = subprocess.Popen(entered, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    try:
        while select.select([ours], [], [], 60)[0]:
            shown += os.read(ours, 65536)
    except OSError:  # The last process has closed it.
        pass
    os.close(ours)
    return process.wait(10), shown.decode().replace("\r\n", "\n")
