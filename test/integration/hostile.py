"""Event data that no mail host sends. Each is made from a message that the fleet would believe."""

from __future__ import annotations

import json
from typing import Any, Callable

#: What some of them would run, if anything of an event were taken for more than data.
MARK = "/run/something-foreign-has-run"
TOUCH = f"local.cmd.run: [{{tgt: '*'}}, {{args: [{{cmd: touch {MARK}}}]}}]"


def _nested(message: str, depth: int = 200) -> Any:
    value: Any = message
    for _ in range(depth):
        value = {"message": value}
    return value


def _altered(message: str) -> str:
    signature, _, signed = message.partition(" ")
    content = json.loads(signed)
    return f"{signature} {json.dumps({**content, 'sender': 'mx2'}, separators=(',', ':'))}"


#: Name -> what makes the event's data from a believable message. None of them may have any effect.
DATA: dict[str, Callable[[str], Any]] = {
    "no data": lambda _: {},
    "null": lambda _: None,
    "a string": lambda message: message,
    "a list": lambda message: [message],
    "a number": lambda _: {"message": 1},
    "a list of messages": lambda message: {"message": [message]},
    "nested": lambda message: {"message": _nested(message)},
    "in another field": lambda message: {"messages": message, "data": {"message": message}},
    "empty": lambda _: {"message": ""},
    "unsigned": lambda message: {"message": message.partition(" ")[2]},
    "altered": lambda message: {"message": _altered(message)},
    "signature of nothing": lambda message: {"message": message.partition(" ")[0]},
    "something appended": lambda message: {"message": message + " "},
    "65,537 characters": lambda message: {"message": message.ljust(65537)},
    "a million characters": lambda _: {"message": "x" * 1_000_000},
    "not ASCII": lambda message: {"message": message.replace("mx1", "mx\u00e9")},
    "beyond the BMP": lambda _: {"message": "\U0001f600"},
    "control characters": lambda _: {"message": "\u0000\u0007\u0085\u2028\r\n\t"},
    "YAML": lambda _: {"message": f'"\nforeign:\n  {TOUCH}\n'},
    "YAML in quotes": lambda _: {"message": f"'\\\"\n\nforeign:\n  {TOUCH}\n#"},
    "YAML tag": lambda _: {"message": f"!!python/object/apply:os.system ['touch {MARK}']"},
    "Jinja": lambda _: {"message": "{{ salt['cmd.run']('touch " + MARK + "') }}"},
    "Jinja block": lambda _: {"message": "{% do salt['cmd.run']('touch " + MARK + "') %}"},
    "renderer line": lambda _: {"message": f"#!py\ndef run():\n  open('{MARK}', 'w')\n"},
    "hostile key": lambda _: {f"message\nforeign:\n  {TOUCH}": "x", "message": None},
    "command-line form": lambda _: {"message": f"message={TOUCH} __kwarg__=True"},
}
