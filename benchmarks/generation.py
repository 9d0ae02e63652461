"""Generation speed: `model.generate` in batches of 64 against this library, and steered against unsteered.

    python benchmarks/generation.py
    python benchmarks/generation.py --model smol-think --threads 2 --repeats 0

Both sides sample chains of thought for the same prompts at temperature 1, with the same weights in float32, each chain
up to its stop token or the limit; tokens behind the stop token do not count. Our side runs in the type that it chooses
by itself, and in that of the weights where that is another one. Steered and unsteered runs alternate. Their vector is
so small that it vanishes in rounding, so both make the same text and only the cost of steering differs. CPU seconds
stand beside wall seconds, because a shared machine disturbs the latter. Results, one entry a model:
`benchmarks/results/generation.json`.
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
from steerable.engines.hf.products import GenerationDtype, product_dtype
from steerable.engines.sampling import Decoding, decoding_of
from steerable.models.loading import blocks
from steerable.models.taught import TAUGHT
from steerable.steering.site import Site
from steerable.steering.spec import shift
from steerable.store.errors import UsageError

RESULTS = Path(__file__).parent / "results" / "generation.json"
BATCH = 64


def material(
    name: str, source: str | None, count: int, device: str = "cpu", dtype: str = "float32"
) -> tuple[str, Any, list[list[int]]]:
    """The model with tasks from the source; without the bundled model's weights, a random model of its shape."""
    try:
        model, tokenizer = st.load(name, device=device, dtype=dtype)
    except UsageError:
        if name != "pocket":
            raise
        return "random model of the pocket model's shape", *stand_in(count)
    tasks = make_tasks(source or (name if name in TAUGHT else "reasoning-gym"), count, 7)
    return name, model, [prompt_ids(tokenizer, task["prompt"]) for task in tasks]


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
    torch.manual_seed(0)
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
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
    """A row for each side, `model.generate` last, and how much faster the first one is."""
    sides: dict[str, Callable[[], list[list[int]]]] = {}
    for asked in ("auto", "model"):

        def ours(asked: GenerationDtype = asked) -> list[list[int]]:
            requests = [st.Request(p, seed, decoding=Decoding(1.0)) for seed, p in enumerate(prompts)]
            engine = st.TransformersEngine(model, generation_dtype=asked)
            return [completion.ids for completion in engine.generate(requests, max_new_tokens=limit)]

        sides.setdefault(f"steerable, {str(product_dtype(model, asked)).removeprefix('torch.')}", ours)
    sides[f"model.generate, {str(model.dtype).removeprefix('torch.')}"] = lambda: plain(model, prompts, limit)
    rows = {}
    for name, work in sides.items():
        texts, wall, cpu = timed(work)
        tokens = sum(map(len, texts))
        rows[name] = {
            "tokens": tokens,
            "mean_length": tokens / len(texts),
            "cut": sum(len(text) == limit for text in texts) / len(texts),
            "tokens_per_second": tokens / wall,
            "tokens_per_cpu_second": tokens / cpu,
        }
    ours, *_, theirs = rows.values()
    ratios = {kind: ours[f"tokens_per_{kind}"] / theirs[f"tokens_per_{kind}"] for kind in ("second", "cpu_second")}
    return {"sides": rows, "ratio_wall": ratios["second"], "ratio_cpu": ratios["cpu_second"]}


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
    parser.add_argument("--model", default="pocket", help="pocket, smol, smol-think, a folder or a hub name")
    parser.add_argument(
        "--tasks", help="where its tasks are from; default: those that the model was taught, or reasoning-gym"
    )
    parser.add_argument("--chains", type=int, default=300)
    parser.add_argument("--limit", type=int, default=500, help="new tokens of a chain at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="of the steered runs; 0 leaves them out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    name, model, prompts = material(arguments.model, arguments.tasks, arguments.chains)
    engines = compare_engines(model, prompts, arguments.limit)
    figures: dict[str, Any] = {
        "arguments": vars(arguments),
        "parameters": sum(p.numel() for p in model.parameters()),
        "engines": engines,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    table = Table("measure", "figure", title=f"{name}, {len(prompts)} chains, {arguments.threads} thread(s)")
    for side, row in engines["sides"].items():
        table.add_row(f"{side}: tokens/s", f"{row['tokens_per_second']:,.0f}")
        table.add_row(f"{side}: mean length", f"{row['mean_length']:,.0f}")
    table.add_row("speed-up, wall", f"{engines['ratio_wall']:.2f}")
    table.add_row("speed-up, CPU seconds", f"{engines['ratio_cpu']:.2f}")
    if arguments.repeats:
        steering = compare_steering(model, prompts[:100], arguments.limit, arguments.repeats)
        figures["steered_over_unsteered"] = steering
        for setting, ratio in steering.items():
            table.add_row(f"steered / unsteered, {setting}", f"{ratio:.3f}")
    Console().print(table)
    before = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({"models": before | {name: figures}}, indent=2) + "\n")


if __name__ == "__main__":
    main()
