"""Out of memory: the same results in smaller batches. The error is torch's own, raised for every batch that is too
wide, as no machine of the tests has an accelerator to fill."""

import pytest
import torch

from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.engines.activations import capture, mean_norms
from steerable.engines.base import Continuation, Request
from steerable.engines.memory import in_halves
from steerable.engines.transformers import TransformersEngine
from steerable.evals.attribution import attribute
from steerable.methods.span_statistics import span_means
from steerable.models.reading import Queries
from steerable.steering.direction import Direction
from steerable.steering.site import Site
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


def test_capture(tiny_llama, tokenizer, narrow):
    texts = [f"{i} + {i} = {2 * i}" for i in range(7)]

    def read():
        return capture(tiny_llama, tokenizer, texts, sites=["resid_post.1"], sinks="keep")[Site("resid_post", 1)]

    expected = read()
    narrow(tiny_llama)
    with pytest.warns(SteerableWarning, match="the memory does not hold 7 rows at once"):
        torch.testing.assert_close(read(), expected, atol=1e-5, rtol=0)


def test_no_batch_counts_twice_in_means(tiny_llama, narrow):
    chains = [AlignedChain(f"{i}", 0, (*range(3, 13), i + 3), (TokenSpan("ab"[i % 2], 2, 6),)) for i in range(7)]
    expected = span_means(tiny_llama, chains, "ab", shuffles=0, sinks="keep")
    norms = mean_norms(tiny_llama, [chain.ids for chain in chains], expected.sites)
    narrow(tiny_llama)
    with pytest.warns(SteerableWarning, match="the memory does not hold 7 rows at once"):
        means = span_means(tiny_llama, chains, "ab", shuffles=0, sinks="keep")
    assert torch.equal(means.counts, expected.counts)
    torch.testing.assert_close(means.means, expected.means, atol=1e-5, rtol=0)
    with pytest.warns(SteerableWarning, match="going on with half as many"):
        assert mean_norms(tiny_llama, [chain.ids for chain in chains], expected.sites) == pytest.approx(norms, rel=1e-5)


def test_attribution(tiny_llama, monkeypatch):
    spans = tuple(TokenSpan("ab"[i % 2], i, i + 2) for i in range(2, 20, 3))
    chain = AlignedChain("task", 0, tuple(range(3, 27)), spans)
    sites = [Site("resid_post", layer) for layer in range(4)]
    width = tiny_llama.config.hidden_size
    direction = Direction({s: torch.randn(width, generator=torch.Generator().manual_seed(s.layer)) for s in sites})
    expected = attribute(tiny_llama, [chain], {"a": direction}).effects["a"]
    whole = Queries.logits

    def limited(queries, index=None):
        if len(queries if index is None else index) > LIMIT:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(queries, index)

    monkeypatch.setattr(Queries, "logits", limited)
    with pytest.warns(SteerableWarning, match="the memory does not hold 512 rows at once"):
        effects = attribute(tiny_llama, [chain], {"a": direction}).effects["a"]
    for metric in expected:
        torch.testing.assert_close(effects[metric], expected[metric], atol=1e-6, rtol=1e-4)
