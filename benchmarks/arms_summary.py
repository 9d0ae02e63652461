"""What the finished jobs of `arms.py` show, as benchmarks/results/arms.json.

Accuracy of every arm on the same unseen tasks, greedy and sampled, and the recovered fraction

    R = (arm - base) / (full - base)

which is null where the interval of full - base holds zero: then there is nothing clear to have a share in.

Intervals are 95 % percentiles of a bootstrap that draws tasks (the same for all arms) and, where an arm has several
seeds, seeds. An arm with one seed is compared with base and full of all seeds, so its own seed's luck is in its figure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DECODINGS = ("greedy", "sampled")
RESAMPLES = 2000
RESULTS = Path(__file__).parent / "results"
#: name in the results -> (job, arm within the job's chains); "{}" is the seed.
ARMS = {
    "base": ("bias-{}", "base"),
    "prefix": ("controls-{}", "prefix"),
    "bias": ("bias-{}", "bias"),
    **{f"layer{layer}": (f"layer{layer}-{{}}", "bias") for layer in range(6)},
    "adaptive": ("adaptive-{}", "adaptive"),
    "lora": ("lora-{}", "lora"),
    "tinylora": ("tinylora-{}", "tinylora"),
    "full": ("full-{}", "full"),
    "format": ("format-{}", "bias"),
    "random-reward": ("random-reward-{}", "bias"),
    "shuffled": ("controls-{}", "shuffled"),
    "random": ("controls-{}", "random"),
    "bias-high": ("bias-high-{}", "bias"),
}


def summarise(out: Path, seeds: Sequence[int] = (0, 1, 2), run: Path = Path("runs/pocket")) -> None:
    """Write benchmarks/results/arms.json from the jobs that are finished."""
    tasks = {task["id"]: task for task in _lines(out / "test.jsonl")}
    right: dict[str, dict[str, np.ndarray]] = {}
    cells: dict[str, dict[str, Any]] = {}
    for name, (job, arm) in ARMS.items():
        found = [seed for seed in seeds if (out / job.format(seed) / "finished.json").exists()]
        if found:
            folders = [out / job.format(seed) for seed in found]
            right[name] = {d: np.stack([_right(f, arm, d, tasks) for f in folders]) for d in DECODINGS}
            cells[name] = {"seeds": len(found), **_cells(folders, arm)}
    rng = np.random.default_rng(0)
    draws = [(rng.integers(0, len(tasks), len(tasks)), rng.integers(0, 1 << 30, len(seeds))) for _ in range(RESAMPLES)]
    result: dict[str, Any] = {"arms": {}, "tasks": len(tasks), "rates": rates(out), "settings": _settings(out)}
    for name, by_decoding in right.items():
        row: dict[str, Any] = dict(cells[name])
        for d in DECODINGS:
            arm, base, full = by_decoding[d], right["base"][d], right.get("full", {}).get(d)
            row[d]["accuracy"] = _interval(arm, lambda x: x[0], draws)
            row[d]["gain"] = _interval(arm, lambda x: x[0] - x[1], draws, base)
            if full is not None and name not in ("base", "full"):
                room = _interval(full, lambda x: x[0] - x[1], draws, base)
                share = _interval(arm, lambda x: (x[0] - x[1]) / (x[2] - x[1]), draws, base, full)
                row[d]["recovered"] = None if room[1] <= 0 <= room[2] else share
        result["arms"][name] = row
    result["against"] = {
        other: {d: _interval(right["bias"][d], lambda x: x[0] - x[1], draws, right[other][d]) for d in DECODINGS}
        for other in ("prefix", "random-reward", "shuffled", "random", "format")
        if other in right and "bias" in right
    }
    if (out / "bias-0/bias.safetensors").exists():
        result["vectors"] = _vectors(out / "bias-0/bias.safetensors", run)
    if (out / "passk/finished.json").exists():
        found = json.loads((out / "passk/finished.json").read_text())
        result["passk"] = {name: _kept(arm) for name, arm in found["arms"].items()}
    RESULTS.joinpath("arms.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result["arms"].items():
        print(name, {d: [round(x, 3) for x in row[d]["accuracy"]] for d in DECODINGS},
              {d: [round(x, 2) for x in row[d].get("recovered") or ()] for d in DECODINGS})  # fmt: skip


def rates(out: Path) -> dict[str, Any]:
    """Validation accuracy (sampled) at every learning rate that was tried."""
    found: dict[str, dict[str, float]] = {}
    for folder in sorted(out.glob("tune-*")):
        if (folder / "finished.json").exists():
            _, method, rate = folder.name.split("-", 2)
            done = json.loads((folder / "finished.json").read_text())
            found.setdefault(method, {})[rate] = round(done[method]["sampled"]["accuracy"][0], 4)
    return found


def _settings(out: Path) -> dict[str, Any]:
    config = json.loads((out / "bias-0/config.json").read_text())
    names = ["tasks", "prompts", "group", "steps", "max_new_tokens", "temperature", "warmup", "clip", "samples", "beta"]
    return {name: config[name] for name in names if name != "tasks"} | {"rollouts": config["prompts"] * config["group"]}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _right(folder: Path, arm: str, decoding: str, tasks: Mapping[str, Any]) -> np.ndarray:
    """Share of right chains of every task, [tasks]; kept beside the chains, as judging them takes longest."""
    from steerable.chains.tasks import correct

    kept = folder / f"right-{arm}-{decoding}.json"
    if not kept.exists():
        found: dict[str, list[bool]] = {name: [] for name in tasks}
        for chain in _lines(folder / f"chains/{arm}-{decoding}.jsonl"):
            answer = chain["answer"] if chain["closed"] else ""
            found[chain["task_id"]].append(bool(correct(tasks[chain["task_id"]], answer)))
        kept.write_text(json.dumps({name: sum(values) / len(values) for name, values in found.items()}))
    shares = json.loads(kept.read_text())
    return np.array([shares[name] for name in tasks])


def _cells(folders: Sequence[Path], arm: str) -> dict[str, Any]:
    """Means over the seeds of what the jobs measured: length, loops, behaviours, divergence, numbers trained."""
    done = [json.loads((folder / "finished.json").read_text()) for folder in folders]
    found: dict[str, Any] = {}
    for d in DECODINGS:
        cells = [job[arm][d] for job in done]
        found[d] = {
            "tokens": float(np.mean([cell["tokens"][0] for cell in cells])),
            "loops": float(np.mean([cell["loops"][0] for cell in cells])),
            "unclosed": float(np.mean([cell["unclosed"][0] for cell in cells])),
            "fractions": {
                label: [float(np.mean([cell["fractions"][label][i] for cell in cells])) for i in range(3)]
                for label in cells[0]["fractions"]
                if all(cell["fractions"][label] for cell in cells)
            },
        }
    if arm != "base" and "training" in done[0]:
        found["trainable_parameters"] = done[0]["training"]["trainable_parameters"]
        found["optimizer_bytes"] = done[0]["training"]["optimizer_bytes"]
        found["learning_rate"] = done[0]["config"]["learning_rate"]
        found["kl"] = float(np.mean([job["training"]["last"]["kl"] for job in done]))
    if "prefix_token" in done[0]:
        found["prefix_tokens"] = [job["prefix_token"] for job in done]
    return found


def _interval(arm: np.ndarray, figure: Any, draws: Sequence[Any], *others: np.ndarray) -> list[float]:
    """[figure, low, high] of the means of [seeds, tasks] tables."""
    tables = [arm, *others]
    estimate = float(figure([table.mean() for table in tables]))
    drawn = []
    for tasks, lots in draws:
        means = []
        for table in tables:
            rows = lots[: len(table)] % len(table)  # the same lots for all: arms of one seed stay together
            means.append(table[rows][:, tasks].mean())
        drawn.append(figure(means))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return [estimate, float(low), float(high)]


def _vectors(path: Path, run: Path) -> dict[str, Any]:
    """Norms, top tokens, and the cosine with each behaviour's difference of means at the same layer."""
    from steerable import Direction
    from steerable.evals.logit_lens import lens
    from steerable.models import loading as models

    trained, loaded = Direction.load(path), models.load("pocket")
    found: dict[str, Any] = {
        "norms": {str(site.layer): float(v.norm()) for site, v in trained.vectors.items()},
        "tokens": {
            str(site.layer): {
                "top": [token for token, _ in read.top],
                "bottom": [token for token, _ in read.bottom],
            }
            for site, v in trained.vectors.items()
            for read in [lens(loaded.model, loaded.tokenizer, v, k=6)]
        },
    }
    selection = run / "selection.json"
    if selection.exists():
        chosen = json.loads(selection.read_text())
        found["cosines"] = {}
        for behaviour, how in chosen.items():
            folder = run / f"vectors/candidates/{how['window']}.pooled"
            file = folder / f"{behaviour}.safetensors"
            if not file.exists():
                file = run / f"vectors/candidates/{how['window']}.overall/{behaviour}.safetensors"
            other = Direction.load(file)
            found["cosines"][behaviour] = {str(s.layer): c for s, c in trained.cosine(other).items()}
        # of two random vectors of this width, 95 % lie within
        found["cosine_by_chance"] = 1.96 / float(np.sqrt(models.width(loaded.model)))
    return found


def _kept(arm: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: arm[name] for name in ("passk", "accuracy", "perplexity")}
    if "against_base" in arm:
        against = arm["against_base"]
        found["against_base"] = {name: against[name] for name in ("difference", "crossing", "perplexity_ratio")}
        found["against_base"] |= {
            name: len(against[name]) if isinstance(against[name], list) else against[name]
            for name in ("created", "lost", "both", "neither")
        }
    return found
