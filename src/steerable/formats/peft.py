"""PEFT BEFT adapters: a trained bias on linear layers, as `PeftModel.save_pretrained` lays it out.

A folder with adapter_config.json ("peft_type": "BEFT") and adapter_model.safetensors, tensors
`base_model.model.<module>.beft_bias` [1, d]. A bias on `down_proj` adds to what the MLP adds to the stream, at every
token, which is the same as adding to the block's output, one on `o_proj` to what the attention adds; where a norm
stands behind them (Gemma 2 and 3, OLMo 2) it is neither. Source of the method: arXiv 2509.15974.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steerable.formats.foreign import MAX_BYTES, Found, plain, same_width, vector, warn
from steerable.formats.safetensors_files import load
from steerable.models.biases import Place
from steerable.models.loading import FAMILIES
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import strict_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Families with a norm behind the MLP that `models` has no entry for.
_POST_NORM = ("olmo3", "glm4")
#: Where `content` puts a bias.
MODULES = {"mlp": "mlp.down_proj", "attention": "self_attn.o_proj"}
_SITES = {"mlp_out": r"mlp\.(?:down_proj|c_proj)", "attn_out": r"(?:self_attn\.o_proj|attn\.c_proj)"}


def read(folder: Path) -> Found:
    """The biases as vectors at `mlp_out` (or `attn_out`). Raises UsageError."""
    config = _config(folder / CONFIG)
    if config.get("peft_type") != "BEFT":
        raise UsageError(f"its adapter is of type {str(config.get('peft_type'))[:30]!r}: only BEFT holds plain vectors")
    if config.get("modules_to_save"):
        raise UsageError("its adapter also replaces whole modules (modules_to_save): that is no vector")
    path = folder / WEIGHTS
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise UsageError(f"it has no {WEIGHTS} (an adapter_model.bin is a pickle and not read)")
    vectors: dict[Site, Tensor] = {}
    for name, tensor in load(path)[1].items():
        site = _site(name)
        if site in vectors:
            raise UsageError(f"it holds two biases for {site}")
        vectors[site] = vector(tensor, f"the tensor {name!r}")
    if not vectors:
        raise UsageError(f"its {WEIGHTS} is empty")
    same_width(vectors)
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and (named := _post_norm_in(base)):
        warn(
            f"in {named} models a norm stands behind the MLP and the attention: there a bias of an adapter is not what "
            "they add to the stream, and the imported vectors will act otherwise than the adapter"
        )
    return Found(
        format="peft-beft",
        vectors=vectors,
        convention="its modules name blocks; a bias on down_proj adds to the MLP's output (no norm behind it)",
        method="BEFT",
        model_id=base if isinstance(base, str) else "",
        about={"peft_version": plain(config.get("peft_version")), "revision": plain(config.get("revision"))},
    )


def _site(name: str) -> Site:
    for kind, pattern in _SITES.items():
        if match := re.fullmatch(rf"(?:\w+\.)*(?:layers|h)\.([0-9]{{1,4}})\.{pattern}\.beft_bias", name):
            return Site(kind, int(match[1]))
    raise UsageError(f"it holds a tensor {name[:90]!r}: expected BEFT biases of down_proj or o_proj")


def has_post_norm(model_type: str) -> bool:
    """Whether blocks of this `config.model_type` have a norm behind the MLP."""
    known = FAMILIES.get(model_type)
    return model_type in _POST_NORM or (known is not None and known.norms != "pre")


def _post_norm_in(name: str) -> str | None:
    """The family with a norm behind the MLP that a model's name speaks of ("google/gemma-2-9b"), if any."""
    plain_name = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((t for t in sorted({*FAMILIES, *_POST_NORM}) if has_post_norm(t) and t in plain_name), None)


def _config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 1 << 20:
            raise ValueError("too large")
        config = strict_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"its {CONFIG} cannot be read ({str(error)[:80]})") from None
    if not isinstance(config, dict):
        raise UsageError(f"its {CONFIG} is no JSON object")
    return config


def content(vectors: Mapping[Place, Tensor], *, model_id: str, revision: str = "") -> dict[str, bytes]:
    """{file name: bytes} of an adapter with biases on down_proj, or o_proj after the attention."""
    from safetensors.torch import save

    names = {place: f"model.layers.{place.layer}.{MODULES[place.after]}" for place in sorted(vectors)}
    config = {
        "base_model_name_or_path": model_id or None,
        "inference_mode": True,
        "init_weights": True,
        "modules_to_save": None,
        "peft_type": "BEFT",
        "revision": revision or None,
        "target_modules": list(names.values()),
        "task_type": "CAUSAL_LM",
    }
    tensors = {f"base_model.model.{name}.beft_bias": vectors[p][None].contiguous() for p, name in names.items()}
    return {
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS: save(tensors, {"format": "pt"}),
    }
