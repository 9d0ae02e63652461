"""What every training command does around the training: tasks, stages, judging beside the untrained model, the report.

A run folder holds tasks.jsonl, config.json, the artefact with training.json, `chains/`, report.json and report.html.
What is finished is not done again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from steerable.chains.duplicates import task_key
from steerable.chains.generation import Job, Prompting
from steerable.chains.records import Record, read_jsonl, write_jsonl
from steerable.chains.tasks import make_splits, make_tasks
from steerable.engines.pool import default_threads, torch_threads
from steerable.engines.sampling import Decoding, warn_if_endless
from steerable.evals.cells import differences, measure_cell
from steerable.evals.intervals import TOO_FEW, is_bounded
from steerable.evals.metrics import Measured, measure
from steerable.jobs import arms
from steerable.jobs.annotation import annotate_by, labels_among, labels_of_function
from steerable.jobs.arms import BASE, Arm
from steerable.jobs.lens_job import stamped_lens
from steerable.jobs.task_origin import keys_of, note_keys
from steerable.jobs.training_settings import MODEL, TrainSettings
from steerable.methods.train import loop
from steerable.methods.train.parameters import Trained, artefact, attach, check_vectors, places
from steerable.models import loading as models
from steerable.models import writers
from steerable.models.loading import Loaded, stop_ids
from steerable.pages import training_page
from steerable.steering.direction import Direction
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.files import write_atomic
from steerable.store.run_folder import RunFolder, read_json, sha256, write_json
from steerable.store.text import plural

DECODINGS = ("greedy", "sampled")
CONTROLS = ("shuffled", "random", "prefix")
"""What trained vectors stand beside, without any training: is it these vectors, in these layers, or only a word?

- `shuffled`: the same vectors, each in another layer;
- `random`: random vectors of the same norms;
- `prefix`: no vector, but every answer begins with the token that the last layer's vector boosts most, since such a
  vector may do no more than choose the first word ("Small Vectors, Big Effects", arXiv 2509.06608).
"""
_VECTORS = artefact("bias")
_UNTRACKED = "evaluation samples controls annotator test save_every launcher accelerate_config vllm_url vllm_memory"
_JUDGED = f"{MODEL} system template max_new_tokens temperature seed samples rows"


@dataclass
class Training:
    """A training at work in its run folder.

    folder: where everything is written. settings: what was asked for. loaded: the untrained model. workers: processes
    that generate; changes no result.
    """

    folder: RunFolder
    settings: TrainSettings
    loaded: Loaded
    workers: int | None = None
    display: Display = field(default_factory=lambda: Display(quiet=True))

    def __post_init__(self) -> None:
        self.dtype = self.loaded.model.dtype  # in which it computes: `full` makes the weights wider

    def stage(self, name: str, inputs: Sequence[str], settings: str, outputs: Sequence[str], work: Any) -> None:
        """Do a stage, `work(folder for partial results)`, unless it is finished. settings: those that it depends on."""
        key = self.settings.subset(settings) | {"weights": self.weights}
        did = self.folder.run_stage(name, inputs, key, outputs, work)
        self.display.say(f"{name}: {'done' if did else 'was done already'}")

    @property
    def weights(self) -> str:
        """What tells the untrained model's weights from others of the same name."""
        return arms.fingerprint(Arm(BASE, "base", self.settings.model), self.loaded.model)

    def tasks(self, split: str) -> list[Record]:
        """The tasks to train on ("train") or to judge on ("evaluation")."""
        return [task for task in read_jsonl(self.folder / "tasks.jsonl", "task") if task["split"] == split]

    @property
    def prompting(self) -> Prompting:
        """How a task is put to the model."""
        return Prompting(self.settings.system, self.settings.template or "")

    def prompts(self) -> list[str]:
        """The tasks to train on, as texts up to where the model begins to speak."""
        return [self.prompting.text(self.loaded.tokenizer, task["prompt"]) for task in self.tasks("train")]

    # Training

    def fit(self, make: Callable[[Trained], Any], method: str) -> None:
        """Train until the artefact and training.json are written.

        make: gives the trainer for the model that was made trainable. method: what a direction file says of its origin.
        Raises SteerableError; what was reached is kept, and the same call goes on from it.
        """
        s, root, model = self.settings, self.folder.root, self.loaded.model
        with loop.quietly(), loop.explained(s.micro_batch, s.rows):
            torch.manual_seed(s.seed)  # the factors of a rank, and adapters, are drawn
            reference = getattr(s, "beta", 0.0) > 0
            trained = attach(model, s.method, layers=s.chosen_layers, reference=reference, **s.subset("after rank"))
            trainer = make(trained)
            loop.run(trainer, model, root, self._key(), self.display)
            if trainer.accelerator.is_main_process:
                stats = {"training": s.to_dict(), **note_keys(keys_of(self.tasks("train")))}
                about = {"behaviour": "reasoning", "method": method, "stats": stats}
                trained.finish(root, self.loaded.tokenizer, **about)
                write_json(root / "training.json", loop.summary(root, trainer))

    def _key(self) -> str:
        """What tells a training from others in the same folder: a hash of its settings, the weights that it begins
        with, and what is learnt."""
        settings = {name: value for name, value in self.settings.to_dict().items() if name not in _UNTRACKED.split()}
        files = [self.folder / name for name in ("tasks.jsonl", "solutions.jsonl")]
        learnt = [sha256(file) for file in files if file.exists()]
        return hashlib.sha256(json.dumps([settings, self.weights, learnt], sort_keys=True).encode()).hexdigest()

    def trainer_arguments(self) -> dict[str, Any]:
        """What is the same for every training, as arguments of transformers' `TrainingArguments`."""
        s, model, root = self.settings, self.loaded.model, self.folder.root
        cpu = models.device(model).type == "cpu"
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
            "bf16": self.dtype == torch.bfloat16 and not cpu,
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

    # Judging

    def judge(self) -> None:
        """Let the untrained model, what was trained and the controls answer the unseen tasks; a stage each."""
        s, trained = self.settings, artefact(self.settings.method)
        compared: list[tuple[Arm, Sequence[str], tuple[int, ...]]] = [
            (arm, () if arm.kind == "base" else (trained,), ())
            for arm in arms.find_arms(s.model, {s.method: self.folder / trained})
        ]
        if self.controls:
            files = [f"controls/{name}" for name in ("shuffled.safetensors", "random.safetensors", "prefix.json")]
            self.stage("controls", [trained], "seed", files, lambda _: self._make_controls())
            token = read_json(self.folder / "controls/prefix.json")["id"]
            for name in ("shuffled", "random"):
                compared.append((Arm(name, "direction", str(self.folder / f"controls/{name}.safetensors")), files, ()))
            compared.append((Arm("prefix", "base", s.model), files, (token,)))
        for arm, inputs, prefix in compared:
            outputs, work = [chains_of(arm.name, d) for d in DECODINGS], partial(self.answer, arm, prefix=prefix)
            self.stage(f"judge-{arm.name}", ["tasks.jsonl", *inputs], _JUDGED, outputs, work)

    def answer(self, arm: Arm, keep: Path, prefix: tuple[int, ...] = ()) -> None:
        """Write one arm's chains on the unseen tasks, greedy and sampled, as two files of the folder.

        keep: where finished blocks wait for the next call, if this one is killed. prefix: token ids that every answer
        begins with.
        """
        s, tasks = self.settings, self.tasks("evaluation")
        for decoding, samples in (("greedy", 1), ("sampled", s.samples)):
            chains = arms.answer(
                arm,
                self.loaded,
                Job(tasks, range(samples), arms.steering(arm), prompting=replace(self.prompting, prefix=prefix)),
                title=f"{arm.name}, {decoding}",
                display=self.display,
                keep=keep / decoding,
                seed=s.seed,
                decoding=Decoding(0.0 if decoding == "greedy" else s.temperature),
                max_new_tokens=s.max_new_tokens,
                rows=s.rows,
                workers=self.workers,
            )
            write_jsonl(self.folder / chains_of(arm.name, decoding), chains)

    def _make_controls(self) -> None:
        direction, seed = Direction.load(self.folder / _VECTORS), self.settings.seed
        shuffled(direction, seed).save(self.folder / "controls/shuffled.safetensors")
        direction.random_like(seed).save(self.folder / "controls/random.safetensors")
        token = boosted(self.loaded, direction)
        content = {"id": token, "token": self.loaded.tokenizer.decode([token])}
        write_json(self.folder / "controls/prefix.json", content)

    @cached_property
    def spans(self) -> dict[str, list[Record]] | None:
        """The labelled spans of everything that was judged, by the file of its chains; None: nobody labels."""
        name, annotator = self.settings.annotator, self.settings.annotate
        files = [chains_of(arm, d) for arm in (BASE, self.settings.method, *self.controls) for d in DECODINGS]
        if annotator is None:
            return None
        return {file: annotate_by(name, annotator, read_jsonl(self.folder / file, "chain")) for file in files}

    @cached_property
    def labels(self) -> list[str]:
        """The annotator's labels."""
        declared = None if (a := self.settings.annotate) is None else labels_of_function(self.settings.annotator, a)
        return labels_among(declared, {span["label"] for spans in (self.spans or {}).values() for span in spans})

    @property
    def controls(self) -> tuple[str, ...]:
        """The names of the controls that are judged."""
        return CONTROLS if self.settings.method == "bias" and self.settings.controls else ()

    def measured(self, arm: str) -> dict[str, list[Measured]]:
        """What the chains of one arm show, by decoding."""
        result = {}
        for decoding in DECODINGS:
            chains = read_jsonl(self.folder / (file := chains_of(arm, decoding)), "chain")
            spans = None if self.spans is None else self.spans[file]
            result[decoding] = measure(self.tasks("evaluation"), chains, spans, self.loaded.tokenizer, self.labels)
        return result

    def _cells(self, measured: dict[str, list[Measured]]) -> dict[str, Any]:
        return {d: measure_cell(measured[d], self.settings.seed, self.labels) for d in DECODINGS}

    def _differences(self, a: dict[str, list[Measured]], b: dict[str, list[Measured]]) -> dict[str, Any]:
        return {d: differences(a[d], b[d], self.settings.seed, self.labels) for d in DECODINGS}

    # The report

    def report(self) -> dict[str, Any]:
        """The content of report.json (docs/training.md)."""
        s, model, training = self.settings, self.loaded.model, read_json(self.folder / "training.json")
        base, trained = self.measured(BASE), self.measured(s.method)
        result = {BASE: self._cells(base), s.method: self._cells(trained)}
        result[s.method]["trainable_parameters"] = training["trainable_parameters"]
        if self.controls:
            result["controls"] = {}
            for name in self.controls:
                control = self.measured(name)
                gap = self._differences(trained, control)
                result["controls"][name] = self._cells(control) | {"difference": gap}
            result["controls"]["prefix"]["token"] = read_json(self.folder / "controls/prefix.json")["token"]
        packages = ("steerable", "torch", "transformers", "trl", "peft", "accelerate")
        return result | {
            "difference": self._differences(trained, base),
            "examples": examples(base["greedy"], trained["greedy"]),
            "training": training,
            "config": s.to_dict(),
            "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
            "model": {"name": models.model_id(model) or s.model, "layers": models.n_layers(model)},
        }

    def write_report(self) -> None:
        """Write report.json, lens.json (what trained vectors say, docs/lens.md) and report.html."""
        report, root, lens = write_json(self.folder / "report.json", self.report()), self.folder.root, None
        if self.settings.method == "bias":
            lens = stamped_lens(*self.loaded, root / _VECTORS, root / "lens.json")
        write_atomic(root / "report.html", training_page.render(read_json(report), loop.read_log(root), lens))


@contextmanager
def opened(
    job: str,
    out: str | Path,
    settings: TrainSettings,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    display: Display | None = None,
) -> Iterator[Training]:
    """The training in a locked run folder, with its model; at the end of the block everything is judged and reported.

    Raises UsageError, before anything is written, for a folder of something else and for what the model does not allow.
    """
    folder = RunFolder(out)
    folder.refuse_other(job, settings.model, settings.revision, overwrite)
    loaded = open_model(settings)
    with folder.locked(), torch_threads(default_threads(loaded.model, 1)):
        check(settings, loaded)
        training = Training(folder, settings, loaded, workers, display or Display(quiet=True))
        yield training
        training.judge()
        training.write_report()


def chains_of(arm: str, decoding: str) -> str:
    """The file of an arm's chains in a run folder."""
    return f"chains/{arm}-{decoding}.jsonl"


def open_model(settings: TrainSettings) -> Loaded:
    """The untrained model."""
    options = settings.subset("dtype device revision trust_remote_code")
    return models.load(settings.model, attn_implementation=settings.attention, **options)


def check(settings: TrainSettings, loaded: Loaded) -> None:
    """Refuse what this model cannot be trained with, before anything is written. Raises UsageError."""
    if missing := [name for name in ("trl", "peft", "datasets") if importlib.util.find_spec(name) is None]:
        raise UsageError(f"training needs {' and '.join(missing)}: pip install 'steerable[train]'")
    if (annotator := settings.annotate) is not None:
        labels_of_function(settings.annotator, annotator)
    if settings.method in ("bias", "adaptive", "lora"):
        chosen = places(loaded.model, settings.chosen_layers, settings.after)
        for place in chosen:
            writers.linear(loaded.model, place)
        if settings.method == "bias":
            check_vectors(loaded.model, chosen, settings.rank, getattr(settings, "beta", 0.0) > 0)
    Prompting(settings.system, settings.template or "").text(loaded.tokenizer, "")
    warn_if_endless(loaded.model)
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if longest and settings.max_new_tokens > longest:
        raise UsageError(
            f"--max-new-tokens is {settings.max_new_tokens}, but this model reads at most {longest}: lower it"
        )


def draw_tasks(settings: TrainSettings) -> list[Record]:
    """Tasks to train on (`split` "train") and unseen ones to judge on ("evaluation")."""
    s = settings
    if s.test is None:
        return make_splits(s.tasks, {"train": s.limit, "evaluation": s.evaluation}, s.seed)
    judged = make_tasks(s.test, s.evaluation, s.seed)
    drawn = make_tasks(s.tasks, s.limit, s.seed, {task_key(task["prompt"]) for task in judged})
    splits = (("train", drawn), ("evaluation", judged))
    return [{**task, "split": split} for split, tasks in splits for task in tasks]


def tell_outcome(training: Training) -> None:
    """Say what a finished training came to, and where its report is."""
    root = training.folder.root
    training.display.tell(*outcome(read_json(root / "report.json")))
    training.display.tell(f"The report is {(root / 'report.html').resolve()}")


def outcome(report: dict[str, Any]) -> Iterator[str]:
    """A training's report in a few sentences."""
    for decoding in DECODINGS:
        before, after = (report[arm][decoding]["accuracy"] for arm in (BASE, report["config"]["method"]))
        if before is None or after is None:
            yield f"{decoding}: these tasks have no reference answers, so accuracy is not measured"
            continue
        gap = report["difference"][decoding]["accuracy"]
        ends = "95 % interval {:+.1%} to {:+.1%}".format(*gap[1:]) if is_bounded(gap) else TOO_FEW
        yield (f"{decoding}: {before[0]:.1%} right before, {after[0]:.1%} after ({after[0] - before[0]:+.1%}, {ends})")
    training = report["training"]
    steps, skipped, why = training["steps"], training["steps_skipped"], "as in every group all rewards were equal"
    if skipped == steps:
        cut = (training.get("last") or {}).get("truncated") == 1
        cure = "raise --max-new-tokens, which cut off every reply" if cut else "give easier or harder tasks"
        yield f"Every step was skipped, {why}: nothing was learnt; {cure}, or use a larger --group"
    elif skipped:
        yield f"{skipped} of {steps} steps {plural(skipped, 'was', 'were')} skipped, {why}"


def shuffled(direction: Direction, seed: int) -> Direction:
    """The same vectors in other layers: none stays where it was, unless there is only one."""
    sites = list(direction.vectors)
    order = random.Random(seed).sample(sites, len(sites))
    # one ring through a random order of the layers moves every vector
    moved = {site: direction.vectors[other] for site, other in zip(order, order[1:] + order[:1], strict=True)}
    return replace(direction, vectors=moved, method=f"shuffled({seed}) {direction.method}", stats={})


def boosted(loaded: Loaded, direction: Direction) -> int:
    """The token that the last layer's vector boosts most, W_U b; tokens that end or structure a text do not count."""
    head = models.unembed(loaded.model)
    last = direction.vectors[max(direction.vectors)]
    with torch.no_grad():
        scores = head(last.to(models.device(head), loaded.model.dtype)).float().cpu()
    special = {*loaded.tokenizer.all_special_ids, *loaded.tokenizer.added_tokens_decoder, *stop_ids(loaded.model)}
    scores[[i for i in special if i < len(scores)]] = -torch.inf
    scores[len(loaded.tokenizer) :] = -torch.inf  # rows that no token has
    return int(scores.argmax())


def examples(base: Sequence[Measured], trained: Sequence[Measured], count: int = 2) -> list[Record]:
    """The shortest task that the training gained and the shortest that it lost; where there is none, others.

    Args:
        base: One chain a task, before the training.
        trained: The same tasks after it.
        count: How many tasks.

    Returns:
        `{"task_id", "prompt", "base", "trained"}` each, a chain being `{"thinking", "answer", "correct", "spans"}`.
    """
    order = [(False, True), (True, False), (True, True), (False, False)]
    kinds: dict[Any, list[tuple[Measured, Measured]]] = {kind: [] for kind in order}
    for pair in zip(base, trained, strict=True):
        kinds.setdefault((pair[0].correct, pair[1].correct), []).append(pair)
    ranked = [sorted(pairs, key=lambda pair: pair[0].tokens + pair[1].tokens) for pairs in kinds.values() if pairs]
    chosen = [pair for pairs in ranked for pair in pairs[:1]] + [pair for pairs in ranked for pair in pairs[1:]]

    def chain(m: Measured) -> Record:
        spans = [{key: span[key] for key in ("label", "start", "end")} for span in m.spans]
        return {"thinking": m.chain["thinking"], "answer": m.chain["answer"], "correct": m.correct, "spans": spans}

    return [
        {"task_id": a.task_id, "prompt": a.task["prompt"], "base": chain(a), "trained": chain(b)}
        for a, b in chosen[:count]
    ]
