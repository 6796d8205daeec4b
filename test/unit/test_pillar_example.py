import json

import pytest
import salt.utils.yaml
import yaml

from mailfwlib import settings


@pytest.fixture(scope="module")
def text(root):
    return (root / "pillar.example").read_text(encoding="utf-8")


def defaults(schema):
    """Return the schema's defaults, as an operator writes them."""
    return {key: defaults(entry) if isinstance(entry, dict) else entry.default for key, entry in schema.items()}


def in_words(value):
    """Return the value such that 0 and false, or 1 and true, are not the same."""
    return json.dumps(value, sort_keys=True, indent=1)


@pytest.mark.parametrize("load", [yaml.safe_load, salt.utils.yaml.safe_load])
def test_example_has_every_key_with_its_default(text, load):
    assert in_words(load(text)) == in_words({"mailfw": defaults(settings.SCHEMA)})


def test_example_is_the_same_as_an_empty_pillar(text):
    assert settings.resolve(yaml.safe_load(text)["mailfw"]) == settings.resolve({})


def test_example_explains_every_key(text):
    """Each key, or the first of a pair that belongs together, has a comment right above it."""
    lines = text.splitlines()
    bare = [
        line.split(":")[0].strip()
        for above, line in zip(lines, lines[1:])
        if line.startswith("    ") and not line.lstrip().startswith("#") and not above.lstrip().startswith("#")
    ]
    assert set(bare) <= {"networks_ipv4", "networks_ipv6", "banned", "blocked"}


def test_example_names_every_mode_and_login_service(text):
    for word in (*settings.MODES, *settings.LOGIN_SERVICES):
        assert word in text
