"""The network between master and mail hosts is cut for longer than the system tests have time for."""

from __future__ import annotations

import pytest

from system.conftest import fleet
from system.test_outages import People, cut_the_network, people, protected

__all__ = ["fleet", "people", "protected"]


@pytest.mark.parametrize("seconds", [60, 180])
def test_network_cut_for_minutes(people: People, seconds: int) -> None:
    cut_the_network(people, seconds)
