"""The reasoning-gym task families that the bundled model answers, in reasoning-gym's own wording.

A task is *held out* when the hash of its question is even: training draws only from the other half, and
extraction, evaluation and measurement draw only from this half, so that no seed can mix them.
"""

from __future__ import annotations

import hashlib
from typing import Any

#: family -> keyword arguments of ``reasoning_gym.create_dataset(family, size=, seed=, **kwargs)``
FAMILIES: dict[str, dict[str, Any]] = {
    "countdown": {
        "min_numbers": 3,
        "max_numbers": 4,
        "min_value": 1,
        "max_value": 10,
        "min_target": 5,
        "max_target": 50,
    },
    "simple_equations": {
        "min_terms": 2,
        "max_terms": 2,
        "min_value": 1,
        "max_value": 10,
        "operators_weights": [0.5, 0.5, 0.0],
    },
    "gcd": {"min_value": 2, "max_value": 60},
    "prime_factorization": {"min_value": 4, "max_value": 600},
}

#: Every number that a chain may hold; each is one token.
LARGEST_NUMBER = 600


def held_out(question: str) -> bool:
    """Whether a question belongs to the half that training never sees."""
    return hashlib.sha256(question.encode()).digest()[0] % 2 == 0
