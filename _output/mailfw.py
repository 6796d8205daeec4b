"""
A table for the terminal: a row for each mail host, a column for each thing that is asked of all of them.

Takes what the runner's ``mailfw.status`` returns: ``hosts``, a mapping of hosts to mappings, and whatever else there is
to say, which comes below the table in Salt's own form.
"""

import salt.output

__virtualname__ = "mailfw"


def __virtual__():
    return __virtualname__


def output(data, **kwargs):
    """Return the data as text."""
    hosts = data.get("hosts") if isinstance(data, dict) else None
    if not isinstance(hosts, dict) or not all(isinstance(row, dict) for row in hosts.values()):
        return _nested(data)
    rest = {key: value for key, value in data.items() if key not in ("hosts", "retcode") and value}
    return "\n\n".join([table(hosts)] * bool(hosts) + [_nested(rest)] * bool(rest))


def _nested(data):
    return salt.output.out_format(data, "nested", {**__opts__, "output": "nested"}).rstrip("\n")


def table(rows):
    """Return rows, name -> column -> value, as lines of columns that are as wide as they have to be."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["host", *columns]]
    lines += [[name, *(cell(row.get(column, "")) for column in columns)] for name, row in sorted(rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def cell(value):
    """Return a value as it stands in a table."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
