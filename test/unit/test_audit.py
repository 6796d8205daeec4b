import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailfwlib import audit

#: A key, and a value that is plain, or quoted as JSON has it.
_FIELD = re.compile(r"""([a-z]+)=(?:([^ "\\=]+)|("(?:[^"\\]|\\.)*"))(?: |$)""")


@pytest.mark.parametrize(
    ("given", "kept"),
    [("", ""), ("ticket 17", "ticket 17"), (17, "17"), ("two\n lines\t", "two lines"), ('a "quote"', "a 'quote'")],
)
def test_reason(given, kept):
    assert audit.reason(given) == kept


@pytest.mark.parametrize("given", ["x" * 91, "ü" * 46, "a\x07bell", "\x1b[31m", ["a", "list"], None, {"a": 1}])
def test_reason_that_is_none(given):
    with pytest.raises(ValueError, match="expected text of at most 90 bytes"):
        audit.reason(given)


@given(st.text())
def test_comment_of_whatever_is_a_reason_is_one(text):
    try:
        why = audit.reason(text)
    except ValueError:
        return
    assert audit.is_note(audit.note(audit.name(text), why))


@pytest.mark.parametrize(
    ("given", "kept"), [("root", "root"), ("sudo_alice", "sudo_alice"), ('a"} \nb', "a____b"), ("", "_")]
)
def test_name(given, kept):
    assert audit.name(given) == kept


@given(st.text(), st.text(), st.text())
def test_no_field_forges_another(address, by, why):
    given = audit.fields("block", address, by, ["dovecot", 587], 0.0, why)
    line = audit.line(given)
    assert line.isprintable()
    found = {key: json.loads(quoted) if quoted else plain for key, plain, quoted in _FIELD.findall(line)}
    assert found == given


def test_line():
    found = audit.fields("block", "192.0.2.0/24", "alice", [587, 993], float("inf"), "a = b, ticket 17")
    assert audit.line(found) == (
        'action=block address=192.0.2.0/24 where=587,993 until=forever by=alice why="a = b, ticket 17"'
    )
    assert audit.line(audit.fields("unblock", "192.0.2.1", "alice")) == "action=unblock address=192.0.2.1 by=alice"
