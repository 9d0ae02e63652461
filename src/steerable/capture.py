"""Reading activations: one forward pass over the text, every layer streamed into accumulators.

`stream` is the machinery, an accumulator is any object with `add(index, h, batch)`; nothing the size of the
data is kept. Texts longer than a chunk are read in pieces behind a key/value cache, so that memory grows with
their length by that cache alone. `capture` is the convenience for a few texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from . import models
from .chunks import CHUNK, read
from .errors import UsageError
from .gates import Selector, SequenceState, parse_selector, resolve, selectors
from .sites import Site, check_site, tap
from .think import think_tags


@dataclass
class Batch:
    """ids [B, T]; mask [B, T] bool, False on padding (None: none); weights [G, B, T] float64, for
    WeightedSums; rows: a number for each of the B rows by which accumulators may tell them apart.

    An accumulator sees a text that is longer than a chunk as several batches of one row.
    """

    ids: Tensor
    mask: Tensor | None = None
    weights: Tensor | None = None
    rows: tuple[int, ...] | None = None

    def to(self, device: torch.device | str) -> Batch:
        mask, weights = (None if t is None else t.to(device) for t in (self.mask, self.weights))
        return Batch(self.ids.to(device), mask, weights, self.rows)

    def alone(self) -> Iterator[Batch]:
        """Each row as a batch of its own, without padding."""
        for row in range(len(self.ids)):
            kept = slice(None) if self.mask is None or bool(self.mask[row].all()) else self.mask[row]
            yield Batch(
                self.ids[row : row + 1, kept],
                None,
                None if self.weights is None else self.weights[:, row : row + 1, kept],
                None if self.rows is None else self.rows[row : row + 1],
            )

    def piece(self, start: int, stop: int) -> Batch:
        """The columns start ... stop - 1."""
        mask, weights = (None if t is None else t[..., start:stop] for t in (self.mask, self.weights))
        return Batch(self.ids[:, start:stop], mask, weights, self.rows)


class Accumulator(Protocol):
    def add(self, index: int, h: Tensor, batch: Batch) -> None:
        """Take in the activations h [B, T, d] of the index-th captured layer."""


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the texts, sorted by length and cut into batches of at most max_tokens tokens, padding
    included (a longer text is a batch by itself), of which padding is at most a sixteenth or 32 tokens, whichever is
    more. Equal lengths keep their order."""
    batches: list[list[int]] = []
    real = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # sorted, so this one is the longest so far
        real += lengths[i]
        size = (len(batches[-1]) + 1) * lengths[i] if batches else 0
        if batches and size <= max_tokens and size - real <= max(32, size // 16):
            batches[-1].append(i)
        else:
            batches.append([i])
            real = lengths[i]
    return batches


def batch_tokens(model: nn.Module) -> int:
    """Tokens in a batch, where the caller does not say: a CPU is busy with few and loses time by padding more of
    them, an accelerator needs many."""
    return 1024 if models.device(model).type == "cpu" else 8192


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
    chunk: int = CHUNK,
) -> None:
    """One forward pass a batch; each accumulator sees every layer's activations at the sites of this kind.

    layers: default all; an accumulator's index counts along them. chunk: tokens of a row in one pass; longer
    rows are read one by one, in pieces (see `chunks`). The unembedding is not computed.
    """
    chosen = range(models.n_layers(model)) if layers is None else layers

    def at(index: int) -> Reader:
        def fn(h: Tensor, batch: Batch) -> None:
            for accumulator in accumulators:
                accumulator.add(index, h, batch)

        return fn

    _run(model, batches, {Site(kind, layer): at(index) for index, layer in enumerate(chosen)}, chunk)


Reader = Callable[[Tensor, Batch], None]
"""Takes in the activations [B, T, width] at one site, and the batch that they are of."""


def _run(model: nn.Module, batches: Iterable[Batch], readers: Mapping[Site, Reader], chunk: int) -> None:
    if chunk < 1:
        raise UsageError(f"chunk must be at least 1 token, not {chunk}")
    model = models.unwrap_to_run(model)
    device = models.device(model)
    current: list[Batch] = []

    def at(reader: Reader) -> Any:
        return lambda h: reader(h, current[0])

    with tap(model, {site: at(reader) for site, reader in readers.items()}):
        for batch in batches:
            batch = batch.to(device)
            if batch.ids.shape[1] <= chunk:
                current[:] = [batch]
                models.base(model)(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
                continue
            # One by one: a row that ends before the others do would attend to nothing in the later pieces.
            for row in batch.alone():

                def enter(start: int, stop: int, row: Batch = row) -> None:
                    current[:] = [row.piece(start, stop)]

                read(model, row.ids, chunk=chunk, before=enter)


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
        if self._rows.device != h.device:  # the layers of one model may be on several devices
            self._rows, self._columns = self._rows.to(h.device), self._columns.to(h.device)
        picked = h.reshape(-1, h.shape[-1])[self._rows].double()
        self.sums[index] += (self._columns @ picked).to(self.sums.device)

    def _take(self, batch: Batch) -> None:
        """Once a batch: only positions that some group weighs are worth converting to float64."""
        if batch.weights is None or batch.weights.shape[0] != self.sums.shape[1]:
            raise UsageError(f"expected weights [{self.sums.shape[1]}, B, T] with each batch")
        flat = batch.weights.reshape(batch.weights.shape[0], -1).double()
        self._rows = flat.any(0).nonzero()[:, 0]
        self._columns = flat[:, self._rows]
        self.totals += flat.sum(1).to(self.totals.device)
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
            norms = norms * batch.mask.to(norms.device)
        self.sums[index] += norms.sum(dtype=torch.float64).to(self.sums.device)
        self.counts[index] += norms.numel() if batch.mask is None else batch.mask.sum().to(self.counts.device)

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
    max_tokens: int | None = None,
    chunk: int = CHUNK,
) -> dict[Site, Tensor]:
    """Activations of the selected tokens of each text, in the texts' order.

    reduce: "mean" over a text's tokens (in float64) or the "last" of them: float32 [texts, d]; "none": all of
    them, text by text: float32 [tokens, d]. A whole text counts as prompt. max_tokens: most tokens in a batch
    (default: `batch_tokens`).
    chunk: tokens of a text in one pass; longer ones are read in pieces. Raises UsageError for no texts, a text
    without a selected token, and sites that the model does not have.
    """
    found = sorted({Site.parse(s) if isinstance(s, str) else s for s in sites})
    for site in found:
        check_site(model, site)
    if reduce not in ("mean", "last", "none"):
        raise UsageError(f"unknown reduce {reduce!r}: expected 'mean', 'last' or 'none'")
    if not texts or not found:
        raise UsageError("capture needs one text and one site at least")
    selector = resolve(parse_selector(where), tokenizer)
    tags = think_tags(tokenizer) if selector.uses("thinking", "answer") else None
    rows = [tokenizer(text)["input_ids"] for text in texts]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise UsageError(f"text {empty[0]} has no tokens")
    kept = {site: _Texts(len(texts), reduce) for site in found}

    def batches() -> Iterator[Batch]:
        for indices in length_batches([len(row) for row in rows], max_tokens or batch_tokens(model)):
            batch = pad([rows[i] for i in indices])
            state = SequenceState(tags)
            state.start(len(indices))
            mask = selector(state.advance(batch.ids, batch.mask))
            if not mask.any(1).all():
                missing = indices[int((~mask.any(1)).nonzero()[0, 0])]
                raise UsageError(f"text {missing} has no token where {selector}")
            yield Batch(batch.ids, batch.mask, mask[None], tuple(indices))

    _run(model, batches(), {site: texts.add for site, texts in kept.items()}, chunk)
    return {site: texts.result() for site, texts in kept.items()}


class _Texts:
    """What `capture` keeps of one site: a sum in float64, the last token, or all of them, of each text.

    A batch's `rows` are the texts' numbers, its weights [1, B, T] bool the selected tokens.
    """

    def __init__(self, texts: int, reduce: str) -> None:
        self.reduce = reduce
        self.parts: list[list[Tensor]] = [[] for _ in range(texts)]
        self.counts = [0] * texts

    def add(self, h: Tensor, batch: Batch) -> None:
        assert batch.rows is not None and batch.weights is not None
        mask = batch.weights[0].to(h.device)
        if self.reduce == "last":
            rows = mask.any(1).nonzero()[:, 0]
            columns = mask.shape[1] - 1 - mask[rows].flip(1).int().argmax(1)
            for row, one in zip(rows.tolist(), h[rows, columns].float().cpu(), strict=True):
                self.parts[batch.rows[row]] = [one[None]]
            return
        for row, text in enumerate(batch.rows):
            picked = h[row, mask[row]]
            if not len(picked):
                continue
            parts = self.parts[text]
            self.counts[text] += len(picked)
            if self.reduce == "mean":
                picked = picked.double().sum(0, keepdim=True)
                parts[:] = [parts[0] + picked if parts else picked]
            else:
                parts.append(picked.float().cpu())

    def result(self) -> Tensor:
        if self.reduce == "mean":
            sums = [parts[0].cpu() / count for parts, count in zip(self.parts, self.counts, strict=True)]
            return torch.cat(sums).float()
        return torch.cat([part for parts in self.parts for part in parts])
