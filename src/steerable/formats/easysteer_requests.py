"""Requests to EasySteer's engine (a fork of vLLM, version 2 of its interface), as JSON.

A file holds the body of a request, {"model", "steering": {"vectors": [...], "conflict"}}, or what stands under
"steering". An entry of vectors is {"source" or "data", "algorithm", "scale", "layers", "normalize", "apply"}: the
operator's GGUF file, which is looked for beside the request, or {"kind": "direction", "tensors": {"layer.<block>":
{"shape": [d], "data": base64 of float32}}}. Only "direct" is an addition: scale * vector at a block's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported
from steerable.formats.gguf import read_gguf
from steerable.formats.vllm_requests import wire_tensor
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

_GATES = {("prompt",): "prompt", ("generation",): "generated", ("generation", "prompt"): "all"}


def _entries(source: Source) -> list[Mapping[str, Any]]:
    content = source.json
    if isinstance(content, Mapping):
        content = content.get("steering", content)
    entries = content.get("vectors") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not all(
        isinstance(e, Mapping) and {"source", "data"} & set(e) for e in entries
    ):
        return []
    # as its own classes are written, with null for what was not given
    return [{key: value for key, value in entry.items() if value is not None} for entry in entries]


def _read(source: Source, options: Options) -> Direction:
    pairs, scales, gates = [], {}, set()
    for entry in _entries(source):
        if (algorithm := entry.get("algorithm", "direct")) != "direct":
            raise UsageError(f"its algorithm is {str(algorithm)[:40]!r}: only direct, which adds a vector, is imported")
        if entry.get("normalize"):
            raise UsageError("it has normalize, so that what is added depends on the activation: no plain addition")
        gates.add(_gate(entry.get("apply")))
        vectors = _inline(entry["data"]) if "data" in entry else _file(source, entry.get("source"))
        layers = entry.get("layers")
        if layers is not None and not isinstance(layers, list):
            raise UsageError(f"its layers are {checks.kind_of(layers)}: expected a list of blocks")
        for layer in vectors if layers is None else [checks.layer_number(n, "a layer") for n in layers]:
            if layer not in vectors:
                raise UsageError(f"it asks for layer {layer}, and its vectors are for {', '.join(map(str, vectors))}")
            site = Site("resid_post", layer)
            pairs.append((site, vectors[layer]))
            scales[site] = checks.number(entry.get("scale", 1.0), "a scale")
    if len(gates) > 1:
        raise UsageError("its vectors are for different tokens (apply): split the request")
    placed, strength = checks.with_strength(checks.unique(pairs), scales)
    content = source.json
    return imported(
        "easysteer-request", placed, "its layers are blocks", strength=strength, gate=gates.pop(),
        model_id=str(checks.plain(content.get("model", "")) or ""),
    )  # fmt: skip


def _gate(apply: Any) -> str:
    """Raises UsageError for single tokens, positions and windows."""
    given = {k: v for k, v in apply.items() if v is not None} if isinstance(apply, Mapping) else {}
    keys = tuple(sorted(given))
    if keys not in _GATES or any(value != "all" for value in given.values()):
        raise UsageError(
            f"its apply is {checks.kind_of(apply)}: expected prompt, generation or both, each 'all'; single tokens and "
            "positions are gates here (tokens, positions), to be given with the direction"
        )
    return _GATES[keys]


def _inline(data: Any) -> dict[int, Tensor]:
    tensors = data.get("tensors") if isinstance(data, Mapping) and data.get("kind") == "direction" else None
    if not isinstance(tensors, Mapping) or not tensors:
        raise UsageError(f"its data are {checks.kind_of(data)}: expected kind direction, and its tensors")
    vectors = {}
    for name, wire in tensors.items():
        layer = checks.layer_number(name.removeprefix("layer."), f"the number in {name[:60]!r}")
        wire = {**wire, "dtype": "float32"} if isinstance(wire, Mapping) else wire
        vectors[layer] = checks.vector(wire_tensor(wire), f"its tensor {name[:60]!r}")
    return vectors


def _file(source: Source, name: Any) -> dict[int, Tensor]:
    """Vectors of a GGUF file beside the request; where the operator has it does not matter."""
    path = source.path.parent / PurePath(str(name)).name
    if path.suffix != ".gguf" or not path.is_file():
        raise UsageError(f"it names the file {str(name)[:80]!r}, which is not beside it: put the GGUF file there")
    direction = read_gguf(Source(path), Options(format="easysteer"))
    return {site.layer: v for site, v in direction.vectors.items()}


FORMATS = (Format("easysteer-request", lambda source: bool(_entries(source)), _read),)
