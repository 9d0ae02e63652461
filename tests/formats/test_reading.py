import json

import pytest
import torch
from vector_files import direction_of, gguf_bytes, steering_lite_bytes, torch_bytes, vectors

from steerable.directions import Direction
from steerable.errors import SteerableError, UsageError
from steerable.formats import import_file, import_to, validate_file


@pytest.fixture
def files(tmp_path, direction):
    """One file of every kind, none with a name that tells."""
    (tmp_path / "pt").write_bytes(torch_bytes(vectors(0, 1)))
    (tmp_path / "vector").write_bytes(torch_bytes(vectors(0)[0]))
    (tmp_path / "lite").write_bytes(steering_lite_bytes(vectors(1)))
    (tmp_path / "svec").write_text(json.dumps({"model_type": "x", "directions": {"1": [1.0, 2.0]}}))
    gguf_bytes(tmp_path / "gguf", {"direction.1": torch.ones(3).numpy()})
    direction.save(tmp_path / "own")
    return tmp_path


def test_the_content_tells_the_format(files):
    found = {p.name: validate_file(p) for p in sorted(files.iterdir())}
    json.dumps(found)
    assert {name: (d.get("format"), d["needs"]) for name, d in found.items()} == {
        "gguf": (None, "layers_from"),
        "lite": ("steering-lite", None),
        "own": ("steerable", None),
        "pt": ("pt", None),
        "svec": ("svec", None),
        "vector": (None, "layer"),
    }
    assert found["lite"]["layers"] == [1] and found["lite"]["strength"] == 2.5 and found["lite"]["width"] == 6
    assert validate_file(files / "vector", layer=3)["layers"] == [3]


def test_a_named_format_must_be_the_content(files):
    for name, wrong in (("pt", "svec"), ("lite", "repeng"), ("svec", "pt"), ("gguf", "steering-lite"), ("pt", "seal")):
        with pytest.raises(UsageError, match=f"content is not {wrong}"):
            import_file(files / name, format=wrong)
    with pytest.raises(UsageError, match="unknown format 'x'"):
        import_file(files / "pt", format="x")
    with pytest.raises(SteerableError, match="not a sound"):
        import_file(files / "svec", format="steerable")


def test_options_without_meaning_are_refused(files):
    for name, option in (("svec", {"label": "x"}), ("lite", {"layers_from": 1}), ("own", {"layout": "blocks"})):
        with pytest.raises(UsageError, match="means nothing for a"):
            import_file(files / name, **option)
    assert import_file(files / "svec", layers_from=0).layers == [1]  # what the format says anyhow
    assert import_file(files / "own", layer=2).layers == [2]


def test_import_to(files, tmp_path):
    out = tmp_path / "out.safetensors"
    done = import_to(files / "pt", out, model_id="org/m", behaviour="b", layer=1)
    json.dumps(done)
    direction = Direction.load(out)
    assert done["format"] == "pt" and done["layers"] == direction.layers == [1]
    imported = direction.stats["imported"]
    assert imported["file"] == "pt" and len(imported["sha256"]) == 64 and "block 0" in imported["convention"]
    assert direction.created_by.startswith("steerable") and direction.model_id == "org/m"
    warned = import_to(files / "vector", out, format="seal", layer=20)
    assert warned["sites"] == ["resid_pre.20"] and warned["strength"] == -1.0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"short", "5 bytes"),
        (b"\x00" * 64, "no known format"),
        (b"hello world, this is a text", "no known format"),
        (b"GGUF" + b"\xff" * 60, "version"),
        (b"PK\x03\x04" + b"\xff" * 60, "archive"),
        (b"\x80\x02}q\x00.        ", "bare pickle"),
        (b"{" + b" " * 20, "JSON"),
        ((20).to_bytes(8, "little") + b"{" + b"x" * 40, "safetensors"),
    ],
)
def test_other_content(tmp_path, data, reason):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UsageError, match=reason) as error:
        import_file(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value) and "\n" not in str(error.value)


def test_no_file_and_other_folders(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        import_file(tmp_path / "missing")
    with pytest.raises(UsageError, match="no adapter"):
        import_file(tmp_path)
    with pytest.raises(UsageError, match="holds no vectors"):
        validate_file(tmp_path)


def test_folders_and_records_are_validated(tmp_path, direction):
    direction.save(tmp_path / "a.safetensors")
    direction_of(vectors(4)).save(tmp_path / "b.safetensors")
    assert [f["layers"] for f in validate_file(tmp_path)["files"]] == [[1, 2, 3], [4]]
    (tmp_path / "a.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(SteerableError, match="a.safetensors"):
        validate_file(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"id": "a", "prompt": "?"}\n{"id": "b", "prompt": "!"}\n')
    assert validate_file(tmp_path / "t.jsonl") == {
        "file": str(tmp_path / "t.jsonl"), "sound": True, "format": "tasks", "records": 2,
    }  # fmt: skip
    (tmp_path / "t.jsonl").write_text('{"id": "a", "prompt": "?"}\n{"id": 3, "prompt": "!"}\n')
    with pytest.raises(UsageError, match="line 2"):
        validate_file(tmp_path / "t.jsonl")
