"""Tasks written by a language model: equally many for each of the ten categories of the paper, without duplicates.

Source: Venhoff et al. 2025 (arXiv 2506.18167), section 3.1: 10 categories x 50 tasks. Its prompt is not published; the
wording here is our own. Unlike the published list, training and evaluation share no task, nor two that differ in
numbers or wording alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection
from itertools import zip_longest
from pathlib import Path

from steerable.chains.duplicates import SHORT, shingles, similarity, task_key
from steerable.chains.endpoint import Endpoint, Progress
from steerable.chains.gym import slug
from steerable.chains.listed import listed_tasks
from steerable.chains.records import Record
from steerable.store.errors import SteerableError, UsageError

#: What each category is about, as the model is told.
ABOUT: dict[str, str] = {
    "Mathematical Logic": "deriving a result by arithmetic, algebra, counting or formal logic in several steps",
    "Spatial Reasoning": "picturing positions, rotations, folds, routes or cross-sections in the mind",
    "Verbal Logic": "what follows from statements: syllogisms, orderings, truth-tellers and liars, family relations",
    "Pattern Recognition": "finding the rule behind a sequence, a table, a code or a set of examples, and applying it",
    "Lateral Thinking": "a strange but explainable situation whose solution needs an assumption to be given up",
    "Causal Reasoning": "what caused what, what would have happened otherwise, how to tell cause from coincidence",
    "Probabilistic Thinking": "chances, expectations, updating on evidence, decisions under uncertainty",
    "Systems Thinking": "parts that act on each other: feedback, delays, bottlenecks, consequences of consequences",
    "Creative Problem Solving": "inventing a workable plan from limited means under stated constraints",
    "Scientific Reasoning": "hypotheses, experiments and their controls, explanations of observations by known laws",
}

ROUNDS = 8
_BARREN = 3  # rounds without a new task after which the model is given up
_BATCH = 10  # tasks in one reply: more of them resemble each other
_ALIKE = 0.6
_SHOWN = 40  # earlier tasks that a later request names, to be avoided
_WORDS = range(6, 401)


def write_tasks(
    source: str,
    n: int,
    seed: int,
    excluded: Collection[str] = (),
    *,
    endpoint: Endpoint | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """`n` tasks written by a model, in equal shares of the ten categories, which alternate.

    A task is dropped if it is an earlier one in another spelling, or if the two share 60 % of their words and word
    pairs (numbers aside). The model is asked again until there are enough tasks, at most `ROUNDS` times, and not after
    three rounds without a new task. The tasks have no reference answer: like the paper's, they are not judged.

    Args:
        source: `llm:MODEL` or `llm:MODEL@URL`, or `llm` with an `endpoint`.
        n, seed: how many tasks, and the seed of the requests.
        excluded: the first `SHORT` digits of hashes (`task_key`) of tasks to leave out.
        endpoint, cache, progress: the client, a folder for its replies (the same call then gives the same tasks, and a
            killed one continues), and where progress is reported.

    Raises:
        SteerableError: the model does not write enough different tasks.
    """
    endpoint = endpoint or endpoint_of(source)
    quotas = {c: n // len(ABOUT) + (i < n % len(ABOUT)) for i, c in enumerate(ABOUT)}
    tasks: dict[str, list[Record]] = {category: [] for category in ABOUT}
    keys: set[str] = set()
    looks: list[frozenset[str]] = []
    failures: list[str] = []
    barren = rounds = 0
    while rounds < ROUNDS and barren < _BARREN and (asked := _requests(quotas, tasks, rounds)):
        before = len(keys)
        replies = endpoint.complete(
            [[{"role": "user", "content": prompt}] for _, prompt in asked],
            cache=cache,
            temperature=1.0,
            max_tokens=6000,
            seed=[_number(seed, rounds, index) for index in range(len(asked))],
            progress=progress,
        )
        failures += [reply.error for reply in replies if reply.error]
        for (category, _), reply in zip(asked, replies, strict=True):
            for prompt in listed_tasks(reply.text):
                if len(tasks[category]) == quotas[category]:
                    break
                key, look = task_key(prompt), shingles(prompt)
                is_alike = key in keys or any(similarity(look, other) >= _ALIKE for other in looks)
                if is_alike or len(prompt.split()) not in _WORDS or key[:SHORT] in excluded:
                    continue
                keys.add(key)
                looks.append(look)
                name = f"llm-{slug(category)}-{len(tasks[category])}"
                origin = {"category": category, "source": f"llm:{endpoint.model}"}
                tasks[category].append({"id": name, "prompt": prompt, **origin})
        rounds += 1
        barren = barren + 1 if len(keys) == before else 0
    if len(keys) < n:
        short = [f"{c} ({len(tasks[c])} of {quota})" for c, quota in quotas.items() if len(tasks[c]) < quota]
        why = f"; the last failure: {failures[-1]}" if failures else ""
        raise SteerableError(
            f"{endpoint.model} wrote only {len(keys)} different tasks of {n} in {rounds} rounds, too few of "
            f"{', '.join(short)}: ask for fewer, or another model{why}"
        )
    for category, group in tasks.items():
        random.Random(f"{seed}/{category}").shuffle(group)  # later rounds must not all fall into one split
    return [task for turn in zip_longest(*tasks.values()) for task in turn if task is not None]


def endpoint_of(source: str) -> Endpoint:
    """The server that a source of tasks names, `llm:MODEL` or `llm:MODEL@URL`."""
    name = source.partition(":")[2]
    model, at, address = name.rpartition("@http")
    if not (model := model if at else name):
        raise UsageError(f"{source!r} names no model: expected llm:MODEL or llm:MODEL@http://localhost:8000/v1")
    return Endpoint(model, f"http{address}" if at else None)


def _requests(quotas: dict[str, int], tasks: dict[str, list[Record]], round_: int) -> list[tuple[str, str]]:
    """What to ask for now, as (category, prompt)."""
    asked = []
    for category, quota in quotas.items():
        missing = quota - len(tasks[category])
        # Some will be duplicates; each round asks for the more, the more has been refused.
        number = missing + min(_BATCH, 1 + missing // 5 + round_) if missing else 0
        earlier = [task["prompt"] for task in tasks[category]]
        for start in range(0, number, _BATCH):
            asked.append((category, _prompt(category, min(_BATCH, number - start), start // _BATCH, earlier)))
    return asked


#: Settings to draw the scenes from, so that requests of the same round do not all get the model's favourite tasks.
_SCENES = (
    "everyday life at home",
    "a workshop, a factory or a building site",
    "nature, farms and animals",
    "towns, traffic and travel",
    "games, sports and puzzles",
    "a hospital, a laboratory or a school",
    "business, markets and money",
    "history, imagined countries or space",
)


def _prompt(category: str, n: int, part: int, earlier: list[str]) -> str:
    lines = [
        f"Write {n} different tasks that make a person think step by step. Kind of thinking: {category}, that is, "
        f"{ABOUT[category]}.",
        "",
        "Each task must",
        "- be complete in itself: all that is needed stands in it, without pictures, links or tables to look up;",
        "- be answerable by thinking in a few minutes, but not at a glance;",
        "- take one to four sentences and end with what is asked;",
        "- contain neither its answer nor a hint to the method;",
        "- differ from the others in situation and in idea, not in names and numbers alone.",
        "",
        f"Let the scenes come from {_SCENES[part % len(_SCENES)]}, as far as that is natural.",
    ]
    if earlier:
        lines += ["", "These exist already; write nothing that resembles one of them:"]
        lines += [f"- {' '.join(prompt.split())[:160]}" for prompt in earlier[-_SHOWN:]]
    lines += ["", f"Answer with a JSON array of {n} strings, one a task, and nothing else."]
    return "\n".join(lines)


def _number(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1
