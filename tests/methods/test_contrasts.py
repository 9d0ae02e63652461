"""Difference of means and PCA on planted directions."""

import pytest
import torch

from steerable.methods.contrasts import difference_of_means, pca
from steerable.steering.site import Site
from steerable.store.errors import UsageError

SITE = Site("resid_post", 3)
PLANTED = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(0)), dim=0)


def groups(n=200, noise=0.3, offset=5.0, seed=1):
    """Pairs with a common nuisance, a large offset, and the planted direction at +-1."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 16, generator=generator) + offset
    a = common + PLANTED + noise * torch.randn(n, 16, generator=generator)
    b = common - PLANTED + noise * torch.randn(n, 16, generator=generator)
    return a, b


def test_difference_of_means():
    a, b = groups()
    direction = difference_of_means(a, b[:150], site="resid_post.3", behaviour="x", model_id="m")
    expected = a.double().mean(0) - b[:150].double().mean(0)
    assert torch.equal(direction.at(SITE), expected.float())
    assert direction.stats == {"positive": 200, "negative": 150} and direction.method == "difference_of_means"
    assert direction.behaviour == "x" and direction.model_id == "m"
    norms = torch.cat([a, b[:150]]).double().norm(dim=1)
    assert direction.norms[SITE] == pytest.approx(float(norms.mean()))


def test_float64_inside():
    """A small difference on a large mean, which float32 sums would lose."""
    a = torch.full((10_000, 2), 4096.0)
    a[::2, 0] += 2**-11
    direction = difference_of_means({SITE: a}, {SITE: torch.full((10_000, 2), 4096.0)})
    assert direction.at(3).tolist() == [2**-12, 0.0]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("n", [200, 201])
def test_pca_of_pairs(flip, n):
    a, b = groups(n)
    if flip:
        a, b = b, a
    direction = pca({SITE: a}, {SITE: b}).at(SITE)
    assert float(direction @ PLANTED) * (-1 if flip else 1) > 0.99
    assert direction.norm() == pytest.approx(1.0, abs=1e-6)
    assert ((a - b) @ direction).mean() > 0  # the positives project higher


def test_pca_of_one_group():
    generator = torch.Generator().manual_seed(0)
    data = 3 * torch.randn(500, 1, generator=generator) * PLANTED + 0.1 * torch.randn(500, 16, generator=generator)
    data = data + PLANTED
    direction = pca(data, site=SITE)
    assert float(direction.at(SITE) @ PLANTED) > 0.99
    covariance = torch.linalg.eigvalsh(data.double().T.cov())
    assert direction.stats["explained"][str(SITE)] == pytest.approx(float(covariance[-1] / covariance.sum()))
    uncentred = pca(data, site=SITE, centre=False).at(SITE).double()
    second_moment = data.double().T @ data.double()
    torch.testing.assert_close(second_moment @ uncentred, uncentred * torch.linalg.eigvalsh(second_moment)[-1])


def test_same_twice():
    a, b = groups()
    assert pca(a, b, site=SITE).to_bytes() == pca(a, b, site=SITE).to_bytes()


@pytest.mark.parametrize("estimate", [difference_of_means, pca])
@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 4), "need site="),
        ({SITE: torch.ones(3, 4)}, {}, "same sites"),
        ({SITE: torch.ones(3, 4)}, torch.ones(3, 4), "same sites"),
        ({}, {}, "no activations"),
        (torch.ones(3, 4).numpy(), torch.ones(3, 4).numpy(), "a torch tensor .*, and no ndarray"),
        ({SITE: torch.ones(3, 4)}, {SITE: torch.ones(3, 5)}, "one width"),
        ({SITE: torch.ones(3)}, {SITE: torch.ones(3)}, "one width"),
        ({SITE: torch.ones(0, 4)}, {SITE: torch.ones(3, 4)}, "n, d"),
        ({SITE: torch.ones(3, 4) * float("nan")}, {SITE: torch.ones(3, 4)}, "NaN"),
    ],
)
def test_errors(estimate, positive, negative, message):
    with pytest.raises(UsageError, match=message):
        estimate(positive, negative)


def test_pca_errors():
    with pytest.raises(UsageError, match="needs pairs"):
        pca(torch.ones(3, 4), torch.ones(2, 4), site=SITE)
    with pytest.raises(UsageError, match="do not vary"):
        pca(torch.ones(3, 4), site=SITE)
