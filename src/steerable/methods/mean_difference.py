"""Difference of means."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steerable.models import sinks as attention_sinks
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

Activations = dict[Site, Tensor] | Tensor


def difference_of_means(
    positive: Activations,
    negative: Activations,
    *,
    site: Site | str | None = None,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = mean(positive) - mean(negative), at each site.

    positive, negative: {site: [n, d]}, or [n, d] with `site`. The means are in float64, the vectors float32.
    `norms` of the result is the mean ||h|| over both groups; `stats` holds the counts, and what was left out by
    `capture` and here.
    sinks: "drop" leaves out rows that are massive beside the others (`models.sinks`), with a SteerableWarning;
    "keep" takes them in.
    about: further fields of `Direction` (behaviour, model_id, ...).

    Marks and Tegmark 2023 (arXiv 2310.06824); Rimsky et al. 2023 (arXiv 2312.06681).
    """
    vectors, norms = {}, {}
    count = [0, 0]
    pairs, told = ordinary_rows(paired_sites(positive, negative, site), sinks)
    for where, (a, b) in pairs.items():
        vectors[where] = (a.mean(0) - b.mean(0)).float()
        norms[where] = float(torch.cat([a, b]).norm(dim=1).mean())
        count = [len(a), len(b)]
    left_out = attention_sinks.stats(getattr(positive, "sinks", {}), getattr(negative, "sinks", {}), told)
    stats = {"positive": count[0], "negative": count[1], **left_out}
    return Direction(vectors, norms=norms, **{"method": "difference_of_means", "stats": stats, **about})


def paired_sites(
    positive: Activations, negative: Activations, site: Site | str | None
) -> dict[Site, tuple[Tensor, Tensor]]:
    """Both groups at each site in float64, on the CPU. Raises UsageError where they do not fit each other."""
    if isinstance(site, str):
        site = Site.parse(site)
    if isinstance(positive, torch.Tensor) and isinstance(negative, torch.Tensor):
        if site is None:
            raise UsageError("activations given as tensors need site=, as in site='resid_post.3'")
        positive, negative = {site: positive}, {site: negative}
    if isinstance(positive, torch.Tensor) or isinstance(negative, torch.Tensor) or set(positive) != set(negative):
        raise UsageError("the positive and the negative activations must have the same sites")
    if not positive:
        raise UsageError("there are no activations")
    pairs = {s: (positive[s].double().cpu(), negative[s].double().cpu()) for s in sorted(positive)}
    for s, (a, b) in pairs.items():
        if a.dim() != 2 or b.dim() != 2 or not len(a) or not len(b) or a.shape[1] != b.shape[1]:
            raise UsageError(f"activations at {s} must be [n, d] of one width, not {tuple(a.shape)}, {tuple(b.shape)}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UsageError(f"the activations at {s} hold NaN or infinite numbers")
    return pairs


def ordinary_rows(
    groups: Mapping[Site, tuple[Tensor, ...]], sinks: str, paired: bool = False
) -> tuple[dict[Site, tuple[Tensor, ...]], dict[Site, dict[str, Any]]]:
    """The groups at each site without their attention sinks, and how many rows were left out; `paired` leaves a row's
    partners out as well. Raises UsageError where a whole group is massive beside the others."""
    attention_sinks.check(sinks)
    if sinks == "keep":
        return dict(groups), {}
    ordinary, told = {}, {}
    for site, parts in groups.items():
        keep = list((~attention_sinks.massive_rows(torch.cat(parts))).split([len(part) for part in parts]))
        if paired:
            keep = [torch.stack(keep).all(0)] * len(keep)
        if not all(rows.any() for rows in keep):
            raise UsageError(
                f"all activations of one group at {site} are massive beside the others, as those of attention sinks "
                "are: capture other tokens, or take them as they are with sinks='keep'"
            )
        left_out = sum(int((~rows).sum()) for rows in keep)
        ordinary[site] = tuple(part[rows] for part, rows in zip(parts, keep, strict=True)) if left_out else parts
        if left_out:
            told[site] = {"left_out": left_out, "of": sum(map(len, parts))}
    if said := attention_sinks.sentence(told):
        warnings.warn(said, SteerableWarning, stacklevel=4)
    return ordinary, told
