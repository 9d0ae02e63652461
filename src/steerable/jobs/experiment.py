"""Doing what `plan.py` lists: generating cells, annotating and measuring their chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerable.chains.records import read_jsonl, write_jsonl
from steerable.jobs.plan import Cell, Part
from steerable.steering.direction import Direction

if TYPE_CHECKING:
    from steerable.jobs.pipeline import Run


def generate_cells(run: Run, cells: Sequence[Cell], split: str, files: Mapping[str, Path], kept: Path) -> None:
    """Generate every part of every cell on the tasks of a split; `files[cell.name]` gets the cell's chains.

    Finished blocks are kept in `kept`, where the next call with the same arguments finds them.
    """
    from steerable.chains.generation import Job, Steering, generate_jobs

    c, tasks = run.config, run.tasks(split)
    jobs = []
    for cell in cells:
        for part in cell.parts:
            steering = None
            if part.direction is not None:
                steering = Steering(_direction(run, part), part.strength, part.layers, part.where)
            jobs.append(Job(tasks, part.samples, steering, cell.strength, cell.control))
    run.display.start(split, sum(len(tasks) * len(job.samples) for job in jobs))
    made = iter(
        generate_jobs(
            run.loaded,
            jobs,
            seed=c.seed,
            greedy=True if c.greedy else None,
            max_new_tokens=c.max_new_tokens,
            rows=c.rows,
            block=c.block,
            **run.spread,
            keep=kept / "blocks",
            progress=run.display.advance,
        )
    )
    run.display.done()
    for cell in cells:
        chains = [{**chain, "part": k} for k, _ in enumerate(cell.parts) for chain in next(made)]
        write_jsonl(files[cell.name], chains)


def measure(run: Run, path: Path, split: str, spans_to: Path | None = None) -> dict[str, Any]:
    """The measured half of a cell from its file of chains; each part is measured by itself, then pooled by task.

    spans_to: where the chains' spans are kept.
    """
    from steerable.evals.cells import measure_cell
    from steerable.evals.metrics import measure as measure_chains
    from steerable.jobs.annotation import annotate

    chains, tasks = read_jsonl(path, "chain"), run.tasks(split)
    found = annotate(run, chains, split).spans
    if spans_to is not None:
        parts = zip(chains, found, strict=True)
        write_jsonl(spans_to, ({**span, "part": c["part"]} for c, spans in parts for span in spans or ()))
    measured = []
    for part in dict.fromkeys(chain["part"] for chain in chains):  # two parts may hold the same sample of a task
        group = [(c, spans) for c, spans in zip(chains, found, strict=True) if c["part"] == part]
        spans = [span for _, spans in group for span in spans or ()]
        measured += measure_chains(tasks, [c for c, _ in group], spans, run.loaded.tokenizer)
    return measure_cell(measured, run.config.seed)


def divergence(run: Run, cell: Cell, path: Path) -> list[float] | None:
    """Mean KL(steered || unsteered) per token over the cell's first chains, [mean, low, high]; zero if unsteered."""
    from steerable.evals.intervals import by_task, mean_interval
    from steerable.evals.likelihood import divergence as measure_divergence

    chains = read_jsonl(path, "chain")
    prompts = run.prompts("evaluation")
    pairs: list[tuple[str, float | None]] = []
    for k, part in enumerate(cell.parts):
        # Spread over the tasks: the first sample of as many of them as there are chains to compare.
        group = [c for c in chains if c["part"] == k and c["sample"] == part.samples[0]]
        group = group[: max(1, run.config.compared // len(cell.parts))]
        if part.direction is None:
            pairs += [(c["task_id"], 0.0) for c in group]
            continue
        values = measure_divergence(
            run.loaded.model,
            run.loaded.tokenizer,
            prompts,
            group,
            _direction(run, part),
            strength=part.strength,
            layers=part.layers,
            where=part.where,
        )
        pairs += [(c["task_id"], value) for c, value in zip(group, values, strict=True)]
    return mean_interval(by_task(pairs), run.config.seed)


def dose(run: Run, cell: Cell) -> dict[str, float]:
    """The relative dose ||s v|| / ||h|| at each layer where the cell adds a vector; of several parts, the mean."""
    doses = [_direction(run, part).dose(part.strength) for part in cell.parts if part.direction is not None]
    sites = {site: [one[site] for one in doses if site in one] for site in (doses[0] if doses else ())}
    return {str(site.layer): sum(values) / len(values) for site, values in sites.items()}


def _direction(run: Run, part: Part) -> Direction:
    assert part.direction is not None
    return Direction.load(run.folder / part.direction).only(part.layers)
