"""steering-lite: safetensors with `layer{i}.v` [d], i a block, and metadata {"cfg": JSON of method, layers, coeff}."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import HELD, Format, Options, Source, WriteOptions, imported, writer
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import strict_json

#: Its methods that add their vector `v`; the others rotate, ablate or gate.
_ADDITIVE = ("mean_diff", "pca", "random")


def _sniff(source: Source) -> bool:
    meta, tensors = source.safetensors
    return "cfg" in meta or bool(tensors) and all(re.match(r"layer\d+\.|sub::", name) for name in tensors)


def _read(source: Source, options: Options) -> Direction:
    meta, tensors = source.safetensors
    try:
        cfg = strict_json(meta.get("cfg", "null"))
    except ValueError as error:
        raise UsageError(f"its metadata 'cfg' is not sound JSON ({error})") from None
    if not isinstance(cfg, dict):
        raise UsageError(f"its metadata 'cfg' is {checks.kind_of(cfg)}: expected steering-lite's JSON object")
    method = cfg.get("method")
    if method not in _ADDITIVE:
        raise UsageError(f"its method is {str(method)[:40]!r}: only those that add a vector ({', '.join(_ADDITIVE)})")
    if cfg.get("target", "residual") != "residual" or cfg.get("target_submodule"):
        raise UsageError("its vectors are not for the residual stream: only target 'residual' is read")
    return imported(
        "steering-lite",
        checks.unique(_vectors(tensors)),
        "its layers are blocks",
        method=str(method),
        strength=checks.number(cfg.get("coeff", 1.0), "its coeff"),
        about={"cfg": {str(k)[:40]: checks.plain(v) for k, v in cfg.items()}},
    )


def _vectors(tensors: dict[str, Tensor]) -> Iterator[tuple[Site, Tensor]]:
    for name, tensor in tensors.items():
        match = re.fullmatch(r"layer([0-9]{1,4})\.v", name)
        if not match:
            raise UsageError(f"it holds a tensor {name[:60]!r}: expected 'layer<block>.v' only")
        yield Site("resid_post", checks.layer_number(match[1], "a layer")), checks.vector(tensor, name)


def _encode(vectors: dict[int, Tensor], direction: Direction, options: WriteOptions) -> bytes:
    from safetensors.torch import save

    cfg = {
        "method": "mean_diff",
        "layers": list(vectors),
        "target": "residual",
        "target_submodule": None,
        "coeff": direction.strength,
        "dtype": "float32",
        "seed": 0,
        "normalize": False,
        "subtract_corpus_mean": False,
    }
    return save({f"layer{block}.v": v.contiguous() for block, v in vectors.items()}, {"cfg": json.dumps(cfg)})


FORMATS = (Format("steering-lite", _sniff, _read, writer(_encode), "It holds the outputs of blocks alone.", HELD),)
