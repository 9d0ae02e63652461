"""Measuring the candidates of every behaviour on the validation tasks, round by round; `selection` has the rules."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerable.chains.records import Record
from steerable.engines.base import Continuation
from steerable.evals.calibration import BudgetNotReached, search
from steerable.evals.cells import same_chains, values
from steerable.evals.metrics import Measured
from steerable.jobs import selection
from steerable.jobs.cells import Cell, Part, candidate_name, dosed, generate_cells, measure_chains, validation_cells
from steerable.jobs.run import Run
from steerable.jobs.settings import candidate_path
from steerable.steering.direction import Direction
from steerable.steering.maps import Shift, parse_map
from steerable.store.run_folder import read_json, write_json

FEWEST_CHAINS, FEWEST_TOKENS = 3, 400
"""Of the unsteered text that candidates are calibrated on, where there is as much."""


class Validation:
    """What every candidate does on the validation tasks, round by round, at strength 1 and, as long as no text of a
    behaviour's candidates is sound, at weaker ones. Strength 1 is the same KL divergence for all of them.

    measured: every candidate as it was measured last. finalists: those of the last rounds, of which one is chosen.
    rounds: what was tried in each round, and what went on. All by behaviour.
    """

    def __init__(self, run: Run, partial: Path):
        self.job, self.partial = run, partial
        self.parts: list[Sequence[Record]] = []  # the tasks of each round
        self.unsteered: dict[int, list[Measured]] = {}
        self.calibrations: dict[str, dict[str, Any] | None] = {}
        self.measured: dict[str, list[dict[str, Any]]] = {}
        self.finalists: dict[str, list[dict[str, Any]]] = {}
        self.rounds: dict[str, list[dict[str, Any]]] = {}

    def run(self, candidates: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Measure the candidates of every behaviour."""
        tasks = self.job.tasks("validation")
        self.parts = selection.rounds(tasks, max(map(len, candidates.values())))
        ends = [0, *itertools.accumulate(map(len, self.parts))]
        places = [slice(*pair) for pair in itertools.pairwise(ends)]
        plain = Cell("unsteered", (), 0.0, tuple(Part(self._samples(k), tasks=place) for k, place in enumerate(places)))
        chains = generate_cells(self.job, [plain], tasks, self.partial / "unsteered")["unsteered"]
        self._calibrate(candidates, chains)
        dosed_candidates = {
            b: [{**c, "dose": (self.calibrations[candidate_name(b, c)] or {}).get("dose")} for c in rows]
            for b, rows in candidates.items()
        }
        for strength in selection.STRENGTHS:
            left = {
                b: rows
                for b, rows in dosed_candidates.items()
                if not any(selection.is_sound_text(c) for c in self.finalists.get(b, ()))
            }
            measured: dict[str, list[Measured]] = {}
            for number, part in enumerate(self.parts):
                left = {b: rows for b, rows in left.items() if rows}
                if left:
                    if number not in self.unsteered:
                        some = [c for c in chains if c["part"] == number]
                        self.unsteered[number] = measure_chains(self.job, some, "validation")
                    rows = self._round(number, part, left, strength, measured)
                    left = {b: self._go_on(b, rows[b], number == len(self.parts) - 1) for b in rows}

    def _round(
        self, number: int, tasks: Sequence[Record], left: Any, strength: float, chains: dict[str, list[Measured]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Measure the candidates that are left on further tasks; `chains` takes what is measured, by cell."""
        cells = validation_cells(left, self.job.load, strength, self._samples(number), self.job.config.gate)
        generated = generate_cells(self.job, cells, tasks, self.partial / f"{strength:g}.{number}")
        for name, some in generated.items():
            chains.setdefault(name, []).extend(measure_chains(self.job, some, "validation"))
        unsteered = [m for some in self.unsteered.values() for m in some]
        result: dict[str, list[dict[str, Any]]] = {}
        for b, candidates in left.items():
            result[b] = []
            for candidate in candidates:
                name = candidate_name(b, candidate)
                down, up = chains[f"{name}.{-strength:+g}"], chains[f"{name}.{strength:+g}"]
                result[b].append({**candidate, "strength": strength, **outcome(b, up, down, unsteered)})
        return result

    def _samples(self, number: int) -> tuple[int, ...]:
        """The chains of each task in a round."""
        return (0,) if self.job.config.greedy or number < len(self.parts) - 1 else (0, 1)

    def direction(self, behaviour: str, candidate: Mapping[str, Any]) -> Direction:
        """A candidate at its layer, with the gate that it is measured with, as long as its calibration says."""
        whole = self.job.load(candidate_path(candidate["window"], candidate["baseline"], behaviour))
        whole = replace(whole, gate=self.job.config.gate)
        about = self.calibrations[candidate_name(behaviour, candidate)]
        if about is None:
            return whole.only([candidate["layer"]])
        there = dosed(whole.only([candidate["layer"]]), about["dose"])
        return replace(there, unit="calibrated", stats={**there.stats, "calibration": about})

    def _calibrate(self, candidates: Mapping[str, Sequence[Mapping[str, Any]]], chains: Sequence[Record]) -> None:
        """The dose of every candidate that moves the model by the budget on unsteered chains of the validation tasks;
        None for a map that is no shift, and where no dose does, as with a gate that these chains never open."""
        c, path = self.job.config, self.partial / "calibrations.json"
        done = read_json(path, dict) if path.exists() else {}
        written = [Continuation(chain["prompt_ids"], chain["ids"]) for chain in chains if chain["sample"] == 0]
        texts: list[Continuation] = []
        for text in (text for text in written if text.ids):
            if len(texts) < FEWEST_CHAINS or sum(len(t.ids) for t in texts) < FEWEST_TOKENS:
                texts.append(text)
        guess = None
        self.job.display.start("calibrating", sum(map(len, candidates.values())))
        for behaviour, rows in candidates.items():
            for candidate in rows:
                name = candidate_name(behaviour, candidate)
                self.calibrations[name] = done.get(name)
                if name not in done:
                    there = replace(self.direction(behaviour, candidate), strength=1.0)
                    if texts and isinstance(parse_map(there.map), Shift):
                        try:
                            self.calibrations[name] = search(
                                *self.job.loaded, there.rescaled_to(), texts, budget=c.budget, guess=guess
                            )
                        except BudgetNotReached as error:
                            self.job.display.say(f"select: {name} keeps its length: {error}")
                    write_json(path, self.calibrations)
                about = self.calibrations[name]
                guess = about["dose"] if about else guess
                self.job.display.advance(1)
        self.job.display.done()

    def _go_on(self, behaviour: str, rows: list[dict[str, Any]], is_last: bool) -> list[Any]:
        """Note a behaviour's round; what goes on to the next one."""
        names = [candidate_name(behaviour, c) for c in rows]
        better = rows if is_last else list(selection.survivors(rows))
        self.rounds.setdefault(behaviour, []).append(
            {
                "strength": rows[0]["strength"],
                "tasks": rows[0]["tasks"],
                "candidates": names,
                "survivors": [candidate_name(behaviour, c) for c in better],
            }
        )
        replaced = {(c["strength"], candidate_name(behaviour, c)) for c in rows}
        before = self.measured.get(behaviour, [])
        self.measured[behaviour] = [
            c for c in before if (c["strength"], candidate_name(behaviour, c)) not in replaced
        ] + rows
        if is_last or not better:
            self.finalists.setdefault(behaviour, []).extend(rows)
        return better


def outcome(
    behaviour: str, up: Sequence[Measured], down: Sequence[Measured], unsteered: Sequence[Measured]
) -> dict[str, Any]:
    """What a candidate did at both signs, beside the unsteered model on the same chains alone: a candidate that falls
    out early has met fewer tasks than others."""
    base, share = same_chains(up, unsteered), f"fractions.{behaviour}"
    high, low = values(up, share), values(down, share)
    differences = [high[task] - low[task] for task in high if task in low]
    return {
        "tasks": len({m.task_id for m in up}),
        "chains": len(up),
        "dropped": max(sum(m.fractions is None for m in side) for side in (up, down)),
        "fraction_unsteered": _mean(base, share),
        "fraction_up": _mean(up, share),
        "fraction_down": _mean(down, share),
        "fraction_difference": sum(differences) / len(differences) if differences else None,
        "accuracy_unsteered": _mean(base, "accuracy"),
        "accuracy_up": _mean(up, "accuracy"),
        "accuracy_down": _mean(down, "accuracy"),
        "loops_unsteered": _mean(base, "loops"),
        "loops": max(_mean(side, "loops") or 0.0 for side in (up, down)),
        "unclosed_unsteered": _mean(base, "unclosed"),
        "unclosed": max(_mean(side, "unclosed") or 0.0 for side in (up, down)),
    }


def _mean(measured: Sequence[Measured], metric: str) -> float | None:
    by_task = values(measured, metric)
    return sum(by_task.values()) / len(by_task) if by_task else None
