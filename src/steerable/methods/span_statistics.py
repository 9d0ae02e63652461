"""Difference of means over annotated chains: every layer, label and window from one pass.

    u_l = mean_l[c, window] - baseline_l,     then     u_l *= ||mean_l[overall]|| / ||u_l||

`mean[c, window]` is the mean over the spans labelled c of the mean activation over the span's window
(`chains.windows.window_positions`). Two baselines:

- `overall` (published): the mean over chains of the mean over first ... last annotated token. A window sits at the
  beginning of spans, the stretch does not, so all labels' vectors share a direction that only says "a sentence begins".
- `pooled`: the count-weighted mean of all labels over the same window, which takes that direction out. The vectors
  before rescaling, weighted by their counts, then sum to zero.

Source: Venhoff et al. 2025, arXiv 2506.18167, section 3.2: window `published`, baseline `overall`, rescaled as above;
the code differs from the text (per span, not per prompt; annotated stretch, not all tokens), and the code is followed.
Difference of means as such: Marks & Tegmark 2023, arXiv 2310.06824; Rimsky et al. 2023, arXiv 2312.06681.

Attention sinks (`models.sinks`) are left out of all means and norms unless asked for; a span with one weighs that much
less.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
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
from steerable.engines.memory import in_narrower_batches
from steerable.engines.pool import MapBlocks, Report, default_threads, loader, map_blocks, tokens_a_minute
from steerable.models import loading as models
from steerable.models import sinks as attention_sinks
from steerable.models.reading import CHUNK
from steerable.models.sinks import Sinks
from steerable.models.taps import width_at
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError
from steerable.store.files import write_atomic

BASELINES = ("overall", "pooled")

_BLOCK = 32768  # tokens, at least, that are summed by one worker in one piece; part of the result's last bits


@dataclass(frozen=True)
class SpanMeans:
    """What one pass over annotated chains leaves: means of all groups, from which every direction follows.

    Attributes:
        means: float64 [L, G, d], NaN for a group without spans; rows G as `chains.windows.groups(labels, windows,
            shuffles)`.
        counts: [G], the number of spans (of chains for `overall`).
        norms: [L], the mean ||h|| with the weights of `overall`.
        sinks: where attention sinks were left out, as in `engines.activations.Captured`.

    Example:
        >>> from steerable.chains.windows import AlignedChain, TokenSpan
        >>> chain = AlignedChain("task", 0, tuple(range(40, 60)), (TokenSpan("a", 4, 9), TokenSpan("b", 9, 15)))
        >>> st.span_means(model, [chain], ["a", "b"]).count("a")
        1
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
        """Mean activation of a group, [L, d]. Raises UsageError for a group that was not taken or has no span."""
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
            unit="mean activation",
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
    keep: Path | None = None,
) -> SpanMeans:
    """Take the means of all labels and windows at all layers in one forward pass over the chains.

    Memory does not depend on the number of chains, and on the length of one only by its key/value cache. The chains are
    cut into blocks whose float64 sums are added up in order, so the result is the same, bit by bit, for any number of
    workers (small models are computed on one thread here, too).

    Args:
        model: the model, or what wraps it.
        chains: chains with labelled token spans; those without spans are skipped.
        labels: all labels that occur.
        windows: which windows of a span to average over (`chains.windows`).
        shuffles: how many label shuffles (seeds `seed`, `seed + 1`, ...) are taken in the same pass, for controls.
        kind: the kind of site, e.g. "resid_post".
        sinks: "drop" leaves attention sinks out of all means and norms, with a SteerableWarning where there were any;
            "keep" takes them in.
        max_tokens: most tokens in a batch, default `engines.activations.batch_tokens(model)`.
        chunk: most tokens of a chain in one pass; longer ones are read in pieces.
        workers: processes; more than one need a model that was loaded by name or folder.
        spread: where they run, here or (`partial(cluster.map_blocks, gpus=1)`) on a Ray cluster.
        keep: a folder that takes the sums of the blocks that are finished, for the next call with the same arguments.

    Returns:
        The means of all groups, from which every direction follows: `SpanMeans.direction(behaviour, window, baseline)`.

    Raises:
        UsageError: for no usable chain or an unknown label.

    Example:
        >>> from steerable.chains.windows import AlignedChain, TokenSpan
        >>> chain = AlignedChain("task", 0, tuple(range(40, 60)), (TokenSpan("a", 4, 9), TokenSpan("b", 9, 15)))
        >>> st.span_means(model, [chain], ["a", "b"]).direction("a", "onset", "pooled").layers
        [0, 1, 2, 3, 4, 5]
    """
    attention_sinks.check(sinks)
    used = [chain for chain in chains if chain.spans]
    if not used:
        raise UsageError("extraction needs at least one chain with annotated spans, got none")
    for label in (span.label for chain in used for span in chain.spans):
        if label not in labels:
            raise UsageError(f"unknown label {label!r}: expected one of {', '.join(labels)}")
    shuffled = [shuffle_labels(used, seed + k) for k in range(shuffles)]
    items = [_Item(chain.ids, chain.spans, [names[i] for names in shuffled]) for i, chain in enumerate(used)]
    blocks: list[list[list[_Item]]] = [[]]
    filled, full = 0, min(_BLOCK, tokens_a_minute(model))
    for rows in length_batches([len(chain.ids) for chain in used], max_tokens or batch_tokens(model)):
        if filled >= full:
            blocks.append([])
            filled = 0
        blocks[-1].append([items[i] for i in rows])
        filled += sum(len(used[i].ids) for i in rows)
    in_order = _InOrder(None if keep is None else keep / "sums.safetensors", len(blocks))
    blocks = blocks[in_order.due :]
    workers = max(1, min(workers, len(blocks)))
    spread(
        _Pass(tuple(labels), tuple(windows), shuffles, kind, chunk, sinks),
        blocks,
        setup=loader(model) if workers > 1 or spread is not map_blocks else tuple,
        workers=workers,
        threads=default_threads(model, workers),
        finished=partial(in_order.add, in_order.due),
        context=(model, None),
        collect=False,
    )
    sums, norms = in_order.total
    counts = sums.totals.round()  # a span's weight is spread over its tokens, and the parts add up to nearly 1
    weights_left = remaining(counts, sums.sunk)
    sites = tuple(Site(kind, layer) for layer in range(models.n_layers(model)))
    left_out = {site: summary for i, site in enumerate(sites) if (summary := sums.tally.summary(i))}
    if warning := attention_sinks.sentence(left_out):
        warnings.warn(warning, SteerableWarning, stacklevel=2)
    return SpanMeans(
        sites=sites,
        labels=tuple(labels),
        windows=tuple(windows),
        shuffles=shuffles,
        means=sums.sums / weights_left[:, :, None],
        counts=counts,
        norms=norms.sums / weights_left[:, 0],
        model_id=models.model_id(model),
        model_revision=models.model_revision(model),
        sinks=left_out,
    )


@dataclass(frozen=True)
class _Item:
    """A chain as a worker needs it; `names[k]` are its spans' labels in shuffle k."""

    ids: tuple[int, ...]
    spans: tuple[TokenSpan, ...]
    names: list[list[str]]


class _InOrder:
    """Adds up the blocks' sums in the blocks' order, as adding floating-point numbers is not associative.

    file: keeps the total, where an earlier pass over as many blocks may have left one. due: how many are in it.
    """

    def __init__(self, file: Path | None, blocks: int) -> None:
        self.early: dict[int, tuple[WeightedSums, NormSums]] = {}
        self.due, self.file, self.blocks = 0, file, blocks
        self.total: tuple[WeightedSums, NormSums]
        if file is not None and file.exists():
            with safe_open(file, "pt") as content:
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - it is no mapping
            due, count = tensors.pop("blocks").tolist()
            if count == blocks:
                self.due, self.total = due, _from_tensors(tensors)

    def add(self, start: int, index: int, block: tuple[WeightedSums, NormSums]) -> None:
        self.early[start + index] = block
        before = self.due
        while self.due in self.early:
            sums, norms = self.early.pop(self.due)
            self.total = (self.total[0] + sums, self.total[1] + norms) if self.due else (sums, norms)
            self.due += 1
        if self.file is not None and before < self.due < self.blocks:
            counts = {"blocks": torch.tensor([self.due, self.blocks])}
            write_atomic(self.file, save(_tensors(*self.total) | counts))


def _tensors(sums: WeightedSums, norms: NormSums) -> dict[str, Tensor]:
    tally = {"positions": sums.tally.positions, "tokens": sums.tally.tokens}
    spans = {"sums": sums.sums, "totals": sums.totals, "sunk": sums.sunk}
    return {**spans, **tally, "norms": norms.sums, "norm_counts": norms.counts}


def _from_tensors(tensors: dict[str, Tensor]) -> tuple[WeightedSums, NormSums]:
    sums, norms = WeightedSums(0, 0, 0), NormSums(0, group=0)
    sums.sums, sums.totals, sums.sunk = tensors["sums"], tensors["totals"], tensors["sunk"]
    sums.tally.positions, sums.tally.tokens = tensors["positions"], tensors["tokens"]
    norms.sums, norms.counts = tensors["norms"], tensors["norm_counts"]
    return sums, norms


@dataclass(frozen=True)
class _Pass:
    """One block of batches, summed in this process or in a worker; the fields are arguments of `span_means`."""

    labels: tuple[str, ...]
    windows: tuple[str, ...]
    shuffles: int
    kind: str
    chunk: int
    sinks: Sinks

    def __call__(self, loaded: Any, block: Sequence[Sequence[_Item]], report: Report) -> tuple[WeightedSums, NormSums]:
        model = loaded[0]
        device, layers = models.device(model), models.n_layers(model)
        count = len(groups(self.labels, self.windows, self.shuffles))
        items_of = [item for items in block for item in items]

        def batches(cut: list[list[int]]) -> Iterator[Batch]:
            for rows in cut:
                items = [items_of[row] for row in rows]
                batch = pad([item.ids for item in items])
                matrix = np.empty((count, *batch.ids.shape))
                for row, item in enumerate(items):
                    matrix[:, row] = weights(item.spans, matrix.shape[2], self.labels, self.windows, item.names)
                batch.weights = torch.from_numpy(matrix)
                yield batch

        def summed(cut: list[list[int]]) -> tuple[WeightedSums, NormSums]:
            width = width_at(model, self.kind)
            if odd := [i for i in range(layers) if width_at(model, self.kind, i) != width]:
                raise UsageError(
                    f"{self.kind} is {width} wide in the first layer that has it, and another width in layer {odd[0]}: "
                    "choose a site of the residual stream"
                )
            sums = WeightedSums(layers, count, width, device)
            norms = NormSums(layers, device, group=0)  # weighted as `overall`, so that they compare with its norm
            stream(model, batches(cut), [sums, norms], kind=self.kind, chunk=self.chunk, sinks=self.sinks)
            return sums.cpu(), norms.cpu()

        numbers = iter(range(len(items_of)))
        return in_narrower_batches([list(islice(numbers, len(items))) for items in block], summed)
