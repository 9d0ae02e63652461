"""Every model family: sites against a recomputation from the block's own modules, and the invariants of steering."""

import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILY_NAMES, VOCABULARY, families, tiny

from steerable.engines.activations import capture
from steerable.engines.transformers import steer
from steerable.evals.logit_lens import lens
from steerable.models import loading as models
from steerable.models.taps import check_site, missing, tap, width_at
from steerable.steering.direction import Direction
from steerable.steering.site import KINDS, Site
from steerable.steering.spec import shift
from steerable.store.errors import SteerableWarning, UsageError

CLOSE = {"atol": 3e-4, "rtol": 1e-3}  # another order of additions
IDS = torch.randint(4, 60, (2, 11), generator=torch.Generator().manual_seed(0))
ROWS = [IDS[0], IDS[1, :8], IDS[0, 2:9]]

# families, and variants whose blocks differ
VARIANTS = {
    **{name: (name, {}) for name in FAMILY_NAMES},
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "deepseek_v3_whole_queries": ("deepseek_v3", {"q_lora_rank": None}),
}
SDPA = [name for name in VARIANTS if name not in ("gpt_oss", "gemma2")]
MOE = {"qwen2_moe": [1], "qwen3_moe": [1], "deepseek_v2": [0, 1], "deepseek_v3": [0, 1], "gpt_oss": []}
MOE["deepseek_v3_whole_queries"] = [0, 1]  # the layers with a plain MLP


@pytest.fixture(scope="module")
def built():
    """Each variant once."""
    made = {}

    def get(name, attention="eager", **options):
        key = (name, attention, *sorted(options.items()))
        if key not in made:
            family, own = VARIANTS[name]
            made[key] = tiny(family, attention=attention, **own, **options)
        return made[key]

    return get


def sites_of(model):
    every = [Site(kind, layer) for layer in range(models.n_layers(model)) for kind in KINDS]
    return [site for site in every if missing(model, site) is None]


def read_all(model, ids=IDS):
    seen = {}
    with tap(model, {s: lambda h, s=s: seen.__setitem__(s, h.clone()) for s in sites_of(model)}):
        out = model(ids, output_hidden_states=True)
    return seen, out


# An account of a block that shares nothing with the library but the names that transformers gives to its modules:
# (list of blocks, attention, its last projection, MLP, its last projection)
NAMES = {
    "gpt2": ("transformer.h", "attn", "attn.c_proj", "mlp", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "gemma3": ("model.language_model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"),
}
LLAMA = ("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")


def naive(name, model, ids=IDS):
    """{(kind, layer): activation}, from the inputs and outputs that the modules of each block had."""
    family = VARIANTS[name][0]
    where, attention, attention_out, mlp, mlp_out = NAMES.get(family, LLAMA)
    calls, at = {}, {}

    def keep(module, args, kwargs, output):
        given = args[0] if args else kwargs.get("hidden_states")
        calls[module] = (given, output[0] if isinstance(output, tuple) else output)

    handles = [m.register_forward_hook(keep, with_kwargs=True) for m in model.get_submodule(where).modules()]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    for layer, block in enumerate(model.get_submodule(where)):
        x, y = calls[block]
        a, m = calls[block.get_submodule(attention)][1], calls[block.get_submodule(mlp)][1]
        if family in ("gemma2", "gemma3", "gemma3_text", "olmo2"):
            a, m = block.post_attention_layernorm(a), block.post_feedforward_layernorm(m)
        at |= {("resid_pre", layer): x, ("resid_post", layer): y, ("attn_out", layer): a, ("mlp_out", layer): m}
        at["head_in", layer] = calls[block.get_submodule(attention_out)][0]
        if name != "gpt_neox":  # what is left when the MLP's part is taken away again
            at["resid_mid", layer] = y - m
        if layer in MOE.get(name, range(99)):
            at["mlp_act", layer] = calls[block.get_submodule(mlp_out)][0]
    return at


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", families(VARIANTS))
def test_sites_against_the_modules(built, name, attention):
    if attention == "sdpa" and name not in SDPA:
        pytest.skip("the fused kernel does not compute this family's attention")
    model = built(name, attention)
    expected = naive(name, model)
    plain = model(IDS).logits
    seen, out = read_all(model)
    assert torch.equal(out.logits, plain)
    assert {(s.kind, s.layer) for s in seen} == set(expected)
    for (kind, layer), h in expected.items():
        site = Site(kind, layer)
        assert seen[site].shape[-1] == width_at(model, kind, layer) == h.shape[-1]
        if kind == "resid_mid":
            torch.testing.assert_close(seen[site], h, atol=2e-5, rtol=2e-5)
        else:
            assert torch.equal(seen[site], h), site
    for layer in range(models.n_layers(model)):
        x, y, a, m = (seen[Site(k, layer)] for k in ("resid_pre", "resid_post", "attn_out", "mlp_out"))
        torch.testing.assert_close(x + a + m, y, atol=2e-5, rtol=2e-5)  # the contributions that are really added
        assert torch.equal(x, out.hidden_states[layer])
    last = seen[Site("resid_post", layer)]
    assert torch.equal(models.final_norm(model)(last), out.hidden_states[-1])
    heads = seen[Site("head_in", 0)].unflatten(-1, (models.n_heads(model), -1))
    assert heads.shape[-2:] == (4, width_at(model, "head_in") // 4)


@pytest.mark.parametrize("name", families(VARIANTS))
def test_capture(built, name):
    model = built(name)
    expected = naive(name, model, IDS[:1])

    class Ids:
        name_or_path, chat_template = "ids", None

        def __call__(self, text, **_):
            return {"input_ids": IDS[0].tolist()}

    got = capture(model, Ids(), ["one"], sites=sites_of(model), reduce="none")
    assert len(got) == len(expected)
    for site, h in got.items():
        torch.testing.assert_close(h, expected[site.kind, site.layer][0], atol=2e-5, rtol=2e-5)


@contextmanager
def edited(name, model, site, change):
    """The forward pass with `change` made at a site, by hooks on the modules that transformers names."""
    family = VARIANTS[name][0]
    where, attention, attention_out, mlp, mlp_out = NAMES.get(family, LLAMA)
    block = model.get_submodule(where)[site.layer]
    post = family in ("gemma2", "gemma3", "gemma3_text", "olmo2")
    adds_a = block.post_attention_layernorm if post else block.get_submodule(attention)
    adds_m = block.post_feedforward_layernorm if post else block.get_submodule(mlp)
    stream = {}

    def before(module, args, kwargs):
        key = None if args else "hidden_states"
        h = args[0] if args else kwargs[key]
        stream["x"] = h
        if site.kind == "resid_mid" and module is block:
            return None
        new = change(h)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, key: new})

    def after(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        new = h + (change(stream["x"] + h) - (stream["x"] + h)) if site.kind == "resid_mid" else change(h)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    into = {"resid_pre": block, "head_in": attention_out, "mlp_act": mlp_out, "resid_mid": block}
    out_of = {"attn_out": adds_a, "mlp_out": adds_m, "resid_post": block, "resid_mid": adds_a}
    handles = []
    if (m := into.get(site.kind)) is not None:
        m = block.get_submodule(m) if isinstance(m, str) else m
        handles.append(m.register_forward_pre_hook(before, with_kwargs=True))
    if (m := out_of.get(site.kind)) is not None:
        handles.append(m.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def vector(model, site, scale=1.0):
    d = width_at(model, site.kind, site.layer)
    return scale * torch.randn(d, generator=torch.Generator().manual_seed(site.layer))


@pytest.mark.parametrize("name", families(VARIANTS))
def test_steering_equals_the_edited_forward(built, name):
    model = built(name)
    plain = model(IDS).logits
    for site in sites_of(model):
        if site.layer not in (1, 2):
            continue
        v = vector(model, site)
        for strength in (0, 0.0, torch.zeros(2)):
            with steer(model, shift(site, v), strength=strength):
                assert torch.equal(model(IDS).logits, plain), site

        def change(h, v=v):
            new = h.clone()
            new[:, 3:6] += 0.7 * v
            return new

        with steer(model, shift(site, v), strength=0.7, where="positions(3, 6)") as handle:
            steered = model(IDS).logits
        assert handle.report()[str(site)]["tokens"] == 6
        with edited(name, model, site, change):
            expected = model(IDS).logits
        torch.testing.assert_close(steered, expected, **CLOSE)
        # the experts' fused product rounds by which tokens it has together
        torch.testing.assert_close(steered[:, :3], plain[:, :3], atol=1e-5 if name in MOE else 0, rtol=0)
        assert not torch.allclose(steered[:, 3:], plain[:, 3:], atol=1e-3)
    assert torch.equal(model(IDS).logits, plain)


def everywhere(model, scale=0.5):
    """A vector at every site of two layers."""
    return Direction({s: vector(model, s, scale) for s in sites_of(model) if s.layer in (1, 2)})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", families(VARIANTS))
def test_padding_batch_and_cache_parity(built, name, attention):
    if attention == "sdpa" and name not in SDPA:
        pytest.skip("the fused kernel does not compute this family's attention")
    model = built(name, attention)
    options = {"where": "positions(2, 99)", "strength": 0.5}
    with steer(model, everywhere(model), **options):
        alone = [model(row[None]).logits[0] for row in ROWS]
    for left in (True, False):
        width = 13
        ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        spans = [slice(width - len(r), width) if left else slice(0, len(r)) for r in ROWS]
        for i, (row, span) in enumerate(zip(ROWS, spans, strict=True)):
            ids[i, span], mask[i, span] = row, 1
        with steer(model, everywhere(model), **options):
            out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        for i, span in enumerate(spans):
            torch.testing.assert_close(out[i, span], alone[i], **CLOSE)
    for chunks in ([5, *[1] * 6], [1] * 11, [3, 5, 3]):
        with steer(model, everywhere(model), **options):
            cache, start, parts = None, 0, []
            for length in chunks:
                # a mask too, as `generate` gives one
                seen = torch.ones(1, start + length, dtype=torch.long)
                step = model(
                    ROWS[0][None, start : start + length], past_key_values=cache, use_cache=True, attention_mask=seen
                )
                cache, start = step.past_key_values, start + length
                parts.append(step.logits[0])
        torch.testing.assert_close(torch.cat(parts), alone[0], **CLOSE)


@pytest.mark.parametrize("name", families(VARIANTS))
def test_generate_left_padded_equals_alone(built, name):
    model = built(name)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    ids[0], ids[1, 3:], mask[1, :3] = ROWS[0][:7], ROWS[1][:4], 0
    with steer(model, everywhere(model), strength=0.5, where="generated") as handle:
        together = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 7:]
        alone = model.generate(input_ids=ids[1:, 3:], attention_mask=mask[1:, 3:], **options)[:, 4:]
    assert torch.equal(together[1], alone[0])
    fed = 2 * 4 + 4  # the last token of a text is never fed
    assert {site["tokens"] for site in handle.report().values()} == {fed}


@pytest.mark.parametrize("name", families(VARIANTS))
def test_gradients_reach_every_site(built, name):
    model = built(name)
    leaves = {}
    for site in sites_of(model):
        leaves[site] = torch.zeros(width_at(model, site.kind, site.layer), requires_grad=True)
    with tap(model, {site: lambda h, v=v: h + v for site, v in leaves.items()}):
        model(IDS).logits[:, -1].square().sum().backward()
    for site, v in leaves.items():
        assert v.grad is not None and v.grad.abs().max() > 0, site
    # one of them by central differences along its own gradient
    site = Site("attn_out", 1)
    g = leaves[site].grad

    def loss(v):
        with torch.no_grad(), tap(model, {site: lambda h: h + v}):
            return float(model(IDS).logits[:, -1].double().square().sum())

    step = 3e-3 / g.norm()
    assert (loss(step * g) - loss(-step * g)) / (2 * step) == pytest.approx(float(g @ g), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", families(VARIANTS))
def test_half_precision(name, dtype):
    family, own = VARIANTS[name]
    model = tiny(family, **own).to(dtype)
    plain = model(IDS).logits
    kinds = {}
    with steer(model, everywhere(model), strength=0):
        assert torch.equal(model(IDS).logits, plain)
    with (
        steer(model, everywhere(model), where="positions(4, 7)"),
        tap(model, {site: lambda h, site=site: kinds.__setitem__(site, h.dtype) for site in sites_of(model)}),
    ):
        steered = model(IDS).logits
    assert set(kinds.values()) == {dtype} == {steered.dtype}
    assert torch.equal(steered[:, :4], plain[:, :4]) and not torch.equal(steered[:, 4:], plain[:, 4:])
    assert steered.isfinite().all()


COMPILED = [("llama", "eager"), ("gemma3_text", "aot_eager"), ("gpt_oss", "eager")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), COMPILED)
def test_compiled(name, backend):
    """A model that was compiled, and used, before it is steered: the logits of the plain one, and nothing stays."""
    torch._dynamo.reset()
    options = {"layer_types": ["sliding_attention", "full_attention"]} if name in ("gemma3_text", "gpt_oss") else {}
    model = tiny(name, num_hidden_layers=2, **options)
    compiled = torch.compile(model, backend=backend)
    plain = model(IDS).logits
    torch.testing.assert_close(compiled(IDS).logits, plain, **CLOSE)
    for layer in (0, 1):
        direction = Direction({(s := Site(kind, layer)): vector(model, s) for kind in ("resid_post", "attn_out")})
        with steer(model, direction, where="positions(3, 7)"):
            expected = model(IDS).logits
        with steer(compiled, direction, where="positions(3, 7)") as handle:
            torch.testing.assert_close(compiled(IDS).logits, expected, **CLOSE)
        assert handle.report()[f"resid_post.{layer}"]["tokens"] == 8
        assert not torch.allclose(expected, plain, atol=1e-2)
    torch.testing.assert_close(compiled(IDS).logits, plain, **CLOSE)


@pytest.mark.slow
def test_compiled_block():
    """One block, compiled by inductor to machine code."""
    torch._dynamo.reset()
    model = tiny("llama", num_hidden_layers=2)
    site = Site("resid_post", 0)
    plain = model(IDS).logits
    with steer(model, shift(site, vector(model, site))):
        expected = model(IDS).logits
    model.model.layers[0].compile(backend="inductor")
    torch.testing.assert_close(model(IDS).logits, plain, **CLOSE)
    with steer(model, shift(site, vector(model, site))):
        torch.testing.assert_close(model(IDS).logits, expected, **CLOSE)
    torch.testing.assert_close(model(IDS).logits, plain, **CLOSE)


@pytest.mark.parametrize("name", families(VARIANTS))
def test_lens_of_the_last_state_is_the_logits(built, name):
    model = built(name)
    seen = {}
    site = Site("resid_post", models.n_layers(model) - 1)
    with tap(model, {site: lambda h: seen.__setitem__("h", h)}):
        logits = model(IDS).logits[0, -1]

    class Ids:
        def decode(self, ids):
            return str(ids[0])

    said = lens(model, Ids(), seen["h"][0, -1], k=VOCABULARY, norm=True).top
    order = logits.argsort(descending=True)
    assert [int(token) for token, _ in said] == order.tolist()
    torch.testing.assert_close(torch.tensor([score for _, score in said]), logits[order], atol=1e-5, rtol=1e-5)
    # a row of the unembedding, as it is, has the score of its own square
    row = model.get_output_embeddings().weight[7]
    scores = dict(lens(model, Ids(), row, k=VOCABULARY).top)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    assert scores["7"] == pytest.approx(float(row @ row) + (0.0 if bias is None else float(bias[7])), rel=1e-4)


@pytest.mark.parametrize("name", MOE)
def test_experts_have_no_neurons(built, name):
    model = built(name)
    plain_layers = MOE[name]
    for layer in range(models.n_layers(model)):
        if layer in plain_layers:
            assert width_at(model, "mlp_act", layer) == 48
            continue
        with pytest.raises(UsageError, match=f"no mlp_act.{layer}: .* mixture of experts .* choose mlp_out"):
            check_site(model, Site("mlp_act", layer))
        with (
            pytest.raises(UsageError, match="mixture of experts"),
            steer(model, Direction({Site("mlp_act", layer): torch.ones(48)})),
        ):
            pass
    if plain_layers:
        assert width_at(model, "mlp_act") == 48
    else:
        with pytest.raises(UsageError, match="mixture of experts"):
            width_at(model, "mlp_act")


def test_parallel_blocks_have_no_middle(built):
    site = Site("resid_mid", 1)
    with pytest.raises(UsageError, match=r"no resid_mid.1: attention and MLP of this model run in parallel"):
        check_site(built("gpt_neox"), site)
    check_site(built("gpt_neox_sequential"), site)


# --- models of a type that the table does not know ---


def renamed(name):
    family, own = VARIANTS[name]
    model = tiny(family, **own)
    model.config.model_type = "cousin"
    return model


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "gemma3"])
def test_structural_guess(built, name):
    """Found without names: the same sites with the same activations as by the table."""
    model = renamed(name)
    with pytest.warns(SteerableWarning, match="'cousin' are not known; guessed from the structure: blocks") as caught:
        found = models.family(model)
    assert len(caught) == 1 and f"attention adds {found.attention_added}" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert models.family(models.base(model)) is found
        seen, _ = read_all(model)
    known = models.family(built(name))
    assert (found.blocks, found.final_norm, found.norms) == (known.blocks, known.final_norm, known.norms)
    expected = naive(name, model)
    assert {(s.kind, s.layer) for s in seen} == set(expected)
    for (kind, layer), h in expected.items():
        torch.testing.assert_close(seen[Site(kind, layer)], h, atol=2e-5, rtol=2e-5)


def test_guess_in_other_families():
    """Types that nobody wrote a line for."""
    import transformers as t

    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    starcoder = t.Starcoder2ForCausalLM(
        t.Starcoder2Config(**common, intermediate_size=40, num_key_value_heads=2)
    ).eval()
    with pytest.warns(SteerableWarning, match="guessed"):
        found = models.family(starcoder)
    assert (found.blocks, found.mlp_out, found.norms) == ("layers", "mlp.c_proj", "pre")
    assert width_at(starcoder, "mlp_act") == 40
    opt = t.OPTForCausalLM(t.OPTConfig(**common, ffn_dim=40, word_embed_proj_dim=32, max_position_embeddings=64)).eval()
    with pytest.warns(SteerableWarning, match="blocks layers, final norm final_layer_norm, .* not found"):
        check_site(opt, Site("resid_post", 2))
    with pytest.raises(UsageError, match="no mlp_out.0"):
        check_site(opt, Site("mlp_out", 0))  # its MLP sees rows and positions flattened
    with steer(opt, shift(Site("resid_post", 1), torch.ones(32))) as handle:
        opt(IDS)  # its head calls the decoder past the model
    assert handle.report()["resid_post.1"]["tokens"] == IDS.numel()
    phi = t.PhiForCausalLM(t.PhiConfig(**common, intermediate_size=40)).eval()
    with pytest.warns(SteerableWarning, match="in parallel"):
        found = models.family(phi)
    assert (found.attention_added, found.mlp_added) == ("self_attn", "mlp")  # not the dropout behind both
    falcon = t.FalconForCausalLM(t.FalconConfig(**common, new_decoder_architecture=False, parallel_attn=True)).eval()
    with pytest.warns(SteerableWarning, match="attention and MLP in parallel"):
        assert models.is_parallel(falcon)
    granite = t.GraniteForCausalLM(t.GraniteConfig(**common, intermediate_size=40, residual_multiplier=0.3)).eval()
    with pytest.warns(SteerableWarning, match="attention adds not found"):
        models.family(granite)  # its names are Llama's, but what it adds is scaled
    check_site(granite, Site("resid_post", 2))
    with pytest.raises(UsageError, match="no attn_out.0"):
        check_site(granite, Site("attn_out", 0))
    t5 = t.T5ForConditionalGeneration(t.T5Config(vocab_size=64, d_model=32, d_ff=40, num_layers=2, num_heads=4, d_kv=8))
    with pytest.raises(UsageError, match="encoder-decoder"):
        models.family(t5)


# --- the page about them ---


def test_documented(built):
    """Each family's row in the table says its norms and the sites that its tiny model has."""
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    rows = {row[0].strip("`"): row for line in page.splitlines() if len(row := line.strip("| ").split(" | ")) >= 4}
    assert set(FAMILY_NAMES) == set(models.FAMILIES)
    for name, family in models.FAMILIES.items():
        _, _, norms, sites, *_ = rows[name]
        assert norms == family.norms, name
        model = built(name)
        absent = {s.kind for s in (Site(k, i) for k in KINDS for i in range(4)) if missing(model, s) is not None}
        present = {s.kind for s in sites_of(model)}
        said = {
            "all": (set(), set(KINDS)),
            "all, `mlp_act` in dense layers": ({"mlp_act"}, set(KINDS)),
            "all but `mlp_act`": ({"mlp_act"}, set(KINDS) - {"mlp_act"}),
            "all, `resid_mid` where sequential": ({"resid_mid"}, set(KINDS) - {"resid_mid"}),
        }
        assert said[sites] == (absent, present), name
