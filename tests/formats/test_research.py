import json

import pytest
import torch
from vector_files import torch_bytes, vectors

from steerable.chains.windows import AlignedChain, Group, TokenSpan
from steerable.formats import NeedsChoice, import_file
from steerable.methods.span_statistics import span_means
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError


@pytest.fixture
def write(tmp_path):
    def write(value, name="a.pt"):
        (tmp_path / name).write_bytes(torch_bytes(value))
        return tmp_path / name

    return write


def means(seed=0):
    torch.manual_seed(seed)
    return {
        label: {"mean": torch.randn(4, 8, dtype=torch.float64), "count": n}
        for label, n in (("overall", 100), ("backtracking", 7), ("deduction", 30))
    }


def test_mean_vectors(write):
    value = means()
    path = write(value)
    with pytest.raises(NeedsChoice, match="backtracking, deduction") as error:
        import_file(path)
    assert error.value.option == "label"
    found = import_file(path, label="backtracking")
    for layer in range(4):  # the paper's formula, in numbers
        u = value["backtracking"]["mean"][layer] - value["overall"]["mean"][layer]
        u = u * value["overall"]["mean"][layer].norm() / u.norm()
        assert torch.allclose(found.at(layer).double(), u, atol=1e-6)
    assert found.behaviour == "backtracking" and found.stats["imported"]["count"] == 7
    with pytest.raises(UsageError, match="no label 'overall'"):
        import_file(path, label="overall")


def test_mean_vectors_that_are_not_sound(write):
    for change, reason in (
        (lambda v: v.pop("overall"), "expected 'overall'"),
        (lambda v: v["deduction"].update(mean=v["overall"]["mean"]), "equals"),
        (lambda v: v["deduction"].update(mean=torch.ones(3, 8)), "shape"),
        (lambda v: v["deduction"].update(mean=torch.full((4, 8), float("nan"))), "NaN"),
        (lambda v: v["deduction"].update(count="many"), "count"),
    ):
        value = means()
        change(value)
        with pytest.raises(UsageError, match=reason):
            import_file(write(value), label="deduction")


def test_it_is_the_librarys_own_direction(tiny_llama, write):
    """The estimator and the importer agree on the same means."""
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0)).tolist()
    spans = (TokenSpan("a", 2, 8), TokenSpan("b", 8, 15), TokenSpan("a", 15, 20))
    chains = [AlignedChain("t", i, tuple(row), spans) for i, row in enumerate(ids)]
    taken = span_means(tiny_llama, chains, ["a", "b"], windows=["published"], shuffles=0)
    value = {"overall": {"mean": taken.overall, "count": 2}}
    value["a"] = {"mean": taken.mean(Group(0, "published", "a")), "count": taken.count("a")}
    found, ours = import_file(write(value)), taken.direction("a")
    assert found.vectors.keys() == ours.vectors.keys()
    assert all(torch.allclose(found.vectors[s], ours.vectors[s], atol=1e-6) for s in ours.vectors)


def test_persona_vectors(write):
    table = torch.randn(5, 8)
    with pytest.warns(SteerableWarning):
        found = import_file(write(table, "evil_response_avg_diff.pt"), format="persona")
    assert found.layers == [0, 1, 2, 3] and torch.equal(found.at(2), table[3])


def test_assistant_axis(write):
    axis = torch.randn(4, 8)
    path = write({"axis": axis, "default_mean": axis, "role_mean": axis * 0, "n_default": 1, "n_roles": 275})
    found = import_file(path)
    assert torch.equal(found.at(3), axis[3]) and found.stats["imported"]["n_roles"] == 275
    role = import_file(write({"vector": axis, "type": "pos_3", "role": "pirate"}))
    assert torch.equal(role.at(1), axis[1]) and role.behaviour == "pirate"
    assert import_file(write(axis), format="assistant-axis").layers == [0, 1, 2, 3]


def test_capping_config(write):
    table = vectors(12, 13)
    path = write(
        {
            "vectors": {f"v{k}": {"layer": k, "vector": v} for k, v in table.items()},
            "experiments": [{"id": "e1", "interventions": [{"vector": "v13", "cap": 2.5}]}],
        }
    )
    with pytest.raises(NeedsChoice, match="v12, v13"):
        import_file(path)
    with pytest.warns(SteerableWarning, match="to be added"):
        found = import_file(path, label="v13")
    assert torch.equal(found.at(13), table[13]) and found.stats["imported"]["caps"] == {"e1": 2.5}
    with pytest.raises(UsageError, match="no vector 'x'"):
        import_file(path, label="x")


def test_seal(write):
    v = vectors(0)[0]
    with pytest.raises(NeedsChoice, match="hidden_states"):
        import_file(write(v), format="seal")
    found = import_file(write(v), format="seal", layer=20)
    assert list(found.vectors) == [Site("resid_pre", 20)]  # hidden_states[20]: the input of block 20
    assert (found.strength, found.gate) == (-1.0, "thinking & boundary & (last_prompt | generated)")


def test_refusal_direction(write, tmp_path):
    v = vectors(0)[0].double()
    path = write(v, "direction.pt")
    with pytest.raises(NeedsChoice, match="metadata"):
        import_file(path, format="refusal-direction")
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -2, "layer": 10}))
    for where in (path, tmp_path):
        found = import_file(where)
        assert list(found.vectors) == [Site("resid_pre", 10)] and found.stats["imported"]["pos"] == -2
    with pytest.raises(UsageError, match="contradicts"):
        import_file(path, layer=11)
    (tmp_path / "direction_metadata.json").write_text('{"layer": "x"}')
    with pytest.raises(NeedsChoice, match="--layer"):
        import_file(path)


def test_vllm_hook(write):
    v = vectors(0)[0]
    path = write({"dir": v, "avg_proj": torch.tensor(1.5)})
    with pytest.raises(NeedsChoice, match="optimal_layer"):
        import_file(path)
    found = import_file(path, layer=9)
    assert torch.equal(found.at(9), v) and found.stats["imported"]["avg_proj"] == 1.5
