"""What the master's reactor makes of events: rendered by Salt's own compiler, without a master."""

from __future__ import annotations

import hashlib
import hmac
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
#: The fleet's keys, newest first, and one of another fleet.
KEYS, FOREIGN = ["0" * 64, "1" * 64], "2" * 64
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
    opts["mailfw"] = {"keys": KEYS}
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


def signature(text: str, key: str) -> str:
    return hmac.new(key.encode(), text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def expected(event: Any) -> list[tuple[str, Any]]:
    """Return what the reactor should do for an event: hand on a signed line of printable ASCII as it is, or nothing."""
    data = event.get("data")
    message = data.get("message") if isinstance(data, dict) else None
    if not isinstance(message, str) or not re.fullmatch(r"[ -~]{0,65536}", message):
        return []
    if message[:64] not in [signature(message[65:], key) for key in KEYS]:
        return []
    return [(ANNOUNCE, [{"args": [{"message": message}]}])]


@pytest.mark.parametrize("key", KEYS)
def test_a_signed_message_reaches_the_runner_as_it_is(compiler: salt.state.Compiler, key: str) -> None:
    message = messages.sign("mx1", messages.new_nonce(), {"192.0.2.1": 1.5, "2001:db8::": 2.5}, key)
    assert reactions(compiler, {"id": "mx1", "data": {"message": message}}) == [
        (ANNOUNCE, [{"args": [{"message": message}]}])
    ]


def test_no_runner_is_started_for_what_another_key_has_signed(compiler: salt.state.Compiler) -> None:
    message = messages.sign("mx1", messages.new_nonce(), {"192.0.2.1": 1.5}, FOREIGN)
    assert reactions(compiler, {"id": "mx1", "data": {"message": message}}) == []


def test_a_master_without_keys_starts_no_runner(compiler: salt.state.Compiler) -> None:
    message = messages.sign("mx1", messages.new_nonce(), {"192.0.2.1": 1.5}, KEYS[0])
    keys = compiler.opts.pop("mailfw")
    try:
        assert reactions(compiler, {"id": "mx1", "data": {"message": message}}) == []
    finally:
        compiler.opts["mailfw"] = keys


@pytest.mark.parametrize("name", hostile.DATA)
def test_hostile_data_is_dropped_or_handed_on_as_it_is(compiler: salt.state.Compiler, name: str) -> None:
    signed = '{"sender":"mx1"}'
    event = {"cmd": "_minion_event", "data": hostile.DATA[name](f"{signature(signed, KEYS[0])} {signed}")}
    assert reactions(compiler, event) == expected(event)


@settings(max_examples=300, deadline=None)
@given(text=TEXT | st.text(string.printable), key=st.sampled_from([*KEYS, FOREIGN]))
@example(text="on", key=KEYS[0])
@example(text="0" * (65536 - 65), key=KEYS[0])
@example(text="0" * (65537 - 65), key=KEYS[0])
@example(text="2026-01-01", key=KEYS[0])
@example(text="{{ 1 }}", key=KEYS[0])
@example(text="\x7f", key=KEYS[0])
@example(text="\x85", key=KEYS[0])
@example(text="\ud83d", key=KEYS[0])
def test_any_signed_text_is_dropped_or_handed_on_as_it_is(compiler: salt.state.Compiler, text: str, key: str) -> None:
    event = {"id": "mx1", "data": {"message": f"{signature(text, key)} {text}"}}
    assert reactions(compiler, event) == expected(event)


@settings(max_examples=200, deadline=None)
@given(event=st.dictionaries(st.sampled_from(["id", "data", "cmd", "tag"]), JSON))
def test_no_event_makes_the_reactor_do_anything_else(compiler: salt.state.Compiler, event: dict[str, Any]) -> None:
    assert reactions(compiler, event) == []
