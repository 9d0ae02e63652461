"""The examples in the docstrings of the estimators run."""

import doctest
import importlib

import pytest

MODULES = [
    "components",
    "dictionaries",
    "discriminants",
    "grouped_means",
    "layer_rules",
    "planes",
    "probes",
    "purification",
    "transport",
    "weighted_means",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"steerable.methods.{name}"))
    assert result.attempted > 0 and result.failed == 0
