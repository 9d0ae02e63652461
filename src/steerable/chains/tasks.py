"""Where tasks come from, and who judges their answers.

Sources are reasoning-gym (procedural tasks with their own scorers, an outside judge) and task files.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from fractions import Fraction
from typing import Any

from steerable.chains.records import Record, content_hash, read_jsonl
from steerable.errors import UsageError
from steerable.pocket.families import FAMILIES, held_out

GYM = "reasoning-gym"


def make_tasks(source: str, n: int, seed: int = 0, exclude_hashes: Collection[str] = ()) -> list[Record]:
    """`n` tasks from a source, balanced over families, none twice and none in `exclude_hashes`.

    `source` is `pocket` (the bundled model's families), `reasoning-gym:countdown,gcd,...`, or the path of a
    `.jsonl` file of task records. Families alternate, so any beginning of the list is balanced as well. The
    same arguments give the same tasks. Tasks of the bundled model's families come from the half that its
    training never saw.

    UsageError when the source is unknown, or too small for `n` distinct tasks.
    """
    if n < 1:
        raise UsageError(f"the number of tasks must be at least 1, got {n}")
    name, _, rest = source.partition(":")
    if source == "pocket":
        streams = [_gym_stream(family, seed) for family in FAMILIES]
    elif name == GYM:
        families = list(dict.fromkeys(filter(None, (part.strip() for part in rest.split(",")))))
        if not families:
            raise UsageError(f"{source!r} names no family: expected for example {GYM}:countdown,gcd")
        streams = [_gym_stream(family, seed) for family in families]
    elif source.endswith((".jsonl", ".json")):
        streams = _file_streams(source, seed)
    else:
        raise UsageError(
            f"unknown task source {source!r}: expected pocket, {GYM}:<family>,... or a path ending in .jsonl"
        )
    tasks = _take(streams, n, set(exclude_hashes))
    if len(tasks) < n:
        raise UsageError(f"{source} gives only {len(tasks)} more distinct tasks, but {n} were asked for: ask for fewer")
    return tasks


def make_splits(source: str, sizes: Mapping[str, int], seed: int = 0) -> list[Record]:
    """Disjoint groups of tasks in one list, each task with the name of its group as `split`.

    `sizes` gives the number of tasks of each split, e.g. `{"extraction": 300, "evaluation": 50}`.
    """
    tasks: list[Record] = []
    for split, n in sizes.items():
        drawn = make_tasks(source, n, seed, {content_hash(task) for task in tasks})
        tasks += [{**task, "split": split} for task in drawn]
    return tasks


def _take(streams: list[Iterator[Record]], n: int, seen: set[str]) -> list[Record]:
    """Take one task of each stream in turn until there are `n`; an empty one leaves its share to others."""
    taken: list[Record] = []
    while streams and len(taken) < n:
        for stream in list(streams):
            task = next((task for task in stream if content_hash(task) not in seen), None)
            if task is None:
                streams.remove(stream)
            elif len(taken) < n:
                seen.add(content_hash(task))
                taken.append(task)
    return taken


def _gym_stream(family: str, seed: int, patience: int = 4000) -> Iterator[Record]:
    """Tasks of one reasoning-gym family until `patience` in a row brought nothing new.

    reasoning-gym seeds task i with `seed + i`, so neighbouring seeds share nearly all tasks: the seed is
    hashed.
    """
    config = FAMILIES.get(family, {})
    gym_seed = int.from_bytes(hashlib.sha256(f"{family}/{seed}".encode()).digest()[:4], "big")
    dataset = _create(family, size=2**31 - 1, seed=gym_seed, **config)
    seen: set[str] = set()
    index, last_new = -1, 0
    while (index := index + 1) - last_new < patience:
        # One turn through JSON now: a task in memory and the same one read from a file must be equal.
        entry = json.loads(json.dumps(dataset[index]))
        question = entry["question"]
        if question in seen or (family in FAMILIES and not held_out(question)):
            continue
        seen.add(question)
        last_new = index
        yield {
            "id": f"{family}-{seed}-{index}",
            "prompt": question,
            "category": family,
            "source": f"{GYM}:{family}",
            "entry": entry,
        }


def _create(family: str, **kwargs: Any) -> Any:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(family, **kwargs)
    except ValueError as error:
        raise UsageError(f"reasoning-gym cannot make the family {family!r}: {error}") from error


def _file_streams(path: str, seed: int) -> list[Iterator[Record]]:
    """One shuffled stream for each category of a task file."""
    by_category: dict[str, list[Record]] = {}
    ids: set[str] = set()
    for record in read_jsonl(path, "task"):
        if record["id"] in ids:
            raise UsageError(f"{path} has two tasks with the id {record['id']!r}: ids must differ")
        ids.add(record["id"])
        task = {"category": "all", "source": path, **record}
        by_category.setdefault(str(task["category"]), []).append(task)
    for category, tasks in by_category.items():
        random.Random(f"{seed}/{category}").shuffle(tasks)
    return [iter(tasks) for tasks in by_category.values()]


# --- judging ---


def score(task: Mapping[str, Any], answer: str | None) -> float | None:
    """How right an answer text is, in [0, 1]; None for a task that has nothing to judge by.

    The final answer is taken out of the text by `extract_answer`. Tasks with `entry` go to reasoning-gym's
    own scorer, tasks with `answer` are compared after normalisation (case, white space, LaTeX dollars,
    number format). No answer, and one that the scorer chokes on, score 0.
    """
    entry, wanted = task.get("entry"), task.get("answer")
    if entry is None and wanted is None:
        return None
    given = extract_answer(answer or "")
    if not given:
        return 0.0
    if entry is None:
        return float(_normal(given) == _normal(str(wanted)))
    family = entry["metadata"]["source_dataset"]
    is_harmless = _HARMLESS.get(family)
    if is_harmless and not is_harmless(given):
        return 0.0
    try:
        return float(_scorer(family)(answer=given, entry=entry))
    except UsageError:
        raise
    except Exception:  # scorers parse free text and raise what they like
        return 0.0


def correct(task: Mapping[str, Any], answer: str | None) -> bool | None:
    """Whether `score` gives full marks: partial credit is no right answer. None: nothing to judge by."""
    mark = score(task, answer)
    return None if mark is None else mark >= 1.0


def extract_answer(text: str) -> str:
    r"""The final answer in a text: the last `\boxed{...}`, else the last `<answer>`, else all of it."""
    boxed = text.rfind(r"\boxed{")
    if boxed >= 0:
        depth, start = 1, boxed + len(r"\boxed{")
        for position in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position].strip()
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return (tagged[-1] if tagged else text).strip()


@functools.cache
def _scorer(family: str) -> Callable[..., float]:
    scorer: Callable[..., float] = _create(family, size=1, seed=0).score_answer
    return scorer


# Some scorers run the answer as Python (`eval`, or sympy's `parse_expr`, which is `eval` too). Sampled text
# must neither run as a program nor ask for a number of 10^9 digits, so it has to be a plain formula or
# literal first.
_FORMULA = re.compile(r"(?:\d{1,12}|\b(?:[A-Za-z]|exp|log|sqrt|a?sin|a?cos|a?tan|sinh|cosh|tanh|pi)\b|[-+*/^().,\s])*")
_POWER = re.compile(r"(?:\*\*|\^)\s*(?:(\d+)|\(\s*-?\s*(\d+)\s*(?:/\s*\d+\s*)?\))?")
# A tower such as 9**9**9 nests to the right, so the product of its exponents says nothing about its size.
_TOWER = re.compile(_POWER.pattern + r"\s*(?:\*\*|\^)")


def _is_formula(answer: str) -> bool:
    if len(answer) > 500 or not _FORMULA.fullmatch(answer) or _TOWER.search(answer):
        return False
    exponents = [plain or bracketed for plain, bracketed in _POWER.findall(answer)]
    return all(exponents) and math.prod(max(1, int(exponent)) for exponent in exponents) <= 10_000


def _is_literal(answer: str) -> bool:
    if len(answer) > 10_000:
        return False
    if re.fullmatch(r"[\w\s,]*", answer):  # bare words and numbers: nothing that eval could run
        return True
    try:
        ast.literal_eval(answer)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


_HARMLESS: dict[str, Callable[[str], bool]] = {
    "countdown": _is_formula,
    "puzzle24": _is_formula,
    "simple_integration": _is_formula,
    "intermediate_integration": _is_formula,
    "polynomial_multiplication": _is_formula,
    "string_insertion": _is_literal,
    "spiral_matrix": _is_literal,
    "binary_matrix": _is_literal,
    "n_queens": _is_literal,
}


def _normal(text: str) -> str | Fraction:
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text).replace("$", "").replace("\\", "")
    text = " ".join(text.casefold().split()).rstrip(".")
    number = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).replace(" ", "")
    if re.fullmatch(r"[-+]?\d{1,40}(?:\.\d{1,40}|/[1-9]\d{0,39})?", number):
        return Fraction(number)
    return text
