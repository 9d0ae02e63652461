"""How long a vector's mark stays in the stream: the shift that one layer's vector makes, in all later layers.

Sinii et al. 2025, "Small Vectors, Big Effects" (arXiv 2509.06608). The vector of layer l alone is added; the same
texts go through the base and the steered model, and D_t is the difference of the two behind a later layer, at token t:

    diff-diff    mean over t of cos(D_t, mean D)   do all tokens still move the same way?
    diff-vector  mean over t of cos(D_t, b_l')     is it the way in which that layer's own vector pushes?

One pass is exact: a mean of cosines with one fixed vector is the product of that vector's unit and the mean of the unit
shifts, so the sums of D_t and of D_t / ||D_t|| are all that is kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steerable.chains.offsets import chain_tokens
from steerable.engines.activations import Batch, batch_tokens, length_batches, pad
from steerable.engines.transformers import steer
from steerable.models import loading as models
from steerable.models.taps import tap
from steerable.steering.direction import Direction
from steerable.steering.float64 import wide
from steerable.steering.gates import Selector, parse_selector, resolve
from steerable.steering.site import Site
from steerable.steering.think import think_tags, think_tags_if_any
from steerable.steering.tokens import SequenceState, Tokens
from steerable.steering.vocabulary import encode, text_list
from steerable.store.errors import SteerableWarning, UsageError

Text = str | tuple[Sequence[int], int]
"""A text that counts as prompt, or token ids with the length of the prompt among them."""
Table = list[list[float | None]]

_HELD = 2**28  # numbers of the base model's stream held at a time, over all layers


@dataclass(frozen=True)
class Persistence:
    """Tables [source][later]: over `sources`, the layers whose vector was added, and all layers of the model.

    None stands before the source, and where there is nothing to compare with (`diff_vector`: no vector of that layer).
    diff_diff, diff_vector: mean cosines. relative: mean of ||D_t|| / ||h_t||. random: the same three tables of random
    vectors with the source's norm, averaged; they say what any shift of this size would do. tokens: those measured, of
    `texts` texts; cut: how many texts were longer than what was read of each.
    """

    sources: list[int]
    diff_diff: Table
    diff_vector: Table
    relative: Table
    random: dict[str, Table] | None
    tokens: int
    texts: int
    cut: int
    strength: float
    where: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dict(vars(self))


@torch.no_grad()
def persistence(
    model: Any,
    tokenizer: Any,
    direction: Direction,
    texts: Sequence[Text],
    *,
    layers: Iterable[int] | None = None,
    strength: float | None = None,
    where: str | Selector | None = None,
    controls: int = 1,
    longest: int = 1024,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Persistence:
    """Follow the shift that the vector of each layer makes through the later layers; see the module.

    direction: one vector [d] a layer, at a site of the residual stream. layers: the sources; default all of them.
    strength, where: default what the direction says; the sign of the strength is taken out of diff-vector. Tokens
    before the first that is touched are left out, and so are those with no shift at all. controls: random vectors for
    each source. longest: tokens read of a text. max_tokens: in a batch. progress: called with the texts just read.

    Shifts are differences of activations in the model's own type, taken in float32: a small vector drowns in the
    rounding of bfloat16, which is seen at the source itself, where diff-vector must be 1; a SteerableWarning says so.
    Raises UsageError for no texts or no tokens touched, strength 0, two vectors at a layer, and what `steer` refuses.
    """
    chosen = direction if layers is None else direction.only(layers)
    vectors = _vectors(direction)
    s = direction.strength if strength is None else float(strength)
    if s == 0 or not math.isfinite(s):
        raise UsageError(f"the strength is {s:g}: a shift needs a finite one other than 0")
    if longest < 1 or controls < 0:
        raise UsageError(f"longest must be 1 or more and controls 0 or more, not {longest} and {controls}")
    with steer(model, chosen, strength=s, where=where, tokenizer=tokenizer, track=False):
        pass  # what does not fit this model is refused now; one that was made on another is warned of
    selector = resolve(parse_selector(direction.gate if where is None else where), tokenizer)
    rows = [_ids(tokenizer, text, i) for i, text in enumerate(text_list(texts, "persistence"))]
    if not rows:
        raise UsageError("persistence needs one text at least")
    runs = [chosen, *(chosen.random_like(seed + i) for i in range(controls))]
    count, width = models.n_layers(model), models.width(model)
    sums = {(i, layer): _Shifts(count - layer, width) for i in range(len(runs)) for layer in chosen.layers}
    first = chosen.layers[0]
    most = max_tokens or max(1, min(batch_tokens(model), _HELD // ((count - first) * width)))
    tokens = 0
    for batch, state in _batches(model, tokenizer, rows, selector, longest, most):
        touched = selector(state) & state.valid
        measured = (touched.cumsum(1) > 0) & state.valid
        tokens += int(measured.sum())
        base: dict[int, Tensor] = {}
        _read(model, batch, range(first, count), partial(_store, base))
        for (run, layer), into in sums.items():
            with (
                warnings.catch_warnings(action="ignore", category=SteerableWarning),  # given once for all above
                steer(
                    model, runs[run].only([layer]), strength=s, where=selector, tokenizer=tokenizer, track=False
                ) as handle,
            ):
                handle.feed(state)
                _read(model, batch, range(layer, count), into.reader(layer, base, measured))
        if progress is not None:
            progress(len(batch.ids))
    if not tokens:
        raise UsageError(f"no token was touched: where={selector} opens nowhere in the {len(rows)} texts")
    signed = {layer: math.copysign(1, s) * vector for layer, vector in vectors.items()}
    tables = [
        _tables([sums[run, layer] for layer in chosen.layers], chosen.layers, signed, count) for run in range(len(runs))
    ]
    _warn_of_rounding(model, chosen, tables[0]["diff_vector"])
    return Persistence(
        sources=chosen.layers,
        **tables[0],
        random=_mean(tables[1:]),
        tokens=tokens,
        texts=len(rows),
        cut=sum(len(ids) > longest for ids, _ in rows),
        strength=s,
        where=str(selector),
    )


def chain_texts(
    tokenizer: Any, chains: Sequence[Mapping[str, Any]], prompts: Mapping[str, str]
) -> list[tuple[list[int], int]]:
    """Chain records as `persistence` reads them: token ids and the length of the prompt.

    prompts: each task's text after the chat template, by task id, for chains without `prompt_ids`. Raises UsageError
    for such a chain whose task has none, and where a text must be cut into tokens by a tokenizer without offsets.
    """
    tokens = chain_tokens(tokenizer, chains, prompts, think_tags_if_any(tokenizer))
    return [(chain.ids, chain.prompt) for chain in tokens]


class _Shifts:
    """Sums over tokens of the shifts behind `layers` consecutive layers, and of their directions; float64."""

    def __init__(self, layers: int, width: int) -> None:
        self.sums = torch.zeros(2, layers, width, dtype=torch.float64)
        self.moved = torch.zeros(layers, dtype=torch.float64)
        self.relative = torch.zeros(layers, dtype=torch.float64)
        self.tokens = torch.zeros(layers, dtype=torch.float64)

    def reader(self, first: int, base: Mapping[int, Tensor], measured: Tensor) -> Callable[[int, Tensor], None]:
        """Takes in the steered stream of a batch, layer by layer from `first` on, beside the base model's."""
        return lambda layer, h: self._add(layer - first, base[layer].to(h.device), h, measured)

    def _add(self, index: int, base: Tensor, steered: Tensor, measured: Tensor) -> None:
        mask = measured.to(base.device)
        before = base[mask].float()
        shift = steered[mask].float() - before
        norms = torch.linalg.vector_norm(shift, dim=1)
        moved = norms > 0
        units = shift[moved] / norms[moved, None]
        for row, part in enumerate((shift, units)):
            self.sums[row, index] += wide(part).sum(0).cpu()
        sizes = torch.linalg.vector_norm(before, dim=1).clamp_min(1e-30)
        self.relative[index] += wide(norms / sizes).sum().cpu()
        self.moved[index] += moved.sum().cpu()
        self.tokens[index] += len(norms)


def _vectors(direction: Direction) -> dict[int, Tensor]:
    """The one vector of each layer, float64."""
    vectors: dict[int, Tensor] = {}
    for site, vector in direction.vectors.items():
        if site.layer in vectors:
            raise UsageError(f"there is more than one vector at layer {site.layer}: persistence follows one a layer")
        if site.kind in ("head_in", "mlp_act"):
            raise UsageError(f"{site} is not in the residual stream: persistence follows vectors that are")
        vectors[site.layer] = vector.reshape(-1).double()
    return vectors


def _ids(tokenizer: Any, text: Text, number: int) -> tuple[list[int], int]:
    ids, start = (encode(tokenizer, text), None) if isinstance(text, str) else text
    if not len(ids):
        raise UsageError(f"text {number} has no tokens")
    return list(ids), len(ids) if start is None else start


def _batches(
    model: Any, tokenizer: Any, rows: Sequence[tuple[list[int], int]], selector: Selector, longest: int, most: int
) -> Iterator[tuple[Batch, Tokens]]:
    tags = think_tags(tokenizer) if selector.uses("thinking", "answer") else None
    cut = [ids[:longest] for ids, _ in rows]
    for indices in length_batches([len(ids) for ids in cut], most):
        batch = pad([cut[i] for i in indices], models.device(model))
        state = SequenceState(tags, selector.breaks)
        state.start(len(indices), batch.ids.device, torch.tensor([rows[i][1] for i in indices]))
        yield batch, state.advance(batch.ids, batch.mask)


def _store(stream: dict[int, Tensor], layer: int, h: Tensor) -> None:
    stream[layer] = h.clone()


def _read(model: Any, batch: Batch, layers: Iterable[int], take: Callable[[int, Tensor], None]) -> None:
    """One forward pass; `take(layer, h)` sees the stream [B, T, d] behind each of the layers."""

    def at(layer: int) -> Callable[[Tensor], None]:
        return lambda h: take(layer, h)

    with tap(model, {Site("resid_post", layer): at(layer) for layer in layers}):
        models.base(model)(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)


def _tables(
    sums: Sequence[_Shifts], sources: Sequence[int], vectors: Mapping[int, Tensor], count: int
) -> dict[str, Table]:
    tables: dict[str, Table] = {"diff_diff": [], "diff_vector": [], "relative": []}
    for source, shifts in zip(sources, sums, strict=True):
        rows: dict[str, list[float | None]] = {name: [None] * source for name in tables}
        for index in range(count - source):
            shift, unit = shifts.sums[:, index]
            moved, total = float(shifts.moved[index]), float(shifts.tokens[index])
            vector = vectors.get(source + index)
            rows["diff_diff"].append(_mean_cosine(unit, shift, moved))
            rows["diff_vector"].append(None if vector is None else _mean_cosine(unit, vector, moved))
            rows["relative"].append(float(shifts.relative[index]) / total if total else None)
        for name, table in tables.items():
            table.append(rows[name])
    return tables


def _mean_cosine(unit_sum: Tensor, vector: Tensor, tokens: float) -> float | None:
    """The mean cosine of the shifts, given the sum of their units, with a vector."""
    norm = float(vector.norm())
    return float(unit_sum @ vector) / norm / tokens if tokens and norm > 0 else None


def _mean(runs: Sequence[Mapping[str, Table]]) -> dict[str, Table] | None:
    """The cell-by-cell mean of several runs' tables over the runs that have a value there."""
    if not runs:
        return None
    result: dict[str, Table] = {}
    for name in runs[0]:
        stacked = torch.tensor(
            [[[math.nan if cell is None else cell for cell in row] for row in run[name]] for run in runs],
            dtype=torch.float64,
        )
        means = stacked.nanmean(0).tolist()
        result[name] = [[None if math.isnan(cell) else cell for cell in row] for row in means]
    return result


def _warn_of_rounding(model: Any, chosen: Direction, diff_vector: Table) -> None:
    at_source = [diff_vector[i][site.layer] for i, site in enumerate(chosen.vectors) if site.kind == "resid_post"]
    worst = min((value for value in at_source if value is not None), default=1.0)
    if worst < 0.99:
        warnings.warn(
            f"at its own layer the shift has a cosine of {worst:.3f} with the vector instead of 1: the rounding of "
            f"{model.dtype} hides a vector this small, so load the model in float32",
            SteerableWarning,
            stacklevel=3,
        )
