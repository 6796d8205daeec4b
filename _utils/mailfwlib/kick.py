"""Ending the open sessions of a user, or from some networks, with Dovecot, through its ``doveadm``."""

from __future__ import annotations

import ipaddress
import shutil
import socket
import subprocess
from collections.abc import Iterable

from mailfwlib import sessions
from mailfwlib.parse import Address, Network

#: Seconds that doveadm may take for each of its two answers.
TIMEOUT = 20
#: doveadm's exit status when there was nobody to kick: EX_NOHOST of sysexits.h, DOVEADM_EX_NOTFOUND.
_NOBODY = 68


class KickError(RuntimeError):
    """The sessions may still be open; the message says why."""


def end_sessions(user: str) -> int:
    """End a user's sessions, whatever their protocol; return how many there were, 0 on a host without doveadm.

    Upper and lower case are the same: 'doveadm who' has it so, and says the names that 'doveadm kick' of Dovecot 2.4
    wants letter by letter. Raises KickError.
    """
    tool = shutil.which("doveadm")
    if tool is None:
        return 0
    if _is_an_address(user):
        raise KickError("doveadm takes this name for an address: end its sessions by hand, see 'doveadm who'")
    found = _run(tool, "-f", "tab", "who", "-1", "--", user).splitlines()[1:]
    _kick(tool, (session.partition("\t")[0] for session in found))
    return len(found)


def end_sessions_from(networks: Iterable[Network], spared: Iterable[Network]) -> list[Address]:
    """End the sessions of clients in some networks, but for those in others.

    The addresses are those that Dovecot knows: behind a proxy the client's, where the connection is the proxy's.

    Returns the address of each session that there was; none on a host without doveadm. Raises KickError.
    """
    tool = shutil.which("doveadm")
    if tool is None:
        return []
    networks, spared = list(networks), list(spared)
    try:
        everybody = [address for address, _ in sessions.logged_in(tool)]
    except sessions.SessionsError as err:
        raise KickError(str(err)) from err
    found = [one for one in everybody if _is_in(one, networks) and not _is_in(one, spared)]
    _kick(tool, map(str, found))
    return found


def _kick(tool: str, whom: Iterable[str]) -> None:
    """Kick each once; what fails with one keeps nobody else connected."""
    problems = []
    for one in dict.fromkeys(whom):
        try:
            _run(tool, "kick", "--", one)
        except KickError as err:
            problems.append(str(err))
    if problems:
        raise KickError("; ".join(dict.fromkeys(problems)))


def _is_in(address: Address, networks: list[Network]) -> bool:
    return any(address in network for network in networks)


def _is_an_address(user: str) -> bool:
    """Return whether a name is one that doveadm would read as an address or a network, as inet_aton(3) does."""
    text = user.partition("/")[0]
    try:
        socket.inet_aton(text)
    except OSError:
        try:
            ipaddress.IPv6Address(text)
        except ValueError:
            return False
    return True


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as err:
        raise KickError(f"doveadm gave no answer in {TIMEOUT} s") from err
    except OSError as err:
        raise KickError(f"doveadm: {err.strerror}") from err
    if done.returncode not in (0, _NOBODY):
        reason = done.stderr.strip().rpartition("\n")[2]
        raise KickError(f"doveadm: {reason or f'exit status {done.returncode}'}")
    return done.stdout
