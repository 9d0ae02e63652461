"""Concept vectors from a ridge logistic probe whose strength of regularisation is validated (RAPTOR)."""

from __future__ import annotations

import importlib.util
import math
import warnings
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steerable.methods.rows import (
    Activations,
    estimated,
    mean_norm,
    ordinary_masks,
    paired_sites,
    sink_stats,
    sites_of,
)
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

STRENGTHS = tuple(np.logspace(-4, 2, 100).tolist())
"""The paper's C, the inverse strength of the ridge: a hundred values from 1e-4 to 1e2."""
_FEWEST = 5
_SHARE = 0.2  # of the rows that validate, and of those that test


def ridge_logistic(
    positive: Activations,
    negative: Activations,
    *,
    site: Site | str | None = None,
    strengths: tuple[float, ...] = STRENGTHS,
    select: Literal["accuracy", "log_loss"] = "accuracy",
    seed: int = 42,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = w of the probe P(positive | h) = 1 / (1 + exp(-<h, w> - b)), at each site.

    RAPTOR (arXiv 2602.00158). The rows are split, each class by itself, into three parts for training (60 %),
    validation and test. Features are standardised with the mean m and the deviation s of the training part; logistic
    regressions with an L2 penalty 1 / C are fitted to it for each C, and the C of the best validation is fitted again
    to training and validation together, with the same m and s. Then w = w' / s and b = b' - <w, m>.

    The paper's concept vector is w / ||w||. Here w itself is kept, with b in `stats["bias"]`, so that the gate
    `probe(name > 0.5)` has the probe's probability; `probability_threshold` gives what RAPTOR steers to. The published
    generation script takes the unit vector with bias 0 for the probe, whose probability that is not: it is left out.

    Args:
        positive: activations {site: [n, d]}, or one tensor [n, d] with `site`; float64 inside.
        negative: the same of the other class; the counts may differ.
        site: the site of activations that are given as tensors.
        strengths: values of C. Small ones shrink w most.
        select: "accuracy" on the validation part, the smallest C where several are best, as in the paper; or
            "log_loss", which tells more values apart where the part is small.
        seed: of the split, which is the same at all sites.
        sinks: as in `contrasts.difference_of_means`.
        about: further fields of `Direction`.

    Returns:
        A Direction with vectors w [d]. `stats` hold, for each site, "bias", "C", "accuracy" (on the test part) and
        "validation_accuracy".

    Raises:
        UsageError: where scikit-learn is missing, for fewer than five rows of a class, strengths that are not positive,
            an unknown `select`, NaN.

    Example:
        >>> probe = ridge_logistic(torch.randn(20, 4) + 3, torch.randn(20, 4) - 3, site="resid_post.2")
        >>> probe.stats["accuracy"]
        {'resid_post.2': 1.0}
    """
    check_scikit_learn()
    if select not in ("accuracy", "log_loss"):
        raise UsageError(f"ridge_logistic selects by 'accuracy' or by 'log_loss', not by {select!r}")
    if not strengths or not all(math.isfinite(c) and c > 0 for c in strengths):
        raise UsageError("the strengths of ridge_logistic are positive numbers, one at least")
    groups = paired_sites(positive, negative, site)
    rows = {s: torch.cat(pair) for s, pair in groups.items()}
    counts = [len(next(iter(sites_of({s: pair[i] for s, pair in groups.items()}, None).values()))) for i in (0, 1)]
    labels = np.repeat([1, 0], counts)
    part = _split(counts, seed)
    masks, left_out = ordinary_masks(rows, sinks)
    vectors, norms = {}, {}
    stats: dict[str, Any] = {"bias": {}, "C": {}, "accuracy": {}, "validation_accuracy": {}}
    for s, x in rows.items():
        chosen = masks[s].numpy()
        for name, number in (("positive", 1), ("negative", 0)):
            if (count := int((chosen & (labels == number)).sum())) < _FEWEST:
                raise UsageError(f"ridge_logistic needs {_FEWEST} {name} activations at least, and {s} has {count}")
        w, vectors[s] = _validated(x.numpy()[chosen], labels[chosen], part[chosen], sorted(strengths), select)
        for key, value in w.items():
            stats[key][str(s)] = value
        norms[s] = mean_norm(x[masks[s]])
    return estimated(vectors, norms, "ridge_logistic", {**stats, **sink_stats(left_out, positive, negative)}, about)


def check_scikit_learn() -> None:
    """Raises UsageError where scikit-learn, which fits the probe, is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError("the probe needs scikit-learn: pip install 'steerable[probe]'")


def probability_threshold(direction: Direction, probability: float) -> dict[Site, float]:
    """The coordinate along w at which the probe gives a probability, (logit p - b) / ||w||^2, at each site.

    RAPTOR steers by the least move to it: a floor at these thresholds, where activations below are to rise to
    probability p, and a ceiling, where those above are to fall to it. Coordinates are counted in the vector w, as maps
    count them.

    Args:
        direction: from `ridge_logistic`.
        probability: p, strictly between 0 and 1.

    Returns:
        {site: threshold}, for `map=Clip.floor(threshold)` at that site.

    Raises:
        UsageError: for another probability, and a direction without the probe's bias.

    Example:
        >>> w = Direction({Site("resid_post", 2): torch.tensor([2.0, 0.0])}, stats={"bias": {"resid_post.2": -1.0}})
        >>> probability_threshold(w, 0.5)
        {Site(kind='resid_post', layer=2): 0.25}
    """
    if not 0 < probability < 1:
        raise UsageError(f"a probability to steer to is strictly between 0 and 1, not {probability}")
    bias = direction.stats.get("bias")
    if not isinstance(bias, dict) or any(str(s) not in bias for s in direction.vectors):
        raise UsageError("the direction has no bias of a probe at each site: make it with ridge_logistic")
    logit = math.log(probability / (1 - probability))
    return {s: (logit - bias[str(s)]) / float(w.double() @ w.double()) for s, w in direction.vectors.items()}


def _split(counts: list[int], seed: int) -> np.ndarray:
    """The part of each row: 0 training, 1 validation, 2 test, each class by itself, dealt in random order."""
    generator = np.random.default_rng(seed)
    parts = []
    for count in counts:
        held = max(1, round(_SHARE * count))
        part = np.repeat([1, 2, 0], [held, held, max(0, count - 2 * held)])[:count]
        parts.append(generator.permutation(part))
    return np.concatenate(parts)


def _validated(
    x: np.ndarray, y: np.ndarray, part: np.ndarray, strengths: list[float], select: str
) -> tuple[dict[str, float], Tensor]:
    """The figures and the w [d] of one site."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    train, validation, test = (part == number for number in range(3))
    mean, scale = x[train].mean(0), x[train].std(0)
    scale[scale <= 1e-12 * np.abs(x[train]).max(0)] = 1.0
    standard = (x - mean) / scale
    # w' lies in the span of the rows it is fitted to: coordinates in it are fewer, and give the same w'.
    _, _, span = np.linalg.svd(standard[~test], full_matrices=False)
    inside = standard @ span.T
    regression = LogisticRegression(max_iter=1000, warm_start=True, tol=1e-6)
    scores = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # where it stops early, the validation says how good it is
        for c in strengths:
            regression.set_params(C=c).fit(inside[train], y[train])
            if select == "accuracy":
                scores.append(regression.score(inside[validation], y[validation]))
            else:
                scores.append(-log_loss(y[validation], regression.predict_proba(inside[validation])[:, 1]))
        best = int(np.argmax(scores))  # the first of the best: the strongest ridge
        regression.set_params(C=strengths[best]).fit(inside[train], y[train])
        accuracy = regression.score(inside[validation], y[validation])
        regression.fit(inside[~test], y[~test])
    w = span.T @ regression.coef_[0] / scale
    figures = {
        "bias": float(regression.intercept_[0] - w @ mean),
        "C": float(strengths[best]),
        "accuracy": float(regression.score(inside[test], y[test])),
        "validation_accuracy": float(accuracy),
    }
    return figures, torch.from_numpy(w)
