"""The arms of the bundled model's reinforcement learning: what a vector a layer recovers of what full training gains.

    python benchmarks/arms.py --out runs/arms                 # everything, two jobs at a time, one thread each
    python benchmarks/arms.py --out runs/arms --only bias     # the jobs whose names begin so
    python benchmarks/arms.py --out runs/arms --summary       # benchmarks/results/arms.json from what is finished

Every job is a process and a folder; a finished one is not done again, a killed one goes on from its last checkpoint.
Equal rollouts for every arm. The learning rate of each method is tuned on validation tasks, after a training of the
same length: of three rates (and the next one, where the highest is best) the lowest that is within one standard error
of the best (the rule of Breiman et al. 1984): a higher one that gains no more is nearer to diverging. The last
checkpoint counts. See docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
SIZES = {"train": 1024, "validation": 128, "test": 512}
STEPS = 16
#: Rates of each method, a factor of about three apart: the first three are tried, the others one by one, while the last
#: one that was tried is the best.
RATES = {
    "bias": (3e-2, 1e-1, 3e-1, 1.0),
    "lora": (3e-3, 1e-2, 3e-2, 1e-1),
    "full": (3e-5, 1e-4, 3e-4, 1e-3),
}
LAYERS = 6
COMMON = {"model": "pocket", "prompts": 16, "group": 8, "steps": STEPS, "max_new_tokens": 400, "limit": SIZES["train"]}


def jobs() -> dict[str, dict[str, Any]]:
    """Every job by name, in order: its settings. `needs`: jobs that must be finished first; `tuned`: the method whose
    best rate it takes."""
    found: dict[str, dict[str, Any]] = {}

    def tune(method: str) -> None:
        for rate in RATES[method]:
            found[f"tune-{method}-{rate:g}"] = {"method": method, "learning_rate": rate}

    def arm(name: str, seed: int, method: str, **more: Any) -> None:
        found[f"{name}-{seed}"] = {"method": method, "seed": seed, "tuned": method, **more}

    for method in ("bias", "full", "lora"):
        tune(method)
    for seed in SEEDS:
        for name, method, more in (
            ("full", "full", {}),
            ("bias", "bias", {}),
            ("lora", "lora", {}),
            ("random-reward", "bias", {"reward": "random"}),
        ):
            arm(name, seed, method, **more)
    for seed in SEEDS:
        found[f"controls-{seed}"] = {"needs": [f"bias-{seed}"], "seed": seed}
    for layer in reversed(range(LAYERS)):
        arm(f"layer{layer}", 0, "bias", layers=str(layer))
    found["passk"] = {"needs": ["bias-0", "full-0", "lora-0"]}
    arm("adaptive", 0, "adaptive", tuned="lora")  # the same map at a lower rank
    arm("format", 0, "bias", reward="format")
    arm("tinylora", 0, "tinylora", tuned="bias")  # a vector, too
    for seed in SEEDS:  # what the rule spares: the rate that is best on the validation tasks, whatever its error
        arm("bias-high", seed, "bias", learning_rate=3e-1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/arms"))
    parser.add_argument("--parallel", type=int, default=2, help="jobs at a time, one thread each")
    parser.add_argument("--only", default="", help="jobs whose names begin so")
    parser.add_argument("--job", help="one job, in this process")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.job:
        do(args.out, args.job)
    elif args.summary:
        from arms_summary import summarise

        summarise(args.out)
    else:
        make_data(args.out)
        schedule(args.out, args.parallel, args.only)


def make_data(out: Path) -> None:
    """Tasks to train on, to tune on and to judge on, once for all arms: no task in two of them."""
    from steerable.chains.records import write_jsonl
    from steerable.chains.tasks import make_splits

    if not all((out / f"{name}.jsonl").exists() for name in SIZES):
        drawn = make_splits("pocket", SIZES, seed=0)
        for name in SIZES:
            write_jsonl(out / f"{name}.jsonl", [task for task in drawn if task["split"] == name])


def finished(out: Path, name: str) -> bool:
    return (out / name / "finished.json").exists()


def schedule(out: Path, parallel: int, only: str) -> None:
    todo = [name for name in jobs() if name.startswith(only) and not finished(out, name)]
    running: dict[str, subprocess.Popen[bytes]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    while todo or running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                print(f"{time.strftime('%H:%M:%S')} {name}: {'done' if finished(out, name) else 'FAILED'}", flush=True)
        todo = [name for name in todo if needs(out, name) is not None]
        ready = [name for name in todo if all(finished(out, need) for need in needs(out, name) or ())]
        while ready and len(running) < parallel:
            name = ready.pop(0)
            todo.remove(name)
            log = open(out / f"{name}.log", "ab")  # noqa: SIM115 - the process keeps it
            command = [sys.executable, __file__, "--out", str(out), "--job", name]
            running[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        if todo and not running and not ready:
            sys.exit(f"these jobs wait for others that failed: {', '.join(todo)}")
        time.sleep(1)


def needs(out: Path, name: str) -> list[str] | None:
    """The jobs that must be finished before this one; None for a rate that need not be tried."""
    job = jobs()[name]
    if method := job.get("tuned"):
        return [f"tune-{method}-{rate:g}" for rate in tried(out, method)]
    rates = RATES.get(job.get("method", ""), ())
    if name.startswith("tune") and job["learning_rate"] in rates[3:]:
        before = rates[: rates.index(job["learning_rate"])]
        names = [f"tune-{job['method']}-{rate:g}" for rate in before]
        if (
            all(finished(out, other) for other in names)
            and best_rate(out, job["method"], before, rule=False) != before[-1]
        ):
            return None
        return names
    return list(job.get("needs", ()))


def tried(out: Path, method: str) -> list[float]:
    """The rates that have to be tried, as far as that is known."""
    rates = list(RATES[method][:3])
    for rate in RATES[method][3:]:
        known = all(finished(out, f"tune-{method}-{r:g}") for r in rates)
        if known and best_rate(out, method, rates, rule=False) == rates[-1]:
            rates.append(rate)
    return rates


def do(out: Path, name: str) -> None:
    job = jobs()[name]
    if name == "passk":
        result: Any = do_passk(out)
    elif name.startswith("controls"):
        result = do_controls(out, name, job["seed"])
    else:
        result = do_training(out, name, job)
    (out / name / "finished.json").write_text(json.dumps(result))


def do_training(out: Path, name: str, job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from steerable.jobs.reinforcement import train_rl
    from steerable.store.run_folder import read_json

    torch.set_num_threads(1)
    settings = {key: value for key, value in job.items() if key not in ("tuned", "needs")}
    tuning = name.startswith("tune")
    if "tuned" in job:
        settings.setdefault("learning_rate", best_rate(out, job["tuned"], tried(out, job["tuned"])))
    test = "validation" if tuning else "test"
    settings = (
        COMMON
        | {"tasks": str(out / "train.jsonl"), "test": str(out / f"{test}.jsonl"), "evaluation": SIZES[test]}
        | {"samples": 4 if tuning else 2}
        | settings
    )
    borrow_base(out, name, test, settings.get("seed", 0))
    return dict(read_json(train_rl(out / name, workers=1, **settings) / "report.json"))


def borrow_base(out: Path, name: str, test: str, seed: int) -> None:
    """The base's chains from another job on the same tasks and seed: their stage is known by what it depends on."""
    target = out / name
    for other in jobs():
        done = out / other / "finished.json"
        if not done.exists() or (target / "stages/judge-base.json").exists():
            continue
        config = json.loads(done.read_text()).get("config", {})
        if config.get("seed") != seed or Path(config.get("test") or "").stem != test:
            continue
        for file in ("tasks.jsonl", "stages/tasks.json", "stages/judge-base.json"):
            copy(out / other / file, target / file)
        for file in (out / other / "chains").glob("base-*.jsonl"):
            copy(file, target / "chains" / file.name)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def best_rate(out: Path, method: str, rates: Sequence[float], rule: bool = True) -> float:
    """The rate whose training is best on the validation tasks, sampled; by the rule the lowest that is as good but for
    one standard error."""
    found = {}
    for rate in rates:
        done = json.loads((out / f"tune-{method}-{rate:g}/finished.json").read_text())
        found[rate] = done[method]["sampled"]["accuracy"]
    best = max(rates, key=lambda rate: found[rate][0])
    mean, low, high = found[best]
    error = (high - low) / 2 / 1.96
    return min(rate for rate in rates if found[rate][0] >= mean - error) if rule else best


def do_controls(out: Path, name: str, seed: int) -> dict[str, Any]:
    """What the trained vectors are compared with, without any training: the same vectors in other layers, random ones
    of equal norm, and the token that the last layer's vector boosts, as the first of every answer."""
    import random

    import torch

    from steerable import Direction
    from steerable.evals.cells import measure_cell
    from steerable.evals.logit_lens import lens
    from steerable.jobs.arms import Arm
    from steerable.jobs.training import Training
    from steerable.jobs.training_settings import RLSettings
    from steerable.models import loading as models
    from steerable.store.run_folder import RunFolder, read_json

    torch.set_num_threads(1)
    trained = out / f"bias-{seed}"
    folder, s = RunFolder(out / name), RLSettings(**read_json(trained / "config.json"))
    copy(trained / "tasks.jsonl", folder / "tasks.jsonl")
    loaded = models.load("pocket")
    training = Training(folder, s, loaded, workers=1)
    direction = Direction.load(trained / "bias.safetensors")
    layers = direction.layers
    order = random.Random(seed).sample(layers, len(layers))
    while any(a == b for a, b in zip(layers, order, strict=True)):  # no vector stays where it was
        order = random.Random(str(order)).sample(layers, len(layers))
    sites = list(direction.vectors)
    moved = {site: direction.at(other) for site, other in zip(sites, order, strict=True)}
    controls = {"shuffled": Direction(moved, model_id="pocket"), "random": direction.random_like(seed)}
    result: dict[str, Any] = {"seed": seed, "order": order}
    token, _ = lens(loaded.model, loaded.tokenizer, direction.at(layers[-1]), k=1).top[0]
    ids = tuple(loaded.tokenizer(token, add_special_tokens=False)["input_ids"])
    result["prefix_token"] = token
    for control in (*controls, "prefix"):
        if control in controls:
            arm = Arm(control, "direction", str(controls[control].save(folder / f"{control}.safetensors")))
            prefix: tuple[int, ...] = ()
        else:
            arm, prefix = Arm(control, "base", "pocket"), ids
        training.answer(arm, folder / f".kept/{control}", prefix)
        result[control] = {d: measure_cell(rows, seed) for d, rows in training.measured(control).items()}
    return result


def do_passk(out: Path) -> dict[str, Any]:
    """pass@k of the base and three arms: 40 tasks that no arm was trained on, 64 samples each."""
    import torch

    from steerable.jobs.elicitation import passk

    torch.set_num_threads(1)
    arms = {"bias": "bias-0/bias.safetensors", "full": "full-0/model", "lora": "lora-0/adapter"}
    return passk(
        "pocket",
        {name: out / path for name, path in arms.items()},
        tasks=str(out / "test.jsonl"),
        limit=40,
        samples=64,
        max_new_tokens=400,
        out=out / "passk",
        workers=1,
    )


if __name__ == "__main__":
    main()
