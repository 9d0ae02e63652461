"""A dose that a 16-bit model does not resolve is warned of; model names are compared by what they mean."""

import warnings

import pytest
import torch

import steerable as st
from steerable.evals.likelihood import divergence

SITE = st.Site("resid_post", 15)


def heard(model, ids, direction, **options):
    """The warnings of a steered forward pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with st.steer(model, direction, **options):
            model(ids)
    return [str(w.message) for w in caught if issubclass(w.category, st.SteerableWarning)]


def vector(norm, seed=0):
    return norm * torch.nn.functional.normalize(torch.randn(576, generator=torch.Generator().manual_seed(seed)), dim=0)


@pytest.fixture(scope="module")
def halves(smol, smol_folder):
    """The model in float32 and in bfloat16, and token ids."""
    model, tokenizer = smol
    text = "The library closes at six o'clock, but on Saturdays it stays open until midnight for everybody."
    narrow, _ = st.load(smol_folder, dtype="bfloat16")
    return model, narrow, tokenizer(text, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("norms", [{SITE: 182.0}, {}])
def test_small_doses_in_bfloat16(halves, norms):
    """Known from the file, or measured in the first pass; the cosines are of the log-probabilities' change."""
    model, narrow, ids = halves

    def effect(m, norm):
        plain = m(ids).logits[0, 1:].float().log_softmax(-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with st.steer(m, st.Direction({SITE: vector(norm)})):
                return (m(ids).logits[0, 1:].float().log_softmax(-1) - plain).flatten()

    for norm, is_resolved in ((5.0, False), (20.0, True)):
        said = heard(narrow, ids, st.Direction({SITE: vector(norm)}, norms=norms))
        assert bool(said) != is_resolved and len(said) <= 1
        cosine = float(torch.cosine_similarity(effect(narrow, norm), effect(model, norm), 0))
        assert (cosine > 0.93) == is_resolved
        assert not heard(model, ids, st.Direction({SITE: vector(norm)}, norms=norms))  # float32
    said = heard(narrow, ids, st.Direction({SITE: vector(20.0)}, norms=norms), strength=-0.2)[0]
    assert "norm 4" in said and "bfloat16" in said and "float32" in said
    assert not heard(narrow, ids, st.Direction({SITE: vector(20.0)}, norms=norms), strength=0)
    assert heard(narrow, ids, st.Direction({SITE: vector(20.0)}, norms=norms), strength=torch.tensor([0.1]))


@pytest.mark.parametrize("norms", [{SITE: 182.0}, {}])
def test_the_weaker_of_two_directions_at_a_site_is_told_of_in_any_order(halves, norms):
    _, narrow, ids = halves
    weak, strong = (st.Direction({SITE: vector(norm)}, norms=norms) for norm in (1.0, 50.0))
    for both in ([weak, strong], [strong, weak]):
        (said,) = heard(narrow, ids, both)
        assert "norm 1 is added" in said


def test_divergence_of_a_16_bit_model_says_so(tiny_llama, tokenizer):
    import copy

    direction = st.Direction({st.Site("resid_post", 1): torch.ones(32)})
    chain = {"task_id": "a", "sample": 0, "thinking": "w1 w2", "answer": "w3", "closed": True}
    arguments = (tokenizer, {"a": "w5 <think>"}, [chain], direction.steering())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        divergence(tiny_llama, *arguments)
    with pytest.warns(st.SteerableWarning, match="bfloat16.*rounding noise"):
        divergence(copy.deepcopy(tiny_llama).bfloat16(), *arguments)


HUB = "/home/user/.cache/huggingface/hub/models--org--small/snapshots/0123abc"


@pytest.mark.parametrize(
    ("loaded", "named", "same"),
    [
        ("{folder}/small", "{folder}/small", True),  # the full path of the very model
        ("{folder}/small", "{folder}/small/", True),
        ("{folder}/small", "small", True),
        ("{folder}/small", "/elsewhere/models/small", True),
        ("{folder}/small", "C:\\models\\small", True),
        ("{folder}/small", "org/small", True),
        ("org/small", "/data/small", True),
        ("org/small", HUB, True),
        ("org/small", "small", True),
        ("org/small", "org/small", True),
        ("org/small", "", True),
        ("org/small", "other/small", False),
        ("org/small", "org/large", False),
        ("{folder}/small", "{folder}/large", False),
        ("{folder}/small", "pocket", False),
    ],
)
def test_a_direction_of_the_same_model(tiny_llama, monkeypatch, tmp_path, loaded, named, same):
    (tmp_path / "small").mkdir()
    monkeypatch.setattr(tiny_llama.config, "_name_or_path", loaded.format(folder=tmp_path))
    direction = st.Direction({st.Site("resid_post", 1): torch.ones(32)}, model_id=named.format(folder=tmp_path))
    said = heard(tiny_llama, torch.tensor([[5, 6]]), direction)
    assert (not said) == same and (same or "was made on" in said[0])


def test_the_bundled_model_by_its_path():
    model, _ = st.load("pocket")
    site = st.Site("resid_post", 1)
    for name in ("pocket", model.config._name_or_path, "/usr/lib/python3/site-packages/steerable/pocket/weights"):
        assert not heard(model, torch.tensor([[5, 6]]), st.Direction({site: torch.ones(192)}, model_id=name))
