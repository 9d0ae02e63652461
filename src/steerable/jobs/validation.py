"""Measuring the candidates of every behaviour on the validation tasks, round by round; `selection` has the rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerable.chains.records import Record
from steerable.evals.cells import values
from steerable.evals.metrics import Measured
from steerable.jobs import selection
from steerable.jobs.cells import candidate_name, generate_cells, measure_chains, validation_cells
from steerable.jobs.run import Run


class Validation:
    """What every candidate does on the validation tasks, round by round, at strength 1 and, as long as no text of a
    behaviour's candidates is sound, at weaker ones.

    measured: every candidate as it was measured last. finalists: those of the last rounds, of which one is chosen.
    rounds: what was tried in each round, and what went on. All by behaviour.
    """

    def __init__(self, run: Run, partial: Path):
        self.job, self.partial = run, partial
        self.parts: list[Sequence[Record]] = []  # the tasks of each round
        self.unsteered: dict[int, list[Measured]] = {}
        self.measured: dict[str, list[dict[str, Any]]] = {}
        self.finalists: dict[str, list[dict[str, Any]]] = {}
        self.rounds: dict[str, list[dict[str, Any]]] = {}

    @property
    def accuracy(self) -> float | None:
        """Of the unsteered model, on the tasks that it has met so far."""
        return _mean([m for some in self.unsteered.values() for m in some], "accuracy")

    def run(self, candidates: dict[str, list[dict[str, Any]]]) -> None:
        """Measure the candidates of every behaviour."""
        tasks = self.job.tasks("validation")
        self.parts = selection.rounds(tasks, max(map(len, candidates.values())))
        for strength in selection.STRENGTHS:
            left = {
                b: rows
                for b, rows in candidates.items()
                if not any(selection.is_sound_text(c, self.accuracy) for c in self.finalists.get(b, ()))
            }
            chains: dict[str, list[Measured]] = {}
            for number, part in enumerate(self.parts):
                left = {b: rows for b, rows in left.items() if rows}
                if left:
                    rows = self._round(number, part, left, strength, chains)
                    left = {b: self._go_on(b, rows[b], number == len(self.parts) - 1) for b in rows}

    def _round(
        self, number: int, tasks: Sequence[Record], left: Any, strength: float, chains: dict[str, list[Measured]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Measure the candidates that are left on further tasks; `chains` takes what is measured, by cell."""
        samples = (0,) if self.job.config.greedy or number < len(self.parts) - 1 else (0, 1)
        cells = validation_cells(left, self.job.load, strength, samples, self.job.config.gate)
        cells = [c for c in cells if c.strength or number not in self.unsteered]
        generated = generate_cells(self.job, cells, tasks, self.partial / f"{strength:g}.{number}")
        for name, some in generated.items():
            measured = measure_chains(self.job, some, "validation")
            if name == "unsteered":
                self.unsteered[number] = measured
            else:
                chains.setdefault(name, []).extend(measured)
        base = [m for some in self.unsteered.values() for m in some]
        result: dict[str, list[dict[str, Any]]] = {}
        for b, candidates in left.items():
            result[b] = []
            for candidate in candidates:
                name = candidate_name(b, candidate)
                down, up = chains[f"{name}.{-strength:+g}"], chains[f"{name}.{strength:+g}"]
                outcome = {
                    "strength": strength,
                    "tasks": len({m.task_id for m in up}),
                    "fraction_unsteered": _mean(base, f"fractions.{b}"),
                    "fraction_up": _mean(up, f"fractions.{b}"),
                    "fraction_down": _mean(down, f"fractions.{b}"),
                    "accuracy_up": _mean(up, "accuracy"),
                    "accuracy_down": _mean(down, "accuracy"),
                    "loops": max(_mean(side, "loops") or 0.0 for side in (up, down)),
                    "unclosed": max(_mean(side, "unclosed") or 0.0 for side in (up, down)),
                    "unclosed_unsteered": _mean(base, "unclosed"),
                }
                result[b].append({**candidate, **outcome})
        return result

    def _go_on(self, behaviour: str, rows: list[dict[str, Any]], is_last: bool) -> list[Any]:
        """Note a behaviour's round; what goes on to the next one."""
        names = [candidate_name(behaviour, c) for c in rows]
        better = rows if is_last else list(selection.survivors(rows, self.accuracy))
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


def _mean(measured: Sequence[Measured], metric: str) -> float | None:
    by_task = values(measured, metric)
    return sum(by_task.values()) / len(by_task) if by_task else None
