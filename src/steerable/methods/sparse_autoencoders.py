"""Sparse autoencoders in the format of SAELens: a feature as a direction, and a direction as features.

A folder holds cfg.json and sae_weights.safetensors, as `SAE.save_model` of `sae-lens` writes them. An autoencoder
encodes an activation h as features f >= 0 and decodes them as h ~ sum_i f_i w_i + b, so that the row w_i of W_dec is
what feature i adds to the activation. Only these rows are read: neither the encoder nor any code of `sae-lens`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import check_header, refuse_stand_in, strict_json

#: What one unit of a feature is worth in the stream, for each way in which SAELens normalises activations.
NORMALISATIONS = {
    "none": "a feature's activation of c is worth c times the decoder's row",
    "expected_average_only_in": (
        "activations are divided by their mean norm / sqrt(d) before they are encoded, so a feature's activation of c "
        "is worth c * mean||h|| / sqrt(d) times the decoder's row"
    ),
    "constant_norm_rescale": (
        "each token's activation is given the norm sqrt(d) before it is encoded, so a feature's activation of c is "
        "worth c * ||h|| / sqrt(d) times the decoder's row, at each token another dose"
    ),
    "layer_norm": (
        "each token's activation is centred and divided by its standard deviation before it is encoded, so a feature's "
        "activation of c is worth c * std(h) times the decoder's row, at each token another dose"
    ),
}
_ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
# TransformerLens' names of hooks. In a gated MLP its hook_post is the product, which the last projection reads.
_HOOKS = {
    **{f"hook_{kind}": kind for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    "attn.hook_z": "head_in",
    "mlp.hook_post": "mlp_act",
}


@dataclass(eq=False)
class SparseAutoencoder:
    """The decoder of a sparse autoencoder, and where in a model it belongs.

    Attributes:
        site: where its activations are read.
        decoder: float32 [features, d]: what an activation of 1 of each feature adds to the decoded activation.
        normalisation: a key of `NORMALISATIONS`: what happens to an activation before it is encoded.
        subtracts_bias: whether the decoder's bias is taken off before encoding (SAELens' apply_b_dec_to_input), which
            moves when a feature is active, and not what it adds.
        model_name: the model that it was trained on, as its file says.

    Example:
        >>> autoencoder = st.SparseAutoencoder(st.Site("resid_post", 3), torch.eye(192))
        >>> autoencoder.nearest(2 * torch.eye(192)[7], top=1)
        [(7, 1.0)]
    """

    site: Site
    decoder: Tensor
    normalisation: str = "none"
    subtracts_bias: bool = True
    model_name: str = ""

    def __post_init__(self) -> None:
        if self.normalisation not in NORMALISATIONS:
            names = ", ".join(NORMALISATIONS)
            raise UsageError(f"unknown normalisation {self.normalisation!r} of an autoencoder: expected one of {names}")
        self.decoder = self.decoder.detach().to("cpu", torch.float32)
        if self.decoder.dim() != 2 or not self.decoder.numel() or not self.decoder.isfinite().all():
            raise UsageError(
                f"an autoencoder's decoder has shape {list(self.decoder.shape)}: expected finite numbers [features, d]"
            )

    def direction(self, feature: int, **about: Any) -> Direction:
        """The direction that a feature writes, at the autoencoder's site; about: further fields of the Direction.

        Raises UsageError for no such feature, and for one whose row is zero.
        """
        if not 0 <= feature < len(self.decoder):
            raise UsageError(
                f"there is no feature {feature}: the autoencoder has features 0 to {len(self.decoder) - 1}"
            )
        row = self.decoder[feature].clone()
        if not row.any():
            raise UsageError(f"feature {feature} writes nothing: its row of the decoder is zero")
        return Direction({self.site: row}, **about)

    def nearest(self, vector: Tensor | Direction, top: int = 10) -> list[tuple[int, float]]:
        """The features whose rows have the largest cosine with a vector [d], or with a direction at the same site.

        Returns:
            (feature, cosine), the largest cosine first; at most `top`.

        Raises:
            UsageError: the direction has no vector [d] at the site, or one of another width or of length zero.
        """
        if isinstance(vector, Direction):
            if self.site not in vector.vectors:
                sites = ", ".join(map(str, vector.vectors))
                raise UsageError(
                    f"the autoencoder reads {self.site}, where the direction has no vector: it has {sites}"
                )
            vector = vector.vectors[self.site]
        v = vector.detach().cpu().double().reshape(-1)
        if len(v) != self.decoder.shape[1] or not v.any():
            raise UsageError(
                f"the autoencoder has width {self.decoder.shape[1]}, and the vector has {len(v)} numbers: expected one "
                "vector of this width other than zero"
            )
        rows = self.decoder.double()
        cosines = rows @ v / (rows.norm(dim=1) * v.norm()).clamp_min(1e-300)
        values, features = cosines.topk(min(top, len(rows)))
        return [(int(i), round(float(c), 6)) for i, c in zip(features, values, strict=True)]

    def worth(self, activations: Tensor) -> Tensor:
        """By how many of the decoder's rows an activation is moved when a feature's activation rises by 1.

        Args:
            activations: h [..., d], as the model computes them at the site.

        Returns:
            [...] float64; for "expected_average_only_in" all equal, from the mean norm of these activations.
        """
        h = activations.double()
        root = sqrt(h.shape[-1])
        match self.normalisation:
            case "none":
                return torch.ones(h.shape[:-1], dtype=h.dtype)
            case "layer_norm":
                return h.std(-1)
            case "constant_norm_rescale":
                return h.norm(dim=-1) / root
        return (h.norm(dim=-1).mean() / root).expand(h.shape[:-1])

    @property
    def coefficient(self) -> str:
        """In one sentence, what a coefficient does to the model's activation."""
        bias = ", and the decoder's bias, taken off before encoding, changes nothing in this" * self.subtracts_bias
        return f"with the normalisation {self.normalisation}, {NORMALISATIONS[self.normalisation]}{bias}"


def read_sae(folder: str | Path) -> SparseAutoencoder:
    """A sparse autoencoder from a folder in the format of SAELens: cfg.json and sae_weights.safetensors.

    SAELens' newer files keep the hook in `metadata`, older ones beside the rest or as `hook_point`; all are read. An
    autoencoder of the hub is brought into such a folder by `sae_lens.SAE.from_pretrained(...).save_model(folder)`.

    A block's hook_resid_pre, hook_resid_mid, hook_resid_post, hook_attn_out and hook_mlp_out are the sites of the same
    name, attn.hook_z is head_in and mlp.hook_post is mlp_act; the name of a block's module ("model.layers.12") means
    its output, resid_post.12. Layers count blocks from 0, as here; number 12 of `hidden_states` would be resid_post.11.

    Args:
        folder: holds the two files.

    Returns:
        The autoencoder. Where activations of features are measured in lengths of the decoder's rows
        (`rescale_acts_by_decoder_norm`), the rows have length 1.

    Raises:
        UsageError: no such folder, another format, or an autoencoder of a hook that is no site, in one sentence.

    Example:
        >>> st.read_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre").site  # doctest: +SKIP
        Site(kind='resid_pre', layer=8)
    """
    folder = Path(folder)
    about = _settings(folder / "cfg.json")
    architecture = about.get("architecture", "standard")
    if architecture not in _ARCHITECTURES:
        raise UsageError(
            f"{folder} holds a {architecture}: expected an autoencoder that decodes what it encodes, one of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    site = _site(folder, about)
    decoder = _decoder(folder / "sae_weights.safetensors")
    shape = [about.get("d_sae"), about.get("d_in")]
    if list(decoder.shape) != shape:
        raise UsageError(f"{folder} has W_dec of shape {list(decoder.shape)}: expected {shape}, as its cfg.json says")
    if about.get("rescale_acts_by_decoder_norm"):
        decoder = decoder / decoder.norm(dim=1, keepdim=True).clamp_min(1e-30)
    normalisation = about.get("normalize_activations") or "none"
    if normalisation is True:  # of SAELens before its version 3
        normalisation = "expected_average_only_in"
    try:
        name = str(about.get("model_name") or "")
        return SparseAutoencoder(site, decoder, normalisation, bool(about.get("apply_b_dec_to_input", True)), name)
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from None


def _settings(path: Path) -> dict[str, Any]:
    """The flat content of cfg.json, with the names of today's SAELens. Raises UsageError."""
    refuse_stand_in(path)
    try:
        content = strict_json(path.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(
            f"{path.parent} is no folder of a sparse autoencoder: expected cfg.json and sae_weights.safetensors, as "
            "SAELens saves them"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} holds no settings: expected an object of JSON")
    inner = content.get("metadata", content.get("meta"))
    flat = {**content, **(inner if isinstance(inner, Mapping) else {})}
    older = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index"}
    return {older.get(key, key): value for key, value in flat.items()}


def _site(folder: Path, about: Mapping[str, Any]) -> Site:
    """The site of a hook. Raises UsageError."""
    name = str(about.get("hook_name") or "")
    hook = re.fullmatch(r"blocks\.(\d{1,6})\.([\w.]+)", name)
    module = re.fullmatch(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d{1,6})", name)
    if about.get("hook_head_index") is not None or not (hook and hook[2] in _HOOKS or module):
        whose = f"head {about['hook_head_index']} of " if about.get("hook_head_index") is not None else ""
        raise UsageError(
            f"{folder} is an autoencoder of {whose}{name or 'no hook'}, which is no site: expected blocks.N. and "
            f"one of {', '.join(_HOOKS)}, or the name of a block"
        )
    site = Site(_HOOKS[hook[2]], int(hook[1])) if hook else Site("resid_post", int(module[1]))  # type: ignore[index]
    if about.get("hook_layer") not in (None, site.layer):
        raise UsageError(
            f"{folder} says hook_layer {about['hook_layer']} and hook_name {name}: expected the same layer"
        )
    return site


def _decoder(path: Path) -> Tensor:
    """W_dec [features, d]. Raises UsageError."""
    from safetensors import SafetensorError, safe_open

    refuse_stand_in(path)
    try:
        check_header(path)
        with safe_open(str(path), framework="pt") as file:
            if "W_dec" not in file.keys():  # noqa: SIM118
                raise ValueError("it has no tensor W_dec")
            decoder: Tensor = file.get_tensor("W_dec")
            if "scaling_factor" in file.keys():  # noqa: SIM118
                decoder = decoder * file.get_tensor("scaling_factor")[:, None]
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read as the weights of a sparse autoencoder: {error}") from None
    return decoder.float()
