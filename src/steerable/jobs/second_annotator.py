"""`steerable reannotate`: do the effects of a run hold when another annotator reads the chains?

An annotator that made the vectors may also see what they do too kindly. The chains of the main cells are labelled anew
by a second one; nothing is generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerable.chains.records import read_jsonl
from steerable.evals.cells import values_by_direction
from steerable.evals.intervals import mean_interval
from steerable.evals.two_way import ByDirection, control_interval, difference_to_control
from steerable.jobs import annotation
from steerable.jobs.cells import Cell, directions_of, evaluation_cells, measure_chains
from steerable.jobs.run import Run, open_run
from steerable.jobs.selection import read_selection
from steerable.jobs.settings import Config
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.run_folder import read_json, write_json

CONTROLS = ("random", "shuffled")


def reannotate(
    out: Path = Path("runs/pocket"), *, annotator: str = "keywords", display: Display | None = None
) -> dict[str, Any]:
    """Label the steered chains of a finished run by a second annotator, and say which effects hold under both.

    Args:
        out: The run folder; the result is its second_annotator.NAME.json, with the part of the annotator before a
            colon: second_annotator.probe.json.
        annotator: As in `steerable run`; it must have the labels that the run steered.
        display: Where progress and the table are shown; default: nowhere.

    Returns:
        `{"annotators": [first, second], "effects": [...]}`; an effect is `{"behaviour", "strength", "fractions",
        "above_control", "outside"}`: by annotator, [mean, low, high] of the behaviour's share of thinking tokens in the
        `unsteered`, `steered`, `random` and `shuffled` chains, the paired difference to each control, and whether the
        effect is beyond both of them.

    Raises:
        UsageError: no finished run, the run's own annotator, or one that lacks a label.

    Example:
        steerable reannotate --out runs/smol-think --annotator keywords
    """
    run = open_run(out, display)
    if not (run.folder / "cells.json").exists():
        raise UsageError(f"{run.folder.root} has no cells yet: finish it with `steerable run --out {run.folder.root}`")
    settings = run.config.to_dict() | {"annotator": annotator}
    second = Run(run.folder, Config(settings.keys() - {"annotator"}, **settings), display=run.display)
    if second.config.annotator == run.config.annotator:
        raise UsageError(f"the run itself was annotated by {annotator}: give another --annotator")
    chosen = read_selection(run.folder / "selection.json")
    labels = annotation.labels_of(second.config)
    if labels is not None and (lacking := [b for b in chosen if b not in labels]):
        raise UsageError(
            f"the annotator {annotator} has no label {lacking[0]!r}: expected one that labels what was steered"
        )
    rows = read_json(run.folder / "cells.json", list)
    plan = {cell.name: cell for cell in evaluation_cells(run.config, chosen, run.load, run.thinks)}
    shares: dict[tuple[str, str], ByDirection] = {}  # of the second annotator, by cell and behaviour
    effects, seed = [], run.config.seed
    for behaviour, one in chosen.items():
        for strength in (one.get("strength", 1.0), -one.get("strength", 1.0)):
            cells = {"unsteered": _row(rows, behaviour, 0.0, None, [], "all")}
            for control in (None, *CONTROLS):
                row = _row(rows, behaviour, strength, control, [one["layer"]], run.config.gate)
                cells[control or "steered"] = row
            for row in cells.values():
                if (key := (row["name"], behaviour)) not in shares:
                    shares[key] = _shares(second, plan[row["name"]], behaviour)
            found = {kind: shares[row["name"], behaviour] for kind, row in cells.items()}
            above = {run.config.annotator: cells["steered"].get("above_control"), annotator: None}
            if above[run.config.annotator]:  # else both are read by the rule of older folders
                own = _means(found["steered"])
                above[annotator] = {kind: difference_to_control(own, found[kind], seed) for kind in CONTROLS}
            fractions = {
                run.config.annotator: {kind: row["fractions"][behaviour] for kind, row in cells.items()},
                annotator: {
                    kind: control_interval(some, seed) if kind in CONTROLS else mean_interval(_means(some), seed)
                    for kind, some in found.items()
                },
            }
            outside = {name: _is_outside(some, above[name], strength) for name, some in fractions.items()}
            about = {"behaviour": behaviour, "strength": strength}
            effects.append(about | {"fractions": fractions, "above_control": above, "outside": outside})
    result = {"annotators": [run.config.annotator, annotator], "effects": effects}
    kind = annotator.partition(":")[0]
    with run.folder.locked():
        write_json(run.folder / f"second_annotator.{kind}.json", result)
    run.display.show(table(result))
    run.display.tell(summary(result))
    return result


def _row(
    rows: list[dict[str, Any]], behaviour: str, strength: float, control: str | None, layers: list[int], where: str
) -> dict[str, Any]:
    """The row of the report for one setting."""
    found = [
        row
        for row in rows
        if (row["behaviour"], row["strength"], row["control"]) == (behaviour, strength, control)
        and (not strength or (row["layers"], row["where"]) == (layers, where))
    ]
    if not found:
        raise UsageError(
            f"cells.json has no cell of {behaviour} at strength {strength:g}, as selection.json says: run the stages "
            "`steer` and `evaluate` again"
        )
    return found[0]


def _shares(run: Run, cell: Cell, behaviour: str) -> ByDirection:
    """A behaviour's share in a cell's chains by task and direction, by the run's annotator."""
    chains = read_jsonl(run.folder / f"steered/{cell.name}.jsonl", "chain")
    measured = measure_chains(run, chains, "evaluation")
    return values_by_direction(measured, f"fractions.{behaviour}", directions_of(cell, measured) or [0] * len(measured))


def _means(shares: ByDirection) -> dict[str, float]:
    return {task: sum(some.values()) / len(some) for task, some in shares.items()}


def _is_outside(shares: Mapping[str, Any], above: Mapping[str, Any] | None, strength: float) -> bool:
    """Whether the effect is beyond both controls, on the side that the strength asks for: by the paired differences, or
    by intervals that do not overlap where a folder lacks these."""
    sign = 1 if strength > 0 else -1
    if above is not None:
        return all(gap is not None and min(sign * gap[1], sign * gap[2]) > 0 for gap in map(above.get, CONTROLS))
    steered = shares["steered"]
    if steered is None or any(shares[control] is None for control in CONTROLS):
        return False
    if strength > 0:
        return all(steered[1] > shares[control][2] for control in CONTROLS)
    return all(steered[2] < shares[control][1] for control in CONTROLS)


def table(result: Mapping[str, Any]) -> Any:
    """The effects as a rich table."""
    from rich.table import Table

    kinds = ("unsteered", "steered", *CONTROLS)
    drawn = Table("behaviour", "annotator", *kinds, "beyond", title="Mean share of thinking tokens, in percent")
    for effect in result["effects"]:
        for name, shares in effect["fractions"].items():
            means = ["-" if shares[kind] is None else f"{100 * shares[kind][0]:.1f}" for kind in kinds]
            outside = "yes" if effect["outside"][name] else "no"
            drawn.add_row(f"{effect['behaviour']} {effect['strength']:+g}", name, *means, outside)
    return drawn


def summary(result: Mapping[str, Any]) -> str:
    """How many effects are outside both controls, by each annotator, in a sentence."""
    counts = [sum(e["outside"][name] for e in result["effects"]) for name in result["annotators"]]
    parts = [f"{n} by {name}" for n, name in zip(counts, result["annotators"], strict=True)]
    return f"of {len(result['effects'])} effects, {' and '.join(parts)} are beyond both controls"
