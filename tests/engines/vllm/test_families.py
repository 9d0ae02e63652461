"""Families by structure: tiny random models, steered by vLLM as by the transformers engine."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from tiny_families import tiny
from vllm_engines import PARITY, family_differences

from steerable.engines.vllm.engine import fitting_here

pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm` sets it up")
pytestmark = pytest.mark.slow

FAMILIES = ("qwen3_moe", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2")


@pytest.fixture(scope="module")
def other_process():
    """vLLM has groups for experts only where the first engine of a process has some, and it changes the classes of
    transformers that it runs itself."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("family", FAMILIES)
def test_steered_texts_of_a_family(family, other_process, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    steered, plain = other_process.submit(family_differences, family, str(tmp_path)).result()
    assert steered < PARITY
    assert plain > 0.1  # steering did something


@pytest.mark.parametrize("family, processes", [("llama", "0"), ("olmo2", "1")])
def test_classes_of_transformers_are_changed_in_another_process(family, processes, tmp_path, monkeypatch):
    import vllm

    tiny(family).save_pretrained(tmp_path)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fitting_here(vllm, str(tmp_path))
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == processes


@pytest.mark.parametrize("free, options", [(140, {}), (70, {"gpu_memory_utilization": 0.45})])
def test_memory_that_is_taken_is_left_alone(free, options, monkeypatch):
    """On a GPU, where this process's own model may lie."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free << 30, 140 << 30))
    assert fitting_here(None, "nowhere") == options
