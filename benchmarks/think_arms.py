"""Reinforcement learning of `smol-think`: what a vector a layer gains beyond a random reward, and beside LoRA.

    python benchmarks/think_arms.py --out runs/think-arms             # every arm, two at a time, one thread each
    python benchmarks/think_arms.py --out runs/think-arms --summary   # benchmarks/results/think_arms.json

Every arm is one `steerable train rl`, printed before it starts; a finished one is not done again, a killed one goes on
from its last checkpoint. Equal rollouts for every arm; the last checkpoint counts. The rate of the bias was lowered
twice: at 3e-2 and 2.5e-2 one of two seeds gained and the other one lost. LoRA's was not tuned. What is trained is in
float32, all else in bfloat16.
R = (arm - base) / (LoRA - base): the recovered fraction of what LoRA of rank 4 gains, not full training. See
docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from arms import copy
from arms_summary import RESULTS, _cells, _interval, _lines, _right

SEEDS = (0, 1)
SIZES = {"train": 512, "test": 128}
COMMON = {
    "model": "smol-think",
    "dtype": "bfloat16",
    "max-new-tokens": 320,
    "steps": 12,
    "prompts": 6,
    "group": 8,
    "samples": 2,
    "save-every": 2,
}
ARMS: dict[str, dict[str, Any]] = {
    "bias": {"method": "bias", "learning-rate": 1e-2},
    "random-reward": {"method": "bias", "learning-rate": 1e-2, "reward": "random"},
    "lora": {"method": "lora", "learning-rate": 1e-3},
}
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/think-arms"))
    parser.add_argument("--parallel", type=int, default=2, help="arms at a time, one thread each")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        summarise(args.out)
    else:
        make_data(args.out)
        train(args.out, args.parallel)


def make_data(out: Path) -> None:
    """Tasks to train on and to judge on, once for all arms."""
    from steerable.chains.records import write_jsonl
    from steerable.chains.tasks import make_splits

    if not (out / "test.jsonl").exists():
        drawn = make_splits("smol-think", SIZES, seed=1)
        for name in SIZES:
            write_jsonl(out / f"{name}.jsonl", [task for task in drawn if task["split"] == name])


def train(out: Path, parallel: int) -> None:
    """Every arm of every seed that is not finished."""
    todo = [(name, seed) for name in ARMS for seed in SEEDS if not (out / f"{name}-{seed}/report.json").exists()]
    running: dict[str, subprocess.Popen[bytes]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    while todo or running:
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                print(f"{time.strftime('%H:%M:%S')} {job}: exit status {process.returncode}", flush=True)
        while todo and len(running) < parallel:
            name, seed = todo.pop(0)
            folder = out / f"{name}-{seed}"
            borrow_base(out, folder, seed)
            settings = COMMON | ARMS[name] | {"seed": seed, "evaluation": SIZES["test"], "workers": 1, "out": folder}
            settings |= {"tasks": out / "train.jsonl", "test": out / "test.jsonl", "limit": SIZES["train"]}
            options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
            command = ["steerable", "train", "rl", *options, "--annotator", "smol-think", "--no-controls"]
            print(time.strftime("%H:%M:%S"), *command, flush=True)
            log = open(out / f"{folder.name}.log", "ab")  # noqa: SIM115 - the process keeps it
            running[folder.name] = subprocess.Popen(
                [sys.executable, "-m", *command], env=environment, stdout=log, stderr=log
            )
        time.sleep(1)


def borrow_base(out: Path, folder: Path, seed: int) -> None:
    """The untrained model's chains from a finished arm with the same seed: they depend on nothing else."""
    for name in ARMS:
        other = out / f"{name}-{seed}"
        if not (folder / "stages/judge-base.json").exists() and (other / "report.json").exists():
            for file in ("tasks.jsonl", "stages/tasks.json", "stages/judge-base.json"):
                copy(other / file, folder / file)
            for file in (other / "chains").glob("base-*.jsonl"):
                copy(file, folder / "chains" / file.name)


def summarise(out: Path) -> None:
    """Accuracy of every arm on the same unseen tasks with 95 % intervals of a bootstrap over tasks and seeds, what it
    gains over the untrained model, the recovered fraction, and what its first seed's vectors say."""
    import numpy as np

    tasks = {task["id"]: task for task in _lines(out / "test.jsonl")}
    right: dict[str, dict[str, np.ndarray]] = {}
    rows: dict[str, Any] = {}
    for name, (job, arm) in {"base": ("bias", "base"), **{name: (name, name) for name in ARMS}}.items():
        folders = [f for seed in SEEDS if ((f := out / f"{job}-{seed}") / "report.json").exists()]
        arm = "bias" if arm == "random-reward" else arm
        if folders:
            for folder in folders:
                copy(folder / "report.json", folder / "finished.json")
            right[name] = {d: np.stack([_right(f, arm, d, tasks) for f in folders]) for d in ("sampled", "greedy")}
            rows[name] = {"seeds": len(folders), **_cells(folders, arm)}
    rng = np.random.default_rng(0)
    draws = [(rng.integers(0, len(tasks), len(tasks)), rng.integers(0, 1 << 30, len(SEEDS))) for _ in range(RESAMPLES)]
    for name, by_decoding in right.items():
        for d, arm in by_decoding.items():
            base, lora = right["base"][d], right.get("lora", {}).get(d)
            rows[name][d] |= {
                "accuracy": _interval(arm, lambda x: x[0], draws),
                "gain": _interval(arm, lambda x: x[0] - x[1], draws, base),
            }
            if lora is not None and name not in ("base", "lora"):
                room = _interval(lora, lambda x: x[0] - x[1], draws, base)
                rows[name][d]["recovered"] = (
                    None  # of a gain that may be none
                    if room[1] <= 0 <= room[2]
                    else _interval(arm, lambda x: (x[0] - x[1]) / (x[2] - x[1]), draws, base, lora)
                )
    result = {"arms": rows, "tasks": len(tasks), "settings": COMMON, "seeds": list(SEEDS)}
    result["against"] = {
        other: {d: _interval(right["bias"][d], lambda x: x[0] - x[1], draws, arm[d]) for d in ("sampled", "greedy")}
        for other, arm in right.items()
        if other in ("random-reward", "lora")
    }
    result["vectors"] = vectors(out / "bias-0/bias.safetensors")
    RESULTS.joinpath("think_arms.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: {d: row[d]["accuracy"] for d in ("sampled", "greedy")} for name, row in rows.items()}))


def vectors(path: Path, shown: int = 8) -> dict[str, Any]:
    """The norm of every layer's vector, and the tokens that it boosts and lowers most, by the logit lens."""
    from steerable import Direction
    from steerable.evals.logit_lens import lens
    from steerable.models import loading as models

    trained, loaded = Direction.load(path), models.load("smol-think")
    reads = {site.layer: lens(loaded.model, loaded.tokenizer, v, k=shown) for site, v in trained.vectors.items()}
    return {
        "norms": {str(site.layer): float(v.norm()) for site, v in trained.vectors.items()},
        "tokens": {
            str(layer): {"top": [token for token, _ in read.top], "bottom": [token for token, _ in read.bottom]}
            for layer, read in reads.items()
        },
    }


if __name__ == "__main__":
    main()
