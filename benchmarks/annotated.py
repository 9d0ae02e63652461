"""What the extraction and attribution benchmarks share: a model, annotated chains of its size, timing,
output."""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.models import loading as models

LABELS = (
    "initializing",
    "deduction",
    "adding-knowledge",
    "example-testing",
    "uncertainty-estimation",
    "backtracking",
)
RESULTS = Path(__file__).parent / "results"


def load(name: str) -> Any:
    """A model by name or folder, or `random`: random weights in the bundled model's shape."""
    if name != "random":
        return models.load(name).model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1500,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


def make_chains(model: Any, count: int, seed: int = 0) -> list[AlignedChain]:
    """Random tokens: prompts of 20-70, then 8-16 spans of 4-16 tokens each, all six labels."""
    rng, chains = random.Random(seed), []
    for i in range(count):
        at, spans = rng.randint(20, 70), []
        for _ in range(rng.randint(8, 16)):
            end = at + rng.randint(4, 16)
            spans.append(TokenSpan(rng.choice(LABELS), at, end))
            at = end
        ids = tuple(rng.randrange(model.config.vocab_size) for _ in range(at))
        chains.append(AlignedChain(f"random-{i}", 0, ids, tuple(spans)))
    return chains


def interleaved(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every job, taken in turn so that a slow spell of the machine meets all of them; one warm-up
    each."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(name: str, baseline: str, seconds: dict[str, list[float]], about: dict[str, Any]) -> None:
    """Print medians and ratios, the median over turns of job / baseline in the same turn, and keep them as
    JSON."""
    rows = {}
    for job, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[baseline], strict=True))
        rows[job] = {"seconds": round(statistics.median(times), 4), "ratio": round(ratio, 3)}
        print(f"{job:45} {rows[job]['seconds']:9.3f} s  {ratio:7.3f} x")
    for key, value in about.items():
        print(f"{key:45} {value}")
    machine = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    content = {"baseline": baseline, "jobs": rows, **about, "machine": machine}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
