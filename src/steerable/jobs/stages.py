"""What each stage of the main job does: reads files of the run folder, writes others."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerable.chains.records import LABELS, STEERABLE, Record, read_jsonl, write_jsonl
from steerable.jobs import annotation, experiment, plan, selection
from steerable.jobs.settings import Config
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.files import write_atomic
from steerable.store.run_folder import read_json, sha256, write_json

if TYPE_CHECKING:
    from steerable.jobs.pipeline import Run


def make_tasks(run: Run, partial: Path) -> None:
    """Tasks of the three splits, disjoint by content."""
    from steerable.chains.tasks import make_splits

    c = run.config
    sizes = {"extraction": c.limit, "validation": c.validation, "evaluation": c.evaluation}
    written: dict[str, Any] = {}
    if c.tasks.partition(":")[0] == "llm":
        written = {"endpoint": annotation.endpoint(c) if c.tasks == "llm" else None, "cache": run.folder / "replies"}
    write_jsonl(run.folder / "tasks.jsonl", make_splits(c.tasks, sizes, c.seed, **written))


def generate(run: Run, partial: Path) -> None:
    """One unsteered chain for every extraction task."""
    cell = plan.Cell("chains", (), None, 0.0, (), "all", (plan.Part((0,)),))
    experiment.generate_cells(run, [cell], "extraction", {"chains": run.folder / "chains.jsonl"}, partial)


def annotate(run: Run, partial: Path) -> None:
    """The thinking part of every chain in labelled spans, and how much of it was understood."""
    chains = read_jsonl(run.folder / "chains.jsonl", "chain")
    found, account = annotation.annotate(run, chains, "extraction")
    kept = annotation.stable(run, chains, found, partial) if run.config.stability else found
    spans = [span for some in kept for span in some or ()]
    counts = Counter(span["label"] for span in spans)
    annotated = sum(map(bool, found))
    silent = sum(not chain["thinking"].strip() for chain in chains)
    if not spans:
        raise SteerableError(_why_no_span(run.config, len(chains), silent, any(found)))
    if silent:
        run.display.say(f"annotate: {silent} of {len(chains)} chains have no think block, and so no span")
    # What stands between spans is white space; it belongs to nobody.
    text = sum(len("".join(chain["thinking"].split())) for chain in chains)
    spoken = sum(len("".join(_text(chain, span).split())) for chain, span in _pairs(chains, spans))
    write_jsonl(run.folder / "spans.jsonl", spans)
    write_json(
        run.folder / "coverage.json",
        {
            "chains": len(chains),
            "closed": sum(chain["closed"] for chain in chains),
            "annotated": annotated,
            "dropped": len(chains) - annotated,
            "coverage": spoken / text if text else None,
            "unstable": sum(len(some or ()) for some in found) - len(spans),
            "spans": {label: counts[label] for label in LABELS},
            "annotator": account,
        },
    )


def _why_no_span(config: Config, chains: int, silent: int, any_found: bool) -> str:
    if silent == chains:
        return (
            f"the model wrote nothing in a think block in any of {chains} chains, so there is nothing to annotate: "
            "take a model that reasons in one (docs/real-models.md)"
        )
    if any_found:
        return f"no span in {chains} chains is as stable as --stability {config.stability:g} asks: lower it"
    without = f" ({silent} of them have no think block)" if silent else ""
    return (
        f"the annotator {config.annotator!r} found no span in {chains} chains{without}: it does not know this "
        "model's language; choose another --annotator"
    )


def _text(chain: Record, span: Record) -> str:
    return chain["thinking"][span["start"] : span["end"]]


def _pairs(chains: Iterable[Record], spans: Iterable[Record]) -> Iterable[tuple[Record, Record]]:
    by_id = {(chain["task_id"], chain["sample"]): chain for chain in chains}
    return ((by_id[span["task_id"], span["sample"]], span) for span in spans)


def extract(run: Run, partial: Path) -> None:
    """One pass over the chains: a direction for every label, window and baseline, and the label-shuffled ones."""
    from steerable.chains.windows import WINDOWS
    from steerable.jobs.settings import BASELINES
    from steerable.methods.span_statistics import span_means

    chains = run.aligned()
    means = span_means(
        run.loaded.model, chains, LABELS, shuffles=run.config.controls, seed=run.config.seed, **run.spread_reading
    )
    data = {"data_sha256": sha256(run.folder / "chains.jsonl"), "created_by": "steerable extract"}
    cosines: dict[str, Any] = {"overall_vs_pooled": {}, "windows": {}}
    missing = [label for label in STEERABLE if not means.count(label)]
    if len(missing) == len(STEERABLE):
        raise SteerableError(
            f"no span in {len(chains)} chains is labelled {' or '.join(missing)}: give more tasks with --limit, or "
            "choose another --annotator"
        )
    for label in missing:
        run.display.say(f"extract: no span in {len(chains)} chains is labelled {label}: the run goes on without it")
    for kind in ("candidates", "shuffled"):  # a run with other settings may have left more labels there
        shutil.rmtree(run.folder / f"vectors/{kind}", ignore_errors=True)
    for label in LABELS:
        if not means.count(label):
            continue
        made = {}
        for window in WINDOWS:
            for baseline in BASELINES:
                made[window, baseline] = direction = means.direction(label, window, baseline)
                for name, value in data.items():
                    setattr(direction, name, value)
                direction.save(run.folder / plan.candidate_path(window, baseline, label))
                for k in range(run.config.controls if label in STEERABLE else 0):
                    control = means.shuffled(label, window, baseline, k + 1)
                    control.save(run.folder / plan.shuffled_path(window, baseline, label, k))
        cosines["overall_vs_pooled"][label] = {
            window: _mean_cosine(made[window, "overall"], made[window, "pooled"]) for window in WINDOWS
        }
        cosines["windows"][label] = {
            f"{a}~{b}": _mean_cosine(made[a, run.config.baseline], made[b, run.config.baseline])
            for a, b in (("published", "onset"), ("published", "span"), ("span", "onset"))
        }
    write_json(run.folder / "cosines.json", cosines)
    write_json(
        run.folder / "norms.json",
        {
            str(site.layer): {"mean_norm": norm, "norm_of_mean": length}
            for site, norm, length in zip(
                means.sites, means.norms.tolist(), means.overall.norm(dim=1).tolist(), strict=True
            )
        },
    )


def _mean_cosine(a: Any, b: Any) -> float:
    values = list(a.cosine(b).values())
    return sum(values) / len(values)


def attribute(run: Run, partial: Path) -> None:
    """The effect of every layer, behaviour and window by all metrics."""
    from steerable.evals.attribution import attribute as measure
    from steerable.steering.direction import Direction

    c = run.config
    chains = run.aligned()
    result = {}
    for window in _windows(c):
        paths = {b: run.folder / plan.candidate_path(window, c.baseline, b) for b in STEERABLE}
        directions = {b: Direction.load(path) for b, path in paths.items() if path.exists()}
        measured = measure(
            run.loaded.model, chains, directions, limit=c.attributed, sample=c.patched, **run.spread_reading
        )
        result[window] = measured.to_dict()
    write_json(run.folder / "attribution.json", result)


def _windows(config: Config) -> list[str]:
    from steerable.chains.windows import WINDOWS

    return [config.window] if config.window else list(WINDOWS)


def select(run: Run, partial: Path) -> None:
    """Window and layer of every behaviour, by attribution and validation (`selection.py`), and its controls."""
    from steerable.steering.direction import Direction

    c = run.config
    measured_windows = read_json(run.folder / "attribution.json", dict)
    effects = {window: effect for window, effect in measured_windows.items() if window in _windows(c)}
    if not effects:
        raise UsageError(
            f"{run.folder / 'attribution.json'} lacks the window {c.window!r}: run `steerable attribute` with it"
        )
    layers = len(next(iter(next(iter(effects.values())).values()))["exact"]["mean"])
    candidates: dict[str, list[dict[str, Any]]] = {}
    for b in [b for b in STEERABLE if all(b in effect for effect in effects.values())]:
        for window, effect in effects.items():
            curve = effect[b]["exact"]["mean"]
            tried = selection.candidate_layers(curve, c.tried) if c.chosen_layer is None else [c.chosen_layer]
            candidates.setdefault(b, []).extend(
                {"window": window, "baseline": c.baseline, "layer": layer, "exact": curve[layer]} for layer in tried
            )
        if not candidates[b]:
            del candidates[b]
            run.display.say(f"select: no effect of {b} was measured in {c.patched} chains: the run goes on without it")
    if not candidates:
        raise SteerableError("no effect of any behaviour was measured: give more chains with --patched, or a layer")
    for b in STEERABLE:
        if b not in candidates:  # a run with other settings may have left a vector
            (run.folder / plan.selected_path(b)).unlink(missing_ok=True)
    validated, unsteered = _validated(run, candidates, partial)
    chosen = {}
    shutil.rmtree(run.folder / "vectors/random", ignore_errors=True)  # the same
    for b, found in validated.items():
        best, rule, passed = selection.pick(found, unsteered)
        if c.chosen_layer is not None:
            rule = f"layer {c.chosen_layer} was asked for" + ("" if rule == selection.RULE else f"; {rule}")
        if not passed:
            warnings.warn(f"{b}: {rule}", SteerableWarning, stacklevel=2)
        direction = Direction.load(run.folder / plan.candidate_path(best["window"], best["baseline"], b))
        selected = replace(direction.only([best["layer"]]), strength=best["strength"])
        chosen[b] = {
            "layer": best["layer"],
            "layers": list(selection.interior(layers)),
            "window": best["window"],
            "baseline": best["baseline"],
            "strength": best["strength"],
            "dose": next(iter(selected.dose().values()), None),
            "passed": passed,
            "rule": rule,
            "candidates": found,
        }
        selected.save(run.folder / plan.selected_path(b))
        for k in range(c.controls):
            seed = (c.seed * 1000 + best["layer"]) * 1000 + k
            selected.random_like(seed).save(run.folder / plan.random_path(best["layer"], k))
    write_json(run.folder / "selection.json", chosen)


def _validated(
    run: Run, candidates: dict[str, list[dict[str, Any]]], partial: Path
) -> tuple[dict[str, list[dict[str, Any]]], float | None]:
    """What each candidate of each behaviour did on the validation tasks, at strength 1 and, as long as all of them
    loop, at weaker ones; and the accuracy of the unsteered model."""

    tried: dict[str, list[dict[str, Any]]] = {b: [] for b in candidates}
    base: dict[str, Any] = {}
    for size in selection.STRENGTHS:
        left = {b: found for b, found in candidates.items() if not any(map(selection.does_not_loop, tried[b]))}
        if not left:
            break
        cells = [cell for cell in plan.validation_cells(run.config, left, size) if cell.strength or not base]
        files = {cell.name: partial / f"{cell.name}.jsonl" for cell in cells}
        experiment.generate_cells(run, cells, "validation", files, partial if size == 1 else partial / f"{size:g}")
        measured = {name: experiment.measure(run, path, "validation") for name, path in files.items()}
        base = base or measured["unsteered"]
        for b, found in left.items():
            for candidate in found:
                name = f"{b}.{candidate['window']}.layer{candidate['layer']}"
                down, up = measured[f"{name}.{-size:+g}"], measured[f"{name}.{size:+g}"]
                tried[b].append(
                    candidate
                    | {
                        "strength": size,
                        "fraction_unsteered": _first(base["fractions"][b]),
                        "fraction_up": _first(up["fractions"][b]),
                        "fraction_down": _first(down["fractions"][b]),
                        "accuracy_up": _first(up["accuracy"]),
                        "accuracy_down": _first(down["accuracy"]),
                        "loops": max(up["loops"][0], down["loops"][0]),
                    }
                )
    return tried, _first(base["accuracy"])


def _first(value: list[float] | None) -> float | None:
    return value[0] if value else None


def steer(run: Run, partial: Path) -> None:
    """The evaluation tasks in every cell of the plan."""
    cells = plan.evaluation_cells(run.config, selection.read(run.folder / "selection.json"))
    pieces = partial / "steered"
    files = {c.name: pieces / f"{c.name}.jsonl" for c in cells}
    experiment.generate_cells(run, cells, "evaluation", files, partial)
    shutil.rmtree(run.folder / "steered", ignore_errors=True)
    pieces.rename(run.folder / "steered")


def evaluate(run: Run, partial: Path) -> None:
    """Every cell's spans, fractions, accuracy, length, loops, unclosed chains and KL divergence, with intervals."""
    cells = []
    spans = partial / "steered_spans"
    for cell in plan.evaluation_cells(run.config, selection.read(run.folder / "selection.json")):
        path = run.folder / f"steered/{cell.name}.jsonl"
        measured = experiment.measure(run, path, "evaluation", spans / path.name)
        measured["kl"] = experiment.divergence(run, cell, path)
        head = {
            "control": cell.control,
            "strength": cell.strength,
            "dose": experiment.dose(run, cell),
            "layers": list(cell.layers),
            "where": cell.where,
        }
        # One entry a behaviour, so that a reader finds a behaviour's controls under its own name.
        for b in cell.behaviours:
            cells.append({"name": cell.name, "behaviour": b, **head, **measured})
    shutil.rmtree(run.folder / "steered_spans", ignore_errors=True)
    spans.rename(run.folder / "steered_spans")
    write_json(run.folder / "cells.json", cells)


def report(run: Run, partial: Path) -> None:
    """report.json and report.html."""
    from steerable.jobs.report_content import assemble
    from steerable.pages.page import render

    content = assemble(run)
    write_json(run.folder / "report.json", content)
    write_atomic(run.folder / "report.html", render(content))  # without timings: equal runs give equal pages
