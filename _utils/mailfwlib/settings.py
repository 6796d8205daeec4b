"""Settings: the one schema that gives pillar its keys, forms and defaults, and the services that mailfw knows.

:func:`resolve` turns the ``mailfw`` pillar of a host into its settings, or raises :class:`SettingsError` that
names everything that is wrong with it at once.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from dataclasses import dataclass
from typing import Any, Callable

from mailfwlib import parse

Settings = dict[str, Any]

MODES = ("autoban", "protected", "private", "public")
ROLES = ("postfix", "dovecot")
FAMILIES = ("ipv4", "ipv6")


@dataclass(frozen=True)
class Service:
    """A service that mail hosts offer: its TCP port (IANA's), the role that serves it, whether people log in there."""

    port: int
    role: str
    login: bool = True


#: The services and their ports: https://www.iana.org/assignments/service-names-port-numbers
SERVICES = {
    "smtp": Service(25, "postfix", login=False),
    "submission": Service(587, "postfix"),
    "submissions": Service(465, "postfix"),
    "imap": Service(143, "dovecot"),
    "imaps": Service(993, "dovecot"),
    "pop3": Service(110, "dovecot"),
    "pop3s": Service(995, "dovecot"),
    "sieve": Service(4190, "dovecot"),
}
LOGIN_SERVICES = tuple(name for name, service in SERVICES.items() if service.login)


class SettingsError(ValueError):
    """The pillar is not valid. ``problems`` has one sentence for each thing that is wrong, by pillar path."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Option:
    """One pillar key: how its value is parsed, what it is when absent, and what it means."""

    parse: Callable[[Any], Any]
    default: Any
    meaning: str


def _choice(*accepted: str) -> Callable[[Any], str]:
    def parse_choice(value: Any) -> str:
        if value not in accepted or not isinstance(value, str):
            raise ValueError(f"expected one of {', '.join(accepted)}")
        return value

    return parse_choice


def _whole(lowest: int, highest: int) -> Callable[[Any], int]:
    def parse_whole(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise ValueError(f"expected a whole number from {lowest} to {highest}")
        return value

    return parse_whole


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _each(parse_item: Callable[[Any], Any], noun: str) -> Callable[[Any], list[Any]]:
    """Return a parser for a list, which reports every bad element by its place."""

    def parse_list(value: Any) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"expected a list of {noun}")
        items, problems = [], []
        for place, element in enumerate(value):
            try:
                items.append(parse_item(element))
            except ValueError as err:
                problems.append((f"[{place}]", element, str(err)))
        if problems:
            raise _NestedError(problems)
        return items

    return parse_list


def _networks(version: int) -> Callable[[Any], list[str]]:
    """Return a parser for the networks of one family; overlaps are collapsed, as static interval sets need them."""
    parse_list = _each(lambda item: parse.network_of_family(item, version), f"IPv{version} networks")
    return lambda value: [str(one) for one in ipaddress.collapse_addresses(parse_list(value))]


def _roles(value: Any) -> list[str]:
    return sorted(set(_each(_choice(*ROLES), "roles")(value)), key=ROLES.index)


def _key(value: Any) -> str:
    form = "expected a secret of at least 32 characters, such as 'openssl rand -hex 32' prints"
    if not isinstance(value, str) or len(value) < 32 or not value.isprintable() or not value.isascii():
        raise ValueError(form)
    if value != value.strip() or len(set(value)) == 1:
        raise ValueError(f"{form}; not one character again and again, nor white space around it")
    return value


def _service_modes(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("expected a mapping of services to modes, such as {sieve: private}")
    modes, problems = {}, []
    for name, mode in value.items():
        try:
            _choice(*LOGIN_SERVICES)(name)
        except ValueError as err:
            problems.append(("", name, str(err)))
            continue
        try:
            modes[name] = _choice(*MODES)(mode)
        except ValueError as err:
            problems.append((f":{name}", mode, str(err)))
    if problems:
        raise _NestedError(problems)
    return modes


def _changed_services(value: Any) -> dict[str, Any]:
    """Return service -> False or {"port": ...} for the services that are switched off or on another port."""
    if not isinstance(value, dict):
        raise ValueError("expected a mapping of services, such as {pop3: false, submission: {port: 2587}}")
    changed: dict[str, Any] = {}
    problems: list[tuple[str, Any, str]] = []
    for name, entry in value.items():
        try:
            _choice(*LOGIN_SERVICES)(name)
            changed[name] = _CHANGED_SERVICE(entry)
        except _NestedError as err:
            problems.extend((f":{name}{rest}", inner, sentence) for rest, inner, sentence in err.problems)
        except ValueError as err:
            known = name in LOGIN_SERVICES
            problems.append((f":{name}" if known else "", entry if known else name, str(err)))
    if problems:
        raise _NestedError(problems)
    return changed


@dataclass(frozen=True)
class FalseOr:
    """A parser for ``false`` or a mapping with the keys of ``schema``."""

    schema: dict[str, Any]
    example: str

    def __call__(self, value: Any) -> Any:
        """Return ``False`` or the parsed mapping. Raises ValueError."""
        if value is False:
            return False
        if not isinstance(value, dict):
            raise ValueError(f"expected false or a mapping such as {self.example}")
        problems: list[tuple[str, Any, str]] = []
        parsed = _walk(value, self.schema, "", problems)
        if problems:
            raise _NestedError(problems)
        return parsed


_CHANGED_SERVICE = FalseOr({"port": Option(_whole(1, 65535), None, "the TCP port of the service")}, "{port: 2587}")


def _two_bits(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**32 or bin(value).count("1") != 2:
        raise ValueError("expected two bits of 32, such as 0x03000000")
    return value


def _users(value: Any) -> str:
    """YAML reads a bare ``off`` as false."""
    return "off" if value is False else _choice("hash", "plain", "off")(value)


def _names(value: Any) -> dict[str, str]:
    """Return service -> host name."""
    if not isinstance(value, dict):
        raise ValueError("expected a mapping of services to host names, such as {imap: imap.example.org}")
    problems: list[tuple[str, Any, str]] = []
    for service, name in value.items():
        if service not in LOGIN_SERVICES:
            problems.append(("", service, f"expected one of {', '.join(LOGIN_SERVICES)}"))
        elif not isinstance(name, str) or not re.fullmatch(r"(?!-)[A-Za-z0-9._-]{1,253}", name):
            problems.append((f":{service}", name, "expected a host name such as imap.example.org"))
    if problems:
        raise _NestedError(problems)
    return dict(value)


class _NestedError(ValueError):
    """Problems inside a value: (the rest of the path, the value, the sentence) for each."""

    def __init__(self, problems: list[tuple[str, Any, str]]):
        super().__init__("; ".join(sentence for _, _, sentence in problems))
        self.problems = problems


_NETWORK_COUNTING = {
    "rate": Option(parse.rate, "100/minute", "new connections of one network, over all its addresses"),
    "ipv4_prefix": Option(_whole(8, 31), 24, "an IPv4 network is a prefix of this length"),
    "ipv6_prefix": Option(_whole(16, 63), 48, "an IPv6 network is a prefix of this length"),
}


_LOGGING = {
    "rate": Option(parse.rate, "10/minute", "lines for each kind of decision"),
    "group": Option(_whole(0, 65535), None, "an nflog group instead of the kernel's log"),
}


#: Where node_exporter looks for files of metrics: Debian's prometheus-node-exporter.
METRICS_DIRECTORY = "/var/lib/prometheus/node-exporter"


def _directory(value: Any) -> str:
    """Return a path that a unit file can name as it is."""
    if not isinstance(value, str) or not re.fullmatch(r"(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+", value):
        raise ValueError(f"expected the absolute path of a directory, such as {METRICS_DIRECTORY}")
    return value


_METRICS = {
    "directory": Option(_directory, METRICS_DIRECTORY, "node_exporter's directory of text files"),
    "interval": Option(parse.duration, "15s", "how often they are written"),
}


_REPORTS = {"port": Option(_whole(1024, 65535), 4145, "a port of loopback")}


def _network_lists(meaning: str) -> dict[str, Option]:
    return {
        "networks_ipv4": Option(_networks(4), [], f"IPv4 networks {meaning}"),
        "networks_ipv6": Option(_networks(6), [], f"IPv6 networks {meaning}"),
    }


#: Every pillar key below ``mailfw``.
SCHEMA: dict[str, Any] = {
    "protection": {
        "type": Option(_choice(*MODES), "autoban", "the mode: autoban, protected, private or public"),
        "services": Option(_service_modes, {}, "another mode for single services, e.g. {sieve: private}"),
    },
    "enforce": Option(_boolean, True, "false: count who would have been refused, refuse nobody"),
    "roles": Option(_roles, list(ROLES), "what this host serves"),
    "services": Option(_changed_services, {}, "services on another port or switched off, e.g. {pop3: false}"),
    "autoban": {
        "rate": Option(parse.rate, "10/minute", "new connections of one source to the ports of one role"),
        "burst": Option(_whole(1, 10000), 20, "connections that a quiet source may open at once"),
        "period": Option(parse.duration, "1h", "how long a source above the rate is banned"),
        "ipv6_prefix": Option(
            _whole(32, 128),
            64,
            "an IPv6 source is a prefix of this length; made longer, whom IPv6 bans and blocks were for is forgotten",
        ),
        "networks": Option(
            FalseOr(_NETWORK_COUNTING, "{rate: 100/minute, ipv4_prefix: 24, ipv6_prefix: 48}"),
            False,
            "count whole networks as well",
        ),
    },
    "trusted": {
        "period": Option(parse.duration, "1d", "how long a login is trusted"),
        "timeout": Option(parse.duration, "5h", "default timeout of the trusted sets"),
        "ipv6_prefix": Option(
            _whole(32, 128),
            64,
            "a login over IPv6 trusts its prefix of this length, the same on all hosts of a fleet; made longer, who is "
            "trusted over IPv6 has to log in again",
        ),
        **_network_lists("that may always connect"),
        "private": Option(_boolean, False, "true: in private mode a login opens the ports from wherever it comes"),
        "never": Option(
            lambda value: [str(one) for one in _each(parse.network, "addresses or networks")(value)],
            [],
            "addresses that a login must not trust: proxies, webmail",
        ),
        "users": Option(_users, "hash", "how the agent keeps who has logged in: hash, plain or off"),
        "per_user": Option(_whole(1, 10_000), 50, "addresses of one user that logins make trusted within a day"),
    },
    "exempt": _network_lists("that are never counted, and for which nothing opens"),
    "blocked": _network_lists("that are refused on every login port"),
    "reaction": {
        "banned": Option(_choice("drop", "reject"), "drop", "what a banned source gets"),
        "blocked": Option(_choice("drop", "reject"), "drop", "what a blocked source gets"),
        "untrusted": Option(_choice("hold", "reject", "drop"), "hold", "what a source that is not trusted gets"),
    },
    "reports": Option(FalseOr(_REPORTS, "{port: 4145}"), {}, "Dovecot reports logins, Postfix's too, to the agent"),
    "log": Option(FalseOr(_LOGGING, "{rate: 10/minute}"), {}, "log bans and refusals, at a limited rate"),
    "metrics": Option(
        FalseOr(_METRICS, f"{{directory: {METRICS_DIRECTORY}}}"), {}, "a text file of metrics for node_exporter"
    ),
    "sizes": {
        "trusted": Option(_whole(1, 2**24), 2_000_000, "elements of the trusted sets: addresses times ports"),
        "banned": Option(_whole(1, 2**24), 65536, "banned sources, for each role and family"),
        "blocked": Option(_whole(1, 2**24), 65536, "sources blocked by operators, for each family"),
        "rates": Option(_whole(1, 2**24), 65536, "sources whose rate is measured, for each role and family"),
        "waiting": Option(_whole(1, 2**24), 65536, "sources that hold keeps waiting, for each family"),
        "observed": Option(_whole(1, 2**24), 65536, "who would have been refused, for each family"),
    },
    "doctor": {
        "names": Option(_names, {}, "the names by which clients reach services, for mailfw.doctor to look up"),
    },
    "mark": Option(_two_bits, 0x03000000, "the two bits of the connection mark that mailfw uses"),
    "fleet": {
        "keys": Option(_each(_key, "secrets"), [], "shared secrets of the mail hosts, newest first"),
    },
}


#: The value of an unknown key: it may be a secret in the wrong place.
_UNKNOWN = object()


def _line(path: str, value: Any, sentence: str) -> str:
    """Return what an operator reads of a problem, without what may be a secret."""
    if value is _UNKNOWN:
        return f"{path}: {sentence}"
    if path == "mailfw" or path.startswith("mailfw:fleet"):
        return f"{path}: (not shown): {sentence}"
    text = repr(value)
    return f"{path}: {text if len(text) <= 80 else text[:77] + '...'}: {sentence}"


def _walk(pillar: Any, schema: dict[str, Any], path: str, problems: list[tuple[str, Any, str]]) -> Settings:
    """Return the parsed values of one level; append (path, value, sentence) to ``problems`` for what is wrong."""
    if not isinstance(pillar, dict):
        problems.append((path, pillar, f"expected a mapping with the keys {', '.join(schema)}"))
        pillar = {}
    for key in pillar:
        if key not in schema:
            close = difflib.get_close_matches(str(key), schema, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(schema)}"
            problems.append((f"{path}:{key}", _UNKNOWN, f"unknown key{hint}"))
    parsed: Settings = {}
    for key, entry in schema.items():
        here = f"{path}:{key}"
        if isinstance(entry, dict):
            parsed[key] = _walk(pillar.get(key, {}), entry, here, problems)
            continue
        value = pillar.get(key, entry.default)
        if value is None and entry.default is None:
            parsed[key] = None
            continue
        try:
            parsed[key] = entry.parse(value)
        except _NestedError as err:
            problems.extend((here + rest, inner, sentence) for rest, inner, sentence in err.problems)
        except ValueError as err:
            problems.append((here, value, str(err)))
    return parsed


def _conflicts(settings: Settings) -> list[str]:
    """Return what is wrong with values that are each fine alone."""
    problems = []
    autoban = settings["autoban"]
    counting = autoban["networks"]
    if counting and counting["ipv6_prefix"] >= autoban["ipv6_prefix"]:
        problems.append(
            f"mailfw:autoban:networks:ipv6_prefix: {counting['ipv6_prefix']}: "
            f"must be shorter than mailfw:autoban:ipv6_prefix, which is {autoban['ipv6_prefix']}"
        )
    taken: dict[int, str] = {SERVICES["smtp"].port: "smtp"}
    # Those on their own ports come first: it is another one that was moved there.
    for service in sorted(_services(settings), key=lambda one: one["name"] in settings["services"]):
        name, port = service["name"], service["port"]
        if (other := taken.setdefault(port, name)) != name:
            problems.append(f"mailfw:services:{name}:port: {port}: is the port of {other}; expected one of its own")
    protected = [one["name"] for one in _services(settings) if one["mode"] == "protected"]
    if protected and "dovecot" not in settings["roles"] and not settings["fleet"]["keys"]:
        problems.append(
            f"mailfw:fleet:keys: []: in mode protected {', '.join(protected)} opens for addresses that have logged in, "
            "and without the role dovecot nobody logs in on this host; expected a key, under which other hosts tell of "
            "logins"
        )
    for family in ("networks_ipv4", "networks_ipv6"):
        for network in sorted(set(settings["trusted"][family]) & set(settings["blocked"][family])):
            problems.append(f"mailfw:blocked:{family}: '{network}': is also in mailfw:trusted:{family}, which wins")
    return problems


def _services(settings: Settings) -> list[dict[str, Any]]:
    """Return the services of the host's roles: name, port, role, mode and whether people log in there."""
    protection, changed = settings["protection"], settings["services"]
    return [
        {
            "name": name,
            "port": changed.get(name, {}).get("port") or service.port,
            "role": service.role,
            "mode": protection["services"].get(name, protection["type"]) if service.login else "public",
            "login": service.login,
        }
        for name, service in SERVICES.items()
        if service.role in settings["roles"] and changed.get(name) is not False
    ]


def resolve(pillar: Any) -> Settings:
    """Return the settings of a host from its ``mailfw`` pillar (``None`` or ``{}``: all defaults).

    Durations are seconds, rates ``{"count", "unit"}``, networks canonical strings; ``services`` lists what the
    host's roles serve. The result is plain data that JSON carries.

    Raises SettingsError with every problem at once.
    """
    problems: list[tuple[str, Any, str]] = []
    settings = _walk({} if pillar is None else pillar, SCHEMA, "mailfw", problems)
    if problems:
        raise SettingsError([_line(*problem) for problem in problems])
    conflicts = _conflicts(settings)
    if conflicts:
        raise SettingsError(conflicts)
    settings["services"] = _services(settings)
    return settings


def login_ports(settings: Settings) -> list[int]:
    """Return the ports that a login opens on this host: those of its services where people log in."""
    return [service["port"] for service in settings["services"] if service["login"]]


def ports(settings: Settings, names: list[Any]) -> list[int]:
    """Return the ports of services given by name or number; raises ValueError for one that this host lacks."""
    known = {service["name"]: service["port"] for service in settings["services"] if service["login"]}
    numbers = {str(port): port for port in known.values()}
    found = []
    for name in map(str, names):
        port = known.get(name) or numbers.get(name)
        if port is None:
            accepted = ", ".join(f"{service} ({number})" for service, number in known.items())
            raise ValueError(f"service {name!r}: expected one of this host's: {accepted}")
        found.append(port)
    return list(dict.fromkeys(found))
