"""mailfw.clean removes mailfw, and mail goes on. The last of the system tests: it leaves mx2 without mailfw."""

from __future__ import annotations

from support import lab
from support.lab import ADDRESSES

TRACES = (
    "/etc/mailfw",
    "/etc/nftables.d/mailfw",
    "/usr/lib/mailfw",
    "/run/mailfw",
    "/etc/dovecot/conf.d/99-mailfw.conf",
    "/etc/systemd/system/mailfw.service",
    "/etc/systemd/system/mailfw-agent.service",
    "/etc/systemd/system/mailfw-agent.socket",
)


def test_clean_removes_everything_and_logins_go_on(fleet):
    lab.states("mx2", "state.apply", "mailfw.clean")
    assert "mailfw" not in lab.run("mx2", "nft", "list", "tables")
    assert lab.run("mx2", "sh", "-c", f"ls -d {' '.join(TRACES)} 2>/dev/null", check=False) == ""
    assert lab.run("mx2", "systemctl", "list-units", "--all", "--no-legend", "mailfw*") == ""
    assert lab.client("home", "login", address=ADDRESSES["mx2"][0])["seconds"] < 3
    assert lab.states("mx2", "state.apply", "mailfw")
