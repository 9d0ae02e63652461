"""reasoning-gym: its families under the ten task categories of the paper, streams of tasks, guarded scorers.

The categories are those of Venhoff et al. 2025 (arXiv 2506.18167), appendix on task generation.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from steerable.chains.records import Record
from steerable.errors import UsageError
from steerable.pocket.families import FAMILIES, held_out

GYM = "reasoning-gym"

#: The paper's ten categories with the reasoning-gym families that ask for that kind of thinking. Two have none:
#: no procedural family asks for a sideways look, nor for an experiment or a law of nature.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "Mathematical Logic": ("knights_knaves", "self_reference", "circuit_logic", "cryptarithm"),
    "Spatial Reasoning": ("color_cube_rotation", "maze", "shortest_path", "rotate_matrix", "simple_geometry"),
    "Verbal Logic": ("syllogism", "family_relationships", "zebra_puzzles", "aiw"),
    "Pattern Recognition": ("number_sequence", "arc_1d", "list_functions", "modulo_grid"),
    "Lateral Thinking": (),
    "Causal Reasoning": ("acre",),
    "Probabilistic Thinking": ("coin_flip", "dice"),
    "Systems Thinking": ("course_schedule", "game_of_life_halting", "rotten_oranges", "quantum_lock"),
    "Creative Problem Solving": ("countdown", "jugs", "word_ladder"),
    "Scientific Reasoning": (),
}


# Families that make all their tasks at once: they are asked for so many at a time.
_EAGER = {"acre": 500, "list_functions": 500, "word_ladder": 500}


def slug(category: str) -> str:
    """A category's name as it is written in a source: `spatial-reasoning`."""
    return category.lower().replace(" ", "-")


def parse_families(rest: str) -> list[tuple[str, tuple[str, ...]]]:
    """What stands behind `reasoning-gym:` as (category, families): `gcd,@causal-reasoning`; nothing means all ten.

    A family named alone is its own category. UsageError for a category that is unknown or has no family.
    """
    parts = list(dict.fromkeys(filter(None, (part.strip() for part in rest.split(",")))))
    if not parts:
        return [(category, families) for category, families in CATEGORIES.items() if families]
    known = {slug(category): category for category in CATEGORIES}
    found: list[tuple[str, tuple[str, ...]]] = []
    for part in parts:
        if not part.startswith("@"):
            found.append((part, (part,)))
            continue
        category = known.get(slug(part[1:]))
        if category is None:
            raise UsageError(f"there is no task category {part!r}: expected one of @{', @'.join(known)}")
        if not CATEGORIES[category]:
            raise UsageError(f"reasoning-gym has no family for {category}: take tasks of it from a file or from llm")
        found.append((category, CATEGORIES[category]))
    return found


def stream(category: str, families: tuple[str, ...], seed: int) -> Iterator[Record]:
    """Tasks of one category, its families in turn; an exhausted family leaves its share to the others."""
    streams = [_family_stream(family, seed) for family in families]
    while streams:
        for one in list(streams):
            task = next(one, None)
            if task is None:
                streams.remove(one)
            else:
                yield {**task, "category": category}


def _family_stream(family: str, seed: int, patience: int = 4000) -> Iterator[Record]:
    """Tasks of one family until `patience` in a row brought nothing new.

    reasoning-gym seeds task i with `seed + i`, so neighbouring seeds share nearly all tasks: the seed is
    hashed.
    """
    seen: set[str] = set()
    last_new = 0
    for index, made in enumerate(_entries(family, seed)):
        if index - last_new >= patience:
            return
        # One turn through JSON now: a task in memory and the same one read from a file must be equal.
        entry = json.loads(json.dumps(made))
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


def _entries(family: str, seed: int) -> Iterator[Mapping[str, Any]]:
    size = _EAGER.get(family, 2**31 - 1)
    for part in itertools.count():
        name = f"{family}/{seed}/{part}" if part else f"{family}/{seed}"
        gym_seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        dataset = _create(family, size=size, seed=gym_seed, **FAMILIES.get(family, {}))
        yield from (dataset[index] for index in range(size))


def _create(family: str, **kwargs: Any) -> Any:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(family, **kwargs)
    except ValueError as error:
        raise UsageError(f"reasoning-gym cannot make the family {family!r}: {error}") from error


# --- judging ---


def gym_score(entry: Mapping[str, Any], given: str) -> float | None:
    """reasoning-gym's own score of an answer in [0, 1]; None for an answer that its scorer cannot read."""
    family = entry["metadata"]["source_dataset"]
    if family in _PAYS_ANYTHING:
        return float(given.strip(" .").casefold() == str(entry["answer"]).casefold())
    is_harmless = _HARMLESS.get(family)
    if is_harmless and not is_harmless(given):
        return None
    try:
        return float(_scorer(family)(answer=given, entry=entry))
    except UsageError:
        raise
    except Exception:  # scorers parse free text and raise what they like
        return None


# Scorers of reasoning-gym 0.1.25 that give full marks to any text (this one compares `bool(answer)`, true for "False").
_PAYS_ANYTHING = ("game_of_life_halting",)


@functools.cache
def _scorer(family: str) -> Callable[..., float]:
    scorer: Callable[..., float] = _create(family, size=1, seed=0).score_answer
    return scorer


# Some scorers run the answer as Python (`eval`, or sympy's `parse_expr`, which is `eval` too). Sampled text
# must neither run as a program nor ask for a number of 10^9 digits, so it has to be a plain formula or
# literal first.
_FORMULA = re.compile(r"(?:\d{1,12}|\b(?:[A-Za-z]|exp|log|sqrt|a?sin|a?cos|a?tan|sinh|cosh|tanh|pi)\b|[-+*/^().,\s])*")
_POWER = re.compile(r"(\)?)\s*(?:\*\*|\^)\s*(?:(\d+)|\(\s*-?\s*(\d+)\s*(?:/\s*\d+\s*)?\))?")
# A tower such as 9**9**9 nests to the right, so the product of its exponents says nothing about its size.
_TOWER = re.compile(_POWER.pattern + r"\s*(?:\*\*|\^)")


def _is_formula(answer: str) -> bool:
    if len(answer) > 500 or not _FORMULA.fullmatch(answer) or _TOWER.search(answer):
        return False
    powers = [(nests, plain or bracketed) for nests, plain, bracketed in _POWER.findall(answer)]
    if not all(exponent for _, exponent in powers):
        return False
    # Only the power of a parenthesis multiplies with those inside it.
    outer = math.prod(max(1, int(exponent)) for nests, exponent in powers if nests)
    return outer * max((int(exponent) for nests, exponent in powers if not nests), default=1) <= 10_000


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
