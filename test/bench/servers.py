"""Real mail servers for a server namespace: a Dovecot and a Postfix of its own, which this program starts and ends.

They are as Debian 12 ships them (Dovecot 2.3), but for what would hide the cost of a connection behind work of theirs:
a process serves any number of clients instead of one.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

IMAP_PORT, IMAPS_PORT, SUBMISSION_PORT = 143, 993, 587
USER, PASSWORD = "user", "secret"
#: The bytes of the one message that there is to fetch.
MESSAGE = 256 * 1024

_DOVECOT = """
base_dir = {directory}/run
state_dir = {directory}/run
log_path = {directory}/log
protocols = imap
listen = {listen}
ssl = yes
ssl_cert = <{directory}/certificate
ssl_key = <{directory}/key
disable_plaintext_auth = no
mail_location = maildir:{directory}/mail
mail_max_userip_connections = 0
first_valid_uid = 1
passdb {{
  driver = static
  args = password={password}
}}
userdb {{
  driver = static
  args = uid=mail gid=mail home={directory}/mail
}}
service imap-login {{
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = {imaps}
    ssl = yes
  }}
}}
{services}
"""
_FEW = """
service imap-login {
  service_count = 0
  process_limit = 1
  client_limit = 1000
}
service imap {
  service_count = 0
  process_limit = 100
}
"""
_POSTFIX = """
compatibility_level = 3.6
myhostname = bench.test
mynetworks = 127.0.0.0/8
inet_protocols = all
queue_directory = {directory}/queue
data_directory = {directory}/data
maillog_file = {directory}/log
maillog_file_prefixes = {directory}
local_recipient_maps =
alias_maps =
smtpd_peername_lookup = no
smtpd_client_connection_count_limit = 0
max_use = 1000000000
"""
_POSTFIX_SERVICES = """
{ipv4}:{port} inet n - n - 1 smtpd
[{ipv6}]:{port} inet n - n - 1 smtpd
postlog unix-dgram n - n - 1 postlogd
"""


def _start(namespace: str, core: int, *command: str) -> subprocess.Popen[bytes]:
    """Start a server on one core of a namespace."""
    inside = f"nsenter --net=/run/netns/{namespace} taskset -c {core}"
    return subprocess.Popen([*inside.split(), *command], stdin=subprocess.DEVNULL, start_new_session=True)


def configured_dovecot(directory: Path, addresses: list[str], port: int, services: str) -> list[str]:
    """Make a directory for a Dovecot that everybody can log in at; return the command that starts it.

    ``services``: what its configuration says of services besides.
    """
    directory.mkdir()
    (directory / "mail").mkdir()
    for name in ("cur", "new", "tmp"):
        (directory / "mail" / name).mkdir()
    (directory / "mail/cur/1.message:2,S").write_bytes(
        b"Subject: bench\r\n\r\n" + (b"x" * 70 + b"\r\n") * (MESSAGE // 72)
    )
    for path in (directory / "mail", *(directory / "mail").rglob("*")):
        shutil.chown(path, "mail", "mail")
    config = directory / "dovecot.conf"
    # The cheapest kind of key that is in common use.
    kind = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=bench.test -days 1"
    files = ["-keyout", str(directory / "key"), "-out", str(directory / "certificate")]
    subprocess.run(["openssl", "req", "-x509", *kind.split(), *files], check=True, capture_output=True)
    values = {
        "listen": ", ".join(addresses),
        "imap": port,
        "imaps": IMAPS_PORT,
        "password": PASSWORD,
        "services": services,
    }
    config.write_text(_DOVECOT.format(directory=directory, **values))
    return ["dovecot", "-F", "-c", str(config)]


def dovecot(namespace: str, addresses: dict[int, str], directory: Path, core: int) -> subprocess.Popen[bytes]:
    """Start a Dovecot, which reads mail for one user."""
    return _start(namespace, core, *configured_dovecot(directory, [*addresses.values()], IMAP_PORT, _FEW))


def postfix(namespace: str, addresses: dict[int, str], directory: Path, core: int) -> subprocess.Popen[bytes]:
    """Start a Postfix, which takes connections for submission."""
    for name in ("", "queue", "queue/pid", "queue/private", "queue/public", "data"):
        (directory / name).mkdir()
    for name in ("queue/private", "queue/public", "data"):
        shutil.chown(directory / name, "postfix")
    values = {"directory": directory, "ipv4": addresses[4], "ipv6": addresses[6], "port": SUBMISSION_PORT}
    (directory / "main.cf").write_text(_POSTFIX.format(**values))
    (directory / "master.cf").write_text(_POSTFIX_SERVICES.format(**values))
    return _start(namespace, core, "/usr/lib/postfix/sbin/master", "-c", str(directory))
