"""Recipes of who is speaking: persona vectors, and the Assistant Axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from steerable.chains.text_pairs import Messages
from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.engines.base import Request
from steerable.engines.hf.engine import TransformersEngine
from steerable.methods.grouped_means import macro_difference
from steerable.methods.personas import Chat, persona_pairs
from steerable.methods.purification import orthogonalised
from steerable.methods.recipes.reading import at_depth, band, origin, read_whole, spoken, units
from steerable.methods.weighted_means import paired_difference
from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.steering.maps import Clip
from steerable.steering.spec import Program
from steerable.steering.think import render_messages
from steerable.steering.vocabulary import encode
from steerable.store.errors import UsageError


def persona(
    model: Any,
    tokenizer: Any,
    persona: str,
    opposite: str,
    *,
    prompts: int = 40,
    max_new_tokens: int = 60,
    keep: Callable[[str, str], bool] | None = None,
    against: Sequence[Direction] = (),
    layer: int | None = None,
    seed: int = 0,
    strength: float = 2.0,
) -> Direction:
    """u = mean over replies of a person of one kind - mean over those of the opposite; h' = h + alpha u at every token.

    Persona vectors (arXiv 2507.21509): everyday questions are asked of both kinds of person, who are described in the
    system message; the model's own replies are read, averaged over their tokens. There a language model judges every
    reply, and a pair counts only where one shows the trait, the other does not, and both make sense: that is `keep`.
    Layer 20 of 28, counted from the embeddings' output, so block 19; alpha = 2.

    Purified: `against` names directions of other traits, of which the vector is made free (`orthogonalised`), after
    "Personality as a Probe" (arXiv 2509.04794), whose own mixture is `purification.contrast_mixed`.

    Data: none but the two words.

    Args:
        model: the model.
        tokenizer: its tokenizer, with a chat template.
        persona: the kind of person, e.g. "happy".
        opposite: the other kind, e.g. "sad".
        prompts: how many questions.
        max_new_tokens: longest reply.
        keep: whether the replies (of the persona, of the opposite) to one question count; None: all.
        against: directions at `resid_post` of the layer, of what is to be left alone.
        layer: None: the paper's depth, 19/28.
        seed: of the replies.
        strength: alpha.

    Returns:
        A Direction at `resid_post` of one layer, in the model's own units; `stats["pairs"]` counts the questions.

    Raises:
        UsageError: one kind of person, no pair of replies that counts, no such layer.

    Example:
        >>> st.recipes.persona(model, tokenizer, "happy", "sad", prompts=2, max_new_tokens=4).layers
        [4]
    """
    layer = at_depth(model, 19 / 28, layer)
    for other in against:
        models.warn_of_other(model, other.model_id, other.model_revision)
    asked = persona_pairs(tokenizer, persona, opposite, prompts)
    sides = [_replies(model, tokenizer, side, max_new_tokens, seed) for side in asked]
    texts = [[tokenizer.decode(c.ids[c.spans[0].start :]) if c.spans else "" for c in side] for side in sides]
    pairs = [
        (a, b)
        for a, b, replies in zip(*sides, zip(*texts, strict=True), strict=True)
        if a.spans and b.spans and (keep is None or keep(*replies))
    ]
    if not pairs:
        raise UsageError(f"no pair of {prompts} replies counts: give more prompts, or another judge")
    rows = [read_whole(model, side, "resid_post", "span") for side in zip(*pairs, strict=True)]
    direction = paired_difference(*rows, **origin(model, persona)).only([layer])
    return replace(orthogonalised(direction, against), method="persona vector", strength=strength)


def assistant_axis(
    model: Any,
    tokenizer: Any,
    default: Sequence[str | Messages],
    roles: Mapping[str, Sequence[str | Messages]],
    *,
    bound: Literal["floor", "ceiling"] = "floor",
    quantile: float | None = None,
    layers: Sequence[int] | None = None,
) -> Program:
    """h' = h - v min(<h, v> - tau, 0), v the unit vector of (mean of the default persona - mean of the roles' means).

    The Assistant Axis (arXiv 2601.10387) and its activation capping: what lies along the axis is kept above tau, the 25
    % quantile of the projections of the replies that were read, each averaged over its tokens, at the blocks 46 to 53
    of 64, at all tokens. Each role counts the same. bound="ceiling" keeps it below tau instead, there the 75 %
    quantile; the published code has a ceiling, which with vectors -v and thresholds -tau is the floor of the paper.

    Data: replies of the assistant as it is and in many roles (275 there, judged to be played), plain or as chats.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        default: replies of the default persona: texts, or chats that end with the assistant's message, which is read.
        roles: replies of each role.
        bound: "floor" or "ceiling".
        quantile: of the projections, from 0 to 1; None: 0.25 for a floor, 0.75 for a ceiling.
        layers: None: the paper's depths, 46/64 to 53/64.

    Returns:
        A Program with a floor (or a ceiling) for each layer.

    Raises:
        UsageError: no roles, a group without a text, another bound, no such layer.

    Example:
        >>> roles = {"pirate": ["Arr, what do you want?"], "ghost": ["Boo! I am dead."]}
        >>> axis = st.recipes.assistant_axis(model, tokenizer, ["How can I help you?"], roles)
        >>> [i.site.layer for i in axis]
        [4, 5]
    """
    if quantile is None:
        quantile = 0.75 if bound == "ceiling" else 0.25
    if bound not in ("floor", "ceiling") or not 0 <= quantile <= 1:
        raise UsageError("the bound is 'floor' or 'ceiling', and its quantile a number from 0 to 1")
    groups = {"default": default, **{f"role {name}": texts for name, texts in roles.items()}}
    if len(groups) < 2 or not all(groups.values()):
        raise UsageError("the axis needs replies of the default persona and of one role at least")
    texts = [text for some in groups.values() for text in some]
    chains = [spoken(tokenizer, text, number) for number, text in enumerate(texts)]
    rows = read_whole(model, chains, "resid_post", "span")
    parts = {s: h.split([len(texts) for texts in groups.values()]) for s, h in rows.items()}
    each = [{s: part[number] for s, part in parts.items()} for number in range(len(groups))]
    axis = units(macro_difference({"default": each[0]}, dict(zip(roles, each[1:], strict=True)), **origin(model)))
    program = Program()
    for layer in band(model, 46 / 64, 53 / 64, layers):
        (site,) = (s for s in rows if s.layer == layer)
        tau = float(torch.quantile(rows[site].double() @ axis.vectors[site].double(), quantile))
        program += axis.only([layer]).steering(map=getattr(Clip, bound)(tau))
    return program


def _replies(model: Any, tokenizer: Any, chats: Sequence[Chat], max_new_tokens: int, seed: int) -> list[AlignedChain]:
    """The model's replies to chats; a reply without a token has no span."""
    prompts = [encode(tokenizer, render_messages(tokenizer, chat)) for chat in chats]
    requests = [Request(ids, seed=seed + number) for number, ids in enumerate(prompts)]
    written = TransformersEngine(model, tokenizer).generate(requests, max_new_tokens=max_new_tokens)
    stops = models.stop_ids(model)
    chains = []
    for number, (prompt, completion) in enumerate(zip(prompts, written, strict=True)):
        ids = (*prompt, *(i for i in completion.ids if i not in stops))
        spans = (TokenSpan("reply", len(prompt), len(ids)),) if len(ids) > len(prompt) else ()
        chains.append(AlignedChain(str(number), 0, ids, spans))
    return chains
