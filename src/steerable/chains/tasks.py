"""Making tasks: `make_tasks` and `make_splits`. Their answers are judged by `chains.judging`.

A task is `{"id", "prompt", "category", "source"}` with what it is judged by: `answer`, or reasoning-gym's own record
`entry` (with neither, accuracy is not measured). docs/tasks.md describes every source.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from steerable.chains import gym, tables, written
from steerable.chains.duplicates import SHORT, task_key
from steerable.chains.endpoint import Endpoint, Progress
from steerable.chains.gym import GYM
from steerable.chains.judging import Verdict, correct, extract_answer, final_answer, judge, score
from steerable.chains.records import Record
from steerable.models.taught import TAUGHT
from steerable.store.errors import UsageError
from steerable.store.text import plural

_LONGEST = 30  # words of a reference that an answer may repeat

__all__ = ["GYM", "Verdict", "correct", "extract_answer", "judge", "make_splits", "make_tasks", "score", "unmet"]


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
    """`n` distinct tasks from a source, balanced over its categories.

    Categories alternate, so any beginning of the list is balanced as well. The same arguments give the same tasks.
    Tasks of the bundled model's families, and of smol-think, come from the half that training never saw.

    Args:
        source: `pocket` and `smol-think` (what these models were taught; `pocket:gcd,countdown`: some of it),
            `reasoning-gym` (the paper's categories),
            `reasoning-gym:gcd,@causal-reasoning,...`, a data set (`gsm8k`, `math500:test`,
            `hf:<id>[:<config>][:<split>]`), the path of a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow`
            file or of a folder, or `llm[:MODEL[@URL]]`, tasks that a language model writes.
        n: how many.
        seed: of the choice and the order.
        exclude_hashes: hashes (`duplicates.task_key`, or their first `SHORT` digits) of tasks that are not wanted, in
            whatever spelling.
        endpoint, cache, progress: for `llm` alone; the server if the source does not name it, the folder of replies,
            and where what is done is reported.

    Raises:
        UsageError: the source is unknown, or too small for `n` distinct tasks.
        SteerableError: the source cannot be reached.

    Example:
        >>> tasks = make_tasks("reasoning-gym:@spatial-reasoning,gcd", 4)
    """
    return _draw(source, [n], seed, {key[:SHORT] for key in exclude_hashes}, endpoint, cache, progress)[0]


def make_splits(
    source: str,
    sizes: Mapping[str, int],
    seed: int = 0,
    *,
    endpoint: Endpoint | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Disjoint splits of tasks in one list; each task has the name of its split under `split`.

    No task occurs twice, in another spelling either (`duplicates.normalised`).

    Args:
        source: where the tasks come from; see `make_tasks`, also for the other arguments and the errors.
        sizes: the number of tasks of each split.

    Example:
        >>> tasks = make_splits("pocket", {"extraction": 300, "evaluation": 50})
    """
    drawn = _draw(source, list(sizes.values()), seed, set(), endpoint, cache, progress)
    return [{**task, "split": split} for split, tasks in zip(sizes, drawn, strict=True) for task in tasks]


def unmet(tasks: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tasks whose reference no plain answer can meet: it is not judged right when it is itself the answer, or it is
    a text of more than 30 words, which nobody writes again word by word.

    Example:
        >>> unmet([{"id": "a", "prompt": "2 + 2?", "answer": "4"}, {"id": "b", "prompt": "Why?", "answer": " "}])
        [{'id': 'b', 'prompt': 'Why?', 'answer': ' '}]
    """
    return [task for task in tasks if not _can_be_met(task)]


def _can_be_met(task: Mapping[str, Any]) -> bool:
    reference = str((task.get("entry") or task).get("answer", ""))
    if "entry" not in task and len(final_answer(reference).split()) > _LONGEST:
        return False
    answers = f"The answer is {reference}.", f"\\boxed{{{reference}}}", reference
    return any(correct(task, answer) is not False for answer in answers)


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
        tasks = written.write_tasks(
            source, sum(sizes), seed, excluded, endpoint=endpoint, cache=cache, progress=progress
        )
        streams: list[Callable[[], Iterable[Record]]] = [lambda: tasks]
    else:
        streams = _open(source, seed)
    seen: set[str] = set()
    groups = []
    for n in sizes:
        groups.append(_take([iter(stream()) for stream in streams], n, seen, excluded))
        if len(groups[-1]) < n:
            few = f"{len(groups[-1])} more distinct {plural(len(groups[-1]), 'task')}"
            raise UsageError(f"{source} gives only {few}, but {n} {plural(n, 'was', 'were')} asked for: ask for fewer")
    return groups


def _open(source: str, seed: int) -> list[Callable[[], Iterable[Record]]]:
    """What gives a source's tasks, one stream a category, each as often as it is asked."""
    name, _, rest = source.partition(":")
    if name in (GYM, *TAUGHT) and not rest and ":" in source:
        raise UsageError(f"{source!r} names no family: expected some behind the colon, or {name} alone")
    if name in TAUGHT:
        sizes = TAUGHT[name].families
        families = rest.split(",") if rest else list(sizes)
        if unknown := [family for family in families if family not in sizes]:
            raise UsageError(f"{name} was not taught {unknown[0]!r}: expected some of {', '.join(sizes)}")
        return [partial(gym.stream, family, (family,), seed, sizes) for family in dict.fromkeys(families)]
    if name == GYM:
        return [partial(gym.stream, category, families, seed) for category, families in gym.parse_families(rest)]
    return [partial(iter, tasks) for tasks in tables.read_tasks(source, seed).values()]


def _take(streams: list[Iterator[Record]], n: int, seen: set[str], excluded: Collection[str]) -> list[Record]:
    """Take one task of each stream in turn until there are `n`; an empty one leaves its share to others."""
    taken: list[Record] = []

    def is_new(task: Record) -> bool:
        key = task_key(task["prompt"])
        return key not in seen and key[:SHORT] not in excluded

    while streams and len(taken) < n:
        for stream in list(streams):
            task = next(filter(is_new, stream), None)
            if task is None:
                streams.remove(stream)
            elif len(taken) < n:
                seen.add(task_key(task["prompt"]))
                taken.append(task)
    return taken
