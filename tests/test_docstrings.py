"""Every public name says what it takes, gives and refuses, and its example runs."""

import doctest
import inspect
import re

import pytest
import torch

import steerable as st

FUNCTIONS = [name for name in st.__all__ if inspect.isfunction(getattr(st, name))]
CLASSES = [
    name
    for name in st.__all__
    if inspect.isclass(getattr(st, name)) and not issubclass(getattr(st, name), BaseException) and name != "selectors"
]


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_sections(name):
    text = inspect.getdoc(getattr(st, name))
    summary = text.split("\n\n")[0]
    assert summary[0].isupper() or summary.startswith("u = "), "a summary is a sentence"
    assert summary.endswith((".", ")")) and summary.count("\n") <= 1
    sections = set(re.findall(r"(?m)^(\w+):$", text))
    if name in FUNCTIONS:
        assert {"Args", "Raises", "Example"} <= sections
        assert name == "tap" or sections & {"Returns", "Yields"}  # `with tap(...)` gives nothing
    else:
        assert "Example" in sections


@pytest.fixture(scope="module")
def namespace():
    model, tokenizer = st.load("pocket", device="cpu")
    vector = torch.randn(192, generator=torch.Generator().manual_seed(0))
    inputs = tokenizer("2 + 2 =", return_tensors="pt")
    direction = st.Direction({st.Site("resid_post", 3): vector})
    return {"st": st, "torch": torch, "model": model, "tokenizer": tokenizer, "inputs": inputs, "direction": direction}


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_examples(name, namespace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(getattr(st, name)), dict(namespace), name, None, None)
    assert example.examples
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
