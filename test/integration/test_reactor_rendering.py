"""What the master's reactor makes of events: rendered by Salt's own compiler, without a master."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import pytest
import salt.config
import salt.loader
import salt.state
from hypothesis import example, given, settings
from hypothesis import strategies as st

from integration import hostile
from mailfwlib import messages

REACTION = Path(__file__).parents[2] / "mailfw" / "reactor" / "login.sls"
#: The only thing that the reactor ever does, with one argument.
ANNOUNCE = "runner.mailfw.announce"
TEXT = st.text(st.characters(exclude_categories=()), max_size=200)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(TEXT | st.just("message"), values, max_size=4),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> salt.state.Compiler:
    """What the reactor compiles reactions with."""
    directory = tmp_path_factory.mktemp("master")
    opts = salt.config.apply_minion_config({"root_dir": str(directory), "file_client": "local"}, minion_id="master")
    return salt.state.Compiler(opts, salt.loader.render(opts, salt.loader.minion_mods(opts)))


def reactions(compiler: salt.state.Compiler, event: Any) -> list[tuple[str, Any]]:
    """Return what the reactor would do for an event: function and arguments of each reaction."""
    high = compiler.render_template(str(REACTION), tag="mailfw/login", data=event)
    return [
        (f"{module}.{calls[-1]}", calls[:-1])
        for body in high.values()
        for module, calls in body.items()
        if not module.startswith("__")
    ]


def expected(event: Any) -> list[tuple[str, Any]]:
    """Return what the reactor should do for an event: hand on a line of printable ASCII as it is, or nothing."""
    data = event.get("data")
    message = data.get("message") if isinstance(data, dict) else None
    if isinstance(message, str) and re.fullmatch(r"[ -~]{0,65536}", message):
        return [(ANNOUNCE, [{"args": [{"message": message}]}])]
    return []


def test_a_signed_message_reaches_the_runner_as_it_is(compiler: salt.state.Compiler) -> None:
    message = messages.sign("mx1", messages.new_nonce(), {"192.0.2.1": 1.5, "2001:db8::": 2.5}, "0" * 64)
    assert reactions(compiler, {"id": "mx1", "data": {"message": message}}) == [
        (ANNOUNCE, [{"args": [{"message": message}]}])
    ]


@pytest.mark.parametrize("name", hostile.DATA)
def test_hostile_data_is_dropped_or_handed_on_as_it_is(compiler: salt.state.Compiler, name: str) -> None:
    event = {"id": "mx1", "cmd": "_minion_event", "data": hostile.DATA[name]("0" * 64 + ' {"sender":"mx1"}')}
    assert reactions(compiler, event) == expected(event)


@pytest.mark.parametrize(
    "name", ["null", "a list", "nested", "not ASCII", "YAML", "control characters", "hostile key", "renderer line"]
)
def test_what_cannot_be_a_message_renders_to_nothing(compiler: salt.state.Compiler, name: str) -> None:
    assert reactions(compiler, {"id": "mx1", "data": hostile.DATA[name]("0" * 64 + ' {"sender":"mx1"}')}) == []


@settings(max_examples=300, deadline=None)
@given(message=TEXT | st.text(string.printable))
@example(message="on")
@example(message="0" * 65536)
@example(message="0" * 65537)
@example(message="2026-01-01")
@example(message="{{ 1 }}")
@example(message="\x7f")
@example(message="\x85")
@example(message="\ud83d")
def test_any_text_is_dropped_or_handed_on_as_it_is(compiler: salt.state.Compiler, message: str) -> None:
    event = {"id": "mx1", "data": {"message": message}}
    assert reactions(compiler, event) == expected(event)


@settings(max_examples=200, deadline=None)
@given(event=st.dictionaries(st.sampled_from(["id", "data", "cmd", "tag"]), JSON))
def test_no_event_makes_the_reactor_do_anything_else(compiler: salt.state.Compiler, event: dict[str, Any]) -> None:
    assert reactions(compiler, event) == expected(event)
