"""The models that this project teaches: their training, and every figure of theirs (`pocket` and `smol-think`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steerable.chains.generation import Job, generate_jobs
from steerable.chains.records import LABELS, STEERABLE, Record, chain_key
from steerable.chains.tasks import make_tasks
from steerable.evals.intervals import TOO_FEW, Interval, by_task, is_bounded, mean_interval, ratio_interval
from steerable.evals.metrics import Measured
from steerable.evals.metrics import measure as measure_chains
from steerable.evals.passk import curve
from steerable.models import loading as models
from steerable.models.pocket import recipe as pocket_recipe
from steerable.models.smol import recipe as smol_recipe
from steerable.models.smol.merging import write_merged
from steerable.models.taught import TAUGHT
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.files import whole_folder, writable_target
from steerable.store.run_folder import write_json

#: The k of pass@k.
KS = {"pocket": (1, 4, 8, 32), "smol-think": (1, 4, 8, 16)}
#: Chains of a task that is not among those with all samples.
FEW = 4
_NUMBER = re.compile(r"\d+")
_SLICE = 512  # chains that are tokenised together

# Two whole numbers, an operator and the value, where no longer formula goes on to the left or right.
_EQUATION = re.compile(r"(?<![\w.*/+=()-])(?<![-+*/=] )(\d+) ([-+*/]) (\d+) = (-?\d+)(?!\w|\.\d| ?[-+*/=])")


def equations(thinking: str) -> tuple[int, int]:
    """``(all, wrong)``: the two-number equations that a chain states, and how many of them are false.

    Equations with an unknown and parts of longer formulas are no statements about two numbers and do not count.
    """
    statements = _EQUATION.findall(thinking)
    return len(statements), sum(not _true(int(a), operator, int(b), int(c)) for a, operator, b, c in statements)


def _true(a: int, operator: str, b: int, c: int) -> bool:
    if operator == "/":
        return b != 0 and a == b * c
    return {"+": a + b, "-": a - b, "*": a * b}[operator] == c


def train_pocket(
    out: Path = Path("pocket-model"),
    *,
    steps: int = 3800,
    seed: int = 0,
    device: str = "cpu",
    threads: int = 0,
    display: Display | None = None,
) -> dict[str, Any]:
    """Train the bundled model from scratch by its recipe; a stopped training goes on from its last checkpoint.

    Args:
        out: The model folder to make.
        steps: Optimiser steps of 32 chains.
        seed: Seed of weights and training stream.
        device: cpu or cuda.
        threads: Threads; 0: as many as there are cores.
        display: Where the training's log is shown; default: nowhere.
    """
    display = display or Display(quiet=True)
    if threads:
        torch.set_num_threads(threads)
    pocket_recipe.train(out, steps=steps, seed=seed, device=device, progress=display.tell)
    display.tell(f"The model is in {out}; try: steerable chat --model {out}")
    return {"out": str(out)}


def train_smol(
    out: Path = Path("smol-think"),
    *,
    steps: int = 820,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    threads: int = 0,
    display: Display | None = None,
) -> dict[str, Any]:
    """Train the adapter of smol-think by its recipe; a stopped training goes on from its last checkpoint.

    Under torchrun, processes share each batch: `torchrun --nproc-per-node 2 -m steerable smol train --threads 1`.

    Args:
        out: The folder to make: adapter/ is the adapter, model/ the model with the adapter in its weights.
        steps: Optimiser steps of 8 chains.
        seed: Seed of adapter and training stream.
        device: cpu or cuda.
        dtype: What matrix products run in; auto: bfloat16 on GPUs and on CPUs with units for it, else float32.
        threads: Threads; 0: as many as there are cores.
        display: Where the training's log is shown; default: nowhere.
    """
    display = display or Display(quiet=True)
    if threads:
        torch.set_num_threads(threads)
    is_first = smol_recipe.train(
        out / "adapter", steps=steps, seed=seed, device=device, dtype=dtype, progress=display.tell
    )
    if is_first:  # of the processes
        with whole_folder(out / "model") as folder:
            write_merged(out / "adapter", folder)
        display.tell(f"The model is in {out / 'model'}; try: steerable smol measure --model {out / 'model'}")
    return {"out": str(out)}


def measure_smol(
    model: str = "smol-think",
    *,
    tasks: int = 32,
    samples: int = 16,
    seed: int = 0,
    workers: int | None = None,
    out: Path | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Every figure of smol-think: pass@k, behaviours, copied numbers, arithmetic, length, closing.

    Args:
        model: 'smol-think' or another folder of the recipe.
        tasks: Unseen tasks a family.
        samples: Chains of each task.
        seed: Seed of tasks and sampling.
        workers: Processes that generate; default: one a core for small models. Changes no result.
        out: Also write the figures to this JSON file.
        display: Where progress and figures are shown; default: nowhere.
    """
    return _measure("smol-think", model, tasks, samples, None, seed, workers, out, display)


def measure_pocket(
    model: str = "pocket",
    *,
    tasks: int = 256,
    samples: int = 32,
    deep: int | None = 64,
    seed: int = 0,
    workers: int | None = None,
    out: Path | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Every figure of the bundled model: pass@k, behaviours, arithmetic, length, closing.

    Args:
        model: 'pocket' or another folder of the recipe.
        tasks: Unseen tasks a family.
        samples: Chains of each task of --deep; the other tasks get 4. pass@k is taken over the tasks that have k
            chains, all else over all chains.
        deep: Tasks a family with all samples; as many as --tasks is the full measurement.
        seed: Seed of tasks and sampling.
        workers: Processes that generate; default: one a core for small models. Changes no result.
        out: Also write the figures to this JSON file.
        display: Where progress and figures are shown; default: nowhere.

    Returns:
        ``figures`` of the chains, with ``model``, ``seed`` and ``megabytes`` (10^6 bytes of the model folder).

    Raises:
        UsageError: an unknown model, fewer than one task or sample, more tasks than a family has.
    """
    return _measure("pocket", model, tasks, samples, deep, seed, workers, out, display)


def _measure(
    name: str,
    model: str,
    tasks: int,
    samples: int,
    deep: int | None,
    seed: int,
    workers: int | None,
    out: Path | None,
    display: Display | None,
) -> dict[str, Any]:
    """The figures of a model that was taught what the model `name` was."""
    if out is not None:
        writable_target(out)
    counts = (("tasks", tasks, 1), ("samples", samples, 1), ("deep", deep, 0), ("workers", workers, 1))
    for option, value, least in counts:
        if value is not None and value < least:
            raise UsageError(f"--{option} is {value}: expected {least} or more")
    loaded = models.load(model)
    display = display or Display(quiet=True)
    jobs, asked = [], []
    for family in TAUGHT[name].families:
        drawn = make_tasks(f"{name}:{family}", tasks, seed)
        asked += drawn
        cut = len(drawn) if deep is None else deep
        parts = (drawn[:cut], range(samples)), (drawn[cut:], range(min(samples, FEW)))
        jobs += [Job(part, numbers) for part, numbers in parts if part]
    display.start("measure", sum(len(job.tasks) * len(job.samples) for job in jobs))
    # Tens of thousands of chains are tens of megabytes of text; what they are measured by is made slice by slice.
    made = generate_jobs(loaded, jobs, seed=seed, workers=workers, progress=display.advance)
    display.done()
    folder = Path(loaded.model.config._name_or_path)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else None
    result = figures(asked, [chain for group in made for chain in group], loaded.tokenizer, seed, name)
    result = {"model": model, "seed": seed, "megabytes": None if size is None else size / 1e6, **result}
    result = {**result, "targets": targets(result, name)}
    if out is not None:
        write_json(out, result)
    display.tell(table(result))
    return result


@dataclass(frozen=True)
class _Seen:
    """What is kept of a chain."""

    chain: Measured
    answered: bool
    stated: int
    wrong: int
    coverage: float
    copied: bool | None


def figures(
    tasks: Sequence[Mapping[str, Any]], chains: Sequence[Record], tokenizer: Any, seed: int = 0, name: str = "pocket"
) -> dict[str, Any]:
    """The model in numbers, from unsteered chains of its tasks.

    Args:
        tasks: task records; ``category`` is the family.
        chains: chain records, each task with at least one.
        tokenizer: the model's own, with offsets.
        seed: of the bootstrap.
        name: of the taught model, whose annotator labels the chains.

    Returns:
        Counts, and ``[estimate, low, high]`` (95 % intervals over tasks) of everything else; shares are in [0, 1].
        ``pass`` holds pass@k by family and for ``mean``, the mean over families, which have equally many tasks.
    """
    seen = [
        s
        for start in range(0, len(chains), _SLICE)
        for s in _look(tasks, chains[start : start + _SLICE], tokenizer, TAUGHT[name].annotate)
    ]
    family = {task["id"]: task["category"] for task in tasks}
    marks: dict[str, list[bool]] = {}
    for s in seen:
        marks.setdefault(s.chain.task_id, []).append(bool(s.chain.correct))

    def interval(value: str) -> Interval | None:
        return mean_interval(by_task(_values(seen, value)), seed)

    names = list(dict.fromkeys(family.values()))
    deepest = {k: [task for task, row in marks.items() if len(row) >= k] for k in KS[name]}
    return {
        "families": len(names),
        "tasks": len(marks),
        "chains": len(chains),
        "tokens_generated": sum(s.chain.tokens for s in seen),
        "equations": sum(s.stated for s in seen),
        "pass_tasks": {f"pass@{k}": len(deep) for k, deep in deepest.items()},
        "pass": {
            group: {
                f"pass@{k}": curve(counts, [k], seed)[k] if counts else None
                for k, deep in deepest.items()
                for counts in [{t: (len(marks[t]), sum(marks[t])) for t in deep if group in ("mean", family[t])}]
            }
            for group in [*names, "mean"]
        },
        "closed_and_answered": interval("answered"),
        "copied": interval("copied"),
        "wrong_equations": ratio_interval(by_task(_values(seen, "wrong")), by_task(_values(seen, "stated")), seed),
        "tokens": interval("tokens"),
        "loops": interval("loops"),
        "coverage": interval("coverage"),
        "fractions": {label: interval(label) for label in LABELS},
    }


def _look(
    tasks: Sequence[Mapping[str, Any]], chains: Sequence[Record], tokenizer: Any, annotate: Any
) -> Iterator[_Seen]:
    numbers = {task["id"]: set(_NUMBER.findall(task["prompt"])) for task in tasks}
    spans = {chain_key(chain): annotate(chain) for chain in chains}
    every_span = [span for chain_spans in spans.values() for span in chain_spans]
    measured = measure_chains(tasks, chains, every_span, tokenizer)
    for chain, about in zip(chains, measured, strict=True):
        text = chain["thinking"]
        inside = sum(_ink(text[s["start"] : s["end"]]) for s in spans[chain_key(chain)])
        answered = chain["closed"] and bool(chain["answer"].strip())
        wanted = numbers[chain["task_id"]]
        copied = wanted <= set(_NUMBER.findall(text)) if wanted else None
        yield _Seen(about, answered, *equations(text), inside / max(1, _ink(text)), copied)


def _ink(text: str) -> int:
    return sum(map(len, text.split()))


def _values(seen: Iterable[_Seen], value: str) -> Iterator[tuple[str, float | None]]:
    for s in seen:
        if value in LABELS:
            yield s.chain.task_id, s.chain.fractions[value] if s.chain.fractions else None
        else:
            found = getattr(s if hasattr(s, value) else s.chain, value)
            yield s.chain.task_id, None if found is None else float(found)


def targets(result: Mapping[str, Any], name: str = "pocket") -> list[dict[str, Any]]:
    """What a taught model promises: ``{"what", "low", "high", "measured", "met"}``; None where it was not measured."""
    mean = result["pass"]["mean"]
    promises: list[tuple[str, Interval | None, float, float]]
    if name == "pocket":
        promises = [
            ("pass@1, mean of families", mean["pass@1"], 0.30, 0.75),
            ("pass@32, mean of families", mean["pass@32"], 0.90, 1.0),
            ("wrong equations", result["wrong_equations"], 0.0, 0.02),
            ("closed and answered", result["closed_and_answered"], 0.97, 1.0),
        ]
    else:
        limits = (("pass@1", 0.30, 0.80), ("pass@16", 0.85, 1.0))
        promises = [
            *(
                (f"{k}, {family}", result["pass"][family][k], *bounds)
                for family in TAUGHT[name].families
                for k, *bounds in limits
            ),
            ("copies the task's numbers", result["copied"], 0.98, 1.0),
            ("closed and answered", result["closed_and_answered"], 0.95, 1.0),
        ]
    promises += [
        *((label, result["fractions"][label], 0.04, 0.35) for label in STEERABLE),
    ]
    return [
        {
            "what": what,
            "low": low,
            "high": high,
            "measured": value[0] if value else None,
            "met": low <= value[0] <= high if value else None,
        }
        for what, value, low, high in promises
    ]


def table(result: Mapping[str, Any]) -> str:
    """The figures of ``measure`` as text for a terminal."""
    counts = result["pass_tasks"]
    ks = [name for name, n in counts.items() if n]
    families = result["families"]
    share = {True: "met", False: "NOT MET", None: "not measured"}
    size = result["megabytes"]
    blocks = [
        [
            f"{result['model']}: {result['tasks'] // families} unseen tasks in each of {families} families, "
            f"{result['chains']:,} sampled chains, {result['tokens_generated']:,} tokens, seed {result['seed']}"
            + (f"; the folder has {size:.1f} MB" if size is not None else ""),
            "In brackets: 95 % interval over tasks.",
        ],
        _columns(
            [
                ["", *ks],
                *([name, *(_percent(row[k]) for k in ks)] for name, row in result["pass"].items()),
                ["tasks a family", *(str(counts[k] // families) for k in ks)],
            ]
        ),
        _columns(
            [
                ["closed and answered", _percent(result["closed_and_answered"])],
                ["chains with every number of the task", _percent(result["copied"])],
                [f"wrong of {result['equations']:,} equations", _percent(result["wrong_equations"], 2)],
                ["tokens a chain", _number(result["tokens"])],
                ["loops (repeated 8-grams)", _percent(result["loops"])],
                ["annotator coverage", _percent(result["coverage"])],
            ]
        ),
        _columns([["thinking tokens", "share"], *([label, _percent(v)] for label, v in result["fractions"].items())]),
        _columns(
            [
                ["target", "wanted", "measured", ""],
                *(
                    [
                        t["what"],
                        f"{t['low']:.0%} to {t['high']:.0%}",
                        "-" if t["measured"] is None else f"{t['measured']:.2%}",
                        share[t["met"]],
                    ]
                    for t in result["targets"]
                ),
            ]
        ),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def _percent(value: Interval | None, digits: int = 1) -> str:
    if value is None:
        return "-"
    middle, low, high = (f"{100 * v:.{digits}f}" for v in value)
    return f"{middle} % ({low}-{high})" if is_bounded(value) else f"{middle} % ({TOO_FEW})"


def _number(value: Interval | None) -> str:
    return "-" if value is None else "{:.1f} ({:.1f}-{:.1f})".format(*value)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
