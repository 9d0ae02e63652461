"""The main job: tasks -> chains -> spans -> vectors -> attribution -> selection -> steered chains -> cells -> report.

Every stage reads and writes files of a run folder and is not done again while its inputs and settings stay the same
(`runfolder.py`). `run` goes through all of them; a single stage is `run(..., stage="extract")`.

The algorithm is that of Venhoff et al. 2025, "Understanding Reasoning in Thinking Language Models via Steering
Vectors" (arXiv 2506.18167), with the choices that `config.py` names.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from steerable import annotation, experiment, plan
from steerable.chains.records import LABELS, STEERABLE, Record, read_jsonl, write_jsonl
from steerable.config import Config, from_dict
from steerable.display import Display
from steerable.errors import SteerableError, UsageError
from steerable.files import write_atomic
from steerable.runfolder import RunFolder, read_json, sha256, write_json


@dataclass
class Run:
    """A run in progress: its folder and settings, and what its stages share (loaded when a stage first needs it)."""

    folder: RunFolder
    config: Config
    workers: int | None = None
    ray: float | None = None
    display: Display = field(default_factory=lambda: Display(quiet=True))

    @cached_property
    def loaded(self) -> Any:
        from steerable import models
        from steerable.chains.generation import prompt_text
        from steerable.think import think_tags

        c = self.config
        where = {"device_map": "auto"} if c.device == "auto" else {"device": c.device}
        loaded = models.load(
            c.model,
            dtype=c.dtype,
            attn_implementation=c.attention,
            quantization=c.quantization,
            revision=c.revision,
            trust_remote_code=c.trust_remote_code,
            **where,
        )
        # A model that cannot be used is refused before anything is done.
        think_tags(loaded.tokenizer)
        prompt_text(loaded.tokenizer, "?")
        layers = models.n_layers(loaded.model)
        if (layer := self.config.chosen_layer) is not None and layer >= layers:
            raise UsageError(f"--layers is {layer}, but {self.config.model} has layers 0 to {layers - 1}")
        return loaded

    @property
    def spread(self) -> dict[str, Any]:
        """On what a stage's blocks of work are computed: `workers` and `spread` of the functions that do it."""
        from steerable.engines import cluster, workers

        count = self.workers or workers.default_workers(self.loaded.model)
        if self.ray is None:
            return {"workers": count, "spread": workers.map_blocks}
        return {"workers": count, "spread": partial(cluster.map_blocks, gpus=self.ray)}

    @cached_property
    def weights(self) -> str:
        """What tells two models of one name apart: the commit of a hub model, the hash of a folder's weights."""
        from steerable.models import pocket_path

        config = self.loaded.model.config
        if commit := getattr(config, "_commit_hash", None):
            return str(commit)
        root = pocket_path() if self.config.model == "pocket" else Path(self.config.model)
        found = sorted([*root.glob("*.safetensors"), *root.glob("*.json"), *root.glob("*.jinja")])
        return hashlib.sha256("".join(f"{f.name} {sha256(f)}" for f in found).encode()).hexdigest()

    def settings(self, stage: Stage) -> dict[str, Any]:
        """What the stage's result depends on beside its inputs, with the content of what the settings only name."""
        found = self.config.subset(stage.settings) | {"weights": self.weights}
        if "tasks" in found and Path(self.config.tasks).is_file():
            found["tasks_sha256"] = sha256(Path(self.config.tasks))
        if "annotator" in found:
            found["annotator_sha256"] = [sha256(source) for source in annotation.sources(self.config)]
        if "llm" not in (found.get("annotator"), found.get("tasks")):
            found.pop("llm_model", None)
        return found

    def tasks(self, split: str) -> list[Record]:
        return [task for task in read_jsonl(self.folder / "tasks.jsonl", "task") if task["split"] == split]

    def prompts(self, split: str) -> dict[str, str]:
        """Task id -> what the chat template makes of the task, up to where the model begins to speak."""
        from steerable.chains.generation import prompt_text

        return {task["id"]: prompt_text(self.loaded.tokenizer, task["prompt"]) for task in self.tasks(split)}

    def aligned(self) -> list[Any]:
        """The extraction chains as the model reads them, with their spans as token ranges."""
        from steerable.chains.windows import align_chain

        tokenizer = self.loaded.tokenizer
        prompts = self.prompts("extraction")
        spans: dict[tuple[str, int], list[Record]] = {}
        for span in read_jsonl(self.folder / "spans.jsonl", "span"):
            spans.setdefault((span["task_id"], span["sample"]), []).append(span)
        chains = read_jsonl(self.folder / "chains.jsonl", "chain")
        return [
            align_chain(tokenizer, prompts[c["task_id"]], c, spans.get((c["task_id"], c["sample"]), [])) for c in chains
        ]


@dataclass(frozen=True)
class Stage:
    """One step: its name, what does it, the files it reads and writes, and the settings its result depends on."""

    name: str
    work: Callable[[Run, Path], None]
    inputs: tuple[str, ...]
    settings: str
    outputs: tuple[str, ...]


_MODEL = "model revision dtype device quantization attention engine"
_ANNOTATOR = "annotator llm_model"
_DECODING = "seed greedy max_new_tokens rows block"


def make_tasks(run: Run, partial: Path) -> None:
    """Tasks of the three splits, disjoint by content."""
    from steerable.chains.tasks import make_splits

    c = run.config
    sizes = {"extraction": c.limit, "validation": c.validation, "evaluation": c.evaluation}
    written: dict[str, Any] = {}
    if c.tasks.partition(":")[0] == "llm":
        written = {"endpoint": annotation.endpoint(c) if c.tasks == "llm" else None, "cache": run.folder / "replies"}
    write_jsonl(run.folder / "tasks.jsonl", make_splits(c.tasks, sizes, c.seed, **written))


def generate(run: Run, partial: Path) -> None:
    """One unsteered chain for every extraction task."""
    cell = plan.Cell("chains", (), None, 0.0, (), "all", (plan.Part((0,)),))
    experiment.generate_cells(run, [cell], "extraction", {"chains": run.folder / "chains.jsonl"}, partial)


def annotate(run: Run, partial: Path) -> None:
    """The thinking part of every chain in labelled spans, and how much of it was understood."""
    chains = read_jsonl(run.folder / "chains.jsonl", "chain")
    found, account = annotation.annotate(run, chains, "extraction")
    kept = annotation.stable(run, chains, found, partial) if run.config.stability else found
    spans = [span for some in kept for span in some or ()]
    counts = Counter(span["label"] for span in spans)
    annotated = sum(map(bool, found))
    if not spans:
        raise SteerableError(
            f"the annotator {run.config.annotator!r} found no span in {len(chains)} chains: it does not know this "
            "model's language; choose another --annotator"
        )
    # What stands between spans is white space; it belongs to nobody.
    text = sum(len("".join(chain["thinking"].split())) for chain in chains)
    spoken = sum(len("".join(_text(chain, span).split())) for chain, span in _pairs(chains, spans))
    write_jsonl(run.folder / "spans.jsonl", spans)
    write_json(
        run.folder / "coverage.json",
        {
            "chains": len(chains),
            "closed": sum(chain["closed"] for chain in chains),
            "annotated": annotated,
            "dropped": len(chains) - annotated,
            "coverage": spoken / text if text else None,
            "unstable": sum(len(some or ()) for some in found) - len(spans),
            "spans": {label: counts[label] for label in LABELS},
            "annotator": account,
        },
    )


def _text(chain: Record, span: Record) -> str:
    return chain["thinking"][span["start"] : span["end"]]


def _pairs(chains: Iterable[Record], spans: Iterable[Record]) -> Iterable[tuple[Record, Record]]:
    by_id = {(chain["task_id"], chain["sample"]): chain for chain in chains}
    return ((by_id[span["task_id"], span["sample"]], span) for span in spans)


def extract(run: Run, partial: Path) -> None:
    """One pass over the chains: a direction for every label, window and baseline, and the label-shuffled ones."""
    from steerable.chains.windows import WINDOWS
    from steerable.config import BASELINES
    from steerable.estimators.span_means import span_means

    chains = run.aligned()
    means = span_means(
        run.loaded.model, chains, LABELS, shuffles=run.config.controls, seed=run.config.seed, **run.spread
    )
    data = {"data_sha256": sha256(run.folder / "chains.jsonl"), "created_by": "steerable extract"}
    cosines: dict[str, Any] = {"overall_vs_pooled": {}, "windows": {}}
    missing = [label for label in STEERABLE if not means.count(label)]
    if missing:
        raise SteerableError(
            f"no span is labelled {missing[0]!r} in {len(chains)} chains: give more tasks with --limit"
        )
    for kind in ("candidates", "shuffled"):  # a run with other settings may have left more labels there
        shutil.rmtree(run.folder / f"vectors/{kind}", ignore_errors=True)
    for label in LABELS:
        if not means.count(label):
            continue
        made = {}
        for window in WINDOWS:
            for baseline in BASELINES:
                made[window, baseline] = direction = means.direction(label, window, baseline)
                for name, value in data.items():
                    setattr(direction, name, value)
                direction.save(run.folder / plan.candidate_path(window, baseline, label))
                for k in range(run.config.controls if label in STEERABLE else 0):
                    control = means.shuffled(label, window, baseline, k + 1)
                    control.save(run.folder / plan.shuffled_path(window, baseline, label, k))
        cosines["overall_vs_pooled"][label] = {
            window: _mean_cosine(made[window, "overall"], made[window, "pooled"]) for window in WINDOWS
        }
        cosines["windows"][label] = {
            f"{a}~{b}": _mean_cosine(made[a, run.config.baseline], made[b, run.config.baseline])
            for a, b in (("published", "onset"), ("published", "span"), ("span", "onset"))
        }
    write_json(run.folder / "cosines.json", cosines)
    write_json(
        run.folder / "norms.json",
        {
            str(site.layer): {"mean_norm": norm, "norm_of_mean": length}
            for site, norm, length in zip(
                means.sites, means.norms.tolist(), means.overall.norm(dim=1).tolist(), strict=True
            )
        },
    )


def _mean_cosine(a: Any, b: Any) -> float:
    values = list(a.cosine(b).values())
    return sum(values) / len(values)


def attribute(run: Run, partial: Path) -> None:
    """The effect of every layer, behaviour and window by all metrics."""
    from steerable.attribution import attribute as measure
    from steerable.directions import Direction

    c = run.config
    chains = run.aligned()
    result = {}
    for window in _windows(c):
        directions = {b: Direction.load(run.folder / plan.candidate_path(window, c.baseline, b)) for b in STEERABLE}
        measured = measure(run.loaded.model, chains, directions, limit=c.attributed, sample=c.patched, **run.spread)
        result[window] = measured.to_dict()
    write_json(run.folder / "attribution.json", result)


def _windows(config: Config) -> list[str]:
    from steerable.chains.windows import WINDOWS

    return [config.window] if config.window else list(WINDOWS)


def select(run: Run, partial: Path) -> None:
    """Window and layer of every behaviour, by attribution and validation (`selection.py`), and its controls."""
    from steerable import selection as rules
    from steerable.directions import Direction

    c = run.config
    measured_windows = read_json(run.folder / "attribution.json")
    effects = {window: effect for window, effect in measured_windows.items() if window in _windows(c)}
    if not effects:
        raise UsageError(
            f"{run.folder / 'attribution.json'} lacks the window {c.window!r}: run `steerable attribute` with it"
        )
    layers = len(next(iter(effects.values()))[STEERABLE[0]]["exact"]["mean"])
    candidates: dict[str, list[dict[str, Any]]] = {}
    for b in STEERABLE:
        for window, effect in effects.items():
            curve = effect[b]["exact"]["mean"]
            tried = rules.candidate_layers(curve, c.tried) if c.chosen_layer is None else [c.chosen_layer]
            candidates.setdefault(b, []).extend(
                {"window": window, "baseline": c.baseline, "layer": layer, "exact": curve[layer]} for layer in tried
            )
        if not candidates[b]:
            raise SteerableError(f"no effect of {b!r} was measured: give more chains with --patched, or a layer")
    cells = plan.validation_cells(c, candidates)
    files = {cell.name: partial / f"{cell.name}.jsonl" for cell in cells}
    experiment.generate_cells(run, cells, "validation", files, partial)
    measured = {name: experiment.measure(run, path, "validation") for name, path in files.items()}
    base = measured["unsteered"]
    chosen = {}
    shutil.rmtree(run.folder / "vectors/random", ignore_errors=True)  # the same
    for b, found in candidates.items():
        for candidate in found:
            name = f"{b}.{candidate['window']}.layer{candidate['layer']}"
            down, up = measured[f"{name}.-1"], measured[f"{name}.+1"]
            candidate |= {
                "fraction_unsteered": _first(base["fractions"][b]),
                "fraction_up": _first(up["fractions"][b]),
                "fraction_down": _first(down["fractions"][b]),
                "accuracy_up": _first(up["accuracy"]),
                "accuracy_down": _first(down["accuracy"]),
                "loops": max(up["loops"][0], down["loops"][0]),
            }
        best = rules.choose(found, _first(base["accuracy"]))
        chosen[b] = {
            "layer": best["layer"],
            "layers": list(rules.interior(layers)),
            "window": best["window"],
            "baseline": best["baseline"],
            "rule": rules.RULE if c.chosen_layer is None else f"layer {c.chosen_layer} was asked for",
            "candidates": found,
        }
        direction = Direction.load(run.folder / plan.candidate_path(best["window"], best["baseline"], b))
        selected = direction.only([best["layer"]])
        selected.save(run.folder / plan.selected_path(b))
        for k in range(c.controls):
            seed = (c.seed * 1000 + best["layer"]) * 1000 + k
            selected.random_like(seed).save(run.folder / plan.random_path(best["layer"], k))
    write_json(run.folder / "selection.json", chosen)


def _first(value: list[float] | None) -> float | None:
    return value[0] if value else None


def steer(run: Run, partial: Path) -> None:
    """The evaluation tasks in every cell of the plan."""
    cells = plan.evaluation_cells(run.config, read_json(run.folder / "selection.json"))
    pieces = partial / "steered"
    files = {c.name: pieces / f"{c.name}.jsonl" for c in cells}
    experiment.generate_cells(run, cells, "evaluation", files, partial)
    shutil.rmtree(run.folder / "steered", ignore_errors=True)
    pieces.rename(run.folder / "steered")


def evaluate(run: Run, partial: Path) -> None:
    """Every cell's spans, fractions, accuracy, length, loops, unclosed chains and KL divergence, with intervals."""
    cells = []
    spans = partial / "steered_spans"
    for cell in plan.evaluation_cells(run.config, read_json(run.folder / "selection.json")):
        path = run.folder / f"steered/{cell.name}.jsonl"
        measured = experiment.measure(run, path, "evaluation", spans / path.name)
        measured["kl"] = experiment.divergence(run, cell, path)
        head = {
            "control": cell.control,
            "strength": cell.strength,
            "layers": list(cell.layers),
            "where": cell.where,
        }
        # One entry a behaviour, so that a reader finds a behaviour's controls under its own name.
        for b in cell.behaviours:
            cells.append({"name": cell.name, "behaviour": b, **head, **measured})
    shutil.rmtree(run.folder / "steered_spans", ignore_errors=True)
    spans.rename(run.folder / "steered_spans")
    write_json(run.folder / "cells.json", cells)


def report(run: Run, partial: Path) -> None:
    """report.json and report.html."""
    from steerable.report.assemble import assemble
    from steerable.report.page import render

    content = assemble(run)
    write_json(run.folder / "report.json", content)
    write_atomic(run.folder / "report.html", render(content))  # without timings: equal runs give equal pages


def _kept_settings(folder: RunFolder) -> dict[str, Any]:
    """What the folder's config.json says; nothing where there is none."""
    kept = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if not isinstance(kept, dict):
        raise UsageError(f"{folder / 'config.json'} holds no settings: delete it and run the same command again")
    return kept


def open_run(out: str | Path, display: Display | None = None) -> Run:
    """The run in a folder, to read it. Raises UsageError where there is none."""
    folder = RunFolder(out)
    if not (folder / "config.json").exists():
        raise UsageError(f"{folder.root} is no run folder: expected one that `steerable run` has made")
    return Run(folder, from_dict(_kept_settings(folder)), display=display or Display(quiet=True))


STAGES = (
    Stage("tasks", make_tasks, (), "tasks llm_model seed limit validation evaluation", ("tasks.jsonl",)),
    Stage("generate", generate, ("tasks.jsonl",), f"{_MODEL} {_DECODING}", ("chains.jsonl",)),
    Stage(
        "annotate",
        annotate,
        ("tasks.jsonl", "chains.jsonl"),
        f"{_ANNOTATOR} seed stability",
        ("spans.jsonl", "coverage.json"),
    ),
    Stage(
        "extract",
        extract,
        ("tasks.jsonl", "chains.jsonl", "spans.jsonl"),
        f"{_MODEL} seed baseline controls",
        ("vectors/candidates", "vectors/shuffled", "cosines.json", "norms.json"),
    ),
    Stage(
        "attribute",
        attribute,
        ("tasks.jsonl", "chains.jsonl", "spans.jsonl", "vectors/candidates"),
        f"{_MODEL} window baseline attributed patched",
        ("attribution.json",),
    ),
    Stage(
        "select",
        select,
        ("tasks.jsonl", "attribution.json", "vectors/candidates"),
        f"{_MODEL} {_DECODING} window baseline layers tried controls {_ANNOTATOR}",
        ("selection.json", "vectors/random", *(plan.selected_path(b) for b in STEERABLE)),
    ),
    Stage(
        "steer",
        steer,
        ("tasks.jsonl", "selection.json", "vectors/candidates", "vectors/shuffled", "vectors/random"),
        f"{_MODEL} {_DECODING} samples side_samples sweep controls",
        ("steered",),
    ),
    Stage(
        "evaluate",
        evaluate,
        ("tasks.jsonl", "selection.json", "steered"),
        f"{_MODEL} {_ANNOTATOR} seed greedy samples side_samples sweep controls compared",
        ("cells.json", "steered_spans"),
    ),
    Stage(
        "report",
        report,
        ("config.json", "tasks.jsonl", "chains.jsonl", "spans.jsonl", "coverage.json", "cosines.json", "norms.json",
         "attribution.json", "selection.json", "vectors", "cells.json", "steered", "steered_spans"),
        "model annotator",
        ("report.json", "report.html"),
    ),
)  # fmt: skip


def run(
    out: str | Path,
    *,
    stage: str | None = None,
    fresh: bool = True,
    quick: bool = False,
    workers: int | None = None,
    ray: float | None = None,
    display: Display | None = None,
    **settings: Any,
) -> Path:
    """Go through all stages, or do one, in the run folder `out`; what is finished already is not done again.

    stage: one of `STAGES` by name. fresh: settings that are not given have their defaults; else those of the folder's
    config.json. quick: fewer tasks and samples. workers: processes; None: one a core for a small model on a CPU.
    ray: the workers are actors of a Ray cluster, each with this many GPUs. settings: those of `Config`.

    Returns the folder. Raises UsageError for a wrong setting or input, before anything is written.
    """
    from steerable.engines.workers import default_threads, torch_threads

    if stage is not None and stage not in {s.name for s in STAGES}:
        raise UsageError(f"unknown stage {stage!r}: expected one of {', '.join(s.name for s in STAGES)}")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}: expected 1 or more")
    if ray is not None and ray < 0:
        raise UsageError(f"--ray is {ray}: expected the number of GPUs of each worker, 0 or more")
    folder = RunFolder(out)
    steps = [step for step in STAGES if stage in (None, step.name)]
    config = from_dict({**({} if fresh else _kept_settings(folder)), **settings})
    config = config.quick() if quick else config
    current = Run(folder, config, workers, ray, display or Display(quiet=True))
    # Wrong settings, an unusable model and missing inputs are refused before anything is written.
    folder.key(steps[0].name, steps[0].inputs, current.settings(steps[0]))
    # As many threads as a worker has: a run's bytes then do not depend on the number of cores or workers.
    with folder.locked(), torch_threads(default_threads(current.loaded.model, 1)):
        # In a new folder config.json waits for the first stage, which is the one that may find the task file wrong.
        if not (is_new := not (folder / "config.json").exists()):
            write_json(folder / "config.json", config.to_dict())
        for step in steps:
            done = folder.run_stage(
                step.name,
                step.inputs,
                current.settings(step),
                step.outputs,
                lambda partial, step=step: step.work(current, partial),  # type: ignore[misc]
            )
            if is_new and step is steps[0]:
                write_json(folder / "config.json", config.to_dict())
            current.display.say(f"{step.name}: {'done' if done else 'was done already'}")
    return folder.root
