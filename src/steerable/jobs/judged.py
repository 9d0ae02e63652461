"""A trained model beside the untrained one, on unseen tasks: chains, greedy and sampled, and what they show."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steerable.chains.generation import Job, Prompting, Steering, generate_jobs
from steerable.chains.records import Record, read_jsonl, write_jsonl
from steerable.engines.sampling import Decoding
from steerable.evals.cells import differences, measure_cell
from steerable.evals.metrics import Measured, all_metrics, measure
from steerable.jobs import arms
from steerable.methods.train import controls
from steerable.methods.train.settings import TrainSettings
from steerable.methods.train.traces import examples
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.store.display import Display
from steerable.store.run_folder import RunFolder, read_json

DECODINGS = ("greedy", "sampled")
_BLOCK = 256  # chains that are computed, and kept, as one piece


def chains_of(arm: str, decoding: str) -> str:
    """The file of an arm's chains in a run folder."""
    return f"chains/{arm}-{decoding}.jsonl"


def split(folder: RunFolder, name: str) -> list[Record]:
    """The tasks to train on ("train") or to judge on ("evaluation")."""
    return [task for task in read_jsonl(folder / "tasks.jsonl", "task") if task["split"] == name]


def answer(
    folder: RunFolder,
    s: TrainSettings,
    arm: arms.Arm,
    loaded: Loaded,
    kept: Path,
    *,
    steering: Steering | None = None,
    prefix: tuple[int, ...] = (),
    workers: int | None = None,
    display: Display | None = None,
) -> None:
    """Chains of one arm on the unseen tasks, greedy and sampled, as two files of the folder.

    steering: in place of the arm's own. prefix: token ids that every answer begins with. kept: where finished blocks
    wait for the next call, if this one is killed.
    """
    tasks, display = split(folder, "evaluation"), display or Display(quiet=True)
    opener = arms.opener(arm, loaded)
    own = loaded if arm.kind in ("base", "direction") else opener()
    steering = steering or arms.steering(arm)
    for decoding, samples in (("greedy", 1), ("sampled", s.samples)):
        display.start(f"{arm.name}, {decoding}", len(tasks) * samples)
        chains = generate_jobs(
            own,
            [Job(tasks, range(samples), steering, prompting=Prompting(s.system, s.template or "", prefix))],
            seed=s.seed,
            decoding=Decoding(0.0) if decoding == "greedy" else Decoding(s.temperature),
            max_new_tokens=s.max_new_tokens,
            rows=s.rows,
            block=_BLOCK,
            workers=workers,
            spread=arms.spread(opener),
            keep=kept / decoding,
            progress=display.advance,
        )[0]
        write_jsonl(folder / chains_of(arm.name, decoding), chains)
    display.done()


def _chains(folder: RunFolder, arm: str, decoding: str) -> list[Record]:
    return read_jsonl(folder / chains_of(arm, decoding), "chain")


def measured(folder: RunFolder, s: TrainSettings, arm: str, decoding: str, tokenizer: Any) -> list[Measured]:
    """What the chains of one arm show."""
    chains = _chains(folder, arm, decoding)
    annotate = s.annotate
    spans = [span for chain in chains for span in annotate(chain)] if annotate else None
    return measure(split(folder, "evaluation"), chains, spans, tokenizer)


def _controls(
    folder: RunFolder, s: TrainSettings, loaded: Loaded, trained: dict[str, list[Measured]]
) -> dict[str, Any]:
    """Each control's cells, and the trained vectors minus it, paired by task."""
    result: dict[str, Any] = {}
    for name in controls.NAMES:
        rows = {decoding: measured(folder, s, name, decoding, loaded.tokenizer) for decoding in DECODINGS}
        result[name] = {decoding: measure_cell(rows[decoding], s.seed) for decoding in DECODINGS}
        result[name]["difference"] = {d: differences(trained[d], rows[d], s.seed) for d in DECODINGS}
    result["prefix"]["token"] = read_json(folder / "controls/prefix.json")["token"]
    return result


def _with_chains(folder: RunFolder, arm: str, greedy: list[Measured]) -> list[tuple[Record, Measured]]:
    return list(zip(_chains(folder, arm, "greedy"), greedy, strict=True))


def report(folder: RunFolder, s: TrainSettings, loaded: Loaded) -> dict[str, Any]:
    """The content of report.json (docs/training.md)."""
    found = {
        arm: {decoding: measured(folder, s, arm, decoding, loaded.tokenizer) for decoding in DECODINGS}
        for arm in (arms.BASE, s.method)
    }
    training = read_json(folder / "training.json")
    result: dict[str, Any] = {
        arm: {decoding: measure_cell(rows, s.seed) for decoding, rows in by_decoding.items()}
        for arm, by_decoding in found.items()
    }
    result[s.method]["trainable_parameters"] = training["trainable_parameters"]
    if s.method == "bias" and s.controls:
        result["controls"] = _controls(folder, s, loaded, found[s.method])
    trained, base = found[s.method], found[arms.BASE]
    packages = ("steerable", "torch", "transformers", "trl", "peft", "accelerate")
    return result | {
        "difference": {decoding: differences(trained[decoding], base[decoding], s.seed) for decoding in DECODINGS},
        "metrics": {name: metric.describe() for name, metric in all_metrics().items()},
        "examples": examples(
            split(folder, "evaluation"),
            _with_chains(folder, arms.BASE, base["greedy"]),
            _with_chains(folder, s.method, trained["greedy"]),
            s.annotate,
        ),
        "training": training,
        "config": s.to_dict(),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "model": {"name": models.model_id(loaded.model) or s.model, "layers": models.n_layers(loaded.model)},
    }
