"""audit.json as one HTML page, as a table for the terminal, and as a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerable.pages import words
from steerable.pages.figures import Panel, Point, Series, curves, nice_scale
from steerable.pages.html import render as render_template

Result = Mapping[str, Any]
_MARKS = {"pass": "✓ passed", "warn": "! doubtful", "fail": "✗ failed", "shown": "shown", "not checked": "not checked"}


def sentence(result: Result) -> str:
    """The verdict and its reasons."""
    return f"{result['file']} is {result['verdict']}: {'; '.join(result['reasons']) or 'nothing could be checked'}."


def tables(result: Result) -> list[Any]:
    """The checks, for a terminal."""
    rows = ([c["title"], _MARKS[c["status"]], c["figure"]] for c in result["checks"])
    return [words.printed("receipts", ["", "", ""], rows)]


def render(result: Result) -> str:
    """Draw the content of audit.json as one page that needs no other file; equal input gives equal bytes."""
    return render_template(
        "audit.html", result=result, marks=_MARKS, sentence=sentence(result), panels=_panels(result),
        css={"pass": "right", "fail": "wrong"},
    )  # fmt: skip


def _panels(result: Result) -> list[Panel]:
    values = {check["name"]: check["values"] for check in result["checks"]}
    effects = values["linearity"].get("effects", {})
    line = [Point(float(s), *read) for s, interval in effects.items() if (read := words.Interval.of(interval))]
    slope = values["linearity"].get("coefficient")
    fitted = [Point(p.x, slope[0] * p.x) for p in (line[0], line[-1])] if slope and line else []
    control = [(name, values["effect"].get(name)) for name in ("random", "shuffled")]
    at = [
        Series(f"{name} directions", f"slim control-{name}", [Point(result["strength"], *read)], "square")
        for name, interval in control
        if (read := words.Interval.of(interval))
    ]
    return [
        _panel("Effect against strength", [Series("the line", "slim unsteered", fitted, "none"),
                                           Series("the vector", "hue-any", line), *at], "strength"),
        _panel("Margin over turns", [_series(values["turns"].get("margins"))], "turns before"),
        _panel("Projection over a chain, steered less unsteered", [_series(values["drift"].get("parts"))], "third"),
    ]  # fmt: skip


def _series(values: list[float] | None) -> Series:
    return Series("", "hue-any", [Point(float(i), v) for i, v in enumerate(values or ())])


def _panel(title: str, series: list[Series], x_title: str) -> Panel:
    points = [point for one in series for point in one.points]
    if not points:
        return Panel(title, None)
    xs = nice_scale([p.x for p in points], floor=None if min(p.x for p in points) < 0 else 0.0)
    ys = nice_scale([0.0, *(end for p in points for end in (p.y, p.low, p.high) if end is not None)], floor=None)
    return Panel(title, curves(series, xs, ys, label=title, x_title=x_title, height=220))
