"""Model folders of stock classes: the same function as the hook, the adapter and the folded bias."""

import copy
import json

import pytest
import torch
import transformers
from tiny_families import tiny
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

import steerable as st
from steerable.formats import export_file, import_file
from steerable.formats.checkpoint import as_checkpoint
from steerable.models import writers as edits
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, UsageError

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
FULL = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}  # no window: what most Qwen2 have


def direction_of(model, kind="resid_post", size=0.3, **about):
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(3)
    return Direction({Site(kind, i): size * torch.randn(width, generator=generator) for i in range(layers)}, **about)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def greedy(model, ids):
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None)
    return out[:, ids.shape[1] :]


def read(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def in_type(model, dtype, folder):
    """Loaded in a type: `model.to(dtype)` would round the rotary frequencies too, which no loaded model has."""
    model.to(dtype).save_pretrained(folder)
    return read(folder)


BASES = {
    "llama": lambda: tiny("llama", attention_bias=False, mlp_bias=False),
    "qwen2, tied": lambda: tiny("qwen2", **FULL),
    "qwen2, untied": lambda: tiny("qwen2", **FULL | {"tie_word_embeddings": False}),
    "pocket": lambda: st.load("pocket", device="cpu").model,
}


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["resid_post", "resid_mid"])
@pytest.mark.parametrize("name", BASES)
def test_four_ways_are_one_function(tmp_path, name, kind, dtype):
    """Hook, PEFT adapter, folded bias, checkpoint: equal logits to 1e-6, the same greedy tokens, with the cache.

    In float32 as a part of the largest logit, 4 to 16: (x + W n) + b and x + (W n + b) round differently there.
    """
    PeftModel = pytest.importorskip("peft").PeftModel
    base = BASES[name]().to(dtype)
    direction, plain = direction_of(base, kind), logits(base)
    export_file(direction, tmp_path / "adapter", "peft-beft", model_type=base.config.model_type)
    as_checkpoint(base, None, direction, tmp_path / "checkpoint")
    assert torch.equal(logits(base), plain)  # the model is as it was

    found, written = {}, {}
    with st.steer(base, direction):
        found["hook"], written["hook"] = logits(base), greedy(base, IDS)
    with edits.restoring(base):
        edits.fold(base, direction)
        found["folded"], written["folded"] = logits(base), greedy(base, IDS)
    checkpoint = read(tmp_path / "checkpoint")
    found["checkpoint"], written["checkpoint"] = logits(checkpoint), greedy(checkpoint, IDS)
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    found["adapter"], written["adapter"] = logits(adapted), greedy(adapted, IDS)

    assert type(checkpoint) is LlamaForCausalLM and checkpoint.dtype == dtype
    limit = 1e-6 if dtype == torch.float64 else 2e-6 * found["hook"].abs().max()
    for way in found:
        assert (found[way] - found["hook"]).abs().max() < limit, way
        assert torch.equal(written[way], written["hook"]), way
    assert (found["hook"] - plain).abs().max() > 0.1

    back = import_file(tmp_path / "adapter")
    assert [v.numpy().tobytes() for v in back.vectors.values()] == [
        v.numpy().tobytes() for v in direction.vectors.values()
    ]
    again = edits.extract_bias(checkpoint, base=base)
    assert again.vectors.keys() == direction.vectors.keys()
    exact = not (kind == "resid_mid" and name == "pocket")  # there the biases were not zero before
    close = {"rtol": 0, "atol": 0 if exact else 1e-6}
    for site, v in direction.vectors.items():
        torch.testing.assert_close(again.vectors[site], v, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("name", "options"), [("llama", {"mlp_bias": False}), ("qwen2", FULL), ("mistral", {"sliding_window": None})]
)
def test_zero_biases_change_nothing(tmp_path, name, options, tied, dtype):
    """Not one bit; what an engine must have loaded before biases can be pushed to it."""
    from safetensors.torch import load_file

    base = in_type(tiny(name, **options | {"tie_word_embeddings": tied}), dtype, tmp_path / "base")
    as_checkpoint(base, None, None, tmp_path / "a")
    model = read(tmp_path / "a")
    assert type(model) is LlamaForCausalLM and model.dtype == dtype
    assert torch.equal(logits(model), logits(base)) and torch.equal(greedy(model, IDS), greedy(base, IDS))
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert ("lm_head.weight" in tensors) == (not tied)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    ours = base.state_dict()
    added = tensors.keys() - ours.keys()
    assert {f"model.layers.{i}.mlp.down_proj.bias" for i in range(4)} <= added
    assert not any(tensors[key].any() for key in added)
    assert all(torch.equal(tensors[key], ours[key]) for key in tensors.keys() - added)
    assert {t.dtype for t in tensors.values()} == {dtype}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["mlp_bias"] and not {"sliding_window", "layer_types", "use_sliding_window"} & config.keys()
    about = ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "pad_token_id")
    theirs = base.config.to_dict()
    assert all(config[key] == theirs[key] for key in about)
    assert config["head_dim"] == base.model.layers[0].self_attn.head_dim


def test_rope_scaling_is_kept(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    base = tiny("qwen2", **FULL | {"rope_parameters": yarn})
    as_checkpoint(base, None, None, tmp_path / "a")
    ids = IDS.repeat(1, 6)
    assert torch.equal(logits(read(tmp_path / "a"), ids), logits(base, ids))


def test_trained_biases_are_written(tmp_path):
    """Float32 while they are trained, in the weights' type in the file: the same numbers come out of both models."""
    base = in_type(tiny("qwen2", **FULL), torch.bfloat16, tmp_path / "base")
    parameters = edits.add_bias(base, [1, 2])
    for parameter, v in zip(parameters, direction_of(base).vectors.values(), strict=False):
        parameter.data += v
    as_checkpoint(base, None, None, tmp_path / "a")
    model = read(tmp_path / "a")
    assert torch.equal(logits(model), logits(base)) and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert parameters[0].dtype == torch.float32
    trained = edits.extract_bias(base)
    edits.remove_bias(base)
    found = edits.extract_bias(model, base=base)
    assert list(found.vectors) == [Site("resid_post", 1), Site("resid_post", 2)]
    assert all(torch.allclose(found.vectors[s], v, rtol=2**-8) for s, v in trained.vectors.items())


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("gpt2", "resid_post", {}),
        ("gpt2", "resid_mid", {}),
        ("gpt_neox", "resid_post", {}),
        ("gpt_neox", "attn_out", {"tie_word_embeddings": True}),
        ("qwen3", "resid_mid", {}),
        ("gpt_oss", "resid_mid", {"tie_word_embeddings": True}),
    ],
)
def test_classes_that_have_the_bias(tmp_path, name, kind, options):
    base = tiny(name, **options)
    direction = direction_of(base, kind)
    with st.steer(base, direction):
        hooked = logits(base)
    as_checkpoint(base, None, direction, tmp_path / "a")
    model = read(tmp_path / "a")
    assert type(model) is type(base)
    torch.testing.assert_close(logits(model), hooked, rtol=1e-6, atol=1e-5)


@pytest.mark.filterwarnings("ignore::steerable.store.errors.SteerableWarning")  # no table lists these types
@pytest.mark.parametrize("name", ["SmolLM3", "Phi"])
def test_types_that_no_table_lists(tmp_path, name):
    """A class with the switch that Llama's has, and one that has the bias."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = getattr(transformers, f"{name}Config")(**sizes, num_attention_heads=4, pad_token_id=0)
    base = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    direction = direction_of(base)
    with st.steer(base, direction):
        hooked = logits(base)
    as_checkpoint(base, None, direction, tmp_path / "a")
    model = read(tmp_path / "a")
    assert type(model) is type(base)
    torch.testing.assert_close(logits(model), hooked, rtol=1e-6, atol=1e-5)


def test_refusals(tmp_path):
    target = tmp_path / "a"
    for base, reason in (
        (tiny("qwen3"), "no stock class of transformers holds a qwen3 model.*steer with a hook, or export an adapter"),
        (tiny("phi3"), "no stock class"),
        (tiny("qwen2"), "sliding window"),
        (tiny("mistral"), "sliding window"),
        (tiny("gemma2"), "norm stands behind"),
        (tiny("qwen3_moe"), "mixture of experts"),
        (tiny("llama").to("meta"), "not all in memory"),
        (tiny("qwen2", **FULL | {"hidden_size": 34, "head_dim": 8}), "no stock class"),  # no multiple of its heads
        (torch.nn.Linear(2, 2), "expected a plain model of transformers"),
    ):
        with pytest.raises(UsageError, match=reason):
            as_checkpoint(base, None, None, target)
    base = tiny("llama")
    base.steering = torch.nn.Linear(3, 3)
    with pytest.raises(UsageError, match="holds steering.bias, which LlamaForCausalLM does not know"):
        as_checkpoint(base, None, None, target)
    base = tiny("llama")
    with pytest.raises(UsageError, match="gate 'thinking'"):
        as_checkpoint(base, None, direction_of(base, gate="thinking"), target)
    base.config.quantization_config = {"quant_method": "x"}
    with pytest.raises(UsageError, match="quantised"):
        as_checkpoint(base, None, None, target)

    class Own(LlamaForCausalLM):
        pass

    Own.__module__ = "elsewhere"
    with pytest.raises(UsageError, match="no stock class"):
        as_checkpoint(Own(tiny("llama").config), None, None, target)
    assert not list(tmp_path.iterdir())
    target.write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        as_checkpoint(tiny("llama"), None, None, target)
    assert target.read_text() == "mine"


def test_whole_or_not_at_all(tmp_path, tokenizer, monkeypatch):
    base = tiny("llama")
    (tmp_path / ".a.tmp").mkdir()
    (tmp_path / ".a.tmp" / "left by a killed process").write_text("")

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "save_pretrained", full)
        with pytest.raises(SteerableError, match="cannot write the folder.*No space left"):
            as_checkpoint(base, tokenizer, None, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()  # an empty folder will do
    assert as_checkpoint(base, tokenizer, None, tmp_path / "a") == tmp_path / "a"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "a").iterdir()}


def test_generation_config_is_kept(tmp_path):
    base = tiny("qwen2", **FULL)
    base.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[7, 9])
    as_checkpoint(base, None, None, tmp_path / "a")
    kept = read(tmp_path / "a").generation_config
    assert (kept.temperature, kept.top_p, kept.eos_token_id, kept.do_sample) == (0.6, 0.9, [7, 9], True)


# --- tokenizers: which class AutoTokenizer takes depends on the type of the model beside it ---

TEXTS = ["  Wait, 12345 + 67 = ?\n\n", "don't re-check", "<think>\nétude 東京 \t x_1</think>", "a" * 40]
TEMPLATE = "{% for m in messages %}<u>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def pairs():
    """A byte-pair tokenizer that cuts digits otherwise than Qwen2's rules do."""
    inner = Tokenizer(kinds.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<pad>", "<end>"])
    inner.train_from_iterator(["12345 12345 6767 6767 wait, re-check don't " * 9], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE, padding_side="left"
    )


def same(a, b):
    chat = [{"role": "user", "content": TEXTS[0]}]
    assert a.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == b.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert [a(text)["input_ids"] for text in TEXTS] == [b(text)["input_ids"] for text in TEXTS]
    assert (a.eos_token_id, a.pad_token_id, a.padding_side) == (b.eos_token_id, b.pad_token_id, b.padding_side)


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "Qwen2TokenizerFast", "LlamaTokenizerFast"])
def test_tokenizer_of_a_qwen2_folder(tmp_path, pairs, named):
    """What AutoTokenizer makes of the base's folder, whatever class that names, it makes of the checkpoint too."""
    base = tmp_path / "base"
    tiny("qwen2", **FULL | {"vocab_size": 330}).save_pretrained(base)
    pairs.save_pretrained(base)
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": named}))
    loaded = st.load(base, device="cpu")
    assert isinstance(loaded.model, Qwen2ForCausalLM)
    as_checkpoint(*loaded, None, tmp_path / "a")
    same(AutoTokenizer.from_pretrained(tmp_path / "a"), loaded.tokenizer)


def test_tokenizer_made_by_hand(tmp_path, pairs):
    as_checkpoint(tiny("llama", vocab_size=330), pairs, None, tmp_path / "a")
    same(AutoTokenizer.from_pretrained(tmp_path / "a"), pairs)


def test_tokenizer_whose_class_would_build_it_anew(tmp_path, pairs):
    base = tmp_path / "base"
    tiny("qwen2", **FULL | {"vocab_size": 330}).save_pretrained(base)
    pairs.save_pretrained(base)
    changed = AutoTokenizer.from_pretrained(base)
    assert type(changed).__name__ == "Qwen2Tokenizer"  # AutoTokenizer's choice for the type
    changed.backend_tokenizer.pre_tokenizer = pairs.backend_tokenizer.pre_tokenizer
    as_checkpoint(tiny("llama", vocab_size=330), changed, None, tmp_path / "a")
    same(AutoTokenizer.from_pretrained(tmp_path / "a"), changed)


def test_tokenizer_that_would_come_back_as_another(tmp_path, pairs):
    class Changed(PreTrainedTokenizerFast):
        def save_pretrained(self, folder, **options):
            pairs.save_pretrained(folder)

    changed = Changed(tokenizer_object=pairs.backend_tokenizer, eos_token="<pad>")
    with pytest.raises(SteerableError, match="AutoTokenizer would not read this Changed back"):
        as_checkpoint(tiny("llama", vocab_size=330), changed, None, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# --- as a format of export_file ---


def test_export(tmp_path, tokenizer):
    base = tiny("qwen2", **FULL)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    direction = direction_of(base, strength=0.5)
    with pytest.raises(UsageError, match="give --model"):
        export_file(direction, tmp_path / "a", "checkpoint", fold_strength=True)
    with pytest.raises(UsageError, match="give --fold-strength"):
        export_file(direction, tmp_path / "a", "checkpoint", model=tmp_path / "base")
    done = export_file(
        direction, tmp_path / "a", "checkpoint", model=tmp_path / "base", fold_strength=True, layers=[1, 2]
    )
    json.dumps(done)
    assert (done["layers"], done["width"], done["strength"]) == ([1, 2], 32, 1.0)
    with st.steer(base, direction.only([1, 2])):
        hooked = logits(base)
    loaded = st.load(tmp_path / "a", device="cpu")
    torch.testing.assert_close(logits(loaded.model), hooked, rtol=1e-6, atol=1e-5)
    again = export_file(direction.only([1]), tmp_path / "b", "checkpoint", model=loaded, fold_strength=True)
    assert again["layers"] == [1]
