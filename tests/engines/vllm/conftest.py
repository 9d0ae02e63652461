"""Engines that several files share: each takes seconds to start, and stays."""

import pytest
from vllm_engines import CROWDED, crowd_prompts, crowd_steerings, start

import steerable as st


@pytest.fixture(scope="session")
def crowded():
    """vLLM with the bundled model, in little room."""
    return start("pocket", **CROWDED)


@pytest.fixture(scope="session")
def reference():
    """The transformers engine with the bundled model."""
    return st.TransformersEngine(*st.load("pocket"))


@pytest.fixture(scope="session")
def prompts(reference):
    return crowd_prompts(reference)


@pytest.fixture(scope="session")
def steerings(reference, prompts):
    return crowd_steerings(reference, prompts)
