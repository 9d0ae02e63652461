"""passk.json as one HTML page, and as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from steerable.pages import words
from steerable.pages.cells import metrics_of
from steerable.pages.figures import SHAPES, Point, Scale, Series, curves, nice_scale, share_scale
from steerable.pages.html import render as render_template
from steerable.pages.words import Interval, Table

Result = Mapping[str, Any]
_HUES = ("hue-2", "hue-5", "hue-3", "hue-4", "hue-0", "hue-1")
_BASE = "base"


def render(result: Result) -> str:
    """Draw the content of passk.json as one page that needs no other file; the same input gives the same bytes."""
    arms, trained = result["arms"], _trained(result)
    signs = {_BASE: ("unsteered", "circle")}
    for place, name in enumerate(trained):
        signs[name] = f"slim {_HUES[place % len(_HUES)]}", SHAPES[(place + 1) % len(SHAPES)]
    return render_template(
        "passk.html",
        model=result["model"],
        settings=result["settings"],
        versions=result["versions"],
        arms=arms,
        metrics=metrics_of(result, arms.values()),
        tasks=len(arms[_BASE]["counts"]),
        findings=findings(result),
        legend=[(name, *sign) for name, sign in signs.items()],
        curves=_curves(result, {name: arm["passk"] for name, arm in arms.items()}, signs, "pass@k against k"),
        differences=_curves(
            result,
            {name: arm["against_base"]["difference"] for name, arm in trained.items()},
            signs,
            "Difference of pass@k to the base against k",
            floor=None,
            against=" - base",
        ),
        pass_table=_pass_table(result),
        difference_table=_difference_table(result),
        solved=_solved_table(result),
        surprise=_perplexity_table(result),
    )


def tables(result: Result) -> list[Any]:
    """The same numbers as tables of rich, for a terminal; where there are more k than arms, with a row for each k."""
    surprise = _perplexity_table(result)
    titled = {
        "pass@k": _turned(_pass_table(result)),
        "difference to the base, in points": _turned(_difference_table(result)),
        "tasks solved at least once": _solved_table(result),
        "perplexity under the base": Table(surprise.head[:4], [row[:4] for row in surprise.rows]),
    }
    return [words.printed(table, title) for title, table in titled.items() if table.rows]


def findings(result: Result) -> list[str]:
    """One sentence an arm: how its curve stands to the base's, and what each solved that the other did not."""
    sentences = []
    for name, arm in _trained(result).items():
        beside = arm["against_base"]
        only = f"by {name} alone: {len(beside['created'])}, by the base alone: {len(beside['lost'])}"
        sentences.append(f"{beside['crossing']['sentence']}. Tasks solved at least once {only}.")
    return sentences


def _trained(result: Result) -> dict[str, Any]:
    return {name: arm for name, arm in result["arms"].items() if name != _BASE}


def _turned(table: Table) -> Table:
    head, *rows = zip(table.head, *table.rows, strict=True)
    return Table(head, rows if table.rows else [])


def _by_k(result: Result, by_arm: Mapping[str, Mapping[str, Any]], write: Callable[[Any], str]) -> Table:
    ks = result["settings"]["ks"]
    rows = [[name, *(write(values[str(k)]) for k in ks)] for name, values in by_arm.items()]
    return Table(["", *(f"k = {k}" for k in ks)], rows)


def _pass_table(result: Result) -> Table:
    by_arm = {name: arm["passk"] for name, arm in result["arms"].items()}
    return _by_k(result, by_arm, lambda read: words.with_interval(read, "share"))


def _difference_table(result: Result) -> Table:
    by_arm = {name: arm["against_base"]["difference"] for name, arm in _trained(result).items()}
    return _by_k(result, by_arm, lambda read: words.change(read, "share", points=""))


def _solved_table(result: Result) -> Table:
    rows = []
    for name, arm in _trained(result).items():
        beside = arm["against_base"]
        counts = (len(beside["created"]), len(beside["lost"]), beside["both"], beside["neither"])
        rows.append([name, *map(str, counts)])
    return Table(["", "by the arm alone", "by the base alone", "by both", "by neither"], rows)


def _perplexity_table(result: Result) -> Table:
    rows = []
    for name, arm in result["arms"].items():
        beside = arm.get("against_base")
        row = [name, str(arm["solved"])]
        for which in ("correct", "all"):
            row.append(words.with_interval(arm["perplexity"][which], "ratio"))
            row.append(words.with_interval(beside["perplexity_ratio"][which], "ratio") if beside else "")
        rows.append([*row, words.with_interval(beside["perplexity_created"], "ratio") if beside else ""])
    head = ["", "tasks solved", "right solutions", "× the base's", "all solutions", "× the base's"]
    return Table([*head, "right ones of tasks that the base never solved"], rows)


def _curves(
    result: Result,
    by_arm: Mapping[str, Mapping[str, Sequence[float]]],
    signs: Mapping[str, tuple[str, str]],
    label: str,
    floor: float | None = 0.0,
    against: str = "",
) -> Markup | None:
    """One line with its band an arm, against log2 k with a margin for the outermost markers."""
    series, ends = [], [0.0]
    for name, values in by_arm.items():
        points = []
        for k in result["settings"]["ks"]:
            read = Interval(*values[str(k)])
            points.append(Point(math.log2(k), *read, f"{name}{against}, k = {k}: {words.with_interval(read, 'share')}"))
            ends += [read.low, read.high]
        series.append(Series(name, signs[name][0], points, signs[name][1], band=True, whiskers=False))
    if not series:
        return None
    places = [math.log2(k) for k in result["settings"]["ks"]]
    pad = 0.05 * ((places[-1] - places[0]) or 1)
    ticks = places if len(places) < 8 else places[::2]
    x = Scale(places[0] - pad, places[-1] + pad, ticks, lambda place: str(round(2**place)))
    y = share_scale(ends) if floor is not None else nice_scale(ends, words.percent_tick, floor=None)
    return curves(series, x, y, label=label, x_title="k", height=280)
