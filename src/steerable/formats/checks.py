"""Checks of values that stand in foreign files: each returns what the library works with, or raises UsageError."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from steerable.steering.site import Site
from steerable.store.errors import UsageError

#: No model has more blocks; a larger number is damage.
MAX_LAYER = 9999


def at_blocks(table: Iterable[Tensor], kind: str = "resid_post") -> dict[Site, Tensor]:
    """Row i as the vector of block i."""
    return {Site(kind, block): row for block, row in enumerate(table)}


def unique(pairs: Iterable[tuple[Site, Tensor]]) -> dict[Site, Tensor]:
    """The vectors by site. Raises UsageError for two vectors at one site."""
    vectors: dict[Site, Tensor] = {}
    for site, v in pairs:
        if site in vectors:
            raise UsageError(f"it holds two vectors for {site}")
        vectors[site] = v
    return vectors


def with_strength(vectors: Mapping[Site, Tensor], factors: Mapping[Site, float]) -> tuple[dict[Site, Tensor], float]:
    """The vectors and their common factor as the strength; factors that differ are multiplied in, for strength 1."""
    if len(set(factors.values())) == 1:
        return dict(vectors), next(iter(factors.values()))
    return {site: vector(v * factors[site], f"the vector of {site}") for site, v in vectors.items()}, 1.0


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
    checked = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not torch.isfinite(checked).all():
        raise UsageError(f"{what} holds NaN or numbers that float32 cannot hold")
    return checked


def rows(value: Any, what: str) -> Tensor:
    """A tensor [n, d] with n rows, as float32. Raises UsageError."""
    if not isinstance(value, Tensor) or value.dim() != 2 or value.numel() == 0:
        raise UsageError(f"{what} is {kind_of(value)}: expected a tensor [layers, d]")
    if len(value) > MAX_LAYER:
        raise UsageError(f"{what} has {len(value)} rows: no model has so many blocks")
    return torch.stack([vector(row, f"{what}, row {i},") for i, row in enumerate(value)])


def number(value: Any, what: str) -> float:
    """A finite float. Raises UsageError."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{what} is {kind_of(value)}: expected a number")
    if not abs(value) <= sys.float_info.max:  # an int may be beyond any float, and NaN is in no order
        raise UsageError(f"{what} is not a finite number")
    return float(value)


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
    shown = f" {str(value)[:30]!r}" if isinstance(value, str | int | float) else ""
    return type(value).__name__ + shown


def plain(value: Any) -> Any:
    """A foreign metadata value as finite JSON: what does not fit becomes a short text."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)[:40]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()[:1000]
    if isinstance(value, list | tuple) and len(value) <= 256 and all(isinstance(x, int | float | str) for x in value):
        return [plain(x) for x in value]
    return kind_of(value)
