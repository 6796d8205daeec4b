"""
A table for the terminal: a row for each mail host, or several of each, a column for each thing that is asked of them.

Takes what the runner's functions return: ``hosts``, a mapping of hosts to mappings, and whatever else there is to say,
which comes below the table in Salt's own form; or what hosts themselves have returned, by host. A host has several rows
when its mapping has a list of ``rows``, and of how many (``of``) they are a part. On a terminal that is too narrow for
the table there are several, one below the other.
"""

import itertools
import os
import sys
import textwrap

import salt.output

__virtualname__ = "mailfw"

GAP = "  "
#: Characters that a column gets, however narrow the terminal is.
LEAST = 20


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
    parts = [table(rows, _terminal())] if rows else []
    parts += [_nested(part) for part in (more, rest) if part]
    return "\n\n".join(parts) or "nobody"


def _has_rows(said):
    return isinstance(said.get("rows"), list) and all(isinstance(row, dict) for row in said["rows"])


def _rows(name, said):
    """Return a host's rows of the table. No host speaks for another one."""
    rows = said["rows"] if _has_rows(said) else [said]
    return [{"host": name, **{column: value for column, value in row.items() if column != "host"}} for row in rows]


def _besides(said):
    """Return what a host has said beside its rows."""
    if not _has_rows(said):
        return {}
    shown, of = len(said["rows"]), said.get("of", 0)
    found = {key: value for key, value in said.items() if key not in ("rows", "of") and value}
    return {**found, "shown": f"{shown} of {of}"} if shown < of else found


def _nested(data):
    return salt.output.out_format(data, "nested", {**__opts__, "output": "nested"}).rstrip("\n")


def _terminal():
    """Return how many characters fit on a line of the terminal; None where there is none, as in a pipe."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None


def table(rows, width=None):
    """Return rows, each column -> value, as lines of columns that are as wide as they have to be.

    Where a width is given and they do not fit, there are several tables, one below the other, each with the first
    column, and long cells have several lines.
    """
    names, *columns = [
        [cell(column), *(cell(row.get(column, "")) for row in rows)]
        for column in dict.fromkeys(column for row in rows for column in row)
    ]
    room = max(LEAST, (width or sys.maxsize) - max(map(len, names)) - len(GAP))
    return "\n\n".join(_lines([names, *some], room) for some in _fitting(columns, room))


def _fitting(columns, room):
    """Yield columns, as many at a time as there is room for."""
    some, left = [], room
    for column in columns:
        wide = min(room, max(map(len, column)))
        if some and wide > left:
            yield some
            some, left = [], room
        some.append(column)
        left -= wide + len(GAP)
    yield some


def _lines(columns, room):
    """Return columns beside each other, each cell wrapped where it is longer than the room."""
    wrapped = [[textwrap.wrap(text, room) or [""] for text in column] for column in columns]
    widths = [max(len(line) for lines in column for line in lines) for column in wrapped]
    found = []
    for cells in zip(*wrapped):
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            found.append(GAP.join(part.ljust(wide) for part, wide in zip(parts, widths)).rstrip())
    return "\n".join(found)


def cell(value):
    """Return a value as it stands in a table: what a host says must not move the cursor."""
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    text = "-" if value is None else str(value)
    return "".join(one if one.isprintable() else "?" for one in text)
