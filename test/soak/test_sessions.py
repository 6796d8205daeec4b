"""A session of two minutes, with trusts of twenty seconds: longer than the system tests have time for."""

from __future__ import annotations

from system import test_sessions
from system.conftest import fleet
from system.test_sessions import short_period, test_trust_lasts_as_long_as_the_session

__all__ = ["fleet", "short_period", "test_trust_lasts_as_long_as_the_session"]

test_sessions.PERIOD, test_sessions.SHORT, test_sessions.LONG = 20, 21, 120
