"""The example of a reactor that mails events: true ones of each kind, hostile ones, and very many."""

from __future__ import annotations

import calendar
import email
import json
import re
import socket
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml

from integration import hostile
from integration.fleet import NETWORK, Fleet, MailHost
from integration.hosts import network_of, wait_for
from integration.test_hostile_events import Intruder

EXAMPLE = "salt://mailfw/reactor/examples/mail.sls"
TAGS = [f"mailfw/{kind}" for kind in ("ban", "block", "full", "healed", "open", "roaming")]
#: Where the mail command puts what it is given, on the master.
MAILS = "/run/mails"
MOST = 30
#: Loops are over after so many connections, whether or not the rules have banned anybody.
MOST_CONNECTIONS = 60


@pytest.fixture(scope="module", autouse=True)
def _reacting(fleet: Fleet) -> Iterator[None]:
    """Have the master react to the events as docs/events.md says, and mx1 tell of them soon."""
    main = Path(fleet.master.config_dir) / "master"
    before = main.read_text()
    configuration = yaml.safe_load(before)
    configuration["reactor"] += [{tag: [EXAMPLE]} for tag in TAGS]
    configuration["mailfw_mail"] = {"to": "operator@example.org", "command": ["tee", "-a", MAILS]}
    mx1 = fleet.hosts["mx1"]
    try:
        # States first: a master that has just started is slow.
        with fleet.pillar(mx1, metrics={"interval": "1s"}, sizes={"blocked": 1}, trusted={"per_user": 2}):
            assert not fleet.apply(mx1).failed
            main.write_text(yaml.safe_dump(configuration))
            configure(fleet)
            wait_for("the master to react", lambda: reacts(fleet), limit=120)
            yield
    finally:
        main.write_text(before)
        configure(fleet)


def reacts(fleet: Fleet) -> bool:
    """Fire an event, and return whether there is a mail: what is fired just after the master's start may be lost."""
    fleet.call(fleet.hosts["mx1"], "event.send", "mailfw/healed", {"host": "mx1"})
    time.sleep(1)
    return bool(mails(fleet))


def configure(fleet: Fleet) -> None:
    """Have mailfw.reactor read what the master's main file says, and the master restarted."""
    assert not fleet.configure_master().failed
    fleet.master.terminate()
    fleet.master.start()
    for host in fleet.hosts.values():
        wait_for(f"{host.name} to be back", lambda host=host: host.agent.status()["reachable"], limit=120)
    fleet.wait_for_minions()


@pytest.fixture(autouse=True)
def _no_mails_yet(fleet: Fleet) -> None:
    fleet.host.path(MAILS).unlink(missing_ok=True)
    for count in Path(fleet.master.config["cachedir"]).glob("mailfw_mail_*.json"):
        count.unlink()


@pytest.fixture(scope="module")
def intruder(fleet: Fleet) -> Iterator[Intruder]:
    process = Intruder(fleet.hosts["mx1"])
    yield process
    process.leave()


def mails(fleet: Fleet) -> list[Message]:
    """Return what the mail command was given so far, each mail as a mail server would read it."""
    path = fleet.host.path(MAILS)
    text = path.read_text() if path.exists() else ""
    return [email.message_from_string(one) for one in re.split("^(?=To: )", text, flags=re.M) if one]


def mailed(fleet: Fleet, tag: str) -> dict[str, str]:
    """Return the fields that the mail for an event has, once it is there."""
    (found,) = wait_for(f"a mail for {tag}", lambda: [one for one in mails(fleet) if one["Subject"] == tag])
    assert found.items() == [
        ("To", "operator@example.org"),
        ("Subject", tag),
        ("Auto-Submitted", "auto-generated"),
    ]
    return dict(line.split(": ", 1) for line in found.get_payload().splitlines())


def is_in_an_hour(until: str) -> bool:
    """Return whether a mail's time is an hour from now, but for what a busy machine takes."""
    at = calendar.timegm(time.strptime(until, "%Y-%m-%d %H:%M:%S UTC"))
    return abs(at - time.time() - 3600) < 300


def test_a_block_and_a_full_set(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    reason = "ticket 17\\nBcc: everybody@example.org {{ 1 + 1 }}"
    try:
        fleet.call(mx1, "mailfw.block", address, period="1h", reason=reason)
        found = mailed(fleet, "mailfw/block")
        assert is_in_an_hour(found.pop("until"))
        assert (json.loads(found.pop("by")), json.loads(found.pop("reason"))) == ("root", reason)
        assert found == {"host": '"mx1"', "address": json.dumps(address)}
        assert mailed(fleet, "mailfw/full") == {"host": '"mx1"', "set": '"blocked_ipv4"', "size": "1"}
    finally:
        fleet.call(mx1, "mailfw.unblock", address)


def test_an_opening_and_its_end(fleet: Fleet, mx1: MailHost) -> None:
    fleet.call(mx1, "mailfw.open", "1h", reason="locked out")
    try:
        found = mailed(fleet, "mailfw/open")
        assert is_in_an_hour(found.pop("until"))
        assert found == {"host": '"mx1"', "reason": '"locked out"'}
    finally:
        fleet.host.path(MAILS).unlink(missing_ok=True)
        fleet.call(mx1, "mailfw.close")
    assert mailed(fleet, "mailfw/open") == {"host": '"mx1"', "until": "0", "reason": '""'}


def test_a_repair(fleet: Fleet, mx1: MailHost) -> None:
    mx1.host.nft("delete", "table", "inet", "mailfw")
    found = mailed(fleet, "mailfw/healed")
    assert found["host"] == '"mx1"'
    assert "counter" in found["altered"]


def test_a_user_who_roams(fleet: Fleet, mx1: MailHost) -> None:
    for _ in range(3):
        mx1.agent.login(fleet.new_address(), "roaming@example.org")
    found = mailed(fleet, "mailfw/roaming")
    assert re.fullmatch('"[0-9a-f]{16}"', found.pop("user"))
    assert found == {"host": '"mx1"', "addresses": "2"}


def test_a_ban_by_the_rules(fleet: Fleet, mx1: MailHost) -> None:
    own = mx1.host.run("ip", "-json", "-4", "address", "show", "eth0").stdout
    mail_host = json.loads(own)[0]["addr_info"][0]["local"]
    with network_of(mx1.host):
        listener = socket.create_server((mail_host, 993))
    try:
        with listener:
            for _ in range(MOST_CONNECTIONS):
                if f'"{NETWORK}.1"' in json.dumps(mx1.host.elements("banned_dovecot_ipv4")):
                    break
                with socket.create_connection((mail_host, 993), 5), listener.accept()[0] as server:
                    server.sendall(b"* OK\r\n")
        found = mailed(fleet, "mailfw/ban")
        assert is_in_an_hour(found.pop("until"))
        assert found == {"host": '"mx1"', "role": '"dovecot"', "address": f'"{NETWORK}.1"'}
    finally:
        fleet.call(mx1, "mailfw.clear", f"{NETWORK}.1")


#: What no host would say in a field. The mail is to have one line for it, and nothing is to run.
VALUES: dict[str, Any] = {
    **{
        name: made("x")
        for name, made in hostile.DATA.items()
        if name in ("null", "a number", "nested", "beyond the BMP")
    },
    "a header": "x\nBcc: everybody@example.org\n\nbody",
    "a header with CR": "x\r\nBcc: everybody@example.org\r\n.\r\n",
    "an escaped line break": "x\\nBcc: everybody@example.org",
    "the end of a mail": "x\n.\nTo: everybody@example.org\n\n",
    "YAML": f'"\nforeign:\n  {hostile.TOUCH}\n',
    "Jinja": "{{ salt['cmd.run']('touch " + hostile.MARK + "') }}{% raw %}",
    "shell": f"$(touch {hostile.MARK}) `touch {hostile.MARK}` ; touch {hostile.MARK} | touch {hostile.MARK} '\"",
    "control characters": "\u0000\u0007\u0085\u2028\r\n\t\x1b[2J",
    "a million characters": "x" * 1_000_000,
    "an enormous time": (1 << 64) - 1,
    "a time that is none": float("nan"),
    "true": True,
}


@pytest.mark.parametrize("name", VALUES)
def test_hostile_fields(fleet: Fleet, mx1: MailHost, intruder: Intruder, name: str) -> None:
    value = VALUES[name]
    intruder.fire({"host": value, "until": value, "reason": value, "x\nBcc: everybody": value}, tag="mailfw/open")
    found = mailed(fleet, "mailfw/open")
    assert found.keys() == {"host", "until", "reason"}
    assert all(one.isascii() and one.isprintable() and len(one) <= 300 for one in found.values())
    assert len(mails(fleet)) == 1
    assert not any(host.path(hostile.MARK).exists() for host in (mx1.host, fleet.host))


@pytest.mark.parametrize("name", ["null", "a string", "a list"])
def test_data_without_fields_is_not_mailed(fleet: Fleet, intruder: Intruder, name: str) -> None:
    intruder.fire(hostile.DATA[name]("x"), tag="mailfw/open")
    intruder.fire({"host": "the next one"}, tag="mailfw/open")
    assert mailed(fleet, "mailfw/open") == {"host": '"the next one"'}


def test_a_flood_is_thirty_mails_an_hour_and_keeps_no_other_event_back(fleet: Fleet, intruder: Intruder) -> None:
    for number in range(MOST + 10):
        intruder.fire({"host": f"mx{number}"}, tag="mailfw/healed")
    wait_for("the mails", lambda: len(mails(fleet)) >= MOST, limit=120)
    (last,) = [one for one in mails(fleet) if "within an hour" in one.get_payload()]
    assert f'host: "mx{MOST - 1}"' in last.get_payload()
    time.sleep(3)  # More would be there by now.
    assert len(mails(fleet)) == MOST
    intruder.fire({"host": "mx1"}, tag="mailfw/open")
    assert mailed(fleet, "mailfw/open") == {"host": '"mx1"'}
