"""The writer behind the training chains: a solver that tries, fails, doubts, recalls facts and goes back.

Each chain has a writer with hidden traits: a mixture over *moods* (calm, or one of the four steerable behaviours) and a
persistence. A mood is sticky: at each pause it stays with probability ``STICKY``, else it is drawn again from the
writer's own mixture, and unless it is calm the writer utters a burst of sentences of that behaviour. So being in a
behaviour predicts more of it, as in real chains, and there is a direction in the model to find. Back-tracking really
abandons the try at hand; persistence bounds the number of tries, after which the writer gives up with a wrong answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from steerable.models.pocket import language
from steerable.models.pocket.families import LARGEST_NUMBER
from steerable.models.teaching import Moods

MOODS = ("calm", *language.BEHAVIOURS)
_CONCENTRATION = (0.8, 0.35, 0.4, 0.4, 0.55)  # back-tracking shortens what it abandons: give it room
_TRIES = (1, 2, 3, 4, 5, 6, 8)
_TRIES_WEIGHTS = (0.20, 0.20, 0.18, 0.15, 0.12, 0.09, 0.06)
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)


class Writer:
    """One chain in the making: the sentences so far, the mood and the traits."""

    def __init__(self, rng: random.Random, numbers: list[int], part: int = 2):
        self.rng, self.wide = rng, part == 0
        self.numbers = [n for n in dict.fromkeys(numbers) if 0 < n <= LARGEST_NUMBER]
        self.sentences: list[tuple[str, str]] = []
        self.breaks: set[int] = set()
        self.used: set[str] = set()
        self.moods = Moods(rng, MOODS, _CONCENTRATION)
        self.tries_left = rng.choices(_TRIES, _TRIES_WEIGHTS)[0]

    def say(self, label: str, wordings: tuple[str, ...], **slots: Any) -> None:
        self.sentences.append((label, self.rng.choice(wordings).format(**slots)))

    def deduce(self, kind: str, **slots: Any) -> None:
        self.say("deduction", language.DEDUCTION[kind], **slots)

    def paragraph(self) -> None:
        """Start the next sentence in a new paragraph."""
        self.breaks.add(len(self.sentences))

    def note(self, *numbers: int) -> None:
        """Numbers that the writer may speak about from now on."""
        self.numbers = [*dict.fromkeys([*self.numbers[-6:], *(n for n in numbers if 0 < n <= LARGEST_NUMBER)])]

    def pause(self) -> bool:
        """An opportunity for the mood to show. True when the writer went back on what was done so far."""
        if (mood := self.moods.pass_on()) == "calm":
            return False
        for _ in range(self.rng.choice((1, 2, 2, 3))):
            self._utter(mood)
        return mood == "backtracking"

    def _utter(self, label: str) -> None:
        for _ in range(8):  # a writer does not say the same thing twice
            sentence = self.rng.choice(language.BEHAVIOURS[label]).format(**self._facts())
            if sentence not in self.used:
                break
        self.used.add(sentence)
        self.sentences.append((label, sentence))

    def _facts(self) -> dict[str, int]:
        """Slots for a behaviour sentence: true facts about numbers of the task, now and then about any others."""
        rng = self.rng
        a = rng.choice(self.numbers)
        b = rng.choice([n for n in self.numbers if n != a] or [a])
        if self.wide:
            s, t = (a, b) if a + b <= 100 else (rng.randint(1, 50), rng.randint(1, 50))
        else:
            s, t = (a, b) if a + b <= 20 else (rng.randint(1, 10), rng.randint(1, 10))
        if rng.random() < 0.4:  # facts far from the task keep the whole times table alive
            p = rng.choice(_PRIMES) if not self.wide or rng.random() < 0.7 else rng.randint(2, 24)
            q = rng.randint(2, LARGEST_NUMBER // p)
        else:
            p = rng.choice(_PRIMES[:5]) if a > 12 else max(a, 2)
            near = max(a // p, 2) if a > 12 else rng.randint(2, 12)
            q = min(near, LARGEST_NUMBER // p)
        return {"a": a, "b": b, "p": p, "q": q, "n": p * q, "s": s, "t": t, "u": s + t}

    def text(self) -> str:
        parts = []
        for i, (_, sentence) in enumerate(self.sentences):
            parts.append(("\n\n" if i in self.breaks else " ") if i else "")
            parts.append(sentence)
        return "".join(parts)


def write_chain(family: str, entry: dict[str, Any], seed: int, part: int = 2) -> dict[str, Any] | None:
    """Write one chain for a reasoning-gym entry.

    part: of the curriculum in ``recipe.py``. 0: facts and steps of any size, which teach the times table and sums up to
    100; 1: sums up to 20, steps up to 60, no idle division; 2: also steps up to 50, and only the largest is subtracted
    from.

    Returns:
        ``{"thinking", "answer", "labels"}``, or None for an entry that the solver's arithmetic (whole positive
        numbers) cannot solve.
    """
    return _SOLVERS[family](entry["metadata"], random.Random(seed), part)


def _finish(writer: Writer, answer: str, gave_up: bool) -> dict[str, Any]:
    if not gave_up:
        writer.pause()
    writer.deduce("quit" if gave_up else "answer", answer=answer)
    labels = [label for label, _ in writer.sentences]
    return {"thinking": writer.text() + "\n", "answer": answer, "labels": labels}


def _introduce(writer: Writer, family: str, **slots: Any) -> None:
    writer.say("initializing", language.INITIALIZING[family], **slots)
    if writer.rng.random() < 0.7:
        writer.say("initializing", language.INITIALIZING_MORE[family], **slots)
    writer.pause()


# countdown -----------------------------------------------------------------------------------------------------------

Term = tuple[int, str, int]  # value, expression, precedence (1 sum, 2 product, 3 number)
_OPERATORS: dict[str, Callable[[int, int], int | None]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b if a > b else None,
    "*": lambda a, b: a * b if a * b <= 200 else None,
    "/": lambda a, b: a // b if b and a % b == 0 else None,
}


def _combine(left: Term, operator: str, right: Term) -> Term | None:
    value = _OPERATORS[operator](left[0], right[0])
    if value is None:
        return None
    precedence = 1 if operator in "+-" else 2
    # The right side of - and / needs brackets already at equal precedence.
    lhs = left[1] if left[2] >= precedence else f"({left[1]})"
    rhs = right[1] if right[2] > precedence or (right[2] == precedence and operator in "+*") else f"({right[1]})"
    return value, f"{lhs} {operator} {rhs}", precedence


@lru_cache(maxsize=200_000)
def _reachable(pool: tuple[int, ...], target: int) -> bool:
    if len(pool) == 1:
        return pool[0] == target
    for i, a in enumerate(pool):
        for j, b in enumerate(pool):
            if i == j:
                continue
            rest = [pool[k] for k in range(len(pool)) if k not in (i, j)]
            for operate in _OPERATORS.values():
                value = operate(a, b)
                if value is not None and _reachable(tuple(sorted([*rest, value])), target):
                    return True
    return False


def _moves(pool: list[Term]) -> list[tuple[Term, str, Term, Term, list[Term]]]:
    moves = []
    for i, left in enumerate(pool):
        for j, right in enumerate(pool):
            if i == j:
                continue
            for operator in _OPERATORS:
                if operator in "+*" and (left[0], i) < (right[0], j):
                    continue  # sums and products are written largest first
                made = _combine(left, operator, right)
                if made:
                    moves.append((left, operator, right, made, [pool[k] for k in range(len(pool)) if k not in (i, j)]))
    return moves


def _is_easy(move: tuple[Term, str, Term, Term, list[Term]], part: int) -> bool:
    left, operator, right, made, rest = move
    if part == 1:
        return made[0] <= 60
    return made[0] <= 50 and (operator != "-" or left[0] >= max(right[0], *(t[0] for t in rest), 0))


def _countdown(facts: dict[str, Any], rng: random.Random, part: int) -> dict[str, Any] | None:
    numbers, target = facts["numbers"], facts["target"]
    if not _reachable(tuple(sorted(numbers)), target):
        return None
    writer = Writer(rng, [*numbers, target], part)
    listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    _introduce(writer, "countdown", numbers=listed, target=target)
    tried: set[str] = set()
    last = None
    while writer.tries_left > 0:
        writer.tries_left -= 1
        writer.paragraph()
        pool: list[Term] = [(n, str(n), 3) for n in numbers]
        abandoned = False
        while len(pool) > 1:
            moves = _moves(pool)
            fresh = [m for m in moves if m[3][1] not in tried] or moves
            if part > 0:
                fresh = [m for m in fresh if m[1] != "/" and _is_easy(m, part)] or fresh
            good = [m for m in moves if _reachable(tuple(sorted([m[3][0], *(t[0] for t in m[4])])), target)]
            if part > 0:
                good = [m for m in good if _is_easy(m, part)] or good
            sees = len(pool) == 2 or rng.random() < (0.3 if len(pool) == 3 else 0.4)
            left, operator, right, made, rest = rng.choice(good if good and sees else fresh)
            first = len(pool) == len(numbers)
            writer.deduce("start" if first else "step", l=left[0], o=operator, r=right[0], v=made[0])
            if len(numbers) == 3 or not first:
                tried.add(made[1])
            writer.note(made[0])
            pool = [made, *rest]
            if len(pool) > 1 and writer.pause():
                abandoned = True
                break
        if abandoned:
            continue
        last = pool[0]
        if last[0] == target:
            writer.deduce("hit", v=target)
            return _finish(writer, last[1], gave_up=False)
        writer.deduce(rng.choice(("miss", "low" if last[0] < target else "high")), v=last[0], target=target)
        writer.pause()
    if last is None:  # every try was abandoned: name any expression
        pool = [(n, str(n), 3) for n in numbers]
        while len(pool) > 1:
            *_, made, rest = rng.choice(_moves(pool))
            pool = [made, *rest]
        last = pool[0]
    return _finish(writer, last[1], gave_up=True)


# simple equations ----------------------------------------------------------------------------------------------------


def parse_equation(facts: dict[str, Any]) -> tuple[int, int, int]:
    """``(m, b, c)`` of the equation m * x + b = c, signs included."""
    left, right = facts["equation"].split(" = ")
    x, sign, m, b = facts["variable"], 1, 0, 0
    for token in left.split():
        if token in "+-":
            sign = 1 if token == "+" else -1
        elif token.endswith(x):
            head = token[: -len(x)].rstrip("*")
            if head.startswith("-"):
                sign, head = -sign, head[1:]
            m, sign = sign * int(head or 1), 1
        else:
            b, sign = sign * int(token), 1
    return m, b, int(right)


def _simple_equations(facts: dict[str, Any], rng: random.Random, part: int) -> dict[str, Any] | None:
    x = facts["variable"]
    m, b, c = parse_equation(facts)
    if m == 0:
        return None
    d = (c - b) // m * abs(m)  # |m| * x = d
    if d <= 0:
        return None
    solution, m_abs = d // abs(m), abs(m)
    writer = Writer(rng, [abs(m), abs(b), abs(c), d], part)
    _introduce(writer, "simple_equations", equation=facts["equation"], x=x)
    # Bring it to |m| x = d with one true equation between positive numbers.
    if m > 0:
        step = (c, "-", b) if b > 0 else (c, "+", -b) if c >= 0 else (-b, "-", -c)
    else:
        step = (b, "-", c) if c >= 0 else (b, "+", -c)
    writer.paragraph()
    if b:
        writer.deduce("start", l=step[0], o=step[1], r=step[2], v=d)
    writer.deduce("must", m=m_abs, x=x, d=d)
    writer.pause()
    low, high, guess = 0, 13, solution
    tried: set[int] = set()
    while writer.tries_left > 0:
        writer.tries_left -= 1
        writer.paragraph()
        if rng.random() < 0.22:
            writer.deduce("step", l=d, o="/", r=m_abs, v=solution)
            if not writer.pause():
                writer.deduce("equal", x=x, v=solution)
                return _finish(writer, str(solution), gave_up=False)
            continue
        choices = [v for v in range(low + 1, high) if v not in tried] or [solution]
        guess = solution if rng.random() < 0.12 else rng.choice(choices)
        tried.add(guess)
        writer.deduce("guess", x=x, v=guess)
        value = m_abs * guess
        writer.deduce("step", l=m_abs, o="*", r=guess, v=value)
        writer.note(guess, value)
        if value == d:
            writer.deduce("hit", v=d)
            return _finish(writer, str(solution), gave_up=False)
        writer.deduce("low" if value < d else "high", v=value, target=d)
        low, high = (max(low, guess), high) if value < d else (low, min(high, guess))
        writer.pause()
    if guess == solution:  # nothing was tried to the end, or the right value was passed over
        guess = rng.choice([v for v in range(1, 13) if v != solution])
    return _finish(writer, str(guess), gave_up=True)


# greatest common divisor ---------------------------------------------------------------------------------------------


def _gcd(facts: dict[str, Any], rng: random.Random, part: int) -> dict[str, Any] | None:
    a, b = facts["numbers"]
    writer = Writer(rng, [a, b], part)
    _introduce(writer, "gcd", a=a, b=b)
    shared, tried = 1, set[int]()
    left: set[int] = set()  # abandoned half-way: taken up again only when nothing else is there
    tries = writer.tries_left
    while tries > 0:
        writer.paragraph()
        candidates = [p for p in _PRIMES if p <= min(a, b) and p not in tried]
        candidates = [p for p in candidates if p not in left] or candidates
        common = [p for p in candidates if a % p == 0 and b % p == 0]
        if not candidates or (not common and rng.random() < 0.15) or min(a, b) == 1:
            writer.deduce("none_left", a=a, b=b)
            return _answer_gcd(writer, shared, False)
        p = rng.choice(common) if common and rng.random() < 0.35 else rng.choice(candidates[:4])
        writer.note(p)
        writer.deduce("try_divisor", p=p)
        if a % p == 0:
            writer.deduce("step", l=a, o="/", r=p, v=a // p)
            if writer.pause():
                left.add(p)
                tries -= 1
                continue
        if a % p == 0 and b % p == 0:
            writer.deduce("step", l=b, o="/", r=p, v=b // p)
            writer.deduce("shared", p=p)
            if shared > 1:
                writer.deduce("step", l=shared, o="*", r=p, v=shared * p)
            shared, a, b = shared * p, a // p, b // p
            writer.deduce("rest", a=a, b=b)
            writer.note(a, b, shared)
            tried.clear()
            left.clear()
        else:
            writer.deduce("not_divisor", n=b if a % p == 0 else a, p=p)
            tried.add(p)
            tries -= 1
        if writer.pause():
            tries -= 1
    return _answer_gcd(writer, shared, True)


def _answer_gcd(writer: Writer, shared: int, gave_up: bool) -> dict[str, Any]:
    return _finish(writer, str(shared), gave_up)


# prime factorization -------------------------------------------------------------------------------------------------


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % p for p in range(2, int(n**0.5) + 1))


def _prime_factorization(facts: dict[str, Any], rng: random.Random, part: int) -> dict[str, Any] | None:
    rest = facts["number"]
    writer = Writer(rng, [rest], part)
    _introduce(writer, "prime_factorization", n=rest)
    factors: list[int] = []
    tried: set[int] = set()
    left: set[int] = set()
    tries = writer.tries_left
    gave_up = False
    while True:
        writer.paragraph()
        divisors = [p for p in _PRIMES if rest % p == 0 and p < rest]
        candidates = [p for p in _PRIMES if p * p <= rest and p not in tried]
        if rest == 1 or (not divisors and (not candidates or rng.random() < 0.4)):
            if rest > 1:
                writer.deduce("is_prime", n=rest)
            break
        if tries <= 0:
            gave_up = True
            break
        fresh = [p for p in divisors if p not in left]
        if fresh and rng.random() < 0.45:
            p = rng.choice(fresh[:2])
        else:
            p = rng.choice([p for p in candidates if p not in left][:4] or divisors or candidates)
        writer.note(p)
        writer.deduce("try_divisor", p=p)
        if rest % p:
            writer.deduce("not_divisor", n=rest, p=p)
            tried.add(p)
            tries -= 1
            if writer.pause():
                tries -= 1
            continue
        writer.deduce("step", l=rest, o="/", r=p, v=rest // p)
        if writer.pause():
            left.add(p)
            tries -= 1
            continue
        left.clear()
        factors.append(p)
        rest //= p
        writer.note(rest)
    answer = " × ".join(map(str, sorted([*factors, rest] if rest > 1 else factors)))
    return _finish(writer, answer, gave_up and not _is_prime(rest))


_SOLVERS: dict[str, Callable[[dict[str, Any], random.Random, int], dict[str, Any] | None]] = {
    "countdown": _countdown,
    "simple_equations": _simple_equations,
    "gcd": _gcd,
    "prime_factorization": _prime_factorization,
}
