"""`steerable train upft`: vectors trained by the likelihood of the first tokens of the model's own solutions.

`methods.train.prefixes` says what is learnt, and what that can and cannot teach.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from steerable.chains.generation import Job, generate_jobs
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.engines.sampling import Decoding
from steerable.jobs.training import Training, draw_tasks, open_model, opened, tell_outcome
from steerable.jobs.training_settings import MODEL, UPFTSettings
from steerable.methods.train.loop import check_length
from steerable.methods.train.parameters import Trained, artefact
from steerable.models.loading import Loaded
from steerable.store.display import Display
from steerable.store.run_folder import RunFolder, write_json

_BLOCK = 1024  # solutions that are computed, and kept, as one piece
_TASKS = "tasks test seed limit evaluation"
_SOLVED = f"{MODEL} system template prefix_tokens prefix_temperature seed rows"
_TRAINED = f"{_SOLVED} method layers after rank learning_rate batch epochs warmup clip micro_batch checkpointing"


def train_upft(
    out: str | Path = "runs/upft",
    *,
    workers: int | None = None,
    overwrite: bool = False,
    display: Display | None = None,
    **settings: Annotated[Any, UPFTSettings],
) -> Path:
    """Train on the first tokens of the model's own solutions, unfiltered: no reward, minutes instead of hours.

    Ends as `steerable train rl` does, and goes on where it was stopped. The tasks to train on need no answers.

    Args:
        out: The run folder: everything that the training reads and writes.
        workers: Processes that generate; default: one a core for small models. Changes no result.
        overwrite: Let results of another model in --out be replaced; else that is refused.
        display: Where progress is shown.
        settings: Those of `UPFTSettings`.

    Returns:
        The run folder, which holds what that of `train_rl` holds, and solutions.jsonl.

    Raises:
        UsageError: A setting or an input is wrong; nothing was written.
        SteerableError: The training failed; the same call goes on with it.

    Example:
        steerable train upft --prefix-tokens 8 --out runs/upft
    """
    s = UPFTSettings(**settings)
    with opened("train upft", out, s, workers=workers, overwrite=overwrite, display=display) as training:
        folder, outputs = training.folder, [artefact(s.method), "training.json"]
        training.stage(
            "tasks", (), _TASKS, ["tasks.jsonl"], lambda _: write_jsonl(folder / "tasks.jsonl", draw_tasks(s))
        )
        write_json(folder / "config.json", s.to_dict())
        training.stage(
            "solutions", ["tasks.jsonl"], _SOLVED, ["solutions.jsonl"], lambda keep: _solve(training, s, keep)
        )
        inputs = ["tasks.jsonl", "solutions.jsonl"]
        work = lambda _: train_prefixes(folder.root, s, open_model(s), training.display)  # noqa: E731
        training.stage("train", inputs, _TRAINED, outputs, work)
    tell_outcome(training)
    return training.folder.root


def _solve(training: Training, s: UPFTSettings, keep: Path) -> None:
    """The first tokens of one own solution of every training task: chains with their token ids."""
    tasks, display = training.tasks("train"), training.display
    check_length(training.loaded, training.prompts(), s.max_new_tokens)
    display.start("solutions", len(tasks))
    chains = generate_jobs(
        training.loaded,
        [Job(tasks, prompting=training.prompting)],
        seed=s.seed,
        decoding=Decoding(s.prefix_temperature),
        max_new_tokens=s.prefix_tokens,
        rows=s.rows,
        block=_BLOCK,
        workers=training.workers,
        keep=keep,
        progress=display.advance,
    )[0]
    write_jsonl(training.folder / "solutions.jsonl", chains)
    display.done()


def train_prefixes(root: Path, s: UPFTSettings, loaded: Loaded, display: Display) -> None:
    """Train until the artefact and training.json lie in the run folder `root`, which has solutions.jsonl.

    Raises SteerableError; what was reached is kept, and the same call goes on from it.
    """
    training = Training(RunFolder(root), s, loaded, display=display)

    def make(trained: Trained) -> Any:
        from peft import get_peft_model
        from transformers import TrainingArguments

        from steerable.methods.train.prefixes import PrefixTrainer, examples

        if trained.peft_config is not None:
            trained.model = get_peft_model(loaded.model, trained.peft_config)
        arguments = TrainingArguments(
            **training.trainer_arguments(),
            num_train_epochs=s.epochs,
            per_device_train_batch_size=s.micro_batch,
            gradient_accumulation_steps=s.batch // s.micro_batch,
            logging_nan_inf_filter=False,
        )
        rows = examples(read_jsonl(root / "solutions.jsonl", "chain"), s.prefix_tokens)
        return PrefixTrainer(trained, arguments, rows, loaded.tokenizer)

    training.fit(make, f"UPFT, first {s.prefix_tokens} tokens, temperature {s.prefix_temperature:g}")
