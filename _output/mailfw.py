"""
A table for the terminal: a row for each mail host, or several of each, a column for each thing that is asked of them.

Takes what the runner's functions return: ``hosts``, a mapping of hosts to mappings, and whatever else there is to say,
which comes below the table in Salt's own form; or what hosts themselves have returned, by host. A host has several rows
when its mapping has a list of ``rows``, and of how many (``of``) they are a part.
"""

import salt.output

__virtualname__ = "mailfw"


def __virtual__():
    return __virtualname__


def output(data, **kwargs):
    """Return the data as text."""
    hosts = data.get("hosts", data) if isinstance(data, dict) else None
    if not isinstance(hosts, dict) or not all(isinstance(row, dict) for row in hosts.values()):
        return _nested(data)
    if hosts is data and not all(_has_rows(said) for said in hosts.values()):
        return _nested(data)
    rows = [row for name, said in sorted(hosts.items()) for row in _rows(name, said)]
    more = {name: said for name, said in ((name, _besides(said)) for name, said in sorted(hosts.items())) if said}
    others = {} if hosts is data else data
    rest = {key: value for key, value in others.items() if key not in ("hosts", "retcode") and value}
    parts = [table(rows)] * bool(rows) + [_nested(part) for part in (more, rest) if part]
    return "\n\n".join(parts) or "nobody"


def _has_rows(said):
    return isinstance(said.get("rows"), list) and all(isinstance(row, dict) for row in said["rows"])


def _rows(name, said):
    """Return a host's rows of the table."""
    return [{"host": name, **row} for row in (said["rows"] if _has_rows(said) else [said])]


def _besides(said):
    """Return what a host has said beside its rows."""
    if not _has_rows(said):
        return {}
    shown, of = len(said["rows"]), said.get("of", 0)
    found = {key: value for key, value in said.items() if key not in ("rows", "of") and value}
    return {**found, "shown": f"{shown} of {of}"} if shown < of else found


def _nested(data):
    return salt.output.out_format(data, "nested", {**__opts__, "output": "nested"}).rstrip("\n")


def table(rows):
    """Return rows, each column -> value, as lines of columns that are as wide as they have to be."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, *([cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def cell(value):
    """Return a value as it stands in a table."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
