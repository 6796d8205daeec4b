"""Print the pillar reference, docs/pillar.md, from the schema that validation uses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mailfwlib.settings import SCHEMA, FalseOr, Option

HEADER = """\
# Pillar reference

Made from the schema that checks the pillar (`make docs`). [pillar.example](../pillar.example) has the same keys with
more words, to start from. All keys are below `mailfw`; a host needs none of them. A value that is not accepted is
reported with its path, and then nothing is changed on the host.

| key | default | accepted | what it is |
|---|---|---|---|
"""


def options(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, Option]]:
    """Yield each key, with those above it, and what is known of it; those inside an optional mapping as well."""
    for key, entry in schema.items():
        here = f"{path}{key}"
        if isinstance(entry, dict):
            yield from options(entry, f"{here}:")
        else:
            yield here, entry
            if isinstance(entry.parse, FalseOr):
                yield from options(entry.parse.schema, f"{here}:")


def accepted(option: Option) -> str:
    """Return what the parser of an option says that it expects."""
    try:
        option.parse(object())
    except ValueError as err:
        return str(err).removeprefix("expected ")
    raise AssertionError(f"{option.meaning}: takes anything")


def row(path: str, option: Option) -> str:
    """Return an option as a row of the table."""
    default = "none" if option.default is None else f"`{written(option.default, path)}`"
    return f"| `{path}` | {default} | {accepted(option)} | {option.meaning} |"


def written(default: Any, path: str) -> str:
    """Return a default as one writes it in YAML."""
    if path == "mark":
        return f"{default:#010x}"
    return default if isinstance(default, str) else json.dumps(default).replace('"', "")


def reference() -> str:
    """Return the text of docs/pillar.md."""
    return HEADER + "".join(f"{row(path, option)}\n" for path, option in options(SCHEMA))


if __name__ == "__main__":
    print(reference(), end="")
