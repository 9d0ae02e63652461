"""What is compared with a base: told apart, refused in a sentence, and really what it says."""

import importlib.util
import json
import pickle

import pytest
import torch
from gguf_models import TOKENS, write_gguf
from tiny_families import tiny
from transformers import LlamaConfig, LlamaForCausalLM

import steerable as st
from steerable.formats import export_file
from steerable.jobs.arms import check_arms, find_arms, fingerprint, opener, parse_arms, steering
from steerable.models.loading import Loaded
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

peft = pytest.importorskip("peft")

IDS = torch.arange(1, 11)[None]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A base model's folder, `base`, with a place for arms beside it."""
    root = tmp_path_factory.mktemp("arms")
    model = tiny("qwen2")
    model.generation_config.update(do_sample=True, eos_token_id=[7], pad_token_id=0)
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    return root


@pytest.fixture(scope="module")
def base(folder):
    return st.load(folder / "base", device="cpu")


def fresh(folder):
    return st.load(folder / "base", device="cpu").model


@pytest.fixture(scope="module")
def lora(folder):
    """An adapter with random weights, and the logits that PEFT itself computes with it, unmerged."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj"], init_lora_weights=False, lora_dropout=0.1)
    model = peft.get_peft_model(fresh(folder), config).eval()
    model.save_pretrained(folder / "lora")
    return folder / "lora", model(input_ids=IDS).logits.detach()


def arm(base_folder, name, source):
    return find_arms(str(base_folder), {name: source})[1]


def test_names(tmp_path):
    (tmp_path / "bias.safetensors").write_bytes(b"")
    file = tmp_path / "bias.safetensors"
    assert parse_arms([str(file), "lora=runs/x=y/adapter", "runs/full/model"]) == {
        "bias": str(file), "lora": "runs/x=y/adapter", "model": "runs/full/model",
    }  # fmt: skip
    with pytest.raises(UsageError, match="two arms are named 'model'"):
        parse_arms(["a/model", "b/model"])
    with pytest.raises(UsageError, match="names no file: expected NAME=FILE"):
        parse_arms(["bias="])
    for name in ("base", "Tasks", "passk", "a/b", "", ".x"):
        with pytest.raises(UsageError, match="an arm cannot be named"):
            find_arms("pocket", {name: file})


def test_kinds(tmp_path, folder, lora):
    (tmp_path / "v.safetensors").write_bytes(b"")
    given = {"bias": tmp_path / "v.safetensors", "lora": lora[0], "full": folder / "base", "hub": "owner/model"}
    assert [a.kind for a in find_arms("pocket", given)] == ["base", "direction", "adapter", "model", "model"]
    export_file(st.Direction({Site("resid_post", 1): torch.ones(4)}), tmp_path / "vectors/v.gguf", "repeng", n_layers=3)
    (tmp_path / "gguf").mkdir()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), **sizes))
    model = write_gguf(tmp_path / "gguf/m.gguf", llama)
    given = {
        "vectors": tmp_path / "vectors/v.gguf",
        "file": model,
        "folder": tmp_path / "gguf",
        "hub": "owner/model/m.gguf",
    }
    assert [a.kind for a in find_arms("pocket", given)][1:] == ["direction", "model", "model", "model"]
    with pytest.raises(UsageError, match="holds neither config.json nor adapter_config.json"):
        find_arms("pocket", {"x": tmp_path})
    for source in ("runs/none.safetensors", "nothing", "a/b/c"):
        with pytest.raises(UsageError, match=f"there is no file or folder '{source}': expected a direction file"):
            find_arms("pocket", {"x": source})
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(UsageError, match="cannot be read"):
        find_arms("pocket", {"x": tmp_path})
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UsageError, match="is no JSON object"):
        find_arms("pocket", {"x": tmp_path})


def test_fingerprints(tmp_path, folder, lora):
    one = arm(folder, "x", lora[0])
    before = fingerprint(one)
    assert before == fingerprint(one) != fingerprint(arm(folder, "x", folder / "base"))
    config = lora[0] / "adapter_config.json"
    text = config.read_text()
    config.write_text(text + " ")
    try:
        assert fingerprint(one) != before
    finally:
        config.write_text(text)
    assert fingerprint(arm(folder, "x", "owner/model")) == "owner/model"


# --- adapters ---


def test_a_lora_is_merged(folder, base, lora):
    """Also as a worker opens it, from what it is sent."""
    one = arm(folder / "base", "lora", lora[0])
    check_arms([one], base)
    assert steering(one) == ()
    before = base.model(input_ids=IDS).logits
    opened = pickle.loads(pickle.dumps(opener(one, base)))()
    logits = opened.model(input_ids=IDS).logits
    torch.testing.assert_close(logits, lora[1], atol=1e-5, rtol=1e-5)
    assert (logits - before).abs().max() > 0.1
    assert type(opened.model) is type(base.model) and not any(p.requires_grad for p in opened.model.parameters())
    assert torch.equal(base.model(input_ids=IDS).logits, before)  # the base itself stays as it was


def test_an_adapter_of_another_shape_is_refused(folder, base, tokenizer, tmp_path):
    """PEFT takes one with more or fewer layers without an error, and leaves the rest out."""
    for layers in (2, 6):
        config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
        options = {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
        peft.get_peft_model(tiny("qwen2", **options), config).save_pretrained(tmp_path / str(layers))
        with pytest.raises(UsageError, match="made for another model"):
            opener(arm(folder, "x", tmp_path / str(layers)), base)()
    config = peft.LoraConfig(r=2, target_modules=["down_proj"])
    peft.get_peft_model(tiny("qwen2", hidden_size=16), config).save_pretrained(tmp_path / "narrow")
    with pytest.raises(UsageError, match="does not fit the base"):
        opener(arm(folder, "x", tmp_path / "narrow"), base)()


def test_what_cannot_be_merged_is_refused(folder, base, tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(tiny("qwen2"), config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="PROMPT_TUNING cannot be merged into the weights: give a LoRA"):
        opener(arm(folder, "x", tmp_path), base)()


def test_no_pickle_and_no_peft(folder, base, tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="has no adapter_model.safetensors"):
        check_arms([arm(folder, "x", tmp_path)], base)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(UsageError, match="needs the library peft: pip install peft"):
        check_arms([arm(folder, "x", tmp_path)], base)


def test_an_adapter_of_another_base_is_told(folder, base, lora, tmp_path):
    for file in lora[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "Qwen/Qwen2.5-7B"}))
    with pytest.warns(SteerableWarning, match="'x' is an adapter of 'Qwen/Qwen2.5-7B', the base is 'base'"):
        check_arms([arm(folder, "x", tmp_path)], base)


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias", "error::steerable.SteerableWarning")
def test_a_trained_bias_is_steered(folder, base, tmp_path):
    """PEFT's BEFT cannot be merged into a model without these biases; as vectors it is the same function."""
    model = peft.get_peft_model(fresh(folder), peft.BeftConfig(target_modules=["down_proj"]))
    for name, parameter in model.named_parameters():
        if "beft" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    one = arm(folder / "base", "bias", tmp_path)
    assert one.kind == "direction"
    check_arms([one], base)
    with st.steer(base.model, steering(one)):
        torch.testing.assert_close(base.model(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


# --- directions and models ---


def test_a_direction_keeps_its_own_strength(folder, base, tmp_path):
    st.Direction({Site("resid_post", 1): torch.ones(32)}, strength=0.25).save(tmp_path / "v.safetensors")
    one = arm(folder, "v", tmp_path / "v.safetensors")
    check_arms([one], base)
    assert [part.strength for part in steering(one)] == [0.25]
    st.Direction({Site("resid_post", 1): torch.ones(16)}).save(tmp_path / "narrow.safetensors")
    with pytest.raises(UsageError, match="has width 16, but the model's width there is 32"):
        check_arms([arm(folder, "v", tmp_path / "narrow.safetensors")], base)


def test_a_checkpoint_speaks_with_the_base_s_prompts(folder, base, tmp_path, tokenizer):
    model = tiny("qwen2", seed=5)
    model.generation_config.update(do_sample=False, eos_token_id=9)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    one = arm(folder / "base", "full", tmp_path)
    check_arms([one], base)
    opened = pickle.loads(pickle.dumps(opener(one, base)))()
    assert isinstance(opened, Loaded)
    assert opened.tokenizer.chat_template == base.tokenizer.chat_template
    assert opened.model.generation_config.eos_token_id == [7]  # the stop tokens are the base's, too
    torch.testing.assert_close(opened.model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    tiny("qwen2", vocab_size=80).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="vocabulary of 80 tokens, the base of 64"):
        check_arms([one], base)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a loadable model folder"):
        check_arms([one], base)
