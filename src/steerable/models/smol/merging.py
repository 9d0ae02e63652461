"""`smol-think` as an ordinary model folder: SmolLM2 with the adapter in its weights, and its own chat template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from steerable.models import loading as models

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def write_merged(adapter: Path, folder: Path) -> None:
    """Merge a LoRA adapter of PEFT's format into `smol` and write the model.

    Args:
        adapter: the folder of `adapter_config.json` and `adapter_model.safetensors`.
        folder: an existing one, to be filled.

    Raises:
        UsageError: `smol` is not on this machine.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale, weights = config["lora_alpha"] / config["r"], load_file(adapter / "adapter_model.safetensors")
    loaded = models.load("smol", dtype="float32", device="cpu")
    suffix = ".lora_A.weight"
    for name in (key.removesuffix(suffix) for key in weights if key.endswith(suffix)):
        a, b = (weights[f"{name}.lora_{part}.weight"].float() for part in "AB")
        weight = loaded.model.get_parameter(f"{name.removeprefix('base_model.model.')}.weight")
        with torch.no_grad():
            weight += scale * (b @ a)
    loaded.tokenizer.chat_template = TEMPLATE
    # Sampling is how the model is meant to be used: greedy decoding shows only the mode of the writer's choices.
    stops = models.stop_ids(loaded.model)
    loaded.model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=500,
        eos_token_id=stops,
        pad_token_id=loaded.tokenizer.pad_token_id,
    )
    with models.no_progress_bar():
        loaded.tokenizer.save_pretrained(folder)
        loaded.model.save_pretrained(folder)
