"""Presets: steerings that are models to a client, so that whoever can choose a model can steer.

Every direction of the folder is one, "pocket:happy", at its own strength; others are given as texts, "pocket:merry" for
"0.5 happy@thinking - 0.2 verbose".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerable.engines.vllm.folder import Folder
from steerable.store.errors import UsageError

VARIABLE = "STEERABLE_PRESETS"
"""The environment variable that hands presets to the processes of a server, as JSON."""


def parse_presets(given: Iterable[str]) -> dict[str, str]:
    """Presets from "NAME=STEERING". Raises UsageError."""
    presets = {}
    for text in given:
        name, equals, steering = text.partition("=")
        if not equals or not name.strip() or not steering.strip() or ":" in name:
            raise UsageError(f"--preset is {text!r}: expected a name and a steering, like 'merry=0.5 happy@thinking'")
        presets[name.strip()] = steering.strip()
    return presets


@dataclass(frozen=True)
class Presets:
    """The steering that a model's name stands for.

    bases: the names that vLLM serves its model by. is_adapter: whether vLLM knows an adapter by a name.
    """

    folder: Folder
    given: Mapping[str, str]
    bases: Sequence[str]
    is_adapter: Callable[[str], bool] = lambda name: False

    def names(self) -> list[str]:
        """What may stand behind the colon."""
        return sorted({*self.folder.names(), *self.given})

    def steering(self, model: str | None) -> str | None:
        """The text of the steering; None for a model's own name, and for one that vLLM has to answer for. Raises
        UsageError for a preset that is not, or no longer, there."""
        if not model or model in self.bases or self.is_adapter(model):
            return None
        base, colon, name = model.rpartition(":")
        if not colon or base not in self.bases:
            return None
        if name not in self.names():
            there = ", ".join(self.names()) or "none"
            raise UsageError(f"the model {base!r} has no steering {name!r}: there are {there}")
        return self.given.get(name, json.dumps(name))


class Models(list[Any]):
    """vLLM's list of the names of the model that it serves, and behind them the presets of the moment."""

    def __init__(self, paths: Iterable[Any], presets: Presets) -> None:
        super().__init__(paths)
        self.presets = presets

    def __iter__(self) -> Iterator[Any]:
        base = list(super().__iter__())
        yield from base
        for path in base:
            for name in self.presets.names():
                yield type(path)(name=f"{path.name}:{name}", model_path=path.model_path)
