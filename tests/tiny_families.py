"""One tiny model for each family, built from its config with random weights: no file, no network.

`from tiny_families import families, tiny` in any test (conftest.py puts this folder on the path).
Four layers at least, a vocabulary of 64, hidden size 32, no special token ids but padding (0). Biases and norm
weights are random, since what starts at zero or one hides mistakes; sliding windows are shorter than the texts.
"""

import torch
from conftest import slow

VOCABULARY = 64

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
GEMMA = {
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "sliding_window": 4,
    "layer_types": SLIDING,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 8.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "first_k_dense_replace": 2,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}

# model type -> (config class, model class, options beside COMMON)
SHAPES: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 5, "head_dim": 12}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": SLIDING, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", EXPERTS | {"head_dim": 12, "mlp_only_layers": [1]}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA | {"attn_logit_softcapping": None}),
    "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration", GEMMA | {"final_logit_softcapping": None}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": 5, "num_attention_heads": 4}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"attention_bias": True}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", MLA | {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", MLA),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 4}
        | {"layer_types": SLIDING, "rope_parameters": YARN},
    ),
}
FAMILY_NAMES = tuple(SHAPES)
#: Of each way to be different one: biases, norms of queries, windows, sinks, latent attention, learned positions.
QUICK = ("llama", "qwen3", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2")


def families(names=FAMILY_NAMES):
    """Parameters of a test: the quick lane has a few of these families."""
    return [name if name in QUICK else slow(name) for name in names]


_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 6,  # more than the decoder has, so that the longest list of blocks is the wrong one
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tiny(name: str, *, seed: int = 0, attention: str | None = None, **options):
    """The family's model in evaluation mode, float32, parameters without gradients.

    attention: "sdpa" or "eager"; options replace the config's (of the text model, in the multimodal one).
    """
    import transformers

    config_name, model_name, own = SHAPES[name]
    settings = COMMON | own | options
    config_class = getattr(transformers, config_name)
    if name == "gpt2":
        settings = {_GPT2_NAMES.get(key, key): v for key, v in settings.items() if key != "num_key_value_heads"}
    if name == "gpt_neox":
        settings.pop("num_key_value_heads")
    if name == "gemma3":
        config = config_class(
            text_config=settings, vision_config=_VISION, mm_tokens_per_image=4, image_token_id=VOCABULARY - 1
        )
    else:
        config = config_class(**settings)
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.abs().max() == 0:  # norms, biases, sinks
                parameter += 0.2 * torch.randn_like(parameter)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer += 0.05 * torch.randn_like(buffer)
    return model
