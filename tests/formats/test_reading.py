import json
import warnings

import pytest
import torch
from vector_files import direction_of, gguf_bytes, steering_lite_bytes, torch_bytes, vectors

import steerable as st
from steerable.formats import NeedsChoice, export_file, import_file, import_to, validate_file
from steerable.steering.direction import Direction
from steerable.steering.spec import Program, shift
from steerable.store.errors import SteerableError, SteerableWarning, UsageError


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
    named = import_file(files / "own", model_id="org/m", behaviour="b", licence="MIT")
    assert (named.model_id, named.behaviour, named.licence) == ("org/m", "b", "MIT")


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


def test_no_file_and_other_folders(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no such file"):
        import_file(tmp_path / "missing")
    monkeypatch.chdir(tmp_path)
    for here in (tmp_path, "."):
        with pytest.raises(UsageError, match="no adapter"):
            import_file(here)
    with pytest.raises(UsageError, match="holds no vectors"):
        validate_file(tmp_path)


def test_folders_and_records_are_validated(tmp_path, direction):
    direction.save(tmp_path / "a.safetensors")
    direction_of(vectors(4)).save(tmp_path / "b.safetensors")
    assert [f["layers"] for f in validate_file(tmp_path)["files"]] == [[1, 2, 3], [4]]
    (tmp_path / "a.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(SteerableError, match="a.safetensors"):
        validate_file(tmp_path)
    direction_of(vectors(4), map="rotate(30)").save(tmp_path / "a.safetensors")
    with pytest.raises(SteerableError, match="a.safetensors cannot steer: rotate needs a plane"):
        validate_file(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"id": "a", "prompt": "?"}\n{"id": "b", "prompt": "!"}\n')
    assert validate_file(tmp_path / "t.jsonl") == {
        "file": str(tmp_path / "t.jsonl"), "sound": True, "format": "tasks", "records": 2,
    }  # fmt: skip
    (tmp_path / "t.jsonl").write_text('{"id": "a", "prompt": "?"}\n{"id": 3, "prompt": "!"}\n')
    with pytest.raises(UsageError, match="line 2"):
        validate_file(tmp_path / "t.jsonl")


# --- the same things are taken by `import_file` and `validate_file` ---


def refusal_folder(folder, direction):
    (folder / "direction.pt").write_bytes(torch_bytes(torch.ones(6, dtype=torch.float64)))
    (folder / "direction_metadata.json").write_text('{"pos": -2, "layer": 10}')


def folder_of_one(folder, direction):
    direction.save(folder / "only.safetensors")
    (folder / "README.md").write_text("a card")


def folder_of_gguf(folder, direction):
    export_file(direction, folder / "v.gguf", "easysteer")


def easyedit_folder(folder, direction):
    (folder / "layer_3.pt").write_bytes(torch_bytes(vectors(3)[3]))


def adapter_folder(folder, direction):
    export_file(direction, folder, "peft-beft", model_type="llama")


@pytest.mark.parametrize("make", [refusal_folder, folder_of_one, folder_of_gguf, easyedit_folder, adapter_folder])
def test_folders(tmp_path, direction, make):
    make(tmp_path, direction)
    found = validate_file(tmp_path)
    json.dumps(found)
    inner = found["files"][0] if found["format"] == "folder" else found
    imported = import_file(tmp_path)
    assert inner["sound"] and inner["needs"] is None
    assert inner["sites"] == [str(site) for site in imported.vectors] and inner["behaviour"] == imported.behaviour


def test_a_folder_of_several(tmp_path, direction):
    direction.save(tmp_path / "a.safetensors")
    direction_of(vectors(4)).save(tmp_path / "b.safetensors")
    with pytest.raises(NeedsChoice, match=r"give --label, one of a\.safetensors, b\.safetensors"):
        import_file(tmp_path)
    assert import_file(tmp_path, label="b").layers == import_file(tmp_path, label="b.safetensors").layers == [4]
    with pytest.raises(UsageError, match="no file 'c'"):
        import_file(tmp_path, label="c")


def test_what_holds_no_vectors_is_named(tmp_path, tiny_llama):
    (tmp_path / "tasks.jsonl").write_text('{"id": "a", "prompt": "?"}\n')
    with pytest.raises(UsageError, match="holds records and no vectors"):
        import_file(tmp_path / "tasks.jsonl")
    tiny_llama.save_pretrained(tmp_path / "model")
    for read in (import_file, validate_file):
        with pytest.raises(UsageError, match="is the folder of a model"):
            read(tmp_path / "model")
        with pytest.raises(UsageError, match="holds no vectors"):
            read(tmp_path)


LOREFT = [
    {"weight": torch.ones(4, 6), "bias": torch.ones(4), "rotate_layer": torch.ones(6, 4)},  # LoReFT
    {"learned_source": torch.ones(4), "rotate_layer.parametrizations.weight.original": torch.ones(6, 4)},  # ConsReFT
    {"learned_source.weight": torch.ones(4, 6), "proj_layer.weight": torch.ones(4, 6)},  # NoReFT
]


@pytest.mark.parametrize("state", LOREFT)
def test_loreft_is_named(tmp_path, state):
    path = tmp_path / "intkey_layer_8_comp_block_output_unit_pos_nunit_1#0.bin"
    path.write_bytes(torch_bytes(state))
    for read in (import_file, validate_file):
        for what in (path, tmp_path):
            with pytest.raises(UsageError, match="pyreft .*LoReFT.*no vector can stand for it"):
                read(what)


LABELS = ("backtracking", "uncertainty-estimation", "adding-knowledge")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x.pt", {label: torch.rand(45, 32) for label in LABELS}),
        ("x.pt", {label: torch.rand(28) for label in LABELS}),
        ("x.pt", {label: [torch.rand(28), torch.rand(28)] for label in LABELS}),
        ("x.pt", {label: [[0.5] * 28] * 3 for label in LABELS}),
        ("layer_effects_deepseek.pt", {"other": {"a": [1.0]}}),
        ("layer_effects_numpy.pt", {"backtracking": __import__("numpy").ones(3)}),
    ],
)
def test_layer_effects_are_named(tmp_path, name, value):
    (tmp_path / name).write_bytes(torch_bytes(value))
    for read in (import_file, validate_file):
        with pytest.raises(UsageError, match="layer_effects.*no vectors"):
            read(tmp_path / name)


def test_an_lm_steer_is_named(tmp_path):
    matrices = {"projector1": torch.ones(4, 4), "projector2": torch.ones(4, 4)}
    (tmp_path / "lm_steer_vector.pt").write_bytes(torch_bytes([matrices]))
    with pytest.raises(UsageError, match="LM-Steer of EasyEdit"):
        import_file(tmp_path / "lm_steer_vector.pt")


def test_a_rotalabs_folder_is_no_easyedit(tmp_path):
    (tmp_path / "layer_15.pt").write_bytes(torch_bytes(vectors(15)[15]))
    assert import_file(tmp_path).stats["imported"]["format"] == "easyedit"
    about = {"behavior": "refusal", "layers": [15], "model_name": "org/m"}
    (tmp_path / "metadata.json").write_text(json.dumps(about))
    found = import_file(tmp_path)
    assert (found.stats["imported"]["format"], found.behaviour, found.model_id) == ("rotalabs", "refusal", "org/m")


NAN = torch.tensor([1.0, float("nan"), 2.0])
UNSOUND = {
    "one vector": (torch_bytes(NAN), {}),
    "infinite": (torch_bytes(NAN.nan_to_num(float("inf"))), {}),
    "beyond float32": (torch_bytes(torch.tensor([1.0, 1e300], dtype=torch.float64)), {}),
    "table": (torch_bytes(torch.stack([NAN, NAN])), {}),
    "numbered": (torch_bytes({1: NAN, 2: NAN}), {}),
    "seal": (torch_bytes(NAN), {"format": "seal"}),
    "refusal": (torch_bytes(NAN), {"format": "refusal-direction"}),
    "vllm-hook": (torch_bytes({"dir": NAN, "avg_proj": 1.0}), {}),
    "capping": (torch_bytes({"vectors": {n: {"layer": 1, "vector": NAN} for n in "ab"}, "experiments": []}), {}),
    "means": (torch_bytes({n: {"mean": NAN[None], "count": 2} for n in ("overall", "a", "b")}), {}),
    "all but overall": (
        torch_bytes(
            {n: {"mean": NAN[None] if n != "overall" else torch.ones(1, 3), "count": 2} for n in ("overall", "a", "b")}
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_is_not_finite_is_not_sound(tmp_path, name):
    """Before anything is asked of the caller."""
    data, options = UNSOUND[name]
    (tmp_path / "a").write_bytes(data)
    for read in (import_file, validate_file):
        with pytest.raises(UsageError, match="NaN or numbers that float32 cannot hold"):
            read(tmp_path / "a", **options)


def test_control_vectors_and_variants_that_are_not_finite(tmp_path):
    gguf_bytes(tmp_path / "a.gguf", {"direction.1": NAN.numpy(), "direction.2": NAN.numpy()})
    folder = tmp_path / "easyedit"
    folder.mkdir()
    for name in ("layer_1.pt", "layer_1_merged.pt"):
        (folder / name).write_bytes(torch_bytes(NAN))
    for path in (tmp_path / "a.gguf", folder):
        with pytest.raises(UsageError, match="NaN"):
            validate_file(path)


def test_labels_of_one_example_are_warned_of(tmp_path):
    counts = {"overall": 90, "a": 1, "b": 40, "c": 0}
    means = {k: {"mean": torch.randn(2, 4), "count": n} for k, n in counts.items()}
    means["c"]["mean"] = torch.full((2, 4), float("nan"))
    (tmp_path / "a").write_bytes(torch_bytes(means))
    with pytest.warns(SteerableWarning, match="'a' is of a single example"):
        found = validate_file(tmp_path / "a")
    assert found["needs"] == "label" and len(found["warnings"]) == 2
    assert any("the mean of 'c'" in text and "cannot be imported" in text for text in found["warnings"])
    with pytest.warns(SteerableWarning, match="count 1"):
        import_file(tmp_path / "a", label="a")
    with warnings.catch_warnings(action="error"):
        import_file(tmp_path / "a", label="b")
    direction_of(vectors(1), stats={"spans": 1}).save(tmp_path / "own")
    with pytest.warns(SteerableWarning, match="a single span"):
        assert len(validate_file(tmp_path / "own")["warnings"]) == 1


def doubled(data, old, new):
    """A safetensors file with this change in its header."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(old, new)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'\\"gate\\":', b'\\"gate\\":\\"thinking\\",\\"gate\\":'),
        (b'\\"strength\\":1.0', b'\\"strength\\":NaN'),
        (b'"unit":"raw"', b'"unit":"raw","unit":"calibrated"'),
        (b'"stats":"{}"', b'"stats":"{\\"a\\":1,\\"a\\":2}"'),
        (b'"norms":"{}"', b'"norms":"{\\"resid_post.1\\":Infinity}"'),
        (b'"resid_post.1":{', b'"resid_post.1":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},"resid_post.1":{'),
    ],
)
def test_metadata_that_mean_two_things(tmp_path, old, new):
    data = direction_of(vectors(1)).to_bytes()
    assert old in data
    (tmp_path / "a.safetensors").write_bytes(doubled(data, old, new))
    for read in (import_file, validate_file, Direction.load):
        with pytest.raises(SteerableError, match="not a sound"):
            read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/b", "nul\x00", "..", "CON:", "\x1b[2J", ""])
def test_a_name_in_a_file_is_no_path(tmp_path, name):
    """Labels are looked up, never opened; what they name cannot leave the folder."""
    inside = tmp_path / "inside"
    inside.mkdir()
    means = {k: {"mean": torch.randn(2, 4), "count": 3} for k in ("overall", name)}
    (inside / "m.pt").write_bytes(torch_bytes(means))
    import_to(inside / "m.pt", inside / "out.safetensors", label=name or None)
    direction = Direction.load(inside / "out.safetensors")
    assert direction.behaviour == name
    for path in st.save_pretrained(direction, inside / "card"):
        assert path.parent == inside / "card" and path.name.isprintable()
    assert {p.name for p in tmp_path.iterdir()} == {"inside"}


def test_a_steering_file_and_a_patch_are_called_what_they_are(tmp_path):
    Program([shift(st.Site("resid_post", 1), torch.ones(4), 1.0)]).save(tmp_path / "steering.json")
    st.WeightPatch({"up.weight": torch.ones(2, 2)}).save(tmp_path / "patch.safetensors")
    for name, text in (("steering.json", "it is a steering file"), ("patch.safetensors", "it is a patch of weights")):
        with pytest.raises(UsageError, match=text):
            import_file(tmp_path / name)
