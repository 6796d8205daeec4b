"""The rate by the clock: how many connections pass, and when the next one does.

Time is measured, not assumed: a bucket that is watched from outside says what must and what must not pass, however slow
the machine is.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any, Callable

import pytest

from mailfwlib import netlink, nft, parse
from support.firewall import Firewall
from support.mail import MailServer
from support.net import FAMILIES, LIMIT, Client, Net, until

PORT = 143
PORTS = [143, 993, 110, 995, 4190]
ROLES = ("postfix", "dovecot")
#: Rates with each unit, under which a connection is earned in half a second, or in 0.864 of one.
RATES = ("2/second", "120/minute", "7200/hour", "100000/day")


def seconds_each(rate: str) -> float:
    """Return the seconds in which a rate earns one connection."""
    parsed = parse.rate(rate)
    return parse.RATE_UNITS[parsed["unit"]] / parsed["count"]


class Source:
    """A source, and what is known of its bucket: the connections in it, at least and at most.

    The kernel counts at some moment of each attempt; it and this class read the same clock.
    """

    def __init__(
        self, net: Net, firewall: Firewall, family: str, rate: str, burst: int, banned: str = "banned_dovecot"
    ):
        self._host, self._firewall, self._client = net.host, firewall, net.alice
        self._banned, self._tally = f"{banned}_{family}", f"counted/imap/{family}"
        self.addresses = net.alice.addresses(family)[:1]
        self.each, self._burst = seconds_each(rate), burst
        self._least = self._most = float(burst)
        self._began = self._ended = time.monotonic()
        self._counters = {"counted": 0, "over_rate": 0}
        #: Attempts of which it was certain beforehand that they had to pass, or not to.
        self.certain: list[str] = []

    def attempt(self) -> bool:
        """Connect, and be unbanned; return whether it passed. Fails when it should not have, or should have."""
        self.addresses.append(self.addresses.pop(0))
        began = time.monotonic()
        connecting = self._client.connecting(PORT, self.addresses[0], 0.1)
        ended = self._host.call(self._when_counted)
        connecting.result(LIMIT)
        counters = self._host.call(nft.counters)
        passed = counters["over_rate"] == self._counters["over_rate"]
        self._counters = counters
        least = min(self._burst, self._least + (began - self._ended) / self.each)
        most = min(self._burst, self._most + (ended - self._began) / self.each)
        self._began, self._ended = began, ended
        if passed:
            assert most >= 1, f"passed, with {most:.2f} in the bucket"
            self._least, self._most = max(least, 1) - 1, most - 1
        else:
            assert least < 1, f"did not pass, with {least:.2f} in the bucket"
            self._least, self._most = least, min(most, 1)
            self._firewall.run(f"flush set inet mailfw {self._banned}")
        if least >= 1 or most < 1:
            self.certain.append("passes" if passed else "not")
        return passed

    def _when_counted(self) -> float:
        """Wait until the attempt under way has been counted; return when it had been."""
        kernel = netlink.Kernel()
        until(lambda: kernel.counter(self._tally) > self._counters["counted"], "counted")
        return time.monotonic()

    def spend(self) -> int:
        """Connect until it does not pass; return how often it did."""
        passed = 0
        while self.attempt():
            passed += 1
        return passed

    def wait_for(self, connections: float) -> None:
        """Wait until so many connections are in the bucket, as far as is known."""
        # The time it takes is what is being tested.
        time.sleep(max(0.0, self._ended + (connections + 0.05 - self._least) * self.each - time.monotonic()))


def watch(source: Source, plan: Callable[[], Any], passes: int, refusals: int) -> None:
    """Do what is planned, again if the machine was too slow: so many attempts had to pass, and so many not to."""
    for _ in range(4):
        plan()
        if source.certain.count("passes") >= passes and source.certain.count("not") >= refusals:
            return
    pytest.fail(f"the machine is too slow to tell: {source.certain}")


def load(firewall: Firewall, rate: str, burst: int, period: str = "1h", **more: Any) -> str:
    autoban = {"rate": rate, "burst": burst, "period": period, **more}
    return firewall.load(autoban=autoban, reaction={"banned": "reject"})


@pytest.mark.parametrize("rate", RATES)
def test_burst_and_then_the_rate(firewall: Firewall, net: Net, mail: MailServer, family: str, rate: str) -> None:
    load(firewall, rate, burst=4)
    source = Source(net, firewall, family, rate, burst=4)
    assert source.spend() >= 4

    def plan() -> None:
        source.wait_for(0.6)
        source.attempt()
        source.wait_for(1)
        assert source.attempt()
        source.attempt()
        source.wait_for(4)  # It is full then: what is known of it is exact again.
        assert source.spend() >= 4

    watch(source, plan, passes=4 + 5, refusals=2)


def test_networks_have_a_burst_and_a_rate_too(firewall: Firewall, net: Net, alice: Client, family: str) -> None:
    """Their burst is the number in the rate. Sources take turns, each far below its own rate."""
    load(firewall, "1/second", burst=100, networks={"rate": "2/second"})
    network = Source(net, firewall, family, "2/second", burst=2, banned="banned_networks_dovecot")
    network.addresses = alice.addresses(family)
    assert network.spend() >= 2

    def plan() -> None:
        network.wait_for(0.7)
        network.attempt()
        network.wait_for(1)
        assert network.attempt()
        network.attempt()
        network.wait_for(2)
        network.spend()

    watch(network, plan, passes=2 + 3, refusals=2)


def test_bucket_holds_no_more_than_the_burst(firewall: Firewall, net: Net, mail: MailServer, family: str) -> None:
    load(firewall, "2/second", burst=2)
    source = Source(net, firewall, family, "2/second", burst=2)
    source.spend()

    def plan() -> None:
        source.certain.clear()
        source.wait_for(4)
        assert source.spend() >= 2

    watch(source, plan, passes=2, refusals=1)


def test_source_that_does_not_stop_gets_the_rate(firewall: Firewall, net: Net, mail: MailServer, family: str) -> None:
    """Attempts above the rate take nothing out of the bucket: what is earned meanwhile passes."""
    load(firewall, "120/minute", burst=1)
    source = Source(net, firewall, family, "120/minute", burst=1)
    assert source.attempt()
    watch(source, lambda: until(source.attempt, "the next one passes"), passes=1, refusals=2)


def test_ban_spends_nothing(firewall: Firewall, net: Net, alice: Client, family: str) -> None:
    """Connections that a ban refuses are not counted, so the bucket fills while it lasts."""
    load(firewall, "60/minute", burst=2)
    source = Source(net, firewall, family, "60/minute", burst=2)
    source.spend()
    address = source.addresses[0]
    firewall.ban(address)
    counted = firewall.counter("counted")
    for _ in range(5):
        assert alice.connect(PORT, address) == "refused"
    assert firewall.counter("counted") == counted
    source.wait_for(1)
    firewall.unban(address)
    assert source.attempt()


def test_ban_lasts_for_the_period_on_every_port_of_the_role(
    firewall: Firewall, alice: Client, mallory: Client, family: str
) -> None:
    """Trying on does not prolong it, and nobody else notices anything."""
    load(firewall, "2/second", burst=8, period="3s")
    source, *_, stranger = alice.addresses(family)
    bystanders = [(alice, stranger), (mallory, mallory.addresses(family)[0])]
    while not firewall.counter("over_rate"):
        began = time.monotonic()
        alice.connect(PORT, source, 0.2)
        ended = time.monotonic()
    assert alice.connect_many(PORTS, source) == dict.fromkeys(PORTS, "refused")
    assert [client.connect(PORT, address) for client, address in bystanders] == ["open"] * 2
    last_refused, tried = began, time.monotonic()
    while alice.connect(PORT, source) == "refused":
        last_refused, tried = tried, time.monotonic()
    # The kernel counts timeouts in jiffies, of up to 10 ms.
    assert time.monotonic() - began >= 2.97
    assert last_refused - ended <= 3.03
    assert alice.connect_many(PORTS, source) == dict.fromkeys(PORTS, "open")


def timeout(firewall: Firewall, name: str) -> int:
    """Return the seconds after which a set forgets what it was not asked about."""
    listed = json.loads(firewall.nft("-j", "-t", "list", "set", *nft.TABLE.split(), name))
    return next(entry["set"]["timeout"] for entry in listed["nftables"] if "set" in entry)


@pytest.mark.parametrize(
    ("rate", "burst", "seconds"),
    [
        ("2/second", 4, 60),
        ("120/minute", 10_000, 5000),
        ("10/minute", 20, 120),
        ("7/hour", 3, 1543),
        ("1/hour", 20, 72000),
        ("1/day", 30, 30 * 86400),
        ("100000/day", 1, 60),
    ],
)
def test_bucket_is_kept_until_it_is_full_again(firewall: Firewall, rate: str, burst: int, seconds: int) -> None:
    """One that is forgotten earlier would be full too early."""
    load(firewall, rate, burst, networks={"rate": "7/hour"})
    assert seconds >= burst * seconds_each(rate)
    for role, address_family in itertools.product(ROLES, FAMILIES):
        assert timeout(firewall, f"rate_{role}_{address_family}") == seconds
        assert timeout(firewall, f"network_rate_{role}_{address_family}") == 3600


def test_year_is_the_longest_that_a_bucket_is_kept(firewall: Firewall) -> None:
    load(firewall, "1/day", 10_000)
    assert timeout(firewall, "rate_dovecot_ipv4") == parse.LONGEST


def test_time_of_a_bucket_begins_anew_with_every_connection(
    firewall: Firewall, net: Net, mail: MailServer, family: str
) -> None:
    """The third one, which is above the rate, too."""
    load(firewall, "1/hour", burst=2)
    source = Source(net, firewall, family, "1/hour", burst=2)

    def left() -> float:
        (seconds,) = firewall.elements(f"rate_dovecot_{family}").values()
        return seconds

    assert source.attempt()
    for passes in (True, False):
        before = until(lambda: left() < 7198 and left(), "two seconds have passed")
        assert source.attempt() is passes
        assert left() > before


def shortened(script: str, seconds: int) -> str:
    """Return rules whose meters of dovecot's sources forget after some seconds."""
    meter = r"(set rate_dovecot_ipv[46] \{[^}]*timeout )60s"
    found, count = re.subn(meter, rf"\g<1>{seconds}s", script)
    assert count == 2
    return found


@pytest.mark.parametrize(("seconds", "early"), [(2, False), (1, True)])
def test_time_that_is_just_enough(
    firewall: Firewall, net: Net, mail: MailServer, family: str, seconds: int, early: bool
) -> None:
    """Four connections at two per second are two seconds: what is forgotten then was full anyway."""
    autoban = {"rate": "2/second", "burst": 4}
    firewall.apply(shortened(firewall.script(autoban=autoban, reaction={"banned": "reject"}), seconds))
    source = Source(net, firewall, family, "2/second", burst=4)
    source.spend()

    def wait_and_spend(times: int) -> None:
        for _ in range(times):
            source.wait_for(2.6)
            assert source.spend() >= 2

    if early:
        with pytest.raises(AssertionError, match=r"^passed, with 0\.\d+ in the bucket"):
            wait_and_spend(times=4)  # again if the machine was too slow to tell
    else:
        wait_and_spend(times=1)


def test_roles_have_buckets_of_their_own(firewall: Firewall, alice: Client, family: str) -> None:
    load(firewall, "1/hour", burst=3)
    source = alice.addresses(family)[0]
    assert [alice.connect(port, source) for port in (143, 587) * 3] == ["open"] * 6
    assert alice.connect(143, source) == "silent"
    assert alice.connect(465, source) == "silent"
