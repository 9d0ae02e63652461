"""Recipes that edit weights: ThinkEdit, Steer2Edit, LASER."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steerable.chains.windows import AlignedChain
from steerable.methods.contrasts import difference_of_means
from steerable.methods.head_projection import head_scores, project_heads
from steerable.methods.rank_reduction import truncate_matrix
from steerable.methods.recipes.reading import at_depth, origin, read_whole, thinking
from steerable.methods.sparse_edits import elastic_net_edits
from steerable.methods.weight_patch import WeightPatch
from steerable.models import loading as models
from steerable.store.errors import UsageError
from steerable.store.text import counted


def thinkedit(
    model: Any,
    tokenizer: Any,
    chains: Sequence[AlignedChain],
    *,
    short: int = 100,
    long: int = 1000,
    heads: int | None = None,
    weight: float = 1.0,
) -> WeightPatch:
    """W_o^(j)' = (I - w v v^T) W_o^(j) of the heads j that write most along short thinking, v = mean long - mean short.

    ThinkEdit, Sun et al. 2025 (arXiv 2503.22048), which mends answers that were thought about too little: v is read at
    `resid_mid` of each layer, over the tokens that predict the thinking, of chains with more than 1000 and fewer than
    100 tokens of thinking; the heads are those with the highest `head_projection.head_scores` on the short chains, 20
    of the 336 of R1-Distill-Qwen-1.5B (4 to 6 % in larger models). The published code has the lists of heads in it.

    Data: the model's own chains, short and long ones; the paper has 2000 answers to GSM8K.

    Args:
        model: not changed.
        tokenizer: its tokenizer.
        chains: chains with any spans; what lies between the first and the last of a chain's counts as its thinking.
        short: a chain with fewer tokens of thinking is short.
        long: a chain with more is long.
        heads: how many, up to all; None: 5 % of all.
        weight: w, the share of the projection.

    Returns:
        The patch, of rank 1 in each layer that has a chosen head.

    Raises:
        UsageError: no short or no long chain, another number of heads; what `project_heads` refuses.

    Example:
        >>> from steerable.chains.windows import AlignedChain, TokenSpan
        >>> def chain(sample, end):
        ...     return AlignedChain("task", sample, tuple(range(40, 40 + end)), (TokenSpan("a", 2, end),))
        >>> st.recipes.thinkedit(model, tokenizer, [chain(0, 9), chain(1, 15)], short=10, long=10, heads=2).method
        'ThinkEdit'
    """
    layers = models.head_layers(model)
    total = len(layers) * models.n_heads(model)
    count = max(1, round(total / 20)) if heads is None else heads
    if not 1 <= count <= total:
        raise UsageError(f"heads is {heads}: expected a number from 1 to {total}, as many as the model has")
    lengths = _lengths(chains)
    sides = [c for c, n in lengths if n < short], [c for c, n in lengths if n > long]
    for side, what in zip(sides, (f"fewer than {short}", f"more than {long}"), strict=True):
        if not side:
            raise UsageError(
                f"no chain has {what} tokens of thinking: the {counted(len(lengths), 'chain')} have {lengths[0][1]} to "
                f"{lengths[-1][1]}; give other chains, or other limits short and long"
            )
    brief, extended = (read_whole(model, side, "resid_mid", "predicting") for side in sides)
    direction = difference_of_means(extended, brief, **origin(model, "long"))
    heads_out = read_whole(model, sides[0], "head_in", "predicting")
    scores = head_scores(model, {s: h for s, h in heads_out.items() if s.layer in layers}, direction)
    return project_heads(model, direction, list(scores)[:count], weight)


def steer2edit(
    model: Any,
    tokenizer: Any,
    chains: Sequence[AlignedChain],
    *,
    rho_attention: float | None = 0.3,
    rho_mlp: float | None = 0.9,
    alpha: float = 0.2,
    share: float = 0.05,
) -> WeightPatch:
    """W_i' = W_i + lambda_i v k_i^T of every head and neuron i, with v = mean of short chains - mean of long ones.

    Steer2Edit, arXiv 2602.09870, for shorter reasoning; lambda and k are those of `sparse_edits.elastic_net_edits`. The
    sides are the shortest and the longest 5 % of the chains, read over the tokens that predict them. rho and alpha are
    tuned for each model: the defaults are those of OpenMath-Nemotron-7B. A stronger edit costs accuracy on hard tasks
    first, so look at accuracy beside the length. The published code takes wrong answers in and cuts long ones.

    Data: the model's own right chains that came to an end; the paper has 200 answers to GSM8K.

    Args:
        model: not changed.
        tokenizer: its tokenizer.
        chains: chains with any spans; what lies between the first and the last of a chain's counts as its thinking.
        rho_attention: the penalty on heads: the edit is weaker and sparser for larger ones; None (`off`): heads stay.
        rho_mlp: the same on neurons, which a mixture of experts does not have.
        alpha: the share of the penalty that makes the edit sparse.
        share: of the chains that are short, and of those that are long.

    Returns:
        The patch, of rank 1 in each map.

    Raises:
        UsageError: fewer than two chains, sides of one length, settings out of range.

    Example:
        >>> from steerable.chains.windows import AlignedChain, TokenSpan
        >>> def chain(sample, end):
        ...     return AlignedChain("task", sample, tuple(range(40, 40 + end)), (TokenSpan("a", 2, end),))
        >>> st.recipes.steer2edit(model, tokenizer, [chain(0, 9), chain(1, 15)]).method
        'Steer2Edit'
    """
    if not 0 < share <= 0.5:
        raise UsageError(f"the share of the chains at each end is {share}: expected more than 0 and at most 0.5")
    lengths = _lengths(chains)
    count = max(1, int(share * len(lengths)))
    if lengths[count - 1][1] >= lengths[-count][1]:
        raise UsageError("the shortest chains are as long as the longest: give more chains, or of more lengths")
    kinds = ("head_in", "attn_out") * (rho_attention is not None) + ("mlp_act", "mlp_out") * (rho_mlp is not None)
    sides = ([chain for chain, _ in part] for part in (lengths[:count], lengths[-count:]))
    heads = models.head_layers(model)
    short, long = (
        {
            site: h
            for kind in kinds
            for site, h in read_whole(model, side, kind, "predicting").items()
            if site.layer in heads or kind.startswith("mlp")
        }
        for side in sides
    )
    return elastic_net_edits(model, short, long, alpha=alpha, rho_attention=rho_attention, rho_mlp=rho_mlp)


def laser(
    model: Any, tokenizer: Any, *, layer: int | None = None, matrix: str | None = None, share: float = 0.01
) -> WeightPatch:
    """W' = the best approximation of one matrix W [m, n] by one of rank rho min(m, n).

    LASER, Sharma et al. 2023 (arXiv 2312.13558): an input matrix of a late MLP loses most of its singular values, down
    to rho = 0.01. Layer, matrix and rho are to be chosen on held-out data; the paper's best for LLaMA 2 is the last but
    a few. The published code decomposes by a randomised method; here it is exact.

    Data: none.

    Args:
        model: not changed.
        tokenizer: not used, as LASER reads no text.
        layer: the block; None: the paper's depth, 26/32 of LLaMA 2.
        matrix: the linear map's name in the block; None: the input matrix of its MLP, `mlp.up_proj` or what stands in
            its place (`mlp.c_fc` in GPT-2, `mlp.gate_up_proj` in Phi-3).
        share: rho.

    Returns:
        The patch of this matrix.

    Raises:
        UsageError: no such layer or map, a share that leaves nothing or everything.

    Example:
        >>> st.recipes.laser(model, tokenizer, share=0.1).stats["rank"]
        19
    """
    number = at_depth(model, 26 / 32, layer)
    block = models.blocks(model)[number]
    maps = {name.removesuffix(".weight"): p for name, p in block.named_parameters() if p.dim() == 2}
    if matrix is None:
        last = models.family(model, number).mlp_out or ""
        inputs = [name for name in maps if last in maps and name != last and name.startswith(last.rpartition(".")[0])]
        matrix = inputs[-1] if inputs else "mlp.up_proj"
    if matrix not in maps:
        raise UsageError(f"a block of this model has no matrix {matrix}: expected one of {', '.join(maps)}")
    weight = maps[matrix]
    name = next(name for name, other in models.unwrap(model).named_parameters() if other is weight)
    if not 0 < share < 1:
        raise UsageError(f"share is {share}: expected a number above 0 and below 1")
    return truncate_matrix(model, name, max(1, int(share * min(weight.shape))))


def _lengths(chains: Sequence[AlignedChain]) -> list[tuple[AlignedChain, int]]:
    """Each chain that has spans and how many tokens it thinks, the shortest first. Raises UsageError for none."""
    spans = [(chain, thinking(chain)) for chain in chains if chain.spans]
    if len(spans) < 2:
        raise UsageError("short and long chains are compared: give two chains with annotated spans at least")
    return sorted(((chain, span.end - span.start) for chain, span in spans), key=lambda pair: pair[1])
