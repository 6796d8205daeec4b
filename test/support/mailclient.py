"""A mail client, or an attacker, in the network namespace that it is started in: JSON in, JSON out.

``python3 mailclient.py '{"do": "probe", "targets": [["192.0.2.11", 143]]}'`` prints what came of it.
"""

from __future__ import annotations

import base64
import imaplib
import itertools
import json
import smtplib
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from ipaddress import ip_network
from typing import Any

IMPLICIT_TLS = {465, 993, 995}
#: What a client says to begin TLS, and how the last line of each answer begins: port -> pairs.
STARTTLS = {
    143: [(b"a STARTTLS", b"a OK")],
    110: [(b"STLS", b"+OK")],
    4190: [(b"STARTTLS", b"OK")],
    587: [(b"EHLO lab.test", b"250 "), (b"STARTTLS", b"220 ")],
}
PASSWORD = "secret"
#: For so many seconds the hook waits for the agent: after them, whoever reads the OK may not be trusted yet.
HOOK_WAITS = 0.25
#: What alice says to log in: protocol -> port, how a greeting ends, pairs of a command and how the answer begins.
LOGIN = {
    "imap": (143, b"* OK", [(f"a LOGIN alice {PASSWORD}\r\n".encode(), b"a OK")]),
    "pop3": (110, b"+OK", [(b"USER alice\r\n", b"+OK"), (f"PASS {PASSWORD}\r\n".encode(), b"+OK")]),
    "sieve": (
        4190,
        b"OK",
        [(b'AUTHENTICATE "PLAIN" "%s"\r\n' % base64.b64encode(f"\0alice\0{PASSWORD}".encode()), b"OK")],
    ),
}
REFUSALS = (b"a NO", b"a BAD", b"* BYE", b"-ERR", b"NO", b"BYE")
#: Seconds in which a connection that is held is let in or refused.
HELD = 10.0
#: Seconds between two logins at an address in come_and_go, and how many are from the same source.
PAUSE, VISITS = 0.7, 3


def tls() -> ssl.SSLContext:
    """The lab's certificate is its own."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def greet(address: str, port: int, source: str | None, patience: float) -> socket.socket:
    """Connect and read the server's greeting: only then has a connection been let in, and counted."""
    connection = socket.create_connection((address, port), patience, (source, 0) if source else None)
    try:
        connection.settimeout(patience)
        if port in IMPLICIT_TLS:
            connection = tls().wrap_socket(connection)
        if not connection.recv(512):
            raise ConnectionResetError
    except OSError:
        connection.close()
        raise
    return connection


def probe_one(address: str, port: int, source: str | None, patience: float) -> str:
    try:
        greet(address, port, source, patience).close()
    except TimeoutError:
        return "silent"
    except OSError:
        return "refused"
    return "open"


def probe(targets: list[list[Any]], source: str | None = None, patience: float = 10.0) -> list[str]:
    """Say for each [address, port] whether it is open, refused or silent. All are tried at once.

    Fewer seconds of patience are for who is to find it silent: a busy server takes its time to greet.
    """
    with ThreadPoolExecutor(len(targets)) as pool:
        return list(pool.map(lambda target: probe_one(*target, source, patience), targets))


class Imap(imaplib.IMAP4):
    """An IMAP client that connects from an address of its choice."""

    def __init__(self, address: str, source: str | None, port: int = 143):
        self.source = source
        super().__init__(address, port, timeout=10)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        local = (self.source, 0) if self.source else None
        connection = socket.create_connection((self.host, self.port), timeout, local)
        return tls().wrap_socket(connection) if self.port in IMPLICIT_TLS else connection


def imap_login(address: str, source: str | None = None, user: str = "alice", port: int = 143) -> Imap:
    client = Imap(address, source, port)
    client.login(user, PASSWORD)
    return client


def login(address: str, source: str | None = None, user: str = "alice", port: int = 143) -> dict[str, float]:
    """Log in over IMAP, and out; say how long the client waited for its OK, and when it came."""
    start = time.time()
    client = imap_login(address, source, user, port)
    answered = time.time()
    client.logout()
    return {"seconds": answered - start, "at": answered}


def log_in_often(targets: list[list[str]], times: int, at_once: int = 4) -> None:
    """Log in over IMAP, and out, so many times, at each [address, source] in turn."""
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda number: login(*targets[number % len(targets)]), range(times)))


def log_in(
    address: str, protocol: str, source: str | None = None, patience: float = 10.0, port: int = 0
) -> tuple[socket.socket, float]:
    """Log in over imap, pop3 or sieve; return the connection when OK was read, and the seconds since the password."""
    usual, greeting, commands = LOGIN[protocol]
    session = socket.create_connection((address, port or usual), patience, (source, 0) if source else None)
    if port in IMPLICIT_TLS:
        session = tls().wrap_socket(session)
    answers = session.makefile("rb")
    for command, answer in [(b"", greeting), *commands]:
        sent = time.time()
        session.send(command)
        line = next((line for line in answers if line.startswith((answer, *REFUSALS))), b"")
        if not line.startswith(answer):
            raise ConnectionError(f"{protocol}: {command!r}: {line!r}")
    return session, time.time() - sent


def login_then_connect(
    address: str, protocol: str, source: str | None = None, port: int = 0, to: str = ""
) -> dict[str, Any]:
    """Log in over imap, pop3 or sieve, and connect to submission, there or elsewhere, once the OK was read.

    Say when the OK came, how many seconds after the password, and how submission is: open, refused or silent.
    """
    session, seconds = log_in(address, protocol, source, port=port)
    at = time.time()
    with session:
        return {"at": at, "seconds": seconds, "submission": probe_one(to or address, 587, source, 10.0)}


def connect_next(address: str, source: str | None) -> str:
    """Connect to submission with the very next packet: open, or what became of that."""
    try:
        socket.create_connection((address, 587), 5, (source, 0) if source else None).close()
    except OSError as err:
        return type(err).__name__
    return "open"


def forgotten_each_time(address: str, protocol: str, times: int, source: str | None = None) -> dict[str, int]:
    """Have somebody take this client's trust away, then log in and connect to submission right after the OK, and so on.

    Says ``forget`` on standard output each time and waits for a line. Count what came of connecting to submission,
    before and after the login, and after one whose OK the hook may have let go without the agent's answer.
    """
    outcomes: list[str] = []
    for _ in range(times):
        print("forget", flush=True)
        sys.stdin.readline()
        outcomes.append("before: " + connect_next(address, source))
        session, seconds = log_in(address, protocol, source)
        with session:
            outcome = connect_next(address, source)
            late = outcome != "open" and seconds >= HOOK_WAITS
            outcomes.append("late" if late else f"after: {outcome}")
            end = time.time() + 10
            while late and connect_next(address, source) != "open" and time.time() < end:  # Then it can be forgotten.
                time.sleep(0.02)
    return {outcome: outcomes.count(outcome) for outcome in set(outcomes)}


def storm(clients: list[list[str]], patience: float) -> list[dict[str, Any]]:
    """Connect to IMAP for each [address, source], then log all of them in at once; each connects to submission next.

    All sessions stay until everybody is in. Say for each what became of the login and of submission, and the seconds
    that the login took.
    """
    ready = threading.Barrier(len(clients))

    def one(client: list[str]) -> dict[str, Any]:
        address, source = client
        ready.wait()
        began = time.time()
        try:
            session, _ = log_in(address, "imap", source, patience)
        except OSError as err:
            return {"login": f"{type(err).__name__}: {err}", "seconds": time.time() - began}
        took = time.time() - began
        return {"login": "OK", "seconds": took, "submission": connect_next(address, source), "session": session}

    with ThreadPoolExecutor(len(clients)) as pool:
        found = list(pool.map(one, clients))
    for each in found:
        if "session" in each:
            each.pop("session").close()
    return found


def login_opens(address: str, watch: list[list[Any]], source: str | None = None, limit: float = 10) -> dict[str, Any]:
    """Log in over IMAP, then try some [address, port] again and again: seconds from the OK until each let this client
    in, or null."""
    at = login(address, source)["at"]

    def opened(target: list[Any]) -> float | None:
        while time.time() < at + limit:
            if probe_one(*target, source, limit) == "open":
                return time.time() - at
            time.sleep(0.02)
        return None

    with ThreadPoolExecutor(len(watch)) as pool:
        return {"seconds": list(pool.map(opened, watch))}


def send(address: str, subject: str, port: int = 587, source: str | None = None) -> dict[str, Any]:
    """Send a message through submission, with authentication."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "alice@lab.test", "bob@lab.test", subject
    message.set_content("Sent by the lab.")
    start = time.time()
    local = (source, 0) if source else None
    if port in IMPLICIT_TLS:
        client: smtplib.SMTP = smtplib.SMTP_SSL(address, port, timeout=10, context=tls(), source_address=local)
    else:
        client = smtplib.SMTP(address, port, timeout=10, source_address=local)
        client.starttls(context=tls())
    connected = time.time()
    with client:
        client.login("alice", PASSWORD)
        refused = client.send_message(message)
    return {"connected": connected - start, "seconds": time.time() - start, "refused": refused}


def send_beside_login(
    login: dict[str, Any], send: dict[str, Any], source: str | None = None
) -> dict[str, dict[str, Any]]:
    """Log in over IMAP and send a message at the same time, each in one try of its own that begins ``after`` seconds.

    Say when each began, in seconds, when the login was answered, and what came of the message.
    """
    start = time.time()

    def one(do: Callable[..., Any], after: float, **arguments: Any) -> dict[str, Any]:
        time.sleep(max(0.0, start + after - time.time()))
        began = time.time() - start
        return {"began": began, **do(source=source, **arguments)}

    with ThreadPoolExecutor(2) as pool:
        sending = pool.submit(one, globals()["send"], **send)
        answered = one(globals()["login"], **login)
        return {"login": {**answered, "at": answered["at"] - start}, "sent": sending.result()}


def knock(targets: list[list[Any]], patience: float, source: str | None = None) -> list[dict[str, Any]]:
    """Connect once to each [address, port], all at once; say how each attempt ended, and after how many seconds."""

    def one(target: list[Any]) -> dict[str, Any]:
        start = time.time()
        try:
            socket.create_connection(tuple(target), patience, (source, 0) if source else None).close()
            end = "open"
        except OSError as err:
            end = type(err).__name__
        return {"end": end, "seconds": time.time() - start}

    with ThreadPoolExecutor(len(targets)) as pool:
        return list(pool.map(one, targets))


def arrived(address: str, subject: str, source: str | None = None, limit: float = 10) -> bool:
    """Say whether bob has a message with this subject, or gets one within the limit."""
    client = imap_login(address, source, "bob")
    try:
        end = time.time() + limit
        while time.time() < end:
            client.select("INBOX")
            if client.search(None, "SUBJECT", f'"{subject}"')[1][0]:
                return True
            time.sleep(0.1)
        return False
    finally:
        client.logout()


def hold_session(address: str, source: str | None = None, user: str = "alice", port: int = 143) -> bool:
    """Hold an IMAP session until a line comes on standard input; say whether the session still answers."""
    client = imap_login(address, source, user, port)
    client.select("INBOX")
    print("ready", flush=True)
    sys.stdin.readline()
    client.sock.settimeout(2)
    answers = client.noop()[0] == "OK" and client.search(None, "ALL")[0] == "OK"
    client.logout()
    return answers


def claim(address: str, header: str = "", identity: str = "", source: str | None = None) -> bool:
    """Log in over IMAP with something that claims another address: a PROXY header, or parameters of an ID command.

    Say whether that works.
    """
    try:
        with socket.create_connection((address, 143), 5, (source, 0) if source else None) as connection:
            connection.settimeout(5)
            identify = f"a ID ({identity})\r\n" if identity else ""
            connection.sendall(f"{header}{identify}b LOGIN alice {PASSWORD}\r\n".encode())
            return any(line.startswith(b"b OK") for line in connection.makefile("rb"))
    except OSError:
        return False


def come_and_go(targets: list[list[str]], then: list[int]) -> list[dict[str, Any]]:
    """Log in over IMAP at each [address, network] again and again, until a line comes on standard input.

    A few times from each address of the network, for IPv6 from each /64. Connect to some ports right after each OK.

    Say for each login when it began, how long the client waited for its OK, what became of each port, or the error.
    """
    visits: list[dict[str, Any]] = []
    leaving = threading.Event()

    def one(address: str, source: str) -> None:
        visit: dict[str, Any] = {"at": address, "source": source, "began": time.time(), "ports": {}}
        visits.append(visit)
        try:
            session = imap_login(address, source)
            visit["seconds"] = time.time() - visit["began"]
            for port in then:
                began = time.time()
                outcome = probe_one(address, port, source, HELD)
                visit["ports"][port] = {"outcome": outcome, "seconds": time.time() - began}
            session.logout()
        except (OSError, imaplib.IMAP4.error) as err:
            visit["error"] = f"{type(err).__name__}: {err}"

    def resident(address: str, network: str) -> None:
        sources = ip_network(network)
        step = 1 if sources.version == 4 else 1 << 64
        for number in itertools.count(VISITS):
            one(address, str(sources.network_address + number // VISITS * step + 1))
            if leaving.wait(PAUSE):
                break

    with ThreadPoolExecutor(len(targets)) as pool:
        done = [pool.submit(resident, *target) for target in targets]
        while len(visits) < 2 * len(done) and not any(one.done() for one in done):
            time.sleep(0.01)
        print("ready", flush=True)
        sys.stdin.readline()
        leaving.set()
    for each in done:
        each.result()
    return visits


def guess(address: str, tries: int, source: str | None = None, patience: float = 10.0) -> dict[str, int]:
    """Guess passwords over IMAP on so many connections at once; count those that were greeted, and the others."""

    def one(number: int) -> str:
        try:
            with greet(address, 143, source, patience) as connection:
                connection.send(b"1 LOGIN alice guess%d\r\n" % number)
                return "served"
        except OSError:
            return "refused"

    with ThreadPoolExecutor(tries) as pool:
        outcomes = list(pool.map(one, range(tries)))
    return {outcome: outcomes.count(outcome) for outcome in ("served", "refused")}


class Restless:
    """One connection of a mail client that wants to be logged in over IMAP, and tries again until it is."""

    def __init__(self, address: str, source: str | None, patience: float, limit: float):
        self._target, self._patience, self._limit = (address, 143, source, patience), patience, limit
        #: Each try: when it began and ended, and how it ended: up, refused, silent, or broken after the greeting.
        self.tries: list[dict[str, Any]] = []
        self._session: socket.socket | None = None

    def connect(self) -> None:
        """Try until the session is up, once a second or so."""
        end = time.time() + self._limit
        while not self._session and time.time() < end:
            one: dict[str, Any] = {"began": time.time()}
            self.tries.append(one)
            one["outcome"] = self._try(one)
            one["ended"] = time.time()
            if not self._session:
                time.sleep(max(0.1, one["began"] + 1 - time.time()))

    def _try(self, one: dict[str, Any]) -> str:
        try:
            connection = greet(*self._target)
        except TimeoutError:
            return "silent"
        except OSError:
            return "refused"
        one["greeted"] = time.time()
        if not self._command(connection, f"LOGIN alice {PASSWORD}"):
            connection.close()
            return "broken"
        self._session = connection
        return "up"

    @staticmethod
    def _command(connection: socket.socket, command: str) -> bool:
        connection.settimeout(30)
        try:
            connection.send(f"a {command}\r\n".encode())
            with connection.makefile("rb") as lines:
                answer = next((line for line in lines if line.startswith(b"a ")), b"")
        except OSError:
            return False
        return answer.startswith(b"a OK")

    def works(self) -> bool:
        """Say whether the session still answers; end it."""
        if not self._session:
            return False
        with self._session:
            return self._command(self._session, "NOOP")


def crowd(
    address: str, connections: int, patience: float, limit: float, source: str | None = None
) -> list[dict[str, Any]]:
    """Have many mail clients behind one address connect at once; each holds its session until all are up.

    Say for each connection what its tries were, and whether its session worked in the end.
    """
    members = [Restless(address, source, patience, limit) for _ in range(connections)]
    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(Restless.connect, members))
    return [{"tries": one.tries, "works": one.works()} for one in members]


def discover(address: str, patience: float = 10.0) -> list[str]:
    """Look at every login service twice at once, as a mail client that finds out its settings: plain, and with TLS.

    Say for each connection whether it was served.
    """
    probes = [(port, encrypt) for port in sorted(STARTTLS.keys() | IMPLICIT_TLS) for encrypt in (False, True)]

    def one(probe: tuple[int, bool]) -> str:
        port, encrypt = probe
        try:
            with greet(address, port, None, patience) as connection:
                if encrypt and port in STARTTLS:
                    start_tls(connection, port)
        except OSError as err:
            return f"{port}: {type(err).__name__}: {err}"
        return "served"

    with ThreadPoolExecutor(len(probes)) as pool:
        return list(pool.map(one, probes))


def start_tls(connection: socket.socket, port: int) -> None:
    """Begin TLS on a connection that was greeted, and end it."""
    for command, answer in STARTTLS[port]:
        connection.send(command + b"\r\n")
        received = b""
        while not received.endswith(b"\n") or not received.splitlines()[-1].startswith(answer):
            part = connection.recv(4096)
            if not part:
                raise ConnectionError(f"{command!r}: {received!r}")
            received += part
    tls().wrap_socket(connection).close()


def answered_late(address: str, connections: int, source: str | None = None) -> list[str]:
    """Connect many times to imaps, log in, and only then begin TLS on those connections; say which are served."""
    local = (source, 0) if source else None
    waiting = [socket.create_connection((address, 993), 10, local) for _ in range(connections)]
    login(address, source)

    def one(connection: socket.socket) -> str:
        try:
            with tls().wrap_socket(connection) as session:
                return "served" if session.recv(512) else "closed"
        except OSError as err:
            return type(err).__name__

    with ThreadPoolExecutor(connections) as pool:
        return list(pool.map(one, waiting))


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    try:
        print(json.dumps({"result": globals()[arguments.pop("do")](**arguments)}))
    except (OSError, imaplib.IMAP4.error, smtplib.SMTPException) as err:
        print(json.dumps({"error": f"{type(err).__name__}: {err}"}))
