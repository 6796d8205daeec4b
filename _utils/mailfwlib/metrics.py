"""Metrics: what there is to know of a host's firewall in numbers, as text that Prometheus reads.

The format is https://prometheus.io/docs/instrumenting/exposition_formats/; node_exporter's textfile collector takes
the file. ``docs/metrics.md`` has the table of :data:`METRICS`, and ``mailfw/monitoring/`` what to make of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from mailfwlib import breakglass, netlink, rules
from mailfwlib.settings import Settings

#: The name of the file, in the directory of the settings.
FILE = "mailfw.prom"


class Metric(NamedTuple):
    """A metric: its type in Prometheus's words, what it says, and the labels that its values may have."""

    kind: str
    meaning: str
    labels: tuple[str, ...] = ()


METRICS = {
    "mailfw_agent_info": Metric("gauge", "1, with the agent's version and the host's mode", ("version", "mode")),
    "mailfw_agent_start_time_seconds": Metric("gauge", "when the agent was started, in Unix time"),
    "mailfw_written_timestamp_seconds": Metric(
        "gauge", "when the agent looked at what it has written here, in Unix time"
    ),
    "mailfw_look_duration_seconds": Metric("gauge", "processor time that the look before took"),
    "mailfw_enforcing": Metric("gauge", "1 when sources are refused, 0 with mailfw:enforce false"),
    "mailfw_rules_wanted": Metric("gauge", "1 unless the rules were taken away on purpose, or never loaded"),
    "mailfw_rules_loaded": Metric("gauge", "1 when the table inet mailfw is loaded"),
    "mailfw_rules_altered": Metric("gauge", "1 when what is loaded is not what was applied last"),
    "mailfw_rules_applied_timestamp_seconds": Metric("gauge", "when rules were applied last, in Unix time"),
    "mailfw_rules_applies_total": Metric("counter", "how often rules were applied, repairs included, since the boot"),
    "mailfw_rules_heals_total": Metric("counter", "how often the agent has repaired rules that somebody altered"),
    "mailfw_open_for_everyone": Metric("gauge", "1 while mailfw-open has every guarded port open"),
    "mailfw_open_until_timestamp_seconds": Metric("gauge", "when that ends, in Unix time; 0 when it is not so"),
    "mailfw_snapshot_timestamp_seconds": Metric("gauge", "when the last snapshot was taken, in Unix time; 0 for never"),
    "mailfw_decisions_total": Metric(
        "counter",
        "packets that were decided on; role, service and family are there for the verdicts "
        + ", ".join(rules.TALLIED)
        + ", and are empty for those that must cost nothing",
        ("verdict", "role", "service", "family"),
    ),
    "mailfw_no_room_total": Metric(
        "counter", "packets of sources that did not fit into a set: rates (of a meter) or bans", ("kind",)
    ),
    "mailfw_set_elements": Metric("gauge", "elements of a set", ("set",)),
    "mailfw_set_size": Metric("gauge", "elements that a set takes at most", ("set",)),
    "mailfw_logins_total": Metric("counter", "logins on this host that made their address trusted"),
    "mailfw_logins_announced_total": Metric("counter", "logins on this host that were news for the fleet"),
    "mailfw_outbox_logins": Metric("gauge", "announced logins whose echo has not come back yet"),
    "mailfw_outbox_dropped_total": Metric("counter", "announced logins that were dropped from a full outbox"),
    "mailfw_last_echo_timestamp_seconds": Metric("gauge", "when the last echo came, in Unix time; 0 for never"),
    "mailfw_messages_received_total": Metric("counter", "signed messages of the fleet that were believed"),
    "mailfw_messages_refused_total": Metric("counter", "messages that were not believed"),
    "mailfw_familiar_addresses": Metric("gauge", "addresses (IPv6: /64) that have logged in within 30 days"),
    "mailfw_familiar_refused": Metric(
        "gauge", "familiar addresses that are refused now, at two looks in a row: the figure to page on", ("reason",)
    ),
    "mailfw_familiar_refusals_total": Metric(
        "counter", "how often a familiar address began to be refused", ("reason",)
    ),
}

#: Verdicts that are counted for the whole host only: the name of the counter is that of the verdict.
PLAIN = (
    "opened",
    "trusted",
    "trusted_network",
    "exempted",
    "over_common_rate",
    "reopened",
    "unanswerable",
    "break_glass",
)
#: Counters of sources that did not fit -> the label ``kind``.
NO_ROOM = {"meter_full": "rates", "ban_set_full": "bans"}
#: Sets whose fill says nothing.
NOT_SHOWN = ("older_", "break_glass")


class Sample(NamedTuple):
    """A value of a metric, with its labels."""

    name: str
    value: float
    labels: dict[str, str]


@dataclass
class Facts:
    """What is known of a host at a moment. Times are Unix time, None for never."""

    now: float
    seconds: float
    started: float
    settings: Settings
    agent: dict[str, Any]
    counters: dict[str, int]
    levels: dict[str, netlink.Level]
    altered: bool
    applies: int
    applied: Optional[float]
    opening: Optional[breakglass.Opening]
    snapshot: Optional[float]
    familiar: int
    refused: dict[str, int]
    refusals: dict[str, int]


def samples(facts: Facts) -> Iterator[Sample]:
    """Yield the values of all metrics; of a host without rules, no decisions and sets."""
    single = {
        "agent_start_time_seconds": facts.started,
        "written_timestamp_seconds": facts.now,
        "look_duration_seconds": facts.seconds,
        "enforcing": facts.settings["enforce"],
        "rules_wanted": facts.applied is not None,
        "rules_loaded": bool(facts.counters),
        "rules_altered": facts.altered,
        "rules_applied_timestamp_seconds": facts.applied or 0,
        "rules_applies_total": facts.applies,
        "rules_heals_total": facts.agent["heals"],
        "open_for_everyone": facts.opening is not None,
        "open_until_timestamp_seconds": facts.opening.ends if facts.opening else 0,
        "snapshot_timestamp_seconds": facts.snapshot or 0,
        "logins_total": facts.agent["logins"],
        "logins_announced_total": facts.agent["announced"],
        "outbox_logins": facts.agent["outbox"],
        "outbox_dropped_total": facts.agent["dropped"],
        "last_echo_timestamp_seconds": facts.agent["last_echo"] or 0,
        "messages_received_total": facts.agent["received"],
        "messages_refused_total": facts.agent["refused"],
        "familiar_addresses": facts.familiar,
    }
    info = {"version": facts.agent["version"], "mode": facts.agent["mode"]}
    yield Sample("mailfw_agent_info", 1, info)
    for name, value in single.items():
        yield Sample(f"mailfw_{name}", float(value), {})
    for reason, count in facts.refused.items():
        yield Sample("mailfw_familiar_refused", count, {"reason": reason})
    for reason, count in facts.refusals.items():
        yield Sample("mailfw_familiar_refusals_total", count, {"reason": reason})
    yield from _decisions(facts)
    for name, level in facts.levels.items():
        if not name.startswith(NOT_SHOWN):
            yield Sample("mailfw_set_size", level.size, {"set": name})
            if level.elements is not None:
                yield Sample("mailfw_set_elements", level.elements, {"set": name})


def _decisions(facts: Facts) -> Iterator[Sample]:
    roles = {service["name"]: service["role"] for service in facts.settings["services"]}
    for name, packets in facts.counters.items():
        verdict, _, rest = name.partition("/")
        if rest:
            service, _, family = rest.partition("/")
            where = {"role": roles.get(service, ""), "service": service, "family": family}
            yield Sample("mailfw_decisions_total", packets, {"verdict": verdict, **where})
        elif name in NO_ROOM:
            yield Sample("mailfw_no_room_total", packets, {"kind": NO_ROOM[name]})
        elif name in PLAIN:
            yield Sample("mailfw_decisions_total", packets, {"verdict": verdict})


def render(found: Iterable[Sample]) -> str:
    """Return values as Prometheus reads them: those of a metric together, after what it is."""
    by_name: dict[str, list[Sample]] = {}
    for sample in found:
        by_name.setdefault(sample.name, []).append(sample)
    lines = []
    for name, metric in METRICS.items():
        if name in by_name:
            lines.append(f"# HELP {name} {_escaped(metric.meaning)}")
            lines.append(f"# TYPE {name} {metric.kind}")
            lines += map(_line, by_name[name])
    return "\n".join(lines) + "\n"


def _line(sample: Sample) -> str:
    labels = ",".join(f'{name}="{_quotable(value)}"' for name, value in sample.labels.items())
    return f"{sample.name}{{{labels}}} {_number(sample.value)}" if labels else f"{sample.name} {_number(sample.value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quotable(text: str) -> str:
    return _escaped(text).replace('"', '\\"')


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
