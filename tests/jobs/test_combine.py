"""Sums of directions do what steering with all of them does; what does not go together is refused."""

import warnings

import pytest
import torch
from tiny_families import tiny

from steerable.engines.transformers import steer
from steerable.jobs.additivity import combine, transferred
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

IDS = torch.arange(10, 22).reshape(2, 6)


def one(layer, seed=0, kind="resid_post", **about):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(100 * layer + seed))
    return Direction({Site(kind, layer): vector}, **({"model_id": "m", "method": "rl"} | about))


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def logits(model, directions):
    with steer(model, directions):
        return model(IDS).logits


@pytest.mark.parametrize(
    "parts",
    [
        [one(0), one(2), one(3, kind="mlp_out")],
        [one(1), one(1, seed=1)],  # the same site: the vectors are added
        [one(0, rescale=True), one(2, rescale=True)],
        [one(0, map="ablate"), one(2, map="ablate")],
        [one(0, strength=0.5), one(2, strength=-1.5), one(2, seed=3, strength=2.0)],
    ],
)
def test_the_sum_steers_like_all_of_them(llama, parts):
    together = combine(parts)
    assert torch.allclose(logits(llama, together), logits(llama, parts), atol=1e-5)
    assert not torch.allclose(logits(llama, together), logits(llama, parts[:1]), atol=1e-2)


def test_equal_strengths_are_kept_and_vectors_untouched():
    a, b = one(0, strength=2.0), one(1, strength=2.0)
    together = combine([a, b])
    assert together.strength == 2.0 and torch.equal(together.at(1), b.at(1))
    assert combine([one(0, strength=1.0), b]).strength == 1.0


def test_what_the_sum_says_of_itself(tmp_path):
    a = one(0, behaviour="x", norms={Site("resid_post", 0): 3.0}, data_sha256="d", licence="mit")
    b = one(1, behaviour="y", norms={Site("resid_post", 0): 4.0, Site("resid_post", 1): 5.0}, model_id="")
    together = combine([a, b])
    assert together.model_id == "m" and together.behaviour == "x + y" and together.method == "sum of 2: rl"
    assert together.norms == {Site("resid_post", 0): 3.0, Site("resid_post", 1): 5.0}
    assert [part["sites"] for part in together.stats["combined"]] == [["resid_post.0"], ["resid_post.1"]]
    path = together.save(tmp_path / "sum.safetensors")
    assert Direction.load(path).to_bytes() == together.to_bytes()
    assert torch.equal(a.at(0), one(0).at(0))  # what went in is as it was


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "nothing to combine"),
        ([one(0), one(1, model_id="other")], "different models, 'm' and 'other'"),
        ([one(0), one(1, gate="thinking")], "different gates, 'all' and 'thinking'"),
        ([one(0), one(1, schedule="ramp(0, 1, 50)")], "different schedules, 'constant' and"),
        ([one(0), one(1, rescale=True)], "different settings of rescale, False and True"),
        (
            [one(0, map="ablate"), one(0, seed=1, map="ablate")],
            "map ablate.* is not what the sum of their vectors does",
        ),
        ([one(0, map="ablate"), one(1, map="ablate", strength=0.5)], "steer with them side by side"),
        ([one(0, rescale=True), one(0, seed=1, rescale=True)], "map shift, rescaled"),
        ([one(0), Direction({Site("resid_post", 1): torch.ones(8)}, model_id="m")], "one width"),
        ([one(0), Direction({Site("resid_post", 0): torch.ones(8)}, model_id="m")], "differ in shape"),
    ],
)
def test_what_does_not_go_together(parts, said):
    with pytest.raises(UsageError, match=said):
        combine(parts)


def test_transfer_to_a_sibling(llama):
    sibling = tiny("llama", seed=9)
    sibling.config._name_or_path = "sibling"
    moved = transferred(one(1), sibling, layers=4)
    assert moved.model_id == "sibling" and moved.stats["transferred_from"] == "m"
    assert torch.equal(moved.at(1), one(1).at(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = logits(sibling, moved)
    assert not torch.equal(changed, sibling(IDS).logits)


@pytest.mark.parametrize(("layers", "options"), [(6, {}), (4, {"hidden_size": 64})])
def test_no_transfer_to_another_shape(layers, options):
    with pytest.raises(UsageError, match=f"with {layers} layers of width 32 cannot be used on one with 4 layers"):
        transferred(one(1), tiny("llama", **options), layers)
