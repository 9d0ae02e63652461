"""A feature of an autoencoder, in a model."""

import pytest
import torch
from sae_files import make_sae

import steerable as st
from steerable import Direction, UsageError


def test_steering_adds_the_row(tiny_llama, tokenizer, tmp_path, read, monkeypatch):
    rows = make_sae(tmp_path / "sae", "blocks.1.hook_resid_post", width=tiny_llama.config.hidden_size)["W_dec"]
    autoencoder = st.read_sae(tmp_path / "sae")
    direction = st.recipes.sae(tiny_llama, tokenizer, autoencoder, feature=7, strength=0.5)
    before = read([7, 8, 9])["resid_post.1"]
    with st.steer(tiny_llama, direction):
        after = read([7, 8, 9])["resid_pre.2"]
    torch.testing.assert_close(after - before, (0.5 * rows[7]).double().expand(3, -1), atol=1e-5, rtol=1e-5)
    assert direction.stats["feature"] == 7 and "the normalisation none" in direction.stats["coefficient"]
    again = st.recipes.sae(tiny_llama, tokenizer, autoencoder, along=direction)
    assert again.stats["feature"] == 7 and again.stats["nearest"][0] == [7, 1.0] and len(again.stats["nearest"]) == 10
    assert Direction.load(again.save(tmp_path / "again.safetensors")) == again
    monkeypatch.setattr(tiny_llama.config, "_name_or_path", "one")
    direction.model_id = "another"
    with pytest.warns(st.SteerableWarning, match="this direction was made on 'another'"):
        st.recipes.sae(tiny_llama, tokenizer, autoencoder, along=direction)


@pytest.mark.parametrize(
    ("hook", "settings", "text"),
    [
        ("blocks.9.hook_resid_post", {}, "layer 9 is out of range"),
        (
            "blocks.1.hook_resid_post",
            {"width": 24},
            "the autoencoder has width 24, that of some-model, and the model has",
        ),
        ("blocks.1.hook_resid_post", {"feature": 40}, "there is no feature 40: the autoencoder has features 0 to 39"),
        ("blocks.1.hook_resid_post", {"feature": None}, "give feature, the number of a feature, or along"),
    ],
)
def test_what_does_not_fit_the_model(tiny_llama, tokenizer, tmp_path, hook, settings, text):
    make_sae(tmp_path / "sae", hook, width=settings.get("width", tiny_llama.config.hidden_size))
    with pytest.raises(UsageError, match=text):
        st.recipes.sae(tiny_llama, tokenizer, st.read_sae(tmp_path / "sae"), feature=settings.get("feature", 1))
