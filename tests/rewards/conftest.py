import sys
import types

import pytest


@pytest.fixture
def user_module(monkeypatch):
    """An importable module for the user functions of a test."""
    module = types.ModuleType("user_rewards")
    monkeypatch.setitem(sys.modules, "user_rewards", module)
    return module
