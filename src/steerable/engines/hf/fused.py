"""Modules of a plain decoder with fewer operations a step, for small models on a CPU.

There the small operations of a decoding step cost as much as its matrix products. The norms, attentions and MLPs of
an engine's own copy of a model are given forward passes that compute the same numbers: one product for queries, keys
and values, one for gate and up, weights laid out as the products read them, and one operation a norm. Every module at
which a model can be steered is still called as a module, so that its hooks act.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerable.engines.hf.slots import Plan, slot_attention
from steerable.models.caches import given_cache

_LARGEST = 50_000_000  # parameters: weights are copied, and in a larger model the matrix products prevail
_ATTENTIONS = {f"{family}Attention" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe")}
_MLPS = {f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2")}


def fuse(model: nn.Module) -> None:
    """Give the modules of an engine's copy of a plain decoder their short forward passes, where the model is small, in
    float32 and on the CPU. Weights are copied: the result is not to outlive a change of the model's."""
    parameters = list(model.parameters())
    if {(p.device.type, p.dtype) for p in parameters} != {("cpu", torch.float32)}:
        return
    if sum(p.numel() for p in parameters) > _LARGEST:
        return
    for module in list(model.modules()):
        part: Any = module
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            part.forward = partial(_norm, part)
        elif name in _ATTENTIONS and _are_plain(part.q_proj, part.k_proj, part.v_proj):
            part.forward = partial(_attention, part, *_interleaved(part))
        elif name in _MLPS and isinstance(part.act_fn, nn.SiLU) and _are_plain(part.gate_proj, part.up_proj):
            part.forward = partial(_mlp, part, *_joined(part.gate_proj, part.up_proj))
        elif type(module) is nn.Linear:
            part._parameters = {**part._parameters, "weight": nn.Parameter(_laid_out(part.weight), False)}


def _are_plain(*modules: nn.Module) -> bool:
    """Whether nothing but their weights would be left out if these were not called."""
    return all(type(m) is nn.Linear and not m._forward_hooks and not m._forward_pre_hooks for m in modules)


def _joined(*linears: Any, order: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one linear map that does the work of several, its outputs in another order if there is one."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    if order is not None:
        weight, bias = weight[order], None if bias is None else bias[order]
    return _laid_out(weight), bias


def _interleaved(attention: Any) -> tuple[Tensor, Tensor | None]:
    """The joined projections of an attention, in whose queries and keys the two numbers that a rotary position turns
    stand side by side, as a complex number's parts do. Scores do not depend on the order, if it is one for both."""
    dim = attention.head_dim
    pairs = torch.arange(dim).view(2, dim // 2).t().reshape(-1)
    for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)):
        if norm is not None:
            norm._parameters = {"weight": nn.Parameter(norm.weight.detach()[pairs], False)}
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    turned, rest = (attention.q_proj.out_features + attention.k_proj.out_features, attention.v_proj.out_features)
    heads = torch.arange(0, turned, dim)[:, None]
    order = torch.cat([(heads + pairs).view(-1), torch.arange(turned, turned + rest)])
    return _joined(*projections, order=order)


def _laid_out(weight: Tensor) -> Tensor:
    """The same matrix [out, in] with the columns of its transpose side by side in memory: the faster product."""
    return weight.detach().t().contiguous().t()


def _norm(norm: Any, x: Tensor) -> Tensor:
    # `F.rms_norm` is put together from eight operations on a CPU; a norm is one, and the rest of the scale is small.
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1])
    return x.mul(scale.add_(norm.variance_epsilon).rsqrt_()).mul_(norm.weight)


def _attention(
    attention: Any,
    weight: Tensor,
    bias: Tensor | None,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    rows, length = hidden_states.shape[:2]
    dim = attention.head_dim
    heads = F.linear(hidden_states, weight, bias).view(rows, length, -1, dim)
    shared = attention.num_key_value_groups
    queries = heads.shape[2] * shared // (shared + 2)
    keys = queries // shared
    turned, value = heads.split([queries + keys, keys], dim=2)
    if hasattr(attention, "q_norm"):
        query, key = turned.split([queries, keys], dim=2)
        turned = torch.cat([attention.q_norm(query), attention.k_norm(key)], dim=2)
    cos, sin = (x[:, :, None, : dim // 2] for x in position_embeddings)  # the second half is the same
    pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    query, key = torch.view_as_real(pairs).flatten(-2).transpose(1, 2).split([queries, keys], dim=1)
    key, value = given_cache(kwargs).update(key, value.transpose(1, 2), attention.layer_idx)
    out, _ = slot_attention(attention, query, key, value, attention_mask, attention.scaling, plan)
    return attention.o_proj(out.view(rows, length, -1)), None


def _mlp(mlp: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
    return mlp.down_proj(F.silu(gate).mul_(up))  # type: ignore[no-any-return]
