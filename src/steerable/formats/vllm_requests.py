"""Requests to vLLM that steer, as JSON: for hotwire and for vllm-lens, two plugins.

A file holds the body of a request, {"model", "vllm_xargs": {name: ...}}, or what stands under the name. In both
layers are blocks, and scale * vector is added to a block's output.

- hotwire, name "hotwire": {"id", "layer", "scale", "decode_only"} or a list of them. The vectors are the operator's
  files `<id>.pt` ([L, d], row i of block i, or [d]; of a dict the first tensor), which are looked for beside the
  request;
- vllm-lens, name "apply_steering_vectors": a list of {"activations": {"data": base64, "dtype", "shape",
  "compression"}, "layer_indices", "scale", "norm_match", "position_indices"}, activations [n, d].
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import strict_json

_KEYS = {"hotwire": {"id", "layer"}, "apply_steering_vectors": {"activations", "layer_indices"}}
_MAX_BYTES = 256 << 20  # of a tensor
_DTYPES = ("float16", "float32", "float64", "int16")


def _entries(source: Source, name: str) -> list[Mapping[str, Any]]:
    """What a request says under this name, as a list of objects; empty where it is none."""
    content = source.json
    for key in ("vllm_xargs", "extra_args", name):
        content = content[key] if isinstance(content, Mapping) and key in content else content
    if isinstance(content, str):  # vLLM's HTTP server passes texts and numbers only
        try:
            content = strict_json(content)
        except ValueError as error:
            raise UsageError(f"its {name!r} is not sound JSON ({str(error)[:80]})") from None
    entries = [content] if isinstance(content, Mapping) else content
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) and set(e) >= _KEYS[name] for e in entries):
        return []
    return entries


def _model(source: Source) -> str:
    return str(checks.plain(source.json.get("model", "")) or "") if isinstance(source.json, Mapping) else ""


def _read_hotwire(source: Source, options: Options) -> Direction:
    entries = _entries(source, "hotwire")
    only = {bool(entry.get("decode_only", False)) for entry in entries}
    if len(only) > 1:
        raise UsageError("only some of its vectors are for decoding alone (decode_only): split the request")
    files = {path.stem: path for path in source.path.parent.glob("*.pt")}
    pairs, scales = [], {}
    for entry in entries:
        site = Site("resid_post", checks.layer_number(entry["layer"], "a layer"))
        if (name := str(entry["id"])) not in files:
            raise UsageError(
                f"it names the vector {name[:60]!r}, whose file {name[:60]!r}.pt is not beside it: put it there"
            )
        pairs.append((site, _row(Source(files[name]).torch, site.layer, name)))
        scales[site] = checks.number(entry.get("scale", 1.0), "a scale")
    vectors, strength = checks.with_strength(checks.unique(pairs), scales)
    return imported(
        "hotwire",
        vectors,
        "its layers are blocks, and so are the rows of the vectors' files",
        strength=strength,
        gate="generated" if only == {True} else "all",
        behaviour="+".join(dict.fromkeys(str(entry["id"])[:60] for entry in entries)),
        model_id=_model(source),
    )


def _row(content: Any, layer: int, name: str) -> Tensor:
    if isinstance(content, Mapping):
        content = next((v for v in content.values() if isinstance(v, Tensor)), None)
    if isinstance(content, Tensor) and content.dim() == 2:
        if layer >= len(content):
            raise UsageError(f"it asks for layer {layer} of {name[:60]!r}, which has {len(content)} rows")
        content = content[layer]
    return checks.vector(content, f"the vector {name[:60]!r}")


def _read_lens(source: Source, options: Options) -> Direction:
    """With norm_match h + scale * ||h|| * v / ||v||, the map norm_shift. Raises UsageError for vectors by position."""
    entries = _entries(source, "apply_steering_vectors")
    pairs, scales = [], {}
    for entry in entries:
        table, layers = wire_tensor(entry["activations"]), entry["layer_indices"]
        if table.dim() != 2 or entry.get("position_indices") is not None:
            raise UsageError("it holds a vector for each position: expected activations [layers, d] for all positions")
        if not isinstance(layers, list) or len(layers) != len(table):
            raise UsageError(
                f"its layer_indices are {checks.kind_of(layers)} for {len(table)} rows: expected one a row"
            )
        for layer, row in zip(layers, checks.rows(table, "its activations"), strict=True):
            site = Site("resid_post", checks.layer_number(layer, "a layer index"))
            pairs.append((site, row))
            scales[site] = checks.number(entry.get("scale", 1.0), "a scale")
    is_matched = any(entry.get("norm_match") for entry in entries)
    if is_matched and (len(set(scales.values())) > 1 or not all(entry.get("norm_match") for entry in entries)):
        raise UsageError("its vectors differ in norm_match, or have it and differ in scale: split the request")
    vectors, strength = checks.with_strength(checks.unique(pairs), scales)
    return imported(
        "vllm-lens", vectors, "its layers are blocks", strength=strength, model_id=_model(source),
        map="norm_shift(1)" if is_matched else "shift",
    )  # fmt: skip


def wire_tensor(value: Any) -> Tensor:
    """The tensor that an object on the wire stands for; bfloat16 travels as int16."""
    wire: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    shape, dtype, data = (wire.get(key) for key in ("shape", "dtype", "data"))
    sizes = isinstance(shape, list) and all(type(n) is int and 0 < n < 1 << 24 for n in shape)
    if not isinstance(shape, list) or not sizes or dtype not in _DTYPES or not isinstance(data, str):
        raise UsageError(
            f"its activations are {checks.kind_of(value)}: expected data, dtype and shape as vllm-lens sends them"
        )
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > _MAX_BYTES:
        raise UsageError(f"its activations of shape {shape} are too large for vectors")
    try:
        content = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise UsageError(f"its activations are not sound base64 ({error})") from None
    if wire.get("compression") == "zstd":
        content = _unpacked(content, size)
    if len(content) != size:
        raise UsageError(f"its activations hold {len(content)} bytes, but shape and dtype ask for {size}")
    tensor = torch.from_numpy(np.frombuffer(content, dtype).reshape(shape).copy())
    return (
        tensor.view(torch.bfloat16) if wire.get("original_dtype") == "torch.bfloat16" and dtype == "int16" else tensor
    )


def _unpacked(content: bytes, size: int) -> bytes:
    """The `size` bytes in a frame of zstd."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UsageError(
            "its activations are packed by zstd, which needs pyarrow: pip install 'steerable[data]'"
        ) from error
    try:
        return bytes(pa.decompress(content, decompressed_size=size, codec="zstd", asbytes=True))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"its activations are not {size} bytes packed by zstd ({str(error)[:80]})") from error


FORMATS = (
    Format("hotwire", lambda source: bool(_entries(source, "hotwire")), _read_hotwire),
    Format("vllm-lens", lambda source: bool(_entries(source, "apply_steering_vectors")), _read_lens),
)
