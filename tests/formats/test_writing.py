import json
import warnings

import pytest
import torch
from vector_files import direction_of, vectors

from steerable.formats import export_file, formats, import_file
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

#: what must be said to read a file back: the rest is in the file
ASKED = {
    "pt-vector": {"layer": 2},
    "pt-blocks": {"layout": "blocks"},
    "pt-hidden-states": {"layout": "hidden_states"},
    "persona": {"format": "persona"},
    "pt-dict": {"layers_from": 0},
}
VECTORS = [
    name for name, format in formats().items() if format.write and name != "checkpoint"
]  # test_checkpoint.py has the model folders
WITHOUT_STRENGTH = set(VECTORS) - {"steering-lite", "lm-eval", "peft-beft"}


@pytest.mark.parametrize("to", VECTORS)
@pytest.mark.filterwarnings("ignore::steerable.store.errors.SteerableWarning")
def test_round_trip(tmp_path, direction, to):
    """Equal numbers at the same blocks, and equal bytes from equal directions."""
    one = direction.only([2]) if to == "pt-vector" else direction
    done = export_file(one, tmp_path / "a", to, n_layers=5, model_type="qwen2")
    json.dumps(done)
    found = import_file(tmp_path / "a", **ASKED.get(to, {}))
    kind = "mlp_out" if to == "peft-beft" else "resid_post"
    kept = {site: v for site, v in found.vectors.items() if v.any()}  # tables have zeros in the other rows
    assert kept.keys() == {Site(kind, block) for block in done["layers"]}
    assert all(torch.equal(v, one.vectors[Site("resid_post", site.layer)]) for site, v in kept.items())
    export_file(one, tmp_path / "b", to, n_layers=5, model_type="qwen2")
    if to == "peft-beft":
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    else:
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("to", VECTORS)
@pytest.mark.filterwarnings("ignore::steerable.store.errors.SteerableWarning")
def test_nothing_is_dropped_silently(tmp_path, to):
    table = vectors(2)
    for bad, reason in (
        (Direction({Site("resid_post", 2): torch.ones(2, 6)}), "one vector a layer"),
        (direction_of(table, "head_in" if to == "peft-beft" else "attn_out"), "outputs of blocks"),
        (
            Direction({Site("resid_pre", 3): table[2], Site("resid_post", 2): table[2]}, strength=1),
            "two vectors",
        ),
    ):
        with pytest.raises(UsageError, match=reason):
            export_file(bad, tmp_path / "a", to, model_type="llama")
    for other, reason in (
        ({"map": "ablate"}, "has the map 'ablate'"),
        ({"schedule": "ramp(0, 1, 50)"}, "has the schedule 'ramp"),
        ({"rescale": True}, "rescales the activation"),
    ):
        with pytest.raises(UsageError, match=f"can hold only additions; this direction {reason}"):
            export_file(direction_of(table, **other), tmp_path / "a", to, model_type="llama", fold_strength=True)
    assert not list(tmp_path.iterdir())
    gated = direction_of(table, gate="thinking")
    with pytest.warns(SteerableWarning, match="gate 'thinking'"):
        done = export_file(gated, tmp_path / "a", to, model_type="llama", n_layers=4)
    assert any("gate" in w for w in done["warnings"])


@pytest.mark.parametrize("to", sorted(WITHOUT_STRENGTH))
def test_strength_is_folded_or_warned_of(tmp_path, to):
    table = vectors(0, 1) if "pt-" in to or to == "persona" else vectors(1, 2)
    table = {1: table[1]} if to == "pt-vector" else table
    direction = direction_of(table, strength=-0.5)
    with pytest.warns(SteerableWarning, match="strength -0.5"):
        assert export_file(direction, tmp_path / "a", to, n_layers=4)["strength"] == -0.5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = export_file(direction, tmp_path / "a", to, fold_strength=True, n_layers=4)
        asked = ASKED.get(to, {}) | ({"layer": 1} if to == "pt-vector" else {})
        found = import_file(tmp_path / "a", **asked)
    assert done["strength"] == 1.0 and not any("strength" in str(w.message) for w in caught)
    assert torch.equal(found.at(1), table[1] * -0.5)


def test_the_input_of_a_block_is_the_output_of_the_one_before(tmp_path):
    v = vectors(3)[3]
    export_file(Direction({Site("resid_pre", 3): v}), tmp_path / "a", "llama.cpp", n_layers=4)
    assert import_file(tmp_path / "a").layers == [2]
    with pytest.raises(UsageError, match="resid_pre.0"):
        export_file(Direction({Site("resid_pre", 0): v}), tmp_path / "b", "repeng")


def test_layers_and_tables(tmp_path, direction):
    assert export_file(direction, tmp_path / "a", "svec", layers=[1, 3])["layers"] == [1, 3]
    with pytest.raises(UsageError, match="no vector at layer 7"):
        export_file(direction, tmp_path / "a", "svec", layers=[7])
    with pytest.raises(UsageError, match="holds one vector, the direction has 3"):
        export_file(direction, tmp_path / "a", "pt-vector")
    with pytest.raises(UsageError, match="--n-layers"):
        export_file(direction, tmp_path / "a", "pt-blocks")
    with pytest.raises(UsageError, match="does not fit"):
        export_file(direction, tmp_path / "a", "pt-blocks", n_layers=3)
    with pytest.warns(SteerableWarning, match="2 of 5 blocks"):
        export_file(direction, tmp_path / "a", "pt-blocks", n_layers=5)
    table = torch.load(tmp_path / "a", weights_only=True)
    assert table.shape == (5, 6) and not table[0].any() and torch.equal(table[3], direction.at(3))
    with pytest.raises(UsageError, match="unknown format 'x'"):
        export_file(direction, tmp_path / "a", "x")


def test_strength_beyond_float32_is_refused(tmp_path):
    huge = direction_of({1: torch.full((6,), 1e30)}, strength=1e20)
    with pytest.raises(UsageError, match="beyond float32"):
        export_file(huge, tmp_path / "a", "repeng", fold_strength=True)
