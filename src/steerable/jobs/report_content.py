"""A run folder -> the content of report.json (schema: docs/report.md)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from steerable.chains.records import Record, chain_key, read_jsonl
from steerable.chains.spans import stretches
from steerable.chains.tasks import correct
from steerable.engines.hf.products import product_dtype
from steerable.engines.hf.routes import route
from steerable.evals.logit_lens import lens
from steerable.evals.metrics import all_metrics
from steerable.jobs.selection import read_selection
from steerable.jobs.settings import FEWEST_SPANS, Config, selected_path
from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.store.errors import UsageError
from steerable.store.run_folder import read_json, sha256
from steerable.store.text import counted

_HASHED = (
    "tasks.jsonl",
    "chains.jsonl",
    "spans.jsonl",
    "vectors/candidates",
    "vectors/shuffled",
    "steered",
    "steered_spans",
)
_RULE = (
    "of the tasks and samples whose three chains all end, those with the most right answers; of these, those on which "
    "the behaviour's share differs between up and down as the cells' means do; of these, the one nearest to the means"
)
_PACKAGES = ("steerable", "torch", "transformers", "reasoning-gym", "numpy", "safetensors")


def assemble(
    folder: Path, config: Mapping[str, Any], model: Mapping[str, Any], tokens: Mapping[str, Any]
) -> dict[str, Any]:
    """Gather everything that the stages measured. Nothing in it depends on the time or the machine's speed.

    folder: of the run. config: its resolved settings. model: what `describe_model` gave. tokens: what `selected_tokens`
    gave. These two need the model to be loaded; everything else is read from files.
    """
    chosen = read_selection(folder / "selection.json")
    effects = read_json(folder / "attribution.json", dict)
    coverage = read_json(folder / "coverage.json", dict)
    if lost := [b for b, one in chosen.items() if b not in (effects.get(one["window"]) or {})]:
        raise UsageError(
            f"{folder / 'attribution.json'} lacks {lost[0]} in the window {chosen[lost[0]]['window']!r}, which "
            "selection.json names: run `steerable select` again"
        )
    missing = {
        b: f"no effect was measured on {config['patched']} chains"
        if (spans := coverage["spans"].get(b, 0)) >= FEWEST_SPANS
        else f"in {coverage['chains']} chains {counted(spans, 'span')} of it: at least {FEWEST_SPANS} are needed"
        for b in read_json(folder / "selection.json", dict).get("missing", ())
    }
    tasks = {task["id"]: task for task in read_jsonl(folder / "tasks.jsonl", "task")}
    examples = [_example(folder, tasks, b, one.get("strength", 1.0)) for b, one in chosen.items()]
    return {
        "config": dict(config),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "model": dict(model),
        "hashes": {name: sha256(folder / name) for name in (*_HASHED, *map(selected_path, chosen))},
        "coverage": coverage,
        "norms": read_json(folder / "norms.json", dict),
        "cosines": {"selected": _cosines(folder, chosen), **read_json(folder / "cosines.json", dict)},
        "attribution": {b: effects[one["window"]][b] for b, one in chosen.items()},
        "attribution_by_window": effects,
        "selection": chosen,
        **({"missing": missing} if missing else {}),
        "look": Config(config, **config).quick().to_dict() == dict(config),
        "metrics": {name: metric.describe() for name, metric in all_metrics().items()},
        "cells": read_json(folder / "cells.json", list),
        "examples": [example for example in examples if example],
        "lens": dict(tokens),
    }


def describe_model(model: Any, name: str, weights: str, generation_dtype: str) -> dict[str, Any]:
    """What the report says of the model as it ran in this process; `weights` tells two of one name apart,
    `generation_dtype` is the setting."""
    return {
        "name": name,
        "architecture": type(model).__name__,
        "layers": models.n_layers(model),
        "width": models.width(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": ", ".join(sorted({str(p.device) for p in model.parameters()})),
        "attention": models.text_config(model)._attn_implementation,
        "generation": route(model).name,
        "generation_dtype": str(product_dtype(model, generation_dtype)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def selected_tokens(folder: Path, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What the logit lens says of every selected vector: `{behaviour: {"layer", "top", "bottom"}}`."""
    tokens = {}
    for behaviour in read_selection(folder / "selection.json"):
        layer, vector = _selected(folder, behaviour)
        ends = lens(model, tokenizer, vector)
        tokens[behaviour] = {"layer": layer, "top": list(map(list, ends.top)), "bottom": list(map(list, ends.bottom))}
    return tokens


def _selected(folder: Path, behaviour: str) -> tuple[int, Any]:
    """The layer of a behaviour's selected vector, and the vector as it was saved."""
    direction = Direction.load(folder / selected_path(behaviour))
    return direction.layers[0], direction.at(direction.layers[0])


def _cosines(folder: Path, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Cosines between the vectors that were selected, each at its own layer and window (Figure 5 of the paper)."""
    labels = list(chosen)
    layers, vectors = zip(*(_selected(folder, b) for b in labels), strict=True)
    units = [v.double() / v.double().norm() for v in vectors]
    return {"labels": labels, "layers": list(layers), "matrix": [[float(a @ b) for b in units] for a in units]}


def _example(folder: Path, tasks: Mapping[str, Record], behaviour: str, strength: float) -> dict[str, Any] | None:
    """One task unsteered, up and down, chosen by `_RULE`."""
    files = {"unsteered": "unsteered", "plus": f"{behaviour}.{strength:+g}", "minus": f"{behaviour}.{-strength:+g}"}
    # These cells have one part, so task and sample tell a chain.
    chains: dict[str, dict[tuple[str, int], Record]] = {}
    for name, file in files.items():
        records = read_jsonl(folder / f"steered/{file}.jsonl", "chain")
        chains[name] = {chain_key(chain): chain | {"spans": []} for chain in records}
        for span in read_jsonl(folder / f"steered_spans/{file}.jsonl", "span"):
            chains[name][chain_key(span)]["spans"].append(span)
    shares = {name: {key: _share(chain, behaviour) for key, chain in cell.items()} for name, cell in chains.items()}
    means = {name: sum(cell.values()) / max(1, len(cell)) for name, cell in shares.items()}
    shown = [key for key in chains["unsteered"] if all(key in cell and cell[key]["closed"] for cell in chains.values())]
    if not shown:
        return None

    @cache
    def right(key: tuple[str, int]) -> int:
        return sum(correct(tasks[key[0]], cell[key]["answer"]) or 0 for cell in chains.values())

    def order(key: tuple[str, int]) -> tuple[bool, float]:
        is_as_mean = (shares["plus"][key] - shares["minus"][key]) * (means["plus"] - means["minus"]) > 0
        return not is_as_mean, sum(abs(shares[name][key] - means[name]) for name in shares)

    nearest = sorted(shown, key=order)
    # Judging can take long: it stops at the first with three right answers.
    key = next(key for least in (3, 2, 1, 0) for key in nearest if right(key) >= least)
    task = tasks[key[0]]
    about = {"behaviour": behaviour, "task_id": key[0], "sample": key[1], "rule": _RULE, "prompt": task["prompt"]}
    return about | {name: _shown(task, cell[key]) for name, cell in chains.items()}


def _share(chain: Record, label: str) -> float:
    spans: Sequence[Record] = chain["spans"]
    lengths = [(s.end - s.start, spans[s.span]["label"] == label) for s in stretches(spans, len(chain["thinking"]))]
    return sum(n for n, ours in lengths if ours) / max(1, sum(n for n, _ in lengths))


def _shown(task: Record, chain: Record) -> dict[str, Any]:
    return {
        "thinking": chain["thinking"],
        "answer": chain["answer"].strip(),
        "correct": correct(task, chain["answer"]),
        "spans": [{key: span[key] for key in ("label", "start", "end")} for span in chain["spans"]],
    }
