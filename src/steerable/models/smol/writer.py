"""The writer behind the chains of `smol-think`: a solver that tries, doubts, recalls, tests, goes back and errs.

Each chain has a writer with hidden traits, as in the bundled model's solver: a mixture over moods that stick, a
persistence, and a *carelessness*, by which a careless writer now and then skips a part of the task. So errors are a
matter of chance, which sampling shows and training can change, and going back over what was done can mend them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from steerable.models.grammar import choose
from steerable.models.pocket.solver import parse_equation
from steerable.models.smol import language
from steerable.models.teaching import Moods

MOODS = ("calm", *language.BEHAVIOURS)
_CONCENTRATION = (0.9, 0.4, 0.4, 0.4, 0.5)
_TRIES, _TRIES_WEIGHTS = (1, 2, 3, 4, 6), (0.22, 0.28, 0.22, 0.16, 0.12)
CARELESS = 0.35  # of the writers
SLIP = 0.6  # of a careless writer's tries


class Writer:
    """One chain in the making: the sentences so far, the mood, the traits, and what the task gives to speak about."""

    def __init__(self, rng: random.Random, things: Sequence[str], facts: Sequence[str], rules: Sequence[str]):
        self.rng, self.things, self.facts, self.rules = rng, list(things), list(facts), list(rules)
        self.sentences: list[tuple[str, str]] = []
        self.breaks: set[int] = set()
        self.used: set[str] = set()
        self.moods = Moods(rng, MOODS, _CONCENTRATION)
        self.tries = rng.choices(_TRIES, _TRIES_WEIGHTS)[0]
        self.careless = rng.random() < CARELESS

    def say(self, label: str, wordings: Sequence[str], **slots: Any) -> None:
        self.sentences.append((label, choose(self.rng.choice(wordings), self.rng).format(**slots)))

    def deduce(self, kind: str, **slots: Any) -> None:
        self.say("deduction", language.DEDUCTION[kind], **slots)

    def introduce(self, family: str, **slots: Any) -> None:
        self.say("initializing", language.INITIALIZING[family], **slots)
        if self.rng.random() < 0.5:
            self.say("initializing", language.INITIALIZING_MORE[family], **slots)
        self.pause()

    def begin(self) -> bool:
        """A new try in a paragraph of its own; False where the writer has no more patience."""
        self.tries -= 1
        self.breaks.add(len(self.sentences))
        return self.tries >= 0

    def slips(self) -> bool:
        return self.careless and self.rng.random() < SLIP

    def pause(self) -> bool:
        """An opportunity for the mood to show. True when the writer went back on what was done so far."""
        if (mood := self.moods.pass_on()) == "calm":
            return False
        for _ in range(self.rng.choice((1, 1, 2, 2, 3))):
            self._utter(mood)
        return mood == "backtracking"

    def _utter(self, label: str) -> None:
        for _ in range(8):  # a writer does not say the same thing twice
            thing, *others = self.rng.sample(self.things, min(2, len(self.things)))
            slots = {"thing": thing, "other": (others or [thing])[0], "rule": self.rng.choice(self.rules)}
            wording = choose(self.rng.choice(language.BEHAVIOURS[label]), self.rng)
            sentence = wording.format(fact=self.rng.choice(self.facts), **slots)
            if sentence not in self.used:
                break
        self.used.add(sentence)
        self.sentences.append((label, sentence))

    def close(self, answer: str, gave_up: bool = False) -> dict[str, Any]:
        if not gave_up:
            self.pause()
        self.deduce("quit" if gave_up else "answer", answer=answer)
        text = "".join(
            (("\n\n" if i in self.breaks else " ") if i else "") + s for i, (_, s) in enumerate(self.sentences)
        )
        return {"thinking": text + "\n", "answer": answer, "labels": [label for label, _ in self.sentences]}


def write_chain(family: str, entry: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """Write one chain for a reasoning-gym entry.

    Returns:
        ``{"thinking", "answer", "labels"}``, or None for an entry that the writer's arithmetic cannot solve.
    """
    return _SOLVERS[family](entry, random.Random(seed))


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else parts[0]


def _sum(left: int, operator: str, right: int) -> int:
    return left + right if operator == "+" else left - right


def _chain_sum(entry: dict[str, Any], rng: random.Random) -> dict[str, Any] | None:
    first, *rest = re.findall(r"([+-]?) ?(\d+)", entry["metadata"]["expression"])
    terms = [(operator, int(number)) for operator, number in rest]
    start = int(first[1])
    numbers = [start, *(n for _, n in terms)]
    pairs = [(a, b) for a in numbers for b in numbers if a >= b]
    facts = [f"{a} + {b} = {a + b}" for a, b in pairs] + [f"{a} - {b} = {a - b}" for a, b in pairs]
    rules = (
        "adding zero changes nothing",
        "a minus takes away",
        "subtracting undoes adding",
        "sums are worked out from left to right",
        "taking away more than there is goes below zero",
    )
    writer = Writer(rng, [f"the {n}" for n in dict.fromkeys(numbers)], list(dict.fromkeys(facts)), rules)
    writer.introduce("chain_sum", task=entry["metadata"]["expression"], n=len(numbers))
    value = start
    while writer.begin():
        steps = list(terms)
        if writer.slips():
            del steps[rng.randrange(len(steps))]
        value, abandoned = start, False
        for i, (operator, number) in enumerate(steps):
            made = _sum(value, operator, number)
            kind = "step" if i else "start"
            writer.deduce(kind, first=f"the {start}", l=value, o=operator, r=number, v=made)
            writer.facts.append(f"{value} {operator} {number} = {made}")
            value = made
            if (abandoned := writer.pause()) and i < len(steps) - 1:
                break
        if abandoned:
            continue
        writer.deduce("total", v=value)
        if not writer.pause():
            return writer.close(str(value))
    return writer.close(str(value), gave_up=True)


def _leg_counting(entry: dict[str, Any], rng: random.Random) -> dict[str, Any] | None:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    animals: dict[str, int] = entry["metadata"]["animals"]
    asked = {f"{n} {name}{'s' if n > 1 else ''}": (name, n, ANIMALS[name]) for name, n in animals.items()}
    facts = [f"the {name} has {legs} legs" for name, _, legs in asked.values()]
    facts += [f"{n} * {legs} = {n * legs}" for _, n, legs in asked.values()]
    rules = (
        "birds walk on two legs",
        "insects have six legs",
        "spiders have eight legs",
        "snakes and worms have no legs",
        "most mammals have four legs",
        "crabs and their kin have ten legs",
    )
    writer = Writer(rng, [f"the {name}" for name, _, _ in asked.values()], facts, rules)
    writer.introduce("leg_counting", task=_listed(list(asked)), n=len(asked))
    total = 0
    while writer.begin():
        order = list(asked.values())
        if rng.random() < 0.3:
            rng.shuffle(order)
        if writer.slips():
            del order[rng.randrange(len(order))]
        total, abandoned = 0, False
        for i, (name, n, legs) in enumerate(order):
            writer.deduce("each", animal=name, each=legs)
            if n > 1:
                writer.deduce("legs", count=n, each=legs, animals=f"{name}s", v=n * legs)
            else:
                writer.deduce("legs_of_one", animals=name, v=legs)
            if i:
                writer.deduce("step", l=total, o="+", r=n * legs, v=total + n * legs)
            total += n * legs
            if (abandoned := writer.pause()) and i < len(order) - 1:
                break
        if abandoned:
            continue
        writer.deduce("total", v=total)
        if not writer.pause():
            return writer.close(str(total))
    return writer.close(str(total), gave_up=True)


def _needle_haystack(entry: dict[str, Any], rng: random.Random) -> dict[str, Any] | None:
    text, _, question = entry["question"].partition("\n")
    people = [statement.split(" ", 1) for statement in text.strip(" .").split(". ")]
    asked = question.removeprefix("Who ").partition("?")[0]
    if any(len(person) != 2 for person in people) or len({name for name, _ in people}) < len(people):
        return None
    rules = (
        "the one who is asked for does exactly that",
        "only one person fits",
        "every sentence begins with a name",
        "the wording must be the same",
    )
    names = [name for name, _ in people]
    writer = Writer(rng, names, [f"{name} {does}" for name, does in people], rules)
    writer.introduce("needle_haystack", task=asked, n=len(people))
    name = rng.choice(names)
    while writer.begin():
        order = people if rng.random() < 0.7 else rng.sample(people, len(people))
        hasty, abandoned = writer.slips(), False
        for name, does in order:
            writer.deduce("read", name=name, does=does)
            if does == asked or (hasty and rng.random() < 0.5):
                writer.deduce("match", name=name)
                if not writer.pause():
                    return writer.close(name)
                break
            writer.deduce("no_match", name=name)
            if abandoned := writer.pause():
                break
        if abandoned:
            name = rng.choice(names)
    return writer.close(name, gave_up=True)


def _simple_equations(entry: dict[str, Any], rng: random.Random) -> dict[str, Any] | None:
    x, equation = entry["metadata"]["variable"], entry["metadata"]["equation"]
    m, b, c = parse_equation(entry["metadata"])
    d = abs(c - b)  # |m| x = d
    if m == 0 or d == 0 or (c - b) // m <= 0:
        return None
    # One true equation between positive numbers that brings it to |m| x = d.
    if m > 0:
        step = (c, "-", b) if b > 0 else (c, "+", -b) if c >= 0 else (-b, "-", -c)
    else:
        step = (b, "-", c) if c >= 0 else (b, "+", -c)
    m, solution = abs(m), d // abs(m)
    numbers = list(dict.fromkeys([m, abs(b), abs(c), d]))
    facts = [f"{m} * {k} = {m * k}" for k in sorted({1, 2, 5, 10, solution})] + [f"{d} - {m} = {d - m}"]
    rules = (
        "subtracting undoes adding",
        "dividing undoes multiplying",
        "both sides stay equal",
        "a bigger factor makes a bigger product",
        "what is done to one side is done to the other",
    )
    writer = Writer(rng, [f"the {n}" for n in numbers], facts, rules)
    writer.introduce("simple_equations", task=equation, x=x)
    writer.breaks.add(len(writer.sentences))
    if b:
        writer.deduce("start", first=f"the {step[0]}", l=step[0], o=step[1], r=step[2], v=d)
    if m == 1:
        writer.pause()
        answer = solution
        if writer.slips():
            answer = rng.choice([v for v in (abs(c), abs(b), solution + 1, solution - 1) if v != solution])
        writer.deduce("equal", x=x, v=answer)
        return writer.close(str(answer))
    writer.deduce("must", m=m, x=x, d=d)
    writer.pause()
    low, high, guess = 0, 13, 0
    tried: set[int] = set()
    while writer.begin():
        choices = [v for v in range(low + 1, high) if v not in tried] or [solution]
        near = [v for v in choices if abs(v - solution) <= 2]
        guess = solution if rng.random() < 0.35 else rng.choice(near or choices)
        tried.add(guess)
        value = m * guess
        writer.deduce("guess", x=x, v=guess)
        writer.deduce("step", l=m, o="*", r=guess, v=value)
        if value == d:
            writer.deduce("hit", v=d)
            writer.deduce("equal", x=x, v=guess)
            return writer.close(str(guess))
        writer.deduce("low" if value < d else "high", v=value, target=d)
        low, high = (max(low, guess), high) if value < d else (low, min(high, guess))
        writer.pause()
    return writer.close(str(guess or rng.randint(1, 12)), gave_up=True)


_SOLVERS: dict[str, Callable[[dict[str, Any], random.Random], dict[str, Any] | None]] = {
    "chain_sum": _chain_sum,
    "leg_counting": _leg_counting,
    "needle_haystack": _needle_haystack,
    "simple_equations": _simple_equations,
}
