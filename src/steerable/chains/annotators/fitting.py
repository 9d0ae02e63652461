"""Logistic regression with cross-validation over groups: what the probe learns and how well it does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PENALTIES = (1e-1, 1e-2, 1e-3)
"""Inverse L2 penalties (scikit-learn's C) to choose from."""
_FIRST = 1e-2
_UNSEEN = 20.0  # logits below the likeliest label that a label gets which the training folds lack


@dataclass(frozen=True)
class Fitted:
    """The chosen candidate, fitted on all rows, in standardised features; `scores` are those held out."""

    choice: tuple[int, ...]
    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    temperature: float
    scores: dict[str, Any]


@dataclass(frozen=True)
class _Candidate:
    choice: tuple[int, ...]
    penalty: float
    logits: np.ndarray
    """[N, K] of every row by the model that was fitted without the row's fold."""


def cross_validate(
    features: Mapping[tuple[int, ...], np.ndarray],
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
    fold = _folds(y, groups, folds, seed)
    candidates = [_Candidate(name, _FIRST, _held_out(x, y, fold, labels, _FIRST)) for name, x in features.items()]
    best = min(candidates, key=lambda c: _calibrated(c.logits, y)[1]).choice
    candidates += [
        _Candidate(best, penalty, _held_out(features[best], y, fold, labels, penalty))
        for penalty in PENALTIES
        if penalty != _FIRST
    ]
    probabilities = np.zeros((len(y), labels))
    raw = np.zeros_like(probabilities)
    for k in range(folds):
        inside, outside = fold == k, fold != k
        chosen, temperature = _choose(candidates, y, outside)
        probabilities[inside] = _softmax(chosen.logits[inside] / temperature)
        raw[inside] = _softmax(chosen.logits[inside])
    final, temperature = _choose(candidates, y, np.ones(len(y), dtype=bool))
    mean, scale, weight, bias = _fit(features[final.choice], y, labels, final.penalty)
    scores = _scores(probabilities, y, labels)
    scores |= {
        "ece_raw": expected_calibration_error(raw, y),
        "penalty": 1 / final.penalty,
        "temperature": temperature,
        "layers": [
            {"layers": list(c.choice), "penalty": 1 / c.penalty, "log_loss": _calibrated(c.logits, y)[1]}
            for c in candidates
        ],
    }
    return Fitted(final.choice, mean, scale, weight, bias, temperature, scores)


def expected_calibration_error(probabilities: np.ndarray, y: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal bins of the confidence, weighted by their rows (Guo et al.
    2017, arXiv 1706.04599, section 2)."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, confidence - right, bins)
    return float(np.abs(gaps).sum() / len(y))


def _folds(y: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    from sklearn.model_selection import GroupKFold

    fold = np.zeros(len(y), dtype=int)
    splits = GroupKFold(folds, shuffle=True, random_state=seed).split(y, y, groups)
    for k, (_, inside) in enumerate(splits):
        fold[inside] = k
    return fold


def _held_out(x: np.ndarray, y: np.ndarray, fold: np.ndarray, labels: int, penalty: float) -> np.ndarray:
    logits = np.zeros((len(y), labels))
    for k in range(int(fold.max()) + 1):
        mean, scale, weight, bias = _fit(x[fold != k], y[fold != k], labels, penalty)
        logits[fold == k] = ((x[fold == k] - mean) / scale) @ weight.T + bias
    return logits


def _fit(x: np.ndarray, y: np.ndarray, labels: int, penalty: float) -> tuple[np.ndarray, ...]:
    """mean [D], scale [D], weight [K, D], bias [K]. A label without rows gets a logit far below the others'."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    seen = np.unique(y)
    weight, bias = np.zeros((labels, x.shape[1])), np.full(labels, -_UNSEEN)
    if len(seen) == 1:
        bias[seen] = 0.0
    else:
        regression = LogisticRegression(C=penalty, max_iter=500)
        with warnings.catch_warnings():  # where it stops early, the held-out figures say how good it is
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression.fit(scaler.transform(x), y)
        if len(seen) == 2:  # scikit-learn keeps the second label's row alone
            weight[seen[1]], bias[seen] = regression.coef_[0], [0.0, regression.intercept_[0]]
        else:
            weight[seen], bias[seen] = regression.coef_, regression.intercept_
    return tuple(np.asarray(a, dtype=np.float64) for a in (scaler.mean_, scaler.scale_, weight, bias))


def _choose(candidates: Sequence[_Candidate], y: np.ndarray, rows: np.ndarray) -> tuple[_Candidate, float]:
    """The candidate of least calibrated log-loss on these rows, and its temperature there."""
    fits = [_calibrated(c.logits[rows], y[rows]) for c in candidates]
    best = min(range(len(fits)), key=lambda i: fits[i][1])
    return candidates[best], fits[best][0]


def _calibrated(logits: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The temperature of least log-loss, and the log-loss with it.

    The labels are smoothed by one row's weight as in Platt scaling (Platt 1999), so that the temperature of predictions
    without a mistake is finite.
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    smoothing = 1 / (len(y) + 2)
    known, average = logits[np.arange(len(y)), y].mean(), logits.mean()

    def partition(temperature: float) -> float:
        top = logits.max(1)
        return float(np.mean(np.log(np.exp((logits - top[:, None]) / temperature).sum(1)) + top / temperature))

    def loss(log_temperature: float) -> float:
        t = float(np.exp(log_temperature))
        return partition(t) - ((1 - smoothing) * known + smoothing * average) / t

    temperature = float(np.exp(minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded").x))
    return temperature, partition(temperature) - known / temperature


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))


def _scores(probabilities: np.ndarray, y: np.ndarray, labels: int) -> dict[str, Any]:
    from sklearn import metrics

    said, known = probabilities.argmax(1), np.arange(labels)
    f1 = metrics.f1_score(y, said, labels=known, average=None, zero_division=0.0)
    counts = np.bincount(y, minlength=labels)
    return {
        "accuracy": float(metrics.accuracy_score(y, said)),
        "macro_f1": float(f1.mean()),
        "kappa": float(metrics.cohen_kappa_score(y, said)),
        "log_loss": float(metrics.log_loss(y, probabilities, labels=known)),
        "ece": expected_calibration_error(probabilities, y),
        "majority": float(counts.max() / len(y)),
        "by_label": [{"f1": float(score), "sentences": int(n)} for score, n in zip(f1, counts, strict=True)],
        "confusion": metrics.confusion_matrix(y, said, labels=known).tolist(),
    }
