"""Vector files of papers' code, as `torch.save` wrote them.

- mean vectors of Venhoff et al. 2025 (arXiv 2506.18167): {label: {"mean": [L, d], "count": n}};
- Assistant Axis: {"axis": [L, d], ...}, role files {"vector": [L, d], "role", "type"}, and the capping
  configuration {"vectors": {name: {"layer", "vector"}}, "experiments": [...]};
- SEAL (arXiv 2504.07986): [d], the layer an index into hidden_states, i.e. the input of that block;
- the refusal direction of Arditi et al. 2024 (arXiv 2406.11717): [d] and beside it a JSON {"pos", "layer"}, read at
  and added to the input of that block;
- vLLM-Hook: {"dir": [d], "avg_proj": [...]}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steerable.chains.records import LABELS
from steerable.formats.foreign import (
    Found,
    NeedsChoice,
    Options,
    kind_of,
    layer_number,
    number,
    plain,
    rows,
    vector,
    warn,
)
from steerable.steering.site import Site
from steerable.store.errors import UsageError

OVERALL = "overall"


def name_of(found: Any) -> str | None:
    """The format of a loaded object, None where it is none of these. Bare tensors tell nothing."""
    if not isinstance(found, Mapping) or not found:
        return None
    if all(isinstance(v, Mapping) and {"mean", "count"} <= set(v) for v in found.values()):
        return "mean-vectors"
    if isinstance(found.get("vectors"), Mapping) and "experiments" in found:
        return "capping"
    if "axis" in found or {"vector", "role"} <= set(found) or {"vector", "type"} <= set(found):
        return "assistant-axis"
    if {"dir", "avg_proj"} <= set(found):
        return "vllm-hook"
    return None


def refuse_no_vectors(found: Any, file: str) -> None:
    """Raises UsageError for what papers' and other tools' code saves beside vectors, by its name."""
    keys = {str(key) for key in found} if isinstance(found, Mapping) else set()
    if any(key.split(".")[0] in ("rotate_layer", "learned_source", "proj_layer") for key in keys):
        raise UsageError(
            "it is a trained intervention of pyreft (LoReFT or one of its kin): what it adds, R^T(Wh + b - Rh), "
            "depends on the activation h, so no vector can stand for it"
        )
    inner = found[0] if isinstance(found, list) and found else found
    if isinstance(inner, Mapping) and {"projector1", "projector2"} <= set(inner):
        raise UsageError("it is an LM-Steer of EasyEdit: linear maps of the activation, for which no vector can stand")
    if file.startswith("layer_effects") or (
        keys and keys <= {*LABELS, OVERALL} and all(map(_is_curve, found.values()))
    ):
        raise UsageError(
            "it is layer_effects of the code of arXiv 2506.18167, how much each layer matters for each label: numbers "
            "for a plot and no vectors, which are in its mean_vectors file"
        )


def _is_curve(value: Any) -> bool:
    """Whether this is a number for each layer, or several such rows, and no vector of any model."""
    if isinstance(value, Tensor):
        return 0 < value.dim() <= 2 and value.shape[-1] <= 128
    return isinstance(value, list | tuple)


def read(found: Any, name: str, options: Options) -> Found:
    """Vectors of a loaded object of the named format. Raises UsageError, NeedsChoice."""
    if name == "seal":
        return _seal(found, options)
    if not isinstance(found, Mapping):
        raise UsageError(f"it holds {kind_of(found)}: expected the dict of a {name} file")
    if name == "mean-vectors":
        return _mean_vectors(found, options)
    if name == "capping":
        return _capping(found, options)
    if name == "assistant-axis":
        return _assistant_axis(found)
    return _vllm_hook(found, options)


def _mean_vectors(found: Mapping[Any, Any], options: Options) -> Found:
    """u = mean[label] - mean[overall], each row as long as that of mean[overall] (the paper's code)."""
    labels = sorted(str(label) for label in found if label != OVERALL)
    if OVERALL not in found or not labels:
        raise UsageError(f"it holds the means of {', '.join(map(repr, labels))}: expected {OVERALL!r} and labels")
    label = options.take("label") or (labels[0] if len(labels) == 1 else None)
    if label is None:
        _check_means(found, labels)
        raise NeedsChoice("label", f"it holds means of several labels: give --label, one of {', '.join(labels)}")
    if label not in labels:
        raise UsageError(f"it has no label {label!r}: expected one of {', '.join(labels)}")
    mean, overall = (_mean(found, key) for key in (label, OVERALL))
    _warn_of_single(found, [label])
    if mean.shape != overall.shape:
        raise UsageError(f"its means differ in shape: {list(mean.shape)} and {list(overall.shape)}")
    raw = mean - overall
    length, target = raw.norm(dim=1), overall.norm(dim=1)
    if not (length > 0).all():
        raise UsageError(f"the mean of {label!r} equals {OVERALL!r} in row {int((length == 0).nonzero()[0])}")
    scaled = (raw * (target / length)[:, None]).float()
    return Found(
        format="mean-vectors",
        vectors={Site("resid_post", i): vector(row, f"row {i} of the difference") for i, row in enumerate(scaled)},
        convention="row i is block i's output",
        method="span difference of means",
        behaviour=label,
        about={
            "baseline": OVERALL,
            "count": plain(found[label]["count"]),
            "norm_of_mean": [float(n) for n in target],
            "norm_before_rescaling": [float(n) for n in length],
        },
    )


def _check_means(found: Mapping[Any, Any], labels: list[str]) -> None:
    """Raises UsageError where no label can be imported; warns of those that cannot, or hardly."""
    _mean(found, OVERALL)
    unsound: dict[str, UsageError] = {}
    for label in labels:
        try:
            _mean(found, label)
        except UsageError as error:
            unsound[label] = error
    for reason in unsound.values():
        if len(unsound) == len(labels):
            raise reason
        warn(f"{reason}: this label cannot be imported")
    _warn_of_single(found, [label for label in labels if label not in unsound])


def _warn_of_single(found: Mapping[Any, Any], labels: list[str]) -> None:
    for label in labels:
        if number(found[label]["count"], f"the count of {label!r}") <= 1:
            warn(f"the mean of {label!r} is of a single example (count 1): its vector is that example and hardly more")


def _mean(found: Mapping[Any, Any], label: str) -> Tensor:
    number(found[label]["count"], f"the count of {label!r}")
    mean = found[label]["mean"]
    rows(mean, f"the mean of {label!r}")  # shape, type, NaN
    return mean.detach().double()


def _assistant_axis(found: Mapping[Any, Any]) -> Found:
    axis = "axis" in found
    taken = rows(found["axis" if axis else "vector"], "its axis" if axis else "its vector")
    return Found(
        format="assistant-axis",
        vectors={Site("resid_post", i): row for i, row in enumerate(taken)},
        convention="row i is block i's output",
        method="mean of the default persona - mean of the roles" if axis else "mean of a role",
        behaviour="assistant" if axis else str(plain(found.get("role", "")) or ""),
        about={str(k): plain(v) for k, v in found.items() if k in ("n_default", "n_roles", "type", "role")},
    )


def _capping(found: Mapping[Any, Any], options: Options) -> Found:
    names = [str(name) for name in found["vectors"]]
    for name, one in found["vectors"].items():
        if isinstance(one, Mapping) and "vector" in one:
            vector(one["vector"], f"the vector {str(name)!r}")
    label = options.take("label") or (names[0] if len(names) == 1 else None)
    if label is None:
        raise NeedsChoice("label", f"it holds {len(names)} vectors: give --label, one of {', '.join(names)[:400]}")
    entry = found["vectors"].get(label)
    if not isinstance(entry, Mapping) or not {"layer", "vector"} <= set(entry):
        raise UsageError(f"it has no vector {label!r}: expected one of {', '.join(names)[:400]}")
    caps = {}
    for experiment in found["experiments"] if isinstance(found["experiments"], list | tuple) else ():
        steps = experiment.get("interventions", ()) if isinstance(experiment, Mapping) else ()
        for step in steps if isinstance(steps, list | tuple) else ():
            if isinstance(step, Mapping) and step.get("vector") == label and "cap" in step:
                caps[str(plain(experiment.get("id")))] = number(step["cap"], f"a cap of {label!r}")
    warn("a capping file says at which projection to cap: the vector was imported, to be added; its caps are in stats")
    site = Site("resid_post", layer_number(entry["layer"], f"the layer of {label!r}"))
    return Found(
        format="capping",
        vectors={site: vector(entry["vector"], f"the vector {label!r}")},
        convention="its layers are blocks",
        behaviour=label,
        about={"caps": caps},
    )


def _vllm_hook(found: Mapping[Any, Any], options: Options) -> Found:
    taken, layer = vector(found["dir"], "its 'dir'"), options.take("layer")
    if layer is None:
        raise NeedsChoice(
            "layer", "a vLLM-Hook file does not hold the layer: give --layer, the request's optimal_layer"
        )
    projection = found["avg_proj"]
    return Found(
        format="vllm-hook",
        vectors={Site("resid_post", layer_number(layer, "--layer")): taken},
        convention=f"the caller's layer {layer} is a block",
        about={"avg_proj": plain(projection.tolist() if isinstance(projection, Tensor) else projection)},
    )


def _seal(found: Any, options: Options) -> Found:
    """As SEAL's code applies it: the saved vector is (reflection, transition) - execution, used with -1, where a
    paragraph break was just fed inside the think block."""
    taken, layer = vector(found, "its vector"), options.take("layer")
    if layer is None:
        raise NeedsChoice("layer", "a SEAL file does not hold the layer: give --layer, its index into hidden_states")
    index = layer_number(layer, "--layer")
    return Found(
        format="seal",
        vectors={Site("resid_pre", index): taken},
        convention=f"hidden_states[{index}] is the input of block {index}",
        method="SEAL: mean of reflection and transition - mean of execution",
        strength=-1.0,
        gate="thinking & boundary",
    )


def metadata_beside(path: Path) -> dict[str, int] | None:
    """{"pos", "layer"} of the refusal direction's `<name>_metadata.json`, None where there is no such file."""
    beside = path.with_name(f"{path.stem}_metadata.json")
    try:
        if not beside.is_file() or beside.stat().st_size > 4096:
            return None
        meta = json.loads(beside.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(meta, dict) or set(meta) != {"pos", "layer"}:
        return None
    return meta if all(type(v) is int for v in meta.values()) and meta["layer"] >= 0 else None


def read_refusal(found: Any, meta: Mapping[str, int] | None, options: Options) -> Found:
    """The refusal direction, with the layer of its metadata file (or the caller's)."""
    taken, said = vector(found, "its vector"), options.take("layer")
    if meta is None and said is None:
        raise NeedsChoice("layer", "there is no <name>_metadata.json beside it: give --layer, the block of its input")
    layer = layer_number(said if said is not None else (meta or {})["layer"], "the layer")
    if meta is not None and said is not None and said != meta["layer"]:
        raise UsageError(f"--layer {said} contradicts the metadata file beside it, which says {meta['layer']}")
    return Found(
        format="refusal-direction",
        vectors={Site("resid_pre", layer): taken},
        convention=f"the input of block {layer}, where it was read",
        method="difference of means at one position (refusal)",
        behaviour="refusal",
        about=dict(meta or {}),
    )
