"""Edits of weights, each against the naive computation and against hooks that change activations."""

import numpy
import pytest
import torch
from tiny_families import tiny

import steerable as st
from steerable.methods.head_projection import Head, head_scores, project_heads
from steerable.methods.rank_reduction import truncate_matrix
from steerable.methods.sparse_edits import elastic_net_edits
from steerable.methods.weight_ablation import ablate_weights
from steerable.methods.weight_patch import LowRank, Replacement, dense
from steerable.models.taps import tap
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(name, **options):
    model = tiny(name, **options).double()
    if hasattr(model.config, "experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def read(model, *kinds, ids=IDS, layers=range(4)):
    """Activations at sites of these kinds, the mean of each text."""
    seen = {}

    def keep(site):
        return lambda h: seen.update({site: h.mean(1)})

    with tap(model, {Site(kind, layer): keep(Site(kind, layer)) for kind in kinds for layer in layers}):
        logits(model, ids)
    return seen


def rank_of(matrix):
    values = torch.linalg.svdvals(matrix)
    return int((values > 1e-9 * values[0]).sum())


def difference(model, patch, name):
    """What the patch really changes in a weight, as [out, in]."""
    before = model.get_parameter(name).detach().clone()
    with patch.apply(model):
        change = model.get_parameter(name).detach() - before
    return change.T if "gpt2" in type(model).__name__.lower() else change


def same_as_hooked(model, patch, atol=1e-10):
    with patch.apply(model):
        applied = logits(model)
    with patch.hooked(model):
        torch.testing.assert_close(logits(model), applied, rtol=0, atol=atol)
    return applied


REFUSED = [("gemma3_text", "a norm stands behind"), ("olmo2", "a norm stands behind")]

# --- ThinkEdit ---


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gpt_neox"])
def test_projected_heads(name, weight):
    model = double(name)
    chosen = [Head(1, 0), Head(1, 3), Head(2, 2)]
    kind = "attn_out" if name == "gpt_neox" else "resid_mid"
    direction = Direction({Site(kind, layer): random(32, seed=layer).float() for layer in range(4)})
    patch = project_heads(model, direction, chosen, weight)
    assert len(patch.changes) == 2
    z, changed = {}, same_as_hooked(model, patch)
    assert not torch.equal(changed, logits(model))
    maps = {int(next(part for part in key.split(".") if part.isdigit())): key for key in patch.changes}

    def projecting(layer):
        w, v = model.get_parameter(maps[layer]).detach(), direction.at(layer).double()
        w, v = (w.T if name == "gpt2" else w), v / v.norm()

        def at_output(h):
            for j in [head.head for head in chosen if head.layer == layer]:
                columns = slice(j * z[layer].shape[-1] // 4, (j + 1) * z[layer].shape[-1] // 4)
                written = z[layer][..., columns] @ w[:, columns].T
                h = h - weight * (written @ v)[..., None] * v
            return h

        return at_output

    hooks = {Site("head_in", layer): lambda h, layer=layer: z.update({layer: h}) for layer in (1, 2)}
    hooks |= {Site("attn_out", layer): projecting(layer) for layer in (1, 2)}
    with tap(model, hooks):
        torch.testing.assert_close(logits(model), changed, rtol=0, atol=1e-10)

    for layer, key in maps.items():
        v = direction.at(layer).double()
        delta = difference(model, patch, key).view(32, 4, -1)
        old = model.get_parameter(key).detach()
        old = (old.T if name == "gpt2" else old).reshape(32, 4, -1)
        assert rank_of(delta.reshape(32, -1)) == 1
        for j in range(4):
            if Head(layer, j) in chosen:
                torch.testing.assert_close(v @ (old + delta)[:, j], (1 - weight) * (v @ old[:, j]), rtol=0, atol=1e-9)
                assert rank_of(delta[:, j]) == 1
            else:
                assert not delta[:, j].any()
    negative = project_heads(model, -direction, chosen, weight)
    assert all(torch.equal(dense(negative.changes[key]), dense(patch.changes[key])) for key in patch.changes)
    if weight == 1:
        with patch.apply(model):
            again = project_heads(model, direction, chosen)
            assert all(dense(change).abs().max() < 1e-12 for change in again.changes.values())


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_scores_of_heads(name):
    model = double(name)
    direction = Direction({Site("resid_mid", layer): random(32, seed=layer).float() for layer in range(4)})
    seen = read(model, "head_in", "attn_out")
    z = {site: h for site, h in seen.items() if site.kind == "head_in"}
    scores = head_scores(model, z, direction)
    assert len(scores) == 16 and list(scores.values()) == sorted(scores.values(), reverse=True)
    for layer in range(4):
        out = model.model.layers[layer].self_attn.o_proj
        v = direction.at(layer).double()
        v, size = v / v.norm(), z[Site("head_in", layer)].shape[1] // 4
        for j in range(4):
            columns = slice(j * size, (j + 1) * size)
            written = z[Site("head_in", layer)][:, columns] @ out.weight[:, columns].T
            assert scores[Head(layer, j)] == pytest.approx(float((written @ -v).mean()), abs=1e-12)
        total = seen[Site("attn_out", layer)].mean(0) - (0 if out.bias is None else out.bias)
        assert sum(scores[Head(layer, j)] for j in range(4)) == pytest.approx(float(total @ -v), abs=1e-12)


def test_heads_that_do_not_fit():
    model = double("qwen3")
    direction = Direction({Site("resid_mid", 1): torch.ones(32)})
    for heads, sentence in (
        ([], "expected one at least"),
        ([(1, 0), (1, 0)], "each once"),
        ([(1, 4)], "no head 4 in layer 1"),
        ([(9, 0)], "layers 0 to 3"),
        ([(2, 0)], "no vector at 2"),
    ):
        with pytest.raises(UsageError, match=sentence):
            project_heads(model, direction, heads)
    for weight in (0.0, float("nan")):
        with pytest.raises(UsageError, match="weight of the projection"):
            project_heads(model, direction, [(1, 0)], weight)
    with pytest.raises(UsageError, match="expected \\[32\\]"):
        project_heads(model, Direction({Site("resid_mid", 1): torch.ones(8)}), [(1, 0)])
    with pytest.raises(UsageError, match="head_in"):
        head_scores(model, {Site("attn_out", 1): torch.ones(2, 32)}, direction)
    with pytest.raises(UsageError, match=r"expected \[n, 48\]"):
        head_scores(model, {Site("head_in", 1): torch.ones(2, 32)}, direction)
    for name, sentence in REFUSED:
        with pytest.raises(UsageError, match=sentence):
            project_heads(tiny(name), direction, [(1, 0)])


# --- Steer2Edit ---


def groups(model, *kinds):
    """Two groups of texts, read at these kinds of sites."""
    a, b = (torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    return read(model, *kinds, ids=a), read(model, *kinds, ids=b)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_elastic_net_edits(name):
    model = double(name)
    positive, negative = groups(model, "head_in", "attn_out", "mlp_act", "mlp_out")
    alpha, rho = 0.3, {"attention": 0.4, "mlp": 0.6}
    patch = elastic_net_edits(model, positive, negative, alpha=alpha, rho_attention=0.4, rho_mlp=0.6)
    assert 0 < sum(patch.stats["edited"].values()) < 4 * (4 + 48)
    same_as_hooked(model, patch)
    swapped = elastic_net_edits(model, negative, positive, alpha=alpha, rho_attention=0.4, rho_mlp=0.6)
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    names = {id(p): key for key, p in model.named_parameters()}
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    for layer, block in enumerate(blocks):
        attention, mlp = (
            (block.attn.c_proj, block.mlp.c_proj) if name == "gpt2" else (block.self_attn.o_proj, block.mlp.down_proj)
        )
        for after, linear, sites in (
            ("attention", attention, ("head_in", "attn_out")),
            ("mlp", mlp, ("mlp_act", "mlp_out")),
        ):
            w = linear.weight.T if name == "gpt2" else linear.weight
            v = positive[Site(sites[1], layer)].mean(0) - negative[Site(sites[1], layer)].mean(0)
            mu = (positive[Site(sites[0], layer)].mean(0) + negative[Site(sites[0], layer)].mean(0)) / 2
            key, count = names[id(linear.weight)], 4 if after == "attention" else w.shape[1]
            delta = difference(model, patch, key) if key in patch.changes else torch.zeros_like(w)
            for columns in torch.arange(w.shape[1]).view(count, -1):
                part, here = delta[:, columns], w[:, columns]
                g = torch.nn.functional.cosine_similarity(v, here @ mu[columns], dim=0)
                gain = g * grid - rho[after] * (alpha * grid.abs() + (1 - alpha) / 2 * grid**2)
                best = float(grid[gain.argmax()])
                k = here.T @ v / (here.T @ v).norm()
                naive = best * torch.outer(v / v.norm(), k)
                torch.testing.assert_close(part, naive, rtol=0, atol=2e-3)
                assert (v @ part @ mu[columns]) >= -1e-12
                assert bool(part.any()) == bool(g.abs() > rho[after] * alpha)
            if key in patch.changes:
                assert rank_of(delta) == 1
                beside = random(32) - (random(32) @ v) / (v @ v) * v
                assert (beside @ delta).norm() < 1e-12 * beside.norm() * delta.norm() + 1e-12
                torch.testing.assert_close(dense(swapped.changes[key]), -dense(patch.changes[key]), rtol=0, atol=1e-12)


def test_edits_are_switched_off():
    model = double("qwen3")
    positive, negative = groups(model, "head_in", "attn_out", "mlp_act", "mlp_out")
    heads = elastic_net_edits(model, positive, negative, alpha=0.1, rho_attention=0.2)
    assert heads.changes and all("o_proj" in name for name in heads.changes)
    assert not elastic_net_edits(model, positive, negative, alpha=0.99, rho_attention=2.0, rho_mlp=2.0).changes


def test_edits_that_do_not_fit():
    model = double("qwen3")
    positive, negative = groups(model, "head_in", "attn_out")
    for options, sentence in (
        ({"alpha": 1.0, "rho_mlp": 0.5}, "alpha is 1.0"),
        ({"alpha": 0.5}, "give rho_attention"),
        ({"alpha": 0.5, "rho_attention": -1.0}, "rho_attention is -1.0"),
        ({"alpha": 0.5, "rho_mlp": 0.5}, "activations at mlp_act and mlp_out"),
    ):
        with pytest.raises(UsageError, match=sentence):
            elastic_net_edits(model, positive, negative, **options)
    with pytest.raises(UsageError, match="the same mean at attn_out.0"):
        elastic_net_edits(model, positive, positive, alpha=0.5, rho_attention=0.5)
    outputs = {site: h for site, h in positive.items() if site.kind == "attn_out"}
    with pytest.raises(UsageError, match="no activations at head_in.0"):
        elastic_net_edits(model, positive, outputs, alpha=0.5, rho_attention=0.5)
    for name, sentence in [*REFUSED, ("qwen3_moe", "a mixture of experts")]:
        sites = {Site(kind, 0): torch.ones(2, 32) for kind in ("mlp_act", "mlp_out")}
        with pytest.raises(UsageError, match=sentence):
            elastic_net_edits(tiny(name), sites, sites, alpha=0.5, rho_mlp=0.5)


# --- directional ablation ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_ablated_weights_are_the_hook(name):
    model = double(name, tie_word_embeddings=False)
    vector = random(32)
    patch = ablate_weights(model, vector)
    changed = same_as_hooked(model, patch)
    sites = [Site("resid_pre", 0), *(Site(kind, i) for kind in ("attn_out", "mlp_out") for i in range(4))]
    with st.steer(model, Direction({site: vector.float() for site in sites}, map="ablate")):
        torch.testing.assert_close(logits(model), changed, rtol=0, atol=1e-5)  # that vector is in float32
    assert (changed - logits(model)).abs().max() > 0.01
    with patch.apply(model):
        for h in read(model, "resid_pre", "attn_out", "mlp_out", "resid_post").values():
            assert (h @ vector).abs().max() < 1e-10
    for key, change in patch.changes.items():
        if isinstance(change, LowRank):
            assert rank_of(difference(model, patch, key)) == 1


def test_ablation_of_tied_embeddings_and_what_is_refused():
    model = double("qwen3")
    assert model.config.tie_word_embeddings
    same_as_hooked(model, ablate_weights(model, random(32)))
    for vector in (torch.ones(8), torch.zeros(32), torch.full((32,), torch.nan)):
        with pytest.raises(UsageError, match=r"expected \[32\], finite and not zero"):
            ablate_weights(model, vector)
    for name, sentence in [*REFUSED, ("qwen3_moe", "a mixture of experts")]:
        with pytest.raises(UsageError, match=sentence):
            ablate_weights(tiny(name), random(32))


def test_a_weight_beside_an_adapter_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(UsageError, match="an adapter writes beside .*merge it first"):
        project_heads(model, Direction({Site("resid_mid", 1): torch.ones(32)}), [(1, 0)])


# --- LASER ---


@pytest.mark.parametrize("rank", [1, 20, 28])
def test_truncated_matrix(rank, tmp_path):
    model = double("llama")
    name = "model.layers.3.mlp.up_proj.weight"
    patch = truncate_matrix(model, name, rank)
    matrix = model.get_parameter(name).detach().clone()
    u, s, v = numpy.linalg.svd(matrix.numpy(), full_matrices=False)
    expected = torch.tensor(u[:, :rank] * s[:rank] @ v[:rank])
    with patch.apply(model):
        truncated = model.get_parameter(name).detach().clone()
    torch.testing.assert_close(truncated, expected, rtol=0, atol=1e-12)
    assert rank_of(truncated) == rank and rank_of(matrix - truncated) == 32 - rank
    assert type(patch.changes[name]) is {1: Replacement, 20: LowRank, 28: LowRank}[rank]
    numbers = min(rank, 32 - rank) * (32 + 48)  # in the file, beside a header
    assert 8 * numbers < len(patch.to_bytes()) < 8 * numbers + 800
    again = st.WeightPatch.load(patch.save(tmp_path / "patch.safetensors"))
    before = matrix.clone()
    with again.apply(model):
        assert torch.equal(model.get_parameter(name), truncated)
    assert torch.equal(model.get_parameter(name), before)
    assert patch.stats["explained"] == pytest.approx(float((expected**2).sum() / (matrix**2).sum()))
    same_as_hooked(model, patch)


def test_matrices_that_cannot_be_truncated():
    model = tiny("llama")
    up = "model.layers.3.mlp.up_proj.weight"
    for name, rank, sentence in (
        ("nothing.weight", 3, "no weight nothing"),
        ("model.norm.weight", 3, "expected a matrix"),
        (up, 0, "expected 1 to 31"),
        (up, 32, "expected 1 to 31"),
    ):
        with pytest.raises(UsageError, match=sentence):
            truncate_matrix(model, name, rank)
    experts = tiny("qwen3_moe")
    fused = next(name for name, p in experts.named_parameters() if p.dim() == 3)
    with pytest.raises(UsageError, match="expected a matrix, which experts"):
        truncate_matrix(experts, fused, 3)
