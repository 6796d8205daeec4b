"""Dovecot's post-login scripts: where mailfw's hook goes so that those of the host itself go on running after it.

A protocol's service names a socket (``executable = imap imap-postlogin``), and the service that listens there runs
scripts, one after the other (``executable = script-login /path/one /path/two``). Where the host has none, mailfw's own
service takes that place. Where it has, its service runs the hook first and then its scripts, as the user that they had:
the agent hears only root and Dovecot's login user.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os.path import basename
from pathlib import Path
from typing import NamedTuple

HOOK = "/usr/lib/mailfw/login-hook"
#: Runs what comes next as the mail user, as ``script-login -d`` does.
AS_MAIL_USER = "/usr/lib/mailfw/as-mail-user"
#: The service, and its socket, for protocols without scripts of the host's own.
OWN_SERVICE = "mailfw-login"
PROTOCOLS = ("imap", "pop3", "managesieve")
#: doveconf with the file $1 taken for empty, without a change that others could see.
_WITHOUT = '[ ! -e "$1" ] || mount --bind /dev/null "$1" && exec doveconf'
#: doveconf can hang only on a broken host; no caller waits longer than this many seconds for it.
TIMEOUT = 60


class DovecotError(RuntimeError):
    """Dovecot cannot read its configuration; the message is doveconf's own."""


class UnchainableError(ValueError):
    """The hook cannot be put before a host's own scripts; the message says why."""


@dataclass(frozen=True)
class Block:
    """A block of Dovecot's configuration, or all of it: what is set, and the blocks in it, by ``kind name``."""

    settings: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)


class Plan(NamedTuple):
    """What mailfw's file of Dovecot's configuration sets, and which protocols it leaves alone."""

    #: Service -> setting -> value.
    services: dict[str, dict[str, str]]
    #: Protocol -> why its logins cannot tell the agent.
    left: dict[str, str]


def configuration(without: str | None = None) -> Block:
    """Return what Dovecot's configuration says, or would say without one of its files. Raises DovecotError."""
    command = ["doveconf"] if without is None else ["unshare", "--mount", "sh", "-c", _WITHOUT, "sh", without]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise DovecotError(f"doveconf: {err}") from err
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise DovecotError(message or f"doveconf: exit status {done.returncode}")
    return parse(done.stdout.decode(errors="surrogateescape"))


def parse(text: str) -> Block:
    """Return what doveconf has printed: Dovecot 2.3 prints all settings, 2.4 those that are not the default."""
    path = [Block()]
    for line in map(str.strip, text.splitlines()):
        key, equals, value = line.partition(" = ")
        if line.endswith("{") and not equals:
            kind, _, name = line[:-1].strip().partition(" ")
            path.append(path[-1].blocks.setdefault(f"{kind} {_unquoted(name)}", Block()))
        elif line == "}" and len(path) > 1:
            path.pop()
        elif equals and not line.startswith("#"):
            path[-1].settings[key] = _unquoted(value)
        elif line.endswith(" ="):
            path[-1].settings[line[:-2]] = ""
    return path[0]


def _unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    return text


def installed(libexec: str) -> list[str]:
    """Return the protocols that this host's Dovecot has; ``libexec`` is where its programs are."""
    return [protocol for protocol in PROTOCOLS if Path(libexec, protocol).is_file()]


def plan(
    found: Block, protocols: Iterable[str], libexec: str, login_user: str, primary_group: Callable[[str], str]
) -> Plan:
    """Return how the hook is run after each login, for a configuration without mailfw's file.

    ``primary_group`` returns a user's group, and raises LookupError for a user that does not exist.
    """
    made = Plan({}, {})
    for protocol in protocols:
        words = _executable(found, protocol)
        try:
            socket = _socket(protocol, words)
            if socket:
                name = _listening(found, socket)
                made.services[name] = _chained(found, name, libexec, login_user, primary_group)
            else:
                made.services[protocol] = {"executable": " ".join([*words, OWN_SERVICE])}
        except UnchainableError as err:
            made.left[protocol] = str(err)
    return made


def without_hook(found: Block, protocols: Iterable[str]) -> dict[str, str]:
    """Return the protocols whose logins do not run the hook -> what they run, for the configuration in force."""
    missing = {}
    for protocol in protocols:
        words = _executable(found, protocol)
        try:
            script = _executable(found, _listening(found, _socket(protocol, words)))
        except UnchainableError:
            script = words
        if HOOK not in script:
            missing[protocol] = " ".join(script)
    return missing


def _executable(found: Block, service: str) -> list[str]:
    block = found.blocks.get(f"service {service}", Block())
    return block.settings.get("executable", service).split()


def _socket(protocol: str, words: list[str]) -> str:
    """Return the socket that a protocol's service asks after a login; empty when there is none."""
    places = [place for place, word in enumerate(words) if basename(word) == protocol]
    if not places:
        raise UnchainableError(f"service {protocol} runs '{' '.join(words)}', where {protocol} itself is not found")
    arguments = [word for word in words[places[0] + 1 :] if not word.startswith("-")]
    return arguments[0] if arguments else ""


def _listening(found: Block, socket: str) -> str:
    """Return the service that listens on a socket in Dovecot's directory."""
    for kind, block in found.blocks.items():
        for listener in block.blocks:
            if kind.startswith("service ") and listener.startswith("unix_listener "):
                path = listener.partition(" ")[2]
                if path == socket or path == f"{found.settings.get('base_dir', '/run/dovecot')}/{socket}":
                    return kind.partition(" ")[2]
    raise UnchainableError(f"no service listens on '{socket}'")


def _chained(
    found: Block, name: str, libexec: str, login_user: str, primary_group: Callable[[str], str]
) -> dict[str, str]:
    """Return what makes a host's own service run the hook before its scripts."""
    settings = found.blocks[f"service {name}"].settings
    login, *rest = settings.get("executable", "").split() or [""]
    options = [word for word in rest if word.startswith("-")]
    scripts = rest[len(options) :]
    if (
        basename(login) != "script-login"
        or not scripts
        or rest[: len(options)] != options
        or options not in ([], ["-d"])
    ):
        raise UnchainableError(f"service {name} runs '{' '.join([login, *rest])}', not script-login with scripts")
    if settings.get("chroot"):
        raise UnchainableError(f"service {name} has a chroot, where the hook is not found")
    if not scripts[0].startswith("/"):
        scripts[0] = f"{libexec}/{scripts[0]}"
    user = _expanded(found, settings.get("user", ""))
    if options:
        return {"executable": " ".join([login, HOOK, *_as_mail_user(found, name), *scripts])}
    if user in ("", "root", "0", login_user):
        return {"executable": " ".join([login, HOOK, *scripts])}
    try:
        drop = _as_user(user, _expanded(found, settings.get("group", "")) or primary_group(user))
    except LookupError as err:
        raise UnchainableError(f"service {name} has the user '{user}', which does not exist") from err
    groups = _list(_expanded(found, settings.get("extra_groups", "")))
    drop.append(f"--groups={','.join(groups)}" if groups else "--clear-groups")
    return {"user": "root", "executable": " ".join([login, HOOK, *drop, *scripts])}


def _as_user(user: str, group: str) -> list[str]:
    return ["/usr/bin/setpriv", f"--reuid={user}", f"--regid={group}"]


def _as_mail_user(found: Block, name: str) -> list[str]:
    """Return what stands for script-login's -d: the hook runs before privileges are dropped."""
    if found.settings.get("mail_access_groups"):
        raise UnchainableError(f"service {name} runs script-login -d, and mail_access_groups is set")
    return [AS_MAIL_USER, *(found.settings.get(f"mail_{kind}") or "-" for kind in ("uid", "gid"))]


def _expanded(found: Block, value: str) -> str:
    """Return a value with Dovecot's variables in it replaced: ``$name`` in 2.3, ``$SET:name`` in 2.4."""
    defaults: Mapping[str, str] = {"default_internal_user": "dovecot", "default_internal_group": "dovecot"}
    return re.sub(
        r"\$(?:SET:)?(\w+)", lambda match: found.settings.get(match[1]) or defaults.get(match[1], match[0]), value
    )


def _list(value: str) -> Iterable[str]:
    return [word for word in re.split(r"[ ,]+", value) if word]
