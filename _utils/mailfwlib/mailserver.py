"""What this host's Dovecot and Postfix say of themselves, asked of their own tools and, for port 25, of the server."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import smtplib
import ssl
import subprocess
from pathlib import Path

from mailfwlib import local
from mailfwlib.parse import Network

#: Seconds that a tool, or a server's next line, may take.
TIMEOUT = 5


class MailServerError(RuntimeError):
    """A tool of the mail server failed; the message is its own."""


def has_dovecot() -> bool:
    """Return whether Dovecot is on this host."""
    return local.has_program("doveconf")


def has_postfix() -> bool:
    """Return whether Postfix is on this host, and configured."""
    return local.has_program("postconf") and Path("/etc/postfix/main.cf").exists()


def dovecot(*settings: str) -> str:
    """Return what ``doveconf -h`` prints of some settings. Raises MailServerError, FileNotFoundError."""
    return _output("doveconf", "-h", *settings)


def postfix(*arguments: str) -> str:
    """Return what ``postconf`` prints. Raises MailServerError, FileNotFoundError."""
    return _output("postconf", *arguments)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as err:
        raise MailServerError(f"{command[0]}: no answer within {TIMEOUT} s") from err
    if done.returncode:
        raise MailServerError(done.stderr.strip().partition("\n")[0] or f"{command[0]}: exit status {done.returncode}")
    return done.stdout.strip()


def policy_server() -> tuple[str, str]:
    """Return the URL to which Dovecot reports logins, and the header that it sends with them; empty without one.

    Dovecot 2.4 has them in a block auth_policy, without that in their names. Raises as :func:`dovecot`.
    """
    found = re.findall(r"^ *(?:auth_policy_)?server_(url|api_header) = (.*)$", _output("doveconf", "-n"), re.M)
    return dict(found).get("url", ""), dict(found).get("api_header", "")


def dovecot_main_file() -> Path:
    """Return the file that Dovecot's configuration begins with. Raises as :func:`dovecot`."""
    return Path(_output("doveconf", "-n").partition("\n")[0].rpartition(": ")[2])


def networks(text: str) -> list[Network]:
    """Return the networks in a list of Dovecot's or Postfix's; names, files and negations in it are left out."""
    found = []
    for word in re.split(r"[\s,]+", text.replace("[", "").replace("]", "")):
        with contextlib.suppress(ValueError):
            found.append(ipaddress.ip_network(word, strict=False))
    return found


def offers_auth(port: int, address: str = "127.0.0.1") -> str:
    """Return how a mail server here offers AUTH: ``in plain text``, ``after STARTTLS``, or empty if it does not.

    Raises OSError and smtplib.SMTPException.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with smtplib.SMTP(address, port, local_hostname="mailfw.invalid", timeout=TIMEOUT) as server:
        server.ehlo_or_helo_if_needed()
        if server.has_extn("auth"):
            return "in plain text"
        if not server.has_extn("starttls"):
            return ""
        server.starttls(context=context)
        server.ehlo()
        return "after STARTTLS" if server.has_extn("auth") else ""


def port_25_service() -> tuple[str, str]:
    """Return what answers mail on port 25 in Postfix's master.cf, such as ``smtp/inet``, and its SASL setting.

    That is ``smtpd/pass`` behind postscreen. Both are empty when nothing does. Raises as :func:`postfix`.
    """
    for line in postfix("-M").splitlines():
        name, kind, *_, program = (line.split(maxsplit=7) + [""] * 8)[:8]
        if kind == "inet" and name.rpartition(":")[2] in ("smtp", "25"):
            service = "smtpd/pass" if program.split()[:1] == ["postscreen"] else f"{name}/inet"
            own = postfix("-P", f"{service}/smtpd_sasl_auth_enable").partition(" = ")[2]
            return service, own or postfix("-h", "smtpd_sasl_auth_enable")
    return "", ""
