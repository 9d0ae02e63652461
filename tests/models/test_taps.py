"""Every site against the parts of the forward pass that it is made of."""

import itertools
import random

import pytest
import torch
from torch import nn

from steerable.models import loading as models
from steerable.models.taps import tap, width_at
from steerable.steering.site import KINDS, Site
from steerable.store.errors import UsageError

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def read_all(model, ids=IDS):
    seen = {}
    sites = [Site(kind, layer) for kind in KINDS for layer in range(models.n_layers(model))]
    with tap(model, {site: lambda h, site=site: seen.__setitem__(site, h.clone()) for site in sites}):
        out = model(ids, output_hidden_states=True)
    return seen, out


def test_names():
    assert Site.parse("resid_post.3") == Site("resid_post", 3) and str(Site("mlp_act", 12)) == "mlp_act.12"
    sites = [Site(kind, layer) for layer in (0, 2, 10) for kind in KINDS]
    assert sorted(random.Random(0).sample(sites, len(sites))) == sites
    for bad in (
        "resid_post",
        "resid_post.",
        "resid_post.-1",
        "resid.1",
        "",
        "resid_post.1.2",
        "resid_post.²",
    ):
        with pytest.raises(UsageError):
            Site.parse(bad)
    with pytest.raises(UsageError, match="negative"):
        Site("resid_post", -1)


def test_reading(model):
    plain = model(IDS).logits
    seen, out = read_all(model)
    assert torch.equal(out.logits, plain)
    last = models.n_layers(model) - 1
    for layer, block in enumerate(models.blocks(model)):
        at = {kind: seen[Site(kind, layer)] for kind in KINDS}
        assert all(at[kind].shape[-1] == width_at(model, kind) for kind in KINDS)
        assert torch.equal(at["resid_pre"], out.hidden_states[layer])
        assert torch.equal(at["attn_out"], block.self_attn.o_proj(at["head_in"]))
        assert torch.equal(at["resid_mid"], at["resid_pre"] + at["attn_out"])
        assert torch.equal(at["mlp_out"], block.mlp(block.post_attention_layernorm(at["resid_mid"])))
        assert torch.equal(at["mlp_out"], block.mlp.down_proj(at["mlp_act"]))
        assert torch.equal(at["resid_post"], at["resid_mid"] + at["mlp_out"])
        if layer < last:
            assert torch.equal(at["resid_post"], out.hidden_states[layer + 1])
    assert torch.equal(models.final_norm(model)(seen[Site("resid_post", last)]), out.hidden_states[-1])


def logits_with(model, site, vector):
    with tap(model, {site: lambda h: h + vector}):
        return model(IDS).logits


@pytest.mark.parametrize("layer", [0, 2])
def test_editing(model, layer):
    """Edits that must amount to the same, from the embeddings on."""
    generator = torch.Generator().manual_seed(layer)
    v = torch.randn(models.width(model), generator=generator)
    block = models.blocks(model)[layer]
    pairs = [(("resid_mid", v), ("attn_out", v)), (("mlp_out", v), ("resid_post", v))]
    for kind, inner, projection in (
        ("attn_out", "head_in", block.self_attn.o_proj),
        ("mlp_out", "mlp_act", block.mlp.down_proj),
    ):
        w = torch.randn(width_at(model, inner), generator=generator)
        pairs.append(((inner, w), (kind, nn.functional.linear(w, projection.weight))))
    for (kind, vector), (other, same) in pairs:
        torch.testing.assert_close(
            logits_with(model, Site(kind, layer), vector),
            logits_with(model, Site(other, layer), same),
            atol=2e-4,
            rtol=1e-3,
        )
    following = logits_with(model, Site("resid_pre", layer + 1), v)
    assert torch.equal(logits_with(model, Site("resid_post", layer), v), following)
    embedded = model(inputs_embeds=model.get_input_embeddings()(IDS) + v).logits
    assert torch.equal(logits_with(model, Site("resid_pre", 0), v), embedded)


def test_edits_are_seen_downstream(tiny_llama):
    """All sites of one block at once, each adding its own vector: later sites see the earlier edits."""
    seen = {}

    def fn(kind):
        def edit(h):
            seen[kind] = h + 1.0 + KINDS.index(kind)
            return seen[kind]

        return edit

    block = models.blocks(tiny_llama)[1]
    with tap(tiny_llama, {Site(kind, 1): fn(kind) for kind in reversed(KINDS)}):
        tiny_llama(IDS)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(seen["attn_out"], block.self_attn.o_proj(seen["head_in"]) + 3.0, **close)
    torch.testing.assert_close(seen["resid_mid"], seen["resid_pre"] + seen["attn_out"] + 4.0, **close)
    torch.testing.assert_close(seen["mlp_out"], block.mlp.down_proj(seen["mlp_act"]) + 6.0, **close)
    torch.testing.assert_close(seen["resid_post"], seen["resid_mid"] + seen["mlp_out"] + 7.0, **close)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_removed(model):
    plain, before = model(IDS).logits, hooks(model)
    taps = {Site(kind, 1): lambda h: h * 2 for kind in KINDS}
    with pytest.raises(RuntimeError), tap(model, taps):
        assert hooks(model) > before
        raise RuntimeError
    assert hooks(model) == before and torch.equal(model(IDS).logits, plain)
    with pytest.raises(UsageError, match="layers 0 to"), tap(model, taps | {Site("resid_post", 99): print}):
        pass
    assert hooks(model) == before


class Block(nn.Module):
    """A block of another make: returns a tensor or a tuple, and takes its input by name or by position."""

    def __init__(self, width, as_tuple):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.self_attn, self.mlp = nn.Module(), nn.Sequential()
        self.self_attn.o_proj = nn.Linear(width, width, bias=False)
        self.mlp.down_proj = nn.Linear(width, width, bias=False)
        self.as_tuple = as_tuple

    def forward(self, hidden_states):
        mid = hidden_states + self.self_attn.o_proj(self.input_layernorm(hidden_states))
        new = mid + self.mlp(self.post_attention_layernorm(mid))
        return (new, "cache") if self.as_tuple else new


class Other(nn.Module):
    def __init__(self, as_tuple, by_name):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.norm = nn.ModuleList(Block(8, as_tuple) for _ in range(2)), nn.RMSNorm(8)
        self.by_name = by_name

    def forward(self, h):
        for block in self.layers:
            out = block(hidden_states=h) if self.by_name else block(h)
            if isinstance(out, tuple):
                assert out[1:] == ("cache",)
            h = out[0] if isinstance(out, tuple) else out
        return h


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_or_tuple_by_name_or_position(kind):
    h = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for as_tuple, by_name in itertools.product([False, True], repeat=2):
        model, seen = Other(as_tuple, by_name), []
        with torch.no_grad(), tap(model, {Site(kind, 1): seen.append}):
            plain = model(h)
        with torch.no_grad(), tap(model, {Site(kind, 1): lambda h: h + 1}):
            results.append(model(h))
        assert seen[0].shape == h.shape and not torch.equal(plain, results[-1])
    assert all(torch.equal(r, results[0]) for r in results)
