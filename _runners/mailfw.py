"""
The fleet of mail hosts, seen from the master: takes the logins that mail hosts announce and publishes them to all.

The fleet's keys are in the master's configuration (``mailfw:keys`` in ``master.d/mailfw.conf``, written by the state
``mailfw.reactor``). What is not signed under one of them is dropped here already, and a minion is a mail host of the
fleet when it has signed something lately: targeting by pillar finds nothing on a 3008 master once minions have a
``pillarenv``, and targeting by grains believes whatever a minion says.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import time

import salt.client
import salt.utils.files
from salt.exceptions import SaltInvocationError

from mailfwlib import messages

log = logging.getLogger(__name__)

__virtualname__ = "mailfw"

#: Seconds in which messages are collected into one job, once the first of a quiet period has been published.
WINDOW = 0.25
#: Messages that one job carries, and that may wait for one.
MOST_IN_A_JOB = 20
MOST_WAITING = 5000
#: Addresses whose last login is remembered for hosts that have missed it.
MOST_LOGINS = 200_000
#: Seconds without a word after which a minion is no mail host any more; each has something to ask every ten minutes.
LONGEST_SILENCE = 7 * 86400
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
    """The messages that wait for a job, the last login from each address, and when each mail host last signed."""
    path = os.path.join(__opts__["cachedir"], "mailfw.sqlite")
    with salt.utils.files.set_umask(0o077):
        database = sqlite3.connect(path, timeout=10)
    try:
        with database:
            database.execute("CREATE TABLE IF NOT EXISTS waiting (message TEXT NOT NULL)")
            database.execute("CREATE TABLE IF NOT EXISTS logins (address TEXT PRIMARY KEY, at REAL NOT NULL)")
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
            "INSERT INTO logins VALUES (?, ?) ON CONFLICT (address) DO UPDATE SET at = max(at, excluded.at)",
            [(str(address), at) for address, at in verified.logins.items()],
        )
    return _publish_waiting()


def _note_host(database, sender):
    database.execute("INSERT OR REPLACE INTO hosts VALUES (?, ?)", (sender, time.time()))


def _publish_waiting():
    """Publish what waits, unless another call is doing so already: that one will find this message, too."""
    jobs = 0
    with open(os.path.join(__opts__["cachedir"], "mailfw.lock"), "a", encoding="ascii") as lock:
        while _take(peek=True):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "published by another call"
            while some := _take():
                _publish(some)
                jobs += 1
                time.sleep(WINDOW)
            fcntl.flock(lock, fcntl.LOCK_UN)
    return f"published in {jobs} jobs"


def _take(peek=False):
    """Return the messages for one job and take them out of the waiting ones, unless this is only a peek."""
    with _database() as database:
        found = database.execute(
            "SELECT rowid, message FROM waiting ORDER BY rowid LIMIT ?", (MOST_IN_A_JOB,)
        ).fetchall()
        if not peek:
            database.executemany("DELETE FROM waiting WHERE rowid = ?", [(rowid,) for rowid, _ in found])
    return [message for _, message in found]


def _publish(some):
    with _database() as database:
        found = database.execute("SELECT id FROM hosts WHERE seen > ?", (time.time() - LONGEST_SILENCE,)).fetchall()
    hosts = [host for (host,) in found]
    with salt.client.get_local_client(mopts=__opts__) as client:
        client.run_job(hosts, "mailfw.receive", arg=[some], tgt_type="list", ret="", timeout=5)


def trusts(request):
    """
    Return the logins of the last seven days as signed messages, for a mail host that may have missed some.

    Called by mail hosts through ``publish.runner``.

    request
        A message signed under a fleet key: that a minion is accepted does not make it a mail host.

    CLI Example:

    .. code-block:: bash

        salt mx1 mailfw.catch_up
    """
    keys = _keys()
    try:
        sender = messages.verify(request, keys).sender
    except messages.MessageError as err:
        log.warning("mailfw: a request for the fleet's logins was refused: %s", err)
        return []
    with _database() as database:
        _note_host(database, sender)
        database.execute("DELETE FROM logins WHERE at < ?", (time.time() - messages.OLDEST_LOGIN,))
        found = database.execute("SELECT address, at FROM logins ORDER BY at DESC LIMIT ?", (MOST_LOGINS,)).fetchall()
    return [
        messages.sign(SENDER, messages.new_nonce(), dict(found[start : start + messages.MOST_LOGINS]), keys[0])
        for start in range(0, len(found), messages.MOST_LOGINS)
    ]
