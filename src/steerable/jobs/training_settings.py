"""The settings of `steerable train` and of comparisons of what it made; recipes: settings of published experiments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from steerable.jobs.settings import ANNOTATORS, LARGEST_SEED, Annotator, Settings, label_file, plain_annotator
from steerable.methods.train import Method
from steerable.models.taught import TAUGHT
from steerable.store.errors import UsageError
from steerable.store.files import refuse_stand_in

RATES: dict[str, dict[str, float]] = {
    "pocket": {"bias": 1e-1, "adaptive": 1e-2, "lora": 1e-2, "tinylora": 1e-1, "full": 3e-4},
    "other": {"bias": 1e-3, "adaptive": 1e-4, "lora": 1e-4, "tinylora": 1e-3, "full": 1e-6},
}
"""Learning rates: of the bundled model, tuned on validation tasks; of other models, from the papers' configurations."""
_LOGITS_ON_CPU, _LOGITS = 2**27, 2**30  # half a gigabyte and four of float32
MODEL = "model revision dtype device attention trust_remote_code"
"""The settings that name a model."""


class TrainSettings(Settings):
    """What every training needs to know: the model, the tasks, what is trained, how it is judged."""

    panels: ClassVar[Mapping[str, str]] = {
        "Common": "model tasks test method layers after learning_rate seed limit evaluation samples max_new_tokens",
        "The model": "revision dtype device attention trust_remote_code system template rows",
    }

    model: str = Field(
        "pocket",
        description="'pocket' (the bundled model), 'smol' or 'smol-think' (of `fetch`), a folder, a .gguf file or a "
        "hub name.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: str | None = Field(
        None, description="Weights' type: float32, bfloat16, ...; default: what the checkpoint says."
    )
    device: str | None = Field(None, description="Device, e.g. cuda:0; default: CUDA, else MPS, else the CPU.")
    attention: str | None = Field(
        None, description="Attention kernel: sdpa, eager, ...; default: what transformers chooses."
    )
    trust_remote_code: bool = Field(False, description="Run code that the model's repository brings along.")
    tasks: str = Field(
        "auto",
        description="pocket, smol-think, reasoning-gym[:<family>,...], gsm8k:train, math, ..., hf:<data set>, or a "
        ".jsonl, .json or .csv file; each task needs an answer that can be checked. auto: the one of "
        "pocket or smol-think for that model, else reasoning-gym.",
    )
    test: str | None = Field(
        None, description="Source of the tasks to judge on, e.g. gsm8k:test; default: unseen ones of --tasks."
    )
    system: str = Field("", description="A system message before every task.")
    template: str | None = Field(None, description="A text with {prompt}, instead of the model's chat template.")
    method: Method = Field(
        "bias", description="What is trained: bias (a vector a layer), adaptive, lora, tinylora or full."
    )
    layers: str | None = Field(None, description="Layers to train, e.g. 3 or 2,4; default: all.")
    after: Literal["mlp", "attention"] = Field(
        "mlp", description="Where a layer's vector is added: after its mlp or its attention."
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="Rank of lora (4) and adaptive (1), numbers of tinylora (13); with bias: all layers' vectors share "
        "it.",
    )
    learning_rate: float | None = Field(None, gt=0, description="Default: by method; tuned for the bundled model.")
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    clip: float = Field(2.0, gt=0, description="Largest norm of a gradient.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of tasks, sampling and parameters.")
    limit: int = Field(1024, ge=1, description="Tasks to train on.")
    evaluation: int = Field(128, ge=1, description="Unseen tasks to judge on, before and after.")
    samples: int = Field(4, ge=1, description="Chains a task when judging by sampling; greedily it is one.")
    max_new_tokens: int = Field(400, ge=1, description="Longest chain, answer included.")
    temperature: float = Field(
        1.0, gt=0, description="Temperature of sampled judging, and of the rollouts that are paid for."
    )
    micro_batch: int = Field(
        64,
        ge=1,
        description="Texts in one forward and backward pass, on each device; fewer by itself for a large vocabulary.",
    )
    checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: slower, in less memory."
    )
    save_every: int = Field(10, ge=1, description="Steps between checkpoints.")
    annotator: str = Field(
        "auto",
        description="Labels behaviours before and after: pocket, keywords, cues:FILE (or cues:seal), module:function "
        "of your own, or none; auto: the one of pocket or smol-think for that model, else keywords.",
    )
    controls: bool = Field(
        True,
        description="With bias: judge vectors of exchanged layers, random ones, and the boosted token as a prefix, "
        "too.",
    )
    rows: int = Field(64, ge=1, description="Sequences that our engine computes together.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Replace defaults that depend on other settings, so that config.json holds what was used."""
        taught = self.model in TAUGHT
        if self.tasks == "auto":
            self._derive(tasks=self.model if taught else "reasoning-gym")
        if self.annotator == "auto":
            self._derive(annotator=self.model if taught else "keywords")
        if self.learning_rate is None:
            self._derive(learning_rate=RATES.get(self.model, RATES["other"])[self.method])
        if self.template is not None and "{prompt}" not in self.template:
            raise UsageError("--template has no {prompt}: expected a text with {prompt} where the task belongs")
        _ = self.chosen_layers
        self._divide(self.micro_batch)
        return self

    def fit_to_memory(self, vocabulary: int, on_cpu: bool) -> None:
        """Fewer texts a pass, unless --micro-batch was given, where the logits of so many would fill the memory: a
        pass holds several tensors as large as `micro_batch x max_new_tokens x vocabulary`."""
        if "micro_batch" not in self.model_fields_set:
            most = _LOGITS_ON_CPU if on_cpu else _LOGITS
            self._divide(max(1, min(self.micro_batch, most // (self.max_new_tokens * vocabulary))))

    def _divide(self, most: int) -> None:
        """The passes of a step must be equally large."""
        if self.batch_size % most or most != self.micro_batch:
            fitting = (n for n in range(1, min(most, self.batch_size) + 1) if self.batch_size % n == 0)
            self._derive(micro_batch=max(fitting))

    def _derive(self, **values: Any) -> None:
        """Set fields without counting them as given."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def batch_size(self) -> int:
        """Texts that one optimiser step learns from."""
        raise NotImplementedError

    @property
    def chosen_layers(self) -> list[int] | None:
        """The layers that were asked for; None: all."""
        from steerable.steering.site import parse_layers  # with torch, which --help does without

        return None if self.layers is None else parse_layers(self.layers)

    @property
    def annotate(self) -> Annotator | None:
        """The annotator as a function `chain -> spans`. Raises UsageError for one that cannot be used."""
        return None if self.annotator == "none" else plain_annotator(self.annotator, "none")


class RLSettings(TrainSettings):
    """Everything that a training by reinforcement learning depends on."""

    reward: Literal["correct", "format", "random"] = Field(
        "correct", description="What is paid for: correct, or, as controls, format or random."
    )
    beta: float = Field(0.0, ge=0, description="Weight of the KL term; 0: none, and no reference model.")
    steps: int = Field(40, ge=1, description="Optimiser steps, one for every batch of rollouts.")
    prompts: int = Field(16, ge=1, description="Tasks a step, over all processes.")
    group: int = Field(8, ge=2, description="Samples of each task.")
    generation: Literal["engine", "generate", "vllm-colocate", "vllm-server"] = Field(
        "engine", description="What rolls out: engine (ours), generate, vllm-colocate or vllm-server."
    )
    vllm_url: str = Field("http://localhost:8000", description="With vllm-server: where `vllm serve` listens.")
    vllm_memory: float = Field(0.3, gt=0, lt=1, description="With vllm-colocate: vLLM's share of the GPU's memory.")
    launcher: Literal["accelerate"] | None = Field(
        None, description="accelerate: train in the processes that `accelerate launch` starts."
    )
    accelerate_config: str | None = Field(None, description="Its configuration: FSDP, DeepSpeed, how many processes.")

    @property
    def batch_size(self) -> int:
        """Rollouts a step."""
        return self.prompts * self.group

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.limit < self.prompts:
            raise UsageError(f"--limit is {self.limit}: expected at least --prompts ({self.prompts}), a batch of tasks")
        if self.beta and self.method == "bias" and self.rank:
            raise UsageError("--beta with --rank is not possible for bias: leave one of them out")
        return self


class UPFTSettings(TrainSettings):
    """Everything that a training on own first tokens depends on."""

    prefix_tokens: int = Field(
        8, ge=1, description="How many first tokens of every own solution are learnt (the paper's code: 32)."
    )
    prefix_temperature: float = Field(
        0.6,
        ge=0,
        description="Temperature at which they are sampled; 0: greedily. At 1 there is nothing to learn on average.",
    )
    batch: int = Field(64, ge=1, description="Solutions a step.")
    epochs: int = Field(1, ge=1, description="How often every solution is seen.")

    @property
    def batch_size(self) -> int:
        """Solutions a step."""
        return self.batch

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prefix_tokens > self.max_new_tokens:
            raise UsageError(
                f"--prefix-tokens is {self.prefix_tokens}: expected no more than --max-new-tokens "
                f"({self.max_new_tokens}), a whole chain"
            )
        return self


class Comparison(Settings):
    """How the arms of a comparison are asked."""

    limit: int = Field(100, ge=1, description="How many tasks.")
    samples: int = Field(1, ge=1, description="Chains a task.")
    max_new_tokens: int = Field(500, ge=1, description="Longest chain, answer included.")
    system: str = Field("", description="A system message.")
    template: str = Field("", description="A text with {prompt}, in place of the chat template.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of tasks, sampling and random directions.")


class PasskSettings(Comparison):
    """The same, with the many samples that pass@k needs."""

    samples: int = Field(64, ge=1, description="Chains a task: the largest k.")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="What generates: transformers, or vllm, for a base and directions."
    )
    engine_options: str = Field("", description="With --engine vllm: options of vllm.LLM as JSON.")


def recipes() -> dict[str, dict[str, Any]]:
    """The recipes that come with the package, by name: settings of the published experiments."""
    folder = resources.files("steerable.methods.train") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return {f.name.removesuffix(".json"): json.loads(f.read_text(encoding="utf-8")) for f in files}


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by its name, or from a JSON file of settings. Raises UsageError where there is none."""
    recipe = recipes().get(name)
    if recipe is None:
        refuse_stand_in(name)
        try:
            recipe = json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--recipe is {name!r}, which is no readable JSON file ({error}): expected one, or "
                f"{', '.join(recipes())}"
            ) from None
        if not isinstance(recipe, dict):
            raise UsageError(f"{name} holds no settings: expected a JSON object of them")
        if recipe.get("trust_remote_code"):
            raise UsageError(f"{name} asks for trust_remote_code, which no file may: give the option yourself")
        annotator = str(recipe.get("annotator", "auto"))
        if annotator not in ("auto", "none", *ANNOTATORS) and label_file(annotator) is None:
            raise UsageError(f"{name} asks for the annotator {annotator}, which no file may: give the option yourself")
    return {key: value for key, value in recipe.items() if key != "about"}
