"""Whether the master serves the fleet, and what only it can know of its mail hosts. See :mod:`mailfwlib.doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mailfwlib import local, messages
from mailfwlib.doctor import Check, Skipped, Wrong

#: Seconds that clocks may differ. Messages are refused from messages.FRESH on.
CLOCKS = 30

APPLY = "on the master, run `salt-call state.apply mailfw.reactor`"


@dataclass
class Master:
    """The master, as its configuration describes it on disk, and the mail hosts that it knows."""

    opts: dict[str, Any]
    hosts: list[str]

    @property
    def keys(self) -> list[str]:
        """The fleet's keys."""
        found: list[str] = (self.opts.get("mailfw") or {}).get("keys") or []
        return found


def fleet_keys_are_there(master: Master) -> Wrong | None:
    """The master has the fleet's keys."""
    if master.keys:
        return None
    return Wrong("the master's configuration has no mailfw:keys, so it knows no message of the fleet", APPLY)


def reactor_hears_logins(master: Master) -> Wrong | None:
    """The master passes logins on."""
    entries = [entry for entry in master.opts.get("reactor") or [] if isinstance(entry, dict)]
    if any("mailfw/login.sls" in str(files) for entry in entries for files in [entry.get("mailfw/login", "")]):
        return None
    return Wrong("the master's configuration has no reactor for mailfw/login, so no login is passed on", APPLY)


def hosts_may_ask_for_logins(master: Master) -> Wrong | None:
    """Mail hosts may ask for the logins that they have missed."""
    allowed = (master.opts.get("peer_run") or {}).values()
    if any("mailfw.trusts" in functions for functions in allowed):
        return None
    return Wrong("the master's peer_run does not let mail hosts ask for mailfw.trusts", APPLY)


def master_has_read_its_configuration(master: Master) -> Wrong | None:
    """The master was restarted since its configuration for mailfw was written."""
    file = Path(master.opts["conf_file"]).parent / "master.d" / "mailfw.conf"
    pid = local.pid_in(Path(master.opts.get("pidfile") or "/nonexistent"))
    if pid is None or not file.exists():
        raise Skipped(f"no pid file or no {file}")
    if local.started(pid) >= file.stat().st_mtime:
        return None
    return Wrong(
        f"the master runs since before {file} was written", "on the master, run `systemctl restart salt-master`"
    )


def mail_hosts_are_known(master: Master) -> Wrong | None:
    """Mail hosts have signed something lately."""
    if master.hosts:
        return None
    return Wrong(
        "no mail host has signed anything for seven days",
        "on a mail host, run `salt-call mailfw.catch_up`, which says what is in the way",
    )


CHECKS: tuple[Check[Master], ...] = (
    fleet_keys_are_there,
    reactor_hears_logins,
    hosts_may_ask_for_logins,
    master_has_read_its_configuration,
    mail_hosts_are_known,
)


def of_host(said: dict[str, Any], keys: list[str], asked: float, answered: float) -> dict[str, Any]:
    """Return what is wrong with a mail host: what it has found itself, and how its keys and its clock compare.

    ``said`` is what it answered, between two Unix times; ``keys`` are the master's.
    """
    found: dict[str, Any] = dict(said["failed"])
    theirs, ours = said["host"]["keys"], [messages.fingerprint(key) for key in keys]
    if theirs and ours and not (theirs[0] in ours and ours[0] in theirs):
        found["its keys are the master's"] = Wrong(
            f"its keys are {', '.join(theirs)}, the master's {', '.join(ours)}: neither believes the other",
            "give both the same mailfw:fleet:keys in pillar, then run `salt-call state.apply mailfw` on the host and "
            "`salt-call state.apply mailfw.reactor` on the master",
        )._asdict()
    at = float(said["host"]["time"])
    apart = max(asked - at, at - answered)
    if apart > CLOCKS:
        found["its clock is the master's"] = Wrong(
            f"its clock is {apart:.0f} s {'behind' if at < asked else 'ahead of'} the master's: from "
            f"{messages.FRESH} s on they do not believe each other's messages",
            "set both clocks by NTP, for example with chrony",
        )._asdict()
    return found
