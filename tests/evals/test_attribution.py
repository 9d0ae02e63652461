"""Every metric against the naive computation over the whole sequence, in float64."""

import json
import math
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.evals import attribution
from steerable.evals.attribution import METRICS, attribute, exact, fisher, published_gradients, spearman
from steerable.models.reading import Queries
from steerable.models.taps import tap
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

LAYERS, WIDTH, VOCABULARY = 4, 16, 40
SITES = tuple(Site("resid_post", layer) for layer in range(LAYERS))


def build(family, attention="sdpa"):
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = model_class(config)
    # transformers' norms compute in float32 whatever the model's type; these keep float64, for finite
    # differences
    for block in model.model.layers:
        block.input_layernorm, block.post_attention_layernorm = (
            torch.nn.RMSNorm(WIDTH, 1e-6),
            torch.nn.RMSNorm(WIDTH, 1e-6),
        )
    model.model.norm = torch.nn.RMSNorm(WIDTH, 1e-6)
    return model.double().eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCABULARY, (20,), generator=torch.Generator().manual_seed(1)).tolist()


POSITIONS = [0, 3, 9, 3, 18]  # unsorted, the first token, and one twice


def normal(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def patched_logits(model, ids, position, site, u):
    """Logits at `position` of the whole sequence with `u` added there at `site`."""

    def add(h):
        h = h.clone()
        h[0, position] += u
        return h

    with torch.no_grad(), tap(model, {site: add}):
        return model(torch.tensor([ids])).logits[0, position]


def test_queries_give_the_logits_of_the_whole_sequence(model, ids):
    queries = Queries(model, ids, POSITIONS)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, POSITIONS]
        torch.testing.assert_close(queries.logits(), expected)
        # a second call sees the same past, and repeated queries do not see each other
        torch.testing.assert_close(queries.logits(torch.tensor([4, 4, 1])), expected[[4, 4, 1]])


@pytest.mark.parametrize("kind", ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"])
def test_published_gradient_is_that_of_the_whole_sequence(model, ids, kind):
    sites = [Site(kind, layer) for layer in range(LAYERS)]
    got = published_gradients(Queries(model, ids, POSITIONS), sites)
    for layer, site in enumerate(sites):
        for q, position in enumerate(POSITIONS):
            added = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)

            def add(h, added=added, position=position):
                pad = torch.zeros_like(h)
                pad[0, position] = 1
                return h + pad * added

            with tap(model, {site: add}):
                z = model(torch.tensor([ids])).logits[0, position]
            loss = z.log_softmax(-1).square().mean() / 2
            (expected,) = torch.autograd.grad(loss, added)
            torch.testing.assert_close(got[layer, q], expected)


def test_published_gradient_is_the_published_codes(model):
    z = normal(VOCABULARY).requires_grad_()
    theirs = torch.nn.functional.kl_div(z.log_softmax(-1), z.log_softmax(-1).detach(), reduction="batchmean")
    ours = z.log_softmax(-1).square().mean() / 2
    (a,), (b,) = torch.autograd.grad(theirs, z), torch.autograd.grad(ours, z)
    assert theirs.isnan()
    torch.testing.assert_close(a, -b)


def test_fisher_is_the_variance_of_finite_differences(model, ids):
    added, index = normal(len(POSITIONS), LAYERS, WIDTH), torch.arange(len(POSITIONS))
    got = fisher(Queries(model, ids, POSITIONS), SITES, index, added, max_queries=7)
    assert got.shape == (len(POSITIONS), LAYERS)
    for q, position in enumerate(POSITIONS):
        p = model(torch.tensor([ids])).logits[0, position].softmax(-1)
        for layer, site in enumerate(SITES):
            step = 1e-5 * added[q, layer]
            up, down = (patched_logits(model, ids, position, site, s * step) for s in (1, -1))
            change = (up - down) / 2e-5
            variance = (p * change.square()).sum() - (p * change).sum().square()
            torch.testing.assert_close(got[q, layer], variance / 2, rtol=1e-6, atol=1e-9)


def test_exact_is_the_kl_of_patching_the_whole_sequence(model, ids):
    added, index = normal(6, LAYERS, WIDTH), torch.tensor([2, 0, 4, 4, 1, 3])
    got = exact(Queries(model, ids, POSITIONS), SITES, index, added, max_queries=5)
    clean = model(torch.tensor([ids])).logits[0]
    for n, q in enumerate(index.tolist()):
        base = clean[POSITIONS[q]].log_softmax(-1)
        for layer, site in enumerate(SITES):
            patched = patched_logits(model, ids, POSITIONS[q], site, added[n, layer]).log_softmax(-1)
            torch.testing.assert_close(got[n, layer], (base.exp() * (base - patched)).sum())


def test_a_small_patch_has_the_fisher_kl(model, ids):
    queries, index = Queries(model, ids, POSITIONS), torch.arange(len(POSITIONS))
    added = normal(len(POSITIONS), LAYERS, WIDTH)
    second_order = fisher(queries, SITES, index, added)
    errors = [(exact(queries, SITES, index, e * added) / e**2 / second_order - 1).abs().max() for e in (1e-3, 1e-4)]
    assert errors[1] < 0.02 and errors[1] < errors[0] / 5  # the difference is third order in the patch


def chain(ids, name="t"):
    spans = (TokenSpan("a", 2, 5), TokenSpan("b", 5, 9), TokenSpan("a", 12, 20))
    return AlignedChain(name, 0, tuple(ids), spans)


def directions():
    vectors = normal(2, LAYERS, WIDTH).float()
    return {b: Direction({s: vectors[i, s.layer] for s in SITES}) for i, b in enumerate("ab")}


def test_attribute_averages_over_the_chosen_onsets(model, ids):
    given, chains = directions(), [chain(ids), chain(ids[::-1], "u"), AlignedChain("v", 0, tuple(ids), ())]
    onsets = {
        "own": {"a": [1, 11], "b": [4]},
        "other": {"a": [4], "b": [1, 11]},
        "all": {"a": [1, 4, 11], "b": [1, 4, 11]},
    }
    for choice, expected in onsets.items():
        result = attribute(model, chains, given, onsets=choice, sample=1, max_queries=5)
        for behaviour, positions in expected.items():
            queries = Queries(model, ids, positions)
            u = torch.stack([given[behaviour].vectors[s] for s in SITES]).double()
            raw = torch.einsum("lqd,ld->lq", published_gradients(queries, SITES), u).abs().mean(1)
            effects, index = result.effects[behaviour], torch.arange(len(positions))
            pairs = u.expand(len(positions), LAYERS, WIDTH)
            torch.testing.assert_close(effects["published_rescaled"][0], raw)
            torch.testing.assert_close(effects["published"][0], raw / u.norm(dim=1))
            torch.testing.assert_close(effects["fisher"][0], fisher(queries, SITES, index, pairs).mean(0))
            torch.testing.assert_close(effects["exact"][0], exact(queries, SITES, index, pairs).mean(0))
            assert effects["exact"][1].isnan().all() and not effects["published"].isnan().any()
            assert effects["exact"].shape == (2, LAYERS)


def test_few_queries_to_a_pass_and_small_pieces_change_nothing(model, ids):
    chains = [chain(ids), chain(ids[::-1], "u")]
    whole, pieced = (attribute(model, chains, directions(), max_queries=n, chunk=c) for n, c in ((512, 4096), (1, 3)))
    for behaviour in "ab":
        for metric in METRICS:
            torch.testing.assert_close(pieced.effects[behaviour][metric], whole.effects[behaviour][metric])


def test_costly_metrics_on_some_of_the_onsets(model, ids):
    given = directions()
    result = attribute(model, [chain(ids)], given, onsets="all", costly_onsets=1)
    queries = Queries(model, ids, [1, 4, 11])
    u = torch.stack([given["a"].vectors[s] for s in SITES]).double()[None]
    middle = torch.tensor([1])
    torch.testing.assert_close(result.effects["a"]["exact"][0], exact(queries, SITES, middle, u)[0])
    torch.testing.assert_close(result.effects["a"]["fisher"][0], fisher(queries, SITES, middle, u)[0])
    every = attribute(model, [chain(ids)], given, onsets="all", costly_onsets=3)
    torch.testing.assert_close(every.mean("a", "published"), result.mean("a", "published"))
    with pytest.raises(UsageError, match="costly_onsets"):
        attribute(model, [chain(ids)], given, costly_onsets=0)


def test_chains_are_blocks_of_work(model, ids):
    """Whoever computes them, in whatever order, as long as the result is told with the chain's number."""
    chains, seen, told = [chain(ids), chain(ids[::-1], "u"), chain(ids[5:] + ids[:5], "v")], [], []

    def out_of_order(work, blocks, *, finished, context, workers, **others):
        seen.append(workers)
        for index in (2, 0, 1):
            # what is sent to another process
            block, result = pickle.loads(pickle.dumps(blocks[index])), work(context, blocks[index], None)
            assert block == blocks[index]
            finished(index, pickle.loads(pickle.dumps(result)))

    model.config._name_or_path = "somewhere"
    here = attribute(model, chains, directions(), sample=2)
    there = attribute(
        model, chains, directions(), sample=2, workers=9, spread=out_of_order, progress=lambda *at: told.append(at)
    )
    model.config._name_or_path = ""
    assert seen == [3] and told == [(1, 3), (2, 3), (3, 3)]
    for metric in METRICS:
        assert torch.equal(here.effects["a"][metric].nan_to_num(), there.effects["a"][metric].nan_to_num())


def test_eager_attention_gives_the_same(ids):
    results = [attribute(build("llama", kind), [chain(ids)], directions()) for kind in ("sdpa", "eager")]
    for metric in METRICS:  # eager attention takes its softmax in float32
        torch.testing.assert_close(*(r.mean("a", metric) for r in results), rtol=1e-4, atol=1e-6)


def test_fisher_and_exact_take_the_strength(model, ids):
    one, tiny = (attribute(model, [chain(ids)], directions(), strength=s) for s in (1.0, 1e-4))
    torch.testing.assert_close(tiny.mean("a", "fisher"), 1e-8 * one.mean("a", "fisher"))
    torch.testing.assert_close(tiny.mean("a", "exact"), tiny.mean("a", "fisher"), rtol=0.01, atol=0)


def test_to_dict_is_plain_json_with_none_for_missing(model, ids):
    result = attribute(model, [chain(ids), chain(ids[::-1])], directions(), sample=0)
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["a"]["exact"] == {"mean": [None] * LAYERS, "std": [None] * LAYERS, "chains": 0}
    assert plain["b"]["rank_correlation"] == {m: None for m in METRICS if m != "exact"}
    assert plain["b"]["published"]["chains"] == 2 and all(v > 0 for v in plain["b"]["published"]["std"])
    with pytest.raises(UsageError, match="no peak"):
        result.peak("a")
    curve = result.mean("a", "published")
    assert result.peak("a", "published", margin=1) == 1 + int(curve[1:-1].argmax())


def test_bad_arguments_are_refused_before_any_forward(ids):
    model, given = build("llama"), directions()
    model.forward = None
    for message, kwargs in {"metric 'kl'": {"metrics": ["kl"]}, "onsets 'mine'": {"onsets": "mine"}}.items():
        with pytest.raises(UsageError, match=message):
            attribute(model, [chain(ids)], given, **kwargs)
    with pytest.raises(UsageError, match="at least one chain"):
        attribute(model, [], given)
    with pytest.raises(UsageError, match="at least one direction"):
        attribute(model, [chain(ids)], {})
    with pytest.raises(UsageError, match="same sites"):
        attribute(model, [chain(ids)], given | {"c": given["a"].only([1])})
    with pytest.raises(UsageError, match="width 3"):
        attribute(model, [chain(ids)], {"a": Direction({SITES[0]: torch.ones(3)})})
    with pytest.raises(UsageError, match="vectors of one width, but 'a' has .16, 24"):
        attribute(model, [chain(ids)], {"a": Direction({SITES[0]: torch.ones(16), Site("mlp_act", 1): torch.ones(24)})})
    with pytest.raises(UsageError, match="out of range"):
        attribute(model, [chain(ids)], {"a": Direction({Site("resid_post", 9): torch.ones(WIDTH)})})
    with pytest.raises(UsageError, match="query positions"):
        Queries(model, ids, [20])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="eager or sdpa"):
        Queries(model, ids, [2])


def test_spearman():
    x = torch.tensor([1.0, 2.0, 2.0, 5.0])
    assert spearman(x, x.exp()) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    # by hand: ranks 0, 1.5, 1.5, 3 and 1, 0, 2, 3
    assert spearman(x, torch.tensor([2.0, 1.0, 3.0, 4.0])) == pytest.approx(3 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman(x, torch.ones(4)))


def test_chains_that_were_measured_are_not_measured_again(model, ids, tmp_path, monkeypatch):
    chains = [chain(ids), chain(ids[::-1], "u")]
    expected = attribute(model, chains, directions(), sample=2)
    measured = attribute(model, chains, directions(), sample=2, keep=tmp_path)
    (tmp_path / "1.json").unlink()
    compute, again = attribution._Measurement.__call__, []

    def counting(self, loaded, block, report):
        again.append(block[0].task_id)
        return compute(self, loaded, block, report)

    monkeypatch.setattr(attribution._Measurement, "__call__", counting)
    resumed = attribute(model, chains, directions(), sample=2, keep=tmp_path)
    assert len(again) == 1
    for behaviour, metrics in expected.effects.items():
        for metric, values in metrics.items():
            for other in (measured, resumed):
                torch.testing.assert_close(other.effects[behaviour][metric], values, rtol=0, atol=0, equal_nan=True)
