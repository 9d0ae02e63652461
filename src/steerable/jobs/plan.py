"""What the steering experiment generates: one cell for every setting, with its controls, as data.

A cell is generated in one or more parts; a part is one vector file, added at some layers and tokens, with one strength,
on some samples of every task. All cells draw with the same seeds a task and sample, so that they are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerable.chains.records import STEERABLE
from steerable.jobs.settings import Config


@dataclass(frozen=True)
class Part:
    """`strength` is what is added at each of `layers`; no `direction` means unsteered."""

    samples: tuple[int, ...]
    direction: str | None = None
    strength: float = 0.0
    layers: tuple[int, ...] = ()
    where: str = "all"


@dataclass(frozen=True)
class Cell:
    """`strength` is the nominal coefficient, the sum over layers; `behaviours` are those that the cell speaks about."""

    name: str
    behaviours: tuple[str, ...]
    control: str | None
    strength: float
    layers: tuple[int, ...]
    where: str
    parts: tuple[Part, ...]


def candidate_path(window: str, baseline: str, behaviour: str) -> str:
    """Where `extract` leaves a direction of all layers."""
    return f"vectors/candidates/{window}.{baseline}/{behaviour}.safetensors"


def shuffled_path(window: str, baseline: str, behaviour: str, k: int) -> str:
    """Where `extract` leaves the same from the k-th shuffle of the labels."""
    return f"vectors/shuffled/{window}.{baseline}/{behaviour}.{k}.safetensors"


def selected_path(behaviour: str) -> str:
    """Where `select` leaves the chosen direction: one layer, ready for `steer` and `chat`."""
    return f"vectors/{behaviour}.safetensors"


def random_path(layer: int, k: int) -> str:
    """Where `select` leaves the k-th random direction of a layer: of the same norm as every vector there."""
    return f"vectors/random/layer{layer}.{k}.safetensors"


def _cell(
    name: str,
    behaviours: Iterable[str],
    strength: float,
    parts: Iterable[Part],
    *,
    control: str | None = None,
    layers: Sequence[int] = (),
    where: str = "all",
) -> Cell:
    return Cell(name, tuple(behaviours), control, strength, tuple(layers), where, tuple(parts))


def validation_cells(
    config: Config, candidates: Mapping[str, Sequence[Mapping[str, Any]]], size: float = 1.0
) -> list[Cell]:
    """Unsteered, and -size and +size of every candidate (`window`, `baseline`, `layer`) of every behaviour.

    Two samples a task; greedy ones would be equal.
    """
    samples = (0,) if config.greedy else (0, 1)
    cells = [_cell("unsteered", candidates, 0.0, [Part(samples)])]
    for behaviour, found in candidates.items():
        for c in found:
            path, layers = candidate_path(c["window"], c["baseline"], behaviour), (c["layer"],)
            cells += [
                _cell(
                    f"{behaviour}.{c['window']}.layer{c['layer']}.{strength:+g}",
                    [behaviour],
                    strength,
                    [Part(samples, path, strength, layers)],
                    layers=layers,
                )
                for strength in (-size, size)
            ]
    return cells


def evaluation_cells(config: Config, selection: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """Every cell of the report, from the selection (`layer`, `layers`, `window`, `baseline` and, where it is not 1,
    `strength` of each behaviour)."""
    main = (0,) if config.greedy else tuple(range(config.samples))
    side = main[: config.side_samples]
    behaviours = [b for b in STEERABLE if b in selection]
    cells = [_cell("unsteered", behaviours, 0.0, [Part(main)])]
    for b in behaviours:
        chosen = selection[b]
        layer, several = (chosen["layer"],), tuple(chosen["layers"])
        path = candidate_path(chosen["window"], chosen["baseline"], b)
        size = chosen.get("strength", 1.0)
        for s in (-size, size):
            cells.append(_cell(f"{b}.{s:+g}", [b], s, [Part(main, path, s, layer)], layers=layer))
            shared = [Part(side, path, s / len(several), several)]
            cells.append(_cell(f"{b}.{s:+g}.layers", [b], s, shared, layers=several))
            thinking = [Part(side, path, s, layer, "thinking")]
            cells.append(_cell(f"{b}.{s:+g}.thinking", [b], s, thinking, layers=layer, where="thinking"))
            shuffles = [shuffled_path(chosen["window"], chosen["baseline"], b, k) for k in range(config.controls)]
            control = _control(shuffles, main, s, layer)
            cells.append(_cell(f"{b}.{s:+g}.shuffled", [b], s, control, control="shuffled", layers=layer))
        for s in config.strengths:
            if abs(s) == size:
                continue
            cells.append(_cell(f"{b}.{s:+g}", [b], s, [Part(side, path, s, layer)], layers=layer))
    # All vectors of a layer have one norm, so its random directions control every behaviour that is steered there.
    places = {b: (selection[b]["layer"], selection[b].get("strength", 1.0)) for b in behaviours}
    for layer, size in sorted(set(places.values())):
        here = [b for b in behaviours if places[b] == (layer, size)]
        for s in (-size, size):
            parts = _control([random_path(layer, k) for k in range(config.controls)], main, s, (layer,))
            cells.append(_cell(f"random.layer{layer}.{s:+g}", here, s, parts, control="random", layers=(layer,)))
    return cells


def _control(paths: Sequence[str], samples: Sequence[int], strength: float, layer: tuple[int, ...]) -> list[Part]:
    """A control is the mean over several directions: every task meets each of them once."""
    return [Part((samples[k % len(samples)],), path, strength, layer) for k, path in enumerate(paths)]
