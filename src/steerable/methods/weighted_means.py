"""Directions as weighted means of activations, u = sum_i w_i x_i with weights that sum to zero.

A constant that is added to all activations then leaves the direction as it is. What differs between the methods is the
weights alone: 1/n and -1/n (`contrasts.difference_of_means`), within pairs, groups, problems or runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steerable.methods.rows import (
    Activations,
    check_pairs,
    column,
    estimated,
    mean_norm,
    numbers,
    ordinary_groups,
    ordinary_masks,
    paired_sites,
    sink_stats,
    sites_of,
)
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


def weighted_mean(
    activations: Activations,
    weights: Sequence[float] | Tensor,
    *,
    site: Site | str | None = None,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = sum_i w_i x_i, at each site, for weights that sum to zero.

    With weights 1/n and -1/n it is the difference of means of two groups.

    Args:
        activations: {site: [n, d]}, or one tensor [n, d] with `site`; float64 inside.
        weights: [n], in units of the direction for one unit of activation; their sum must be zero.
        site: the site of activations that are given as a tensor.
        sinks: as in `contrasts.difference_of_means`. Where rows are left out, the weights of the same sign that remain
            are scaled to the sum that they had, as each of two means is then taken over the other rows.
        about: further fields of `Direction`.

    Returns:
        A Direction with float32 vectors [d], in the model's own units.

    Raises:
        UsageError: for weights of another number than the rows, or whose sum is not zero, and activations with NaN.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
        >>> weighted_mean(x, [0.5, 0.5, -1.0], site="resid_post.2").at(2)
        tensor([ 2., -1.])
    """
    rows = sites_of(activations, site)
    w = numbers(weights, rows, "weights")
    if not bool(w.any()) or abs(float(w.sum())) > 1e-6 * float(w.abs().sum()):
        raise UsageError(
            f"the weights of a contrast are not all zero and sum to zero, and these sum to {float(w.sum()):.3g}: "
            "subtract their mean"
        )

    def of(chosen: Tensor) -> Tensor:
        part = w[chosen]
        sides = [torch.where(w * sign > 0, w, 0.0) for sign in (1, -1)]
        if not all(bool(side[chosen].any()) for side in sides):
            raise UsageError("all activations with weights of one sign are attention sinks: capture other tokens")
        factors = [float(side.sum() / side[chosen].sum()) for side in sides]
        return torch.where(part > 0, part * factors[0], part * factors[1])

    return _weighted(activations, rows, of, sinks, "weighted_mean", {"rows": len(w)}, about)


def paired_difference(
    positive: Activations,
    negative: Activations,
    *,
    site: Site | str | None = None,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = (1/n) sum_i (positive_i - negative_i), at each site.

    The difference of means of pairs; a pair of which one half is an attention sink is left out as a whole, so that
    what the halves have in common (their question, their problem) cancels. With pairs of the shortest and the longest
    right answer to a problem (`length_extremes`) this is the direction of Efficiency Steering (arXiv 2506.15647), whose
    details are not published.

    Args:
        positive: activations {site: [n, d]}, or one tensor [n, d] with `site`; float64 inside.
        negative: the pairs' other halves, as many rows.
        site, sinks, about: as in `contrasts.difference_of_means`.

    Returns:
        A Direction with float32 vectors [d]; `stats["pairs"]` counts the pairs that were given.

    Raises:
        UsageError: for unequal numbers of rows, NaN, and where no pair is left.

    Example:
        >>> paired_difference(torch.ones(4, 2), torch.zeros(4, 2), site="resid_post.2").at(2)
        tensor([1., 1.])
    """
    groups = paired_sites(positive, negative, site)
    check_pairs(groups, "paired_difference")
    pairs = len(next(iter(groups.values()))[0])
    ordinary, left_out = ordinary_groups(groups, sinks, paired=True)
    vectors = {s: (a - b).mean(0) for s, (a, b) in ordinary.items()}
    norms = {s: mean_norm(a, b) for s, (a, b) in ordinary.items()}
    stats = {"pairs": pairs, **sink_stats(left_out, positive, negative)}
    return estimated(vectors, norms, "paired_difference", stats, about)


def macro_difference(
    positive: Mapping[str, Activations],
    negative: Mapping[str, Activations],
    *,
    site: Site | str | None = None,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = mean over the positive groups of their means - the same of the negative groups, at each site.

    Each group weighs the same, whatever its number of rows. With the default persona as the one positive group and
    the roles as negative ones this is the Assistant Axis (arXiv 2601.10387).

    Args:
        positive: {name of a group: activations {site: [n, d]}, or tensors [n, d] with `site`}; float64 inside.
        negative: the same of the other groups.
        site, sinks, about: as in `contrasts.difference_of_means`; rows are compared with those of all groups.

    Returns:
        A Direction with float32 vectors [d]; `stats` hold the number of rows of each group.

    Raises:
        UsageError: for no groups, groups at different sites, NaN, and a group of nothing but attention sinks.

    Example:
        >>> roles = {"pirate": torch.ones(5, 2), "ghost": 3 * torch.ones(1, 2)}
        >>> macro_difference({"default": torch.zeros(2, 2)}, roles, site="resid_post.2").at(2)
        tensor([-2., -2.])
    """
    if not positive or not negative:
        raise UsageError("macro_difference needs one positive and one negative group at least")
    given = [*positive.values(), *negative.values()]
    parts = [paired_sites(given[0], group, site) for group in given]
    ordinary, left_out = ordinary_groups({s: tuple(part[s][1] for part in parts) for s in parts[0]}, sinks)
    vectors, norms = {}, {}
    for s, groups in ordinary.items():
        means = torch.stack([group.mean(0) for group in groups])
        vectors[s] = means[: len(positive)].mean(0) - means[len(positive) :].mean(0)
        norms[s] = mean_norm(*groups)
    first = next(iter(parts[0]))
    counts = [len(part[first][1]) for part in parts]
    stats = {
        "positive": dict(zip(positive, counts, strict=False)),
        "negative": dict(zip(negative, counts[len(positive) :], strict=True)),
        **sink_stats(left_out, *given),
    }
    return estimated(vectors, norms, "macro_difference", stats, about)


def entropy_weighted(
    activations: Activations,
    entropies: Sequence[float] | Tensor,
    runs: Sequence[Hashable] | Tensor,
    *,
    site: Site | str | None = None,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = (1/Z) sum_i h_i (z_i - mean of z over the run of i), with Z = sum_i h_i, at each site.

    EAST, entropic activation steering (arXiv 2406.00244): z_i is the activation at the last prompt token of a step of
    an agent, h_i the entropy of its actions there. It equals sum_i (h_i - mean of h over the run) z_i / Z: the
    covariance of entropy and activation within runs, up to a factor. No code is published. Entropies in bits or nats
    give the same direction, for Z has their unit.

    Args:
        activations: {site: [n, d]}, or one tensor [n, d] with `site`; one row for each step, float64 inside.
        entropies: h [n], none negative.
        runs: [n], what run each step belongs to (any names or numbers).
        site, sinks, about: as in `contrasts.difference_of_means`.

    Returns:
        A Direction with float32 vectors [d], in the model's own units.

    Raises:
        UsageError: for negative entropies, for entropies that do not vary within any run, NaN.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 0.0], [5.0, 1.0], [5.0, 0.0]])
        >>> entropy_weighted(z, [0.6, 0.2, 0.1, 0.1], ["a", "a", "b", "b"], site="resid_post.2").at(2)
        tensor([0.2000, 0.0000])
    """
    rows = sites_of(activations, site)
    h = numbers(entropies, rows, "entropies")
    _, run = _codes(column(runs, rows, "runs"))
    if bool((h < 0).any()):
        raise UsageError(f"entropies are not negative, and one of them is {float(h.min()):.3g}")

    def of(chosen: Tensor) -> Tensor:
        part, numbered = h[chosen], run[chosen]
        centred = part - _means(part, numbered)[numbered]
        if not float(centred.abs().max() if len(part) else 0.0) > 1e-12 * float(h.max()):
            raise UsageError("the entropies do not vary within any run, so they give no direction")
        return centred / part.sum()

    stats = {"steps": len(h), "runs": int(run.max()) + 1}
    return _weighted(activations, rows, of, sinks, "entropy_weighted", stats, about)


def within_problem_difference(
    activations: Activations,
    positive: Sequence[bool] | Tensor,
    problems: Sequence[Hashable] | Tensor,
    *,
    site: Site | str | None = None,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """u = mean over problems of (mean of its positive rows - mean of its negative rows), at each site.

    Right against wrong answers to the same problem: what problems have in common with their difficulty cancels, and
    each problem weighs the same. Problems with rows of one kind alone say nothing and are left out.

    Args:
        activations: {site: [n, d]}, or one tensor [n, d] with `site`; one row for each answer, float64 inside.
        positive: [n] bool, for example whether the answer is right.
        problems: [n], what problem each row belongs to (any names or numbers).
        site, sinks, about: as in `contrasts.difference_of_means`.

    Returns:
        A Direction with float32 vectors [d]; `stats` hold the number of problems that were used and left out, where
        all rows are ordinary.

    Raises:
        UsageError: where no problem has rows of both kinds, NaN.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [9.0, 9.0]])
        >>> within_problem_difference(x, [True, False, True], ["a", "a", "b"], site="resid_post.2").at(2)
        tensor([1., 0.])
    """
    rows = sites_of(activations, site)
    right = numbers(positive, rows, "positive").bool()
    _, problem = _codes(column(problems, rows, "problems"))
    total = int(problem.max()) + 1

    def of(chosen: Tensor) -> Tensor:
        kinds = [torch.bincount(problem[chosen & side], minlength=total) for side in (right, ~right)]
        both = (kinds[0] > 0) & (kinds[1] > 0)
        if not bool(both.any()):
            raise UsageError("no problem has both positive and negative activations, so none can be compared within")
        count = torch.where(right, kinds[0][problem], -kinds[1][problem]).double()
        return torch.where(both[problem], 1 / count.masked_fill(count == 0, 1.0) / both.sum(), 0.0)[chosen]

    used = sum(bool(right[problem == q].any() and (~right[problem == q]).any()) for q in range(total))
    stats = {"problems": used, "problems_left_out": total - used}
    return _weighted(activations, rows, of, sinks, "within_problem_difference", stats, about)


def length_extremes(
    lengths: Sequence[int] | Tensor, problems: Sequence[Hashable] | Tensor
) -> tuple[list[int], list[int]]:
    """The rows of the shortest and of the longest answer to each problem, as two lists of one length.

    For `paired_difference(x[shortest], x[longest])`, as in Efficiency Steering (arXiv 2506.15647): give the right
    answers that came to an end alone, as a longest answer that was cut off would be no answer. Problems whose answers
    have all one length are left out; of equal lengths the first counts.

    Args:
        lengths: [n] tokens.
        problems: [n], what problem each answer belongs to.

    Returns:
        Two lists of row numbers, problem by problem in the order in which they appear.

    Raises:
        UsageError: for unequal numbers, and where no problem has answers of two lengths.

    Example:
        >>> length_extremes([30, 10, 20, 50], ["a", "a", "a", "b"])
        ([1], [0])
    """
    count = [int(n) for n in lengths]
    names, numbered = _codes(problems.tolist() if isinstance(problems, Tensor) else list(problems))
    if len(count) != len(numbered):
        raise UsageError(f"there are {len(count)} lengths and {len(numbered)} problems: expected one of each a row")
    shortest, longest = [], []
    for q in range(len(names)):
        rows = [i for i, number in enumerate(numbered.tolist()) if number == q]
        low, high = min(rows, key=count.__getitem__), max(rows, key=count.__getitem__)
        if count[low] < count[high]:
            shortest.append(low)
            longest.append(high)
    if not shortest:
        raise UsageError("no problem has answers of two lengths, so none can be compared within")
    return shortest, longest


def _weighted(
    activations: Activations,
    rows: Mapping[Site, Tensor],
    weights: Callable[[Tensor], Tensor],
    sinks: Sinks,
    method: str,
    stats: dict[str, Any],
    about: dict[str, Any],
) -> Direction:
    """The weighted sum at each site; `weights` gives those of the rows that are chosen, [n] bool to [chosen]."""
    masks, left_out = ordinary_masks(rows, sinks, stacklevel=4)
    vectors = {s: weights(masks[s]) @ x[masks[s]] for s, x in rows.items()}
    norms = {s: mean_norm(x[masks[s]]) for s, x in rows.items()}
    return estimated(vectors, norms, method, {**stats, **sink_stats(left_out, activations)}, about)


def _codes(names: Sequence[Hashable]) -> tuple[list[Hashable], Tensor]:
    """The different names in their order, and the number of each row's, [n]."""
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return list(order), torch.tensor([order[name] for name in names], dtype=torch.int64)


def _means(values: Tensor, codes: Tensor) -> Tensor:
    """The mean of the values of each code; 0 for a code without any."""
    size = int(codes.max()) + 1 if len(codes) else 0
    return torch.bincount(codes, values, size) / torch.bincount(codes, minlength=size).clamp_min(1)
