"""Chains of thought from tasks: chat template, generation, and the text split into thinking and answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerable.chains.judging import is_marked
from steerable.chains.records import Record, read_jsonl, write_jsonl
from steerable.engines.hf.generation import Completion, Request, generate
from steerable.engines.hf.hooks import steer
from steerable.engines.pool import MapBlocks, Report, default_threads, default_workers, loader, map_blocks
from steerable.engines.sampling import Decoding
from steerable.models.loading import Loaded, stop_ids
from steerable.steering.direction import Direction
from steerable.steering.think import ThinkTags, render, think_tags_if_any
from steerable.steering.vocabulary import with_first
from steerable.store.errors import UsageError

Progress = Callable[[int, int], None]
"""Called as `progress(chains, tokens)` with what was done since the last call."""


@dataclass(frozen=True)
class Steering:
    """How a set of chains is steered: the arguments of `steer` that a process can be sent."""

    directions: Direction | tuple[Direction, ...]
    strength: float = 1.0
    layers: tuple[int, ...] | None = None
    where: str | None = None
    rescale: bool = False


@dataclass(frozen=True)
class Prompting:
    """How a task is put to a model, where that is not its chat template alone.

    system: a system message. template: a text with `{prompt}` instead of the chat template, for models that have
    none; what the tokenizer puts in front of a text (a BOS) stands before it. prefix: token ids that the answer begins
    with, as if the model had chosen them.
    """

    system: str = ""
    template: str = ""
    prefix: tuple[int, ...] = ()

    def text(self, tokenizer: Any, prompt: str) -> str:
        """A task up to where the model begins to speak (without `prefix`). Raises UsageError for a template without
        a place for the task."""
        if not self.template:
            return prompt_text(tokenizer, prompt, system=self.system)
        if "{prompt}" not in self.template:
            raise UsageError("the template has no {prompt}: expected a text with {prompt} where the task belongs")
        return with_first(tokenizer, self.template.replace("{prompt}", prompt))

    def ids(self, tokenizer: Any, prompt: str) -> list[int]:
        """The same as token ids, `prefix` behind them."""
        text = self.text(tokenizer, prompt)
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], *self.prefix]


@dataclass(frozen=True)
class Job:
    """Tasks to be answered in one setting: these samples of each, by number. `strength` and `control` are what
    the chains' records will say."""

    tasks: Sequence[Mapping[str, Any]]
    samples: Sequence[int] = (0,)
    steering: Steering | None = None
    strength: float = 0.0
    control: str | None = None
    prompting: Prompting = Prompting()


@dataclass(frozen=True)
class Settings:
    """What all jobs share; see `generate_jobs`."""

    seed: int = 0
    greedy: bool | None = None
    max_new_tokens: int = 500
    rows: int = 64
    decoding: Decoding | None = None


def generate_chains(
    loaded: Loaded,
    tasks: Sequence[Mapping[str, Any]],
    *,
    samples: int = 1,
    seed: int = 0,
    greedy: bool | None = None,
    max_new_tokens: int = 500,
    rows: int = 64,
    block: int = 512,
    steering: Steering | None = None,
    strength: float | None = None,
    control: str | None = None,
    workers: int | None = 1,
    progress: Progress | None = None,
) -> list[Record]:
    """Chain records of all tasks, `samples` each, in the order of the tasks. One `Job` of `generate_jobs`."""
    label = strength if strength is not None else steering.strength if steering else 0.0
    job = Job(tasks, range(samples), steering, label, control)
    return generate_jobs(
        loaded,
        [job],
        seed=seed,
        greedy=greedy,
        max_new_tokens=max_new_tokens,
        rows=rows,
        block=block,
        workers=workers,
        progress=progress,
    )[0]


def generate_jobs(
    loaded: Loaded,
    jobs: Sequence[Job],
    *,
    seed: int = 0,
    greedy: bool | None = None,
    max_new_tokens: int = 500,
    rows: int = 64,
    block: int = 512,
    workers: int | None = None,
    spread: MapBlocks = map_blocks,
    keep: Path | None = None,
    progress: Progress | None = None,
    decoding: Decoding | None = None,
) -> list[list[Record]]:
    """Chain records of every job, in order.

    seed: with the task's id and the sample's number it fixes a chain's randomness, so the same sample of two
    jobs differs by the steering alone. greedy: None follows the model's `generation_config`. rows: sequences
    computed together. block: chains that one worker computes in one piece; part of the result's identity,
    where `workers` is not (None: a process a core for a small model on a CPU). More than one worker needs a
    model that `load` can find again by its name or folder. keep: a folder that takes every finished block at once and
    gives back those of an earlier call with the same arguments, which a killed one left. decoding: instead of `greedy`
    and the model's own. Every chain keeps its `prompt_ids` and the `ids` that were generated, which its text need not
    give back. Chains that do not close the think block are kept, with `closed` false.
    """
    if block < 1 or any(not job.samples for job in jobs):
        raise UsageError("block must be at least 1, and every job needs a sample")
    model = loaded.model
    settings = Settings(seed, greedy, max_new_tokens, rows, decoding)
    # Jobs that differ in strength alone are computed together, each row with its own: fuller batches.
    groups: dict[Any, list[tuple[int, Mapping[str, Any], int]]] = {}
    for number, job in enumerate(jobs):
        items = groups.setdefault((_kind(job.steering), job.prompting), [])
        items += [(number, task, sample) for task in job.tasks for sample in job.samples]
    parts = [items[i : i + block] for items in groups.values() for i in range(0, len(items), block)]
    blocks = [_block(jobs, part, settings) for part in parts]
    files = [None if keep is None else keep / f"{i}.jsonl" for i in range(len(blocks))]
    kept = {i: read_jsonl(file, "chain") for i, file in enumerate(files) if file is not None and file.exists()}
    # An earlier version kept chains without their ids.
    kept = {i: part for i, part in kept.items() if all("ids" in chain and "prompt_ids" in chain for chain in part)}
    missing = [i for i in range(len(blocks)) if i not in kept]
    if progress is not None and kept:
        progress(sum(map(len, kept.values())), 0)

    def store(place: int, part: list[Record]) -> None:
        kept[missing[place]] = part
        if (file := files[missing[place]]) is not None:
            write_jsonl(file, part)

    workers = min(workers or default_workers(model), max(1, len(missing)))
    spread(
        _run_block,
        [blocks[i] for i in missing],
        setup=loader(model) if workers > 1 or spread is not map_blocks else tuple,
        workers=workers,
        threads=default_threads(model, workers),
        report=(lambda done: progress(*done)) if progress else None,
        finished=store,
        context=loaded,
    )
    chains: list[list[Record]] = [[] for _ in jobs]
    for i, part in enumerate(parts):
        for (number, _, _), chain in zip(part, kept[i], strict=True):
            chains[number].append({**chain, "strength": jobs[number].strength, "control": jobs[number].control})
    return chains


def _kind(steering: Steering | None) -> Any:
    """What two ways of steering must share to be computed in one batch: all but the strength."""
    if steering is None:
        return None
    found = steering.directions
    directions = (found,) if isinstance(found, Direction) else tuple(found)
    return tuple(d.to_bytes() for d in directions), steering.layers, steering.where, steering.rescale


def _block(jobs: Sequence[Job], part: Sequence[tuple[int, Mapping[str, Any], int]], settings: Settings) -> Any:
    steerings = [jobs[number].steering for number, _, _ in part]
    strengths = [None if s is None else s.strength for s in steerings]
    prompting = jobs[part[0][0]].prompting
    if len(set(strengths)) == 1:  # one number for all rows is the faster path
        return steerings[0], prompting, [(task, sample, None) for _, task, sample in part], settings
    items = [(t, sample, s) for (_, t, sample), s in zip(part, strengths, strict=True)]
    return steerings[0], prompting, items, settings


def _run_block(loaded: Loaded, block: Any, report: Report) -> list[Record]:
    steering, prompting, items, settings = block
    model, tokenizer = loaded
    tags = think_tags_if_any(tokenizer)
    requests = [
        Request(prompting.ids(tokenizer, task["prompt"]), request_seed(settings.seed, task["id"], sample), strength)
        for task, sample, strength in items
    ]
    with _steered(loaded, steering) as handle:
        completions = generate(
            model,
            tokenizer,
            requests,
            max_new_tokens=settings.max_new_tokens,
            rows=settings.rows,
            greedy=settings.greedy,
            decoding=settings.decoding,
            steering=handle,
            progress=lambda chains, tokens: report((chains, tokens)),
        )
    chains, endless = [], not stop_ids(model)
    for (task, sample, _), request, completion in zip(items, requests, completions, strict=True):
        # the prefix counts as the model's own
        prompt = list(request.prompt[: len(request.prompt) - len(prompting.prefix)])
        written = Completion([*prompting.prefix, *completion.ids], completion.finished)
        ids = {"prompt_ids": prompt, "ids": written.ids}
        text = split_chain(tokenizer, tags, written, endless=endless)
        chains.append({"task_id": task["id"], "sample": sample} | ids | text)
    return chains


def _steered(loaded: Loaded, steering: Steering | None) -> Any:
    if steering is None:
        return nullcontext()
    directions = steering.directions
    return steer(
        loaded.model,
        [directions] if isinstance(directions, Direction) else list(directions),
        strength=steering.strength,
        layers=steering.layers,
        where=steering.where,
        rescale=steering.rescale,
        tokenizer=loaded.tokenizer,
        track=False,
    )


def prompt_ids(tokenizer: Any, prompt: str, thinking: bool = True) -> list[int]:
    """Token ids of a user's message in the model's chat template, up to where the model begins to speak.

    Special tokens are those that the template writes, so that none (the first one above all) comes twice.
    """
    text = prompt_text(tokenizer, prompt, thinking)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_text(tokenizer: Any, prompt: str, thinking: bool = True, system: str = "") -> str:
    """A user's message in the model's chat template, up to where the model begins to speak; see `think.render`.

    Raises UsageError for a tokenizer without a chat template.
    """
    return render(tokenizer, prompt, thinking, system)


def request_seed(seed: int, task_id: str, sample: int) -> int:
    """64 bits that are the same on every machine and for every batch."""
    digest = hashlib.sha256(f"{seed}/{task_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def split_chain(tokenizer: Any, tags: ThinkTags | None, completion: Completion, *, endless: bool = False) -> Record:
    """`thinking`, `answer`, `closed`, `tokens` (new ones, the stop token included) and `thinking_tokens`.

    `thinking` is the text between the tags untouched, so that character offsets stay valid. Without a think
    block everything is the answer. See `ThinkTags.split`. A model that has no such block (tags None) thinks aloud: its
    text is both, and closed where it stopped by itself or marked an answer. endless: the model has no token to stop at,
    so that the longest length cuts nothing off: such a text is closed as it stands.
    """
    ids = completion.ids[:-1] if completion.finished else completion.ids
    if tags is None:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return {
            "thinking": text,
            "answer": text,
            "closed": completion.finished or endless or is_marked(text),
            "tokens": len(completion.ids),
            "thinking_tokens": len(ids),
        }
    found = tags.split(tokenizer, ids)
    return {
        "thinking": found.thinking,
        "answer": found.answer,
        "closed": found.closed,
        "tokens": len(completion.ids),
        "thinking_tokens": found.thinking_tokens,
    }
