"""Recipes on chains of thought that steer: SEAL, and Efficiency Steering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from steerable.chains.windows import AlignedChain
from steerable.methods.contrasts import difference_of_means
from steerable.methods.estimators import span_activations
from steerable.methods.grouped_means import length_extremes
from steerable.methods.recipes.reading import NEW, Rows, at_depth, origin, read_whole, thinking
from steerable.methods.text_pairs import separation
from steerable.methods.weighted_means import paired_difference
from steerable.steering.automaton import Automaton
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
    break inside the think block; of a prompt only the last token is steered. The code saves -S and adds it with -1.
    What it reads is what it steers: a span that begins elsewhere than behind a paragraph break, such as the first one
    of a chain, is left out.

    Data: chains whose spans are paragraphs, labelled as by `cue_files.seal`; the paper has 500 right and 500 wrong.

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
        UsageError: no span with such a label behind a break, a model without a think block or without a paragraph
            break, no such layer.

    Example:
        >>> from steerable.chains.windows import AlignedChain, TokenSpan
        >>> (end,) = tokenizer("\\n\\n")["input_ids"]
        >>> spans = TokenSpan("execution", 2, 4), TokenSpan("reflection", 5, 7)
        >>> chain = AlignedChain("task", 0, (40, end, 41, 42, end, 43, 44), spans)
        >>> st.recipes.seal(model, tokenizer, [chain]).gate
        'thinking & boundary & (last_prompt | generated)'
    """
    think_tags(tokenizer)
    gate = f"thinking & boundary & ({NEW})"
    breaks = resolve(parse_gate(gate), tokenizer).breaks
    assert breaks is not None  # `boundary` is resolved or refused
    site = Site("resid_pre", at_depth(model, 20 / 28, layer))
    rows = _read_behind_breaks(model, chains, [execution, others], site, breaks)
    direction = difference_of_means(*rows, **origin(model, "execution"))
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


def _read_behind_breaks(
    model: Any, chains: Sequence[AlignedChain], groups: Sequence[Sequence[str]], site: Site, breaks: Automaton
) -> list[Rows]:
    """For each group of labels the activations at the breaks right before such spans, {site: [spans, d]}.

    Raises UsageError for a group without one.
    """
    behind = []
    for chain in chains:
        ids = torch.tensor([chain.ids])
        completed = breaks.advance(torch.zeros(1, dtype=torch.long), ids, torch.ones_like(ids, dtype=torch.bool))[0][0]
        spans = tuple(span for span in chain.spans if span.start and completed[span.start - 1])
        behind.append(replace(chain, spans=spans))
    labels = {span.label for chain in behind for span in chain.spans}
    for group in groups:
        if not labels & {*group}:
            there = f"those that do are labelled {', '.join(sorted(labels))}" if labels else "none does"
            raise UsageError(
                f"no span labelled {' or '.join(group)} begins behind a paragraph break, where SEAL reads and steers: "
                f"{there}; give chains whose paragraphs are labelled, as --annotator cues:seal does"
            )
    read = span_activations(model, behind, "onset", kind=site.kind, layers=[site.layer])
    masks = [torch.tensor([label in group for label in read.labels[0]]) for group in groups]
    return [{s: h[mask] for s, h in read.activations.items()} for mask in masks]
