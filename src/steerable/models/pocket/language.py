"""The wording of the bundled model's chains, and the exact annotator that knows it.

Every sentence of a training chain is one template of one behaviour with its slots filled. A template is known by
its *shape*: its text with every number replaced by ``#`` and every lone letter by ``@``. No two behaviours share a
shape or an opening, so a sentence tells its behaviour without a judge.
"""

from __future__ import annotations

from collections.abc import Iterator

from steerable.models.grammar import Grammar

# Slots: {p} * {q} = {n} and {s} + {t} = {u} are true facts; {a} and {b} are numbers of the task.
#: The four steerable behaviours and their wordings.
BEHAVIOURS: dict[str, tuple[str, ...]] = {
    "adding-knowledge": (
        "I remember that {p} * {q} = {n}.",
        "I know that {p} * {q} = {n}.",
        "Recall that {p} * {q} = {n}.",
        "Recall that {n} / {p} = {q}.",
        "It is known that {n} / {p} = {q}.",
        "By the times table, {p} * {q} = {n}.",
        "From school I know that {s} + {t} = {u}.",
        "I remember that {s} + {t} = {u}.",
        "Recall that {u} - {s} = {t}.",
        "It is known that multiplying grows numbers fast.",
        "As a rule, even numbers can be halved.",
        "As a rule, a product does not care about order.",
        "From school I know that dividing undoes multiplying.",
        "I remember that subtracting undoes adding.",
        "I know that {n} is a multiple of {p}.",
        "Recall that {n} is a multiple of {q}.",
        "A known fact is that {n} splits into {p} and {q}.",
        "A known fact is that one changes nothing in a product.",
        "By definition a factor divides without a rest.",
        "By definition a prime has only two divisors.",
    ),
    "example-testing": (
        "For example, {p} * {q} = {n}.",
        "For example, {s} + {t} = {u}.",
        "For instance, {u} - {s} = {t}.",
        "For instance, {n} / {p} = {q}.",
        "Let me test it with {a}.",
        "Let me test it with {a} and {b}.",
        "Let me check a case: {p} * {q} = {n}.",
        "Let me check a case: {s} + {t} = {u}.",
        "Test case: {u} - {s} = {t}.",
        "Test case: {n} / {p} = {q}.",
        "Checking with {s} and {t} I get {u}.",
        "Checking with {p} and {q} I get {n}.",
        "To see it, take {a} first.",
        "To see it, take {s} and {t}, which make {u}.",
        "As an example, take {p} times {q}, which is {n}.",
        "As an example, look at {a} next to {b}.",
        "Testing {a} in this place looks fine.",
        "Testing {a} against {b} is quick.",
        "A small trial: {s} + {t} = {u}.",
        "A small trial: {p} * {q} = {n}.",
    ),
    "uncertainty-estimation": (
        "Hmm, I am not sure about this.",
        "Hmm, {a} looks strange here.",
        "I am not certain that {a} helps.",
        "I am not certain about the last step.",
        "Maybe this is wrong.",
        "Maybe {a} is the problem.",
        "Perhaps I missed something.",
        "Perhaps {a} and {b} do not fit together.",
        "I doubt that this leads anywhere.",
        "I doubt that {a} is right.",
        "It is hard to say if {a} belongs here.",
        "It is hard to say what comes next.",
        "I could be mistaken about {a}.",
        "I could be mistaken here.",
        "I wonder if this can be right.",
        "I wonder if {a} matters.",
        "This feels shaky to me.",
        "This feels like a guess.",
        "Is {a} really correct?",
        "Is this really the way?",
    ),
    "backtracking": (
        "Wait, that does not lead anywhere.",
        "Wait, let me go back.",
        "Wait, {a} was a bad choice.",
        "No, back to the start.",
        "No, forget about {a}.",
        "Scrap that idea.",
        "Scrap the part with {a}.",
        "Let me go back and try something else.",
        "Let me go back to {a} and {b}.",
        "Let me start over with {a}.",
        "Let me start over from a new angle.",
        "On second thought, I will change my approach.",
        "On second thought, not {a}.",
        "Actually, another way is better.",
        "Actually, I should leave {a} alone.",
        "I will drop this and take another route.",
        "I will drop {a} for now.",
        "That was a dead end.",
        "Instead, let me turn to {b}.",
        "Instead, let me try a different path.",
    ),
}

# Sentences of the solver itself; every slot is filled by the solver.
INITIALIZING: dict[str, tuple[str, ...]] = {
    "countdown": (
        "Okay, the numbers are {numbers} and the target is {target}.",
        "Okay, I need to make {target} out of {numbers}.",
        "The task is to reach {target} with {numbers}.",
        "We are given {numbers} and want {target}.",
    ),
    "simple_equations": (
        "Okay, the equation is {equation}.",
        "Okay, I need to find {x} in {equation}.",
        "The task is to solve {equation} for {x}.",
        "We are given {equation} and want {x}.",
    ),
    "gcd": (
        "Okay, the numbers are {a} and {b}.",
        "Okay, I need the largest number that divides {a} and {b}.",
        "The task is to find the greatest common divisor of {a} and {b}.",
        "We are given {a} and {b} and want what they share.",
    ),
    "prime_factorization": (
        "Okay, the number is {n}.",
        "Okay, I need to split {n} into primes.",
        "The task is to write {n} as a product of primes.",
        "We are given {n} and want its prime factors.",
    ),
}
INITIALIZING_MORE: dict[str, tuple[str, ...]] = {
    "countdown": (
        "Each number is used once.",
        "All of the numbers must be used.",
        "The goal is a single expression.",
    ),
    "simple_equations": (
        "The goal is a single value.",
        "The unknown is a whole number.",
        "First I will bring it into a simple form.",
    ),
    "gcd": (
        "The goal is the greatest of the common divisors.",
        "First I will look for shared factors.",
        "The goal is one number.",
    ),
    "prime_factorization": (
        "First I will look for small factors.",
        "The goal is a list of primes.",
        "Each factor has to be prime.",
    ),
}
DEDUCTION: dict[str, tuple[str, ...]] = {
    "step": (
        "{l} {o} {r} = {v}.",
        "So {l} {o} {r} = {v}.",
        "Then {l} {o} {r} = {v}.",
        "Next, {l} {o} {r} = {v}.",
    ),
    "start": (
        "Try {l} {o} {r} = {v}.",
        "Start with {l} {o} {r} = {v}.",
        "Take {l} {o} {r} = {v}.",
        "{l} {o} {r} = {v}.",
    ),
    "hit": ("That is {v}, as wanted.", "{v} is the target.", "This reaches {v}."),
    "miss": ("{v} is not {target}.", "That is {v}, not {target}.", "{v} misses {target}."),
    "low": ("{v} is less than {target}.", "That is too small.", "{v} is too low."),
    "high": ("{v} is more than {target}.", "That is too big.", "{v} is too high."),
    "guess": ("Try {x} = {v}.", "Suppose {x} = {v}.", "Set {x} = {v}."),
    "must": ("So {m} times {x} is {d}.", "Then {m} times {x} must be {d}."),
    "equal": ("So {x} = {v}.", "Then {x} = {v}.", "Therefore {x} = {v}."),
    "not_divisor": ("{n} / {p} is not whole.", "{p} does not divide {n}.", "So {p} is no factor of {n}."),
    "try_divisor": ("Try {p}.", "Next, {p}.", "Take {p}."),
    "is_prime": ("{n} is prime.", "So {n} is prime.", "Then {n} cannot be split."),
    "shared": ("So {p} is shared.", "Both can be divided by {p}.", "Then {p} is a common factor."),
    "rest": ("What is left is {a} and {b}.", "So {a} and {b} remain.", "Now {a} and {b} are left."),
    "none_left": ("Nothing more is shared by {a} and {b}.", "So {a} and {b} share nothing else."),
    "answer": ("The answer is {answer}.", "So the answer is {answer}.", "Therefore the answer is {answer}."),
    "quit": ("I will settle for {answer}.", "I will just say {answer}.", "Enough, I go with {answer}."),
}


def templates() -> Iterator[tuple[str, str]]:
    """Every (label, template) of the language."""
    for group in (INITIALIZING, INITIALIZING_MORE):
        for wordings in group.values():
            yield from (("initializing", template) for template in wordings)
    for wordings in DEDUCTION.values():
        yield from (("deduction", template) for template in wordings)
    for label, wordings in BEHAVIOURS.items():
        yield from ((label, template) for template in wordings)


# Every slot stands for one word, and three words tell a template's label.
GRAMMAR = Grammar(templates(), words=3)
annotate = GRAMMAR.annotate
