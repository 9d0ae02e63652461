"""report.json -> report.html: what each figure and table of a run's page shows; the template lays it out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steerable.pages import words
from steerable.pages.cells import (
    CONTROLS,
    Cell,
    Effect,
    Setting,
    curve,
    doses,
    effect,
    extremes,
    main_setting,
    measured,
    metrics_of,
    setting_of,
    settings,
    unsteered,
)
from steerable.pages.examples import columns, labels_in
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
from steerable.pages.words import Interval, Table
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import write_atomic
from steerable.store.plurals import plural

Report = Mapping[str, Any]
Metric = Mapping[str, Any]
_CHAINS = {"unsteered": "Unsteered", "plus": "Steered up", "minus": "Steered down"}
_RECORD = {
    "Configuration": "config",
    "Model": "model",
    "Chains and annotation": "coverage",
    "Versions": "versions",
    "Hashes (SHA-256)": "hashes",
}


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
    report = {key: value for key, value in report.items() if value is not None}
    cells, cosines = report.get("cells") or [], report.get("cosines") or {}
    examples, labels, vectors = report.get("examples") or [], _labels(report), vectors_of(report)
    methods, metrics = methods_of(report), metrics_of(report, cells)
    rules, chosen, candidates = _selection(vectors)
    return render_template(
        "run.html",
        model=report.get("model") or {},
        report=report,
        chains=(report.get("coverage") or {}).get("chains"),
        seed=(report.get("config") or {}).get("seed"),
        judged=max(((c["tasks"], c.get("samples") or 1) for c in cells if c.get("tasks") and not c.get("control")),
                   default=None),
        vectors=vectors,
        headline=_headline([v for v in vectors if v.setting]),
        cost=_cost(vectors),
        bars=fraction_panels(vectors),
        doses=[_dose_response(v) for v in vectors],
        places=[panel for v in vectors if (panel := _places(v))],
        place_legend=_place_legend(vectors),
        side_effects=[_side_effect(vectors, name, metric, report) for name, metric in metrics.items()],
        vector_legend=[(v.name, f"slim {v.hue}", SHAPES[i % len(SHAPES)]) for i, v in enumerate(vectors)],
        method_legend=[(name.replace("_", " "), *method_sign(name, "hue-any")) for name in methods],
        layer_effects=[layer_panel(report, v, methods) for v in vectors],
        effects_table=_effects_table(report, vectors, methods),
        norms=_norms(report),
        hues={label: words.hue(label, labels) for label in labels},
        cost_table=_cell_table(vectors, metrics, main_only=True),
        cell_table=_cell_table(vectors, metrics, main_only=False),
        heatmap=cosines.get("selected"),
        baseline_table=_cosine_table(cosines.get("overall_vs_pooled")),
        window_table=_cosine_table(cosines.get("windows")),
        rules=rules,
        selection=chosen,
        candidates=candidates,
        examples=[(example, columns(example, _CHAINS, labels)) for example in examples],
        tables=[(title, Table((), list(words.flat(report.get(key))))) for title, key in _RECORD.items()],
        timings=Table((), list(words.flat(timings))) if timings else None,
    )  # fmt: skip


def vectors_of(report: Report) -> list[Vector]:
    """The behaviours that have a vector, in the order of the selection, then of the cells."""
    cells, selection, labels = report.get("cells") or [], report.get("selection") or {}, _labels(report)
    steered = [c["behaviour"] for c in cells if c.get("behaviour") and c.get("strength")]
    return [
        Vector(b, words.hue(b, labels), cells, main_setting(cells, b, selection.get(b)), selection.get(b) or {})
        for b in dict.fromkeys([*selection, *steered])
    ]


def _labels(report: Report) -> list[str]:
    """Every label that occurs."""
    cells = report.get("cells") or []
    behaviours = [*(report.get("selection") or {}), *(c["behaviour"] for c in cells if c.get("behaviour"))]
    fractions = (label for cell in cells for label in cell.get("fractions") or {})
    return words.ordered([*behaviours, *fractions, *labels_in(report.get("examples") or [], _CHAINS)])


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Draw `run_dir/report.json`, with `timings.json` where there is one, into `run_dir/report.html`.

    Args:
        run_dir: The folder of a run.

    Returns:
        The path of the page, which is written whole or not at all.

    Raises:
        UsageError: There is no report.json.
        SteerableError: A file cannot be read or written.

    Example:
        >>> write_report("runs/pocket")
    """
    folder = Path(run_dir)
    if not (folder / "report.json").is_file():
        raise UsageError(f"{folder} holds no report.json; run `steerable evaluate` on this run folder first")
    timings = _read(folder / "timings.json") if (folder / "timings.json").is_file() else None
    return write_atomic(folder / "report.html", render(_read(folder / "report.json"), timings))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SteerableError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise SteerableError(f"{path} must hold one JSON object, not a {type(content).__name__}")
    return content


class Vector(NamedTuple):
    """A behaviour's vector with all cells, the setting that the figures show, and its entry of `selection`."""

    behaviour: str
    hue: str
    cells: list[Cell]
    setting: Setting | None
    selection: Mapping[str, Any]

    @property
    def name(self) -> str:
        return words.short(self.behaviour)

    @property
    def place(self) -> str:
        """The setting in words, nothing where none was measured."""
        return words.setting(self.setting) if self.setting else ""

    @property
    def strengths(self) -> tuple[float, float]:
        """Down and up: what the headline names."""
        return extremes(self.cells, self.behaviour, self.setting) if self.setting else (-1.0, 1.0)

    @property
    def effects(self) -> list[Effect]:
        """Up, then down."""
        place = self.setting
        return [effect(self.cells, self.behaviour, place, s) for s in self.strengths[::-1]] if place else []

    @property
    def dose(self) -> Mapping[str, float] | None:
        """The relative dose of the upper strength, by layer."""
        by_strength = doses(self.cells, self.behaviour, None, self.setting) if self.setting else {}
        return next((c["dose"] for c in by_strength.get(self.strengths[1], []) if c.get("dose")), None)

    def base(self, metric: str = "") -> Interval | None:
        """A metric of the unsteered model, by default the behaviour's fraction."""
        return measured(unsteered(self.cells, self.behaviour), metric or f"fractions.{self.behaviour}")

    def curve(
        self, metric: str = "", control: str | None = None, setting: Setting | None = None
    ) -> dict[float, Interval]:
        """A metric, by default the behaviour's fraction, by strength; by default in the main setting."""
        place, metric = setting or self.setting, metric or f"fractions.{self.behaviour}"
        return curve(self.cells, self.behaviour, control, place, metric) if place else {}


# --- sentences ---


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
    """The price of the headline's effects, at its worst: accuracy, loops, unclosed chains."""
    sentences = []
    for index in (1, 0):
        at = [(v, v.strengths[index]) for v in vectors if v.setting]
        gaps = [v.curve("accuracy").get(s) for v, s in at]
        bases = [v.base("accuracy") for v, _ in at]
        changes = [read.mean - base.mean for read, base in zip(gaps, bases, strict=True) if read and base]
        loops = [read.mean for v, s in at if (read := v.curve("loops").get(s))]
        if changes:
            low, high = (words.signed(round(100 * end, 1)) for end in (min(changes), max(changes)))
            most = f", loops at most {words.percent(max(loops))}" if loops else ""
            strengths = "/".join(sorted({words.signed(s) for _, s in at}))
            span = low if low == high else f"{low} to {high}"
            sentences.append(f"at {strengths} accuracy changes by {span} points{most}")
    parts = [f"Cost: {'; '.join(sentences)}."] if sentences else []
    if failed := [v.name for v in vectors if v.selection.get("passed") is False]:
        parts.append(f"No candidate for {', '.join(failed)} kept its loops within the limit on the validation tasks.")
    return " ".join(parts)


# --- figures ---


def _point(x: float, read: Interval, what: str, unit: str = "share") -> Point:
    return Point(x, *read, f"{what}: {words.with_interval(read, unit)}")


def fraction_panels(vectors: Sequence[Vector]) -> list[Panel]:
    """Fraction of each behaviour unsteered, down and up, beside the controls (the paper's figure 4)."""
    all_groups, highest = [], []
    for v in vectors:
        groups = []
        for strength in (v.strengths[0], 0.0, v.strengths[1]) if v.setting else ():
            if not strength:
                reads = {"unsteered": v.base()}
            else:
                reads = {f"vector {v.hue}": v.curve().get(strength)}
                reads |= {f"control-{c} thin": v.curve(control=c).get(strength) for c in CONTROLS}
            members = []
            for css, read in reads.items():
                kind = css.split()[0].removeprefix("control-")
                if read:
                    name = f"{words.signed(strength)} {kind}" if strength else kind
                    members.append((css, _point(strength, read, name)))
                    highest.append(read.high)
            main = next(iter(reads.values()))
            below = words.percent(main.mean) if main else ""
            groups.append((words.signed(strength) if strength else "unsteered", below, members))
        all_groups.append(groups)
    panels, scale = [], share_scale(highest)
    for v, groups in zip(vectors, all_groups, strict=True):
        figure, base = None, v.base()
        if any(members for _, _, members in groups):
            label = f"Fraction of {v.name} tokens by steering strength"
            figure = bars(groups, scale, label=label, reference=base.mean if base else None)
        panels.append(Panel(v.name, figure, v.place, v.hue))
    return panels


def _dose_response(v: Vector) -> Panel:
    """Fraction of a behaviour against the steering strength, the controls beside it."""
    series, highest = [], []
    for control, marker in (("shuffled", "triangle"), ("random", "square"), (None, "circle")):
        name, css = (control, f"control-{control}") if control else ("vector", f"vector {v.hue}")
        reads = v.curve(control=control)
        points = [_point(s, read, f"{words.signed(s)} {name}") for s, read in reads.items() if s or not control]
        highest += [read.high for read in reads.values()]
        series.append(Series(name, css, points, marker, band=control is None, whiskers=control is not None))
    figure = None
    if strengths := [p.x for one in series for p in one.points]:
        label = f"Fraction of {v.name} tokens against steering strength"
        figure = curves(series, _strength_scale(strengths), share_scale(highest), label=label, x_title="strength")
    return Panel(v.name, figure, v.place, v.hue)


def _places(v: Vector) -> Panel | None:
    """The other settings beside the main one: layers that share the strength, thinking tokens only."""
    base = v.base()
    groups, notes, highest = [], [], [base.high] if base else []
    for setting in sorted(settings(v.cells, v.behaviour), key=lambda setting: setting != v.setting)[:4]:
        members = []
        for strength, css in zip(extremes(v.cells, v.behaviour, setting), ("down", "up"), strict=True):
            if read := v.curve(setting=setting).get(strength):
                name = f"{words.signed(strength)}, {words.setting(setting)}"
                members.append((f"thin bar-{css} {v.hue}", _point(strength, read, name)))
                highest.append(read.high)
        name = "several" if len(setting.layers) > 1 else "one"
        groups.append((name if setting.where == "all" else setting.where, "", members))
        notes.append(words.setting(setting))
    if len(groups) < 2:
        return None
    label, reference = f"Fraction of {v.name} tokens by layers and positions", base.mean if base else None
    figure = bars(groups, share_scale(highest), label=label, height=150, reference=reference)
    return Panel(v.name, figure, "; ".join(notes), v.hue)


def _place_legend(vectors: Sequence[Vector]) -> list[tuple[str, str, str]]:
    """The strengths that the headline names, of all behaviours: downwards and upwards."""
    pairs = [extremes(v.cells, v.behaviour, first) for v in vectors for first in settings(v.cells, v.behaviour)[:1]]
    named = ["/".join(dict.fromkeys(map(words.signed, side))) for side in zip(*pairs, strict=True)]
    return [(name, f"bar-{side} hue-any", "bar") for name, side in zip(named, ("down", "up"), strict=False)]


def _side_effect(vectors: Sequence[Vector], name: str, metric: Metric, report: Report) -> Panel:
    """What steering costs by one metric: one line a behaviour, the unsteered model as a level."""
    title, unit = metric["title"], metric["unit"]
    note = metric["description"]
    if note:
        note = {"share": f"share of {note}", "nats per token": f"{note}, nats a token"}.get(unit, note)
    series, highest, strengths = [], [], []
    for index, v in enumerate(vectors):
        reads = v.curve(name)
        highest += [read.high for read in reads.values()]
        strengths += list(reads)
        # The lines are set apart a little, so that their error bars do not hide one another.
        aside = 0.035 * (index - (len(vectors) - 1) / 2)
        points = [_point(s + aside if s else s, read, f"{v.name} {words.signed(s)}", unit) for s, read in reads.items()]
        if name == "kl" and points and 0.0 not in reads:
            # The unsteered model is at no distance from itself, by definition.
            points = sorted([*points, Point(0, 0, tip="unsteered: 0")], key=lambda point: point.x)
        series.append(Series(v.name, f"slim {v.hue}", points, SHAPES[index % len(SHAPES)]))
    figure, base = None, vectors[0].base(name) if vectors else None
    if strengths:
        y = share_scale(highest) if unit == "share" else nice_scale(highest)
        reference = Point(0, *base) if base and name != "kl" else None
        label = f"{title} against steering strength"
        figure = curves(
            series, _strength_scale(strengths), y, label=label, height=170, reference=reference, x_title="strength"
        )
    dtype = (report.get("model") or {}).get("dtype") or "float32"
    if name == "kl" and dtype != "float32":
        note += f"; the model ran in {dtype}, whose rounding noise is in it"
    return Panel(title, figure, note)


def _strength_scale(strengths: Sequence[float]) -> Scale:
    """An axis over the strengths with a margin for the outermost markers; ticks thin out when they crowd."""
    low, high = min(strengths), max(strengths)
    pad = 0.08 * ((high - low) or 1)
    ticks = sorted(set(strengths))
    if len(ticks) > 7:
        ticks = [t for t in nice_scale([high], floor=low).ticks if low <= t <= high]
    return Scale(low - pad, high + pad, ticks, words.signed)


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
    attribution = report.get("attribution") or {}
    effects, series, count = attribution.get(v.behaviour) or {}, [], 0
    for name in methods:
        means, spreads = _effect_of(effects, name)
        count = max(count, len(means))
        peak = max((abs(mean) for mean in means if mean is not None), default=0) or 1.0
        points = []
        for layer, (mean, std) in enumerate(zip(means, spreads, strict=True)):
            if mean is not None:
                low, high = (None, None) if std is None else ((mean - std) / peak, (mean + std) / peak)
                tip = f"{name}, layer {layer}: {words.number(mean)}"
                tip += "" if std is None else f" ± {words.number(std)} (std over chains)"
                points.append(Point(layer, mean / peak, low, high, tip))
        css, marker = method_sign(name, v.hue)
        css += " dense" if len(means) > 12 else ""
        series.append(Series(name, css, points, marker, band=name == "exact", whiskers=False))
    figure, note = None, ""
    if count:
        chosen = v.selection.get("layer")
        figure = curves(
            series,
            step_scale(count),
            Scale(0, 1.12, (0, 0.25, 0.5, 0.75, 1), words.percent_tick),
            label=f"Effect of each layer on {v.name}",
            marked=[] if chosen is None else [(chosen, "selected")],
            x_title="layer",
        )
        rho = (attribution.get("rank_correlation") or {}).get(v.behaviour) or effects.get("rank_correlation") or {}
        note = " · ".join(f"{name.replace('_', ' ')} {words.fixed(r)}" for name, r in rho.items() if name != "exact")
    return Panel(v.name, figure, f"Rank correlation with exact: {note}" if note else "", v.hue)


def _effect_of(effects: Mapping[str, Any], method: str) -> tuple[list[float | None], list[float | None]]:
    """Means and standard deviations of every layer."""
    curve = effects.get(method) or {}
    means = curve.get("mean") or []
    return means, curve.get("std") or [None] * len(means)


def _norms(report: Report) -> Panel | None:
    """The two norms of a layer: of the mean activation (the paper's scale) and the mean of the norms."""
    by_layer = sorted((int(layer), both or {}) for layer, both in (report.get("norms") or {}).items())
    if not by_layer:
        return None
    series = []
    for key, name, css, marker in (
        ("mean_norm", "mean of the norms", "m-0", "square"),
        ("norm_of_mean", "norm of the mean", "m-3", "circle"),
    ):
        norms = [(layer, both[key]) for layer, both in by_layer if both.get(key) is not None]
        points = [Point(layer, norm, tip=f"{name}, layer {layer}: {words.number(norm)}") for layer, norm in norms]
        series.append(Series(name, css, points, marker))
    y = nice_scale([p.y for one in series for p in one.points])
    label = "Norms of the activations by layer"
    figure = curves(series, step_scale(by_layer[-1][0] + 1), y, label=label, height=170, x_title="layer")
    return Panel("Size of the activations", figure, "A vector at strength 1 has the norm of the mean of its layer.")


# --- tables ---


def _cell_table(vectors: Sequence[Vector], metrics: Mapping[str, Metric], *, main_only: bool) -> Table:
    """The numbers behind the figures: every cell, or only those of the main settings without controls."""
    rows: list[list[str]] = []
    strong = set()
    for v in vectors:
        here = settings(v.cells, v.behaviour)
        group = [
            c
            for c in v.cells
            if c.get("strength")
            and (c.get("behaviour") == v.behaviour or (c.get("behaviour") is None and setting_of(c) in here))
            and not (main_only and (c.get("control") or setting_of(c) != v.setting))
        ]
        group.sort(
            key=lambda c: (
                setting_of(c) != v.setting,
                setting_of(c),
                (None, *CONTROLS).index(c.get("control")),
                c["strength"],
            )
        )
        for cell in [*unsteered(v.cells, v.behaviour), *group]:
            is_steered = bool(cell.get("strength"))
            row = [v.name, words.signed(cell["strength"]), words.dose(cell.get("dose"))]
            if not main_only:
                row += [cell.get("control") or "vector", words.setting(setting_of(cell))]
            if not is_steered:
                strong.add(len(rows))
                row = [v.name, "unsteered", *[""] * (len(row) - 2)]
            row.append(words.with_interval(measured([cell], f"fractions.{v.behaviour}"), "share"))
            for name, metric in metrics.items():
                is_empty = name == "kl" and not is_steered
                row.append("" if is_empty else words.with_interval(cell.get(name), metric["unit"]))
            rows.append(row)
    places = [] if main_only else ["Vector", "Where"]
    titles = [metric["title"] for metric in metrics.values()]
    return Table(["Behaviour", "Strength", "Dose", *places, "Fraction", *titles], rows, frozenset(strong))


def _effects_table(report: Report, vectors: Sequence[Vector], methods: Sequence[str]) -> Table:
    """Raw attribution by layer: the figure shows shares of each method's peak."""
    rows: list[list[str]] = []
    strong = set()
    for v in vectors:
        effects = (report.get("attribution") or {}).get(v.behaviour) or {}
        reads = [list(zip(*_effect_of(effects, name), strict=True)) for name in methods]
        for layer in range(max(map(len, reads), default=0)):
            row = [v.name, str(layer)]
            for mean, std in (read[layer] if layer < len(read) else (None, None) for read in reads):
                row.append(words.number(mean) + ("" if std is None or mean is None else f" ± {words.number(std)}"))
            if layer == v.selection.get("layer"):
                strong.add(len(rows))
            rows.append(row)
    return Table(["Behaviour", "Layer", *methods], rows, frozenset(strong))


def _cosine_table(cosines: Mapping[str, Mapping[str, float | None]] | None) -> Table | None:
    if not cosines:
        return None
    keys = list(dict.fromkeys(key for row in cosines.values() for key in row or {}))
    rows = [[words.short(b), *(words.fixed((row or {}).get(key)) for key in keys)] for b, row in cosines.items()]
    return Table(["", *(key.replace("~", " ~ ") for key in keys)], rows)


def _selection(vectors: Sequence[Vector]) -> tuple[list[str], Table, Table]:
    """The rules (one where all behaviours share it), what they chose, and what every candidate gave."""
    chosen = [v for v in vectors if v.selection]
    rules = list(dict.fromkeys(words.value(v.selection.get("rule")) for v in chosen))
    keys = ["layer", "layers", "window", "baseline", "strength", "dose"] + (["rule"] if len(rules) != 1 else [])
    rows = [[v.name, *(words.value(v.selection.get(key)) for key in keys)] for v in chosen]
    table = Table(["Behaviour", *map(_title, keys)], rows)
    tried = [(v, candidate) for v in chosen for candidate in v.selection.get("candidates") or []]
    keys = list(dict.fromkeys(key for _, candidate in tried for key in candidate))
    rows = [[v.name, *(_candidate(key, candidate.get(key)) for key in keys)] for v, candidate in tried]
    strong = frozenset(i for i, (v, candidate) in enumerate(tried) if _is_chosen(candidate, v.selection))
    sentences = [words.capital(rule) + "." for rule in rules] if len(rules) == 1 else []
    return sentences, table, Table(["Behaviour", *map(_title, keys)], rows, strong)


def _title(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _is_chosen(candidate: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    keys = ("window", "baseline", "layer", "strength")
    shared = [key for key in keys if key in candidate and chosen.get(key) is not None]
    return bool(shared) and all(candidate[key] == chosen[key] for key in shared)


def _candidate(key: str, item: Any) -> str:
    is_share = key.startswith(("fraction", "accuracy", "loops", "unclosed"))
    return words.percent(item) if is_share and isinstance(item, int | float) else words.value(item)
