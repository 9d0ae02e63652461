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


def run(script, *options, **environment):
    """A process of a script beside the tests."""
    path = Path(vllm_engines.__file__).with_name(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.run(
        [sys.executable, path, *options], env=environment, capture_output=True, text=True, timeout=600
    )


def told(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith("{"))


def second_runner(option):
    """What a process tells that has Triton's interpreter from the start: vLLM takes this runner by itself wherever
    Triton works, which is on GPUs."""
    return told(run("vllm_second_runner.py", option))


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


@pytest.mark.skipif("STEERABLE_ALL" not in os.environ, reason="minutes; set STEERABLE_ALL=1 to run it")
def test_graphs_that_are_kept(tmp_path):
    """Cut at attention, compiled in pieces, and taken from vLLM's cache by the next engine, as on GPUs. Those of
    another code do not steer, and are noticed."""
    for loaded in (0, 1):
        seen = told(run("vllm_kept_graphs.py", VLLM_CACHE_ROOT=str(tmp_path / "steered")))
        assert seen["loaded"] == loaded
        assert seen["difference"] < PARITY < 0.1 < seen["difference_if_unsteered"]
    stale = {"VLLM_CACHE_ROOT": str(tmp_path / "stale")}
    assert told(run("vllm_kept_graphs.py", "--unsteered", **stale)) == {"loaded": 0}
    done = run("vllm_kept_graphs.py", **stale)
    assert done.returncode and "steering does nothing at layers 0-5 of this model" in done.stderr
