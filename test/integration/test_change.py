"""Changes of the pillar and of the templates on a host where people are trusted."""

import json

from integration.fleet import Applied, Fleet, MailHost, wait_until_trusted

BROKEN = "table inet mailfw {\n\tchain dovecot_protected {\n\t\ttcp dport 143 acept\n\t}\n}\n"


def difference(applied: Applied) -> str:
    """Return the diff of the ruleset that a state run reports."""
    return applied["mailfw ruleset is loaded"]["changes"]["diff"]


def test_a_change_of_the_mode_shows_a_diff_and_keeps_who_is_trusted(fleet: Fleet, mx1: MailHost) -> None:
    address, banned = fleet.new_address(), fleet.new_address()
    mx1.agent.login(address)
    fleet.call(mx1, "mailfw.ban", banned)
    before, trusted = mx1.host.ruleset(), mx1.host.trusted()
    with fleet.pillar(mx1, protection={"type": "protected"}):
        tested = fleet.apply(mx1, test=True)
        assert tested["mailfw ruleset is loaded"]["result"] is None
        assert "postfix_protected" in difference(tested)
        assert mx1.host.ruleset() == before
        assert mx1.agent.status()["mode"] == "autoban"

        applied = fleet.apply(mx1)
        assert not applied.failed
        assert difference(applied) == difference(tested)
        assert "587 : goto postfix_protected" in mx1.host.nft("list", "map", "inet", "mailfw", "services")
        assert mx1.host.trusted().keys() == trusted.keys()
        assert fleet.call(mx1, "mailfw.list", "banned", role="dovecot", network=banned)["of"] == 1
        assert mx1.agent.status()["mode"] == "protected"
        assert "accepted: trusted" in fleet.call(mx1, "mailfw.check", address)["services"]["submission"]
        assert "refused" in fleet.call(mx1, "mailfw.check", fleet.new_address())["services"]["submission"]
    assert mx1.host.ruleset() == before
    assert mx1.trusts(address)


def test_a_template_that_nft_refuses_leaves_the_running_ruleset(fleet: Fleet, mx1: MailHost) -> None:
    before = mx1.host.ruleset()
    files = {path.name: path.read_text() for path in mx1.host.path("/etc/nftables.d/mailfw").iterdir()}
    template = "mailfw/dovecot/nftables/protected.nft.jinja"
    with fleet.pillar(mx1, protection={"type": "protected"}), fleet.overlay(template, BROKEN):
        applied = fleet.apply(mx1)
        assert "acept" in applied.failed["mailfw ruleset is loaded"]
        assert "syntax error" in applied.failed["mailfw ruleset is loaded"]
        assert "mailfw settings are saved" in applied.failed
        assert mx1.host.ruleset() == before
        assert {path.name: path.read_text() for path in mx1.host.path("/etc/nftables.d/mailfw").iterdir()} == files
        assert mx1.agent.status()["mode"] == "autoban"


def test_a_wrong_pillar_leaves_the_running_ruleset_and_its_settings(fleet: Fleet, mx1: MailHost) -> None:
    before = mx1.host.ruleset()
    settings = mx1.host.path("/etc/mailfw/settings.json").read_text()
    with fleet.pillar(mx1, protection={"type": "private"}, enforce="perhaps"):
        applied = fleet.apply(mx1)
        assert "mailfw:enforce: 'perhaps'" in applied.failed["mailfw settings are valid"]
        assert mx1.host.ruleset() == before
        assert mx1.host.path("/etc/mailfw/settings.json").read_text() == settings


def test_a_lost_pillar_opens_nothing(fleet: Fleet, mx1: MailHost) -> None:
    """A minion with a new name, or in another pillarenv, matches nothing in the pillar's top file any more."""
    blocked = {"networks_ipv4": ["192.0.2.0/24"]}
    with fleet.pillar(mx1, protection={"type": "private"}, blocked=blocked):
        assert not fleet.apply(mx1).failed
        before = mx1.host.ruleset()
        settings = mx1.host.path("/etc/mailfw/settings.json").read_text()
        fleet.write_whole_pillar("mx1", {})
        for test in (True, False):
            applied = fleet.apply(mx1, test=test)
            said = applied.failed["mailfw settings are valid"]
            assert said.startswith("mailfw: this minion's pillar has no such key any more, so nothing was changed")
            assert "write `mailfw: {}` if the defaults are meant" in said
            assert not applied.changed
        assert mx1.host.ruleset() == before
        assert mx1.host.path("/etc/mailfw/settings.json").read_text() == settings
        assert fleet.call(mx1, "mailfw.render").startswith("ERROR: mailfw: this minion's pillar has no such key")
        # What needs no pillar goes on.
        mx1.host.nft("flush", "set", "inet", "mailfw", "blocked_networks_ipv4")
        fleet.call(mx1, "mailfw.apply")
        assert mx1.host.ruleset() == before

        for defaults in ({}, None):
            fleet.write_whole_pillar("mx1", {"mailfw": defaults})
            assert not fleet.apply(mx1).failed
            assert "587 : goto postfix_autoban" in mx1.host.nft("list", "map", "inet", "mailfw", "services")


def test_the_fleets_trust_follows_each_hosts_own_pillar(fleet: Fleet, mx1: MailHost, mx2: MailHost) -> None:
    address, refused = fleet.new_address(), fleet.new_address()
    with fleet.pillar(mx2, trusted={"period": "2h", "never": [refused]}, roles=["postfix"]):
        assert not fleet.apply(mx2).failed
        mx1.agent.login(refused)
        mx1.agent.login(address)
        wait_until_trusted(address, mx2)
        found = mx2.host.trusted()
        assert found[address].keys() == {587, 465}
        assert all(7190 <= left <= 7200 for left in found[address].values())
        assert refused not in found


def test_settings_hold_what_the_agent_needs(fleet: Fleet, mx1: MailHost) -> None:
    host = json.loads(mx1.host.path("/etc/mailfw/settings.json").read_text())["host"]
    assert host["id"] == "mx1"
    assert host["login_users"] == ["dovecot"]
    assert host["salt_helper"][1:] == ["/usr/lib/mailfw/salt_helper.py", str(mx1.minion.config_dir)]
