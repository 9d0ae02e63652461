"""Scores against the model's own logits, sklearn, and a product written out."""

from functools import partial

import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny_families import VOCABULARY, tiny

from steerable.evals import logit_lens as scores
from steerable.evals.logit_lens import TOP, Unembedding, extremes, group_scores
from steerable.models import loading as models
from steerable.models.taps import tap
from steerable.steering.site import Site
from steerable.store.errors import UsageError

V = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))


def readings(model, vectors=V, tokens=VOCABULARY):
    found = {}
    for part in Unembedding.of(model, tokens).readings(vectors):
        for score, norm, values in part:
            found.setdefault((score, norm), []).append(values)
    return {key: torch.cat(parts) for key, parts in found.items()}


def scaled(config, **scale):
    """A tiny model of a family that scales its logits."""
    import transformers

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    made = getattr(transformers, config)(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, initializer_range=0.3, **sizes, **scale
    )
    return transformers.AutoModelForCausalLM.from_config(made).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "make",
    [
        *(
            pytest.param(partial(tiny, name), id=name)
            for name in ("llama", "qwen2", "gemma2", "gpt2", "olmo2", "gpt_neox")
        ),
        pytest.param(partial(scaled, "GraniteConfig", logits_scaling=8.0), id="granite"),
        pytest.param(partial(scaled, "CohereConfig", logit_scale=0.0625), id="cohere"),
    ],
)
def test_with_the_norm_these_are_the_models_logits(make):
    """From the last block's output, scale (Granite, Cohere) and soft-cap (Gemma-2) included."""
    model = make()
    ids = torch.tensor([[7, 9, 20, 11]])
    last: list = []
    with tap(model, {Site("resid_post", models.n_layers(model) - 1): lambda h: last.append(h[0].clone())}):
        logits = model(ids).logits[0]
    found = readings(model, last[0])
    torch.testing.assert_close(found["dot", True], logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["softmax", True], logits.softmax(-1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_without_the_norm(name):
    model = tiny(name)
    rows = models.unembed(model).weight
    found = readings(model)
    for i in range(len(V)):
        for t in (1, 11, 63):
            dot = (rows[t].double() * V[i].double()).sum()
            assert found["dot", False][i, t].item() == pytest.approx(dot.item(), rel=1e-4, abs=1e-5)
            cosine = dot / rows[t].double().norm() / V[i].double().norm()
            assert found["cosine", False][i, t].item() == pytest.approx(cosine.item(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(found["softmax", False], found["dot", False].softmax(1))
    normed = models.final_norm(model)(V)
    expected = torch.nn.functional.cosine_similarity(normed[:, None], rows[None], dim=-1)
    torch.testing.assert_close(found["cosine", True], expected, atol=1e-5, rtol=1e-4)


def test_pieces_and_slices_change_nothing(monkeypatch):
    model = tiny("llama")
    whole = readings(model)
    monkeypatch.setattr(scores, "_PIECE", 32 * 7)  # seven rows of the unembedding at a time
    monkeypatch.setattr(scores, "_HELD", 4 * VOCABULARY)  # two vectors at a time
    assert len(list(Unembedding.of(model, VOCABULARY).readings(V))) == 3
    for key, values in readings(model).items():
        torch.testing.assert_close(values, whole[key])


def test_rows_without_a_token_are_left_out():
    model = tiny("llama")
    found = readings(model, tokens=40)
    assert found["cosine", False].shape == (5, 40)
    assert torch.equal(found["dot", False], readings(model)["dot", False][:, :40])
    assert readings(model, tokens=1000)["dot", False].shape == (5, VOCABULARY)


def test_lower_precision_is_read_in_float32():
    model, low = tiny("llama"), tiny("llama").to(torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(model.parameters(), low.parameters(), strict=True):
            p.copy_(q.float())  # the same numbers in both
    for key, values in readings(low).items():
        torch.testing.assert_close(values, readings(model)[key], atol=1e-5, rtol=1e-4)


def test_the_bias_of_the_unembedding_is_no_part_of_a_vector():
    model = tiny("llama")
    plain = readings(model)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
    biased = readings(model)
    assert torch.equal(biased["dot", False], plain["dot", False])
    assert torch.equal(biased["cosine", True], plain["cosine", True])
    torch.testing.assert_close(biased["dot", True], plain["dot", True] + model.lm_head.bias)


def test_zero_vectors_and_rows_have_the_cosine_zero():
    assert not readings(tiny("llama"), torch.zeros(1, 32))["cosine", False].any()
    model = tiny("qwen2")  # its padding row is zero
    assert not models.unembed(model).weight[0].any() and not readings(model)["cosine", False][:, 0].any()


def test_extremes():
    top, bottom = extremes(torch.tensor([[0.5, 3.0, -1.0, 2.0]]), 2)
    assert top == [[(1, 3.0), (3, 2.0)]] and bottom == [[(2, -1.0), (0, 0.5)]]
    assert len(extremes(torch.zeros(1, 4), 9)[0][0]) == 4


def test_group_scores_are_those_of_sklearn():
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(3, 200, generator=generator)
    values[1] = values[1].mul(2).round()  # many equal scores
    groups = [torch.randperm(200, generator=generator)[:n].tolist() for n in (1, 7, 60)]
    found = group_scores(values, groups)
    for i, row in enumerate(values.double()):
        order = row.sort(descending=True).indices.tolist()
        for g, ids in enumerate(groups):
            member = [float(t in ids) for t in range(200)]
            assert found.auc[i, g].item() == pytest.approx(roc_auc_score(member, row.numpy()))
            standard = ((row - row.mean()) / row.std(correction=0))[ids].mean()
            assert found.mean[i, g].item() == pytest.approx(standard.item(), abs=1e-5)
            if i != 1:
                assert found.top[i, g].item() == sum(t in ids for t in order[:TOP]) / TOP
                assert found.bottom[i, g].item() == sum(t in ids for t in order[-TOP:]) / TOP


def test_groups_without_members_or_without_others():
    found = group_scores(torch.randn(1, 4), [[], [0, 1, 2, 3]])
    assert found.mean[0, 0].isnan() and found.auc[0, 0].isnan() and found.auc[0, 1].isnan()
    assert found.top[0, 1] == 1


def test_weights_that_accelerate_keeps_elsewhere():
    from accelerate import cpu_offload

    model = tiny("llama")
    plain = readings(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta and model.model.norm.weight.is_meta
    for key, values in readings(model).items():
        torch.testing.assert_close(values, plain[key])


def test_a_quantised_unembedding_is_refused():
    model = tiny("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.ones(VOCABULARY, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match="int8: load the model without quantising"):
        readings(model)
