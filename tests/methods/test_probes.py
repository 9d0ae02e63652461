"""The probe against scikit-learn's own pipeline on all dimensions, and steering to a probability."""

import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from steerable.methods import probes
from steerable.methods.probes import probability_threshold, ridge_logistic
from steerable.steering.gates import probe
from steerable.steering.maps import Clip
from steerable.steering.site import Site
from steerable.store.errors import UsageError

SITE = Site("resid_post", 3)
FEW = (1e-3, 1e-2, 0.1, 1.0)


def classes(n=40, d=6, gap=1.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 5, d, dtype=torch.float64)
    a, b = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    return (a + gap * torch.eye(d)[0]) * scale + 2, b * scale + 2


@pytest.mark.parametrize("d", [6, 100])
def test_as_scikit_learn_on_all_dimensions(d):
    a, b = classes(d=d)
    direction = ridge_logistic(a, b, site=SITE, strengths=FEW)
    x, y = torch.cat([a, b]).numpy(), np.repeat([1, 0], 40)
    part = probes._split([40, 40], 42)
    assert [int((part[y == 1] == number).sum()) for number in range(3)] == [24, 8, 8]
    scaler = StandardScaler().fit(x[part == 0])

    def fit(rows, c):
        return LogisticRegression(C=c, max_iter=2000, tol=1e-8).fit(scaler.transform(x[rows]), y[rows])

    def score(probe, rows):
        return probe.score(scaler.transform(x[rows]), y[rows])

    validated = [score(fit(part == 0, c), part == 1) for c in FEW]
    best = FEW[int(np.argmax(validated))]
    oracle = fit(part != 2, best)
    w = oracle.coef_[0] / scaler.scale_
    assert direction.stats["C"] == {str(SITE): best}
    assert direction.stats["validation_accuracy"] == {str(SITE): pytest.approx(max(validated))}
    assert direction.stats["accuracy"] == {str(SITE): pytest.approx(score(oracle, part == 2))}
    np.testing.assert_allclose(direction.at(SITE).numpy(), w, rtol=2e-3, atol=2e-4 * np.abs(w).max())
    logits = x @ direction.at(SITE).double().numpy() + direction.stats["bias"][str(SITE)]
    np.testing.assert_allclose(logits, oracle.decision_function(scaler.transform(x)), atol=5e-3)


def test_the_strongest_ridge_of_equals_is_taken():
    a, b = classes(gap=40.0)
    direction = ridge_logistic(a, b, site=SITE, strengths=(1.0, 0.1, 10.0))
    assert direction.stats["C"] == {str(SITE): 0.1} and direction.stats["accuracy"] == {str(SITE): 1.0}
    weak = ridge_logistic(a, b, site=SITE, strengths=(0.1, 10.0), select="log_loss")
    assert weak.stats["C"] == {str(SITE): 10.0}


def test_units_of_features_do_not_count():
    a, b = classes()
    units = torch.logspace(-3, 3, 6, dtype=torch.float64)
    direction, other = (ridge_logistic(x, y, site=SITE, strengths=FEW) for x, y in ((a, b), (a * units, b * units)))
    torch.testing.assert_close(other.at(SITE).double() * units, direction.at(SITE).double(), rtol=1e-4, atol=1e-6)


def test_shuffled_labels_are_at_chance():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=g)
    assert ridge_logistic(x[:100], x[100:], site=SITE, strengths=FEW).stats["accuracy"][str(SITE)] < 0.75


def test_steering_to_a_probability():
    a, b = classes()
    direction = ridge_logistic(a, b, site=SITE, strengths=(1.0,))
    w, bias = direction.at(SITE).double(), direction.stats["bias"][str(SITE)]
    h = torch.cat([a, b])[None]
    for map, beyond in ((Clip.floor, torch.le), (Clip.ceiling, torch.ge)):
        (intervention,) = direction.steering(1.0, map=map(probability_threshold(direction, 0.8)[SITE]))
        before, after = ((x @ w + bias).sigmoid()[0] for x in (h, intervention.apply(h)))
        moved = beyond(before, torch.tensor(0.8))
        assert moved.any() and not moved.all()
        torch.testing.assert_close(after[moved], torch.full_like(after[moved], 0.8), atol=1e-6, rtol=0)
        torch.testing.assert_close(intervention.apply(h)[0][~moved], h[0][~moved])
        step = (intervention.apply(h) - h)[0].norm(dim=1)
        least = ((np.log(4) - bias - h[0] @ w) / w.norm()).abs() * moved
        torch.testing.assert_close(step, least, atol=1e-8, rtol=1e-5)


def test_the_gate_reads_its_bias():
    a, b = classes()
    direction = ridge_logistic(a, b, site=SITE, strengths=FEW)
    bias = {SITE: direction.stats["bias"][str(SITE)]}
    assert probe(direction, ">", 0.5, bias).readings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": ()}, "positive numbers"),
        ({"strengths": (0.0, 1.0)}, "positive numbers"),
        ({"select": "loss"}, "not by 'loss'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UsageError, match=message):
        ridge_logistic(*classes(), site=SITE, **options)


def test_more_errors(monkeypatch):
    a, b = classes()
    with pytest.raises(UsageError, match="5 negative activations at least, and resid_post.3 has 4"):
        ridge_logistic(a, b[:4], site=SITE)
    direction = ridge_logistic(a, b, site=SITE, strengths=(1.0,))
    for probability in (0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="strictly between"):
            probability_threshold(direction, probability)
    direction.stats.clear()
    with pytest.raises(UsageError, match="no bias"):
        probability_threshold(direction, 0.5)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UsageError, match="scikit-learn"):
        ridge_logistic(a, b, site=SITE)
