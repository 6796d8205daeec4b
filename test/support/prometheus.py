"""Debian's node_exporter on the mail host, as it would be there, and a Prometheus: what that answers."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from support.net import LIMIT, REPOSITORY, Namespace, until

#: Where test/install-packages has put the programs.
PROGRAMS = Path(os.environ.get("MAILFW_CACHE", "/var/cache/mailfw")) / "prometheus/usr/bin"
#: Where Prometheus listens.
SERVER = "127.0.0.1:9090"


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool, which says on its standard output what is wrong."""
    return subprocess.run(
        [PROGRAMS / "promtool", *arguments], input=text, capture_output=True, text=True, check=False, timeout=LIMIT
    )


class Prometheus:
    """node_exporter with the text files of a directory, and a Prometheus that asks it every second.

    ``host``: where node_exporter runs, at ``address``. ``server``: where Prometheus runs, its files in ``directory``.
    """

    def __init__(self, host: Namespace, address: str, textfiles: str, server: Namespace, directory: Path):
        self._server = server
        self._processes: list[subprocess.Popen[bytes]] = []
        exporter = f"{address}:9100"
        configuration = directory / "prometheus.yml"
        asked = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(REPOSITORY / "mailfw/monitoring/alerts.yml")],
            "scrape_configs": [{"job_name": "node", "static_configs": [{"targets": [exporter]}]}],
        }
        configuration.write_text(json.dumps(asked), encoding="utf-8")  # JSON is YAML
        self._log = directory / "prometheus.log"
        collector = (
            "--collector.disable-defaults",
            "--collector.textfile",
            f"--collector.textfile.directory={textfiles}",
        )
        self._start(host, "prometheus-node-exporter", f"--web.listen-address={exporter}", *collector)
        storage = f"--storage.tsdb.path={directory / 'tsdb'}"
        self._start(server, "prometheus", f"--web.listen-address={SERVER}", f"--config.file={configuration}", storage)
        until(lambda: self.query("up == 1"), "Prometheus has asked node_exporter")

    def _start(self, place: Namespace, program: str, *arguments: str) -> None:
        # If the thread that has started it ends, with the test run or without, the process ends as well.
        command = ["setpriv", "--pdeathsig", "KILL", str(PROGRAMS / program), *arguments]
        with self._log.open("ab") as log:
            self._processes.append(place.call(subprocess.Popen, command, stdout=log, stderr=log))

    def _get(self, path: str) -> Any:
        try:
            with self._server.call(urllib.request.urlopen, f"http://{SERVER}/api/v1/{path}", timeout=LIMIT) as answer:
                return json.load(answer)["data"]
        except OSError:  # It does not listen yet.
            return {}

    def query(self, expression: str) -> dict[str, float]:
        """Return the value of each series that an expression gives now: its labels, but the scrape's own, -> value."""
        found = self._get("query?" + urllib.parse.urlencode({"query": expression})).get("result", [])
        return {_labels(one["metric"]): float(one["value"][1]) for one in found}

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        alerts = self._get("alerts").get("alerts", [])
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}

    def close(self) -> None:
        """End both."""
        for process in self._processes:
            process.kill()
            process.wait()


def _labels(labels: dict[str, str]) -> str:
    return " ".join(f"{name}={labels[name]}" for name in sorted(labels) if name not in ("__name__", "instance", "job"))
