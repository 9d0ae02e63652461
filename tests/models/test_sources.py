"""What a model's name means: named models, GGUF files, folders in shards, the hub, and the device they go to."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf_models import TOKENS, write_gguf
from hub_server import hub
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

import steerable as st
from steerable.engines.pool import loader
from steerable.models import loading as models
from steerable.models import sources
from steerable.store.errors import SteerableWarning, UsageError

IDS = torch.tensor([[1, 50, 60, 70, 2]])


@pytest.fixture(scope="module")
def llama():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=len(TOKENS), initializer_range=0.2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gguf(llama, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf", llama)


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(models, "_unpacked", set())


def quietly(*arguments, **options):
    with warnings.catch_warnings(action="ignore"):
        return st.load(*arguments, device="cpu", **options)


# --- GGUF files ---


def test_a_gguf_file_is_the_model_that_it_was_made_of(gguf, llama, capfd):
    with pytest.warns(SteerableWarning, match=r"tiny-f32.gguf are unpacked to float32, \S+ GB in memory"):
        model, tokenizer = st.load(gguf, device="cpu")
    torch.testing.assert_close(model(IDS).logits, llama(IDS).logits)
    assert models.model_id(model) == "tiny-f32.gguf" and not model.training
    assert capfd.readouterr().err == ""  # no progress bar
    assert tokenizer.decode(tokenizer("he said")["input_ids"]) == "he said"
    assert tokenizer("he")["input_ids"] == [TOKENS.index("he")]
    assert models.stop_ids(model) == [2] and tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template


def test_the_user_is_told_once(gguf):
    with pytest.warns(SteerableWarning, match="unpacked to bfloat16"):
        assert st.load(gguf, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error", SteerableWarning)
        st.load(gguf, device="cpu")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantised_weights_are_ggufs_own(llama, tmp_path, kind):
    """The oracle is gguf's own arithmetic on one matrix."""
    model, _ = quietly(write_gguf(tmp_path / "a.gguf", llama, kind))
    name = "model.layers.1.mlp.gate_proj.weight"
    plain, of = llama.state_dict()[name].numpy(), GGMLQuantizationType[kind]
    expected = quants.dequantize(quants.quantize(plain, of), of)
    assert torch.equal(model.state_dict()[name], torch.from_numpy(expected))
    assert not torch.equal(model.state_dict()[name], llama.state_dict()[name])


def test_it_is_an_ordinary_model_afterwards(gguf, tmp_path):
    """It can be saved, which transformers refuses of quantised ones, and opened again by a worker."""
    model, tokenizer = quietly(gguf)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, reread = quietly(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert reread.chat_template == tokenizer.chat_template and reread.get_vocab() == tokenizer.get_vocab()
    with warnings.catch_warnings(action="ignore"):
        worker = loader(model)()
    assert torch.equal(worker.model(IDS).logits, model(IDS).logits)


def test_a_folder_with_one_and_with_several(gguf, llama, tmp_path, monkeypatch):
    shutil.copy(gguf, tmp_path / "a.gguf")
    assert models.model_id(quietly(tmp_path).model) == "a.gguf"
    write_gguf(tmp_path / "b.gguf", llama, "Q8_0")
    with pytest.raises(UsageError, match=r"several GGUF models: give one as the model \(a.gguf, b.gguf\)"):
        st.load(tmp_path)
    assert models.model_id(quietly(tmp_path, gguf_file="b.gguf").model) == "b.gguf"
    monkeypatch.chdir(tmp_path)
    assert models.model_id(quietly("b.gguf").model) == "b.gguf"  # beside where one is
    hashes = {sources.find(name).fingerprint for name in ("a.gguf", tmp_path / "b.gguf")}
    assert len(hashes) == 2 and None not in hashes


def cut(path):
    path.write_bytes(path.read_bytes()[:-5000])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:900])


def overwrite(path):
    path.write_bytes(b"not a model" * 100)


def make_long(path):
    """A number of tensors that would take years to read."""
    path.write_bytes(path.read_bytes()[:8] + (2**50).to_bytes(8, "little") + path.read_bytes()[16:])


def leave_a_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "a.gguf' is not a loadable model file"),
        (cut_in_the_header, "a.gguf' is not a loadable model file"),
        (overwrite, "a.gguf' is not a loadable model file .*GGUF"),
        (make_long, "a.gguf' is not a loadable model file"),
        (leave_a_pointer, "Git LFS pointer"),
    ],
)
def test_a_broken_file(gguf, tmp_path, damage, message):
    path = Path(shutil.copy(gguf, tmp_path / "a.gguf"))
    damage(path)
    with pytest.raises(UsageError, match=message) as error:
        st.load(path)
    assert "\n" not in str(error.value)


def test_other_bad_files(llama, gguf, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="architecture wavenet is not supported"):
        st.load(write_gguf(tmp_path / "a.gguf", llama, arch="wavenet"))
    missing = write_gguf(tmp_path / "b.gguf", llama, leave_out=["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(UsageError, match="no weights for model.layers.1.mlp.up_proj.weight, which would be random"):
        st.load(missing)
    with pytest.raises(UsageError, match="one part of a split GGUF model"):
        st.load(shutil.copy(gguf, tmp_path / "c-00001-of-00002.gguf"))
    for name, options in ((tmp_path / "d.gguf", {}), (tmp_path, {"gguf_file": "d.gguf"})):
        with pytest.raises(UsageError, match=r"there is no file \S*d.gguf.*a.gguf, b.gguf"):
            st.load(name, **options)
    with pytest.raises(UsageError, match="leave the quantization out"):
        st.load(gguf, quantization="8bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the library gguf: pip install gguf"):
        st.load(gguf)


HUB = """
import sys, warnings, json
import steerable as st
from steerable.engines.pool import loader
from steerable.models import loading as models
warnings.simplefilter("ignore")
def load(name, options):
    try:
        model = st.load(name, device="cpu", **options).model
    except st.UsageError as error:
        return str(error)
    again = loader(model)().model
    assert float(again.lm_head.weight.sum()) == float(model.lm_head.weight.sum())
    return [models.model_id(model), models.model_revision(model), models.model_id(again), type(again).__name__]
print(json.dumps([load(*what) for what in json.loads(sys.argv[1])]))
"""


@pytest.mark.slow
def test_models_of_the_hub(llama, gguf, tmp_path):
    """A real client against a hub on this machine: GGUF files, revisions, and what is not there."""
    folder = tmp_path / "plain"
    llama.save_pretrained(folder)
    quietly(gguf).tokenizer.save_pretrained(folder)
    with hub() as server:
        server.repos["me/packed"] = {"main": ("a" * 40, {"q/tiny.gguf": gguf.read_bytes()})}
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        server.repos["me/plain"] = {"main": ("b" * 40, {}), "v1": ("c" * 40, files)}
        asked = [
            ("me/packed/q/tiny.gguf", {}),
            ("me/packed", {"gguf_file": "q/tiny.gguf"}),
            ("me/plain", {"revision": "v1"}),
            ("me/plain", {}),  # its main branch is empty
            ("me/nothing/tiny.gguf", {}),
        ]
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", HUB, json.dumps(asked)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    packed, same, plain, empty, nothing = json.loads(done.stdout)
    assert packed == same == ["tiny.gguf", "a" * 40, "tiny.gguf", "LlamaForCausalLM"]
    assert plain == ["me/plain", "c" * 40, "me/plain", "LlamaForCausalLM"]
    assert "'me/plain' is neither" in empty
    assert "no hub model 'me/nothing'" in nothing


# --- named models ---


def test_smol_before_it_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="'smol' is not on this machine yet: get it with `steerable fetch smol`"):
        st.load("smol")


def test_smol_is_known_by_its_name(smol_folder, smol, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(smol_folder.parents[1]))
    model, tokenizer = st.load("smol", device="cpu")
    assert model.dtype == torch.float32 and models.model_id(model) == "smol"
    assert sources.find("smol").fingerprint == sources.find(smol_folder).fingerprint
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, smol[0](ids).logits)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tokenizer.model"])
def test_a_folder_is_known_by_its_weights_and_its_tokenizer(tmp_path, name):
    found = []
    for content in (b"one", b"two"):
        (tmp_path / name).write_bytes(content)
        found.append(sources.find(tmp_path).fingerprint)
    assert found[0] != found[1]


# --- folders in shards ---


@pytest.fixture
def shards(llama, gguf, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="100KB")
    quietly(gguf).tokenizer.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    return files


def test_shards(llama, shards):
    model, _ = st.load(shards[0].parent, device="cpu")
    assert torch.equal(model(IDS).logits, llama(IDS).logits)


def test_a_missing_shard(shards):
    shards[1].unlink()
    with pytest.raises(UsageError, match=shards[1].name) as error:
        st.load(shards[0].parent)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_weights_that_are_missing_are_not_made_up(shards):
    """transformers fills them with random numbers and a warning."""
    index = shards[0].parent / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] = {k: v for k, v in table["weight_map"].items() if v != shards[-1].name}
    index.write_text(json.dumps(table))
    with pytest.raises(UsageError, match="holds no weights for .*, which would be random"):
        st.load(shards[0].parent)


# --- devices ---


@pytest.mark.parametrize(
    ("cuda", "mps", "device"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_default_device(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert models.default_device() == device
