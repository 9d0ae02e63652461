"""What the recipes do to reasoning, from recipes.json in benchmarks/results; `fill_figures.py` places it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from training_figures import table

from steerable.pages import words

Sources = Mapping[str, Any]
_LESS, _MORE, _LOSS = 0.8, 0.05, -0.02  # the bars: thinking, accuracy, accuracy that may be lost


def reasoning(given: Sources) -> str:
    """The unsteered model, then one row a recipe and aim, the shorter chains first."""
    result = given.get("recipes", {})
    if not result.get("rows"):
        return table([], [])
    base = result["unsteered"]
    shown = [["unsteered", "", _share(base["accuracy"]), words.with_interval(base["thinking"], "tokens"),
              words.percent(base["loops"][0]), words.percent(base["unclosed"][0]), *[""] * 5]]  # fmt: skip
    order = sorted(result["rows"], key=lambda r: (r["aim"], r["thinking_ratio"][0]))
    for row in order:
        shown.append(
            [
                f"`{row['recipe']}`",
                row["aim"],
                _change(row["accuracy_change"], _points),
                _change(row["thinking_ratio"], _cut),
                words.percent(row["loops"][0]),
                words.percent(row["unclosed"][0]),
                words.fixed(row["chosen"]["factor"]),
                words.fixed(row["kl_of_its_own_chains"], ".3f"),
                *(_control(row.get(kind)) for kind in ("random", "shuffled")),
                words.fixed(row.get("time")),
            ]
        )
    head = ["recipe", "to be", "accuracy", "thinking", "loops", "unclosed", "dose", "KL of its chains"]
    return table([*head, "random", "shuffled", "time a token"], shown)


def verdict(given: Sources) -> str:
    """Which rows meet the two bars, and which others make chains shorter or longer."""
    rows = given.get("recipes", {}).get("rows", [])
    if not rows:
        return words.MISSING
    short = [r for r in rows if r["thinking_ratio"][0] <= _LESS and r["accuracy_change"][1] >= _LOSS]
    right = [r for r in rows if r["accuracy_change"][0] >= _MORE and r["accuracy_change"][1] > 0]
    others = [r for r in rows if r["thinking_ratio"][2] < 1 and r not in short]
    longer = [r for r in rows if r["thinking_ratio"][1] > 1]
    as_shuffled = [r for r in longer if r.get("shuffled") and r["shuffled"]["thinking_ratio"][1] > 1]
    return (
        f"Cut thinking by a fifth or more while the interval excludes a loss of more than 2 points: {_named(short)}. "
        f"Lift accuracy by 5 points or more, with an interval above 0: {_named(right)}. Others whose thinking is "
        f"shorter, with an interval below 0: {_named(others)}. Longer, with an interval above 0: {_named(longer)}; on "
        f"shuffled labels, too: {_named(as_shuffled)}."
    )


def measured(given: Sources) -> dict[str, str]:
    """What the table of all recipes says of each that was measured."""
    figures: dict[str, list[str]] = {}
    for row in given.get("recipes", {}).get("rows", []):
        figures.setdefault(row["recipe"], []).append(f"to be {row['aim']}: {_figure(row)}")
    return {name: "; ".join(some) for name, some in figures.items()}


def _figure(row: Mapping[str, Any]) -> str:
    return f"thinking {_cut(row['thinking_ratio'][0])}, accuracy {_points(row['accuracy_change'][0])} points"


def _named(rows: list[Mapping[str, Any]]) -> str:
    return "; ".join(f"`{r['recipe']}` to be {r['aim']} ({_figure(r)})" for r in rows) or "none"


def _control(row: Mapping[str, Any] | None) -> str:
    return f"{_points(row['accuracy_change'][0])} / {_cut(row['thinking_ratio'][0])}" if row else "–"


def _change(interval: Any, shown: Callable[[float], str]) -> str:
    if interval is None:
        return words.MISSING
    mean, low, high = map(shown, interval)
    return f"{mean} ({low} to {high})"


def _points(share: float) -> str:
    return words.fixed(100 * share, "+.1f")


def _cut(ratio: float) -> str:
    return f"{words.fixed(100 * (ratio - 1), '+.0f')}%"


def _share(value: Any) -> str:
    return words.with_interval(value, "share")


FIGURES: dict[str, Callable[[Sources], str]] = {"recipes.reasoning": reasoning, "recipes.verdict": verdict}
