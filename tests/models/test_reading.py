"""Queries of every family against the whole sequence without a cache, in windows and behind long prefixes."""

import pytest
import torch
from tiny_families import families, tiny
from transformers import MptConfig, MptForCausalLM

from steerable.evals.attribution import exact, fisher, published_gradients
from steerable.models import loading as models
from steerable.models import reading as queries
from steerable.models.reading import Queries
from steerable.models.taps import tap
from steerable.steering.site import Site
from steerable.store.errors import UsageError

IDS = torch.randint(3, 60, (22,), generator=torch.Generator().manual_seed(1)).tolist()
POSITIONS = [0, 2, 13, 20, 13]  # before the windows are full, beyond, unsorted, the first token, and one twice


@pytest.fixture(scope="module", params=families())
def model(request):
    model = tiny(request.param).double()
    model.config._experts_implementation = "eager"  # the other kernels of mixtures of experts know no float64
    return model


def sites(model):
    return [Site("resid_post", layer) for layer in range(models.n_layers(model))]


def added_at(model, site, position, u):
    """Logits at `position` of the whole sequence with `u` added there at `site`."""

    def add(h):
        place = torch.zeros_like(h)
        place[0, position] = 1
        return h + place * u.to(h)

    with tap(model, {site: add}):
        return model(torch.tensor([IDS]), use_cache=False).logits[0, position].double()


def vectors(model, count, seed=2):
    shape = (count, models.n_layers(model), models.width(model))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_logits_are_those_of_the_whole_sequence(model, chunk):
    asked = Queries(model, IDS, POSITIONS, chunk=chunk)
    with torch.no_grad():
        expected = model(torch.tensor([IDS]), use_cache=False).logits[0, POSITIONS]
        torch.testing.assert_close(asked.logits(), expected, atol=1e-5, rtol=1e-5)
        index = torch.tensor([4, 4, 1])  # a shorter prefix, and repeated queries
        torch.testing.assert_close(asked.logits(index), expected[index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(asked.logits(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("long", [False, True])
def test_published_gradients_are_those_of_the_whole_sequence(model, long, monkeypatch):
    monkeypatch.setattr(queries, "_LONG", 4 if long else 4096)
    got = published_gradients(Queries(model, IDS, POSITIONS), sites(model))
    assert not any("forward" in vars(block) for block in models.blocks(model))
    for layer, site in list(enumerate(sites(model)))[::2]:
        for q in (2, 3):
            u = torch.zeros(models.width(model), dtype=torch.float64, requires_grad=True)
            loss = added_at(model, site, POSITIONS[q], u).log_softmax(-1).square().mean() / 2
            (expected,) = torch.autograd.grad(loss, u)
            torch.testing.assert_close(got[layer, q], expected, atol=1e-5, rtol=1e-4)


def test_exact_is_the_kl_of_patching_the_whole_sequence(model):
    index, added = torch.tensor([3, 2, 3]), vectors(model, 3)
    got = exact(Queries(model, IDS, POSITIONS), sites(model), index, added, max_queries=2)
    zero = torch.zeros(models.width(model))
    with torch.no_grad():
        for n, q in enumerate(index.tolist()):
            for layer, site in enumerate(sites(model)):
                base = added_at(model, site, POSITIONS[q], zero).log_softmax(-1)
                patched = added_at(model, site, POSITIONS[q], added[n, layer]).log_softmax(-1)
                expected = (base.exp() * (base - patched)).sum()
                torch.testing.assert_close(got[n, layer], expected, atol=1e-5, rtol=1e-4)


def test_fisher_is_the_variance_of_finite_differences(model):
    index, added = torch.tensor([3, 2]), vectors(model, 2)
    got = fisher(Queries(model, IDS, POSITIONS), sites(model), index, added, max_queries=3)
    with torch.no_grad():
        for n, q in enumerate(index.tolist()):
            for layer, site in enumerate(sites(model)):
                p = added_at(model, site, POSITIONS[q], 0 * added[n, layer]).softmax(-1)
                # norms compute in float32, so that the step cannot be small
                up, down = (added_at(model, site, POSITIONS[q], s * added[n, layer]) for s in (1e-3, -1e-3))
                change = (up - down) / 2e-3
                variance = (p * change.square()).sum() - (p * change).sum().square()
                torch.testing.assert_close(got[n, layer], variance / 2, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma2", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows_in_both_kinds_of_attention(name, attention):
    model = tiny(name, attention=attention)
    got = Queries(model, IDS, POSITIONS).logits()
    torch.testing.assert_close(
        got, model(torch.tensor([IDS]), use_cache=False).logits[0, POSITIONS], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_fisher_with_the_experts_own_kernels(name):
    """They have no forward-mode derivative; the plain ones stand in, and only then."""
    index, results = torch.tensor([3, 2]), []
    for kernel in ("eager", "grouped_mm"):
        model = tiny(name)
        model.config._experts_implementation = kernel
        results.append(fisher(Queries(model, IDS, POSITIONS), sites(model), index, vectors(model, 2)))
        assert model.config._experts_implementation == kernel
    torch.testing.assert_close(*results)


def test_a_pass_takes_fewer_queries_behind_a_long_prefix_and_before_a_large_vocabulary(tiny_llama, monkeypatch):
    asked = Queries(tiny_llama, IDS, POSITIONS)
    assert asked.per_pass(512) == 512
    monkeypatch.setattr(queries, "_SCORES", 4 * 20 * 3)  # heads x prefix x 3
    assert asked.per_pass(512) == 3 and asked.per_pass(2) == 2
    monkeypatch.setattr(queries, "most_logits", lambda device: 64)
    assert asked.per_pass(512) == 1


@pytest.mark.parametrize("known", [True, False])
def test_a_model_of_an_unknown_type_is_tried(known):
    """MPT's attention adds what depends on the distance of columns, in which a query does not stand at its place."""
    if known:
        model = tiny("qwen3")
        model.config.model_type = "cousin"
        expected = model(torch.tensor([IDS]), use_cache=False).logits[0, POSITIONS]
        torch.testing.assert_close(Queries(model, IDS, POSITIONS).logits(), expected, atol=1e-4, rtol=1e-4)
        return
    torch.manual_seed(0)
    model = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=64)).eval()
    for _ in range(2):
        with pytest.raises(UsageError, match="attribution cannot single out tokens of this mpt model"):
            Queries(model, IDS, POSITIONS)


def test_other_kinds_of_attention_are_refused(tiny_llama):
    model = tiny("qwen3", layer_types=["full_attention"] * 4)
    model.config.layer_types = ["full_attention", "linear_attention"] * 2
    with pytest.raises(UsageError, match="layer 1 of this qwen3 model has 'linear attention'"):
        Queries(model, IDS, POSITIONS)
