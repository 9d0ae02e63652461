"""One training in this process: TRL's arguments for the published loss, the journal, checkpoints, what goes wrong.

In the run folder: `checkpoints/` (of the training at hand; others are cleared away), `log.jsonl` (a line a step),
`tensorboard/` where TensorBoard is installed, at the end the artefact and `training.json`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerable.chains.generation import Prompting
from steerable.chains.records import read_jsonl
from steerable.engines.hf.routes import position_table, positions
from steerable.methods.train import sync
from steerable.methods.train.journal import Rollouts, own_callbacks, read_log
from steerable.methods.train.parameters import Trained, attach
from steerable.methods.train.rewards import reward_of
from steerable.methods.train.settings import RLSettings, TrainSettings
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.store.display import Display
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.run_folder import read_json, write_json

WEIGHTS = "trained.safetensors"
_PATIENCE = 10.0  # seconds that a vLLM server may take to show itself
_UNTRACKED = (
    "evaluation", "samples", "controls", "annotator", "test", "save_every", "launcher", "accelerate_config",
    "vllm_url", "vllm_memory",
)  # fmt: skip


def train(root: Path, s: RLSettings, loaded: Loaded, display: Display) -> None:
    """Train until the artefact and training.json lie in the run folder `root`, which holds tasks.jsonl.

    Raises UsageError and SteerableError; what was reached is kept, and the same call goes on from it.
    """
    with quietly():
        from steerable.methods.train.trainer import VectorTrainer

        torch.manual_seed(s.seed)  # the factors of a rank are drawn
        vllm = s.generation.startswith("vllm")
        if vllm:
            sync.prepare(root, s, loaded)
        trained = attach(
            loaded.model,
            s.method,
            layers=s.chosen_layers,
            after=s.after,
            rank=s.rank,
            reference=s.beta > 0,
        )
        tasks = [task for task in read_jsonl(root / "tasks.jsonl", "task") if task["split"] == "train"]
        prompting = Prompting(s.system, s.template or "")
        prompts = [prompting.text(loaded.tokenizer, task["prompt"]) for task in tasks]
        longest = check_length(s, loaded, prompts)
        with explained(root, s):
            trainer = VectorTrainer(
                trained,
                arguments(root, s, loaded, longest),
                train_dataset=dataset(prompts),
                processing_class=loaded.tokenizer,
                tasks=tasks,
                reward=reward_of(s.reward, s.seed),
                own_engine=s.generation == "engine",
                rows=s.rows,
            )
            _check_sharding(trainer, s)
            if vllm:
                sync.only_trained(trainer)
            main = trainer.accelerator.is_main_process
            last = last_checkpoint(root, s) if main else None
            last = _broadcast(trainer, last)
            if last:
                trainer.restore(last)
            own_callbacks(trainer, Rollouts(root, trainer, display, int(last.name.rpartition("-")[2]) if last else 0))
            with last_unread(loaded.model):
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            sync.unshard(trained)
        if main:
            about = {"behaviour": "reasoning", "method": f"bias-only RL, reward {s.reward}"}
            trained.finish(root, loaded.tokenizer, **about, stats={"training": s.to_dict()})
            write_json(root / "training.json", summary(root, trainer, trained))
        display.done()


def dataset(prompts: list[str]) -> Any:
    """What the trainer draws from: a task's text and its number."""
    from datasets import Dataset

    return Dataset.from_dict({"prompt": prompts, "task": list(range(len(prompts)))})


def arguments(root: Path, s: RLSettings, loaded: Loaded, longest: int | None = None) -> Any:
    """The published loss as TRL's settings. longest: tokens of the longest prompt, for vLLM's memory."""
    from accelerate import PartialState
    from trl import GRPOConfig

    processes = PartialState(cpu=models.device(loaded.model).type == "cpu").num_processes
    if s.rollouts % processes or (s.rollouts // processes) % min(s.micro_batch, s.rollouts // processes):
        raise UsageError(
            f"{s.rollouts} rollouts a step (--prompts {s.prompts} x --group {s.group}) cannot be shared by {processes} "
            f"processes in passes of {s.micro_batch}: choose numbers that divide each other"
        )
    share = s.rollouts // processes
    passes = share // min(s.micro_batch, share)
    vllm: dict[str, Any] = {}
    if s.generation.startswith("vllm"):
        vllm = {
            "use_vllm": True,
            "vllm_mode": s.generation.removeprefix("vllm-"),
            "vllm_server_base_url": s.vllm_url,
            "vllm_server_timeout": _PATIENCE,
            "vllm_max_model_length": None if longest is None else longest + s.max_new_tokens,
            "vllm_gpu_memory_utilization": s.vllm_memory,
            "vllm_enable_sleep_mode": False,  # it discards weights, and only the trained ones are pushed again
        }
    return GRPOConfig(
        **shared_arguments(root, s, loaded),
        loss_type="dapo",
        scale_rewards="none",
        beta=s.beta,
        use_bias_correction_kl=False,
        num_iterations=1,
        num_generations=s.group,
        temperature=s.temperature,
        top_p=1.0,
        top_k=0,
        max_completion_length=s.max_new_tokens,
        per_device_train_batch_size=share // passes,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        max_steps=s.steps,
        **vllm,
    )


def shared_arguments(root: Path, s: TrainSettings, loaded: Loaded) -> dict[str, Any]:
    """What is the same for every training, as settings of transformers' Trainer."""
    cpu = models.device(loaded.model).type == "cpu"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(root / "tensorboard")
    return {
        "output_dir": str(root / "checkpoints"),
        "learning_rate": s.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": s.warmup,
        "max_grad_norm": s.clip,
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "gradient_checkpointing": s.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": loaded.model.dtype == torch.bfloat16 and not cpu,
        "use_cpu": cpu,
        "seed": s.seed,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": s.save_every,
        "save_total_limit": 2,
        "report_to": [name for name in ("tensorboard", "wandb") if importlib.util.find_spec(name)],
        "disable_tqdm": True,
        "log_level": "error",
    }


def _check_sharding(trainer: Any, s: RLSettings) -> None:
    """Raises UsageError for what needs the weights in one piece where FSDP or ZeRO 3 has cut them up."""
    if not (trainer._dist.is_fsdp or trainer._dist.is_zero3):
        return
    if s.generation == "engine":
        raise UsageError(
            "--generation engine cannot roll out from weights that FSDP or ZeRO 3 spreads over processes: use "
            "vllm-colocate or vllm-server, or, where one device holds the model, accelerate's MULTI_GPU or ZeRO 2"
        )
    if s.method == "bias" and s.rank:
        raise UsageError("--rank with --method bias cannot be trained by FSDP or ZeRO 3: use MULTI_GPU or ZeRO 2")


def check_length(s: TrainSettings, loaded: Loaded, prompts: list[str]) -> int:
    """Tokens of the longest prompt. Raises UsageError where the model does not read it and the answer."""
    longest = max(len(ids) for ids in loaded.tokenizer(prompts, add_special_tokens=False)["input_ids"])
    room = positions(loaded.model)
    # Nothing is predicted from the last token, so it needs no position; but vLLM counts it.
    table = position_table(loaded.model)
    spare = int(getattr(s, "generation", "engine") == "engine" and (table is None or type(table) is nn.Embedding))
    if room and longest + s.max_new_tokens - spare > room:
        most = room + spare - longest
        cure = f"lower --max-new-tokens to {most}" if most > 0 else "give shorter tasks"
        raise UsageError(
            f"the longest task has {longest} tokens and --max-new-tokens is {s.max_new_tokens}, but this model reads "
            f"at most {room}: {cure}"
        )
    return longest


@contextmanager
def last_unread(model: Any) -> Iterator[None]:
    """Lets a text be one token longer than a table of learned positions: from its last token nothing is predicted, so
    that it may have any position."""
    table = position_table(model)
    if table is None:
        yield
        return

    def clamp(table: nn.Embedding, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].clamp(max=table.num_embeddings - 1), *args[1:]

    hook = table.register_forward_pre_hook(clamp)
    try:
        yield
    finally:
        hook.remove()


# --- checkpoints ---


def _key(s: TrainSettings, root: Path) -> str:
    kept = {name: value for name, value in s.to_dict().items() if name not in _UNTRACKED}
    content = json.dumps(kept, sort_keys=True) + hashlib.sha256((root / "tasks.jsonl").read_bytes()).hexdigest()
    return hashlib.sha256(content.encode()).hexdigest()


def last_checkpoint(root: Path, s: TrainSettings) -> Path | None:
    """The last whole checkpoint of this very training; what another one left is cleared away."""
    folder, stamp = root / "checkpoints", root / "checkpoints/training.json"
    if not stamp.exists() or read_json(stamp) != _key(s, root):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(root / "tensorboard", ignore_errors=True)
        (root / "log.jsonl").unlink(missing_ok=True)
        write_json(stamp, _key(s, root))
        return None
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if not (path / "trainer_state.json").exists():  # the last file of a checkpoint: it was killed before
            shutil.rmtree(path)
    whole = [path for path in found if path.exists()]
    return whole[-1] if whole else None


def _broadcast(trainer: Any, last: Path | None) -> Path | None:
    from accelerate.utils import broadcast_object_list

    box = [None if last is None else str(last)]
    broadcast_object_list(box)
    return None if box[0] is None else Path(box[0])


# --- what it took ---


def summary(root: Path, trainer: Any, trained: Trained) -> dict[str, Any]:
    """What the training took and gave, over all its sittings."""
    rows = read_log(root)
    parts = sorted({name for row in rows for name in row["seconds"]})
    return {
        "steps": len(rows),
        "trainable_parameters": trained.count(),
        "optimizer_bytes": optimizer_bytes(trainer),
        "seconds_per_step": {name: sum(row["seconds"].get(name, 0.0) for row in rows) / len(rows) for name in parts},
        "steps_skipped": sum(row.get("skipped", False) for row in rows),
        "curve": {
            name: [row[name] for row in rows] for name in ("step", "reward", "accuracy", "tokens", "kl", "entropy")
        },
        "last": {name: value for name, value in rows[-1].items() if name != "seconds"},
    }


def optimizer_bytes(trainer: Any) -> int:
    """The optimiser's memory, counted from its tensors."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    state = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in state)


# --- what goes wrong ---


@contextmanager
def explained(root: Path, s: TrainSettings) -> Iterator[None]:
    """Other libraries' errors as one sentence each."""
    again = "what was reached is kept, and the same command goes on from it"
    try:
        yield
    except (UsageError, SteerableError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
            raise SteerableError(
                f"out of memory: lower --micro-batch (now {s.micro_batch}), --rows (now {s.rows}) or --max-new-tokens, "
                f"or give --checkpointing; {again}"
            ) from error
        if isinstance(s, RLSettings) and s.generation == "vllm-server":
            if isinstance(error, ConnectionError) or type(error).__module__.startswith(("requests", "urllib3")):
                raise SteerableError(
                    f"the vLLM server at {s.vllm_url} does not answer: look at its log, or start it with "
                    f"`{sync.serve_command(root, s)}`; {again}"
                ) from error
            if text.startswith(("Request failed", "The vLLM server", "Weight synchronization")):  # TRL's own words
                raise SteerableError(
                    f"the vLLM server at {s.vllm_url} cannot be used ({text[:300].rstrip('.')}); {again}"
                ) from error
        raise


@contextmanager
def quietly() -> Iterator[None]:
    """Without the libraries' notices to developers: what matters is said by the journal or raised."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    names = ("bitsandbytes", "transformers", "trl", "accelerate", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        # A warning counts as the library's through which it came here; ours, the last and so the first rule, never do.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(trl|peft|torch|transformers)\.")
        warnings.simplefilter("always", SteerableWarning)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
