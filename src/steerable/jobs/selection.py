"""Which window, layer and strength steer each behaviour: candidates by attribution, the choice by validation.

1. Candidates: for every window, the layers with the largest `exact` effect at span onsets (the KL divergence of really
   adding the vector), away from the edges: the published range 4 ... L-4 of 32 layers, scaled to the depth.
2. Rounds (successive halving): all candidates steer a third of the validation tasks, one chain of each; the half of
   them with the largest difference (see 3) steers the second third, and the half of that, two at least, the last one,
   two chains of each. So few chains say nothing of accuracy.
3. Choice: on validation tasks, disjoint from extraction and evaluation, the candidate with the largest difference
   between the behaviour's fraction at +1 and at -1, the mean of the tasks' own differences, among those whose loops
   (the mean share of repeated 8-grams) are at most 10 points above those of the unsteered model and whose -1 keeps
   accuracy within 10 points of it; where none does both, among those that write sound text.
4. Where none writes sound text at 1 (loops, tokens without sense, or most chains without a label), the candidates are
   tried at a half and at a quarter of it. Where none does there, either, none has passed: the one with the fewest loops
   is taken, and `rule` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerable.chains.records import is_label
from steerable.chains.windows import WINDOWS
from steerable.jobs.settings import BASELINES
from steerable.store.errors import UsageError
from steerable.store.run_folder import read_json

RULE = (
    "candidates: largest exact effect away from the edges, for every window; choice: largest fraction at +1 "
    "minus fraction at -1 on the validation tasks, paired by task, with loops at most 10 points above the unsteered "
    "model's and -1 costing at most 10 points of accuracy"
)
LOOPS, ACCURACY_COST = 0.10, 0.10
#: A text is nonsense where accuracy falls under this share of the unsteered one, or where this many more chains never
#: close their thinking: a model that writes tokens without sense repeats none of them.
NONSENSE_ACCURACY, NONSENSE_UNCLOSED = 0.1, 0.5
#: What a few labelled chains of many show is no measurement of a behaviour.
MOST_DROPPED = 0.5
STRENGTHS = (1.0, 0.5, 0.25)
"""Strengths that are tried, each only where no candidate writes sound text at the one before."""
ROUNDS = 3
FEWEST, FEWEST_TASKS = 2, 12
"""Of so few candidates, or on fewer tasks, there is one round alone."""

Candidate = Mapping[str, Any]


def read_selection(path: Path) -> dict[str, dict[str, Any]]:
    """What was chosen for each behaviour, from a run's selection.json; `missing` lists those without a vector.

    Raises UsageError where it is not what `select` writes: its words become file names.
    """
    selection = {b: chosen for b, chosen in read_json(path, dict).items() if b != "missing"}
    if unsound := [b for b, chosen in selection.items() if not (is_label(b) and _is_sound(chosen))]:
        raise UsageError(f"{path} is unsound at {unsound[0]!r}: delete it and run `steerable select` again")
    if not selection:
        raise UsageError(f"{path} holds no behaviour: delete it and run `steerable select` again")
    return selection


def _is_sound(chosen: Any) -> bool:
    return (
        isinstance(chosen, dict)
        and chosen.get("window") in list(WINDOWS)
        and chosen.get("baseline") in BASELINES
        and isinstance(layers := chosen.get("layers"), list)
        and bool(layers)
        and all(type(layer) is int and layer >= 0 for layer in [chosen.get("layer"), *layers])
        and type(strength := chosen.get("strength", 1.0)) in (int, float)
        and strength > 0
        and isinstance(chosen.get("rule"), str)
        and isinstance(candidates := chosen.get("candidates"), list)
        and all(isinstance(candidate, dict) for candidate in candidates)
    )


def interior(layers: int) -> range:
    """Layers 4 ... L-4 of 32, scaled: an eighth of the depth is left out at either end."""
    edge = max(1, round(layers / 8)) if layers > 2 else 0
    return range(edge, layers - edge)


def candidate_layers(effect: Sequence[float | None], count: int) -> list[int]:
    """The `count` interior layers with the largest effect, lowest first."""
    inner = [layer for layer in interior(len(effect)) if effect[layer] is not None]
    return sorted(sorted(inner, key=lambda layer: -(effect[layer] or 0.0))[:count])


def rounds(tasks: Sequence[Any], candidates: int) -> list[Sequence[Any]]:
    """The validation tasks of each round; one round where there is little to choose from or to measure on."""
    if candidates <= FEWEST or len(tasks) < FEWEST_TASKS:
        return [tasks]
    size = math.ceil(len(tasks) / ROUNDS)
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def survivors(measured: Sequence[Candidate]) -> list[Candidate]:
    """The better half of a round's candidates, two at least, in their order; none where no text is sound."""
    sound = [c for c in measured if is_sound_text(c)]
    best = sorted(sound, key=lambda c: -separation(c))[: max(FEWEST, len(measured) // 2)]
    return [c for c in measured if c in best]


def pick(measured: Sequence[Candidate]) -> tuple[Candidate, str, bool]:
    """The best of everything that was measured, each with its `strength`; the rule that chose it in words; and
    whether its text is sound. The largest strength at which some candidate's text is sound is taken."""
    strengths = sorted({c["strength"] for c in measured}, reverse=True)
    for strength in strengths:
        sound = [c for c in measured if c["strength"] == strength and is_sound_text(c)]
        if not sound:
            continue
        best = choose(sound)
        rule = RULE if strength == 1 else RULE.replace("+1", f"+{strength:g}").replace("-1", f"-{strength:g}")
        if strength != strengths[0]:
            larger = _listed(s for s in strengths if s > strength)
            faults = _faults(c for c in measured if c["strength"] > strength)
            rule += f"; at the larger strengths tried ({larger}) every candidate {faults}"
        if not is_gentle(best):
            rule += "; no candidate kept the accuracy"
        return best, rule, True
    best = min(measured, key=lambda c: (c["loops"], -separation(c)))
    rule = (
        f"none passed: at {_listed(strengths)} every candidate {_faults(measured)}; "
        f"taken is the one with the fewest repeated 8-grams, {best['loops']:.0%} at {_listed([best['strength']])}"
    )
    return best, rule, False


def _listed(strengths: Iterable[float]) -> str:
    return ", ".join(f"\N{PLUS-MINUS SIGN}{s:g}" for s in strengths)


def _faults(candidates: Iterable[Candidate]) -> str:
    return " or ".join(sorted({found for c in candidates if (found := fault(c))}))


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The best of the measured candidates.

    Each has `fraction_difference` (up - down), `loops` (the larger of both signs), `accuracy_down`, and
    `accuracy_unsteered` on the same tasks; any of them may be None, not measured. Of equal candidates the first wins.
    """
    gentle = [c for c in candidates if is_gentle(c)]
    return max(gentle or candidates, key=separation)


def does_not_loop(candidate: Candidate) -> bool:
    """Whether loops stay within the limit above those of the unsteered model, at both signs."""
    return (candidate["loops"] or 0.0) - (candidate.get("loops_unsteered") or 0.0) <= LOOPS


def is_sound_text(candidate: Candidate) -> bool:
    """Whether a candidate writes text without a fault, at both signs."""
    return fault(candidate) is None


def fault(candidate: Candidate) -> str | None:
    """What is wrong with a candidate's text, beside that of the unsteered model on the same tasks."""
    accuracies = [candidate.get("accuracy_up"), candidate.get("accuracy_down")]
    worst = min((a for a in accuracies if a is not None), default=None)
    is_wrong = worst is not None and worst < NONSENSE_ACCURACY * (candidate.get("accuracy_unsteered") or 0.0)
    more_unclosed = (candidate.get("unclosed") or 0.0) - (candidate.get("unclosed_unsteered") or 0.0)
    if not does_not_loop(candidate):
        return "repeated itself more than the unsteered model"
    if is_wrong or more_unclosed > NONSENSE_UNCLOSED:
        return "made no sense"
    if (candidate.get("dropped") or 0) > MOST_DROPPED * candidate.get("chains", 0):
        return "left most chains without a label"
    return None


def is_gentle(candidate: Candidate) -> bool:
    """Whether a candidate keeps within the allowed side effects."""
    accuracy, before = candidate["accuracy_down"], candidate.get("accuracy_unsteered")
    cheap = accuracy is None or before is None or accuracy >= before - ACCURACY_COST
    return cheap and does_not_loop(candidate)


def separation(candidate: Candidate) -> float:
    """up - down: its error is the same for all candidates, where that of a ratio grows as `down` nears zero.

    Minus infinity where no task has a measured chain at both signs.
    """
    difference = candidate["fraction_difference"]
    return -math.inf if difference is None else float(difference)
