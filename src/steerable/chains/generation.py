"""Chains of thought from tasks: chat template, generation, and the text split into thinking and answer."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from steerable.chains.judging import is_marked
from steerable.chains.records import Record, read_jsonl, write_jsonl
from steerable.engines.base import Completion, Engine, Progress, Request
from steerable.engines.pool import (
    MapBlocks,
    Report,
    default_threads,
    default_workers,
    loader,
    map_blocks,
    tokens_a_minute,
)
from steerable.engines.sampling import Decoding, decoding_of
from steerable.engines.transformers import GenerationDtype, TransformersEngine
from steerable.models.loading import Loaded, stop_ids
from steerable.steering.spec import Steering
from steerable.steering.think import ThinkTags, render, think_tags_if_any
from steerable.steering.vocabulary import with_first
from steerable.store.errors import SteerableWarning, UsageError

_FEW = 128  # chains that are one piece of work
_MINUTES = 2  # of a piece: while its last chains are written, rows of the batch are empty; a killed run loses it
_LONGEST = 4  # the longest chain that is allowed, as a multiple of what chains are on average
_FEWEST = 8  # chains that are computed together: one alone takes as long as all of them


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
    """Tasks to be answered in one setting: these samples of each, by number. `strength` and `control` are what the
    chains' records will say."""

    tasks: Sequence[Mapping[str, Any]]
    samples: Sequence[int] = (0,)
    steering: Steering = ()
    strength: float = 0.0
    control: str | None = None
    prompting: Prompting = Prompting()


def generate_chains(
    loaded: Loaded,
    tasks: Sequence[Mapping[str, Any]],
    *,
    samples: int = 1,
    steering: Steering = (),
    strength: float = 0.0,
    control: str | None = None,
    workers: int | None = 1,
    **options: Any,
) -> list[Record]:
    """Chain records of all tasks, `samples` each, in the order of the tasks: one `Job` of `generate_jobs`, which has
    the same options."""
    return generate_jobs(loaded, [Job(tasks, range(samples), steering, strength, control)], workers=workers, **options)[
        0
    ]


def generate_jobs(
    loaded: Loaded,
    jobs: Sequence[Job],
    *,
    seed: int = 0,
    greedy: bool | None = None,
    decoding: Decoding | None = None,
    max_new_tokens: int = 500,
    rows: int | None = None,
    generation_dtype: GenerationDtype = "auto",
    engine: Engine | None = None,
    block: int = 512,
    workers: int | None = None,
    spread: MapBlocks = map_blocks,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> list[list[Record]]:
    """Chain records of every job, in order.

    Every chain has its `prompt_ids` and the `ids` that were generated, which its text need not give back. Chains that
    do not close the think block are there too, with `closed` false.

    Args:
        seed: with the task's id and the sample's number it fixes a chain's randomness, so that the same sample of two
            jobs differs by the steering alone.
        greedy: None follows the model's `generation_config`. decoding: instead of it and of the model's own.
        max_new_tokens: of a chain. rows, generation_dtype: as for the engine.
        engine: what generates, in this process; None: transformers.
        block: chains that one worker computes in one piece, at most: as many as a core writes in about two minutes, by
            the model's size, where chains are a quarter of the longest on average, and no more than this. Another
            engine takes so many at once.
        workers: processes; None: one a core for a small model on a CPU. They change no chain. More than one needs a
            model that `load` can find again by its name or folder. spread: what distributes the blocks.
        keep: a folder that takes every finished block at once and gives back those of an earlier call with the same
            arguments, which a killed one left.
        progress: called as `progress(chains, tokens)` with what was finished since the last call.

    Raises UsageError for a job without samples, and as the engine does.
    """
    if block < 1 or any(not job.samples for job in jobs):
        raise UsageError("block must be at least 1, and every job needs a sample")
    model = loaded.model
    decoding = decoding or (None if greedy is None else decoding_of(model, greedy=greedy))
    if any(len(job.samples) > 1 for job in jobs) and (decoding or decoding_of(model)).greedy:
        warnings.warn(
            "decoding is greedy, by --greedy or by the model's generation_config, so that all samples of a task are "
            "one and the same chain: give --samples 1",
            SteerableWarning,
            stacklevel=2,
        )
    items = [(number, task, sample) for number, job in enumerate(jobs) for task in job.tasks for sample in job.samples]
    if engine is None:
        timely = _MINUTES * _LONGEST * tokens_a_minute(model) // max_new_tokens
        block = min(block, max(_FEWEST, timely))
    size = block_size(len(items), block)
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    files = [None if keep is None else keep / f"{i}.jsonl" for i in range(len(parts))]
    finished = {i: read_jsonl(file, "chain") for i, file in enumerate(files) if file is not None and file.exists()}
    # An earlier version kept chains without their ids, and cut the work in other pieces.
    asked = [[(task["id"], sample) for _, task, sample in part] for part in parts]
    finished = {
        i: part
        for i, part in finished.items()
        if all("ids" in c and "prompt_ids" in c for c in part)
        and [(c["task_id"], c["sample"]) for c in part] == asked[i]
    }
    missing = [i for i in range(len(parts)) if i not in finished]
    if progress is not None and finished:
        progress(sum(map(len, finished.values())), 0)

    def store(place: int, part: list[Record]) -> None:
        finished[missing[place]] = part
        if (file := files[missing[place]]) is not None:
            write_jsonl(file, part)

    def block_of(part: Sequence[tuple[int, Mapping[str, Any], int]]) -> list[Any]:
        return [(jobs[n].steering, jobs[n].prompting, task["id"], task["prompt"], sample) for n, task, sample in part]

    workers = min(workers or default_workers(model), max(1, len(missing)))
    spread(
        partial(
            _answer,
            seed=seed,
            decoding=decoding,
            max_new_tokens=max_new_tokens,
            rows=rows,
            generation_dtype=generation_dtype,
            engine=engine,
        ),
        [block_of(parts[i]) for i in missing],
        setup=loader(model) if workers > 1 or spread is not map_blocks else tuple,
        workers=workers,
        threads=default_threads(model, workers),
        report=(lambda done: progress(*done)) if progress else None,
        finished=store,
        context=loaded,
    )
    chains: list[list[Record]] = [[] for _ in jobs]
    for i, part in enumerate(parts):
        for (number, _, _), chain in zip(part, finished[i], strict=True):
            chains[number].append({**chain, "strength": jobs[number].strength, "control": jobs[number].control})
    return chains


def block_size(items: int, block: int) -> int:
    """Chains in each of an even number of equal pieces: a piece ends with few rows, and a short last one has few from
    its beginning, while another worker waits for it. A few chains are one piece."""
    return items if items <= min(block, _FEW) else max(1, math.ceil(items / (2 * math.ceil(items / (2 * block)))))


def _answer(
    loaded: Loaded,
    block: Sequence[tuple[Steering, Prompting, str, str, int]],
    report: Report,
    *,
    seed: int,
    decoding: Decoding | None,
    max_new_tokens: int,
    rows: int | None,
    generation_dtype: GenerationDtype,
    engine: Engine | None,
) -> list[Record]:
    """The chains of one block, each of a steering, a prompting, a task's id and prompt, and the sample's number."""
    model, tokenizer = loaded
    requests = [
        Request(prompting.ids(tokenizer, prompt), request_seed(seed, task, sample), steering, decoding)
        for steering, prompting, task, prompt, sample in block
    ]
    engine = engine or TransformersEngine(model, tokenizer, rows, generation_dtype)
    completions = engine.generate(
        requests, max_new_tokens=max_new_tokens, progress=lambda chains, tokens: report((chains, tokens))
    )
    tags, endless = think_tags_if_any(tokenizer), not stop_ids(model)
    chains = []
    for (_, prompting, task, _, sample), request, completion in zip(block, requests, completions, strict=True):
        # the prefix counts as written by the model
        prompt = list(request.prompt_ids[: len(request.prompt_ids) - len(prompting.prefix)])
        written = Completion([*prompting.prefix, *completion.ids], completion.finished)
        record = {"task_id": task, "sample": sample, "prompt_ids": prompt, "ids": written.ids}
        chains.append(record | split_chain(tokenizer, tags, written, endless=endless))
    return chains


def prompt_ids(tokenizer: Any, prompt: str, thinking: bool = True, **more: Any) -> list[int]:
    """Token ids of a user's message in the model's chat template, up to where the model begins to speak. more: `system`
    and `history`, as for `think.render`.

    Special tokens are those that the template writes, so that none (the first one above all) comes twice.
    """
    text = render(tokenizer, prompt, thinking, **more)
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
    """`thinking`, `answer`, `closed`, `tokens` (new ones, the stop token included) and `thinking_tokens` of a text.

    `thinking` is the text between the tags untouched, so that character offsets stay valid. Without a think block
    everything is the answer. See `ThinkTags.split`. A model that has no such block (tags None) thinks aloud: its text
    is both, and closed where it stopped by itself or marked an answer. endless: the model has no token to stop at, so
    that the longest length cuts nothing off: such a text is closed as it stands.
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
    parts = tags.split(tokenizer, ids)
    return {
        "thinking": parts.thinking,
        "answer": parts.answer,
        "closed": parts.closed,
        "tokens": len(completion.ids),
        "thinking_tokens": parts.thinking_tokens,
    }
