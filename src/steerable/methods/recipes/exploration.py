"""A recipe for agents that settle too early: EAST."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from steerable.chains.text_pairs import Messages
from steerable.methods.recipes.reading import NEW, at_depth, origin, read_texts
from steerable.methods.weighted_means import entropy_weighted
from steerable.steering.direction import Direction
from steerable.steering.schedule import Constant, Until
from steerable.steering.site import Site
from steerable.store.errors import UsageError


def east(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    entropies: Sequence[float],
    runs: Sequence[Hashable],
    *,
    layer: int | None = None,
    until: str = "",
    strength: float = 2.0,
) -> Direction:
    """u = (1/Z) sum over runs k and steps t of h_t^k (z_t^k - mean of z over the run); h' = h + beta u at new tokens.

    EAST, entropic activation steering (arXiv 2406.00244): z is the activation at the last token of a step's prompt, h
    the entropy of the agent's action there, estimated from 25 sampled completions of which the valid ones count. Added
    at block 16 of 32 with beta = 2, until the action is taken. That the site is `resid_post` is our reading; no code is
    published.

    Data: the prompts of several runs of an agent (65 runs of 50 steps there), with their entropies.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: of each step, texts or chats.
        entropies: h of each step, in any unit.
        runs: what run each step belongs to.
        layer: None: the paper's depth, 16/32.
        until: the text that ends an action; empty: steer to the end.
        strength: beta.

    Returns:
        A Direction at `resid_post` of one layer, in the model's own units.

    Raises:
        UsageError: unequal numbers, entropies that do not vary within any run, no such layer.

    Example:
        >>> st.recipes.east(model, tokenizer, ["2 + 3", "4 + 5"], [0.6, 0.1], ["a", "a"]).layers
        [3]
    """
    if not len(prompts) == len(entropies) == len(runs):
        raise UsageError("every step has one prompt, one entropy and one run: give as many of each")
    (rows,) = read_texts(model, tokenizer, [prompts], [Site("resid_post", at_depth(model, 16 / 32, layer))], "last")
    direction = entropy_weighted(rows, entropies, runs, **origin(model, "exploration"))
    ids = _behind_others(tokenizer, until) if until else []
    return replace(
        direction, method="EAST", gate=NEW, schedule=Until(tuple(ids)) if ids else Constant(), strength=strength
    )


def _behind_others(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text as they stand behind a line of others: SentencePiece puts a space before a text alone."""
    alone, line, both = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, "\n", f"\n{text}"))
    behind = both[len(line) :]
    return list(behind if both[: len(line)] == line and tokenizer.decode(behind) == text else alone)
