"""safetensors of other tools: read safely, and steering-lite's layout.

steering-lite: tensors `layer{i}.v` [d], i a block, and metadata {"cfg": JSON with method, layers, coeff, ...}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steerable.formats.foreign import Found, kind_of, layer_number, number, plain, same_width, vector
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import check_header, refuse_stand_in, strict_json

#: Methods of steering-lite that add their vector `v`; the others rotate, ablate or gate.
_ADDITIVE = ("mean_diff", "pca", "random")


def load(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors. Raises UsageError for a file that is not sound."""
    from safetensors import SafetensorError, safe_open

    refuse_stand_in(path)
    try:
        check_header(path)
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise UsageError(f"it is not a sound safetensors file ({str(error)[:120]})") from error


def is_steering_lite(meta: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    return "cfg" in meta or bool(tensors) and all(re.match(r"layer\d+\.|sub::", name) for name in tensors)


def read_steering_lite(meta: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Found:
    """Additive vectors after blocks, with their coefficient as strength. Raises UsageError."""
    cfg = _config(meta)
    method = cfg.get("method")
    if method not in _ADDITIVE:
        raise UsageError(f"its method is {str(method)[:40]!r}: only those that add a vector ({', '.join(_ADDITIVE)})")
    if cfg.get("target", "residual") != "residual" or cfg.get("target_submodule"):
        raise UsageError("its vectors are not for the residual stream: only target 'residual' is read")
    vectors: dict[Site, Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"layer([0-9]{1,4})\.v", name)
        if not match:
            raise UsageError(f"it holds a tensor {name[:60]!r}: expected 'layer<block>.v' only")
        site = Site("resid_post", layer_number(match[1], "a layer"))
        if site in vectors:
            raise UsageError(f"it holds two vectors for layer {site.layer}")
        vectors[site] = vector(tensor, name)
    same_width(vectors)
    return Found(
        format="steering-lite",
        vectors=vectors,
        convention="its layers are blocks",
        method=str(method),
        strength=number(cfg.get("coeff", 1.0), "its coeff"),
        about={"cfg": {str(k)[:40]: plain(v) for k, v in cfg.items()}},
    )


def _config(meta: Mapping[str, str]) -> dict[str, Any]:
    try:
        cfg = strict_json(meta.get("cfg", ""))
    except ValueError as error:
        if "cfg" in meta:
            raise UsageError(f"its metadata 'cfg' is not sound JSON ({error})") from None
        cfg = None
    if not isinstance(cfg, dict):
        raise UsageError(f"its metadata 'cfg' is {kind_of(cfg)}: expected steering-lite's JSON object")
    return cfg


def dumps_steering_lite(vectors: Mapping[int, Tensor], strength: float) -> bytes:
    """A mean_diff file of steering-lite, with the strength as its coeff."""
    from safetensors.torch import save

    cfg = {
        "method": "mean_diff",
        "layers": sorted(vectors),
        "target": "residual",
        "target_submodule": None,
        "coeff": strength,
        "dtype": "float32",
        "seed": 0,
        "normalize": False,
        "subtract_corpus_mean": False,
    }
    tensors = {f"layer{block}.v": v.contiguous() for block, v in sorted(vectors.items())}
    return save(tensors, {"cfg": json.dumps(cfg)})
