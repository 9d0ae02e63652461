"""Tasks to show beside their answers before and after a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steerable.chains.records import Record
from steerable.evals.metrics import Measured
from steerable.jobs.settings import Annotator

#: Which (right before, right after) are shown first.
_ORDER = ((False, True), (True, False), (True, True), (False, False))


def examples(
    tasks: Sequence[Mapping[str, Any]],
    base: Sequence[tuple[Mapping[str, Any], Measured]],
    trained: Sequence[tuple[Mapping[str, Any], Measured]],
    annotate: Annotator | None,
    count: int = 2,
) -> list[Record]:
    """The shortest task that training gained and the shortest that it lost; where there is none, others.

    base, trained: one chain a task with what it shows, in the same order. Each is `{"task_id", "prompt", "base",
    "trained"}`, a chain `{"thinking", "answer", "correct", "spans"}`.
    """
    prompts = {task["id"]: task["prompt"] for task in tasks}
    kinds: dict[Any, list[tuple[int, int]]] = {}
    for i, ((_, a), (_, b)) in enumerate(zip(base, trained, strict=True)):
        kinds.setdefault((a.correct, b.correct), []).append((a.tokens + b.tokens, i))
    wanted = [kinds.pop(kind) for kind in _ORDER if kind in kinds] + list(kinds.values())
    chosen = [min(kind)[1] for kind in wanted][:count]
    chosen += [i for kind in wanted for _, i in sorted(kind)[1:]][: count - len(chosen)]
    found = []
    for i in chosen:
        name = base[i][0]["task_id"]
        chains = {"base": _chain(*base[i], annotate), "trained": _chain(*trained[i], annotate)}
        found.append({"task_id": name, "prompt": prompts[name], **chains})
    return found


def _chain(chain: Mapping[str, Any], measured: Measured, annotate: Annotator | None) -> Record:
    spans = annotate(chain) if annotate else []
    return {
        "thinking": chain["thinking"],
        "answer": chain["answer"],
        "correct": measured.correct,
        "spans": [{key: span[key] for key in ("label", "start", "end")} for span in spans],
    }
