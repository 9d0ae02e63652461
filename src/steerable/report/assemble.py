"""A run folder -> the content of report.json (schema: docs/report.md)."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from steerable import models, plan
from steerable.chains.records import STEERABLE, Record, read_jsonl
from steerable.chains.tasks import correct
from steerable.directions import Direction
from steerable.lens import lens
from steerable.runfolder import read_json, sha256

if TYPE_CHECKING:
    from steerable.pipeline import Run

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
    selection = read_json(folder / "selection.json")
    effects = read_json(folder / "attribution.json")
    cosines = read_json(folder / "cosines.json")
    return {
        "config": run.config.to_dict(),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "model": _model(run),
        "hashes": {name: sha256(folder / name) for name in _HASHED}
        | {plan.selected_path(b): sha256(folder / plan.selected_path(b)) for b in selection},
        "coverage": read_json(folder / "coverage.json"),
        "norms": read_json(folder / "norms.json"),
        "cosines": {"selected": _cosines(run, selection), **cosines},
        "attribution": {b: effects[chosen["window"]][b] for b, chosen in selection.items()},
        "attribution_by_window": effects,
        "selection": selection,
        "cells": read_json(folder / "cells.json"),
        "examples": [
            example for b, chosen in selection.items() if (example := _example(run, b, chosen.get("strength", 1.0)))
        ],
        "lens": {b: _lens(run, b) for b in selection},
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
    return Direction.load(run.folder / plan.selected_path(behaviour))


def _cosines(run: Run, selection: dict[str, Any]) -> dict[str, Any]:
    """Cosines between the behaviours' vectors, all at the layer of the row's behaviour (Figure 5 of the paper)."""
    labels = [b for b in STEERABLE if b in selection]
    matrix = []
    for a in labels:
        chosen = selection[a]
        at = {
            b: Direction.load(run.folder / plan.candidate_path(chosen["window"], chosen["baseline"], b)).only(
                [chosen["layer"]]
            )
            for b in labels
        }
        matrix.append([next(iter(at[a].cosine(at[b]).values())) for b in labels])
    return {"labels": labels, "matrix": matrix}


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
    shares = {name: {key: _share(s, behaviour) for key, s in found.items()} for name, found in spans.items()}
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


def _share(spans: list[Record], label: str) -> float:
    lengths = [(span["end"] - span["start"], span["label"] == label) for span in spans]
    return sum(n for n, ours in lengths if ours) / max(1, sum(n for n, _ in lengths))


def _said(task: Record, chain: Record, spans: list[Record]) -> dict[str, Any]:
    return {
        "thinking": chain["thinking"],
        "answer": chain["answer"].strip(),
        "correct": correct(task, chain["answer"]),
        "spans": [{key: span[key] for key in ("label", "start", "end")} for span in spans],
    }
