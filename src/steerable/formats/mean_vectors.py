"""Mean vectors of Venhoff et al. 2025 (arXiv 2506.18167): {label: {"mean": [L, d], "count": n}} by `torch.save`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported, warn
from steerable.steering.direction import Direction
from steerable.store.errors import UsageError

OVERALL = "overall"


def _sniff(source: Source) -> bool:
    content = source.torch
    return isinstance(content, Mapping) and bool(content) and all(map(_is_mean, content.values()))


def _is_mean(value: Any) -> bool:
    return isinstance(value, Mapping) and {"mean", "count"} <= set(value)


def _read(source: Source, options: Options) -> Direction:
    """u = mean[label] - mean[overall], each row as long as that of mean[overall] (the paper's code)."""
    means = {str(label): entry for label, entry in source.torch.items()}
    labels = sorted(means.keys() - {OVERALL})
    if OVERALL not in means or not labels:
        raise UsageError(f"it holds the means of {', '.join(map(repr, labels))}: expected {OVERALL!r} and labels")
    label = options.choose(labels, "label", lambda: _check(means, labels))
    mean, overall = (_mean(means, key) for key in (label, OVERALL))
    _warn_of_single(means, [label])
    if mean.shape != overall.shape:
        raise UsageError(f"its means differ in shape: {list(mean.shape)} and {list(overall.shape)}")
    raw = mean - overall
    length, target = raw.norm(dim=1), overall.norm(dim=1)
    if not (length > 0).all():
        raise UsageError(f"the mean of {label!r} equals {OVERALL!r} in row {int((length == 0).nonzero()[0])}")
    scaled = (raw * (target / length)[:, None]).float()
    return imported(
        "mean-vectors",
        checks.at_blocks(checks.vector(row, f"row {i} of the difference") for i, row in enumerate(scaled)),
        "row i is block i's output",
        method="span difference of means",
        behaviour=label,
        about={
            "baseline": OVERALL,
            "count": checks.plain(means[label]["count"]),
            "norm_of_mean": target.tolist(),
            "norm_before_rescaling": length.tolist(),
        },
    )


def _check(means: Mapping[str, Any], labels: list[str]) -> None:
    """Raises UsageError where no label can be imported; warns of those that cannot, or hardly."""
    _mean(means, OVERALL)
    unsound: dict[str, UsageError] = {}
    for label in labels:
        try:
            _mean(means, label)
        except UsageError as error:
            unsound[label] = error
    for reason in unsound.values():
        if len(unsound) == len(labels):
            raise reason
        warn(f"{reason}: this label cannot be imported")
    _warn_of_single(means, [label for label in labels if label not in unsound])


def _warn_of_single(means: Mapping[str, Any], labels: list[str]) -> None:
    for label in labels:
        if checks.number(means[label]["count"], f"the count of {label!r}") <= 1:
            warn(f"the mean of {label!r} is of a single example (count 1): its vector is that example and hardly more")


def _mean(means: Mapping[str, Any], label: str) -> Tensor:
    """The mean [L, d] in float64, of which float32 must hold every number."""
    checks.number(means[label]["count"], f"the count of {label!r}")
    mean: Tensor = means[label]["mean"]
    checks.rows(mean, f"the mean of {label!r}")
    return mean.detach().double()


FORMATS = (Format("mean-vectors", _sniff, _read),)
