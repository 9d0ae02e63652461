"""Blocks on several processes: order, errors, and nothing left behind."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings

import pytest
import torch
from tiny_families import COMMON, tiny
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import steerable as st
from steerable.engines import pool
from steerable.engines.pool import default_threads, loader, map_blocks
from steerable.models.writers import fold, remove_bias
from steerable.store.errors import SteerableError, SteerableWarning, UsageError


def setup():
    return os.getpid()


def square(pid, block, report):
    report(block)
    return block * block, torch.get_num_threads()


def misbehave(pid, block, report):
    if block == "usage":
        raise UsageError("the block is wrong")
    if block == "bug":
        raise ValueError("two\nlines")
    if block == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if block == "sleep":
        time.sleep(60)
    return block


def warn(pid, block, report):
    warnings.warn("the vector is weak", SteerableWarning, stacklevel=1)
    return block


def children():
    return [p for p in multiprocessing.active_children() if p.is_alive()]


@pytest.mark.slow
def test_warnings_reach_the_caller():
    with pytest.warns(SteerableWarning, match="^the vector is weak$"):
        assert map_blocks(warn, [3, 1, 2], setup=setup, workers=2) == [3, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_in_order(workers):
    seen = []
    before = torch.get_num_threads()
    found = map_blocks(square, [3, 1, 2], setup=setup, workers=workers, report=seen.append)
    assert found == [(9, 1), (1, 1), (4, 1)]
    assert sorted(seen) == [1, 2, 3]
    assert torch.get_num_threads() == before
    assert not children()


def test_nothing_to_do():
    assert map_blocks(square, [], setup=setup, workers=3) == []
    with pytest.raises(UsageError):
        map_blocks(square, [1], setup=setup, workers=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "kind", "text"),
    [
        ("usage", UsageError, "^the block is wrong$"),
        ("bug", SteerableError, r"ValueError: two lines \(test_pool.py, line \d+\)"),
        (
            "die",
            SteerableError,
            r"killed by signal 9 before its work was done \(3 times in the same place\); if memory",
        ),
    ],
)
def test_failures_are_one_sentence(block, kind, text):
    with pytest.raises(kind, match=text):
        map_blocks(misbehave, [block, "sleep"], setup=setup, workers=2)
    assert not children()


def die_once(pid, block, report):
    folder, number = block
    report(number)
    mark = folder / f"{number}.died"
    if number in (0, 2) and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number, pid


@pytest.mark.slow
def test_a_block_whose_worker_died_is_done_again(tmp_path):
    found, seen = {}, []
    results = map_blocks(
        die_once,
        [(tmp_path, number) for number in range(5)],
        setup=setup,
        workers=2,
        report=seen.append,
        finished=lambda index, result: found.setdefault(index, result),
        collect=False,
    )
    assert [found[number][0] for number in range(5)] == [0, 1, 4, 9, 16]
    assert results == []  # they were not to be collected
    assert sorted(seen) == [0, 0, 1, 2, 2, 3, 4] and len({pid for _, pid in found.values()}) >= 2
    assert not children()


@pytest.mark.slow
def test_no_retries():
    with pytest.raises(SteerableError, match="killed by signal 9 before its work was done; if memory"):
        map_blocks(misbehave, ["die", "usual"], setup=setup, workers=2, retries=0)
    assert not children()


def test_the_loader_needs_a_name(tiny_llama):
    with pytest.raises(UsageError, match="loaded by name or folder"):
        loader(tiny_llama)


@pytest.mark.parametrize("change", ["the weight patch", "the hook", "the bias", "the adapter"])
def test_the_loader_needs_the_model_as_it_was_loaded(change):
    """A worker that loads it by its name would compute without what was put into it."""
    peft = pytest.importorskip("peft")
    model = tiny("llama", num_hidden_layers=1, mlp_bias=False)
    model.config._name_or_path = "tiny"
    assert loader(model) and pool.default_workers(model) == pool.cores()
    patch = st.WeightPatch({"model.layers.0.mlp.down_proj.weight": torch.ones(32, 48)})
    direction = st.Direction({st.Site("resid_post", 0): torch.ones(32)})
    with contextlib.ExitStack() as stack:
        if change == "the weight patch":
            stack.enter_context(patch.apply(model))
        elif change == "the hook":
            stack.enter_context(st.steer(model, direction))
        elif change == "the bias":
            fold(model, direction)
            stack.callback(remove_bias, model)
        else:
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"]))
        with pytest.raises(UsageError, match=f"{change} that this one has would be missing there: pass workers=1"):
            loader(model)
        assert pool.default_workers(model) == 1
    if change != "the adapter":
        assert loader(model)


@pytest.mark.slow
def test_interrupt_leaves_no_process():
    timer = threading.Timer(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        map_blocks(misbehave, ["sleep", "sleep"], setup=setup, workers=2)
    timer.cancel()
    assert not children()


def test_a_small_model_has_one_thread():
    model = torch.nn.Linear(2, 2)
    assert default_threads(model, 1) == default_threads(model, 8) == 1


def test_a_large_model_has_the_cores_but_no_more_threads_than_torch(monkeypatch):
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(pool, "SMALL", 1)
    monkeypatch.setattr(pool, "cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [default_threads(model, workers) for workers in (1, 2, 3, 20)] == [8, 4, 2, 1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # as OMP_NUM_THREADS=3 sets it
    assert [default_threads(model, workers) for workers in (1, 2, 3, 20)] == [3, 3, 2, 1]


def test_a_row_takes_the_keys_and_values_of_every_layer():
    """Also where layers have heads of their own width, which the config then refuses to name for the whole model."""
    settings = COMMON | {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
    settings["layer_types"] = ["sliding_attention", "full_attention"] * 2
    wide, plain = Gemma4ForCausalLM(Gemma4TextConfig(**settings)), tiny("llama")
    kept = [pool.row_bytes(model, 100) - pool.row_bytes(model, 0) for model in (wide, plain)]
    assert kept == [100 * 4 * 2 * 2 * (8 + 16 + 8 + 16), 100 * 4 * 2 * 2 * 4 * 8]
