"""Recipes with a probe or a condition: RAPTOR, CAST, and the gate of Guiding Giants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from steerable.chains.text_pairs import Messages
from steerable.engines.transformers import steer
from steerable.methods.contrasts import pca
from steerable.methods.layer_rules import accurate_layers
from steerable.methods.probes import probability_threshold, ridge_logistic
from steerable.methods.recipes.reading import NEW, Rows, at_depth, origin, read_texts, sites_of
from steerable.steering.direction import Direction
from steerable.steering.gates import Gate, latched, parse_gate, probe, when
from steerable.steering.maps import Clip
from steerable.steering.site import Site
from steerable.steering.spec import Program
from steerable.store.errors import UsageError

Texts = Sequence[str | Messages]
_FEWEST = 15  # of each kind, so that a fifth of them, three, are left to test the probe


def raptor(
    model: Any,
    tokenizer: Any,
    positive: Texts,
    negative: Texts,
    *,
    probability: float = 0.99,
    above: float = 0.9,
) -> Program:
    """h' = h + max(tau - <h, v>, 0) v, with tau the coordinate at which a probe is sure enough: (logit p - b) / ||w||.

    RAPTOR, arXiv 2602.00158: at each layer a ridge logistic probe w, b of validated strength on the last tokens
    (`probes.ridge_logistic`); at the layers where it is right on more than 0.9 of its test rows, new tokens that it
    gives less than p are moved by the least step to where it gives p. For p below one half the step goes down. The
    published script steers by the unit vector with bias 0, which is another probability: it is left out.

    Data: texts of two kinds, 15 of each at least.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        positive: texts, or chats, that show the concept.
        negative: texts that do not.
        probability: p.
        above: the accuracy that a layer's probe must exceed.

    Returns:
        A Program with a floor (or a ceiling) for each of these layers.

    Raises:
        UsageError: too few texts, no layer with such a probe, scikit-learn missing.

    Example:
        >>> happy, sad = [f"I am glad of {i}." for i in range(20)], [f"I am sad of {i}." for i in range(20)]
        >>> st.recipes.raptor(model, tokenizer, happy, sad)[0].gate
        Gate(...)
    """
    rows = read_texts(model, tokenizer, [positive, negative], sites_of(model, ["resid_post"]), "last")
    _refuse_few(rows)
    direction = ridge_logistic(*rows, method="RAPTOR", **origin(model))
    bound = Clip.floor if probability >= 0.5 else Clip.ceiling
    limits = probability_threshold(direction, probability)
    chosen = direction.only(accurate_layers(direction, above))
    steered = (chosen.only([s.layer]).steering(where=NEW, map=bound(limits[s])) for s in chosen.vectors)
    return sum(steered, Program())


def cast(
    model: Any,
    tokenizer: Any,
    positive: Texts,
    negative: Texts,
    *,
    direction: Direction,
    strength: float | None = None,
    each_token: bool = False,
) -> Direction:
    """h' = h + alpha u where <h, c> > theta: a direction that acts on prompts of one kind alone.

    Conditional activation steering, CAST (arXiv 2409.05907): the condition vector c is the first principal component of
    pairs of prompts that fulfil and that do not fulfil the condition; its layer, at or before that of the direction,
    and the threshold theta are those that tell these prompts apart with the best F1. Rules of several conditions are
    gates: `latched(gate_a & ~gate_b)`.

    The paper asks once for each prompt, by the cosine with its activation averaged over its tokens, and steers the
    whole answer. Here the last token of the prompt is asked, by its projection, and decides for it and all of the
    answer. `each_token` asks at every token instead, by a condition that is averaged over the tokens of the prompts, so
    that the gate also opens where the text comes to the matter later.

    Data: as many prompts that fulfil the condition as others, two of each or more, and a direction of any recipe.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        positive: prompts, or chats, on which to steer.
        negative: prompts on which not to.
        direction: what is added, with its own map.
        strength: None: the direction's own.
        each_token: ask at each token, not once for a prompt.

    Returns:
        The direction with the gate; `stats["condition"]` holds its site, threshold and F1.

    Raises:
        UsageError: unequal numbers of prompts, a single pair, a direction of another model.

    Example:
        >>> u = Direction({Site("resid_post", 4): torch.ones(192)})
        >>> sums, words = ["What is 2 + 3?", "Add 4 and 5."], ["Who are you?", "Tell me a tale."]
        >>> st.recipes.cast(model, tokenizer, sums, words, direction=u).stats["condition"]["f1"]
        1.0
    """
    _refuse_other(model, tokenizer, direction)
    layers = range(min(site.layer for site in direction.vectors) + 1)
    sites = [s for s in sites_of(model, ["resid_post"], layers) if s <= min(direction.vectors)]
    reduce: Literal["mean", "last"] = "mean" if each_token else "last"
    rows = read_texts(model, tokenizer, [positive, negative], sites or [min(direction.vectors)], reduce)
    condition = pca(*rows)
    best = {s: _best_f1(*(group[s].double() @ v.double() for group in rows)) for s, v in condition.vectors.items()}
    site = max(best, key=lambda s: best[s][0])
    f1, threshold = best[site]
    gate = when({site: condition.vectors[site]}, ">", threshold, "condition")
    gate = gate if each_token else latched(gate)
    return _conditional(direction, gate, strength, {"site": str(site), "threshold": threshold, "f1": f1})


def guiding_giants(
    model: Any,
    tokenizer: Any,
    positive: Texts,
    negative: Texts,
    *,
    direction: Direction,
    layer: int | None = None,
    probability: float = 0.5,
    strength: float | None = None,
) -> Direction:
    """h' = h + alpha u on prompts to which a probe gives more than one half: a controller's decision in closed form.

    After weighted activation steering, "Guiding Giants" (arXiv 2505.20309), whose controller is a small network on the
    last token of a prompt that says how strongly to add a direction (there alpha = 4 times a unit vector), trained to
    tell two kinds of prompts apart. Its weights of layers are held at one half by its own loss and so learn nothing; it
    reads the last layers, which come too late; and its strength goes negative on the other prompts. Here a ridge
    logistic probe takes its place, on the last tokens at the first layer of the direction or before. As there, it is
    asked once for each prompt, at its last token, and decides for it and all of the answer.

    Data: prompts of two kinds, 15 of each at least, and a direction of any recipe.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        positive: prompts, or chats, on which to steer.
        negative: prompts on which not to.
        direction: what is added, with its own map.
        layer: where the probe reads `resid_post`; None: at the direction's first site.
        probability: what the probe must exceed.
        strength: None: the direction's own.

    Returns:
        The direction with the gate; `stats["condition"]` holds its site, threshold and accuracy.

    Raises:
        UsageError: too few prompts, a layer behind the direction, a direction of another model, scikit-learn missing.

    Example:
        >>> u = Direction({Site("resid_post", 4): torch.ones(192)})
        >>> sums, words = [f"What is {i} + 3?" for i in range(20)], [f"Who is number {i}?" for i in range(20)]
        >>> str(st.recipes.guiding_giants(model, tokenizer, sums, words, direction=u).gate)
        'latched(probe(condition > 0.5))'
    """
    _refuse_other(model, tokenizer, direction)
    site = min(direction.vectors) if layer is None else Site("resid_post", at_depth(model, 0, layer))
    rows = read_texts(model, tokenizer, [positive, negative], [site], "last")
    _refuse_few(rows)
    weights = ridge_logistic(*rows)
    gate = latched(probe(weights, ">", probability, weights.stats["bias"][str(site)], "condition"))
    gate.at(min(direction.vectors))
    accuracy = weights.stats["accuracy"][str(site)]
    return _conditional(direction, gate, strength, {"site": str(site), "threshold": probability, "accuracy": accuracy})


def _refuse_other(model: Any, tokenizer: Any, direction: Direction) -> None:
    """Raises UsageError for a direction that this model cannot be steered by."""
    with steer(model, direction, tokenizer=tokenizer, track=False):
        pass


def _refuse_few(rows: Sequence[Rows]) -> None:
    """Raises UsageError for kinds of which too few are left to test a probe."""
    if (fewest := min(len(h) for group in rows for h in group.values())) < _FEWEST:
        raise UsageError(f"a probe needs {_FEWEST} texts of each kind at least, and one kind has {fewest}")


def _conditional(direction: Direction, gate: Gate, strength: float | None, condition: dict[str, Any]) -> Direction:
    """The direction that acts where the gate is open, too."""
    stats = {**direction.stats, "condition": condition}
    given = direction.strength if strength is None else strength
    both = gate if str(direction.gate) == "all" else parse_gate(direction.gate) & gate
    return replace(direction, gate=both, strength=given, stats=stats)


def _best_f1(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """The best F1 of "more than a threshold means positive", and that threshold, halfway between two values."""
    values = torch.cat([positive, negative]).unique()
    middles = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    right = (positive[None] > middles[:, None]).sum(1).double()
    wrong = (negative[None] > middles[:, None]).sum(1).double()
    scores = 2 * right / (right + wrong + len(positive))
    return float(scores.max()), float(middles[scores.argmax()])
