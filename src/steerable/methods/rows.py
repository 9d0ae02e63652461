"""Rows of activations as estimators take them: checked, in float64 on the CPU, and without attention sinks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steerable.models import sinks as attention_sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

Activations = dict[Site, Tensor] | Tensor
"""Activations {site: [n, d]} as `capture` returns them, or one tensor [n, d] beside `site=`."""
Groups = dict[Site, tuple[Tensor, ...]]
"""Several groups of rows at each site, float64 [n, d] each."""


def paired_sites(
    positive: Activations, negative: Activations, site: Site | str | None
) -> dict[Site, tuple[Tensor, Tensor]]:
    """Both groups at each site in float64, on the CPU. Raises UsageError where they do not fit each other."""
    if isinstance(site, str):
        site = Site.parse(site)
    if odd := [type(group).__name__ for group in (positive, negative) if not isinstance(group, torch.Tensor | Mapping)]:
        raise UsageError(f"activations are a torch tensor [n, d], or such tensors by site, and no {odd[0]}")
    if isinstance(positive, torch.Tensor) and isinstance(negative, torch.Tensor):
        if site is None:
            raise UsageError("activations given as tensors need site=, as in site='resid_post.3'")
        positive, negative = {site: positive}, {site: negative}
    if isinstance(positive, torch.Tensor) or isinstance(negative, torch.Tensor) or set(positive) != set(negative):
        raise UsageError("the positive and the negative activations must have the same sites")
    if not positive:
        raise UsageError("there are no activations")
    pairs = {s: (positive[s].cpu().double(), negative[s].cpu().double()) for s in sorted(positive)}
    for s, (a, b) in pairs.items():
        if a.dim() != 2 or b.dim() != 2 or not len(a) or not len(b) or a.shape[1] != b.shape[1]:
            raise UsageError(f"activations at {s} must be [n, d] of one width, not {tuple(a.shape)}, {tuple(b.shape)}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UsageError(f"the activations at {s} hold NaN or infinite numbers")
    return pairs


def sites_of(activations: Activations, site: Site | str | None) -> dict[Site, Tensor]:
    """One group at each site in float64, on the CPU, of as many rows at every site. Raises UsageError."""
    rows = {s: a for s, (a, _) in paired_sites(activations, activations, site).items()}
    if len(counts := sorted({len(a) for a in rows.values()})) > 1:
        raise UsageError(f"the sites must have the same rows, and there are {counts[0]} and {counts[1]} of them")
    return rows


def check_pairs(groups: Mapping[Site, tuple[Tensor, Tensor]], method: str) -> None:
    """Raises UsageError for unequal numbers of positive and negative rows."""
    for s, (a, b) in groups.items():
        if len(a) != len(b):
            raise UsageError(f"{method} needs pairs: {len(a)} positive and {len(b)} negative activations at {s}")


def ordinary_masks(
    rows: Mapping[Site, Tensor], sinks: str, stacklevel: int = 3
) -> tuple[dict[Site, Tensor], dict[Site, dict[str, Any]]]:
    """Which rows are not attention sinks at each site, [n] bool, and how many are left out; warns of them."""
    attention_sinks.check(sinks)
    if sinks == "keep":
        return {s: torch.ones(len(a), dtype=torch.bool) for s, a in rows.items()}, {}
    masks = {s: ~attention_sinks.massive_rows(a) for s, a in rows.items()}
    return masks, _left_out(masks, stacklevel + 1)


def ordinary_groups(
    groups: Mapping[Site, tuple[Tensor, ...]], sinks: str, paired: bool = False
) -> tuple[Groups, dict[Site, dict[str, Any]]]:
    """The groups at each site without their attention sinks, and how many rows were left out; `paired` leaves a row's
    partners out as well. Raises UsageError where a whole group is massive beside the others."""
    attention_sinks.check(sinks)
    if sinks == "keep":
        return dict(groups), {}
    ordinary: Groups = {}
    masks = {}
    for site, parts in groups.items():
        rows = list((~attention_sinks.massive_rows(torch.cat(parts))).split([len(part) for part in parts]))
        if paired:
            rows = [torch.stack(rows).all(0)] * len(rows)
        if not all(some.any() for some in rows):
            raise UsageError(
                f"all activations of one group at {site} are massive beside the others, as those of attention sinks "
                "are: capture other tokens, or take them as they are with sinks='keep'"
            )
        ordinary[site] = tuple(part[some] for part, some in zip(parts, rows, strict=True))
        masks[site] = torch.cat(rows)
    return ordinary, _left_out(masks, 4)


def _left_out(masks: Mapping[Site, Tensor], stacklevel: int) -> dict[Site, dict[str, Any]]:
    summaries = {s: {"left_out": int((~some).sum()), "of": len(some)} for s, some in masks.items() if not some.all()}
    if warning := attention_sinks.sentence(summaries):
        warnings.warn(warning, SteerableWarning, stacklevel=stacklevel)
    return summaries


def sink_stats(left_out: Mapping[Site, dict[str, Any]], *activations: Any) -> dict[str, Any]:
    """What `stats` say of the attention sinks that `capture` and the estimator left out."""
    return attention_sinks.stats(*(getattr(group, "sinks", {}) for group in activations), left_out)


def mean_norm(*groups: Tensor) -> float:
    """Mean ||h|| over the rows of all groups."""
    return float(torch.cat(groups).norm(dim=1).mean())


def column(values: Sequence[Any] | Tensor, rows: Mapping[Site, Tensor], name: str) -> list[Any]:
    """One value for each row. Raises UsageError for another number of them."""
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    count = len(next(iter(rows.values())))
    if len(listed) != count:
        raise UsageError(f"{name} must have one value for each of the {count} activations, not {len(listed)}")
    return listed


def numbers(values: Sequence[float] | Tensor, rows: Mapping[Site, Tensor], name: str) -> Tensor:
    """One finite number for each row, [n] float64. Raises UsageError."""
    try:
        result = torch.tensor(column(values, rows, name), dtype=torch.float64)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must hold numbers") from None
    if result.dim() != 1 or not bool(result.isfinite().all()):
        raise UsageError(f"{name} must hold one finite number for each activation")
    return result


def estimated(vectors: dict[Site, Tensor], norms: dict[Site, float], method: str, stats: Any, about: Any) -> Direction:
    """An estimator's Direction in float32; `about` has the last word."""
    return Direction(
        {s: v.float() for s, v in vectors.items()}, norms=norms, **{"method": method, "stats": stats, **about}
    )
