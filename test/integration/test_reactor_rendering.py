"""What the master's reactor makes of events: rendered by Salt's own compiler, without a master."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import string
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import salt.config
import salt.loader
import salt.state
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from integration import hostile
from mailfwlib import messages

REACTION = Path(__file__).parents[2] / "mailfw" / "reactor" / "login.sls"
EXAMPLE = REACTION.parent / "examples" / "mail.sls"
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


def reactions(
    compiler: salt.state.Compiler, *events: Any, tag: str = "mailfw/login", file: Path = REACTION
) -> list[tuple[str, Any]]:
    """Return what a new master's reactor would do for some events in turn: function and arguments of each reaction."""
    sys.modules.pop("mailfw_reactor", None)
    rendered = [compiler.render_template(str(file), tag=tag, data=event) for event in events]
    return [
        (f"{module}.{calls[-1]}", calls[:-1])
        for high in rendered
        for body in high.values()
        for module, calls in body.items()
        if not module.startswith("__")
    ]


def signature(text: str, key: str) -> str:
    return hmac.new(key.encode(), text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def expected(event: Any) -> list[tuple[str, Any]]:
    """Return what the reactor should do for a first event: hand on what is signed and fresh as it is, or nothing."""
    data = event.get("data")
    message = data.get("message") if isinstance(data, dict) else None
    if not isinstance(message, str) or not re.fullmatch(r"[ -~]{0,65536}", message):
        return []
    if message[:64] not in [signature(message[65:], key) for key in KEYS]:
        return []
    if abs(json.loads(message[65:])["sent"] - time.time()) > 120:
        return []
    return [(ANNOUNCE, [{"args": [{"message": message}]}])]


def believable(nonce: str) -> str:
    """Return a message that is signed, and was sent now."""
    return messages.sign("mx1", nonce, {"192.0.2.1": 1.5}, KEYS[0])


def signed(text: str, key: str) -> dict[str, Any]:
    """Return the event of a message that says anything, signed under a key."""
    return {"id": "mx1", "data": {"message": f"{signature(text, key)} {text}"}}


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


def test_a_message_is_handed_on_once(compiler: salt.state.Compiler) -> None:
    """Salt runs the reactor's file anew for each event: what it remembers is not in the file's own module."""
    one, other = ({"id": "mx1", "data": {"message": believable(nonce)}} for nonce in ("one", "other"))
    assert reactions(compiler, one, other, one, {**other, "id": "mx2"}, one) == reactions(compiler, one, other)
    assert len(reactions(compiler, one, other)) == 2


def test_a_message_is_remembered_until_it_is_stale_and_no_longer(compiler: salt.state.Compiler) -> None:
    assert len(reactions(compiler, {"id": "mx1", "data": {"message": believable("one")}})) == 1
    remembered = sys.modules["mailfw_reactor"].seen
    assert len(remembered) == 1
    (until,) = remembered.values()
    assert 239 <= until - time.monotonic() <= 240
    remembered.update(dict.fromkeys(remembered, time.monotonic() - 1))
    compiler.render_template(str(REACTION), tag="", data={"id": "mx1", "data": {"message": believable("other")}})
    assert len(remembered) == 1


def test_what_is_remembered_is_bounded(compiler: salt.state.Compiler) -> None:
    first, last = believable("first"), believable("last")
    assert len(reactions(compiler, {"id": "mx1", "data": {"message": first}})) == 1
    remembered = sys.modules["mailfw_reactor"].seen
    remembered.update(dict.fromkeys(map(str, range(99_999)), time.monotonic() + 200))
    compiler.render_template(str(REACTION), tag="", data={"id": "mx1", "data": {"message": last}})
    assert len(remembered) == 100_000
    assert first[:64] not in remembered
    assert last[:64] in remembered


def test_what_is_dropped_is_logged_once_a_minute_for_each_source(
    compiler: salt.state.Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    believed = {"id": "mx1", "data": {"message": believable("one")}}
    junk = {"id": "mx\n3", "data": {}}
    with caplog.at_level(logging.WARNING):
        assert len(reactions(compiler, junk, believed, junk, believed, believed)) == 1
        said = sys.modules["mailfw_reactor"].said
        said.update(dict.fromkeys(said, time.monotonic() - 61))
        reactions(compiler, junk)
    start = "mailfw: an event mailfw/login, of"
    assert [record.getMessage() for record in caplog.records] == [
        f"{start} 'mx\\n3' by its own account, was dropped: malformed",
        f"{start} 'mx1' by its own account, was dropped: replayed",
        f"{start} 'mx\\n3' by its own account, was dropped: malformed",
    ]


def test_sources_that_are_logged_are_bounded(compiler: salt.state.Compiler, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        reactions(compiler, *({"id": f"forged {number}", "data": {}} for number in range(150)))
    assert len(caplog.records) == len(sys.modules["mailfw_reactor"].said) == 100


@pytest.mark.parametrize("name", hostile.DATA)
def test_hostile_data_is_dropped_or_handed_on_as_it_is(compiler: salt.state.Compiler, name: str) -> None:
    message = messages.sign("mx1", messages.new_nonce(), {"192.0.2.1": 1.5}, KEYS[0])
    event = {"cmd": "_minion_event", "data": hostile.DATA[name](message)}
    assert reactions(compiler, event) == expected(event)


@settings(max_examples=300, deadline=None)
@given(text=TEXT | st.text(string.printable), key=st.sampled_from([*KEYS, FOREIGN]))
@example(text="on", key=KEYS[0])
@example(text="2026-01-01", key=KEYS[0])
@example(text="{{ 1 }}", key=KEYS[0])
@example(text="[" * 65000, key=KEYS[0])
@example(text="9" * 65000, key=KEYS[0])
@example(text="[]", key=KEYS[0])
@example(text="{}", key=KEYS[0])
@example(text='{"sent": NaN}', key=KEYS[0])
@example(text='{"sent": 1e999}', key=KEYS[0])
@example(text='{"sent": ' + "9" * 400 + "}", key=KEYS[0])
def test_any_other_text_is_dropped_even_when_it_is_signed(compiler: salt.state.Compiler, text: str, key: str) -> None:
    assert reactions(compiler, signed(text, key)) == []


@settings(max_examples=300, deadline=None)
@given(sent=st.integers(-300, 300), more=TEXT | st.text(string.printable), key=st.sampled_from([*KEYS, FOREIGN]))
@example(sent=0, more="x" * 65000, key=KEYS[0])
@example(sent=0, more="x" * 66000, key=KEYS[0])
@example(sent=0, more="{{ 1 }}", key=KEYS[0])
@example(sent=0, more="\x7f", key=KEYS[0])
@example(sent=0, more="\x85", key=KEYS[0])
@example(sent=0, more="\ud83d", key=KEYS[0])
def test_anything_signed_and_fresh_is_handed_on_as_it_is_or_dropped(
    compiler: salt.state.Compiler, sent: int, more: str, key: str
) -> None:
    assume(abs(sent) not in (119, 120))  # The clock goes on meanwhile.
    content = {"sent": time.time() + sent, "more": more}
    for escaped in (False, True):
        event = signed(json.dumps(content, ensure_ascii=escaped), key)
        assert reactions(compiler, event) == expected(event)


@settings(max_examples=200, deadline=None)
@given(event=st.dictionaries(st.sampled_from(["id", "data", "cmd", "tag"]), JSON))
def test_no_event_makes_the_reactor_do_anything_else(compiler: salt.state.Compiler, event: dict[str, Any]) -> None:
    assert reactions(compiler, event) == []


MAIL = re.compile(
    "To: operator@example.org\nSubject: mailfw/open\nAuto-Submitted: auto-generated\n\n"
    "((host|until|reason): [ -~]{1,300}\n)*"
)


@settings(max_examples=300, deadline=None)
@given(data=st.dictionaries(st.sampled_from(["host", "until", "reason"]) | TEXT, JSON | st.integers()))
@example(data={"host": "\nBcc: everybody", "until": 1 << 40, "reason": "\\nBcc: everybody"})
@example(data={"until": 1 << 33})
def test_whatever_an_event_holds_its_mail_has_a_line_of_ascii_for_each_field(
    compiler: salt.state.Compiler, data: dict[str, Any]
) -> None:
    compiler.opts["mailfw_mail"] = {"to": "operator@example.org"}
    count = Path(compiler.opts["cachedir"], "mailfw_mail_open.json")
    count.parent.mkdir(parents=True, exist_ok=True)
    count.unlink(missing_ok=True)
    found = reactions(compiler, {"id": "mx1", "data": data}, tag="mailfw/open", file=EXAMPLE)
    if not data.keys() & {"host", "until", "reason"}:
        assert found == []
        return
    ((function, (arguments,)),) = found
    given_ = {name: value for one in arguments["args"] for name, value in one.items()}
    assert MAIL.fullmatch(given_.pop("stdin"))
    command = ["/usr/sbin/sendmail", "-i", "-t"]
    assert (function, given_) == (
        "runner.salt.cmd",
        {"fun": "cmd.run", "cmd": command, "stdin_raw_newlines": True, "python_shell": False},
    )


@pytest.mark.parametrize("tag", ["mailfw/login", "mailfw/else", "mailfw/open/x", ""])
def test_other_events_are_not_mailed(compiler: salt.state.Compiler, tag: str) -> None:
    compiler.opts["mailfw_mail"] = {"to": "operator@example.org"}
    assert reactions(compiler, {"id": "mx1", "data": {"host": "mx1"}}, tag=tag, file=EXAMPLE) == []


def test_flood_of_one_tag_keeps_no_other_one_back_and_is_logged_once_an_hour(
    compiler: salt.state.Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.opts["mailfw_mail"] = {"to": "operator@example.org"}
    directory = Path(compiler.opts["cachedir"])
    directory.mkdir(parents=True, exist_ok=True)
    for count in directory.glob("mailfw_mail*"):
        count.unlink()
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    now = time.time()

    def mails(tag: str, events: int, at: float) -> int:
        monkeypatch.setattr(time, "time", lambda: at)
        return len(reactions(compiler, *[{"id": "mx1", "data": {"host": "mx1"}}] * events, tag=tag, file=EXAMPLE))

    def logged() -> list[str]:
        said = [one.getMessage() for one in caplog.records if "not mailed" in one.getMessage()]
        caplog.clear()
        return said

    assert mails("mailfw/roaming", 80, now) == 30
    assert logged() == ["mailfw: 1 events mailfw/roaming were not mailed: more than 30 an hour"]
    assert mails("mailfw/open", 2, now) == 2
    assert mails("mailfw/roaming", 10, now + 3599) == 0
    assert logged() == []
    assert mails("mailfw/roaming", 1, now + 3601) == 1
    assert logged() == ["mailfw: 59 events mailfw/roaming were not mailed: more than 30 an hour"]
    counts = {one.name for one in directory.glob("mailfw_mail*")}
    assert counts == {"mailfw_mail_roaming.json", "mailfw_mail_open.json"}
