"""What mailfw.clean leaves on a host, and mailfw.reactor.clean on the master: what was there before. Mail goes on."""

from __future__ import annotations

import contextlib
import time

import pytest

from support import lab
from support.lab import ADDRESSES, changed

from .conftest import ENVIRONMENTS, HOSTS
from .inventory import differences, inventory


@pytest.fixture(scope="module", autouse=True)
def autoban(fleet):
    for environment in ENVIRONMENTS.values():
        lab.set_pillar(environment, protection={"type": "autoban"})
    lab.all_states(HOSTS, "state.apply", "mailfw")


@pytest.fixture(autouse=True)
def installed_again(autoban):
    yield
    lab.all_states(HOSTS, "state.apply", "mailfw")


def use(host: str) -> None:
    """Have mailfw do all that leaves something behind."""
    use_mail(host)
    for verb in ("trust", "ban", "block"):
        lab.salt(host, f"mailfw.{verb}", "192.0.2.77")
    lab.salt(host, "mailfw.untrust", "192.0.2.78")
    lab.salt(host, "mailfw.open", "1h", "reason=somebody was locked out")
    lab.run(host, "systemctl", "restart", "mailfw-agent")
    lab.wait_until(lambda: "192.0.2.77" in lab.run(host, "cat", "/var/lib/mailfw/snapshot", check=False), "a snapshot")


def use_mail(host: str) -> None:
    """Log in, and send a message that arrives, over both versions of IP."""
    for address in ADDRESSES[host]:
        subject = f"clean {address} {time.time()}"
        assert lab.quickest_login("home", address, 3) < 3
        assert lab.client("home", "send", address=address, subject=subject)["refused"] == {}
        assert lab.client("home", "arrived", address=address, subject=subject)


def what_clean_leaves(before: dict[str, dict[str, str]]) -> str:
    """Clean both hosts; return how they differ from what they were, a line for each difference."""
    lab.all_states(HOSTS, "state.apply", "mailfw.clean")
    after = lab.on_each(HOSTS, inventory)
    return "\n".join(f"{host}: {line}" for host in HOSTS for line in differences(before[host], after[host]))


def test_clean_leaves_hosts_as_they_were_and_mail_goes_on(fleet):
    lab.on_each(HOSTS, use)
    with contextlib.ExitStack() as stack:
        people = [stack.enter_context(lab.logins(host)) for host in HOSTS]
        left = what_clean_leaves(fleet.before)
        visits = [one for each in people for one in each.end()]
    assert left == ""
    assert lab.got_in(visits, reloads=len(HOSTS))
    lab.on_each(HOSTS, use_mail)
    again = lab.all_states(HOSTS, "state.apply", "mailfw.clean")
    assert [changed(results) for results in again.values()] == [[], []]


def test_a_broken_installation_can_be_cleaned(fleet):
    for host in HOSTS:
        lab.run(host, "rm", "-r", "/usr/lib/mailfw/mailfwlib")
        lab.run(host, "systemctl", "restart", "mailfw-agent", check=False)
    assert what_clean_leaves(fleet.before) == ""


def test_clean_leaves_the_master_as_it_was_and_it_goes_on(fleet):
    use_mail("mx1")
    try:
        cleaned = lab.configure_master("mailfw.reactor.clean")
        assert changed(cleaned) != []
        assert "\n".join(differences(fleet.before["master"], inventory("master"))) == ""
        assert "mailfw.sqlite" not in lab.run("master", "ls", "/var/cache/salt/master")
        assert changed(lab.configure_master("mailfw.reactor.clean")) == []
    finally:
        lab.configure_master()
