"""Cells: the settings that the main job generates, with their controls, as data; and how one is generated and measured.

A cell is generated in one or more parts; a part is one steering on some samples of some tasks. All cells draw with the
same seeds a task and sample, so that they are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steerable.chains.generation import Job, generate_jobs
from steerable.chains.records import Record, read_jsonl, write_jsonl
from steerable.evals.cells import differences, measure_cell, same_chains, values, values_by_direction, wrong_way
from steerable.evals.intervals import by_task, mean_interval
from steerable.evals.likelihood import divergence
from steerable.evals.metrics import Measured, measure
from steerable.evals.two_way import ByDirection, difference_to_control
from steerable.jobs.annotation import annotate
from steerable.jobs.run import Run
from steerable.jobs.settings import Config, candidate_path, random_path, shuffled_path
from steerable.steering.direction import Direction
from steerable.steering.maps import Shift, parse_map
from steerable.steering.spec import Steering
from steerable.store.run_folder import read_json, write_json

Load = Callable[[str], Direction]
"""Path in a run folder -> the direction there."""


@dataclass(frozen=True)
class Part:
    """One way of steering within a cell.

    samples: which ones of each task, by number. tasks: which of the cell's tasks. dose: the relative dose
    ||s v|| / ||h|| by layer. direction: the number of a control's direction.
    """

    samples: tuple[int, ...]
    steering: Steering = ()
    dose: Mapping[int, float] = field(default_factory=dict)
    tasks: slice = field(default_factory=lambda: slice(None))
    direction: int = 0


@dataclass(frozen=True)
class Cell:
    """One row of the report.

    strength: the nominal coefficient, the sum over layers. behaviours: those that the cell speaks about. tasks: how
    many of the split's tasks it is generated on, None for all. both_signs: half of its chains have the opposite
    strength, for which it stands, too.
    """

    name: str
    behaviours: tuple[str, ...]
    strength: float
    parts: tuple[Part, ...]
    layers: tuple[int, ...] = ()
    control: str | None = None
    where: str = "all"
    tasks: int | None = None
    both_signs: bool = False


def _part(direction: Direction, samples: Sequence[int], strength: float, layers: Sequence[int], where: str) -> Part:
    """`strength` times the direction at each of the layers; only what is added has a dose."""
    there = direction.only(layers)
    is_added = isinstance(parse_map(there.map), Shift)
    dose = {site.layer: value for site, value in there.dose(strength).items()} if is_added else {}
    return Part(tuple(samples), there.steering(strength, where=where), dose)


def validation_cells(
    candidates: Mapping[str, Sequence[Mapping[str, Any]]],
    load: Load,
    strength: float = 1.0,
    samples: tuple[int, ...] = (0,),
    where: str = "all",
) -> list[Cell]:
    """-strength and +strength of every candidate (`window`, `baseline`, `layer`, `dose`) of every behaviour."""
    cells = []
    for behaviour, rows in candidates.items():
        for c in rows:
            direction, layers = load(candidate_path(c["window"], c["baseline"], behaviour)), (c["layer"],)
            direction = dosed(direction, c["dose"])
            for s in (-strength, strength):
                part = _part(direction, samples, s, layers, where)
                name = f"{candidate_name(behaviour, c)}.{s:+g}"
                cells.append(Cell(name, (behaviour,), s, (part,), layers, where=where))
    return cells


def dosed(direction: Direction, dose: float | None) -> Direction:
    """The direction with this relative dose at strength 1, at every layer; None: as its method made it."""
    return direction if dose is None else direction.rescaled_to().scaled(dose)


def candidate_name(behaviour: str, candidate: Mapping[str, Any]) -> str:
    """What the cells of a candidate are called, up to the strength."""
    return f"{behaviour}.{candidate['window']}.layer{candidate['layer']}"


def evaluation_cells(
    config: Config, selection: Mapping[str, Mapping[str, Any]], load: Load, thinks: bool = True
) -> list[Cell]:
    """Every cell of the report, from selection.json (`layer`, `layers`, `window`, `baseline`, `dose` and, where it is
    not 1, `strength` of each behaviour).

    The unsteered cell and those of the chosen vectors, up and down, have all tasks and samples. In a control, at the
    same dose, every task meets each of its directions once. Random directions have no sign, nor has the noise that is
    left of shuffled labels beside the pooled mean of all labels: there one cell stands for both signs, in which every
    direction is subtracted at every other task. The side cells (several layers, thinking only, the sweep) have
    `side_tasks` and `side_samples`. A model that `thinks` has cells that are steered inside its think block alone.
    """
    main = (0,) if config.greedy else tuple(range(config.samples))
    side, few, where = main[: config.side_samples], config.side_tasks, config.gate
    behaviours = list(selection)
    cells = [Cell("unsteered", tuple(behaviours), 0.0, (Part(main),))]
    for b in behaviours:
        chosen = selection[b]
        layer, several = (chosen["layer"],), tuple(chosen["layers"])
        size, dose = chosen.get("strength", 1.0), chosen.get("dose")
        direction = dosed(load(candidate_path(chosen["window"], chosen["baseline"], b)), dose)
        paths = [shuffled_path(chosen["window"], chosen["baseline"], b, k) for k in range(config.controls)]
        shuffles = [dosed(load(path), dose) for path in paths]
        for s in (-size, size):
            name = f"{b}.{s:+g}"
            steered = _part(direction, main, s, layer, where)
            shared = _part(direction, side, s / len(several), several, where)
            cells += [
                Cell(name, (b,), s, (steered,), layer, where=where),
                Cell(f"{name}.layers", (b,), s, (shared,), several, where=where, tasks=few),
            ]
            if chosen["baseline"] != "pooled":
                control = _control(shuffles, main, s, layer, where)
                cells.append(Cell(f"{name}.shuffled", (b,), s, control, layer, "shuffled", where))
            if thinks and where != "thinking":  # that is the main cell
                inside = _part(direction, side, s, layer, "thinking")
                cells.append(Cell(f"{name}.thinking", (b,), s, (inside,), layer, where="thinking", tasks=few))
        unsigned = {"random": [load(random_path(b, k)) for k in range(config.controls)]}
        if chosen["baseline"] == "pooled":
            unsigned["shuffled"] = shuffles
        for kind, directions in unsigned.items():
            control = _control(directions, main, size, layer, where, both_signs=True)
            cells.append(Cell(f"{b}.{size:g}.{kind}", (b,), size, control, layer, kind, where, both_signs=True))
        for s in config.strengths:
            if abs(s) != size:
                part = _part(direction, side, s, layer, where)
                cells.append(Cell(f"{b}.{s:+g}", (b,), s, (part,), layer, where=where, tasks=few))
    return cells


def _control(
    directions: Sequence[Direction],
    samples: Sequence[int],
    strength: float,
    layer: tuple[int, ...],
    where: str,
    both_signs: bool = False,
) -> tuple[Part, ...]:
    """A control is the mean over several directions, each of which every task meets once. both_signs: every other task
    meets it subtracted, and no task meets all of them with one sign."""
    parts = []
    for k, direction in enumerate(directions):
        for start in (0, 1) if both_signs else (0,):
            signed = -strength if both_signs and (k + start) % 2 else strength
            part = _part(direction, (samples[k % len(samples)],), signed, layer, where)
            parts.append(replace(part, tasks=slice(start, None, 2 if both_signs else 1), direction=k))
    return tuple(parts)


def generate_cells(run: Run, cells: Sequence[Cell], tasks: Sequence[Record], keep: Path) -> dict[str, list[Record]]:
    """The chains of every cell, each with the number of its `part`, by the cell's name.

    All parts of all cells are generated in one go. Finished blocks are kept in `keep`, where the next call with the
    same arguments finds them.
    """
    c = run.config
    jobs = []
    for cell in cells:
        for part in cell.parts:
            some = tasks[: cell.tasks][part.tasks]
            jobs.append(Job(some, part.samples, part.steering, cell.strength, cell.control))
    run.display.start("generating", sum(len(job.tasks) * len(job.samples) for job in jobs))
    generated = iter(
        generate_jobs(
            run.loaded,
            jobs,
            seed=c.seed,
            greedy=True if c.greedy else None,
            max_new_tokens=c.max_new_tokens,
            rows=c.rows,
            generation_dtype=c.generation_dtype,
            block=c.block,
            **run.spread,
            keep=keep / "blocks",
            progress=run.display.advance,
        )
    )
    run.display.done()
    return {
        cell.name: [{**chain, "part": k} for k, _ in enumerate(cell.parts) for chain in next(generated)]
        for cell in cells
    }


def measure_chains(run: Run, chains: Sequence[Record], split: str, spans_to: Path | None = None) -> list[Measured]:
    """Annotate and measure the chains of a cell. spans_to: a file for their spans."""
    tasks = run.tasks(split)
    spans = annotate(
        run.config, chains, tasks, run.loaded,
        replies=run.folder / "replies", display=run.display, reference=run.reference,
    ).spans  # fmt: skip
    if spans_to is not None:
        rows = zip(chains, spans, strict=True)
        write_jsonl(spans_to, ({**span, "part": chain["part"]} for chain, some in rows for span in some or ()))
    measured = []
    for part in dict.fromkeys(chain["part"] for chain in chains):  # two parts may hold the same sample of a task
        group = [(c, some) for c, some in zip(chains, spans, strict=True) if c["part"] == part]
        flat = [span for _, some in group for span in some or ()]
        measured += measure(tasks, [c for c, _ in group], flat, run.loaded.tokenizer, run.labels)
    return measured


def directions_of(cell: Cell, measured: Sequence[Measured]) -> list[int] | None:
    """The number of the direction of each chain of a control; None for a cell that is none."""
    return [cell.parts[m.chain["part"]].direction for m in measured] if cell.control else None


def evaluate_cells(run: Run, cells: Sequence[Cell], partial: Path) -> list[dict[str, Any]]:
    """The rows of the report: of every cell its setting, every metric with its interval, and the difference to the
    unsteered chains with the same seeds and to each control; one row a behaviour, so that its controls stand under its
    own name.

    cells: the unsteered one first. partial: a folder for the spans of the chains, `steered_spans`, and for the
    divergences, which take longest and are found there by the next call.
    """
    spans, kept = partial / "steered_spans", partial / "divergences.json"
    divergences: dict[str, Any] = read_json(kept, dict) if kept.exists() else {}
    rows: list[dict[str, Any]] = []
    unsteered: list[Measured] = []
    steered: dict[int, dict[str, float]] = {}  # the behaviour's share by task, by the number of the row
    controls: dict[tuple[Any, ...], ByDirection] = {}
    for cell in cells:
        chains = read_jsonl(run.folder / f"steered/{cell.name}.jsonl", "chain")
        measured = measure_chains(run, chains, "evaluation", spans / f"{cell.name}.jsonl")
        unsteered = unsteered or measured
        base, seed = same_chains(measured, unsteered), run.config.seed
        directions = directions_of(cell, measured)
        if cell.name not in divergences:
            divergences[cell.name] = _divergence(run, cell, chains)
            write_json(kept, divergences)
        content = {
            "control": cell.control,
            "strength": cell.strength,
            "dose": _dose(cell),
            "layers": list(cell.layers),
            "where": cell.where,
            **measure_cell(measured, seed, run.labels, directions),
            "kl": divergences[cell.name],
            "difference": differences(measured, base, seed, run.labels, directions) if cell.strength else None,
        }
        for strength in (-cell.strength, cell.strength) if cell.both_signs else (cell.strength,):
            for b in cell.behaviours:
                wrong = wrong_way(measured, base, b, strength, seed)
                about = {"name": cell.name, "behaviour": b} | content | {"strength": strength}
                if directions is not None:
                    shares = values_by_direction(measured, f"fractions.{b}", directions)
                    controls[(cell.control, *_place(about))] = shares
                elif strength:
                    steered[len(rows)] = values(measured, f"fractions.{b}")
                rows.append({**about, "wrong_way": wrong, "above_control": None})
    for number, own in steered.items():
        place, seed = _place(rows[number]), run.config.seed
        found = {kind: shares for (kind, *where), shares in controls.items() if tuple(where) == place}
        if found:
            above = {kind: difference_to_control(own, shares, seed) for kind, shares in found.items()}
            rows[number]["above_control"] = above
    return rows


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a vector and its controls have in common."""
    return row["behaviour"], row["strength"], tuple(row["layers"]), row["where"]


def _divergence(run: Run, cell: Cell, chains: Sequence[Record]) -> list[float] | None:
    """Mean KL(steered || unsteered) per token over one chain of each of the first tasks, [mean, low, high]; zero if
    unsteered."""
    compared, steerings = compared_chains(cell, chains, run.tasks("evaluation"), run.config.compared)
    values: Sequence[float | None] = [0.0] * len(compared)
    if any(steerings):
        values = divergence(*run.loaded, run.prompts("evaluation"), compared, steerings)
    return mean_interval(by_task((c["task_id"], v) for c, v in zip(compared, values, strict=True)), run.config.seed)


def compared_chains(
    cell: Cell, chains: Sequence[Record], tasks: Sequence[Record], count: int
) -> tuple[list[Record], list[Steering]]:
    """One chain of each of the first `count` tasks, and how it was steered. The parts of a cell take turns, so that all
    cells are compared on the same tasks, however many directions a control has."""
    found = {(c["part"], c["task_id"], c["sample"]): c for c in chains}
    tasks = tasks[: cell.tasks]
    compared, steerings = [], []
    for i, task in enumerate(tasks[:count]):
        parts = [(k, part) for k, part in enumerate(cell.parts) if i in range(len(tasks))[part.tasks]]
        # Two tasks in a row for a direction: where a control stands for both signs, they meet it with both.
        k, part = parts[i // 2 % len(parts)]
        compared.append(found[k, task["id"], part.samples[0]])
        steerings.append(part.steering)
    return compared, steerings


def _dose(cell: Cell) -> dict[str, float]:
    """The relative dose at each layer where the cell adds or subtracts a vector; of several parts, the mean."""
    doses = [part.dose for part in cell.parts if part.steering]
    layers = {layer: [one[layer] for one in doses if layer in one] for layer in (doses[0] if doses else ())}
    return {str(layer): sum(values) / len(values) for layer, values in layers.items()}
