"""The examples in docstrings print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import inference
import ppl_models

MODULES = [m.name for p in (inference, ppl_models) for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")]


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_the_examples_of_a_module(name: str) -> None:
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=options).failed == 0
