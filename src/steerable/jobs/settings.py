"""The settings of a run: fields from which the command line's options, the checks and `config.json` follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from steerable.chains.annotators.cue_files import LABEL_SETS, read_cues, read_labels
from steerable.chains.records import is_label
from steerable.chains.windows import WINDOWS
from steerable.models.taught import TAUGHT
from steerable.store.errors import UsageError
from steerable.store.plugins import function_at

Annotator = Callable[[Mapping[str, Any]], list[dict[str, Any]]]
ANNOTATORS = {
    "pocket": "steerable.models.pocket.language:annotate",
    "smol-think": "steerable.models.smol.language:annotate",
    "keywords": "steerable.chains.annotators.keyword_rules:keywords",
}
"""Annotators that are plain functions; `llm` and `probe:FILE` are not."""
FEWEST_SPANS = 5
"""A label with fewer spans is not steered: the mean of so few says nothing."""
BASELINES = ("pooled", "overall")
DIFFERENCE = "difference_of_means"
LARGEST_SEED = 2**32 - 1
PAPER: dict[str, Any] = {
    "tasks": "llm",
    "annotator": "llm",
    "limit": 500,
    "evaluation": 50,
    "greedy": True,
    "max_new_tokens": 1000,
    "window": "published",
    "attributed": 50,
}
"""The published setting (Venhoff et al. 2025, arXiv 2506.18167), as defaults of a run."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "smol-think": {
        "limit": 200,
        "validation": 24,
        "evaluation": 110,
        "samples": 1,  # more tasks rather than more chains of each: intervals are over tasks
        "controls": 2,
        "budget": 0.1,
        "window": "onset",
        "tried": 2,
        "side_tasks": 6,
        "sweep": "",
    }
}
"""Defaults of a model that would take a laptop hours with those of the bundled one, which is fifty times smaller."""


def flag(name: str) -> str:
    """The command line's option for a setting: `max_new_tokens` is `--max-new-tokens`."""
    return f"--{name.replace('_', '-')}"


def label_file(annotator: str) -> Path | None:
    """The file that an annotator reads: a probe, cue words, or labels for a language model."""
    kind, _, path = annotator.partition(":")
    if kind == "cues" and (shipped := LABEL_SETS / f"{Path(path).name}.json").is_file():
        return shipped
    return Path(path) if kind in ("probe", "cues", "llm") and path else None


def plain_annotator(annotator: str, others: str) -> Annotator:
    """The annotator that is a plain function, `chain -> spans`, by its name, `cues:FILE` or `module:function`.

    others: what the setting could be besides. Raises UsageError for a file or a function that cannot be used.
    """
    if annotator.startswith("cues:") and (file := label_file(annotator)) is not None:
        return read_cues(file)
    names = f"{', '.join(ANNOTATORS)}, cues:FILE, {others} or module:function, chain -> spans"
    return function_at(ANNOTATORS.get(annotator, annotator), "--annotator", names)


class Settings(BaseModel):
    """Base of every table of settings: frozen, strict about types, closed to unknown names.

    Each field is an option of the command line; its `description` is the option's help. A wrong value raises
    UsageError with one sentence that names the option. A check over several fields is a pydantic `model_validator`
    that raises UsageError.

    Example:
        >>> class Training(Settings):
        ...     steps: int = Field(40, ge=1, description="Optimiser steps.")
        >>> Training(steps=0)
        Traceback (most recent call last):
        steerable.store.errors.UsageError: --steps is 0: expected 1 or more
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    #: Headings of the command line's help, each with the fields below it; the rest stands under "Settings".
    panels: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(self._sentence(error)) from None

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as `config.json` holds them."""
        return self.model_dump()

    def subset(self, names: str) -> dict[str, Any]:
        """The fields named in a text with spaces between them: what a stage depends on."""
        return {name: getattr(self, name) for name in names.split()}

    def replace(self, **values: Any) -> Self:
        """The same settings with some of other values, checked again."""
        return type(self)(**self.to_dict() | values)

    @classmethod
    def _sentence(cls, error: ValidationError) -> str:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            return f"unknown setting {name!r}: expected some of {', '.join(sorted(cls.model_fields))}"
        return f"{flag(name)} is {problem['input']!r}: expected {cls._expected(name, problem['type'])}"

    @classmethod
    def _expected(cls, name: str, problem: str) -> str:
        """The values that a field takes, in words."""
        field = cls.model_fields[name]
        kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
        if get_origin(field.annotation) is Literal:
            kinds = [field.annotation]
        if get_origin(kinds[0]) is Literal:
            return f"one of {', '.join(map(str, get_args(kinds[0])))}"
        limits = {kind: getattr(rule, kind) for rule in field.metadata for kind in _LIMITS if hasattr(rule, kind)}
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        if problem.endswith("_type") or not limits:
            return names.get(kinds[0], str(kinds[0])) if problem != "finite_number" else "a finite number"
        if set(limits) == {"ge"}:
            return f"{limits['ge']:g} or more"
        if set(limits) == {"ge", "le"}:
            return f"{names[kinds[0]]} from {limits['ge']} to {limits['le']}"
        return f"{names[kinds[0]]} " + " and ".join(f"{_LIMITS[kind]} {limit:g}" for kind, limit in limits.items())


_LIMITS = {"ge": "not below", "gt": "above", "le": "not above", "lt": "below"}


class Config(Settings):
    """Everything that a run's result depends on."""

    panels: ClassVar[Mapping[str, str]] = {
        "Common": "model tasks annotator behaviours seed limit evaluation samples max_new_tokens greedy",
        "The model": "revision dtype device quantization attention trust_remote_code engine engine_options "
        "generation_dtype rows block",
        "Vectors and their selection": "estimator map gate window baseline layers validation tried budget attributed "
        "patched",
        "What is measured": "side_tasks side_samples sweep controls compared stability",
        "Language model that annotates or writes tasks": "llm_model llm_url llm_prices llm_concurrency llm_rpm llm_tpm",
    }

    model: str = Field(
        "pocket",
        description="'pocket' (the bundled model), 'smol' or 'smol-think' (of `fetch`), a folder, a .gguf file or a "
        "hub name.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: str | None = Field(None, description="Weights' type, e.g. bfloat16; default: the checkpoint's.")
    device: str | None = Field(
        None, description="E.g. cuda:0, or auto to spread a big model; default: CUDA, else MPS, else the CPU."
    )
    quantization: Literal["8bit", "4bit"] | None = Field(None, description="8bit or 4bit; default: the checkpoint's.")
    attention: str | None = Field(
        None, description="Attention kernel: sdpa, eager, ...; default: transformers' choice."
    )
    trust_remote_code: bool = Field(False, description="Run code that the model's repository brings along.")
    tasks: str = Field(
        "auto",
        description="pocket, smol-think, reasoning-gym[:<family>,...], gsm8k, math500, aime24, ..., hf:<data set>, a "
        ".jsonl, .json or .csv file, or llm; auto: the one of pocket or smol-think for that model, else reasoning-gym.",
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="What generates: transformers, or vllm (the extra steerable[vllm])."
    )
    engine_options: str = Field(
        "", description="With --engine vllm: options of vllm.LLM as JSON, e.g. '{\"tensor_parallel_size\": 2}'."
    )
    generation_dtype: Literal["auto", "model", "bfloat16"] = Field(
        "auto",
        description="Type in which linear layers generate: model (the weights'), bfloat16, or auto: bfloat16 for a "
        "float32 model of 50 million parameters or more on a CPU with units for it.",
    )
    annotator: str = Field(
        "auto",
        description="pocket, smol-think, keywords, length, llm, llm:FILE, cues:FILE (or cues:seal), probe:FILE, or "
        "module:function of your own, chain -> spans; auto: the one of pocket or smol-think for that model, else "
        "keywords.",
    )
    stability: float = Field(
        0.0, ge=0, le=1, description="Keep a span only if this share of re-sampled continuations begins with its label."
    )
    llm_model: str = Field("gpt-4.1", description="Language model that annotates or writes tasks.")
    llm_url: str | None = Field(None, description="Its endpoint; default: OPENAI_BASE_URL. The key is OPENAI_API_KEY.")
    llm_prices: str | None = Field(None, description="Its prices of a million tokens read and written, e.g. 2,8.")
    llm_concurrency: int = Field(8, ge=1, description="Requests in flight at once.")
    llm_rpm: int = Field(0, ge=0, description="Most requests a minute; 0: no limit of ours.")
    llm_tpm: int = Field(0, ge=0, description="Most tokens a minute; 0: no limit of ours.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of tasks, sampling and controls.")
    limit: int = Field(300, ge=1, description="Tasks to extract from.")
    validation: int = Field(30, ge=1, description="Tasks set apart for choosing window and layer.")
    evaluation: int = Field(50, ge=1, description="Unseen tasks to judge steering on.")
    samples: int = Field(
        4, ge=1, description="Chains a task in the main cells (one when --greedy), and where --annotator length reads."
    )
    side_tasks: int = Field(12, ge=1, description="Tasks, of those, in the other cells.")
    side_samples: int = Field(1, ge=1, description="Chains a task there: sweep, several layers, thinking only.")
    max_new_tokens: int = Field(500, ge=1, description="Longest chain, answer included.")
    greedy: bool = Field(False, description="Decode greedily, as published; default: the model's generation_config.")
    behaviours: str | None = Field(
        None, description="Labels to steer, e.g. backtracking,deduction; default: the paper's four, or all of others."
    )
    estimator: str = Field(
        DIFFERENCE,
        description="What makes a vector: difference_of_means, or module:function of your own, (activations of a "
        "behaviour's spans, those of all others) -> Direction.",
    )
    map: str = Field(
        "shift", description="What is done along the vector: shift, ablate, clip(-1, 2), ... (docs/concepts.md)."
    )
    gate: str = Field("all", description="Tokens that the main cells steer, e.g. thinking or 'answer & ~boundary'.")
    window: Literal["published", "span", "onset"] | None = Field(
        None, description="published, span or onset; default: the one that wins on the validation tasks."
    )
    baseline: Literal["pooled", "overall", "auto"] = Field(
        "auto",
        description="What a behaviour's mean is compared with: pooled, overall, or auto (overall with --window "
        "published).",
    )
    layers: str | None = Field(None, description="Layer to steer, e.g. 3; default: chosen by validation.")
    budget: float = Field(
        0.05, gt=0, description="KL in nats a token between the unsteered model and the one steered at strength 1."
    )
    tried: int = Field(2, ge=1, description="Layers of each window that go to validation.")
    sweep: str = Field("-0.5,0.5,1.25", description="Further strengths for the dose-response curves; '' for none.")
    controls: int = Field(4, ge=1, description="Directions in each control: random ones, and shuffled labels'.")
    attributed: int = Field(50, ge=1, description="Chains for attribution by gradients.")
    patched: int = Field(8, ge=1, description="Chains, of those, for exact patching and Fisher information.")
    compared: int = Field(8, ge=1, description="Chains of each cell for its KL divergence.")
    block: int = Field(1200, ge=1, description="Chains in one unit of work, at most; fewer if they take over a minute.")
    rows: int | None = Field(None, ge=1, description="Sequences computed together; default: as many as fit a budget.")

    #: Names of the settings that were read from a file: what such a setting names is never imported or run, and no
    #: key is sent to it (`check_own`).
    _from_file: frozenset[str] = PrivateAttr(frozenset())

    def __init__(self, from_file: Collection[str] = (), /, **values: Any) -> None:
        super().__init__(**values)
        self._from_file = frozenset(from_file)
        if "annotator" not in self._from_file or self.annotator in ANNOTATORS or self.annotator_file is not None:
            _ = self.annotate  # one that cannot be used is refused now
        if "estimator" not in self._from_file:
            _ = self.estimate

    def replace(self, **values: Any) -> Self:
        return type(self)(self._from_file, **self.to_dict() | values)

    @model_validator(mode="before")
    @classmethod
    def _resolve_auto(cls, values: dict[str, Any]) -> dict[str, Any]:
        model = str(values.get("model", "pocket"))  # what a file says may be anything
        defaults = {
            "tasks": model if model in TAUGHT else "reasoning-gym",
            "annotator": model if model in TAUGHT else "keywords",
            "baseline": "overall" if values.get("window") == "published" else "pooled",  # as published
        }
        of_model = DEFAULTS.get(model, {})
        if values.get("annotator") == "length":  # chains of one task begin alike, and several are compared
            defaults["window"] = "span"
            values = {**values, "window": values.get("window") or "auto"}
            of_model = {name: max(2, value) if name == "samples" else value for name, value in of_model.items()}
        values = {**of_model, **values}
        return {**values, **{name: value for name, value in defaults.items() if values.get(name, "auto") == "auto"}}

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        _ = self.strengths, self.prices, self.chosen_layer, self.steered
        if self.annotator == "length" and (self.samples < 2 or self.greedy):
            raise UsageError(
                "--annotator length compares several chains of each task: give --samples 2 or more, and no --greedy"
            )
        return self

    @property
    def strengths(self) -> list[float]:
        """The sweep as numbers."""
        try:
            # Rounded to what a cell's name shows, so that no two cells share one.
            strengths = {float(f"{float(part):g}") for part in self.sweep.split(",") if part.strip()}
        except ValueError:
            strengths = {math.nan}
        if not all(map(math.isfinite, strengths)):
            raise UsageError(f"--sweep is {self.sweep!r}: expected numbers separated by commas, e.g. -0.5,0.5")
        return sorted(strengths - {-1.0, 0.0, 1.0})

    @property
    def steered(self) -> list[str] | None:
        """The labels that were asked to be steered."""
        if self.behaviours is None:
            return None
        labels = list(dict.fromkeys(part.strip() for part in self.behaviours.split(",")))
        if unsound := [label for label in labels if not is_label(label)]:
            raise UsageError(
                f"--behaviours is {self.behaviours!r}, in which {unsound[0]!r} is no label: expected labels separated "
                "by commas, e.g. backtracking,deduction"
            )
        return labels

    @property
    def prices(self) -> tuple[float, float] | None:
        """`llm_prices` as numbers."""
        if self.llm_prices is None:
            return None
        try:
            read, written = (float(part) for part in self.llm_prices.split(","))
        except ValueError:
            read = written = math.nan
        if not (0 <= read < math.inf and 0 <= written < math.inf):
            raise UsageError(f"--llm-prices is {self.llm_prices!r}: expected two prices, of a million tokens, e.g. 2,8")
        return read, written

    @property
    def chosen_layer(self) -> int | None:
        """The layer that was asked for."""
        if self.layers is None:
            return None
        if not (self.layers.isascii() and self.layers.isdigit()):
            raise UsageError(f"--layers is {self.layers!r}: expected one 0-based layer, e.g. 3")
        return int(self.layers)

    @property
    def extraction_samples(self) -> range:
        """The samples of each task that vectors are extracted from: several where chains of one task are compared."""
        return range(self.samples if self.annotator == "length" else 1)

    @property
    def windows(self) -> tuple[str, ...]:
        """The windows of which vectors are made. Chains of one task begin alike, so that their onsets do not differ."""
        return tuple(window for window in WINDOWS if window != "onset" or self.annotator != "length")

    @property
    def annotator_file(self) -> Path | None:
        """The file that the annotator reads, as `label_file`."""
        return label_file(self.annotator)

    @property
    def probe(self) -> Path | None:
        """The file of the probe that annotates, if one does."""
        return self.annotator_file if self.annotator.startswith("probe:") else None

    @property
    def is_judged(self) -> bool:
        """Whether a language model annotates."""
        return self.annotator == "llm" or self.label_texts is not None

    @property
    def label_texts(self) -> dict[str, str] | None:
        """What each label says, for a language model that annotates with other labels than the paper's."""
        return read_labels(file) if self.annotator.startswith("llm:") and (file := self.annotator_file) else None

    @property
    def annotate(self) -> Annotator | None:
        """The annotator as a function `chain -> spans`, None where it is none."""
        if self.annotator == "length" or self.is_judged:
            return None
        if (file := self.probe) is not None:
            if not file.is_file():
                raise UsageError(f"--annotator is {self.annotator!r}, but there is no such file: see `steerable probe`")
            return None
        if self.annotator not in ANNOTATORS and self.annotator_file is None:
            self.check_own("annotator")
        return plain_annotator(self.annotator, "length, llm, llm:FILE, probe:FILE")

    @property
    def estimate(self) -> Callable[..., Any] | None:
        """The estimator as a function of two groups of activations; None for the difference of means."""
        if self.estimator == DIFFERENCE:
            return None
        self.check_own("estimator")
        choices = f"{DIFFERENCE} or module:function, (positive, negative activations) -> Direction"
        return function_at(self.estimator, "--estimator", choices)

    def check_own(self, name: str) -> None:
        """Raises UsageError for a setting that could run code, or be sent a key, and that only a file asks for."""
        if name in self._from_file:
            value = getattr(self, name)
            raise UsageError(
                f"config.json asks for {flag(name)}{'' if value is True else f' {value}'}, and what could run code or "
                "be sent your key is never taken from a file: give the option yourself if you trust it"
            )

    def quick(self) -> Config:
        """The same run with fewer tasks and samples, and no sweep: a look (a minute with pocket), not a result."""
        return self.replace(
            limit=min(self.limit, 64),
            validation=min(self.validation, 4),
            evaluation=min(self.evaluation, 8),
            samples=len(self.extraction_samples),
            side_tasks=min(self.side_tasks, 3),
            side_samples=1,
            tried=1,
            controls=min(self.controls, 2),
            sweep="",
            window=self.window or "onset",
            attributed=min(self.attributed, 12),
            patched=min(self.patched, 4),
            compared=min(self.compared, 2),
        )


@dataclass(frozen=True)
class Stage:
    """One step of the main job: what it does, the files it reads and writes, the settings its result depends on."""

    name: str
    summary: str
    inputs: tuple[str, ...]
    settings: str
    outputs: tuple[str, ...]

    @property
    def options(self) -> str:
        """The settings that the stage reads: also those that say how its result is computed, not what it is."""
        language_model = " llm_url llm_concurrency llm_rpm llm_tpm" if "llm_model" in self.settings else ""
        engine = " engine_options" if "engine" in self.settings.split() else ""
        return f"{self.settings} attention trust_remote_code{engine}{language_model}"


def candidate_path(window: str, baseline: str, behaviour: str) -> str:
    """Where `extract` leaves a direction of all layers."""
    return f"vectors/candidates/{window}.{baseline}/{behaviour}.safetensors"


def shuffled_path(window: str, baseline: str, behaviour: str, k: int) -> str:
    """Where `extract` leaves the same from the k-th shuffle of the labels."""
    return f"vectors/shuffled/{window}.{baseline}/{behaviour}.{k}.safetensors"


def selected_path(behaviour: str) -> str:
    """Where `select` leaves the chosen direction: one layer, ready for `steer` and `chat`."""
    return f"vectors/{behaviour}.safetensors"


def random_path(behaviour: str, k: int) -> str:
    """Where `select` leaves the k-th random direction with the norm of the chosen one, and so with its dose."""
    return f"vectors/random/{behaviour}.{k}.safetensors"


_MODEL = "model revision dtype device quantization attention engine"
_ANNOTATOR = "annotator llm_model llm_prices"
_CELLS = "samples side_tasks side_samples sweep controls gate"
_DECODING = "seed greedy max_new_tokens generation_dtype rows block"
STAGES = (
    Stage(
        "tasks",
        "Stage 1: tasks for extraction, validation and evaluation.",
        (),
        "tasks llm_model seed limit validation evaluation",
        ("tasks.jsonl",),
    ),
    Stage(
        "generate",
        "Stage 2: one chain of thought for every extraction task.",
        ("tasks.jsonl",),
        f"{_MODEL} {_DECODING}",
        ("chains.jsonl",),
    ),
    Stage(
        "annotate",
        "Stage 3: the chains in labelled spans; or how far two annotations agree.",
        ("tasks.jsonl", "chains.jsonl"),
        f"{_ANNOTATOR} seed stability",
        ("spans.jsonl", "coverage.json"),
    ),
    Stage(
        "extract",
        "Stage 4: candidate vectors of every layer, behaviour, window and baseline.",
        ("tasks.jsonl", "chains.jsonl", "spans.jsonl"),
        f"{_MODEL} seed baseline controls estimator map behaviours",
        ("vectors/candidates", "vectors/shuffled", "cosines.json", "norms.json"),
    ),
    Stage(
        "attribute",
        "Stage 5: where each vector matters.",
        ("tasks.jsonl", "chains.jsonl", "spans.jsonl", "vectors/candidates"),
        f"{_MODEL} window baseline attributed patched",
        ("attribution.json",),
    ),
    Stage(
        "select",
        "Stage 6: window and layer of each behaviour.",
        ("tasks.jsonl", "attribution.json", "vectors/candidates"),
        f"{_MODEL} {_DECODING} window baseline layers tried budget controls gate {_ANNOTATOR}",
        ("selection.json", "vectors/random", selected_path("*")),
    ),
    Stage(
        "steer",
        "Stage 7: the evaluation tasks, steered up and down, and the controls.",
        ("tasks.jsonl", "selection.json", "vectors/candidates", "vectors/shuffled", "vectors/random"),
        f"{_MODEL} {_DECODING} {_CELLS}",
        ("steered",),
    ),
    Stage(
        "evaluate",
        "Stage 8: what steering did, with intervals.",
        ("tasks.jsonl", "selection.json", "steered"),
        f"{_MODEL} {_ANNOTATOR} seed greedy compared {_CELLS}",
        ("cells.json", "steered_spans"),
    ),
    Stage(
        "report",
        "Stage 9: report.json and report.html.",
        ("config.json", "tasks.jsonl", "chains.jsonl", "spans.jsonl", "coverage.json", "cosines.json", "norms.json",
         "attribution.json", "selection.json", "vectors", "cells.json", "steered", "steered_spans"),
        "model",
        ("report.json", "report.html"),
    ),
)  # fmt: skip
"""The main job, in order. `jobs/main_job.py` says what each stage does."""
