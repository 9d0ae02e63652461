"""What lies beside vectors in papers' and other tools' folders and can be no vector: refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steerable.chains.records import LABELS
from steerable.formats.base import Source, small_json
from steerable.formats.mean_vectors import OVERALL
from steerable.store.errors import UsageError

_LM_EVAL_CSV = b"loader,action,sparse_model,hookpoint"  # how the CSV of lm-eval begins
_PYREFT = {"rotate_layer", "learned_source", "proj_layer"}


def refuse(source: Source) -> None:
    """Raises UsageError for a file or folder that is known to hold no vectors, and why."""
    if source.kind == "torch" and source.path.name.startswith("layer_effects"):
        raise UsageError(_LAYER_EFFECTS)
    if source.head.startswith(_LM_EVAL_CSV):
        raise UsageError(
            "an lm-eval CSV names features of sparse autoencoders and holds no vectors: take the rows of W_dec that it "
            "names, times their coefficient, and save them as a .pt"
        )
    about = source.json if isinstance(source.json, Mapping) else {}
    if _is_ds4(source, about):
        raise UsageError(
            "it is a file of ds4, by which the part along a vector is taken out of what attention or MLP give, "
            "y - scale * v (v y): a projection, which removes at a positive scale, and no vector to be added"
        )
    if source.kind == "json" and {"sae", "features"} <= set(about):
        raise UsageError(
            "it names features of a sparse autoencoder (BrainPatch 0.1) and holds no vectors: compile it first"
        )
    if isinstance(source.json, list) and any(
        isinstance(i, Mapping) and {"site", "basis", "map"} <= set(i) for i in source.json
    ):
        raise UsageError(
            "it is a steering file, several interventions that no direction file can hold: `chat --steer` takes it"
        )
    if "steerable.patch" in source.safetensors[0]:
        raise UsageError(
            "it is a patch of weights, made by `steerable edit`, and holds no vectors: st.WeightPatch loads it"
        )
    content = source.torch
    keys = {str(key) for key in content} if isinstance(content, Mapping) else set()
    reft_folder = source.kind == "folder" and any(source.path.glob("intkey_*.bin"))
    if reft_folder or any(key.split(".")[0] in _PYREFT for key in keys):
        raise UsageError(
            "it is a trained intervention of pyreft (LoReFT or one of its kin): what it adds, R^T(Wh + b - Rh), "
            "depends on the activation h, so no vector can stand for it"
        )
    inner = content[0] if isinstance(content, list) and content else content
    if isinstance(inner, Mapping) and {"projector1", "projector2"} <= set(inner):
        raise UsageError("it is an LM-Steer of EasyEdit: linear maps of the activation, for which no vector can stand")
    if keys and keys <= {*LABELS, OVERALL} and all(map(_is_curve, content.values())):
        raise UsageError(_LAYER_EFFECTS)


def _is_ds4(source: Source, about: Mapping[str, Any]) -> bool:
    """Its JSON, or its rows of float32 without a header: of 43 blocks and width 4096, or with that JSON beside them."""
    if source.kind == "":
        about = small_json(source.path.with_suffix(".json")) or {}
    is_described = str(about.get("format", "")).startswith("ds4-directional-steering")
    return is_described or source.kind == "" and source.size == 43 * 4096 * 4


_LAYER_EFFECTS = (
    "it is layer_effects of the code of arXiv 2506.18167, how much each layer matters for each label: numbers "
    "for a plot and no vectors, which are in its mean_vectors file"
)


def _is_curve(value: Any) -> bool:
    """Whether this is a number for each layer, or several such rows, and no vector of any model."""
    if isinstance(value, Tensor):
        return 0 < value.dim() <= 2 and value.shape[-1] <= 128
    return isinstance(value, list | tuple)
