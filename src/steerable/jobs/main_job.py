"""The main job: tasks -> chains -> spans -> vectors -> attribution -> selection -> steered chains -> cells -> report.

Every stage reads and writes files of a run folder and is not done again while its inputs and settings stay the same
(`store/run_folder.py`). `run` goes through all of them; a single stage is `run(..., stage="extract")`.

The algorithm is that of Venhoff et al. 2025, "Understanding Reasoning in Thinking Language Models via Steering
Vectors" (arXiv 2506.18167), with the choices that `jobs/settings.py` names.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import torch

from steerable.chains.annotators.length import reference_length
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.chains.tables import parse_source
from steerable.chains.tasks import make_splits, unmet
from steerable.chains.windows import AlignedChain
from steerable.chains.written import endpoint_of
from steerable.engines.pool import default_threads, torch_threads
from steerable.evals.agreement import agreement_tables, measure_agreement_of_files
from steerable.evals.attribution import attribute
from steerable.evals.metrics import all_metrics
from steerable.jobs import annotation, selection
from steerable.jobs.cells import (
    Cell,
    Part,
    evaluate_cells,
    evaluation_cells,
    generate_cells,
)
from steerable.jobs.dry_run import estimate, tables
from steerable.jobs.report_content import assemble, describe_model, selected_tokens
from steerable.jobs.run import Run, recorded_settings
from steerable.jobs.settings import (
    BASELINES,
    FEWEST_SPANS,
    PAPER,
    STAGES,
    Config,
    Stage,
    candidate_path,
    flag,
    random_path,
    selected_path,
    shuffled_path,
)
from steerable.jobs.task_origin import keys_of, note_keys
from steerable.jobs.validation import Validation
from steerable.methods.estimators import span_activations
from steerable.methods.span_statistics import SpanMeans, span_means
from steerable.models.reading import check_queries
from steerable.pages.run_page import render
from steerable.steering.direction import Direction
from steerable.steering.gates import parse_gate
from steerable.steering.maps import fitted, parse_map
from steerable.store.display import Display
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.files import sha256, write_atomic
from steerable.store.run_folder import RunFolder, read_json, write_json
from steerable.store.text import counted

UNMET = 0.05
"""Share of tasks without a possible right answer from which on a run says so."""


def make_tasks(run: Run, partial: Path) -> None:
    """Tasks of the three splits, disjoint by content."""
    c = run.config
    sizes = {"extraction": c.limit, "validation": c.validation, "evaluation": c.evaluation}
    tasks = make_splits(c.tasks, sizes, c.seed, **annotation.writer(c, run.folder.root))
    if len(wrong := unmet(tasks)) > UNMET * len(tasks):
        warnings.warn(
            f"the references of {len(wrong)} of {counted(len(tasks), 'task')} are met by no plain answer, not even by "
            f"themselves (e.g. that of {wrong[0]['id']!r}): such tasks count as wrong whatever is answered",
            SteerableWarning,
            stacklevel=2,
        )
    write_jsonl(run.folder / "tasks.jsonl", tasks)


def generate(run: Run, partial: Path) -> None:
    """One unsteered chain for every extraction task, several for an annotator that compares them."""
    cell = Cell("chains", (), 0.0, (Part(tuple(run.config.extraction_samples)),))
    chains = generate_cells(run, [cell], run.tasks("extraction"), partial)["chains"]
    write_jsonl(run.folder / "chains.jsonl", chains)


def annotate(run: Run, partial: Path) -> None:
    """The thinking part of every chain in labelled spans, and how much of it was understood."""
    chains = read_jsonl(run.folder / "chains.jsonl", "chain")
    source = run.config, chains, run.tasks("extraction"), run.loaded
    spans, account = annotation.annotate(*source, replies=run.folder / "replies", display=run.display)
    stable = spans
    if run.config.stability:
        drawn = partial / "continuations"
        stable = annotation.keep_stable(*source, spans, continuations=drawn, display=run.display)
    flat = [span for some in stable for span in some or ()]
    counts = Counter(span["label"] for span in flat)
    labels = annotation.labels_among(annotation.labels_of(run.config), counts)
    annotated = sum(map(bool, spans))
    silent = sum(not chain["thinking"].strip() for chain in chains)
    if not flat:
        raise SteerableError(_why_no_span(run.config, len(chains), silent, any(spans)))
    if silent:
        run.display.say(f"annotate: {silent} of {len(chains)} chains have no think block, and so no span")
    # What stands between spans is white space; it belongs to nobody.
    text = sum(_letters(chain["thinking"]) for chain in chains)
    labelled = sum(
        _letters(chain["thinking"][span["start"] : span["end"]])
        for chain, some in zip(chains, stable, strict=True)
        for span in some or ()
    )
    write_jsonl(run.folder / "spans.jsonl", flat)
    write_json(
        run.folder / "coverage.json",
        {
            "chains": len(chains),
            "closed": sum(chain["closed"] for chain in chains),
            "annotated": annotated,
            "dropped": len(chains) - annotated,
            "coverage": labelled / text if text else None,
            "unstable": sum(len(some or ()) for some in spans) - len(flat),
            "spans": {label: counts[label] for label in labels},
            "annotator": account,
            **({"reference": reference_length(chains)} if run.config.annotator == "length" else {}),
        },
    )


def _letters(text: str) -> int:
    return len("".join(text.split()))


def _why_no_span(config: Config, chains: int, silent: int, any_before_filter: bool) -> str:
    if silent == chains:
        return (
            f"the model wrote nothing in a think block in any of {chains} chains, so there is nothing to annotate: "
            "take a model that reasons in one (docs/real-models.md)"
        )
    if config.annotator == "length":
        return (
            f"no task has a right chain that is much longer than another right one, in {chains} chains: give more "
            "tasks or samples, or a model that samples"
        )
    if any_before_filter:
        return f"no span in {chains} chains is as stable as --stability {config.stability:g} asks: lower it"
    without = f" ({silent} of them have no think block)" if silent else ""
    return (
        f"the annotator {config.annotator!r} found no span in {chains} chains{without}: it does not know this "
        "model's language; choose another --annotator"
    )


def extract(run: Run, partial: Path) -> None:
    """One pass over the chains: a direction for every label, window and baseline, and the label-shuffled ones."""
    c, chains = run.config, run.aligned()
    labels, behaviours = run.labels, run.behaviours
    means = span_means(
        run.loaded.model, chains, labels, shuffles=c.controls, seed=c.seed, keep=partial, **run.spread_reading
    )
    missing = [label for label in behaviours if means.count(label) < FEWEST_SPANS]
    if len(missing) == len(behaviours):
        raise SteerableError(
            f"{len(chains)} chains have fewer than {FEWEST_SPANS} spans of {' and of '.join(missing)}: give more tasks "
            "with --limit, or choose another --annotator or other --behaviours"
        )
    for label in missing:
        spans = counted(means.count(label), "span")
        run.display.say(f"extract: {len(chains)} chains have {spans} of {label}: the run goes on without it")
    for kind in ("candidates", "shuffled"):  # a run with other settings may have left more labels there
        shutil.rmtree(run.folder / f"vectors/{kind}", ignore_errors=True)
    origin: dict[str, Any] = {"data_sha256": sha256(run.folder / "chains.jsonl"), "created_by": "steerable extract"}
    cosines: dict[str, Any] = {"overall_vs_pooled": {}, "windows": {}}
    estimate = _estimator(run, chains, means)
    served = note_keys(keys_of(run.tasks("extraction")), keys_of(run.tasks("validation")))
    for label in (label for label in labels if means.count(label) and label not in missing):
        directions = {}
        for window in c.windows:
            for baseline in BASELINES:
                direction = estimate(label, window, baseline, 0)
                direction = replace(direction, map=c.map, stats=direction.stats | served, **origin)
                direction.save(run.folder / candidate_path(window, baseline, label))
                directions[window, baseline] = direction
                for k in range(c.controls if label in behaviours else 0):
                    control = replace(estimate(label, window, baseline, k + 1), map=c.map)
                    control.save(run.folder / shuffled_path(window, baseline, label, k))
        cosines["overall_vs_pooled"][label] = {
            window: _mean_cosine(directions[window, "overall"], directions[window, "pooled"]) for window in c.windows
        }
        cosines["windows"][label] = {
            f"{a}~{b}": _mean_cosine(directions[a, c.baseline], directions[b, c.baseline])
            for a, b in (("published", "onset"), ("published", "span"), ("span", "onset"))
            if {a, b} <= {*c.windows}
        }
    write_json(run.folder / "cosines.json", cosines)
    lengths = zip(means.sites, means.norms.tolist(), means.overall.norm(dim=1).tolist(), strict=True)
    norms = {str(site.layer): {"mean_norm": norm, "norm_of_mean": length} for site, norm, length in lengths}
    write_json(run.folder / "norms.json", norms)


def _estimator(run: Run, chains: Sequence[AlignedChain], means: SpanMeans) -> Callable[[str, str, str, int], Direction]:
    """What makes the direction of a label, window, baseline and shuffle (0: the true labels): the difference of means,
    or the user's own estimator, which has no baseline but all other spans."""
    function = run.config.estimate
    if function is None:
        return means.direction
    spans = {
        window: span_activations(run.loaded.model, chains, window, shuffles=run.config.controls, seed=run.config.seed)
        for window in run.config.windows
    }
    return lambda label, window, baseline, shuffle: spans[window].direction(function, means, label, shuffle)


def _mean_cosine(a: Direction, b: Direction) -> float:
    values = list(a.cosine(b).values())
    return sum(values) / len(values)


def attribute_layers(run: Run, partial: Path) -> None:
    """The effect of every layer, behaviour and window by all metrics."""
    c, chains = run.config, run.aligned()
    effects = {}
    for window in [c.window] if c.window else c.windows:
        paths = {b: run.folder / candidate_path(window, c.baseline, b) for b in run.behaviours}
        directions = {b: Direction.load(path) for b, path in paths.items() if path.exists()}
        effect = attribute(
            run.loaded.model,
            chains,
            directions,
            limit=c.attributed,
            sample=c.patched,
            keep=partial / window,
            **run.spread_reading,
        )
        effects[window] = effect.to_dict()
    write_json(run.folder / "attribution.json", effects)


def select(run: Run, partial: Path) -> None:
    """Window and layer of every behaviour, by attribution and validation (`jobs/selection.py`), and its controls."""
    c = run.config
    layers, candidates = _candidates(run)
    for stale in run.folder.root.glob(selected_path("*")):  # a run with other settings may have left a vector
        if stale.stem not in candidates:
            stale.unlink()
    shutil.rmtree(run.folder / "vectors/random", ignore_errors=True)  # the same
    validation = Validation(run, partial)
    validation.run(candidates)
    chosen: dict[str, Any] = {}
    for number, b in enumerate(candidates):
        best, rule, passed = selection.pick(validation.finalists[b])
        if c.chosen_layer is not None:
            rule = f"layer {c.chosen_layer} was asked for" + ("" if rule == selection.RULE else f"; {rule}")
        if not passed:
            warnings.warn(f"{b}: {rule}", SteerableWarning, stacklevel=2)
        selected = replace(validation.direction(b, best), strength=best["strength"])
        chosen[b] = {
            "layer": best["layer"],
            "layers": list(selection.interior(layers)),
            "window": best["window"],
            "baseline": best["baseline"],
            "strength": best["strength"],
            "dose": best["dose"],
            "passed": passed,
            "rule": rule,
            "candidates": validation.measured[b],
            "rounds": validation.rounds[b],
        }
        selected.save(run.folder / selected_path(b))
        for k in range(c.controls):
            seed = (c.seed * 1000 + number) * 1000 + k  # other directions for every behaviour
            selected.random_like(seed).save(run.folder / random_path(b, k))
    missing = [b for b in run.behaviours if b not in chosen]
    write_json(run.folder / "selection.json", chosen | ({"missing": missing} if missing else {}))


def _candidates(run: Run) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """The model's number of layers, and the windows and layers to validate for every behaviour."""
    c, path = run.config, run.folder / "attribution.json"
    effects = {window: effect for window, effect in read_json(path, dict).items() if c.window in (None, window)}
    if not effects:
        raise UsageError(f"{path} lacks the window {c.window!r}: run `steerable attribute` with it")
    layers = len(next(iter(next(iter(effects.values())).values()))["exact"]["mean"])
    candidates: dict[str, list[dict[str, Any]]] = {}
    for b in [b for b in run.behaviours if all(b in effect for effect in effects.values())]:
        rows = []
        for window, effect in effects.items():
            curve = effect[b]["exact"]["mean"]
            tried = selection.candidate_layers(curve, c.tried) if c.chosen_layer is None else [c.chosen_layer]
            rows += [{"window": window, "baseline": c.baseline, "layer": n, "exact": curve[n]} for n in tried]
        if rows:
            candidates[b] = rows
        else:
            run.display.say(f"select: no effect of {b} was measured in {c.patched} chains: the run goes on without it")
    if not candidates:
        raise SteerableError("no effect of any behaviour was measured: give more chains with --patched, or a layer")
    return layers, candidates


def steer(run: Run, partial: Path) -> None:
    """The evaluation tasks in every cell of the plan."""
    cells = evaluation_cells(run.config, selection.read_selection(run.folder / "selection.json"), run.load, run.thinks)
    pieces = partial / "steered"
    for name, chains in generate_cells(run, cells, run.tasks("evaluation"), partial).items():
        write_jsonl(pieces / f"{name}.jsonl", chains)
    shutil.rmtree(run.folder / "steered", ignore_errors=True)
    pieces.rename(run.folder / "steered")


def evaluate(run: Run, partial: Path) -> None:
    """Every cell's spans, fractions, accuracy, length, loops, unclosed chains and KL divergence, with intervals."""
    chosen = selection.read_selection(run.folder / "selection.json")
    rows = evaluate_cells(run, evaluation_cells(run.config, chosen, run.load, run.thinks), partial)
    shutil.rmtree(run.folder / "steered_spans", ignore_errors=True)
    (partial / "steered_spans").rename(run.folder / "steered_spans")
    write_json(run.folder / "cells.json", rows)


def report(run: Run, partial: Path) -> None:
    """report.json and report.html."""
    folder, (model, tokenizer) = run.folder.root, run.loaded
    about = describe_model(model, run.config.model, run.weights, run.config.generation_dtype) | {"thinks": run.thinks}
    content = assemble(folder, run.config.to_dict(), about, selected_tokens(folder, model, tokenizer))
    write_json(run.folder / "report.json", content)
    write_atomic(run.folder / "report.html", render(content))  # without timings: equal runs give equal pages


_WORK: dict[str, Callable[[Run, Path], None]] = {
    "tasks": make_tasks,
    "generate": generate,
    "annotate": annotate,
    "extract": extract,
    "attribute": attribute_layers,
    "select": select,
    "steer": steer,
    "evaluate": evaluate,
    "report": report,
}


def _depends_on(run: Run, stage: Stage) -> dict[str, Any]:
    """What the stage's result depends on beside its inputs, with the content of what the settings only name."""
    settings = run.config.subset(stage.settings) | {"weights": run.weights}
    if "tasks" in settings and (file := Path(parse_source(run.config.tasks)[0])).is_file():
        settings["tasks_sha256"] = sha256(file)
    if "annotator" in settings:
        settings |= annotation.content(run.config)
    if (estimate := run.config.estimate if "estimator" in settings else None) is not None:
        settings["estimator_sha256"] = [sha256(file) for file in annotation.source_of(estimate)]
    if stage.name in ("attribute", "select") and run.config.behaviours is not None:  # those of `extract`, which do not
        settings["behaviours"] = run.config.behaviours  # change the candidates
    if stage.name == "generate" and len(run.config.extraction_samples) > 1:
        settings["extraction_samples"] = len(run.config.extraction_samples)
    if stage.name == "evaluate":
        settings["metrics"] = sorted(all_metrics())
        settings["cells"] = 2  # raised when cells.json holds more: 2, the paired differences to the controls
    if settings.get("tasks") != "llm" and not ("annotator" in settings and run.config.is_judged):
        settings = {name: value for name, value in settings.items() if not name.startswith("llm_")}
    return settings


def _refuse_settings_of_earlier(stage: Stage, changed: set[str]) -> None:
    """Raises UsageError for a changed setting on which only earlier stages depend: their results would stay as they
    are, and config.json and the report would say something else of them."""
    for earlier in STAGES[: STAGES.index(stage)]:
        if unused := sorted((changed & set(earlier.settings.split())) - set(stage.settings.split())):
            raise UsageError(
                f"{flag(unused[0])} changes nothing in stage {stage.name!r}, as stage {earlier.name!r} depends on it: "
                f"give it to `steerable {earlier.name}`, or to `steerable run`, which does all stages that depend on it"
            )


def _read_config(path: Path | None) -> dict[str, Any]:
    """The settings in a JSON file."""
    if path is None:
        return {}
    if not path.is_file():
        raise UsageError(f"there is no file {path}: expected a JSON file of settings, e.g. the config.json of a run")
    return dict(read_json(path, dict))


def run(
    out: Path | str | None = None,
    *,
    stage: str | None = None,
    fresh: bool = True,
    config: Path | None = None,
    quick: bool = False,
    paper: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    ray: float | None = None,
    overwrite: bool = False,
    display: Display | None = None,
    **settings: Annotated[Any, Config],
) -> Path | dict[str, Any]:
    """All stages of the main job, from tasks to the report. A stopped run goes on where it was.

    Args:
        out: The run folder: everything that the run reads and writes; default: runs/<model>.
        stage: One stage alone, by its name in `STAGES`.
        fresh: Settings that are not given have their defaults; else those of the folder's config.json.
        config: A JSON file of settings, e.g. the config.json of a former run; options on the command line go before it.
        quick: Fewer tasks and samples: a look, in under a minute with the bundled model, and not a result.
        paper: The published setting: 500 tasks, written and annotated by a language model; greedy, 1000 tokens.
        dry_run: Do nothing, but say what would be done, how long it would take and what it would cost.
        workers: Processes that generate; default: one a core for small models. Changes no result.
        ray: Workers are actors of a Ray cluster (RAY_ADDRESS, else here) with this many GPUs each.
        overwrite: Let results of another model in --out be replaced; else that is refused.
        display: Where progress is shown; default: nowhere.
        settings: The fields of `Config`.

    Returns:
        The run folder; with `dry_run` what `dry_run.estimate` says of all stages, and which are `done` already.

    Raises:
        UsageError: a wrong setting or input, before anything is written.

    Example:
        >>> folder = run("runs/look", quick=True)
    """
    if stage is not None and stage not in _WORK:
        raise UsageError(f"unknown stage {stage!r}: expected one of {', '.join(_WORK)}")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}: expected 1 or more")
    if ray is not None and ray < 0:
        raise UsageError(f"--ray is {ray}: expected the number of GPUs of each worker, 0 or more")
    display = display or Display(quiet=True)
    if out is None:
        out = default_folder(settings.get("model", "pocket"))
    folder = RunFolder(out)
    steps = [step for step in STAGES if stage in (None, step.name)]
    recorded = _read_config(config) if fresh else recorded_settings(folder)
    given = (PAPER if paper else {}) | settings
    final = Config(recorded.keys() - given.keys(), **recorded | given)
    final = final.quick() if quick else final
    fitted(torch.ones(1, 1), parse_map(final.map)), parse_gate(final.gate)  # what no vector could be steered by
    folder.refuse_other("run", final.model, final.revision, overwrite)
    if stage is not None and recorded:
        changed = {name for name in settings if recorded.get(name) != getattr(final, name)}
        _refuse_settings_of_earlier(steps[0], changed)
    job = Run(folder, final, workers, ray, display)
    if dry_run:
        finished = takewhile(lambda step: _is_finished(job, [step]), steps)
        plan = estimate(job, [step.name for step in finished])
        display.show(*tables(plan))
        return plan
    is_new = not (folder / "config.json").exists()
    if is_new or recorded_settings(folder) != final.to_dict() or not _is_finished(job, steps):
        # Wrong settings, an unusable model and missing inputs are refused before anything is written.
        if final.is_judged and any("annotator" in step.settings for step in steps):
            annotation.endpoint(final).check_key()
        if final.tasks.partition(":")[0] == "llm" and any("tasks" in step.settings.split() for step in steps):
            (annotation.endpoint(final) if final.tasks == "llm" else endpoint_of(final.tasks)).check_key()
        _ = job.loaded
        if "attribute" in [step.name for step in steps]:
            check_queries(job.loaded.model)
        if stage is None and (labels := annotation.labels_of(final)) is not None:
            job.behaviours_among(labels)
        folder.key(steps[0].name, steps[0].inputs, _depends_on(job, steps[0]))
    with folder.locked(), ExitStack() as threads:
        if "loaded" in vars(job):
            # As many threads as a worker has: a small model's bytes do not depend on the number of cores or workers.
            threads.enter_context(torch_threads(default_threads(job.loaded.model, 1)))
        # config.json waits for the first stage, which may find the task file wrong; the report is made of it.
        waits = is_new or "config.json" not in steps[0].inputs
        if not waits:
            write_json(folder / "config.json", final.to_dict())
        for number, step in enumerate(steps, start=1):
            display.part = f"stage {number} of {len(steps)}" if len(steps) > 1 else ""
            depends_on = _depends_on(job, step)
            done = folder.run_stage(step.name, step.inputs, depends_on, step.outputs, partial(_WORK[step.name], job))
            if waits and step is steps[0]:
                write_json(folder / "config.json", final.to_dict())
            display.say(f"{step.name}: {'done' if done else 'was done already'}")
    if steps[-1].name == "report":
        display.tell(f"The report is {(folder / 'report.html').resolve()}")
    return folder.root


def default_folder(model: str) -> Path:
    """The run folder of a model: its name, the last part of a path or hub name, under `runs`."""
    return Path("runs") / (re.sub(r"[^\w.-]", "-", Path(model).name.removesuffix(".gguf")).strip(".") or "model")


def annotate_or_compare(
    out: Path = Path("runs/pocket"),
    *,
    agreement: tuple[Path, Path] | None = None,
    chains: Path | None = None,
    workers: int | None = None,
    ray: float | None = None,
    overwrite: bool = False,
    display: Display | None = None,
    **settings: Annotated[Any, Config],
) -> Path | dict[str, Any]:
    """Do the stage `annotate` of a run, or say how far two annotations of the same chains agree.

    Args:
        out: The run folder: everything that the run reads and writes.
        agreement: Do not annotate: compare two files of spans of the same chains.
        chains: With --agreement: the file of the chains themselves.
        workers: Processes that generate; default: one a core for small models. Changes no result.
        ray: Workers are actors of a Ray cluster (RAY_ADDRESS, else here) with this many GPUs each.
        overwrite: Let results of another model in --out be replaced; else that is refused.
        display: Where progress and tables are shown; default: nowhere.
        settings: The fields of `Config` that the stage reads.

    Returns:
        The run folder; with `agreement`, the figures of `measure_agreement_of_files`.
    """
    if agreement is not None:
        comparison = measure_agreement_of_files(*agreement, chains)
        (display or Display(quiet=True)).show(*agreement_tables(comparison))
        return comparison.to_dict()
    if chains is not None:
        raise UsageError("--chains goes with --agreement; the stage annotates the chains of --out")
    how: dict[str, Any] = {"workers": workers, "ray": ray, "overwrite": overwrite, "display": display}
    return run(out, stage="annotate", fresh=False, **how, **settings)


def _is_finished(run: Run, steps: Sequence[Stage]) -> bool:
    """Whether none of these stages has anything to do."""
    try:
        return all(run.folder.finished(s.name, run.folder.key(s.name, s.inputs, _depends_on(run, s))) for s in steps)
    except UsageError:
        return False  # an input is missing
