"""Tell this host's agent who has logged in, and wait for its acknowledgement for at most 250 ms.

Run by Dovecot after each login with /usr/bin/python3 -IS, as an unprivileged user, or as root where the host's own
scripts need that: it imports next to nothing, since a user waits for it, and it never fails, since the session starts
whatever happens here.
"""

import os
from _socket import AF_UNIX, SOCK_SEQPACKET, socket

SOCKET = b"/run/mailfw/login.sock"
LONGEST_WAIT = 0.25
LONGEST_USER = 256
NOBODY = 65534

try:
    connection = socket(AF_UNIX, SOCK_SEQPACKET)
    connection.settimeout(LONGEST_WAIT)
    connection.connect(SOCKET)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    user = os.environb.get(b"USER", b"")[:LONGEST_USER]
    connection.send(b"\0".join((b"login", os.environb.get(b"IP", b"")[:LONGEST_USER], user)))
    connection.recv(4096)
except OSError:
    pass
