"""A minion that mailfw has never been on, and the first state.apply there."""

import itertools
from collections.abc import Iterator

import pytest

from integration.fleet import Fleet, MailHost

#: A master takes no second key from a minion that it knows.
names = (f"new{number}" for number in itertools.count(1))


@pytest.fixture
def newcomer(fleet: Fleet) -> Iterator[MailHost]:
    """A mail host that mailfw has never been on."""
    with fleet.mail_host(next(names)) as host:
        assert fleet.call(host, "sys.list_functions", "mailfw") == []
        yield host


def is_untouched(host: MailHost) -> bool:
    """Return whether mailfw has left nothing on a host."""
    places = ("/etc/mailfw", "/etc/nftables.d", "/usr/lib/mailfw", "/run/mailfw")
    return not host.host.ruleset() and not any(host.host.path(place).exists() for place in places)


def test_one_run_brings_everything_and_a_second_finds_nothing_to_do(fleet: Fleet, newcomer: MailHost) -> None:
    first = fleet.apply(newcomer)
    assert not first.failed
    assert "table inet mailfw" in newcomer.host.ruleset()
    assert first["mailfw ruleset is loaded"]["changes"]["files"] == ["base.nft", "dovecot.nft", "postfix.nft"]
    assert newcomer.host.path("/etc/mailfw/settings.json").stat().st_mode & 0o777 == 0o600
    assert newcomer.host.path("/usr/lib/mailfw/login-hook").stat().st_mode & 0o777 == 0o755

    second = fleet.apply(newcomer)
    assert not second.failed
    assert not second.changed


def test_a_host_whose_pillar_never_said_anything_has_the_defaults(fleet: Fleet, newcomer: MailHost) -> None:
    fleet.write_whole_pillar(newcomer.name, {})
    assert not fleet.apply(newcomer).failed
    second = fleet.apply(newcomer)
    assert not second.failed
    assert not second.changed


def test_a_test_run_says_what_it_cannot_know_and_leaves_nothing(fleet: Fleet, newcomer: MailHost) -> None:
    applied = fleet.apply(newcomer, test=True)
    assert not applied.failed
    assert "not known yet" in applied["mailfw is new to this minion"]["comment"]
    assert is_untouched(newcomer)
    assert fleet.call(newcomer, "sys.list_functions", "mailfw") == []


def test_a_wrong_pillar_is_reported_whole_and_nothing_is_loaded(fleet: Fleet, newcomer: MailHost) -> None:
    fleet.write_pillar(
        newcomer.name,
        protection={"type": "autobahn"},
        autoban={"rate": "10/fortnight", "perod": "1h"},
        trusted={"networks_ipv4": ["192.0.2.1/24", "2001:db8::/48"]},
    )
    applied = fleet.apply(newcomer)
    problems = applied["mailfw settings are valid"]["comment"]
    for path in (
        "mailfw:protection:type",
        "mailfw:autoban:rate",
        "mailfw:autoban:perod",
        "mailfw:trusted:networks_ipv4[0]",
        "mailfw:trusted:networks_ipv4[1]",
    ):
        assert path in problems
    assert fleet.key not in problems
    assert applied.failed.keys() >= {
        "mailfw settings are valid",
        "mailfw ruleset is loaded",
        "mailfw settings are saved",
    }
    assert is_untouched(newcomer)
