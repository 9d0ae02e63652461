"""Weighted means against closed forms in NumPy, and the equivalences between them."""

import numpy as np
import pytest
import torch

from steerable.methods.contrasts import difference_of_means
from steerable.methods.weighted_means import entropy_weighted, paired_difference, weighted_mean
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

SITE = Site("resid_post", 3)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3.0


def close(direction, expected):
    torch.testing.assert_close(direction.at(SITE), torch.as_tensor(expected).float())


def test_mean_difference_is_a_weighted_mean():
    x = normal(11, 6)
    x[2] *= 1000  # an attention sink: left out of both
    weights = [1 / 4] * 4 + [-1 / 7] * 7
    with pytest.warns(SteerableWarning, match="attention sinks"):
        expected = difference_of_means(x[:4], x[4:], site=SITE)
    with pytest.warns(SteerableWarning, match="attention sinks"):
        direction = weighted_mean(x, weights, site=SITE)
    close(direction, expected.at(SITE))
    assert direction.norms == pytest.approx(expected.norms)
    assert direction.stats["attention_sinks"] == expected.stats["attention_sinks"]
    close(weighted_mean(x, weights, site=SITE, sinks="keep"), x[:4].mean(0) - x[4:].mean(0))


@pytest.mark.parametrize(("weights", "message"), [([1, 1, 1], "sum to zero"), ([0, 0, 0], "not all zero"),
                                                  ([1, -1], "one value for each"), ([1, "a", 2], "numbers"),
                                                  ([1, float("nan"), -1], "finite")])  # fmt: skip
def test_weights_that_are_no_contrast(weights, message):
    with pytest.raises(UsageError, match=message):
        weighted_mean(normal(3, 2), weights, site=SITE)


def test_pairs():
    a, b = normal(9, 4), normal(9, 4, seed=1)
    direction = paired_difference(a, b, site=SITE)
    close(direction, (a - b).mean(0))
    close(direction, difference_of_means(a, b, site=SITE).at(SITE))
    close(paired_difference(b, a, site=SITE), -direction.at(SITE))
    common = 10 * normal(9, 4, seed=2)  # what a pair has in common
    close(paired_difference(a + common, b + common, site=SITE), direction.at(SITE))
    a[0] *= 1e4
    with pytest.warns(SteerableWarning):
        close(paired_difference(a, b, site=SITE), (a - b)[1:].mean(0))
    with pytest.raises(UsageError, match="needs pairs"):
        paired_difference(a, b[1:], site=SITE)


def east(seed=0):
    rng = np.random.default_rng(seed)
    runs = np.repeat(["a", "b", "c"], [7, 4, 1])
    return torch.tensor(rng.normal(size=(12, 5)) + 2), rng.uniform(0.1, 0.7, 12), runs


def test_east_is_the_covariance_within_runs():
    z, h, runs = east()
    direction = entropy_weighted({SITE: z}, torch.tensor(h), runs)
    covariances = sum(
        (runs == run).sum() * np.cov(h[runs == run], z.numpy()[runs == run].T, ddof=0)[0, 1:] for run in "abc"
    )
    close(direction, covariances / h.sum())
    centred = z.clone()
    for run in "abc":
        centred[runs == run] -= z[runs == run].mean(0)
    close(direction, torch.tensor(h) @ centred / h.sum())
    weights = np.array([x - h[runs == run].mean() for x, run in zip(h, runs, strict=True)]) / h.sum()
    close(direction, weighted_mean(z, weights, site=SITE).at(SITE))


def test_east_invariances():
    z, h, runs = east()
    direction = entropy_weighted(z, h, runs, site=SITE)
    moved = z.clone()
    moved[runs == "b"] += 5.0
    close(entropy_weighted(moved, h, runs, site=SITE), direction.at(SITE))
    close(entropy_weighted(z, h / np.log(2), runs, site=SITE), direction.at(SITE))
    with pytest.raises(UsageError, match="do not vary"):
        entropy_weighted(z, [0.3] * 12, runs, site=SITE)
    with pytest.raises(UsageError, match="not negative"):
        entropy_weighted(z, -h, runs, site=SITE)


def test_east_leaves_sinks_out_of_the_means_of_runs():
    z, h, runs = east()
    with_sink = torch.cat([z, 1e5 * torch.ones(1, 5, dtype=z.dtype)])
    with pytest.warns(SteerableWarning, match="1 of 13"):
        direction = entropy_weighted(with_sink, [*h, 0.7], [*runs, "a"], site=SITE)
    close(direction, entropy_weighted(z, h, runs, site=SITE).at(SITE))
