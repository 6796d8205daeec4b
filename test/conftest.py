"""How the tests are shared out where several run at once: what uses one lab or one fleet stays together."""

from __future__ import annotations

import pytest

TOGETHER = {"system": "lab", "integration": "fleet"}


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups then.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        suite = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(TOGETHER.get(suite, item.path.stem)))
