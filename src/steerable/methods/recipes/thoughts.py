"""Recipes on chains of thought that steer: SEAL, and Efficiency Steering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from steerable.chains.windows import AlignedChain
from steerable.methods.contrasts import difference_of_means
from steerable.methods.grouped_means import length_extremes
from steerable.methods.recipes.reading import at_depth, origin, read_spans, read_whole, thinking
from steerable.methods.text_pairs import separation
from steerable.methods.weighted_means import paired_difference
from steerable.steering.direction import Direction
from steerable.steering.gates import parse_gate, resolve
from steerable.steering.site import Site
from steerable.steering.think import think_tags
from steerable.store.errors import UsageError

_FEWEST = 4  # pairs, of which each half has a variance


def seal(
    model: Any,
    tokenizer: Any,
    chains: Sequence[AlignedChain],
    *,
    execution: Sequence[str] = ("execution",),
    others: Sequence[str] = ("reflection", "transition"),
    layer: int | None = None,
    strength: float = 1.0,
) -> Direction:
    """S = mean of execution - mean of reflection and transition; h' = h + alpha S at paragraph breaks in the thinking.

    SEAL, Chen et al. 2025 (arXiv 2504.07986). A thought is a paragraph of the thinking, and stands for itself by the
    activation of the token that ends the paragraph before it. S is the difference of the pooled means, read and added
    at the input of one block (20 of the 28 of R1-Distill-Qwen), alpha = 1, only at the tokens that complete a paragraph
    break inside the think block. The code saves -S and adds it with -1. It leaves out the first thought of a chain,
    which no break precedes; so does this.

    Data: chains whose spans are thoughts, labelled as by `cue_files.seal`; the paper has 500 right and 500 wrong ones.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        chains: chains with labelled token spans.
        execution: labels of thoughts to go towards.
        others: labels of thoughts to go away from.
        layer: the block at whose input it acts; None: the paper's depth, 20/28.
        strength: alpha.

    Returns:
        A Direction at `resid_pre` of one layer, in the model's own units.

    Raises:
        UsageError: no span with such a label, a model without a think block or without a paragraph break, no such
            layer.

    Example:
        >>> from steerable.chains.windows import AlignedChain, TokenSpan
        >>> spans = TokenSpan("deduction", 2, 6), TokenSpan("deduction", 6, 9), TokenSpan("backtracking", 9, 12)
        >>> chain = AlignedChain("task", 0, tuple(range(40, 60)), spans)
        >>> st.recipes.seal(model, tokenizer, [chain], execution=["deduction"], others=["backtracking"]).gate
        'thinking & boundary'
    """
    think_tags(tokenizer)
    resolve(parse_gate(gate := "thinking & boundary"), tokenizer)
    site = Site("resid_pre", at_depth(model, 20 / 28, layer))
    later = [replace(chain, spans=tuple(sorted(chain.spans, key=lambda span: span.start)[1:])) for chain in chains]
    direction = difference_of_means(
        *read_spans(model, later, [execution, others], site, "onset"), **origin(model, "execution")
    )
    return replace(direction, method="SEAL", gate=gate, strength=strength)


def efficiency(
    model: Any,
    tokenizer: Any,
    chains: Sequence[AlignedChain],
    *,
    layer: int | None = None,
    first: int | None = None,
    strength: float = 0.1,
) -> Direction:
    """u = mean over problems of (mean of the shortest right chain - mean of the longest one); h' = h + alpha ||h|| u.

    Efficiency Steering, arXiv 2506.15647; its site, layer, tokens and scale are not published, so these are ours: means
    over the thinking tokens of `resid_post`, u scaled to the layer's mean ||h||, so that alpha is a share of it, at
    thinking tokens of the layer that tells held-out pairs apart best. A chain was compared within its problem, so that
    how hard the problem is cancels.

    Data: several right chains that came to an end of each problem; all that are given count as such.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        chains: chains with any spans; what lies between the first and the last of a chain's counts as its thinking.
        layer: None: the layer with the largest d' of held-out pairs, for which there must be four pairs.
        first: read only so many tokens of each chain, so that the direction does not say how late a token is.
        strength: alpha.

    Returns:
        A Direction at `resid_post` of one layer; `stats["pairs"]` counts the problems.

    Raises:
        UsageError: no problem with chains of two lengths, too few to choose a layer, a model without a think block.

    Example:
        >>> from steerable.chains.windows import AlignedChain, TokenSpan
        >>> def chain(sample, end):
        ...     return AlignedChain("task", sample, tuple(range(40, 40 + end)), (TokenSpan("a", 2, end),))
        >>> st.recipes.efficiency(model, tokenizer, [chain(0, 9), chain(1, 15)], layer=3).stats["pairs"]
        1
    """
    think_tags(tokenizer)
    used = [chain for chain in chains if chain.spans]
    spans = [thinking(chain) for chain in used]
    sides = length_extremes([span.end - span.start for span in spans], [chain.task_id for chain in used])
    rows = [read_whole(model, [used[i] for i in side], "resid_post", "span", first) for side in sides]
    direction = paired_difference(*rows, **origin(model, "short"))
    if layer is None:
        if len(sides[0]) < _FEWEST:
            raise UsageError(
                f"{len(sides[0])} problems have right chains of two lengths, too few to choose a layer: give more "
                "chains, or a layer"
            )
        scores = separation(paired_difference, *rows)
        layer = max(scores, key=scores.__getitem__).layer
    chosen = direction.only([at_depth(model, 0, layer)]).rescaled_to()
    return replace(chosen, method="Efficiency Steering", gate="thinking", strength=strength)
