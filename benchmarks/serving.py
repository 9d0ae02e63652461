"""Throughput of vLLM where every request is steered otherwise, over that of the same engine without the plugin.

    python benchmarks/serving.py                                   # pocket and smol-think, compiled and eager
    python benchmarks/serving.py --models pocket --modes eager --quick
    python benchmarks/serving.py --models smol-think --modes compiled --chains 300

All engines of a model live in one process, with one thread. A round is every row once, in an order of its own, beside
the engine without the plugin; a row's figure is the median over the rounds of its tokens a second over those of the
round's plain turn, so that a machine that is slow for a while is slow for both. "plain again" is that engine against
itself: what it is away from 1 is noise. Ratios of CPU seconds stand beside those of the clock.

The shifts run in an engine that was started for shifts alone (Settings(lanes=1, maps=0, gates=0)), as one is that
serves additions; rotation and clip, and the rows "default settings", in one that has all (Settings()). "hooks" is the
mechanism of other plugins, rebuilt (`serving_hooks.py`): it needs an eager engine, also where the others are compiled.

--chains generates the first stage of the main job instead: chains of so many tasks, by the vLLM engine, the
transformers engine and `model.generate` in one run.

`benchmarks/results/serving.json` is written after every round; a row whose rounds are there is not measured again.
--check ends with 1 where a compiled row is below its bar.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
)  # fmt: skip

import torch
import vllm
from generation import material, plain
from rich.console import Console
from rich.table import Column, Table
from serving_hooks import Hooks

import steerable as st
from steerable.engines.activations import mean_norms
from steerable.engines.base import Request
from steerable.engines.sampling import Decoding
from steerable.engines.vllm.engine import VllmEngine
from steerable.engines.vllm.settings import Settings
from steerable.models.loading import n_layers
from steerable.models.sources import find
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.steering.spec import Steering
from steerable.steering.think import think_tags_if_any
from steerable.store.run_folder import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "serving.json"
DOSE = 0.1  # of the mean norm of the activations
BARS = {"shift": 0.98, "map": 0.95, "gate": 0.95}


@dataclass(frozen=True)
class Row:
    """engine: which one it runs in. kind: whose bar it has; empty: none. vectors: how many different ones."""

    engine: str
    kind: str = ""
    vectors: int = 0
    layers: str = "all"
    where: str = "all"
    map: str | None = None


ROWS = {
    "plain again": Row("plain"),
    "idle": Row("shifts", "shift"),
    "one layer, 1 vector": Row("shifts", "shift", 1, "one"),
    "all layers, 1 vector": Row("shifts", "shift", 1),
    "all layers, 64 vectors": Row("shifts", "shift", 64),
    "all layers, 256 vectors": Row("shifts", "shift", 256),
    "thinking gate, 64 vectors": Row("shifts", "gate", 64, where="thinking"),
    "rotation of rank 2, 64 planes": Row("default", "map", 64, map="rotate(10)"),
    "clip, 64 vectors": Row("default", "map", 64, map="clip(-1, 1)"),
    "default settings, idle": Row("default"),
    "default settings, all layers, 64 vectors": Row("default", vectors=64),
    "hooks, one layer, 1 vector": Row("hooks", vectors=1, layers="one"),
    "hooks, all layers, 64 vectors": Row("hooks", vectors=64),
}
SETTINGS = {"shifts": Settings(lanes=1, maps=0, gates=0), "default": Settings()}


class Bench:
    """The engines of one model, and what its rows ask of them."""

    def __init__(self, name: str, mode: str, count: int, tokens: int) -> None:
        self.name, self.mode, self.count, self.tokens = name, mode, count, tokens
        _, model, prompts = material(name, None, 16)
        self.prompts = prompts
        self.width, self.layers = model.config.hidden_size, n_layers(model)
        self.norms = mean_norms(model, prompts, [Site("resid_post", i) for i in range(self.layers)])
        self.tokenizer = st.load(name).tokenizer
        self.where = {"thinking": "boundary" if think_tags_if_any(self.tokenizer) is None else "thinking"}
        self.engines: dict[str, VllmEngine] = {}

    def engine(self, kind: str) -> VllmEngine:
        """Started where it is first needed. With hooks it is eager."""
        from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

        kind = "plain" if kind == "hooks" and self.mode == "eager" else kind
        if kind not in self.engines:
            _ROPE_DICT.clear()  # a compiled engine must not take an eager one's kernel over
            longest = max(map(len, self.prompts)) + self.tokens
            options: dict[str, Any] = {
                "dtype": "float32", "enforce_eager": self.mode == "eager" or kind == "hooks",
                "max_model_len": longest + 1, "max_num_seqs": self.count, "enable_prefix_caching": False,
                "gpu_memory_utilization": 0.05,
            }  # fmt: skip
            if kind in SETTINGS:
                self.engines[kind] = VllmEngine.start(self.name, SETTINGS[kind], **options)
            else:
                self.engines[kind] = VllmEngine(vllm.LLM(find(self.name).place, **options), self.name)
        return self.engines[kind]

    def steerings(self, row: Row) -> list[Steering]:
        """One a request."""
        if not row.vectors:
            return [()] * self.count
        chosen = range(self.layers) if row.layers == "all" else [self.layers // 2]
        rows = 2 if (row.map or "").startswith("rotate") else 1
        different = []
        for seed in range(row.vectors):
            generator = torch.Generator().manual_seed(seed)
            vectors = {}
            for site in (Site("resid_post", i) for i in chosen):
                drawn = torch.randn(rows, self.width, generator=generator)
                drawn = drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True) * DOSE * self.norms[site]
                vectors[site] = drawn[0] if rows == 1 else drawn
            where = self.where.get(row.where, row.where)
            different.append(Direction(vectors).steering(where=where, map=row.map))
        return [one for one, _ in zip(cycle(different), range(self.count), strict=False)]

    def turn(self, row: Row) -> tuple[float, float]:
        """Seconds, by the clock and of the CPU, in which a batch of requests is steered and answered."""
        engine, steerings = self.engine(row.engine), self.steerings(row)
        if row.engine != "hooks":
            return self._timed(engine, steerings)
        vectors = [{i.site.layer: i.vector for i in steering if i.vector is not None} for steering in steerings]
        with Hooks(engine, vectors):
            return self._timed(engine, [()] * self.count)

    def _timed(self, engine: VllmEngine, steerings: list[Steering]) -> tuple[float, float]:
        from vllm.inputs.engine import tokens_input

        llm = engine.llm.llm_engine
        wall, cpu = time.perf_counter(), time.process_time()
        for n, (prompt, steering) in enumerate(zip(cycle(self.prompts), steerings, strict=False)):
            params = engine._params(steering, max_tokens=self.tokens, temperature=0.0, ignore_eos=True)
            llm.add_request(str(n), tokens_input(list(prompt)), params)
        while llm.has_unfinished_requests():
            llm.step()
        return time.perf_counter() - wall, time.process_time() - cpu


def measure(bench: Bench, rows: dict[str, Row], rounds: int, stored: dict[str, Any], save: Callable[[], Any]) -> None:
    """Append a ratio to each row that has too few, round by round. `stored` holds them by row."""
    short = {n: row for n, row in rows.items() if len(stored.get(n, {}).get("wall", [])) < rounds}
    for row in [Row("plain"), *short.values()]:
        bench.turn(row)  # starts and warms up
    rng = random.Random(len(short))
    while short:
        order = ["plain", *short]
        rng.shuffle(order)
        times = {name: bench.turn(short.get(name, Row("plain"))) for name in order}
        for name in list(short):
            entry = stored.setdefault(name, {"wall": [], "cpu": []})
            for kind, base, seconds in zip(("wall", "cpu"), times["plain"], times[name], strict=True):
                entry[kind].append(round(base / seconds, 4))
            entry["plain_tokens_per_second"] = round(bench.count * bench.tokens / times["plain"][0], 1)
            if len(entry["wall"]) >= rounds:
                del short[name]
        save()


def chains(bench: Bench, count: int, limit: int) -> dict[str, Any]:
    """Tokens a second with which the main job's chains are generated, unsteered and steered at all layers."""
    _, model, prompts = material(bench.name, None, count)
    bench.prompts, bench.tokens, bench.count = prompts, limit, 64
    steering = bench.steerings(Row("default", vectors=1, where="thinking"))[0]
    engines = {
        "vLLM engine": bench.engine("default"),
        "transformers engine": st.TransformersEngine(model, bench.tokenizer),
    }
    sides: dict[str, Callable[[list[list[int]]], list[list[int]]]] = {}
    for name, engine in engines.items():
        for kind, program in (("", ()), (", steered", steering)):

            def generate(texts: list[list[int]], engine: Any = engine, program: Steering = program) -> list[list[int]]:
                requests = [Request(p, seed, program, Decoding(1.0)) for seed, p in enumerate(texts)]
                return [done.ids for done in engine.generate(requests, max_new_tokens=limit)]

            sides[name + kind] = generate
    sides["model.generate"] = lambda texts: plain(model, texts, limit)
    rows = {}
    for name, work in sides.items():
        work(prompts[:2])
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = sum(map(len, work(prompts)))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        speeds = {"tokens_per_second": round(tokens / wall, 1), "tokens_per_cpu_second": round(tokens / cpu, 1)}
        rows[name] = {"tokens": tokens, **speeds}
    return {"chains": count, "limit": limit, "sides": rows}


def one(arguments: argparse.Namespace, model: str, mode: str) -> None:
    """Measure a model in one mode, in this process."""
    torch.set_num_threads(1)
    stored = read_json(arguments.out) if arguments.out.exists() else {}
    part = stored.setdefault("models", {}).setdefault(model, {})
    versions = {"torch": torch.__version__, "vllm": vllm.__version__, "machine": platform.machine()}
    bench = Bench(model, mode, arguments.requests, arguments.tokens)
    if arguments.chains:
        part.setdefault("chains", {})[mode] = chains(bench, arguments.chains, arguments.limit) | versions
        write_json(arguments.out, stored)
        return
    size = {"requests": arguments.requests, "tokens": arguments.tokens}
    if part.get(mode, {}).get("size") != size:
        part[mode] = {"size": size, "rows": {}}
    part[mode] |= versions
    names = [name for name in ROWS if any(text in name for text in arguments.only)]
    measure(
        bench, {name: ROWS[name] for name in names}, arguments.rounds, part[mode]["rows"],
        lambda: write_json(arguments.out, stored),
    )  # fmt: skip


def show(stored: dict[str, Any]) -> bool:
    """Print what is there; whether every compiled row with a bar has reached it."""
    reached = True
    for model, part in stored.get("models", {}).items():
        for mode in ("compiled", "eager"):
            if mode not in part:
                continue
            size = part[mode]["size"]
            title = f"{model}, {mode}: {size['requests']} requests of {size['tokens']} tokens, over the plain engine"
            table = Table(
                Column("row", no_wrap=True), "throughput", "quartiles", "by CPU seconds", "bar", "rounds", title=title
            )
            for name in ROWS:
                if (entry := part[mode]["rows"].get(name)) is None:
                    continue
                wall, bar = entry["wall"], BARS.get(ROWS[name].kind) if mode == "compiled" else None
                median = statistics.median(wall)
                low, _, high = statistics.quantiles(wall, n=4) if len(wall) > 1 else (wall[0],) * 3
                reached &= bar is None or median >= bar
                table.add_row(
                    name, f"{median:.3f}", f"{low:.3f} to {high:.3f}", f"{statistics.median(entry['cpu']):.3f}",
                    "" if bar is None else f"{bar} {'reached' if median >= bar else 'MISSED'}", str(len(wall)),
                )  # fmt: skip
            Console(width=120).print(table)
        for mode, entry in part.get("chains", {}).items():
            table = Table(
                "side", "tokens", "tokens/s", "tokens/CPU s", title=f"{model}, {entry['chains']} chains, {mode}"
            )
            for side, row in entry["sides"].items():
                figures = (row["tokens"], row["tokens_per_second"], row["tokens_per_cpu_second"])
                table.add_row(side, *(f"{figure:,.0f}" for figure in figures))
            Console(width=120).print(table)
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="pocket,smol-think")
    parser.add_argument("--modes", default="compiled,eager")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose names hold one of these")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48, help="new ones of each request")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--chains", type=int, default=0, help="generate so many chains instead")
    parser.add_argument("--limit", type=int, default=500, help="new tokens of a chain at most")
    parser.add_argument("--quick", action="store_true", help="two rounds of eight short requests, to a temporary file")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/serving.json")
    parser.add_argument("--check", action="store_true", help="end with 1 where a compiled row is below its bar")
    parser.add_argument("--show", action="store_true", help="measure nothing, print what is there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.requests, arguments.tokens, arguments.rounds, arguments.limit = 8, 4, 2, 8
    quick = Path(tempfile.gettempdir()) / "serving-quick.json"
    arguments.out = arguments.out or (quick if arguments.quick else RESULTS)
    pairs = [(m, mode) for m in arguments.models.split(",") for mode in arguments.modes.split(",")]
    if len(pairs) == 1 and not arguments.show:
        one(arguments, *pairs[0])
    elif not arguments.show:
        for model, mode in pairs:  # engines of one model do not disturb those of another
            again = [sys.executable, __file__, *sys.argv[1:], "--models", model, "--modes", mode]
            subprocess.run(again, check=True)
    if arguments.out.exists() and not show(read_json(arguments.out)) and arguments.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
