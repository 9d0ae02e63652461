"""saklas: a fitted concept, `<model>.safetensors` with a sidecar `<model>.json`, where it is flat and of two nodes.

Tensors `layer_<i>.mean` [d] and `layer_<i>.basis` [1, d], i a block. The vector of block i is the basis times that
layer's share of `mahalanobis_share_per_layer`, as its own GGUF files have it. A coefficient of saklas is a share of
the way to the pole, bounded by the activation's norm, and not this vector's strength.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported, small_json
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

_TENSOR = re.compile(r"layer_([0-9]{1,4})\.(\w+)")


def _sniff(source: Source) -> bool:
    names = set(source.safetensors[1]) - {"node_coords"}
    return bool(names) and len(names) < len(source.safetensors[1]) and all(map(_TENSOR.fullmatch, names))


def _read(source: Source, options: Options) -> Direction:
    """Raises UsageError for curved concepts and those of more than two nodes."""
    sidecar = small_json(source.path.with_suffix(".json"))
    if sidecar is None:
        raise UsageError(f"it has no {source.path.with_suffix('.json').name} beside it, which holds the layers' shares")
    if (space := sidecar.get("feature_space")) != "raw":
        raise UsageError(f"it was fitted on {str(space)[:40]!r}: only a fit on the residual stream ('raw') is read")
    return imported(
        "saklas",
        checks.unique(_vectors(source.safetensors[1], sidecar.get("mahalanobis_share_per_layer"))),
        "its layers are blocks",
        method=str(checks.plain(sidecar.get("method", "")) or ""),
        behaviour=str(checks.plain(sidecar.get("name", "")) or ""),
        model_id=source.path.stem.replace("__", "/"),
        about={key: checks.plain(sidecar.get(key)) for key in ("node_labels", "saklas_version", "fit_mode")},
    )


def _vectors(tensors: Mapping[str, Tensor], shares: Any) -> Iterator[tuple[Site, Tensor]]:
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match and match[2] == "node_params":
            raise UsageError("it is a curved manifold, along which the direction changes: no vector can stand for it")
        if match is None or match[2] != "basis":
            continue
        if tensor.dim() != 2 or len(tensor) != 1:
            raise UsageError(f"its {name} is {checks.kind_of(tensor)}: only a concept of two nodes is one vector")
        if not isinstance(shares, Mapping) or str(int(match[1])) not in shares:
            raise UsageError(f"its sidecar has no share of layer {int(match[1])} (mahalanobis_share_per_layer)")
        share = checks.number(shares[str(int(match[1]))], f"the share of layer {int(match[1])}")
        v = checks.vector(tensor, name).double() * share
        yield Site("resid_post", int(match[1])), checks.vector(v, f"{name} times its share")


FORMATS = (Format("saklas", _sniff, _read),)
