"""Logins that Dovecot reports: a thread that takes what Dovecot's authentication tells a policy server, over HTTP.

Dovecot reports each authentication, Postfix's SASL included, after it has answered the client, and waits for nothing
(https://doc.dovecot.org, authentication policy). So this is the source of logins for clients that only send, and on
proxies, where no script can run after a login. Only loopback is listened to, but every process of the host can
connect to that: a report counts only with the secret that Dovecot's configuration has.
"""

from __future__ import annotations

import hmac
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Callable

from mailfwlib import __version__

#: The header that carries the secret.
HEADER = "X-Mailfw-Secret"
#: Seconds after which a connection that says nothing is closed; Dovecot connects again.
PATIENCE = 5.0
#: Connections at a time; Dovecot needs a few.
MOST_CONNECTIONS = 16
#: Bytes of a report: Dovecot's have some hundred.
LONGEST = 16384

log = logging.getLogger("mailfw-agent")

#: What is done with a login: address, user.
Trust = Callable[[str, str], Any]


def login(body: bytes) -> tuple[str, str] | None:
    """Return address and user of a report about a login that succeeded, None for another report. Raises ValueError."""
    report = json.loads(body)
    if not isinstance(report, dict):
        raise ValueError("expected an object")
    if report.get("success") is not True or report.get("policy_reject"):
        return None
    remote, user = report.get("remote"), report.get("login")
    if not isinstance(remote, str) or not isinstance(user, str):
        raise ValueError("expected the strings remote and login")
    return remote, user


class Reports(ThreadingMixIn, TCPServer):
    """The server, on a port of loopback. ``secret`` is asked for each report, so that a new one counts at once."""

    allow_reuse_address = True
    request_queue_size = 64
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int, secret: Callable[[], str], trust: Trust):
        """Start it. Raises OSError when the port is taken."""
        super().__init__(("127.0.0.1", port), Handler)
        self.port, self.secret, self.trust = port, secret, trust
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        threading.Thread(target=self._serve, name="reports", daemon=True).start()

    def _serve(self) -> None:
        with self:
            self.serve_forever()

    def stop(self) -> None:
        """End it, without waiting for that."""
        threading.Thread(target=self.shutdown, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, if there is a place left."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # No more threads.
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, and give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, *_: Any) -> None:
        """Log that a connection broke."""
        log.debug("a connection with reports broke", exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One connection of Dovecot's, with one report after the other."""

    server: Reports
    protocol_version = "HTTP/1.1"
    server_version = f"mailfw-agent/{__version__}"
    sys_version = ""
    timeout = PATIENCE
    #: An answer is one packet: of two, the second would wait for the client's delayed acknowledgement, 40 ms.
    wbufsize = -1

    def do_POST(self) -> None:
        """Take a report."""
        secret = self.server.secret()
        if not secret or not hmac.compare_digest(self.headers.get(HEADER, "").encode(), secret.encode()):
            self._answer(403)
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LONGEST:
            self._answer(413)
            return
        try:
            found = login(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            self._answer(400)
            return
        if found:
            self.server.trust(*found)
        self._answer(200)

    def _answer(self, status: int) -> None:
        body = b'{"status":0}\n'
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200:  # What follows may be the rest of a body.
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log no line for each report."""
