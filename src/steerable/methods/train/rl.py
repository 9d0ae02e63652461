"""`steerable train rl`: from tasks to trained vectors, judged beside the untrained model on unseen tasks.

The stages are those of a run folder: tasks, train, judge (the base, then what was trained) and report. A killed
training goes on from its last checkpoint. With `--launcher accelerate` the training alone runs in the processes that
`accelerate launch` starts (`worker.py`); the rest stays here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from steerable.chains.generation import Prompting
from steerable.chains.judging import final_answer, judge
from steerable.chains.records import Record, content_hash, write_jsonl
from steerable.chains.tasks import make_splits, make_tasks
from steerable.engines.sampling import warn_if_endless
from steerable.jobs import arms
from steerable.jobs.judged import DECODINGS, answer, chains_of, report
from steerable.methods.train import controls
from steerable.methods.train.parameters import artefact
from steerable.methods.train.rewards import refuse_constants
from steerable.methods.train.settings import RLSettings, TrainSettings, from_dict, read_recipe
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.steering.direction import Direction
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.plurals import plural
from steerable.store.run_folder import RunFolder, read_json, write_json

Stage = Callable[[str, Sequence[str], str, Sequence[str], Any], None]
MODEL = "model revision dtype device attention trust_remote_code"
_TASKS = "tasks test seed limit evaluation prompts"
_TRAINED = f"""{MODEL} system template method layers after rank reward learning_rate beta steps prompts group
    max_new_tokens temperature warmup clip seed micro_batch checkpointing generation rows"""
_JUDGED = f"{MODEL} system template max_new_tokens temperature seed samples annotator rows"


def train_rl(
    out: str | Path = "runs/rl",
    *,
    recipe: str | None = None,
    workers: int | None = None,
    display: Display | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Path:
    """Train by reinforcement learning on verifiable answers, and judge base and result; what is finished is not done
    again.

    recipe: settings by name or from a JSON file (`settings.recipes`), under those that are given. workers: processes
    that judge; changes no result. overwrite: replace the results of another model that the folder holds. settings:
    those of `RLSettings`. Returns the run folder. Raises UsageError for a wrong setting or input, before anything is
    written, and SteerableError for a training that fails: the same call goes on with it.
    """
    from steerable.engines.pool import default_threads, torch_threads
    from steerable.pages.rl_page import write_page

    s = from_dict((read_recipe(recipe) if recipe else {}) | settings)
    folder = RunFolder(out)
    folder.refuse_other("train rl", s.model, s.revision, overwrite)
    loaded = open_model(s)
    with folder.locked(), torch_threads(default_threads(loaded.model, 1)):
        train_and_judge(folder, s, loaded, workers, display or Display(quiet=True))
        write_json(folder / "report.json", report(folder, s, loaded))
        write_page(folder.root, loaded)
    return folder.root


def train_and_judge(
    folder: RunFolder, s: RLSettings, loaded: Loaded, workers: int | None = None, display: Display | None = None
) -> None:
    """The stages tasks, train and judge in a locked folder, as far as they are not finished. `loaded` is the untrained
    model. Raises as `train_rl`."""
    display = display or Display(quiet=True)
    check(s, loaded)
    stage = stages(folder, s, loaded, display)
    tasks, trained = ("tasks.jsonl",), artefact(s.method)
    stage("tasks", (), _TASKS, tasks, lambda _: _make_tasks(folder, s, display))
    write_json(folder / "config.json", s.to_dict())
    stage("train", tasks, _TRAINED, (trained, "training.json"), lambda _: _train(folder, s, display))
    judge_arms(folder, s, loaded, stage, workers, display)


def stages(folder: RunFolder, s: TrainSettings, loaded: Loaded, display: Display) -> Stage:
    """`stage(name, inputs, settings it depends on, outputs, work)`: does a stage of this model's training, unless it
    is finished."""
    weights = arms.fingerprint(arms.Arm(arms.BASE, "base", s.model), loaded.model)

    def stage(name: str, inputs: Sequence[str], settings: str, outputs: Sequence[str], work: Any) -> None:
        done = folder.run_stage(name, inputs, s.subset(settings) | {"weights": weights}, outputs, work)
        display.say(f"{name}: {'done' if done else 'was done already'}")

    return stage


def judge_arms(
    folder: RunFolder, s: TrainSettings, loaded: Loaded, stage: Stage, workers: int | None, display: Display
) -> None:
    """The untrained model and what was trained answer the unseen tasks; a stage each."""
    trained = artefact(s.method)
    for arm in arms.find_arms(s.model, {s.method: folder / trained}):
        work = partial(answer, folder, s, arm, loaded, workers=workers, display=display)
        inputs = ["tasks.jsonl"] if arm.kind == "base" else ["tasks.jsonl", trained]
        stage(f"judge-{arm.name}", inputs, _JUDGED, [chains_of(arm.name, d) for d in DECODINGS], work)
    if s.method == "bias" and s.controls:
        direction = Direction.load(folder / trained)
        files = [f"controls/{name}" for name in ("shuffled.safetensors", "random.safetensors", "prefix.json")]
        stage("controls", [trained], "seed", files, lambda _: controls.make(folder.root, direction, loaded, s.seed))
        token = read_json(folder / "controls/prefix.json")["id"]
        for name in controls.NAMES:
            work = partial(
                answer, folder, s, controls.arm(folder.root, name, s.model), loaded,
                prefix=(token,) if name == "prefix" else (), workers=workers, display=display,
            )  # fmt: skip
            stage(f"judge-{name}", ["tasks.jsonl", *files], _JUDGED, [chains_of(name, d) for d in DECODINGS], work)


def open_model(s: TrainSettings) -> Loaded:
    """The untrained model."""
    return models.load(
        s.model,
        dtype=s.dtype,
        device=s.device,
        attn_implementation=s.attention,
        revision=s.revision,
        trust_remote_code=s.trust_remote_code,
    )


def check(s: TrainSettings, loaded: Loaded) -> None:
    """Refuse what this model cannot be trained with, before anything is written. Raises UsageError."""
    _need_libraries()
    from steerable.methods.train.parameters import check_vectors, places
    from steerable.models import biases

    layers = s.chosen_layers
    if s.method in ("bias", "adaptive", "lora"):
        chosen = places(loaded.model, layers, s.after)
        for place in chosen:
            biases.linear(loaded.model, place)
        if s.method == "bias":
            check_vectors(loaded.model, chosen, s.rank, getattr(s, "beta", 0.0) > 0)
    Prompting(s.system, s.template or "").text(loaded.tokenizer, "")
    warn_if_endless(loaded.model)
    config = loaded.model.config.get_text_config()
    if (longest := getattr(config, "max_position_embeddings", None)) and s.max_new_tokens > longest:
        raise UsageError(f"--max-new-tokens is {s.max_new_tokens}, but this model reads at most {longest}: lower it")


def _need_libraries() -> None:
    import importlib.util

    missing = [name for name in ("trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"training needs {' and '.join(missing)}: pip install 'steerable[train]'")


# --- tasks ---


def draw_tasks(s: TrainSettings) -> list[Record]:
    """Tasks to train on (`split` "train") and unseen ones to judge on ("evaluation")."""
    if s.test is None:
        return make_splits(s.tasks, {"train": s.limit, "evaluation": s.evaluation}, s.seed)
    judged = make_tasks(s.test, s.evaluation, s.seed)
    hashes = {content_hash(task) for task in judged}
    drawn = [{**task, "split": "train"} for task in make_tasks(s.tasks, s.limit, s.seed, hashes)]
    return drawn + [{**task, "split": "evaluation"} for task in judged]


def _make_tasks(folder: RunFolder, s: RLSettings, display: Display) -> None:
    drawn = draw_tasks(s)
    kept = [task for task in drawn if task["split"] != "train" or is_verifiable(task)]
    left = sum(task["split"] == "train" for task in kept)
    if left < s.prompts:
        raise UsageError(
            f"{s.tasks} has {left} {plural(left, 'task')} with an answer that can be checked, but a step takes "
            f"{s.prompts}: give tasks with reference answers (docs/tasks.md), or fewer --prompts"
        )
    if not any(is_verifiable(task) for task in kept if task["split"] == "evaluation"):
        raise UsageError(
            f"none of the tasks of {s.test or s.tasks} to judge on has an answer that can be checked: give tasks with "
            "reference answers (docs/tasks.md)"
        )
    if s.reward == "correct":
        refuse_constants([task for task in kept if task["split"] == "train"])
    if dropped := len(drawn) - len(kept):
        verb = plural(dropped, "was", "were")
        display.say(f"tasks: {dropped} of {s.limit} {verb} left out, as no reply could be checked against the answer")
    write_jsonl(folder / "tasks.jsonl", kept)


def is_verifiable(task: Mapping[str, Any]) -> bool:
    """Whether there is something to judge by, and the judge finds the reference answer itself right."""
    if task.get("entry") is not None:
        return True
    if task.get("answer") is None:
        return False
    return judge(task, f"\\boxed{{{final_answer(str(task['answer']))}}}").reason == "right"


# --- training ---


def _train(folder: RunFolder, s: RLSettings, display: Display) -> None:
    if s.launcher is None:
        from steerable.methods.train.loop import train

        train(folder.root, s, open_model(s), display)
    else:
        from steerable.methods.train.launcher import launch

        launch(folder.root, s.accelerate_config, s.steps, display)
