"""What a training says of itself: a line of `log.jsonl` for every step, and the progress on the terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from steerable.methods.train.rewards import REASONS
from steerable.store.display import Display
from steerable.store.files import write_atomic


def own_callbacks(trainer: Any, journal: Any) -> None:
    """The journal in place of the libraries' own lines and bars."""
    for other in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(other)
    trainer.add_callback(journal)


class Journal(TrainerCallback):  # type: ignore[misc]
    """A line of `log.jsonl` for every step, and the progress on the terminal. begun: steps of earlier sittings."""

    def __init__(self, root: Path, trainer: Any, display: Display, begun: int) -> None:
        self.path, self.trainer, self.display = root / "log.jsonl", trainer, display
        self.main = trainer.accelerator.is_main_process
        self.seconds: dict[str, float] = {}
        if self.main:
            rows = [row for row in read_log(root) if row["step"] <= begun]
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows))
            display.start("train", trainer.args.max_steps, unit="step")
            display.advance(begun)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not self.main or not logs or "loss" not in logs:
            return
        now = dict(self.trainer.seconds)
        seconds = {name: round(value - self.seconds.get(name, 0.0), 3) for name, value in now.items()}
        self.seconds = now
        row, note = self.line(logs, seconds)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step} | _plain(row)) + "\n")
        self.display.advance(1, note=note)

    def line(self, logs: dict[str, Any], seconds: dict[str, float]) -> tuple[dict[str, Any], str]:
        """A line but for its step, and what the terminal says of it."""
        raise NotImplementedError


class Rollouts(Journal):
    """The journal of reinforcement learning."""

    tokens = 0

    def line(self, logs: dict[str, Any], seconds: dict[str, float]) -> tuple[dict[str, Any], str]:
        made = self.trainer.counted["tokens"] - self.tokens
        self.tokens += made
        made *= self.trainer.accelerator.num_processes  # which have equal shares
        row = {
            "reward": logs["reward"],
            "accuracy": logs.get("reason/right"),
            "tokens": logs["completions/mean_length"],
            "truncated": logs.get("cut off"),
            "kl": logs.get("kl"),
            "entropy": logs.get("entropy"),
            "flat_groups": logs["frac_reward_zero_std"],
            "skipped": self.trainer.nothing_learnt,
            "loss": float(logs["loss"]),
            "gradient_norm": float(logs.get("grad_norm") or 0.0),
            "learning_rate": float(logs["learning_rate"]),
            "reasons": {reason: logs.get(f"reason/{reason}") for reason in REASONS},
            "seconds": seconds,
            "tokens_per_second": round(made / max(seconds.get("generation", 0.0), 1e-9), 1) if made else None,
        }
        return row, note(row)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinite numbers: such a measurement is missing."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def note(row: dict[str, Any]) -> str:
    """A line of the journal in a few words."""
    kl = "" if row["kl"] is None else f", KL {row['kl']:.3f}"
    rate = "" if row["tokens_per_second"] is None else f", {row['tokens_per_second']:,.0f} tokens/s"
    right = row["accuracy"] or 0.0
    return f"reward {row['reward']:+.2f}, right {right:.0%}, {row['tokens']:.0f} tokens{kl}{rate}"


def read_log(root: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log.jsonl; a line that a killed run left half-written is dropped."""
    rows = []
    path = root / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
