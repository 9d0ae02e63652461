"""Weighted means of rows that come in groups: groups that weigh the same, and rows compared within their problem."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steerable.methods.rows import (
    Activations,
    column,
    estimated,
    mean_norm,
    numbers,
    ordinary_groups,
    paired_sites,
    sink_stats,
    sites_of,
)
from steerable.methods.weighted_means import codes, weighted
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


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
    _, problem = codes(column(problems, rows, "problems"))
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
    return weighted(activations, rows, of, sinks, "within_problem_difference", stats, about)


def length_extremes(
    lengths: Sequence[int] | Tensor, problems: Sequence[Hashable] | Tensor
) -> tuple[list[int], list[int]]:
    """The rows of the shortest and of the longest answer to each problem, as two lists of one length.

    For `weighted_means.paired_difference(x[shortest], x[longest])`, as in Efficiency Steering (arXiv 2506.15647): give
    the right answers that came to an end alone, as a longest answer that was cut off would be no answer. Problems whose
    answers have all one length are left out; of equal lengths the first counts.

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
    names, numbered = codes(problems.tolist() if isinstance(problems, Tensor) else list(problems))
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
