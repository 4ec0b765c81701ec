"""The scripts that made the demo's corpus and base model, which nothing else runs."""

import importlib
import pkgutil

import pytest

import demo


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(demo.__path__)])
def test_it_finds_what_it_imports(name):
    importlib.import_module(f"demo.{name}")
