"""passk.json as one HTML page, and as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from steerable.pages import words
from steerable.pages.cells import metrics_of
from steerable.pages.figures import SHAPES, Point, Scale, Series, curves, nice_scale, share_scale
from steerable.pages.html import render as render_template
from steerable.pages.words import Interval

Result = Mapping[str, Any]
_HUES = ("hue-2", "hue-5", "hue-3", "hue-4", "hue-0", "hue-1")
_BASE = "base"


def render(result: Result) -> str:
    """Draw the content of passk.json as one page that needs no other file; the same input gives the same bytes."""
    arms, trained = result["arms"], _trained(result)
    signs = {_BASE: ("unsteered", "circle")}
    for place, name in enumerate(trained):
        signs[name] = f"slim {_HUES[place % len(_HUES)]}", SHAPES[(place + 1) % len(SHAPES)]
    gaps = {f"{name} - base": arm["against_base"]["difference"] for name, arm in trained.items()}
    label = "Difference of pass@k to the base against k"
    return render_template(
        "passk.html",
        result=result,
        trained=trained,
        heads=["", *(f"k = {k}" for k in result["settings"]["ks"])],
        metrics=metrics_of(result, arms.values()),
        findings=findings(result),
        legend=[(name, *sign) for name, sign in signs.items()],
        curves=_curves(result, {name: arm["passk"] for name, arm in arms.items()}, signs, "pass@k against k"),
        differences=_curves(result, gaps, signs, label, floor=None) if trained else None,
    )


def tables(result: Result) -> list[Any]:
    """The same numbers as tables of rich, for a terminal; there are more k than arms, so each k has a row."""
    arms, trained, ks = result["arms"], _trained(result), result["settings"]["ks"]
    passes = [[f"k = {k}", *(_share(arm["passk"][str(k)]) for arm in arms.values())] for k in ks]
    surprise = [[name, str(arm["solved"]), _ratio(arm["perplexity"]["correct"])] for name, arm in arms.items()]
    for row, arm in zip(surprise, arms.values(), strict=True):
        row.append(_ratio(arm["against_base"]["perplexity_ratio"]["correct"]) if "against_base" in arm else "")
    made = [words.printed("pass@k", ["", *arms], passes)]
    if trained:
        beside = {name: arm["against_base"] for name, arm in trained.items()}
        gaps = [
            [f"k = {k}", *(words.change(b["difference"][str(k)], "share", "") for b in beside.values())] for k in ks
        ]
        counts = [(n, len(b["created"]), len(b["lost"]), b["both"], b["neither"]) for n, b in beside.items()]
        head = ["", "by the arm alone", "by the base alone", "by both", "by neither"]
        made.append(words.printed("difference to the base, in points", ["", *trained], gaps))
        made.append(words.printed("tasks solved at least once", head, (list(map(str, row)) for row in counts)))
    head = ["", "tasks solved", "right solutions", "× the base's"]
    return [*made, words.printed("perplexity under the base", head, surprise)]


_share = partial(words.with_interval, unit="share")
_ratio = partial(words.with_interval, unit="ratio")


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


def _curves(
    result: Result,
    by_arm: Mapping[str, Mapping[str, Sequence[float]]],
    signs: Mapping[str, tuple[str, str]],
    label: str,
    floor: float | None = 0.0,
) -> Markup:
    """One line with its band an arm, against log2 k with a margin for the outermost markers."""
    series, ends = [], [0.0]
    for name, values in by_arm.items():
        reads = {k: read for k in result["settings"]["ks"] if (read := Interval.of(values[str(k)]))}
        ends += [end for read in reads.values() for end in (read.low, read.high)]
        points = [
            Point(math.log2(k), *read, f"{name}, k = {k}: {words.with_interval(read, 'share')}")
            for k, read in reads.items()
        ]
        css, marker = signs[name.removesuffix(" - base")]
        series.append(Series(name, css, points, marker, band=True, whiskers=False))
    places = [math.log2(k) for k in result["settings"]["ks"]]
    pad = 0.05 * ((places[-1] - places[0]) or 1)
    ticks = places if len(places) < 8 else places[::2]
    x = Scale(places[0] - pad, places[-1] + pad, ticks, lambda place: str(round(2**place)))
    y = share_scale(ends) if floor is not None else nice_scale(ends, words.percent_tick, floor=None)
    return curves(series, x, y, label=label, x_title="k", height=280)
