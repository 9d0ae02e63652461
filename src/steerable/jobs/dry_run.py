"""What a job would do, take and cost, before it does anything: `--dry-run` of `run`, `calibrate` and `audit`.

The cells are those that the job itself would make; how fast the model writes and reads, and how long its chains are, is
measured on a few of its tasks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steerable.chains.annotators.llm import LABEL_TEXTS, instructions
from steerable.chains.everyday import QUESTIONS
from steerable.chains.generation import Job, Prompting, generate_jobs
from steerable.chains.records import STEERABLE, Record
from steerable.chains.tasks import make_splits
from steerable.chains.windows import WINDOWS
from steerable.engines.hf.products import product_dtype
from steerable.engines.pool import default_rows, default_workers, row_bytes
from steerable.engines.transformers import score_tokens
from steerable.evals.halving import successive_halving
from steerable.jobs import selection
from steerable.jobs.annotation import labels_of
from steerable.jobs.audit_checks import LONGEST_ANSWER, Checks
from steerable.jobs.calibration_grid import TEXTS, TOKENS, is_searched
from steerable.jobs.cells import Cell, evaluation_cells, validation_cells
from steerable.jobs.run import Run
from steerable.jobs.validation import FEWEST_CHAINS
from steerable.models import loading as models
from steerable.pages import words
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.text import duration

_PROBED, _PROBED_TOKENS, _FEW = 32, 256, 4
_PASSES = 9
"""Over each text that a candidate is calibrated on: three strengths of both signs, and unsteered passes beside them."""
_PASSES_UNGUESSED = 15
"""The same, where no dose is near at first."""
_MARKS = 1.3
"""Tokens that a language model writes for one of the text that it marks."""
_QUESTION = "What is 17 times 23? Think step by step."


class Pace:
    """How long a run's chains are and how fast they are written and read, measured on a few tasks; with it, stages."""

    def __init__(self, run: Run, tasks: Sequence[Record], longest: int | None = None) -> None:
        self.run = run
        numbered = [{**task, "id": str(number)} for number, task in enumerate(tasks[:_PROBED])]
        self.probe = _probe(run, numbered, min(longest or run.config.max_new_tokens, run.config.max_new_tokens))
        self.length: float = self.probe["tokens"]
        self.context: float = self.probe["prompt_tokens"] + self.length
        self.workers = run.workers or default_workers(run.loaded.model)

    def writing(self, stage: str, chains: int, cells: int = 0) -> dict[str, Any]:
        """A stage that generates."""
        tokens = chains * self.length
        seconds = tokens / self.probe["tokens_a_second"] / self.workers
        return {"stage": stage, "chains": chains, "cells": cells, "tokens": round(tokens), "seconds": seconds}

    def reading(self, stage: str, passes: float, length: float | None = None) -> dict[str, Any]:
        """A stage that reads: `passes` over texts of a length in tokens, else over a chain with its prompt."""
        tokens = passes * (self.context if length is None else length)
        return {
            "stage": stage, "chains": 0, "cells": 0, "tokens": round(tokens),
            "seconds": tokens / self.probe["tokens_read_a_second"],
        }  # fmt: skip

    def plan(self, stages: Sequence[Mapping[str, Any]], annotated: int, done: Sequence[str]) -> dict[str, Any]:
        """What `--dry-run` prints: the stages, and what annotating so many chains costs."""
        c, asked, cost = self.run.config, None, None
        if c.is_judged:
            asked = (
                annotated * (len(instructions(c.label_texts or LABEL_TEXTS)) / 4 + self.length),
                annotated * self.length * _MARKS,
            )
            cost = sum(n * price / 1e6 for n, price in zip(asked, c.prices, strict=True)) if c.prices else None
        return {
            "done": list(done),
            "stages": list(stages),
            "seconds": sum(stage["seconds"] for stage in stages),
            "probe": self.probe,
            "memory_bytes": _memory(self.run, self.probe["prompt_tokens"]),
            "annotated_tokens": asked and [round(n) for n in asked],
            "cost": cost,
        }


def estimate(run: Run, done: Sequence[str] = ()) -> dict[str, Any]:
    """What the stages of a run would do.

    Returns:
        `done`: the stages that are finished already; `stages`: for each its name, `chains` and `cells` that are
        generated, `tokens` that are written or read, and `seconds`; `probe`: what was measured; `memory_bytes`: weights
        and what the widest batch takes; `cost`: dollars of a paid annotator whose prices are given, else null;
        `annotated_tokens`: what it would read and write.
    """
    c = run.config
    sizes = {"extraction": c.limit, "validation": c.validation, "evaluation": c.evaluation}
    is_written = c.tasks.partition(":")[0] == "llm"  # by a language model, which costs
    tasks = [] if is_written else make_splits(c.tasks, sizes, c.seed)
    pace = Pace(run, [t for t in tasks if t["split"] == "extraction"] or [{"prompt": _QUESTION}] * 8)
    layers = models.n_layers(run.loaded.model)
    behaviours = run.behaviours_among(labels_of(c) or c.steered or STEERABLE)
    windows = [c.window] if c.window else list(WINDOWS)
    candidates, validation, selecting = _selecting(run, behaviours, windows, layers)
    steered = evaluation_cells(c, _selection(behaviours, windows[0], layers), _anything(layers), run.thinks)
    chains = sum(_chains(cell, c.evaluation) for cell in steered)
    # a patch is computed from its layer on
    patched = min(c.patched, c.limit) * len(behaviours) * len(windows) * layers / 2
    extracted = c.limit * len(c.extraction_samples)
    select = pace.writing("select", validation, selecting)
    select["seconds"] += pace.reading("select", candidates * FEWEST_CHAINS * _PASSES)["seconds"]
    stages = [
        pace.writing("generate", extracted),
        pace.reading("extract", extracted),
        pace.reading("attribute", 3 * min(c.attributed, c.limit) * len(windows) + patched),
        select,
        pace.writing("steer", chains, len(steered)),
        pace.reading("evaluate", 2 * min(c.compared, c.evaluation) * len(steered)),
    ]
    return pace.plan(stages, extracted + validation + chains, done)


def estimate_search(
    run: Run, tasks: Sequence[Record], arms: int, strengths: int, samples: int, full_grid: bool,
    done: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """What `calibrate` would do with a grid of arms and strengths on these tasks; returned as by `estimate`.

    The rounds are those of the search, where every setting's chains are as long as the unsteered ones.
    """
    pace, count, grid = Pace(run, tasks), len(tasks), arms * strengths
    written: list[tuple[str, int, int]] = [("unsteered", count, 1)]  # stage, tasks of all its settings, settings
    if is_searched(grid, count, full_grid):
        rounds = successive_halving(
            range(grid), count,
            lambda some, start, stop: len(some) * (stop - start), lambda some, _: some, lambda _: 1.0,
        )  # fmt: skip
        searched = sum(len(r.settings) * (r.stop - r.start) for r in rounds)
        written += [("search", searched, grid), ("control", rounds[-1].stop - rounds[-1].start, 1)]
        written += [("grid", grid * count - searched, grid)] if full_grid else []
    else:
        written += [("grid", grid * count, grid), ("control", count, 1)]
    made = [pace.writing(stage, of * samples, settings) for stage, of, settings in written]
    chains = sum(stage["chains"] for stage in made)
    stages = [
        made[0],
        pace.reading("calibrate", arms * min(TEXTS, count, TOKENS / max(1, pace.length)) * _PASSES_UNGUESSED),
        *made[1:],
        pace.reading("measure", 2 * chains),
    ]
    return pace.plan(stages, chains, done)


def estimate_audit(run: Run, checks: Checks, done: Sequence[str] = ()) -> dict[str, Any]:
    """What `audit` would do; returned as by `estimate`. Raises UsageError where its effect cannot be judged."""
    shuffled = [checks.direction.random_like(10_000 + k) for k in range(checks.controls * checks.is_vector)]
    settings = 1 + len(checks.settings(shuffled))
    if checks.sides is None:
        _ = checks.label
        pace, chains = Pace(run, checks.tasks), len(checks.tasks) * checks.samples
        stages = [pace.writing("chains", settings * chains, settings), pace.reading("checks", 4 * chains)]
        return pace.plan(stages, settings * chains, done)
    questions = [{"prompt": question} for question in QUESTIONS[: checks.limit]]
    pace, texts = Pace(run, questions[:_FEW], LONGEST_ANSWER), [ids for side in checks.texts for ids in side]
    stages = [
        pace.writing("answers", 2 * len(questions), 2),
        pace.reading("checks", settings * len(texts), sum(map(len, texts)) / len(texts)),
    ]
    return pace.plan(stages, 0, done)


def _probe(run: Run, tasks: Sequence[Record], longest: int) -> dict[str, Any]:
    """How long the chains are and how fast they are written and read, on a few tasks."""
    c, model = run.config, run.loaded.model
    limit = min(longest, _PROBED_TOKENS)
    options: dict[str, Any] = {"seed": c.seed, "greedy": True if c.greedy else None, "workers": 1}
    options |= {"rows": c.rows, "generation_dtype": c.generation_dtype, "engine": run.engine}
    chats = bool(getattr(run.loaded.tokenizer, "chat_template", None))
    prompting = Prompting() if chats else Prompting(template="{prompt}")
    # what is done once is not counted
    generate_jobs(run.loaded, [Job(tasks[:1], prompting=prompting)], max_new_tokens=2, **options)
    began = time.perf_counter()
    chains = generate_jobs(run.loaded, [Job(tasks, prompting=prompting)], max_new_tokens=limit, **options)[0]
    seconds = time.perf_counter() - began
    texts = [[*chain["prompt_ids"], *chain["ids"]] for chain in chains]
    began = time.perf_counter()
    score_tokens(model, texts, [len(chain["prompt_ids"]) for chain in chains])
    reading = time.perf_counter() - began
    new = sum(chain["tokens"] for chain in chains)
    cut = sum(chain["tokens"] == limit for chain in chains) / len(chains)
    # Of a chain that was cut off no more is known than that it may be as long as it may become.
    tokens = new / len(chains) + cut * (longest - limit)
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
    stored = product_dtype(model, run.config.generation_dtype)
    return weights + (run.config.rows or default_rows(model, longest, stored)) * row_bytes(model, longest, stored)


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
