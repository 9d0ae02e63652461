"""One meaning of strength: the relative dose at which a steered model has moved by a stated KL divergence.

A vector's length says little: the same factor is nothing in one model and babble in another. What a reader notices is
how far the next-token distributions have moved, so that is what strength 1 fixes, in the direction of either sign that
moves the model further. n layers share the budget, at one relative dose ||s v|| / ||h||.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from steerable.chains.everyday import QUESTIONS
from steerable.chains.generation import prompt_ids
from steerable.chains.records import dump
from steerable.engines.activations import mean_norms
from steerable.engines.base import Continuation, Request
from steerable.engines.transformers import Handle, TransformersEngine, dtype_of, is_narrow, score_tokens
from steerable.evals.likelihood import kl
from steerable.models.loading import unwrap_to_run
from steerable.steering.direction import Direction
from steerable.steering.maps import Shift, parse_map
from steerable.steering.vocabulary import encode, text_list
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

#: Nats a token. Of twelve everyday contrasts on SmolLM2-135M-Instruct (`benchmarks/contrasts.py`), +-1 then is plainly
#: another manner and still fluent; at 0.3 casual is not told from controls any more.
BUDGET = 0.4
TOLERANCE = 0.05  # of the budget: less than it differs from one set of texts to another
_ROUNDING = 0.1  # budgets below it are not much more than the rounding of a 16-bit model
_REPLIES, _LENGTH = 8, 40
_SWEEP, _STEP, _SMALLEST, _LARGEST = (0.1, 0.3, 0.9), 3.0, 1e-4, 100.0  # doses, of all sites together


def check_budget(budget: Any) -> None:
    """Raises UsageError for what is no positive number of nats a token."""
    if not (isinstance(budget, int | float) and 0 < budget < math.inf):
        raise UsageError(f"the budget is {budget!r}: expected a positive number of nats a token")


class BudgetNotReached(SteerableError):
    """No dose moves the model by the budget, or the smallest dose moves it further."""


def calibrate(
    model: Any,
    tokenizer: Any,
    direction: Direction,
    texts: Sequence[str | Continuation] | None = None,
    *,
    budget: float = BUDGET,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Direction:
    """Give a direction the length at which strength 1 moves the model by a KL divergence of `budget` nats a token.

    All sites get the same relative dose ||v|| / ||h||, where ||h|| is the mean over the texts' ordinary tokens
    (attention sinks left out): the smallest that `search` finds, with the direction's own gate and schedule. A control
    with the same norms (`Direction.random_like`) has the same dose.

    Args:
        model: a transformers model, or what wraps one.
        tokenizer: its tokenizer.
        direction: what is added to activations; its strength is taken as 1.
        texts: texts that the direction was not made from, or `Continuation`s, of which the prompt is not counted; None:
            the unsteered model's own replies to everyday questions, which is what will be steered: a model is surer of
            them than of foreign texts. They are the same for all directions of a model.
        budget: nats a token, more than 0.
        seed: of the replies.
        progress: called with a sentence now and then.

    Returns:
        The direction with other lengths, strength 1 and unit "calibrated". Its `norms` are those that the dose refers
        to, and its `stats["calibration"]` is what `search` returns.

    Raises:
        UsageError: a budget that is not positive, no texts, or a direction whose map is not a shift.
        BudgetNotReached: no dose moves the model so far (the gate never opens, say), or the smallest dose moves it
            further (rounding of a 16-bit model). The message says how far it was moved.

    Example:
        >>> happy = st.calibrate(model, tokenizer, direction, ["2 + 3 = 5, so the answer is 5."], budget=0.1)
        >>> about = happy.stats["calibration"]
        >>> happy.unit, round(max(about["kl"], about["kl_reversed"]), 1)
        ('calibrated', 0.1)
    """
    check_budget(budget)
    if not isinstance(parse_map(direction.map), Shift):
        raise UsageError(f"only what is added has a dose, but the map of this direction is {direction.map}")
    say = progress or (lambda text: None)
    if texts is None:
        say(f"the unsteered model replies to {_REPLIES} everyday questions, to be calibrated on")
        held_out = replies(model, tokenizer, seed=seed)
    else:
        held_out = [_continuation(tokenizer, text) for text in text_list(texts, "calibrate")]
    held_out = [text for text in held_out if len(text.prompt_ids) + len(text.ids) > 1]
    if not held_out:
        raise UsageError("calibration needs a text of two tokens or more")
    if budget < _ROUNDING and is_narrow(dtype := dtype_of(model)):
        warnings.warn(
            f"a {str(dtype).removeprefix('torch.')} model's rounding is part of the KL, and matters to a budget of "
            f"{budget:g}: load it with dtype='float32', or take {_ROUNDING} or more",
            SteerableWarning,
            stacklevel=2,
        )
    norms = mean_norms(model, [[*text.prompt_ids, *text.ids] for text in held_out], list(direction.vectors))
    unit = replace(direction.rescaled_to(norms), strength=1.0, norms=norms)
    about = search(model, tokenizer, unit, held_out, budget=budget, progress=say)
    return replace(unit.scaled(about["dose"]), unit="calibrated", stats={**direction.stats, "calibration": about})


def search(
    model: Any,
    tokenizer: Any,
    unit: Direction,
    texts: Sequence[Continuation],
    *,
    budget: float,
    guess: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The strength of a direction at which the model has moved by `budget`, on a grid and then by the secant of log KL
    over log strength.

    What is measured is the mean of KL(steered || unsteered) over the texts' tokens, prompts left out, at both signs:
    the larger of the two is the budget, to 5 %. Both models read the same tokens.

    Args:
        model: a transformers model, or what wraps one.
        tokenizer: its tokenizer.
        unit: a direction whose vectors are as long as the activations, so that strength is relative dose.
        texts: of two tokens or more.
        budget: nats a token.
        guess: a dose that may be near; None: the grid is wide.
        progress: called with a sentence now and then.

    Returns:
        budget, dose, kl and kl_reversed at that dose and its opposite, the number of tokens, and texts_sha256.

    Raises:
        BudgetNotReached: no dose moves the model so far, or the smallest dose moves it further.

    Example:
        >>> search(model, tokenizer, direction.rescaled_to(direction.norms), texts, budget=0.05)["dose"]
        0.42
    """
    rows = [[*text.prompt_ids, *text.ids] for text in texts]
    starts = [len(text.prompt_ids) for text in texts]
    both: dict[float, list[float]] = {}

    def measure(doses: Sequence[float]) -> list[float]:
        moved = _divergences(model, tokenizer, rows, starts, unit, [sign * dose for dose in doses for sign in (1, -1)])
        both.update({dose: moved[2 * k : 2 * k + 2] for k, dose in enumerate(doses)})
        if progress is not None:
            progress(", ".join(f"KL {max(both[dose]):.3g} at dose {dose:.3g}" for dose in doses))
        return [max(both[dose]) for dose in doses]

    dose = _dose(measure, budget, len(unit.vectors), guess)[0]
    written = b"".join(dump({"prompt_ids": list(t.prompt_ids), "ids": list(t.ids)}) + b"\n" for t in texts)
    return {
        "budget": budget,
        "kl": both[dose][0],
        "kl_reversed": both[dose][1],
        "dose": dose,
        "tokens": sum(len(row) - max(1, start) for row, start in zip(rows, starts, strict=True)),
        "texts_sha256": hashlib.sha256(written).hexdigest(),
    }


def replies(
    model: Any, tokenizer: Any, *, questions: int = _REPLIES, max_new_tokens: int = _LENGTH, seed: int = 0
) -> list[Continuation]:
    """What the unsteered model says to everyday questions, in its chat template if it has one, decoded as its
    `generation_config` says."""
    chats = bool(getattr(tokenizer, "chat_template", None))
    prompts = [prompt_ids(tokenizer, q) if chats else encode(tokenizer, q) for q in QUESTIONS[:questions]]
    requests = [Request(ids, seed=seed + n) for n, ids in enumerate(prompts)]
    written = TransformersEngine(model, tokenizer).generate(requests, max_new_tokens=max_new_tokens)
    return [Continuation(ids, completion.ids) for ids, completion in zip(prompts, written, strict=True)]


def _continuation(tokenizer: Any, text: str | Continuation) -> Continuation:
    return text if isinstance(text, Continuation) else Continuation([], encode(tokenizer, text))


def _divergences(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    unit: Direction,
    doses: Sequence[float],
) -> list[float]:
    """Mean KL(steered || unsteered) in nats a token at each dose, from one sweep; infinite where it is no number."""

    def compare(logs: list[Tensor], came: Tensor) -> Tensor:
        return torch.stack([kl([steered, logs[0]], came) for steered in logs[1:]], 1)

    model = unwrap_to_run(model)
    passes = [[number] * len(rows) for number in range(-1, len(doses))]
    with Handle(model, [unit.steering(dose) for dose in doses], tokenizer, track=False) as handle:
        scores = score_tokens(model, rows, starts, compare, handle=handle, passes=passes)
    means = torch.cat(scores).mean(0)
    return [mean if math.isfinite(mean) else math.inf for mean in means.tolist()]


def _dose(
    measure: Callable[[Sequence[float]], list[float]], budget: float, sites: int, guess: float | None = None
) -> tuple[float, float]:
    """The smallest dose found at which the KL is the budget, and that KL. What is added at n sites adds up, so the grid
    is one of doses times n, unless there is a guess."""
    curve: dict[float, float] = {}
    doses = [total / sites for total in _SWEEP] if guess is None else [guess / 1.2, guess * 1.2]
    for step in count(1):
        curve.update(zip(doses, measure(doses), strict=True))
        above = min((dose for dose, value in curve.items() if value >= budget), default=None)
        below = max((dose for dose in curve if above is None or dose < above), default=None)
        if above is None and below is not None:
            if below * sites > _LARGEST:
                raise BudgetNotReached(
                    f"the budget of {budget:g} nats a token is not reached: at a relative dose of {below:.3g} the KL "
                    f"is {curve[below]:.3g}; take a smaller budget, or a gate that opens on these texts"
                )
            doses = [below * _STEP, below * _STEP**2]
        elif below is None and above is not None:
            if above * sites < _SMALLEST:
                raise BudgetNotReached(
                    f"a relative dose of {above:.3g} already moves the model by {curve[above]:.3g} nats a token, more "
                    f"than the budget of {budget:g}: take a larger budget, or load the model with dtype='float32'"
                )
            doses = [above / _STEP**2, above / _STEP]
        else:
            assert above is not None and below is not None
            best = min((above, below), key=lambda dose: abs(curve[dose] - budget))
            if abs(curve[best] - budget) <= TOLERANCE * budget or above / below < 1 + 1e-4:
                return best, curve[best]
            low, high = max(curve[below], 1e-12), curve[above]
            # A secant alone crawls where the curve bends; every third step halves.
            share = math.log(budget / low) / math.log(high / low) if step % 3 and math.isfinite(high) else 0.5
            doses = [below * (above / below) ** min(max(share, 0.02), 0.98)]
    raise AssertionError("the search ends by itself")
