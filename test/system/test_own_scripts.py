"""A host's own post-login scripts go on running, after mailfw's hook, whatever is done to them and to mailfw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support import lab
from support.lab import ADDRESSES, changed, elements

from .conftest import ENVIRONMENTS, HOSTS, on_both_hosts

CONF, SCRIPT, RAN, DENY = "/etc/dovecot/conf.d/50-own.conf", "/usr/local/bin/own-login", "/run/own-login", "/run/deny"
#: Says as whom it runs, and what comes after it; drops the session when it is told to.
OWN = f"""#!/bin/sh
echo "$(id -un) $1" >>{RAN}/ran
[ ! -e {DENY} ] || exit 3
exec "$@"
"""
#: imap only, as root, and two scripts; and all protocols, as the mail user.
ROOT = f"""
service imap {{
  executable = imap imap-postlogin
}}
service imap-postlogin {{
  executable = script-login {SCRIPT} {SCRIPT}
  unix_listener imap-postlogin {{
  }}
}}
"""
EACH = "".join(f"service {name} {{\n  executable = {name} own\n}}\n" for name in ("imap", "pop3", "managesieve"))
MAIL_USER = f"""{EACH}
service own {{
  executable = script-login -d {SCRIPT}
  unix_listener own {{
  }}
}}
"""
PROTOCOLS = ("imap", "pop3", "sieve")
FINISH = "/usr/lib/dovecot/script-login"
OURS = "mailfw login hook is run by Dovecot"


@pytest.fixture(scope="module", autouse=True)
def own_script(fleet: object) -> Iterator[None]:
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, protection={"type": "protected"}, reports=False)
    lab.all_states(HOSTS, "state.apply", "mailfw")
    for host in HOSTS:
        lab.run(host, "tee", SCRIPT, text=OWN)
        lab.run(host, "sh", "-c", f"chmod 755 {SCRIPT}; mkdir -m 1777 {RAN}; touch {RAN}/ran; chmod 666 {RAN}/ran")
    yield
    for host in HOSTS:
        lab.run(host, "rm", "-rf", CONF, SCRIPT, RAN, DENY)


def apply(host: str, configuration: str) -> None:
    """Change the host's own configuration, as its admin does, and apply mailfw after that."""
    lab.run(host, "tee", CONF, text=configuration)
    assert any(one.startswith(OURS) for one in changed(lab.states(host, "state.apply", "mailfw")))


def log_in(host: str, *protocols: str) -> list[str]:
    """Log in over each protocol; return what the own script has said, for each time that it ran."""
    lab.run(host, "sh", "-c", f": >{RAN}/ran")
    for protocol in protocols:
        lab.client("cafe", "login_then_connect", address=ADDRESSES[host][0], protocol=protocol)
    return lab.run(host, "cat", f"{RAN}/ran").splitlines()


def is_trusted(host: str) -> bool:
    return "203.0.113.10 . 587" in elements(host, "trusted_ipv4")


def planned(host: str) -> dict[str, Any]:
    return lab.salt(host, "mailfw.login_services")[host]


@on_both_hosts
def test_own_scripts_run_after_the_hook_whatever_is_changed(host: str) -> None:
    apply(host, ROOT)
    lab.forget(host)
    assert log_in(host, "imap") == [f"root {SCRIPT}", f"root {FINISH}"]
    assert is_trusted(host)
    assert log_in(host, "pop3", "sieve") == []

    apply(host, MAIL_USER)
    for protocol in PROTOCOLS:
        lab.forget(host)
        assert log_in(host, protocol) == [f"alice {FINISH}"]
        assert is_trusted(host)
    before = planned(host)
    lab.run(host, "touch", DENY)
    with pytest.raises(lab.LabError, match="imap"):
        log_in(host, "imap")
    lab.run(host, "rm", DENY)

    lab.states(host, "state.apply", "mailfw.clean")
    assert log_in(host, *PROTOCOLS) == [f"alice {FINISH}"] * 3
    # The same with mailfw's file and without it: another state.apply has nothing to do.
    assert planned(host) == before

    lab.run(host, "rm", CONF)
    lab.states(host, "state.apply", "mailfw")
    lab.forget(host)
    assert log_in(host, *PROTOCOLS) == []
    assert is_trusted(host)


@on_both_hosts
def test_scripts_that_the_hook_cannot_precede_go_on_and_are_named(host: str) -> None:
    """Here since Dovecot reads them after mailfw's file."""
    lab.run(host, "tee", "/etc/dovecot/local.conf", text=ROOT)
    try:
        lab.restart_dovecot(host)
        (found,) = lab.salt(host, "state.single", "mailfw.login_hook_run", "each login runs the hook")[host].values()
        assert len(found["warnings"]) == 1
        assert "logins over imap do not run mailfw's hook" in found["warnings"][0]
        assert log_in(host, "imap") == [f"root {SCRIPT}", f"root {FINISH}"]
    finally:
        lab.run(host, "rm", "/etc/dovecot/local.conf")
        lab.restart_dovecot(host)
    assert lab.salt(host, "mailfw.logins_without_hook")[host] == {}
