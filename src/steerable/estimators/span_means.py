"""Difference of means over annotated chains: every layer, label and window from one pass.

    u_l = mean_l[c, window] - baseline_l,     then     u_l *= ||mean_l[overall]|| / ||u_l||

`mean[c, window]` is the mean over the spans labelled c of the mean activation over the span's window
(`chains.windows.window_positions`). Two baselines:

- `overall` (published): the mean over chains of the mean over first ... last annotated token. A window sits
  at the beginning of spans, the stretch does not, so all labels' vectors share a direction that only says "a
  sentence begins".
- `pooled`: the count-weighted mean of all labels over the same window, which takes that direction out. The
  vectors
  before rescaling, weighted by their counts, then sum to zero.

Source: Venhoff et al. 2025, arXiv 2506.18167, section 3.2: window `published`, baseline `overall`, rescaled
as above; the code differs from the text (per span, not per prompt; annotated stretch, not all tokens), and
the code is followed. Difference of means as such: Marks & Tegmark 2023, arXiv 2310.06824; Rimsky et al. 2023,
arXiv 2312.06681.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import models
from ..capture import Batch, WeightedSums, length_batches, pad, stream
from ..chains.windows import OVERALL, WINDOWS, AlignedChain, Group, groups, shuffle_labels, weights
from ..directions import Direction
from ..errors import UsageError
from ..sites import Site, width_at

BASELINES = ("overall", "pooled")


@dataclass(frozen=True)
class SpanMeans:
    """What one pass over annotated chains leaves: means of all groups, from which every direction follows.

    `means` float64 [L, G, d] (NaN for a group without spans), `counts` [G] the number of spans (chains for
    `overall`), `norms` [L] mean ||h|| with the weights of `overall`; rows G as `chains.windows.groups(labels,
    windows, shuffles)`.
    """

    sites: tuple[Site, ...]
    labels: tuple[str, ...]
    windows: tuple[str, ...]
    shuffles: int
    means: Tensor
    counts: Tensor
    norms: Tensor
    model_id: str = ""
    model_revision: str = ""

    @property
    def overall(self) -> Tensor:
        """Mean activation over the annotated stretches, [L, d]."""
        return self.mean(OVERALL)

    def mean(self, group: Group) -> Tensor:
        """Mean activation of a group, [L, d]. Raises UsageError for a group that was not taken or has no
        span."""
        row = self._row(group)
        if self.counts[row] == 0:
            raise UsageError(f"no span is labelled {group.label!r}: annotate more chains or leave the behaviour out")
        return self.means[:, row]

    def count(self, label: str) -> int:
        """Number of spans with this label."""
        return round(float(self.counts[self._row(Group(0, self.windows[0], label))]))

    def pooled(self, window: str) -> Tensor:
        """Mean over the spans of all labels, [L, d]; relabelling does not change it."""
        rows = [self._row(Group(0, window, label)) for label in self.labels]
        share = self.counts[rows] / self.counts[rows].sum()
        return torch.einsum("g,lgd->ld", share, self.means[:, rows].nan_to_num())

    def direction(
        self, behaviour: str, window: str = "published", baseline: str = "overall", shuffle: int = 0
    ) -> Direction:
        """The behaviour's Direction at all layers, each vector as long as that layer's `overall` mean.

        `shuffle` k > 0 is the control: the same from the k-th shuffle of the labels. `norms` of the result
        are mean ||h||; `stats` tell window, baseline, counts, the norm of the mean activation, and the
        vector's norm before rescaling.
        """
        if baseline not in BASELINES:
            raise UsageError(f"unknown baseline {baseline!r}: expected one of {', '.join(BASELINES)}")
        base = self.overall if baseline == "overall" else self.pooled(window)
        raw = self.mean(Group(shuffle, window, behaviour)) - base
        length, target = raw.norm(dim=1), self.overall.norm(dim=1)
        if not (length > 0).all():
            raise UsageError(f"the mean of {behaviour!r} equals its baseline: more than one label is needed")
        scaled = (raw * (target / length)[:, None]).float()
        return Direction(
            vectors=dict(zip(self.sites, scaled, strict=True)),
            model_id=self.model_id,
            model_revision=self.model_revision,
            behaviour=behaviour,
            method="span difference of means" + (f", labels shuffled ({shuffle})" if shuffle else ""),
            norms=dict(zip(self.sites, self.norms.tolist(), strict=True)),
            stats={
                "window": window,
                "baseline": baseline,
                "spans": self.count(behaviour),
                "chains": round(float(self.counts[0])),
                "norm_of_mean": {str(s): n for s, n in zip(self.sites, target.tolist(), strict=True)},
                "norm_before_rescaling": {str(s): n for s, n in zip(self.sites, length.tolist(), strict=True)},
            },
        )

    def shuffled(self, behaviour: str, window: str = "published", baseline: str = "overall", k: int = 1) -> Direction:
        """The label-shuffled control of `direction`, from the k-th shuffle (1 ... shuffles)."""
        if not 1 <= k <= self.shuffles:
            raise UsageError(f"shuffle {k} was not taken: the pass had {self.shuffles}")
        return self.direction(behaviour, window, baseline, shuffle=k)

    def _row(self, group: Group) -> int:
        try:
            return groups(self.labels, self.windows, self.shuffles).index(group)
        except ValueError:
            raise UsageError(
                f"no mean was taken of {group.label!r}, window {group.window!r}, shuffle {group.shuffle}: "
                f"the pass had labels {self.labels}, windows {self.windows} and {self.shuffles} shuffles"
            ) from None


def span_means(
    model: Any,
    chains: Sequence[AlignedChain],
    labels: Sequence[str],
    *,
    windows: Sequence[str] = WINDOWS,
    shuffles: int = 1,
    seed: int = 0,
    kind: str = "resid_post",
    max_tokens: int = 4096,
) -> SpanMeans:
    """One forward pass over the chains (sorted by length, `max_tokens` to a batch), all layers at sites of
    `kind`.

    Chains without spans are skipped. `shuffles` label shuffles (seeds `seed`, `seed + 1`, ...) are taken in
    the same pass. Memory does not depend on the number of chains. Raises UsageError for no usable chain or an
    unknown label.
    """
    used = [chain for chain in chains if chain.spans]
    if not used:
        raise UsageError("extraction needs at least one chain with annotated spans, got none")
    relabelled = [shuffle_labels(used, seed + k) for k in range(shuffles)]
    device = next(model.parameters()).device
    sites = tuple(Site(kind, layer) for layer in range(models.n_layers(model)))
    sums = WeightedSums(len(sites), len(groups(labels, windows, shuffles)), width_at(model, kind), device)
    norms = _StretchNorms(len(sites), device)

    def batches() -> Iterator[Batch]:
        for rows in length_batches([len(chain.ids) for chain in used], max_tokens):
            batch = pad([used[i].ids for i in rows])
            length = batch.ids.shape[1]
            matrix = [weights(used[i].spans, length, labels, windows, [names[i] for names in relabelled]) for i in rows]
            batch.weights = torch.from_numpy(np.stack(matrix, axis=1))
            yield batch

    stream(model, batches(), [sums, norms], kind=kind)
    return SpanMeans(
        sites=sites,
        labels=tuple(labels),
        windows=tuple(windows),
        shuffles=shuffles,
        means=sums.means().cpu(),
        counts=sums.totals.cpu(),
        norms=norms.means().cpu(),
        model_id=models.model_id(model),
        model_revision=str(getattr(model.config, "_commit_hash", None) or ""),
    )


class _StretchNorms:
    """Mean ||h|| of each layer with the weights of group `overall`: the prompt, and with it the first token's
    huge
    activation, stays out, and the result compares with the norm of the mean."""

    def __init__(self, layers: int, device: torch.device | str) -> None:
        self.sums = torch.zeros(layers, dtype=torch.float64, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, index: int, h: Tensor, batch: Batch) -> None:
        assert batch.weights is not None
        norms = torch.linalg.vector_norm(h, dim=-1, dtype=torch.promote_types(h.dtype, torch.float32))
        self.sums[index] += (batch.weights[0] * norms).sum()
        if index == 0:
            self.total += batch.weights[0].sum()

    def means(self) -> Tensor:
        return self.sums / self.total
