"""The operator's verbs, called through the master."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import ANY

import pytest

from integration.fleet import NETWORK, Fleet, MailHost, wait_until_trusted
from integration.hosts import network_of, wait_for
from mailfwlib import listing, messages


def both(fleet: Fleet, function: str, *arguments: Any, **named: Any) -> list[Any]:
    """Call a function on both mail hosts with one job; return what each returned."""
    found = fleet.call_all(list(fleet.hosts.values()), function, *arguments, **named)
    return [found["mx1"], found["mx2"]]


def listed(fleet: Fleet, target: MailHost, *arguments: Any, **named: Any) -> list[dict[str, Any]]:
    """Return the rows of a mail host's list."""
    return fleet.call(target, "mailfw.list", *arguments, **named)["rows"]


def test_settings_are_the_pillar_with_defaults_and_without_secrets(fleet: Fleet) -> None:
    for settings in both(fleet, "mailfw.settings"):
        assert settings["protection"] == {"type": "autoban", "services": {}}
        assert settings["trusted"]["period"] == 86400
        assert settings["fleet"]["keys"] == [messages.fingerprint(fleet.key)]
        assert fleet.key not in str(settings)


def test_apply_has_nothing_to_do_on_a_host_in_order(fleet: Fleet) -> None:
    assert both(fleet, "mailfw.apply") == [{"diff": "", "files": []}] * 2


def test_apply_shows_and_repairs_what_somebody_changed(fleet: Fleet, mx1: MailHost) -> None:
    before = mx1.host.ruleset()
    mx1.agent.stop()  # It would repair this first.
    try:
        mx1.host.nft("add", "rule", "inet", "mailfw", "guarded", "ip", "saddr", "192.0.2.66", "accept")
        assert "-\t\tip saddr 192.0.2.66 accept" in fleet.call(mx1, "mailfw.apply", test=True)["diff"]
        assert fleet.call(mx1, "mailfw.drift") == fleet.call(mx1, "mailfw.apply", test=True)["diff"]
        assert mx1.host.ruleset() != before
        assert "192.0.2.66" in fleet.call(mx1, "mailfw.apply")["diff"]
        assert mx1.host.ruleset() == before
    finally:
        mx1.agent.start()


def test_render_gives_the_files_that_are_loaded(fleet: Fleet, mx1: MailHost) -> None:
    directory = mx1.host.path("/etc/nftables.d/mailfw")
    assert fleet.call(mx1, "mailfw.render") == {path.name: path.read_text() for path in directory.iterdir()}


def test_trust_and_untrust(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()
    done = fleet.call(mx1, "mailfw.trust", address)
    assert done == {"trusted": address, "ports": [587, 465, 143, 993, 110, 995, 4190], "period": "1d", "was": {}}
    assert mx1.trusts(address)
    assert not mx2.trusts(address)
    (row,) = listed(fleet, mx1, "trusted", network=address)
    assert row["where"] == sorted(done["ports"])
    assert "accepted: trusted" in fleet.call(mx1, "mailfw.check", address)["services"]["imaps"]

    undone = {"untrusted": address, "ports": sorted(done["ports"]), "sessions_ended": 0, "only_here": ANY}
    assert fleet.call(mx1, "mailfw.untrust", address) == undone
    assert fleet.call(mx1, "mailfw.untrust", address) == {**undone, "ports": []}
    assert not mx1.trusts(address)
    assert listed(fleet, mx1, network=address) == []


def test_trust_on_some_services_for_some_time(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    done = fleet.call(mx1, "mailfw.trust", address, period="90m", services="submission,993")
    assert done == {"trusted": address, "ports": [587, 993], "period": "1h30m", "was": {}}
    left = mx1.host.trusted()[address]
    assert left.keys() == {587, 993}
    assert all(5390 <= seconds <= 5400 for seconds in left.values())


def test_a_login_does_not_shorten_what_an_operator_gave(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    fleet.call(mx1, "mailfw.trust", address, period="30d")
    mx1.agent.login(address)
    assert all(left > 29 * 86400 for left in mx1.host.trusted()[address].values())


def test_ban_and_unban(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    done = fleet.call(mx1, "mailfw.ban", address, role="dovecot", period="90m")
    assert done == {"banned": address, "roles": ["dovecot"], "period": "1h30m", "was": {}}
    again = fleet.call(mx1, "mailfw.ban", address, role="dovecot", period="2h")
    assert re.fullmatch(r"1h(30m|29m\d\ds)", again["was"]["dovecot"])
    assert [row["where"] for row in listed(fleet, mx1, "banned", network=address)] == [["dovecot"]]
    services = fleet.call(mx1, "mailfw.check", address)["services"]
    assert "refused: banned" in services["imap"]
    assert "limited: below the rate" in services["submission"]

    assert fleet.call(mx1, "mailfw.unban", address) == {"unbanned": address, "roles": ["dovecot"]}
    assert listed(fleet, mx1, "banned", role="dovecot", network=address) == []


def test_a_login_lifts_a_ban_on_every_host_but_never_a_block(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    banned, blocked = fleet.new_address(), fleet.new_address()
    both(fleet, "mailfw.ban", banned)
    both(fleet, "mailfw.block", blocked)
    mx1.agent.login(banned)
    mx1.agent.login(blocked)
    wait_until_trusted(banned, mx2)
    wait_until_trusted(blocked, mx2)
    assert [found["of"] for found in both(fleet, "mailfw.list", "banned", network=banned)] == [0, 0]
    for found in both(fleet, "mailfw.check", blocked):
        assert found["services"]["imap"].startswith("refused: blocked without an end, by ")


def test_block_and_unblock(fleet: Fleet) -> None:
    address = fleet.new_address()
    done = {"blocked": address, "period": "forever", "sessions_ended": 0, "was": ""}
    assert both(fleet, "mailfw.block", address) == [done] * 2
    assert both(fleet, "mailfw.block", address) == [{**done, "was": "forever"}] * 2
    for found in both(fleet, "mailfw.list", "blocked", network=address):
        assert [row["left"] for row in found["rows"]] == ["forever"]
    assert both(fleet, "mailfw.unblock", address) == [{"unblocked": address, "was_blocked": True}] * 2
    assert both(fleet, "mailfw.unblock", address) == [{"unblocked": address, "was_blocked": False}] * 2
    assert [found["of"] for found in both(fleet, "mailfw.list", "blocked", network=address)] == [0, 0]


@contextlib.contextmanager
def session(target: MailHost, port: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from here to a mail host: the client's socket and the server's."""
    own = target.host.run("ip", "-json", "-4", "address", "show", "eth0").stdout
    mail_host = json.loads(own)[0]["addr_info"][0]["local"]
    with network_of(target.host):
        listener = socket.create_server((mail_host, port))
    with listener, socket.create_connection((mail_host, port), 5) as client, listener.accept()[0] as server:
        yield client, server


def test_a_block_is_an_event_on_the_master(fleet: Fleet, mx1: MailHost) -> None:
    address, moment = fleet.new_address(), time.time()
    fleet.call(mx1, "mailfw.block", address, period="1h", reason="ticket 17")
    (event,) = wait_for("the event", lambda: fleet.events.get_events({("master", "mailfw/block")}, after_time=moment))
    found = event.data["data"]
    assert (found["host"], found["address"], found["reason"]) == ("mx1", address, "ticket 17")
    assert 3500 < found["until"] - moment < 3700
    kept = mx1.host.path("/var/lib/mailfw/snapshot")
    wait_for("a snapshot has it", lambda: address in kept.read_text())
    fleet.call(mx1, "mailfw.unblock", address)
    wait_for("it no longer has it", lambda: address not in kept.read_text())


def test_a_block_ends_idle_sessions_at_once(fleet: Fleet, mx1: MailHost) -> None:
    source = f"{NETWORK}.1"
    with session(mx1, 993) as (client, server):
        assert client.getsockname()[0] == source
        try:
            assert fleet.call(mx1, "mailfw.block", source)["sessions_ended"] == 1
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            with pytest.raises(ConnectionAbortedError):
                server.recv(1)
        finally:
            assert fleet.call(mx1, "mailfw.unblock", source)["was_blocked"]


def over_rate(host: MailHost) -> int:
    """Return how many packets the kernel has refused as above the rate."""
    listed = json.loads(host.host.nft("-j", "list", "counter", "inet", "mailfw", "over_rate"))["nftables"]
    return next(one["counter"]["packets"] for one in listed if "counter" in one)


def test_status_of_a_host_in_order(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    before = [over_rate(host) for host in (mx1, mx2)]
    found = both(fleet, "mailfw.status")
    for status, least, host in zip(found, before, (mx1, mx2)):
        assert status["enforcing"] is True
        assert status["rules"] == "loaded"
        assert status["services"]["imaps"] == "993: autoban, limited"
        assert re.fullmatch(r"\d+ of 2000000", status["sets"]["trusted_ipv4"])
        assert least <= status["decisions"]["over_rate"] <= over_rate(host)
        # What other tests have blocked lately is known for some seconds more.
        assert [one for one in status["warnings"] if not one.startswith("familiar addresses")] == []


def test_status_says_what_is_wrong(fleet: Fleet, mx1: MailHost) -> None:
    # Salt's own connections go on: the host is to answer.
    rules = "ct state established accept; tcp sport { 4505, 4506 } accept; iif lo accept;"
    mx1.host.nft(
        f"add table inet other {{ chain input {{ type filter hook input priority 0; policy drop; {rules} }}; }}"
    )
    mx1.agent.stop()  # It would repair this.
    mx1.host.nft("flush", "chain", "inet", "mailfw", "guarded")
    with network_of(mx1.host):
        listener = socket.create_server(("0.0.0.0", 993))
    try:
        status = fleet.call(mx1, "mailfw.status")
    finally:
        listener.close()
        mx1.host.nft("delete", "table", "inet", "other")
        fleet.call(mx1, "mailfw.apply")
        mx1.agent.start()
    assert status["rules"] == "differ: see mailfw.drift"
    assert len(status["warnings"]) == 1
    assert "table inet other, chain input" in status["warnings"][0]
    assert fleet.call(mx1, "mailfw.status")["rules"] == "loaded"


def test_a_block_of_an_ipv6_address_takes_its_prefix_and_ends(fleet: Fleet, mx1: MailHost) -> None:
    assert fleet.call(mx1, "mailfw.block", "2001:db8:9:9::1", period="1d") == {
        "blocked": "2001:db8:9:9::/64",
        "period": "1d",
        "sessions_ended": 0,
        "was": "",
    }
    assert "refused" in fleet.call(mx1, "mailfw.check", "2001:db8:9:9::2")["services"]["imap"]
    assert fleet.call(mx1, "mailfw.unblock", "2001:db8:9:9:8::")["was_blocked"] is True


def test_explain_is_for_some_services_or_all(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    fleet.call(mx1, "mailfw.ban", address, role="postfix", reason='a "reason"')
    told = fleet.call(mx1, "mailfw.explain", address, "submission,993")
    assert (told["address"], told["host"], told["mode"]) == (address, "mx1", "autoban")
    assert told["verdicts"].keys() == {"submission", "imaps"}
    assert re.fullmatch(r"until .* left\), for \ds so far, by [a-z_]+: a 'reason'", told["banned"]["postfix"])
    assert told["advice"][0].startswith(f"salt mx1 mailfw.unban {address} ")
    short = fleet.call(mx1, "mailfw.check", address)["services"]
    assert {name: said.partition(":")[0] for name, said in short.items()} == {
        **dict.fromkeys(("imap", "imaps", "pop3", "pop3s", "sieve"), "limited"),
        **dict.fromkeys(("submission", "submissions"), "refused"),
        "smtp": "accepted",
    }


def test_list_is_by_kind_service_role_network_and_user(fleet: Fleet, mx1: MailHost) -> None:
    home, office, other = (fleet.new_address() for _ in range(3))
    user = f"user-{home}@example.org"
    mx1.agent.login(home, user)
    mx1.agent.login(office)
    fleet.call(mx1, "mailfw.ban", home, role="postfix", reason="ticket 17")
    fleet.call(mx1, "mailfw.trust", other, services="imaps", period="30d")
    within = [home, office, other]

    def found(**asked: Any) -> list[tuple[str, str]]:
        rows = listed(fleet, mx1, network=asked.pop("network", within), **asked)
        return [(row["kind"], row["address"]) for row in rows]

    everything = {("trusted", home), ("trusted", office), ("trusted", other), ("banned", home)}
    assert set(found()) == everything
    assert set(found(kind="trusted")) == everything - {("banned", home)}
    assert set(found(service="imaps")) == everything - {("banned", home)}
    assert set(found(service="587")) == everything - {("trusted", other)}
    assert set(found(role="postfix", kind=["banned", "trusted"])) == everything - {("trusted", other)}
    assert found(role="postfix", service="imaps") == []
    assert set(found(user=user.upper())) == {("trusted", home), ("banned", home)}
    assert found(user="nobody-of-that-name") == []
    assert found(network=office) == [("trusted", office)]
    assert found(sort="remaining", limit=1) == [("trusted", other)]
    assert set(found(sort="ending", limit=1)) == {("banned", home)}
    (row,) = listed(fleet, mx1, "banned", network=home)
    assert row["by"].endswith(": ticket 17")
    assert fleet.call(mx1, "mailfw.list", network=within, limit=2)["of"] == 4
    for address in within:
        fleet.call(mx1, "mailfw.clear", address)


def test_list_by_user_where_no_user_is_kept_says_so(fleet: Fleet, mx1: MailHost) -> None:
    with fleet.pillar(mx1, trusted={"users": "off"}):
        fleet.apply(mx1)
        said = fleet.call(mx1, "mailfw.list", user="alice")
    assert "user: mailfw:trusted:users is off on this host" in said


def test_longest_list_gets_through_the_master(fleet: Fleet, mx1: MailHost) -> None:
    """What is too long, Salt replaces without a word."""
    many = [f"2001:db8:{n // 9999 + 0xAAAA:x}:{n + 0x1000:x}::" for n in range(listing.MOST + 1)]
    note = "x" * 127
    mx1.host.nft("add", "element", "inet", "mailfw", "blocked_ipv6", f"{{ {many[0]} }}")
    rules = "".join(f'add element inet mailfw blocked_ipv6 {{ {one} comment "{note}" }}\n' for one in many[1:])
    mx1.host.run("nft", "-f", "-", input=rules)
    said = fleet.call(mx1, "mailfw.list", "blocked", network="2001:db8:8000::/33", limit=listing.MOST)
    mx1.host.nft("flush", "set", "inet", "mailfw", "blocked_ipv6")
    assert (len(said["rows"]), said["of"]) == (listing.MOST, listing.MOST + 1)
    assert {row["by"] for row in said["rows"]} >= {note}


def test_observed_says_who_would_be_refused(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    """A host that refuses has nothing to say, and says so."""
    fleet.forget_hosts("id NOT IN ('mx1', 'mx2')")
    member, stranger = fleet.new_address(), fleet.new_address()
    with fleet.pillar(mx1, enforce=False, protection={"type": "private"}):
        fleet.apply(mx1)
        mx1.agent.login(member, "alice")
        for address, packets in ((member, 2), (stranger, 7)):
            for port in (587, 993):
                value = f"{{ {address} . {port} counter packets {packets} bytes 60 }}"
                mx1.host.nft("add", "element", "inet", "mailfw", "observed_ipv4", value)
        found = wait_for(
            "the login is on disk",
            lambda: (said := fleet.call(mx1, "mailfw.observed"))["services"]["imaps"]["logged in"] and said,
        )
        assert found["observing"] is True
        assert found["services"]["submission"] == {"role": "postfix", "sources": 2, "times": 9, "logged in": 1}
        assert [(row["address"], row["times"]) for row in found["rows"]] == [(member, 2)] * 2 + [(stranger, 7)] * 2
        assert found["rows"][0]["logged in"].endswith("s ago")
        assert found["rows"][2]["logged in"] is None
        assert (found["of"], found["warnings"]) == (4, [])
        some = fleet.call(mx1, "mailfw.observed", role="dovecot", network=stranger, limit=1)
        assert [row["service"] for row in some["rows"]] == ["imaps"]

        fleet.call(mx1, "mailfw.trust", member, services="submission", period="2h")
        row = fleet.call(mx1, "mailfw.observed", service="submission", network=member)["rows"][0]
        assert re.fullmatch(r"2h|1h59m\d+s", row["trusted"])

        status, everywhere = fleet.salt_run("-t", "60", "mailfw.observed")
        assert (status, everywhere["failed"], everywhere["no answer"]) == (0, {}, [])
        assert everywhere["hosts"]["mx1"]["of"] == 4
        assert (everywhere["hosts"]["mx2"]["rows"], everywhere["hosts"]["mx2"]["observing"]) == ([], False)
        assert "does not observe now" in everywhere["hosts"]["mx2"]["warnings"][0]
        shown = fleet.salt_run_shows("-t", "60", "mailfw.observed")[1]
        assert shown.splitlines()[0].split()[:4] == ["host", "address", "service", "times"]
        for address in (member, stranger):
            fleet.call(mx1, "mailfw.clear", address)
    # What was observed stays to be looked at; what was cleared does not.
    assert fleet.call(mx1, "mailfw.observed")["observing"] is False


def test_seed_trusts_who_has_logged_in_lately(fleet: Fleet, mx1: MailHost) -> None:
    """These hosts have no Dovecot to ask who is logged in: that is said, and the rest is done."""
    member, gone = fleet.new_address(), fleet.new_address()
    mx1.agent.login(member, "alice")
    mx1.agent.login(gone, "alice")
    fleet.call(mx1, "mailfw.untrust", gone)
    mx1.agent.stop()
    mx1.host.nft("flush", "set", "inet", "mailfw", "trusted_ipv4")
    mx1.agent.start()
    assert not mx1.trusts(member)
    done = fleet.call(mx1, "mailfw.seed")
    assert mx1.trusts(member)
    assert not mx1.trusts(gone)
    assert {row["result"] for row in done["rows"] if row["address"] == member} == {"trusted"}
    assert all(row["because"].startswith("logged in ") for row in done["rows"])
    (ended,) = [row["result"] for row in done["rows"] if row["address"] == gone]
    assert ended == "an operator has ended its trust, and nobody has logged in since"
    assert "who is logged in is not known: doveadm who: " in done["problems"][0]
    again = fleet.call(mx1, "mailfw.seed")
    assert [row for row in again["rows"] if row["result"] == "trusted"] == []
    assert again["already"] >= 1


def test_networks_are_taken_source_by_source(fleet: Fleet, mx1: MailHost) -> None:
    network, inside, outside = "192.0.2.64/26", "192.0.2.77", "192.0.2.128"
    for verb, undo in (("block", "unblock"), ("ban", "unban")):
        assert network in fleet.call(mx1, f"mailfw.{verb}", network).values()
        assert fleet.call(mx1, "mailfw.check", inside)["services"]["imap"].startswith("refused: ")
        assert fleet.call(mx1, "mailfw.check", outside)["services"]["imap"].startswith("limited: ")
        fleet.call(mx1, f"mailfw.{undo}", network)
        assert fleet.call(mx1, "mailfw.check", inside)["services"]["imap"].startswith("limited: ")
    fleet.call(mx1, "mailfw.trust", network, services="587")
    assert mx1.host.trusted()[inside].keys() == {587}
    assert fleet.call(mx1, "mailfw.untrust", network)["ports"] == [587]
    assert inside not in mx1.host.trusted()


def test_untrust_on_a_service_leaves_what_an_operator_gave_on_others(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    fleet.call(mx1, "mailfw.trust", address, period="30d")
    fleet.call(mx1, "mailfw.untrust", address, services="sieve")
    mx1.agent.login(address)
    left = mx1.host.trusted()[address]
    assert left.pop(4190) <= 86400
    assert min(left.values()) > 29 * 86400


def test_untrust_ends_sessions_on_its_services_at_once(fleet: Fleet, mx1: MailHost) -> None:
    source = f"{NETWORK}.1"
    fleet.call(mx1, "mailfw.trust", source)
    with session(mx1, 993) as (imaps, _), session(mx1, 143) as (imap, server):
        assert fleet.call(mx1, "mailfw.untrust", source, services="imaps") == {
            "untrusted": source,
            "ports": [993],
            "sessions_ended": 1,
            "only_here": "a login or a session on another mail host has it trusted again: "
            "salt-run mailfw.untrust is for all of them",
        }
        with pytest.raises(ConnectionResetError):
            imaps.recv(1)
        imap.sendall(b"x")
        assert server.recv(1) == b"x"
    fleet.call(mx1, "mailfw.clear", source)


def test_clear_forgets_everything_but_a_block(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    fleet.call(mx1, "mailfw.trust", address, period="30d")
    fleet.call(mx1, "mailfw.ban", address)
    fleet.call(mx1, "mailfw.block", address)
    mx1.host.nft("add", "element", "inet", "mailfw", "waiting_ipv4", f"{{ {address} . 587 }}")
    mx1.host.nft("add", "element", "inet", "mailfw", "rate_dovecot_ipv4", f"{{ {address} }}")
    done = fleet.call(mx1, "mailfw.clear", address)
    assert (done["cleared"], done["still_blocked"]) == (address, "forever")
    assert (len(done["trusted"]), done["banned"].keys()) == (7, {"postfix", "dovecot"})
    assert mx1.host.nft("list", "ruleset").count(address) == 1
    assert fleet.call(mx1, "mailfw.clear", address) == {
        "cleared": address,
        "trusted": {},
        "banned": {},
        "still_blocked": "forever",
    }
    fleet.call(mx1, "mailfw.unblock", address)
    mx1.agent.login(address)
    assert all(left <= 86400 for left in mx1.host.trusted()[address].values()), "the agent has forgotten as well"


def test_flush_is_of_one_kind(fleet: Fleet, mx1: MailHost) -> None:
    trusted, banned, blocked = (fleet.new_address() for _ in range(3))
    mx1.agent.login(trusted)
    fleet.call(mx1, "mailfw.ban", banned)
    fleet.call(mx1, "mailfw.block", blocked)
    for kind, address in (("banned", banned), ("trusted", trusted), ("blocked", blocked)):
        assert address in mx1.host.nft("list", "ruleset")
        assert fleet.call(mx1, "mailfw.flush", kind, all=True)["elements"] >= 1
        assert address not in mx1.host.nft("list", "ruleset")
    assert fleet.call(mx1, "mailfw.flush", "trusted", all=True) == {"flushed": "trusted", "elements": 0}


def test_an_argument_that_there_is_not_is_named(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    assert "perod: there is no such argument" in fleet.call(mx1, "mailfw.block", address, perod="1d")
    assert address not in fleet_sets(mx1)


def test_changes_are_in_the_journal_with_who_and_why(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    with mx1.host.journal() as entries:
        for verb in ("trust", "untrust", "ban", "unban", "ban", "trust", "block", "unblock", "unblock"):
            fleet.call(mx1, f"mailfw.{verb}", address, reason="ticket 17")
        found = [entry["MESSAGE"] for entry in entries() if entry.get("MAILFW_ADDRESS") == address]
    assert [line.split()[0] for line in found] == [
        f"action={verb}" for verb in ("trust", "untrust", "ban", "unban", "ban", "trust", "unban", "block", "unblock")
    ]
    assert all(re.search(r' by=[a-z_]+ why="ticket 17"$', line) for line in found)
    assert f"address={address} where=587,465,143,993,110,995,4190 until=20" in found[0]
    assert found[6].startswith(f"action=unban address={address} where=postfix,dovecot by="), "the trust lifted the ban"
    assert "until=forever" in found[7]
    fleet.call(mx1, "mailfw.clear", address)


@pytest.mark.parametrize(
    ("function", "arguments", "lasting"),
    [("trusted", {"services": ["submission"], "period": "30d"}, "30d"), ("blocked", {}, "forever")],
)
def test_states_keep_an_address_and_have_it_absent(
    fleet: Fleet, mx1: MailHost, function: str, arguments: dict[str, Any], lasting: str
) -> None:
    address = fleet.new_address()

    def state(name: str, **more: Any) -> dict[str, Any]:
        (found,) = fleet.call(mx1, "state.single", f"mailfw.{name}", address, **more).values()
        return found

    what = {"trusted": "587", "blocked": "all"}[function]
    changes = {function: {"old": {what: ""}, "new": {what: lasting}}}
    assert (state(function, test=True, **arguments)["result"], address in fleet_sets(mx1)) == (None, False)
    done = state(function, **arguments)
    assert (done["result"], json.loads(json.dumps(done["changes"]))) == (True, changes)
    assert address in fleet_sets(mx1)
    again = state(function, **arguments)
    assert (again["result"], again["changes"]) == (True, {})

    assert state("absent", test=True)["result"] is None
    assert address in fleet_sets(mx1)
    gone = state("absent")
    assert (gone["result"], list(gone["changes"])) == (True, [function])
    assert address not in fleet_sets(mx1)
    assert state("absent")["changes"] == {}


def test_states_renew_what_has_less_than_half_of_its_period_left(fleet: Fleet, mx1: MailHost) -> None:
    address = fleet.new_address()
    fleet.call(mx1, "mailfw.block", address, period="10h")
    for period, changed in (("19h", False), ("21h", True), ("21h", False), (None, True)):
        (done,) = fleet.call(mx1, "state.single", "mailfw.blocked", address, period=period).values()
        assert bool(done["changes"]) is changed, period
    fleet.call(mx1, "mailfw.unblock", address)


def test_states_say_what_is_wrong(fleet: Fleet, mx1: MailHost) -> None:
    for function in ("trusted", "blocked", "absent"):
        (done,) = fleet.call(mx1, "state.single", f"mailfw.{function}", "nonsense").values()
        assert done["result"] is False
        assert "address 'nonsense': expected an IPv4 or IPv6 address" in done["comment"]


def fleet_sets(host: MailHost) -> str:
    """Return the loaded elements, as nft lists them."""
    return host.host.nft("list", "ruleset")


def test_login_does_what_the_hook_does(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address = fleet.new_address()
    assert fleet.call(mx1, "mailfw.login", address, user="alice") == f"{address} is trusted"
    wait_until_trusted(address, mx1, mx2)


def test_agent_status_says_how_the_agent_is(fleet: Fleet) -> None:
    for status in both(fleet, "mailfw.agent_status"):
        assert status["mode"] == "autoban"
        assert status["keys"] == [messages.fingerprint(fleet.key)]
        assert status["dropped"] == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["trust", "nonsense"], "address 'nonsense': expected an IPv4 or IPv6 address"),
        (["trust", "192.0.2.1/24"], "address '192.0.2.1/24': has host bits set: write 192.0.2.0/24 for the network"),
        (["block", "192.0.0.0/16"], "address '192.0.0.0/16': has 65536 sources, more than the 4096"),
        (["explain", "192.0.2.0/24"], "address '192.0.2.0/24': expected an IPv4 or IPv6 address"),
        (["explain", "192.0.2.1", "gopher"], "service 'gopher': expected one of imap, imaps"),
        (["block", "192.0.2.1", None, "x" * 91], "expected text of at most 90 bytes"),
        (["flush", "everything", True], "kind 'everything': expected one of trusted, banned, blocked"),
        (["flush", "trusted"], "expected all=True"),
        (["trust", "192.0.2.1", "a while"], "period 'a while': expected a duration"),
        (["trust", "192.0.2.1", "1h", "smtp"], "service 'smtp': expected one of this host's: submission (587)"),
        (["untrust", "192.0.2.1", "gopher"], "service 'gopher': expected one of this host's"),
        (["ban", "192.0.2.1", "exim"], "role 'exim': expected one of postfix, dovecot"),
        (["ban", "192.0.2.1", "dovecot", 0], "period 0: expected a duration"),
        (["unban", 3221225985], "address 3221225985: expected an IPv4 or IPv6 address"),
        (["block", "fe80::1%eth0"], "address 'fe80::1%eth0': expected an IPv4 or IPv6 address"),
        (["unblock", ""], "address '': expected an IPv4 or IPv6 address"),
        (["check", "mail.example.com"], "address 'mail.example.com': expected an IPv4 or IPv6 address"),
        (["list", "friends"], "kind 'friends': expected one of trusted, banned, blocked, observed"),
        (["list", "trusted,"], "kind '': expected one of trusted, banned, blocked, observed"),
        (["list", ["trusted", {"a": 1}]], "kind {'a': 1}: expected one of trusted"),
        (["list", "observed"], "kind 'observed': this host enforces its rules"),
        (["list", None, "gopher"], "service 'gopher': expected one of this host's: submission (587)"),
        (["list", None, None, "exim"], "role 'exim': expected one of postfix, dovecot"),
        (["list", None, None, None, "192.0.2.1/24"], "network '192.0.2.1/24': has host bits set: write 192.0.2.0/24"),
        (["list", None, None, None, ["192.0.2.1", 7]], "network 7: expected a network such as"),
        (["list", None, None, None, None, "a*"], "user 'a*': expected a user's name as Dovecot logs it"),
        (["list", None, None, None, None, None, "size"], "sort 'size': expected one of remaining, ending, address"),
        (["list", None, None, None, None, None, "address", 0], "limit 0: expected a whole number from 1 to 3000"),
        (["list", None, None, None, None, None, "address", 3001], "limit 3001: expected a whole number from 1 to 3000"),
        (["list", None, None, None, None, None, "address", "all"], "limit 'all': expected a whole number"),
        (["list", None, None, None, None, None, "address", True], "limit True: expected a whole number"),
        (["observed", "gopher"], "service 'gopher': expected one of this host's"),
        (["observed", None, None, "192.0.2.1/24"], "network '192.0.2.1/24': has host bits set"),
        (["observed", None, None, None, 0], "limit 0: expected a whole number from 1 to 3000"),
        (["login", "nonsense"], "address 'nonsense': expected an IPv4 or IPv6 address"),
        (["receive", "text"], "signed: expected a list of signed messages"),
        (["receive", [1]], "signed: expected a list of signed messages"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named_with_what_would_be_accepted(
    fleet: Fleet, mx1: MailHost, call: list[Any], said: str
) -> None:
    before = mx1.host.nft("list", "ruleset").count("192.0.2.1")
    answer = fleet.call(mx1, f"mailfw.{call[0]}", *call[1:])
    assert isinstance(answer, str)
    assert said in answer
    assert "Traceback" not in answer
    assert mx1.host.nft("list", "ruleset").count("192.0.2.1") == before
