"""The whole document on a hand-made unembedding, its controls, and the files made of it."""

import io
import json

import pytest
import torch
from rich.console import Console
from tiny_families import tiny

from steerable.jobs.lens_job import read_direction
from steerable.models import loading as models
from steerable.pages.lens_page import page, tables
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

WORDS = [" wait", " but", " maybe", " so", " then", "7", "8", "9", " +", "\n", "<b>&", " the", " a", "日"]


class Words:
    """A tokenizer of these words, and of "x12" and the like."""

    is_fast = False

    def __len__(self):
        return 60

    def convert_ids_to_tokens(self, ids):
        return [self.decode([i]) for i in ids]

    def decode(self, ids):
        return WORDS[ids[0]] if ids[0] < len(WORDS) else f"x{ids[0]}"


@pytest.fixture(scope="module")
def model():
    """Rows of the unembedding: orthonormal for the words, small for all others."""
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[: len(WORDS)] = torch.eye(32)[: len(WORDS)]
        model.lm_head.weight[len(WORDS) :] *= 0.01 / model.lm_head.weight[len(WORDS) :].norm(dim=1, keepdim=True)
        model.lm_head.weight[60:] = 100.0  # no token has these rows
    return model


def direction(*weights, **about):
    """One vector a layer, made of unembedding rows: {word number: weight}."""
    rows = torch.eye(32)
    vectors = {
        Site("resid_post", layer): sum((w * rows[i] for i, w in parts.items()), torch.zeros(32))
        for layer, parts in enumerate(weights)
    }
    return Direction(vectors, **about)


def said(document, layer, score, norm=False):
    return next(t for t in document["vectors"][layer]["tokens"] if (t["score"], t["norm"]) == (score, norm))


def test_known_tokens(model):
    document = read_direction(model, Words(), direction({0: 3.0, 3: 2.0, 5: -4.0}, {13: 1.0, 9: 0.5}), k=2)
    dot = said(document, 0, "dot")
    assert dot["top"] == [[" wait", pytest.approx(3)], [" so", pytest.approx(2)]]
    assert dot["bottom"][0] == ["7", pytest.approx(-4)] and len(dot["bottom"]) == 2
    length = 29**0.5
    assert said(document, 0, "cosine")["top"][0] == [" wait", pytest.approx(3 / length)]
    logits = model.lm_head(direction({0: 3.0, 3: 2.0, 5: -4.0}).at(0))[:60].double()
    share = (logits[0].exp() / logits.exp().sum()).item()
    assert said(document, 0, "softmax")["top"][0] == [" wait", pytest.approx(share, rel=1e-5)]
    assert [t for t, _ in said(document, 1, "cosine")["top"]] == ["日", "\n"]
    assert document["vocabulary"] == 60 and document["k"] == 2  # the rows without a token would be on top of all
    with_norm = said(document, 0, "dot", True)["top"][0]
    normed = model.model.norm(direction({0: 3.0, 3: 2.0, 5: -4.0}).at(0)[None])[0]
    best = model.lm_head(normed)[:60].max().item()
    assert with_norm[1] == pytest.approx(best, rel=1e-5)
    assert {(t["score"], t["norm"]) for t in document["vectors"][0]["tokens"]} == {
        (s, n) for s in ("dot", "cosine", "softmax") for n in (False, True)
    }


def test_groups_against_random_vectors(model):
    document = read_direction(model, Words(), direction({0: 1.0, 1: 1.0, 2: 1.0, 3: -1.0, 4: -1.0}))
    assert {g: v["tokens"] for g, v in document["groups"].items()} == {
        "numbers": 3, "operators": 1, "connectives": 2, "doubt": 3, "structure": 1, "other scripts": 1
    }  # fmt: skip
    assert document["groups"]["doubt"]["examples"] == [" wait", " but", " maybe"]
    cells = {c["group"]: c for c in document["vectors"][0]["groups"] if (c["score"], c["norm"]) == ("cosine", False)}
    assert cells["doubt"]["auc"] == 1 and cells["doubt"]["beyond"] and cells["doubt"]["z"] > 2
    assert cells["connectives"]["auc"] == 0 and cells["connectives"]["z"] < -2
    assert cells["doubt"]["top"] == 3 / 50 and cells["connectives"]["bottom"] == 2 / 50
    assert not cells["numbers"]["beyond"]
    assert document["beyond_random"]["cells"] == 6 * 4  # groups, by dot and cosine, without and with the norm


def test_random_vectors_are_seldom_beyond_random_vectors():
    """Also where the rows of a group point one way, as real ones do: every error by their number would be too small."""
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[:8] += 3 * torch.randn(32, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(8)
    vectors = {Site("resid_post", i): torch.randn(32, generator=generator) for i in range(4)}
    vectors |= {Site("resid_pre", i): torch.randn(32, generator=generator) for i in range(4)}
    vectors |= {Site("mlp_out", i): torch.randn(8, 32, generator=generator) for i in range(4)}
    document = read_direction(model, Words(), Direction(vectors))
    assert len(document["vectors"]) == 8 + 32 and document["vectors"][1]["name"] == "mlp_out.0[0]"
    beyond = document["beyond_random"]
    assert beyond["cells"] == 40 * 24 and 0.01 < beyond["outside"] / beyond["cells"] < 0.12
    doubt = next(
        c for c in document["random"]["groups"] if (c["group"], c["score"], c["norm"]) == ("doubt", "dot", False)
    )
    assert doubt["auc"][0] < 0.1 and doubt["auc"][1] > 0.9  # three tokens that go together


def test_norms_shape_and_zero_vectors(model):
    norms = {Site("resid_post", 0): 6.0}
    document = read_direction(model, Words(), direction({0: 3.0}, {}, {0: 1.0, 1: 1.0}, norms=norms))
    first, zero, third = document["vectors"]
    assert (first["norm"], first["relative_norm"], third["relative_norm"]) == (3.0, 0.5, None)
    assert zero["norm"] == 0 and zero["tokens"] == zero["groups"] == []
    matrix = document["cosines"]["matrix"]
    assert matrix[0][2] == pytest.approx(0.5**0.5) and matrix[0][1] is None
    # eigenvalues of [[9, 3], [3, 2]]
    largest = (11 + (49 + 36) ** 0.5) / 2
    assert document["stable_rank"] == pytest.approx(11 / largest)
    json.dumps(document, allow_nan=False)
    shown = io.StringIO()
    Console(file=shown, width=80).print(*tables(document))
    assert "␣wait" in shown.getvalue() and "random, high" in shown.getvalue() and "stable rank" in shown.getvalue()
    assert "wait" in page(document)
    nothing = read_direction(model, Words(), direction({}))
    assert nothing["stable_rank"] is None and "All vectors are zero" in page(nothing) and tables(nothing)


def test_layers_and_sites(model):
    both = Direction({Site("resid_post", 0): torch.ones(32), Site("mlp_act", 0): torch.ones(48)})
    document = read_direction(model, Words(), both)
    assert document["skipped"] == ["mlp_act.0"] and len(document["vectors"]) == 1
    document = read_direction(model, Words(), direction({0: 1.0}, {1: 1.0}, {2: 1.0}), layers=[2])
    assert [v["name"] for v in document["vectors"]] == ["resid_post.2"]


def test_a_model_without_a_known_final_norm(model, monkeypatch):
    from dataclasses import replace

    family = models.family(model)
    monkeypatch.setattr(models, "family", lambda m: replace(family, final_norm=None))
    document = read_direction(model, Words(), direction({0: 1.0}))
    assert {t["norm"] for t in document["vectors"][0]["tokens"]} == {False}
    assert page(document) and tables(document)


@pytest.mark.parametrize(
    ("given", "options", "error"),
    [
        (direction({0: 1.0}), {"k": 0}, "number of tokens is 0"),
        (direction({0: 1.0}), {"layers": [3]}, "no vector at layer 3"),
        (Direction({Site("resid_post", 0): torch.ones(8)}), {}, "width 8, but the model's residual stream 32"),
        (Direction({Site("head_in", 0): torch.ones(32)}), {}, "vectors of the residual stream"),
    ],
)
def test_errors(model, given, options, error):
    with pytest.raises(UsageError, match=error):
        read_direction(model, Words(), given, **options)
