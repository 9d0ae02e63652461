"""Small models and a tokenizer, built once. None needs a network."""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 64


def build(config_class, model_class, seed=0, **options):
    config = config_class(
        **{
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
        | options
    )
    torch.manual_seed(seed)
    model = model_class(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start at zero, where a mistake would not show
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test material that is not part of the repository."""
    beside = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("STEERABLE_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"no test material at {folder}: set STEERABLE_SHARED")
    return folder


@pytest.fixture(scope="session")
def tiny_llama():
    return build(LlamaConfig, LlamaForCausalLM, seed=1)


@pytest.fixture(scope="session")
def tiny_qwen2():
    return build(Qwen2Config, Qwen2ForCausalLM, seed=2)


@pytest.fixture(scope="session")
def stories(shared):
    """A real small Llama."""
    folder = shared / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="session", params=["tiny_llama", "tiny_qwen2", "stories"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; id 1 is <think>, 2 </think>, 3 a paragraph break; the template opens the block."""
    words = ["<pad>", "<think>", "</think>", "\n\n", "<user>", "<assistant>", "<unk>"]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<think>", "</think>", "\n\n"],
        chat_template="{% for m in messages %}<user> {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant> <think>{% endif %}",
    )
