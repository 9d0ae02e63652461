"""Angular and Selective Steering against their formulas."""

from copy import deepcopy

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import steerable as st
from steerable.steering.site import Site


@pytest.fixture(scope="module")
def plane(read, texts, tokenizer):
    """b1, b2 and both sides' last activations at all streams that norms read, but where the texts do not differ."""
    sites = [f"{kind}.{i}" for i in range(4) for kind in ("resid_pre", "resid_mid")]
    sides = [[read(tokenizer(text)["input_ids"]) for text in side] for side in texts]
    rows = {s: [torch.stack([h[s][-1] for h in side]) for side in sides] for s in sites}
    units = torch.stack([torch.nn.functional.normalize(a.mean(0) - b.mean(0), dim=0) for a, b in rows.values()])
    b1 = units[(units @ units.T).mean(1).argmax()]
    component = torch.linalg.svd(units - units.mean(0))[2][0]
    b2 = torch.nn.functional.normalize(component - (component @ b1) * b1, dim=0)
    return b1, b2, rows


def test_angular_sends_the_plane_to_an_angle(tiny_llama, tokenizer, texts, plane):
    b1, b2, rows = plane
    direction = st.recipes.angular(tiny_llama, tokenizer, *texts, degrees=30)
    assert {str(s) for s in direction.vectors} == set(rows)
    frame = direction.vectors[Site("resid_mid", 2)].double()
    torch.testing.assert_close(frame[0], b1, atol=1e-5, rtol=1e-5)
    assert abs(float(frame[1] @ b2)) == pytest.approx(1, abs=1e-5)
    b2 = frame[1]
    h = torch.randn(1, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = ((h @ b1).square() + (h @ b2).square()).sqrt()[..., None]
    angle = torch.tensor(30.0).double().deg2rad()
    inside = (h @ b1)[..., None] * b1 + (h @ b2)[..., None] * b2
    expected = h - inside + q * (angle.cos() * b1 + angle.sin() * b2)
    (part,) = (i for i in direction.steering() if i.site == Site("resid_mid", 2))
    torch.testing.assert_close(part.apply(h), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.apply(h).norm(dim=-1), h.norm(dim=-1), atol=1e-5, rtol=1e-5)


def test_groups_of_unequal_size_that_end_alike_are_the_same_before_the_first_block(tiny_llama, tokenizer, texts):
    """Their means differ by the rounding of float32, which is no direction."""
    groups = [f"{text} w60" for text in texts[0][:9]], [f"{text} w60" for text in texts[1][:7]]
    direction = st.recipes.angular(tiny_llama, tokenizer, *groups)
    assert Site("resid_pre", 0) not in direction.vectors and Site("resid_mid", 0) in direction.vectors


def test_adaptive_leaves_the_negative_side_alone(tiny_llama, tokenizer, texts, plane, read):
    """At the last site alone, so that what is turned is what changes behind it."""
    direction = st.recipes.angular(tiny_llama, tokenizer, *texts, degrees=180, adaptive=True)
    site = Site("resid_mid", 3)
    alone = direction.only([3])
    alone = st.Direction({site: alone.vectors[site]}, map=alone.map, gate=alone.gate)
    ids = torch.arange(7, 40)
    with torch.no_grad():
        before = tiny_llama(ids[None]).logits[0]
        with st.steer(tiny_llama, alone):
            after = tiny_llama(ids[None]).logits[0]
    positive = read(ids.tolist())["resid_mid.3"] @ plane[0] > 0
    assert 0 < int(positive.sum()) < 33
    assert torch.equal((before != after).any(-1), positive)


def test_selective_turns_at_the_layers_of_opposite_sides(tiny_llama, tokenizer, texts, plane):
    b1, _, rows = plane
    direction = st.recipes.selective(tiny_llama, tokenizer, *texts, degrees=45)
    unit = torch.nn.functional.normalize
    opposite = {s: float((unit(a) @ b1).mean() * (unit(b) @ b1).mean()) < 0 for s, (a, b) in rows.items()}
    expected = [i for i in range(4) if all(opposite[f"{kind}.{i}"] for kind in ("resid_pre", "resid_mid"))]
    assert direction.layers == expected and direction.map == "rotate(45)"


def test_each_chosen_norm_reads_the_stream_turned_once_and_nothing_else_does(tiny_llama, tokenizer, texts):
    """The same as turning what these norms are given in their own code, where the stream goes on as it is."""
    direction = st.recipes.selective(tiny_llama, tokenizer, *texts, degrees=50)
    basis = direction.vectors[Site("resid_pre", direction.layers[0])]
    (turn, *_) = direction.steering()
    handles = []
    for layer in direction.layers:
        block = tiny_llama.model.layers[layer]
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            handles.append(norm.register_forward_pre_hook(lambda module, args: (turn.apply(args[0]),)))
    ids = torch.arange(7, 30)[None]
    with torch.no_grad():
        expected = tiny_llama(ids).logits
        for handle in handles:
            handle.remove()
        plain = tiny_llama(ids).logits
        with st.steer(tiny_llama, direction):
            steered = tiny_llama(ids).logits
    assert len(direction.layers) > 1 and basis.shape == (2, 32)
    torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-4)
    assert float((plain - expected).abs().max()) > 0.1


def test_angles_do_not_add_up_over_blocks_that_write_nothing(tiny_llama, tokenizer, texts):
    direction = st.recipes.selective(tiny_llama, tokenizer, *texts, degrees=50)
    basis = direction.vectors[Site("resid_pre", direction.layers[0])]
    silent = deepcopy(tiny_llama)
    with torch.no_grad():
        for name, weight in silent.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(1e-6)
    coordinates = {}

    def keep(name):
        return lambda module, args: coordinates.setdefault(name, []).append(args[0] @ basis.T)

    for number, block in enumerate(silent.model.layers):
        block.input_layernorm.register_forward_pre_hook(keep((number, "input")))
        block.post_attention_layernorm.register_forward_pre_hook(keep((number, "middle")))
    silent.model.norm.register_forward_pre_hook(keep((None, "final")))
    with torch.no_grad():
        silent(torch.arange(7, 30)[None])
        with st.steer(silent, direction):
            silent(torch.arange(7, 30)[None])
    for (number, _), (before, after) in coordinates.items():
        turned = torch.atan2(after[..., 1], after[..., 0]) - torch.atan2(before[..., 1], before[..., 0])
        by = 50.0 if number in direction.layers else 0.0
        away = (turned.rad2deg() - by + 180) % 360 - 180
        assert float(away.abs().max()) < 0.1, number


def test_relative_rotations_compose(tiny_llama, tokenizer, texts):
    both, once, twice = (
        st.recipes.selective(tiny_llama, tokenizer, *texts, degrees=degrees).steering()[0] for degrees in (70, 30, 40)
    )
    h = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(twice.apply(once.apply(h)), both.apply(h), atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:models of type")
def test_a_model_whose_parts_are_not_known_is_refused(tokenizer, texts):
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 4, "residual_multiplier": 0.3, "initializer_range": 0.2, "pad_token_id": 0}
    granite = GraniteForCausalLM(GraniteConfig(**settings)).eval()
    with pytest.raises(st.UsageError, match="there is no attn_out"):
        st.recipes.selective(granite, tokenizer, *texts)
