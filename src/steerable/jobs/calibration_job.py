"""`steerable calibrate`: which layer, which strength? Directions at layers and strengths, measured over whole chains.

Every arm (a file's direction at one layer, or at all of its layers) is first given the length at which strength 1 moves
the unsteered model's own chains by the KL budget, so that equal strengths are equal prices. Then `evals/halving.py`
searches the grid of arms and strengths; `--full-grid` also measures the rest of it. What is finished of a stopped
search is kept, and not done again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from steerable.chains.records import read_jsonl, write_jsonl
from steerable.chains.tasks import make_tasks
from steerable.engines.transformers import steer
from steerable.evals.dose_response import Limits
from steerable.evals.halving import fewest_tasks
from steerable.evals.metrics import all_metrics
from steerable.formats import import_file
from steerable.jobs import annotation
from steerable.jobs.annotation import labels_of
from steerable.jobs.calibration_grid import FIELDS, THINKING, Arm, GridSearch, noted
from steerable.jobs.dry_run import estimate_search
from steerable.jobs.dry_run import tables as plan_tables
from steerable.jobs.run import Run, open_run, recorded_settings
from steerable.jobs.selection import interior
from steerable.jobs.settings import Config
from steerable.jobs.task_origin import known_tasks
from steerable.models import loading as models
from steerable.pages.calibration_page import render, summary, tables
from steerable.steering.direction import Direction
from steerable.steering.maps import Shift, parse_map
from steerable.steering.site import parse_layers
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import write_atomic
from steerable.store.run_folder import RunFolder, read_json, write_json

_LAYERS = 8  # that are tried of a file that has many


def calibrate_files(
    files: Sequence[str | Path],
    *,
    run: Path | None = None,
    target: str | None = None,
    aim: str = "more",
    strengths: str | None = None,
    layers: str | None = None,
    samples: int = 2,
    full_grid: bool = False,
    perplexity: float = 2.0,
    loops: float = 0.1,
    unclosed: float = 0.1,
    accuracy: float = 0.1,
    dry_run: bool = False,
    out: str | Path = "runs/calibrate",
    workers: int | None = None,
    overwrite: bool = False,
    display: Display | None = None,
    **settings: Annotated[Any, Config],
) -> dict[str, Any]:
    """Which layer, which strength? Searches both, for one direction or several, under a budget of side effects.

    Every arm (a file at one layer, or at all its layers) gets the length at which strength 1 spends the KL budget; its
    strengths are multiples of that. Side effects are measured over whole chains. The recommended setting is written
    into the direction file's stats (not into a run folder's), and as a file of its own. Goes on where it was stopped.

    Args:
        files: Direction files; several are compared at equal KL and at equal dose.
        run: A run folder whose model, validation tasks and annotator are taken; without it tasks are drawn that the
            files were not made on, as far as that is known.
        target: What is aimed at: a label of the annotator, accuracy, thinking (its length in tokens), or another
            metric; default: the behaviour that the first file names.
        aim: more or less of it.
        strengths: Multiples of the KL budget's dose, e.g. 0.5,1; default 0.25,0.5,0.75,1,1.25, negative where less of a
            label is aimed at.
        layers: Layers to try, e.g. 2,3; default: the file's, without the model's first and last eighth, eight at most.
        samples: Chains of each task.
        full_grid: Also measure every setting on every task, to see what the search cost and lost.
        perplexity: Largest perplexity of steered chains under the unsteered model, as a multiple of its own chains'.
        loops: Largest rise of the share of repeated 8-grams.
        unclosed: Largest rise of the share of chains that never end.
        accuracy: Largest fall of the accuracy.
        dry_run: Do nothing, but say what would be done, how long it would take and what it would cost.
        out: The folder of the results.
        workers: Processes that generate; default: one a core for small models. Changes no result.
        overwrite: Let results of another model in --out be replaced; else that is refused.
        display: Where progress and tables are shown; default: nowhere.
        settings: Fields of `Config`: --validation is the number of tasks, --budget the KL in nats a token.

    Returns:
        The content of calibrate.json: see docs/calibrate.md. Its page is calibrate.html; recommended.safetensors has
        the recommended layers alone, and steers as recommended by itself. With `dry_run`, `dry_run.estimate_search`.

    Raises:
        UsageError: Files that do not fit the model, a target that nobody measures, or too few tasks for the grid;
            nothing was generated.
        SteerableError: No arm can be calibrated.

    Example:
        steerable calibrate runs/pocket/vectors/candidates/onset.pooled/backtracking.safetensors --out runs/calibrate
    """
    if not files:
        raise UsageError("there is nothing to calibrate: give one direction file at least")
    if aim not in ("more", "less"):
        raise UsageError(f"--aim is {aim!r}: expected more or less")
    if samples < 1:
        raise UsageError(f"--samples is {samples}: expected 1 or more")
    source = None if run is None else open_run(run)
    recorded = {} if source is None else recorded_settings(source.folder)
    config = Config(recorded.keys() - settings.keys(), **recorded | settings)
    if source is not None and "validation" in settings:
        raise UsageError(
            "--validation is the number of tasks, which --run has already: leave it out, or leave out --run"
        )
    limits = Limits(config.budget, perplexity, loops, unclosed, accuracy)
    directions = {str(file): import_file(file) for file in files}
    target, is_label = _target(target, next(iter(directions.values())), config)
    sign = -1.0 if aim == "less" and is_label else 1.0
    doses = _strengths(strengths, sign)
    display = display or Display(quiet=True)
    job = Run(RunFolder(out), config, workers, display=display)
    job.folder.refuse_other("calibrate", config.model, config.revision, overwrite=overwrite)
    arms = _arms(directions, parse_layers(layers), job)
    if source is None:
        known = set().union(*(known_tasks(file, direction.stats) for file, direction in directions.items()))
        tasks = make_tasks(
            config.tasks, config.validation, config.seed, known, **annotation.writer(config, job.folder.root, dry_run)
        )
    else:
        tasks = source.tasks("validation")
    grid = len(arms) * len(doses)
    if not full_grid and len(tasks) < (fewest := fewest_tasks(grid)):
        more = f"--validation {fewest}, " if source is None else ""
        raise UsageError(
            f"{grid} settings need {fewest} tasks or more for a search at a quarter of the grid's cost, and there are "
            f"{len(tasks)}: give {more}more --strengths or --layers, or --full-grid, which measures all of them"
        )
    reference = None if source is None else source.reference
    how = {"target": target, "aim": aim, "strengths": doses, "samples": samples, "full_grid": full_grid}
    key = how | {
        "limits": asdict(limits), "layers": [arm.layers for arm in arms], "weights": job.weights,
        "files": {f: hashlib.sha256(replace(d, stats={}).to_bytes()).hexdigest() for f, d in directions.items()},
        "reference": reference, **annotation.content(config), **config.subset(FIELDS),
    }  # fmt: skip
    outputs = ["calibrate.json", "measured.jsonl", "recommended.safetensors"]
    if dry_run:
        file = job.folder / "tasks.jsonl"
        is_same = file.exists() and read_jsonl(file, "task") == tasks
        is_done = is_same and job.folder.finished("calibrate", job.folder.key("calibrate", ["tasks.jsonl"], key))
        plan = estimate_search(job, tasks, len(arms), len(doses), samples, full_grid, ["calibrate"] * is_done)
        display.show(*plan_tables(plan))
        return plan
    with job.folder.locked():
        write_json(job.folder / "config.json", {"job": "calibrate", "model": config.model, **key})
        write_jsonl(job.folder / "tasks.jsonl", tasks)
        search = GridSearch(job, tasks, arms, doses, target if is_label else "", how, limits, reference)
        job.folder.run_stage("calibrate", ["tasks.jsonl"], key, outputs, search.work)
        result: dict[str, Any] = read_json(job.folder / "calibrate.json", dict)
        write_atomic(job.folder / "calibrate.html", render(result))
    display.show(*tables(result))
    display.tell(summary(result), f"The page is {(job.folder / 'calibrate.html').resolve()}")
    _note(result, directions, display)
    return result


# --- the grid ---


def _target(target: str | None, direction: Direction, config: Config) -> tuple[str, bool]:
    """What is aimed at, and whether it is a label of the annotator."""
    labels = labels_of(config)
    name = target or direction.behaviour
    if name in (THINKING, *all_metrics()):
        return name, False
    if labels is None or name in labels:
        if not name:
            raise UsageError("the first file names no behaviour: give --target accuracy, thinking, or a label")
        return name, True
    what = f"--target is {name!r}" if target else f"the first file's behaviour is {name!r}" if name else "no --target"
    choices = ", ".join([*labels, THINKING, *all_metrics()])
    raise UsageError(f"{what}, which --annotator {config.annotator} does not label: give --target one of {choices}")


def _strengths(given: str | None, sign: float) -> list[float]:
    try:
        chosen = sorted(
            {float(part) for part in given.split(",")} if given else {sign * s for s in (0.25, 0.5, 0.75, 1, 1.25)},
            key=abs,
        )
    except ValueError:
        chosen = []
    if not chosen or not all(math.isfinite(s) and s != 0 for s in chosen) or min(chosen) < 0 < max(chosen):
        raise UsageError(f"--strengths is {given!r}: expected numbers of one sign, separated by commas, e.g. 0.5,1")
    return chosen


def _arms(directions: Mapping[str, Direction], layers: Sequence[int] | None, job: Run) -> list[Arm]:
    """Each file at each of its layers, and at all of them together. Raises UsageError for one that does not fit."""
    arms = []
    inner = interior(models.n_layers(job.loaded.model))
    for file, direction in directions.items():
        with steer(job.loaded.model, direction, tokenizer=job.loaded.tokenizer, track=False):
            pass
        if not isinstance(parse_map(direction.map), Shift):
            raise UsageError(f"{file}: only what is added has a dose, but the map of this direction is {direction.map}")
        zero = {site.layer for site, vector in direction.vectors.items() if not vector.any()}
        nonzero = [layer for layer in direction.layers if layer not in zero]
        if not nonzero or zero & {*(layers or ())}:
            raise UsageError(f"{file}: its vector at layer {min(zero)} is zero, at any length: give other --layers")
        there = [layer for layer in nonzero if layer in inner] or nonzero
        few = min(_LAYERS, len(there))
        chosen = layers or [there[round(i * (len(there) - 1) / max(1, few - 1))] for i in range(few)]  # evenly spread
        stem = Path(file).stem if len({Path(f).stem for f in directions}) == len(directions) else file
        for some in [*((layer,) for layer in chosen), *([tuple(chosen)] if len(chosen) > 1 else [])]:
            part = replace(direction.only(some), strength=1.0)
            arms.append(Arm(f"{stem}, {_layers(some)}", file, some, part))
    return arms


def _layers(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"


def _note(result: Mapping[str, Any], files: Iterable[str], display: Display) -> None:
    """Write the recommendation into the stats of the direction file that it is about, if that is one of ours. Where
    there is none, an earlier one of the same aim and model is taken out of the files."""
    about, settings = result["recommended"], result["settings"]
    same = {"of": settings["target"], "aim": settings["aim"], "model": result["model"]}
    say = display.say if about else lambda text: None
    for path in map(Path, [about["file"]] if about else files):
        if any((folder / "stages").is_dir() and (folder / "config.json").exists() for folder in path.resolve().parents):
            say(f"calibrate: {path} is a run's, which would be done again if the recommendation were written into it")
            continue
        try:
            direction = Direction.load(path)
        except SteerableError:
            say(f"calibrate: {path} is another tool's, so that the recommendation is not written into it")
            continue
        stats = dict(direction.stats)
        if about:
            stats["recommended"] = noted(result)
        elif isinstance(old := stats.get("recommended"), dict) and {**old, **same} == old:
            del stats["recommended"]
            display.say(f"calibrate: {path} no longer has the recommendation of an earlier calibration")
        if stats != direction.stats:
            replace(direction, stats=stats).save(path)
