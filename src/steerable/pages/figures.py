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

from steerable.pages.words import number, percent_tick

_NARROW = 160  # pixels: the width of the plot area in the narrowest panel, a quarter of a small laptop
_LEFT, _RIGHT = 48, 14  # pixels that labels have beside the plot area, of its own padding and a little of the panel's

MARKERS = {
    "circle": '<circle r="4"/>',
    "square": '<rect x="-3.6" y="-3.6" width="7.2" height="7.2"/>',
    "triangle": '<path d="M0,-4.8L4.6,3.6H-4.6Z"/>',
    "diamond": '<path d="M0,-5.2L5.2,0L0,5.2L-5.2,0Z"/>',
    "none": "",
}
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


def _place(x: float, y: float, drawing: str) -> str:
    """Pixels drawn around the point (x %, y % from the bottom)."""
    return f'<svg x="{x:g}%" y="{100 - y:g}%" class="at">{drawing}</svg>'


def _text(words: str, css: str, dx: float = 0, dy: float = 0) -> str:
    """A word beside the point where it is placed."""
    return f'<text x="{dx:g}" y="{dy:g}" class="{css}">{escape(words)}</text>'


def _level(css: str, at: float) -> str:
    return f'<line class="{css}" x1="0" x2="100%" y1="{100 - at:g}%" y2="{100 - at:g}%"/>'


def _whisker(x: float, point: Point, y: Scale, cap: float) -> str:
    """A point's interval as an error bar with caps; all in percent but the caps' half width in pixels."""
    if point.low is None or point.high is None:
        return ""
    low, high = y(point.low), y(point.high)
    stem = f'<line x1="{x:g}%" x2="{x:g}%" y1="{100 - low:g}%" y2="{100 - high:g}%"/>'
    caps = "".join(_place(x, end, f'<line x1="{-cap:g}" x2="{cap:g}"/>') for end in (low, high))
    return f'<g class="whisker">{stem}{caps}</g>'


def _width(words: str) -> float:
    """Pixels that a text takes at most, at a font size of 12 pixels; of letters and digits of common fonts."""
    return 12 * sum(0.35 if char in ".,:" else 0.95 if char in "%+−×mwMW" else 0.65 for char in words)


def _left(y: Scale) -> float:
    """Pixels that the labels of the y axis take."""
    return max(_LEFT, *(_width(y.write(tick)) + 9 for tick in y.ticks))


def _padding(left: float, labels: Sequence[tuple[float, str]]) -> str:
    """The style of a plot whose labels, of which some stand above or below it, need more room beside it than most."""
    left = max([left, *(_width(words) / 2 - at / 100 * _NARROW for at, words in labels)])
    right = max([_RIGHT, *(_width(words) / 2 - (1 - at / 100) * _NARROW for at, words in labels)])
    wider = [f"padding-left:{math.ceil(left)}px"] * (left > _LEFT)
    wider += [f"padding-right:{math.ceil(right)}px"] * (right > _RIGHT)
    return f' style="{";".join(wider)}"' if wider else ""


def _thinned(labels: Sequence[tuple[float, str]], left: float) -> Sequence[tuple[float, str]]:
    """Every label, every second one, ..., so that none stands upon its neighbour in a narrow panel."""
    room = max((_width(words) + 3 for _, words in labels), default=0)
    least = min((b - a for (a, _), (b, _) in pairwise(labels)), default=100.0) / 100 * (_NARROW - (left - _LEFT))
    return labels[:: max(1, math.ceil(room / max(least, 1.0)))]


def _frame(
    parts: Sequence[str],
    y: Scale,
    x_labels: Sequence[tuple[float, str]],
    *,
    label: str,
    height: int,
    below: str | None,
    above: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Axes, grid and drawing. `x_labels`, and those `above` the plot, are (percent, words); `below` is a title under
    the former, or "" to leave the room of one; `label` is what a screen reader says."""
    axes = []
    for tick in y.ticks:
        axes.append(_level("axis" if tick == 0 else "gridline", y(tick)))
        axes.append(_place(0, y(tick), _text(y.write(tick), "tick end", dx=-8, dy=4)))
    axes += [_place(at, 0, _text(words, "tick middle", dy=19)) for at, words in x_labels]
    axes += [_place(50, 0, _text(below, "tick middle quiet", dy=37))] if below else []
    css = "plot" if below is None else "plot titled"
    return Markup(
        f'<div class="{css}"{_padding(_left(y), [*x_labels, *above])}><svg role="img" aria-label="{escape(label)}" '
        f'height="{height}">{"".join(axes)}{"".join(parts)}</svg></div>'
    )


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
    parts = [] if reference is None else [_level("reference", y(reference))]
    x_labels = []
    slot = 100 / max(len(groups), 1)
    longest = 14 if len(groups) < 3 else 9  # characters of a name below bars
    for index, (words, below, members) in enumerate(groups):
        sizes = [slot * (0.2 if "thin" in css.split() else 0.36) for css, _ in members]
        middle = slot * (index + 0.5)
        left = middle - sum(sizes) / 2
        x_labels.append((middle, words if len(words) <= longest else f"{words[: longest - 1]}…"))
        parts.append(_place(middle, 0, _text(below, "value middle", dy=38)))
        for (css, point), size in zip(members, sizes, strict=True):
            if not math.isfinite(point.y):
                continue
            top = y(point.y)
            parts.append(
                f'<g class="mark {css}"><title>{escape(point.tip)}</title><rect x="{left + size * 0.06:g}%" '
                f'y="{100 - top:g}%" width="{size * 0.88:g}%" height="{top:g}%" rx="1.5"/>'
                f"{_whisker(left + size / 2, point, y, cap=4)}</g>"
            )
            left += size
    below_all = "" if any(below for _, below, _ in groups) else None
    return _frame(parts, y, x_labels, label=label, height=height, below=below_all)


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
    parts = []
    if reference is not None:
        if reference.low is not None and reference.high is not None:
            top, bottom = 100 - y(reference.high), 100 - y(reference.low)
            parts.append(f'<rect class="reference-band" x="0" width="100%" y="{top:g}%" height="{bottom - top:g}%"/>')
        parts.append(_level("reference", y(reference.y)))
    above = [(x(value), words) for value, words in marked]
    for at, words in above:
        parts.append(f'<line class="marked" x1="{at:g}%" x2="{at:g}%" y1="0" y2="100%"/>')
        parts.append(_place(at, 100, _text(words, "tick middle", dy=-6)))
    for one in series:
        places = [(x(p.x), y(p.y), p) for p in one.points if math.isfinite(p.x) and math.isfinite(p.y)]
        parts.append(f'<g class="mark {one.css}">{_paths(one, places, y)}')
        for at, level, point in places:
            bar = _whisker(at, point, y, cap=3) if one.whiskers else ""
            marker = _place(at, level, f'<g class="marker">{MARKERS[one.marker]}</g>')
            parts.append(f"<g><title>{escape(point.tip or one.name)}</title>{bar}{marker}</g>")
        parts.append("</g>")
    x_labels = _thinned([(x(tick), x.write(tick)) for tick in x.ticks], _left(y))
    return _frame(parts, y, x_labels, label=label, height=height, below=x_title or None, above=above)


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
    return f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%" class="at">{drawn}</svg>'


def swatch(css: str, marker: str = "bar") -> Markup:
    """The sign of a series in a legend: a bar, or a line with its marker."""
    line = f'<path class="line" d="M0,7H22"/><g transform="translate(11,7)" class="marker">{MARKERS.get(marker)}</g>'
    drawn = '<rect x="4" y="1" width="14" height="12" rx="1.5"/>' if marker == "bar" else line
    return Markup(
        f'<svg class="swatch" width="22" height="14" aria-hidden="true"><g class="mark {css}">{drawn}</g></svg>'
    )
