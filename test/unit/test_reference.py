"""The pillar reference is what the schema says today."""

import importlib.util

from mailfwlib import settings


def reference(root):
    spec = importlib.util.spec_from_file_location("reference", root / "docs/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_is_up_to_date(root):
    """`make docs` brings it there."""
    assert (root / "docs/pillar.md").read_text(encoding="utf-8") == reference(root).reference()


def test_reference_names_keys_inside_optional_mappings(root):
    paths = dict(reference(root).options(settings.SCHEMA))
    assert {"autoban:networks:ipv6_prefix", "log:group", "reports:port", "fleet:keys"} <= set(paths)
