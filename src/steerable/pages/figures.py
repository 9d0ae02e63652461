"""Small figures as inline SVG: scales, and where labels find room; `templates/figure.html` draws.

Coordinates are percentages of the plot area; sizes of text, markers and lines are pixels. So a figure fills
any width while its text keeps its size, and one drawing serves the phone and the laptop. Colours are CSS
variables of the page, so the same drawing serves light and dark. Nothing here knows of steering.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from markupsafe import Markup

from steerable.pages.html import render
from steerable.pages.words import number, percent_tick

_NARROW = 160  # pixels: the width of the plot area in the narrowest panel, a quarter of a small laptop
_LEFT, _RIGHT = 48, 14  # pixels that labels have beside the plot area, of its own padding and a little of the panel's
SHAPES = ("circle", "square", "triangle", "diamond")


class Panel(NamedTuple):
    """One small figure with its title and a line below it; without a figure it reads "not measured"."""

    title: str
    figure: Markup | None
    note: str = ""
    hue: str = ""


class Point(NamedTuple):
    """A measured value at x, with an interval or without one (`low is None`); `tip` is shown on hover."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""


class Series(NamedTuple):
    """One line; `css` names its colour and dash in the style sheet."""

    name: str
    css: str
    points: Sequence[Point]
    marker: str = "circle"
    band: bool = False
    whiskers: bool = True


class Scale(NamedTuple):
    """A linear axis: data `low..high` onto 0..100 %, with ticks and the way in which they are written."""

    low: float
    high: float
    ticks: Sequence[float]
    write: Callable[[float], str] = number

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 3)


def nice_scale(
    values: Sequence[float],
    write: Callable[[float], str] = number,
    *,
    floor: float | None = 0.0,
    ceiling: float | None = None,
) -> Scale:
    """An axis with three to six round ticks that covers the finite values, from `floor` when it is given."""
    values = [value for value in values if math.isfinite(value)]
    low = min(values, default=0.0) if floor is None else min(floor, *values, floor)
    high = max(values, default=1.0)
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if ceiling is not None:
        last = min(last, math.floor(ceiling / step + 1e-9))
    ticks = [float(f"{i * step:.12g}") for i in range(first, last + 1)]
    return Scale(ticks[0], max(ticks[-1], high if ceiling is not None else ticks[-1]), ticks, write)


def share_scale(values: Sequence[float]) -> Scale:
    """An axis for shares, in per cent and never beyond 100 %."""
    return nice_scale(values, percent_tick, ceiling=1.0)


def step_scale(count: int, write: Callable[[float], str] = number) -> Scale:
    """An axis over the places 0 to count - 1 of a list, about eight of them with a tick."""
    return Scale(-0.4, count - 0.6, range(0, count, max(1, round(count / 8))), write)


def bars(
    groups: Sequence[tuple[str, str, Sequence[tuple[str, Point]]]],
    y: Scale,
    *,
    label: str,
    height: int = 200,
    reference: float | None = None,
) -> Markup:
    """Groups of vertical bars with error bars.

    A group is (words below it, a second line below, bars); a bar is (CSS classes, point). Bars stand close
    inside a group; a thin bar has the class `thin`. `reference` draws one dashed level across the plot.
    """
    x_labels, drawn = [], []
    slot = 100 / max(len(groups), 1)
    longest = 14 if len(groups) < 3 else 9  # characters of a name below bars
    for index, (words, below, members) in enumerate(groups):
        sizes = [slot * (0.2 if "thin" in css.split() else 0.36) for css, _ in members]
        middle = slot * (index + 0.5)
        lefts = [middle - sum(sizes) / 2 + sum(sizes[:i]) for i in range(len(sizes))]
        marks = [(css, left, size, _mark(p, y)) for (css, p), left, size in zip(members, lefts, sizes, strict=True)]
        x_labels.append((middle, words if len(words) <= longest else f"{words[: longest - 1]}…"))
        drawn.append((middle, below, marks))
    level = None if reference is None else _mark(Point(0, reference), y)
    below_all = "" if any(below for _, below, _ in groups) else None
    return _figure(x_labels, y, label=label, height=height, reference=level, below=below_all, groups=drawn)


def curves(
    series: Sequence[Series],
    x: Scale,
    y: Scale,
    *,
    label: str,
    height: int = 200,
    reference: Point | None = None,
    marked: Sequence[tuple[float, str]] = (),
    x_title: str = "",
) -> Markup:
    """Lines with markers, error bars and bands; later series are drawn over earlier ones.

    `reference` is one level across the plot, its interval a band; `marked` are (x, words) vertical rules.
    """
    lines = [(one, [_mark(p, y, x) for p in one.points if math.isfinite(p.x) and math.isfinite(p.y)]) for one in series]
    labels = [(x(tick), x.write(tick)) for tick in x.ticks]
    # Every label, every second one, ..., so that none stands upon its neighbour in a narrow panel.
    room = max((_width(words) + 3 for _, words in labels), default=0)
    least = min((b - a for (a, _), (b, _) in pairwise(labels)), default=100.0) / 100
    labels = labels[:: max(1, math.ceil(room / max(least * (_NARROW - (_left(y) - _LEFT)), 1.0)))]
    above = [(x(value), words) for value, words in marked]
    level = None if reference is None else _mark(reference, y)
    return _figure(
        labels, y, label=label, height=height, reference=level, above=above, below=x_title or None, lines=lines
    )


def _mark(point: Point, y: Scale, x: Scale | None = None) -> Point:
    """The point with its places in the plot, in per cent."""
    low, high = (None if end is None else y(end) for end in (point.low, point.high))
    return Point(x(point.x) if x else 0, y(point.y), low, high, point.tip)


def _width(words: str) -> float:
    """Pixels that a text takes at most, at a font size of 12 pixels; of letters and digits of common fonts."""
    return 12 * sum(0.35 if char in ".,:" else 0.95 if char in "%+−×mwMW" else 0.65 for char in words)


def _left(y: Scale) -> float:
    """Pixels that the labels of the y axis take."""
    return max(_LEFT, *(_width(y.write(tick)) + 9 for tick in y.ticks))


def _figure(
    x_labels: Sequence[tuple[float, str]], y: Scale, above: Sequence[tuple[float, str]] = (), **content: Any
) -> Markup:
    """The drawing, with padding where labels below and above it need more room beside it than most."""
    labels = [*x_labels, *above]
    left = max([_left(y), *(_width(words) / 2 - at / 100 * _NARROW for at, words in labels)])
    right = max([_RIGHT, *(_width(words) / 2 - (1 - at / 100) * _NARROW for at, words in labels)])
    wider = [f"padding-left:{math.ceil(left)}px"] * (left > _LEFT)
    wider += [f"padding-right:{math.ceil(right)}px"] * (right > _RIGHT)
    y_labels = [(y(tick), y.write(tick), tick) for tick in y.ticks]
    drawing = {"groups": (), "lines": (), "above": above, "padding": ";".join(wider)} | content
    return Markup(render("figure.html", x_labels=x_labels, y_labels=y_labels, **drawing))
