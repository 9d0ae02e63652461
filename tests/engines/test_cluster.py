"""Blocks on a real Ray cluster of this machine: order, a worker that is killed in mid-run, errors, nothing left."""

import os
import pickle
import signal
import subprocess
import time
from functools import partial

import pytest
import torch

from steerable.engines import cluster
from steerable.engines.cluster import map_blocks
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def processes():
    """Ids of Ray's processes, this one's children or not."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if "raylet" in line or "gcs_server" in line}


@pytest.fixture(scope="module", autouse=True)
def local():
    before = processes()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="warning",
    )
    yield
    ray.shutdown()
    deadline = time.monotonic() + 30
    while processes() - before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes() - before


def setup():
    return os.getpid()


def square(pid, block, report):
    report(block)
    return block * block, torch.get_num_threads(), pid


def misbehave(pid, block, report):
    folder, what = block
    (folder / f"{what}.{time.monotonic_ns()}").write_text(str(os.getpid()))
    if what == "usage":
        raise UsageError("the block is wrong")
    if what == "bug":
        raise ValueError("two\nlines")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "long":
        report("long")
        time.sleep(1.5)
    if what == "killed":
        report("killed")
        time.sleep(0 if len(list(folder.glob("killed.*"))) > 1 else 60)
    return what, pid


def test_results_in_order():
    seen, found = [], {}
    results = map_blocks(
        square, [3, 1, 2], setup=setup, workers=2, threads=1, report=seen.append, finished=found.__setitem__
    )
    assert [r[:2] for r in results] == [(9, 1), (1, 1), (4, 1)]
    assert sorted(seen) == [1, 2, 3] and found == dict(enumerate(results))
    assert os.getpid() not in {pid for *_, pid in results}
    assert map_blocks(square, [], setup=setup) == []


def test_a_worker_that_is_killed_in_mid_run_is_replaced_and_its_block_done_again(tmp_path):
    """Killed from outside, while it computes: the first report says that it does."""
    killed = []

    def on_report(message):
        if not killed:
            killed.append(int(next(tmp_path.glob("killed.*")).read_text()))
            os.kill(killed[0], signal.SIGKILL)

    names = ["killed", "a", "b", "c"]
    results = map_blocks(
        misbehave, [(tmp_path, name) for name in names], setup=setup, workers=2, report=on_report, collect=True
    )
    assert [name for name, _ in results] == names
    assert len(killed) == 1 and killed[0] != results[0][1]
    assert len(list(tmp_path.glob("killed.*"))) == 2  # begun twice, finished once


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("usage", UsageError, "^the block is wrong$"),
        ("bug", SteerableError, r"on the cluster failed: ValueError: two lines \(test_cluster.py, line \d+\)"),
        ("die", SteerableError, r"died before its work was done \(ActorDiedError.*\(2 times in the same place\)"),
    ],
)
def test_failures_are_one_sentence(tmp_path, what, kind, text):
    with pytest.raises(kind, match=text) as caught:
        map_blocks(misbehave, [(tmp_path, what), (tmp_path, "long")], setup=setup, workers=2, retries=1)
    assert "\n" not in str(caught.value)


def test_no_more_workers_than_fit():
    with pytest.warns(SteerableWarning, match="2 CPUs and 0 GPUs: 2 of 5 workers"):
        assert len(map_blocks(square, [1, 2], setup=setup, workers=5)) == 2
    with pytest.raises(UsageError, match="a worker needs 1 CPUs and 2 GPUs, but the cluster has 2 CPUs and 0 GPUs"):
        map_blocks(square, [1], setup=setup, gpus=2)
    with pytest.raises(UsageError, match="at least 1"):
        map_blocks(square, [1], setup=setup, workers=0)


def test_a_worker_with_gpus_is_told_the_device():
    """No GPU here: the worker's own half, in this process."""

    def answer(gpus):
        setup = partial(dict, device="cuda:3", device_map=None, dtype="auto")
        actor = cluster._Actor(pickle.dumps((square, setup, 1, cluster._placement(gpus))))
        kind, _, reports = pickle.loads(actor.run(pickle.dumps(4)))
        assert kind == "result" and reports == [4]
        return actor.ready[0]

    threads = torch.get_num_threads()
    assert answer(0) == {"device": "cuda:3", "device_map": None, "dtype": "auto"}
    assert answer(0.5) == answer(1) == {"device": "cuda", "device_map": None, "dtype": "auto"}
    assert answer(4) == {"device": None, "device_map": "auto", "dtype": "auto"}
    torch.set_num_threads(threads)
