"""A run in progress: its folder and settings, and what its stages share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from steerable.chains.generation import prompt_text
from steerable.chains.records import Record, by_chain, chain_key, read_jsonl, steered_by_default
from steerable.chains.windows import align_chains
from steerable.engines.base import Engine
from steerable.engines.cluster import map_blocks as map_blocks_on_cluster
from steerable.engines.pool import default_workers, map_blocks
from steerable.engines.sampling import warn_if_endless
from steerable.engines.vllm.engine import VllmEngine, parse_options
from steerable.jobs.settings import Config
from steerable.models import loading as models
from steerable.models.sources import find
from steerable.steering.direction import Direction
from steerable.steering.gates import parse_gate
from steerable.steering.think import think_tags, think_tags_if_any
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.run_folder import RunFolder, read_json


@dataclass
class Run:
    """A run folder with the settings of a run; the model is loaded when a stage first needs it."""

    folder: RunFolder
    config: Config
    workers: int | None = None
    ray: float | None = None
    display: Display = field(default_factory=lambda: Display(quiet=True))

    @cached_property
    def loaded(self) -> models.Loaded:
        """The model and its tokenizer. Raises UsageError for a model that the main job cannot use."""
        c = self.config
        loaded = load_model(c)
        if parse_gate(c.gate).uses("thinking", "answer"):
            think_tags(loaded.tokenizer)
        prompt_text(loaded.tokenizer, "?")
        warn_if_endless(loaded.model)
        layers = models.n_layers(loaded.model)
        if c.chosen_layer is not None and c.chosen_layer >= layers:
            raise UsageError(f"--layers is {c.chosen_layer}, but {c.model} has layers 0 to {layers - 1}")
        return loaded

    @property
    def thinks(self) -> bool:
        """Whether the model writes a think block; if not, all that it writes is the chain."""
        return think_tags_if_any(self.loaded.tokenizer) is not None

    @cached_property
    def weights(self) -> str:
        """What tells two models of one name apart, without loading them: the commit of a hub model, the hash of a
        folder's weights or of a GGUF file."""
        source = find(self.config.model)
        if (content := source.fingerprint) is not None:
            return content
        return models.pin(source.place, self.config.revision)[0] or models.model_revision(self.loaded.model)

    @property
    def spread(self) -> dict[str, Any]:
        """On what chains are generated: `workers`, `spread` and `engine` of the functions that do it."""
        if self.engine is not None:
            return {"workers": 1, "spread": map_blocks, "engine": self.engine}
        return self._spread(self.workers or default_workers(self.loaded.model))

    @cached_property
    def engine(self) -> Engine | None:
        """What generates, where it is not transformers; started when a stage first needs it. Raises UsageError for
        settings that it does not know."""
        c = self.config
        options = parse_options(c.engine, c.engine_options)
        if c.engine == "transformers":
            return None
        if options:
            c.check_own("engine_options")
        others = {"--quantization": c.quantization, "--device": c.device, "--attention": c.attention, "--ray": self.ray}
        if given := [name for name, value in others.items() if value is not None]:
            raise UsageError(f"{given[0]} is a setting of --engine transformers: leave it out, vLLM has its own")
        dtype = str(self.loaded.model.dtype).removeprefix("torch.")
        fixed: dict[str, Any] = {"dtype": dtype, "trust_remote_code": c.trust_remote_code, "seed": c.seed}
        return VllmEngine.start(c.model, **fixed | {"revision": c.revision} | options)

    @property
    def spread_reading(self) -> dict[str, Any]:
        """On what chains are read. Reading is short: more processes than one take longer to start than they save,
        unless the model or the chains are long enough for somebody to ask for them."""
        return self._spread(self.workers or 1)

    def _spread(self, workers: int) -> dict[str, Any]:
        spread = map_blocks if self.ray is None else partial(map_blocks_on_cluster, gpus=self.ray)
        return {"workers": workers, "spread": spread}

    def load(self, path: str) -> Direction:
        """The direction at a path of the folder."""
        return Direction.load(self.folder / path)

    @property
    def labels(self) -> list[str]:
        """The annotator's labels, as the stage `annotate` left them."""
        return list(read_json(self.folder / "coverage.json", dict)["spans"])

    @property
    def reference(self) -> float | None:
        """The length of a chain against which others are `short` or `long`, where the annotator is `length`."""
        value = read_json(self.folder / "coverage.json", dict).get("reference")
        return None if value is None else float(value)

    @property
    def behaviours(self) -> list[str]:
        """The labels to be steered: those that were asked for, else the paper's four, or all of another set. Raises
        UsageError for one that the annotator does not have."""
        return self.behaviours_among(self.labels)

    def behaviours_among(self, labels: Sequence[str]) -> list[str]:
        """`behaviours`, where these are the annotator's labels."""
        steered = self.config.steered
        if steered is None:
            return steered_by_default(labels)
        if unknown := [b for b in steered if b not in labels]:
            raise UsageError(
                f"--behaviours has {unknown[0]!r}, which is no label of --annotator {self.config.annotator}: expected "
                f"some of {', '.join(labels)}"
            )
        return steered

    def tasks(self, split: str) -> list[Record]:
        """The tasks of a split: extraction, validation or evaluation. Those of another tool, without one, are the
        first."""
        tasks = read_jsonl(self.folder / "tasks.jsonl", "task")
        return [task for task in tasks if task.get("split", "extraction") == split]

    def prompts(self, split: str) -> dict[str, str]:
        """Task id -> what the chat template makes of the task, up to where the model begins to speak."""
        return {task["id"]: prompt_text(self.loaded.tokenizer, task["prompt"]) for task in self.tasks(split)}

    def aligned(self) -> list[Any]:
        """The extraction chains as the model reads them, with their spans as token ranges."""
        spans = by_chain(read_jsonl(self.folder / "spans.jsonl", "span"))
        chains = read_jsonl(self.folder / "chains.jsonl", "chain")
        spans_of = [spans[chain_key(chain)] for chain in chains]
        return align_chains(self.loaded.tokenizer, self.prompts("extraction"), chains, spans_of)


def load_model(c: Config) -> models.Loaded:
    """The model of the settings and its tokenizer, whatever they can be used for."""
    if c.trust_remote_code:
        c.check_own("trust_remote_code")
    if "/" in (c.attention or ""):  # a kernel on the hub is code
        c.check_own("attention")
    where = {"device_map": "auto"} if c.device == "auto" else {"device": c.device}
    return models.load(
        c.model,
        dtype=c.dtype,
        attn_implementation=c.attention,
        quantization=c.quantization,
        revision=c.revision,
        trust_remote_code=c.trust_remote_code,
        **where,
    )


def recorded_settings(folder: RunFolder) -> dict[str, Any]:
    """What the folder's config.json says; nothing where there is none."""
    settings = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if not isinstance(settings, dict):
        raise UsageError(f"{folder / 'config.json'} holds no settings: delete it and run the same command again")
    return settings


def open_run(out: str | Path, display: Display | None = None) -> Run:
    """The run in a folder, to read it. Raises UsageError where there is none."""
    folder = RunFolder(out)
    if not (folder / "config.json").exists():
        raise UsageError(f"{folder.root} is no run folder: expected one that `steerable run` has made")
    settings = recorded_settings(folder)
    return Run(folder, Config(settings, **settings), display=display or Display(quiet=True))
