"""Passages, tokens of texts that show something or do not, and where their activations lie along a direction.

One passage is one example: a whole text, or the spans of a chain that have a label. What a direction should tell apart
is two lists of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from steerable.engines.activations import Batch, batch_tokens, length_batches, pad, stream
from steerable.models import loading as models
from steerable.models import sinks as attention_sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


class Passage(NamedTuple):
    """A text as token ids, and the places among them that count."""

    ids: Sequence[int]
    tokens: Sequence[int]

    @classmethod
    def whole(cls, ids: Sequence[int], start: int = 0) -> Passage:
        """All tokens from `start` on."""
        return cls(ids, range(start, len(ids)))


def read_passages(
    model: Any, passages: Sequence[Passage], sites: Sequence[Site], reduce: Callable[[Site, Tensor], Any]
) -> dict[Site, list[Any]]:
    """What `reduce` makes of each passage's activations at each site, [n, d] float32 without attention sinks.

    Raises UsageError for a passage without tokens, or with attention sinks alone.
    """
    if empty := [i for i, passage in enumerate(passages) if not len(passage.tokens)]:
        raise UsageError(f"passage {empty[0]} has no tokens")
    result: dict[Site, list[Any]] = {site: [None] * len(passages) for site in sites}
    vocabulary = models.vocabulary(model)
    rows = [[*p.ids, *attention_sinks.company(list(p.ids), vocabulary)] for p in passages]

    class Taken:
        def add(self, index: int, h: Tensor, batch: Batch) -> None:
            assert batch.rows is not None
            for row, number in enumerate(batch.rows):
                places = torch.tensor(list(passages[number].tokens), device=h.device)
                picked = h[row, places].float()
                if batch.sinks is not None:
                    picked = picked[~batch.sinks.to(h.device)[row, places]]
                if not len(picked):
                    raise UsageError(
                        f"every token of passage {number} is an attention sink at {of_kind[index]}, whose activation "
                        "is massive whatever the text says: give longer texts"
                    )
                result[of_kind[index]][number] = reduce(of_kind[index], picked.cpu())

    def batches() -> Any:
        for indices in length_batches(list(map(len, rows)), batch_tokens(model)):
            batch = pad([rows[i] for i in indices])
            batch.rows = tuple(indices)
            yield batch

    longest = max(map(len, rows), default=1)
    for kind in dict.fromkeys(site.kind for site in sites):
        of_kind = [site for site in sites if site.kind == kind]
        stream(model, batches(), [Taken()], kind=kind, layers=[s.layer for s in of_kind], chunk=longest)
    return result


def passage_means(model: Any, passages: Sequence[Passage], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """{site: [passages, d]}: the mean activation of each passage, as estimators take them.

    Example:
        >>> means = passage_means(model, [Passage.whole(ids)], [st.Site("resid_post", 3)])
    """
    read = read_passages(model, passages, sites, lambda _, h: h.double().mean(0))
    return {site: torch.stack(rows).float() for site, rows in read.items()}


def projections(model: Any, passages: Sequence[Passage], direction: Direction) -> list[Tensor]:
    """Of each passage, every token's projection <h, v> / ||v||, averaged over the direction's sites in units of the
    activations' mean norm there, so that no site rules by its size; float64 [tokens].

    Example:
        >>> projections(model, [Passage.whole(chain["ids"])], direction)[0].mean()
    """
    lines = {s: (v.double().reshape(-1, v.shape[-1]).sum(0)) for s, v in direction.vectors.items()}
    lines = {s: line / line.norm().clamp_min(1e-30) for s, line in lines.items()}
    norms: dict[Site, float] = {}

    def along(site: Site, h: Tensor) -> Tensor:
        norms[site] = norms.get(site, 0.0) + float(h.double().norm(dim=1).sum())
        return h.double() @ lines[site]

    read = read_passages(model, passages, list(lines), along)
    count = {site: sum(map(len, rows)) for site, rows in read.items()}
    parts = [[row / (norms[s] / max(1, count[s])) for row in rows] for s, rows in read.items()]
    shortest = [min(map(len, some)) for some in zip(*parts, strict=True)]  # a sink at one site counts at none
    return [
        torch.stack([p[-n:] for p in some]).mean(0) for n, some in zip(shortest, zip(*parts, strict=True), strict=True)
    ]


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a positive score is higher than a negative one, ties by half: Mann and Whitney 1947.

    Example:
        >>> auc([2.0, 3.0], [1.0, 2.0])
        0.875
    """
    if not len(positive) or not len(negative):
        raise UsageError("an AUC needs scores of both sides")
    return float(mannwhitneyu(positive, negative).statistic) / len(positive) / len(negative)


def auc_interval(positive: Sequence[float], negative: Sequence[float]) -> list[float]:
    """[AUC, low, high] by Newcombe 2006, "Confidence intervals for an effect size measure based on the Mann-Whitney
    statistic. Part 2", method 5: the values theta that lie within 1.96 standard errors of the AUC, by their own error

        V(theta) = theta (1 - theta) / (m n) (1 + ((m + n) / 2 - 1) ((1 - theta) / (2 - theta) + theta / (1 + theta))),

    the variance of Hanley and McNeil 1982 with m and n alike. The AUC's own error is 0 at 1, of however few scores.

    Example:
        >>> auc_interval([3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 0.0, 1.0])
        [1.0, 0.58, 1.0]
    """
    a, m, n = auc(positive, negative), len(positive), len(negative)

    def edge(outside: float) -> float:
        inside = a
        for _ in range(50):
            theta = (outside + inside) / 2
            spread = 1 + ((m + n) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
            is_outside = (a - theta) ** 2 > 1.96**2 * theta * (1 - theta) / (m * n) * spread
            outside, inside = (theta, inside) if is_outside else (outside, theta)
        return inside

    return [a, edge(0.0), edge(1.0)]


def halves_agreement(make: Callable[[Sequence[int]], Direction], count: int, seed: int = 0, splits: int = 8) -> float:
    """How much a direction depends on the examples it was made of: the mean cosine of the directions of two random
    halves, over the sites, and over several splits.

    A vector whose halves do not agree is mostly noise: "split-half reliability", Spearman 1910. The whole data's
    direction is better than a half's, by 2 c / (1 + c) in the same measure.

    Args:
        make: indices of examples -> their direction.
        count: how many examples there are.

    Raises:
        UsageError: fewer than four examples.

    Example:
        >>> halves_agreement(lambda some: Direction({Site("resid_post", 0): data[list(some)].mean(0)}), len(data))
    """
    if count < 4:
        raise UsageError(f"two halves of {count} examples say nothing: expected four or more")
    generator = torch.Generator().manual_seed(seed)
    cosines = []
    for _ in range(splits):
        order = torch.randperm(count, generator=generator).tolist()
        first, second = make(sorted(order[::2])), make(sorted(order[1::2]))
        cosines += list(first.cosine(second).values())
    return sum(cosines) / len(cosines)


def held_out_auc(
    make: Callable[[Sequence[int]], Direction], positive: Mapping[Site, Tensor], negative: Mapping[Site, Tensor]
) -> list[float]:
    """[AUC, low, high] at which examples are told apart by a direction that was made without them.

    The examples are cut in two; each half is projected on the direction of the other, and centred by that half's mean
    of both sides. `make` may also return the same direction always, where it was made of other data.

    Args:
        make: indices of examples -> a direction.
        positive, negative: {site: [n, d]}, example by example.

    Raises:
        UsageError: fewer than four examples.

    Example:
        >>> held_out_auc(lambda some: direction, happy, sad)
        [0.97, 0.93, 1.0]
    """
    scores: tuple[list[float], list[float]] = ([], [])
    count = len(next(iter(positive.values())))
    if count < 4:
        raise UsageError(f"how well {count} examples are told apart says nothing: expected four or more")
    for half in range(2):
        fit, held = list(range(half, count, 2)), list(range(1 - half, count, 2))
        direction = make(fit)
        sides = []
        for side in (positive, negative):
            lines = {s: v.double().reshape(-1, v.shape[-1]).sum(0) for s, v in direction.vectors.items()}
            along = [side[s][held].double() @ line / line.norm().clamp_min(1e-30) / side[s].double().norm(dim=1).mean()
                     for s, line in lines.items()]  # fmt: skip
            sides.append(torch.stack(along).mean(0))
        centre = torch.cat(sides).mean()
        for into, along_side in zip(scores, sides, strict=True):
            into.extend((along_side - centre).tolist())
    return auc_interval(*scores)


def margin_over_turns(
    model: Any, direction: Direction, contexts: Sequence[Sequence[int]], positive: Sequence[Sequence[int]],
    negative: Sequence[Sequence[int]],
) -> list[float]:  # fmt: skip
    """Whether a direction still means the same later in a conversation: the margin of a probe over the turns.

        margin(t) = mean over pairs of phi(context_t, a+) - phi(context_t, a-), divided by its value's spread at t = 0

    with phi the mean projection of the answer's tokens. "Linear representations in language models can change
    dramatically over a conversation" (arXiv 2601.20834): margins of what the conversation is about may turn round.

    Args:
        contexts: token ids of what stands before the texts, turn by turn: the first is usually empty.
        positive, negative: token ids of the pairs' texts, which are read behind each context.

    Returns:
        The margin behind every context, in standard deviations of the projections of both sides behind the first.

    Raises:
        UsageError: fewer than two pairs, which have no standard deviation.

    Example:
        >>> margin_over_turns(model, direction, [[], first_turn, both_turns], happy, sad)
        [2.1, 1.9, 1.8]
    """
    if min(len(positive), len(negative)) < 2:
        raise UsageError("a margin in standard deviations needs two pairs or more")
    margins: list[float] = []
    spread = 1.0
    for context in contexts:
        sides = []
        for texts in (positive, negative):
            passages = [Passage.whole([*context, *text], len(context)) for text in texts]
            sides.append(torch.stack([p.mean() for p in projections(model, passages, direction)]))
        if not margins:
            spread = math.sqrt(float(sides[0].var() + sides[1].var()) / 2) or 1.0
        margins.append(float(sides[0].mean() - sides[1].mean()) / spread)
    return margins


def drift_over_chains(
    model: Any, direction: Direction, steered: Sequence[Passage], unsteered: Sequence[Passage], parts: int = 3
) -> list[float]:
    """Whether the model drifts back while it is steered: how far its text lies along the direction, part by part.

    Both kinds of chains are read by the *unsteered* model, so that what is added is not counted, but what was written
    under it. "Endogenous Resistance to Activation Steering" (arXiv 2602.06941): a model may notice and correct itself,
    so that the last part lies nearer to the unsteered chains than the first.

    Returns:
        For each of the `parts` of a chain, the mean projection of the steered minus that of the unsteered chains, in
        standard deviations of the unsteered chains' parts.

    Example:
        >>> drift_over_chains(model, direction, steered, unsteered)
        [0.9, 0.8, 0.8]
    """
    means = []
    for chains in (steered, unsteered):
        long = [p for p in chains if len(p.tokens) >= 2 * parts]
        if not long:
            raise UsageError(f"no chain has {2 * parts} tokens: expected longer ones")
        rows = [
            [float(piece.mean()) for piece in row.tensor_split(parts)] for row in projections(model, long, direction)
        ]
        means.append(torch.tensor(rows, dtype=torch.float64))
    spread = float(means[1].std()) or 1.0
    return ((means[0].mean(0) - means[1].mean(0)) / spread).tolist()
