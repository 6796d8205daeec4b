"""Whether Dovecot, Postfix and what stands before them are right for mailfw. See :mod:`mailfwlib.doctor`."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

from mailfwlib import client, dovecot, local, mailserver, parse, reports, sockets
from mailfwlib.doctor import APPLY, PROGRAMS, RESTART_AGENT, Check, Host, Skipped, Wrong, shortened
from mailfwlib.parse import Network
from mailfwlib.settings import ROLES, SERVICES, login_ports

#: Dovecot's part of the reports, written by the states.
REPORTS = Path("/etc/mailfw/dovecot-reports.conf")
#: Networks of proxies that are larger than these are hardly proxies alone.
WIDEST = {4: 24, 6: 64}
#: What is known to pass connections on.
PROXIES = ("haproxy", "nginx", "envoy", "traefik", "caddy", "hitch", "stunnel", "stunnel4", "sslh", "socat")


# The login hook, and Dovecot


def dovecot_can_run_the_hook(host: Host) -> Wrong | None:
    """Dovecot's user can reach the hook and run it."""
    hook, script = PROGRAMS / "login-hook", PROGRAMS / "login_hook.py"
    for user in _login_users(host):
        for path in (hook, script):
            if wrong := _unreachable(user, path):
                return wrong
        for command in ([str(hook), "/bin/true"], ["/usr/bin/python3", "-IS", str(script)]):
            # As after a login from this host itself, which is trusted by nobody.
            done = local.run_as(user, *command, env={"IP": "127.0.0.1", "USER": "mailfw-doctor", "PATH": os.defpath})
            if done.returncode:
                said = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
                return Wrong(f"{' '.join(command)}, run as {user}: {said}", APPLY)
    return None


def dovecot_can_tell_the_agent(host: Host) -> Wrong | None:
    """Dovecot's user, and not everyone, can report logins on the agent's socket."""
    host.agent()
    path = Path(client.SOCKET)
    for user in _login_users(host):
        if wrong := _unreachable(user, path, restart=True):
            return wrong
        done = local.run_as(user, "/usr/bin/python3", "-I", "-c", _LOGIN, client.SOCKET)
        if "not trusted" not in done.stdout:
            said = done.stderr.strip().rpartition("\n")[2] or done.stdout.strip()
            return Wrong(f"the agent refuses a login that {user} reports: {said}", RESTART_AGENT)
    if (mode := path.stat().st_mode & 0o777) & 0o007:
        return Wrong(f"{path} has mode {mode:04o}: it is not for everyone", RESTART_AGENT)
    return None


#: What the hook says, with an answer: a login from this host itself, which is trusted by nobody.
_LOGIN = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
    agent.settimeout(3)
    agent.connect(sys.argv[1])
    agent.send(bytes(1).join((b"login", b"127.0.0.1", b"mailfw-doctor")))
    print(agent.recv(4096).partition(bytes(1))[2].decode())
"""


def _login_users(host: Host) -> Iterator[str]:
    """Yield the users as which Dovecot runs the hook."""
    host.has_role("dovecot")
    found = []
    for name in host.settings["host"]["login_users"]:
        with contextlib.suppress(KeyError):
            found.append(pwd.getpwnam(name).pw_name)
    if not found:
        raise Skipped(f"there is no user {' or '.join(host.settings['host']['login_users'])} here")
    yield from found


def _unreachable(user: str, path: Path, restart: bool = False) -> Wrong | None:
    """Return what keeps a user from a file, or from a socket when the agent is what makes it."""
    obstacle = local.obstacle(user, path)
    if obstacle is None:
        return None
    if not obstacle.exists():
        return Wrong(f"{obstacle} is not there", RESTART_AGENT if restart else APPLY)
    mode = f"{obstacle.stat().st_mode & 0o7777:04o}"
    if obstacle == path and restart:
        return Wrong(f"{user} may not use {obstacle} (mode {mode})", RESTART_AGENT)
    return Wrong(f"{user} may not pass {obstacle} (mode {mode})", f"run `chmod a+rx {obstacle}`")


def dovecot_runs_the_hook(host: Host) -> Wrong | None:
    """Dovecot's configuration has the hook after each login, before scripts of the host's own."""
    _needs_dovecot(host)
    configured = dovecot.configuration()
    missing = dovecot.without_hook(configured, dovecot.installed(mailserver.dovecot("libexec_dir")))
    if not missing:
        return None
    said = f"Dovecot does not run mailfw's hook after logins over {', '.join(missing)}"
    main = mailserver.dovecot_main_file()
    file = next(main.parent.rglob("99-mailfw.conf"), None)
    if file is None:
        return Wrong(f"{said}: there is no 99-mailfw.conf below {main.parent}", APPLY)
    if f"service {dovecot.OWN_SERVICE}" in configured.blocks:
        instead = "; ".join(f"{protocol} runs {program}" for protocol, program in missing.items())
        return Wrong(f"{said}: {instead}", f"{APPLY}: it puts the hook before that, or says why it cannot")
    return Wrong(
        f"{said}, though there is {file}: {main} does not include it",
        f"put `!include {file}` at the end of {main}, then run `doveadm reload`",
    )


def dovecot_has_read_its_configuration(host: Host) -> Wrong | None:
    """Dovecot runs, and has read mailfw's part of its configuration."""
    _needs_dovecot(host)
    directory = Path(mailserver.dovecot("base_dir"))
    pid = local.pid_in(directory / "master.pid")
    if pid is None:
        return Wrong("Dovecot is not running", "run `systemctl restart dovecot`")
    main = mailserver.dovecot_main_file()
    written = [path.stat().st_mtime for path in (*main.parent.rglob("99-mailfw.conf"), REPORTS) if path.exists()]
    readers = [one for one in local.children(pid) if one.name in ("config", "auth")]
    if any(one.started < at for one in readers for at in written):
        return Wrong("Dovecot runs since before mailfw's part of its configuration was written", "run `doveadm reload`")
    return None


def dovecot_reports_logins(host: Host) -> Wrong | None:
    """The agent takes reports, and Dovecot's configuration sends them there, under the right secret."""
    if not host.settings["reports"]:
        raise Skipped("mailfw:reports is false: clients that only send are not trusted")
    _needs_dovecot(host)
    host.agent()
    url = f"http://127.0.0.1:{host.settings['reports']['port']}/"
    secret = host.settings["host"]["report_secret"]
    if wrong := _report(url, secret):
        return wrong
    said, header = mailserver.policy_server()
    if said and said != url:
        return Wrong(
            f"Dovecot has a policy server already, {said}, so it does not report logins to mailfw's agent",
            f"set mailfw:reports to false in pillar, then {APPLY}",
        )
    if not said and REPORTS.exists():
        return Wrong(f"Dovecot does not read {REPORTS}", "mend what 'dovecot runs the hook' says")
    if not said or header != f"{reports.HEADER}: {secret}":
        return Wrong(f"Dovecot's reports have not the secret that the agent asks for, in {REPORTS}", APPLY)
    return None


def _report(url: str, secret: str) -> Wrong | None:
    """Give the agent a report about a login that failed, which it takes and does nothing about."""
    request = urllib.request.Request(url, b'{"success": false}', {reports.HEADER: secret})  # noqa: S310
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=mailserver.TIMEOUT) as answer:
            server = answer.headers.get("Server", "")
    except urllib.error.HTTPError as err:
        server = err.headers.get("Server", "")
        if server.startswith("mailfw-agent"):
            return Wrong(f"the agent refuses a report at {url}: {err}", RESTART_AGENT)
    except OSError as err:
        return Wrong(f"the agent takes no reports at {url}: {getattr(err, 'reason', err)}", RESTART_AGENT)
    if not server.startswith("mailfw-agent"):
        port = url.rpartition(":")[2].strip("/")
        return Wrong(
            f"port {port} of 127.0.0.1, where Dovecot is to report logins, is somebody else's",
            f"give mailfw:reports:port another one in pillar, then {APPLY}",
        )
    return None


def _needs_dovecot(host: Host) -> None:
    """Skip the check unless this host has Dovecot and its role."""
    host.has_role("dovecot")
    if not mailserver.has_dovecot():
        raise Skipped("Dovecot is not installed here")


# Postfix, proxies, and names


def port_25_offers_no_login(host: Host) -> Wrong | None:
    """Port 25, which is never counted, offers no AUTH: not to this host, nor by Postfix's configuration to others."""
    host.has_role("postfix")
    port = SERVICES["smtp"].port
    if not local.listens(port):
        raise Skipped(f"nothing listens on port {port}")
    found, service = mailserver.offers_auth(port), ""
    if mailserver.has_postfix():
        service, setting = mailserver.port_25_service()
        # What Postfix offers may depend on the client's network, and this host is not a stranger.
        if not found and setting == "yes":
            found = "to others than this host"
    if not found:
        return None
    said = f"AUTH is offered on port {port}, {found}: nobody is counted there, so passwords can be guessed at will"
    if service:
        return Wrong(said, f"run `postconf -P {service}/smtpd_sasl_auth_enable=no && postfix reload`")
    return Wrong(said, f"switch AUTH off on port {port}, and let clients send over 587 or 465")


def dovecot_believes_few_hosts(host: Host) -> Wrong | None:
    """In private mode, only few hosts may tell Dovecot of other addresses than their own."""
    if not any(service["mode"] == "private" for service in host.settings["services"]):
        raise Skipped("no service is private")
    _needs_dovecot(host)
    wide = [
        network
        for network in mailserver.networks(mailserver.dovecot("login_trusted_networks"))
        if network.prefixlen < WIDEST[network.version] and not network.is_loopback
    ]
    if not wide:
        return None
    return Wrong(
        f"login_trusted_networks of Dovecot has {shortened(wide)}: every host in there can give any address as its "
        "client's, and have that trusted",
        "give login_trusted_networks the addresses of your proxies and webmail only, then run `doveadm reload`",
    )


def proxies_are_let_in(host: Host) -> Wrong | None:
    """The proxies and webmail hosts that Dovecot and Postfix know are known to mailfw as well."""
    return _let_in(
        host,
        ((role, network) for role in ROLES for network in _proxies(host, role) if not network.is_loopback),
        "is a proxy for Dovecot or Postfix",
    )


def _proxies(host: Host, role: str) -> list[Network]:
    """Return the networks that a role's server believes when they tell of their clients."""
    said = []
    if role in host.settings["roles"] and role == "dovecot" and mailserver.has_dovecot():
        said += [mailserver.dovecot(f"{kind}_trusted_networks") for kind in ("haproxy", "login")]
    if role in host.settings["roles"] and role == "postfix" and mailserver.has_postfix():
        said.append(mailserver.postfix("-h", "smtpd_authorized_xclient_hosts"))
    return mailserver.networks(" ".join(said))


def containers_are_let_in(host: Host) -> Wrong | None:
    """What has sessions from a container of this host, as a webmail has, is known to mailfw."""
    inside, roles = local.container_networks(), {one["port"]: one["role"] for one in host.settings["services"]}
    found = [
        (roles[port], parse.network(str(address)))
        for address, _, port in sockets.connections(login_ports(host.settings))
        if any(address in network for network in inside)
    ]
    return _let_in(host, found, "is a container of this host and has sessions, as a webmail has")


def _let_in(host: Host, found: Iterable[tuple[str, Network]], what: str) -> Wrong | None:
    """Return which networks mailfw does not know as the address of many people, in the ports of a role."""
    unknown: dict[str, dict[Network, None]] = {}
    for role, network in found:
        name = host.list_for(role)
        if name and not any(one.version == network.version and one.overlaps(network) for one in host.listed(name)):
            unknown.setdefault(name, {})[network] = None
    if not unknown:
        return None
    networks = dict.fromkeys(network for some in unknown.values() for network in some)
    lists = " and ".join(f"mailfw:{name} ({_in_pillar(some)})" for name, some in unknown.items())
    return Wrong(
        f"{shortened(networks)} {what}; for mailfw it is one client, refused until trusted, or banned by its rate",
        f"put it into {lists} in pillar, then {APPLY}",
    )


def _in_pillar(networks: Iterable[Network]) -> str:
    """Return the pillar keys for some networks."""
    by_family: dict[str, list[str]] = {}
    for network in networks:
        by_family.setdefault(f"networks_ipv{network.version}", []).append(str(network))
    return "; ".join(f"{key}: [{', '.join(items)}]" for key, items in by_family.items())


def local_proxies_tell_who_connects(host: Host) -> Wrong | None:
    """A proxy on a login port of this host passes on its clients' addresses."""
    names = local.listeners(login_ports(host.settings))
    found = {port: name for port, some in sorted(names.items()) for name in PROXIES if name in some}
    if not found:
        return None
    own = local.own_networks()
    if any(
        one.version == other.version and one.overlaps(other)
        for role in ROLES
        for one in _proxies(host, role)
        for other in own
    ):
        return None
    said = ", ".join(f"{name} listens on port {port}" for port, name in found.items())
    return Wrong(
        f"{said}: Dovecot and Postfix take this host for the client, so logins through it are trusted by nobody",
        "have the proxy use the PROXY protocol, and name 127.0.0.1 in haproxy_trusted_networks of Dovecot, or in "
        "smtpd_authorized_xclient_hosts of Postfix",
    )


def names_lead_to_the_same_kinds_of_address(host: Host) -> Wrong | None:
    """The names of the services have the same kinds of address: a login is known by its address."""
    names: dict[str, str] = host.settings.get("doctor", {}).get("names", {})
    if len(names) < 2:
        raise Skipped("mailfw:doctor:names does not say by which names clients reach this host's services")
    kinds = {service: _kinds(name) for service, name in names.items()}
    unknown = [f"{names[service]} ({service})" for service, some in kinds.items() if not some]
    if unknown:
        return Wrong(
            f"no address is found for {', '.join(unknown)}", "correct that name in the DNS or in mailfw:doctor:names"
        )
    every = sorted(set().union(*kinds.values()))
    lacking = {
        f"{record} record for {names[service]} ({service})": None
        for service, some in kinds.items()
        for record in every
        if record not in some
    }
    if not lacking:
        return None
    said = "; ".join(
        f"{names[service]} ({service}) has {' and '.join(sorted(some))}" for service, some in kinds.items()
    )
    return Wrong(
        f"{said}: a client that reads mail over one version of IP and sends over the other is not known where it sends",
        f"add an {' and an '.join(lacking)}, or remove its counterpart",
    )


def _kinds(name: str) -> set[str]:
    """Return which records a name has: A, AAAA."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return set()
    return {{socket.AF_INET: "A", socket.AF_INET6: "AAAA"}[family] for family, *_ in found}


CHECKS: tuple[Check[Host], ...] = (
    dovecot_can_run_the_hook,
    dovecot_can_tell_the_agent,
    dovecot_runs_the_hook,
    dovecot_has_read_its_configuration,
    dovecot_reports_logins,
    port_25_offers_no_login,
    dovecot_believes_few_hosts,
    proxies_are_let_in,
    containers_are_let_in,
    local_proxies_tell_who_connects,
    names_lead_to_the_same_kinds_of_address,
)
