"""PEFT BEFT adapters: a trained bias on linear layers, as `PeftModel.save_pretrained` lays it out.

A folder with adapter_config.json ("peft_type": "BEFT") and adapter_model.safetensors, tensors
`base_model.model.<module>.beft_bias` [1, d]. A bias on `down_proj` adds to what the MLP adds to the stream, at every
token, which is the same as adding to the block's output, one on `o_proj` to what the attention adds; where a norm
stands behind them (Gemma 2 and 3, OLMo 2) it is neither. Source of the method: arXiv 2509.15974.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from steerable.formats import checks
from steerable.formats.base import (
    FOLDED,
    Format,
    Options,
    Source,
    WriteOptions,
    imported,
    one_vector,
    output_of_block,
    small_json,
    warn,
    warn_of_gate,
)
from steerable.models.families import FAMILIES, has_post_norm, post_norm_in
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import write_atomic

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SITES = {"mlp_out": r"mlp\.(?:down_proj|c_proj)", "attn_out": r"(?:self_attn\.o_proj|attn\.c_proj)"}
#: Where `_write` puts a bias for a site.
_DOWN, _O = "mlp.down_proj", "self_attn.o_proj"
_MODULES = {"mlp_out": _DOWN, "attn_out": _O, "resid_mid": _O}


def _sniff(source: Source) -> bool:
    if source.kind == "folder":
        return (source.path / CONFIG).is_file()
    return any(name.endswith(".beft_bias") for name in source.safetensors[1])


def _read(source: Source, options: Options) -> Direction:
    """The biases as vectors at `mlp_out` or `attn_out`."""
    folder = source.path if source.kind == "folder" else source.path.parent
    if not (folder / CONFIG).is_file():
        raise UsageError(f"it is the tensors of an adapter without its {CONFIG}: give the whole folder")
    if (config := small_json(folder / CONFIG)) is None:
        raise UsageError(f"its {CONFIG} is no sound JSON object")
    if config.get("peft_type") != "BEFT":
        raise UsageError(f"its adapter is of type {str(config.get('peft_type'))[:30]!r}: only BEFT holds plain vectors")
    if config.get("modules_to_save"):
        raise UsageError("its adapter also replaces whole modules (modules_to_save): that is no vector")
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"it has no {WEIGHTS} (an adapter_model.bin is a pickle and not read)")
    tensors = Source(folder / WEIGHTS).safetensors[1]
    if not tensors:
        raise UsageError(f"its {WEIGHTS} is empty")
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and (family := post_norm_in(base)):
        warn(
            f"in {family} models a norm stands behind the MLP and the attention: there a bias of an adapter is not "
            "what they add to the stream, and the imported vectors will act otherwise than the adapter"
        )
    return imported(
        "peft-beft",
        checks.unique((_site(name), checks.vector(tensor, f"the tensor {name!r}")) for name, tensor in tensors.items()),
        "its modules name blocks; a bias on down_proj adds to the MLP's output (no norm behind it)",
        method="BEFT",
        model_id=base if isinstance(base, str) else "",
        about={key: checks.plain(config.get(key)) for key in ("peft_version", "revision")},
    )


def _site(name: str) -> Site:
    for kind, pattern in _SITES.items():
        if match := re.fullmatch(rf"(?:\w+\.)*(?:layers|h)\.([0-9]{{1,4}})\.{pattern}\.beft_bias", name):
            return Site(kind, int(match[1]))
    raise UsageError(f"it holds a tensor {name[:90]!r}: expected BEFT biases of down_proj or o_proj")


def _write(direction: Direction, path: Path, options: WriteOptions) -> None:
    """Biases of down_proj: what the MLP adds (`mlp_out`) and, the same, block outputs; of o_proj: `attn_out` and
    `resid_mid`."""
    from safetensors.torch import save

    if has_post_norm(options.model_type):
        raise UsageError(
            f"in {options.model_type} a norm stands behind the MLP, so no bias on down_proj adds a vector to the stream"
        )
    family = FAMILIES.get(options.model_type)
    tensors = {}
    for site, v in direction.vectors.items():
        flat, module = one_vector(v, site, options.to), _MODULES.get(site.kind, _DOWN)
        block = site.layer if site.kind in _MODULES else output_of_block(site, options.to)
        name = f"model.layers.{block}.{module}"
        if name in tensors:
            raise UsageError(f"two vectors of this direction are for the {module} of block {block}")
        if family is not None and module not in (family.mlp_out, family.attention_out):
            last = module.rpartition(".")[2]
            raise UsageError(f"the blocks of {options.model_type} have no {last}, on which the adapter's biases stand")
        tensors[name] = flat[None].contiguous()
    warn_of_gate(direction, options.to)
    if not options.model_type:
        warn(
            "a bias on down_proj is the same only where no norm stands behind the MLP (not Gemma 2 and 3, OLMo 2): "
            "give --model-type to have that checked"
        )
    config = {
        "base_model_name_or_path": direction.model_id or None,
        "inference_mode": True,
        "init_weights": True,
        "modules_to_save": None,
        "peft_type": "BEFT",
        "revision": direction.model_revision or None,
        "target_modules": list(tensors),
        "task_type": "CAUSAL_LM",
    }
    data = save({f"base_model.model.{name}.beft_bias": v for name, v in tensors.items()}, {"format": "pt"})
    write_atomic(path / WEIGHTS, data)  # the weights first: without its config it is no adapter
    write_atomic(path / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


FORMATS = (
    Format(
        "peft-beft",
        _sniff,
        _read,
        _write,
        "It holds additions at mlp_out, attn_out, resid_mid and block outputs, and no strength.",
        strength=FOLDED,
    ),
)
