"""Steering on vLLM's other model runner, and where a model is spread over several processes. Pipeline stages, which
take a CPU long to start, are in `benchmarks/parity.py`, on both runners."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_engines
from vllm_engines import PARITY, difference, generated, start

pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm` sets it up")
pytestmark = pytest.mark.slow


def second_runner(option):
    """What a process tells that has Triton's interpreter from the start: vLLM takes this runner by itself wherever
    Triton works, which is on GPUs."""
    script = Path(vllm_engines.__file__).with_name("vllm_second_runner.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, option], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith("{"))


def test_the_second_model_runner():
    """Asynchronously: a step is prepared before the tokens of the last are known."""
    seen = second_runner("--async")
    assert seen["runner"] == "vllm.v1.worker.cpu.model_runner" and seen["is_async"]
    assert seen["preemptions"] > 0 and seen["cached"] > 4
    assert seen["difference"] < PARITY < 0.1 < seen["difference_if_unsteered"]
    assert seen["difference_of_three_texts"] < PARITY and seen["difference_of_scores"] < PARITY
    assert seen["equal_draws"] == 1


def test_two_ranks(reference, prompts, steerings):
    """Each adds the whole vector to the sum of both, once."""
    engine = start("pocket", max_model_len=192, max_num_seqs=8, tensor_parallel_size=2)
    outputs = generated(engine, prompts, steerings, max_tokens=16)
    assert difference(reference, steerings, outputs) < PARITY
    one, other = engine.llm.llm_engine.collective_rpc("steering_status")
    assert one == other and one["tokens"] > 0
