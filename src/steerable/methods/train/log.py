"""What a training says of itself: a line of `log.jsonl` for every step, and the progress on the terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from steerable.store.display import Display
from steerable.store.files import write_atomic


class StepLog(TrainerCallback):  # type: ignore[misc]
    """Appends `trainer.row(logs, seconds)` to the folder's log.jsonl after every step, and moves the progress bar.

    done: steps that earlier sittings did; later lines of theirs are dropped.
    """

    def __init__(self, folder: Path, trainer: Any, display: Display, done: int) -> None:
        self.path, self.trainer, self.display = folder / "log.jsonl", trainer, display
        self.main = trainer.accelerator.is_main_process
        self.seconds: dict[str, float] = {}
        if self.main:
            rows = [row for row in read_log(folder) if row["step"] <= done]
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows))
            display.start("train", trainer.args.max_steps, unit="step")
            display.advance(done)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Called by transformers' Trainer."""
        if not self.main or not logs or "loss" not in logs:
            return
        now = dict(self.trainer.seconds)
        seconds = {name: round(value - self.seconds.get(name, 0.0), 3) for name, value in now.items()}
        self.seconds = now
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
