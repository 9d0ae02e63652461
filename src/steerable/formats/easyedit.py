"""Folders of EasyEdit2: `layer_{i}.pt` [d], and variants `layer_{i}_{variant}.pt` (merged, trimmed). And of
rotalabs-steer, which has the same files and a `metadata.json` {"behavior", "layers", "model_name"}."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from steerable.formats.foreign import MAX_BYTES, Found, NeedsChoice, Options, plain, same_width, vector
from steerable.formats.torch_files import load
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import refuse_stand_in, strict_json

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
        for path in (path for layers in groups.values() for path in layers.values()):
            _load(path)  # raises for an unsound one before anything is asked
        raise NeedsChoice("label", f"it holds several variants: give --label, one of {', '.join(sorted(groups))}")
    if variant not in groups:
        raise UsageError(f"it has no variant {variant!r}: expected one of {', '.join(sorted(groups))}")
    vectors = {Site("resid_post", i): _load(path) for i, path in groups[variant].items()}
    same_width(vectors)
    convention = "the numbers in its file names are blocks"
    if (about := _rotalabs(folder)) is None:
        return Found("easyedit", vectors, convention, about={"variant": variant})
    behaviour, model = (str(plain(about[key]) or "") for key in ("behavior", "model_name"))
    return Found("rotalabs", vectors, convention, behaviour=behaviour, model_id=model)


def _rotalabs(folder: Path) -> dict[str, Any] | None:
    """The metadata of a folder of rotalabs-steer, None for any other."""
    path = folder / "metadata.json"
    try:
        found = strict_json(path.read_bytes()) if path.is_file() and path.stat().st_size <= 1 << 20 else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"behavior", "model_name"} <= set(found) else None


def _load(path: Path) -> Tensor:
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"its {path.name} is too large for a vector")
    refuse_stand_in(path)
    found = load(path.read_bytes())
    if isinstance(found, Tensor) and found.dim() == 2 and len(found) > 1:
        raise UsageError(f"its {path.name} holds {len(found)} concepts: save the row of one as layer_<i>.pt [d]")
    return vector(found, f"the vector in {path.name}")
