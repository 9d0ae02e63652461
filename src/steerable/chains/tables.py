"""Tasks from tables (files, folders and data sets of Hugging Face `datasets`) with the column names that people use.

Formats are recognised by what the records hold, not by the name: GSM8K's worked answers (`#### 42`), MATH's solutions
(`\\boxed{}`), AIME, multiple choice, chats.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

from steerable.chains import sources
from steerable.chains.judging import final_answer
from steerable.chains.records import Record
from steerable.store.errors import UsageError

#: What a column may be called, the first that is there; capitals and `_` do not matter. `?prompt=NAME` names another.
COLUMNS = {
    field: names.split()
    for field, names in {
        "id": "id task_id unique_id question_id problem_id uid",
        "prompt": "prompt question problem query input instruction messages conversations",
        "answer": "answer final_answer target label gold ground_truth expected_answer reference_answer best_answer "
        "correct_answer solution",
        "category": "category subject type topic domain level",
    }.items()
}
_OPTIONS = (*COLUMNS, "split", "config", "revision")


def read_tasks(source: str, seed: int) -> dict[str, list[Record]]:
    """The tasks of a file, folder or data set by category, shuffled within each.

    `source` may end in `?prompt=COLUMN&answer=COLUMN&category=COLUMN&id=COLUMN` where the columns have other names
    (`A+B` joins two, an empty name takes none), and name a `split` and a `config` of a data set.

    UsageError for a missing, unreadable or empty source, one without a prompt, and ids that occur twice.
    """
    place, options = parse_source(source)
    rows, name = sources.read_rows(place, options)
    columns = {field: options[field] for field in COLUMNS if field in options}
    by_category: dict[str, list[Record]] = {}
    ids: set[str] = set()
    for number, row in enumerate(rows):
        task = task_of(row, columns, number=number, name=name, source=source, where=f"{source}, record {number + 1}")
        if task["id"] in ids:
            raise UsageError(
                f"{source} has two tasks with the id {task['id']!r}: ids must differ (?id= numbers the records instead)"
            )
        ids.add(task["id"])
        by_category.setdefault(task["category"], []).append(task)
    if not ids:
        raise UsageError(f"{source} is empty: expected at least one task")
    for category, tasks in by_category.items():
        random.Random(f"{seed}/{category}").shuffle(tasks)
    return by_category


def parse_source(source: str) -> tuple[str, dict[str, str]]:
    """A source without its options, and these: `file.csv?prompt=Body+Question` -> `file.csv`, `{"prompt": ...}`."""
    place, mark, rest = source.rpartition("?")
    if not mark or "=" not in rest:
        return source, {}
    options = {key: value for key, _, value in (part.partition("=") for part in rest.split("&"))}
    if unknown := options.keys() - set(_OPTIONS):
        raise UsageError(
            f"{min(unknown)!r} in {source!r} is no option of a task source: expected {', '.join(_OPTIONS)}"
        )
    return place, options


def task_of(
    row: Mapping[str, Any], columns: Mapping[str, str] | None = None, *, number: int, name: str, source: str, where: str
) -> Record:
    """One task from a record in any format; unknown keys are kept if JSON can hold them.

    UsageError, naming the place `where`, for a record without a prompt.
    """
    used: set[str] = set()

    def take(field: str) -> Any:
        if columns and field in columns:
            value, names = _named(row, columns[field], where)
            used.update(names)
            return value
        for candidate in _candidates(row, COLUMNS[field]):
            if row[candidate] not in (None, "", []):
                if field != "category":
                    used.add(candidate)
                return row[candidate]
        return None

    prompt = _prompt(take("prompt"))
    if not prompt:
        raise UsageError(
            f"{where} has no prompt: expected text under {', '.join(COLUMNS['prompt'][:6])}, or name the column as "
            f"{source.partition('?')[0]}?prompt=COLUMN (there are: {', '.join(map(str, row))[:200]})"
        )
    identity, answer, category = take("id"), take("answer"), take("category")
    prompt, answer = _with_choices(row, prompt, answer)
    task: Record = {
        "id": str(identity) if identity is not None else f"{name}-{number}",
        "prompt": prompt,
        "category": str(category) if category is not None else "all",
        "source": row["source"] if isinstance(row.get("source"), str) and row["source"] else source,
    }
    if isinstance(row.get("entry"), dict) and "source_dataset" in (row["entry"].get("metadata") or {}):
        task["entry"] = row["entry"]
    worked = row.get("solution") if isinstance(row.get("solution"), str) else None
    reference = _reference(answer, is_solution=answer is not None and answer is worked)
    if reference is not None:
        task["answer"] = reference
        if worked is None and isinstance(answer, str) and len(answer) > len(reference) + 8:
            worked = answer
    if worked:
        task["solution"] = re.sub(r"<<[^<>]*>>", "", worked)  # GSM8K's marks of calculations
    # What was read, and what a task's own keys would be mistaken for, stands here already.
    taken = {*used, *task, "answer", "entry"}
    return task | {key: v for key, v in row.items() if isinstance(key, str) and key not in taken and _is_json(v)}


def _candidates(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    by_name = {str(key).strip().lower().replace(" ", "_"): key for key in reversed(list(row))}
    return [by_name[name] for name in names if name in by_name]


def _named(row: Mapping[str, Any], column: str, where: str) -> tuple[Any, list[str]]:
    """The value of a column that was named, or of several joined by `+`; None for an empty name."""
    if not column:
        return None, []
    if column in row:
        return row[column], [column]
    names = column.split("+")
    if missing := [name for name in names if name not in row]:
        raise UsageError(f"{where} has no column {missing[0]!r}: there are {', '.join(map(str, row))[:200]}")
    return "\n".join(str(row[name]) for name in names if row[name] not in (None, "")), names


def _prompt(value: Any) -> str:
    """The text of a prompt; of a chat, what the user says last."""
    if isinstance(value, list):
        turns = [m for m in value if isinstance(m, dict) and m.get("role", m.get("from")) in ("user", "human")]
        value = turns[-1].get("content", turns[-1].get("value")) if turns else None
    return value if isinstance(value, str) and value.strip() else ""


def _reference(answer: Any, is_solution: bool) -> str | None:
    """What is compared with: the final answer of a worked one; None where there is none."""
    if isinstance(answer, list) and answer and not isinstance(answer[0], (dict, list)):
        answer = ", ".join(str(part).strip().strip("$") for part in answer)
    if isinstance(answer, bool | int | float):
        return str(answer)
    if not isinstance(answer, str) or not answer.strip():
        return None
    final = final_answer(answer)
    if is_solution and final == answer.strip() and (len(final) > 100 or "\n" in final):
        return None  # a worked solution that marks no answer
    return final or None


def _with_choices(row: Mapping[str, Any], prompt: str, answer: Any) -> tuple[str, Any]:
    """Multiple choice: the choices with their letters belong to the prompt, and the answer is a letter."""
    choices = next((row[name] for name in _candidates(row, ("choices", "options"))), None)
    letters = None
    if isinstance(choices, dict):  # as in ARC: {"text": [...], "label": ["A", ...]}
        letters, choices = choices.get("label"), choices.get("text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26 or not all(isinstance(c, str) for c in choices):
        return prompt, answer
    letters = letters if isinstance(letters, list) else [chr(ord("A") + i) for i in range(len(choices))]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = letters[answer]
    elif answer in choices:
        answer = letters[choices.index(answer)]
    if all(choice in prompt for choice in choices):
        return prompt, answer
    return prompt + "\n\n" + "\n".join(f"{a}. {c}" for a, c in zip(letters, choices, strict=True)), answer


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
