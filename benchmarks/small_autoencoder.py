"""A small sparse autoencoder of SmolLM2 for `everyday_recipes.py`, since none is published for this model.

TopK (Gao et al. 2024, arXiv 2406.04093): f = top_k(W_enc (h - b) + b_enc), h ~ W_dec f + b, rows of W_dec of length 1,
and the squared error as the loss. It is trained on the tokens of the bundled pairs of sentences and of the model's own
replies to everyday questions, and saved in the format of SAELens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from contrasts import ROOT
from safetensors.torch import save_file
from torch import Tensor

from steerable.chains.text_pairs import read_pairs
from steerable.engines.activations import capture
from steerable.evals.calibration import replies
from steerable.models import loading as models

SEEDS = 12  # of replies to each question


def texts(loaded: models.Loaded) -> list[str]:
    """All sentences of the pairs, and the model's replies with other seeds than the calibration's."""
    pairs = [read_pairs(path) for path in sorted((ROOT / "examples/contrasts").glob("*.jsonl"))]
    told = [one for seed in range(1, SEEDS + 1) for one in replies(*loaded, seed=1000 * seed)]
    return [
        *(loaded.tokenizer.decode(one.ids, skip_special_tokens=True) for one in told),
        *(str(text) for sides in pairs for side in sides for text in side),
    ]


def train(
    loaded: models.Loaded,
    folder: Path,
    *,
    layer: int,
    features: int = 2304,
    k: int = 16,
    steps: int = 3000,
    batch: int = 512,
    rate: float = 1e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """Train it on the output of a block and save it; what it explains of tokens that it was not trained on."""
    site = f"resid_post.{layer}"
    read = [text for text in texts(loaded) if text.strip()]
    [h] = capture(*loaded, read, sites=[site], reduce="none").values()
    h = h[h.norm(dim=1) < 5 * h.norm(dim=1).median()]  # attention sinks would be all that there is to explain
    draws = torch.Generator().manual_seed(seed)
    h = h[torch.randperm(len(h), generator=draws)]
    cut = len(h) * 9 // 10
    trained, held_out = h[:cut], h[cut:]
    b_dec = trained.mean(0)
    scale = (trained - b_dec).norm(dim=1).mean()
    w_dec = torch.nn.functional.normalize(torch.randn(features, h.shape[1], generator=draws), dim=1)
    weights = {"W_dec": w_dec, "W_enc": w_dec.T.clone(), "b_enc": torch.zeros(features), "b_dec": b_dec / scale}
    for value in weights.values():
        value.requires_grad_(True)
    optimizer = torch.optim.Adam(weights.values(), rate)
    spread = trained.var(0).sum() / scale**2
    for step in range(steps):
        drawn = trained[torch.randint(len(trained), (batch,), generator=draws)] / scale
        loss = (decoded(weights, drawn, k) - drawn).square().sum(1).mean() / spread
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            w_dec /= w_dec.norm(dim=1, keepdim=True)
    with torch.no_grad():
        error = (decoded(weights, held_out / scale, k) - held_out / scale).square().sum(1).mean()
        explained = 1 - float(error / (held_out.var(0).sum() / scale**2))
        # In the model's own units: an activation is `scale` times what it was here.
        kept = {name: value.detach() * (scale if name.startswith("b_") else 1.0) for name, value in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in kept.items()}, folder / "sae_weights.safetensors")
    about = {
        "architecture": "topk", "d_in": h.shape[1], "d_sae": features, "k": k, "apply_b_dec_to_input": True,
        "normalize_activations": "none", "hook_name": f"blocks.{layer}.hook_resid_post", "model_name": "smol",
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(about, indent=1))
    return {"layer": layer, "features": features, "k": k, "tokens": cut, "explained": round(explained, 3)}


def decoded(weights: dict[str, Tensor], h: Tensor, k: int) -> Tensor:
    """What the k most active features make of activations."""
    values, chosen = ((h - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).topk(k, dim=1)
    features = torch.zeros(len(h), len(weights["b_enc"])).scatter(1, chosen, values.relu())
    return features @ weights["W_dec"] + weights["b_dec"]
