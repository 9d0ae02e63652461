"""pass@k: the chance that at least one of k samples is right; its intervals, and where two curves meet or cross.

Chen et al. 2021 (arXiv 2107.03374) for the estimator; Yue et al. 2025 (arXiv 2504.13837) for the question that it
answers: whether training taught a model new tasks, or to solve with one try what it could solve with many.

**What the intervals cover.** Tasks are resampled, each with its own estimate from its own n samples. The spread of
these estimates holds both the spread between tasks and the noise of sampling inside each, so an interval is for *new
tasks of the same source, and new samples*. It does not cover another training seed of the compared model. Where every
task is solved (or none), it has no width: that says only that harder (or easier) tasks were not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from steerable.evals.intervals import TOO_FEW, Interval, is_bounded, percentile_interval, resampled_means
from steerable.store.errors import UsageError
from steerable.store.text import counted

Counts = Mapping[str, tuple[int, int]]
"""Task id -> (n samples, c right ones)."""


@lru_cache(maxsize=65536)
def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right, when c of n were: 1 - C(n - c, k) / C(n, k).

    Computed as 1 - prod_{j = n-c+1..n} (1 - k / j), which neither overflows nor cancels (Chen et al. 2021, arXiv
    2107.03374). Raises UsageError unless 0 <= c <= n and 1 <= k <= n: pass@k cannot be had from fewer than k samples.
    """
    if n < 1 or not 0 <= c <= n:
        raise UsageError(
            f"{c} of {n} samples were right: expected at least one sample, and from 0 to all of them right"
        )
    if not 1 <= k <= n:
        raise UsageError(
            f"pass@{k} cannot be estimated from {counted(n, 'sample')}: expected k from 1 to {n}, so draw more samples"
        )
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / j for j in range(n - c + 1, n + 1))


def curve(counts: Counts, ks: Sequence[int], seed: int = 0) -> dict[int, Interval]:
    """{k: [mean pass@k over tasks, low, high]}; the module says what the 95 % intervals cover."""
    means = resampled_means(_table(counts, sorted(counts), ks), seed)
    return {k: percentile_interval(means[:, i]) for i, k in enumerate(ks)}


def difference(a: Counts, b: Counts, ks: Sequence[int], seed: int = 0) -> dict[int, Interval]:
    """{k: [pass@k of a minus that of b, low, high]} over the tasks that both have, paired by task."""
    tasks = _shared(a, b)
    means = resampled_means(_table(a, tasks, ks) - _table(b, tasks, ks), seed)
    return {k: percentile_interval(means[:, i]) for i, k in enumerate(ks)}


@dataclass(frozen=True)
class Crossing:
    """How two curves stand to each other from the first to the last k; see `crossing`.

    verdict: `crosses`, `meets`, `apart`, `parts` or `level`. leader: who is ahead at the first k, `a` or `b`, or None
    where its interval holds 0. k: [k, low, high] from which the one behind is ahead up to the last k; None for a number
    beyond it. overtaken: the share of resamples in which that happens. level_from: the first of the given k from which
    on every interval of the difference holds 0. first, last: the difference a - b at the first and last k.
    """

    verdict: str
    leader: str | None
    k: list[int | None]
    overtaken: float
    level_from: int | None
    first: Interval
    last: Interval
    ks: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def sentence(self, a: str, b: str) -> str:
        """The verdict in words; a and b are the names of the two."""
        low, high = self.ks[0], self.ks[-1]
        ahead, behind = (a, b) if self.leader != "b" else (b, a)
        style = "{:+.1f} points, {:+.1f} to {:+.1f}" if is_bounded(self.last) else "{:+.1f} points, " + TOO_FEW
        gap = style.format(*(100 * x for x in self.last)).replace("-", "\N{MINUS SIGN}")
        if self.verdict == "crosses":
            return (
                f"{ahead} is ahead at k = {low}, {behind} at k = {high} ({gap}): they cross at k \u2248 {self._where()}"
            )
        if self.verdict == "meets":
            since = f"from k = {self.level_from} on" if self.level_from else f"at k = {high}"
            return f"{ahead} is ahead at k = {low}, and {since} they cannot be told apart (at k = {high}: {gap})"
        if self.verdict == "apart":
            return f"{ahead} is ahead from k = {low} to k = {high} ({gap}): they do not meet"
        if self.verdict == "parts":
            winner = a if self.last[0] > 0 else b
            return f"{a} and {b} cannot be told apart at k = {low}; at k = {high} {winner} is ahead ({gap})"
        return f"{a} and {b} cannot be told apart, neither at k = {low} nor at k = {high} ({gap})"

    def _where(self) -> str:
        best, low, high = ("beyond" if k is None else str(k) for k in self.k)
        return f"{best} ({low} to {high})" if high != "beyond" else f"{best} ({low} or more)"


def crossing(a: Counts, b: Counts, ks: Sequence[int], seed: int = 0) -> Crossing:
    """Whether the curve that is ahead at the smallest k is met or overtaken up to the largest.

    The verdict looks at the two ends alone, because picking the best of many k would find differences where none are.
    With the paired 95 % intervals of a - b at the smallest and the largest of `ks`:

    - `crosses`: one is ahead at the smallest k, the *other* at the largest (both intervals without 0);
    - `meets`: one is ahead at the smallest k, and the interval at the largest holds 0. They cannot be told apart
      there, which is not the same as being equal: its width says how far apart they may still be;
    - `apart`: the same one is ahead at both ends;
    - `parts`: the interval holds 0 at the smallest k and not at the largest; `level`: it holds 0 at both.

    The crossing k is the smallest k from which on the one behind (by the estimates at the smallest k) stays ahead up to
    the largest; every whole k is tried, not just `ks`. Its interval comes from the same resamples of the tasks; an end
    is None where the one behind is not ahead at the largest k.
    """
    ks, tasks = sorted(ks), _shared(a, b)
    if not ks:
        raise UsageError("a crossing needs some k: expected at least one")
    grid = list(range(ks[0], ks[-1] + 1))
    means = resampled_means(_table(a, tasks, grid) - _table(b, tasks, grid), seed)
    gaps = {k: percentile_interval(means[:, k - ks[0]]) for k in ks}
    first, last = gaps[ks[0]], gaps[ks[-1]]
    began, ended = _sign(first), _sign(last)
    if began:
        verdict = "apart" if began == ended else "meets" if ended == 0 else "crosses"
    else:
        verdict = "parts" if ended else "level"
    leader = began or (1 if means[0, 0] >= 0 else -1)
    places = _overtaken(leader * means)
    level_from = None
    for k in reversed(ks):
        if _sign(gaps[k]):
            break
        level_from = k
    return Crossing(
        verdict=verdict,
        leader={1: "a", -1: "b", 0: None}[began],
        k=[grid[int(place)] if 0 <= place < len(grid) else None for place in percentile_interval(places)],
        overtaken=float(np.isfinite(places[1:]).mean()),
        level_from=level_from,
        first=first,
        last=last,
        ks=ks,
    )


def solved(a: Counts, b: Counts) -> dict[str, Any]:
    """Which tasks were solved at least once: `only_a` and `only_b` (task ids), `both` and `neither` (numbers).

    Never solved means "in these n samples". Two draws from one and the same model differ too, so `only_a` says
    something beside `only_b` alone. Raises UsageError where a task has more samples in one than in the other.
    """
    tasks = _shared(a, b)
    if unequal := [task for task in tasks if a[task][0] != b[task][0]]:
        raise UsageError(
            f"task {unequal[0]!r} has {a[unequal[0]][0]} samples in one and {b[unequal[0]][0]} in the other: solved "
            "sets compare only at equal numbers"
        )
    return {
        "only_a": [task for task in tasks if a[task][1] and not b[task][1]],
        "only_b": [task for task in tasks if b[task][1] and not a[task][1]],
        "both": sum(a[task][1] > 0 and b[task][1] > 0 for task in tasks),
        "neither": sum(a[task][1] == b[task][1] == 0 for task in tasks),
    }


def _sign(gap: Interval) -> int:
    """1 or -1 where the interval lies on one side of 0."""
    return int(gap[1] > 0) - int(gap[2] < 0)


def _overtaken(lead: np.ndarray) -> np.ndarray:
    """In each row of a leader's lead [rows, k], the place from which on it is negative; inf where there is none."""
    behind = np.logical_and.accumulate(lead[:, ::-1] < 0, axis=1)[:, ::-1]
    return np.where(behind.any(axis=1), behind.argmax(axis=1).astype(float), np.inf)


def _shared(a: Counts, b: Counts) -> list[str]:
    tasks = sorted(a.keys() & b.keys())
    if not tasks:
        raise UsageError("the two sets of counts have no task in common: expected the same tasks")
    return tasks


def _table(counts: Counts, tasks: Sequence[str], ks: Sequence[int]) -> np.ndarray:
    """pass@k of every task [tasks, ks]."""
    if not tasks:
        raise UsageError("there are no counts: expected {task id: (samples, right ones)}")
    return np.array([[pass_at_k(*counts[task], k) for k in ks] for task in tasks])
