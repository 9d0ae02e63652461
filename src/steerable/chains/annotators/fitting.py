"""Calibrated logistic regression with cross-validation over groups: what the probe learns and how well it does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

PENALTIES = (1e-2, 1e-1, 1e-3)
"""Inverse L2 penalties (scikit-learn's C) to choose from; the features are chosen with the first."""
_UNSEEN = -20.0  # log-probability of a label that the training folds lack

Choice = tuple[int, ...]


@dataclass(frozen=True)
class Fitted:
    """The chosen candidate, fitted on all rows, in standardised features; `scores` are those held out."""

    choice: Choice
    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    temperature: float
    scores: dict[str, Any]


def cross_validate(
    features: Mapping[Choice, np.ndarray],
    y: np.ndarray,
    groups: np.ndarray,
    labels: int,
    *,
    folds: int = 5,
    seed: int = 0,
) -> Fitted:
    """Choose among features (arrays [N, D] by name) and penalties, fit on all rows, and measure without bias.

    y: label numbers [N]; groups [N]: rows of one group are never on both sides of a split. Which candidate and which
    temperature a fold's rows are predicted with is decided on the held-out predictions of the other folds.
    """
    from scipy.special import softmax
    from sklearn.model_selection import GroupKFold

    splits = list(GroupKFold(folds, shuffle=True, random_state=seed).split(y, y, groups))

    def held_out(choice: Choice, penalty: float) -> np.ndarray:
        """Log-probabilities [N, K] of every row by the model that was fitted without the row's fold."""
        logs, x = np.full((len(y), labels), _UNSEEN), features[choice]
        for outside, inside in splits:
            seen = np.unique(y[outside])
            log_probs = 0.0 if len(seen) == 1 else _fitted(x[outside], y[outside], penalty).predict_log_proba(x[inside])
            logs[np.ix_(inside, seen)] = log_probs
        return logs

    def choose(rows: np.ndarray) -> tuple[tuple[Choice, float], float]:
        """The candidate of least calibrated log-loss on these rows, and its temperature there."""
        fits = {candidate: calibrate(logs[rows], y[rows]) for candidate, logs in candidates.items()}
        best = min(fits, key=lambda candidate: fits[candidate][1])
        return best, fits[best][0]

    everywhere = np.arange(len(y))
    candidates = {(choice, PENALTIES[0]): held_out(choice, PENALTIES[0]) for choice in features}
    best = choose(everywhere)[0][0]
    candidates |= {(best, penalty): held_out(best, penalty) for penalty in PENALTIES[1:]}
    raw, probabilities = np.zeros((2, len(y), labels))
    for outside, inside in splits:
        candidate, temperature = choose(outside)
        raw[inside] = softmax(candidates[candidate][inside], axis=1)
        probabilities[inside] = softmax(candidates[candidate][inside] / temperature, axis=1)
    (choice, penalty), temperature = choose(everywhere)
    scores = _scores(probabilities, y, labels) | {
        "ece_raw": expected_calibration_error(raw, y),
        "penalty": 1 / penalty,
        "temperature": temperature,
        "layers": [
            {"layers": list(name), "penalty": 1 / strength, "log_loss": calibrate(logs, y)[1]}
            for (name, strength), logs in candidates.items()
        ],
    }
    scaler, regression = (step for _, step in _fitted(features[choice], y, penalty).steps)
    weight, bias = np.zeros((labels, features[choice].shape[1])), np.full(labels, _UNSEEN)
    # Of two labels scikit-learn keeps the second one's row alone.
    seen = regression.classes_
    weight[seen] = np.vstack([0 * regression.coef_, regression.coef_]) if len(seen) == 2 else regression.coef_
    bias[seen] = [0, *regression.intercept_] if len(seen) == 2 else regression.intercept_
    return Fitted(choice, scaler.mean_, scaler.scale_, weight, bias, temperature, scores)


def _fitted(x: np.ndarray, y: np.ndarray, penalty: float) -> Any:
    """Standardised features and a logistic regression with an L2 penalty, as a scikit-learn pipeline."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():  # where it stops early, the held-out figures say how good it is
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=500)).fit(x, y)


def calibrate(logits: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The temperature of least log-loss, and the log-loss with it (Guo et al. 2017, arXiv 1706.04599).

    The labels are smoothed by one row's weight as in Platt scaling (Platt 1999), so that the temperature of predictions
    without a mistake is finite.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    smoothing, rows = 1 / (len(y) + 2), np.arange(len(y))
    target = np.full(logits.shape, smoothing / logits.shape[1])
    target[rows, y] += 1 - smoothing

    def loss(log_temperature: float) -> float:
        return -float((target * log_softmax(logits / np.exp(log_temperature), axis=1)).sum(1).mean())

    temperature = float(np.exp(minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded").x))
    return temperature, -float(log_softmax(logits / temperature, axis=1)[rows, y].mean())


def expected_calibration_error(probabilities: np.ndarray, y: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal bins of the confidence, weighted by their rows (Guo et al.
    2017, arXiv 1706.04599, section 2)."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(place, confidence - right, bins)).sum() / len(y))


def _scores(probabilities: np.ndarray, y: np.ndarray, labels: int) -> dict[str, Any]:
    from sklearn import metrics

    predicted, numbers = probabilities.argmax(1), np.arange(labels)
    f1 = metrics.f1_score(y, predicted, labels=numbers, average=None, zero_division=0.0)
    counts = np.bincount(y, minlength=labels)
    return {
        "accuracy": float(metrics.accuracy_score(y, predicted)),
        "macro_f1": float(f1.mean()),
        "kappa": float(metrics.cohen_kappa_score(y, predicted)),
        "log_loss": float(metrics.log_loss(y, probabilities, labels=numbers)),
        "ece": expected_calibration_error(probabilities, y),
        "majority": float(counts.max() / len(y)),
        "by_label": [{"f1": float(score), "sentences": int(n)} for score, n in zip(f1, counts, strict=True)],
        "confusion": metrics.confusion_matrix(y, predicted, labels=numbers).tolist(),
    }
