"""What a GPU gives, by one command in under ten minutes: training of smol-think's adapter, generation, capture, RL.

    python benchmarks/gpu.py --out gpu                                               # on the GPU
    python benchmarks/gpu.py --out try --device cpu --model pocket --chains 16 --minutes 0   # the same without one

Each part stands beside plain transformers on the same device: generation beside `model.generate` in batches of 64, the
capture of all layers' span means beside a plain forward pass, a step of reinforcement learning with rollouts by the
package's engine beside rollouts by `model.generate`. The adapter is trained by its recipe for `--minutes`, and goes on
from its last checkpoint when called again. One JSON, `gpu.json` in the folder, which names the card, holds what has
been measured, even if a later part fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import training
from annotated import LABELS, interleaved, make_chains
from generation import compare_engines, material

from steerable.engines.activations import length_batches, pad, stream
from steerable.methods.span_statistics import span_means
from steerable.models import loading as models

ROUNDS = 5
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float32", help="of the weights, on both sides")
    parser.add_argument("--model", default="smol-think")
    parser.add_argument("--chains", type=int, default=300)
    parser.add_argument("--limit", type=int, default=500, help="new tokens of a chain at most")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training smol-think's adapter; 0 leaves it out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    is_gpu = args.device.startswith("cuda")
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(args.device) if is_gpu else args.device,
        "torch": torch.__version__,
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    parts = {"generation": generation, "capture": capture, "rl_step": rl_step, "adapter": adapter}
    for name, part in parts.items():
        began = time.perf_counter()
        result[name] = part(args) | {"took": round(time.perf_counter() - began, 1)}
        (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(result[name]), flush=True)


def generation(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the engine and of `model.generate`, sampling the same tasks."""
    _, model, prompts = material(args.model, None, args.chains, args.device, args.dtype)
    compare_engines(model, prompts[:4], 8)  # kernels are chosen and loaded at their first use
    return compare_engines(model, prompts, args.limit)


def capture(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the span means of all layers over those of a plain forward pass on the same batches."""
    model = models.load(args.model, device=args.device, dtype=args.dtype).model
    chains = make_chains(model, args.chains)
    lengths, most = [len(chain.ids) for chain in chains], BATCH_TOKENS[args.device.partition(":")[0]]

    def plain() -> None:
        stream(model, (pad([chains[i].ids for i in rows]) for rows in length_batches(lengths, most)), [])

    seconds = interleaved(
        {"plain": plain, "capture": lambda: span_means(model, chains, LABELS, shuffles=0, max_tokens=most)}, ROUNDS
    )
    ratio = statistics.median(a / b for a, b in zip(seconds["capture"], seconds["plain"], strict=True))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": middle, "tokens": sum(lengths), "ratio": ratio}


def rl_step(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the parts of one step of bias training, with either way to roll out."""
    settings = argparse.Namespace(model=args.model, device=args.device, tasks=args.model)
    about: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in ("engine", "generate"):
            rows: list[dict[str, float]] = []
            training.one_step("bias", settings, Path(folder) / engine, 0, rows, about, engine)
            seconds[engine] = rows[0]
    ratio = seconds["generate"]["generation"] / seconds["engine"]["generation"]
    return {"seconds": seconds, "generate_over_engine": ratio, "tokens": about["bias"]["tokens"]}


def adapter(args: argparse.Namespace) -> dict[str, Any]:
    """Train smol-think's adapter until the time is up; what was reached."""
    if not args.minutes:
        return {"steps": 0}
    command = [sys.executable, "-m", "steerable", "smol", "train", "--out", str(args.out / "adapter")]
    process = subprocess.Popen([*command, "--device", args.device.partition(":")[0], "--steps", "100000"],
                               env=os.environ)  # fmt: skip
    try:
        process.wait(60 * args.minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
    [log] = (args.out / "adapter").rglob("log.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return {"steps": len(rows), "last": rows[-1]}


if __name__ == "__main__":
    main()
