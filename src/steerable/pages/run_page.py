"""report.json -> report.html: what each figure of a run's page shows; `templates/run.html` lays it out."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from steerable.pages import cells as ask
from steerable.pages import words
from steerable.pages.cells import CONTROLS
from steerable.pages.examples import columns
from steerable.pages.figures import (
    SHAPES,
    Panel,
    Point,
    Scale,
    Series,
    bars,
    curves,
    nice_scale,
    share_scale,
    step_scale,
)
from steerable.pages.html import render as render_template
from steerable.pages.vectors import CHAINS, Report, Vector, labels_of, vectors_of, whole
from steerable.pages.words import Interval
from steerable.store.errors import UsageError
from steerable.store.files import write_atomic
from steerable.store.run_folder import read_json
from steerable.store.text import plural


def render(report: Report, timings: Mapping[str, Any] | None = None) -> str:
    """Draw a report as one HTML page.

    The page is a pure function of both arguments: the same input gives the same bytes.

    Args:
        report: The content of report.json (schema: docs/report.md); any part of it may be missing or null and then
            reads "not measured".
        timings: The content of timings.json, kept apart because it differs from run to run.

    Returns:
        The page, which loads nothing from anywhere.

    Example:
        >>> page = render(json.loads(Path("runs/pocket/report.json").read_text()))
    """
    report = whole(report)
    vectors, labels, methods = vectors_of(report), labels_of(report), methods_of(report)
    metrics = ask.metrics_of(report, report["cells"])
    judged = [(c["tasks"], c.get("samples") or 1) for c in report["cells"] if c.get("tasks") and not c.get("control")]
    return render_template(
        "run.html",
        report=report,
        timings=timings,
        judged=max(judged, default=None),
        tokens="tokens" if report["model"].get("thinks") is False else "thinking tokens",
        vectors=vectors,
        hues={label: words.hue(label, labels) for label in labels},
        settings=words.settings(report["config"], report["model"]),
        metrics=metrics,
        columns=_columns(metrics),
        read=ask.measured,
        label_changes=_label_changes(vectors, labels),
        usage=[_usage(report, v) for v in vectors if v.setting],
        methods=methods,
        headline=_headline([v for v in vectors if v.setting]),
        cost=_cost([v for v in vectors if v.setting]),
        is_paired=any(cell.get("above_control") for cell in report["cells"]),
        bars=fraction_panels(vectors),
        doses=[_dose_response(v) for v in vectors],
        places=[panel for v in vectors if (panel := _places(v))],
        place_legend=_place_legend(vectors),
        side_effects=[_side_effect(vectors, name, metric, report) for name, metric in metrics.items()],
        vector_legend=[(v.name, f"slim {v.hue}", SHAPES[i % len(SHAPES)]) for i, v in enumerate(vectors)],
        method_legend=[(name.replace("_", " "), *method_sign(name, "hue-any")) for name in methods],
        layer_effects=[layer_panel(report, v, methods) for v in vectors],
        norms=_norms(report),
        examples=[(example, columns(example, CHAINS, labels)) for example in report["examples"]],
    )


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Draw `run_dir/report.json`, with `timings.json` where there is one, into `run_dir/report.html`.

    Args:
        run_dir: The folder of a run.

    Returns:
        The path of the page, which is written whole or not at all.

    Raises:
        UsageError: There is no report.json, or it is none.
        SteerableError: A file cannot be written.

    Example:
        >>> write_report("runs/pocket")
    """
    folder = Path(run_dir)
    if not (folder / "report.json").is_file():
        raise UsageError(f"{folder} holds no report.json; run `steerable evaluate` on this run folder first")
    timings = read_json(folder / "timings.json", dict) if (folder / "timings.json").is_file() else None
    return write_atomic(folder / "report.html", render(read_json(folder / "report.json", dict), timings))


def _headline(vectors: Sequence[Vector]) -> str:
    """One or two sentences that say what the vectors did and whether it stands beside the controls."""
    if not vectors:
        return "No steered setting was measured."
    sentences = []
    for verb, effects in zip(("raise", "lower"), zip(*(v.effects for v in vectors), strict=True), strict=True):
        ratios = [e.ratio for e in effects if e.ratio is not None]
        clear, count = sum(e.clear for e in effects), len(effects)
        strengths = "/".join(sorted({words.signed(e.strength) for e in effects}))
        spread = f" ({words.times(min(ratios))} to {words.times(max(ratios))})" if ratios else ""
        if all(beaten is None for e in effects for beaten in e.beats.values()):
            which = plural(count, "vector stands", f"{count} vectors stand")
            sentences.append(f"at {strengths} the {which} beside no measured control{spread}")
        else:
            share = f"all {count}" if clear == count > 1 else f"{clear} of {count}"
            deed = f"{verb} their behaviour" if clear != 1 else f"{verb}s its behaviour"
            sentences.append(f"at {strengths}, {share} {plural(count, 'vector')} {deed} beyond both controls{spread}")
    return words.capital("; ".join(sentences)) + "."


def _cost(vectors: Sequence[Vector]) -> str:
    """The price of the headline's effects: the worst change of accuracy and of loops, paired with unsteered."""
    sentences = []
    for side in (1, 0):
        worst = []
        for metric, end in (("accuracy", min), ("loops", max)):
            changes = [(change, v.name) for v in vectors if (change := v.change(metric, v.strengths[side]))]
            if changes:
                change, name = end(changes)
                worst.append(f"{metric} {words.change(change, 'share')} for {name}")
        if worst:
            strengths = "/".join(sorted({words.signed(v.strengths[side]) for v in vectors}))
            sentences.append(f"at {strengths} {', '.join(worst)}")
    parts = [f"Cost, at its worst: {'; '.join(sentences)}."] if sentences else []
    for v in vectors:
        if v.selection.get("passed") is False:
            parts.append(f"{words.capital(v.name)}: {v.selection.get('rule') or 'no candidate passed'}.")
    return " ".join(parts)


def _columns(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Title, unit and place in a cell of what a table of cells shows; "{}" is the vector's behaviour."""
    columns = [("Fraction", "share", "fractions.{}"), ("Tasks the wrong way", "share", "wrong_way.fraction")]
    for name, metric in metrics.items():
        columns.append((metric["title"], metric["unit"], name))
        if name == "accuracy":
            columns.append(("Tasks answered worse", "share", "wrong_way.accuracy"))
    return columns


def _label_changes(
    vectors: Sequence[Vector], labels: Sequence[str]
) -> list[tuple[Vector, float, list[tuple[str, Interval | None]]]]:
    """What each vector, up and down, does to the share of every label: rows of vector, strength, changes by label."""
    rows = [
        (v, s, [(label, v.change(f"fractions.{label}", s)) for label in labels])
        for v in vectors
        if v.setting
        for s in v.strengths[::-1]
    ]
    return [row for row in rows if any(change for _, change in row[2])]


def _usage(report: Report, v: Vector) -> tuple[str, str]:
    """The command and the Python code that steer with a vector, for the folder that holds the page."""
    name, path = report["model"].get("name") or "pocket", f"vectors/{v.behaviour}.safetensors"
    strength, where = f"{v.strengths[1]:g}", v.setting.where if v.setting else "all"
    options = ["--model", name, "--steer", path, "--strength", strength, *(["--where", where] * (where != "all"))]
    model, file, gate = (json.dumps(text, ensure_ascii=False) for text in (name, path, where))
    code = f"""\
import steerable as st

model, tokenizer = st.load({model})
direction = st.Direction.load({file})
prompt = [{{"role": "user", "content": "Find the value of w in the equation: 2*w + 8 = 30"}}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with st.steer(model, direction, strength={strength}{f", where={gate}" if where != "all" else ""}, tokenizer=tokenizer):
    chain = model.generate(**inputs.to(model.device), max_new_tokens={report["config"].get("max_new_tokens") or 500})
print(tokenizer.decode(chain[0]))"""
    return shlex.join(["steerable", "chat", *options]), code


def _point(x: float, read: Interval, what: str, unit: str = "share") -> Point:
    return Point(x, *read, f"{what}: {words.with_interval(read, unit)}")


def _on(tasks: int | None) -> str:
    return f" on {tasks} {plural(tasks, 'task')}" if tasks else ""


def fraction_panels(vectors: Sequence[Vector]) -> list[Panel]:
    """Fraction of each behaviour unsteered, down and up, beside the controls (the paper's figure 4)."""
    drawn = [[_bars(v, s) for s in (v.strengths[0], 0.0, v.strengths[1])] if v.setting else [] for v in vectors]
    scale = share_scale([point.high or 0.0 for groups in drawn for _, _, members in groups for _, point in members])
    panels = []
    for v, groups in zip(vectors, drawn, strict=True):
        base, label = v.base(), f"Fraction of {v.name} tokens by steering strength"
        has_bars = any(members for _, _, members in groups)
        figure = bars(groups, scale, label=label, reference=base.mean if base else None) if has_bars else None
        panels.append(v.panel(figure))
    return panels


def _bars(v: Vector, strength: float) -> tuple[str, str, list[tuple[str, Point]]]:
    """Strength, fraction and bars of the vector and its controls."""
    reads = [("unsteered", "unsteered", v.base())]
    if strength:
        reads = [("vector", f"vector {v.hue}", v.curve().get(strength))]
        reads += [(c, f"control-{c} thin", v.curve(control=c).get(strength)) for c in CONTROLS]
    name, main = words.signed(strength) if strength else "", reads[0][2]
    members = [(css, _point(strength, read, f"{name} {kind}".strip())) for kind, css, read in reads if read]
    return name or "unsteered", words.percent(main.mean) if main else "", members


def _dose_response(v: Vector) -> Panel:
    """Fraction of a behaviour against the steering strength, the controls beside it."""
    series, counts = [], v.tasks()
    for control, marker in (("shuffled", "triangle"), ("random", "square"), (None, "circle")):
        name, css = (control, f"control-{control}") if control else ("vector", f"vector {v.hue}")
        reads, tasks = v.response(control=control), v.tasks(control)
        points = [
            _point(s, read, f"{words.signed(s)} {name}{_on(tasks.get(s))}")
            for s, read in reads.items()
            if s or not control
        ]
        series.append(Series(name, css, points, marker, band=not control, whiskers=bool(control)))
    strengths = [p.x for one in series for p in one.points]
    figure = _against_strength(series, strengths, "share", f"Fraction of {v.name} tokens")
    places = [words.setting(v.setting)] if v.setting else []
    for count in sorted({*counts.values()}, reverse=True):
        places.append(f"{', '.join(words.signed(s) for s, n in counts.items() if n == count)}{_on(count)}")
    return v.panel(figure, "; ".join(places))


def _against_strength(
    series: Sequence[Series], strengths: Sequence[float], unit: str, what: str, **options: Any
) -> Markup | None:
    """Curves over the strengths, with a margin for the outermost markers; ticks thin out when they crowd."""
    if not strengths:
        return None
    low, high = min(strengths), max(strengths)
    pad, ticks = 0.08 * ((high - low) or 1), sorted(set(strengths))
    if len(ticks) > 7:
        ticks = [t for t in nice_scale([high], floor=low).ticks if low <= t <= high]
    highest = [p.high for one in series for p in one.points if p.high is not None]
    y = share_scale(highest) if unit == "share" else nice_scale(highest)
    x = Scale(low - pad, high + pad, ticks, words.signed)
    return curves(series, x, y, label=f"{what} against steering strength", x_title="strength", **options)


def _places(v: Vector) -> Panel | None:
    """The other settings beside the main one: layers that share the strength, thinking tokens only."""
    base, groups, notes = v.base(), [], []
    for setting in sorted(ask.settings(v.cells, v.behaviour), key=lambda setting: setting != v.setting)[:4]:
        members, tasks = [], v.tasks(setting=setting)
        ends = ask.extremes(v.cells, v.behaviour, setting)
        for strength, css in zip(ends, ("down", "up"), strict=True):
            if read := v.response(setting=setting).get(strength):
                name = f"{words.signed(strength)}, {words.setting(setting)}"
                members.append((f"thin bar-{css} {v.hue}", _point(strength, read, name)))
        name = "several" if len(setting.layers) > 1 else "one"
        is_same = v.setting is not None and setting.where == v.setting.where
        groups.append((name if is_same else setting.where, "", members))
        notes.append(words.setting(setting) + _on(max(tasks.get(s, 0) for s in ends)))
    if len(groups) < 2:
        return None
    highest = [point.high or 0.0 for _, _, members in groups for _, point in members]
    scale = share_scale([*highest, base.high] if base else highest)
    label, reference = f"Fraction of {v.name} tokens by layers and positions", base.mean if base else None
    return v.panel(bars(groups, scale, label=label, height=150, reference=reference), "; ".join(notes))


def _place_legend(vectors: Sequence[Vector]) -> list[tuple[str, str, str]]:
    """The strengths that the headline names, of all behaviours: downwards and upwards."""
    pairs = [
        ask.extremes(v.cells, v.behaviour, first) for v in vectors for first in ask.settings(v.cells, v.behaviour)[:1]
    ]
    named = ["/".join(dict.fromkeys(map(words.signed, side))) for side in zip(*pairs, strict=True)]
    return [(name, f"bar-{side} hue-any", "bar") for name, side in zip(named, ("down", "up"), strict=False)]


def _side_effect(vectors: Sequence[Vector], name: str, metric: Mapping[str, Any], report: Report) -> Panel:
    """What steering costs by one metric: one line a behaviour, the unsteered model as a level."""
    title, unit, note = metric["title"], metric["unit"], metric["description"]
    if note:
        note = {"share": f"share of {note}", "nats per token": f"{note}, nats a token"}.get(unit, note)
    series, strengths = [], []
    for index, v in enumerate(vectors):
        reads, tasks = v.response(name, unit), v.tasks()
        strengths += list(reads)
        # The lines are set apart a little, so that their error bars do not hide one another.
        aside = 0.035 * (index - (len(vectors) - 1) / 2)
        points = [
            _point(s and s + aside, read, f"{v.name} {words.signed(s)}{_on(tasks.get(s))}", unit)
            for s, read in reads.items()
        ]
        if name == "kl" and points and 0.0 not in reads:
            # The unsteered model is at no distance from itself, by definition.
            points = sorted([*points, Point(0, 0, tip="unsteered: 0")], key=lambda point: point.x)
        series.append(Series(v.name, f"slim {v.hue}", points, SHAPES[index % len(SHAPES)]))
    base = vectors[0].base(name) if vectors and name != "kl" else None
    reference = Point(0, *base) if base else None
    dtype = report["model"].get("dtype") or "float32"
    if name == "kl" and dtype != "float32":
        note += f"; the model ran in {dtype}, whose rounding noise is in it"
    return Panel(title, _against_strength(series, strengths, unit, title, height=170, reference=reference), note)


def methods_of(report: Report) -> list[str]:
    """The attribution methods that were measured for any behaviour, `exact` last so that it is drawn on top."""
    effects = (report.get("attribution") or {}).values()
    names = [name for one in effects for name, read in (one or {}).items() if isinstance(read, dict) and "mean" in read]
    return sorted(dict.fromkeys(names), key=lambda name: name == "exact")


def method_sign(name: str, hue: str = "") -> tuple[str, str]:
    """CSS classes and marker of an attribution method; `exact`, which really patches, has the behaviour's colour."""
    if name.startswith("published"):
        return ("m-1", "diamond") if "rescaled" in name or "norm" in name else ("m-0", "square")
    if "exact" in name:
        return f"m-3 {hue}" if name == "exact" else "m-3", "circle"
    return ("m-2", "triangle") if "fisher" in name else ("m-4", "diamond")


def layer_panel(report: Report, v: Vector, methods: Sequence[str]) -> Panel:
    """Effect of every layer by every method, each as a share of its own peak (the paper's figure 3)."""
    series, count = [], 0
    for name, effect in zip(methods, v.effects_by(methods, report), strict=True):
        count = max(count, len(effect))
        peak = max((abs(mean) for mean, _ in effect if mean is not None), default=0) or 1.0
        points = []
        for layer, (mean, std) in enumerate(effect):
            if mean is not None:
                low, high = (None, None) if std is None else ((mean - std) / peak, (mean + std) / peak)
                spread = "" if std is None else f" ± {words.number(std)} (std over chains)"
                tip = f"{name}, layer {layer}: {words.number(mean)}{spread}"
                points.append(Point(layer, mean / peak, low, high, tip))
        css, marker = method_sign(name, v.hue)
        css += " dense" if len(effect) > 12 else ""
        series.append(Series(name, css, points, marker, band=name == "exact", whiskers=False))
    if not count:
        return v.panel(None, "")
    chosen = v.selection.get("layer")
    y = Scale(0, 1.12, (0, 0.25, 0.5, 0.75, 1), words.percent_tick)
    marked, label = [] if chosen is None else [(chosen, "selected")], f"Effect of each layer on {v.name}"
    figure = curves(series, step_scale(count), y, label=label, marked=marked, x_title="layer")
    attribution = report["attribution"]
    together, alone = attribution.get("rank_correlation") or {}, attribution[v.behaviour].get("rank_correlation")
    rho = together.get(v.behaviour) or alone or {}
    note = " · ".join(f"{name.replace('_', ' ')} {words.fixed(r)}" for name, r in rho.items() if name != "exact")
    return v.panel(figure, f"Rank correlation with exact: {note}" if note else "")


def _norms(report: Report) -> Panel | None:
    """The two norms of a layer: of the mean activation (the paper's scale) and the mean of the norms."""
    by_layer = sorted((int(layer), both or {}) for layer, both in report["norms"].items())
    if not by_layer:
        return None
    series = []
    for key, name, css, marker in (
        ("mean_norm", "mean of the norms", "m-0", "square"),
        ("norm_of_mean", "norm of the mean", "m-3", "circle"),
    ):
        reads = [(layer, both[key]) for layer, both in by_layer if both.get(key) is not None]
        points = [Point(layer, norm, tip=f"{name}, layer {layer}: {words.number(norm)}") for layer, norm in reads]
        series.append(Series(name, css, points, marker))
    x, y = step_scale(by_layer[-1][0] + 1), nice_scale([p.y for one in series for p in one.points])
    figure = curves(series, x, y, label="Norms of the activations by layer", height=170, x_title="layer")
    note = ""
    if any((chosen or {}).get("dose") for chosen in report["selection"].values()):
        budget = report["config"].get("budget")
        reached = f", at which it moves the model by {budget:g} nats a token" if budget else ""
        note = (
            "Strength 1 of a vector is its dose in the table of choices, a share of the mean of the norms of its layer"
            f"{reached} (KL divergence on unsteered chains)."
        )
    return Panel("Size of the activations", figure, note)
