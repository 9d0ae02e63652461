"""What a run would do, take and cost, before it does anything: `steerable run --dry-run`.

The cells are those that the run itself would make; how fast the model writes and reads, and how long its chains are, is
measured on a few of its tasks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steerable.chains.annotators.llm import LABEL_TEXTS, instructions
from steerable.chains.generation import generate_chains
from steerable.chains.records import STEERABLE, Record
from steerable.chains.tasks import make_splits
from steerable.chains.windows import WINDOWS
from steerable.engines.pool import default_rows, default_workers, row_bytes
from steerable.engines.transformers import score_tokens
from steerable.jobs import selection
from steerable.jobs.annotation import labels_of
from steerable.jobs.cells import Cell, evaluation_cells, validation_cells
from steerable.jobs.run import Run
from steerable.jobs.validation import FEWEST_CHAINS
from steerable.models import loading as models
from steerable.pages import words
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.text import duration

_PROBED, _PROBED_TOKENS = 32, 256
_PASSES = 9
"""Over each text that a candidate is calibrated on: three strengths of both signs, and unsteered passes beside them."""
_MARKS = 1.3
"""Tokens that a language model writes for one of the text that it marks."""
_QUESTION = "What is 17 times 23? Think step by step."


def estimate(run: Run) -> dict[str, Any]:
    """What the stages of a run would do.

    Returns:
        `stages`: for each its name, `chains` and `cells` that are generated, `tokens` that are written or read, and
        `seconds`; `probe`: what was measured; `memory_bytes`: weights and what the widest batch takes; `cost`:
        dollars of a paid annotator whose prices are given, else null; `annotated_tokens`: what it would read and write.
    """
    c = run.config
    sizes = {"extraction": c.limit, "validation": c.validation, "evaluation": c.evaluation}
    is_written = c.tasks.partition(":")[0] == "llm"  # by a language model, which costs
    tasks = [] if is_written else make_splits(c.tasks, sizes, c.seed)
    probed = [t for t in tasks if t["split"] == "extraction"][:_PROBED] or [{"id": "0", "prompt": _QUESTION}] * 8
    probe = _probe(run, [{**task, "id": str(number)} for number, task in enumerate(probed)])
    length, context = probe["tokens"], probe["prompt_tokens"] + probe["tokens"]
    layers = models.n_layers(run.loaded.model)
    behaviours = run.behaviours_among(labels_of(c) or c.steered or STEERABLE)
    windows = [c.window] if c.window else list(WINDOWS)
    workers = run.workers or default_workers(run.loaded.model)

    def written(stage: str, chains: int, cells: int = 0) -> dict[str, Any]:
        tokens = chains * length
        seconds = tokens / probe["tokens_a_second"] / workers
        return {"stage": stage, "chains": chains, "cells": cells, "tokens": round(tokens), "seconds": seconds}

    def read(stage: str, passes: float) -> dict[str, Any]:
        tokens = passes * context
        return {
            "stage": stage, "chains": 0, "cells": 0, "tokens": round(tokens),
            "seconds": tokens / probe["tokens_read_a_second"],
        }  # fmt: skip

    candidates, validation, selecting = _selecting(run, behaviours, windows, layers)
    steered = evaluation_cells(c, _selection(behaviours, windows[0], layers), _anything(layers), run.thinks)
    chains = sum(_chains(cell, c.evaluation) for cell in steered)
    # a patch is computed from its layer on
    patched = min(c.patched, c.limit) * len(behaviours) * len(windows) * layers / 2
    extracted = c.limit * len(c.extraction_samples)
    select = written("select", validation, selecting)
    select["seconds"] += read("select", candidates * FEWEST_CHAINS * _PASSES)["seconds"]
    stages = [
        written("generate", extracted),
        read("extract", extracted),
        read("attribute", 3 * min(c.attributed, c.limit) * len(windows) + patched),
        select,
        written("steer", chains, len(steered)),
        read("evaluate", 2 * min(c.compared, c.evaluation) * len(steered)),
    ]
    annotated = extracted + validation + chains
    asked = annotated * (len(instructions(c.label_texts or LABEL_TEXTS)) / 4 + length), annotated * length * _MARKS
    cost = sum(n * price / 1e6 for n, price in zip(asked, c.prices, strict=True)) if c.is_judged and c.prices else None
    return {
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages),
        "probe": probe,
        "memory_bytes": _memory(run, probe["prompt_tokens"]),
        "annotated_tokens": [round(n) for n in asked] if c.is_judged else None,
        "cost": cost,
    }


def _probe(run: Run, tasks: Sequence[Record]) -> dict[str, Any]:
    """How long the chains are and how fast they are written and read, on a few tasks."""
    c, model = run.config, run.loaded.model
    limit = min(c.max_new_tokens, _PROBED_TOKENS)
    options: dict[str, Any] = {"seed": c.seed, "greedy": True if c.greedy else None}
    options |= {"rows": c.rows, "generation_dtype": c.generation_dtype, "engine": run.engine}
    generate_chains(run.loaded, tasks[:1], max_new_tokens=2, **options)  # what is done once is not counted
    began = time.perf_counter()
    chains = generate_chains(run.loaded, tasks, max_new_tokens=limit, **options)
    seconds = time.perf_counter() - began
    texts = [[*chain["prompt_ids"], *chain["ids"]] for chain in chains]
    began = time.perf_counter()
    score_tokens(model, texts, [len(chain["prompt_ids"]) for chain in chains])
    reading = time.perf_counter() - began
    new = sum(chain["tokens"] for chain in chains)
    cut = sum(chain["tokens"] == limit for chain in chains) / len(chains)
    # Of a chain that was cut off no more is known than that it may be as long as it may become.
    tokens = new / len(chains) + (cut * (c.max_new_tokens - limit) if limit < c.max_new_tokens else 0)
    return {
        "chains": len(chains),
        "tokens": tokens,
        "prompt_tokens": sum(len(chain["prompt_ids"]) for chain in chains) / len(chains),
        "cut": cut,
        "tokens_a_second": new / seconds,
        "tokens_read_a_second": sum(map(len, texts)) / reading,
    }


def _selecting(run: Run, behaviours: Sequence[str], windows: Sequence[str], layers: int) -> tuple[int, int, int]:
    """The candidates of the selection, and its chains and cells at strength 1, the unsteered cell among them."""
    c = run.config
    tried = 1 if c.chosen_layer is not None else min(c.tried, len(selection.interior(layers)))
    count = candidates = len(windows) * tried
    parts = selection.rounds(range(c.validation), count)
    chains, cells = 0, 1
    for number, part in enumerate(parts):
        samples = (0,) if c.greedy or number < len(parts) - 1 else (0, 1)
        one = [
            {"window": windows[0], "baseline": c.baseline, "layer": layer % layers, "dose": None}
            for layer in range(count)
        ]
        made = validation_cells(dict.fromkeys(behaviours, one), _anything(layers), samples=samples)
        chains += len(part) * len(samples) + sum(_chains(cell, len(part)) for cell in made)
        cells += len(made)
        count = max(selection.FEWEST, count // 2)
    return candidates * len(behaviours), chains, cells


def _chains(cell: Cell, tasks: int) -> int:
    every = range(tasks)[: cell.tasks]
    return sum(len(every[part.tasks]) * len(part.samples) for part in cell.parts)


def _selection(behaviours: Sequence[str], window: str, layers: int) -> dict[str, dict[str, Any]]:
    """A selection; which layer it names changes nothing that is counted."""
    inner = list(selection.interior(layers))
    return {b: {"layer": inner[0], "layers": inner, "window": window, "baseline": "pooled"} for b in behaviours}


def _anything(layers: int) -> Any:
    """A direction for every path: cells are counted, not generated."""
    direction = Direction({Site("resid_post", layer): torch.ones(1, 1) for layer in range(layers)})
    return lambda path: direction


def _memory(run: Run, prompt: float) -> int:
    model, longest = run.loaded.model, round(prompt) + run.config.max_new_tokens
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + (run.config.rows or default_rows(model, longest)) * row_bytes(model, longest)


def tables(plan: Mapping[str, Any]) -> list[Any]:
    """The plan for a terminal."""
    rows = [
        (s["stage"], f"{s['cells']:,}" if s["cells"] else "", f"{s['chains']:,}" if s["chains"] else "",
         f"{s['tokens']:,}", duration(s["seconds"]))
        for s in plan["stages"]
    ]  # fmt: skip
    probe = plan["probe"]
    caption = (
        f"measured on {probe['chains']} chains: {probe['tokens']:.0f} tokens each, {probe['tokens_a_second']:,.0f} "
        f"written and {probe['tokens_read_a_second']:,.0f} read a second; memory for weights and rows "
        f"{words.size(plan['memory_bytes'])}"
    )
    if plan["annotated_tokens"]:
        read, written = plan["annotated_tokens"]
        price = "give --llm-prices for its cost" if plan["cost"] is None else f"${plan['cost']:,.2f}"
        caption += f"; the annotator reads {read:,} and writes {written:,} tokens: {price}"
    done = f"; done already: {', '.join(plan['done'])}" if plan["done"] else ""
    title = f"A plan: nothing was run. All stages take about {duration(plan['seconds'])}{done}"
    return [words.printed(title, ["stage", "cells", "chains", "tokens", "time"], rows, caption)]
