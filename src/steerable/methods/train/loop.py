"""What every training shares: checkpoints of what is trained alone, the log, and what goes wrong.

A training's folder holds `checkpoints/` (of the training at hand; those of others are cleared away), `log.jsonl` (a
line a step) and, where TensorBoard is installed, `tensorboard/`.
"""

from __future__ import annotations

import json
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
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from steerable.engines.transformers import position_table, positions
from steerable.methods.train.parameters import Trained
from steerable.models.loading import Loaded
from steerable.store.display import Display
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.files import write_atomic
from steerable.store.run_folder import read_json, write_json

WEIGHTS = "trained.safetensors"
AGAIN = "what was reached is kept, and the same command goes on from it"


class SmallCheckpoints:
    """A mixin for transformers' Trainer: checkpoints without the frozen weights, parts that are timed, finite losses.

    `trained` is the model and what is trained in it, `seconds` what each part of a step took, `CURVE` the
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

    model: the one inside the trainer's wrappers. key: what tells this training from others in the same folder.
    """
    from accelerate.utils import broadcast_object_list

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
    unshard(trainer.trained)
    display.done()


# --- the log ---


class StepLog(TrainerCallback):  # type: ignore[misc]
    """Appends `trainer.row(logs, seconds)` to the folder's log.jsonl after every step, and moves the progress bar.

    done: steps that earlier sittings did; later lines of theirs are dropped.
    """

    def __init__(self, folder: Path, trainer: Any, display: Display, done: int) -> None:
        self.path, self.trainer, self.display = folder / "log.jsonl", trainer, display
        self.main = trainer.accelerator.is_main_process
        if self.main:
            rows = [row for row in read_log(folder) if row["step"] <= done]
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows))
            display.start("train", trainer.args.max_steps, unit="step")
            display.advance(done)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Called by transformers' Trainer."""
        if not self.main or not logs or "loss" not in logs:
            return
        seconds = {part: round(value, 3) for part, value in self.trainer.seconds.items()}
        self.trainer.seconds.clear()
        row = {"step": state.global_step} | self.trainer.row(logs, seconds)
        # JSON knows no infinite numbers: such a measurement is missing.
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.display.advance(1, note=in_words(row))


def in_words(row: dict[str, Any]) -> str:
    """A line of the log, short enough to stand behind a progress bar."""
    if "reward" not in row:
        return f"loss {row['loss'] or math.nan:.3f} nats a token"
    kl = "" if row["kl"] is None else f", KL {row['kl']:.3f}"
    rate = "" if row["tokens_per_second"] is None else f", {row['tokens_per_second']:,.0f} tokens/s"
    right = row["accuracy"] or 0.0
    return f"reward {row['reward']:+.2f}, right {right:.0%}, {row['tokens']:.0f} tokens{kl}{rate}"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's log.jsonl; a last line that a killed process left half-written is dropped."""
    rows = []
    path = folder / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


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


def full_tensor(x: Tensor) -> Tensor:
    """A tensor that FSDP 2 has sharded, whole; every process must call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def unshard(trained: Trained) -> None:
    """Make trained parameters that FSDP 2 has sharded whole again, for good; every process must call it."""
    whole: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in trained.model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad and hasattr(p, "full_tensor"):
                module._parameters[name] = whole.setdefault(id(p), nn.Parameter(p.detach().full_tensor()))


# --- what goes wrong ---


@contextmanager
def explained(micro_batch: int, rows: int) -> Iterator[None]:
    """An exhausted memory as a SteerableError that says which of the present settings to lower."""
    try:
        yield
    except SteerableError:
        raise
    except Exception as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            raise SteerableError(
                f"out of memory: lower --micro-batch (now {micro_batch}), --rows (now {rows}) or --max-new-tokens, "
                f"or give --checkpointing; {AGAIN}"
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
