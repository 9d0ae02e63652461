"""Reading activations: one forward pass over the text, every layer streamed into accumulators.

`stream` is the machinery, an accumulator is any object with `add(index, h, batch)`; nothing the size of the
data is kept. Texts longer than a chunk are read in pieces behind a key/value cache, so that memory grows with
their length by that cache alone; models with a recurrent state (Mamba) read them whole. `capture` is the convenience
for a few texts. Both tell attention sinks (`sinks`) from ordinary tokens, and leave them out of every mean unless
asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from steerable.engines.hf.routes import position_table, positions
from steerable.engines.memory import in_narrower_batches
from steerable.models import loading as models
from steerable.models import sinks as attention_sinks
from steerable.models.reading import CHUNK, is_recurrent, read
from steerable.models.sinks import EARLY, Sinks, Tally
from steerable.models.taps import check_site, tap
from steerable.steering.float64 import wide, wide_device
from steerable.steering.gates import Selector, parse_selector, resolve, selectors
from steerable.steering.site import Site
from steerable.steering.think import think_tags
from steerable.steering.tokens import SequenceState
from steerable.steering.vocabulary import encode, text_list
from steerable.store.errors import SteerableWarning, UsageError


@dataclass
class Batch:
    """Texts that are read together, padded on the right.

    ids: [B, T]. mask: [B, T] bool, False on padding; None where there is none. weights: [G, B, T] float64, for
    `WeightedSums`. rows: a number for each of the B rows, by which accumulators may tell them apart. position: [B, T],
    of each token in its text (by default counted from the mask). `stream` sets two more for each layer before an
    accumulator sees it: sinks, [B, T] bool, which tokens are attention sinks there, and norms, [B, T], the activations'
    norms; both None where attention sinks count like other tokens.

    An accumulator sees a text that is longer than a chunk as several batches of one row.
    """

    ids: Tensor
    mask: Tensor | None = None
    weights: Tensor | None = None
    rows: tuple[int, ...] | None = None
    position: Tensor | None = None
    sinks: Tensor | None = None
    norms: Tensor | None = None

    def __post_init__(self) -> None:
        if self.position is None:
            self.position = attention_sinks.ranks(self.valid())

    def valid(self) -> Tensor:
        """Which tokens are not padding, [B, T] bool."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask.bool()

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `fn` applied to every tensor."""
        mask, weights, position = (None if t is None else fn(t) for t in (self.mask, self.weights, self.position))
        return Batch(fn(self.ids), mask, weights, self.rows, position)

    def alone(self) -> Iterator[Batch]:
        """Each row as a batch of its own, without padding."""
        for row in range(len(self.ids)):
            real = slice(None) if self.mask is None or bool(self.mask[row].all()) else self.mask[row]
            ids, weights = self.ids[row : row + 1, real], None
            if self.weights is not None:
                weights = self.weights[:, row : row + 1, real]
            yield Batch(ids, None, weights, None if self.rows is None else self.rows[row : row + 1])

    def piece(self, start: int, stop: int) -> Batch:
        """The columns start ... stop - 1."""
        return self.map(lambda t: t[..., start:stop])


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
    sinks: Sinks = "drop",
) -> None:
    """One forward pass a batch; each accumulator sees every layer's activations at the sites of this kind.

    layers: default all; an accumulator's index counts along them. chunk: tokens of a row in one pass; longer
    rows are read one by one, in pieces (see `chunks`). The unembedding is not computed. sinks: "drop" marks attention
    sinks in `batch.sinks`, which the accumulators here leave out of their means; "keep" marks none.
    """
    attention_sinks.check(sinks)
    chosen = range(models.n_layers(model)) if layers is None else layers

    def at(index: int) -> Reader:
        def fn(h: Tensor, batch: Batch) -> None:
            for accumulator in accumulators:
                accumulator.add(index, h, batch)

        return fn

    _run(model, batches, {Site(kind, layer): at(index) for index, layer in enumerate(chosen)}, chunk, sinks)


Reader = Callable[[Tensor, Batch], None]
"""Takes in the activations [B, T, width] at one site, and the batch that they are of."""


def _run(model: nn.Module, batches: Iterable[Batch], readers: Mapping[Site, Reader], chunk: int, sinks: Sinks) -> None:
    if chunk < 1:
        raise UsageError(f"chunk must be at least 1 token, not {chunk}")
    model = models.unwrap_to_run(model)
    device, whole = models.device(model), is_recurrent(model)
    first = sinks == "drop" and attention_sinks.first_is_massive(model)
    watches = {site: _Watch(site.kind, reader, sinks, first) for site, reader in readers.items()}
    vocabulary, longest = models.vocabulary(model), positions(model) if position_table(model) is not None else None
    with tap(model, {site: watch.see for site, watch in watches.items()}):
        for batch in batches:
            if longest is not None and batch.ids.shape[1] > longest:
                raise UsageError(
                    f"a text has {batch.ids.shape[1]} tokens, and the model has learned positions for {longest}: give "
                    "shorter texts"
                )
            if (last := int(batch.ids.max())) >= vocabulary:
                raise UsageError(
                    f"a text has the token {last}, and the model knows tokens from 0 to {vocabulary - 1}: give the "
                    "model's own tokenizer"
                )
            batch = batch.map(lambda t: t.to(wide_device(device) if t.dtype == torch.float64 else device))
            if batch.ids.shape[1] <= chunk or whole:
                text = _Text(batch)
                for watch in watches.values():
                    watch.start(text)
                models.base(model)(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
                continue
            # One by one: a row that ends before the others do would attend to nothing in the later pieces.
            for row in batch.alone():
                text = _Text(row)
                for watch in watches.values():
                    watch.start(text)
                read(model, row.ids, chunk=chunk)


class _Text:
    """What is being read, and its pieces, which all sites share: accumulators know a batch by its identity."""

    def __init__(self, batch: Batch) -> None:
        self.length = batch.ids.shape[1]
        self.pieces = {(0, self.length): batch}

    def piece(self, start: int, stop: int) -> Batch:
        if (start, stop) not in self.pieces:
            self.pieces[start, stop] = self.pieces[0, self.length].piece(start, stop)
        return self.pieces[start, stop]


class _Watch:
    """Hands one site's activations to their reader, with attention sinks marked.

    What is ordinary is known after the first EARLY tokens, so pieces that end before them are held back: the marks
    do not depend on how a text is cut.
    """

    def __init__(self, kind: str, reader: Reader, sinks: Sinks, first: bool) -> None:
        self.kind, self.reader, self.drops, self.first = kind, reader, sinks == "drop", first

    def start(self, text: _Text) -> None:
        self.text, self.done = text, 0
        self.held: list[Tensor] = []
        self.limits: tuple[Tensor, Tensor] | None = None

    def see(self, h: Tensor) -> None:
        self.held.append(h)
        stop = self.done + sum(part.shape[1] for part in self.held)
        if self.drops and stop < min(EARLY, self.text.length):
            return
        h = self.held[0] if len(self.held) == 1 else torch.cat(self.held, 1)
        piece = self.text.piece(self.done, stop)
        self.done, self.held = stop, []
        if self.drops:
            assert piece.position is not None
            position, piece.norms = piece.position.to(h.device), attention_sinks.norms_of(h)
            if self.limits is None:
                valid = piece.valid().to(h.device)
                self.limits = attention_sinks.limits(piece.norms, position, valid, self.kind, self.first)
            piece.sinks = attention_sinks.massive(piece.norms, position, self.limits)
        self.reader(h, piece)


def remaining(totals: Tensor, sunk: Tensor) -> Tensor:
    """totals - sunk, exactly zero where nothing but rounding remains."""
    left = totals - sunk
    return left.masked_fill(left <= 1e-9 * totals, 0.0)


class WeightedSums:
    """For each layer and group g: sums [L, G, d] of weights[g, b, t] * h[b, t], the totals [G] of the weights, and
    how much of them [L, G] fell on attention sinks, which are left out of the sums; float64.

    The mean of a group is `sums / (totals - sunk)`. Two are merged by `+`.
    """

    def __init__(self, layers: int, groups: int, width: int, device: torch.device | str = "cpu"):
        device = wide_device(device)
        self.sums = torch.zeros(layers, groups, width, dtype=torch.float64, device=device)
        self.totals = torch.zeros(groups, dtype=torch.float64, device=device)
        self.sunk = torch.zeros(layers, groups, dtype=torch.float64, device=device)
        self.tally = Tally(layers, device)
        self._batch: Batch | None = None
        self._rows, self._columns = torch.zeros(0), torch.zeros(0)

    def add(self, index: int, h: Tensor, batch: Batch) -> None:
        if batch is not self._batch:
            self._take(batch)
        if self._rows.device != h.device:  # the layers of one model may be on several devices
            self._rows, self._columns = self._rows.to(h.device), self._columns.to(wide_device(h.device))
        columns = self._columns
        if batch.sinks is not None:
            assert batch.position is not None
            sunk = batch.sinks.reshape(-1)[self._rows].to(h.device)
            self.tally.add(index, sunk, batch.position.reshape(-1).to(h.device)[self._rows])
            if sunk.any():
                columns = columns.masked_fill(sunk.to(columns.device), 0.0)
                self.sunk[index] += (self._columns - columns).sum(1).to(self.sunk.device)
        picked = wide(h.reshape(-1, h.shape[-1])[self._rows])
        self.sums[index] += (columns @ picked).to(self.sums.device)

    def _take(self, batch: Batch) -> None:
        """Once a batch: only positions that some group weighs are worth converting to float64."""
        if batch.weights is None or batch.weights.shape[0] != self.sums.shape[1]:
            raise UsageError(f"expected weights [{self.sums.shape[1]}, B, T] with each batch")
        flat = wide(batch.weights.reshape(batch.weights.shape[0], -1))
        self._rows = flat.any(0).nonzero()[:, 0]
        self._columns = flat[:, self._rows]
        self.totals += flat.sum(1).to(self.totals.device)
        self._batch = batch

    def means(self) -> Tensor:
        """[L, G, d]; NaN for a group without weight."""
        return self.sums / remaining(self.totals, self.sunk)[:, :, None]

    def cpu(self) -> WeightedSums:
        """The same on the CPU, without what belongs to the last batch, so that it can be sent to another process."""
        result = WeightedSums(0, 0, 0)
        result.sums, result.totals, result.sunk = self.sums.cpu(), self.totals.cpu(), self.sunk.cpu()
        result.tally = self.tally.cpu()
        return result

    def __add__(self, other: WeightedSums) -> WeightedSums:
        result = copy(self)
        result.sums, result.totals = self.sums + other.sums, self.totals + other.totals
        result.sunk, result.tally = self.sunk + other.sunk, self.tally + other.tally
        return result


class NormSums:
    """Mean ||h|| of each layer over the tokens that are not padding, or with the weights of one group of
    `batch.weights`; attention sinks are left out."""

    def __init__(self, layers: int, device: torch.device | str = "cpu", group: int | None = None):
        device = wide_device(device)
        self.sums = torch.zeros(layers, dtype=torch.float64, device=device)
        self.counts = torch.zeros(layers, dtype=torch.float64, device=device)
        self.group = group

    def add(self, index: int, h: Tensor, batch: Batch) -> None:
        norms = attention_sinks.norms_of(h) if batch.norms is None else batch.norms
        if self.group is None:
            weights = wide(batch.valid().to(h.device))
        else:
            assert batch.weights is not None
            weights = batch.weights[self.group].to(wide_device(h.device))
        if batch.sinks is not None:
            weights = weights.masked_fill(batch.sinks.to(weights.device), 0.0)
        self.sums[index] += (norms.to(weights.device) * weights).sum().to(self.sums.device)
        self.counts[index] += weights.sum().to(self.counts.device)

    def means(self) -> Tensor:
        """[L] float64."""
        return self.sums / self.counts

    def cpu(self) -> NormSums:
        """The same on the CPU."""
        result = copy(self)
        result.sums, result.counts = self.sums.cpu(), self.counts.cpu()
        return result

    def __add__(self, other: NormSums) -> NormSums:
        result = copy(self)
        result.sums, result.counts = self.sums + other.sums, self.counts + other.counts
        return result


@torch.no_grad()
def mean_norms(model: nn.Module, rows: Sequence[Sequence[int]], sites: Sequence[Site]) -> dict[Site, float]:
    """Mean ||h|| at sites over the ordinary tokens of texts, given as token ids; attention sinks are left out.

    Raises UsageError where a site has no ordinary token.
    """
    vocabulary = models.vocabulary(model)
    result: dict[Site, float] = {}
    longer = [[*row, *attention_sinks.company(list(row), vocabulary)] for row in rows]

    def batches(cut: list[list[int]]) -> Iterator[Batch]:
        for indices in cut:
            batch, alone = pad([longer[i] for i in indices]), pad([rows[i] for i in indices]).valid()
            batch.weights = nn.functional.pad(alone, (0, batch.ids.shape[1] - alone.shape[1]))[None].double()
            yield batch

    for kind in dict.fromkeys(site.kind for site in sites):
        here = [site for site in sites if site.kind == kind]

        def means(cut: list[list[int]], kind: str = kind, here: list[Site] = here) -> list[float]:
            norms = NormSums(len(here), models.device(model), group=0)
            stream(model, batches(cut), [norms], kind=kind, layers=[site.layer for site in here])
            return list(norms.means().tolist())

        whole = length_batches([len(row) for row in longer], batch_tokens(model))
        result |= dict(zip(here, in_narrower_batches(whole, means), strict=True))
    if bare := [site for site, norm in result.items() if norm != norm]:
        raise UsageError(f"the texts have no ordinary token at {bare[0]}, only attention sinks: give longer ones")
    return result


class Captured(dict[Site, Tensor]):
    """Activations by site, as `capture` returns them.

    sinks: {site: {"left_out", "of", "positions": {position: how often}}} for each site where attention sinks were left
    out of the means; estimators write it to the direction's `stats`.
    """

    sinks: dict[Site, dict[str, Any]]


@torch.no_grad()
def capture(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    sites: Sequence[Site | str],
    where: str | Selector = selectors.all,
    reduce: Literal["mean", "last", "none"] | int = "mean",
    sinks: Sinks = "drop",
    max_tokens: int | None = None,
    chunk: int = CHUNK,
) -> Captured:
    """Read the activations of the selected tokens of each text.

    A whole text counts as prompt. It gets the special tokens that the tokenizer adds, but no second BOS where it begins
    with one, as texts from a chat template do.

    Args:
        model: the model, or what wraps it.
        tokenizer: its tokenizer.
        texts: the texts, in a list.
        sites: sites or their names, e.g. "resid_post.3".
        where: which tokens; a selector or its text.
        reduce: "mean" over a text's tokens (in float64), over the last n of them for a number n, the "last" of them, or
            "none": all of them.
        sinks: "drop" leaves attention sinks (`models.sinks`: in most pretrained models the first token, whose
            activation is massive) out of the means, with a SteerableWarning that says how many; "keep" takes them in.
            A last token that is one is only warned of, and "none" returns every token: the estimators then leave
            massive ones out.
        max_tokens: most tokens in a batch; default `batch_tokens(model)`.
        chunk: most tokens of a text in one pass; longer texts are read in pieces.

    Returns:
        {site: float32 [texts, d]} in the texts' order; with reduce="none" [tokens, d], text by text.

    Raises:
        UsageError: for no texts, a single string instead of a list, a text without a selected token or with none but
            attention sinks, and sites that the model does not have.

    Example:
        >>> happy = st.capture(model, tokenizer, ["What a lovely day!"], sites=["resid_post.3"])  # doctest: +SKIP
    """
    texts = text_list(texts, "capture")
    places = sorted({Site.parse(s) if isinstance(s, str) else s for s in sites})
    for site in places:
        check_site(model, site)
    if reduce not in ("mean", "last", "none") and not (isinstance(reduce, int) and reduce > 0):
        raise UsageError(f"unknown reduce {reduce!r}: expected 'mean', 'last', 'none' or a number of last tokens")
    attention_sinks.check(sinks)
    if not texts or not places:
        raise UsageError("capture needs one text and one site at least")
    selector = resolve(parse_selector(where), tokenizer)
    tags = think_tags(tokenizer) if selector.uses("thinking", "answer") else None
    rows = [encode(tokenizer, text) for text in texts]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise UsageError(f"text {empty[0]} has no tokens")
    drops = sinks == "drop" and reduce != "none"
    vocabulary = models.vocabulary(model)
    read_rows = [[*row, *attention_sinks.company(row, vocabulary)] if drops else row for row in rows]

    def batches(cut: list[list[int]]) -> Iterator[Batch]:
        for indices in cut:
            batch, texts_alone = pad([read_rows[i] for i in indices]), pad([rows[i] for i in indices])
            state = SequenceState(tags, selector.breaks)
            state.start(len(indices))
            mask = selector(state.advance(texts_alone.ids, texts_alone.mask))
            if not mask.any(1).all():
                missing = indices[int((~mask.any(1)).nonzero()[0, 0])]
                raise UsageError(f"text {missing} has no token where {selector}")
            if isinstance(reduce, int):
                mask = mask & (mask.flip(1).cumsum(1).flip(1) <= reduce)
            mask = nn.functional.pad(mask, (0, batch.ids.shape[1] - mask.shape[1]))
            yield Batch(batch.ids, batch.mask, mask[None], tuple(indices))

    def taken(cut: list[list[int]]) -> dict[Site, _Texts]:
        readers = {site: _Texts(len(texts), "mean" if isinstance(reduce, int) else reduce) for site in places}
        adders = {site: reader.add for site, reader in readers.items()}
        _run(model, batches(cut), adders, chunk, sinks if drops else "keep")
        return readers

    whole = length_batches([len(row) for row in read_rows], max_tokens or batch_tokens(model))
    readers = in_narrower_batches(whole, taken)
    result = Captured({site: reader.result(site) for site, reader in readers.items()})
    result.sinks = {site: summary for site, reader in readers.items() if (summary := reader.tally.summary(0))}
    if warning := attention_sinks.sentence(result.sinks, last=reduce == "last"):
        warnings.warn(warning, SteerableWarning, stacklevel=4)  # past torch's no_grad
    if reduce == "last":
        result.sinks = {}
    return result


class _Texts:
    """What `capture` keeps of one site: a sum in float64, the last token, or all of them, of each text.

    A batch's `rows` are the texts' numbers, its weights [1, B, T] bool the selected tokens.
    """

    def __init__(self, texts: int, reduce: str) -> None:
        self.reduce = reduce
        self.parts: list[list[Tensor]] = [[] for _ in range(texts)]
        self.counts = [0] * texts
        self.tally = Tally(1)
        self.last: dict[int, tuple[Tensor, Tensor]] = {}  # of each text: whether it is a sink, and where it stands

    def add(self, h: Tensor, batch: Batch) -> None:
        assert batch.rows is not None and batch.weights is not None and batch.position is not None
        mask = batch.weights[0].to(h.device)
        sinks = None if batch.sinks is None else batch.sinks.to(h.device)
        if self.reduce == "last":
            rows = mask.any(1).nonzero()[:, 0]
            columns = mask.shape[1] - 1 - mask[rows].flip(1).int().argmax(1)
            for row, one in zip(rows.tolist(), h[rows, columns].float().cpu(), strict=True):
                self.parts[batch.rows[row]] = [one[None]]
            if sinks is not None:
                position = batch.position.to(h.device)
                for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                    self.last[batch.rows[row]] = sinks[row, column], position[row, column]
            return
        if sinks is not None:
            self.tally.add(0, sinks[mask], batch.position.to(h.device)[mask])
            mask = mask & ~sinks
        for row, text in enumerate(batch.rows):
            picked = h[row, mask[row]]
            if not len(picked):
                continue
            parts = self.parts[text]
            self.counts[text] += len(picked)
            if self.reduce == "mean":
                picked = wide(picked).sum(0, keepdim=True)
                parts[:] = [parts[0] + picked if parts else picked]
            else:
                parts.append(picked.float().cpu())

    def result(self, site: Site) -> Tensor:
        if self.last:
            marks, places = zip(*self.last.values(), strict=True)
            self.tally.add(0, torch.stack(marks), torch.stack(places))
        if self.reduce == "mean":
            if bare := [text for text, count in enumerate(self.counts) if not count]:
                raise UsageError(
                    f"every selected token of text {bare[0]} is an attention sink at {site}, whose activation is "
                    "massive whatever the text says: give a longer text, or sinks='keep' to take it as it is"
                )
            sums = [parts[0].cpu() / count for parts, count in zip(self.parts, self.counts, strict=True)]
            return torch.cat(sums).float()
        return torch.cat([part for parts in self.parts for part in parts])
