"""The name of the cache of keys and values: `past_key_values` in transformers up to 5.23, and `cache` from 5.24 on.

From 5.24 on a model of transformers still takes the old name, but its layers and its output have the new one alone, and
code that came with a checkpoint may know the old one only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from inspect import signature
from typing import Any

NAMES = ("cache", "past_key_values")


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward pass, or in its output; None where there is none.

    `generate_batch` passes something else by the name `cache`: memory in pages that knows of no rows.
    """
    # An output of transformers 5.24 that is asked for the old name warns of it, so it is not asked.
    return next((x for name, x in kwargs.items() if name in NAMES and hasattr(x, "get_seq_length")), None)


def as_argument(model: Any, value: Any) -> dict[str, Any]:
    """The cache as the keyword argument that the model's forward pass has for it."""
    kind: Any = type(model)
    return {_name(kind.forward): value}


@cache
def _name(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in signature(forward).parameters else "past_key_values"
