"""Model families: where the parts of a decoder are and what is special about it, one row a `model_type`.

A new family is one row. Think tags belong to the tokenizer, whatever the family: their table is `think.KNOWN`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Where the parts of a decoder are. The defaults are Llama's.

    `blocks` and `final_norm` are attribute paths from the base model (the model without its unembedding), the others
    from a block; None: this model has no such part, or none is known. A path may exist in some blocks only, as
    `mlp.down_proj` in a mixture of experts.
    """

    blocks: str = "layers"
    final_norm: str | None = "norm"
    #: The first module that reads the block's input x: a norm, or with post-norms the attention itself.
    entry: str | None = "input_layernorm"
    #: The attention's last projection: its input is `head_in`, the heads' outputs side by side.
    attention_out: str | None = "self_attn.o_proj"
    #: The module whose output is added to the stream: behind the post-norm where there is one.
    attention_added: str | None = "self_attn.o_proj"
    #: The MLP's last projection: its input is `mlp_act`, the neurons. Experts are fused tensors: they have none.
    mlp_out: str | None = "mlp.down_proj"
    mlp_added: str | None = "mlp"
    #: "pre": x + f(norm(x)); "post": x + norm(f(x)); "both": x + norm(f(norm(x))).
    norms: str = "pre"
    #: The config's switch for x + attention(x) + mlp(x), where no `resid_mid` exists; "always" without a switch.
    parallel: str | None = None
    #: The attention kernel that computes the family's own attention, where transformers' default does not.
    attention: str | None = None
    #: How the engine generates exactly: "slots" where the attention is plain softmax attention, which the engine's own
    #: computes; "slots, own attention" where it differs (soft-caps, sinks, latents, scores scaled by layer) and reads
    #: the engine's cache; None: by `model.generate`.
    route: str | None = None
    #: The stock class that can hold a bias on every map that writes to the stream, beside the family's own: Llama's
    #: does the same arithmetic to the last bit, where no window slides.
    bias_holder: Literal["own", "llama"] = "own"


_LLAMA = Family(route="slots")
_OWN_ATTENTION = replace(_LLAMA, route="slots, own attention")
_SANDWICH = replace(
    _OWN_ATTENTION,
    attention_added="post_attention_layernorm",
    mlp_added="post_feedforward_layernorm",
    norms="both",
)

#: By `model_type` of the config.
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, bias_holder="llama"),
    "qwen2": replace(_LLAMA, bias_holder="llama"),
    "qwen3": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3_moe": _LLAMA,
    # The fused kernels leave out Gemma-2's soft-cap of the attention scores.
    "gemma2": replace(_SANDWICH, attention="eager"),
    "gemma3_text": _SANDWICH,
    "gemma3": replace(_SANDWICH, blocks="language_model.layers", final_norm="language_model.norm"),
    "phi3": replace(_LLAMA, attention_added="resid_attn_dropout", mlp_added="resid_mlp_dropout"),
    "olmo2": replace(_SANDWICH, entry="self_attn", norms="post", route="slots"),
    "gpt2": replace(
        _OWN_ATTENTION,
        blocks="h",
        final_norm="ln_f",
        entry="ln_1",
        attention_out="attn.c_proj",
        attention_added="attn.resid_dropout",
        mlp_out="mlp.c_proj",
    ),
    "gpt_neox": replace(
        _OWN_ATTENTION,
        final_norm="final_layer_norm",
        attention_out="attention.dense",
        attention_added="post_attention_dropout",
        mlp_out="mlp.dense_4h_to_h",
        mlp_added="post_mlp_dropout",
        parallel="use_parallel_residual",
    ),
    "deepseek_v2": _OWN_ATTENTION,
    "deepseek_v3": _OWN_ATTENTION,
    "gpt_oss": _OWN_ATTENTION,
}
#: Types without a row of which nothing is known but a norm behind the MLP and the attention.
_POST_NORM = (
    *("afmoe", "exaone4", "flex_olmo", "gemma3n", "gemma4", "glm4", "hyperclovax", "muse_glimmer", "olmo3"),
    "olmo_hybrid",  # in its layers of softmax attention
)


def has_post_norm(model_type: str) -> bool:
    """Whether a norm stands behind the MLP and the attention in models of this `config.model_type`."""
    known = model_type.removesuffix("_text") in _POST_NORM
    return known or (model_type in FAMILIES and FAMILIES[model_type].norms != "pre")


def post_norm_in(name: str) -> str | None:
    """The family with such a norm that a model's name speaks of ("google/gemma-2-9b"), if any."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return next(
        (t for t in sorted({*FAMILIES, *_POST_NORM}) if has_post_norm(t) and t.replace("_", "") in letters), None
    )
