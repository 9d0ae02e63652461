"""Every figure of the bundled model: ``steerable pocket measure``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import comb
from typing import Any

_EQUATION = re.compile(r"(?<![\w*/+=-])(?<![-+*/] )(\d+) ([-+*/]) (\d+) = (\d+)(?!\w)")


def equations(thinking: str) -> tuple[int, int]:
    """``(all, wrong)``: the two-number equations that a chain states, and how many of them are false."""
    found = _EQUATION.findall(thinking)
    return len(found), sum(not _true(*map(str, parts)) for parts in found)


def _true(left: str, operator: str, right: str, value: str) -> bool:
    a, b, c = int(left), int(right), int(value)
    if operator == "/":
        return b != 0 and a == b * c
    return {"+": a + b, "-": a - b, "*": a * b}[operator] == c


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right, given ``right`` of ``samples`` were.

    1 - C(n - c, k) / C(n, k); Chen et al. 2021, arXiv 2107.03374.
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def figures(
    chains: Sequence[Mapping[str, Any]],
    right: Mapping[tuple[str, int], bool],
    families: Mapping[str, str],
    fractions: Mapping[str, float],
    coverage: float,
    ks: Iterable[int] = (1, 4, 8, 32),
) -> dict[str, Any]:
    """The model's card in numbers.

    Args:
        chains: unsteered chains, each task with the same number of samples.
        right: (task id, sample) -> whether the outside scorer gave full marks.
        families: task id -> family.
        fractions: label -> share of the thinking tokens.
        coverage: share of thinking characters inside spans.
    """
    by_task: dict[str, list[bool]] = {}
    for chain in chains:
        by_task.setdefault(chain["task_id"], []).append(right[chain["task_id"], chain["sample"]])
    counts = [equations(chain["thinking"]) for chain in chains]
    stated, wrong = sum(n for n, _ in counts), sum(w for _, w in counts)
    samples = min(map(len, by_task.values()))
    passes: dict[str, dict[str, float]] = {}
    for family in [*dict.fromkeys(families.values()), "all"]:
        tasks = [marks for task, marks in by_task.items() if family in ("all", families[task])]
        passes[family] = {
            f"pass@{k}": sum(pass_at_k(sum(m), len(m), k) for m in tasks) / len(tasks) for k in ks if k <= samples
        }
    return {
        "tasks": len(by_task),
        "samples": samples,
        "pass": passes,
        "closed": sum(chain["closed"] for chain in chains) / len(chains),
        "tokens": sum(chain["tokens"] for chain in chains) / len(chains),
        "equations": stated,
        "wrong_equations": wrong / stated if stated else None,
        "fractions": dict(fractions),
        "coverage": coverage,
    }
