"""Blocks on several processes: order, errors, and nothing left behind."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from steerable.engines.workers import default_threads, map_blocks
from steerable.errors import SteerableError, UsageError


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


def children():
    return [p for p in multiprocessing.active_children() if p.is_alive()]


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


@pytest.mark.parametrize(
    ("block", "kind", "text"),
    [
        ("usage", UsageError, "^the block is wrong$"),
        ("bug", SteerableError, r"ValueError: two lines \(test_workers.py, line \d+\)"),
        ("die", SteerableError, "killed by signal 9"),
    ],
)
def test_failures_are_one_sentence(block, kind, text):
    with pytest.raises(kind, match=text):
        map_blocks(misbehave, [block, "sleep"], setup=setup, workers=2)
    assert not children()


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
