"""Which window and layer steer each behaviour: candidates by attribution, the choice by validation.

1. Candidates: for every window, the layers with the largest `exact` effect at span onsets (the KL divergence of really
   adding the vector), away from the edges: the published range 4 ... L-4 of 32 layers, scaled to the depth.
2. Choice: on validation tasks, disjoint from extraction and evaluation, the candidate with the largest
   difference between the behaviour's fraction at +1 and at -1, among those whose loops stay under 10 % and whose -1
   keeps accuracy within 10 points of the unsteered model; among all of them, where none does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

RULE = (
    "candidates: largest exact effect away from the edges, for every window; choice: largest fraction at +1 "
    "minus fraction at -1 on the validation tasks, with loops under 10 % and -1 costing at most 10 points of accuracy"
)
LOOPS, ACCURACY_COST = 0.10, 0.10


def interior(layers: int) -> range:
    """Layers 4 ... L-4 of 32, scaled: an eighth of the depth is left out at either end."""
    edge = max(1, round(layers / 8)) if layers > 2 else 0
    return range(edge, layers - edge)


def candidate_layers(effect: Sequence[float | None], count: int) -> list[int]:
    """The `count` interior layers with the largest effect, lowest first."""
    inner = [layer for layer in interior(len(effect)) if effect[layer] is not None]
    return sorted(sorted(inner, key=lambda layer: -(effect[layer] or 0.0))[:count])


def choose(candidates: Sequence[Mapping[str, Any]], unsteered_accuracy: float | None) -> Mapping[str, Any]:
    """The best of the measured candidates.

    Each has `fraction_up`, `fraction_down` (means in [0, 1]), `loops` (the larger of both signs), `accuracy_down`;
    any of them may be None, not measured. Of equal candidates the first wins.
    """
    gentle = [c for c in candidates if is_gentle(c, unsteered_accuracy)]
    return max(gentle or candidates, key=separation)


def is_gentle(candidate: Mapping[str, Any], unsteered_accuracy: float | None) -> bool:
    """Whether a candidate keeps within the allowed side effects."""
    accuracy = candidate["accuracy_down"]
    cheap = accuracy is None or unsteered_accuracy is None or accuracy >= unsteered_accuracy - ACCURACY_COST
    return cheap and (candidate["loops"] or 0.0) <= LOOPS


def separation(candidate: Mapping[str, Any]) -> float:
    """up - down: its error is the same for all candidates, where that of a ratio grows as `down` nears zero.

    Minus infinity where a sign left no chain that could be measured.
    """
    if candidate["fraction_up"] is None or candidate["fraction_down"] is None:
        return -math.inf
    return float(candidate["fraction_up"] - candidate["fraction_down"])
