"""The figures of the report: each is a list of panels, one a behaviour or one a metric."""

from __future__ import annotations

from typing import Any, NamedTuple

from markupsafe import Markup

from steerable.pages import words
from steerable.pages.cells import (
    CONTROLS,
    Cell,
    Interval,
    Setting,
    doses,
    extremes,
    main_setting,
    measured,
    settings,
    unsteered,
)
from steerable.pages.figures import Point, Scale, Series, bars, curves, nice_scale

Report = dict[str, Any]
Group = tuple[str, str, list[tuple[str, Point]]]

METRICS = {  # name in a cell -> title, style, what it is
    "accuracy": ("Accuracy", "percent", "share of right answers, by the task's own scorer"),
    "loops": ("Loops", "percent", "share of repeated 8-grams in the thinking tokens"),
    "tokens": ("Length", "number", "new tokens a chain"),
    "unclosed": ("Unclosed chains", "percent", "share of chains that never end their thinking"),
    "kl": ("Divergence", "number", "mean KL to unsteered, nats a token"),
}
SHAPES = ("circle", "square", "triangle", "diamond")
# The reference (patching for real) is drawn last, over the cheap metrics.
METHODS = (("fisher", "triangle", "m-2"), ("exact", "circle", "m-3"))


class Panel(NamedTuple):
    """One small figure with its title and a line below it."""

    title: str
    figure: Markup | None
    note: str = ""
    hue: str = ""


def _point(x: float, read: Interval, what: str, style: str = "percent") -> Point:
    return Point(x, read.mean, read.low, read.high, f"{what}: {words.with_interval(read, style)}")


def _curve(
    cells: list[Cell], behaviour: str, control: str | None, where: Setting, metric: str
) -> dict[float, Interval]:
    by_strength = doses(cells, behaviour, control, where)
    return {s: read for s, found in by_strength.items() if (read := measured(found, metric))}


def _share_scale(reads: list[Interval]) -> Scale:
    return nice_scale([i.high for i in reads], ceiling=1.0)


def fractions(report: Report, behaviours: list[str]) -> list[Panel]:
    """Fraction of each behaviour unsteered, down and up, beside the controls (the paper's figure 4)."""
    cells, panels = report.get("cells") or [], []
    drawn: list[tuple[str, Setting | None, list[Group], Interval | None]] = []
    reads: list[Interval] = []
    for behaviour in behaviours:
        where = main_setting(cells, behaviour, (report.get("selection") or {}).get(behaviour))
        metric, hue = f"fractions.{behaviour}", words.hue(behaviour, behaviours)
        base = measured(unsteered(cells, behaviour), metric)
        groups: list[Group] = []
        if where is not None:
            down, up = extremes(cells, behaviour, where)
            for strength in (down, 0.0, up):
                members: list[tuple[str, Point]] = []
                below = ""
                if strength == 0 and base:
                    reads.append(base)
                    members.append(("unsteered", _point(0, base, "unsteered")))
                    below = words.percent(base.mean)
                for control in (None, *CONTROLS) if strength else ():
                    read = _curve(cells, behaviour, control, where, metric).get(strength)
                    if read is None:
                        continue
                    reads.append(read)
                    name = f"{words.signed(strength)} {control or 'vector'}"
                    css = f"control-{control} thin" if control else f"vector {hue}"
                    members.append((css, _point(strength, read, name)))
                    below = below if control else words.percent(read.mean)
                groups.append((words.signed(strength) if strength else "unsteered", below, members))
        drawn.append((behaviour, where, groups, base))
    scale = _share_scale(reads)
    for behaviour, where, groups, base in drawn:
        figure = None
        if any(members for _, _, members in groups):
            label = f"Fraction of {words.short(behaviour)} tokens by steering strength"
            figure = bars(groups, scale, words.percent_tick, label=label, reference=base.mean if base else None)
        note = words.setting(where) if where else ""
        panels.append(Panel(words.short(behaviour), figure, note, words.hue(behaviour, behaviours)))
    return panels


def dose_response(report: Report, behaviours: list[str]) -> list[Panel]:
    """Fraction of each behaviour against the steering strength, the controls beside it."""
    cells, panels = report.get("cells") or [], []
    for behaviour in behaviours:
        where = main_setting(cells, behaviour, (report.get("selection") or {}).get(behaviour))
        hue, metric = words.hue(behaviour, behaviours), f"fractions.{behaviour}"
        series, reads = [], []
        for control, marker in (("shuffled", "triangle"), ("random", "square"), (None, "circle")):
            if where is None:
                break
            found = _curve(cells, behaviour, control, where, metric)
            name = control or "vector"
            points = [_point(s, i, f"{words.signed(s)} {name}") for s, i in found.items() if s or not control]
            reads += list(found.values())
            css = f"control-{control}" if control else f"vector {hue}"
            series.append(Series(name, css, points, marker, band=control is None, whiskers=control is not None))
        figure = None
        if any(one.points for one in series):
            x = _strength_scale([p.x for one in series for p in one.points])
            label = f"Fraction of {words.short(behaviour)} tokens against steering strength"
            figure = curves(
                series,
                x,
                _share_scale(reads),
                words.signed,
                words.percent_tick,
                label=label,
                x_title="strength",
            )
        panels.append(Panel(words.short(behaviour), figure, words.setting(where) if where else "", hue))
    return panels


def places(report: Report, behaviours: list[str]) -> list[Panel]:
    """The other settings beside the main one: layers that share the strength, thinking tokens only."""
    cells, panels = report.get("cells") or [], []
    for behaviour in behaviours:
        metric, hue = f"fractions.{behaviour}", words.hue(behaviour, behaviours)
        base = measured(unsteered(cells, behaviour), metric)
        main = main_setting(cells, behaviour, (report.get("selection") or {}).get(behaviour))
        found = settings(cells, behaviour)
        found.sort(key=lambda s: s != main)
        groups: list[Group] = []
        reads, notes = [base] if base else [], []
        for where in found[:4]:
            members = []
            for strength, css in zip(extremes(cells, behaviour, where), ("down", "up"), strict=True):
                if read := _curve(cells, behaviour, None, where, metric).get(strength):
                    name = f"{words.signed(strength)}, {words.setting(where)}"
                    members.append((f"thin bar-{css} {hue}", _point(strength, read, name)))
                    reads.append(read)
            name = "several" if len(where.layers) > 1 else "one"
            groups.append((name if where.where == "all" else where.where, "", members))
            notes.append(words.setting(where))
        if len(groups) > 1:
            figure = bars(
                groups,
                _share_scale(reads),
                words.percent_tick,
                label=f"Fraction of {words.short(behaviour)} tokens by layers and positions",
                height=150,
                reference=base.mean if base else None,
            )
            panels.append(Panel(words.short(behaviour), figure, "; ".join(notes), hue))
    return panels


def side_effects(report: Report, behaviours: list[str]) -> list[Panel]:
    """What steering costs: one panel a metric, one line a behaviour, the unsteered model as a level."""
    cells, panels = report.get("cells") or [], []
    for metric, (title, style, what) in METRICS.items():
        series, reads, strengths = [], [], []
        base = measured(unsteered(cells, behaviours[0]), metric) if behaviours else None
        for index, behaviour in enumerate(behaviours):
            where = main_setting(cells, behaviour, (report.get("selection") or {}).get(behaviour))
            found = _curve(cells, behaviour, None, where, metric) if where else {}
            reads += list(found.values())
            strengths += list(found)
            # The lines are set apart a little, so that their error bars do not hide one another.
            aside = 0.035 * (index - (len(behaviours) - 1) / 2)
            points = [
                _point(s + aside if s else s, i, f"{words.short(behaviour)} {words.signed(s)}", style)
                for s, i in found.items()
            ]
            if metric == "kl" and points and 0.0 not in found:
                # The unsteered model is at no distance from itself, by definition.
                points = sorted([*points, Point(0, 0, tip="unsteered: 0")], key=lambda point: point.x)
            name, css = words.short(behaviour), f"slim {words.hue(behaviour, behaviours)}"
            series.append(Series(name, css, points, SHAPES[index % len(SHAPES)]))
        figure = None
        if any(one.points for one in series):
            x = _strength_scale(strengths)
            is_share = style == "percent"
            y = _share_scale(reads) if is_share else nice_scale([i.high for i in reads])
            reference = Point(0, base.mean, base.low, base.high) if base and metric != "kl" else None
            figure = curves(
                series,
                x,
                y,
                words.signed,
                words.percent_tick if is_share else words.number,
                label=f"{title} against steering strength",
                height=170,
                reference=reference,
                x_title="strength",
            )
        kind = (report.get("model") or {}).get("dtype") or "float32"
        if metric == "kl" and kind != "float32":
            what += f"; the model ran in {kind}, whose rounding noise is in it"
        panels.append(Panel(title, figure, what))
    return panels


def _strength_scale(strengths: list[float]) -> Scale:
    """An axis over the strengths with a margin for the outermost markers; ticks thin out when they crowd."""
    low, high = min(strengths), max(strengths)
    pad = 0.08 * ((high - low) or 1)
    ticks = sorted(set(strengths))
    if len(ticks) > 7:
        ticks = [t for t in nice_scale([high], floor=low).ticks if low <= t <= high]
    return Scale(low - pad, high + pad, ticks)


def metric_css(name: str) -> tuple[str, str]:
    """Marker and CSS class of an attribution metric."""
    if name.startswith("published"):
        return ("diamond", "m-1") if "rescaled" in name or "norm" in name else ("square", "m-0")
    return next(((marker, css) for known, marker, css in METHODS if known in name), ("diamond", "m-4"))


def metric_names(report: Report) -> list[str]:
    """The metrics that were measured for any behaviour, `exact` last so that it is drawn on top."""
    names: dict[str, None] = {}
    for effects in (report.get("attribution") or {}).values():
        names |= dict.fromkeys(n for n, m in (effects or {}).items() if isinstance(m, dict) and "mean" in m)
    return sorted(names, key=lambda name: name == "exact")


def layer_effects(report: Report, behaviours: list[str]) -> list[Panel]:
    """Effect of every layer by every metric, each as a share of its own peak (the paper's figure 3)."""
    attribution, panels = report.get("attribution") or {}, []
    correlations = attribution.get("rank_correlation") or {}
    for behaviour in behaviours:
        effects, series, count = attribution.get(behaviour) or {}, [], 0
        for name in metric_names(report):
            curve = effects.get(name) or {}
            means = curve.get("mean") or []
            count = max(count, len(means))
            peak = max((abs(m) for m in means if m is not None), default=0) or 1.0
            marker, css = metric_css(name)
            points = []
            for layer, mean in enumerate(means):
                if mean is None:
                    continue
                std = (curve.get("std") or [None] * len(means))[layer]
                low, high = (None, None) if std is None else ((mean - std) / peak, (mean + std) / peak)
                spread = "" if std is None else f" ± {words.number(std)} (std over chains)"
                tip = f"{name}, layer {layer}: {words.number(mean)}{spread}"
                points.append(Point(layer, mean / peak, low, high, tip))
            hue = words.hue(behaviour, behaviours) if name == "exact" else ""
            css = f"{css} {hue} dense" if count > 12 else f"{css} {hue}"
            series.append(Series(name, css, points, marker, band=name == "exact", whiskers=False))
        figure, note = None, ""
        if count:
            chosen = (report.get("selection") or {}).get(behaviour, {}).get("layer")
            step = max(1, round(count / 8))
            figure = curves(
                series,
                Scale(-0.4, count - 0.6, range(0, count, step)),
                Scale(0, 1.12, (0, 0.25, 0.5, 0.75, 1)),
                lambda layer: f"{layer:g}",
                words.percent_tick,
                label=f"Effect of each layer on {words.short(behaviour)}",
                marked=[] if chosen is None else [(chosen, "selected")],
                x_title="layer",
            )
            rho = correlations.get(behaviour) or effects.get("rank_correlation") or {}
            note = " · ".join(f"{n.replace('_', ' ')} {correlation(r)}" for n, r in rho.items() if n != "exact")
            note = f"Rank correlation with exact: {note}" if note else ""
        panels.append(Panel(words.short(behaviour), figure, note, words.hue(behaviour, behaviours)))
    return panels


def correlation(value: float | None) -> str:
    """A cosine or a rank correlation: two decimals."""
    return words.MISSING if value is None else f"{value:.2f}".replace("-", words.MINUS)


def norms(report: Report) -> Panel | None:
    """The two norms of a layer: of the mean activation (the paper's scale) and the mean of the norms."""
    by_layer = sorted((int(layer), both or {}) for layer, both in (report.get("norms") or {}).items())
    if not by_layer:
        return None
    series = []
    for key, name, css, marker in (
        ("mean_norm", "mean of the norms", "m-0", "square"),
        ("norm_of_mean", "norm of the mean", "m-3", "circle"),
    ):
        points = [
            Point(layer, both[key], tip=f"{name}, layer {layer}: {words.number(both[key])}")
            for layer, both in by_layer
            if both.get(key) is not None
        ]
        series.append(Series(name, css, points, marker))
    last, step = by_layer[-1][0], max(1, round(len(by_layer) / 8))
    figure = curves(
        series,
        Scale(-0.4, last + 0.4, range(0, last + 1, step)),
        nice_scale([p.y for one in series for p in one.points]),
        lambda layer: f"{layer:g}",
        words.number,
        label="Norms of the activations by layer",
        height=170,
        x_title="layer",
    )
    return Panel("Size of the activations", figure, "A vector at strength 1 has the norm of the mean of its layer.")
