import copy

import pytest
import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

import steerable as st
from steerable.models import loading as models
from steerable.models import sources
from steerable.store.errors import SteerableWarning, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama, tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_load(folder, tiny_llama):
    model, tokenizer = st.load(folder, device="cpu")
    ids = torch.tensor([tokenizer("w1 w2 w3")["input_ids"]])
    assert torch.equal(model(ids).logits, tiny_llama(ids).logits)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert models.model_id(model) == "tiny"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_load_dtype(folder, dtype):
    assert st.load(folder, dtype=dtype, device="cpu").model.dtype == torch.bfloat16


def test_a_model_that_sees_is_loaded_for_its_text(tmp_path, tokenizer):
    """Transformers does not count it among the causal language models (Magistral, Ministral 3, Qwen3-VL)."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sees = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **small}
    text = {"model_type": "gemma2", "vocab_size": 64, "head_dim": 8, "num_key_value_heads": 1, **small}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=sees, text_config=text)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = st.load(tmp_path, device="cpu").model
    ids = torch.arange(4, 12)[None]
    model.set_attn_implementation("eager")  # as the text model needs it
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", ["float33", "load"])
def test_unknown_dtype(folder, dtype):
    with pytest.raises(UsageError, match="unknown dtype"):
        st.load(folder, dtype=dtype)


def test_no_such_model(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "pin", lambda name, revision: (revision, False))
    for name in (tmp_path, tmp_path / "nothing", "nobody/nothing"):
        with pytest.raises(UsageError) as error:
            st.load(name)
        assert str(name) in str(error.value) and "\n" not in str(error.value)


def test_parts(model):
    assert models.n_layers(model) == model.config.num_hidden_layers == len(models.blocks(model))
    assert models.width(model) == model.config.hidden_size
    assert models.final_norm(model) is model.model.norm
    assert models.unembed(model) is model.lm_head
    assert models.blocks(models.base(model)) is models.blocks(model)  # also without the unembedding


def test_unknown_family_by_its_structure(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    model.config.model_type = "cousin"
    with pytest.warns(SteerableWarning, match="'cousin' are not known; guessed from the structure: blocks layers"):
        found = models.family(model)
    assert models.family(model) is found
    assert (found.blocks, found.final_norm, found.attention_out) == ("layers", "norm", "self_attn.o_proj")
    with pytest.raises(UsageError, match="'Linear' are not known"):
        models.family(nn.Linear(1, 1))


def test_missing_pocket_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_POCKET", tmp_path)
    with pytest.raises(UsageError, match="weights are missing"):
        st.load("pocket")
