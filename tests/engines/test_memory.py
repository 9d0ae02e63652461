"""Out of memory: the same results in smaller batches. The error is torch's own, raised for every batch that is too
wide, as no machine of the tests has an accelerator to fill."""

import pytest
import torch

from steerable.engines.base import Continuation, Request
from steerable.engines.memory import in_halves
from steerable.engines.transformers import TransformersEngine
from steerable.store.errors import SteerableError, SteerableWarning

LIMIT = 3


@pytest.fixture
def narrow(monkeypatch):
    """`narrow(model)`: its linear maps have memory for three rows."""

    def make(model):
        forward = torch.nn.functional.embedding

        def limited(input, *args, **kwargs):
            if len(input) > LIMIT:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(input, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "embedding", limited)
        return model

    return make


@pytest.mark.parametrize("way", ["slots", "padded batches"])
def test_generation_goes_on_in_smaller_batches(way, tiny_llama, tokenizer, narrow, monkeypatch):
    if way == "padded batches":
        from steerable.engines.hf import engine as inside
        from steerable.engines.hf.routes import Route

        monkeypatch.setattr(inside, "route", lambda *_: Route(way, ""))
    requests = [Request([3 + i % 5, 4], seed=i) for i in range(11)]
    engine = TransformersEngine(tiny_llama, tokenizer, rows=8)
    expected = engine.generate(requests, max_new_tokens=6)
    narrow(tiny_llama)
    with pytest.warns(SteerableWarning, match="the memory does not hold 8 rows at once"):
        assert engine.generate(requests, max_new_tokens=6) == expected


def test_scores(tiny_llama, tokenizer, narrow):
    sequences = [Continuation([3, 4 + i], [5, 6, 7]) for i in range(7)]
    engine = TransformersEngine(tiny_llama, tokenizer)
    expected = engine.logprobs(sequences)
    narrow(tiny_llama)
    with pytest.warns(SteerableWarning, match="the memory does not hold 7 rows at once"):
        scores = engine.logprobs(sequences)
    for one, other in zip(scores, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_one_row_too_much_is_one_sentence():
    def work(batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.warns(SteerableWarning), pytest.raises(SteerableError, match="does not hold a single row"):
        in_halves([[0, 1]], work)


def test_other_errors_stay():
    def work(batch):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_halves([[0, 1]], work)
