"""What a step of reinforcement learning costs, in one run: bias, LoRA and full training side by side.

    python benchmarks/training.py [--model pocket] [--rounds 3]

All methods answer the same tasks with the same rollouts (the learning rate is too small to change them), in turns. Of a
step are measured: generation, reward, update (forward, backward, optimiser); then the optimiser's memory, from its own
tensors; and the rollouts once more by TRL's plain `generate` in place of the package's engine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
METHODS = ("bias", "lora", "full")
IDLE = 1e-12  # a learning rate that leaves every rollout as it is


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--tasks", default="pocket")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in (*METHODS, "bias, model.generate")}
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for name in METHODS:
                one_step(name, args, Path(folder), turn, steps[name], about)
        one_step("bias", args, Path(folder), 0, steps["bias, model.generate"], {}, engine="generate")
    middle = {
        name: {part: statistics.median(row[part] for row in rows) for part in rows[0]} for name, rows in steps.items()
    }
    result = {
        "model": args.model,
        "rounds": args.rounds,
        "threads": args.threads,
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "rollouts": 128,
        "methods": {name: {**about.get(name, {}), "seconds": middle[name]} for name in steps},
        "update_bias_over_lora": middle["bias"]["update"] / middle["lora"]["update"],
        "update_bias_over_full": middle["bias"]["update"] / middle["full"]["update"],
        "optimizer_bias_over_full": about["bias"]["optimizer_bytes"] / about["full"]["optimizer_bytes"],
        "generate_over_engine": middle["bias, model.generate"]["generation"] / middle["bias"]["generation"],
    }
    RESULTS.joinpath("training.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def one_step(
    method: str,
    args: argparse.Namespace,
    root: Path,
    turn: int,
    rows: list[dict[str, float]],
    about: dict[str, Any],
    engine: str = "engine",
) -> None:
    """Two steps; the second is measured, when everything has been warmed up."""
    from steerable.chains.generation import prompt_text
    from steerable.chains.tasks import make_tasks
    from steerable.jobs.reinforcement import arguments
    from steerable.jobs.training import Training, open_model
    from steerable.jobs.training_settings import RLSettings
    from steerable.methods.train.loop import quietly
    from steerable.methods.train.parameters import attach
    from steerable.methods.train.rewards import reward
    from steerable.methods.train.trainer import VectorTrainer
    from steerable.store.run_folder import RunFolder

    s = RLSettings(model=args.model, method=method, steps=2, learning_rate=IDLE, save_every=100, seed=turn,
                   generation=engine, device=args.device)  # fmt: skip
    loaded = open_model(s)
    tasks = make_tasks(args.tasks, 2 * s.prompts, seed=turn)
    with quietly():
        trainer = VectorTrainer(
            attach(loaded.model, method),
            arguments(Training(RunFolder(root / f"{method}-{turn}"), s, loaded)),
            [prompt_text(loaded.tokenizer, task["prompt"]) for task in tasks],
            tasks,
            reward,
            loaded.tokenizer,
            own_engine=engine == "engine",
            kl_rows=0,
        )
        marks: list[dict[str, float]] = []
        trainer.add_callback(marker(trainer, marks))
        began = time.perf_counter()
        trainer.train()
    first, second = marks
    rows.append({part: second[part] - first[part] for part in ("generation", "reward", "update")})
    state = [x for values in trainer.optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    about[method] = {
        "trainable_parameters": trainer.trained.count(),
        "optimizer_bytes": sum(x.numel() * x.element_size() for x in state),
        "tokens": trainer.counted["tokens"],
    }
    print(f"{method}, {engine}: {rows[-1]} ({time.perf_counter() - began:.1f} s)", flush=True)


def marker(trainer: Any, marks: list[dict[str, float]]) -> Any:
    """A callback that keeps what every step took."""
    from transformers import TrainerCallback

    class Marker(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(dict(trainer.seconds))

    return Marker()


if __name__ == "__main__":
    main()
