import json
import re

import pytest
import yaml

from mailfwlib import breakglass, metrics, netlink, settings
from mailfwlib.metrics import METRICS, Facts, Sample


@pytest.fixture
def facts():
    agent = dict.fromkeys(("heals", "logins", "announced", "outbox", "dropped", "received", "refused"), 3)
    return Facts(
        now=1000.5,
        seconds=0.01,
        started=900.0,
        settings=settings.resolve({"services": {"pop3": False}}),
        agent={**agent, "last_echo": None, "version": "0", "mode": "autoban"},
        counters={
            "banned": 7,
            "banned/imap/ipv6": 7,
            "banned/gone/ipv4": 1,
            "trusted": 5,
            "meter_full": 2,
            "unknown": 1,
        },
        levels={
            "trusted_ipv4": netlink.Level(9, 10),
            "rate_dovecot_ipv4": netlink.Level(None, 20),
            "older_ipv4": netlink.Level(5, 6),
            "break_glass": netlink.Level(1, 1),
        },
        altered=False,
        applies=4,
        applied=800.0,
        opening=breakglass.Opening(2000, "why"),
        snapshot=None,
        familiar=12,
        refused={"banned": 1},
        refusals={"banned": 2},
    )


def test_text_is_what_prometheus_reads(facts):
    text = metrics.render(metrics.samples(facts))
    lines = text.splitlines()
    assert text.endswith("\n")
    assert 'mailfw_decisions_total{verdict="banned",role="dovecot",service="imap",family="ipv6"} 7' in lines
    assert 'mailfw_decisions_total{verdict="trusted"} 5' in lines
    # A total that is told by service is not told twice.
    assert not [line for line in lines if 'verdict="banned"}' in line or "unknown" in line]
    assert 'mailfw_no_room_total{kind="rates"} 2' in lines
    assert [line for line in lines if line.startswith("mailfw_set_")] == [
        'mailfw_set_elements{set="trusted_ipv4"} 9',
        'mailfw_set_size{set="trusted_ipv4"} 10',
        'mailfw_set_size{set="rate_dovecot_ipv4"} 20',
    ]
    for line in (
        "mailfw_written_timestamp_seconds 1000.5",
        "mailfw_last_echo_timestamp_seconds 0",
        "mailfw_open_until_timestamp_seconds 2000",
        "mailfw_rules_wanted 1",
        'mailfw_familiar_refused{reason="banned"} 1',
    ):
        assert line in lines
    assert lines.count("# TYPE mailfw_decisions_total counter") == 1


def test_label_values_cannot_end_their_line():
    hostile = 'a"} 1\nmailfw_enforcing 0\\'
    text = metrics.render([Sample("mailfw_agent_info", 1, {"version": hostile, "mode": ""})])
    assert text.splitlines()[2:] == ['mailfw_agent_info{version="a\\"} 1\\nmailfw_enforcing 0\\\\",mode=""} 1']


def test_every_metric_has_a_value_its_type_and_its_labels(facts):
    found = list(metrics.samples(facts))
    assert {sample.name for sample in found} == METRICS.keys()
    for name, metric in METRICS.items():
        assert metric.kind == ("counter" if name.endswith("_total") else "gauge")
        assert re.fullmatch(r"mailfw_[a-z_]+", name)
        assert all(set(sample.labels) <= set(metric.labels) for sample in found if sample.name == name)


def test_manual_has_every_metric(root):
    rows = re.findall(
        r"^\| `(mailfw_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", (root / "docs/metrics.md").read_text(), re.M
    )
    assert rows == [
        (name, metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.meaning)
        for name, metric in METRICS.items()
    ]


def test_manual_has_every_alert(root):
    (group,) = yaml.safe_load((root / "mailfw/monitoring/alerts.yml").read_text())["groups"]
    wanted = [(rule["alert"], rule["labels"]["severity"]) for rule in group["rules"]]
    assert re.findall(r"^\| `(Mailfw\w+)` \| (\w+) \|", (root / "docs/metrics.md").read_text(), re.M) == wanted


BAD = [
    "",
    "metrics",
    "metrics/text",
    "/",
    "/srv/",
    "/srv//text",
    "/srv/../etc",
    "/srv/te xt",
    "/srv/%i",
    "/srv/a\nb",
    5,
    None,
]


@pytest.mark.parametrize("directory", BAD, ids=repr)
def test_directory_is_one_that_a_unit_can_name(directory):
    with pytest.raises(settings.SettingsError, match=r"mailfw:metrics:directory: .*expected the absolute path"):
        settings.resolve({"metrics": {"directory": directory}})
    assert settings.resolve({"metrics": {"directory": "/srv/a_b/c-1.d"}})["metrics"]["directory"] == "/srv/a_b/c-1.d"


def known(expression):
    """Return whether an expression names metrics of this host only, with the labels that they have."""
    names = set(re.findall(r"\bmailfw_\w+", expression))
    labels = {label for name in names if name in METRICS for label in METRICS[name].labels} | {"instance", "job"}
    used = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    used += [one for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression) for one in re.findall(r"\w+", group)]
    return bool(names) and names <= METRICS.keys() and set(used) <= labels


def test_alerts_ask_for_what_is_written(root):
    (group,) = yaml.safe_load((root / "mailfw/monitoring/alerts.yml").read_text())["groups"]
    assert [rule["alert"] for rule in group["rules"] if not known(rule["expr"])] == []
    tested = (root / "mailfw/monitoring/alerts_test.yml").read_text()
    assert [rule["alert"] for rule in group["rules"] if rule["alert"] not in tested] == []


@pytest.fixture(scope="module")
def dashboard(root):
    return json.loads((root / "mailfw/monitoring/dashboard.json").read_text())


def test_dashboard_asks_for_what_is_written(dashboard):
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert [query for query in queries if not known(query)] == []
    named = {name for query in queries for name in re.findall(r"\bmailfw_\w+", query)}
    # What is left is for alerts, or for people who ask.
    assert METRICS.keys() - named == {
        "mailfw_agent_info",
        "mailfw_rules_wanted",
        "mailfw_rules_applied_timestamp_seconds",
        "mailfw_open_until_timestamp_seconds",
    }


def test_dashboard_takes_any_prometheus_and_no_two_panels_are_in_one_place(dashboard):
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert dashboard["id"] is None
    places = set()
    for panel in dashboard["panels"]:
        spot = panel["gridPos"]
        cells = {
            (x, y) for x in range(spot["x"], spot["x"] + spot["w"]) for y in range(spot["y"], spot["y"] + spot["h"])
        }
        assert spot["x"] + spot["w"] <= 24
        assert not places & cells
        places |= cells
        if panel["type"] != "row":
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
            for target in panel["targets"]:
                assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= variables.keys() | {"__rate_interval"}
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
