"""What every reader and writer of other tools' vector files shares.

A reader gets the file's content and the caller's `Options` and returns `Found`. Nothing about a file is guessed:
where its content does not settle what is meant, `NeedsChoice` names the option that does.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

#: No vector file is larger; what is, is a model or damaged. Bytes.
MAX_BYTES = 2 << 30
#: No model has more blocks; a larger number is damage.
MAX_LAYER = 9999


class NeedsChoice(UsageError):
    """The file is sound, but one thing about it must be said. `option`: which (as a Python argument name)."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass
class Options:
    """What the caller says about a file. `asked` remembers what a reader looked at, so that an option that means
    nothing for a format is refused instead of ignored."""

    format: str | None = None
    layer: int | None = None
    layers_from: int | None = None
    layout: str | None = None
    label: str | None = None
    site: str | None = None
    asked: set[str] = field(default_factory=set)

    def take(self, name: str) -> Any:
        self.asked.add(name)
        return getattr(self, name)

    def refuse_unused(self, format_name: str) -> None:
        """Raises UsageError for an option that was given but that this format has no use for."""
        for name in ("layers_from", "layout", "label", "site"):
            value = getattr(self, name)
            harmless = name == "layers_from" and value == 0  # it says what the format says
            if value is not None and name not in self.asked and not harmless:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value} means nothing for a {format_name} file: leave it out"
                )


@dataclass
class Found:
    """What a reader took from a file.

    convention: one sentence on how the file's layer numbers were read. about: what else the file says (JSON-able).
    """

    format: str
    vectors: dict[Site, Tensor]
    convention: str
    method: str = ""
    model_id: str = ""
    behaviour: str = ""
    strength: float = 1.0
    gate: str = "all"
    about: dict[str, Any] = field(default_factory=dict)


def warn(message: str) -> None:
    warnings.warn(message, SteerableWarning, stacklevel=3)


def vector(value: Any, what: str) -> Tensor:
    """A 1-D float32 copy of a tensor [d] or [1, d]. Raises UsageError for anything else, NaN and infinities too."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise UsageError(f"{what} is {kind_of(value)}: expected a dense tensor [d]")
    if value.dim() == 2 and value.shape[0] == 1:
        value = value[0]
    if value.dim() != 1 or value.numel() == 0:
        raise UsageError(f"{what} has shape {list(value.shape)}: expected [d]")
    if not value.is_floating_point():
        raise UsageError(f"{what} holds {str(value.dtype).removeprefix('torch.')}: expected floating-point numbers")
    taken = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not torch.isfinite(taken).all():
        raise UsageError(f"{what} holds NaN or numbers that float32 cannot hold")
    return taken


def rows(value: Any, what: str) -> Tensor:
    """A tensor [n, d] with n rows, as float32. Raises UsageError."""
    if not isinstance(value, Tensor) or value.dim() != 2 or value.numel() == 0:
        raise UsageError(f"{what} is {kind_of(value)}: expected a tensor [layers, d]")
    return torch.stack([vector(row, f"{what}, row {i},") for i, row in enumerate(value)])


def same_width(vectors: Mapping[Any, Tensor]) -> None:
    """Raises UsageError where vectors differ in width."""
    widths = {int(v.shape[-1]) for v in vectors.values()}
    if len(widths) > 1:
        raise UsageError(f"its vectors differ in width ({', '.join(map(str, sorted(widths)))}): expected one width")


def number(value: Any, what: str) -> float:
    """A finite float. Raises UsageError."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{what} is {kind_of(value)}: expected a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise UsageError(f"{what} is not a finite number")
    return found


def layer_number(value: Any, what: str) -> int:
    """A layer number, from an int or its digits. Raises UsageError."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,4}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_LAYER:
        raise UsageError(f"{what} is {str(value)[:40]!r}: expected a layer number, 0 or more")
    return value


def kind_of(value: Any) -> str:
    """A few words on what a value is, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        keys = ", ".join(repr(k)[:30] for k in list(value)[:4])
        return f"a dict with keys {keys}{', ...' if len(value) > 4 else ''}" if value else "an empty dict"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return (
        f"{type(value).__name__} {str(value)[:30]!r}" if isinstance(value, str | int | float) else type(value).__name__
    )


def plain(value: Any) -> Any:
    """A foreign metadata value as finite JSON: what does not fit becomes a short text."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)[:40]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()[:1000]
    if isinstance(value, Tensor) and value.numel() == 1:
        return plain(value.item())
    if isinstance(value, list | tuple) and len(value) <= 256 and all(isinstance(x, int | float | str) for x in value):
        return [plain(x) for x in value]
    return kind_of(value)


def block_outputs(direction: Direction, to: str, fold_strength: bool) -> tuple[dict[int, Tensor], list[str]]:
    """The vectors as {block: [d]}, added to the output of that block, and the warnings about what `to` cannot hold.

    `resid_pre.k` becomes block k - 1: its output is the same stream. With `fold_strength` the vectors are multiplied
    by the direction's strength. Raises UsageError where the direction is more than additions to the residual stream.
    """
    vectors: dict[int, Tensor] = {}
    for site, v in direction.vectors.items():
        flat = single(v, site, to)
        if site.kind == "resid_post":
            block = site.layer
        elif site.kind == "resid_pre" and site.layer > 0:
            block = site.layer - 1
        else:
            raise UsageError(f"a {to} file holds vectors for the outputs of blocks, none for {site}")
        if block in vectors:
            raise UsageError(f"two vectors of this direction are for the output of block {block}: {to} holds one")
        vectors[block] = flat * direction.strength if fold_strength else flat
    return vectors, about_gate(direction, to)


def single(v: Tensor, site: Site, to: str) -> Tensor:
    """One vector [d] of a direction. Raises UsageError for a subspace [k, d]."""
    if v.dim() == 2 and len(v) == 1:
        v = v[0]
    if v.dim() != 1:
        raise UsageError(f"a {to} file holds one vector a layer, the direction has {len(v)} at {site}")
    return v


def about_gate(direction: Direction, to: str) -> list[str]:
    """Raises UsageError for a map that is no addition; warns of a gate, which no other tool's file holds."""
    if direction.map != "shift":
        raise UsageError(f"a {to} file holds additions: it cannot hold the map {direction.map!r} of this direction")
    if direction.gate == "all":
        return []
    return [f"a {to} file cannot hold the gate {direction.gate!r}: the vectors will be added at every token"]


def about_strength(direction: Direction, to: str, fold_strength: bool, how: str) -> list[str]:
    """A warning for formats that cannot hold a strength, with how to give it there."""
    if fold_strength or direction.strength == 1.0:
        return []
    return [
        f"a {to} file cannot hold the strength {direction.strength:g}: {how}, or multiply it in with --fold-strength"
    ]


def stacked(vectors: Mapping[int, Tensor], n_layers: int | None, to: str) -> tuple[Tensor, list[str]]:
    """Rows for blocks 0 ... n_layers - 1, zeros where there is no vector. Raises UsageError where the number of
    blocks is needed and not known."""
    top = max(vectors) + 1
    if n_layers is None and sorted(vectors) != list(range(top)):
        raise UsageError(
            f"{to} has a row for every block, the direction only some: give --n-layers, the model's number"
        )
    count = n_layers or top
    if count < top or count > MAX_LAYER:
        raise UsageError(f"--n-layers {count} does not fit: the direction has a vector for block {top - 1}")
    table = torch.zeros(count, len(vectors[top - 1]))
    for block, v in vectors.items():
        table[block] = v
    missing = count - len(vectors)
    return table, [f"{missing} of {count} blocks have no vector: their rows are zero"] if missing else []


def layers_text(layers: Iterable[int]) -> str:
    """Layer numbers, runs shortened: "0-3, 7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
