"""Folders of EasyEdit2: `layer_{i}.pt` [d], and variants `layer_{i}_{variant}.pt` (merged, trimmed)."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported
from steerable.formats.rotalabs import is_rotalabs
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

_NAME = re.compile(r"layer_([0-9]{1,4})(?:_(.+))?\.pt")


def _sniff(source: Source) -> bool:
    return (
        not is_rotalabs(source)
        and source.kind == "folder"
        and any(_NAME.fullmatch(path.name) for path in source.path.glob("layer_*.pt"))
    )


def _read(source: Source, options: Options) -> Direction:
    """One vector a block. Raises NeedsChoice where there are several variants."""
    variants: dict[str, dict[int, Path]] = {}
    for path in sorted(source.path.glob("layer_*.pt")):
        if match := _NAME.fullmatch(path.name):
            layers = variants.setdefault(match[2] or "plain", {})
            if int(match[1]) in layers:
                raise UsageError(f"it holds two files for layer {int(match[1])}")
            layers[int(match[1])] = path
    paths = [path for layers in variants.values() for path in layers.values()]
    variant = options.choose(sorted(variants), "variant", lambda: [_vector(path) for path in paths])
    vectors = {Site("resid_post", i): _vector(path) for i, path in variants[variant].items()}
    return imported("easyedit", vectors, "the numbers in its file names are blocks", about={"variant": variant})


def _vector(path: Path) -> Tensor:
    content = Source(path).torch
    if isinstance(content, Tensor) and content.dim() == 2 and len(content) > 1:
        raise UsageError(f"its {path.name} holds {len(content)} concepts: save the row of one as layer_<i>.pt [d]")
    return checks.vector(content, f"the vector in {path.name}")


FORMATS = (Format("easyedit", _sniff, _read),)
