"""Is an effect that of the vector, or what any vector of its size does? Effects beside controls, over prompts and
strengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from scipy.special import stdtrit
from torch import Tensor

from steerable.engines.transformers import Handle, score_tokens
from steerable.evals.dose_response import fit_power
from steerable.evals.intervals import ByTask, student_interval
from steerable.models.loading import unwrap_to_run
from steerable.steering.direction import Direction
from steerable.steering.spec import Steering
from steerable.store.errors import UsageError

Effect = Callable[[Steering], ByTask]
"""What a steering changes, by task (or pair): a difference to the unsteered model, more is more of what is steered."""


def pair_preferences(
    model: Any,
    tokenizer: Any,
    positive: Sequence[Sequence[int]],
    negative: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]] | None = None,
) -> Effect:
    """The effect on which text of a pair a model prefers, in nats a token:

        m(s) = mean log p(a+ | prompt) - mean log p(a- | prompt),   effect(s) = m(s) - m(0)

    over the tokens behind what the two texts have in common. The answer-token margins of Rimsky et al. 2023 (arXiv
    2312.06681), for whole texts: no text has to be generated or judged.

    Args:
        positive, negative: token ids of the pairs' texts.
        prompts: what stands before both texts of each pair.

    Returns:
        An effect; its tasks are the pairs' numbers.

    Example:
        >>> pair_preferences(model, tokenizer, happy, sad)(direction.steering(1.0))
        {'0': 0.31, '1': 0.24}
    """
    if len(positive) != len(negative) or not positive:
        raise UsageError("preferences need pairs: as many positive texts as negative ones, one at least")
    rows, starts = [], []
    for i, (a, b) in enumerate(zip(positive, negative, strict=True)):
        before = list(prompts[i]) if prompts else []
        same = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        rows += [[*before, *a], [*before, *b]]
        starts += [len(before) + min(same, len(a) - 1, len(b) - 1)] * 2
    model = unwrap_to_run(model)
    base: list[float] = []

    def means(steering: Steering) -> list[float]:
        with Handle(model, [steering], tokenizer, track=False) as handle:
            passes = [[0 if steering else -1] * len(rows)]
            scores: list[Tensor] = score_tokens(model, rows, starts, handle=handle, passes=passes)
        per_text = [float(score.mean()) if len(score) else 0.0 for score in scores]
        return [a - b for a, b in zip(per_text[::2], per_text[1::2], strict=True)]

    def effect(steering: Steering) -> dict[str, float]:
        if not base:
            base.extend(means(()))
        return {str(i): after - before for i, (after, before) in enumerate(zip(means(steering), base, strict=True))}

    return effect


def effect_beside_controls(
    effect: Effect,
    direction: Direction,
    shuffled: Sequence[Direction] = (),
    *,
    strength: float = 1.0,
    controls: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """A direction's effect beside that of random directions of equal norm, and of label-shuffled ones.

    Args:
        effect: what is measured.
        shuffled: directions made of the same data with their labels shuffled; they get the direction's norms.
        strength: how strongly all of them steer.
        controls: how many random directions.

    Returns:
        `effect`: [mean, low, high] by Student's t, over `tasks` tasks; `random` and `shuffled`: the same of the mean
        over these controls, each added and subtracted, as they have no sign; `above_random`, `above_shuffled`: the
        difference, paired by task; `largest`: the largest mean of any control at either sign; `reach`: what one more
        control stays below in 39 of 40 cases, by Student's t: of few controls the largest says little. None where there
        are no shuffled ones.

    Example:
        >>> effect_beside_controls(effect, direction)["above_random"]
        [0.28, 0.19, 0.37]
    """
    own = effect(direction.steering(strength))
    result: dict[str, Any] = {"effect": student_interval(own), "tasks": len(own)}
    largest: list[float] = []
    halves: list[float] = []  # a control has no sign: half of what its two signs differ by
    for name, directions in control_directions(direction, shuffled, controls, seed).items():
        ways = [effect(one.steering(sign * strength)) for one in directions for sign in (1, -1)]
        tasks = sorted(set.intersection(*map(set, ways))) if ways else []
        mean = {task: sum(way[task] for way in ways) / len(ways) for task in tasks}
        largest += [sum(way.values()) / len(way) for way in ways if way]
        means = [sum(way.values()) / max(1, len(way)) for way in ways]
        halves += [(up - down) / 2 for up, down in zip(means[::2], means[1::2], strict=True)]
        above = {task: own[task] - mean[task] for task in tasks if task in own}
        result |= {name: student_interval(mean), f"above_{name}": student_interval(above)}
    reach = float(stdtrit(len(halves), 0.975)) * (sum(x * x for x in halves) / len(halves)) ** 0.5 if halves else None
    return result | {"largest": max(largest, default=None), "reach": reach}


def control_directions(
    direction: Direction, shuffled: Sequence[Direction], controls: int, seed: int = 0
) -> dict[str, list[Direction]]:
    """The controls of a direction: random ones of its norms, and label-shuffled ones that are given them."""
    norms = {site: float(v.double().norm()) for site, v in direction.vectors.items()}
    return {
        "random": [direction.random_like(seed + k) for k in range(controls)],
        "shuffled": [replace(direction, vectors=one.rescaled_to(norms).vectors) for one in shuffled],
    }


def linearity(effect: Effect, direction: Direction, strengths: Sequence[float], seed: int = 0) -> dict[str, Any] | None:
    """Whether the effect is proportional to the strength, at both signs: a line through 0, and its R2.

    The linear regime of arXiv 2401.16332; outside of it a strength says little about another one.

    Returns:
        As `fit_power` with power 1 of signed strengths, and `effects`: {strength: [mean, low, high]}.

    Example:
        >>> linearity(effect, direction, [-1, -0.5, 0.5, 1])["r2"]
        0.98
    """
    effects = {s: effect(direction.steering(s)) for s in strengths}
    turned = [{t: v if s > 0 else -v for t, v in effects[s].items()} for s in strengths]
    law = fit_power(strengths, turned, 1, seed)
    return None if law is None else law | {"effects": {f"{s:g}": student_interval(effects[s]) for s in strengths}}


def sign_stability(effects: Mapping[str, ByTask]) -> dict[str, Any]:
    """Whether the sign of an effect holds over prompts and over paraphrases of what stands before them.

    Stress tests of steering find effects that turn round with the context ("When the coffee feature activates on
    coffins", arXiv 2601.03047); and an effect that is smaller than the spread over formats says nothing (arXiv
    2503.08688).

    Args:
        effects: by paraphrase, the effect by task.

    Returns:
        `paraphrases`: {name: [mean, low, high]}; `right`: of all tasks that moved, in all paraphrases, the share that
        moved the right way; `spread`: the standard deviation of the paraphrases' means, as a share of their mean.

    Example:
        >>> sign_stability({"plain": {"a": 1.0, "b": 2.0}, "loud": {"a": 1.0, "b": -1.0}})["right"]
        0.75
    """
    intervals = {name: student_interval(some) for name, some in effects.items()}
    means = [interval[0] for interval in intervals.values() if interval is not None]
    moved = [value for some in effects.values() for value in some.values() if value]
    if not moved:
        raise UsageError("the sign of an effect needs an effect: expected one task at least that moves")
    mean = sum(means) / len(means)
    deviation = (sum((m - mean) ** 2 for m in means) / max(1, len(means) - 1)) ** 0.5
    return {
        "paraphrases": intervals,
        "right": sum(value > 0 for value in moved) / len(moved),
        "spread": deviation / abs(mean) if mean else None,
    }
