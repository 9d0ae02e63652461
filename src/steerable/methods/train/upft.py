"""`steerable train upft`: vectors trained by the likelihood of the first tokens of the model's own solutions.

UPFT (Ji et al. 2025, arXiv 2503.02875), on vectors instead of weights: of every training task one own solution is
sampled, right or wrong, and only its first k tokens are learnt (8 suffice in the paper, its code takes 32):

    L = -(1 / N_tok) sum_i sum_{t <= k} log pi(y_it | x_i, y_i<t),      y_i ~ pi_0^{1/T}

There is no reward, no reference answer, and no solution is finished: sampling takes k tokens a task. The paper also
learns a share of whole solutions and puts its end token behind a prefix; neither is done here.

What this can and cannot learn. Sampled at T = 1 the expected gradient at the untrained model is zero, as
E[grad log pi] = 0, and the cross-entropy with pi_0's own samples is least where nothing has changed: on average there
is nothing to learn, and what a finite number of samples teaches is their noise. Only a temperature below 1 (default
0.6; 0: greedily) gives the loss a direction: it sharpens the model's first tokens towards its likeliest ones, whether
these lead anywhere good or not. T = 1 is the control for that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steerable.chains.generation import Job, Prompting, generate_jobs
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.engines.sampling import Decoding, pad_id
from steerable.jobs.judged import report, split
from steerable.methods.train.journal import Journal, own_callbacks, read_log
from steerable.methods.train.loop import (
    WEIGHTS,
    check_length,
    explained,
    last_checkpoint,
    last_unread,
    optimizer_bytes,
    quietly,
    shared_arguments,
)
from steerable.methods.train.parameters import Trained, artefact, attach
from steerable.methods.train.rl import MODEL, check, draw_tasks, judge_arms, open_model, stages
from steerable.methods.train.settings import UPFTSettings
from steerable.models.loading import Loaded
from steerable.store.display import Display
from steerable.store.errors import SteerableError
from steerable.store.run_folder import RunFolder, write_json

IGNORED = -100
"""The label of what is not learnt, as torch and transformers have it."""
_BLOCK = 1024  # solutions that are computed, and kept, as one piece
_TASKS = "tasks test seed limit evaluation"
_SOLVED = f"{MODEL} system template prefix_tokens prefix_temperature seed rows"
_TRAINED = f"""{_SOLVED} method layers after rank learning_rate batch epochs warmup clip micro_batch checkpointing"""


def train_upft(
    out: str | Path = "runs/upft",
    *,
    workers: int | None = None,
    display: Display | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Path:
    """Train on the first tokens of own solutions, and judge base and result; what is finished is not done again.

    workers: processes that generate; changes no result. overwrite: replace the results of another model that the
    folder holds. settings: those of `UPFTSettings`. The tasks to train on need
    no answers. Returns the run folder, which holds what that of `train_rl` holds, and solutions.jsonl. Raises
    UsageError for a wrong setting or input, before anything is written, and SteerableError for a training that fails:
    the same call goes on with it.
    """
    from steerable.engines.pool import default_threads, torch_threads
    from steerable.pages.rl_page import write_page

    s = UPFTSettings.from_dict(settings)
    folder, display = RunFolder(out), display or Display(quiet=True)
    folder.refuse_other("train upft", s.model, s.revision, overwrite)
    loaded = open_model(s)
    with folder.locked(), torch_threads(default_threads(loaded.model, 1)):
        check(s, loaded)
        stage = stages(folder, s, loaded, display)
        stage("tasks", (), _TASKS, ["tasks.jsonl"], lambda _: write_jsonl(folder / "tasks.jsonl", draw_tasks(s)))
        write_json(folder / "config.json", s.to_dict())
        known, found = ["tasks.jsonl"], ["solutions.jsonl"]
        stage("solutions", known, _SOLVED, found, lambda kept: _solve(folder, s, loaded, kept, workers, display))
        outputs = [artefact(s.method), "training.json"]
        stage("train", known + found, _TRAINED, outputs, lambda _: _train(folder, s, open_model(s), display))
        judge_arms(folder, s, loaded, stage, workers, display)
        write_json(folder / "report.json", report(folder, s, loaded))
        write_page(folder.root, loaded)
    return folder.root


def _solve(
    folder: RunFolder, s: UPFTSettings, loaded: Loaded, kept: Path, workers: int | None, display: Display
) -> None:
    """The first tokens of one own solution of every training task: chains with their token ids."""
    tasks, prompting = split(folder, "train"), Prompting(s.system, s.template or "")
    check_length(s, loaded, [prompting.text(loaded.tokenizer, task["prompt"]) for task in tasks])
    display.start("solutions", len(tasks))
    chains = generate_jobs(
        loaded,
        [Job(tasks, prompting=prompting)],
        seed=s.seed,
        decoding=Decoding(s.prefix_temperature),
        max_new_tokens=s.prefix_tokens,
        rows=s.rows,
        block=_BLOCK,
        workers=workers,
        keep=kept,
        progress=display.advance,
    )[0]
    write_jsonl(folder / "solutions.jsonl", chains)
    display.done()


# --- the loss ---


def examples(loaded: Loaded, prompts: Sequence[Sequence[int]], solutions: Sequence[Sequence[int]], k: int) -> Any:
    """Rows for the trainer, `{"input_ids", "labels"}`: prompt and first k tokens; labels are -100 on the prompt."""
    return [
        {"input_ids": [*prompt, *said[:k]], "labels": [IGNORED] * len(prompt) + list(said[:k])}
        for prompt, said in zip(prompts, solutions, strict=True)
    ]


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad: int = 0) -> dict[str, Any]:
    """A batch `[rows, longest]`, padded on the right, with `logits_to_keep`: how many last positions predict a label.

    Of the others no logits are computed: over a large vocabulary these would take most of the memory.
    """
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([[*row[key], *[value] * (width - len(row[key]))] for row in rows])

    labels = padded("labels", IGNORED)
    first = int((labels != IGNORED).any(0).nonzero()[0])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {
        "input_ids": padded("input_ids", pad),
        "attention_mask": mask,
        "labels": labels,
        "logits_to_keep": width - first + 1,
    }


def prefix_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """-log likelihood of the labelled tokens, a token; of the whole step's, where their number is given.

    outputs: the model's, with logits `[rows, n, vocabulary]` of the last n positions. labels: `[rows, longest]`.
    """
    logits = outputs["logits"][:, :-1]
    wanted = labels[:, labels.shape[1] - logits.shape[1] :].to(logits.device)
    total = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (wanted != IGNORED).sum())


# --- training ---


def _train(folder: RunFolder, s: UPFTSettings, loaded: Loaded, display: Display) -> None:
    """Train until the artefact and training.json are written, from the last checkpoint if there is one."""
    root, k = folder.root, s.prefix_tokens
    chains = read_jsonl(folder / "solutions.jsonl", "chain")
    rows = examples(loaded, [chain["prompt_ids"] for chain in chains], [chain["ids"] for chain in chains], k)
    with quietly():
        torch.manual_seed(s.seed)  # the factors of a rank, and adapters, are drawn
        trained = attach(loaded.model, s.method, layers=s.chosen_layers, after=s.after, rank=s.rank)
        if trained.peft_config is not None:
            from peft import get_peft_model

            trained.model = get_peft_model(loaded.model, trained.peft_config)
        with explained(root, s):
            trainer = _trainer()(trained, _arguments(root, s, loaded), rows, loaded.tokenizer)
            last = last_checkpoint(root, s)
            if last:
                trained.restore(last / WEIGHTS)
            begun = int(last.name.rpartition("-")[2]) if last else 0
            own_callbacks(trainer, _Lines(root, trainer, display, begun))
            with last_unread(loaded.model):
                trainer.train(resume_from_checkpoint=str(last) if last else None)
        about = {"behaviour": "reasoning", "method": f"UPFT, first {k} tokens, temperature {s.prefix_temperature:g}"}
        trained.finish(root, loaded.tokenizer, **about, stats={"training": s.to_dict()})
        write_json(root / "training.json", _summary(root, trainer, trained))
    display.done()


def _arguments(root: Path, s: UPFTSettings, loaded: Loaded) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        **shared_arguments(root, s, loaded),
        num_train_epochs=s.epochs,
        per_device_train_batch_size=s.micro_batch,
        gradient_accumulation_steps=s.batch // s.micro_batch,
        logging_nan_inf_filter=False,
    )


def _trainer() -> Callable[..., Any]:
    """The class of the trainer; transformers' is imported only where a training runs."""
    from transformers import Trainer

    class PrefixTrainer(Trainer):  # type: ignore[misc]
        """transformers' Trainer with the loss of a prefix, and checkpoints of what is trained alone."""

        def __init__(self, trained: Trained, args: Any, rows: Any, tokenizer: Any) -> None:
            self.trained = trained
            self.seconds: dict[str, float] = {"update": 0.0}
            pad = pad_id(trained.model, tokenizer)
            super().__init__(
                trained.model,
                args,
                train_dataset=rows,
                data_collator=lambda batch: collate(batch, pad),
                compute_loss_func=prefix_loss,
            )

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            began = time.perf_counter()
            loss: Tensor = super().training_step(*args, **kwargs)
            if not math.isfinite(float(loss)):
                raise SteerableError(
                    f"the loss of step {self.state.global_step + 1} is not a finite number: the last checkpoint "
                    "before it is kept; lower --learning-rate, or use --dtype float32"
                )
            self.seconds["update"] += time.perf_counter() - began
            return loss

        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            self.trained.save(Path(output_dir or self.args.output_dir) / WEIGHTS, state_dict)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            """Nothing: the parameters were restored before."""

    return PrefixTrainer


class _Lines(Journal):
    def line(self, logs: dict[str, Any], seconds: dict[str, float]) -> tuple[dict[str, Any], str]:
        row = {
            "loss": float(logs["loss"]),
            "gradient_norm": float(logs.get("grad_norm") or 0.0),
            "learning_rate": float(logs["learning_rate"]),
            "seconds": seconds,
        }
        return row, f"loss {row['loss']:.3f} nats a token"


def _summary(root: Path, trainer: Any, trained: Trained) -> dict[str, Any]:
    """What the training took and gave, over all its sittings."""
    rows = read_log(root)
    return {
        "steps": len(rows),
        "trainable_parameters": trained.count(),
        "optimizer_bytes": optimizer_bytes(trainer),
        "seconds_per_step": {"update": sum(row["seconds"]["update"] for row in rows) / len(rows)},
        "curve": {name: [row[name] for row in rows] for name in ("step", "loss", "gradient_norm")},
        "last": {name: value for name, value in rows[-1].items() if name != "seconds"},
    }
