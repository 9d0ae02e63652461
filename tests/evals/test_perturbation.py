"""Persistence against a naive recomputation from `hidden_states`, and what must hold at the source."""

import warnings

import pytest
import torch
from tiny_families import tiny

from steerable.chains.generation import prompt_text
from steerable.evals.perturbation import chain_texts, persistence
from steerable.models.taps import tap
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

LAYERS = 4


def vectors(seed=0, layers=range(LAYERS), size=2.0, kind="resid_post"):
    generator = torch.Generator().manual_seed(seed)
    return {Site(kind, layer): size * torch.randn(32, generator=generator) for layer in layers}


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(5)
    return [(torch.randint(7, 64, (n,), generator=generator).tolist(), 2) for n in (9, 5, 12)]


def streams(model, ids, change=None):
    """resid_post of all layers of one text [L, T, d]; change: {site: function of h}."""
    found = {}
    with tap(model, change or {}), tap(
        model, {Site("resid_post", i): lambda h, i=i: found.update({i: h[0].clone()}) for i in range(LAYERS)}
    ):  # fmt: skip
        model(torch.tensor([ids]))
    return torch.stack([found[i] for i in range(LAYERS)])


def naive(model, texts, own, source, strength, masks, first_of):
    """All shifts in memory, text by text; then the definitions."""
    shifts, sizes = [], []
    for (ids, _), mask in zip(texts, masks, strict=True):
        vector = strength * own[source]

        def change(h, mask=mask, vector=vector):
            return h + vector * mask[None, :, None]

        base = streams(model, ids)
        site = next(site for site in own_sites if site.layer == source)
        shifts.append((streams(model, ids, {site: change}) - base)[:, first_of(mask) :])
        sizes.append(base[:, first_of(mask) :].norm(dim=-1))
    d, h = torch.cat(shifts, 1).double(), torch.cat(sizes, 1).double()
    cosine = torch.nn.functional.cosine_similarity
    result = {"diff_diff": [], "diff_vector": [], "relative": []}
    for layer in range(source, LAYERS):
        moved = d[layer][d[layer].norm(dim=1) > 0]
        result["diff_diff"].append(cosine(moved, d[layer].mean(0, keepdim=True)).mean().item())
        target = own.get(layer)
        sign = 1 if strength > 0 else -1
        result["diff_vector"].append(
            None if target is None else cosine(moved, sign * target[None].double()).mean().item()
        )
        result["relative"].append((d[layer].norm(dim=1) / h[layer]).mean().item())
    return result


own_sites = vectors()


@pytest.mark.parametrize(("strength", "where"), [(1.0, "all"), (-0.5, "all"), (1.0, "generated")])
def test_equals_a_naive_recomputation(llama, tokenizer, texts, strength, where):
    direction = Direction(own_sites, strength=strength, gate=where)
    own = {site.layer: v for site, v in own_sites.items()}
    found = persistence(llama, tokenizer, direction, texts, controls=0)
    masks = [
        torch.tensor([1.0 if where == "all" or i >= start else 0.0 for i in range(len(ids))]) for ids, start in texts
    ]
    for i, source in enumerate(found.sources):
        expected = naive(llama, texts, own, source, strength, masks, lambda m: int(m.argmax()))
        for name, values in expected.items():
            row = getattr(found, name)[i]
            assert row[:source] == [None] * source
            assert row[source:] == pytest.approx(values, abs=2e-5), (name, source)
    assert found.tokens == int(sum(m.sum() for m in masks)) and found.random is None
    assert (found.texts, found.cut, found.strength, found.where) == (3, 0, strength, where)


def test_at_its_own_layer_every_token_moves_along_the_vector(llama, tokenizer, texts):
    found = persistence(llama, tokenizer, Direction(own_sites, strength=-2.0), texts)
    for i in found.sources:
        assert found.diff_diff[i][i] == pytest.approx(1, abs=1e-5)
        assert found.diff_vector[i][i] == pytest.approx(1, abs=1e-5)
        assert found.random["diff_diff"][i][i] == pytest.approx(1, abs=1e-5)
        # the controls are as long: at the source their shift is as large
        assert found.random["relative"][i][i] == pytest.approx(found.relative[i][i], rel=1e-5)
        assert abs(found.random["diff_vector"][i][i]) < 0.7
    assert found.diff_diff[0][3] < 0.999


def test_batches_change_nothing(llama, tokenizer, texts):
    direction = Direction(vectors(1, [1, 2]))
    alone, together = (persistence(llama, tokenizer, direction, texts, max_tokens=n) for n in (1, 10_000))
    for name in ("diff_diff", "diff_vector", "relative"):
        for a, b in zip(getattr(alone, name), getattr(together, name), strict=True):
            assert [x is None for x in a] == [x is None for x in b]
            assert [x for x in a if x is not None] == pytest.approx([x for x in b if x is not None], abs=1e-5)
    assert together.diff_vector[0][0] is None and together.diff_vector[0][3] is None  # no vectors there


def test_other_sites_and_chosen_sources(llama, tokenizer, texts):
    direction = Direction(vectors(2, kind="mlp_out"))
    found = persistence(llama, tokenizer, direction, texts, layers=[2], controls=0)
    assert found.sources == [2] and len(found.diff_diff) == 1
    # behind layer 2's MLP nothing else acts before the block ends
    assert found.diff_vector[0][2] == pytest.approx(1, abs=1e-5)
    assert found.diff_vector[0][3] is not None


def test_long_texts_are_cut_and_counted(llama, tokenizer, texts):
    progress = []
    direction = Direction(vectors(1, [3]))
    found = persistence(llama, tokenizer, direction, texts, longest=6, progress=progress.append)
    assert found.cut == 2 and found.tokens == 6 + 5 + 6 and sum(progress) == 3


def test_a_zero_vector_moves_nothing(llama, tokenizer, texts):
    direction = Direction({Site("resid_post", 1): torch.zeros(32), Site("resid_post", 2): torch.ones(32)})
    found = persistence(llama, tokenizer, direction, texts, layers=[1])
    assert found.diff_diff == [[None] * 4] and found.diff_vector == [[None] * 4]
    assert found.relative == [[None, 0, 0, 0]]


def test_lower_precision_is_noticed(tokenizer, texts):
    model = tiny("llama").to(torch.bfloat16)
    small = Direction(vectors(size=1e-4, layers=[2]))
    with pytest.warns(SteerableWarning, match="bfloat16 hides a vector this small"):
        persistence(model, tokenizer, small, texts, controls=0)


def test_chains(llama, tokenizer):
    chains = [
        {"task_id": "a", "sample": 0, "thinking": " w1 w2 ", "answer": " w3", "closed": True, "tokens": 5},
        {"task_id": "b", "sample": 0, "thinking": " w4", "answer": "", "closed": False, "tokens": 1},
    ]
    prompts = {task: prompt_text(tokenizer, f"w{9 + i}") for i, task in enumerate("ab")}
    (first, start), (second, _) = chain_texts(tokenizer, chains, prompts)
    said = tokenizer.convert_ids_to_tokens(first)
    assert said[:start] == ["<user>", "w9", "<assistant>", "<think>"]
    assert said[start:] == ["w1", "w2", "</think>", "w3"]
    assert tokenizer.convert_ids_to_tokens(second)[-1] == "w4"
    direction = Direction(vectors(layers=[1]), gate="thinking")
    found = persistence(llama, tokenizer, direction, chain_texts(tokenizer, chains, prompts), controls=0)
    assert found.tokens == 4 + 1  # from the first thinking token to the end
    assert found.relative[0][1] > 0
    with pytest.raises(UsageError, match="no prompt for the chain of task 'b'"):
        chain_texts(tokenizer, chains, {"a": prompts["a"]})


def test_chains_of_a_model_without_a_think_block(tokenizer, monkeypatch):
    monkeypatch.setattr("steerable.evals.perturbation.think_tags_if_any", lambda tokenizer: None)
    chain = {"task_id": "a", "sample": 0, "thinking": " w1 w2", "answer": " w1 w2", "closed": True, "tokens": 2}
    ((ids, start),) = chain_texts(tokenizer, [chain], {"a": "w9 w8"})
    assert tokenizer.convert_ids_to_tokens(ids) == ["w9", "w8", "w1", "w2"] and start == 2


def test_errors(llama, tokenizer, texts):
    direction = Direction(vectors(layers=[1]))
    for text, options in (
        ("strength is 0", {"strength": 0}),
        ("longest must be 1 or more", {"longest": 0}),
        ("no vector at layer 2", {"layers": [2]}),
    ):
        with pytest.raises(UsageError, match=text):
            persistence(llama, tokenizer, direction, texts, **options)
    with pytest.raises(UsageError, match="one text at least"):
        persistence(llama, tokenizer, direction, [])
    with pytest.raises(UsageError, match="no token was touched: where=answer"):
        persistence(llama, tokenizer, direction, texts, where="answer")
    with pytest.raises(UsageError, match="more than one vector at layer 1"):
        persistence(llama, tokenizer, Direction(vectors(layers=[1]) | vectors(layers=[1], kind="resid_pre")), texts)
    with pytest.raises(UsageError, match="width 8"):
        persistence(llama, tokenizer, Direction({Site("resid_post", 1): torch.ones(8)}), texts)
    with pytest.raises(UsageError, match="not in the residual stream"):
        persistence(llama, tokenizer, Direction(vectors(layers=[1], kind="head_in")), texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        persistence(llama, tokenizer, direction, texts[:1])
