"""report.json -> report.html: gathers what each section of the page says; the template only lays it out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steerable.pages import examples, panels, templates, words
from steerable.pages.cells import (
    CONTROLS,
    Cell,
    Effect,
    doses,
    effect,
    extremes,
    main_setting,
    measured,
    setting_of,
    settings,
    unsteered,
)
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import write_atomic
from steerable.store.plurals import plural

Report = dict[str, Any]


class Table(NamedTuple):
    """Column names, rows of words (the first is the row's name), and the rows to set off."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()


class Card(NamedTuple):
    """What one vector did, in the summary."""

    name: str
    hue: str
    where: str
    unsteered: str
    effects: Sequence[tuple[Effect, str, str, str]]


def render(report: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> str:
    """Draw a report as one HTML page.

    `report` is the content of report.json (schema: docs/report.md); any part of it may be missing or null and
    then reads "not measured". `timings` is the content of timings.json, kept apart because it differs from
    run to run. The page is a pure function of both: the same input gives the same bytes.
    """
    data = dict(report)
    return templates.render("template.html", **_view(data), timings=_timings(timings))


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Draw `run_dir/report.json`, with `timings.json` where there is one, into `run_dir/report.html`: its
    path.

    Raises UsageError when there is no report.json and SteerableError when a file cannot be read or written.
    The page is written whole or not at all.
    """
    folder = Path(run_dir)
    if not (folder / "report.json").is_file():
        raise UsageError(f"{folder} holds no report.json; run `steerable evaluate` on this run folder first")
    timings = _read(folder / "timings.json") if (folder / "timings.json").is_file() else None
    page = render(_read(folder / "report.json"), timings)
    return write_atomic(folder / "report.html", page)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SteerableError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise SteerableError(f"{path} must hold one JSON object, not a {type(content).__name__}")
    return content


def behaviours_of(report: Report) -> list[str]:
    """The behaviours that have a vector, in the order of the selection, then of the cells."""
    steered = (c["behaviour"] for c in report.get("cells") or [] if c.get("behaviour") and c.get("strength"))
    return list(dict.fromkeys([*(report.get("selection") or {}), *steered]))


def _view(report: Report) -> dict[str, Any]:
    behaviours = behaviours_of(report)
    labels = _labels(report, behaviours)
    cards = [card for name in behaviours if (card := _card(report, name, behaviours))]
    metrics = panels.metric_names(report)
    rules, selection, candidates = _selection(report, behaviours)
    return {
        "model": str((report.get("model") or {}).get("name") or "the model"),
        "facts": _facts(report),
        "cards": cards,
        "headline": _headline(cards),
        "cost": _cost(report, behaviours),
        "bars": panels.fractions(report, behaviours),
        "doses": panels.dose_response(report, behaviours),
        "places": panels.places(report, behaviours),
        "place_legend": [(name, f"bar-{side} hue-any") for name, side in _strengths(report, behaviours)],
        "layer_effects": panels.layer_effects(report, behaviours),
        "side_effects": panels.side_effects(report, behaviours),
        "norms": panels.norms(report),
        "metric_legend": [(name, *_metric_sign(name)) for name in metrics],
        "behaviour_legend": [
            (words.short(b), panels.SHAPES[i % 4], f"slim {words.hue(b, behaviours)}") for i, b in enumerate(behaviours)
        ],
        "labels": [(label, words.hue(label, labels)) for label in labels],
        "hues": {label: words.hue(label, labels) for label in labels},
        "effects_table": _effects_table(report, behaviours, metrics),
        "cost_table": _cell_table(report, behaviours, main_only=True),
        "cell_table": _cell_table(report, behaviours, main_only=False),
        "heatmap": (report.get("cosines") or {}).get("selected"),
        "baseline_table": _cosine_table((report.get("cosines") or {}).get("overall_vs_pooled")),
        "window_table": _cosine_table((report.get("cosines") or {}).get("windows")),
        "rules": rules,
        "selection": selection,
        "candidates": candidates,
        "examples": [(e, examples.columns(e, labels)) for e in report.get("examples") or []],
        "lens": [(b, words.hue(b, behaviours), says) for b, says in (report.get("lens") or {}).items() if says],
        "tables": [
            (title, Table((), list(words.flat(report.get(key)))))
            for title, key in (
                ("Configuration", "config"),
                ("Model", "model"),
                ("Chains and annotation", "coverage"),
                ("Versions", "versions"),
                ("Hashes (SHA-256)", "hashes"),
            )
        ],
    }


def _labels(report: Report, behaviours: list[str]) -> list[str]:
    """Every label that occurs: the paper's six first, in its order, then others as they appear."""
    seen = dict.fromkeys(behaviours)
    for cell in report.get("cells") or []:
        seen |= dict.fromkeys(cell.get("fractions") or {})
    for example in report.get("examples") or []:
        chains = (example.get(key) or {} for key in ("unsteered", "plus", "minus"))
        seen |= dict.fromkeys(span["label"] for chain in chains for span in chain.get("spans") or [])
    return [label for label in words.SHORT if label in seen] + [label for label in seen if label not in words.SHORT]


def _facts(report: Report) -> list[str]:
    """The line under the title: what was run, as far as the report says."""
    model, config = report.get("model") or {}, report.get("config") or {}
    coverage, facts = report.get("coverage") or {}, []
    if model.get("layers") and model.get("width"):
        facts.append(f"{model['layers']} {plural(model['layers'], 'layer')} of width {model['width']}")
    if model.get("parameters"):
        facts.append(f"{words.number(model['parameters'] / 1e6)} M parameters")
    if coverage.get("chains"):
        facts.append(f"vectors from {words.number(coverage['chains'])} {plural(coverage['chains'], 'chain')}")
    cells = [c for c in report.get("cells") or [] if c.get("tasks") and c.get("control") is None]
    if cells:
        tasks, samples = max((c["tasks"], c.get("samples") or 1) for c in cells)
        each = f" × {samples:g} samples" if samples > 1 else ""
        facts.append(f"judged on {tasks} other {plural(tasks, 'task')}{each}")
    for behaviour, why in (report.get("missing") or {}).items():
        facts.append(f"no vector for {words.short(behaviour)}, as {why}")
    if config.get("seed") is not None:
        facts.append(f"seed {config['seed']}")
    return facts


def _card(report: Report, behaviour: str, behaviours: list[str]) -> Card | None:
    cells = report.get("cells") or []
    where = main_setting(cells, behaviour, (report.get("selection") or {}).get(behaviour))
    if where is None:
        return None
    base = measured(unsteered(cells, behaviour), f"fractions.{behaviour}")
    down, up = extremes(cells, behaviour, where)
    rows = []
    for done in (effect(cells, behaviour, where, up), effect(cells, behaviour, where, down)):
        share = words.percent(done.fraction.mean) if done.fraction else words.MISSING
        rows.append((done, words.signed(done.strength), words.times(done.ratio), share))
    name, hue = words.short(behaviour), words.hue(behaviour, behaviours)
    at: dict[str, Any] = next((c for c in doses(cells, behaviour, None, where).get(up, []) if c.get("dose")), {})
    place = words.setting(where) + (f"; dose {words.dose(at['dose'])} of ‖h‖ at {words.signed(up)}" if at else "")
    return Card(name, hue, place, words.percent(base.mean) if base else words.MISSING, rows)


def _headline(cards: list[Card]) -> str:
    """One or two sentences that say what the vectors did and whether it stands beside the controls."""
    if not cards:
        return "No steered setting was measured."
    sentences = []
    for index, verb in ((0, "raise"), (1, "lower")):
        done = [card.effects[index][0] for card in cards]
        ratios = [e.ratio for e in done if e.ratio is not None]
        clear = sum(e.clear for e in done)
        strengths = sorted({words.signed(e.strength) for e in done})
        spread = f" ({words.times(min(ratios))} to {words.times(max(ratios))})" if ratios else ""
        if not any(b is not None for e in done for b in e.beats.values()):
            beyond = f"beside no measured control{spread}"
            which = plural(len(done), "vector stands", f"{len(done)} vectors stand")
            sentences.append(f"at {'/'.join(strengths)} the {which} {beyond}")
        else:
            count = f"all {len(done)}" if clear == len(done) > 1 else f"{clear} of {len(done)}"
            did = f"{verb} their behaviour" if clear != 1 else f"{verb}s its behaviour"
            which = f"{count} {plural(len(done), 'vector')}"
            sentences.append(f"at {'/'.join(strengths)}, {which} {did} beyond both controls{spread}")
    joined = "; ".join(sentences)
    return joined[0].upper() + joined[1:] + "."


def _cost(report: Report, behaviours: list[str]) -> str:
    """The price of the headline's effects, at its worst: accuracy, loops, unclosed chains."""
    cells, said = report.get("cells") or [], []
    for index in (1, 0):
        changes, loops, strengths = [], [], set()
        for behaviour in behaviours:
            where = main_setting(cells, behaviour, (report.get("selection") or {}).get(behaviour))
            if where is None:
                continue
            strength = extremes(cells, behaviour, where)[index]
            strengths.add(words.signed(strength))
            at = [c for c in _own(cells, behaviour) if setting_of(c) == where and c["strength"] == strength]
            base = measured(unsteered(cells, behaviour), "accuracy")
            if base and (got := measured(at, "accuracy")):
                changes.append(got.mean - base.mean)
            if got := measured(at, "loops"):
                loops.append(got.mean)
        if changes:
            low, high = (f"{words.signed(round(100 * c, 1))}" for c in (min(changes), max(changes)))
            most = f", loops at most {words.percent(max(loops))}" if loops else ""
            span = low if low == high else f"{low} to {high}"
            said.append(f"at {'/'.join(sorted(strengths))} accuracy changes by {span} points{most}")
    joined = "; ".join(said)
    selection = report.get("selection") or {}
    failed = [words.short(b) for b in behaviours if (selection.get(b) or {}).get("passed") is False]
    parts = [f"Cost: {joined}."] if joined else []
    if failed:
        parts.append(f"No candidate for {', '.join(failed)} kept its loops within the limit on the validation tasks.")
    return " ".join(parts)


def _strengths(report: Report, behaviours: list[str]) -> list[tuple[str, str]]:
    """The strengths that the headline names, of all behaviours: downwards and upwards."""
    cells = report.get("cells") or []
    pairs = [extremes(cells, b, where) for b in behaviours for where in settings(cells, b)[:1]]
    named = ["/".join(dict.fromkeys(words.signed(s) for s in side)) for side in zip(*pairs, strict=True)]
    return list(zip(named, ("down", "up"), strict=True)) if named else []


def _own(cells: list[Cell], behaviour: str) -> list[Cell]:
    return [c for c in cells if c.get("behaviour") == behaviour and c.get("control") is None and c.get("strength")]


def _cell_table(report: Report, behaviours: list[str], *, main_only: bool) -> Table:
    """The numbers behind the figures: every cell, or only those of the main settings without controls."""
    cells = report.get("cells") or []
    rows: list[list[str]] = []
    strong = set()
    for behaviour in behaviours:
        where = main_setting(cells, behaviour, (report.get("selection") or {}).get(behaviour))
        mine = [c for c in cells if c.get("behaviour") == behaviour and c.get("strength")]
        shared = [c for c in cells if c.get("behaviour") is None and c.get("strength")]
        mine += [c for c in shared if setting_of(c) in settings(cells, behaviour)]
        if main_only:
            mine = [c for c in mine if c.get("control") is None and setting_of(c) == where]
        mine.sort(
            key=lambda c: (
                setting_of(c) != where,
                setting_of(c),
                (None, *CONTROLS).index(c.get("control")),
                c["strength"],
            )
        )
        for cell in [*unsteered(cells, behaviour), *mine]:
            steered = bool(cell.get("strength"))
            head = [words.short(behaviour), words.signed(cell["strength"]) if steered else "unsteered"]
            head.append(words.dose(cell.get("dose")) if steered else "")
            if not main_only:
                head += [cell.get("control") or "vector", words.setting(setting_of(cell))] if steered else ["", ""]
            head.append(words.with_interval(measured([cell], f"fractions.{behaviour}"), "percent"))
            for name, (_, style, _) in panels.METRICS.items():
                head.append("" if name == "kl" and not steered else words.with_interval(measured([cell], name), style))
            if not steered:
                strong.add(len(rows))
            rows.append(head)
    extra = [] if main_only else ["Vector", "Where"]
    head = ["Behaviour", "Strength", "Dose", *extra, "Fraction", *(title for title, _, _ in panels.METRICS.values())]
    return Table(head, rows, frozenset(strong))


def _metric_sign(name: str) -> tuple[str, str]:
    marker, css = panels.metric_css(name)
    return marker, f"{css} hue-any" if name == "exact" else css


def _effects_table(report: Report, behaviours: list[str], metrics: list[str]) -> Table:
    """Raw attribution by layer: the figure shows shares of each metric's peak."""
    rows: list[list[str]] = []
    strong = set()
    for behaviour in behaviours:
        effects = (report.get("attribution") or {}).get(behaviour) or {}
        curves = [(effects.get(name) or {}) for name in metrics]
        chosen = ((report.get("selection") or {}).get(behaviour) or {}).get("layer")
        for layer in range(max((len(c.get("mean") or []) for c in curves), default=0)):
            row = [words.short(behaviour), str(layer)]
            for curve in curves:
                mean, std = ((curve.get(key) or [])[layer : layer + 1] or [None] for key in ("mean", "std"))
                spread = "" if std[0] is None else f" ± {words.number(std[0])}"
                row.append(words.MISSING if mean[0] is None else words.number(mean[0]) + spread)
            if layer == chosen:
                strong.add(len(rows))
            rows.append(row)
    return Table(["Behaviour", "Layer", *metrics], rows, frozenset(strong))


def _cosine_table(cosines: dict[str, dict[str, float | None]] | None) -> Table | None:
    if not cosines:
        return None
    columns = list(dict.fromkeys(key for row in cosines.values() for key in row or {}))
    rows = [[words.short(b), *(panels.correlation((row or {}).get(c)) for c in columns)] for b, row in cosines.items()]
    return Table(["", *(c.replace("~", " ~ ") for c in columns)], rows)


def _selection(report: Report, behaviours: list[str]) -> tuple[list[str], Table, Table]:
    """The rules (one where all behaviours share it), what they chose, and what every candidate gave."""
    selection = {b: s for b in behaviours if (s := (report.get("selection") or {}).get(b))}
    rules = dict.fromkeys(words.value(chosen.get("rule")) for chosen in selection.values())
    shared = len(rules) == 1
    keys = ["layer", "layers", "window", "baseline", "strength", "dose"] + ([] if shared else ["rule"])
    rows = [[words.short(b), *(words.value(s.get(key)) for key in keys)] for b, s in selection.items()]
    chosen_table = Table(["Behaviour", *map(_title, keys)], rows)
    every = [(b, one) for b, s in selection.items() for one in s.get("candidates") or []]
    keys = list(dict.fromkeys(key for _, one in every for key in one))
    rows = [[words.short(b), *(_candidate(key, one.get(key)) for key in keys)] for b, one in every]
    strong = frozenset(i for i, (b, one) in enumerate(every) if _is_chosen(one, selection[b]))
    candidates = Table(["Behaviour", *map(_title, keys)], rows, strong)
    return [rule[0].upper() + rule[1:] + "." for rule in rules] if shared else [], chosen_table, candidates


def _title(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _is_chosen(candidate: dict[str, Any], chosen: dict[str, Any]) -> bool:
    shared = [
        key for key in ("window", "baseline", "layer", "strength") if key in candidate and chosen.get(key) is not None
    ]
    return bool(shared) and all(candidate[key] == chosen[key] for key in shared)


def _candidate(key: str, item: Any) -> str:
    is_share = key.startswith(("fraction", "accuracy", "loops", "unclosed"))
    return words.percent(item) if is_share and isinstance(item, int | float) else words.value(item)


def _timings(timings: Mapping[str, Any] | None) -> Table | None:
    """Timings as they were written: seconds, dates, tokens a second."""
    return Table((), list(words.flat(dict(timings)))) if timings else None
