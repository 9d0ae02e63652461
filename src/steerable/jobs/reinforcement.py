"""`steerable train rl`: from tasks to trained vectors, judged beside the untrained model on unseen tasks."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch

from steerable.chains.records import write_jsonl
from steerable.jobs import arms, launcher
from steerable.jobs.training import Training, draw_tasks, open_model, opened, tell_outcome
from steerable.jobs.training_settings import MODEL, RLSettings, read_recipe
from steerable.methods.train.loop import check_length
from steerable.methods.train.parameters import Trained, artefact
from steerable.methods.train.rewards import is_verifiable, refuse_constants, reward_of
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import RunFolder, read_json, write_json
from steerable.store.text import plural

_TASKS = "tasks test seed limit evaluation prompts"
_TRAINED = f"""{MODEL} system template method layers after rank reward learning_rate beta steps prompts group
    max_new_tokens temperature warmup clip seed micro_batch checkpointing generation rows"""
PATIENCE = 10.0  # seconds that a vLLM server may take to show itself


def train_rl(
    out: str | Path = "runs/rl",
    *,
    recipe: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    display: Display | None = None,
    **settings: Annotated[Any, RLSettings],
) -> Path:
    """Reinforcement learning on verifiable answers: one vector a layer, or an adapter, or all weights.

    Ends with the untrained and the trained model judged on unseen tasks, greedily and sampled: report.json and
    report.html. A killed training goes on from its last checkpoint with the same command.

    Args:
        out: The run folder: everything that the training reads and writes.
        recipe: Settings of a published experiment by name, or a JSON file; a wrong name lists them.
        workers: Processes that generate; default: one a core for small models. Changes no result.
        overwrite: Let results of another model in --out be replaced; else that is refused.
        display: Where progress is shown.
        settings: Those of `RLSettings`; they win over the recipe's.

    Returns:
        The run folder.

    Raises:
        UsageError: A setting or an input is wrong; nothing was written.
        SteerableError: The training failed; the same call goes on with it.

    Example:
        steerable train rl --tasks reasoning-gym:gcd,simple_equations --out runs/rl
    """
    s = RLSettings(**(read_recipe(recipe) if recipe else {}) | settings)
    with opened("train rl", out, s, workers=workers, overwrite=overwrite, display=display) as training:
        folder, display, model = training.folder, training.display, training.loaded.model
        s.fit_to_memory(models.vocabulary(model), models.device(model).type == "cpu")
        training.stage("tasks", (), _TASKS, ["tasks.jsonl"], lambda _: _make_tasks(folder, s, display))
        write_json(folder / "config.json", s.to_dict())
        outputs = [artefact(s.method), "training.json"]
        training.stage("train", ["tasks.jsonl"], _TRAINED, outputs, lambda _: _train(folder, s, display))
    tell_outcome(training)
    return training.folder.root


def _make_tasks(folder: RunFolder, s: RLSettings, display: Display) -> None:
    drawn = draw_tasks(s)
    tasks = [task for task in drawn if task["split"] != "train" or is_verifiable(task)]
    training = [task for task in tasks if task["split"] == "train"]
    if len(training) < s.prompts:
        raise UsageError(
            f"{s.tasks} has {len(training)} {plural(len(training), 'task')} with an answer that can be checked, but a "
            f"step takes {s.prompts}: give tasks with reference answers (docs/tasks.md), or fewer --prompts"
        )
    if not any(is_verifiable(task) for task in tasks if task["split"] == "evaluation"):
        raise UsageError(
            f"none of the tasks of {s.test or s.tasks} to judge on has an answer that can be checked: give tasks with "
            "reference answers (docs/tasks.md)"
        )
    if s.reward == "correct":
        refuse_constants(training)
    if dropped := len(drawn) - len(tasks):
        verb = plural(dropped, "was", "were")
        display.say(f"tasks: {dropped} of {s.limit} {verb} left out, as no reply could be checked against the answer")
    write_jsonl(folder / "tasks.jsonl", tasks)


def _train(folder: RunFolder, s: RLSettings, display: Display) -> None:
    if s.launcher is None:
        train_policy(folder.root, s, open_model(s), display)
    else:
        launcher.launch(folder.root, s.accelerate_config, s.steps, display)


def train_policy(root: Path, s: RLSettings, loaded: Loaded, display: Display) -> None:
    """Train in this process until the artefact and training.json lie in the run folder `root`, which has tasks.jsonl.

    Raises UsageError and SteerableError; what was reached is kept, and the same call goes on from it.
    """
    from steerable.methods.train import sync
    from steerable.methods.train.trainer import VectorTrainer

    training, vllm = Training(RunFolder(root), s, loaded, display=display), s.generation.startswith("vllm")
    prompts = training.prompts()
    longest = check_length(loaded, prompts, s.max_new_tokens, spare=s.generation == "engine")
    if vllm:
        source = arms.fingerprint(arms.Arm(arms.BASE, "base", s.model), loaded.model)
        sync.prepare(root, loaded, source=source, **s.subset("method after revision"))

    def make(trained: Trained) -> VectorTrainer:
        trainer = VectorTrainer(
            trained,
            arguments(training, longest),
            prompts,
            training.tasks("train"),
            reward_of(s.reward, s.seed),
            loaded.tokenizer,
            own_engine=s.generation == "engine",
            rows=s.rows,
        )
        if vllm:
            sync.only_trained(trainer)
        return trainer

    server = s.vllm_url if s.generation == "vllm-server" else ""
    with sync.explained(root, s.model, server) if server else nullcontext():
        training.fit(make, f"bias-only RL, reward {s.reward}")


def arguments(training: Training, longest: int | None = None) -> Any:
    """The published loss as TRL's `GRPOConfig`.

    longest: tokens of the longest prompt, for vLLM's memory. Raises UsageError where the processes cannot share the
    rollouts.
    """
    from accelerate import PartialState
    from trl import GRPOConfig

    from steerable.methods.train.trainer import LOSS

    s, rollouts = training.settings, training.settings.batch_size
    assert isinstance(s, RLSettings)
    processes = PartialState(cpu=training.loaded.model.device.type == "cpu").num_processes
    share = rollouts // processes
    rows = min(s.micro_batch, share)
    if rollouts % processes or share % rows:
        raise UsageError(
            f"{rollouts} rollouts a step (--prompts {s.prompts} x --group {s.group}) cannot be shared by {processes} "
            f"processes in passes of {s.micro_batch}: choose numbers that divide each other"
        )
    vllm: dict[str, Any] = {}
    if s.generation.startswith("vllm"):
        vllm = {
            "use_vllm": True,
            "vllm_mode": s.generation.removeprefix("vllm-"),
            "vllm_server_base_url": s.vllm_url,
            "vllm_server_timeout": PATIENCE,
            "vllm_max_model_length": None if longest is None else longest + s.max_new_tokens,
            "vllm_gpu_memory_utilization": s.vllm_memory,
            "vllm_enable_sleep_mode": False,  # it discards weights, and only the trained ones are pushed again
        }
    # TRL loads the reference of a KL term by the model's name: it must be these very weights.
    commit = models.model_revision(training.loaded.model) or None
    return GRPOConfig(
        **training.trainer_arguments(),
        model_init_kwargs={"revision": commit, "trust_remote_code": s.trust_remote_code} if commit else None,
        **LOSS,
        beta=s.beta,
        num_generations=s.group,
        temperature=s.temperature,
        max_completion_length=s.max_new_tokens,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=share // rows,
        steps_per_generation=share // rows,
        max_steps=s.steps,
        **vllm,
    )


def main() -> None:
    """Train in this process the run folder that is named on its command line, as `accelerate launch` has it."""
    root, launched = Path(sys.argv[1]), launcher.LAUNCHER in os.environ
    launcher.end_with_launcher()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # "cuda" is then this process's own
    try:
        settings = RLSettings(**read_json(root / "config.json"))
        if settings.trust_remote_code and not launched:
            raise UsageError("config.json asks for trust_remote_code, which no file may: use `steerable train rl`")
        quiet = launched or os.environ.get("RANK", "0") != "0"
        train_policy(root, settings, open_model(settings), Display(quiet=quiet))
    except Exception as error:
        launcher.report(root, error)
        if isinstance(error, SteerableError):
            sys.exit(f"steerable: {error}")
        raise


if __name__ == "__main__":
    main()
