import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from vector_files import torch_bytes, vectors

from steerable.formats import NeedsChoice, import_file
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError


@pytest.fixture
def write(tmp_path):
    def write(value, name="a.pt", **options):
        (tmp_path / name).write_bytes(value if isinstance(value, bytes) else torch_bytes(value, **options))
        return tmp_path / name

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_one_vector_needs_its_layer(write, dtype, shape):
    v = torch.tensor([1.5, -2.0, 0.25, 8.0])
    path = write(v.to(dtype).reshape(shape), "vec_layer15.pt")
    with pytest.raises(NeedsChoice, match="--layer.*speaks of layer 15") as error:
        import_file(path)
    assert error.value.option == "layer"
    found = import_file(path, layer=15, model_id="org/model", behaviour="x", licence="MIT")
    assert list(found.vectors) == [Site("resid_post", 15)] and torch.equal(found.at(15), v)
    assert (found.model_id, found.behaviour, found.licence) == ("org/model", "x", "MIT")
    assert list(import_file(path, layer=2, site="mlp_out").vectors) == [Site("mlp_out", 2)]


def test_parameters_and_views(write):
    base = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(import_file(write(torch.nn.Parameter(base[1].clone())), layer=0).at(0), base[1])
    assert torch.equal(import_file(write(base[1]), layer=0).at(0), base[1])  # saved with its whole storage
    assert torch.equal(import_file(write(base[:, 1]), layer=0).at(0), base[:, 1])  # not contiguous


def test_tables(write):
    table = torch.randn(4, 3)
    path = write(table)
    with pytest.raises(NeedsChoice, match="blocks .*hidden_states") as error:
        import_file(path)
    assert error.value.option == "layout"
    blocks = import_file(path, layout="blocks")
    assert blocks.layers == [0, 1, 2, 3] and torch.equal(blocks.at(3), table[3])
    with pytest.warns(SteerableWarning) as said:
        states = import_file(path, layout="hidden_states")
    assert states.layers == [0, 1, 2] and torch.equal(states.at(0), table[1])
    assert "row 0" in str(said[0].message) and "final norm" in str(said[1].message)
    assert import_file(path, layout="blocks", layer=2).layers == [2]
    with pytest.raises(UsageError, match="no vector at layer 9"):
        import_file(path, layout="blocks", layer=9)
    with pytest.raises(UsageError, match="unknown: expected blocks"):
        import_file(path, layout="rows")


def test_dicts_by_layer(write):
    table = vectors(0, 1, 5)
    assert import_file(write(table)).layers == [0, 1, 5]
    assert import_file(write({f"layer_{k}": v for k, v in table.items()})).layers == [0, 1, 5]
    assert import_file(write({f"model.layers.{k + 3}": v for k, v in table.items()})).layers == [3, 4, 8]
    assert import_file(write({f"mlp_out.{k}": v[None] for k, v in table.items()})).vectors.keys() == {
        Site("mlp_out", k) for k in table
    }
    later = write({k + 1: v for k, v in table.items()})
    with pytest.raises(NeedsChoice, match="first"):
        import_file(later)
    assert import_file(later, layers_from=0).layers == [1, 2, 6]
    assert import_file(later, layers_from=1).layers == [0, 1, 5]
    with pytest.raises(UsageError, match="key 0"):
        import_file(write(table), layers_from=1)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.tensor([1, 2, 3]), "int64"),
        (torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.tensor([1e300], dtype=torch.float64), "float32 cannot hold"),
        (torch.ones(2, 2, 2), "expected"),
        (torch.ones(0), "expected"),
        ({0: torch.ones(3), 1: torch.ones(4)}, "width"),
        ({0: torch.ones(3), "0": torch.ones(3)}, "two vectors"),
        ({"a": torch.ones(3)}, "keys that are layers"),
        ({0: "x"}, "no layout"),
        ({}, "empty dict"),
        ([torch.ones(3)], "list of 1"),
        ([{"projector1": torch.ones(2, 2)}], "list of 1"),
        ("text", "str"),
    ],
)
def test_unsound_contents(write, value, reason):
    with pytest.raises(UsageError, match=reason):
        import_file(write(value), layer=0)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_nothing_is_unpickled(write):
    with pytest.raises(UsageError, match="exec.*unpickled"):
        import_file(write(Bomb()), layer=0)
    with pytest.raises(UsageError, match="unpickled"):
        import_file(write(pickle.dumps(Bomb())), layer=0)
    with pytest.raises(UsageError, match="numpy.*torch.save plain tensors"):
        import_file(write({"dir": np.ones(3), "avg_proj": 1.0}), layer=0)
    with pytest.raises(UsageError, match="older than 1.6"):
        import_file(write(torch_bytes(torch.ones(3), _use_new_zipfile_serialization=False)), layer=0)


def rezipped(data, change, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def test_archives_that_claim_more_than_they_hold(write):
    data = torch_bytes(torch.zeros(64))

    def inflate(name, content):
        return bytes(10_000_000) if name.endswith("data/0") else content

    with pytest.raises(UsageError, match="compressed"):
        import_file(write(rezipped(data, inflate, zipfile.ZIP_DEFLATED)), layer=0)
    with pytest.raises(UsageError, match="larger than its data|weights_only"):
        import_file(write(torch.zeros(1).expand(1 << 40)), layer=0)  # 4 TiB when copied
    damaged = bytearray(data)
    damaged[data.index(bytes(64)) + 8] ^= 1
    with pytest.raises(UsageError, match="checksum"):
        import_file(write(bytes(damaged)), layer=0)
    with pytest.raises(UsageError, match="archive"):
        import_file(write(data[:-30]), layer=0)
    with pytest.raises(UsageError, match="no data.pkl"):
        import_file(write(rezipped(data, lambda n, c: c).replace(b"data.pkl", b"data.pxl")), layer=0)


def test_a_memory_bomb_in_the_pickle(write):
    """bytearray(n) is among the calls that torch allows."""
    bomb = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    data = rezipped(torch_bytes(torch.zeros(2)), lambda n, c: bomb if n.endswith("data.pkl") else c)
    with pytest.raises(UsageError, match="bytearray"):
        import_file(write(data), layer=0)
