"""Small files of papers' and other tools' code, as `torch.save` wrote them.

- Assistant Axis: {"axis": [L, d], ...}, role files {"vector": [L, d], "role", "type"}, and the capping
  configuration {"vectors": {name: {"layer", "vector"}}, "experiments": [...]};
- SEAL (arXiv 2504.07986): [d], the layer an index into hidden_states, i.e. the input of that block;
- the refusal direction of Arditi et al. 2024 (arXiv 2406.11717): [d] and beside it a JSON {"pos", "layer"}, read at
  and added to the input of that block;
- vLLM-Hook: {"dir": [d], "avg_proj": [...]}.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported, small_json, warn
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

_REFUSAL = "direction.pt"  # as the refusal direction's code leaves it in a folder


def _dict(source: Source) -> Mapping[Any, Any]:
    return source.torch if isinstance(source.torch, Mapping) else {}


def _is_axis(source: Source) -> bool | None:
    if isinstance(source.torch, Tensor):
        return None
    keys = set(_dict(source))
    return "axis" in keys or "vector" in keys and bool(keys & {"role", "type"})


def _read_axis(source: Source, options: Options) -> Direction:
    content = {"axis": source.torch} if isinstance(source.torch, Tensor) else source.torch
    key = "axis" if "axis" in content else "vector"
    is_axis = key == "axis"
    return imported(
        "assistant-axis",
        checks.at_blocks(checks.rows(content[key], f"its {key}")),
        "row i is block i's output",
        method="mean of the default persona - mean of the roles" if is_axis else "mean of a role",
        behaviour="assistant" if is_axis else str(checks.plain(content.get("role", "")) or ""),
        about={k: checks.plain(content.get(k)) for k in ("n_default", "n_roles", "type", "role")},
    )


def _is_capping(source: Source) -> bool:
    return isinstance(_dict(source).get("vectors"), Mapping) and "experiments" in _dict(source)


def _read_capping(source: Source, options: Options) -> Direction:
    entries = source.torch["vectors"]
    for name, entry in entries.items():
        if isinstance(entry, Mapping) and "vector" in entry:
            checks.vector(entry["vector"], f"the vector {str(name)!r}")
    label = options.choose([str(name) for name in entries], "vector")
    entry = entries.get(label)
    if not isinstance(entry, Mapping) or not {"layer", "vector"} <= set(entry):
        raise UsageError(f"its vector {label!r} is {checks.kind_of(entry)}: expected the keys 'layer' and 'vector'")
    caps = {
        str(checks.plain(experiment.get("id"))): checks.number(step["cap"], f"a cap of {label!r}")
        for experiment in _mappings(source.torch["experiments"])
        for step in _mappings(experiment.get("interventions"))
        if step.get("vector") == label and "cap" in step
    }
    warn("a capping file says at which projection to cap: the vector was imported, to be added; its caps are in stats")
    site = Site("resid_post", checks.layer_number(entry["layer"], f"the layer of {label!r}"))
    v = checks.vector(entry["vector"], f"the vector {label!r}")
    return imported("capping", {site: v}, "its layers are blocks", behaviour=label, about={"caps": caps})


def _mappings(value: Any) -> list[Mapping[Any, Any]]:
    """The dicts in a list; none where it is no list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def _read_vllm_hook(source: Source, options: Options) -> Direction:
    v = checks.vector(source.torch["dir"], "its 'dir'")
    layer = options.need_layer("a vLLM-Hook file does not hold the layer: give --layer, the request's optimal_layer")
    projection = source.torch["avg_proj"]
    return imported(
        "vllm-hook",
        {Site("resid_post", layer): v},
        f"the caller's layer {layer} is a block",
        about={"avg_proj": checks.plain(projection.tolist() if isinstance(projection, Tensor) else projection)},
    )


def _read_seal(source: Source, options: Options) -> Direction:
    """As SEAL's code applies it: the saved vector is (reflection, transition) - execution, used with -1, where a
    paragraph break was just fed inside the think block, of a prompt at the last token alone."""
    v = checks.vector(source.torch, "its vector")
    index = options.need_layer("a SEAL file does not hold the layer: give --layer, its index into hidden_states")
    return imported(
        "seal",
        {Site("resid_pre", index): v},
        f"hidden_states[{index}] is the input of block {index}",
        method="SEAL: mean of reflection and transition - mean of execution",
        strength=-1.0,
        gate="thinking & boundary & (last_prompt | generated)",
    )


def _refusal_file(source: Source) -> Path:
    return source.path / _REFUSAL if source.kind == "folder" else source.path


def _refusal_metadata(source: Source) -> dict[str, int] | None:
    """{"pos", "layer"} of `<name>_metadata.json`, None where there is no such file."""
    path = _refusal_file(source)
    meta = small_json(path.with_name(f"{path.stem}_metadata.json"))
    if meta is None or set(meta) != {"pos", "layer"}:
        return None
    return meta if all(type(v) is int for v in meta.values()) and meta["layer"] >= 0 else None


def _is_refusal(source: Source) -> bool | None:
    if source.kind == "folder":
        return _refusal_file(source).is_file()
    if not isinstance(source.torch, Tensor):
        return False
    return source.torch.dim() == 1 and _refusal_metadata(source) is not None or None


def _read_refusal(source: Source, options: Options) -> Direction:
    """With the layer of its metadata file, or the caller's."""
    v = checks.vector(Source(_refusal_file(source)).torch, "its vector")
    meta, layer = _refusal_metadata(source) or {}, options.take("layer")
    if not meta:
        layer = options.need_layer("there is no <name>_metadata.json beside it: give --layer, the block of its input")
    elif layer not in (None, meta["layer"]):
        raise UsageError(f"--layer {layer} contradicts the metadata file beside it, which says {meta['layer']}")
    block = checks.layer_number(meta.get("layer", layer), "the layer")
    return imported(
        "refusal-direction",
        {Site("resid_pre", block): v},
        f"the input of block {block}, where it was read",
        method="difference of means at one position (refusal)",
        behaviour="refusal",
        about=meta,
    )


FORMATS = (
    Format("assistant-axis", _is_axis, _read_axis),
    Format("capping", _is_capping, _read_capping),
    Format("vllm-hook", lambda source: {"dir", "avg_proj"} <= set(_dict(source)), _read_vllm_hook),
    Format("seal", lambda source: None if isinstance(source.torch, Tensor) else False, _read_seal),
    Format("refusal-direction", _is_refusal, _read_refusal),
)
