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

Attention sinks (`sinks`) stay out of all means and norms unless asked; a span with one weighs that much less.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerable.chains.windows import OVERALL, WINDOWS, AlignedChain, Group, TokenSpan, groups, shuffle_labels, weights
from steerable.engines.activations import (
    Batch,
    NormSums,
    WeightedSums,
    batch_tokens,
    length_batches,
    pad,
    remaining,
    stream,
)
from steerable.engines.pool import MapBlocks, Report, default_threads, loader, map_blocks
from steerable.models import loading as models
from steerable.models import sinks as attention_sinks
from steerable.models.reading import CHUNK
from steerable.models.sinks import Sinks, Tally
from steerable.models.taps import width_at
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

BASELINES = ("overall", "pooled")

_BLOCK = 32768  # tokens, at least, that are summed by one worker in one piece; part of the result's last bits


@dataclass(frozen=True)
class SpanMeans:
    """What one pass over annotated chains leaves: means of all groups, from which every direction follows.

    `means` float64 [L, G, d] (NaN for a group without spans), `counts` [G] the number of spans (chains for
    `overall`), `norms` [L] mean ||h|| with the weights of `overall`; rows G as `chains.windows.groups(labels,
    windows, shuffles)`. `sinks`: where attention sinks were left out, as in `capture.Captured`.
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
    sinks: dict[Site, dict[str, Any]] = field(default_factory=dict)

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
                **attention_sinks.stats(self.sinks),
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
    sinks: Sinks = "drop",
    max_tokens: int | None = None,
    chunk: int = CHUNK,
    workers: int = 1,
    spread: MapBlocks = map_blocks,
) -> SpanMeans:
    """One forward pass over the chains, sorted by length, `max_tokens` to a batch (default `capture.batch_tokens`), all
    layers at sites of `kind`.

    Chains without spans are skipped. `shuffles` label shuffles (seeds `seed`, `seed + 1`, ...) are taken in
    the same pass. Memory does not depend on the number of chains, and on the length of one only by its key/value
    cache: chains longer than `chunk` tokens are read in pieces. sinks: "drop" leaves attention sinks out of all means
    and norms, with a SteerableWarning where there were any; "keep" takes them in. Raises UsageError for no usable chain
    or an unknown label.

    workers: more than one need a model that was loaded by name or folder. spread: where they run, here or
    (`partial(cluster.map_blocks, gpus=1)`) on a Ray cluster. The chains are cut into blocks and the blocks' float64
    sums added up in order, whatever the number of workers: what they compute being equal, so is the result, bit by
    bit. Small models are computed on one thread here too.
    """
    attention_sinks.check(sinks)
    used = [chain for chain in chains if chain.spans]
    if not used:
        raise UsageError("extraction needs at least one chain with annotated spans, got none")
    for chain in used:
        for span in chain.spans:
            if span.label not in labels:
                raise UsageError(f"unknown label {span.label!r}: expected one of {', '.join(labels)}")
    relabelled = [shuffle_labels(used, seed + k) for k in range(shuffles)]
    items = [_Item(chain.ids, chain.spans, [names[i] for names in relabelled]) for i, chain in enumerate(used)]
    blocks: list[list[list[_Item]]] = [[]]
    filled = 0
    for rows in length_batches([len(chain.ids) for chain in used], max_tokens or batch_tokens(model)):
        if filled >= _BLOCK:
            blocks.append([])
            filled = 0
        blocks[-1].append([items[i] for i in rows])
        filled += sum(len(used[i].ids) for i in rows)
    total = _InOrder()
    workers = min(workers, len(blocks))
    spread(
        partial(
            _sums,
            labels=tuple(labels),
            windows=tuple(windows),
            shuffles=shuffles,
            kind=kind,
            chunk=chunk,
            sinks=sinks,
        ),
        blocks,
        setup=loader(model) if workers > 1 or spread is not map_blocks else tuple,
        workers=workers,
        threads=default_threads(model, workers),
        finished=total.add,
        context=(model, None),
        collect=False,
    )
    found = total.sums
    counts = found.weights.round()  # a span's weight is spread over its tokens, and the parts add up to nearly 1
    means_over = remaining(counts, found.sunk)
    sites = tuple(Site(kind, layer) for layer in range(models.n_layers(model)))
    dropped = {site: about for i, site in enumerate(sites) if (about := found.tally.summary(i))}
    if said := attention_sinks.sentence(dropped):
        warnings.warn(said, SteerableWarning, stacklevel=2)
    return SpanMeans(
        sites=sites,
        labels=tuple(labels),
        windows=tuple(windows),
        shuffles=shuffles,
        means=found.sums / means_over[:, :, None],
        counts=counts,
        norms=found.norms / means_over[:, 0],
        model_id=models.model_id(model),
        model_revision=models.model_revision(model),
        sinks=dropped,
    )


@dataclass(frozen=True)
class _Item:
    """A chain as a worker needs it; `names[k]` are its spans' labels in shuffle k."""

    ids: tuple[int, ...]
    spans: tuple[TokenSpan, ...]
    names: list[list[str]]


@dataclass(frozen=True)
class _Sums:
    """A block's part of the result, float64: weighted sums [L, G, d], their weights [G], the part of these that fell on
    attention sinks [L, G], and the sum of the norms weighted as `overall` [L]."""

    sums: Tensor
    weights: Tensor
    sunk: Tensor
    norms: Tensor
    tally: Tally

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.sums + other.sums,
            self.weights + other.weights,
            self.sunk + other.sunk,
            self.norms + other.norms,
            self.tally + other.tally,
        )


class _InOrder:
    """Adds blocks up in their order, as far as they are there, since adding floating-point numbers is not
    associative."""

    def __init__(self) -> None:
        self.early: dict[int, _Sums] = {}
        self.due = 0

    def add(self, index: int, sums: _Sums) -> None:
        self.early[index] = sums
        while self.due in self.early:
            part = self.early.pop(self.due)
            self.sums: _Sums = self.sums + part if self.due else part
            self.due += 1


def _sums(
    loaded: Any,
    block: Sequence[Sequence[_Item]],
    report: Report,
    *,
    labels: Sequence[str],
    windows: Sequence[str],
    shuffles: int,
    kind: str,
    chunk: int,
    sinks: Sinks,
) -> _Sums:
    """One block, each of whose parts is a batch."""
    model = loaded[0]
    device = models.device(model)
    sums = WeightedSums(models.n_layers(model), len(groups(labels, windows, shuffles)), width_at(model, kind), device)
    norms = NormSums(models.n_layers(model), device, group=0)

    def batches() -> Iterator[Batch]:
        for items in block:
            batch = pad([item.ids for item in items])
            matrix = np.empty((sums.sums.shape[1], *batch.ids.shape))
            for row, item in enumerate(items):
                matrix[:, row] = weights(item.spans, matrix.shape[2], labels, windows, item.names)
            batch.weights = torch.from_numpy(matrix)
            yield batch

    stream(model, batches(), [sums, norms], kind=kind, chunk=chunk, sinks=sinks)
    return _Sums(sums.sums.cpu(), sums.totals.cpu(), sums.sunk.cpu(), norms.sums.cpu(), sums.tally.cpu())
