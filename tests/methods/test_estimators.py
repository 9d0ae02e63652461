"""Estimators on span activations against the means of one pass, and against naive sums."""

from functools import partial

import pytest
import torch
from tiny_families import tiny

from steerable.chains.windows import AlignedChain, TokenSpan, window_positions
from steerable.methods import estimators
from steerable.methods.contrasts import difference_of_means
from steerable.methods.estimators import span_activations
from steerable.methods.span_statistics import span_means
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

LABELS = ("a", "b", "c")


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def chains():
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(9):
        spans = tuple(TokenSpan(LABELS[(i + j) % 3], at, at + 3) for j, at in enumerate(range(2, 12 + 3 * (i % 4), 4)))
        ids = torch.randint(0, 60, (spans[-1].end + 1,), generator=generator).tolist()
        made.append(AlignedChain(f"t{i}", 0, tuple(ids), spans))
    return made


@pytest.mark.parametrize("window", ["onset", "span", "published"])
@pytest.mark.parametrize("shuffle", [0, 1, 2])
def test_difference_of_means_is_the_pooled_direction(model, chains, window, shuffle):
    """mean(b) - mean(not b) and mean(b) - mean(all) point the same way, and both are made equally long."""
    means = span_means(model, chains, LABELS, shuffles=2, seed=5, sinks="keep")
    spans = span_activations(model, chains, window, shuffles=2, seed=5)
    for label in LABELS:
        expected = means.direction(label, window, "pooled", shuffle=shuffle)
        got = spans.direction(difference_of_means, means, label, shuffle)
        for site, vector in expected.vectors.items():
            torch.testing.assert_close(got.vectors[site], vector, atol=1e-4, rtol=1e-4)
        assert got.behaviour == label and got.norms == expected.norms and got.unit == expected.unit


@pytest.mark.parametrize("chunk", [None, 7])
def test_activations_are_naive_means(model, chains, monkeypatch, chunk):
    if chunk is not None:  # chains that are longer than a chunk are batches by themselves, and are read in pieces
        monkeypatch.setattr(estimators, "batch_tokens", lambda model: 1)
        monkeypatch.setattr(estimators, "stream", partial(estimators.stream, chunk=chunk, sinks="keep"))
    spans = span_activations(model, chains, "published")
    with torch.no_grad():
        rows = []
        for chain in chains:
            h = model(torch.tensor([chain.ids]), output_hidden_states=True).hidden_states[2][0]
            rows += [(s.label, h[list(window_positions("published", s.start, s.end))].mean(0)) for s in chain.spans]
    assert sorted(spans.labels[0]) == sorted(label for label, _ in rows)
    got, expected = spans.activations[Site("resid_post", 1)], torch.stack([row for _, row in rows])
    nearest = (got[:, None] - expected[None]).norm(dim=-1).min(1)
    assert nearest.values.max() < 1e-4 and len(set(nearest.indices.tolist())) == len(rows) == len(got)
    assert [rows[i][0] for i in nearest.indices.tolist()] == spans.labels[0]


def test_what_an_estimator_must_return(model, chains):
    means, spans = span_means(model, chains, LABELS), span_activations(model, chains, "onset")
    with pytest.raises(UsageError, match="must return a Direction"):
        spans.direction(lambda positive, negative: positive, means, "a")
    with pytest.raises(UsageError, match="must return a Direction"):
        spans.direction(lambda p, n: Direction({Site("resid_post", 0): torch.ones(32)}), means, "a")

    def broken(positive, negative):
        raise KeyError("x")

    with pytest.raises(UsageError, match="the estimator broken failed on a .KeyError"):
        spans.direction(broken, means, "a")
