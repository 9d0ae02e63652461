"""Which tasks a vector was made or selected on: they are no test of it, so new tasks for it are drawn without them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steerable.chains.duplicates import SHORT, task_key
from steerable.chains.records import Record, read_jsonl

_NOTED = "task_keys"  # in the stats of a direction


def note_keys(*parts: Iterable[str]) -> dict[str, str]:
    """What a direction's `stats` keep of the short keys of its tasks, so that a copy of its file knows them, too."""
    keys = sorted(set().union(*parts))
    return {_NOTED: "".join(keys)} if keys else {}


def keys_of(tasks: Iterable[Record]) -> set[str]:
    """The short keys of tasks."""
    return {task_key(task["prompt"])[:SHORT] for task in tasks}


def keys_in(stats: Mapping[str, Any]) -> set[str]:
    """The short keys that a direction's `stats` keep."""
    text = str(stats.get(_NOTED, ""))
    return {text[i : i + SHORT] for i in range(0, len(text), SHORT)}


def known_tasks(source: str | Path, stats: Mapping[str, Any]) -> set[str]:
    """The short keys of the tasks that a file or folder was made or selected on: those that its `stats` name, and all
    but the evaluation tasks of the run folder that holds it. Empty where nothing is known of them."""
    keys = keys_in(stats)
    for folder in Path(source).resolve().parents if Path(source).exists() else ():
        if (folder / "config.json").is_file() and (folder / "tasks.jsonl").is_file():
            tasks = read_jsonl(folder / "tasks.jsonl", "task")
            return keys | keys_of(task for task in tasks if task.get("split") != "evaluation")
    return keys
