"""Every recipe says what it takes, needs, gives and refuses, and its example runs on the bundled model."""

import doctest
import inspect
import re

import pytest
import torch

import steerable as st
from steerable.steering.direction import Direction
from steerable.steering.site import Site


@pytest.fixture(scope="module")
def namespace():
    model, tokenizer = st.load("pocket", device="cpu")
    return {"st": st, "torch": torch, "model": model, "tokenizer": tokenizer, "Direction": Direction, "Site": Site}


@pytest.mark.parametrize("name", st.recipes.RECIPES)
def test_docstring(name):
    recipe = st.recipes.RECIPES[name]
    assert recipe.function.__name__ == name.replace("-", "_")
    text = inspect.getdoc(recipe.function)
    assert {"Args", "Returns", "Raises", "Example"} <= set(re.findall(r"(?m)^(\w+):$", text))
    assert "\nData: " in text and all(f"arXiv {paper}" in text for paper in recipe.papers)


@pytest.mark.parametrize("name", st.recipes.RECIPES)
def test_example(name, namespace):
    text = inspect.getdoc(st.recipes.RECIPES[name].function)
    example = doctest.DocTestParser().get_doctest(text, dict(namespace), name, None, None)
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=report.append)
    assert example.examples and runner.failures == 0, "".join(report)
