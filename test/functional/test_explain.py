"""What the host says of an address is what a connection from there finds: for every mode, service and standing."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mailfwlib import audit, elements, explain, netlink, nft, parse, snapshot
from mailfwlib.settings import MODES, SERVICES, resolve
from support.agent import Agent
from support.firewall import Firewall, render
from support.mail import MailServer
from support.net import LIMIT, Client, Host, until

PORTS = {name: service.port for name, service in SERVICES.items()}
REJECT = {"banned": "reject", "blocked": "reject", "untrusted": "reject"}
NETWORKS = {"rate": "1000/second", "ipv4_prefix": 24, "ipv6_prefix": 48}
#: An address of alice's, and a network around each of hers.
ADDRESSES = {"ipv4": "198.51.100.10", "ipv6": "2001:db8:a::10"}
AROUND = {"ipv4": "198.51.100.0/24", "ipv6": "2001:db8:a::/48"}


def pillar_list(kind: str) -> Callable[[str], dict[str, Any]]:
    return lambda family: {kind: {f"networks_{family}": [AROUND[family]]}}


def trusted_on_some_ports(firewall: Firewall, source: str) -> None:
    firewall.trust(source, ports=[465, 993, 110])


def network_banned(firewall: Firewall, source: str) -> None:
    family = "ipv6" if ":" in source else "ipv4"
    for name in ("postfix", "dovecot"):
        if f"banned_networks_{name}_{family}" in firewall.nft("list", "sets"):
            base = AROUND[family].partition("/")[0]
            firewall.run(f"add element inet mailfw banned_networks_{name}_{family} {{ {base} }}")


def opened(firewall: Firewall, _: str) -> None:
    firewall.run("add element inet mailfw break_glass { tcp timeout 1m }")


def nobody(_: Firewall, __: str) -> None:
    """Leave a source as unknown as it is."""


#: What pillar makes of a source, and what logins, operators and rules make of it.
STANDINGS: dict[str, tuple[Callable[[str], dict[str, Any]], Callable[[Firewall, str], None]]] = {
    "unknown": (lambda _: {}, nobody),
    "trusted": (lambda _: {}, Firewall.trust),
    "trusted on some ports": (lambda _: {}, trusted_on_some_ports),
    "trusted network": (pillar_list("trusted"), nobody),
    "exempt": (pillar_list("exempt"), nobody),
    "exempt and banned": (pillar_list("exempt"), Firewall.ban),
    "banned": (lambda _: {}, Firewall.ban),
    "banned from one role": (lambda _: {}, lambda firewall, source: firewall.ban(source, ("dovecot",))),
    "banned network": (lambda _: {}, network_banned),
    "blocked": (lambda _: {}, Firewall.block),
    "blocked network": (pillar_list("blocked"), nobody),
    "open": (pillar_list("blocked"), opened),
}


def found(client: Client, source: str) -> dict[str, bool]:
    """Return for each service whether a connection is served."""
    answers = client.connect_many(list(PORTS.values()), source)
    return {name: answers[port] == "open" for name, port in PORTS.items()}


def said(firewall: Firewall, source: str) -> dict[str, bool]:
    """Return for each service whether a connection would be served, by what the host says."""
    verdicts = firewall.explain(source)["verdicts"]
    assert {one.partition(": ")[0] for one in verdicts.values()} <= {"accepted", "limited", "refused"}
    return {name: not one.startswith("refused: ") for name, one in verdicts.items()}


#: Observing changes what comes of a refusal only.
CASES = [*((one, True) for one in STANDINGS), *((one, False) for one in ("unknown", "banned", "blocked network"))]


@pytest.mark.parametrize(("standing", "enforce"), CASES, ids=[f"{one}-{enforce}" for one, enforce in CASES])
@pytest.mark.parametrize("mode", MODES)
def test_verdict_is_what_a_connection_finds(
    firewall: Firewall, alice: Client, family: str, mode: str, standing: str, enforce: bool
) -> None:
    source = alice.addresses(family)[0]
    pillar, make = STANDINGS[standing]
    firewall.load(
        protection={"type": mode}, enforce=enforce, reaction=REJECT, autoban={"networks": NETWORKS}, **pillar(family)
    )
    make(firewall, source)
    before = said(firewall, source)
    assert found(alice, source) == before
    assert before["smtp"]


def test_verdicts_differ(firewall: Firewall, family: str) -> None:
    """So that the test above compares something."""
    source = ADDRESSES[family]
    firewall.load(protection={"type": "protected", "services": {"pop3": "private", "sieve": "public"}})
    firewall.ban(source)
    firewall.trust(source, ports=[993])
    firewall.ban(source, ("dovecot",))
    served = {name for name, is_served in said(firewall, source).items() if is_served}
    assert served == {"smtp", "imaps", "sieve"}


@pytest.mark.parametrize(
    ("reaction", "finds", "verdict", "lately"),
    [
        ("hold", "silent", "; the first tries get no answer", "held or refused"),
        ("drop", "silent", "; it gets no answer", "refused"),
        ("reject", "refused", "the mode is protected", "refused"),
    ],
)
def test_reaction(
    firewall: Firewall, alice: Client, family: str, reaction: str, finds: str, verdict: str, lately: str
) -> None:
    """The host says what a stranger gets, and when one last got it."""
    source = alice.addresses(family)[0]
    firewall.load(protection={"type": "protected"}, reaction={"untrusted": reaction})
    assert not said(firewall, source)["submission"]
    assert firewall.explain(source)["lately"] == {}
    assert alice.connect(587, source) == finds
    told = firewall.explain(source)
    assert verdict in told["verdicts"]["submission"]
    assert told["lately"].keys() == {"submission"}
    assert re.fullmatch(rf"{lately}, the last time [0-9]s ago", told["lately"]["submission"])


@pytest.mark.parametrize("of", ["banned", "blocked"])
def test_bans_and_blocks_leave_no_refusal_to_be_told(firewall: Firewall, alice: Client, family: str, of: str) -> None:
    source = alice.addresses(family)[0]
    firewall.load(reaction=REJECT)
    {"banned": firewall.ban, "blocked": firewall.block}[of](source)
    assert alice.connect(993, source) == "refused"
    assert firewall.explain(source)["lately"] == {}


def advice(firewall: Firewall, source: str) -> list[str]:
    return firewall.explain(source)["advice"]


def test_advice_is_a_login_where_one_opens_the_port(firewall: Firewall, family: str) -> None:
    """Mixed modes: it says of which services that is so."""
    source, trust = ADDRESSES[family], f"salt mx1 mailfw.trust {ADDRESSES[family]}"
    firewall.load(protection={"type": "protected", "services": {"sieve": "private"}})
    assert advice(firewall, source) == [
        f"a login opens submission, submissions, or {trust}",
        "no login opens sieve: no mailfw:trusted network admits it, and the mode is private (mailfw:trusted:private); "
        f"{trust} does, or its network in mailfw:trusted:networks_{family} of the pillar",
    ]
    firewall.load(protection={"type": "private"}, trusted={"private": True})
    assert advice(firewall, source)[0].startswith("a login opens submission, submissions, imap, imaps")


@pytest.mark.parametrize(
    "pillar",
    [
        {"protection": {"type": "protected"}},
        {"protection": {"type": "protected", "services": {"sieve": "private"}}},
        {"protection": {"type": "private"}},
        {"protection": {"type": "private"}, "trusted": {"private": True}},
        {"protection": {"type": "protected"}, "trusted": {"never": list(AROUND.values())}},
    ],
)
def test_a_login_opens_what_the_advice_says(
    firewall: Firewall, host: Host, family: str, pillar: dict[str, Any], tmp_path: Path
) -> None:
    source = ADDRESSES[family]
    firewall.load(**pillar)
    before, sentences = said(firewall, source), advice(firewall, source)
    found = re.search("a login opens (.*), or salt", "\n".join(sentences))
    named = set(found[1].split(", ")) if found else set()
    with closing(Agent(host, tmp_path, pillar)) as agent:
        agent.login(source)
    assert {name for name, served in said(firewall, source).items() if served and not before[name]} == named
    closed = {name for name, served in before.items() if not served} - named
    no_login = f"no login opens {', '.join(name for name in PORTS if name in closed)}: "
    assert any(one.startswith(no_login) for one in sentences) == bool(closed)


@pytest.mark.parametrize(
    ("never", "address", "reason"),
    [
        (True, None, "is in mailfw:trusted:never"),
        (False, {"ipv4": "169.254.7.7", "ipv6": "fe80::7"}, "is link-local"),
    ],
)
def test_advice_is_no_login_where_none_is_trusted(
    firewall: Firewall, family: str, never: bool, address: dict[str, str] | None, reason: str
) -> None:
    source = (address or ADDRESSES)[family]
    firewall.load(protection={"type": "protected"}, trusted={"never": [source] if never else []})
    assert advice(firewall, source) == [
        f"no login opens submission, submissions: {reason}; salt mx1 mailfw.trust {source} does, "
        f"or its network in mailfw:trusted:networks_{family} of the pillar"
    ]
    firewall.ban(source, ("dovecot",))
    assert advice(firewall, source)[0] == f"salt mx1 mailfw.unban {source} lifts the ban"
    firewall.trust(source)
    assert all(said(firewall, source).values()), "as it was told"


def test_observing_says_when_it_would_have_refused(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    firewall.load(protection={"type": "private"}, enforce=False)
    assert alice.connect(993, source) == "open"
    told = firewall.explain(source)
    assert told["verdicts"]["imaps"].startswith("accepted: mailfw:enforce is false; it would be refused: not trusted")
    assert re.fullmatch(r"would have been refused, the last time [0-9]s ago", told["lately"]["imaps"])


def standing(firewall: Firewall, host: Host, source: str) -> explain.Standing:
    return host.call(lambda: explain.standing(parse.address(source), firewall.settings, netlink.Kernel()))


def test_connections_that_are_said_to_be_free_are(firewall: Firewall, host: Host, alice: Client, family: str) -> None:
    """Up to the rate and above it: what is limited is served as long as one is free, and then banned."""
    source = alice.addresses(family)[0]
    firewall.load(autoban={"rate": "120/minute", "burst": 3}, reaction=REJECT)

    def free() -> int:
        return explain.free("dovecot", standing(firewall, host, source), firewall.settings)

    assert free() == 3
    began = time.monotonic()
    assert [alice.connect(993, source) for _ in range(3)] == ["open"] * 3
    assert free() <= 2 * (time.monotonic() - began), "two are earned each second"
    until(lambda: free() >= 2, "two are free again")
    assert [alice.connect(993, source) for _ in range(2)] == ["open"] * 2
    assert re.match("limited: counted, the last one [0-9]s ago", firewall.explain(source)["verdicts"]["imaps"])
    until(lambda: alice.connect(993, source) != "open", "above the rate")
    told = firewall.explain(source)
    assert re.match(r"refused: banned until .* \((1h|59m5\ds) left\).*, by the rate$", told["verdicts"]["imap"])
    assert told["verdicts"]["submission"].startswith("limited: below the rate")
    assert told["banned"].keys() == {"dovecot"}
    assert told["decided_by"]["imap"] == f"set banned_dovecot_{family}"
    assert "mailfw.unban" in told["advice"][0]
    assert alice.connect(143, source) == "refused"


def test_trust_that_is_over_counts_no_more(firewall: Firewall, alice: Client) -> None:
    """Though the kernel clears it away a minute later only."""
    source = alice.ipv4[0]
    firewall.load(protection={"type": "private"}, reaction=REJECT)
    firewall.trust(source)
    assert said(firewall, source)["imaps"]
    firewall.trust(source, seconds=1)
    until(lambda: not said(firewall, source)["imaps"], "the end of the trust")
    assert alice.connect(993, source) == "refused"


def test_the_loaded_rules_decide_whatever_the_settings_say(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    firewall.load(protection={"type": "private"}, services={"sieve": False}, reaction=REJECT)
    firewall.settings = resolve({})
    assert found(alice, source) == said(firewall, source)
    assert "do not guard this port" in firewall.explain(source)["verdicts"]["sieve"]


def test_without_rules_everything_is_open(firewall: Firewall, alice: Client, family: str) -> None:
    source = alice.addresses(family)[0]
    firewall.script(protection={"type": "private"})
    assert found(alice, source) == said(firewall, source) == dict.fromkeys(PORTS, True)
    assert firewall.explain(source)["advice"][0] == "salt mx1 mailfw.apply loads the rules"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", Host.ipv4, Host.ipv6])
def test_host_itself(firewall: Firewall, host: Host, mail: MailServer, address: str) -> None:
    firewall.load(protection={"type": "private"}, reaction=REJECT)
    assert said(firewall, address) == dict.fromkeys(PORTS, True)
    with host.call(socket.create_connection, (address, 587), LIMIT, (address, 0)) as connection:
        assert connection.recv(100)


def test_who_did_it_when_and_why(firewall: Firewall, host: Host, family: str) -> None:
    """Also after the table was lost: the snapshot keeps the comments."""
    logged_in, source = {"ipv4": ("192.0.2.1", "192.0.2.9"), "ipv6": ("2001:db8:1::1", "2001:db8:9::9")}[family]
    firewall.load()
    address, known = parse.address(source), firewall.settings
    firewall.trust(logged_in)
    firewall.run(elements.trust(address, {993: 600}, known, audit.note("alice", "it's a “friend”: 50% & more")))
    firewall.run(elements.ban(address, ["postfix"], 7200, known, audit.note("bob", "")))
    firewall.run(elements.block(address, None, known, audit.note("carol", "ticket 17")))
    for _ in range(2):
        told = firewall.explain(source)
        trust = r"until \d{4}-\d\d-\d\d [\d:]{8} \((10m|9m5\ds) left\), by alice: it's a “friend”: 50% & more"
        assert re.fullmatch(trust, told["trusted"]["imaps"])
        assert re.fullmatch(r"until .*, for [\ds]+ so far, by bob", told["banned"]["postfix"])
        assert told["blocked"] == "without an end, by carol: ticket 17"
        assert told["verdicts"]["imaps"] == "refused: blocked without an end, by carol: ticket 17"
        assert firewall.explain(logged_in)["trusted"]["pop3"].endswith(
            "by a login, here or on another host of the fleet"
        )
        host.call(snapshot.save)
        script = render(known)
        firewall.run("delete table inet mailfw")
        firewall.apply(script)


def test_answer_takes_no_longer_with_many_elements_beside_steady_logins(
    firewall: Firewall, host: Host, alice: Client, family: str
) -> None:
    source = alice.addresses(family)[0]
    firewall.load(protection={"type": "private"}, reaction=REJECT)
    for start in range(0, 100_000, 20_000):
        many = (f"10.{n >> 16}.{n >> 8 & 255}.{n & 255} . 587 timeout 1d" for n in range(start, start + 20_000))
        firewall.run(f"add element inet mailfw trusted_ipv4 {{ {', '.join(many)} }}")
    firewall.trust(source)
    with logins(host, firewall):
        took = []
        for _ in range(20):
            began = time.monotonic()
            assert all(said(firewall, source).values())
            took.append(time.monotonic() - began)
        assert sorted(took)[10] < 0.1
    assert found(alice, source) == said(firewall, source)


@contextmanager
def logins(host: Host, firewall: Firewall) -> Iterator[None]:
    """People log in all the time."""
    over, made = threading.Event(), []

    def log_in() -> None:
        library = nft.Library()
        while not over.is_set():
            address = parse.address(f"172.16.{len(made) >> 8 & 255}.{len(made) & 255}")
            library.run(elements.trust(address, {993: 600}, firewall.settings))
            made.append(address)

    done = host.start(log_in)
    until(lambda: len(made) > 10, "logins")
    try:
        yield
    finally:
        over.set()
        done.result()
