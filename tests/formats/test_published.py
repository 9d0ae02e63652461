"""Vectors that others released: their documented facts (number of layers, norms) are found again."""

import numpy as np
import pytest
import torch

from steerable.formats import NeedsChoice, import_file, validate_file
from steerable.steering.site import Site


@pytest.fixture(scope="module")
def released(shared):
    return shared / "data" / "vectors"


def norms(direction):
    return np.array([float(v.double().norm()) for v in direction.vectors.values()])


@pytest.mark.parametrize(
    ("name", "layers", "width", "method"),
    [
        ("experiment__hallucination__real1-pca.gguf", 28, 1536, "center"),
        ("replications__creative_writing__create.gguf", 32, 4096, "diffmean"),
    ],
)
def test_unit_vectors_of_easysteer(released, name, layers, width, method):
    direction = import_file(released / name)
    assert direction.layers == list(range(layers)) and direction.at(0).shape == (width,)
    assert norms(direction) == pytest.approx(np.ones(layers), abs=1e-6)
    assert direction.method == method and direction.stats["imported"]["format"] == "easysteer"
    assert direction.stats["imported"]["token_pos"] == -1.0


def test_seal_means_of_easysteer(released):
    """The merged vector is execution - reflection - transition; SEAL's norm of 26 to 28 is that of layer 0."""
    execution = import_file(released / "experiment__math__execution_avg_vector.gguf")
    merged = import_file(released / "experiment__math__seal_merged_vector.gguf")
    assert execution.layers == merged.layers == list(range(28))
    assert norms(execution)[[0, 27]] == pytest.approx([26.150535, 467.131903], rel=1e-6)
    assert norms(merged)[[0, 27]] == pytest.approx([27.844632, 771.368869], rel=1e-6)
    assert execution.stats["imported"]["num_vectors_averaged"] == 59383.0
    assert merged.stats["imported"]["composition"] == "execution - reflection - transition"


@pytest.mark.parametrize("path", ["experiment__hallucination__real1-pca.gguf"])
def test_the_numbers_are_those_of_ggufs_reader(released, path):
    import gguf

    direction = import_file(released / path)
    for tensor in gguf.GGUFReader(released / path).tensors:
        block = int(tensor.name.removeprefix("direction."))
        assert torch.equal(direction.at(block), torch.from_numpy(np.array(tensor.data)))


@pytest.mark.parametrize(
    ("name", "width", "norm"),
    [("replications__bipo__vec_ep20_layer15.pt", 4096, 8.702973), ("vectors__2534.pt", 3584, 1.0)],
)
def test_bare_vectors(released, name, width, norm):
    path = released / name
    with pytest.raises(NeedsChoice, match="--layer"):
        import_file(path)
    assert validate_file(path)["needs"] == "layer"
    direction = import_file(path, layer=15)
    assert direction.at(15).shape == (width,) and norms(direction) == pytest.approx([norm], rel=1e-6)


def test_the_refusal_direction(released):
    """A view into a larger float64 table, its layer in the JSON beside it."""
    direction = import_file(released / "gemma-2b-it_direction.pt", model_id="google/gemma-2b-it")
    assert list(direction.vectors) == [Site("resid_pre", 10)] and direction.at(10).shape == (2048,)
    assert norms(direction) == pytest.approx([10.064354], rel=1e-6)
    assert direction.stats["imported"]["pos"] == -2
