"""The settings of a run: one table from which the command line's options, the checks and `config.json` follow."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from steerable.chains.windows import WINDOWS
from steerable.store.errors import UsageError

Annotator = Callable[[Mapping[str, Any]], list[dict[str, Any]]]
ANNOTATORS = {
    "pocket": "steerable.models.pocket.language:annotate",
    "keywords": "steerable.chains.annotators.cues:keywords",
}
"""Annotators that are plain functions; `llm` and `probe:FILE` are not."""
ENGINES = ("transformers",)
BASELINES = ("pooled", "overall")
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


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def flag(name: str) -> str:
    """A setting as the option that it is."""
    return f"--{name.replace('_', '-')}"


def option(default: Any, text: str) -> Any:
    """A field of a table of settings: its default, and the help of its option."""
    return field(default=default, metadata={"help": text})


def check_types(settings: Any) -> None:
    """Raises UsageError for a value of another type than its field's ("int", "str | None", ...)."""
    for f in fields(settings):
        kind, _, optional = str(f.type).partition(" | ")
        value = getattr(settings, f.name)
        if type(value) not in _TYPES[kind] and not (optional and value is None):
            raise UsageError(f"{flag(f.name)} is {value!r}: expected {_NAMES[kind]}")


def check_positive(settings: Any, names: Sequence[str]) -> None:
    """Raises UsageError for one of these settings below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise UsageError(f"{flag(name)} is {getattr(settings, name)}: expected 1 or more")


@dataclass(frozen=True)
class Config:
    """Everything that a run's result depends on. Raises UsageError for a value that makes no sense.

    from_file: names of the settings that were read from a file. What such a setting names is never imported or run, and
    no key is sent to it (`check_own`).
    """

    from_file: InitVar[frozenset[str]] = frozenset()
    model: str = option("pocket", "'pocket' (the bundled model), a model folder, or a name on the Hugging Face hub.")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    dtype: str | None = option(None, "Weights' type: float32, bfloat16, ...; default: what the checkpoint says.")
    device: str | None = option(
        None, "Device, e.g. cpu or cuda:0, or auto to spread a big model; default: a GPU where there is one."
    )
    quantization: str | None = option(None, "8bit or 4bit weights; default: as the checkpoint is.")
    attention: str | None = option(None, "Attention kernel: sdpa, eager, ...; default: what transformers chooses.")
    trust_remote_code: bool = option(False, "Run code that the model's repository brings along.")
    tasks: str = option(
        "auto",
        "pocket, reasoning-gym[:<family>,...], gsm8k, math500, aime24, ..., hf:<data set>, a .jsonl, .json or .csv "
        "file, or llm; auto: pocket for the bundled model, else reasoning-gym.",
    )
    engine: str = option("transformers", "What generates: transformers.")
    annotator: str = option(
        "auto",
        "pocket, keywords, llm, probe:<file>, or module:function of your own, chain -> spans; auto: pocket for the "
        "bundled model, else keywords.",
    )
    stability: float = option(
        0.0, "Keep a span only if this share of re-sampled continuations begins with its label; 0: keep all."
    )
    llm_model: str = option("gpt-4.1", "Language model that annotates or writes tasks.")
    llm_url: str | None = option(
        None, "Its OpenAI-compatible endpoint; default: OPENAI_BASE_URL. The key is OPENAI_API_KEY."
    )
    llm_prices: str | None = option(
        None, "Its prices, for the account: of a million tokens read and of a million written, e.g. 2,8."
    )
    llm_concurrency: int = option(8, "Requests in flight at once.")
    llm_rpm: int = option(0, "Most requests a minute; 0: no limit of ours.")
    llm_tpm: int = option(0, "Most tokens a minute; 0: no limit of ours.")
    seed: int = option(0, "Seed of tasks, sampling and controls.")
    limit: int = option(300, "Tasks to extract from.")
    validation: int = option(40, "Tasks kept apart to choose window and layer on.")
    evaluation: int = option(50, "Unseen tasks to judge steering on.")
    samples: int = option(4, "Chains a task in the main cells (one when --greedy).")
    side_samples: int = option(1, "Chains a task in the other cells: sweep, several layers, thinking only.")
    max_new_tokens: int = option(500, "Longest chain, answer included.")
    greedy: bool = option(False, "Decode greedily, as published; default: the model's own generation_config.")
    window: str | None = option(None, "published, span or onset; default: the one that wins on the validation tasks.")
    baseline: str = option(
        "auto", "What a behaviour's mean is compared with: pooled, overall, or auto (overall with --window published)."
    )
    layers: str | None = option(None, "Layer to steer, e.g. 3; default: chosen by attribution and validation.")
    tried: int = option(2, "Layers of each window that go to validation.")
    sweep: str = option("-0.5,0.5,1.5", "Further strengths for the dose-response curves; '' for none.")
    controls: int = option(5, "Directions in each control: random ones, and ones from shuffled labels.")
    attributed: int = option(50, "Chains for attribution by gradients.")
    patched: int = option(8, "Chains, of those, for exact patching and Fisher information.")
    compared: int = option(8, "Chains of each cell for its KL divergence.")
    block: int = option(150, "Chains that are generated as one unit of work: what a killed run may lose.")
    rows: int = option(100, "Sequences computed together.")

    def __post_init__(self, from_file: frozenset[str]) -> None:
        object.__setattr__(self, "from_file", from_file)  # `replace` passes it on
        for name, other in (("tasks", "reasoning-gym"), ("annotator", "keywords")):
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, "pocket" if self.model == "pocket" else other)
        if self.baseline == "auto":  # the published window comes with the published baseline
            object.__setattr__(self, "baseline", "overall" if self.window == "published" else "pooled")
        check_types(self)
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed is {self.seed}: expected a whole number from 0 to {2**32 - 1}")
        counts = (
            "limit", "validation", "evaluation", "samples", "side_samples", "max_new_tokens", "tried", "controls",
            "attributed", "patched", "compared", "block", "rows", "llm_concurrency",
        )  # fmt: skip
        check_positive(self, counts)
        for name in ("llm_rpm", "llm_tpm"):
            if getattr(self, name) < 0:
                raise UsageError(f"{flag(name)} is {getattr(self, name)}: expected 0 or more")
        if not 0 <= self.stability <= 1:
            raise UsageError(f"--stability is {self.stability}: expected a share from 0 to 1")
        for name, allowed in (
            ("engine", ENGINES),
            ("baseline", BASELINES),
            ("window", (*WINDOWS, None)),
            ("quantization", ("8bit", "4bit", None)),
        ):
            if getattr(self, name) not in allowed:
                names = ", ".join(a for a in allowed if a)
                raise UsageError(f"--{name} is {getattr(self, name)!r}: expected one of {names}")
        _ = self.strengths, self.prices, self.chosen_layer
        if "annotator" not in from_file or self.annotator in ANNOTATORS or self.probe is not None:
            _ = self.annotate

    @property
    def strengths(self) -> list[float]:
        """The sweep as numbers."""
        try:
            # Rounded to what a cell's name shows, so that no two cells share one.
            found = {float(f"{float(part):g}") for part in self.sweep.split(",") if part.strip()}
        except ValueError:
            found = {math.nan}
        if not all(map(math.isfinite, found)):
            raise UsageError(f"--sweep is {self.sweep!r}: expected numbers separated by commas, e.g. -0.5,0.5")
        return sorted(found - {-1.0, 0.0, 1.0})

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
    def probe(self) -> Path | None:
        """The file of the probe that annotates, if one does."""
        kind, _, path = self.annotator.partition(":")
        return Path(path) if kind == "probe" else None

    @property
    def annotate(self) -> Annotator | None:
        """The annotator as a function `chain -> spans`, None where it is none; a module of one's own may lie in the
        working folder."""
        if self.annotator == "llm":
            return None
        if (file := self.probe) is not None:
            if not file.is_file():
                raise UsageError(f"--annotator is {self.annotator!r}, but there is no such file: see `steerable probe`")
            return None
        if self.annotator not in ANNOTATORS:
            self.check_own("annotator")
            if (here := os.getcwd()) not in sys.path:
                sys.path.append(here)
        module, _, name = ANNOTATORS.get(self.annotator, self.annotator).partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:  # somebody else's module: importing it may raise anything
            raise UsageError(
                f"--annotator is {self.annotator!r}, which cannot be imported ({error}): "
                f"expected {', '.join(ANNOTATORS)}, llm, probe:<file> or module:function"
            ) from None
        if not callable(function):
            raise UsageError(f"--annotator is {self.annotator!r}, which is no function: expected chain -> spans")
        return function  # type: ignore[no-any-return]

    def check_own(self, name: str) -> None:
        """Raises UsageError for a setting that could run code, or be sent a key, and that only a file asks for."""
        if name in vars(self)["from_file"]:
            value = getattr(self, name)
            raise UsageError(
                f"config.json asks for {flag(name)}{'' if value is True else f' {value}'}, and what could run code or "
                "be sent your key is never taken from a file: give the option yourself if you trust it"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def subset(self, names: str) -> dict[str, Any]:
        """The named settings, for a stage's key."""
        return {name: getattr(self, name) for name in names.split()}

    def quick(self) -> Config:
        """The same run in under a minute: fewer tasks and samples, no sweep; a look, not a result."""
        return replace(
            self,
            limit=min(self.limit, 80),
            validation=min(self.validation, 6),
            evaluation=min(self.evaluation, 12),
            samples=1,
            side_samples=1,
            tried=1,
            controls=min(self.controls, 2),
            sweep="",
            attributed=min(self.attributed, 12),
            patched=min(self.patched, 4),
            compared=min(self.compared, 4),
        )


def from_dict(values: Mapping[str, Any], from_file: Collection[str] = ()) -> Config:
    """A Config from its dict; from_file: names of values that a file gave. Raises UsageError for an unknown setting or
    a wrong value."""
    check_names(Config, values)
    return Config(**values, from_file=frozenset(from_file))


def check_names(table: Any, values: Mapping[str, Any]) -> None:
    """Raises UsageError for a key that the table of settings has not."""
    known = {f.name for f in fields(table)}
    if unknown := sorted(set(values) - known):
        raise UsageError(f"unknown setting {unknown[0]!r}: expected some of {', '.join(sorted(known))}")
