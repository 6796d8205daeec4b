"""A command on the mail host that waits before each thing that it does to disk or kernel, so that it can end there.

Its processes run under a seccomp filter (seccomp_unotify(2)): the kernel holds each system call that has an effect
until the test lets it go on.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import select
import signal
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from support.net import LIMIT, Host

#: System call -> its number on x86_64 and on aarch64 (<asm/unistd.h>), for those that the product and nft use.
_NUMBERS = {
    "write": (1, 64),
    "openat": (257, 56),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "sendmsg": (46, 211),
    "execve": (59, 221),
    "exit_group": (231, 94),
}
_SECCOMP, _PIDFD_GETFD = (317, 277), (438, 438)
_MACHINE = ("x86_64", "aarch64").index(platform.machine())
_NAMES = {numbers[_MACHINE]: name for name, numbers in _NUMBERS.items() if numbers[_MACHINE] is not None}

# Classic BPF and struct seccomp_data, little-endian (<linux/bpf_common.h>, <linux/seccomp.h>).
_LOAD, _IF_EQUAL, _IF_GREATER, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_CALL, _FIRST, _THIRD = 0, 16, 32
_ALLOW, _HOLD = (_RETURN, 0, 0, 0x7FFF0000), (_RETURN, 0, 0, 0x7FC00000)
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
#: What has an effect only under a condition: output is none, and neither is opening a file to read it.
_CONDITIONS = {"write": (_FIRST, _IF_GREATER, 2), "openat": (_THIRD, _IF_ANY_BIT, os.O_ACCMODE | os.O_CREAT)}

#: Starts a command under a filter. Tells the filter's file descriptor with a system call that the filter lets pass.
_LAUNCHER = """
import ctypes, os, sys
call, code, *command = sys.argv[1:]
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
program = Program(len(code) // 16, bytes.fromhex(code))
listener = ctypes.CDLL(None, use_errno=True).syscall(int(call), 1, 8, ctypes.byref(program))
if listener < 0:
    sys.exit(os.strerror(ctypes.get_errno()))
os.writev(1, [b"%d\\n" % listener])
os.execv(command[0], command)
"""

_libc = ctypes.CDLL(None, use_errno=True)


def _filter() -> bytes:
    """Return the filter's program, which holds what has an effect, and allows the rest."""
    lines = [(_LOAD, 0, 0, _CALL)]
    for number, name in _NAMES.items():
        if name in _CONDITIONS:
            argument, test, value = _CONDITIONS[name]
            lines += [(_IF_EQUAL, 0, 4, number), (_LOAD, 0, 0, argument), (test, 0, 1, value), _HOLD, _ALLOW]
        else:
            lines += [(_IF_EQUAL, 0, 1, number), _HOLD]
    return b"".join(struct.pack("=HBBI", *line) for line in [*lines, _ALLOW])


class Step(NamedTuple):
    """A system call that is about to happen: whose, which, and of what."""

    pid: int
    call: str
    subject: str

    def __str__(self) -> str:
        return f"{self.call} {self.subject}"


class Steps:
    """A running command. Iterating over it yields each step before it happens, and lets it happen afterwards."""

    def __init__(self, host: Host, *command: str):
        launcher = ["/usr/bin/python3", "-Ic", _LAUNCHER, str(_SECCOMP[_MACHINE]), _filter().hex(), *command]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "bufsize": 0, "start_new_session": True}
        self.process: subprocess.Popen[bytes] = host.call(subprocess.Popen, launcher, **options)
        self._senders: set[int] = set()
        self.output = ""
        remote = int(self.process.stdout.readline())
        process = os.pidfd_open(self.process.pid)
        self._listener = _libc.syscall(_PIDFD_GETFD[_MACHINE], process, remote, 0)
        os.close(process)
        self._network = _network(self.process.pid)

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        """End what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for _ in self:
            pass
        os.close(self._listener)

    def __iter__(self) -> Iterator[Step]:
        while self._is_held():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # Who asked has been killed.
                number, step = self._receive()
                if self._has_effect(step):
                    yield step
                fcntl.ioctl(self._listener, _SEND, struct.pack("=QqiI", number, 0, 0, _CONTINUE))
        if not self.process.stdout.closed:
            self.output = self.process.communicate(timeout=LIMIT)[0].decode()

    def _is_held(self) -> bool:
        """Wait until a call is held, and return True; or False when nobody is left under the filter."""
        waiting = select.poll()
        waiting.register(self._listener, select.POLLIN)
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            if found := waiting.poll(50):
                return bool(found[0][1] & select.POLLIN)
            self.process.poll()  # Until it is reaped, it counts.
        raise AssertionError("the command neither ends nor goes on")

    def _receive(self) -> tuple[int, Step]:
        found = fcntl.ioctl(self._listener, _RECEIVE, bytes(_NOTIFICATION.size))
        number, pid, _, call, _, _, *arguments = _NOTIFICATION.unpack(found)
        name = _NAMES[call]
        return number, Step(pid, name, _subject(pid, name, arguments))

    def _has_effect(self, step: Step) -> bool:
        """Return whether a held call is a step. That an nft ends is one once it has told the kernel something."""
        if step.call == "sendmsg" and step.subject == "nft" and _network(step.pid) == self._network:
            self._senders.add(step.pid)
            return True
        if step.call == "exit_group":
            return step.pid in self._senders
        if step.call.startswith("mkdir"):
            return not Path(f"/proc/{step.pid}/root", step.subject[1:]).exists()
        return step.call not in ("execve", "sendmsg") and not step.subject.startswith(("/dev/null", "/memfd:"))


def processes(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return found


def kill(pids: Iterable[int]) -> None:
    """Kill some processes, at once; those that have ended already are no matter."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _network(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _subject(pid: int, call: str, arguments: list[int]) -> str:
    """Return what a system call is about."""
    if call in ("sendmsg", "exit_group"):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    if call in ("write", "fchmod", "fchown", "ftruncate", "fsync"):
        return os.readlink(f"/proc/{pid}/fd/{arguments[0]}")
    return _text(pid, arguments[1 if "at" in call[-3:] else 0])


def _text(pid: int, address: int) -> str:
    """Return a string from a process's memory."""
    with open(f"/proc/{pid}/mem", "rb") as memory:
        memory.seek(address)
        return os.fsdecode(memory.read1(4096).partition(b"\0")[0])
