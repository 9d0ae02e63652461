"""The search of `steerable calibrate`: what is measured of each setting, what is chosen, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from steerable.chains.annotators.length import reference_length
from steerable.chains.records import Record, write_jsonl
from steerable.engines.base import Continuation
from steerable.evals.calibration import BudgetNotReached, calibrate
from steerable.evals.dose_response import (
    Limits,
    Rows,
    change,
    column,
    compare_at_equal,
    fit_power,
    gain_interval,
    of_tasks,
    pareto_front,
    perplexity_beside,
)
from steerable.evals.halving import Round, fewest_tasks, successive_halving
from steerable.evals.intervals import (
    FEWEST,
    Interval,
    difference_interval,
    is_bounded,
    mean_interval,
    simultaneous_intervals,
    student_interval,
)
from steerable.evals.metrics import Measured, all_metrics, measure
from steerable.evals.side_effects import score_texts
from steerable.formats import import_file
from steerable.jobs.annotation import annotate, labels_among, labels_of
from steerable.jobs.cells import Cell, Part, generate_cells
from steerable.jobs.run import Run
from steerable.jobs.task_origin import keys_of, known_tasks, note_keys
from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import read_json, write_json
from steerable.store.text import counted

THINKING = "thinking"
FIELDS = (
    "model revision dtype device quantization attention annotator tasks seed validation max_new_tokens greedy budget "
    "generation_dtype rows block engine"
)
TEXTS, TOKENS = 8, 800
"""Unsteered chains that arms are calibrated on, at most, and their tokens."""
_CLEAR = 8  # chains, of which an interval may be clear of 0 where they are of `FEWEST` tasks
_METRICS = ("target", "kl", "accuracy", "tokens", "thinking", "loops", "unclosed")


@dataclass(frozen=True)
class Arm:
    """A file's direction at some of its layers."""

    name: str
    file: str
    layers: tuple[int, ...]
    direction: Direction


@dataclass(frozen=True)
class Setting:
    """An arm, by its number, at one strength."""

    arm: int
    strength: float


class GridSearch:
    """One calibration; `rows` holds what was measured of every setting, of None the unsteered chains."""

    def __init__(
        self, job: Run, tasks: Sequence[Record], arms: Sequence[Arm], strengths: Sequence[float], label: str,
        how: Mapping[str, Any], limits: Limits, reference: float | None,
    ):  # fmt: skip
        self.job, self.tasks, self.arms, self.strengths, self.label = job, tasks, list(arms), strengths, label
        self.how, self.limits, self.reference = how, limits, reference
        self.aim = 1.0 if how["aim"] == "more" else -1.0
        self.seed = job.config.seed
        self.rows: dict[Setting | None, list[dict[str, Any]]] = {}
        self.partial = Path()

    def work(self, partial: Path) -> None:
        """Measure, and write calibrate.json and recommended.safetensors."""
        self.partial = partial
        chains = self._generate("unsteered", {None: slice(None)}, lambda _: ())[None]
        if self.reference is None and self.job.config.annotator == "length":
            self.reference = reference_length(chains)
        self.rows[None] = self._measured("unsteered", {None: chains}, lambda _: ())[None]
        if not column(self.rows[None], "target"):
            raise SteerableError(
                f"{self.how['target']} is measured in none of {counted(len(chains), 'unsteered chain')}, so that "
                "no gain of it can be told: give another --target, tasks with answers (accuracy), or an annotator that "
                "knows this text"
            )
        self._calibrate(chains)
        grid = [Setting(k, s) for k in range(len(self.arms)) for s in self.strengths]
        rounds: list[Round[Setting]] = []
        if is_searched(len(grid), len(self.tasks), self.how["full_grid"]):
            rounds = successive_halving(grid, len(self.tasks), self._extend, self._ranked, self._cost)
        else:
            self._fill(grid)
        best, reason = self._choose(grid, rounds)
        spent = self._tokens()
        about = None if reason or best is None else self._recommended(best, grid, rounds)
        reason = reason or self._no_more_than_random(about)
        chosen, about = (None, None) if reason else (best, about)
        cost: dict[str, Any] = {"search": spent if rounds else None, "grid": None, "share": None}
        if self.how["full_grid"]:
            if rounds:
                self._fill(grid)
                cost |= {"share": spent / self._tokens(), **self._lost(best, self._choose(grid, [])[0])}
            cost["grid"] = self._tokens()
        result = self._result(grid, rounds, chosen, reason, about, cost)
        write_json(self.job.folder / "calibrate.json", result)
        about_rows = ((s and self._named(s), row) for s, rows in self.rows.items() for row in rows)
        write_jsonl(self.job.folder / "measured.jsonl", ({"setting": s, **row} for s, row in about_rows))
        file = self.job.folder / "recommended.safetensors"
        if chosen is None:
            file.unlink(missing_ok=True)  # of an earlier grid
        else:
            made = self.arms[chosen.arm].direction
            known = known_tasks(self.arms[chosen.arm].file, made.stats)
            stats = {**made.stats, "recommended": noted(result), **note_keys(known, keys_of(self.tasks))}
            replace(made, strength=chosen.strength, stats=stats).save(file)

    def _calibrate(self, chains: Sequence[Record]) -> None:
        """Give each arm the length at which strength 1 spends the budget; leave out those that cannot."""
        texts: list[Continuation] = []
        for chain in chains:
            if chain["sample"] == 0 and len(texts) < TEXTS and sum(len(t.ids) for t in texts) < TOKENS:
                texts.append(Continuation(chain["prompt_ids"], chain["ids"]))
        file = self.partial / "calibrations.json"
        done: dict[str, Any] = read_json(file, dict) if file.exists() else {}
        arms = []
        self.job.display.start("calibrating", len(self.arms), "arm")
        for arm in self.arms:
            if arm.name not in done:
                try:
                    made = calibrate(*self.job.loaded, arm.direction, texts, budget=self.limits.kl)
                    done[arm.name] = {
                        "lengths": {str(s): float(v.double().norm()) for s, v in made.vectors.items()},
                        "norms": {str(s): n for s, n in made.norms.items()},
                        "calibration": made.stats["calibration"],
                    }
                except BudgetNotReached as error:
                    self.job.display.say(f"calibrate: {arm.name} is left out: {error}")
                    done[arm.name] = None
                write_json(file, done)
            if (about := done[arm.name]) is not None:
                norms = {s: about["norms"][str(s)] for s in arm.direction.vectors}
                made = arm.direction.rescaled_to({s: about["lengths"][str(s)] for s in norms})
                stats = {**made.stats, "calibration": about["calibration"]}
                arms.append(replace(arm, direction=replace(made, norms=norms, stats=stats, unit="calibrated")))
            self.job.display.advance(1)
        self.job.display.done()
        if not arms:
            raise SteerableError("no dose of any arm moves the model by the budget: give another --budget or --layers")
        self.arms = arms

    def _steering(self, setting: Setting | None) -> Any:
        return () if setting is None else self.arms[setting.arm].direction.steering(setting.strength)

    def _generate(
        self, name: str, where: Mapping[Any, slice], steering: Callable[[Any], Any], control: str | None = None
    ) -> dict[Any, list[Record]]:
        """Chains of each setting on its slice of the tasks; finished blocks are kept."""
        cells = []
        samples = tuple(range(self.how["samples"]))
        for number, (setting, some) in enumerate(where.items()):
            strength = getattr(setting, "strength", 0.0)
            cells.append(
                Cell(str(number), (), strength, (Part(samples, steering(setting), tasks=some),), control=control)
            )
        chains = generate_cells(self.job, cells, self.tasks, self.partial / name)
        return {setting: chains[str(number)] for number, setting in enumerate(where)}

    def _measured(
        self, name: str, chains: Mapping[Any, Sequence[Record]], steering: Callable[[Any], Any]
    ) -> dict[Any, list[dict[str, Any]]]:
        """A row for every chain: what is aimed at, and every side effect."""
        file = self.partial / f"{name}.json"
        if not file.exists():
            self.job.display.start("measuring", sum(map(len, chains.values())))
            write_json(file, [self._rows_of(some, steering(setting)) for setting, some in chains.items()])
            self.job.display.done()
        return dict(zip(chains, read_json(file, list), strict=True))

    def _rows_of(self, chains: Sequence[Record], steering: Any) -> list[dict[str, Any]]:
        run, (model, tokenizer) = self.job, self.job.loaded
        spans = None
        labels: Sequence[str] = ()
        if self.label:
            given = annotate(
                run.config, chains, self.tasks, run.loaded,
                replies=run.folder / "replies", display=Display(quiet=True), reference=self.reference,
            ).spans  # fmt: skip
            spans = [span for some in given for span in some or ()]
            labels = labels_among(labels_of(run.config), {self.label, *(span["label"] for span in spans)})
        measured = measure(self.tasks, chains, spans, tokenizer, labels)
        texts = [Continuation(chain["prompt_ids"], chain["ids"]) for chain in chains]
        scores = score_texts(model, tokenizer, texts, steering)
        run.display.advance(len(chains))
        return [
            {
                "task_id": m.task_id, "sample": m.sample, "target": self._value(m),
                "accuracy": None if m.correct is None else float(m.correct), "tokens": m.tokens,
                "thinking": m.chain["thinking_tokens"], "loops": m.loops, "unclosed": float(m.unclosed),
                "kl": score and score.kl, "nats": score and score.unsteered,
            }
            for m, score in zip(measured, scores, strict=True)
        ]  # fmt: skip

    def _value(self, m: Measured) -> float | None:
        if self.label:
            return None if m.fractions is None else m.fractions[self.label]
        if self.how["target"] == THINKING:
            return float(m.chain["thinking_tokens"])
        value = all_metrics()[self.how["target"]].value(m)
        return None if value is None else float(value)

    def _target_unit(self) -> str:
        if self.label:
            return "share"
        return "tokens" if self.how["target"] == THINKING else all_metrics()[self.how["target"]].unit

    def _extend(self, settings: Sequence[Setting], start: int, stop: int) -> float:
        before = self._tokens()
        self._take(f"search.{start}", {s: slice(start, stop) for s in settings})
        return self._tokens() - before

    def _fill(self, grid: Sequence[Setting]) -> None:
        """Every setting on the tasks that it has not met."""
        met = {s: len({row["task_id"] for row in self.rows.get(s, ())}) for s in grid}
        self._take("grid", {s: slice(met[s], None) for s in grid if met[s] < len(self.tasks)})

    def _take(self, name: str, where: Mapping[Setting, slice]) -> None:
        measured = self._measured(name, self._generate(name, where, self._steering), self._steering)
        for setting, rows in measured.items():
            self.rows.setdefault(setting, []).extend(rows)

    # --- choosing ---

    def _tokens(self) -> int:
        return sum(row["tokens"] for rows in self.rows.values() for row in rows)

    def _cost(self, setting: Setting | None) -> float:
        """The tokens that a task is expected to take: as many times the unsteered ones as on the tasks that were met,
        of which some are longer than others."""
        base = column(self.rows[None], "tokens")
        mine = column(self.rows[setting], "tokens")
        ratio = sum(mine.values()) / sum(base[task] for task in mine)
        return ratio * sum(base.values()) / len(base) * self.how["samples"]

    def _gains(self, setting: Setting) -> dict[str, float]:
        """By task."""
        return {t: self.aim * v for t, v in change(self.rows[setting], self.rows[None], "target").items()}

    def _gain(self, setting: Setting) -> float:
        gains = self._gains(setting)
        return _mean(gains) if gains else -math.inf

    def _ranked(self, settings: Sequence[Setting], is_last: bool) -> list[Setting]:
        """Those within the limits first, then by gain. While there are few chains, half of a setting's gain is what the
        linear law of its arm expects: it is fitted to all strengths, and so to more chains."""
        gains = {s: self._gains(s) for s in settings}
        score = {s: _mean(gains[s]) if gains[s] else -math.inf for s in settings}
        if not is_last:
            for arm in {s.arm for s in settings}:
                some = [s for s in settings if s.arm == arm]
                if (law := fit_power([s.strength for s in some], [gains[s] for s in some], 1)) is not None:
                    score |= {s: (score[s] + law["coefficient"][0] * abs(s.strength)) / 2 for s in some}
        broken = {s: bool(self.limits.broken(self.rows[s], self.rows[None], is_early=not is_last)) for s in settings}
        return sorted(settings, key=lambda s: (broken[s], -score[s]))

    def _choose(self, grid: Sequence[Setting], rounds: Sequence[Round[Setting]]) -> tuple[Setting | None, str]:
        """The setting within the limits with the largest gain of those whose gain is clear of 0 on the tasks that test
        it (see `_tested`), else of all, with the reason why it is not recommended; None where all break a limit."""
        settings, tasks = _tested(grid, rounds)
        gains = self._tested_gains(settings, tasks)
        within = [s for s in self._ranked(settings, True) if not self.limits.broken(self.rows[s], self.rows[None])]
        if not within:
            return None, "every setting that was measured breaks a limit"
        best = within[0]
        told, count = gains[best], len(self._on(best, tasks))
        if told is not None and (count < _CLEAR or not is_bounded(told)):
            fit = len(self._gains(best).keys() & {task["id"] for task in self.tasks[tasks]})
            return best, (
                f"a gain is told from {_CLEAR} chains of {FEWEST} tasks or more, and there are {count} of {fit}: give "
                "more --validation or --samples"
            )
        if clear := [s for s in within if (tested := gains[s]) is not None and tested[1] > 0]:
            return clear[0], ""
        if told is None or told[0] <= 0:
            return best, f"no setting within the limits has a gain of {self.how['target']}"
        gain, low, high = told
        enough = math.ceil(len(self.tasks) * ((gain - low) / gain) ** 2 / 10) * 10
        return best, (
            f"the best setting within the limits, {self.arms[best.arm].name} at {best.strength:g}, has a gain of "
            f"{gain:.3g} ({low:.3g} to {high:.3g}), which is not clear of 0; if it is real, about --validation "
            f"{enough} would show it"
        )

    def _on(self, setting: Setting, tasks: slice) -> list[dict[str, Any]]:
        """The rows of a setting on some of the tasks."""
        ids = {task["id"] for task in self.tasks[tasks]}
        return [row for row in self.rows[setting] if row["task_id"] in ids]

    def _tested_gains(self, settings: Sequence[Setting], tasks: slice) -> dict[Setting, Interval | None]:
        """[gain, low, high] of each, wide enough for the best of them to be believed."""
        gains = [
            {t: self.aim * v for t, v in change(self._on(s, tasks), self.rows[None], "target").items()}
            for s in settings
        ]  # fmt: skip
        return dict(zip(settings, simultaneous_intervals(gains, self.seed), strict=True))

    def _lost(self, chosen: Setting | None, best: Setting | None) -> dict[str, Any]:
        """What the search's choice gives away beside the full grid's, and what one step of the grid changes there."""
        if chosen is None or best is None:
            return {"steps": None, "lost": None, "step": None, "best": self._named(best)}
        lost = difference_interval(self._gains(best), self._gains(chosen), self.seed)
        near = [s for s in self.rows if s and self._steps(s, best) == 1]
        near = [s for s in near if not self.limits.broken(self.rows[s], self.rows[None])]
        step = max((abs(self._gain(best) - self._gain(s)) for s in near), default=0.0)
        return {"steps": self._steps(chosen, best), "lost": lost, "step": step, "best": self._named(best)}

    def _steps(self, a: Setting, b: Setting) -> int | None:
        """How many steps of the grid lie between two settings; None between two files, or one layer and several."""
        one, other = self.arms[a.arm], self.arms[b.arm]
        if one.file != other.file or (len(one.layers) > 1) != (len(other.layers) > 1):
            return None
        between = [arm.layers for arm in self.arms if arm.file == one.file]
        by_layer = abs(between.index(one.layers) - between.index(other.layers))
        return by_layer + abs(self.strengths.index(a.strength) - self.strengths.index(b.strength))

    # --- what is told ---

    def _named(self, setting: Setting | None) -> dict[str, Any] | None:
        if setting is None:
            return None
        arm = self.arms[setting.arm]
        doses = arm.direction.dose(setting.strength)
        return {"arm": arm.name, "layers": list(arm.layers), "strength": setting.strength, "dose": max(doses.values())}

    def _about(self, setting: Setting, rows: Rows) -> dict[str, Any]:
        base = of_tasks(self.rows[None], rows)
        return {
            **(self._named(setting) or {}),
            "tasks": len({row["task_id"] for row in rows}),
            "dropped": sum(row["target"] is None for row in rows),
            "gain": gain_interval(rows, base, self.aim, self.seed),
            **{name: mean_interval(column(rows, name), self.seed) for name in _METRICS},
            "perplexity": perplexity_beside(rows, base, self.seed),
            "broken": self.limits.broken(rows, base),
        }

    def _recommended(
        self, chosen: Setting, grid: Sequence[Setting], rounds: Sequence[Round[Setting]]
    ) -> dict[str, Any]:
        """The setting with intervals over the tasks that tested it; beside it a random direction with the same dose."""
        settings, tasks = _tested(grid, rounds)
        rows = self._on(chosen, tasks)
        arm = self.arms[chosen.arm]
        twin = arm.direction.random_like(self.seed).steering(chosen.strength)
        chains = self._generate("control", {chosen: tasks}, lambda _: twin, control="random")
        control = self._measured("control", chains, lambda _: twin)[chosen]
        original = {s: float(v.double().norm()) for s, v in import_file(arm.file).vectors.items()}
        factors = {float(v.double().norm()) / original[s] for s, v in arm.direction.vectors.items()}
        file_strength = factors.pop() * chosen.strength if len(factors) == 1 else None
        about = self._about(chosen, rows) | {"gain": self._tested_gains(settings, tasks)[chosen]}
        random = self._about(chosen, control)
        beyond = {task: self.aim * value for task, value in change(rows, control, "target").items()}
        return {
            **about, "file": arm.file, "file_strength": file_strength,
            "random": {name: random[name] for name in ("gain", "kl", "accuracy", "tokens")},
            "above_random": student_interval(beyond),
        }  # fmt: skip

    def _no_more_than_random(self, about: Mapping[str, Any] | None) -> str:
        """Why a setting with a clear gain is not recommended where a random direction of its dose does as much."""
        if about is None or (beyond := about["above_random"]) is not None and beyond[1] > 0:
            return ""
        told = "nothing that could be told" if beyond is None else "{:.3g} ({:.3g} to {:.3g})".format(*beyond)
        return (
            f"the best setting within the limits, {about['arm']} at {about['strength']:g}, has a gain of "
            f"{about['gain'][0]:.3g}, of which {told} is beyond a random direction with the same dose: not clear of 0"
        )

    def _result(
        self, grid: Sequence[Setting], rounds: Sequence[Round[Setting]], chosen: Setting | None, reason: str,
        about: Mapping[str, Any] | None, cost: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        settings = [self._about(s, self.rows[s]) for s in grid if s in self.rows]
        prices = {i: (s["kl"][0], s["gain"][0]) for i, s in enumerate(settings) if s["kl"] and s["gain"]}
        arms = []
        curves: dict[str, dict[str, Any]] = {"kl": {}, "dose": {}}
        for k, arm in enumerate(self.arms):
            mine = [s for s in grid if s.arm == k and s in self.rows]
            gains = {s: self._gains(s) for s in mine}
            harms = {n: [change(self.rows[s], self.rows[None], n) for s in mine] for n in ("kl", "accuracy")}
            strengths = [s.strength for s in mine]
            arms.append({
                "name": arm.name, "file": arm.file, "layers": list(arm.layers), "method": arm.direction.method,
                "calibration": arm.direction.stats["calibration"],
                "law": {
                    "gain": fit_power(strengths, list(gains.values()), 1, self.seed),
                    "kl": fit_power(strengths, harms["kl"], 2, self.seed),
                    "accuracy": fit_power(strengths, harms["accuracy"], 2, self.seed),
                },
            })  # fmt: skip
            curves["kl"][arm.name] = [(_mean(column(self.rows[s], "kl")), gains[s]) for s in mine]
            curves["dose"][arm.name] = [(max(arm.direction.dose(s.strength).values()), gains[s]) for s in mine]
        return {
            "model": models.model_id(self.job.loaded.model) or self.job.config.model,
            "settings": dict(self.how) | {"unit": self._target_unit(), "limits": asdict(self.limits)}
                        | self.job.config.subset(FIELDS),
            "tasks": len(self.tasks),
            "unsteered": {n: mean_interval(column(self.rows[None], n), self.seed)
                          for n in _METRICS},
            "arms": arms,
            "grid": settings,
            "front": pareto_front(prices),
            "rounds": [{"tasks": r.stop, "settings": len(r.settings),
                        "survivors": list(map(self._named, r.survivors[:5]))} for r in rounds],
            "equal_kl": compare_at_equal(curves["kl"], self.seed),
            "equal_dose": compare_at_equal(curves["dose"], self.seed),
            "cost": dict(cost),
            "recommended": None if about is None else dict(about),
            "reason": reason,
        }  # fmt: skip


def is_searched(settings: int, tasks: int, full_grid: bool) -> bool:
    """Whether a grid is searched; a full grid on too few tasks for that is measured as it is."""
    try:
        return not full_grid or tasks >= fewest_tasks(settings)
    except UsageError:
        return False


def _tested(grid: Sequence[Setting], rounds: Sequence[Round[Setting]]) -> tuple[Sequence[Setting], slice]:
    """The settings among which one is chosen, and the tasks that test its gain: after a search those of its last round,
    whose tasks had no part in the choice of its settings; else all."""
    return (rounds[-1].settings, slice(rounds[-1].start, rounds[-1].stop)) if rounds else (grid, slice(0, None))


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0


def noted(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a direction file keeps of a recommendation, in `stats["recommended"]`."""
    about = {key: value for key, value in result["recommended"].items() if key not in ("arm", "file", "broken")}
    return {**about, "of": result["settings"]["target"], "aim": result["settings"]["aim"], "model": result["model"]}
