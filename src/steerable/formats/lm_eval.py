"""Files of `lm-eval --model steered`.

`.pt`: {hookpoint: {"steering_vector": [1, d], "steering_coefficient": x, "action": "add" or "clamp", "bias",
"head_index"}}, the hookpoint a module of the base model, such as "layers.3". The `.csv` names features of sparse
autoencoders: its vectors are in those, not in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steerable.formats.foreign import Found, kind_of, number, same_width, vector, warn
from steerable.steering.site import Site
from steerable.store.errors import UsageError

#: First line of the CSV form.
CSV = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient"
_BLOCK = r"(?:\w+\.)*(?:layers|h|blocks)\.([0-9]{1,4})"
_SITES = {
    "resid_post": _BLOCK,
    "attn_out": _BLOCK + r"\.(?:self_attn|attn|attention)(?:\.(?:o_proj|c_proj|dense))?",
    "mlp_out": _BLOCK + r"\.mlp(?:\.(?:down_proj|c_proj|dense_4h_to_h))?",
}


def matches(found: Any) -> bool:
    return (
        isinstance(found, Mapping)
        and bool(found)
        and all(isinstance(v, Mapping) and "steering_vector" in v for v in found.values())
    )


def read(found: Any) -> Found:
    """Raises UsageError for clamps and heads. Coefficients that differ are multiplied in."""
    if not matches(found):
        raise UsageError(f"it holds {kind_of(found)}: expected {{hookpoint: {{'steering_vector', ...}}}}")
    vectors: dict[Site, Tensor] = {}
    coefficients: dict[Site, float] = {}
    for hookpoint, entry in found.items():
        site, where = _site(str(hookpoint)), f"hookpoint {str(hookpoint)[:60]!r}"
        if site in vectors:
            raise UsageError(f"it holds two vectors for {site}")
        if entry.get("action") != "add":
            raise UsageError(
                f"{where} has the action {str(entry.get('action'))[:20]!r}: only additions can be imported"
            )
        if entry.get("head_index") is not None:
            raise UsageError(f"{where} is for one attention head: only vectors of the whole width can be imported")
        if entry.get("bias") is not None:
            raise UsageError(f"{where} has a bias: lm-eval takes none for additions")
        vectors[site] = vector(entry["steering_vector"], f"the vector of {where}")
        coefficients[site] = number(entry.get("steering_coefficient", 1.0), f"the coefficient of {where}")
    same_width(vectors)
    if any(site.kind != "resid_post" for site in vectors):
        warn("a vector for an attention or an MLP adds to what it adds to the stream only where no norm follows it")
    strength = next(iter(coefficients.values()))
    if len(set(coefficients.values())) > 1:
        strength = 1.0
        vectors = {site: vector(v * coefficients[site], f"the vector of {site}") for site, v in vectors.items()}
    return Found(
        format="lm-eval",
        vectors=vectors,
        convention="its hookpoints name blocks",
        strength=strength,
        about={"coefficients": {str(site): c for site, c in coefficients.items()}},
    )


def _site(hookpoint: str) -> Site:
    for kind, pattern in _SITES.items():
        if match := re.fullmatch(pattern, hookpoint):
            return Site(kind, int(match[1]))
    raise UsageError(f"hookpoint {hookpoint[:60]!r} is not known: expected a block ('layers.3'), its attention or MLP")


def refuse_csv() -> Found:
    raise UsageError(
        "an lm-eval CSV names features of sparse autoencoders and holds no vectors: take the rows of W_dec that it "
        "names, times their coefficient, and save them as a .pt"
    )


def content(vectors: Mapping[int, Tensor], strength: float, blocks: str = "layers") -> dict[str, dict[str, Any]]:
    """The dict to `torch.save`; `blocks` is the path of the blocks in the base model ("h" for GPT-2)."""
    return {
        f"{blocks}.{block}": {
            "steering_vector": v[None].clone(),
            "steering_coefficient": float(strength),
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for block, v in sorted(vectors.items())
    }
