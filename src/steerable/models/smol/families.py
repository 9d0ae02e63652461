"""The reasoning-gym task families that `smol-think` was taught, in reasoning-gym's own wording."""

from __future__ import annotations

from typing import Any

#: family -> keyword arguments of ``reasoning_gym.create_dataset(family, size=, seed=, **kwargs)``
FAMILIES: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1},
    "leg_counting": {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 5},
    "needle_haystack": {"min_num_statements": 3, "max_num_statements": 5},
    "simple_equations": {
        "min_terms": 2,
        "max_terms": 2,
        "min_value": 1,
        "max_value": 10,
        "operators_weights": [0.5, 0.5, 0.0],
    },
}
