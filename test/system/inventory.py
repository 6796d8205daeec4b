"""What is on a host, to be compared with what was there before."""

from __future__ import annotations

import json
import re

from support import lab

LISTING = (lab.REPOSITORY / "test/support/listing.py").read_text()
TOPS = ("/etc", "/usr", "/var/lib", "/run", "/root", "/opt")
#: What changes on a host that has no mailfw, and whose it is.
OTHERS = {
    r"/etc/salt/minion\.d/_schedule\.conf": "Salt's file of scheduled jobs, which are compared themselves",
    r"/run/dovecot/auth-token-secret\.dat": "Dovecot's, since the first login",
    r"/etc/salt/master\.d": "Salt's packages have it, the lab's master has not",
    r"/var/lib/postfix/(prng_exch|smtp_scache\.db)": "Postfix's, since the first TLS session",
    r"/run/systemd/journal/seqnum": "the number of the last line of the journal",
    r"/run/(salt-master\.pid|systemd/units/invocation:salt-master\.service)": "the restarted master's",
    r"/run/systemd/journal/streams/.*": "one for each service that runs",
    r"/run/systemd/namespace-.*": "made while a service that has file systems of its own starts",
    r"/run/systemd/transient": "systemd's, since somebody first used systemd-run, as Salt does",
}
_OTHERS = re.compile("|".join(OTHERS))


def inventory(host: str) -> dict[str, str]:
    """Return what is on a host: files, units, packet filter, scheduled jobs, and processes that name mailfw."""
    found: dict[str, str] = json.loads(lab.run(host, "python3", "-IB", "-c", LISTING, *TOPS))
    for line in lab.run(host, "systemctl", "list-unit-files", "--no-legend", "--no-pager").splitlines():
        unit, state, *_ = line.split()
        found[f"unit {unit}"] = state
    for line in lab.run(host, "systemctl", "list-units", "--all", "--plain", "--no-legend", "mailfw*").splitlines():
        found[f"loaded unit {line}"] = "there"
    for line in lab.run(host, "ps", "-eo", "args").splitlines():
        if "mailfw" in line:
            found[f"process {line}"] = "runs"
    found["packet filter"] = lab.run(host, "nft", "list", "ruleset")
    found["scheduled jobs"] = lab.salt(host, "schedule.list")[host]
    return {name: what for name, what in found.items() if not _OTHERS.fullmatch(name)}


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return what was added, removed or changed."""
    return [
        f"{name}: {before.get(name, 'was not there')}; now {after.get(name, 'gone')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
