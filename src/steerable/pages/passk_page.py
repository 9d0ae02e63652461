"""passk.json as one HTML page, and as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from steerable.pages import templates, words
from steerable.pages.cells import Interval
from steerable.pages.figures import Point, Scale, Series, curves, nice_scale
from steerable.store.plurals import plural

Result = Mapping[str, Any]
_HUES = ("hue-2", "hue-5", "hue-3", "hue-4", "hue-0", "hue-1")
_MARKERS = ("circle", "square", "triangle", "diamond")
_BASE = "base"


class Table(NamedTuple):
    """Column names and rows of words; the first cell of a row is its name."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def render(result: Result) -> str:
    """Draw the content of passk.json as one page that needs no other file; the same input gives the same bytes."""
    arms, settings = result["arms"], result["settings"]
    tasks = len(arms[_BASE]["counts"])
    return templates.render(
        "passk.html",
        model=result["model"],
        facts=[
            f"{tasks} {plural(tasks, 'task')} of {settings['tasks']}",
            f"{settings['samples']} {plural(settings['samples'], 'sample')} each",
            _decoding(settings),
        ],
        findings=findings(result),
        legend=[(name, *_sign(result, name)) for name in arms],
        curves=_curves(result),
        differences=_differences(result),
        pass_table=pass_table(result),
        difference_table=difference_table(result),
        samples=settings["samples"],
        solved=solved_table(result),
        surprise=perplexity_table(result),
        form=_form_table(result),
        record=Table(["", ""], list(words.flat({**settings, "versions": result["versions"]}))),
    )


def tables(result: Result) -> list[Any]:
    """The same numbers as tables of rich, for `print`."""
    from rich.table import Table as Printed

    found = []
    surprise = perplexity_table(result)
    for title, data in (
        ("pass@k", _turned(pass_table(result))),
        ("difference to the base, in points", _turned(difference_table(result))),
        ("tasks solved at least once", solved_table(result)),
        ("perplexity under the base", Table(surprise.head[:4], [row[:4] for row in surprise.rows])),
    ):
        if data is not None:
            printed = Printed(*data.head, title=title, title_justify="left")
            for row in data.rows:
                printed.add_row(*row)
            found.append(printed)
    return found


def _turned(data: Table | None) -> Table | None:
    """Rows for columns: a terminal is narrow, and there are more k than arms."""
    if data is None:
        return None
    head, *rows = zip(data.head, *data.rows, strict=True)
    return Table(head, rows)


def findings(result: Result) -> list[str]:
    """One sentence an arm: how its curve stands to the base's, and what each solved that the other did not."""
    found = []
    for name, arm in _trained(result):
        beside = arm["against_base"]
        only = f"by {name} alone: {len(beside['created'])}, by the base alone: {len(beside['lost'])}"
        found.append(f"{beside['crossing']['sentence']}. Tasks solved at least once {only}.")
    return found


def pass_table(result: Result) -> Table:
    ks = result["settings"]["ks"]
    rows = [[name, *(_percent(arm["passk"][str(k)]) for k in ks)] for name, arm in result["arms"].items()]
    return Table(["", *(f"k = {k}" for k in ks)], rows)


def difference_table(result: Result) -> Table | None:
    ks = result["settings"]["ks"]
    rows = [[name, *(_points(arm["against_base"]["difference"][str(k)]) for k in ks)] for name, arm in _trained(result)]
    return Table(["", *(f"k = {k}" for k in ks)], rows) if rows else None


def solved_table(result: Result) -> Table | None:
    rows = [
        [name, *(str(n) for n in (len(b["created"]), len(b["lost"]), b["both"], b["neither"]))]
        for name, arm in _trained(result)
        for b in [arm["against_base"]]
    ]
    return Table(["", "by the arm alone", "by the base alone", "by both", "by neither"], rows) if rows else None


def perplexity_table(result: Result) -> Table:
    rows = []
    for name, arm in result["arms"].items():
        row = [name, str(arm["solved"])]
        for which in ("correct", "all"):
            row.append(_plain(arm["perplexity"][which]))
            row.append("" if name == _BASE else _plain(arm["against_base"]["perplexity_ratio"][which]))
        row.append("" if name == _BASE else _plain(arm["against_base"]["perplexity_created"]))
        rows.append(row)
    head = ["", "tasks solved", "right solutions", "× the base's", "all solutions", "× the base's"]
    return Table([*head, "right ones of tasks that the base never solved"], rows)


def _form_table(result: Result) -> Table:
    rows = [
        [
            name,
            _percent(arm["accuracy"]),
            _plain(arm["tokens"]),
            _percent(arm["loops"]),
            _percent(arm["unclosed"]),
        ]
        for name, arm in result["arms"].items()
    ]
    return Table(["", "right", "tokens a chain", "repeated 8-grams", "think block never closed"], rows)


def _trained(result: Result) -> list[tuple[str, Any]]:
    return [(name, arm) for name, arm in result["arms"].items() if name != _BASE]


def _decoding(settings: Mapping[str, Any]) -> str:
    found = settings["decoding"]
    said = [f"temperature {words.number(found['temperature'])}"]
    said += [f"top-p {words.number(found['top_p'])}"] if found["top_p"] < 1 else []
    said += [f"top-k {found['top_k']}"] if found["top_k"] else []
    return ", ".join(said)


def _sign(result: Result, name: str) -> tuple[str, str]:
    """CSS classes and marker of an arm."""
    if name == _BASE:
        return "unsteered", "circle"
    place = [n for n, _ in _trained(result)].index(name)
    return f"slim {_HUES[place % len(_HUES)]}", _MARKERS[(place + 1) % len(_MARKERS)]


def _curves(result: Result) -> Markup:
    series, highest = [], 0.0
    for name, arm in result["arms"].items():
        css, marker = _sign(result, name)
        points = [_point(k, arm["passk"][str(k)], name) for k in result["settings"]["ks"]]
        highest = max([highest, *(p.high or 0.0 for p in points)])
        series.append(Series(name, css, points, marker, band=True, whiskers=False))
    y = nice_scale([highest], ceiling=1.0)
    return curves(
        series, _log_scale(result), y, _power, words.percent_tick, label="pass@k against k", x_title="k", height=280
    )


def _differences(result: Result) -> Markup | None:
    series, ends = [], [0.0]
    for name, arm in _trained(result):
        css, marker = _sign(result, name)
        gaps = arm["against_base"]["difference"]
        points = [_point(k, gaps[str(k)], f"{name} - base") for k in result["settings"]["ks"]]
        ends += [end for p in points for end in (p.low, p.high) if end is not None]
        series.append(Series(name, css, points, marker, band=True, whiskers=False))
    if not series:
        return None
    label = "Difference of pass@k to the base against k"
    y = nice_scale(ends, floor=None)
    return curves(series, _log_scale(result), y, _power, words.percent_tick, label=label, x_title="k", height=280)


def _point(k: int, read: Sequence[float], name: str) -> Point:
    tip = f"{name}, k = {k}: {words.with_interval(Interval(*read), 'percent')}"
    return Point(math.log2(k), read[0], read[1], read[2], tip)


def _log_scale(result: Result) -> Scale:
    """log2 k with a margin for the outermost markers; every second tick where they crowd."""
    places = [math.log2(k) for k in result["settings"]["ks"]]
    pad = 0.05 * ((places[-1] - places[0]) or 1)
    return Scale(places[0] - pad, places[-1] + pad, places if len(places) < 8 else places[::2])


def _power(place: float) -> str:
    return str(round(2**place))


def _percent(read: Sequence[float] | None) -> str:
    return words.with_interval(None if read is None else Interval(*read), "percent")


def _points(read: Sequence[float]) -> str:
    middle, low, high = (f"{100 * x:+.1f}".replace("-", words.MINUS) for x in read)
    return f"{middle} ({low} to {high})"


def _plain(read: Sequence[float] | None) -> str:
    return words.with_interval(None if read is None else Interval(*read), "number")
