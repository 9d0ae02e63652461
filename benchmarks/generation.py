"""Generation speed: `model.generate` in batches of 64 against this library, and steered against unsteered.

    python benchmarks/generation.py [--tasks 300] [--limit 500] [--threads 1] [--repeats 3]

Both generate greedily from the same prompts with the same weights; tokens after the stop token do not count,
and the texts must be equal. Steered and unsteered runs alternate. Their vector is so small that it vanishes in
rounding, so both make the same text and only the cost of steering differs. CPU seconds stand beside wall
seconds, because a shared machine disturbs the latter. Results: `benchmarks/results/generation.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

import steerable as st
from steerable.chains.generation import prompt_ids, request_seed
from steerable.chains.tasks import make_tasks
from steerable.engines.base import Completion
from steerable.engines.sampling import Decoding, decoding_of
from steerable.models.loading import blocks
from steerable.steering.site import Site
from steerable.steering.spec import shift
from steerable.store.errors import UsageError

RESULTS = Path(__file__).parent / "results" / "generation.json"
BATCH = 64


def material(count: int) -> tuple[str, Any, list[list[int]]]:
    """The bundled model with tasks of its families; without its weights, a random model of that shape."""
    try:
        model, tokenizer = st.load("pocket", device="cpu")
    except UsageError:
        return "random model of the pocket model's shape", *stand_in(count)
    tasks = make_tasks("pocket", count, 7)
    return "pocket", model, [prompt_ids(tokenizer, task["prompt"]) for task in tasks]


def stand_in(count: int) -> tuple[Any, list[list[int]]]:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1328,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        initializer_range=0.3,  # wide enough for texts that wander, so that lengths vary
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = list(range(1, 12))
    rng = random.Random(0)
    return model, [[rng.randrange(20, 1328) for _ in range(rng.randrange(20, 71))] for _ in range(count)]


def plain(model: Any, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """What a script without this library does: left padding, batches of 64, `model.generate`."""
    stop = model.generation_config.eos_token_id
    stops = {stop} if isinstance(stop, int) else set(stop)
    pad = model.generation_config.pad_token_id
    texts = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
        )
        for row in out[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            texts.append(row[:end])
    return texts


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall seconds, CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def compare_engines(model: Any, prompts: list[list[int]], limit: int) -> dict[str, Any]:
    requests, engine = [st.Request(p, decoding=Decoding(0.0)) for p in prompts], st.TransformersEngine(model)
    ours, wall, cpu = timed(lambda: engine.generate(requests, max_new_tokens=limit))
    theirs, wall_0, cpu_0 = timed(lambda: plain(model, prompts, limit))
    tokens = sum(len(c.ids) for c in ours)
    return {
        "tokens": tokens,
        "equal": sum(c.ids == ids for c, ids in zip(ours, theirs, strict=True)),
        "tokens_per_second": {"model.generate": tokens / wall_0, "steerable": tokens / wall},
        "ratio_wall": wall_0 / wall,
        "ratio_cpu": cpu_0 / cpu,
    }


def compare_steering(model: Any, prompts: list[list[int]], limit: int, repeats: int) -> dict[str, Any]:
    """Median over the repeats of steered / unsteered CPU seconds, sampling with the model's own settings."""
    engine, decoding = st.TransformersEngine(model), decoding_of(model, greedy=False)
    layers = len(blocks(model))
    faint = torch.full((model.config.hidden_size,), 1e-30)  # vanishes in rounding: the same text, the full cost

    def run(chosen: list[int], where: str) -> list[Completion]:
        steering = tuple(shift(Site("resid_post", layer), faint, 1.0, where) for layer in chosen)
        seeds = [request_seed(0, "benchmark", i) for i in range(len(prompts))]
        requests = [st.Request(p, seed, steering, decoding) for p, seed in zip(prompts, seeds, strict=True)]
        return engine.generate(requests, max_new_tokens=limit)

    settings = {
        "one layer": ([layers // 2], "all"),
        "all layers": (list(range(layers)), "all"),
        "all layers, generated tokens": (list(range(layers)), "generated"),
    }
    ratios: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(repeats):
        for name, setting in settings.items():
            base, _, before = timed(lambda: run([], "all"))
            text, _, cpu = timed(lambda setting=setting: run(*setting))
            assert text == base
            ratios[name].append(cpu / before)
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Generation speed against model.generate.")
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--limit", type=int, default=500, help="new tokens of a chain at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="of the steered runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    name, model, prompts = material(arguments.tasks)
    engines = compare_engines(model, prompts, arguments.limit)
    steering = compare_steering(model, prompts[:100], arguments.limit, arguments.repeats)

    table = Table("measure", "figure", "goal", title=f"{name}, {len(prompts)} prompts, {arguments.threads} thread(s)")
    for engine, speed in engines["tokens_per_second"].items():
        table.add_row(f"{engine}, tokens/s", f"{speed:,.0f}", "")
    table.add_row("speed-up, wall", f"{engines['ratio_wall']:.2f}", ">= 7")
    table.add_row("speed-up, CPU seconds", f"{engines['ratio_cpu']:.2f}", ">= 7")
    table.add_row("equal greedy texts", f"{engines['equal']} of {len(prompts)}", "all")
    for setting, ratio in steering.items():
        table.add_row(f"steered / unsteered, {setting}", f"{ratio:.3f}", "<= 1.05")
    Console().print(table)
    figures = {
        "model": name,
        "arguments": vars(arguments),
        "engines": engines,
        "steered_over_unsteered": steering,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
