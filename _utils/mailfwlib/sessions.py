"""Sessions: trust lasts as long as a user stays logged in, for some days after the login itself.

A thread asks Dovecot now and then who is logged in (``doveadm who``) and has the agent renew their trust, a few at a
time, so that logins come in between. What a session renews is the trust of a login on this host: an address that has
none here, or whose trust an operator has ended since, is never renewed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from typing import IO, Any, cast

from mailfwlib import messages, parse
from mailfwlib.journal import DIRECTORY, Journal
from mailfwlib.parse import Address
from mailfwlib.people import LONGEST_NAME
from mailfwlib.settings import Settings
from mailfwlib.worker import Worker, WorkError

#: Dovecot's services where a session begins with a password: LMTP's clients, for one, are other mail servers.
PROTOCOLS = {"imap", "pop3", "sieve", "managesieve", "submission"}
#: Seconds between two looks at who is logged in: a tenth of the period of a trust, in these bounds.
SHORTEST_PAUSE, LONGEST_PAUSE = 2.0, 300.0
#: doveadm gets so many seconds, and so many bytes are read of what it says: more than a hundred thousand sessions.
TIMEOUT, LONGEST = 30.0, 16 << 20
#: Bytes that are read at a time.
PIECE = 1 << 16
#: Sessions whose renewal is one request to the agent: it keeps a login waiting for some milliseconds.
AT_ONCE = 10
#: Addresses whose last login is remembered, and the seconds within which another login is not worth a note.
MOST_LOGINS, SAME = 100_000, 3600.0

#: An address as text, and a user.
Client = tuple[str, str]


class SessionsError(WorkError):
    """Dovecot does not say who is logged in; the message says why."""


def last_logins() -> dict[Address, float]:
    """Return when addresses have last logged in on this host (Unix time), as the agent keeps it on disk."""
    return _journal(parse.address).load()


def _journal(key: Callable[[str], Address]) -> Journal[Address]:
    return Journal(DIRECTORY / "logins", 2 * MOST_LOGINS, key)


class LastLogins:
    """When addresses have last logged in on this host, to the hour, for as long as a session of theirs counts."""

    def __init__(self, ended: dict[Address, float], key: Callable[[str], Address] = parse.address):
        """``ended``: when an operator has ended an address's trust; logins before that are none any more.

        ``key`` returns the address under which the one that is on disk is trusted.
        """
        self._journal = _journal(key)
        kept = self._journal.load()
        counting = [(key, at) for key, at in kept.items() if _counts(at) and at > ended.get(key, 0.0)]
        self._at = dict(sorted(counting, key=lambda login: login[1])[-MOST_LOGINS:])
        if len(self._at) < len(kept):
            self._journal.replace(self._at)

    def note(self, address: Address, at: float) -> None:
        """Remember a login, on disk as well."""
        if abs(at - self._at.get(address, 0.0)) < SAME:
            return
        self._at.pop(address, None)
        self._at[address] = at
        if len(self._at) > MOST_LOGINS:
            del self._at[next(iter(self._at))]
        self._journal.append(address, at, lambda: self._at)

    def forget(self, address: Address) -> None:
        """Take an address for one that never logged in. Whoever starts the next agent knows that, too."""
        self._at.pop(address, None)

    def count(self, address: Address) -> bool:
        """Return whether an address has logged in so lately that its sessions renew its trust."""
        return _counts(self._at.get(address, 0.0))


def _counts(at: float) -> bool:
    return abs(time.time() - at) < messages.OLDEST_LOGIN


class Sessions:
    """Has the trust of those renewed who are logged in: ``renew`` is called with a few of them at a time."""

    def __init__(self, settings: Callable[[], Settings], renew: Callable[[list[Client]], Any], tool: str = "doveadm"):
        self._settings, self._renew, self._tool = settings, renew, tool
        self._failures = 0
        failing = "the trust of who is still logged in is not renewed"
        self._worker = Worker("sessions", failing, self.look, lambda: pause(self._settings()))

    def start(self) -> None:
        """Start the thread. It ends with the process."""
        self._worker.start()

    def look(self) -> None:
        """Have everybody renewed who is logged in. Does nothing on a host without Dovecot.

        Raises SessionsError when Dovecot does not say so twice: once is one that restarts, or is up after the agent.
        """
        if "dovecot" not in self._settings()["roles"] or not shutil.which(self._tool):
            return
        try:
            found = sorted({(str(address), user) for address, user in logged_in(self._tool)})
        except SessionsError:
            self._failures += 1
            if self._failures > 1:
                raise
            return
        self._failures = 0
        for first in range(0, len(found), AT_ONCE):
            self._renew(found[first : first + AT_ONCE])


def pause(settings: Settings) -> float:
    """Return the seconds between two looks."""
    return float(min(LONGEST_PAUSE, max(SHORTEST_PAUSE, settings["trusted"]["period"] / 10)))


def logged_in(tool: str) -> list[tuple[Address, str]]:
    """Return address and user of each session that this host's Dovecot has. Raises SessionsError."""
    said = _said([tool, "-f", "json", "who", "-1"])
    try:
        return list(clients(json.loads(said.decode("utf-8", "replace"), strict=False)))
    except (ValueError, TypeError, AttributeError, RecursionError) as err:
        raise SessionsError(f"{tool} who: says what is no list of sessions") from err


def _said(command: list[str]) -> bytearray:
    """Return what a command says, within the bounds of time and size. Raises SessionsError."""
    about = f"{command[0]} who"
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError as err:
        raise SessionsError(f"{about}: {err.strerror}") from err
    late = threading.Timer(TIMEOUT, process.kill)
    late.start()
    with process:
        # read() would take memory for LONGEST at once, and C's library then keep as much for itself ever after.
        said = bytearray()
        while len(said) < LONGEST and (more := cast(IO[bytes], process.stdout).read(PIECE)):
            said += more
        if len(said) >= LONGEST:
            process.kill()
            raise SessionsError(f"{about}: says more than {LONGEST} bytes")
        status = process.wait()
        late.cancel()
    if status < 0:
        raise SessionsError(f"{about}: no answer in {TIMEOUT:g} s")
    if status:
        raise SessionsError(f"{about}: exit status {status}")
    return said


def clients(listed: list[dict[str, Any]]) -> Iterable[tuple[Address, str]]:
    """Yield address and user of the sessions that ``doveadm -f json who -1`` lists.

    User names in there are whatever users have made of them. Raises what comes of a list that is none.
    """
    for session in listed:
        if session.get("service") in PROTOCOLS:
            with contextlib.suppress(ValueError):  # None for a session that has no client.
                yield parse.address(session.get("ip")), _name(session.get("username"))


def _name(user: Any) -> str:
    """Return a user's name as the hook would hand it on; empty for what cannot be one."""
    if not isinstance(user, str) or "\0" in user:
        return ""
    return user.encode("utf-8", "replace")[:LONGEST_NAME].decode("utf-8", "ignore")
