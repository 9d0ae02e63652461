"""Files of `lm-eval --model steered`.

{hookpoint: {"steering_vector": [1, d], "steering_coefficient": x, "action": "add" or "clamp", "bias", "head_index"}} by
`torch.save`, the hookpoint a module of the base model, such as "layers.3".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import HELD, Format, Options, Source, WriteOptions, imported, warn, writer
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.torch_archive import dumps

_BLOCK = r"(?:\w+\.)*(?:layers|h|blocks)\.([0-9]{1,4})"
_SITES = {
    "resid_post": _BLOCK,
    "attn_out": _BLOCK + r"\.(?:self_attn|attn|attention)(?:\.(?:o_proj|c_proj|dense))?",
    "mlp_out": _BLOCK + r"\.mlp(?:\.(?:down_proj|c_proj|dense_4h_to_h))?",
}


def _sniff(source: Source) -> bool:
    content = source.torch
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(v, Mapping) and "steering_vector" in v for v in content.values())
    )


def _read(source: Source, options: Options) -> Direction:
    """Raises UsageError for clamps and heads. Coefficients that differ are multiplied in."""
    vectors: dict[Site, Tensor] = {}
    coefficients: dict[Site, float] = {}
    for hookpoint, entry in source.torch.items():
        site, where = _site(str(hookpoint)), f"hookpoint {str(hookpoint)[:60]!r}"
        if site in vectors:
            raise UsageError(f"it holds two vectors for {site}")
        if (action := entry.get("action")) != "add":
            raise UsageError(f"{where} has the action {str(action)[:20]!r}: only additions can be imported")
        if entry.get("head_index") is not None:
            raise UsageError(f"{where} is for one attention head: only vectors of the whole width can be imported")
        if entry.get("bias") is not None:
            raise UsageError(f"{where} has a bias: lm-eval takes none for additions")
        vectors[site] = checks.vector(entry["steering_vector"], f"the vector of {where}")
        coefficients[site] = checks.number(entry.get("steering_coefficient", 1.0), f"the coefficient of {where}")
    if any(site.kind != "resid_post" for site in vectors):
        warn("a vector for an attention or an MLP adds to what it adds to the stream only where no norm follows it")
    vectors, strength = checks.with_strength(vectors, coefficients)
    about = {"coefficients": {str(site): c for site, c in coefficients.items()}}
    return imported("lm-eval", vectors, "its hookpoints name blocks", strength=strength, about=about)


def _site(hookpoint: str) -> Site:
    for kind, pattern in _SITES.items():
        if match := re.fullmatch(pattern, hookpoint):
            return Site(kind, int(match[1]))
    raise UsageError(f"hookpoint {hookpoint[:60]!r} is not known: expected a block ('layers.3'), its attention or MLP")


def _encode(vectors: dict[int, Tensor], direction: Direction, options: WriteOptions) -> bytes:
    entry = {"steering_coefficient": direction.strength, "action": "add", "bias": None, "head_index": None}
    blocks = {
        f"{options.blocks}.{block}": {"steering_vector": v[None].clone(), **entry} for block, v in vectors.items()
    }
    return dumps(blocks)


FORMATS = (Format("lm-eval", _sniff, _read, writer(_encode), "It holds the outputs of blocks alone.", HELD),)
