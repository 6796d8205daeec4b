"""Talking to this host's agent: one request and one reply, each a packet of fields with NUL between them."""

from __future__ import annotations

import os
import socket

SOCKET = "/run/mailfw/login.sock"
#: A request or reply longer than this is refused.
LONGEST = 131072


class AgentError(RuntimeError):
    """The agent is not there, did not answer in time, or refused; the message says which."""


def ask(verb: str, *arguments: str, path: str = SOCKET, timeout: float = 10.0) -> str:
    """Ask the agent and return its answer's text. Raises AgentError."""
    request = "\0".join((verb, *arguments)).encode()
    if len(request) > LONGEST:
        raise AgentError(f"{verb}: {len(request)} bytes are more than the agent takes ({LONGEST})")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(timeout)
            connection.connect(os.fspath(path))
            connection.send(request)
            status, _, text = connection.recv(LONGEST).decode().partition("\0")
    except OSError as err:
        raise AgentError(f"mailfw-agent at {path}: {err.strerror or err}") from err
    if status != "ok":
        raise AgentError(text or "mailfw-agent gave no answer")
    return text
