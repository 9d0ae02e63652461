"""A run folder -> the content of report.json (schema: docs/report.md)."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from steerable.chains.records import STEERABLE, Record, read_jsonl
from steerable.chains.spans import stretches
from steerable.chains.tasks import correct
from steerable.evals.logit_lens import lens
from steerable.evals.metrics import all_metrics
from steerable.jobs.selection import read_selection
from steerable.jobs.settings import selected_path
from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.store.errors import UsageError
from steerable.store.run_folder import read_json, sha256

if TYPE_CHECKING:
    from steerable.jobs.run import Run

Key = tuple[str, int]
_HASHED = (
    "tasks.jsonl",
    "chains.jsonl",
    "spans.jsonl",
    "vectors/candidates",
    "vectors/shuffled",
    "steered",
    "steered_spans",
)
_PACKAGES = ("steerable", "torch", "transformers", "reasoning-gym", "numpy", "safetensors")


def assemble(run: Run) -> dict[str, Any]:
    """Gather everything that the stages measured. Nothing in it depends on the time or the machine's speed."""
    folder = run.folder
    selection = read_selection(folder / "selection.json")
    effects = read_json(folder / "attribution.json", dict)
    cosines = read_json(folder / "cosines.json", dict)
    if lost := [b for b, chosen in selection.items() if b not in (effects.get(chosen["window"]) or {})]:
        raise UsageError(
            f"{folder / 'attribution.json'} lacks {lost[0]} in the window {selection[lost[0]]['window']!r}, which "
            "selection.json names: run `steerable select` again"
        )
    return {
        "config": run.config.to_dict(),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "model": _model(run),
        "hashes": {name: sha256(folder / name) for name in _HASHED}
        | {selected_path(b): sha256(folder / selected_path(b)) for b in selection},
        "coverage": read_json(folder / "coverage.json", dict),
        "norms": read_json(folder / "norms.json", dict),
        "cosines": {"selected": _cosines(run, selection), **cosines},
        "attribution": {b: effects[chosen["window"]][b] for b, chosen in selection.items()},
        "attribution_by_window": effects,
        "selection": selection,
        **({"missing": missing} if (missing := _missing(run, selection)) else {}),
        "metrics": {name: metric.describe() for name, metric in all_metrics().items()},
        "cells": read_json(folder / "cells.json", list),
        "examples": [
            example for b, chosen in selection.items() if (example := _example(run, b, chosen.get("strength", 1.0)))
        ],
        "lens": {b: _lens(run, b) for b in selection},
    }


def _missing(run: Run, selection: Mapping[str, Any]) -> dict[str, str]:
    """Why a behaviour has no vector, of those that have none."""
    coverage = read_json(run.folder / "coverage.json")
    return {
        b: f"in {coverage['chains']} chains no span is labelled so"
        if not coverage["spans"].get(b)
        else f"no effect was measured on {run.config.patched} chains"
        for b in STEERABLE
        if b not in selection
    }


def _model(run: Run) -> dict[str, Any]:
    model = run.loaded.model
    return {
        "name": run.config.model,
        "architecture": type(model).__name__,
        "layers": models.n_layers(model),
        "width": models.width(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": run.weights,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _selected(run: Run, behaviour: str) -> Direction:
    return Direction.load(run.folder / selected_path(behaviour))


def _cosines(run: Run, selection: dict[str, Any]) -> dict[str, Any]:
    """Cosines between the vectors that were selected, each at its own layer and window (Figure 5 of the paper)."""
    labels = [b for b in STEERABLE if b in selection]
    chosen = [_selected(run, b) for b in labels]
    units = [d.at(d.layers[0]).double() / d.at(d.layers[0]).double().norm() for d in chosen]
    matrix = [[float(a @ b) for b in units] for a in units]
    return {"labels": labels, "layers": [d.layers[0] for d in chosen], "matrix": matrix}


def _lens(run: Run, behaviour: str) -> dict[str, Any]:
    direction = _selected(run, behaviour)
    layer = direction.layers[0]
    said = lens(run.loaded.model, run.loaded.tokenizer, direction.at(layer))
    return {
        "layer": layer,
        "top": [list(pair) for pair in said.top],
        "bottom": [list(pair) for pair in said.bottom],
    }


def _example(run: Run, behaviour: str, strength: float) -> dict[str, Any] | None:
    """One task unsteered, up and down: the one whose three chains show the behaviour nearest to the cells' means."""
    tasks = {task["id"]: task for task in run.tasks("evaluation")}
    files = {"unsteered": "unsteered", "plus": f"{behaviour}.{strength:+g}", "minus": f"{behaviour}.{-strength:+g}"}
    chains = {
        name: {(c["task_id"], c["sample"]): c for c in read_jsonl(run.folder / f"steered/{file}.jsonl", "chain")}
        for name, file in files.items()
    }
    spans = {name: _spans(run, file, chains[name]) for name, file in files.items()}
    shares = {
        name: {key: _share(s, behaviour, len(chains[name][key]["thinking"])) for key, s in found.items()}
        for name, found in spans.items()
    }
    means = {name: sum(found.values()) / max(1, len(found)) for name, found in shares.items()}
    keys = [
        key for key in chains["unsteered"] if all(key in found and found[key]["closed"] for found in chains.values())
    ]
    if not keys:
        return None
    key = min(keys, key=lambda key: sum(abs(shares[name][key] - means[name]) for name in shares))
    task = tasks[key[0]]
    said = {name: _said(task, chains[name][key], spans[name][key]) for name in chains}
    return {"behaviour": behaviour, "task_id": key[0], "sample": key[1], "prompt": task["prompt"], **said}


def _spans(run: Run, file: str, chains: Mapping[Key, Record]) -> dict[Key, list[Record]]:
    """A cell's spans by chain; these cells have one part, so task and sample tell a chain."""
    found: dict[Key, list[Record]] = {key: [] for key in chains}
    for span in read_jsonl(run.folder / f"steered_spans/{file}.jsonl", "span"):
        found[span["task_id"], span["sample"]].append(span)
    return found


def _share(spans: list[Record], label: str, length: int) -> float:
    lengths = [(kept.end - kept.start, spans[kept.span]["label"] == label) for kept in stretches(spans, length)]
    return sum(n for n, ours in lengths if ours) / max(1, sum(n for n, _ in lengths))


def _said(task: Record, chain: Record, spans: list[Record]) -> dict[str, Any]:
    return {
        "thinking": chain["thinking"],
        "answer": chain["answer"].strip(),
        "correct": correct(task, chain["answer"]),
        "spans": [{key: span[key] for key in ("label", "start", "end")} for span in spans],
    }
