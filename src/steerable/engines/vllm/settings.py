"""How an engine is made ready to steer: what `--additional-config '{"steering": {...}}'` says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from steerable.steering.plain import is_index
from steerable.store.errors import UsageError

KEY = "steering"
"""The key of `additional_config`, and of `SamplingParams.extra_args`."""


@dataclass(frozen=True)
class Settings:
    """Sizes that are fixed when the model is compiled.

    Attributes:
        lanes: additions with different gates or schedules that one request may have; with one gate and schedule any
            number of them is one addition. 0 or more.
        maps: other maps (clip, rotate, affine; rescaled additions), one behind the other at one layer. 0 leaves their
            arithmetic out of the graph.
        rank: rows [k, d] that such a map may have, at most.
        gates: conditions on activations (`when`, `probe`) that a request may have at one layer, up to 8. 0 leaves them
            out of the graph.
        layers: those that can be steered; None: all. Each costs time, whether it is used or not.
        bank: the type in which vectors are kept, "float32" or "bfloat16". They are added in float32.
        directions: the folder of the directions that requests name; empty: requests bring their own vectors.
        code: a hash of this package's code, so that no compiled graph outlives it; written by the plugin.
    """

    lanes: int = 2
    maps: int = 1
    rank: int = 2
    gates: int = 1
    layers: tuple[int, ...] | None = None
    bank: str = "float32"
    directions: str = ""
    code: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name, least in (("lanes", 0), ("maps", 0), ("rank", 1), ("gates", 0)):
            if not is_index(value := getattr(self, name), least):
                raise UsageError(f"{name} of the steering settings is a whole number from {least} on, not {value!r}")
        if self.gates > 8:
            raise UsageError(f"gates of the steering settings is a whole number up to 8, not {self.gates}")
        if self.layers is not None:
            if not isinstance(self.layers, (list, tuple)) or not self.layers or not all(map(is_index, self.layers)):
                raise UsageError(
                    f"layers of the steering settings are a list of layers, like [2, 3], not {self.layers}"
                )
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        if self.bank not in ("float32", "bfloat16"):
            raise UsageError(f"bank of the steering settings is float32 or bfloat16, not {self.bank!r}")
        if not isinstance(self.directions, str) or self.directions and not Path(self.directions).is_dir():
            raise UsageError(f"directions of the steering settings is a folder, and {self.directions!r} is none")

    @property
    def answers(self) -> int:
        """How many answers the conditions of a token can have together."""
        return 1 << self.gates


def settings_of(additional_config: Any) -> Settings | None:
    """What an engine's `additional_config` says; None where steering is not switched on. Raises UsageError."""
    if not isinstance(additional_config, dict) or KEY not in additional_config:
        return None
    given = additional_config[KEY]
    if given is True:
        given = {}
    if not isinstance(given, dict):
        raise UsageError(f'the steering settings are an object, as in {{"steering": {{"lanes": 1}}}}, not {given!r}')
    if unknown := sorted(set(given) - (names := {f.name for f in fields(Settings)})):
        expected = ", ".join(sorted(names - {"code"}))
        raise UsageError(f"unknown key {unknown[0]!r} in the steering settings: expected {expected}")
    return Settings(**given)


def with_sizes(additional_config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """An engine's `additional_config` with these settings, before which go those that it has. Raises UsageError."""
    given = additional_config or {}
    if not isinstance(given, dict) or not isinstance(own := given.get(KEY, {}), dict):
        raise UsageError(f"additional_config is {given!r:.80}: expected a JSON object, with one in it as {KEY!r}")
    return {**given, KEY: {**sizes, **own}}


def switched_on(additional_config: dict[str, Any]) -> dict[str, Any]:
    """The same `additional_config` with the hash of this package's code: vLLM's key of a compiled graph holds all of
    it, and the files of a plugin are no part of that key otherwise."""
    given = additional_config[KEY]
    return {**additional_config, KEY: {**(given if isinstance(given, dict) else {}), "code": code_hash()}}


@cache
def code_hash() -> str:
    """A hash of the files of this package, in all that they could change."""
    content = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(content).hexdigest()[:16]
