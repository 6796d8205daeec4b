"""Whether everything on this mail host is right, and for each thing that is not, the one thing to do about it.

Each check is a function that is named after what has to be right. It takes a :class:`Host`, returns None or a
:class:`Wrong`, and raises :class:`Skipped` when it has nothing to look at here. Nothing is changed, and nothing is sent
to other hosts but the DNS queries for names that pillar gives. Commands in what to do are for root on this host; they
stand between backquotes.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, TypeVar

from mailfwlib import (
    __version__,
    breakglass,
    client,
    foreign,
    kernel_settings,
    local,
    messages,
    neighbours,
    netlink,
    nft,
    parse,
    rules,
    ruleset,
    sockets,
)
from mailfwlib.parse import Network
from mailfwlib.settings import FAMILIES, Settings, login_ports

#: Seconds that a check may take, and all of them together.
LIMIT, LONGEST = 10.0, 60.0
#: Seconds that the agent may take for an answer: it takes a fraction of a millisecond.
AGENT = 3.0
#: The oldest nft with which the rules are tested.
OLDEST_NFT = (1, 0, 6)
#: Where the states install programs.
PROGRAMS = Path("/usr/lib/mailfw")
UNITS = ("mailfw.service", "mailfw-agent.socket", "mailfw-agent.service")
CONNTRACK = Path("/proc/sys/net/netfilter")
#: Part of the connections that the kernel can track, above which there is no room for an attack.
CONNTRACK_FILL = 0.8
#: Seconds after which a login should have had its echo: it is announced again every minute.
LATE = 300

APPLY = "run `salt-call state.apply mailfw`"
RESTART_AGENT = "run `systemctl restart mailfw-agent.socket mailfw-agent.service`"


class Wrong(NamedTuple):
    """What was found, and the one thing to do about it."""

    found: str
    do: str


#: What checks are about, and a check of it.
Subject = TypeVar("Subject")
Check = Callable[[Subject], Optional[Wrong]]


class Skipped(Exception):  # noqa: N818
    """A check has nothing to look at; the message says why."""


@dataclass
class Host:
    """What the caller knows of this host: the rest the checks ask for themselves."""

    #: What the last state.apply left here; None when there is none.
    saved: Settings | None
    #: The settings of the pillar, or the sentences about what is wrong with it; None when the pillar is not at hand.
    pillar: Settings | str | None
    #: What the master answers a host without keys; a list when it serves a fleet.
    master: Any = None
    #: Sentences about login ports that are open and not guarded.
    unguarded: Callable[[Settings], list[str]] = field(default=lambda _: [])
    #: The services that pillar switches off: they may be open.
    switched_off: Sequence[str] = ()
    #: The minion's id; None when it is not at hand.
    minion_id: str | None = None

    @property
    def settings(self) -> Settings:
        """The settings that rules and agent go by."""
        if self.saved is None:
            raise Skipped("mailfw is not applied here")
        return self.saved

    def agent(self) -> dict[str, Any]:
        """Return what the agent says of itself."""
        if isinstance(self.agent_said, client.AgentError):
            raise Skipped("the agent does not answer")
        return self.agent_said

    @functools.cached_property
    def agent_said(self) -> dict[str, Any] | client.AgentError:
        """What the agent says of itself, or that it does not answer: asked once, since that takes its time."""
        try:
            found: dict[str, Any] = json.loads(client.ask("status", timeout=AGENT))
        except client.AgentError as err:
            return err
        return found

    def has_role(self, role: str) -> None:
        """Skip the check unless this host has a role."""
        if role not in self.settings["roles"]:
            raise Skipped(f"this host has not the role {role}")

    def list_for(self, role: str) -> str | None:
        """Return the list of pillar that lets many people in from one address to a role's ports; None where all may."""
        ways = {
            rules.access(role, one["mode"]) for one in self.settings["services"] if one["login"] and one["role"] == role
        }
        return "trusted" if "trusted only" in ways else "exempt" if "limited" in ways else None

    def listed(self, name: str) -> list[Network]:
        """Return the networks of such a list; who is trusted needs no exemption."""
        return [
            parse.network(network)
            for kind in {name, "trusted"}
            for family in FAMILIES
            for network in self.settings[kind][f"networks_{family}"]
        ]


def examine(subject: Subject, checks: Sequence[Check[Subject]]) -> dict[str, Any]:
    """Run checks; return ``ok`` (names), ``failed`` (name -> what was ``found`` and what to ``do``), ``skipped``."""
    result: dict[str, Any] = {"ok": [], "failed": {}, "skipped": {}}
    end = time.monotonic() + LONGEST
    for check in checks:
        name = check.__name__.replace("_", " ")
        outcome = _within(min(LIMIT, end - time.monotonic()), check, subject)
        if isinstance(outcome, Wrong):
            result["failed"][name] = outcome._asdict()
        elif isinstance(outcome, Skipped):
            result["skipped"][name] = str(outcome)
        else:
            result["ok"].append(name)
    return result


def _within(seconds: float, check: Check[Subject], subject: Subject) -> Wrong | Skipped | None:
    """Return what comes of a check within some seconds; that it breaks, or takes longer, is wrong as well."""
    if seconds <= 0:
        return Wrong(
            f"not looked at: the other checks have taken {LONGEST:.0f} s", "mend what else has failed, and ask again"
        )
    outcomes: list[Wrong | Skipped | None] = []

    def run() -> None:
        try:
            outcomes.append(check(subject))
        except Skipped as why:
            outcomes.append(why)
        except Exception as err:
            outcomes.append(Wrong(f"the check itself failed: {type(err).__name__}: {err}", "see what it says"))

    # A daemon: one that hangs must not keep this process from ending.
    thread = threading.Thread(target=run, name=check.__name__, daemon=True)
    thread.start()
    thread.join(seconds)
    return (
        outcomes[0]
        if outcomes
        else Wrong(f"no answer within {seconds:.0f} s", "see what keeps this host busy, and ask again")
    )


def shortened(items: Iterable[Any]) -> str:
    """Return a list's first items."""
    listed = [str(item) for item in items]
    return ", ".join([*listed[:5], f"and {len(listed) - 5} more"] if len(listed) > 5 else listed)


# Settings


def pillar_is_valid(host: Host) -> Wrong | None:
    """The mailfw pillar has no wrong keys or values."""
    if host.pillar is None:
        raise Skipped("asked without a master, whose pillar is not here")
    if isinstance(host.pillar, str):
        return Wrong(host.pillar, f"correct the pillar at these places, then {APPLY}")
    return None


def what_pillar_says_is_applied(host: Host) -> Wrong | None:
    """The settings that rules and agent go by are the pillar's."""
    if not isinstance(host.pillar, dict):
        raise Skipped("there is no valid pillar")
    if host.saved is None:
        return Wrong("/etc/mailfw/settings.json is not there", APPLY)
    wanted = json.loads(json.dumps(host.pillar))
    differing = sorted(key for key in wanted if wanted[key] != host.saved.get(key))
    if differing:
        return Wrong(f"not applied yet: {', '.join(f'mailfw:{key}' for key in differing)}", APPLY)
    return None


def minion_id_is_applied(host: Host) -> Wrong | None:
    """The agent tells of logins in the name that the minion has: the master publishes to whom it hears of."""
    if host.minion_id is None:
        raise Skipped("asked without Salt, which knows the minion's id")
    saved = host.settings["host"]["id"]
    if saved == host.minion_id:
        return None
    return Wrong(
        f"this minion is {host.minion_id}, and its agent goes by {saved}: nothing of the fleet reaches it", APPLY
    )


def fleet_key_is_there(host: Host) -> Wrong | None:
    """A host whose master serves a fleet has the fleet's key."""
    if host.settings["fleet"]["keys"]:
        return None
    if isinstance(host.master, list):
        return Wrong(
            "mailfw:fleet:keys is empty, though this host's master serves a fleet: logins elsewhere count for nothing "
            "here, and those here nowhere else",
            f"put the fleet's key into this host's pillar (mailfw:fleet:keys), then {APPLY}",
        )
    raise Skipped("mailfw:fleet:keys is empty: logins stay on this host, which is right for a single one")


# Rules


def nft_is_recent_enough(_: Host) -> Wrong | None:
    """The installed nft is one with which the rules are tested."""
    try:
        said = nft.command("--version")
    except nft.NftError as err:
        return Wrong(str(err), APPLY)
    found = re.search(r"v(\d+)\.(\d+)\.(\d+)", said)
    if not found or tuple(map(int, found.groups())) < OLDEST_NFT:
        oldest = ".".join(map(str, OLDEST_NFT))
        return Wrong(f"{said.strip()}: older than {oldest}", f"upgrade the package nftables to {oldest} or later")
    return None


def kernel_takes_the_rules(_: Host) -> Wrong | None:
    """The rule files load, in a namespace that vanishes afterwards: this kernel has what they need."""
    files = _rule_files()
    try:
        ruleset.wanted(ruleset.joined(files))
    except nft.NftError as err:
        return Wrong(
            f"{ruleset.RULES} does not load on Linux {os.uname().release}: {str(err).partition(chr(10))[0]}",
            f"{APPLY}: it writes the files anew; if they still do not load, boot a kernel that has what nft names",
        )
    return None


def rules_are_loaded(_: Host) -> Wrong | None:
    """What the kernel has is what the rule files say."""
    files = _rule_files()
    load = f"run `{PROGRAMS}/mailfw-rules load`"
    with ruleset.turn():
        if not ruleset.live():
            return Wrong("the table inet mailfw is not loaded: every port is open", load)
        try:
            diff = ruleset.compare(ruleset.joined(files))
        except nft.NftError as err:
            raise Skipped("the files do not load, so there is nothing to compare with") from err
    if diff:
        return Wrong(f"what is loaded differs from {ruleset.RULES} in {shortened(ruleset.altered(diff))}", load)
    return None


def _rule_files() -> dict[str, str]:
    files = ruleset.present()
    if not files:
        raise Skipped("mailfw is not applied here")
    return files


def rules_are_in_force(_: Host) -> Wrong | None:
    """Nobody has opened everything by mailfw-open."""
    is_open = breakglass.sentence(time.time(), netlink.Kernel())
    return Wrong(is_open, "run `mailfw-open close`") if is_open else None


def sets_have_room(_: Host) -> Wrong | None:
    """No set is full."""
    full = [name for name, has_port in _sets() if not _takes_one_more(name, has_port)]
    if not full:
        return None
    keys = dict.fromkeys(f"mailfw:sizes:{rules.size_key(name)}" for name in full)
    return Wrong(f"full: {', '.join(full)}", f"raise {', '.join(keys)} in pillar, then {APPLY}")


def _sets() -> list[tuple[str, bool]]:
    """Return the sets whose size counts, and whether their elements have a port behind the address."""
    objects = ruleset.live()
    return [(name, " . inet_service" in objects["set", name]) for name in ruleset.sizes(objects)]


def _takes_one_more(name: str, has_port: bool) -> bool:
    """Return whether an element more would fit. Nothing is added (``nft --check``), and no element is listed."""
    address = "0.0.0.1" if name.endswith("ipv4") else "::1"
    element = f"{address} . 1" if has_port else address
    try:
        nft.command("--check", "-f", "-", script=f"add element {nft.TABLE} {name} {{ {element} timeout 1s }}\n")
    except nft.NftError as err:
        if err.full:
            return False
        raise
    return True


def every_login_port_is_guarded(host: Host) -> Wrong | None:
    """No login service listens that mailfw leaves out, but for those that pillar switches off."""
    found = [one for one in host.unguarded(host.settings) if not any(f"({name})" in one for name in host.switched_off)]
    return Wrong("; ".join(found), f"give these services back to mailfw in pillar, then {APPLY}") if found else None


# Other rules and settings of the host


def other_tables_let_mail_pass(host: Host) -> Wrong | None:
    """No other table drops connections to services that listen here."""
    served = [service for service in host.settings["services"] if service["port"] in sockets.listening()]
    found = neighbours.refusals(foreign.read(), {**host.settings, "services": served})
    return _neighbour(found, "have that chain accept these ports, or, if it is right, stop what listens there")


def nobody_changes_the_mark(host: Host) -> Wrong | None:
    """No other rule changes the bits of the connection mark with which mailfw counts."""
    found = neighbours.marks(foreign.read(), host.settings)
    return _neighbour(found, f"give mailfw:mark two bits that no other rule uses, then {APPLY}")


def connections_are_tracked(host: Host) -> Wrong | None:
    """No other rule keeps connections to limited ports from being tracked."""
    found = neighbours.untracked(foreign.read(), host.settings)
    return _neighbour(found, "except the login ports from that notrack rule, in both directions")


def _neighbour(sentences: list[str], do: str) -> Wrong | None:
    """Return what certainly gets in the way; what may, such as a list of banned addresses, is for mailfw.status."""
    certain = [sentence for sentence in sentences if neighbours.is_certain(sentence)]
    return Wrong("; ".join(certain), do) if certain else None


def tcp_fast_open_is_off(_: Host) -> Wrong | None:
    """Servers take no data in a connection's first packet."""
    found = kernel_settings.warnings()
    if not found:
        return None
    value = int(kernel_settings.FASTOPEN.read_text(encoding="ascii")) & ~kernel_settings.FASTOPEN_SERVER
    return Wrong("; ".join(found), f"run `sysctl -w net.ipv4.tcp_fastopen={value}`, and write that into /etc/sysctl.d")


def connection_tracking_has_room(_: Host) -> Wrong | None:
    """The kernel can track many more connections than it does."""
    try:
        count, most = (
            int((CONNTRACK / f"nf_conntrack_{name}").read_text(encoding="ascii")) for name in ("count", "max")
        )
    except FileNotFoundError as err:
        raise Skipped("nothing is tracked here yet") from err
    if count <= CONNTRACK_FILL * most:
        return None
    return Wrong(
        f"{count} of {most} connections are tracked: above that, new ones are dropped, whatever mailfw says",
        f"set net.netfilter.nf_conntrack_max = {2 * most} (sysctl), outside of containers",
    )


# The agent


def agent_answers(host: Host) -> Wrong | None:
    """The agent runs and answers."""
    if not host.settings["roles"]:
        raise Skipped("this host serves no mail")
    return Wrong(str(host.agent_said), RESTART_AGENT) if isinstance(host.agent_said, client.AgentError) else None


def agent_is_current(host: Host) -> Wrong | None:
    """The agent is the installed one, which is the one that Salt has brought, and has read its settings."""
    status, settings = host.agent(), host.settings
    installed = PROGRAMS / "mailfwlib"
    if _contents(installed) != _contents(Path(__file__).parent):
        return Wrong(f"{installed} differs from what Salt has brought to this host", APPLY)
    if status["version"] != __version__:
        return Wrong(f"it is {status['version']}, installed is {__version__}", RESTART_AGENT)
    if local.started(status["pid"]) < max(path.stat().st_mtime for path in installed.glob("*.py")):
        return Wrong("it runs since before its programs were replaced", RESTART_AGENT)
    keys = [messages.fingerprint(key) for key in settings["fleet"]["keys"]]
    if (status["keys"], status["ports"]) != (keys, login_ports(settings)):
        return Wrong("it goes by other settings than /etc/mailfw/settings.json has", RESTART_AGENT)
    return None


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.py")}


def units_are_enabled(host: Host) -> Wrong | None:
    """Rules and agent are there after a reboot, and now."""
    if not Path("/run/systemd/system").is_dir():
        raise Skipped("there is no systemd here")
    wrong = {}
    for unit in UNITS if host.settings["roles"] else UNITS[:1]:
        enabled, active = (local.output("systemctl", verb, unit) for verb in ("is-enabled", "is-active"))
        if enabled != "enabled" or active not in ("active", "activating"):
            wrong[unit] = f"{unit} is {enabled or 'missing'} and {active}"
    if not wrong:
        return None
    if any("missing" in said or "not-found" in said for said in wrong.values()):
        return Wrong("; ".join(wrong.values()), APPLY)
    return Wrong("; ".join(wrong.values()), f"run `systemctl enable --now {' '.join(wrong)}`")


def logins_reach_the_fleet(host: Host) -> Wrong | None:
    """No login waits for long to be announced: each message comes back as an echo."""
    if not host.settings["fleet"]["keys"]:
        raise Skipped("mailfw:fleet:keys is empty: logins stay on this host")
    status = host.agent()
    oldest = status.get("oldest")
    if oldest is None or time.time() - oldest < LATE:
        return None
    waited = parse.duration_text(time.time() - oldest)
    return Wrong(
        f"{status['outbox']} logins wait to be announced, the oldest for {waited}",
        "on the master, run `salt-run mailfw.doctor`: it knows whether its reactor, the keys and the clocks are right",
    )


CHECKS: tuple[Check[Host], ...] = (
    pillar_is_valid,
    what_pillar_says_is_applied,
    minion_id_is_applied,
    fleet_key_is_there,
    nft_is_recent_enough,
    kernel_takes_the_rules,
    rules_are_loaded,
    rules_are_in_force,
    sets_have_room,
    every_login_port_is_guarded,
    other_tables_let_mail_pass,
    nobody_changes_the_mark,
    connections_are_tracked,
    tcp_fast_open_is_off,
    connection_tracking_has_room,
    agent_answers,
    agent_is_current,
    units_are_enabled,
    logins_reach_the_fleet,
)
