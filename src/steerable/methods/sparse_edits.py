"""Steer2Edit: a steering vector as sparse edits of rank 1 of the heads and neurons that carry it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from steerable.methods.weight_patch import Change, WeightPatch, WritingMap
from steerable.models import loading as models
from steerable.models.writers import Place
from steerable.steering.site import Site
from steerable.store.errors import UsageError

_SITES = {"attention": ("head_in", "attn_out"), "mlp": ("mlp_act", "mlp_out")}


def elastic_net_edits(
    model: nn.Module,
    positive: Mapping[Site, Tensor],
    negative: Mapping[Site, Tensor],
    *,
    alpha: float,
    rho_attention: float | None = None,
    rho_mlp: float | None = None,
) -> WeightPatch:
    """W_i' = W_i + lambda_i v k_i^T of every head and every neuron i, with a strength lambda_i that is mostly zero.

        g_i      = cos(v, W_i mu_i)                                how much the component writes along v
        k_i      = W_i^T v / ||W_i^T v||                           (of a neuron +1 or -1)
        lambda_i = sign(g_i) max(|g_i| - rho alpha, 0) / (rho (1 - alpha))

    Steer2Edit, arXiv 2602.09870. Of each layer's attention and MLP, v is the difference of the two groups' mean
    outputs, scaled to length 1, and mu the mean of their mean inputs; W_i are the columns of the last map that read
    component i. lambda maximises g lambda - rho (alpha |lambda| + (1 - alpha) / 2 lambda^2). All components of a layer
    share v, so the edit of each map is of rank 1, and two vectors hold it. It pushes the output at the mean input
    towards v: for shorter chains the positive group is the short one.

    The strengths do not depend on how large the weights are, so rho and alpha are to be tuned for each model (in the
    paper from a grid of 0.1, 0.3 ... 0.9). The published code computes in the model's bfloat16 and counts an example
    without response tokens as zeros; here it is float64, and such examples are for the caller to leave out.

    Args:
        model: not changed.
        positive: activations at `head_in` and `attn_out`, at `mlp_act` and `mlp_out`, or at all of them, of the layers
            to edit; [examples, width], each row the mean over the tokens that predict one example's response.
        negative: the same of the other group; the counts may differ.
        alpha: the share of the penalty that makes lambda sparse, from 0 to less than 1.
        rho_attention: the penalty on heads, above 0; None leaves the attention as it is.
        rho_mlp: the same on neurons.

    Returns:
        A patch of the maps in which some lambda is not zero. `stats` hold the settings and, for each map, how many
        components are edited.

    Raises:
        UsageError: settings out of range, groups that do not fit each other, outputs without a difference, a mixture of
            experts, a norm behind a map, quantised weights.
    """
    rho = {"attention": rho_attention, "mlp": rho_mlp}
    if not 0 <= alpha < 1:
        raise UsageError(f"alpha is {alpha}: expected a number from 0 to less than 1")
    if all(r is None for r in rho.values()):
        raise UsageError("neither heads nor neurons are to be edited: give rho_attention, rho_mlp or both")
    changes: dict[str, Change] = {}
    edited: dict[str, int] = {}
    for after, penalty in rho.items():
        if penalty is None:
            continue
        if not (math.isfinite(penalty) and penalty > 0):
            raise UsageError(f"rho_{after} is {penalty}: expected a number above 0, or None to leave the {after} out")
        reads, writes = _SITES[after]
        layers = sorted({site.layer for site in {*positive, *negative} if site.kind in (reads, writes)})
        if not layers:
            raise UsageError(f"rho_{after} needs activations at {reads} and {writes}: capture these")
        for layer in layers:
            writing = WritingMap(model, Place(layer, after))
            w = writing.matrix.cpu()
            inputs = [_mean(group, Site(reads, layer), w.shape[1]) for group in (positive, negative)]
            outputs = [_mean(group, Site(writes, layer), w.shape[0]) for group in (positive, negative)]
            v, mu = outputs[0] - outputs[1], (inputs[0] + inputs[1]) / 2
            if not v.any():
                raise UsageError(f"the two groups have the same mean at {Site(writes, layer)}: there is no direction")
            v = v / v.norm()
            components = models.n_heads(model, layer) if after == "attention" else w.shape[1]
            strengths, k = _strengths(w, v, mu, components, penalty, alpha)
            if strengths.any():
                changes[writing.name] = writing.difference(v[:, None], (strengths[:, None] * k).view(1, -1))
                edited[writing.name] = int(strengths.count_nonzero())
    return WeightPatch(
        changes,
        method="Steer2Edit",
        model_id=models.model_id(model),
        model_revision=models.model_revision(model),
        stats={"alpha": alpha, "rho_attention": rho_attention, "rho_mlp": rho_mlp, "edited": edited},
    )


def _strengths(w: Tensor, v: Tensor, mu: Tensor, components: int, rho: float, alpha: float) -> tuple[Tensor, Tensor]:
    """lambda [components] and k [components, columns] of equal slices of w's columns; zero where a component writes
    nothing."""
    slices = w.view(len(w), components, -1)
    written = torch.einsum("dcn,cn->cd", slices, mu.view(components, -1))
    importance = (written @ v) / written.norm(dim=1).clamp_min(1e-300)
    k = (v @ w).view(components, -1)
    size = (importance.abs() - rho * alpha).clamp_min(0) / (rho * (1 - alpha))
    return importance.sign() * size, k / k.norm(dim=1, keepdim=True).clamp_min(1e-300)


def _mean(group: Mapping[Site, Tensor], site: Site, width: int) -> Tensor:
    """The mean of one group's rows, in float64. Raises UsageError where they do not fit."""
    if site not in group:
        raise UsageError(f"a group has no activations at {site}: both need the inputs and the outputs of each layer")
    h = group[site]
    if h.dim() != 2 or not len(h) or h.shape[1] != width or not h.isfinite().all():
        raise UsageError(f"the activations at {site} have shape {tuple(h.shape)}: expected [n, {width}], finite")
    return h.cpu().double().mean(0)
