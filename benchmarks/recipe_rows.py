"""What `benchmarks/recipes.py` compares: each recipe with an aim, on the data of the extraction tasks or on the same
with its labels shuffled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from recipe_data import (
    Data,
    Pairs,
    edited_heads,
    shuffled_efficiency,
    shuffled_pairs,
    shuffled_steer2edit,
    shuffled_thinkedit,
    shuffled_thoughts,
)
from recipe_doses import Made, as_difference

from steerable.methods import recipes
from steerable.steering.direction import Direction
from steerable.steering.spec import Steering

#: Those that a recipe may choose from, where it leaves the layer open; and late ones, of which LASER truncates one.
LAYERS = {"pocket": (2, 4), "smol-think": (13, 17)}
LATE = {"pocket": (4, 5), "smol-think": (26, 29)}
Make = Callable[[Data, Any, int | None], Made | None]


@dataclass(frozen=True)
class Row:
    """A recipe with an aim. make: of the data, one of `choices`, and the seed of shuffled labels or None."""

    recipe: str
    aim: str
    make: Make
    choices: tuple[Any, ...] = (None,)

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.aim}"


def on_pairs(recipe: Callable[..., Any], read: Callable[[Data], Pairs], **more: Any) -> Make:
    def make(data: Data, layer: int | None, seed: int | None) -> Made:
        pairs = read(data) if seed is None else shuffled_pairs(read(data), seed)
        chosen = {} if layer is None else {"layer": layer}
        return steering(recipe(*data.loaded, *pairs, **chosen, **more))

    return make


def seal(data: Data, layer: int, seed: int | None) -> Made:
    chains = data.thoughts if seed is None else shuffled_thoughts(data.thoughts, seed)
    return steering(recipes.seal(*data.loaded, chains, layer=layer))


def _efficiency(data: Data, layer: int, seed: int | None) -> Direction:
    made = data.of_lengths(layer)
    return made if seed is None else shuffled_efficiency(data, made, seed)


def efficiency(data: Data, layer: int, seed: int | None) -> Made:
    return steering(_efficiency(data, layer, seed))


def conditional(recipe: Callable[..., Direction]) -> Make:
    """Efficiency Steering on tasks that are mostly answered right."""

    def make(data: Data, layer: int, seed: int | None) -> Made:
        return steering(recipe(*data.loaded, *data.prompts(), direction=_efficiency(data, layer, seed)))

    return make


def thinkedit(data: Data, _: Any, seed: int | None) -> Made:
    lengths = sorted(chain.spans[0].end - chain.spans[0].start for chain in data.lengths)
    short, long = lengths[len(lengths) // 5], lengths[-len(lengths) // 5]
    if seed is not None:
        return shuffled_thinkedit(data, (sum(n < short for n in lengths), sum(n > long for n in lengths)), seed)
    return recipes.thinkedit(*data.loaded, data.lengths, short=short, long=long, heads=edited_heads(data.loaded.model))


def steer2edit(data: Data, _: Any, seed: int | None) -> Made:
    made = recipes.steer2edit(*data.loaded, data.lengths)
    if seed is None:
        return made
    count = max(1, int(0.05 * len(data.lengths)))
    settings = {key: made.stats[key] for key in ("alpha", "rho_attention", "rho_mlp")}
    return shuffled_steer2edit(data, (count, count), seed, **settings)


def laser(data: Data, layer: int, seed: int | None) -> Made | None:
    return as_difference(data.loaded.model, recipes.laser(*data.loaded, layer=layer)) if seed is None else None


def east(data: Data, layer: int, seed: int | None) -> Made:
    texts, entropies, runs = data.steps
    if seed is not None:
        order = torch.randperm(len(entropies), generator=torch.Generator().manual_seed(seed)).tolist()
        entropies = [entropies[i] for i in order]
    return steering(recipes.east(*data.loaded, texts, entropies, runs, layer=layer))


def steering(given: Any) -> Steering:
    return given.steering() if isinstance(given, Direction) else tuple(given)


def rows(model: str) -> list[Row]:
    """Every recipe that reads chains or pairs of them, with what it is asked for."""
    layers = LAYERS[model]
    made = [
        Row("efficiency", "shorter", efficiency, layers),
        Row("steer2edit", "shorter", steer2edit),
    ]
    for name, choices in (
        ("caa", layers),
        ("linear-act", (None,)),
        ("shift-vectors", layers),
        ("fractional", (None,)),
        ("angular", (None,)),
    ):
        function = recipes.RECIPES[name].function
        made += [
            Row(name, "right", on_pairs(function, Data.more_right), choices),
            Row(name, "shorter", on_pairs(function, Data.shorter), choices),
        ]
    made += [
        Row("seal", "shorter", seal, layers),
        Row("thinkedit", "right", thinkedit),
        Row("repe", "shorter", on_pairs(recipes.repe, Data.shorter)),
        Row("selective", "shorter", on_pairs(recipes.selective, Data.shorter)),
        Row("raptor", "shorter", on_pairs(recipes.raptor, Data.shorter, above=0.5)),
        Row("cast", "shorter", conditional(recipes.cast), layers),
        Row("guiding-giants", "shorter", conditional(recipes.guiding_giants), layers),
        Row("laser", "right", laser, LATE[model]),
        Row("east", "right", east, layers),
    ]
    return made
