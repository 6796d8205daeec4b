"""
The fleet of mail hosts, seen from the master: takes the logins that mail hosts announce and publishes them to all; asks
all of them what an operator wants to know, and tells them the verbs of the execution module.

The fleet's keys are in the master's configuration (``mailfw:keys`` in ``master.d/mailfw.conf``, written by the state
``mailfw.reactor``). What is not signed under one of them is dropped here already, and a minion is a mail host of the
fleet when it has signed something lately: targeting by pillar finds nothing on a 3008 master once minions have a
``pillarenv``, and targeting by grains believes whatever a minion says.
"""

import contextlib
import fcntl
import ipaddress
import logging
import os
import secrets
import sqlite3
import time

import salt.client
import salt.utils.files
from salt.exceptions import CommandExecutionError, SaltInvocationError

from mailfwlib import audit, breakglass, doctor, doctor_master, elements, messages, overview, parse, people

log = logging.getLogger(__name__)

__virtualname__ = "mailfw"
__func_alias__ = {"open_": "open", "doctor_": "doctor", "list_": "list"}

#: Seconds in which messages are collected into one job, once the first of a quiet period has been published.
WINDOW = 0.25
#: Messages that one job carries, and that may wait for one.
MOST_IN_A_JOB = 20
MOST_WAITING = 5000
#: Addresses whose last login is remembered for hosts that have missed it.
MOST_LOGINS = 200_000
#: Seconds without a word after which a minion is no mail host any more; each has something to ask every ten minutes.
LONGEST_SILENCE = 7 * 86400
#: Seconds that an operator waits for the hosts' answers, unless salt-run or the master's configuration says longer.
PATIENCE = 10
#: Who signs what the master tells. Not its id: Salt puts the asking minion's there, and that would be an echo to it.
SENDER = "/master"


def __virtual__():
    return __virtualname__


def _keys():
    keys = (__opts__.get("mailfw") or {}).get("keys")
    if not keys:
        raise SaltInvocationError("mailfw: this master has no fleet keys; apply the state mailfw.reactor to it")
    return keys


@contextlib.contextmanager
def _database():
    """The messages that wait for a job, each user's last login from each address, and when each mail host last signed.

    Users are keys: see mailfwlib.people; an empty one is nobody by name. Of those that are revoked it is the hashes.
    """
    path = os.path.join(__opts__["cachedir"], "mailfw.sqlite")
    with salt.utils.files.set_umask(0o077):
        database = sqlite3.connect(path, timeout=10)
    try:
        with database:
            database.execute("CREATE TABLE IF NOT EXISTS waiting (message TEXT NOT NULL)")
            database.execute(
                "CREATE TABLE IF NOT EXISTS trusts"
                " (address TEXT NOT NULL, user TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (address, user))"
            )
            database.execute("CREATE TABLE IF NOT EXISTS revoked (user TEXT PRIMARY KEY, at REAL NOT NULL)")
            database.execute("CREATE TABLE IF NOT EXISTS hosts (id TEXT PRIMARY KEY, seen REAL NOT NULL)")
            yield database
    finally:
        database.close()


def announce(message):
    """
    Publish a mail host's signed message to all mail hosts. Called by the reactor for each event ``mailfw/login``.

    Messages that come within a quarter of a second, however many hosts send them, become one job. Returns what became
    of the message.

    message
        The message, as the mail host's agent signed it.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.announce '<signature> {...}'
    """
    try:
        verified = messages.verify(message, _keys())
    except messages.MessageError as err:
        log.warning("mailfw: a message was dropped: %s", err)
        return f"dropped: {err}"
    with _database() as database:
        _note_host(database, verified.sender)
        (waiting,) = database.execute("SELECT count(*) FROM waiting").fetchone()
        if waiting >= MOST_WAITING:
            log.warning("mailfw: a message of %s was dropped: %s wait already", verified.sender, waiting)
            return "dropped: too many wait"
        database.execute("INSERT INTO waiting VALUES (?)", (message,))
        database.executemany(
            "INSERT INTO trusts VALUES (?, ?, ?) ON CONFLICT (address, user) DO UPDATE SET at = max(at, excluded.at)",
            _rows(verified, dict(database.execute("SELECT user, at FROM revoked").fetchall())),
        )
    return _publish_waiting()


def _rows(verified, revoked):
    """Return what a message tells: address, user's key, and when, without the logins that an operator has revoked."""
    rows = []
    for address, at in verified.logins.items():
        whose = verified.users.get(address, {})
        if at > max(whose.values(), default=0):
            rows.append((str(address), "", at))
        rows += [
            (str(address), user, last)
            for user, last in whose.items()
            if not revoked or last > max(revoked.get(one, 0) for one in people.hashes(user, _keys()))
        ]
    return rows


def _note_host(database, sender):
    database.execute("INSERT OR REPLACE INTO hosts VALUES (?, ?)", (sender, time.time()))


def _publish_waiting():
    """Publish what waits, unless another call is doing so already: that one will find this message, too."""
    jobs = 0
    with open(os.path.join(__opts__["cachedir"], "mailfw.lock"), "a", encoding="ascii") as lock:
        while _waiting():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "published by another call"
            while some := _take_waiting():
                _publish(some)
                jobs += 1
                time.sleep(WINDOW)
            fcntl.flock(lock, fcntl.LOCK_UN)
    return f"published in {jobs} jobs"


def _waiting():
    """Return how many messages wait."""
    with _database() as database:
        return database.execute("SELECT count(*) FROM waiting").fetchone()[0]


def _take_waiting():
    """Take the messages for one job out of the waiting ones, and return them."""
    with _database() as database:
        found = database.execute(
            "SELECT rowid, message FROM waiting ORDER BY rowid LIMIT ?", (MOST_IN_A_JOB,)
        ).fetchall()
        database.executemany("DELETE FROM waiting WHERE rowid = ?", [(rowid,) for rowid, _ in found])
    return [message for _, message in found]


def _publish(some):
    with salt.client.get_local_client(mopts=__opts__) as client:
        client.run_job(_mail_hosts(), "mailfw.receive", arg=[some], tgt_type="list", ret="", timeout=5)


def _mail_hosts():
    with _database() as database:
        found = database.execute("SELECT id FROM hosts WHERE seen > ?", (time.time() - LONGEST_SILENCE,)).fetchall()
    return [host for (host,) in found]


def genkey():
    """
    Return a new secret for ``mailfw:fleet:keys``. Put it before the others there; those may go once every mail host and
    the master have the new one.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.genkey
    """
    return secrets.token_hex(32)


def trusts(request):
    """
    Return the logins of the last seven days as signed messages, for a mail host that may have missed some.

    Called by mail hosts through ``publish.runner``.

    request
        A message of the minion that asks, signed under a fleet key: that a minion is accepted, or has overheard another
        one's message, does not make it a mail host.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.catch_up
    """
    keys = _keys()
    try:
        sender = messages.verify(request, keys).sender
        if sender != __opts__["id"]:  # There Salt puts that of the minion that asks, authenticated.
            raise messages.MessageError(f"{__opts__['id']!r:.80} asks with a message of {sender!r:.80}")
    except messages.MessageError as err:
        log.warning("mailfw: a request for the fleet's logins was refused: %s", err)
        return []
    with _database() as database:
        _note_host(database, sender)
        now = time.time()
        oldest = (now - messages.OLDEST_LOGIN,)
        # From when clocks were ahead: what is told with each answer's own time would never end.
        database.execute("UPDATE trusts SET at = ? WHERE at > ?", (now, now))
        database.execute("DELETE FROM trusts WHERE at < ?", oldest)
        database.execute("DELETE FROM revoked WHERE at < ?", oldest)
        found = database.execute(
            "SELECT address, user, at FROM trusts ORDER BY at DESC LIMIT ?", (MOST_LOGINS,)
        ).fetchall()
    signed = []
    while found:
        count = messages.fitting((address, user) for address, user, _ in found)
        logins, users = messages.split({(address, user): at for address, user, at in found[:count]}, now)
        signed.append(messages.sign(SENDER, messages.new_nonce(), logins, keys[0], now, users))
        found = found[count:]
    return signed


def open_(period, reason="through Salt"):
    """
    Open every guarded port of all mail hosts for everyone, for some time: the way out when mailfw is at fault.

    Returns what each host says: until when it is open, and why. Hosts that fail, and those that do not answer within
    ten seconds (``salt-run -t 60`` waits longer), are named, and salt-run's exit status is 1 then. A host that was only
    cut off may still open once it is back.

    period
        For how long, at most ``7d``.

    reason
        Why, for whoever looks at a host's status or log; at most 200 bytes.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.open 2h "nobody can log in"
    """
    try:
        seconds, why = breakglass.arguments(period, reason)
    except ValueError as err:
        # Not SaltInvocationError: it is a TypeError too, with which salt-run's exit status is 0.
        raise CommandExecutionError(str(err)) from None
    log.warning("mailfw: all mail hosts are opened for %s: %s", seconds, why)
    return _tell_all("mailfw.open", {"period": seconds, "reason": why}, _opening)


def close():
    """
    End on all mail hosts what :py:func:`open` began, or ``mailfw-open`` there. Returns what that does.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.close
    """
    log.warning("mailfw: all mail hosts are closed again")
    return _tell_all("mailfw.close", {}, _opening)


def _opening(said):
    return said.get("open")


def revoke(user, reason=""):
    """
    End on all mail hosts what only this user's logins have earned, and the user's open sessions: for a stolen password,
    once it is changed. Trusts that the user shares with others, and those of operators, stay.

    Returns what each host says, see the function of that name there. Hosts that fail or have problems, and those that
    do not answer within ten seconds, are named, and salt-run's exit status is 1 then. A host that was down trusts what
    it trusted when it is back: call this again.

    user
        The user, as Dovecot logs the name. Upper and lower case are the same.

    reason
        Why, for the hosts' audit; at most 90 bytes.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.revoke alice@example.org
    """
    try:
        user = people.name(user)
    except ValueError as err:
        raise CommandExecutionError(f"user {user!r:.80}: {err}") from None
    try:
        reason = audit.reason(reason)
    except ValueError as err:
        raise CommandExecutionError(f"reason {reason!r:.80}: {err}") from None
    keys = people.every_key(user, _keys())
    _forget_user(keys, time.time())
    log.warning("mailfw: a user is revoked on all mail hosts: %s", keys[-1])
    return _tell_all("mailfw.revoke", {"user": user, "reason": reason}, _revoked)


def _forget_user(keys, now):
    """Have hosts that catch up hear no more of a user's logins until now, nor of unnamed ones beside them."""
    each = [(key,) for key in keys]
    with _database() as database:
        database.executemany(
            "DELETE FROM trusts WHERE user = '' AND address IN (SELECT address FROM trusts WHERE user = ?)", each
        )
        database.executemany("DELETE FROM trusts WHERE user = ?", each)
        # Only hashes are kept: they mean the names, too.
        hashes = [(key, now) for key in keys if ":" not in key]
        database.executemany("INSERT OR REPLACE INTO revoked VALUES (?, ?)", hashes)


def _forget_address(text):
    """Have hosts that catch up hear no more of an address's or a network's logins until now."""
    try:
        network = ipaddress.ip_network(parse.network(text) if "/" in str(text) else parse.address(text))
    except ValueError:
        return  # The hosts say what is wrong with it.
    # Which prefix stands for an IPv6 address is for each host's pillar to say: any that pillar takes.
    bases = {elements.prefix_base(network.network_address, length) for length in range(32, network.prefixlen + 1)}
    with _database() as database:
        known = database.execute("SELECT DISTINCT address FROM trusts").fetchall()
        ended = [row for row in known if (address := parse.address(row[0])) in bases or address in network]
        database.executemany("DELETE FROM trusts WHERE address = ?", ended)


def _revoked(said):
    return said if "revoked" in said and "problems" not in said else None


def status():
    """
    Return a table of all mail hosts: mode, whether the rules are in force, how many addresses are trusted, banned and
    blocked (in brackets since an hour ago), drift, agent, what waits for its echo, age of the last echo and of the
    snapshot, warnings, the fingerprints of the keys, versions; and where hosts differ that should not.

    Reads need no host to answer: who fails and who does not answer within ten seconds is named, and the exit status is
    1 then.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.status
        salt-run mailfw.status --out=json
    """
    found = _ask_all("mailfw.overview", {})
    differ = overview.differing(found["hosts"], ("keys", "versions"))
    return {"data": {**found, "differ": differ}, "outputter": "mailfw"}


def explain(address, service=None):
    """
    Say how each mail host treats an address and why, and where hosts differ: see the function of that name there.

    address
        The address.

    service
        A service or port, or several with commas between them. Default: all of them.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.explain 192.0.2.1
        salt-run mailfw.explain 192.0.2.1 submission
    """
    found = _ask_all("mailfw.explain", {"address": address, "service": service})
    return {**found, "differ": _differing(found["hosts"])}


def _differing(hosts):
    """Return in which services the verdicts of hosts on an address differ: service -> first word -> hosts."""
    verdicts = {host: _words(said["verdicts"]) for host, said in hosts.items()}
    services = list(dict.fromkeys(service for words in verdicts.values() for service in words))
    return overview.differing(verdicts, services)


def _words(verdicts):
    """Return the first words of verdicts: accepted, limited or refused."""
    return {service: verdict.partition(":")[0] for service, verdict in verdicts.items()}


def why(user, service=None):
    """
    Say why a user can or cannot connect to each mail host, and for which of the user's addresses hosts differ: see the
    function of that name there.

    user
        The user, as Dovecot logs the name.

    service
        A service or port, or several with commas between them. Default: all of them.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.why alice@example.org
    """
    found = _ask_all("mailfw.why", {"user": user, "service": service})
    places = {host: said["addresses"] for host, said in found["hosts"].items()}
    addresses = dict.fromkeys(address for known in places.values() for address in known)
    differ = {address: _differing_places(address, places) for address in addresses}
    return {**found, "differ": {address: said for address, said in differ.items() if said}}


def _differing_places(address, places):
    """Return where hosts differ on an address of a user's logins, and which know of none from there."""
    found = _differing({host: known[address] for host, known in places.items() if address in known})
    unaware = [host for host, known in sorted(places.items()) if address not in known]
    return {**found, "no login known": unaware} if unaware else found


def who(address):
    """
    Return a table of all mail hosts: where an address is trusted, banned or blocked, and until when; and where hosts
    differ.

    address
        The address.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.who 192.0.2.1
    """
    found = explain(address)
    hosts = {host: _standing(said) for host, said in found["hosts"].items()}
    return {"data": {**found, "hosts": hosts}, "outputter": "mailfw"}


def _standing(said):
    """Return what a host says of an address, in one row; what is the same for all services is said once."""
    trusted = said["trusted"]
    alike = set(trusted.values())
    return {
        "trusted": alike.pop() if len(alike) == 1 else [f"{service} {until}" for service, until in trusted.items()],
        "banned": [f"{role} {until}" for role, until in said["banned"].items()],
        "blocked": said["blocked"] or "",
        "refused": [service for service, word in _words(said["verdicts"]).items() if word == "refused"],
    }


def list_(kind=None, service=None, role=None, network=None, user=None, sort=None, limit=None):
    """
    List who is trusted, banned and blocked on each mail host, in a table. The parameters, and what is listed, are those
    of the function of that name in the execution module; ``limit`` is for each host.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.list
        salt-run mailfw.list banned network=198.51.100.0/24 --out=json
    """
    arguments = {"kind": kind, "service": service, "role": role, "network": network, "user": user, "sort": sort}
    return {"data": _ask_all("mailfw.list", {**arguments, "limit": limit}), "outputter": "mailfw"}


def observed(service=None, role=None, network=None, limit=None):
    """
    Say who would have been refused on each mail host that has ``enforce: false``, in a table. The parameters, and what
    is said, are those of the function of that name in the execution module; ``limit`` is for each host.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.observed
        salt-run mailfw.observed service=submission --out=json
    """
    arguments = {"service": service, "role": role, "network": network, "limit": limit}
    return {"data": _ask_all("mailfw.observed", arguments), "outputter": "mailfw"}


def trust(address, period=None, services=None, reason=""):
    """
    Trust an address or network on all mail hosts, and lift its bans: the parameters are those of the function of that
    name in the execution module, as for the other verbs here.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.trust 192.0.2.1 period=5h reason="ticket 17"
    """
    return _tell("trust", address, period=period, services=services, reason=reason)


def untrust(address, services=None, reason=""):
    """
    End an address's or network's trust on all mail hosts, and its sessions. Where a host fails or does not answer, an
    open session goes on having the address trusted, on all of them: call this again.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.untrust 192.0.2.1
    """
    # Of some services, too: the table knows of no ports, and hosts believe older logins of this address for none now.
    _forget_address(address)
    found = _tell("untrust", address, services=services, reason=reason)
    for said in found["hosts"].values():
        said.pop("only_here", None)
    return found


def unban(address, role=None, reason=""):
    """
    Lift the rate bans of a source or network on all mail hosts.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.unban 192.0.2.1
    """
    return _tell("unban", address, role=role, reason=reason)


def block(address, period=None, reason=""):
    """
    Block a source or network on all mail hosts, and end its sessions.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.block 192.0.2.1 reason="ticket 17"
    """
    return _tell("block", address, period=period, reason=reason)


def unblock(address, reason=""):
    """
    End the block of a source or network on all mail hosts.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.unblock 192.0.2.1
    """
    return _tell("unblock", address, reason=reason)


def clear(address, reason=""):
    """
    Forget all that was earned by or made about an address or network on all mail hosts, but for blocks.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.clear 192.0.2.1
    """
    _forget_address(address)
    return _tell("clear", address, reason=reason)


def _tell(verb, address, **arguments):
    """Have all mail hosts do something about an address. They check the arguments, all alike."""
    log.warning("mailfw: %s %r on all mail hosts, by an operator: %s", verb, address, arguments["reason"])
    return _ask_all(f"mailfw.{verb}", {"address": address, **arguments})


def _ask_all(function, arguments):
    """Call a function that answers with a mapping on all mail hosts."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return _tell_all(function, given, lambda said: said)


def _tell_all(function, arguments, done_by):
    """Call a function on all mail hosts, with one job; return who said what, who failed, and who did not answer.

    ``done_by`` returns what is to be reported of a host's answer, a mapping, or None when it means a failure.
    """
    hosts = _mail_hosts()
    if not hosts:
        raise CommandExecutionError("mailfw: this master knows no mail host: none has signed anything for seven days")
    answers = _answers(hosts, function, arguments)
    done, failed = {}, {}
    for host, returned in answers.items():
        said = returned["ret"]
        answer = done_by(said) if isinstance(said, dict) else None
        if answer is None:
            failed[host] = said
        else:
            done[host] = answer
    silent = sorted(set(hosts) - answers.keys())
    # Salt makes retcode the exit status.
    return {"hosts": done, "failed": failed, "no answer": silent, "retcode": int(bool(failed or silent))}


def _answers(hosts, function, arguments):
    """Call a function on some hosts, with one job; return what Salt has of each that answered."""
    # By name: Salt would take a reason such as "ticket=17" for a named argument.
    with salt.client.get_local_client(mopts=__opts__) as client:
        return client.cmd_full_return(
            hosts, function, kwarg=arguments, tgt_type="list", timeout=max(PATIENCE, __opts__["timeout"])
        )


def doctor_():
    """
    Run ``mailfw.doctor`` on all mail hosts, and check what only the master can know: its own configuration for the
    fleet, and whether the hosts' keys and clocks are its own.

    Returns for the ``master`` and for each of the ``hosts`` what is wrong and what to do about it, or that all is well,
    and names the hosts that fail to look and those that do not answer. salt-run's exit status is 1 if any of these is
    not well.

    CLI Example:

    .. code-block:: bash

        salt-run mailfw.doctor
    """
    hosts = _mail_hosts()
    master = doctor_master.Master(__opts__, hosts)
    own = doctor.examine(master, doctor_master.CHECKS)
    asked = time.time()
    answers = _answers(hosts, "mailfw.doctor", {}) if hosts else {}
    answered = time.time()
    found, failed = {}, {}
    for host, answer in answers.items():
        said = answer["ret"]
        try:
            wrong = doctor_master.of_host(said, master.keys, asked, answered)
            found[host] = wrong or f"all is well: {len(said['ok'])} checks, {len(said['skipped'])} not for this host"
        except (LookupError, TypeError, ValueError):
            failed[host] = said
    silent = sorted(set(hosts) - answers.keys())
    ill = own["failed"] or failed or silent or any(isinstance(one, dict) for one in found.values())
    return {
        "master": own["failed"] or f"all is well: {len(own['ok'])} checks",
        "hosts": found,
        "failed": failed,
        "no answer": silent,
        "retcode": int(bool(ill)),
    }
