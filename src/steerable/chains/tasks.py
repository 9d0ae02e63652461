"""Where tasks come from: `make_tasks` and `make_splits`. Who judges their answers is in `chains.judging`.

A task is `{"id", "prompt", "category", "source"}` with what it is judged by: `answer`, or reasoning-gym's own record
`entry` (with neither, accuracy is not measured). docs/tasks.md describes every source.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from steerable.chains import gym, tables, written
from steerable.chains.duplicates import task_key
from steerable.chains.gym import GYM
from steerable.chains.judging import Verdict, correct, extract_answer, judge, score
from steerable.chains.records import Record, content_hash
from steerable.models.pocket.families import FAMILIES
from steerable.store.errors import UsageError
from steerable.store.plurals import plural

if TYPE_CHECKING:
    from steerable.chains.endpoint import Endpoint, Progress

__all__ = ["GYM", "Verdict", "correct", "extract_answer", "judge", "make_splits", "make_tasks", "score"]


def make_tasks(
    source: str,
    n: int,
    seed: int = 0,
    exclude_hashes: Collection[str] = (),
    *,
    endpoint: Endpoint | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """`n` tasks from a source, balanced over categories, none twice and none in `exclude_hashes` (of `content_hash`).

    `source` is `pocket` (the bundled model's families), `reasoning-gym` (the paper's categories),
    `reasoning-gym:gcd,@causal-reasoning,...`, a data set (`gsm8k`, `math500:test`, `hf:<id>[:<config>][:<split>]`),
    the path of a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow` file or of a folder, or
    `llm[:MODEL[@URL]]`, tasks that a language model writes. Categories alternate, so any beginning of the list is
    balanced as well. The same arguments give the same tasks. Tasks of the bundled model's families come from the half
    that its training never saw.

    endpoint, cache, progress: for `llm` alone; the server if the source does not name it, the folder of replies, and
    where what is done is reported.

    UsageError when the source is unknown, or too small for `n` distinct tasks; SteerableError when it cannot be
    reached.
    """
    return _draw(source, [n], seed, set(exclude_hashes), endpoint, cache, progress)[0]


def make_splits(
    source: str,
    sizes: Mapping[str, int],
    seed: int = 0,
    *,
    endpoint: Endpoint | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Disjoint groups of tasks in one list, each task with the name of its group as `split`.

    `sizes` gives the number of tasks of each split, e.g. `{"extraction": 300, "evaluation": 50}`. No task stands in two
    splits, nor twice in one, in another spelling either (`duplicates.normalised`). See `make_tasks`.
    """
    drawn = _draw(source, list(sizes.values()), seed, set(), endpoint, cache, progress)
    return [{**task, "split": split} for split, tasks in zip(sizes, drawn, strict=True) for task in tasks]


def _draw(
    source: str,
    sizes: list[int],
    seed: int,
    excluded: set[str],
    endpoint: Endpoint | None,
    cache: Path | None,
    progress: Progress | None,
) -> list[list[Record]]:
    """Disjoint groups of tasks."""
    if small := [n for n in sizes if n < 1]:
        raise UsageError(f"the number of tasks must be at least 1, got {small[0]}")
    if source.partition(":")[0] == "llm":
        wanted = sum(sizes)
        written_tasks = written.write_tasks(
            source, wanted, seed, excluded, endpoint=endpoint, cache=cache, progress=progress
        )
        streams = [_listed(written_tasks)]
    else:
        streams = _open(source, seed)
    seen: set[str] = set()
    groups = []
    for n in sizes:
        groups.append(_take([stream() for stream in streams], n, seen, excluded))
        if len(groups[-1]) < n:
            few = f"{len(groups[-1])} more distinct {plural(len(groups[-1]), 'task')}"
            raise UsageError(f"{source} gives only {few}, but {n} {plural(n, 'was', 'were')} asked for: ask for fewer")
    return groups


Streams = list[Callable[[], Iterator[Record]]]


def _open(source: str, seed: int) -> Streams:
    """What gives a source's tasks, one stream a category, each as often as it is asked."""
    name, _, rest = source.partition(":")
    if source == "pocket":
        return [_gym(family, (family,), seed) for family in FAMILIES]
    if name == GYM:
        if not rest and ":" in source:
            raise UsageError(f"{source!r} names no family: expected for example {GYM}:countdown,gcd, or {GYM} alone")
        return [_gym(category, families, seed) for category, families in gym.parse_families(rest)]
    by_category = tables.read_tasks(source, seed)
    return [_listed(tasks) for tasks in by_category.values()]


def _gym(category: str, families: tuple[str, ...], seed: int) -> Callable[[], Iterator[Record]]:
    return lambda: gym.stream(category, families, seed)


def _listed(tasks: list[Record]) -> Callable[[], Iterator[Record]]:
    return lambda: iter(tasks)


def _take(streams: list[Iterator[Record]], n: int, seen: set[str], excluded: Collection[str]) -> list[Record]:
    """Take one task of each stream in turn until there are `n`; an empty one leaves its share to others."""
    taken: list[Record] = []

    def is_new(task: Record) -> bool:
        return task_key(task["prompt"]) not in seen and content_hash(task) not in excluded

    while streams and len(taken) < n:
        for stream in list(streams):
            task = next((task for task in stream if is_new(task)), None)
            if task is None:
                streams.remove(stream)
            elif len(taken) < n:
                seen.add(task_key(task["prompt"]))
                taken.append(task)
    return taken
