"""A mail client, or an attacker, in the network namespace that it is started in: JSON in, JSON out.

``python3 mailclient.py '{"do": "probe", "targets": [["192.0.2.11", 143]]}'`` prints what came of it.
"""

from __future__ import annotations

import base64
import imaplib
import json
import poplib
import smtplib
import socket
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from typing import Any

IMPLICIT_TLS = {465, 993, 995}
PASSWORD = "secret"


def tls() -> ssl.SSLContext:
    """The lab's certificate is its own."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def greet(address: str, port: int, source: str | None = None, patience: float = 2.0) -> socket.socket:
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


def probe(targets: list[list[Any]], source: str | None = None, patience: float = 1.0) -> list[str]:
    """Say for each [address, port] whether it is open, refused or silent. All are tried at once."""
    with ThreadPoolExecutor(len(targets)) as pool:
        return list(pool.map(lambda target: probe_one(*target, source, patience), targets))


class Imap(imaplib.IMAP4):
    """An IMAP client that connects from an address of its choice."""

    def __init__(self, address: str, source: str | None):
        self.source = source
        super().__init__(address, 143, timeout=10)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout, (self.source, 0) if self.source else None)


def imap_login(address: str, source: str | None = None, user: str = "alice") -> Imap:
    client = Imap(address, source)
    client.login(user, PASSWORD)
    return client


def login(address: str, source: str | None = None, user: str = "alice") -> dict[str, float]:
    """Log in over IMAP, and out; say how long the client waited for its OK, and when it came."""
    start = time.time()
    client = imap_login(address, source, user)
    answered = time.time()
    client.logout()
    return {"seconds": answered - start, "at": answered}


def login_then_connect(address: str, protocol: str, source: str | None = None) -> str:
    """Log in over imap, pop3 or sieve, and connect to submission once the OK was read: open, refused or silent."""
    if protocol == "imap":
        session: Any = imap_login(address, source)
    elif protocol == "pop3":
        session = poplib.POP3(address, timeout=10)
        session.user("alice")
        session.pass_(PASSWORD)
    else:
        session = sieve_login(address, source)
    return probe_one(address, 587, source, 1.0)


def sieve_login(address: str, source: str | None) -> socket.socket:
    """Log in over ManageSieve (RFC 5804), which Python's library does not speak."""
    session = socket.create_connection((address, 4190), 10, (source, 0) if source else None)
    answers = session.makefile("rb")

    def read_ok() -> None:
        line = next((line for line in answers if line.startswith((b"OK", b"NO", b"BYE"))), b"")
        if not line.startswith(b"OK"):
            raise ConnectionError(f"sieve: {line!r}")

    read_ok()
    secret = base64.b64encode(f"\0alice\0{PASSWORD}".encode()).decode()
    session.send(f'AUTHENTICATE "PLAIN" "{secret}"\r\n'.encode())
    read_ok()
    return session


def login_opens(address: str, watch: list[list[Any]], source: str | None = None, limit: float = 10) -> dict[str, Any]:
    """Log in over IMAP, then try some [address, port] again and again: seconds from the OK until each let this client
    in, or null."""
    at = login(address, source)["at"]

    def opened(target: list[Any]) -> float | None:
        while time.time() < at + limit:
            if probe_one(*target, source, 0.2) == "open":
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
    with client:
        client.login("alice", PASSWORD)
        refused = client.send_message(message)
    return {"seconds": time.time() - start, "refused": refused}


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


def hold_session(address: str, source: str | None = None) -> bool:
    """Hold an IMAP session until a line comes on standard input; say whether the session still answers."""
    client = imap_login(address, source)
    client.select("INBOX")
    print("ready", flush=True)
    sys.stdin.readline()
    client.sock.settimeout(2)
    answers = client.noop()[0] == "OK" and client.search(None, "ALL")[0] == "OK"
    client.logout()
    return answers


def guess(address: str, tries: int, source: str | None = None) -> dict[str, int]:
    """Guess passwords over IMAP on parallel connections; count those that the server answered, and the others."""

    def one(number: int) -> str:
        try:
            with greet(address, 143, source, 3.0) as connection:
                connection.send(b"1 LOGIN alice guess%d\r\n" % number)
                return "served"
        except OSError:
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(one, range(tries)))
    return {outcome: outcomes.count(outcome) for outcome in ("served", "refused")}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    try:
        print(json.dumps({"result": globals()[arguments.pop("do")](**arguments)}))
    except (OSError, imaplib.IMAP4.error, smtplib.SMTPException) as err:
        print(json.dumps({"error": f"{type(err).__name__}: {err}"}))
