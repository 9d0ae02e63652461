"""What is compared with a base model: a direction that steers it, an adapter merged into it, or a checkpoint; and the
tasks that all of them answer.

Every arm answers the base's own prompts (its tokenizer and chat template) by the base's decoding and stop tokens, in
the base's dtype and on its device, so that nothing but the training differs.
"""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from steerable.chains.generation import Job, Prompting, generate_jobs
from steerable.chains.records import Record, read_jsonl, write_jsonl
from steerable.chains.tables import parse_source
from steerable.chains.tasks import make_tasks
from steerable.engines.pool import MapBlocks, loader, map_blocks
from steerable.engines.transformers import steer
from steerable.formats import gguf, import_file
from steerable.jobs.task_origin import keys_of, known_tasks
from steerable.jobs.training_settings import Comparison
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.models.sources import find
from steerable.models.taught import TAUGHT
from steerable.steering.direction import Direction
from steerable.steering.spec import Steering
from steerable.store.display import Display
from steerable.store.errors import SteerableWarning, UsageError
from steerable.store.files import sha256
from steerable.store.run_folder import RunFolder
from steerable.store.text import counted, plural

BASE = "base"
BLOCK = 256
"""Chains that are computed, and kept, as one piece: what a killed run may lose."""
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class Arm:
    """One thing that is compared; `source` is the file, the folder or (of a model) the hub name."""

    name: str
    kind: Literal["base", "direction", "adapter", "model"]
    source: str


def parse_arms(given: Iterable[str]) -> dict[str, str]:
    """{name: source} from `name=source` or `source` alone, which is then named after the file. Raises UsageError."""
    sources: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            path = Path(text)
            name, source = path.stem if path.is_file() else path.name, text
        if not source:
            raise UsageError(f"--arm {text!r} names no file: expected NAME=FILE, e.g. bias=runs/rl/bias.safetensors")
        if name in sources:
            raise UsageError(f"two arms are named {name!r}: give them names, e.g. --arm other={source}")
        sources[name] = source
    return sources


def find_arms(model: str, given: Mapping[str, str | Path]) -> list[Arm]:
    """The base and the arms, each with its kind. Raises UsageError for a bad name and for what cannot be an arm."""
    arms = [Arm(BASE, "base", model)]
    for name, source in given.items():
        if not _NAME.fullmatch(name) or name.lower() in (BASE, "tasks", "passk"):
            raise UsageError(
                f"an arm cannot be named {name!r}: expected letters and digits, and not base, tasks or passk"
            )
        arms.append(Arm(name, _kind(name, Path(source)), str(source)))
    return arms


def _kind(name: str, path: Path) -> Literal["direction", "adapter", "model"]:
    if path.is_file():
        return "model" if path.suffix.lower() == ".gguf" and gguf.holds_model(path) else "direction"
    if (path / _CONFIG).is_file():
        # a plain vector a layer: steered, since a model without these biases cannot take it up
        return "direction" if _adapter_config(path).get("peft_type") == "BEFT" else "adapter"
    if path.is_dir() and not (path / "config.json").is_file() and find(path).gguf_file is None:
        raise UsageError(
            f"arm {name!r}: {path} holds neither config.json nor adapter_config.json: expected a direction file, a "
            "PEFT adapter, a model folder or a .gguf file"
        )
    # a hub name is owner/model, or owner/model/file.gguf
    if not path.exists() and (path.suffix == ".safetensors" or (len(path.parts) != 2 and path.suffix != ".gguf")):
        raise UsageError(
            f"arm {name!r}: there is no file or folder {str(path)!r}: expected a direction file, a PEFT adapter, a "
            "model folder or a .gguf file"
        )
    return "model"


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / _CONFIG} cannot be read ({str(error)[:80]}): expected a PEFT adapter") from None
    if not isinstance(config, dict):
        raise UsageError(f"{folder / _CONFIG} is no JSON object: expected a PEFT adapter")
    return config


def fingerprint(arm: Arm, model: Any = None) -> str:
    """What tells two contents of one name apart: the hub's commit, or a hash of the file or of a folder's files."""
    if model is not None and (commit := models.model_revision(model)):
        return commit
    return find(arm.source).fingerprint or arm.source


def check_fit(base: Loaded, direction: Direction) -> None:
    """Refuse, before anything is generated, vectors that do not fit the model. Raises UsageError."""
    with steer(base.model, direction, tokenizer=base.tokenizer, track=False):
        pass


def check_arms(arms: Iterable[Arm], base: Loaded) -> None:
    """Refuse, before anything is generated, what does not fit the base. Raises UsageError; see `steer` for warnings."""
    for arm in arms:
        if arm.kind == "direction":
            check_fit(base, _direction(arm.source))
        elif arm.kind == "adapter":
            _check_adapter(arm, base.model)
        elif arm.kind == "model":
            _check_model(arm, base.model)


def steering(arm: Arm) -> Steering:
    """How the arm steers, at the direction's own strength; not at all where it is a model."""
    return _direction(arm.source).steering() if arm.kind == "direction" else ()


def _direction(source: str) -> Direction:
    direction = import_file(source)
    return replace(direction, model_id=models.short_name(direction.model_id))


def opener(arm: Arm, base: Loaded) -> Callable[[], Loaded]:
    """What opens the arm's model, here or in a worker."""
    again = loader(base.model)
    if arm.kind == "adapter":
        return partial(_open_adapter, again, arm)
    if arm.kind == "model":
        assert isinstance(again, partial)
        options = {**again.keywords, "revision": None}
        load = partial(again.func, arm.source, **options)
        return partial(_open_model, load, base.tokenizer, base.model.generation_config)
    return again


def _open_model(load: Callable[[], Loaded], tokenizer: Any, generation_config: Any) -> Loaded:
    model = load().model
    model.generation_config = generation_config
    return Loaded(model, tokenizer)


def _check_model(arm: Arm, base: Any) -> None:
    from transformers import AutoConfig

    path = Path(arm.source)
    if not path.exists():
        return  # the hub's: `load` says what is wrong with it
    with refusing(f"arm {arm.name!r}: {path} is not a loadable model folder"):
        config = AutoConfig.from_pretrained(**find(arm.source).arguments, trust_remote_code=False).get_text_config()
    mine, theirs = base.config.get_text_config().vocab_size, config.vocab_size
    if mine != theirs:
        raise UsageError(
            f"arm {arm.name!r} has a vocabulary of {theirs} tokens, the base of {mine}: expected a model trained from "
            "the base, because the base is to judge its tokens"
        )


# --- answering ---


def job_of(s: Comparison, tasks: Sequence[Record] = ()) -> Job:
    """What every arm is asked."""
    return Job(tasks, range(s.samples), prompting=Prompting(s.system, s.template))


def source_of(tasks: str, model: str) -> str:
    """A source of tasks; "auto" is what the model was taught, else reasoning-gym."""
    return (model if model in TAUGHT else "reasoning-gym") if tasks == "auto" else tasks


def draw_tasks(
    folder: RunFolder, source: str, s: Comparison, exclude: Sequence[str | Path], arms: Iterable[Arm]
) -> list[Record]:
    """Tasks of a source (as for `make_tasks`) in the folder's tasks.jsonl, drawn once: none of the files `exclude`, and
    none that an arm was made on. Raises UsageError for tasks without reference answers."""
    if source.partition(":")[0] == "llm":
        raise UsageError("tasks that a language model writes have no reference answers: give another source of tasks")
    known = [keys_of(read_jsonl(file, "task")) for file in exclude]
    for arm in arms:
        known.append(known_tasks(arm.source, _direction(arm.source).stats if arm.kind == "direction" else {}))
    seen = sorted(set().union(*known))
    settings = {"tasks": source, "exclude": seen, **s.subset("limit seed")}
    if (place := Path(parse_source(source)[0])).exists():
        settings["tasks_sha256"] = sha256(place)

    def work(_: Path) -> None:
        drawn = make_tasks(source, s.limit, s.seed, seen)
        if open_ended := sum(task.get("answer") is None and task.get("entry") is None for task in drawn):
            raise UsageError(
                f"{open_ended} of {counted(len(drawn), 'task')} {plural(open_ended, 'has', 'have')} neither an answer "
                "nor an entry, so nobody can judge them: give tasks with reference answers (docs/tasks.md)"
            )
        write_jsonl(folder / "tasks.jsonl", drawn)

    folder.run_stage("tasks", [], settings, ["tasks.jsonl"], work)
    return read_jsonl(folder / "tasks.jsonl", "task")


def answer(arm: Arm, base: Loaded, job: Job, *, title: str, display: Display, keep: Path, **how: Any) -> list[Record]:
    """One arm's chains for a job's tasks; the job's steering is what steers the base, where the arm is a direction.

    title: of the progress bar. keep: where finished blocks wait for the next call, if this one is killed. how: further
    arguments of `generate_jobs`.
    """
    opens = opener(arm, base)
    loaded = base if arm.kind in ("base", "direction") else opens()
    display.start(title, len(job.tasks) * len(job.samples))
    chains = generate_jobs(
        loaded, [job], block=BLOCK, spread=spread(opens), keep=keep, progress=display.advance, **how
    )[0]
    display.done()
    return chains


def spread(opens: Callable[[], Loaded]) -> MapBlocks:
    """`map_blocks` with workers that open the arm's own model: its name alone is that of the base, if it is merged."""

    def work(*arguments: Any, setup: Any, **options: Any) -> list[Any]:
        return map_blocks(*arguments, setup=opens, **options)

    return work


# --- adapters ---


def _check_adapter(arm: Arm, base: Any) -> None:
    folder = Path(arm.source)
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"arm {arm.name!r} is a PEFT adapter, which needs the library peft: pip install peft")
    if not (folder / _WEIGHTS).is_file():
        raise UsageError(
            f"arm {arm.name!r}: {folder} has no {_WEIGHTS} (an adapter_model.bin is a pickle and not read)"
        )
    named = models.short_name(str(_adapter_config(folder).get("base_model_name_or_path") or ""))
    if not models.is_named(base, named):
        warnings.warn(
            f"arm {arm.name!r} is an adapter of {named!r}, the base is {models.model_id(base)!r}: it may do nothing "
            "good here",
            SteerableWarning,
            stacklevel=3,
        )


def _open_adapter(load: Callable[[], Loaded], arm: Arm) -> Loaded:
    """The base with the adapter merged into its weights, in its dtype."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    base = load()
    folder = Path(arm.source)
    with refusing(f"arm {arm.name!r}: the adapter {folder} does not fit the base"):
        model = PeftModel.from_pretrained(base.model, str(folder))
        stored, loaded = load_file(folder / _WEIGHTS), get_peft_model_state_dict(model, save_embedding_layers=False)
    if not _same(stored, loaded):
        raise UsageError(
            f"arm {arm.name!r}: the adapter {folder} holds other weights than the base would take up: it was made for "
            "another model"
        )
    if not hasattr(model, "merge_and_unload"):
        kind = _adapter_config(folder).get("peft_type")
        raise UsageError(f"arm {arm.name!r}: an adapter of type {kind} cannot be merged into the weights: give a LoRA")
    with refusing(f"arm {arm.name!r}: the adapter {folder} cannot be merged"):
        merged = model.merge_and_unload(safe_merge=True)
    return Loaded(merged.eval().requires_grad_(False), base.tokenizer)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever a foreign file makes a library raise, as a UsageError; its warnings are silent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is missing is noticed afterwards, and refused
            yield
    except Exception as error:
        raise UsageError(f"{what} ({' '.join(str(error).split())[:160]})") from error


def _same(stored: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model took up every tensor of the file, and has no other: PEFT only warns of those."""
    extra = [name for name in stored if name not in loaded and "embed" not in name and "lm_head" not in name]
    return not extra and all(
        name in stored and torch.equal(stored[name].float(), tensor.to("cpu", torch.float32))
        for name, tensor in loaded.items()
    )
