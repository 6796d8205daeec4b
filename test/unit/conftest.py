import importlib.util
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("mailfw", deadline=None, max_examples=100)
settings.load_profile("mailfw")


@pytest.fixture(scope="session")
def root():
    """The repository."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def outputter(root):
    """What makes the fleet's answers tables."""
    spec = importlib.util.spec_from_file_location("outputter", root / "_output/mailfw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__opts__ = {"color": False}
    return module
