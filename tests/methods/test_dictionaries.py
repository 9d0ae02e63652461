"""Dictionaries of concepts against scikit-learn and planted factors, and the algebra of shifts."""

import pytest
import torch
from sklearn.cluster import KMeans

from steerable.methods.dictionaries import concept_shifts, kmeans_dictionary, shift_vectors, snmf_dictionary
from steerable.store.errors import SteerableWarning, UsageError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clusters():
    """Three clusters of 20, 12 and 6 rows."""
    centres = 6 * normal(3, 5, seed=1)
    labels = torch.arange(3).repeat_interleave(torch.tensor([20, 12, 6]))
    return centres[labels] + 0.3 * normal(38, 5), labels


def test_kmeans():
    x, labels = clusters()
    dictionary = kmeans_dictionary(x, 3)
    oracle = KMeans(3, n_init=5, random_state=0).fit(x.numpy())
    assert torch.equal(dictionary.assignment, labels)  # the largest first
    means = torch.stack([x[labels == k].mean(0) for k in range(3)])
    torch.testing.assert_close(dictionary.concepts, means.float())
    assert dictionary.error == pytest.approx(oracle.inertia_ / float(x.square().sum()))
    torch.testing.assert_close(dictionary.amounts, (1 / (1 + torch.cdist(x, means))).float(), atol=1e-5, rtol=1e-4)
    again = kmeans_dictionary(x, 3)
    assert torch.equal(again.concepts, dictionary.concepts) and torch.equal(again.amounts, dictionary.amounts)


def test_snmf_of_planted_factors():
    a, u = normal(60, 3).abs() * (normal(60, 3, seed=2) > 0), normal(3, 8, seed=3)
    x = (a @ u)[a.sum(1) > 0]
    dictionary = snmf_dictionary(x, 3)
    assert dictionary.error < 1e-3 and bool((dictionary.amounts >= 0).all())
    rest = (x - dictionary.amounts.double() @ dictionary.concepts.double()).square().sum() / x.square().sum()
    assert float(rest) == pytest.approx(dictionary.error, abs=1e-6)
    torch.testing.assert_close(dictionary.amounts.amax(0), torch.ones(3))  # the stated length


def test_snmf_leaves_less_over_than_clusters_and_more_than_svd():
    x = normal(40, 6) + 1
    error = snmf_dictionary(x, 3).error
    singular = torch.linalg.svdvals(x).square()
    assert float(singular[3:].sum() / singular.sum()) <= error < kmeans_dictionary(x, 3).error


@pytest.mark.parametrize("make", [kmeans_dictionary, snmf_dictionary])
def test_sinks_and_errors(make):
    x, _ = clusters()
    with_sink = torch.cat([1e5 * torch.ones(1, 5).double(), x])
    with pytest.warns(SteerableWarning):
        dictionary = make(with_sink, 3)
    assert dictionary.rows.tolist() == [False] + [True] * 38
    torch.testing.assert_close(dictionary.concepts, make(x, 3).concepts)
    assert make(x, 3, seed=-1).concepts.shape == (3, 5)
    for bad, count, message in [
        (x[0], 2, "activations"),
        (x, 0, "expected 1 to 38"),
        (torch.ones(4, 2), 2, "expected 1 to 1"),
        (x * float("nan"), 2, "NaN"),
    ]:
        with pytest.raises(UsageError, match=message):
            make(bad, count)


def test_shifts():
    s = shift_vectors(normal(4, 3))
    assert torch.equal(s, -s.transpose(0, 1)) and not s.diagonal().any()
    torch.testing.assert_close(s[0, 1] + s[1, 2], s[0, 2])
    torch.testing.assert_close(s.mean((0, 1)), torch.zeros(3).double())
    with pytest.raises(UsageError, match=r"\[K, d\]"):
        shift_vectors(torch.ones(3))


def test_concept_shifts():
    x, labels = clusters()
    planted = normal(3, 5, seed=4)
    shifts = concept_shifts(x, x + planted[labels], labels, 3)
    torch.testing.assert_close(shifts, planted.float())
    with pytest.raises(UsageError, match="concept 3 has no row"):
        concept_shifts(x, x, labels, 4)
    with pytest.raises(UsageError, match="from 0 to 1"):
        concept_shifts(x, x, labels, 2)
    with pytest.raises(UsageError, match="same rows"):
        concept_shifts(x, x[1:], labels, 3)
