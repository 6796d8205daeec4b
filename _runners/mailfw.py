"""
The fleet of mail hosts, seen from the master: takes the logins that mail hosts announce and publishes them to all.

The master's configuration (``mailfw:`` in ``master.d/mailfw.conf``, written by the state ``mailfw.reactor``) is the
only authority: ``keys``, the fleet's secrets, and ``target``, a compound target of the mail hosts. Messages that are
not signed under one of the keys are dropped here already.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import time

import salt.client
import salt.utils.files
from mailfwlib import messages
from salt.exceptions import SaltInvocationError

log = logging.getLogger(__name__)

__virtualname__ = "mailfw"

#: Seconds in which messages are collected into one job, once the first of a quiet period has been published.
WINDOW = 0.25
#: Messages that one job carries, and that may wait for one.
MOST_IN_A_JOB = 20
MOST_WAITING = 5000
#: Addresses whose last login is remembered for hosts that have missed it.
MOST_LOGINS = 200_000


def __virtual__():
    return __virtualname__


def _configuration():
    found = __opts__.get("mailfw") or {}
    if not found.get("keys") or not found.get("target"):
        raise SaltInvocationError("mailfw: this master has no fleet keys; apply the state mailfw.reactor to it")
    return found


@contextlib.contextmanager
def _database():
    """The messages that wait for a job, and the last login from each address."""
    path = os.path.join(__opts__["cachedir"], "mailfw.sqlite")
    with salt.utils.files.set_umask(0o077):
        database = sqlite3.connect(path, timeout=10)
    try:
        with database:
            database.execute("CREATE TABLE IF NOT EXISTS waiting (message TEXT NOT NULL)")
            database.execute("CREATE TABLE IF NOT EXISTS logins (address TEXT PRIMARY KEY, at REAL NOT NULL)")
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
    configuration = _configuration()
    try:
        verified = messages.verify(message, configuration["keys"])
    except messages.MessageError as err:
        log.warning("mailfw: a message was dropped: %s", err)
        return f"dropped: {err}"
    with _database() as database:
        (waiting,) = database.execute("SELECT count(*) FROM waiting").fetchone()
        if waiting >= MOST_WAITING:
            log.warning("mailfw: a message of %s was dropped: %s wait already", verified.sender, waiting)
            return "dropped: too many wait"
        database.execute("INSERT INTO waiting VALUES (?)", (message,))
        database.executemany(
            "INSERT INTO logins VALUES (?, ?) ON CONFLICT (address) DO UPDATE SET at = max(at, excluded.at)",
            [(str(address), at) for address, at in verified.logins.items()],
        )
    return _publish_waiting(configuration["target"])


def _publish_waiting(target):
    """Publish what waits, unless another call is doing so already: that one will find this message, too."""
    jobs = 0
    with open(os.path.join(__opts__["cachedir"], "mailfw.lock"), "a", encoding="ascii") as lock:
        while _take(peek=True):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "published by another call"
            while some := _take():
                _publish(target, some)
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


def _publish(target, some):
    with contextlib.closing(_local_client()) as client:
        client.run_job(target, "mailfw.receive", arg=[some], tgt_type="compound", ret="", timeout=5)


def _local_client():
    return salt.client.get_local_client(mopts=__opts__)


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
    keys = _configuration()["keys"]
    try:
        messages.verify(request, keys)
    except messages.MessageError as err:
        log.warning("mailfw: a request for the fleet's logins was refused: %s", err)
        return []
    with _database() as database:
        database.execute("DELETE FROM logins WHERE at < ?", (time.time() - messages.OLDEST_LOGIN,))
        found = database.execute("SELECT address, at FROM logins ORDER BY at DESC LIMIT ?", (MOST_LOGINS,)).fetchall()
    return [
        messages.sign(__opts__["id"], messages.new_nonce(), dict(found[start : start + messages.MOST_LOGINS]), keys[0])
        for start in range(0, len(found), messages.MOST_LOGINS)
    ]
