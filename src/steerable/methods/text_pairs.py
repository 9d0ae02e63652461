"""From pairs of texts to a direction: read both sides, take their difference where it separates best, and give it a
length that means the same everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from steerable import __version__
from steerable.chains.text_pairs import Messages, check_text, pairs_sha256
from steerable.engines.activations import capture, mean_norms
from steerable.engines.base import Continuation
from steerable.evals.calibration import BUDGET, calibrate, check_budget
from steerable.methods.contrasts import difference_of_means, pca
from steerable.methods.estimators import Estimator
from steerable.methods.layer_rules import separation_along
from steerable.models import loading as models
from steerable.models import sinks as attention_sinks
from steerable.models.taps import missing
from steerable.steering.direction import Direction
from steerable.steering.gates import Selector
from steerable.steering.site import Site
from steerable.steering.think import render_messages, think_tags_if_any
from steerable.steering.vocabulary import encode, text_list
from steerable.store.errors import SteerableWarning, UsageError
from steerable.store.text import counted

ESTIMATORS: dict[str, Estimator] = {"difference_of_means": difference_of_means, "pca": pca}
_FEWEST = 8  # pairs, of which two halves can be compared


def contrast(
    model: Any,
    tokenizer: Any,
    positive: Sequence[str | Messages],
    negative: Sequence[str | Messages],
    *,
    method: str | Estimator = "difference_of_means",
    layers: int | Sequence[int] | None = None,
    site: str = "resid_post",
    where: str | Selector = "all",
    reduce: Literal["mean", "last"] | int = "mean",
    budget: float | None = BUDGET,
    texts: Sequence[str | Continuation] | None = None,
    behaviour: str = "",
    progress: Callable[[str], None] | None = None,
) -> Direction:
    """A calibrated direction from pairs of texts that differ in what is to be steered.

    Each text is one activation at each layer, and `method` makes a direction of the two groups. Rimsky et al. 2023,
    "Steering Llama 2 via Contrastive Activation Addition" (arXiv 2312.06681); Zou et al. 2023 (arXiv 2310.01405).

    Args:
        model: a transformers model, or what wraps one.
        tokenizer: its tokenizer.
        positive: texts, or chats as lists of messages, which are rendered by the chat template, up to where the model
            begins to speak if the last message is the user's.
        negative: the pairs' other halves, as many.
        method: "difference_of_means", "pca", or a function of two groups of activations {site: [n, d]} that returns a
            `Direction`.
        layers: which; None: the band of a third of all layers, in the middle half, at which the two sides of held-out
            pairs lie furthest apart (d'; needs eight pairs, else the middle of the model is taken).
        site: the kind of site.
        where: which tokens of a text are read; a selector or its text.
        reduce: "mean" over these, a number n for the mean over the last n of them, or "last".
        budget: nats a token at strength 1, see `calibrate`; None: the vectors stay as the method made them.
        texts: what is calibrated on; None: the unsteered model's own replies to everyday questions.
        behaviour: what the direction does, for reports.
        progress: called with a sentence now and then.

    Returns:
        The direction, whose strength 1 is the dose at which the KL budget is reached. `stats` hold the number of pairs,
        the d' of each layer that was looked at ("separation"), and the calibration; `data_sha256` is that of the pairs
        as JSON lines.

    Raises:
        UsageError: a single text instead of a list, unequal numbers, an empty text, two sides that are the same, an
            unknown method, or layers that the model does not have. SteerableError: the budget is not reached. Warns
        (SteerableWarning) where held-out pairs are not told apart.

    Example:
        >>> happy, sad = ["What a lovely day!", "I am so glad!"], ["What an awful day.", "I am so sad."]
        >>> direction = st.contrast(model, tokenizer, happy, sad, layers=3, budget=0.05, behaviour="happy")
        >>> with st.steer(model, direction, strength=1):
        ...     output = model.generate(**inputs, max_new_tokens=8)
    """
    say = progress or (lambda text: None)
    estimator = _estimator(method)
    if budget is not None:
        check_budget(budget)
    if reduce == "none":
        raise UsageError("contrast needs one activation a text: reduce is 'mean', 'last' or a number of last tokens")
    sides = [
        rendered(tokenizer, side, name, "contrast") for name, side in (("positive", positive), ("negative", negative))
    ]
    if len(sides[0]) != len(sides[1]):
        raise UsageError(f"{len(sides[0])} positive and {len(sides[1])} negative texts make no pairs: give as many")
    if sides[0] == sides[1]:
        raise UsageError("the positive texts are the same as the negative ones" if sides[0] else "there are no pairs")
    chosen = _sites(model, site, layers)
    count = len(sides[0])
    say(f"reading {counted(count, 'pair')} at {counted(len(chosen), 'layer')}")
    with warnings.catch_warnings(action="ignore", category=SteerableWarning):  # left-out sinks are in the stats
        captured = capture(model, tokenizer, [*sides[0], *sides[1]], sites=chosen, where=where, reduce=reduce)
    groups = [{s: h[:count] for s, h in captured.items()}, {s: h[count:] for s, h in captured.items()}]
    scores: dict[Site, float] = {}
    if count >= _FEWEST:
        scores = separation(estimator, *groups)
    if layers is None:
        chosen = _band(chosen, scores, models.n_layers(model))
        groups = [{s: group[s] for s in chosen} for group in groups]
    if scores and sum(scores[s] for s in chosen) <= 0:
        warnings.warn(
            "held-out pairs are not told apart by a direction made from the others (d' is "
            f"{max(scores[s] for s in chosen):.2g} at best): give more pairs, or pairs that differ in one thing alone",
            SteerableWarning,
            stacklevel=2,
        )
    direction = _applied(estimator, *groups)
    if not any(vector.any() for vector in direction.vectors.values()):
        raise UsageError(
            "the direction is zero, as the two sides are the same on average: do some pairs have their sides exchanged?"
        )
    about = {
        "pairs": count,
        "reduce": reduce,
        "separation": {str(s): round(score, 4) for s, score in scores.items()},
        **attention_sinks.stats({s: about for s, about in captured.sinks.items() if s in chosen}),
    }
    rows = [encode(tokenizer, text) for side in sides for text in side]
    direction = replace(
        direction,
        model_id=models.model_id(model),
        model_revision=models.model_revision(model),
        behaviour=behaviour or direction.behaviour,
        method=direction.method or getattr(estimator, "__name__", "contrast"),
        norms={} if budget is not None else mean_norms(model, rows, chosen),
        stats={**direction.stats, **about},
        data_sha256=pairs_sha256(positive, negative),
        created_by=f"steerable {__version__} contrast",
    )
    if budget is None:
        return direction
    return calibrate(model, tokenizer, direction, texts, budget=budget, progress=progress)


def separation(
    estimator: Estimator, positive: Mapping[Site, Tensor], negative: Mapping[Site, Tensor]
) -> dict[Site, float]:
    """How far apart the two sides of pairs lie along directions that were made without them: d' at each site, the mean
    of two halves.

    The pairs of one half are projected on the estimator's direction of the other half (`layer_rules.separation_along`).
    """
    scores = dict.fromkeys(positive, 0.0)
    for half in range(2):
        fit, held = slice(half, None, 2), slice(1 - half, None, 2)
        direction = _applied(
            estimator, {s: h[fit] for s, h in positive.items()}, {s: h[fit] for s, h in negative.items()}
        )
        sides = [{s: h[held] for s, h in group.items()} for group in (positive, negative)]
        for site, score in separation_along(direction, *sides, sinks="keep").items():
            scores[site] += score / 2
    return scores


def _applied(estimator: Estimator, positive: dict[Site, Tensor], negative: dict[Site, Tensor]) -> Direction:
    direction = estimator(positive, negative)
    if not isinstance(direction, Direction) or set(direction.vectors) != set(positive):
        raise UsageError("the method must return a Direction with vectors at the sites that it was given")
    return direction


def _estimator(method: str | Estimator) -> Estimator:
    if callable(method):
        return method
    if method not in ESTIMATORS:
        raise UsageError(f"unknown method {method!r}: expected {', '.join(ESTIMATORS)} or a function")
    return ESTIMATORS[method]


def rendered(tokenizer: Any, side: Sequence[str | Messages], name: str, function: str) -> list[str]:
    """The texts of one side, chats as `said`. name, function: what errors call the side, and who reads it."""
    return ["".join(said(tokenizer, item)) for item in checked(side, name, function)]


def said(tokenizer: Any, item: str | Messages) -> tuple[str, str]:
    """A chat through the chat template, up to where the assistant's last message begins, and this message; the other
    chats and texts as they are, and nothing. Raises UsageError."""
    if isinstance(item, str):
        return item, ""
    text = render_messages(tokenizer, item)
    answer = item[-1]["content"].strip() if item[-1]["role"] == "assistant" else ""
    start = text.rfind(answer) if answer else -1
    if start < 0 and answer and (tags := think_tags_if_any(tokenizer)) is not None:
        _, closing, shown = answer.rpartition(tags.texts[1])  # of R1, whose template leaves out what was thought
        if closing and shown.strip():
            return said(tokenizer, [*item[:-1], {**item[-1], "content": shown}])
    return (text[:start], text[start:]) if start >= 0 else (text, "")


def checked(side: Sequence[str | Messages], name: str, function: str) -> list[str | Messages]:
    """The texts and chats of one side, as `rendered` takes them. Raises UsageError for what is neither."""
    items = text_list(side, function)
    for number, item in enumerate(items):
        check_text(item, f"the {name} text {number}")
    return items


def _sites(model: Any, kind: str, layers: int | Sequence[int] | None) -> list[Site]:
    """The sites that are read: at the layers given, else in the middle half of the model, where it has them."""
    if layers is not None:
        numbers = layers if isinstance(layers, Iterable) else [layers]
        if not (chosen := sorted({Site(kind, layer) for layer in numbers})):
            raise UsageError("no layers are given: expected one at least, or None for those that suit the pairs")
        return chosen
    total = models.n_layers(model)
    sites = [Site(kind, layer) for layer in range(total // 4, max(total * 3 // 4, total // 4 + 1))]
    return [s for s in sites if missing(model, s) is None] or sites[:1]


def _band(sites: list[Site], scores: Mapping[Site, float], total: int) -> list[Site]:
    """The run of a third of all layers with the highest mean score; without scores the middle one."""
    width = min(len(sites), max(1, total // 3))
    bands = [sites[i : i + width] for i in range(len(sites) - width + 1)]
    if not scores:
        return bands[len(bands) // 2]
    return max(bands, key=lambda band: sum(scores[s] for s in band))
