"""`.svec`: the JSON of IBM/activation-steering (CAST) and AISteer360.

{"model_type", "directions": {"<block>": [...] or [[...]]}, "explained_variances": {"<block>": x}, ...}; layers are
0-based block outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steerable.formats.foreign import Found, kind_of, layer_number, number, plain, same_width, vector
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import strict_json


def load(data: bytes) -> Any:
    """JSON without NaN, infinities and doubled keys. Raises UsageError."""
    try:
        return strict_json(data.decode("utf-8-sig"))
    except ValueError as error:  # decoding errors are ValueErrors
        raise UsageError(f"it is not sound JSON ({str(error)[:80]})") from None


def read(found: Any) -> Found:
    """Raises UsageError for per-head, positional and plane directions, which are no single vectors."""
    if not isinstance(found, Mapping) or not isinstance(found.get("directions"), Mapping) or not found["directions"]:
        raise UsageError(f"it holds {kind_of(found)}: expected the keys 'model_type' and 'directions' of a .svec")
    if found.get("num_heads") is not None or found.get("head_dim") is not None:
        raise UsageError("it holds directions of attention heads (ITI): only vectors of the residual stream are read")
    vectors: dict[Site, Tensor] = {}
    for key, numbers in found["directions"].items():
        site = Site("resid_post", layer_number(key, "a key of 'directions'"))
        if site in vectors:
            raise UsageError(f"it holds two directions for layer {site.layer}")
        vectors[site] = _vector(numbers, f"the direction of layer {key}")
    same_width(vectors)
    return Found(
        format="svec",
        vectors=vectors,
        convention="its keys are blocks",
        about={
            "model_type": plain(found.get("model_type", "")),
            "explained_variances": _variances(found.get("explained_variances")),
        },
    )


def _vector(numbers: Any, what: str) -> Tensor:
    if isinstance(numbers, list) and numbers and all(isinstance(x, list) for x in numbers):
        if len(numbers) > 1:
            raise UsageError(f"{what} has {len(numbers)} vectors (one a position, or a plane): expected one")
        numbers = numbers[0]
    if not isinstance(numbers, list) or not numbers:
        raise UsageError(f"{what} is {kind_of(numbers)}: expected a list of numbers")
    return vector(torch.tensor([number(x, f"a number in {what}") for x in numbers], dtype=torch.float64), what)


def _variances(found: Any) -> dict[str, float]:
    if not isinstance(found, Mapping):
        return {}
    return {str(k)[:20]: number(v, "an explained variance") for k, v in found.items()}


def dumps(vectors: Mapping[int, Tensor], *, model_type: str = "", variances: Any = None) -> bytes:
    """The file's text. CAST refuses files without explained variances: 0.0 stands for those not measured."""
    known = variances if isinstance(variances, Mapping) else {}
    value = {
        "model_type": model_type or "unknown",
        "directions": {str(block): v.double().tolist() for block, v in sorted(vectors.items())},
        "explained_variances": {str(block): known.get(str(block), 0.0) for block in sorted(vectors)},
    }
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
