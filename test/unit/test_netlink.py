"""What is made of what the kernel says of an element."""

from __future__ import annotations

import pytest

from mailfwlib.netlink import SetElement


@pytest.mark.parametrize(
    ("timeout", "left", "default", "age"),
    [
        (100.0, 40.0, None, 60.0),
        (100.0, 40.0, 50.0, 60.0),
        (None, 40.0, 100.0, 60.0),
        (None, 100.5, 100.0, 0.0),
        (None, 40.0, None, None),
        (None, None, 100.0, None),
        (None, None, None, None),
        (0.0, 0.0, 5.0, None),
    ],
)
def test_age_goes_by_the_element_then_by_its_set(
    timeout: float | None, left: float | None, default: float | None, age: float | None
) -> None:
    assert SetElement("192.0.2.1", timeout, left).age(default) == age
