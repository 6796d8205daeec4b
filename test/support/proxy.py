"""HAProxy in a client's network of the lab, in front of mail hosts, which it tells of its clients (PROXY protocol)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.lablib import hosts, images
from support import lab

#: Where test/install-packages has unpacked it.
UNPACKED = images.CACHE / "haproxy"
CONFIGURATION = """
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
"""
#: A port of an address of HAProxy's, where it connects from there, and which header it begins with: text or binary.
LISTEN = """
listen {name}
  bind {address}:{port}
  server mail {host}:{port} {header}
"""


@contextmanager
def haproxy(client: str, fronts: dict[str, str], ports: list[int], directory: Path) -> Iterator[None]:
    """Run it in a client's network. ``fronts``: an address there -> the mail host's. The ports are the same."""
    text, headers = CONFIGURATION, ("send-proxy", "send-proxy-v2")
    for number, (address, host) in enumerate(fronts.items()):
        for port in ports:
            name, header = f"{client}-{number}-{port}", headers[number % 2]
            text += LISTEN.format(name=name, address=address, port=port, host=host, header=header)
    file = directory / "haproxy.cfg"
    file.write_text(text)
    libraries = next((UNPACKED / "usr/lib").glob("*-linux-gnu"))
    command = ["env", f"LD_LIBRARY_PATH={libraries}", str(UNPACKED / "usr/sbin/haproxy"), "-db", "-f", str(file)]
    with subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *hosts.enter_node(client, command)]) as process:
        try:
            wanted = len(fronts) * len(ports)
            lab.wait_until(lambda: len(_listening(client)) == wanted, "HAProxy listens", limit=10)
            yield
        finally:
            process.kill()


def _listening(client: str) -> list[str]:
    return lab.run(client, "ss", "-Htln").splitlines()
