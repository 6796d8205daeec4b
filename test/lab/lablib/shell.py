"""Running commands, showing progress, waiting, and the one error that the lab shows to people."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Programs of sbin are not on the PATH of every root shell.
os.environ["PATH"] = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"

STARTED = time.monotonic()
LOCK_ADDRESS = "\0mailfw-lab"
LOCK_WAIT = 900.0


class LabError(Exception):
    """Something a person can act on: the message says what failed and shows the relevant log."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.1f}s] {text}", flush=True)


def run(command: Sequence[str], text_input: str | None = None, timeout: float = 120.0) -> str:
    """Run a command and return what it printed; LabError with its error output if it fails."""
    try:
        result = subprocess.run(command, input=text_input, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError as err:
        raise LabError(f"{command[0]} is not installed; `lab requirements` lists the packages") from err
    except subprocess.TimeoutExpired as err:
        raise LabError(f"no end after {timeout:.0f} s: {' '.join(command)}") from err
    if result.returncode:
        raise LabError(f"{' '.join(command)}: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def wait_until(what: str, condition: Callable[[], bool], limit: float, pause: float = 0.05) -> None:
    """Poll until the condition holds; LabError naming `what` after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not so after {limit:.0f} s")
        time.sleep(pause)


def tail(path: Path, lines: int = 25) -> str:
    """The last lines of a log, indented, without carriage returns."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return f"    (no {path})"
    return "\n".join("    " + line.rstrip() for line in text.splitlines()[-lines:])


@contextmanager
def heartbeat(what: str, every: float = 20.0) -> Iterator[None]:
    """Say now and then that a long step is still under way, and at its end how long it took."""
    begun = time.monotonic()
    done = threading.Event()

    def beat() -> None:
        while not done.wait(every):
            say(f"{what}: under way for {time.monotonic() - begun:.0f} s")

    say(f"{what} ...")
    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        done.set()
    say(f"{what}: done in {time.monotonic() - begun:.0f} s")


@contextmanager
def lock() -> Iterator[None]:
    """Let one lab command at a time change the machine. The kernel drops the lock with its process."""
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = time.monotonic() + LOCK_WAIT
    told = False
    while True:
        try:
            holder.bind(LOCK_ADDRESS)
            break
        except OSError as err:
            if time.monotonic() > deadline:
                raise LabError("another lab command did not end; look for it with `ss -xlp`") from err
        if not told:
            print("lab: waiting for another lab command to end", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.2)
    try:
        yield
    finally:
        holder.close()
