from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("mailfw", deadline=None, max_examples=100)
settings.load_profile("mailfw")


@pytest.fixture(scope="session")
def root():
    """The repository."""
    return Path(__file__).resolve().parents[2]
