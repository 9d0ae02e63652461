"""Sparse autoencoders as SAELens saves them, of random weights."""

import json

import torch
from safetensors.torch import save_file


def make_sae(folder, hook, *, features=40, width=32, tensors=None, flat=False, **settings):
    """Write a folder with cfg.json and sae_weights.safetensors; flat: without `metadata`, as SAELens before version 6.
    Gives the weights."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (width, features), "W_dec": (features, width), "b_enc": (features,), "b_dec": (width,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | (tensors or {})
    place = {"hook_name": hook, "model_name": "some-model", "hook_head_index": None}
    cfg = {
        "d_in": width,
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "architecture": "standard",
        **(place if flat else {"metadata": {**place, "sae_lens_version": "6.12.1"}}),
        **settings,
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return weights
