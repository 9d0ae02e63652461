"""Folders of EasyEdit2: `layer_{i}.pt` [d], and variants `layer_{i}_{variant}.pt` (merged, trimmed)."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from ..errors import UsageError
from ..sites import Site
from .foreign import MAX_BYTES, Found, NeedsChoice, Options, same_width, vector
from .torch_files import load

_NAME = re.compile(r"layer_([0-9]{1,4})(?:_(.+))?\.pt")


def is_folder(folder: Path) -> bool:
    return any(_NAME.fullmatch(path.name) for path in folder.glob("layer_*.pt"))


def read(folder: Path, options: Options) -> Found:
    """One vector a block. Raises UsageError, NeedsChoice where there are several variants."""
    groups: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("layer_*.pt")):
        if match := _NAME.fullmatch(path.name):
            layers = groups.setdefault(match[2] or "plain", {})
            if int(match[1]) in layers:
                raise UsageError(f"it holds two files for layer {int(match[1])}")
            layers[int(match[1])] = path
    if not groups:
        raise UsageError("it holds no layer_<i>.pt: expected a folder of EasyEdit2")
    variant = options.take("label") or (next(iter(groups)) if len(groups) == 1 else None)
    if variant is None:
        raise NeedsChoice("label", f"it holds several variants: give --label, one of {', '.join(sorted(groups))}")
    if variant not in groups:
        raise UsageError(f"it has no variant {variant!r}: expected one of {', '.join(sorted(groups))}")
    vectors = {Site("resid_post", i): _load(path) for i, path in groups[variant].items()}
    same_width(vectors)
    return Found("easyedit", vectors, "the numbers in its file names are blocks", about={"variant": variant})


def _load(path: Path) -> Tensor:
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"its {path.name} is too large for a vector")
    found = load(path.read_bytes())
    if isinstance(found, Tensor) and found.dim() == 2 and len(found) > 1:
        raise UsageError(f"its {path.name} holds {len(found)} concepts: save the row of one as layer_<i>.pt [d]")
    return vector(found, f"the vector in {path.name}")
