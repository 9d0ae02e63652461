"""Planted classes with a posterior in closed form, and the honesty of the held-out figures."""

import numpy as np
import pytest

from steerable.chains.annotators.fitting import calibrate, cross_validate, expected_calibration_error


def planted(rows=1500, width=6, labels=3, seed=0, separation=1.5):
    """Gaussian classes of one covariance (the identity): log p(k | x) = m_k x - |m_k|^2 / 2 + constant."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(labels, width)) * separation / np.sqrt(width) * 1.5
    y = rng.integers(0, labels, rows)
    x = means[y] + rng.normal(size=(rows, width))
    logits = x @ means.T - (means**2).sum(1) / 2
    posterior = np.exp(logits - logits.max(1, keepdims=True))
    return x.astype(np.float32), y, posterior / posterior.sum(1, keepdims=True), rng.integers(0, 60, rows)


def predicted(fitted, x):
    logits = (((x - fitted.mean) / fitted.scale) @ fitted.weight.T + fitted.bias) / fitted.temperature
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def test_planted_classes_give_bayes_posterior():
    x, y, posterior, groups = planted(6000)
    fitted = cross_validate({(0,): x}, y, groups, 3)
    assert np.abs(predicted(fitted, x) - posterior).mean() < 0.02
    assert fitted.scores["accuracy"] == pytest.approx((posterior.argmax(1) == y).mean(), abs=0.01)
    assert fitted.scores["log_loss"] == pytest.approx(-np.log(posterior[np.arange(len(y)), y]).mean(), abs=0.01)
    assert fitted.scores["ece"] < 0.03
    assert np.array(fitted.scores["confusion"]).sum() == len(y)


def test_the_informative_features_are_chosen_and_noise_scores_nothing():
    x, y, _, groups = planted()
    noise = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    fitted = cross_validate({(0,): noise, (5,): x, (9,): noise[::-1]}, y, groups, 3)
    assert fitted.choice == (5,)
    only = cross_validate({(0,): noise}, y, groups, 3).scores
    assert abs(only["kappa"]) < 0.06 and only["log_loss"] >= np.log(3) - 0.02  # calibrated: it claims to know nothing


def test_groups_are_never_on_both_sides():
    # Each group has a feature of its own that gives its label away, and nothing carries over to other groups.
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 10)
    y = np.repeat(rng.integers(0, 2, 40), 10)
    x = np.eye(40, dtype=np.float32)[groups] + 0.01 * rng.normal(size=(400, 40)).astype(np.float32)
    assert cross_validate({(0,): x}, y, groups, 2).scores["accuracy"] < 0.65
    rows = rng.integers(0, 400, 400)  # the same with groups that mean nothing: rows of one kind on both sides
    assert cross_validate({(0,): x}, y, rows, 2).scores["accuracy"] > 0.95


def test_calibration_mends_overconfidence():
    # Far more features than the data can fix: the raw probabilities are too sure.
    rng = np.random.default_rng(0)
    x, y, _, groups = planted(300, separation=0.8)
    wide = np.hstack([x, rng.normal(size=(300, 600)).astype(np.float32)])
    scores = cross_validate({(0,): wide}, y, groups, 3).scores
    assert scores["ece"] < 0.5 * scores["ece_raw"]


def test_temperature_closed_forms():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = (rng.random(20_000)[:, None] > p.cumsum(1)).sum(1)
    for factor in (0.25, 1, 5):  # logits that are `factor` times too large
        temperature, loss = calibrate(logits * factor, y)
        assert temperature == pytest.approx(factor, rel=0.05)
        assert loss == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), rel=0.01)
    certain = np.array([[1.0, 0.0], [0.0, 1.0]] * 50)
    temperature, _ = calibrate(certain, np.array([0, 1] * 50))
    # without a mistake the smoothed optimum is odds of 1 - s/2 to s/2 with s = 1 / (n + 2)
    assert 1 / temperature == pytest.approx(np.log((1 - 1 / 204) / (1 / 204)), rel=1e-3)


def test_expected_calibration_error_by_hand():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    # bins of 0.2: confidences 0.6 and 0.8, 0.9, 0.9 -> [0.6, 0.8): gap 0.6; [0.8, 1]: |2.6 - 2| = 0.6
    assert expected_calibration_error(p, np.array([0, 1, 1, 1]), bins=5) == pytest.approx((0.6 + 0.6) / 4)
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0


@pytest.mark.parametrize("rare", [1, 2])
def test_labels_that_a_fold_lacks(rare):
    x, y, _, groups = planted(200, labels=2)
    y[groups == 7] = 2  # in one group alone: never both learnt and tested
    y = y if rare == 2 else np.where(y == 2, 2, 0)  # then the other folds have one label only
    fitted = cross_validate({(0,): x}, y, groups, 3)
    assert np.isfinite(fitted.scores["log_loss"]) and np.isfinite(fitted.weight).all()
    assert fitted.scores["by_label"][2] == {"f1": 0.0, "sentences": int((groups == 7).sum())}
