"""
Ask and tell a mail host's firewall who may connect: the operator's verbs, and what states, reactor and runner call.

The verbs work on what is loaded on the host and on the settings that the last ``state.apply mailfw`` left there
(``/etc/mailfw/settings.json``); :py:func:`settings` and :py:func:`render` work on the minion's pillar.

Addresses are IPv4 or IPv6; an IPv4-mapped IPv6 address means the IPv4 address in it. An IPv6 address stands for its
prefix (``mailfw:trusted:ipv6_prefix``, ``mailfw:autoban:ipv6_prefix``; a /64 by default). Where a verb takes an
address, it takes a network of up to 4096 such sources as well, which then stand in the sets one by one; larger ones are
for the lists of the pillar. Durations are such as ``1d``, ``5h``, ``90m``, ``1d12h`` or ``3600``.

Verbs that change something can be repeated, say what was before, and leave a line in the journal, with the reason and
who asked for it: ``journalctl -t mailfw``, or ``journalctl MAILFW_ADDRESS=192.0.2.1``.
"""

import contextlib
import glob
import json
import logging
import os
import pwd
import secrets
import subprocess
import sys
import time
from pathlib import Path

import salt.utils.files
import salt.utils.user
import salt.utils.yaml
import salt.version
from salt.exceptions import CommandExecutionError, SaltInvocationError

from mailfwlib import (
    __version__,
    audit,
    breakglass,
    client,
    doctor,
    doctor_mail,
    dovecot,
    elements,
    familiar,
    files,
    kick,
    listing,
    messages,
    neighbours,
    netlink,
    nft,
    overview,
    parse,
    people,
    rules,
    ruleset,
    sessions,
    snapshot,
    sockets,
)
from mailfwlib import explain as explaining
from mailfwlib import observed as observing
from mailfwlib import settings as schema

log = logging.getLogger(__name__)

__virtualname__ = "mailfw"
__func_alias__ = {
    "apply_": "apply",
    "open_": "open",
    "doctor_": "doctor",
    "overview_": "overview",
    "list_": "list",
}
__outputter__ = {"list_": "mailfw", "observed": "mailfw", "seed": "mailfw"}

SETTINGS = "/etc/mailfw/settings.json"
TREE = "salt://mailfw"
SALT_HELPER = "/usr/lib/mailfw/salt_helper.py"
#: Addresses that the agent is told of at once.
MOST_TOLD = 1000
#: What the end of a trust on one host of a fleet comes with.
ONLY_HERE = "a login or a session on another mail host has it trusted again: salt-run mailfw.untrust is for all of them"


def __virtual__():
    if __grains__["kernel"] != "Linux":
        return False, "mailfw needs nftables, which only Linux has"
    return __virtualname__


def settings():
    """
    Return this minion's settings: its ``mailfw`` pillar with the defaults, checked.

    Durations are in seconds. The fleet's keys are shown as fingerprints.

    Raises CommandExecutionError with everything that is wrong, a line for each, by pillar path.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.settings
    """
    found = _pillar_settings()
    found["fleet"]["keys"] = [messages.fingerprint(key) for key in found["fleet"]["keys"]]
    return found


def _pillar_settings():
    if "mailfw" not in __pillar__ and _had_pillar():
        raise CommandExecutionError(
            "mailfw: this minion's pillar has no such key any more, so nothing was changed: look for it under the "
            "minion's present name and pillarenv; write `mailfw: {}` if the defaults are meant"
        )
    try:
        return schema.resolve(__pillar__.get("mailfw"))
    except schema.SettingsError as err:
        raise CommandExecutionError(f"the mailfw pillar of this minion is not valid:\n{err}") from err


def _had_pillar():
    """Return whether the pillar had the key ``mailfw`` at the last state.apply; so it had where that cannot be told."""
    try:
        return os.path.exists(SETTINGS) and _host_settings()["host"].get("from_pillar", True)
    except (ValueError, LookupError):
        return True


def _host_settings():
    """Return the settings that the last state.apply left on this host: what its rules and its agent go by."""
    try:
        with salt.utils.files.fopen(SETTINGS) as stream:
            return json.load(stream)
    except FileNotFoundError as err:
        raise CommandExecutionError(f"{SETTINGS}: not there; run 'state.apply mailfw' on this host first") from err


def render(saltenv="base"):
    """
    Return the rule files that this minion's pillar asks for: file name -> text. Loads and writes nothing.

    saltenv
        The environment that the templates come from. Default: ``base``.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.render
    """
    wanted = _pillar_settings()
    shared = rules.context(wanted)
    return {
        name: "\n".join(_render(part["source"], {**shared, **part}, saltenv) for part in parts)
        for name, parts in rules.files(wanted).items()
    }


def _render(source, context, saltenv):
    path = f"{TREE}/{source}"
    if not __salt__["cp.cache_file"](path, saltenv=saltenv):
        raise CommandExecutionError(f"{path}: not found in the environment {saltenv}")
    return __salt__["slsutil.renderer"](path=path, default_renderer="jinja", saltenv=saltenv, context=context) + "\n"


def apply_(files=None, test=False):
    """
    Load rule files, in one transaction: all of them are loaded, or nothing changes. Bans, blocks and trusts stay.

    Returns ``{"diff": ..., "files": [...]}``: how the loaded rules differ from what the files declare (empty when they
    do not), and which files were written.

    files
        File name -> text, as :py:func:`render` gives it. They are written to ``/etc/nftables.d/mailfw`` once the
        kernel has taken them. Default: the files that are there.

    test
        Whether to say what would change, and change nothing. Default: ``False``.

    Raises CommandExecutionError with nft's message when they do not load.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.apply
        salt mx1 mailfw.apply test=True
    """
    wanted = ruleset.present() if files is None else files
    if not wanted:
        raise CommandExecutionError(f"{ruleset.RULES}: no rules there; run 'state.apply mailfw' on this host first")
    try:
        if test:
            return {"diff": ruleset.compare(ruleset.joined(wanted)), "files": ruleset.stale_files(wanted)}
        diff, stale = (ruleset.reload(), []) if files is None else ruleset.install(wanted)
    except nft.NftError as err:
        raise CommandExecutionError(f"the rules do not load, and those from before stay:\n{err}") from err
    except OSError as err:
        raise CommandExecutionError(f"the rules cannot be written, and those from before stay: {err}") from err
    if diff:
        _end_blocked(_host_settings() if files is None else _pillar_settings())
    return {"diff": diff, "files": stale}


def _end_blocked(host):
    """End the open sessions of the pillar's blocked networks; the rules would wait for their next packet."""
    blocked = [network for family in schema.FAMILIES for network in host["blocked"][f"networks_{family}"]]
    if blocked:
        _end_sessions([parse.network(network) for network in blocked], schema.login_ports(host), host)


def _end_sessions(networks, ports, host):
    """End some networks' open sessions on some ports, but for trusted networks'; return how many there were."""
    if not host["enforce"]:
        return 0
    ended, direct = 0, set()
    # Dovecot cannot be asked to end some of its services only.
    has_dovecot = "dovecot" in host["roles"] and _ports_of("dovecot", host) <= set(ports)
    if has_dovecot:
        with _warned(networks):
            direct = {address for address, _, _ in sockets.connections(ports)}
    for network in networks:
        with _warned([network]):
            ended += sockets.end(network, ports, host["trusted"][f"networks_ipv{network.version}"])
    if has_dovecot:  # Those whose connection is a proxy's.
        spared = [parse.network(one) for family in schema.FAMILIES for one in host["trusted"][f"networks_{family}"]]
        with _warned(networks):
            ended += sum(address not in direct for address in kick.end_sessions_from(networks, spared))
    return ended


@contextlib.contextmanager
def _warned(networks):
    """Log why some sessions are not ended, and go on with the others."""
    try:
        yield
    except (sockets.SocketsError, kick.KickError) as err:
        log.warning("mailfw: sessions of %s are not ended at once: %s", ", ".join(map(str, networks)), err)


def _ports_of(role, host):
    """Return the login ports of a role."""
    return {one["port"] for one in host["services"] if one["login"] and one["role"] == role}


def _replace(path, text, mode, test, owner="root"):
    """Make a file say ``text``, unless this is a test; return whether it says something else so far."""
    try:
        with salt.utils.files.fopen(path) as stream:
            same = stream.read() == text
    except FileNotFoundError:
        same = False
    if not same and not test:
        files.replace(Path(path), text, mode, owner)
    return not same


def save_settings(login_users=("dovecot",), test=False):
    """
    Write this minion's settings to ``/etc/mailfw/settings.json``, for the agent and the verbs. Return whether they
    differ from what was there.

    login_users
        The users as which Dovecot runs the login hook. Default: ``dovecot``.

    test
        Whether to write nothing. Default: ``False``.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.save_settings
    """
    wanted = _pillar_settings()
    configuration = os.path.dirname(__opts__["conf_file"])
    wanted["host"] = {
        "id": __opts__["id"],
        "from_pillar": "mailfw" in __pillar__,
        "login_users": list(login_users),
        "salt_helper": [sys.executable, SALT_HELPER, configuration],
        "report_secret": report_secret() or secrets.token_hex(32),
    }
    return _replace(SETTINGS, json.dumps(wanted, indent=1, sort_keys=True) + "\n", 0o600, test)


def report_secret():
    """
    Return the secret under which this host's Dovecot reports logins to its agent; empty before the first
    ``state.apply mailfw``. Called by the state that writes Dovecot's configuration: whoever has it can have any
    address trusted on this host.

    CLI Example:

    .. code-block:: bash

        salt-call mailfw.report_secret
    """
    try:
        return _host_settings()["host"].get("report_secret", "")
    except (CommandExecutionError, ValueError, LookupError):
        return ""


def login_services(ours="/etc/dovecot/conf.d/99-mailfw.conf", login_user="dovecot", libexec="/usr/lib/dovecot"):
    """
    Return how this host's Dovecot is to run mailfw's login hook, before the post-login scripts that it has itself.
    Called by the state that writes Dovecot's configuration.

    Returns ``{"services": {service: {setting: value}}, "left": {protocol: reason}}``: what mailfw's file sets, and the
    protocols whose own scripts the hook cannot be put before.

    ours
        mailfw's file of Dovecot's configuration, which does not count. Default: ``/etc/dovecot/conf.d/99-mailfw.conf``.

    login_user
        The user as which Dovecot runs the hook. Default: ``dovecot``.

    libexec
        Where Dovecot's programs are. Default: ``/usr/lib/dovecot``.

    Raises CommandExecutionError with Dovecot's message when it refuses its configuration without mailfw's file.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.login_services
    """

    def primary_group(user):
        return str((pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)).pw_gid)

    found = _dovecot(ours)
    return dovecot.plan(found, dovecot.installed(libexec), libexec, login_user, primary_group)._asdict()


def logins_without_hook(libexec="/usr/lib/dovecot"):
    """
    Return the protocols whose logins do not run mailfw's hook, as this host's Dovecot is configured now, each with what
    they run instead. Their addresses are trusted by Dovecot's reports, a moment after the login.

    libexec
        Where Dovecot's programs are. Default: ``/usr/lib/dovecot``.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.logins_without_hook
    """
    return dovecot.without_hook(_dovecot(), dovecot.installed(libexec))


def _dovecot(without=None):
    try:
        return dovecot.configuration(without)
    except dovecot.DovecotError as err:
        raise CommandExecutionError(f"Dovecot's configuration cannot be read:\n{err}") from err


def _parsed(name, parser, value):
    """Return what a parser makes of an argument."""
    try:
        return parser(value)
    except ValueError as err:
        raise SaltInvocationError(f"{name} {value!r:.80}: {err}") from err


def _address(value):
    return _parsed("address", parse.address, value)


def _source(value, host):
    """Return the address or network that is meant, if the sets take it."""

    def parsed(text):
        source = parse.network(text) if "/" in str(text) else parse.address(text)
        elements.trusted_keys(source, host)
        elements.source_keys(source, host)
        return source

    return _parsed("address", parsed, value)


def _trusted_text(source, host):
    return elements.text(elements.trusted_network(source, host))


def _source_text(source, host):
    return elements.text(elements.source_network(source, host))


def _who(kwargs):
    """Return who calls a verb, from what Salt adds to its arguments; there are no others."""
    unknown = [name for name in kwargs if not name.startswith("__pub_")]
    if unknown:
        raise SaltInvocationError(f"{', '.join(unknown)}: there is no such argument")
    return audit.name(kwargs.get("__pub_user") or salt.utils.user.get_specific_user())


def _reason(value):
    return _parsed("reason", audit.reason, value)


def _user(value):
    return _parsed("user", people.name, value)


def _period(value):
    return _parsed("period", parse.duration, value)


def _list(value):
    """Return a list from what a command line gives: a list, one value, or values with commas between them."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _ports(services, host):
    if services is None:
        return schema.login_ports(host)
    try:
        return schema.ports(host, _list(services))
    except ValueError as err:
        raise SaltInvocationError(str(err)) from err


def _roles(role):
    if role is None:
        return schema.ROLES
    return (_choice("role", role, schema.ROLES),)


def _run(script):
    try:
        with ruleset.turn():  # An applier may be carrying elements to a set that it makes anew.
            nft.run(script)
    except nft.NftError as err:
        raise CommandExecutionError(str(err)) from err
    with contextlib.suppress(client.AgentError):  # Without it, the next snapshot is taken when it starts.
        client.ask("save", timeout=2)


def _holds():
    """Return what says whether a set has an element."""
    return _kernel(lambda kernel: kernel.holds, "the sets")


def _elements(name):
    return _kernel(lambda kernel: list(kernel.elements(name)), name)


def _kernel(ask, what):
    """Return what the kernel answers. It is not asked through nft, which comes to no end beside steady logins."""
    try:
        return ask(netlink.Kernel())
    except OSError as err:
        raise CommandExecutionError(f"{what}: {err.strerror}; see mailfw.status") from err


def _remaining(source, host):
    return _kernel(lambda kernel: explaining.remaining(source, host, kernel), source)


def _texts(found):
    """Return seconds as durations, by what they are for."""
    return {what: _text(seconds) for what, seconds in found.items()}


def _text(seconds):
    return "forever" if seconds == float("inf") else parse.duration_text(seconds)


def _tell_agent(verb, keys, *arguments):
    """Tell the agent what the kernel has been told already. If it is not there, it reads the sets when it starts."""
    try:
        for place in range(0, len(keys), MOST_TOLD):
            client.ask(verb, ",".join(map(str, keys[place : place + MOST_TOLD])), *arguments)
    except client.AgentError as err:
        log.warning("mailfw: %s", err)


def trust(address, period=None, services=None, reason="", **kwargs):
    """
    Trust an address or a network on this host, and lift its rate bans. Blocks stay.

    address
        The address or network.

    period
        For how long. Default: ``mailfw:trusted:period``. A login does not shorten it. One that outlasts it takes the
        trust over, as one that is earned, but for services in private mode: there it renews the operator's.

    services
        The services or ports, as a list or with commas between them. Default: every login port of the host.

    reason
        Why, for the journal and :py:func:`explain`; at most 90 bytes.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.trust 192.0.2.1
        salt mx1 mailfw.trust 192.0.2.0/28 period=5h services=submission,submissions reason="ticket 17"
    """
    host, by, why = _host_settings(), _who(kwargs), _reason(reason)
    source, ports = _source(address, host), _ports(services, host)
    seconds = host["trusted"]["period"] if period is None else _period(period)
    had = _remaining(source, host)
    was = {port: left for port, left in had["trusted"].items() if port in ports}
    until, note = time.time() + seconds, audit.note(by, why)
    _run(elements.trust(source, dict.fromkeys(ports, seconds), host, note, _holds()))
    _tell_agent("remember", elements.trusted_keys(source, host), ",".join(map(str, ports)), str(until), note)
    name = _trusted_text(source, host)
    audit.record("trust", name, by, ports, until, why)
    if had["banned"]:
        audit.record("unban", _source_text(source, host), by, had["banned"], why=why)
    return {"trusted": name, "ports": ports, "period": parse.duration_text(seconds), "was": _texts(was)}


def untrust(address, services=None, reason="", **kwargs):
    """
    End the trust of an address or a network on this host, whether a login earned it or an operator gave it, and its
    open sessions on these services, at once; where they are all of Dovecot's, those behind a proxy, too. Trusted
    networks of the pillar stay.

    In a fleet, a login or an open session on another mail host has the address trusted again, here as well (the answer
    says so as ``only_here``): ``salt-run mailfw.untrust`` ends both on all of them.

    address
        The address or network.

    services
        The services or ports, as a list or with commas between them. Default: every login port of the host.

    reason
        Why, for the journal; at most 90 bytes.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.untrust 192.0.2.1
    """
    host, by, why = _host_settings(), _who(kwargs), _reason(reason)
    source, ports = _source(address, host), _ports(services, host)
    had = sorted(set(ports) & _remaining(source, host)["trusted"].keys())
    _run(elements.untrust(source, ports, host, _holds()))
    _tell_agent("forget", elements.trusted_keys(source, host), ",".join(map(str, ports)))
    ended = _end_sessions([elements.trusted_network(source, host)], ports, host)
    name = _trusted_text(source, host)
    if had or ended:
        audit.record("untrust", name, by, had, why=why)
    done = {"untrusted": name, "ports": had, "sessions_ended": ended}
    return {**done, "only_here": ONLY_HERE} if host["fleet"]["keys"] else done


def revoke(user, reason="", **kwargs):
    """
    End on this host what only this user's logins have earned, and the user's open sessions: for a stolen password, once
    it is changed.

    Returns the addresses that are trusted no more (``revoked``); those that stay, because others have logged in from
    there as well (``shared``) or because an operator has trusted them (``given``: the ports that were given); how many
    sessions were ended; and ``problems``, if there were any. Logins of nobody by name are nobody's.

    user
        The user, as Dovecot logs the name. Upper and lower case are the same.

    reason
        Why, for the audit; at most 90 bytes.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.revoke alice@example.org
    """
    user = _user(user)
    host, by, why = _host_settings(), _who(kwargs), _reason(reason)
    found, more = {"revoked": [], "shared": [], "given": []}, True
    while more:
        answer = json.loads(_ask_agent("revoke", user))
        more = answer.pop("more")
        for what, addresses in answer.items():
            found[what] += addresses
    ended, problems = _end_user(user, found["revoked"], host)
    found = {what: [_trusted_text(parse.address(one), host) for one in addresses] for what, addresses in found.items()}
    for address in found["revoked"]:
        audit.record("revoke", address, by, why=why)
    return {**found, "sessions_ended": ended, **({"problems": problems} if problems else {})}


def _end_user(user, addresses, host):
    """End a user's sessions, and the submissions of some addresses; return how many there were, and problems."""
    ended, problems = 0, []
    if host["trusted"].get("users") == "off":
        problems.append("mailfw:trusted:users is off: who has earned what is not known, only sessions were ended")
    if "dovecot" in host["roles"]:
        try:
            ended += kick.end_sessions(user)
        except kick.KickError as err:
            problems.append(f"the user's sessions: {err}")
    ports = _ports_of("postfix", host)
    keys = set(map(parse.address, addresses))
    try:
        open_ = {source for source, _, _ in sockets.connections(ports)} if keys else set()
        for source in open_:
            if elements.trusted_key(source, host) in keys:
                ended += sockets.end(parse.network(str(source)), ports)
    except sockets.SocketsError as err:
        problems.append(f"connections to submission: {err}")
    return ended, problems


def ban(address, role=None, period=None, reason="", **kwargs):
    """
    Ban a source or a network from the limited ports of a role, as if it had exceeded the rate. A login or ``unban``
    lifts it. Open sessions go on.

    address
        The address or network.

    role
        ``postfix`` or ``dovecot``. Default: both.

    period
        For how long. Default: ``mailfw:autoban:period``.

    reason
        Why, for the journal and :py:func:`explain`; at most 90 bytes.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.ban 192.0.2.1
        salt mx1 mailfw.ban 192.0.2.1 role=dovecot period=90m reason="guesses passwords"
    """
    host, by, why = _host_settings(), _who(kwargs), _reason(reason)
    source, roles = _source(address, host), _roles(role)
    seconds = host["autoban"]["period"] if period is None else _period(period)
    was = {one: left for one, left in _remaining(source, host)["banned"].items() if one in roles}
    _run(elements.ban(source, roles, seconds, host, audit.note(by, why)))
    name = _source_text(source, host)
    audit.record("ban", name, by, roles, time.time() + seconds, why)
    return {"banned": name, "roles": list(roles), "period": parse.duration_text(seconds), "was": _texts(was)}


def unban(address, role=None, reason="", **kwargs):
    """
    Lift the rate bans of a source or of each source of a network, and let it start with a full burst again.

    address
        The address or network.

    role
        ``postfix`` or ``dovecot``. Default: both.

    reason
        Why, for the journal; at most 90 bytes.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.unban 192.0.2.1
    """
    host, by, why = _host_settings(), _who(kwargs), _reason(reason)
    source, roles = _source(address, host), _roles(role)
    had = [one for one in roles if one in _remaining(source, host)["banned"]]
    meters = [name for name in _sets("rate_") if name.split("_")[1] in roles]
    _run(elements.unban(source, roles, host, _holds()) + elements.refill(source, meters, host, _holds()))
    name = _source_text(source, host)
    if had:
        audit.record("unban", name, by, had, why=why)
    return {"unbanned": name, "roles": had}


def _sets(*beginnings):
    """Return the loaded sets whose names begin so."""
    return [name for name in _kernel(lambda kernel: kernel.sets(), "the sets") if name.startswith(beginnings)]


def block(address, period=None, reason="", **kwargs):
    """
    Block a source or a network from every login port of this host, whatever else it is, and end its sessions at once,
    idle ones too, and those that Dovecot has behind a proxy. Only ``unblock`` lifts it; a trusted network of the pillar
    is never blocked.

    address
        The address or network.

    period
        For how long. Default: until it is unblocked.

    reason
        Why, for the journal and :py:func:`explain`; at most 90 bytes.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.block 192.0.2.1
        salt mx1 mailfw.block 192.0.2.0/24 period=1d reason="ticket 17"
    """
    host, by, why = _host_settings(), _who(kwargs), _reason(reason)
    source = _source(address, host)
    seconds = None if period is None else _period(period)
    was = _remaining(source, host)["blocked"]
    _run(elements.block(source, seconds, host, audit.note(by, why)))
    ended = _end_sessions([elements.source_network(source, host)], schema.login_ports(host), host)
    name = _source_text(source, host)
    until = time.time() + seconds if seconds else float("inf")
    audit.record("block", name, by, until=until, why=why)
    _fire("mailfw/block", {"address": name, "until": round(until) if seconds else None, "by": by, "reason": why})
    return {
        "blocked": name,
        "period": parse.duration_text(seconds) if seconds else "forever",
        "sessions_ended": ended,
        "was": "" if was is None else _text(was),
    }


def _fire(tag, data):
    """Tell whoever listens on the master. That nobody hears it is no failure."""
    if __opts__.get("file_client") != "local":
        __salt__["event.send"](tag, {"host": __opts__["id"], **data})


def unblock(address, reason="", **kwargs):
    """
    End the block of a source, or of each source of a network. Blocked networks of the pillar stay.

    address
        The address or network.

    reason
        Why, for the journal; at most 90 bytes.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.unblock 192.0.2.1
    """
    host, by, why = _host_settings(), _who(kwargs), _reason(reason)
    source = _source(address, host)
    had = _remaining(source, host)["blocked"] is not None
    _run(elements.unblock(source, host, _holds()))
    name = _source_text(source, host)
    if had:
        audit.record("unblock", name, by, why=why)
    return {"unblocked": name, "was_blocked": had}


def clear(address, reason="", **kwargs):
    """
    Forget what an address or a network has earned and what was made of it: trust, bans, what the meters, hold and
    observing remember. Blocks stay, which are somebody's decision, and open sessions go on.

    address
        The address or network.

    reason
        Why, for the journal; at most 90 bytes.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.clear 192.0.2.1
    """
    host, by, why = _host_settings(), _who(kwargs), _reason(reason)
    source, ports = _source(address, host), schema.login_ports(host)
    had, has = _remaining(source, host), _holds()
    _run(
        elements.untrust(source, ports, host, has)
        + elements.unban(source, schema.ROLES, host, has)
        + elements.refill(source, _sets("rate_"), host, has)
        + elements.forget(source, _sets("waiting_", "observed_"), ports, host, has)
    )
    _tell_agent("forget", elements.trusted_keys(source, host))
    _tell_agent("overlook", elements.source_keys(source, host))
    name = _source_text(source, host)
    audit.record("clear", name, by, [*had["trusted"], *had["banned"]], why=why)
    still = "" if had["blocked"] is None else _text(had["blocked"])
    return {"cleared": name, "trusted": _texts(had["trusted"]), "banned": _texts(had["banned"]), "still_blocked": still}


#: What can be flushed: the beginnings of the names of its sets.
_FLUSHED = {"trusted": "trusted_ipv", "banned": "banned_", "blocked": "blocked_ipv"}


def flush(kind, all=False, reason="", **kwargs):
    """
    Forget every trusted, banned or blocked source of this host. What pillar gives stays, and open sessions go on.

    kind
        ``trusted``, ``banned`` or ``blocked``.

    all
        Must be ``True``, since this is about everybody.

    reason
        Why, for the journal; at most 90 bytes.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.flush banned all=True
    """
    by, why = _who(kwargs), _reason(reason)
    _choice("kind", kind, _FLUSHED)
    found = {name: _elements(name) for name in _sets(_FLUSHED[kind])}
    count = sum(map(len, found.values()))
    if all is not True:
        raise SaltInvocationError(f"all {all!r}: this forgets all {count} elements that are {kind}: expected all=True")
    _run("".join(f"flush set {nft.TABLE} {name}\n" for name in found))
    if kind == "trusted":
        _tell_agent("forget", list({one.value.partition(" ")[0] for listed in found.values() for one in listed}))
    audit.record("flush", "all", by, [kind], why=why)
    return {"flushed": kind, "elements": count}


def remaining(address):
    """
    Return how many seconds an address is still trusted, banned and blocked by elements, or the word ``forever``; of a
    network, what all of it still is, and 0 where only a part of it is. Called by the states.

    address
        The address or network.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.remaining 192.0.2.1
    """
    host = _host_settings()
    found = _remaining(_source(address, host), host)
    found["blocked"] = {} if found["blocked"] is None else {"all": found["blocked"]}
    return {
        kind: {what: "forever" if left == float("inf") else int(left) for what, left in lasting.items()}
        for kind, lasting in found.items()
    }


def lacking(kind, address, period=None, services=None):
    """
    Return what an address or a network lacks to be trusted, or blocked, for at least half of a period: port, or
    ``all`` for a block, -> for how long it still is, empty when it is not. Called by the states.

    kind
        ``trusted`` or ``blocked``.

    address
        The address or network.

    period
        The period. Default: for ever.

    services
        The services or ports that it is to be trusted on, as a list. Default: every login port of the host.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.lacking trusted 192.0.2.1 period=30d
    """
    host = _host_settings()
    found = _remaining(_source(address, host), host)
    if kind == "trusted":
        left = {port: found["trusted"].get(port) for port in _ports(services, host)}
    elif kind == "blocked":
        left = {"all": found["blocked"]}
    else:
        raise SaltInvocationError(f"kind {kind!r}: expected trusted or blocked")
    enough = float("inf") if period is None else _period(period) / 2
    return {what: "" if one is None else _text(one) for what, one in left.items() if one is None or one < enough}


def explain(address, service=None):
    """
    Say how this host treats an address, and why: the walk of the loaded rules, over what the kernel has of it. Takes
    milliseconds, however much is trusted. Returns

    - ``address``, ``host``, ``mode``
    - ``verdicts``: service -> ``accepted``, ``limited`` (accepted below the rate) or ``refused``, and why
    - ``decided_by``: service -> the set, map or chain that decides
    - ``networks``: the lists of the pillar that it is in
    - ``trusted``: service -> until when, and by what
    - ``banned``: role -> until when, and by whom; ``blocked``: the same
    - ``rate``: role -> how near to the rate it is
    - ``lately``: service -> when the mode refused it the last time, within a minute, or would have, within a week
    - ``advice``: what can be done about it

    address
        The address.

    service
        A service or port, or several, as a list or with commas between them. Default: all of them.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.explain 192.0.2.1
        salt mx1 mailfw.explain 192.0.2.1 submission
    """
    return _explain(address, service, "")


def _explain(address, service, no_trust):
    """Do what :py:func:`explain` does. ``no_trust``: why a login from there has earned no trust, if it has not."""
    host, source = _host_settings(), _address(address)
    names = {str(one["port"]): one["name"] for one in host["services"]}
    names.update({name: name for name in names.values()})
    asked = list(names) if service is None else list(map(str, _list(service)))
    for name in asked:
        if name not in names:
            raise SaltInvocationError(f"service {name!r}: expected one of {', '.join(sorted(set(names.values())))}")
    wanted = {names[name] for name in asked}
    return _kernel(lambda kernel: explaining.explain(source, host, kernel, wanted, no_trust), source)


def why(user, service=None):
    """
    Say why a user can or cannot connect to this host: for each address from which the user has logged in lately, here
    or on another host of the fleet, the last first: when that was, and how this host treats the address now. Returns

    - ``user``, ``host``
    - ``addresses``: address -> ``last_login``; ``no_trust``, if that login has earned none on this host, and why; and
      ``verdicts``, ``lately`` and ``advice`` as in :py:func:`explain`
    - ``advice``: what to do when no login of the user is known

    Logins are known for ``mailfw:trusted:period``, and at least for a day; those that have earned no trust on this host
    only, until its agent is restarted, and the last ten of a user.

    user
        The user, as Dovecot logs the name. Upper and lower case are the same.

    service
        A service or port, or several, as a list or with commas between them. Default: all of them.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.why alice@example.org
        salt mx1 mailfw.why alice@example.org submission
    """
    user = _user(user)
    host = _host_settings()
    places = json.loads(_ask_agent("places", user))
    logins = {**{address: (at, "") for address, at in places["trusted"].items()}, **places["refused"]}
    addresses = {
        _trusted_text(parse.address(address), host): _login_place(address, service, at, no_trust)
        for address, (at, no_trust) in sorted(logins.items(), key=lambda one: -one[1][0])
    }
    return {
        "user": user,
        "host": host["host"]["id"],
        "addresses": addresses,
        "advice": [] if addresses else [_unknown_user(host)],
    }


def _login_place(address, service, at, no_trust):
    """Return when a user has logged in from somewhere, and how this host treats the address."""
    found = _explain(address, service, no_trust)
    return {
        "last_login": f"{overview.ago(at)} ago",
        **({"no_trust": no_trust} if no_trust else {}),
        **{key: found[key] for key in ("verdicts", "lately", "advice")},
    }


def _unknown_user(host):
    """Return what to do about a user of whom no login is known."""
    if host["trusted"]["users"] == "off":
        return "mailfw:trusted:users is off, so it is not known who logs in: ask for the address, and explain that"
    return (
        "no login of that name is known here: look how Dovecot logs it (with or without the domain), have the user "
        "read mail once, or ask for the address, and explain that"
    )


def check(address):
    """
    Say for each of this host's services whether an address is accepted, and why: the short form of :py:func:`explain`.

    address
        The address.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.check 192.0.2.1
    """
    found = explain(address)
    return {"address": found["address"], "services": found["verdicts"]}


def open_(period, reason="through Salt"):
    """
    Open every guarded port of this host for everyone, for some time: the way out when mailfw is at fault. It closes by
    itself; neither a reboot nor a highstate ends it early. On the host itself: ``mailfw-open``.

    period
        For how long, at most ``7d``.

    reason
        Why, for whoever looks at the status or the log; at most 200 bytes.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.open 2h reason="locked out, see ticket 17"
    """
    try:
        arguments = breakglass.arguments(period, reason)
    except ValueError as err:
        raise SaltInvocationError(str(err)) from err
    return {"open": _break_glass(*arguments)}


def close():
    """
    End what :py:func:`open` began.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.close
    """
    return {"open": _break_glass("close")}


def _break_glass(*arguments):
    command = [breakglass.TOOL, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except OSError as err:
        missing = f"{breakglass.TOOL}: {err.strerror}; run 'state.apply mailfw' on this host first"
        raise CommandExecutionError(missing) from err
    if done.returncode:
        raise CommandExecutionError(done.stderr.strip())
    return done.stdout.strip()


def opening():
    """
    Return until when this host is open for everyone and why, in a sentence; empty when it is not. See :py:func:`open`.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.opening
    """
    return _kernel(lambda kernel: breakglass.sentence(time.time(), kernel), "the rules")


def status():
    """
    Say how this host's firewall is: each service's treatment, whether the rules are loaded, how full the sets are, what
    was decided how often, and what is wrong or worth knowing.

    Lists every set, so it is for people and timers.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.status
    """
    host = _host_settings()
    objects, is_open = _live(), opening()
    sizes = ruleset.sizes(objects)
    fill = {name: len(_elements(name)) for name in sizes}
    rules_are = ("differ: see mailfw.drift" if drift() else "loaded") if objects else "not loaded"
    return {
        "enforcing": host["enforce"],
        "services": {
            service["name"]: f"{service['port']}: {service['mode']}, {rules.access(service['role'], service['mode'])}"
            for service in host["services"]
            if service["login"]
        },
        "rules": rules_are,
        "sets": {name: f"{fill[name]} of {size}" for name, size in sizes.items()},
        "decisions": _counters(),
        "warnings": [is_open] * bool(is_open) + _full(fill, sizes) + _unguarded(host) + _neighbours(host) + _familiar(),
    }


def overview_():
    """
    Say how this host is, in one row: what ``salt-run mailfw.status`` shows of each host.

    ``trusted``, ``banned`` and ``blocked`` are addresses, with those of the last hour in brackets; ``drift`` whether
    what is loaded differs from the rule files; ``warnings`` how many :py:func:`status` has, but for those about full
    sets; times are ages.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.overview
    """
    host, loaded = _host_settings(), _kernel(lambda kernel: kernel.has(breakglass.SET), "the rules")
    agent = _agent_of_host()
    return {
        "mode": overview.modes(host),
        "rules": overview.in_force(loaded, opening(), host),
        **_kernel(overview.counts, "the sets"),
        "drift": bool(drift()),
        "agent": "runs" if agent else "NO ANSWER",
        "outbox": agent.get("outbox"),
        "last echo": overview.ago(agent.get("last_echo")),
        "snapshot": overview.ago(agent.get("last_snapshot")),
        "warnings": len(_unguarded(host) + _neighbours(host)),
        "keys": [messages.fingerprint(key) for key in host["fleet"]["keys"]],
        "versions": f"mailfw {agent.get('version', '?')}, nft {_nft_version()}, Salt {salt.version.__version__}",
    }


def _agent_of_host():
    """Return what the agent says of itself, nothing when it does not answer."""
    try:
        return json.loads(client.ask("status", timeout=2))
    except client.AgentError:
        return {}


def _nft_version():
    try:
        return nft.command("--version").split()[1].removeprefix("v")
    except (nft.NftError, IndexError):
        return "?"


def drift():
    """
    Return how what is loaded differs from the rule files of this host, as a diff: lines with ``-`` are loaded, those
    with ``+`` should be. Empty when nothing does.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.drift
    """
    return apply_(test=True)["diff"]


def _familiar():
    """Return a warning when addresses are refused that have logged in within 30 days."""
    try:
        refused = json.loads(client.ask("status")).get("refused_addresses")
    except client.AgentError:
        return []
    return [f"familiar addresses are refused: {refused}; see docs/metrics.md"] if refused else []


def doctor_():
    """
    Check everything that has to be right on this host for mailfw, and say for each thing that is not what to do.

    Returns ``ok`` (what is right), ``failed`` (what is not: ``found`` and what to ``do``), ``skipped`` (what there is
    nothing to check for, and why), and the ``host``'s version, keys and time, for the master to compare. Commands are
    for root on this host. Nothing is changed. The exit status is 1 when something failed.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.doctor
    """
    saved, pillar = _settings_for_doctor(), _pillar_for_doctor()
    keys = saved["fleet"]["keys"] if saved else []
    host = doctor.Host(saved, pillar, [] if keys else _ask_master(), _unguarded, _switched_off(), __opts__["id"])
    found = doctor.examine(host, doctor.CHECKS + doctor_mail.CHECKS)
    if found["failed"]:
        __context__["retcode"] = 1
    fingerprints = [messages.fingerprint(key) for key in keys]
    return {**found, "host": {"version": __version__, "keys": fingerprints, "time": time.time()}}


def _settings_for_doctor():
    try:
        return _host_settings()
    except (CommandExecutionError, ValueError):
        return None


def _pillar_for_doctor():
    """Return the pillar's settings, or what is wrong with them; None when it is not the master's pillar."""
    if __opts__.get("local"):
        return None
    try:
        return schema.resolve(__pillar__.get("mailfw"))
    except schema.SettingsError as err:
        return str(err)


def _ask_master():
    """Return what this host's master answers a mail host without a key: a list, if it serves a fleet."""
    try:
        return __salt__["publish.runner"]("mailfw.trusts", [""])
    except Exception as err:
        return str(err)


def _switched_off():
    """Return the services that pillar switches off."""
    pillar = __pillar__.get("mailfw") or {}
    return [name for name, entry in (pillar.get("services") or {}).items() if entry is False]


def _counters():
    try:
        return nft.counters()
    except nft.NftError as err:
        raise CommandExecutionError(str(err)) from err


def _full(fill, sizes):
    """Return a warning for each set that takes no more elements."""
    return [
        f"the set {name} is full, with {sizes[name]} elements: see mailfw:sizes:{rules.size_key(name)}"
        for name in sizes
        if fill[name] >= sizes[name]
    ]


def _unguarded(host):
    """Return a warning for each login port that is open here and that the settings do not know."""
    guarded = {service["port"] for service in host["services"]}
    try:
        found = sockets.listening() - guarded
    except sockets.SocketsError as err:
        return [f"what listens here cannot be told: {err}"]
    return [
        f"port {service.port} ({name}) is open and not guarded: mailfw:services or mailfw:roles leave it out"
        for name, service in schema.SERVICES.items()
        if service.login and service.port in found
    ]


def _neighbours(host):
    try:
        return neighbours.warnings(host)
    except nft.NftError as err:
        return [f"other tables cannot be read: {err}"]


def _live():
    try:
        return ruleset.live()
    except nft.NftError as err:
        raise CommandExecutionError(str(err)) from err


def list_(kind=None, service=None, role=None, network=None, user=None, sort="remaining", limit=100):
    """
    List who is trusted, banned and blocked on this host, and with ``enforce: false`` who would have been refused
    (``observed``): what is in the sets. The networks of the pillar are in :py:func:`settings`. Returns

    - ``rows``: ``kind``; ``address``, over IPv6 its prefix; ``where``, the ports, or the role of a ban, or nothing for
      everywhere; how long it has ``left``; ``by`` whom or what, and why
    - ``of``: how many rows there are, shown or not

    Comes to an end where people log in all the time; an address that changes in that moment may be missing.

    kind
        ``trusted``, ``banned``, ``blocked`` or ``observed``, or several of them. Default: all.

    service
        Only what bears on these services or ports: bans of their role, and blocks, too. Default: all.

    role
        Only what bears on ``postfix`` or ``dovecot``. Default: both.

    network
        Only sources within these addresses or networks, or around them. Default: everywhere.

    user
        Only sources from where this user has logged in lately: the last hundred such addresses. Default: everybody's.

    sort
        ``remaining``: what lasts longest comes first; ``ending``: what ends soonest; or ``address``. Default:
        ``remaining``.

    limit
        How many rows at most, up to 3000. Default: 100.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.list
        salt mx1 mailfw.list banned role=dovecot network=198.51.100.0/24 sort=address
        salt mx1 mailfw.list trusted service=submission user=alice@example.org
    """
    host, now = _host_settings(), time.time()
    wanted = _wanted(host, kind, service, role, network, user)
    order = _choice("sort", sort, listing.SORTS)
    most = _limit(limit)
    found = list(listing.rows(_listed(wanted), wanted, host))
    rows = [listing.said(row, now) for row in listing.in_order(found, order, most)]
    return {"rows": rows, "of": len(found)}


def _wanted(host, kind, service, role, network, user):
    """Return what is to be listed."""
    kinds = listing.KINDS if kind is None else [_choice("kind", one, listing.KINDS) for one in _list(kind)]
    if kind is not None and "observed" in kinds and not _sets("observed_"):
        raise SaltInvocationError("kind 'observed': this host enforces its rules: see mailfw.observed for before that")
    ports, roles = None, set(_roles(role))
    if service is not None or role is not None:
        asked = _ports(service, host)
        known = [one for one in host["services"] if one["port"] in asked and one["role"] in roles]
        ports, roles = frozenset(one["port"] for one in known), {one["role"] for one in known}
    within = [] if network is None else [[_parsed("network", parse.network, one) for one in _list(network)]]
    if user is not None:
        within.append(_places(user, host))
    return listing.Wanted(frozenset(kinds), ports, frozenset(roles), tuple(within))


def _places(user, host):
    """Return from where a user has logged in lately."""
    user = _user(user)
    if host["trusted"]["users"] == "off":
        raise SaltInvocationError("user: mailfw:trusted:users is off on this host, so it is not known who logs in")
    places = json.loads(_ask_agent("places", user))["trusted"]
    return [elements.trusted_network(parse.address(address), host) for address in places]


def _listed(wanted):
    try:
        return snapshot.current(wanted.sets())
    except nft.NftError as err:
        raise CommandExecutionError(f"{err}; see mailfw.status") from err


def _choice(name, value, accepted):
    if value not in tuple(accepted):
        raise SaltInvocationError(f"{name} {value!r:.80}: expected one of {', '.join(accepted)}")
    return value


def _limit(value):
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= listing.MOST:
        raise SaltInvocationError(f"limit {value!r:.80}: expected a whole number from 1 to {listing.MOST}")
    return value


def observed(service=None, role=None, network=None, limit=100):
    """
    Say who would have been refused on this host while it had ``enforce: false``. The agent keeps that, for 30 days
    after it was last seen: of at most 50,000 sources and ports, those the longest that have logged in. Returns

    - ``observing``: whether it does so now; ``since`` and ``until`` when it has
    - ``services``: for each service the ``sources``, the ``times`` that they would have been refused, and how many of
      them have ``logged in``
    - ``rows``: ``address``; ``service``; ``times``: of blocked sources packets, of others connections; ``first`` and
      ``last`` time, ``first`` None where that was before the agent looked; ``logged in``: the last login from there
      within 30 days, on any host; ``users`` who have logged in from there within ``mailfw:trusted:period``, see
      ``mailfw:trusted:users``; for how long it is ``trusted`` now, on that service, None over IPv6 where
      ``mailfw:trusted:ipv6_prefix`` is longer than ``mailfw:autoban:ipv6_prefix``: some addresses of the row may be
      trusted then, and others not. Those come first who have logged in, then those who have tried the most
    - ``of``: how many rows there are, shown or not
    - ``warnings``: what keeps this from being all: sets that are or were full, what was dropped for want of room. Look
      at them before you enforce: whoever sends forged packets can fill the sets, and hides new sources as long as he
      goes on

    service, role, network
        As for :py:func:`list`. Default: everything.

    limit
        How many rows at most, up to 3000. Default: 100.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.observed
        salt mx1 mailfw.observed service=submission limit=20
    """
    host, now = _host_settings(), time.time()
    wanted, most = _wanted(host, None, service, role, network, None), _limit(limit)
    tally = observing.Tally()
    levels = _kernel(lambda kernel: tally.look(kernel, now) if kernel.has(observing.SET) else {}, "the sets")
    found = observing.seen(tally, wanted, familiar.Familiar(), people.known(), host)
    rows = _kernel(lambda kernel: [(one, observing.trust(one, kernel, host)) for one in found[:most]], "the sets")
    return {
        "observing": bool(levels),
        "since": f"{overview.ago(tally.since, now)} ago" if tally.until else "never",
        "until": f"{overview.ago(tally.until, now)} ago" if tally.until else "never",
        "services": observing.by_service(found, host),
        "rows": [observing.said(one, trusted, now, host) for one, trusted in rows],
        "of": len(found),
        "warnings": _not_observed(tally, levels, host, now),
    }


def _not_observed(tally, levels, host, now):
    """Return what keeps the answer from being all of it."""
    said = []
    if not levels:
        said.append("this host does not observe now: it has no rules with mailfw:enforce false")
    said += observing.missing(tally, now)
    said += [
        f"the set {name} is full until the agent empties it, within minutes: see mailfw:sizes:observed"
        for name, count in levels.items()
        if count >= host["sizes"]["observed"]
    ]
    return said


def login(address, user=""):
    """
    Do what Dovecot's login hook does: trust an address for the period, and announce it to the fleet.

    For callers without the hook, such as a webmail or a login service of your own.

    address
        The address that has logged in.

    user
        Who has. Default: nobody in particular.

    Raises CommandExecutionError when the agent does not answer or refuses the address.

    CLI Example:

    .. code-block:: bash

        salt-call mailfw.login 192.0.2.1
    """
    return _ask_agent("login", str(_address(address)), str(user))


def seed():
    """
    Trust who is logged in at this host's Dovecot now (``doveadm who``) for the period, and who has logged in within
    ``mailfw:trusted:period`` for what is left of it: before a host enforces for the first time. Whom a login would not
    make trusted, this does not (``mailfw:trusted:never``, ``mailfw:trusted:per_user``, the mode), and what an operator
    has ended stays so. It can be repeated. What it returns:

    - ``rows``: ``address``; ``because`` of which login; ``result``: ``trusted``, or why not. Those come first that are
      not; at most 3000, ``of`` how many
    - ``already``: how many were trusted as they are
    - ``problems``, if there were any

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.seed
    """
    host, now = _host_settings(), time.time()
    clients, problems = _logged_in(host)
    earlier = _earlier_logins(now - host["trusted"]["period"])
    results = {}
    for verb, logins in (("seed", sorted(clients, key=str)), ("believe", earlier.items())):
        for address, why in _seed(verb, logins):
            because = "is logged in" if verb == "seed" else f"logged in {overview.ago(earlier[address], now)} ago"
            name = _trusted_text(address, host)
            if results.get(name, ("", "x"))[1]:
                results[name] = (because, why)
    everybody = {_trusted_text(address, host) for address in [*earlier, *(one for one, _ in clients)]}
    rows = [
        {"address": name, "because": because, "result": why or "trusted"}
        for name, (because, why) in sorted(results.items(), key=lambda item: not item[1][1])
    ]
    already = len(everybody - results.keys())
    return {"rows": rows[: listing.MOST], "of": len(rows), "already": already, "problems": problems}


def _logged_in(host):
    """Return from where which users are logged in at Dovecot, and problems."""
    if "dovecot" not in host["roles"]:
        return set(), []
    try:
        return set(sessions.logged_in("doveadm")), []
    except sessions.SessionsError as err:
        return set(), [f"who is logged in is not known: {err}"]


def _earlier_logins(since):
    """Return the addresses from where logins have earned trust, here or on another host: address -> the last one."""
    found = {}
    for address, at in [*sessions.last_logins().items(), *((who[0], at) for who, at in people.known().items())]:
        if at > since:
            found[address] = max(at, found.get(address, 0.0))
    return found


def _seed(verb, logins):
    """Tell the agent of logins, a few at a time, so that others come in between; yield address and what came of it."""
    texts = [str(text) for login in logins for text in login]
    for first in range(0, len(texts), 2 * sessions.AT_ONCE):
        for address, why in json.loads(_ask_agent(verb, *texts[first : first + 2 * sessions.AT_ONCE])):
            yield parse.address(address), why


def receive(signed):
    """
    Hand signed messages of other mail hosts to this host's agent, which checks them. Called by the master's runner.

    Returns what came of it.

    signed
        A list of messages, as the senders' agents signed them.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.receive '["<signature> {...}"]'
    """
    if not isinstance(signed, list) or not all(isinstance(message, str) for message in signed):
        raise SaltInvocationError("signed: expected a list of signed messages")
    if not os.path.exists(client.SOCKET):
        return "there is no mailfw-agent on this host"
    news = sum(int(_ask_agent("receive", message)) for message in signed)
    return f"{news} addresses are newly trusted"


def agent_status():
    """
    Return what this host's agent says of itself: version, mode, keys' fingerprints, logins, outbox, last echo.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.agent_status
    """
    return json.loads(_ask_agent("status"))


def _ask_agent(verb, *arguments):
    try:
        return client.ask(verb, *arguments)
    except client.AgentError as err:
        raise CommandExecutionError(str(err)) from err


def catch_up():
    """
    Ask the master for the fleet's logins, and have this host's agent trust those that it has missed.

    Called by the minion's scheduler every ten minutes. Returns what the agent says.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.catch_up
    """
    host = _host_settings()
    keys = host["fleet"]["keys"]
    if not keys:
        return "this host has no fleet keys: its logins stay on it"
    request = messages.sign(host["host"]["id"], messages.new_nonce(), {}, keys[0])
    answer = __salt__["publish.runner"]("mailfw.trusts", [request])
    if not isinstance(answer, list):
        raise CommandExecutionError(f"the master gave no list of logins, but: {answer!r:.200}")
    return receive(answer)


def configure_master(test=False):
    """
    Write ``master.d/mailfw.conf`` for the master on this host: the reactor, what mail hosts may ask, the fleet's keys.

    In Salt's configuration a list in ``master.d`` replaces the one in the main file, so the main file's own ``reactor``
    and ``peer_run`` are repeated there. Unless it is set elsewhere, ``reactor_refresh_interval`` becomes an hour.
    Returns whether the file differs from what was there. The master must be restarted to read it.

    test
        Whether to write nothing. Default: ``False``.

    Raises CommandExecutionError when there is no master here, its configuration cannot be read, or the pillar has no
    fleet keys.

    CLI Example:

    .. code-block:: bash

        salt-call mailfw.configure_master test=True
    """
    fleet = _pillar_settings()["fleet"]
    if not fleet["keys"]:
        raise CommandExecutionError("mailfw:fleet:keys: []: the master needs the fleet's keys to know its messages")
    directory = os.path.dirname(__opts__["conf_file"])
    main = _yaml_mapping(os.path.join(directory, "master"))
    path = os.path.join(directory, "master.d", "mailfw.conf")
    others = [
        _yaml_mapping(other) for other in glob.glob(os.path.join(directory, "master.d", "*.conf")) if other != path
    ]
    kept = {name: value for name, value in main.items() if not any(name in other for other in others)}
    peers = dict(kept.get("peer_run") or {})
    peers[".*"] = [*peers.get(".*", []), "mailfw.trusts"]
    configuration = {
        "reactor": [*(kept.get("reactor") or []), {"mailfw/login": [os.path.join(directory, "mailfw", "login.sls")]}],
        "peer_run": peers,
        "mailfw": {"keys": fleet["keys"]},
    }
    if not any("reactor_refresh_interval" in other for other in (main, *others)):
        # By default Salt drops the runner after a minute, and takes 0.1 s for the next login.
        configuration["reactor_refresh_interval"] = 3600
    text = (
        "# Managed by Salt (mailfw). A list here replaces the one in the main file: that is why its own are repeated.\n"
        "# After a change there, apply the state mailfw.reactor again.\n"
        + salt.utils.yaml.safe_dump(configuration, default_flow_style=False)
    )
    return _replace(path, text, 0o600, test, owner=main.get("user", "root"))


def _yaml_mapping(path):
    try:
        with salt.utils.files.fopen(path) as stream:
            found = salt.utils.yaml.safe_load(stream) or {}
    except OSError as err:
        raise CommandExecutionError(f"{path}: {err.strerror}") from err
    except salt.utils.yaml.YAMLError as err:
        raise CommandExecutionError(f"{path}: not YAML: {err}") from err
    if not isinstance(found, dict):
        raise CommandExecutionError(f"{path}: expected a mapping")
    return found
