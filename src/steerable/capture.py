"""Reading activations: one forward pass over the text, every layer streamed into accumulators.

`stream` is the machinery, an accumulator is any object with `add(index, h, batch)`; nothing the size of the
data is kept. `capture` is the convenience for a few texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from . import models
from .errors import UsageError
from .gates import Selector, SequenceState, parse_selector, resolve, selectors
from .sites import Site, check_site, tap


@dataclass
class Batch:
    """ids [B, T]; mask [B, T] bool, False on padding (None: none); weights [G, B, T] float64, for
    WeightedSums."""

    ids: Tensor
    mask: Tensor | None = None
    weights: Tensor | None = None


class Accumulator(Protocol):
    def add(self, index: int, h: Tensor, batch: Batch) -> None:
        """Take in the activations h [B, T, d] of the index-th captured layer."""


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the texts, sorted by length and cut into batches of at most max_tokens tokens, padding
    included (a longer text is a batch by itself). Equal lengths keep their order."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # sorted, so this one is the longest so far
        if batches and (len(batches[-1]) + 1) * lengths[i] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
    """Rows of token ids as one batch, padded on the right with id 0."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    return Batch(ids.to(device), mask.to(device))


@torch.no_grad()
def stream(
    model: nn.Module,
    batches: Iterable[Batch],
    accumulators: Sequence[Accumulator],
    *,
    kind: str = "resid_post",
    layers: Sequence[int] | None = None,
) -> None:
    """One forward pass a batch; each accumulator sees every layer's activations at the sites of this kind.

    layers: default all; an accumulator's index counts along them. The unembedding is not computed.
    """
    chosen = range(models.n_layers(model)) if layers is None else layers
    device = next(model.parameters()).device
    current: list[Batch] = []

    def at(index: int) -> Any:
        def fn(h: Tensor) -> None:
            for accumulator in accumulators:
                accumulator.add(index, h, current[0])

        return fn

    with tap(model, {Site(kind, layer): at(index) for index, layer in enumerate(chosen)}):
        for batch in batches:
            on = [None if t is None else t.to(device) for t in (batch.ids, batch.mask, batch.weights)]
            current[:] = [Batch(*on)]  # type: ignore[arg-type]
            models.base(model)(input_ids=on[0], attention_mask=on[1], use_cache=False)


class WeightedSums:
    """For each layer and group g: sums [L, G, d] of weights[g, b, t] * h[b, t], and their totals [G];
    float64.

    The mean of a group is `sums / totals`. Two are merged by `+`.
    """

    def __init__(self, layers: int, groups: int, width: int, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(layers, groups, width, dtype=torch.float64, device=device)
        self.totals = torch.zeros(groups, dtype=torch.float64, device=device)
        self._batch: Batch | None = None
        self._rows, self._columns = torch.zeros(0), torch.zeros(0)

    def add(self, index: int, h: Tensor, batch: Batch) -> None:
        if batch is not self._batch:
            self._take(batch)
        picked = h.reshape(-1, h.shape[-1])[self._rows].double()
        self.sums[index] += self._columns @ picked

    def _take(self, batch: Batch) -> None:
        """Once a batch: only positions that some group weighs are worth converting to float64."""
        if batch.weights is None or batch.weights.shape[0] != self.sums.shape[1]:
            raise UsageError(f"expected weights [{self.sums.shape[1]}, B, T] with each batch")
        flat = batch.weights.reshape(batch.weights.shape[0], -1).double()
        self._rows = flat.any(0).nonzero()[:, 0]
        self._columns = flat[:, self._rows]
        self.totals += flat.sum(1)
        self._batch = batch

    def means(self) -> Tensor:
        """[L, G, d]; NaN for a group without weight."""
        return self.sums / self.totals[:, None]

    def __add__(self, other: WeightedSums) -> WeightedSums:
        result = copy(self)
        result.sums, result.totals = self.sums + other.sums, self.totals + other.totals
        return result


class NormSums:
    """Mean ||h|| of each layer over the tokens of `batch.mask` (all, where there is none)."""

    def __init__(self, layers: int, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(layers, dtype=torch.float64, device=device)
        self.counts = torch.zeros(layers, dtype=torch.float64, device=device)

    def add(self, index: int, h: Tensor, batch: Batch) -> None:
        norms = torch.linalg.vector_norm(h, dim=-1, dtype=torch.promote_types(h.dtype, torch.float32))
        if batch.mask is not None:
            norms = norms * batch.mask
        self.sums[index] += norms.sum(dtype=torch.float64)
        self.counts[index] += norms.numel() if batch.mask is None else batch.mask.sum()

    def means(self) -> Tensor:
        """[L] float64."""
        return self.sums / self.counts

    def __add__(self, other: NormSums) -> NormSums:
        result = copy(self)
        result.sums, result.counts = self.sums + other.sums, self.counts + other.counts
        return result


@torch.no_grad()
def capture(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    sites: Sequence[Site | str],
    where: str | Selector = selectors.all,
    reduce: Literal["mean", "last", "none"] = "mean",
    max_tokens: int = 8192,
) -> dict[Site, Tensor]:
    """Activations of the selected tokens of each text, in the texts' order.

    reduce: "mean" over a text's tokens (in float64) or the "last" of them: float32 [texts, d]; "none": all of
    them,
    text by text: float32 [tokens, d]. A whole text counts as prompt. max_tokens: most tokens in a batch.
    Raises UsageError for no texts, a text without a selected token, and sites that the model does not have.
    """
    found = sorted({Site.parse(s) if isinstance(s, str) else s for s in sites})
    for site in found:
        check_site(model, site)
    if reduce not in ("mean", "last", "none"):
        raise UsageError(f"unknown reduce {reduce!r}: expected 'mean', 'last' or 'none'")
    if not texts or not found:
        raise UsageError("capture needs one text and one site at least")
    selector = resolve(parse_selector(where), tokenizer)
    tags = models.think_tags(tokenizer) if selector.uses("thinking", "answer") else None
    rows = [tokenizer(text)["input_ids"] for text in texts]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise UsageError(f"text {empty[0]} has no tokens")
    parts: dict[Site, dict[int, Tensor]] = {site: {} for site in found}
    for indices in length_batches([len(row) for row in rows], max_tokens):
        batch = pad([rows[i] for i in indices], next(model.parameters()).device)
        state = SequenceState(tags)
        state.start(len(indices), batch.ids.device)
        mask = selector(state.advance(batch.ids, batch.mask))
        if not mask.any(1).all():
            missing = indices[int((~mask.any(1)).nonzero()[0, 0])]
            raise UsageError(f"text {missing} has no token where {selector}")

        def at(site: Site, mask: Tensor = mask, indices: list[int] = indices) -> Any:
            def fn(h: Tensor) -> None:
                for row, i in enumerate(indices):
                    parts[site][i] = _reduced(h[row, mask[row]], reduce)

            return fn

        with tap(model, {site: at(site) for site in found}):
            models.base(model)(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return {site: torch.cat([by_text[i] for i in range(len(texts))]) for site, by_text in parts.items()}


def _reduced(h: Tensor, reduce: str) -> Tensor:
    if reduce == "mean":
        h = h.double().mean(0, keepdim=True)
    return (h[-1:] if reduce == "last" else h).float().cpu()
