"""Autoencoders of SAELens, against encoding and decoding written out."""

import json

import pytest
import torch
from sae_files import make_sae

import steerable as st
from steerable import Direction, Site, UsageError
from steerable.methods.sparse_autoencoders import NORMALISATIONS


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.8.hook_resid_pre", "resid_pre.8"),
        ("blocks.0.hook_resid_mid", "resid_mid.0"),
        ("blocks.11.hook_resid_post", "resid_post.11"),
        ("blocks.2.hook_attn_out", "attn_out.2"),
        ("blocks.2.hook_mlp_out", "mlp_out.2"),
        ("blocks.2.attn.hook_z", "head_in.2"),
        ("blocks.2.mlp.hook_post", "mlp_act.2"),
        ("model.layers.12", "resid_post.12"),
        ("transformer.h.3", "resid_post.3"),
    ],
)
def test_hooks_are_sites(tmp_path, hook, site):
    weights = make_sae(tmp_path / "sae", hook)
    read = st.read_sae(tmp_path / "sae")
    assert (str(read.site), read.model_name, read.normalisation) == (site, "some-model", "none")
    assert torch.equal(read.direction(7).vectors[Site.parse(site)], weights["W_dec"][7])


def test_older_files(tmp_path):
    make_sae(tmp_path / "v3", "blocks.1.hook_resid_pre", flat=True, hook_layer=1)
    assert st.read_sae(tmp_path / "v3").site == Site("resid_pre", 1)
    older = {"hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1, "normalize_activations": True}
    make_sae(tmp_path / "v1", None, flat=True, **older)
    cfg = json.loads((tmp_path / "v1/cfg.json").read_text())
    del cfg["hook_name"], cfg["architecture"], cfg["apply_b_dec_to_input"]
    (tmp_path / "v1/cfg.json").write_text(json.dumps(cfg))
    read = st.read_sae(tmp_path / "v1")
    assert (read.site, read.normalisation) == (Site("resid_pre", 1), "expected_average_only_in")


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_coefficient_is_worth_what_decoding_it_adds(tmp_path, normalisation, subtracts):
    w = make_sae(
        tmp_path / "sae",
        "blocks.0.hook_resid_post",
        normalize_activations=normalisation,
        apply_b_dec_to_input=subtracts,
    )
    w = {name: tensor.double() for name, tensor in w.items()}
    h = 3 + 5 * torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shift, scale = torch.zeros(6, 1), torch.ones(6, 1)
    if normalisation == "layer_norm":
        shift, scale = h.mean(1, keepdim=True), ((h - h.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True).div(31).sqrt()
    elif normalisation == "constant_norm_rescale":
        scale = h.pow(2).sum(1, keepdim=True).div(32).sqrt()
    elif normalisation == "expected_average_only_in":
        scale = torch.full((6, 1), float(h.pow(2).sum(1).sqrt().mean()) / 32**0.5)
    f = torch.relu(((h - shift) / scale - subtracts * w["b_dec"]) @ w["W_enc"] + w["b_enc"])

    def decoded(features):
        return (features @ w["W_dec"] + w["b_dec"]) * scale + shift

    more = f.clone()
    more[:, 7] += 2.5
    read = st.read_sae(tmp_path / "sae")
    added = 2.5 * read.worth(h)[:, None] * read.direction(7).vectors[read.site].double()
    torch.testing.assert_close(decoded(more) - decoded(f), added)
    assert NORMALISATIONS[normalisation] in read.coefficient and ("bias" in read.coefficient) == subtracts


def test_scaled_rows(tmp_path):
    w = make_sae(tmp_path / "norm", "blocks.0.hook_resid_post", architecture="topk", rescale_acts_by_decoder_norm=True)
    expected = w["W_dec"] / w["W_dec"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(st.read_sae(tmp_path / "norm").decoder, expected)
    factor = torch.rand(40)
    w = make_sae(tmp_path / "tuned", "blocks.0.hook_resid_post", tensors={"scaling_factor": factor})
    torch.testing.assert_close(st.read_sae(tmp_path / "tuned").decoder, factor[:, None] * w["W_dec"])
    w = make_sae(tmp_path / "half", "blocks.0.hook_resid_post", tensors={"W_dec": torch.randn(40, 32).bfloat16()})
    assert torch.equal(st.read_sae(tmp_path / "half").decoder, w["W_dec"].float())


def test_the_nearest_features(tmp_path):
    rows = make_sae(tmp_path / "sae", "blocks.0.hook_resid_post")["W_dec"]
    read = st.read_sae(tmp_path / "sae")
    v = rows[3] + 0.1 * rows[9]
    cosines = [float(torch.nn.functional.cosine_similarity(row, v, dim=0)) for row in rows]
    expected = sorted(range(40), key=lambda i: -cosines[i])[:5]
    nearest = read.nearest(Direction({Site("resid_post", 0): v}), top=5)
    assert [i for i, _ in nearest] == expected and nearest[0][0] == 3
    assert [c for _, c in nearest] == pytest.approx([cosines[i] for i in expected], abs=1e-5)
    assert len(read.nearest(v, top=100)) == 40
    for i in (0, 17):
        assert read.nearest(read.direction(i))[0] == (i, 1.0)


@pytest.mark.parametrize(
    ("hook", "settings", "text"),
    [
        ("hook_embed", {}, "is an autoencoder of hook_embed, which is no site"),
        ("blocks.1.ln2.hook_normalized", {}, "which is no site: expected blocks.N. and one of hook_resid_pre"),
        (None, {}, "is an autoencoder of no hook"),
        ("blocks.1.attn.hook_z", {"hook_head_index": 2, "flat": True}, "of head 2 of blocks.1.attn.hook_z"),
        ("blocks.1.hook_resid_pre", {"hook_layer": 2}, "hook_layer 2 and hook_name blocks.1.hook_resid_pre"),
        ("blocks.1.hook_resid_pre", {"architecture": "transcoder"}, "holds a transcoder: expected an autoencoder"),
        ("blocks.1.hook_resid_pre", {"d_in": 33}, r"W_dec of shape \[40, 32\]: expected \[40, 33\]"),
        ("blocks.1.hook_resid_pre", {"normalize_activations": "max"}, "unknown normalisation 'max'"),
        ("blocks.1.hook_resid_pre", {"tensors": {"W_dec": torch.full((40, 32), torch.nan)}}, "expected finite numbers"),
    ],
)
def test_what_is_no_autoencoder_of_a_site(tmp_path, hook, settings, text):
    make_sae(tmp_path / "sae", hook, **settings)
    with pytest.raises(UsageError, match=text):
        st.read_sae(tmp_path / "sae")


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="is no folder of a sparse autoencoder: expected cfg.json and sae_weights"):
        st.read_sae(tmp_path)
    make_sae(tmp_path / "sae", "blocks.1.hook_resid_pre")
    weights = tmp_path / "sae/sae_weights.safetensors"
    content = weights.read_bytes()
    for damaged in (
        content[:-5],
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        content.replace(b"W_dec", b"W_abc"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(UsageError, match="sae_weights.safetensors"):
            st.read_sae(tmp_path / "sae")
    for text in ("[]", "{", '{"a": 1, "a": 2}'):
        (tmp_path / "sae/cfg.json").write_text(text)
        with pytest.raises(UsageError, match="cfg.json"):
            st.read_sae(tmp_path / "sae")


def test_directions_that_are_not_at_its_site(tmp_path):
    make_sae(tmp_path / "sae", "blocks.1.hook_resid_pre", tensors={"W_dec": torch.eye(40, 32)})
    read = st.read_sae(tmp_path / "sae")
    with pytest.raises(UsageError, match=r"reads resid_pre.1, where the direction has no vector: it has resid_post.1"):
        read.nearest(Direction({Site("resid_post", 1): torch.ones(32)}))
    with pytest.raises(UsageError, match="has width 32, and the vector has 31 numbers"):
        read.nearest(torch.ones(31))
    with pytest.raises(UsageError, match="feature 35 writes nothing"):
        read.direction(35)
