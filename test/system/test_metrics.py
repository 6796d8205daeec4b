"""The agent, as systemd confines it, writes metrics as soon as there is a node_exporter."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from mailfwlib.settings import METRICS_DIRECTORY
from support import lab
from support.prometheus import Prometheus

from .conftest import on_both_hosts

FILE = f"{METRICS_DIRECTORY}/mailfw.prom"


@on_both_hosts
def test_metrics_are_written_once_node_exporter_is_there(fleet, host):
    """Though the agent was started before its directory was there; mailfw.clean takes the file away."""
    assert lab.run(host, "find", "/var/lib/prometheus", check=False) == ""
    lab.run(host, "mkdir", "-p", METRICS_DIRECTORY)
    try:
        lab.wait_until(lambda: "mailfw_rules_loaded 1\n" in lab.run(host, "cat", FILE, check=False), "it is written")
        assert lab.run(host, "stat", "-c", "%a %U", FILE) == "644 root\n"
        restarts = lab.run(host, "systemctl", "show", "-P", "NRestarts", "mailfw-agent")
        written = lab.run(host, "stat", "-c", "%Y", FILE)
        lab.wait_until(lambda: lab.run(host, "stat", "-c", "%Y", FILE) != written, "it is written again")
        assert lab.run(host, "systemctl", "show", "-P", "NRestarts", "mailfw-agent") == restarts
        # As a package does that is installed again.
        lab.run(host, "sh", "-c", f"rm -r {METRICS_DIRECTORY} && mkdir {METRICS_DIRECTORY}")
        lab.wait_until(lambda: "mailfw_rules_loaded 1\n" in lab.run(host, "cat", FILE, check=False), "it is written")
        removed = lab.salt(host, "state.sls_id", "mailfw agent is removed", "mailfw.agent.clean", "test=True")[host]
        assert FILE in str(removed)
    finally:
        lab.run(host, "rm", "-r", "/var/lib/prometheus")


def test_prometheus_elsewhere_asks_a_host(fleet, tmp_path: Path) -> None:
    """node_exporter runs in the network of mx1 and reads its text files; Prometheus is somewhere in the network."""
    lab.run("mx1", "mkdir", "-p", METRICS_DIRECTORY)
    boot = lab.lab("pid", "mx1").stdout.strip()
    try:
        with (
            closing(lab.network("mx1")) as host,
            closing(lab.network("home")) as home,
            closing(
                Prometheus(host, lab.ADDRESSES["mx1"][0], f"/proc/{boot}/root{METRICS_DIRECTORY}", home, tmp_path)
            ) as prometheus,
        ):
            lab.wait_until(lambda: prometheus.query("mailfw_rules_loaded == 1"), "the host's figures are there")
            logins = prometheus.query("mailfw_logins_total")
            lab.client("cafe", "login", address=lab.ADDRESSES["mx1"][0])
            lab.wait_until(lambda: prometheus.query("mailfw_logins_total") != logins, "a login is counted", 30)
            assert prometheus.firing() == set()
    finally:
        lab.run("mx1", "rm", "-r", "/var/lib/prometheus")
