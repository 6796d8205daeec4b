"""Logins with strange users and addresses, on the mail host itself, by the ways in that a real Dovecot has.

Runs on the host, with its Python: JSON lines in, one for each login, JSON lines out: how Dovecot answered. Texts stand
for bytes (Latin 1). The ways are those of :data:`WAYS`.
"""

from __future__ import annotations

import array
import base64
import json
import socket
import sys

LIMIT = 20.0
#: How Dovecot's own services write what separates their fields.
ESCAPES = {"\1": "\0011", "\t": "\1t", "\n": "\1n", "\r": "\1r"}


def imap(connection: socket.socket, user: str, *before: str) -> str:
    """Log in over IMAP; return the tagged answer."""
    connection.settimeout(LIMIT)
    answers = connection.makefile("rb")
    answers.readline()
    token = base64.b64encode(f"\0{user}\0secret".encode("latin-1")).decode()
    for command in (*before, f"AUTHENTICATE PLAIN {token}"):
        connection.sendall(f"a {command}\r\n".encode("latin-1"))
        answer = next((line for line in answers if line.startswith(b"a ")), b"a closed")
    return answer.decode("latin-1")[2:].strip()


def over_tcp(user: str) -> str:
    """As a client of this host."""
    return imap(socket.create_connection(("127.0.0.1", 143), LIMIT), user)


def from_address(user: str, address: str) -> str:
    """As a webmail that says where its user is: see login_trusted_networks of Dovecot."""
    connection = socket.create_connection(("127.0.0.1", 143), LIMIT)
    return imap(connection, user, f'ID ("x-originating-ip" "{address}")')


def over_unix(user: str) -> str:
    """On a Unix socket, where there is no address."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("/run/dovecot/imap")
    return imap(connection, user)


def post_login(user: str, address: str) -> str:
    """As Dovecot's imap, which asks the post-login service: hands over a session, and gets it back with the user."""
    service, (session, _client) = socket.socket(socket.AF_UNIX), socket.socketpair()
    service.settimeout(LIMIT)
    service.connect("/run/dovecot/mailfw-login")
    escaped = "".join(ESCAPES.get(one, one) for one in user)
    request = f"VERSION\tscript-login\t1\t0\n127.0.0.1\t{address}\t{escaped}\thome=/home/alice\n".encode("latin-1")
    rights = array.array("i", [session.fileno()]).tobytes()
    sent = service.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    if sent < len(request):  # Nothing, sent to a service that has answered already, is a broken pipe.
        service.sendall(request[sent:])
    answer, rights_back, _, _ = service.recvmsg(65536, socket.CMSG_SPACE(4))
    return "OK" if rights_back and answer.endswith(b"\thome=/home/alice\n") else f"closed {answer[:100]!r}"


WAYS = {each.__name__: each for each in (over_tcp, from_address, over_unix, post_login)}


def main() -> None:
    """Carry out each login."""
    for line in sys.stdin:
        way, *arguments = json.loads(line)
        try:
            try:
                answer = WAYS[way](*arguments)
            except BrokenPipeError:  # Dovecot ends idle processes, one that has just taken a connection, too.
                answer = WAYS[way](*arguments)
        except OSError as err:
            answer = f"{type(err).__name__}: {err}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
