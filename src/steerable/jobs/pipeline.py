"""The main job: tasks -> chains -> spans -> vectors -> attribution -> selection -> steered chains -> cells -> report.

Every stage reads and writes files of a run folder and is not done again while its inputs and settings stay the same
(`runfolder.py`). `run` goes through all of them; a single stage is `run(..., stage="extract")`.

The algorithm is that of Venhoff et al. 2025, "Understanding Reasoning in Thinking Language Models via Steering
Vectors" (arXiv 2506.18167), with the choices that `config.py` names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from steerable.chains.records import STEERABLE, Record, read_jsonl
from steerable.jobs import annotation, plan, stages
from steerable.jobs.settings import Config, flag
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.files import sha256, sha256_of
from steerable.store.run_folder import RunFolder, read_json, write_json


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
        from steerable.chains.generation import prompt_text
        from steerable.engines.sampling import warn_if_endless
        from steerable.models import loading as models
        from steerable.steering.think import think_tags

        c = self.config
        if c.trust_remote_code:
            c.check_own("trust_remote_code")
        if "/" in (c.attention or ""):  # a kernel on the hub is code
            c.check_own("attention")
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
        warn_if_endless(loaded.model)
        layers = models.n_layers(loaded.model)
        if (layer := self.config.chosen_layer) is not None and layer >= layers:
            raise UsageError(f"--layers is {layer}, but {self.config.model} has layers 0 to {layers - 1}")
        return loaded

    @property
    def spread(self) -> dict[str, Any]:
        """On what chains are generated: `workers` and `spread` of the functions that do it."""
        from steerable.engines.pool import default_workers

        return self._spread(self.workers or default_workers(self.loaded.model))

    @property
    def spread_reading(self) -> dict[str, Any]:
        """On what chains are read. That is short: more processes than one take longer to start than they save, unless
        the model or the chains are long enough for somebody to ask for them."""
        return self._spread(self.workers or 1)

    def _spread(self, workers: int) -> dict[str, Any]:
        from steerable.engines.cluster import map_blocks as on_cluster
        from steerable.engines.pool import map_blocks

        return {"workers": workers, "spread": map_blocks if self.ray is None else partial(on_cluster, gpus=self.ray)}

    @cached_property
    def weights(self) -> str:
        """What tells two models of one name apart: the commit of a hub model, the hash of a folder's weights."""
        from steerable.models.loading import pocket_path

        config = self.loaded.model.config
        if commit := getattr(config, "_commit_hash", None):
            return str(commit)
        root = pocket_path() if self.config.model == "pocket" else Path(self.config.model)
        found = [*root.glob("*.safetensors"), *root.glob("*.json"), *root.glob("*.jinja")]
        return sha256_of({file.name: file for file in found})

    def settings(self, stage: Stage) -> dict[str, Any]:
        """What the stage's result depends on beside its inputs, with the content of what the settings only name."""
        found = self.config.subset(stage.settings) | {"weights": self.weights}
        if "tasks" in found and Path(self.config.tasks).is_file():
            found["tasks_sha256"] = sha256(Path(self.config.tasks))
        if "annotator" in found:
            found["annotator_sha256"] = [sha256(source) for source in annotation.sources(self.config)]
        if "llm" not in (found.get("annotator"), found.get("tasks")):
            found = {name: value for name, value in found.items() if not name.startswith("llm_")}
        return found

    def tasks(self, split: str) -> list[Record]:
        return [task for task in read_jsonl(self.folder / "tasks.jsonl", "task") if task["split"] == split]

    def prompts(self, split: str) -> dict[str, str]:
        """Task id -> what the chat template makes of the task, up to where the model begins to speak."""
        from steerable.chains.generation import prompt_text

        return {task["id"]: prompt_text(self.loaded.tokenizer, task["prompt"]) for task in self.tasks(split)}

    def aligned(self) -> list[Any]:
        """The extraction chains as the model reads them, with their spans as token ranges."""
        from steerable.chains.windows import align_chains

        spans: dict[tuple[str, int], list[Record]] = {}
        for span in read_jsonl(self.folder / "spans.jsonl", "span"):
            spans.setdefault((span["task_id"], span["sample"]), []).append(span)
        chains = read_jsonl(self.folder / "chains.jsonl", "chain")
        marked = [spans.get((chain["task_id"], chain["sample"]), []) for chain in chains]
        return align_chains(self.loaded.tokenizer, self.prompts("extraction"), chains, marked)


@dataclass(frozen=True)
class Stage:
    """One step: its name, what does it, the files it reads and writes, and the settings its result depends on."""

    name: str
    work: Callable[[Run, Path], None]
    inputs: tuple[str, ...]
    settings: str
    outputs: tuple[str, ...]


_MODEL = "model revision dtype device quantization attention engine"
_ANNOTATOR = "annotator llm_model llm_prices"
_DECODING = "seed greedy max_new_tokens rows block"


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
    kept = _kept_settings(folder)
    return Run(folder, Config(kept, **kept), display=display or Display(quiet=True))


STAGES = (
    Stage("tasks", stages.make_tasks, (), "tasks llm_model seed limit validation evaluation", ("tasks.jsonl",)),
    Stage("generate", stages.generate, ("tasks.jsonl",), f"{_MODEL} {_DECODING}", ("chains.jsonl",)),
    Stage(
        "annotate",
        stages.annotate,
        ("tasks.jsonl", "chains.jsonl"),
        f"{_ANNOTATOR} seed stability",
        ("spans.jsonl", "coverage.json"),
    ),
    Stage(
        "extract",
        stages.extract,
        ("tasks.jsonl", "chains.jsonl", "spans.jsonl"),
        f"{_MODEL} seed baseline controls",
        ("vectors/candidates", "vectors/shuffled", "cosines.json", "norms.json"),
    ),
    Stage(
        "attribute",
        stages.attribute,
        ("tasks.jsonl", "chains.jsonl", "spans.jsonl", "vectors/candidates"),
        f"{_MODEL} window baseline attributed patched",
        ("attribution.json",),
    ),
    Stage(
        "select",
        stages.select,
        ("tasks.jsonl", "attribution.json", "vectors/candidates"),
        f"{_MODEL} {_DECODING} window baseline layers tried controls {_ANNOTATOR}",
        ("selection.json", "vectors/random", *(plan.selected_path(b) for b in STEERABLE)),
    ),
    Stage(
        "steer",
        stages.steer,
        ("tasks.jsonl", "selection.json", "vectors/candidates", "vectors/shuffled", "vectors/random"),
        f"{_MODEL} {_DECODING} samples side_samples sweep controls",
        ("steered",),
    ),
    Stage(
        "evaluate",
        stages.evaluate,
        ("tasks.jsonl", "selection.json", "steered"),
        f"{_MODEL} {_ANNOTATOR} seed greedy samples side_samples sweep controls compared",
        ("cells.json", "steered_spans"),
    ),
    Stage(
        "report",
        stages.report,
        ("config.json", "tasks.jsonl", "chains.jsonl", "spans.jsonl", "coverage.json", "cosines.json", "norms.json",
         "attribution.json", "selection.json", "vectors", "cells.json", "steered", "steered_spans"),
        "model",
        ("report.json", "report.html"),
    ),
)  # fmt: skip


def _refuse_settings_of_earlier(stage: str, changed: set[str]) -> None:
    """Raises UsageError for a changed setting on which only earlier stages depend: their results would stay as they
    are, and config.json and the report would say something else of them."""
    names = [s.name for s in STAGES]
    used = STAGES[names.index(stage)].settings.split()
    for earlier in STAGES[: names.index(stage)]:
        if unused := sorted((changed & set(earlier.settings.split())) - set(used)):
            raise UsageError(
                f"{flag(unused[0])} changes nothing in stage {stage!r}, as stage {earlier.name!r} depends on it: give "
                f"it to `steerable {earlier.name}`, or to `steerable run`, which does all stages that depend on it"
            )


def run(
    out: str | Path,
    *,
    stage: str | None = None,
    fresh: bool = True,
    quick: bool = False,
    workers: int | None = None,
    ray: float | None = None,
    display: Display | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Path:
    """Go through all stages, or do one, in the run folder `out`; what is finished already is not done again.

    stage: one of `STAGES` by name. fresh: settings that are not given have their defaults; else those of the folder's
    config.json. quick: fewer tasks and samples. workers: processes; None: one a core for a small model on a CPU.
    ray: the workers are actors of a Ray cluster, each with this many GPUs. overwrite: replace the results of another
    model that the folder holds. settings: those of `Config`.

    Returns the folder. Raises UsageError for a wrong setting or input, before anything is written.
    """
    from steerable.engines.pool import default_threads, torch_threads

    if stage is not None and stage not in {s.name for s in STAGES}:
        raise UsageError(f"unknown stage {stage!r}: expected one of {', '.join(s.name for s in STAGES)}")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}: expected 1 or more")
    if ray is not None and ray < 0:
        raise UsageError(f"--ray is {ray}: expected the number of GPUs of each worker, 0 or more")
    folder = RunFolder(out)
    steps = [step for step in STAGES if stage in (None, step.name)]
    kept = {} if fresh else _kept_settings(folder)
    config = Config(kept.keys() - settings.keys(), **{**kept, **settings})
    config = config.quick() if quick else config
    folder.refuse_other("run", config.model, config.revision, overwrite)
    if stage is not None and kept:
        _refuse_settings_of_earlier(stage, {name for name in settings if kept.get(name) != getattr(config, name)})
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
