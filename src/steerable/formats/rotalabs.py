"""rotalabs-steer: `<name>.pt` [d] with a `<name>.json` {"behavior", "layer_index", "model_name", ...} beside it, and a
set of them, `layer_<i>.pt`, in a folder with `metadata.json` {"behavior", "layers", "model_name"}. The index is the
block whose output was read; the vector is the raw difference of means.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported, small_json
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

_SET, _ONE = {"behavior", "layers", "model_name"}, {"behavior", "layer_index", "model_name"}
_NAME = re.compile(r"layer_([0-9]{1,4})\.pt")


def _json(path: Path, keys: set[str]) -> dict[str, Any]:
    """The JSON object in a file; empty where it has not these keys."""
    value = small_json(path) or {}
    return value if keys <= set(value) else {}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("layer_*.pt")) if _NAME.fullmatch(path.name)]


def is_rotalabs(source: Source) -> bool:
    """Whether a file of a vector, or a folder of them, is of this tool: EasyEdit2's have the same names."""
    if source.kind == "folder":
        return bool(files := _files(source.path)) and bool(
            _json(source.path / "metadata.json", _SET) or _json(files[0].with_suffix(".json"), _ONE)
        )
    return isinstance(source.torch, Tensor) and bool(_json(source.path.with_suffix(".json"), _ONE))


def _read(source: Source, options: Options) -> Direction:
    """Raises UsageError where a layer that the folder's metadata name has no file."""
    files = _files(source.path) if source.kind == "folder" else [source.path]
    one = _json(files[0].with_suffix(".json"), _ONE)
    about = (_json(source.path / "metadata.json", _SET) if source.kind == "folder" else {}) or one
    vectors = checks.unique((_site(path), _vector(path)) for path in files)
    layers = about.get("layers")
    if missing := set(layers if isinstance(layers, list) else ()) - {site.layer for site in vectors}:
        raise UsageError(f"its metadata.json names layer {min(missing)}, of which it has no file")
    return imported(
        "rotalabs",
        vectors,
        "its layer_index is the block",
        method=str(checks.plain(one.get("extraction_method", "")) or ""),
        behaviour=str(checks.plain(about["behavior"]) or ""),
        model_id=str(checks.plain(about["model_name"]) or ""),
    )


def _site(path: Path) -> Site:
    one, match = _json(path.with_suffix(".json"), _ONE), _NAME.fullmatch(path.name)
    return Site(
        "resid_post", checks.layer_number(one.get("layer_index", match and match[1]), f"the layer of {path.name}")
    )


def _vector(path: Path) -> Tensor:
    return checks.vector(Source(path).torch, f"the vector in {path.name}")


FORMATS = (Format("rotalabs", is_rotalabs, _read),)
