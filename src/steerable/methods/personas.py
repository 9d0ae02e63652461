"""Pairs of prompts that ask for two kinds of person, for a direction between them."""

from __future__ import annotations

from itertools import islice, product
from typing import Any

from steerable.chains.everyday import QUESTIONS
from steerable.steering.think import render
from steerable.store.errors import UsageError

Chat = list[dict[str, str]]

TEMPLATES = (
    "You are a very {} person.",
    "Answer as a very {} person would.",
    "Write like somebody who is always {}.",
)
MOST = len(TEMPLATES) * len(QUESTIONS)


def persona_pairs(tokenizer: Any, persona: str, opposite: str, prompts: int) -> tuple[list[Chat], list[Chat]]:
    """As many everyday questions, each asked twice: of a `persona` and of an `opposite` person.

    The person is described in a system message, or, where the chat template has no place for one, before the question.
    Raises UsageError as `check_persona`, and for a tokenizer without a chat template.
    """
    check_persona(persona, opposite, prompts)
    separate = _takes_system(tokenizer)

    def chat(template: str, question: str, person: str) -> Chat:
        text = template.format(person.strip())
        if separate:
            return [{"role": "system", "content": text}, {"role": "user", "content": question}]
        return [{"role": "user", "content": f"{text} {question}"}]

    asked = list(islice(product(TEMPLATES, QUESTIONS), prompts))
    return [chat(*a, persona) for a in asked], [chat(*a, opposite) for a in asked]


def check_persona(persona: str, opposite: str, prompts: int) -> None:
    """Raises UsageError for two persons that are the same, and for a number of prompts that there is not."""
    if not persona.strip() or not opposite.strip() or persona.strip() == opposite.strip():
        raise UsageError(f"two kinds of person are needed, as happy and sad, not {persona!r} and {opposite!r}")
    if not 1 <= prompts <= MOST:
        raise UsageError(f"{prompts} prompts are asked for: expected 1 to {MOST}")


def _takes_system(tokenizer: Any) -> bool:
    """Whether a system message reaches the prompt: some templates refuse it, and some leave it out."""
    mark = "You are somebody."
    plain = render(tokenizer, "Hello")
    try:
        return mark in render(tokenizer, "Hello", system=mark) and mark not in plain
    except UsageError:
        return False
