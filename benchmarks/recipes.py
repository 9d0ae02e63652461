"""Every recipe for reasoning on a model that was taught to think, at one KL budget: which shortens chains, which lifts
accuracy?

    python benchmarks/recipes.py                        # pocket; goes on where it was stopped; one thread
    python benchmarks/recipes.py --summary              # benchmarks/results/recipes.json
    python benchmarks/recipes.py --model smol-think --only angular-shorter seal-shorter      # recipes_smol-think.json
    # one row again, on other tasks
    python benchmarks/recipes.py --only angular-shorter --seed 1 --out runs/recipes-1 \
        --to benchmarks/results/recipes_again_1.json

Directions come from chains of extraction tasks; the layer, where a recipe leaves it open, is chosen on validation
tasks; figures are those of evaluation tasks that neither has seen, with the seeds of the unsteered chains. Whatever a
recipe gives is scaled until KL(steered || unsteered), in nats a token, is the budget over whole unsteered chains of
validation tasks: the strength of what is added, of a floor or of a transport, the angle of a relative rotation, the
difference of the weights. Two controls are scaled to the same budget, each drawn twice: the recipe's own map in random
directions, and the recipe on data with shuffled labels. Intervals are 95 % over tasks, paired with the unsteered
chains. `--budget`, `--tasks` and `--only` make a short pass.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from recipe_data import Data
from recipe_doses import Made, Texts, dosed, patched, random_like
from recipe_rows import Row, rows

from steerable.chains.generation import Job, generate_jobs
from steerable.chains.records import Record, read_jsonl, write_jsonl
from steerable.chains.tasks import make_splits
from steerable.evals.intervals import by_task, difference_interval, mean_interval, ratio_interval
from steerable.evals.metrics import measure
from steerable.models import loading as models
from steerable.store.errors import SteerableError, SteerableWarning
from steerable.store.run_folder import read_json, write_json

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "pocket": {"extraction": 120, "validation": 48, "evaluation": 100},
    "smol-think": {"extraction": 80, "validation": 24, "evaluation": 64},
}
SAMPLES = {"extraction": 4, "validation": 4, "evaluation": 4}
CONTROLS = ("random", "shuffled")
DRAWS = 2  # of each control: sample k is steered by draw k
LONGEST, TEXTS = 400, 8


# --- the work ---


class Work:
    """One folder of chains and settings; what is finished is not done again."""

    def __init__(self, out: Path, model: str, budget: float, sizes: dict[str, int], seed: int):
        self.out, self.model, self.budget = out, model, budget
        self.loaded = models.load(model)
        if not (out / "tasks.jsonl").exists():
            write_jsonl(out / "tasks.jsonl", make_splits(model, sizes, seed=seed))
        tasks = read_jsonl(out / "tasks.jsonl", "task")
        self.tasks = {split: [t for t in tasks if t["split"] == split][:size] for split, size in sizes.items()}
        self.cache: dict[Any, Made | None] = {}

    def chains(self, name: str, split: str, cells: Callable[[], Sequence[tuple[Sequence[int], Made]]]) -> list[Record]:
        """The chains of a file; each cell has its samples and what steers them."""
        file = self.out / "chains" / f"{name}.jsonl"
        if not file.exists():
            chains = []
            for samples, made in cells():
                with patched(self.loaded.model, made) as steered:
                    job = Job(self.tasks[split], samples, steered)
                    chains += generate_jobs(self.loaded, [job], max_new_tokens=LONGEST, workers=1)[0]
            write_jsonl(file, chains)
        return read_jsonl(file, "chain")

    def unsteered(self, split: str) -> list[Record]:
        return self.chains(split, split, lambda: [(range(SAMPLES[split]), ())])

    @cached_property
    def data(self) -> Data:
        tasks = {task["id"]: task for task in self.tasks["extraction"]}
        chains = [c for c in self.unsteered("extraction") if c["task_id"] in tasks]
        return Data(self.loaded, tasks, chains)

    @cached_property
    def texts(self) -> Texts:
        return Texts(self.loaded, [c for c in self.unsteered("validation") if c["sample"] == 0][:TEXTS])

    def made(self, row: Row, choice: Any, seed: int | None = None) -> Made | None:
        key = row.name, choice, seed
        if key not in self.cache:
            self.cache[key] = row.make(self.data, choice, seed)
        return self.cache[key]

    def setting(self, row: Row) -> dict[str, Any]:
        """The choice that validation tasks prefer, and its dose.

        Where chains are to be shorter: the shortest of those whose accuracy falls by no more than 5 points, else the
        most accurate. Where answers are to be right: the most accurate.
        """
        file = self.out / "settings" / f"{row.name}.json"
        if not file.exists():
            before = self.measured("validation", self.unsteered("validation"))
            accuracy = _mean(before, "accuracy")
            tried = []
            for choice in row.choices:
                try:
                    made = self.made(row, choice)
                    assert made is not None
                    factor, kl = self.texts.dose(made, self.budget)
                except SteerableError as error:
                    tried.append({"choice": choice, "error": str(error)})
                    continue
                if len(row.choices) == 1:
                    tried.append({"choice": choice, "factor": factor, "kl": kl, "accuracy": None, "thinking": None})
                    continue
                name = f"validation/{row.name}-{choice}"
                cells = [((0, 1), dosed(made, factor))]
                after = self.measured("validation", self.chains(name, "validation", lambda cells=cells: cells))
                figures = {key: _mean(after, key) for key in ("accuracy", "thinking")}
                tried.append({"choice": choice, "factor": factor, "kl": kl, **figures})
            able = [t for t in tried if "error" not in t]
            best = able[0] if len(able) == 1 else None
            if len(able) > 1:
                cheap = [t for t in able if t["accuracy"] >= accuracy - 0.05] if row.aim == "shorter" else []
                best = min(cheap, key=lambda t: t["thinking"]) if cheap else max(able, key=lambda t: t["accuracy"])
            unsteered = {key: _mean(before, key) for key in ("accuracy", "thinking")}
            write_json(file, {"chosen": best, "tried": tried, "unsteered": unsteered})
        return read_json(file)  # type: ignore[no-any-return]

    def steered(self, row: Row) -> Made:
        chosen = self.setting(row)["chosen"]
        return dosed(self.made(row, chosen["choice"]), chosen["factor"])  # type: ignore[arg-type]

    def evaluate(self, row: Row) -> list[Record]:
        return self.chains(row.name, "evaluation", lambda: [(range(SAMPLES["evaluation"]), self.steered(row))])

    def control(self, row: Row, kind: str) -> list[Record] | None:
        """Chains of a control at the same budget; None where the recipe has none, or none that reaches the budget."""
        chosen = self.setting(row)["chosen"]
        file = self.out / "settings" / f"{row.name}-{kind}.json"
        if not file.exists():
            doses: list[dict[str, Any]] | None = []
            try:
                for seed in range(DRAWS):
                    if (made := self.undosed(row, kind, seed)) is None:
                        raise SteerableError("it learns from nothing that could be shuffled")
                    factor, kl = self.texts.dose(made, self.budget, chosen["factor"])
                    doses.append({"factor": factor, "kl": kl})
            except SteerableError as error:
                doses = [{"error": str(error)}]
            write_json(file, doses)
        doses = read_json(file, list)
        if "error" in doses[0]:
            return None
        drawn = enumerate(dose["factor"] for dose in doses)
        return self.chains(
            f"{row.name}-{kind}",
            "evaluation",
            lambda: [([seed], dosed(self.undosed(row, kind, seed), factor)) for seed, factor in drawn],
        )

    def undosed(self, row: Row, kind: str, seed: int) -> Made | None:
        """A draw of a control as it comes."""
        choice = self.setting(row)["chosen"]["choice"]
        if kind == "shuffled":
            return self.made(row, choice, seed + 1)
        return random_like(self.made(row, choice), seed)

    def measured(self, split: str, chains: Sequence[Record]) -> list[dict[str, Any]]:
        figures = measure(self.tasks[split], chains, None, self.loaded.tokenizer)
        return [
            {
                "task_id": m.task_id, "sample": m.sample, "accuracy": float(bool(m.correct)),
                "thinking": m.chain["thinking_tokens"], "loops": m.loops, "unclosed": float(m.unclosed),
            }
            for m in figures
        ]  # fmt: skip


def _mean(measured: Sequence[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in measured) / len(measured)


# --- the summary ---


def summarise(work: Work, chosen: Sequence[Row], out: Path) -> None:
    base = work.measured("evaluation", work.unsteered("evaluation"))
    table = []
    for row in chosen:
        if not (work.out / "chains" / f"{row.name}.jsonl").exists():
            continue
        made: dict[str, Any] = {"recipe": row.recipe, "aim": row.aim, **work.setting(row)}
        made |= effects(work.measured("evaluation", work.evaluate(row)), base)
        made["kl_of_its_own_chains"] = of_own_chains(work, row)
        for kind in CONTROLS:
            if (work.out / "settings" / f"{row.name}-{kind}.json").exists() and (chains := work.control(row, kind)):
                made[kind] = effects(work.measured("evaluation", chains), base)
                made[kind]["doses"] = read_json(work.out / "settings" / f"{row.name}-{kind}.json")
                made[kind]["beyond"] = effects(
                    work.measured("evaluation", work.evaluate(row)), work.measured("evaluation", chains)
                )
        table.append(made)
    unsteered = {k: mean_interval(by_task((r["task_id"], r[k]) for r in base)) for k in COLUMNS}
    about = {"model": work.model, "budget": work.budget, "tasks": {k: len(v) for k, v in work.tasks.items()}}
    write_json(out, {**about, "samples": SAMPLES, "unsteered": unsteered, "rows": table})
    for made in table:
        print(made["recipe"], made["aim"], {k: made[k] for k in ("accuracy_change", "thinking_ratio")})


COLUMNS = ("accuracy", "thinking", "loops", "unclosed")


def effects(rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means, and differences to the same samples of the same tasks, with their intervals."""
    samples = {row["sample"] for row in rows} & {row["sample"] for row in base}
    after, before = (
        {k: by_task((r["task_id"], r[k]) for r in some if r["sample"] in samples) for k in COLUMNS}
        for some in (rows, base)
    )
    whole = {k: by_task((r["task_id"], r[k]) for r in rows) for k in COLUMNS}
    return {
        **{k: mean_interval(whole[k]) for k in COLUMNS},
        "accuracy_change": difference_interval(after["accuracy"], before["accuracy"]),
        "thinking_ratio": ratio_interval(after["thinking"], before["thinking"]),
        "loops_change": difference_interval(after["loops"], before["loops"]),
    }


def of_own_chains(work: Work, row: Row) -> float:
    """KL(steered || unsteered) over the recipe's own chains of 60 tasks."""
    file = work.out / "divergences" / f"{row.name}.json"
    if not file.exists():
        chains = [c for c in work.evaluate(row) if c["sample"] == 0][:60]
        write_json(file, Texts(work.loaded, chains).divergence(work.steered(row)))
    return float(read_json(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="pocket")
    parser.add_argument("--out", type=Path, help="default: runs/recipes, or runs/recipes-MODEL")
    parser.add_argument("--budget", type=float, default=0.05, help="nats a token")
    parser.add_argument("--tasks", type=float, default=1.0, help="share of the tasks")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks: another one wants folders of its own")
    parser.add_argument("--only", nargs="+", help="rows, recipe-aim")
    parser.add_argument("--stages", nargs="+", default=["settings", "evaluation", "controls"])
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--to", type=Path, help="default: recipes.json or recipes_MODEL.json in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SteerableWarning)
    name = "recipes" if args.model == "pocket" else f"recipes_{args.model}"
    sizes = {split: round(n * args.tasks) for split, n in SIZES[args.model].items()}
    work = Work(args.out or Path("runs") / name.replace("_", "-"), args.model, args.budget, sizes, args.seed)
    chosen = [row for row in rows(args.model) if not args.only or row.name in args.only]
    if not args.summary:
        do = {
            "settings": lambda row: work.setting(row)["chosen"],
            "evaluation": lambda row: len(work.evaluate(row)),
            "controls": lambda row: [len(work.control(row, kind) or ()) for kind in CONTROLS],
        }
        work.unsteered("evaluation")
        for row, stage in itertools.product(chosen, args.stages):
            if stage == "settings" or work.setting(row)["chosen"]:
                print(time.strftime("%H:%M:%S"), stage, row.name, do[stage](row), flush=True)
    summarise(work, chosen, args.to or RESULTS / f"{name}.json")


if __name__ == "__main__":
    main()
