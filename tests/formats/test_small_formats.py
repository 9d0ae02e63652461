"""svec, steering-lite, lm-eval, EasyEdit2 folders."""

import json

import pytest
import torch
from safetensors.torch import save, save_file
from vector_files import direction_of, steering_lite_bytes, torch_bytes, vectors

from steerable.formats import NeedsChoice, export_file, import_file
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError


@pytest.fixture
def write(tmp_path):
    def write(value, name="a"):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def svec(**change):
    full = {"model_type": "llama", "directions": {"3": [1.0, 2.0], "4": [[3.0, 4]]}, "explained_variances": {"3": 0.5}}
    return full | change


def test_svec(write, tmp_path):
    found = import_file(write(svec()))
    assert found.at(3).tolist() == [1, 2] and found.at(4).tolist() == [3, 4]
    export_file(found, tmp_path / "b.svec", "svec")
    again = json.loads((tmp_path / "b.svec").read_text())
    assert again == {  # what CAST's loader takes: model_type, 1-D directions, a variance for each
        "model_type": "llama",
        "directions": {"3": [1.0, 2.0], "4": [3.0, 4.0]},
        "explained_variances": {"3": 0.5, "4": 0.0},
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"directions": {}}, "directions"),
        ({"directions": {"x": [1.0]}}, "layer number"),
        ({"directions": {"-1": [1.0]}}, "layer number"),
        ({"directions": {"1": [[1.0], [2.0]]}}, "2 vectors"),
        ({"directions": {"1": [1.0], "01": [1.0]}}, "two directions"),
        ({"directions": {"1": [1.0], "2": [1.0, 2.0]}}, "width"),
        ({"directions": {"1": ["1"]}}, "a number"),
        ({"directions": {"1": [True]}}, "a number"),
        ({"directions": {"1": [10**400]}}, "finite"),
        ({"directions": {"1": [1e300]}}, "float32"),
        ({"num_heads": 8, "head_dim": 4}, "heads"),
    ],
)
def test_unsound_svec(write, change, reason):
    with pytest.raises(UsageError, match=reason):
        import_file(write(svec(**change)))


def test_svec_that_is_no_json(write):
    for data, reason in (
        (b'{"directions": {"1": [NaN]}}', "NaN"),
        (b'{"directions": {"1": [1], "1": [2]}}', "twice"),
        (b'{"directions": ' + b"[" * 100_000, "JSON"),
        (b'{"directions": \xff\xff}', "JSON"),
    ):
        with pytest.raises(UsageError, match=reason):
            import_file(write(data))


def test_steering_lite(write, tmp_path):
    table = vectors(3, 4)
    found = import_file(write(steering_lite_bytes(table)))
    assert found.strength == 2.5 and torch.equal(found.at(4), table[4]) and found.method == "mean_diff"
    half = import_file(write(steering_lite_bytes({k: v.bfloat16() for k, v in table.items()})))
    assert torch.equal(half.at(3), table[3].bfloat16().float())
    export_file(found, tmp_path / "b", "steering-lite")
    again = import_file(tmp_path / "b")
    assert again.strength == 2.5 and torch.equal(again.at(3), table[3])
    for bad, reason in (
        (steering_lite_bytes(table, method="spherical"), "spherical"),
        (steering_lite_bytes(table, target="attn_out"), "residual"),
        (steering_lite_bytes(table, coeff=float("inf")), "finite"),
        (save({"layer1.U": torch.ones(2, 2)}, {"cfg": '{"method": "pca"}'}), "layer1.U"),
        (save({"layer1.v": torch.ones(2)}, {"cfg": "["}), "cfg"),
        (save({"layer1.v": torch.ones(2)}), "cfg"),
        (save({"sub::mlp::V": torch.ones(2)}), "cfg"),
    ):
        with pytest.raises(UsageError, match=reason):
            import_file(write(bad))


def test_other_safetensors(write, tmp_path):
    table = vectors(0, 1)
    save_file({f"layers.{k}": v for k, v in table.items()}, tmp_path / "b")
    found = import_file(tmp_path / "b")
    assert torch.equal(found.at(1), table[1]) and found.stats["imported"]["format"] == "safetensors"


def entry(v, **change):
    return {
        "steering_vector": v,
        "steering_coefficient": 2.0,
        "action": "add",
        "bias": None,
        "head_index": None,
    } | change


def test_lm_eval(write):
    a, b = vectors(0, 1).values()
    with pytest.warns(SteerableWarning, match="no norm follows"):
        found = import_file(write(torch_bytes({"layers.3": entry(a[None]), "model.layers.4.mlp": entry(b)})))
    assert list(found.vectors) == [Site("resid_post", 3), Site("mlp_out", 4)] and found.strength == 2.0
    different = {"layers.3": entry(a), "layers.4": entry(b, steering_coefficient=-1.0)}
    found = import_file(write(torch_bytes(different)))
    assert found.strength == 1.0 and torch.equal(found.at(3), 2 * a) and torch.equal(found.at(4), -b)
    for bad, reason in (
        ({"layers.3": entry(a, action="clamp")}, "clamp"),
        ({"layers.3": entry(a, head_index=2)}, "head"),
        ({"layers.3": entry(a, bias=a)}, "bias"),
        ({"embed": entry(a)}, "not known"),
        ({"layers.3": entry(a), "model.layers.3": entry(a)}, "two vectors"),
        ({"layers.3": entry(a, steering_coefficient=float("nan"))}, "finite"),
    ):
        with pytest.raises(UsageError, match=reason):
            import_file(write(torch_bytes(bad)))
    csv = b"loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description\n"
    with pytest.raises(UsageError, match="autoencoders"):
        import_file(write(csv))


def test_lm_eval_export_is_what_its_loader_takes(tmp_path):
    table = vectors(3, 4)
    export_file(direction_of(table, strength=0.5), tmp_path / "a.pt", "lm-eval", blocks="h")
    value = torch.load(tmp_path / "a.pt", weights_only=True)
    assert set(value) == {"h.3", "h.4"}
    assert value["h.3"].keys() == entry(0).keys() and value["h.3"]["steering_vector"].shape == (1, 6)
    assert value["h.3"]["steering_coefficient"] == 0.5 and value["h.3"]["action"] == "add"
    assert import_file(tmp_path / "a.pt").strength == 0.5


def test_easyedit(write, tmp_path):
    table = vectors(17, 18)
    for k, v in table.items():
        write(torch_bytes(v), f"layer_{k}.pt")
    found = import_file(tmp_path)
    assert found.layers == [17, 18] and torch.equal(found.at(18), table[18])
    write(torch_bytes(table[17] * 2), "layer_17_merged_vector.pt")
    with pytest.raises(NeedsChoice, match="merged_vector, plain"):
        import_file(tmp_path)
    assert torch.equal(import_file(tmp_path, label="merged_vector").at(17), table[17] * 2)
    write(torch_bytes(torch.ones(3, 6)), "layer_19.pt")
    with pytest.raises(UsageError, match="3 concepts"):
        import_file(tmp_path, label="plain")
