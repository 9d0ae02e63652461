"""Extraction and attribution on a real Ray cluster, with a worker killed in mid-run, against this process alone."""

import os
import signal
import threading
import time
from functools import partial

import pytest
import torch

from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.engines import cluster
from steerable.evals.attribution import METRICS, attribute
from steerable.methods import span_statistics as module
from steerable.methods.span_statistics import span_means
from steerable.models.loading import load
from steerable.steering.direction import Direction
from steerable.steering.site import Site

ray = pytest.importorskip("ray")
LABELS = ("a", "b")


@pytest.fixture(scope="module", autouse=True)
def local():
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


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    from tiny_families import tiny  # not at the top: the workers import this module without the tests' own path

    folder = tmp_path_factory.mktemp("model")
    tiny("qwen2").save_pretrained(folder)  # with sliding windows
    tokenizer.save_pretrained(folder)
    return load(folder, device="cpu").model


@pytest.fixture(scope="module")
def chains():
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(12):
        spans = tuple(TokenSpan(LABELS[(i + j) % 2], at, at + 4) for j, at in enumerate(range(4, 16 + 4 * (i % 3), 4)))
        ids = torch.randint(0, 60, (spans[-1].end,), generator=generator).tolist()
        made.append(AlignedChain(f"t{i}", 0, tuple(ids), spans))
    return made


class Murder:
    """`work`, but the first process that computes block 1 is killed (SIGKILL) in the middle of it."""

    def __init__(self, work, mark):
        self.work, self.mark = work, mark

    def __call__(self, loaded, block, report):
        number, block = block
        if number == 1 and not self.mark.exists():
            self.mark.write_text(str(os.getpid()))
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
            self.work(loaded, block, report)
            time.sleep(30)
        return self.work(loaded, block, report)


def killed_once(work, blocks, *, mark, **options):
    return cluster.map_blocks(Murder(work, mark), list(enumerate(blocks)), **options)


@pytest.mark.slow
def test_span_means_are_those_of_this_process(model, chains, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 40)
    here = span_means(model, chains, LABELS, max_tokens=40)
    mark = tmp_path / "killed"
    there = span_means(model, chains, LABELS, max_tokens=40, workers=2, spread=partial(killed_once, mark=mark))
    assert int(mark.read_text()) != os.getpid()
    for name in ("means", "counts", "norms"):
        assert torch.equal(getattr(there, name), getattr(here, name))
    # and the blocks matter to the last bits alone
    monkeypatch.setattr(module, "_BLOCK", 10**9)
    whole = span_means(model, chains, LABELS, max_tokens=40)
    for name in ("means", "counts", "norms"):
        torch.testing.assert_close(getattr(here, name), getattr(whole, name), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_attribution_is_that_of_this_process(model, chains, tmp_path):
    vectors = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    given = {b: Direction({Site("resid_post", k): vectors[i, k] for k in range(4)}) for i, b in enumerate(LABELS)}
    here = attribute(model, chains, given, sample=2, limit=5)
    mark, told = tmp_path / "killed", []
    there = attribute(
        model, chains, given, sample=2, limit=5, workers=2, spread=partial(killed_once, mark=mark),
        progress=lambda *at: told.append(at),
    )  # fmt: skip
    assert mark.exists() and told == [(n, 5) for n in range(1, 6)]
    for behaviour in LABELS:
        for metric in METRICS:
            a, b = (x.effects[behaviour][metric].nan_to_num(-1) for x in (here, there))
            assert torch.equal(a, b)
