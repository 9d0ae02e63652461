"""The labels `short` and `long`: whole chains of thought, by their length alone.

Vectors come from pairs: the shortest and the longest right answer to one task differ in how long the model reasons and
in little else. Whether steering shortens chains is judged against one length, the median of the unsteered ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from steerable.chains.records import Record
from steerable.chains.tasks import correct

LABELS = ("short", "long")
RATIO = 1.25
"""The longer chain of a pair has at least so many times the tokens of the shorter one."""


def length_pairs(tasks: Iterable[Mapping[str, Any]], chains: Sequence[Mapping[str, Any]]) -> list[list[Record]]:
    """The spans of each chain: one over the whole thinking of the shortest and of the longest right chain of a task,
    none for others.

    Args:
        tasks: task records. A task without a reference has no right answer: there closed chains count as right.
        chains: chain records, several of each task.

    Example:
        >>> spans = length_pairs(tasks, chains)
    """
    by_id = {task["id"]: task for task in tasks}
    groups: dict[str, list[int]] = {}
    for number, chain in enumerate(chains):
        is_whole = chain["closed"] and chain["thinking"].strip()
        if is_whole and correct(by_id[chain["task_id"]], chain["answer"]) is not False:
            groups.setdefault(chain["task_id"], []).append(number)
    spans: list[list[Record]] = [[] for _ in chains]
    for numbers in groups.values():
        short, *_, long = sorted(numbers, key=lambda i: chains[i]["thinking_tokens"]) if len(numbers) > 1 else (0, 0)
        if chains[long]["thinking_tokens"] >= RATIO * chains[short]["thinking_tokens"] and short != long:
            spans[short], spans[long] = [_whole(chains[short], "short")], [_whole(chains[long], "long")]
    return spans


def length_spans(chains: Sequence[Mapping[str, Any]], reference: float) -> list[list[Record]]:
    """One span a chain: `short` under the reference, in tokens of thinking, else `long`."""
    labels = ["short" if chain["thinking_tokens"] < reference else "long" for chain in chains]
    return [[_whole(chain, label)] if chain["thinking"] else [] for chain, label in zip(chains, labels, strict=True)]


def reference_length(chains: Sequence[Mapping[str, Any]]) -> float:
    """The median of the chains' thinking, in tokens."""
    return float(median(chain["thinking_tokens"] for chain in chains))


def _whole(chain: Mapping[str, Any], label: str) -> Record:
    about = {"task_id": chain["task_id"], "sample": chain["sample"]}
    return {**about, "label": label, "start": 0, "end": len(chain["thinking"])}
