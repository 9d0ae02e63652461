"""Biases of the maps that write to the stream: the same function as a hook, in every family that can hold them."""

import copy

import pytest
import torch
from tiny_families import families, tiny

import steerable as st
from steerable.models import loading as models
from steerable.models import writers as edits
from steerable.models.taps import tap
from steerable.models.writers import AFTER, Place, linear
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
NORM_BEHIND = {"gemma2", "gemma3_text", "gemma3", "olmo2"}
EXPERTS = {"qwen2_moe": [1], "qwen3_moe": [1], "deepseek_v2": [0, 1], "deepseek_v3": [0, 1], "gpt_oss": []}


def vector(seed, width=32, size=0.3):
    return size * torch.randn(width, generator=torch.Generator().manual_seed(seed))


def direction_at(*sites, **about):
    return Direction({site: vector(i) for i, site in enumerate(sites)}, **about)


def train(parameters):
    """Something other than zero in every bias."""
    for seed, parameter in enumerate(parameters):
        parameter.data += vector(seed, len(parameter)).to(parameter)
    return parameters


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def double(name, **options):
    """Float64, where equal functions differ by 1e-15 and other ones by far more than the 1e-6 that are asked for."""
    model = tiny(name, **options).double()
    if hasattr(model.config, "experts_implementation") or name in EXPERTS:
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    return model


# --- every family ---


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("name", families())
def test_a_bias_is_a_hook(name, after):
    model = double(name)
    plain, state = logits(model), copy.deepcopy(model.state_dict())
    layers = None
    if name in NORM_BEHIND:
        with pytest.raises(UsageError, match="a norm stands behind"):
            edits.add_bias(model, after=after)
        return
    if name in EXPERTS and after == "mlp":
        with pytest.raises(UsageError, match="a mixture of experts"):
            edits.add_bias(model, after=after)
        with edits.restoring(model):  # which refuses a model with added biases
            pass
        layers = EXPERTS[name]
        if not layers:
            return
    train(edits.add_bias(model, layers, after))
    direction = edits.extract_bias(model, behaviour="b", method="m")
    assert direction.layers == (layers or [0, 1, 2, 3]) and (direction.behaviour, direction.method) == ("b", "m")
    kind = "resid_post" if after == "mlp" else "attn_out" if models.is_parallel(model) else "resid_mid"
    assert {site.kind for site in direction.vectors} == {kind}
    biased = logits(model)
    edits.remove_bias(model)
    assert torch.equal(logits(model), plain)
    assert state.keys() == model.state_dict().keys()
    with st.steer(model, direction), torch.no_grad():
        hooked = model(IDS).logits
    with edits.restoring(model):
        edits.fold(model, direction)
        folded = logits(model)
    assert (biased - hooked).abs().max() < 1e-6 and (folded - hooked).abs().max() < 1e-6
    assert (hooked - plain).abs().max() > 0.1
    assert torch.equal(logits(model), plain)


def unknown(name, **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        **options,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).double().eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore::steerable.store.errors.SteerableWarning")
@pytest.mark.parametrize(
    ("name", "options", "refused"),
    [
        ("Granite", {"residual_multiplier": 0.22}, "no single last linear map"),
        ("Glm4", {"head_dim": 8}, "norm stands behind"),
        ("Cohere", {}, None),
        ("SmolLM3", {"mlp_bias": True}, None),
        ("Phi", {}, None),
    ],
)
def test_types_that_no_table_lists(name, options, refused):
    """What their structure proves; a factor behind the map (Granite) is no sum."""
    model = unknown(name, **options)
    plain = logits(model)
    if refused:
        with pytest.raises(UsageError, match=refused):
            edits.add_bias(model)
        return
    train(edits.add_bias(model))
    direction, biased = edits.extract_bias(model), logits(model)
    edits.remove_bias(model)
    with st.steer(model, direction):
        assert (logits(model) - biased).abs().max() < 1e-6 < (biased - plain).abs().max()


# --- training ---


@pytest.mark.parametrize(("name", "after"), [("llama", "mlp"), ("gpt2", "attention")])
def test_gradients_are_those_of_the_vector(name, after):
    model = double(name)
    where = Site("resid_post" if after == "mlp" else "resid_mid", 1)
    leaf = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    with tap(model, {where: lambda h: h + leaf}):
        model(IDS).logits.square().mean().backward()
    (bias,) = edits.add_bias(model, [1], after)
    model(IDS).logits.square().mean().backward()
    torch.testing.assert_close(bias.grad, leaf.grad, rtol=1e-9, atol=1e-12)
    assert [p for p in model.parameters() if p.grad is not None] == [bias]


def test_names_are_those_of_stock_classes():
    model = tiny("qwen2")
    parameters = edits.add_bias(model, [0, 2])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == ["model.layers.0.mlp.down_proj.bias", "model.layers.2.mlp.down_proj.bias"]
    assert all(a is b for a, b in zip(trained.values(), parameters, strict=True))
    assert not any(p.any() for p in parameters) and all(p.dtype == torch.float32 for p in parameters)
    assert edits.add_bias(model, [0, 2])[0] is parameters[0]  # asked for again: the same


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_small_steps_are_kept_beside_narrow_weights(name):
    """Float32 parameters, and a forward pass that is to the bit the one of a model with rounded biases."""
    model = tiny(name).to(torch.bfloat16)
    stock = copy.deepcopy(model)
    bias = edits.add_bias(model, [1])[0]
    assert bias.dtype == torch.float32
    start = bias.detach().clone()
    bias.data += 0.3
    for _ in range(8):
        bias.data += 2.0**-12  # in bfloat16 the sum would be 0.3 again
    assert torch.allclose(bias.detach() - start, torch.full([32], 0.3 + 8 * 2.0**-12), atol=1e-6)
    linear(stock, Place(1, "mlp")).bias = torch.nn.Parameter(bias.detach().to(torch.bfloat16))
    assert torch.equal(logits(model), logits(stock))
    model(IDS).logits.float().square().mean().backward()
    assert bias.grad.dtype == torch.float32 and bias.grad.any()
    other = copy.deepcopy(model)  # as trainers make for a reference
    linear(other, Place(1, "mlp")).bias.data.zero_()
    assert torch.equal(logits(model), logits(stock)) and not torch.equal(logits(other), logits(stock))
    assert edits.add_bias(tiny("llama").to(torch.bfloat16), dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    edits.remove_bias(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in tiny(name).modules()}


def test_what_was_there_is_not_part_of_the_direction():
    model = tiny("gpt2")
    before = linear(model, Place(2, "mlp")).bias
    was = before.clone()
    (bias,) = edits.add_bias(model, [2])
    assert torch.equal(bias, was) and bias is not before
    bias.data += 1.0
    found = edits.extract_bias(model)
    assert list(found.vectors) == [Site("resid_post", 2)] and torch.allclose(found.at(2), torch.ones(32), atol=1e-6)
    edits.remove_bias(model)
    assert linear(model, Place(2, "mlp")).bias is before and torch.equal(before, was)


def test_training_can_begin_with_a_direction():
    model = tiny("llama").to(torch.bfloat16)
    direction = direction_at(Site("resid_post", 1))
    edits.fold(model, direction)
    folded = logits(model)
    (bias,) = edits.add_bias(model, [1])
    assert bias.dtype == torch.float32 and bias.requires_grad and torch.equal(logits(model), folded)
    assert torch.allclose(edits.extract_bias(model).at(1), direction.at(1), atol=0.01)
    bias.data.add_(1)
    assert torch.allclose(edits.extract_bias(model).at(1), direction.at(1) + 1, atol=0.01)


def test_modules_of_accelerate():
    """Layers that accelerate has put hooks around are run by way of these, not by way of their class."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny("llama").to(torch.bfloat16)
    plain, module = logits(model), linear(model, Place(1, "mlp"))
    add_hook_to_module(module, AlignDevicesHook("cpu"))
    (bias,) = edits.add_bias(model, [1])
    bias.data += vector(0)
    biased = logits(model)
    edits.remove_bias(model)
    assert torch.equal(logits(model), plain) and not torch.equal(biased, plain)
    with st.steer(model, direction_at(Site("resid_post", 1))):
        assert (logits(model) - biased).abs().max() < 0.25  # bfloat16, logits of some 10


def test_bad_layers():
    model = tiny("llama")
    for layers, after, reason in (
        ([4], "mlp", "out of range"),
        ([-1], "mlp", "out of range"),
        ([1, 1], "mlp", "each once"),
        ([], "mlp", "one at least"),
        ([1], "norm", "unknown place 'norm'"),
    ):
        with pytest.raises(UsageError, match=reason):
            edits.add_bias(model, layers, after)
    with pytest.raises(UsageError, match="kept on disk"):
        edits.add_bias(model.to("meta"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_weights(tmp_path, tokenizer, dtype):
    pytest.importorskip("bitsandbytes")
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = st.load(tmp_path, device="cpu", dtype=dtype, quantization="8bit")
    plain = logits(model)
    where = Site("resid_post", 1)
    with st.steer(model, Direction({where: vector(0, 64)})):
        hooked = logits(model)
    (bias,) = edits.add_bias(model, [1])
    bias.data += vector(0, 64)
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == "float32" else {"atol": 0.2, "rtol": 0.05}
    torch.testing.assert_close(logits(model), hooked, **close)
    assert bias.dtype == torch.float32 and not torch.equal(plain, hooked)
    model(IDS).logits.float().square().mean().backward()
    assert bias.grad.any()
    edits.remove_bias(model)
    assert torch.equal(logits(model), plain)


# --- directions folded in ---


def test_every_site_of_the_stream():
    model = double("llama")
    sites = [Site(*s) for s in (("resid_post", 0), ("mlp_out", 0), ("resid_pre", 2), ("resid_mid", 2), ("attn_out", 3))]
    direction = direction_at(*sites, strength=-0.7)
    for strength in (None, 1.5):
        with st.steer(model, direction, strength=strength):
            hooked = logits(model)
        with edits.restoring(model):
            edits.fold(model, direction, strength)
            assert (logits(model) - hooked).abs().max() < 1e-6
            found = edits.extract_bias(model)
            assert [str(s) for s in found.vectors] == ["resid_post.0", "resid_post.1", "resid_mid.2", "resid_mid.3"]
        with edits.restoring(model):  # in two steps
            edits.fold(model, direction, strength)
            edits.fold(model, direction, -(direction.strength if strength is None else strength))
            assert all(v.abs().max() < 1e-6 for v in edits.extract_bias(model).vectors.values())


def test_strength_zero_changes_nothing():
    model = tiny("llama", mlp_bias=False)
    plain, names = logits(model), set(model.state_dict())
    edits.fold(model, direction_at(Site("resid_post", 1)), 0)
    assert torch.equal(logits(model), plain) and set(model.state_dict()) == names


def test_what_no_bias_does():
    model = tiny("llama")
    plain = logits(model)
    ok = Site("resid_post", 0)
    for bad, reason in (
        (direction_at(ok, gate="thinking"), "gate 'thinking'"),
        (direction_at(ok, Site("resid_pre", 0)), "no bias adds a vector at resid_pre.0"),
        (direction_at(ok, Site("head_in", 1)), "no bias adds a vector at head_in.1"),
        (direction_at(ok, Site("resid_post", 9)), "out of range"),
        (Direction({ok: torch.ones(2, 32)}), "one vector a site"),
        (Direction({ok: torch.ones(31)}), "made on this model"),
        (direction_at(ok, strength=1e39), "beyond float32"),
    ):
        with pytest.raises(UsageError, match=reason):
            edits.fold(model, bad)
        assert torch.equal(logits(model), plain)
    model.config._name_or_path = "org/model"
    with pytest.warns(SteerableWarning, match="made on 'org/other'"):
        edits.fold(model, direction_at(ok, model_id="org/other"))


def test_restoring():
    model = tiny("llama")
    plain = logits(model)
    with pytest.raises(KeyError), edits.restoring(model):
        edits.fold(model, direction_at(Site("resid_post", 1)))
        raise KeyError
    assert torch.equal(logits(model), plain)
    edits.add_bias(model)
    with pytest.raises(UsageError, match="remove_bias first"), edits.restoring(model):
        pass
    model.double()  # what was put aside follows the model
    edits.remove_bias(model)
    assert (logits(model) - plain).abs().max() < 1e-4


# --- taken out again ---


def test_extraction_from_two_models():
    base, model = tiny("llama", mlp_bias=False), tiny("llama", mlp_bias=True)
    model.load_state_dict(base.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if "mlp" in name and name.endswith("bias"):
            parameter.data.zero_()
    with pytest.raises(UsageError, match="the same biases"):
        edits.extract_bias(model, base=base)
    linear(model, Place(2, "mlp")).bias.data += vector(0)
    linear(model, Place(3, "attention")).bias.data += vector(1)
    found = edits.extract_bias(model, base=base, norms={Site("resid_post", 2): 3.0}, stats={"steps": 2})
    assert list(found.vectors) == [Site("resid_post", 2), Site("resid_mid", 3)]
    assert torch.equal(found.at(2), vector(0)) and torch.allclose(found.at(3), vector(1), atol=1e-6)
    assert found.norms == {Site("resid_post", 2): 3.0} and found.stats == {"steps": 2}
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.bias[3] = 1.0
    with pytest.raises(UsageError, match="differ in model.layers.1.mlp.up_proj.bias"):
        edits.extract_bias(model, base=base)
    with pytest.raises(UsageError, match="no bias was added"):
        edits.extract_bias(base)


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias", "ignore:models of type")
@pytest.mark.parametrize("kind", ["llama", "cousin"])
def test_extraction_from_an_adapter(kind):
    """PEFT's BEFT, over a map that has none and over one with a trained bias; merged or not."""
    peft = pytest.importorskip("peft")
    model = tiny("llama", mlp_bias=False)
    edits.fold(model, direction_at(Site("resid_post", 2)))
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
    wrapped = peft.get_peft_model(model, peft.BeftConfig(target_modules=names))
    model.config.model_type = kind  # of an unknown type the parts are looked for inside of the adapter
    expected = {1: vector(5), 2: vector(0) + vector(6)}
    for (name, parameter), seed in zip(
        [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad], (5, 6), strict=True
    ):
        assert name.startswith("base_model.model.model.layers")
        parameter.data[0] = vector(seed)
    found = edits.extract_bias(wrapped)
    assert all(torch.allclose(found.at(layer), v, atol=1e-6) for layer, v in expected.items())
    biased = logits(wrapped)
    plain = tiny("llama", mlp_bias=False)
    with st.steer(plain, found):
        assert (logits(plain) - biased).abs().max() < 1e-5
    wrapped.base_model.model.model.layers[2].mlp.down_proj.merge()
    found = edits.extract_bias(wrapped)
    assert all(torch.allclose(found.at(layer), v, atol=1e-6) for layer, v in expected.items())
