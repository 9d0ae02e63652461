"""Estimators of one's own on annotated chains: functions of two groups of activations, given every span's mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from steerable.chains.windows import AlignedChain, shuffle_labels, window_positions
from steerable.engines.activations import Batch, batch_tokens, length_batches, pad, stream
from steerable.engines.memory import in_narrower_batches
from steerable.methods.span_statistics import SpanMeans
from steerable.steering.direction import Direction
from steerable.steering.float64 import wide, wide_device
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, UsageError

Estimator = Callable[[dict[Site, Tensor], dict[Site, Tensor]], Direction]
"""Activations {site: [n, d]} of one behaviour's spans and of all others' in, a `Direction` at the same sites out, as
`methods.contrasts.difference_of_means`."""


@dataclass(frozen=True)
class SpanActivations:
    """The mean activation of every span over one window, for estimators that need more than means.

    activations: {site: float32 [spans, d]}. labels: for the true labels and each shuffle, the spans' labels.
    """

    activations: dict[Site, Tensor]
    labels: list[list[str]]

    def direction(self, estimator: Estimator, means: SpanMeans, behaviour: str, shuffle: int = 0) -> Direction:
        """The estimator's direction of a behaviour against all other spans, each vector as long as that layer's mean
        activation, as `SpanMeans.direction` makes them.

        shuffle: k > 0 takes the k-th shuffle of the labels. Raises UsageError where the estimator fails or returns
        something else than a Direction at the same sites.
        """
        rows = torch.tensor([label == behaviour for label in self.labels[shuffle]])
        groups = [{site: h[mask] for site, h in self.activations.items()} for mask in (rows, ~rows)]
        name = getattr(estimator, "__name__", "the estimator")
        try:
            direction = estimator(*groups)
        except SteerableError:
            raise
        except Exception as error:  # somebody else's function
            raise UsageError(f"the estimator {name} failed on {behaviour} ({type(error).__name__}: {error})") from error
        if not isinstance(direction, Direction) or set(direction.vectors) != set(self.activations):
            raise UsageError(
                f"the estimator {name} must return a Direction with vectors at the sites that it was given"
            )
        lengths = dict(zip(means.sites, means.overall.norm(dim=1).tolist(), strict=True))
        return replace(
            direction.rescaled_to(lengths),
            model_id=means.model_id,
            model_revision=means.model_revision,
            behaviour=behaviour,
            method=(direction.method or name) + (f", labels shuffled ({shuffle})" if shuffle else ""),
            unit="mean activation",
            norms=dict(zip(means.sites, means.norms.tolist(), strict=True)),
        )


def span_activations(
    model: Any,
    chains: Sequence[AlignedChain],
    window: str,
    *,
    shuffles: int = 0,
    seed: int = 0,
    kind: str = "resid_post",
    layers: Sequence[int] | None = None,
) -> SpanActivations:
    """Read the chains once and take the mean activation of every span over `window`, at all layers or some.

    Memory is spans x layers x d numbers. Spans of which every token is an attention sink are left out. shuffles, seed:
    as in `span_means`, so that the same shuffle is meant.
    """
    used = [chain for chain in chains if chain.spans]
    names = [[[span.label for span in chain.spans] for chain in used]]
    names += [shuffle_labels(used, seed + k) for k in range(shuffles)]
    batches = length_batches([len(chain.ids) for chain in used], batch_tokens(model))
    order = [i for rows in batches for i in rows]

    def read(cut: list[list[int]]) -> Iterator[Batch]:
        for rows in cut:
            batch = pad([used[i].ids for i in rows])
            batch.rows = tuple(rows)
            spans = [(row, span) for row, i in enumerate(rows) for span in used[i].spans]
            batch.weights = torch.zeros(len(spans), *batch.ids.shape, dtype=torch.float64)
            for number, (row, span) in enumerate(spans):
                at = window_positions(window, span.start, span.end)
                batch.weights[number, row, at.start : at.stop] = 1.0
            yield batch

    def means(cut: list[list[int]]) -> _SpanRows:
        rows_of_spans = _SpanRows()
        stream(model, read(cut), [rows_of_spans], kind=kind, layers=layers)
        return rows_of_spans

    rows_of_spans = in_narrower_batches(batches, means)
    ordinary = torch.stack([torch.cat([*parts.values()]) for parts in rows_of_spans.weights.values()]).gt(0).all(0)
    labels = [[label for i in order for label in labelling[i]] for labelling in names]
    return SpanActivations(
        {
            Site(kind, index if layers is None else layers[index]): torch.cat([*parts.values()])[ordinary]
            for index, parts in rows_of_spans.means.items()
        },
        [list(compress(labelling, ordinary.tolist())) for labelling in labels],
    )


class _SpanRows:
    """An accumulator of each span's mean, [spans, d] a batch, and of the weight that it is the mean of.

    A chain that is longer than a chunk is a batch by itself, of which several pieces come.
    """

    def __init__(self) -> None:
        self.means: dict[int, dict[Any, Tensor]] = {}
        self.weights: dict[int, dict[Any, Tensor]] = {}

    def add(self, index: int, h: Tensor, batch: Batch) -> None:
        assert batch.weights is not None
        weights = batch.weights.to(wide_device(h.device))
        if batch.sinks is not None:
            weights = weights.masked_fill(batch.sinks.to(weights.device), 0.0)
        flat = weights.flatten(1)
        sums, totals = (flat @ wide(h.reshape(-1, h.shape[-1]))).cpu(), flat.sum(1).cpu()
        means, before = self.means.setdefault(index, {}), self.weights.setdefault(index, {})
        if batch.rows in before:
            sums += before[batch.rows][:, None] * means[batch.rows].double()
            totals += before[batch.rows]
        means[batch.rows] = (sums / totals.clamp_min(1e-30)[:, None]).float()
        before[batch.rows] = totals
