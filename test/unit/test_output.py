"""The table of all mail hosts, at any width."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

KEYS = ["0123456789abcdef", "fedcba9876543210"]
ROWS = [
    {"host": "mx1", "mode": "autoban", "trusted": "0 (+0)", "outbox": 0, "keys": KEYS[:1]},
    {"host": "mx2", "mode": "private", "trusted": "12 (+3)", "outbox": None, "keys": KEYS},
]
#: Widths, and what is shown there.
SHOWN = {
    None: """\
host  mode     trusted  outbox  keys
mx1   autoban  0 (+0)   0       0123456789abcdef
mx2   private  12 (+3)  -       0123456789abcdef, fedcba9876543210
""",
    40: """\
host  mode     trusted  outbox
mx1   autoban  0 (+0)   0
mx2   private  12 (+3)  -

host  keys
mx1   0123456789abcdef
mx2   0123456789abcdef, fedcba9876543210
""",
    29: """\
host  mode     trusted
mx1   autoban  0 (+0)
mx2   private  12 (+3)

host  outbox
mx1   0
mx2   -

host  keys
mx1   0123456789abcdef
mx2   0123456789abcdef,
      fedcba9876543210
""",
}


@pytest.mark.parametrize("width", SHOWN)
def test_a_table_is_folded_where_it_does_not_fit(outputter: Any, width: int | None) -> None:
    assert outputter.table(ROWS, width) + "\n" == SHOWN[width]


CELL = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text(), max_size=4)


@given(
    hosts=st.dictionaries(st.text(max_size=20), st.dictionaries(st.text(max_size=20), CELL, max_size=8), min_size=1),
    width=st.none() | st.integers(1, 200),
)
def test_whatever_hosts_say_fits_and_is_printable(
    outputter: Any, hosts: dict[str, dict[str, Any]], width: int | None
) -> None:
    rows = [{"host": name, **row} for name, row in hosts.items()]
    lines = outputter.table(rows, width).split("\n")
    assert all(line.isprintable() for line in lines)
    if width is not None:
        names = max(len(outputter.cell(text)) for text in ["host", *(row["host"] for row in rows)])
        assert max(map(len, lines)) <= max(width, names + 2 + outputter.LEAST)
