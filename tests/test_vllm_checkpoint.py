"""Checkpoints with biases in stock vLLM: the tokens and probabilities of the steered model in transformers."""

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

import steerable as st
from steerable.formats import export_file
from steerable.formats.checkpoint import as_checkpoint
from steerable.steering.direction import Direction
from steerable.steering.site import Site

PROMPTS = [list(range(10, 10 + n)) for n in (5, 9, 17)]
TOKENS = 12


def tiny_qwen2():
    """Heads of 32, the least that vLLM's attention on a CPU has."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.2)
    return model


def direction_for(model, size):
    generator = torch.Generator().manual_seed(1)
    shape, layers = model.config.hidden_size, range(model.config.num_hidden_layers)
    return Direction({Site("resid_post", i): size * torch.randn(shape, generator=generator) for i in layers})


def greedy(model, prompt):
    """Tokens, and the log-probabilities of each."""
    ids, found = list(prompt), []
    for _ in range(TOKENS):
        with torch.no_grad():
            row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(row.argmax()))
        found.append(float(row.max()))
    return ids[len(prompt) :], found


@pytest.mark.parametrize("name", ["qwen2", "pocket"])
def test_vllm_runs_the_biased_model(tmp_path, monkeypatch, name):
    model = tiny_qwen2() if name == "qwen2" else st.load("pocket", device="cpu").model
    direction = direction_for(model, 0.3)
    plain = [greedy(model, prompt) for prompt in PROMPTS]
    with st.steer(model, direction):
        expected = [greedy(model, prompt) for prompt in PROMPTS]
    assert [tokens for tokens, _ in expected] != [tokens for tokens, _ in plain]
    as_checkpoint(model, None, direction, tmp_path / "a")

    for key, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(key, value)
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(tmp_path / "a"), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=128, seed=0
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True, detokenize=False)
    done = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    largest = 0.0
    for (tokens, scores), answer in zip(expected, done, strict=True):
        given = answer.outputs[0]
        assert list(given.token_ids) == tokens
        theirs = [row[token].logprob for row, token in zip(given.logprobs, tokens, strict=True)]
        largest = max(largest, *(abs(a - b) for a, b in zip(theirs, scores, strict=True)))
    print(f"{name}: largest difference of log-probabilities {largest:.2g}")
    assert largest < 1e-3


def test_vllm_takes_no_bias_as_an_adapter(tmp_path):
    """Why the checkpoint is there: its LoRA loader refuses the folder of a BEFT adapter."""
    from vllm.lora.peft_helper import PEFTHelper

    model = tiny_qwen2()
    export_file(direction_for(model, 0.3), tmp_path / "a", "peft-beft", model_type="qwen2")
    with pytest.raises(ValueError, match="Missing required configuration fields"):
        PEFTHelper.from_local_dir(str(tmp_path / "a"), max_position_embeddings=128)
