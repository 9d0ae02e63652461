"""reasoning-gym: its families by the ten task categories of the paper, endless streams of tasks, and scoring.

The categories are those of Venhoff et al. 2025 (arXiv 2506.18167), appendix on task generation.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from steerable.chains.gym_scorers import COMPARISONS, GUARDS, bare_forms
from steerable.chains.records import Record
from steerable.models.pocket.families import FAMILIES, held_out
from steerable.store.errors import UsageError

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
_EAGER = {"acre": 500, "gsm_symbolic": 500, "list_functions": 500, "word_ladder": 500}


def slug(category: str) -> str:
    """A category's name as it is written in a source: `spatial-reasoning`."""
    return category.lower().replace(" ", "-")


def parse_families(rest: str) -> list[tuple[str, tuple[str, ...]]]:
    """The (category, families) pairs of a source, from its text after `reasoning-gym:` such as `gcd,@causal-reasoning`.

    No text means all categories; a family without `@` is its own category. UsageError for a category that is unknown
    or has no family.
    """
    parts = list(dict.fromkeys(filter(None, (part.strip() for part in rest.split(",")))))
    if not parts:
        return [(category, families) for category, families in CATEGORIES.items() if families]
    by_slug = {slug(category): category for category in CATEGORIES}
    chosen: list[tuple[str, tuple[str, ...]]] = []
    for part in parts:
        category = by_slug.get(slug(part[1:])) if part.startswith("@") else part
        if category is None:
            raise UsageError(f"there is no task category {part!r}: expected one of @{', @'.join(by_slug)}")
        families = CATEGORIES[category] if part.startswith("@") else (part,)
        if not families:
            raise UsageError(f"reasoning-gym has no family for {category}: take tasks of it from a file or from llm")
        chosen.append((category, families))
    return chosen


def stream(
    category: str, families: tuple[str, ...], seed: int, sizes: Mapping[str, Mapping[str, Any]] = FAMILIES
) -> Iterator[Record]:
    """Tasks of one category, its families in turn; an exhausted family leaves its share to the others.

    sizes: the arguments of `create_dataset` for families that a model was taught, whose training half is left out.
    """
    streams = [_family_stream(family, seed, sizes) for family in families]
    while streams:
        for one in list(streams):
            task = next(one, None)
            if task is None:
                streams.remove(one)
            else:
                yield {**task, "category": category}


def _family_stream(
    family: str, seed: int, sizes: Mapping[str, Mapping[str, Any]], patience: int = 4000
) -> Iterator[Record]:
    """Tasks of one family until `patience` in a row brought nothing new.

    reasoning-gym seeds task i with `seed + i`, so neighbouring seeds would share nearly all tasks: the seed is hashed.
    """
    seen: set[str] = set()
    last_new = 0
    for index, made in enumerate(_entries(family, seed, sizes.get(family, {}))):
        if index - last_new >= patience:
            return
        # One turn through JSON now: a task in memory and the same one read from a file must be equal.
        entry = json.loads(json.dumps(made))
        question = entry["question"]
        if question in seen or (family in sizes and not held_out(question)) or _is_reversed(family, entry):
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


def _is_reversed(family: str, entry: Mapping[str, Any]) -> bool:
    """Whether the reference answers the reverse of the question, as reasoning-gym 0.1.25 has it for in-laws: what the
    second person is to the first (findings/reasoning-gym-reverses-in-laws.sh). Such a task is left out."""
    return family == "family_relationships" and str(entry["answer"]).endswith("-in-law")


def _entries(family: str, seed: int, size_of: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    size = _EAGER.get(family, 2**31 - 1)
    for part in itertools.count():
        name = f"{family}/{seed}/{part}" if part else f"{family}/{seed}"
        gym_seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        dataset = _create(family, size=size, seed=gym_seed, **size_of)
        yield from (dataset[index] for index in range(size))


def _create(family: str, **kwargs: Any) -> Any:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(family, **kwargs)
    except ValueError as error:
        raise UsageError(f"reasoning-gym cannot make the family {family!r}: {error}") from error


# --- judging ---


#: Characters of an answer that a scorer is given to read, or four times those of the entry's own answer.
LONGEST = 4000


def gym_score(entry: Mapping[str, Any], given: str) -> float | None:
    """1.0 for a right answer, 0.0 for a wrong one, None for one that cannot be read.

    An answer is right if it is the entry's own or gets full marks from reasoning-gym's scorer, as it is or in a bare
    form (`gym_scorers.bare_forms`). Partial credit counts as wrong: the scorers give it for any text, or for a constant
    that happens to be near (docs/scorers.md). Raises UsageError for an entry without a known family.
    """
    try:
        family = str(entry["metadata"]["source_dataset"])
    except (KeyError, TypeError):
        raise UsageError(
            "a task's entry names no data set of reasoning-gym: expected what reasoning-gym made, with "
            "metadata.source_dataset"
        ) from None
    reference = entry.get("answer")
    if not isinstance(given, str) or len(given) > max(LONGEST, 4 * len(str(reference))):
        return None
    forms = bare_forms(given)
    if isinstance(reference, str) and not set(forms).isdisjoint(bare_forms(reference)):
        return 1.0
    is_readable = False
    for form in forms:
        is_right = _is_right(family, entry, form)
        if is_right:
            return 1.0
        is_readable |= is_right is not None
    return 0.0 if is_readable else None


def _is_right(family: str, entry: Mapping[str, Any], form: str) -> bool | None:
    """Whether one form of an answer is right; None where it cannot be read."""
    compare, guard = COMPARISONS.get(family), GUARDS.get(family)
    scorer = None if compare else _scorer(family)
    try:
        if compare:
            return compare(entry, form)
        if guard and not guard(entry, form):
            return None
        # Some scorers write into the entry, and some print.
        copy = {**entry, "metadata": {**entry["metadata"]}}
        with contextlib.redirect_stdout(io.StringIO()):
            return float(scorer(answer=form, entry=copy)) >= 1.0  # type: ignore[misc]
    except Exception:  # they parse free text, and raise what they like
        return None


@functools.cache
def _scorer(family: str) -> Callable[..., float]:
    scorer: Callable[..., float] = _create(family, size=1, seed=0).score_answer
    return scorer
