"""Types that no table lists and whose blocks differ: linear and softmax attention in turn, a norm in front of the one
and behind the other, experts in some. What is found is held against what the blocks add up to."""

from copy import deepcopy
from threading import Thread

import pytest
import torch
import transformers
from tiny_families import COMMON, EXPERTS, MLA, VOCABULARY

from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.evals.logit_lens import Unembedding
from steerable.methods.head_projection import project_heads
from steerable.methods.recipes.edits import steer2edit, thinkedit
from steerable.methods.span_statistics import span_means
from steerable.models import loading as models
from steerable.models.reading import is_recurrent
from steerable.models.taps import check_site, missing, tap
from steerable.models.writers import all_places
from steerable.steering.direction import Direction
from steerable.steering.site import KINDS, Site
from steerable.store.errors import SteerableWarning, UsageError

IDS = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(0))
IN_TURN = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

# name -> (options of its config, the kinds of site that layer 0 and layer 1 lack)
SHAPES = {
    "OlmoHybrid": (IN_TURN | LINEAR, set(), set()),
    "Qwen3_5": (IN_TURN | LINEAR | {"head_dim": 8}, set(), set()),
    "Lfm2": ({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, set(), set()),
    "KimiLinear": (
        MLA | IN_TURN | {"linear_num_heads": 2, "linear_head_dim": 8, "mlp_layer_types": ["dense", "sparse"]},
        set(),
        {"mlp_act"},
    ),
    # its experts see rows and positions flattened
    "Llama4": (
        EXPERTS
        | {
            "num_hidden_layers": 2,
            "moe_layers": [1],
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
        },
        set(),
        set(KINDS) - {"resid_pre", "resid_post"},
    ),
}


def build(name, **options):
    kind = next(k for k in (f"{name}TextConfig", f"{name}Config") if hasattr(transformers, k))
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**COMMON | options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def read(model, site=None, v=0.0):
    """Every site's activation, with v added at one of them."""
    every = [Site(kind, layer) for layer in range(models.n_layers(model)) for kind in KINDS]
    seen = {}

    def at(here):
        def fn(h):
            seen[here] = h + v if here == site else h.clone()
            return seen[here] if here == site else None

        return fn

    with tap(model, {s: at(s) for s in every if missing(model, s) is None}):
        model(IDS, use_cache=False)
    return seen


@pytest.mark.filterwarnings("ignore:models of type")
@pytest.mark.parametrize("name", SHAPES)
def test_blocks_that_differ(name):
    options, *absent = SHAPES[name]
    model = build(name, **options)
    seen = read(model)
    for layer in range(2):
        there = {site.kind for site in seen if site.layer == layer}
        assert set(KINDS) - there == absent[layer], layer
        x, y = (seen[Site(kind, layer)] for kind in ("resid_pre", "resid_post"))
        if "mlp_out" not in there:
            continue
        a, m = (seen[Site(kind, layer)] for kind in ("attn_out", "mlp_out"))
        torch.testing.assert_close(x + a + m, y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen[Site("resid_mid", layer)], x + a)
        v = torch.randn(32, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(read(model, Site("mlp_out", layer), v)[Site("resid_post", layer)], y + v)
        again = read(model, Site("attn_out", layer), v)
        expected = x + a + v + again[Site("mlp_out", layer)]
        torch.testing.assert_close(again[Site("resid_post", layer)], expected, atol=1e-5, rtol=1e-5)
    if name == "OlmoHybrid":  # the norm behind the maps of layer 1
        assert {place.layer for place in all_places(model)} == {0}
    if name in ("Llama4", "OlmoHybrid"):
        return
    direction = Direction({Site("resid_mid", layer): torch.ones(32) for layer in range(2)})
    assert models.head_layers(model) == [1]
    with pytest.raises(UsageError, match="layer 0 of this .* model has no attention heads"):
        project_heads(model, direction, [(0, 1)])
    assert list(project_heads(model, direction, [(1, 1)]).changes)
    chains = [AlignedChain("t", n, tuple(range(20, 29 + n)), (TokenSpan("a", 2, 9 + n),)) for n in (0, 4)]
    assert {layer for layer, _ in thinkedit(model, None, chains, short=10, long=10).stats["heads"]} == {1}
    patch = steer2edit(model, None, chains, rho_mlp=None)
    assert all(".layers.1." in name for name in patch.changes) and patch.changes
    if name == "KimiLinear":
        with pytest.raises(UsageError, match="head_in is 16 wide in the first layer that has it, and another width in"):
            span_means(model, chains, ["a"], kind="head_in")


@pytest.mark.filterwarnings("ignore:models of type")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma4", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "head_dim": 8}),
        ("MiniCPM3", MLA | {"dim_model_base": 8}),
        ("Granite", {"logits_scaling": 4.0}),
        ("HyperCLOVAX", {"logits_scaling": 4.0}),
        ("RecurrentGemma", {"lru_width": 32, "logits_soft_cap": 3.0}),
    ],
)
def test_the_final_norm_and_what_becomes_of_the_logits(name, options):
    model = build(name, **options)
    last, seen = Site("resid_post", models.n_layers(model) - 1), []
    with tap(model, {last: lambda h: seen.append(h) and None}):
        logits = model(IDS, use_cache=False).logits[0]
    (readings,) = Unembedding.of(model).readings(seen[0][0])
    said = next(r.values for r in readings if r.norm and r.score == "dot")
    torch.testing.assert_close(said, logits, atol=1e-4, rtol=1e-4)
    assert said.shape[1] == VOCABULARY


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("HrmText", {"num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 1}),  # its blocks run in cycles
        (
            "Gemma3n",
            {"vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0},
        ),  # four streams; its lists of matrices
    ],
)
def test_no_stream_of_blocks(name, options):
    with pytest.raises(UsageError, match="no decoder blocks were found .* once in a pass"):
        models.family(build(name, **options))


def test_another_threads_pass_while_a_model_is_looked_at(tiny_llama):
    model = deepcopy(tiny_llama)
    model.config.model_type = "cousin"
    results = []
    plain = model(IDS).logits
    block = model.model.layers[1]

    def meanwhile(module, args):
        handle.remove()
        thread = Thread(target=lambda: results.append(model(IDS).logits))
        thread.start()
        thread.join()

    handle = block.register_forward_pre_hook(meanwhile)
    with pytest.warns(SteerableWarning, match="attention adds self_attn, .* MLP adds mlp,"):
        models.family(model)
    assert torch.equal(results[0], plain)


def test_a_model_that_does_not_run(tiny_llama):
    model = deepcopy(tiny_llama)
    model.config.model_type = "cousin"
    model.model.forward = lambda **inputs: inputs["pixels"]
    with pytest.raises(UsageError, match=r"LlamaForCausalLM is of no known type, .* four tokens .*KeyError: 'pixels'"):
        models.family(model)


@pytest.mark.filterwarnings("ignore:models of type")
def test_a_model_without_attention():
    model = build("Mamba", num_hidden_layers=1)
    with pytest.raises(UsageError, match="no layer of this mamba model has attention heads"):
        thinkedit(model, None, [], short=1, long=1)
    with pytest.raises(UsageError, match="no attn_out.0: where its parts add to the stream was not found"):
        check_site(model, Site("attn_out", 0))


def test_minimax_is_read_in_one_pass():
    """Its state is in a cache of its own kind."""
    assert is_recurrent(
        build("MiniMax", **IN_TURN | EXPERTS | {"num_local_experts": 4, "head_dim": 8, "block_size": 4})
    )
