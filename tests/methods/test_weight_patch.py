"""Weight patches: the same function applied and as hooks, taken back bit for bit, saved and merged."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import steerable as st
from steerable.engines.sampling import Decoding
from steerable.methods import weight_patch
from steerable.methods.weight_patch import LowRank, Replacement, dense
from steerable.models.writers import fold
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
DOWN = "model.layers.1.mlp.down_proj"


def random(*shape, seed=0, dtype=torch.float64):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def bits(model):
    return {name: t.contiguous().view(torch.uint8).clone() for name, t in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def patch_of(model, names, dtype=torch.float64, **about):
    """A random change of each weight, of low rank where it is a matrix and the count is even."""
    changes = {}
    for i, name in enumerate(names):
        shape = model.get_parameter(name).shape
        if len(shape) == 2 and i % 2 == 0:
            changes[name] = LowRank(random(shape[0], 2, seed=i, dtype=dtype), random(2, shape[1], seed=-i, dtype=dtype))
        else:
            changes[name] = random(*shape, seed=i, dtype=dtype)
    return st.WeightPatch(changes, **about)


#: The dense and the low-rank change of linear layers, Conv1D, embeddings (tied in GPT-2), and a bias.
WEIGHTS = {
    "llama": [DOWN + ".weight", "model.layers.2.self_attn.o_proj.weight", DOWN + ".bias", "model.embed_tokens.weight"],
    "gpt2": [
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.1.attn.c_proj.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
    ],
    "gemma3_text": ["model.embed_tokens.weight"],  # whose rows are scaled
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_applied_and_hooked_are_the_sum_of_weights(name):
    model = tiny(name).double()
    patch, before, plain = patch_of(model, WEIGHTS[name]), bits(model), logits(model)
    by_hand = copy.deepcopy(model)
    for key, change in patch.changes.items():
        by_hand.get_parameter(key).add_(change.left @ change.right if isinstance(change, LowRank) else change)
    expected = logits(by_hand)
    assert (expected - plain).abs().max() > 0.1
    with patch.apply(model):
        assert torch.equal(logits(model), expected)
        assert same_bits(bits(model), bits(by_hand))
    assert same_bits(bits(model), before)
    with patch.hooked(model):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)
        assert same_bits(bits(model), before)
    assert torch.equal(logits(model), plain)


def test_a_replacement_is_applied_hooked_and_saved(tmp_path):
    """In a linear layer, Conv1D and an embedding, in two types; the old weight has no part in it."""
    for family, weight, dtype in (
        ("llama", DOWN + ".weight", torch.float64),
        ("gpt2", "transformer.h.0.mlp.c_proj.weight", torch.float64),
        ("gpt2", "transformer.wpe.weight", torch.float64),
        ("llama", DOWN + ".weight", torch.bfloat16),
    ):
        model = tiny(family).to(dtype)
        rows, columns = model.get_parameter(weight).shape
        kept = torch.promote_types(dtype, torch.float32)
        change = Replacement(random(rows, 2, dtype=kept), random(2, columns, seed=1, dtype=kept))
        patch = st.WeightPatch.load(st.WeightPatch({weight: change}).save(tmp_path / "patch.safetensors"))
        assert type(patch.changes[weight]) is Replacement
        before = bits(model)
        with patch.apply(model):
            expected = logits(model)
            assert torch.equal(model.get_parameter(weight), (change.left.double() @ change.right.double()).to(dtype))
        assert same_bits(bits(model), before)
        with patch.hooked(model):
            atol = 1e-10 if dtype == torch.float64 else 0.1
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=atol)
        assert (logits(model) - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_revert_is_exact_in_lower_precision_and_after_an_exception(dtype):
    model = tiny("llama").to(dtype)
    patch, before = patch_of(model, WEIGHTS["llama"], torch.float32), bits(model)
    with pytest.raises(ZeroDivisionError), patch.apply(model):
        assert not same_bits(bits(model), before)
        raise ZeroDivisionError
    assert same_bits(bits(model), before)
    with pytest.raises(ZeroDivisionError), patch.hooked(model):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("size", "is_lost"), [(1e-6, True), (1e-3, False)])
def test_a_patch_that_rounding_takes_away_is_told(size, is_lost):
    """A weight of 0.02 has steps of 1e-4 in bfloat16."""
    model, name = tiny("llama").bfloat16(), DOWN + ".weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.fill_(0.02)
    patch, before = st.WeightPatch({name: torch.full(weight.shape, size)}), bits(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", SteerableWarning)
        with patch.apply(model):
            assert same_bits(bits(model), before) == is_lost
        with st.WeightPatch({name: torch.zeros(weight.shape)}).apply(model):
            pass
        with patch.apply(model.float()):
            pass
    text = f"most of the patch is lost in the rounding to bfloat16 in 1 of 1 weight, {name} the first"
    assert [text in str(w.message) for w in told] == [True] * is_lost


def test_a_patch_that_stops_halfway_leaves_nothing_behind(monkeypatch):
    model = tiny("llama")
    patch, before = patch_of(model, WEIGHTS["llama"], torch.float32), bits(model)
    last = list(patch.changes.values())[-1]

    def out_of_memory(change):
        if change is last:
            raise MemoryError
        return dense(change)

    monkeypatch.setattr(weight_patch, "dense", out_of_memory)
    with pytest.raises(MemoryError):
        patch.apply(model)
    assert same_bits(bits(model), before)


def test_patches_on_each_other_are_reverted_in_turn():
    model = tiny("llama")
    first, second = (patch_of(model, names, torch.float32) for names in (WEIGHTS["llama"], [DOWN + ".weight"]))
    before = bits(model)
    a = first.apply(model)
    between = bits(model)
    b = second.apply(model)
    with pytest.raises(UsageError, match="applied to the same weights later"):
        a.revert()
    b.revert()
    assert same_bits(bits(model), between)
    a.revert()
    a.revert()
    assert same_bits(bits(model), before)


def test_nothing_to_change_changes_nothing():
    model, patch = tiny("llama"), st.WeightPatch({})
    before, plain = bits(model), logits(model)
    with patch.apply(model), patch.hooked(model):
        assert same_bits(bits(model), before) and torch.equal(logits(model), plain)


def test_file(tmp_path):
    model = tiny("llama")
    about = {"method": "m", "model_id": "x", "model_revision": "abc", "stats": {"heads": [[1, 2]], "weight": 0.5}}
    patch = patch_of(model, WEIGHTS["llama"], torch.float32, **about)
    again = st.WeightPatch.load(patch.save(tmp_path / "patch.safetensors"))
    assert again.to_bytes() == patch.to_bytes()
    assert {key: getattr(again, key) for key in about} == about
    assert again.changes.keys() == patch.changes.keys()
    for name, change in patch.changes.items():
        assert type(again.changes[name]) is type(change)
        pairs = zip(again.changes[name], change, strict=True)
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)
    matrix = model.get_parameter(DOWN + ".weight")
    one = st.WeightPatch({DOWN + ".weight": LowRank(random(32, 1), random(1, 48))})
    assert len(one.to_bytes()) < matrix.numel() * matrix.element_size()


def test_unsound_files(tmp_path):
    with pytest.raises(UsageError, match="there is no patch file"):
        st.WeightPatch.load(tmp_path / "none")
    path = tmp_path / "file"
    good = '{"method": "", "model_id": "", "model_revision": "", "stats": {}, "version": "1"}'
    x = torch.ones(3, 2)
    cases = [
        ({"w": x}, None, "its metadata do not say"),
        ({"w": x}, good.replace('"1"', '"9"'), "expected version 1"),
        ({"w": x}, good.replace('"stats": {}', '"stats": []'), "stats"),
        ({"w": x}, good.replace('"method": ""', '"method": 3'), "must be texts"),
        ({"w|left": x}, good, "unknown tensor"),
        ({"w|left": x, "w|right": x.clone()}, good, "must be left"),
        ({"w|left": x, "w|new right": x.clone()}, good, "unknown tensor"),
        ({"w": x.half()}, good, "float32 or float64"),
        ({"w": x * torch.nan}, good, "NaN"),
    ]
    for tensors, text, sentence in cases:
        save_file(tensors, path, None if text is None else {"steerable.patch": text})
        with pytest.raises(SteerableError, match=sentence):
            st.WeightPatch.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(SteerableError, match="not a sound patch file"):
        st.WeightPatch.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_checkpoint(tmp_path, dtype, tokenizer):
    tiny("qwen3").to(dtype).save_pretrained(tmp_path / "plain")  # tied embeddings
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    names = [DOWN + ".weight", "model.layers.0.self_attn.o_proj.weight", "model.embed_tokens.weight"]
    patch, before = patch_of(model, names, torch.float32), bits(model)
    patch.merge(model, tokenizer, tmp_path / "merged")
    assert same_bits(bits(model), before)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(merged) is type(model) and merged.dtype == dtype
    with patch.apply(model):
        assert torch.equal(logits(merged), logits(model))
    assert not torch.equal(logits(merged), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("w1 w2") == tokenizer.encode("w1 w2")
    with pytest.raises(UsageError, match="is there already"):
        patch.merge(model, None, tmp_path / "merged")
    assert same_bits(bits(model), before)


def test_a_merged_checkpoint_has_the_folded_biases_too(tmp_path):
    model = tiny("llama", mlp_bias=False)
    patch = patch_of(model, [DOWN + ".weight"], torch.float32)
    fold(model, st.Direction({st.Site("resid_post", 1): torch.ones(32)}))
    patch.merge(model, None, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with patch.apply(model):
        torch.testing.assert_close(logits(merged), logits(model))


def test_wrong_models():
    model = tiny("llama")
    x = torch.ones(2, 3)
    with pytest.raises(UsageError, match=r"no weight nothing\.weight"):
        st.WeightPatch({"nothing.weight": x}).apply(model)
    with pytest.raises(UsageError, match=r"has shape \(32, 48\), its change \(2, 3\)"):
        st.WeightPatch({DOWN + ".weight": x}).apply(model)
    before = bits(model)
    huge = st.WeightPatch(
        {DOWN + ".bias": torch.ones(32), DOWN + ".weight": torch.full((32, 48), 1e300, dtype=torch.float64)}
    )
    with pytest.raises(UsageError, match="is beyond float32"):
        huge.apply(model)
    assert same_bits(bits(model), before)
    with (
        pytest.raises(UsageError, match="has no hook form"),
        st.WeightPatch({"model.norm.weight": torch.ones(32)}).hooked(model),
    ):
        pass
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4)
    )
    name = "model.decoder.embed_positions.weight"
    with pytest.raises(UsageError, match="has no hook form"), st.WeightPatch({name: torch.ones(2050, 32)}).hooked(opt):
        pass
    tied = tiny("qwen3")
    two = {name: torch.ones(64, 32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    with pytest.raises(UsageError, match="are one in this model"):
        st.WeightPatch(two).apply(tied)
    with pytest.raises(UsageError, match="not in memory"):
        st.WeightPatch({DOWN + ".bias": torch.ones(32)}).apply(model.to("meta"))
    with pytest.raises(UsageError, match="what JSON can hold"):
        st.WeightPatch({}, stats={"x": torch.ones(1)}).to_bytes()


def test_the_engine_generates_with_it():
    model, tokenizer = st.load("pocket", device="cpu")
    names = [f"model.layers.1.{part}.weight" for part in ("mlp.up_proj", "self_attn.o_proj", "mlp.down_proj")]
    patch = patch_of(model, [*names, "model.embed_tokens.weight"], torch.float32)
    engine = st.TransformersEngine(model, tokenizer)
    ids = tokenizer("Find the value of w in the equation: 2*w + 8 = 30")["input_ids"]

    def written():
        (completion,) = engine.generate(
            [st.Request(prompt_ids=ids, decoding=Decoding(temperature=0))], max_new_tokens=12
        )
        return completion.ids

    plain = written()
    with patch.apply(model):
        applied = written()
        ids_of_all = torch.tensor([[*ids, *applied]])
        greedy = logits(model, ids_of_all)[0, len(ids) - 1 : -1].argmax(-1)
    with patch.hooked(model):
        hooked = written()
    assert applied == hooked == greedy.tolist() != plain == written()


def test_a_patch_of_another_model_warns():
    model = st.load("pocket", device="cpu").model
    patch = st.WeightPatch({"model.norm.weight": torch.zeros(192)}, model_id="other")
    with pytest.warns(SteerableWarning, match="this weight patch was made on 'other'"):
        patch.apply(model).revert()
