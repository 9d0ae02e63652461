"""The discriminant against scikit-learn's."""

import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from steerable.methods.contrasts import difference_of_means
from steerable.methods.discriminants import lda
from steerable.steering.site import Site
from steerable.store.errors import UsageError

SITE = Site("resid_post", 3)


def classes(n=30, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    a, b = (torch.randn(n, d, generator=g, dtype=torch.float64) @ mix for _ in range(2))
    return a + 1.5, b


def unit(x):
    return torch.nn.functional.normalize(torch.as_tensor(x).double(), dim=0).float()


@pytest.mark.parametrize(("n", "d", "a"), [(30, 8, 0.0), (30, 8, 0.3), (5, 20, 0.2)])
def test_as_scikit_learn(n, d, a):
    positive, negative = classes(n, d)
    x, y = torch.cat([positive, negative]).numpy(), [1] * n + [0] * n
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=a).fit(x, y)
    direction = lda(positive, negative, site=SITE, shrinkage=a)
    torch.testing.assert_close(direction.at(SITE), unit(oracle.coef_[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "d"), [(30, 8), (6, 25)])
def test_shrinkage_of_ledoit_and_wolf(n, d):
    positive, negative = classes(n, d)
    within = torch.cat([positive - positive.mean(0), negative - negative.mean(0)]).numpy()
    expected = ledoit_wolf_shrinkage(within, assume_centered=True)
    assert lda(positive, negative, site=SITE).stats["shrinkage"] == {str(SITE): pytest.approx(expected)}


def test_full_shrinkage_is_the_difference_of_means():
    positive, negative = classes()
    expected = unit(difference_of_means(positive, negative, site=SITE).at(SITE))
    torch.testing.assert_close(lda(positive, negative, site=SITE, shrinkage=1.0).at(SITE), expected)


def test_it_leans_away_from_what_varies_within_the_classes():
    g = torch.Generator().manual_seed(1)
    noise = 10 * torch.randn(400, 1, generator=g) * torch.tensor([1.0, 0, 0]) + 0.1 * torch.randn(400, 3, generator=g)
    positive, negative = noise[:200] + torch.tensor([0, 1.0, 0]), noise[200:]
    assert float(lda(positive, negative, site=SITE, shrinkage=0.0).at(SITE)[1]) > 0.99


@pytest.mark.parametrize(
    ("positive", "negative", "options", "message"),
    [
        (torch.randn(3, 4), torch.randn(3, 4), {"shrinkage": 2}, "from 0 to 1"),
        (torch.randn(3, 9), torch.randn(3, 9), {"shrinkage": 0}, "too few rows"),
        (torch.ones(3, 4), torch.zeros(3, 4), {}, "some variance"),
        (torch.eye(3), torch.eye(3), {}, "different means"),
    ],
)
def test_errors(positive, negative, options, message):
    with pytest.raises(UsageError, match=message):
        lda(positive, negative, site=SITE, **options)
