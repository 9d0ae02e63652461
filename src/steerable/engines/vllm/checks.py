"""What an engine's config must not have where it steers: ways of running a model in which a layer does not see the
tokens of the step, each once."""

from __future__ import annotations

import os
from typing import Any

import torch

from steerable.engines.vllm.settings import settings_of
from steerable.store.errors import UsageError

CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "NixlConnector")
"""Connectors of vLLM that know blocks by vLLM's own hashes, or requests by their ids."""


def check_config(config: Any) -> None:
    """Raises UsageError for what steering does not go together with, and for layers that the model has not."""
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise UsageError(
            "VLLM_USE_RUST_FRONTEND is set, and that front end does not read the steerings of requests: unset it"
        )
    parallel, cache, drafts = config.parallel_config, config.cache_config, config.speculative_config
    refused = {
        "--kv-sharing-fast-prefill": getattr(cache, "kv_sharing_fast_prefill", False),
        "--enable-dbo": getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False),
        "--prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--enable-expert-parallel beside tensor and data parallelism": getattr(
            parallel, "use_sequence_parallel_moe", False
        ),
        "--enable-prompt-embeds": getattr(config.model_config, "enable_prompt_embeds", False),
        "enable_adaptive_verification of --speculative-config": getattr(drafts, "enable_adaptive_verification", False),
    }
    if names := [name for name, is_on in refused.items() if is_on]:
        raise UsageError(
            f"steering does not go together with {names[0]}, by which layers see other tokens: leave it out"
        )
    transfer = getattr(config, "kv_transfer_config", None)
    if transfer is not None and (connector := transfer.kv_connector) not in CONNECTORS:
        raise UsageError(
            f"steering does not go together with {connector} of --kv-transfer-config, which may know stored texts by "
            f"their tokens alone, however they were steered: take one of {', '.join(CONNECTORS)}"
        )
    settings, text = settings_of(config.additional_config), config.model_config.hf_text_config
    is_latent = getattr(text, "kv_lora_rank", None) is not None
    if config.model_config.dtype == torch.float16 and is_latent and getattr(text, "routed_scaling_factor", 1.0) != 1.0:
        raise UsageError(
            "in float16 vLLM keeps the stream of models like DeepSeek-V3 divided by the routed_scaling_factor, and "
            "no vector would have its strength there: take --dtype bfloat16"
        )
    number = text.num_hidden_layers
    if settings is not None and (beyond := [i for i in settings.layers or () if i >= number]):
        raise UsageError(f"the steering settings name layer {beyond[0]}, and the model has layers 0 to {number - 1}")
