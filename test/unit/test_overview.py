"""A host in one row, and the table of all hosts."""

import pytest

from mailfwlib import overview, settings

HOUR = 3600.0


@pytest.mark.parametrize(
    ("loaded", "is_open", "pillar", "expected"),
    [
        (False, "", {}, "NOT LOADED"),
        (False, "open until", {}, "NOT LOADED"),
        (True, "open until", {}, "OPEN"),
        (True, "", {"enforce": False}, "observing"),
        (True, "", {}, "enforcing"),
    ],
)
def test_worst_state_is_said(loaded, is_open, pillar, expected):
    assert overview.in_force(loaded, is_open, settings.resolve(pillar)) == expected


def test_modes_of_single_services_are_named():
    pillar = {"protection": {"type": "protected", "services": {"sieve": "private"}}, "fleet": {"keys": ["k1" * 20]}}
    assert overview.modes(settings.resolve(pillar)) == "protected; sieve: private"


def test_where_hosts_differ_is_said_by_value():
    rows = {
        "mx1": {"keys": ["a"], "mode": "x"},
        "mx2": {"keys": ["b"], "mode": "x"},
        "mx3": {"keys": ["a"], "mode": "x"},
    }
    assert overview.differing(rows, ["keys", "mode"]) == {"keys": {"['a']": ["mx1", "mx3"], "['b']": ["mx2"]}}


def test_table_has_a_row_for_each_host(outputter):
    rows = {"mx2": {"mode": "private", "keys": ["a", "b"]}, "mx1": {"mode": "autoban", "keys": [], "outbox": None}}
    assert outputter.output({"hosts": rows}).splitlines() == [
        "host  mode     keys  outbox",
        "mx1   autoban        -",
        "mx2   private  a, b",
    ]


def test_what_is_not_a_table_is_said_in_salts_own_form(outputter):
    said = outputter.output({"hosts": {"mx1": {"mode": "autoban"}}, "failed": {}, "no answer": ["mx9"], "retcode": 1})
    assert said.startswith("host  mode\nmx1   autoban\n\n")
    assert "mx9" in said
    assert "failed" not in said
    assert "retcode" not in said


@pytest.mark.parametrize("data", ["a sentence", {"hosts": {"mx1": "a sentence"}}, ["a sentence"]])
def test_whatever_else_comes_is_shown(outputter, data):
    assert "a sentence" in outputter.output(data)


LISTED = {"rows": [{"address": "192.0.2.1", "where": [587, 993]}, {"address": "192.0.2.2", "where": []}], "of": 2}
TABLE = """\
host  address    where
mx1   192.0.2.1  587, 993
mx1   192.0.2.2"""


@pytest.mark.parametrize("data", [{"mx1": LISTED}, {"hosts": {"mx1": LISTED}, "failed": {}, "no answer": []}])
def test_hosts_may_have_several_rows(outputter, data):
    assert outputter.output(data) == TABLE


def test_how_many_rows_are_left_out_is_said_of_each_host(outputter):
    said = outputter.output({"mx1": {**LISTED, "of": 5000, "since": "a week ago"}, "mx2": {"rows": [], "of": 0}})
    assert said.startswith(TABLE + "\n\n")
    assert "2 of 5000" in said
    assert "a week ago" in said
    assert "mx2" not in said


def test_nobody_is_said_as_well(outputter):
    assert outputter.output({"mx1": {"rows": [], "of": 0}}) == "nobody"


@pytest.mark.parametrize(
    "data", [{"mx1": "a sentence"}, {"mx1": {"rows": "a sentence"}}, {"mx1": {"rows": ["a sentence"]}}]
)
def test_what_hosts_return_instead_of_rows_is_shown(outputter, data):
    assert "a sentence" in outputter.output(data)
