"""LASER: the best approximation of one weight matrix by one of lower rank."""

from __future__ import annotations

import torch
from torch import nn

from steerable.methods.weight_patch import LowRank, Replacement, WeightPatch, as_kept, check_weight
from steerable.models import loading as models
from steerable.steering.float64 import wide
from steerable.store.errors import UsageError


def truncate_matrix(model: nn.Module, name: str, rank: int) -> WeightPatch:
    """W' = U_k S_k V_k^T, the k largest singular values of one matrix and their vectors.

    Layer-selective rank reduction, Sharma et al. 2023 (LASER, arXiv 2312.13558). The paper gives the rank as a share
    rho of the largest one, k = floor(rho min(m, n)), and gains most by truncating an input matrix of a late MLP
    (`mlp.up_proj`, `mlp.gate_proj`), down to rho = 0.01; layer, matrix and rank are to be chosen on held-out data.

    The published code takes a randomised decomposition (`torch.svd_lowrank`, two iterations), which is approximate and
    depends on the seed; here it is exact, in float64.

    Args:
        model: not changed.
        name: the matrix's name in the model's state dict, "model.layers.20.mlp.up_proj.weight".
        rank: k, less than the matrix's smaller side.

    Returns:
        A patch of this matrix, [m, n], in factors of k (m + n) numbers: what is left of it; or, where that is smaller,
        what is taken away, of rank min(m, n) - k. `stats` hold the rank and the share of ||W||^2 that is left.

    Raises:
        UsageError: no such weight, no matrix (the fused tensor of a mixture of experts), quantised, or no such rank.
    """
    weights = dict(models.unwrap(model).named_parameters(remove_duplicate=False))
    if name not in weights:
        raise UsageError(f"the model has no weight {name}: expected a name as in its state dict, ending in .weight")
    weight = weights[name].detach()
    if weight.dim() != 2:
        raise UsageError(f"{name} has shape {tuple(weight.shape)}: expected a matrix, which experts and biases are not")
    check_weight(name, weight)
    smaller = min(weight.shape)
    if not 0 < rank < smaller:
        raise UsageError(f"the rank is {rank}: expected 1 to {smaller - 1}, less than the smaller side of {name}")
    u, s, vh = torch.linalg.svd(wide(weight), full_matrices=False)
    kind: type[LowRank] = Replacement
    left, right = u[:, :rank] * s[:rank], vh[:rank]
    if rank > smaller - rank:
        kind, left, right = LowRank, -u[:, rank:] * s[rank:], vh[rank:]
    return WeightPatch(
        {name: kind(as_kept(left, weight), as_kept(right, weight))},
        method="LASER",
        model_id=models.model_id(model),
        model_revision=models.model_revision(model),
        stats={"rank": rank, "explained": float((s[:rank] ** 2).sum() / (s**2).sum().clamp_min(1e-300))},
    )
