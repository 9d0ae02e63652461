"""Recipes that edit weights against their formulas, computed anew one chain at a time."""

import pytest
import torch
from tiny_families import tiny

import steerable as st
from steerable import UsageError

HEADS = 4


def thoughts(chains):
    return sorted(chains, key=lambda c: len(c.ids))


def predicting(read, chain, name):
    """The mean over the tokens that predict the thinking, which begins behind three tokens of prompt."""
    return read(chain.ids)[name][2:-1].mean(0)


def mean(rows):
    return torch.stack(list(rows)).mean(0)


def test_thinkedit_projects_the_heads_that_write_most_against_long_thinking(tiny_llama, tokenizer, chains, read):
    ordered = thoughts(chains)
    short, long = ordered[:3], ordered[-2:]
    limits = {"short": len(short[-1].ids) - 3 + 1, "long": len(long[0].ids) - 3 - 1}
    patch = st.recipes.thinkedit(tiny_llama, tokenizer, chains, heads=3, **limits)
    scores = {}
    for i in range(4):
        v = mean(predicting(read, c, f"resid_mid.{i}") for c in long) - mean(
            predicting(read, c, f"resid_mid.{i}") for c in short
        )
        v = v / v.norm()
        w = tiny_llama.model.layers[i].self_attn.o_proj.weight.double()
        z = mean(predicting(read, c, f"head_in.{i}") for c in short)
        width = w.shape[1] // HEADS
        for j in range(HEADS):
            part = slice(j * width, (j + 1) * width)
            scores[i, j] = (float(-v @ (w[:, part] @ z[part])), v, part)
    chosen = sorted(scores, key=lambda key: -scores[key][0])[:3]
    expected = {i: tiny_llama.model.layers[i].self_attn.o_proj.weight.double().clone() for i, _ in chosen}
    for i, j in chosen:
        _, v, part = scores[i, j]
        expected[i][:, part] -= torch.outer(v, v @ expected[i][:, part])
    assert sorted(map(tuple, patch.stats["heads"])) == sorted(chosen)
    with patch.apply(tiny_llama):
        for i, w in expected.items():
            edited = tiny_llama.model.layers[i].self_attn.o_proj.weight.double()
            torch.testing.assert_close(edited, w, atol=1e-5, rtol=1e-5)


def test_steer2edit_is_the_elastic_net_of_the_shortest_against_the_longest(tiny_llama, tokenizer, chains, read):
    rho, alpha = 0.5, 0.3
    patch = st.recipes.steer2edit(
        tiny_llama, tokenizer, chains, rho_attention=rho, rho_mlp=rho, alpha=alpha, share=0.25
    )
    ordered = thoughts(chains)
    short, long = ordered[:2], ordered[-2:]
    with patch.apply(tiny_llama):
        edited = {n: p.double().clone() for n, p in tiny_llama.named_parameters()}
    maps = {
        "head_in attn_out self_attn.o_proj": HEADS,
        "mlp_act mlp_out mlp.down_proj": tiny_llama.config.intermediate_size,
    }
    for i in range(4):
        for names, parts in maps.items():
            reads, writes, module = names.split()
            x = [mean(predicting(read, c, f"{reads}.{i}") for c in side) for side in (short, long)]
            y = [mean(predicting(read, c, f"{writes}.{i}") for c in side) for side in (short, long)]
            v, mu = (y[0] - y[1]) / (y[0] - y[1]).norm(), (x[0] + x[1]) / 2
            name = f"model.layers.{i}.{module}.weight"
            w = dict(tiny_llama.named_parameters())[name].double()
            expected, width = w.clone(), w.shape[1] // parts
            for j in range(parts):
                part = slice(j * width, (j + 1) * width)
                out = w[:, part] @ mu[part]
                g = float(v @ out / out.norm())
                k = w[:, part].T @ v
                size = max(abs(g) - rho * alpha, 0) / (rho * (1 - alpha)) * (1 if g > 0 else -1)
                expected[:, part] += size * torch.outer(v, k / k.norm())
            torch.testing.assert_close(edited[name], expected, atol=1e-5, rtol=1e-5)


def test_steer2edit_reads_only_what_it_edits(tiny_llama, tokenizer, chains):
    """A mixture of experts has no neurons that could be read, but its heads can be edited."""
    options = {"share": 0.25, "rho_attention": 0.1, "rho_mlp": 0.1}
    whole = st.recipes.steer2edit(tiny_llama, tokenizer, chains, **options)
    for off, kept in (("rho_mlp", "self_attn.o_proj"), ("rho_attention", "mlp.down_proj")):
        part = st.recipes.steer2edit(tiny_llama, tokenizer, chains, **options | {off: None})
        assert part.changes.keys() == {name for name in whole.changes if kept in name} and part.changes
    experts = tiny("qwen3_moe")
    assert st.recipes.steer2edit(experts, tokenizer, chains, **options | {"rho_mlp": None}).changes
    with pytest.raises(UsageError, match="neither heads nor neurons"):
        st.recipes.steer2edit(tiny_llama, tokenizer, chains, rho_attention=None, rho_mlp=None)


def test_halves_of_an_odd_number_of_chains_do_not_overlap(tiny_llama, tokenizer, chains):
    several = thoughts(chains)[:7]
    rest = [*several[:3], *several[4:]]
    options = {"share": 0.5, "rho_attention": 0.1, "rho_mlp": 0.1}
    odd, even = (st.recipes.steer2edit(tiny_llama, tokenizer, some, **options) for some in (several, rest))
    assert odd.changes.keys() == even.changes.keys()
    for name, change in odd.changes.items():
        torch.testing.assert_close(change.left @ change.right, even.changes[name].left @ even.changes[name].right)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "mlp.c_fc"),
        ("phi3", "mlp.gate_up_proj"),
        ("gpt_neox", "mlp.dense_h_to_4h"),
        ("gemma2", "mlp.up_proj"),
        ("llama", "mlp.up_proj"),
    ],
)
def test_laser_takes_the_input_matrix_of_the_familys_mlp(tokenizer, family, name):
    patch = st.recipes.laser(tiny(family), tokenizer, layer=1, share=0.25)
    assert [f".1.{name}.weight" in changed for changed in patch.changes] == [True]
    with pytest.raises(UsageError, match="no matrix mlp.up_proj: expected one of"):
        st.recipes.laser(tiny("qwen3_moe"), tokenizer, layer=2)


def test_laser_keeps_a_share_of_the_rank(tiny_llama, tokenizer):
    patch = st.recipes.laser(tiny_llama, tokenizer, layer=1, matrix="mlp.gate_proj", share=0.25)
    w = tiny_llama.model.layers[1].mlp.gate_proj.weight.double()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    with patch.apply(tiny_llama):
        edited = tiny_llama.model.layers[1].mlp.gate_proj.weight.double()
        torch.testing.assert_close(edited, u[:, :8] * s[:8] @ vh[:8], atol=1e-5, rtol=1e-5)
    assert list(patch.changes) == ["model.layers.1.mlp.gate_proj.weight"] and patch.stats["rank"] == 8


def test_an_edit_is_its_hooks(tiny_llama, tokenizer, chains):
    ids = torch.tensor([chains[0].ids])
    for patch in (
        st.recipes.thinkedit(tiny_llama, tokenizer, chains, short=10, long=10, heads=2),
        st.recipes.steer2edit(tiny_llama, tokenizer, chains, share=0.25),
        st.recipes.laser(tiny_llama, tokenizer, share=0.5),
    ):
        with torch.no_grad(), patch.apply(tiny_llama):
            edited = tiny_llama(ids).logits
        with torch.no_grad(), patch.hooked(tiny_llama):
            torch.testing.assert_close(tiny_llama(ids).logits, edited, atol=1e-4, rtol=1e-4)


def test_refusals(tiny_llama, tokenizer, chains):
    with pytest.raises(UsageError, match="no chain has more than 1000 tokens of thinking: the 8 chains have 5 to 15"):
        st.recipes.thinkedit(tiny_llama, tokenizer, chains)
    for heads in (-1, 0, 1000):
        with pytest.raises(UsageError, match=f"heads is {heads}: expected a number from 1 to 16, as many as the model"):
            st.recipes.thinkedit(tiny_llama, tokenizer, chains, short=10, long=10, heads=heads)
    with pytest.raises(UsageError, match="no chain has fewer than 2 tokens"):
        st.recipes.thinkedit(tiny_llama, tokenizer, chains, short=2, long=4)
    with pytest.raises(UsageError, match="two chains with annotated spans at least"):
        st.recipes.steer2edit(tiny_llama, tokenizer, chains[:1])
    with pytest.raises(UsageError, match="as long as the longest"):
        st.recipes.steer2edit(tiny_llama, tokenizer, chains[:1] * 4)
    with pytest.raises(UsageError, match="more than 0 and at most 0.5"):
        st.recipes.steer2edit(tiny_llama, tokenizer, chains, share=0.7)
    with pytest.raises(UsageError, match="no matrix mlp.none: expected one of self_attn.q_proj"):
        st.recipes.laser(tiny_llama, tokenizer, matrix="mlp.none")
