"""What every training shares: the Trainer's arguments, checkpoints of what is trained alone, and what goes wrong.

A training's folder holds `checkpoints/` (of the training at hand; those of others are cleared away), `log.jsonl` (a
line a step) and, where TensorBoard is installed, `tensorboard/`.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steerable.engines.hf.routes import position_table, positions
from steerable.methods.train.log import StepLog, read_log
from steerable.methods.train.parameters import Trained
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.store.display import Display
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.run_folder import read_json, write_json

WEIGHTS = "trained.safetensors"
AGAIN = "what was reached is kept, and the same command goes on from it"


class SmallCheckpoints:
    """A mixin for transformers' Trainer: checkpoints without the frozen weights, parts that are timed, finite losses.

    `trained` is the model and what is trained in it, `seconds` what each part of the steps so far took, `CURVE` the
    columns of the log that the summary keeps.
    """

    trained: Trained
    CURVE: ClassVar[tuple[str, ...]]

    def __init__(self, trained: Trained, *args: Any, **options: Any) -> None:
        self.trained = trained
        self.seconds: defaultdict[str, float] = defaultdict(float)
        super().__init__(trained.model, *args, **options)  # type: ignore[call-arg]

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time of a block as this part's, but for what blocks inside it count as theirs."""
        began, others = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[part] += time.perf_counter() - began - (sum(self.seconds.values()) - others)

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """One forward and backward pass. Raises SteerableError where the loss is not a finite number."""
        with self.timed("update"):
            loss: Tensor = super().training_step(*args, **options)  # type: ignore[misc]
            if not math.isfinite(float(loss)):
                step = self.state.global_step + 1  # type: ignore[attr-defined]
                raise SteerableError(
                    f"the loss of step {step} is not a finite number: the last checkpoint before it is kept; lower "
                    "--learning-rate, or use --dtype float32"
                )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.trained.save(Path(output_dir or self.args.output_dir) / WEIGHTS, state_dict)  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `run` has restored the parameters, before they were sharded."""


def run(trainer: Any, model: Any, folder: Path, key: str, display: Display) -> None:
    """Train to the end, from the last checkpoint of this very training if there is one.

    Args:
        trainer: A Trainer with `SmallCheckpoints`.
        model: The model inside the trainer's wrappers.
        folder: Where checkpoints and log.jsonl are.
        key: What tells this training from others that may have used the folder.
        display: Where progress is shown.
    """
    from accelerate.utils import broadcast_object_list
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    box = [last_checkpoint(folder, key) if trainer.accelerator.is_main_process else None]
    broadcast_object_list(box)
    last = box[0]
    if last:
        trainer.trained.restore(last / WEIGHTS)
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(StepLog(folder, trainer, display, step_of(last) if last else 0))
    with last_unread(model):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    display.done()


def common_arguments(
    folder: Path,
    model: Any,
    *,
    learning_rate: float,
    warmup: float,
    clip: float,
    seed: int,
    checkpointing: bool,
    save_every: int,
) -> dict[str, Any]:
    """What is the same for every training, as arguments of transformers' `TrainingArguments`."""
    cpu = models.device(model).type == "cpu"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    return {
        "output_dir": str(folder / "checkpoints"),
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": warmup,
        "max_grad_norm": clip,
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": model.dtype == torch.bfloat16 and not cpu,
        "use_cpu": cpu,
        "seed": seed,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": save_every,
        "save_total_limit": 2,
        "report_to": [name for name in ("tensorboard", "wandb") if importlib.util.find_spec(name)],
        "disable_tqdm": True,
        "log_level": "error",
    }


# --- length ---


def check_length(loaded: Loaded, prompts: list[str], max_new_tokens: int, *, spare: bool = True) -> int:
    """Tokens of the longest prompt. Raises UsageError where the model cannot read it and its answer.

    spare: from an answer's last token nothing is predicted, so that it needs no position (vLLM does count it).
    """
    longest = max(len(ids) for ids in loaded.tokenizer(prompts, add_special_tokens=False)["input_ids"])
    room, table = positions(loaded.model), position_table(loaded.model)
    extra = int(spare and (table is None or type(table) is nn.Embedding))
    if room and longest + max_new_tokens - extra > room:
        most = room + extra - longest
        cure = f"lower --max-new-tokens to {most}" if most > 0 else "give shorter tasks"
        raise UsageError(
            f"the longest task has {longest} tokens and --max-new-tokens is {max_new_tokens}, but this model reads "
            f"at most {room}: {cure}"
        )
    return longest


@contextmanager
def last_unread(model: Any) -> Iterator[None]:
    """Let a text be one token longer than a table of learned positions: nothing is predicted from its last token, so
    that it may have any position."""
    table = position_table(model)
    if table is None:
        yield
        return

    def clamp(table: nn.Embedding, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].clamp(max=table.num_embeddings - 1), *args[1:]

    hook = table.register_forward_pre_hook(clamp)
    try:
        yield
    finally:
        hook.remove()


# --- checkpoints ---


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path, key: str) -> Path | None:
    """The last whole checkpoint of the training with this key; what another training left is cleared away."""
    checkpoints, stamp = folder / "checkpoints", folder / "checkpoints/training.json"
    if not stamp.exists() or read_json(stamp) != key:
        shutil.rmtree(checkpoints, ignore_errors=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        (folder / "log.jsonl").unlink(missing_ok=True)
        write_json(stamp, key)
        return None
    whole = []
    for path in sorted(checkpoints.glob("checkpoint-*"), key=step_of):
        if (path / "trainer_state.json").exists():  # the last file that is written
            whole.append(path)
        else:
            shutil.rmtree(path)
    return whole[-1] if whole else None


def summary(folder: Path, trainer: Any) -> dict[str, Any]:
    """What the training took and gave, over all its sittings: the content of training.json (docs/training.md)."""
    rows = read_log(folder)
    parts = sorted({name for row in rows for name in row["seconds"]})
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    state = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
    return {
        "steps": len(rows),
        "trainable_parameters": trainer.trained.count(),
        "optimizer_bytes": sum(x.numel() * x.element_size() for x in state),
        "seconds_per_step": {name: sum(row["seconds"].get(name, 0.0) for row in rows) / len(rows) for name in parts},
        "steps_skipped": sum(row.get("skipped", False) for row in rows),
        "curve": {name: [row[name] for row in rows] for name in trainer.CURVE},
        "last": {name: value for name, value in rows[-1].items() if name != "seconds"},
    }


# --- what goes wrong ---


@contextmanager
def explained(micro_batch: int, rows: int, server: str = "", serve_command: str = "") -> Iterator[None]:
    """Other libraries' errors as one sentence each.

    Args:
        micro_batch: The present setting, which is named where memory runs out.
        rows: Likewise.
        server: Where the vLLM server listens, if one rolls out.
        serve_command: How to start it.
    """
    try:
        yield
    except SteerableError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
            raise SteerableError(
                f"out of memory: lower --micro-batch (now {micro_batch}), --rows (now {rows}) or --max-new-tokens, "
                f"or give --checkpointing; {AGAIN}"
            ) from error
        if server and (
            isinstance(error, ConnectionError) or type(error).__module__.startswith(("requests", "urllib3"))
        ):
            raise SteerableError(
                f"the vLLM server at {server} does not answer: look at its log, or start it with "
                f"`{serve_command}`; {AGAIN}"
            ) from error
        # TRL's own words
        if server and text.startswith(("Request failed", "The vLLM server", "Weight synchronization")):
            raise SteerableError(
                f"the vLLM server at {server} cannot be used ({text[:300].rstrip('.')}); {AGAIN}"
            ) from error
        raise


@contextmanager
def quietly() -> Iterator[None]:
    """Without the libraries' notices to developers: what matters is logged or raised."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "transformers", "trl", "accelerate", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        # A warning counts as the library's through which it came here; ours, the last and so the first rule, never do.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(trl|peft|torch|transformers)\.")
        warnings.simplefilter("always", SteerableWarning)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
