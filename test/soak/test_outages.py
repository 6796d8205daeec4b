"""The network between master and mail hosts is cut for longer than the system tests have time for."""

from __future__ import annotations

from system.conftest import fleet
from system.test_outages import People, cut_the_network, people, protected

__all__ = ["fleet", "people", "protected"]


def test_network_cut_for_a_minute(people: People) -> None:
    """After three, both hosts know everybody as soon: they ask. Echoes come when the master's kernel tries again."""
    cut_the_network(people, 60)
