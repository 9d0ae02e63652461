"""The settings of `steerable train`: tables from which options, checks and `config.json` follow; recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self

from steerable.jobs.settings import ANNOTATORS, Annotator, check_names, check_positive, check_types, flag, option
from steerable.store.errors import UsageError
from steerable.store.files import refuse_stand_in

METHODS = ("bias", "adaptive", "lora", "tinylora", "full")
REWARDS = ("correct", "format", "random")
GENERATION = ("engine", "generate", "vllm-colocate", "vllm-server")
#: Of the bundled model, tuned on validation tasks; of other models, those of the paper's configurations.
RATES = {
    "pocket": {"bias": 1e-1, "adaptive": 1e-2, "lora": 1e-2, "tinylora": 1e-1, "full": 3e-4},
    "other": {"bias": 1e-3, "adaptive": 1e-4, "lora": 1e-4, "tinylora": 1e-3, "full": 1e-6},
}


@dataclass(frozen=True)
class TrainSettings:
    """What every training needs to know: the model, the tasks, what is trained, how it is judged. Raises UsageError for
    a value that makes no sense."""

    #: Default learning rates, of the bundled model and of others, by method.
    rates: ClassVar[Mapping[str, Mapping[str, float]]] = RATES

    model: str = option("pocket", "'pocket' (the bundled model), a model folder, or a name on the Hugging Face hub.")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    dtype: str | None = option(None, "Weights' type: float32, bfloat16, ...; default: what the checkpoint says.")
    device: str | None = option(None, "Device, e.g. cpu or cuda:0; default: a GPU where there is one.")
    attention: str | None = option(None, "Attention kernel: sdpa, eager, ...; default: what transformers chooses.")
    trust_remote_code: bool = option(False, "Run code that the model's repository brings along.")
    tasks: str = option(
        "auto",
        "pocket, reasoning-gym[:<family>,...], gsm8k:train, math, ..., hf:<data set>, or a .jsonl, .json or .csv file; "
        "each task needs an answer that can be checked. auto: pocket for the bundled model, else reasoning-gym.",
    )
    test: str | None = option(
        None, "Source of the tasks to judge on, e.g. gsm8k:test; default: unseen ones of --tasks."
    )
    system: str = option("", "A system message before every task.")
    template: str | None = option(None, "A text with {prompt}, instead of the model's chat template.")
    method: str = option("bias", "What is trained: bias (a vector a layer), adaptive, lora, tinylora or full.")
    layers: str | None = option(None, "Layers to train, e.g. 3 or 2,4; default: all.")
    after: str = option("mlp", "Where a layer's vector is added: after its mlp or its attention.")
    rank: int | None = option(
        None, "Rank of lora (4) and adaptive (1), numbers of tinylora (13); with bias: all layers' vectors share it."
    )
    learning_rate: float | None = option(None, "Default: by method; tuned for the bundled model.")
    warmup: float = option(0.03, "Share of the steps in which the learning rate rises.")
    clip: float = option(2.0, "Largest norm of a gradient.")
    seed: int = option(0, "Seed of tasks, sampling and parameters.")
    limit: int = option(1024, "Tasks to train on.")
    evaluation: int = option(128, "Unseen tasks to judge on, before and after.")
    samples: int = option(4, "Chains a task when judging by sampling; greedily it is one.")
    max_new_tokens: int = option(400, "Longest chain, answer included.")
    temperature: float = option(1.0, "Temperature of sampled judging, and of the rollouts that are paid for.")
    micro_batch: int = option(64, "Texts in one forward and backward pass, on each device.")
    checkpointing: bool = option(False, "Compute activations again in the backward pass: slower, in less memory.")
    save_every: int = option(10, "Steps between checkpoints.")
    annotator: str = option("auto", "Labels behaviours before and after: pocket, keywords or none; auto: by model.")
    controls: bool = option(
        True, "With bias: judge vectors of exchanged layers, random ones, and the boosted token as a prefix, too."
    )
    rows: int = option(64, "Sequences that our engine computes together.")

    def __post_init__(self) -> None:
        other = "pocket" if self.model == "pocket" else "other"
        for name, value in (
            ("tasks", "pocket" if other == "pocket" else "reasoning-gym"),
            ("annotator", "pocket" if other == "pocket" else "keywords"),
        ):
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, value)
        if self.learning_rate is None and self.method in METHODS:
            object.__setattr__(self, "learning_rate", self.rates[other][self.method])
        check_types(self)
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed is {self.seed}: expected a whole number from 0 to {2**32 - 1}")
        counts = "max_new_tokens limit evaluation samples micro_batch save_every rows"
        check_positive(self, counts.split())
        self._check_choices(
            ("method", METHODS), ("after", ("mlp", "attention")), ("annotator", ("pocket", "keywords", "none"))
        )
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank is {self.rank}: expected 1 or more")
        if not (self.learning_rate or 0) > 0 or self.temperature <= 0 or self.clip <= 0:
            raise UsageError("--learning-rate, --temperature and --clip must be above 0")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"--warmup is {self.warmup}, but it is a share: expected a number from 0 to 1")
        if self.template is not None and "{prompt}" not in self.template:
            raise UsageError("--template has no {prompt}: expected a text with {prompt} where the task belongs")
        if self.layers is not None:
            _ = self.chosen_layers

    def _check_choices(self, *choices: tuple[str, tuple[str | None, ...]]) -> None:
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{flag(name)} is {getattr(self, name)!r}: expected one of {', '.join(a for a in allowed if a)}"
                )

    def _fit_micro_batch(self, batch: int) -> None:
        """The passes of a step must be equally large."""
        if batch % self.micro_batch:
            fitting = [n for n in range(1, min(self.micro_batch, batch) + 1) if batch % n == 0][-1]
            object.__setattr__(self, "micro_batch", fitting)

    @property
    def chosen_layers(self) -> list[int] | None:
        """The layers that were asked for; None: all."""
        from steerable.steering.site import parse_layers  # with torch, which --help does without

        return None if self.layers is None else parse_layers(self.layers)

    @property
    def annotate(self) -> Annotator | None:
        """The annotator as a function `chain -> spans`."""
        if self.annotator == "none":
            return None
        import importlib

        module, _, name = ANNOTATORS[self.annotator].partition(":")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Settings from a dict. Raises UsageError for an unknown setting or a wrong value."""
        check_names(cls, values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def subset(self, names: str) -> dict[str, Any]:
        """The named settings, for a stage's key."""
        return {name: getattr(self, name) for name in names.split()}


@dataclass(frozen=True)
class RLSettings(TrainSettings):
    """Everything that a training by reinforcement learning depends on."""

    reward: str = option("correct", "What is paid for: correct, or, as controls, format or random.")
    beta: float = option(0.0, "Weight of the KL term; 0: none, and no reference model.")
    steps: int = option(40, "Optimiser steps, one for every batch of rollouts.")
    prompts: int = option(16, "Tasks a step, over all processes.")
    group: int = option(8, "Samples of each task.")
    generation: str = option("engine", "What rolls out: engine (ours), generate, vllm-colocate or vllm-server.")
    vllm_url: str = option("http://localhost:8000", "With vllm-server: where `vllm serve` listens.")
    vllm_memory: float = option(0.3, "With vllm-colocate: vLLM's share of the GPU's memory.")
    launcher: str | None = option(None, "accelerate: train in the processes that `accelerate launch` starts.")
    accelerate_config: str | None = option(None, "Its configuration: FSDP, DeepSpeed, how many processes.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("steps", "prompts"))
        self._check_choices(("reward", REWARDS), ("generation", GENERATION), ("launcher", (None, "accelerate")))
        if self.group < 2:
            raise UsageError(f"--group is {self.group}: expected 2 or more, as a sample is compared with its group")
        if self.beta < 0:
            raise UsageError(f"--beta is {self.beta}: expected 0 or more")
        if not 0 < self.vllm_memory < 1:
            raise UsageError(f"--vllm-memory is {self.vllm_memory}, but it is a share: expected a number from 0 to 1")
        if self.limit < self.prompts:
            raise UsageError(f"--limit is {self.limit}: expected at least --prompts ({self.prompts}), a batch of tasks")
        self._fit_micro_batch(self.rollouts)
        if self.beta and self.method == "bias" and self.rank:
            raise UsageError("--beta with --rank is not possible for bias: leave one of them out")

    @property
    def rollouts(self) -> int:
        """Rollouts a step."""
        return self.prompts * self.group


@dataclass(frozen=True)
class UPFTSettings(TrainSettings):
    """Everything that a training on own first tokens depends on."""

    prefix_tokens: int = option(8, "How many first tokens of every own solution are learnt (the paper's code: 32).")
    prefix_temperature: float = option(
        0.6, "Temperature at which they are sampled; 0: greedily. At 1 there is nothing to learn on average."
    )
    batch: int = option(64, "Solutions a step.")
    epochs: int = option(1, "How often every solution is seen.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("prefix_tokens", "batch", "epochs"))
        if self.prefix_temperature < 0:
            raise UsageError(f"--prefix-temperature is {self.prefix_temperature}: expected 0 or more")
        if self.prefix_tokens > self.max_new_tokens:
            raise UsageError(
                f"--prefix-tokens is {self.prefix_tokens}: expected no more than --max-new-tokens "
                f"({self.max_new_tokens}), a whole chain"
            )
        self._fit_micro_batch(self.batch)


def from_dict(values: Mapping[str, Any]) -> RLSettings:
    """Settings from a dict. Raises UsageError for an unknown setting or a wrong value."""
    return RLSettings.from_dict(values)


def recipes() -> dict[str, dict[str, Any]]:
    """The recipes that come with the package, by name: settings of the published experiments."""
    folder = resources.files("steerable.methods.train") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return {f.name.removesuffix(".json"): json.loads(f.read_text(encoding="utf-8")) for f in files}


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by its name, or from a JSON file of settings. Raises UsageError where there is none."""
    known = recipes()
    if name in known:
        return {key: value for key, value in known[name].items() if key != "about"}
    refuse_stand_in(name)
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--recipe is {name!r}, which is no readable JSON file ({error}): expected one, or {', '.join(known)}"
        ) from None
    if not isinstance(found, dict):
        raise UsageError(f"{name} holds no settings: expected a JSON object of them")
    if found.get("trust_remote_code"):
        raise UsageError(f"{name} asks for trust_remote_code, which no file may: give the option yourself")
    return {key: value for key, value in found.items() if key != "about"}
