"""Small figures as inline SVG.

Coordinates are percentages of the plot area; sizes of text, markers and lines are pixels. So a figure fills
any width while its text keeps its size, and one drawing serves the phone and the laptop. Colours are CSS
variables of the page, so the same drawing serves light and dark. Nothing here knows of steering.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup, escape

Format = Callable[[float], str]

_NARROW = 160  # pixels: the width of the plot area in the narrowest panel, a quarter of a small laptop
_LEFT, _RIGHT = 48, 14  # pixels that labels have beside the plot area, of its own padding and a little of the panel's

MARKERS = {
    "circle": '<circle r="4"/>',
    "square": '<rect x="-3.6" y="-3.6" width="7.2" height="7.2"/>',
    "triangle": '<path d="M0,-4.8L4.6,3.6H-4.6Z"/>',
    "diamond": '<path d="M0,-5.2L5.2,0L0,5.2L-5.2,0Z"/>',
    "none": "",
}


class Point(NamedTuple):
    """A measured value at x, with an interval or without one (`low is None`); `tip` is shown on hover."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""


class Series(NamedTuple):
    """One line or one kind of bar; `css` names its colour and dash in the style sheet."""

    name: str
    css: str
    points: Sequence[Point]
    marker: str = "circle"
    band: bool = False
    whiskers: bool = True


class Scale(NamedTuple):
    """A linear axis: data `low..high` onto 0..100 %, with ticks."""

    low: float
    high: float
    ticks: Sequence[float]

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 3)


def nice_scale(values: Sequence[float], *, floor: float | None = 0.0, ceiling: float | None = None) -> Scale:
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
    return Scale(ticks[0], max(ticks[-1], high if ceiling is not None else ticks[-1]), ticks)


def place(x: float, y: float, drawing: str) -> str:
    """Pixels drawn around the point (x %, y % from the bottom)."""
    return f'<svg x="{x:g}%" y="{100 - y:g}%" class="at">{drawing}</svg>'


def text(words: str, css: str, dx: float = 0, dy: float = 0) -> str:
    """A word beside the point where it is placed."""
    return f'<text x="{dx:g}" y="{dy:g}" class="{css}">{escape(words)}</text>'


def whisker(x: float, low: float, high: float, cap: float = 4) -> str:
    """An interval as an error bar with caps; all in percent but the caps' half width in pixels."""
    stem = f'<line x1="{x:g}%" x2="{x:g}%" y1="{100 - low:g}%" y2="{100 - high:g}%"/>'
    caps = "".join(place(x, y, f'<line x1="{-cap:g}" x2="{cap:g}"/>') for y in (low, high))
    return f'<g class="whisker">{stem}{caps}</g>'


def width(words: str, size: float = 12) -> float:
    """Pixels that a text takes at most, at a font size in pixels; of letters and digits of common fonts."""
    return size * sum(0.35 if char in ".,:" else 0.95 if char in "%+−×mwMW" else 0.65 for char in words)


def _left(y_format: Format, y: Scale) -> float:
    """Pixels that the labels of the y axis take."""
    return max(_LEFT, *(width(y_format(tick)) + 9 for tick in y.ticks))


def _padding(left: float, labels: Sequence[tuple[float, str]]) -> str:
    """The style of a plot whose labels, of which some stand above or below it, need more room beside it than most."""
    left = max([left, *(width(words) / 2 - at / 100 * _NARROW for at, words in labels)])
    right = max([_RIGHT, *(width(words) / 2 - (1 - at / 100) * _NARROW for at, words in labels)])
    wider = [f"padding-left:{math.ceil(left)}px"] * (left > _LEFT)
    wider += [f"padding-right:{math.ceil(right)}px"] * (right > _RIGHT)
    return f' style="{";".join(wider)}"' if wider else ""


def _thinned(labels: Sequence[tuple[float, str]], left: float) -> Sequence[tuple[float, str]]:
    """Every label, every second one, ..., so that none stands upon its neighbour in a narrow panel."""
    room = max((width(words) + 3 for _, words in labels), default=0)
    least = min((b - a for (a, _), (b, _) in pairwise(labels)), default=100.0) / 100 * (_NARROW - (left - _LEFT))
    return labels[:: max(1, math.ceil(room / max(least, 1.0)))]


def frame(
    drawing: str,
    y: Scale,
    x_labels: Sequence[tuple[float, str]],
    y_format: Format,
    *,
    label: str,
    height: int,
    x_title: str = "",
    two_lines: bool = False,
    above: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Axes, grid and drawing. `x_labels`, and those `above` the plot, are (percent, words); `label` is what a screen
    reader says."""
    parts = []
    for tick in y.ticks:
        at = y(tick)
        css = "axis" if tick == 0 else "gridline"
        parts.append(f'<line class="{css}" x1="0" x2="100%" y1="{100 - at:g}%" y2="{100 - at:g}%"/>')
        parts.append(place(0, at, text(y_format(tick), "tick end", dx=-8, dy=4)))
    parts += [place(at, 0, text(words, "tick middle", dy=19)) for at, words in x_labels]
    if x_title:
        parts.append(place(50, 0, text(x_title, "tick middle quiet", dy=37)))
    css = "plot titled" if x_title or two_lines else "plot"
    style = _padding(_left(y_format, y), [*x_labels, *above])
    return Markup(
        f'<div class="{css}"{style}><svg role="img" aria-label="{escape(label)}" height="{height}">'
        f"{''.join(parts)}{drawing}</svg></div>"
    )


def bars(
    groups: Sequence[tuple[str, str, Sequence[tuple[str, Point]]]],
    y: Scale,
    y_format: Format,
    *,
    label: str,
    height: int = 200,
    reference: float | None = None,
) -> Markup:
    """Groups of vertical bars with error bars.

    A group is (words below it, a second line below, bars); a bar is (CSS classes, point). Bars stand close
    inside a group; a thin bar has the class `thin`. `reference` draws one dashed level across the plot.
    """
    parts, x_labels = [], []
    slot = 100 / max(len(groups), 1)
    longest = 14 if len(groups) < 3 else 9  # characters of a name below bars
    if reference is not None:
        at = 100 - y(reference)
        parts.append(f'<line class="reference" x1="0" x2="100%" y1="{at:g}%" y2="{at:g}%"/>')
    for index, (words, below, members) in enumerate(groups):
        sizes = [0.2 if "thin" in css.split() else 0.36 for css, _ in members]
        left = slot * (index + 0.5 - sum(sizes) / 2)
        middle = slot * (index + 0.5)
        x_labels.append((middle, words if len(words) <= longest else f"{words[: longest - 1]}…"))
        parts.append(place(middle, 0, text(below, "value middle", dy=38)))
        for (css, point), size in zip(members, sizes, strict=True):
            if not math.isfinite(point.y):
                continue
            span = slot * size
            middle, top = left + span / 2, y(point.y)
            parts.append(f'<g class="mark {css}"><title>{escape(point.tip)}</title>')
            parts.append(
                f'<rect x="{left + span * 0.06:g}%" y="{100 - top:g}%" width="{span * 0.88:g}%" '
                f'height="{top:g}%" rx="1.5"/>'
            )
            if point.low is not None and point.high is not None:
                parts.append(whisker(middle, y(point.low), y(point.high)))
            parts.append("</g>")
            left += span
    return frame(
        "".join(parts),
        y,
        x_labels,
        y_format,
        label=label,
        height=height,
        two_lines=any(below for _, below, _ in groups),
    )


def curves(
    series: Sequence[Series],
    x: Scale,
    y: Scale,
    x_format: Format,
    y_format: Format,
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
    parts = []
    if reference is not None:
        at = 100 - y(reference.y)
        if reference.low is not None and reference.high is not None:
            top, bottom = 100 - y(reference.high), 100 - y(reference.low)
            parts.append(f'<rect class="reference-band" x="0" width="100%" y="{top:g}%" height="{bottom - top:g}%"/>')
        parts.append(f'<line class="reference" x1="0" x2="100%" y1="{at:g}%" y2="{at:g}%"/>')
    for value, words in marked:
        at = x(value)
        parts.append(f'<line class="marked" x1="{at:g}%" x2="{at:g}%" y1="0" y2="100%"/>')
        parts.append(place(at, 100, text(words, "tick middle", dy=-6)))
    for one in series:
        places = [(x(p.x), y(p.y), p) for p in one.points if math.isfinite(p.x) and math.isfinite(p.y)]
        parts.append(f'<g class="mark {one.css}">')
        parts.append(_paths(one, places, y))
        for at, level, point in places:
            parts.append(f"<g><title>{escape(point.tip or one.name)}</title>")
            if one.whiskers and point.low is not None and point.high is not None:
                parts.append(whisker(at, y(point.low), y(point.high), cap=3))
            parts.append(place(at, level, f'<g class="marker">{MARKERS[one.marker]}</g>') + "</g>")
        parts.append("</g>")
    x_labels = _thinned([(x(tick), x_format(tick)) for tick in x.ticks], _left(y_format, y))
    above = [(x(value), words) for value, words in marked]
    return frame("".join(parts), y, x_labels, y_format, label=label, height=height, x_title=x_title, above=above)


def _paths(one: Series, places: Sequence[tuple[float, float, Point]], y: Scale) -> str:
    """The line and the band, in a stretched 100 x 100 box, because paths take no percentages."""
    if len(places) < 2:
        return ""
    line = "L".join(f"{at:g},{100 - level:g}" for at, level, _ in places)
    drawn = f'<path class="line" d="M{line}"/>'
    edges = [(at, p.low, p.high) for at, _, p in places if p.low is not None and p.high is not None]
    if one.band and len(edges) > 1:
        upper = [f"{at:g},{100 - y(high):g}" for at, _, high in edges]
        lower = [f"{at:g},{100 - y(low):g}" for at, low, _ in reversed(edges)]
        drawn = f'<path class="band" d="M{"L".join(upper + lower)}Z"/>' + drawn
    stretched = 'viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%"'
    return f'<svg {stretched} class="at">{drawn}</svg>'


def swatch(css: str, marker: str = "bar") -> Markup:
    """The sign of a series in a legend: a bar, or a line with its marker."""
    if marker == "bar":
        inside = '<rect x="4" y="1" width="14" height="12" rx="1.5"/>'
    else:
        inside = '<path class="line" d="M0,7H22"/>'
        inside += f'<g transform="translate(11,7)" class="marker">{MARKERS[marker]}</g>'
    size = 'width="22" height="14" aria-hidden="true"'
    return Markup(f'<svg class="swatch" {size}><g class="mark {css}">{inside}</g></svg>')
