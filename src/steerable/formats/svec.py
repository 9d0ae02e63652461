"""`.svec`: the JSON of IBM/activation-steering (CAST) and AISteer360.

{"model_type", "directions": {"<block>": [...] or [[...]]}, "explained_variances": {"<block>": x}, ...}; layers are
0-based block outputs, where the vectors were read. CAST adds them at the input of that block, one block earlier.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, WriteOptions, imported, writer
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


def _read(source: Source, options: Options) -> Direction:
    """Raises UsageError for per-head, positional and plane directions, which are no single vectors."""
    content = source.json
    if (
        not isinstance(content, Mapping)
        or not isinstance(content.get("directions"), Mapping)
        or not content["directions"]
    ):
        raise UsageError(
            f"it holds {checks.kind_of(content)}: expected the keys 'model_type' and 'directions' of a .svec"
        )
    if content.get("num_heads") is not None or content.get("head_dim") is not None:
        raise UsageError("it holds directions of attention heads (ITI): only vectors of the residual stream are read")
    vectors: dict[Site, Tensor] = {}
    for key, numbers in content["directions"].items():
        site = Site("resid_post", checks.layer_number(key, "a key of 'directions'"))
        if site in vectors:
            raise UsageError(f"it holds two directions for layer {site.layer}")
        vectors[site] = _vector(numbers, f"the direction of layer {key}")
    variances = content.get("explained_variances")
    variances = variances if isinstance(variances, Mapping) else {}
    about = {
        "model_type": checks.plain(content.get("model_type", "")),
        "explained_variances": {str(k)[:20]: checks.number(v, "an explained variance") for k, v in variances.items()},
    }
    convention = "its keys are blocks whose outputs were read (CAST adds them at the inputs of these blocks)"
    return imported("svec", vectors, convention, about=about)


def _vector(numbers: Any, what: str) -> Tensor:
    if isinstance(numbers, list) and numbers and all(isinstance(x, list) for x in numbers):
        if len(numbers) > 1:
            raise UsageError(f"{what} has {len(numbers)} vectors (one a position, or a plane): expected one")
        numbers = numbers[0]
    if not isinstance(numbers, list) or not numbers:
        raise UsageError(f"{what} is {checks.kind_of(numbers)}: expected a list of numbers")
    return checks.vector(
        torch.tensor([checks.number(x, f"a number in {what}") for x in numbers], dtype=torch.float64), what
    )


def _encode(vectors: dict[int, Tensor], direction: Direction, options: WriteOptions) -> bytes:
    """CAST refuses files without explained variances: 0.0 stands for those not measured."""
    about = direction.stats.get("imported", {})
    variances = about.get("explained_variances", {})
    value = {
        "model_type": options.model_type or about.get("model_type") or about.get("model_hint") or "unknown",
        "directions": {str(block): v.double().tolist() for block, v in vectors.items()},
        "explained_variances": {str(block): variances.get(str(block), 0.0) for block in vectors},
    }
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


FORMATS = (
    Format(
        "svec",
        lambda source: source.kind == "json",
        _read,
        writer(_encode),
        "It holds no strength and no sites but blocks.",
        general=True,
    ),
)
