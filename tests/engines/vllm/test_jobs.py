"""Commands that generate with `--engine vllm` say what they say with the other engine."""

import json

import pytest
import torch
from vllm_engines import ENVIRONMENT

import steerable as st
from steerable.chains.records import read_jsonl
from steerable.jobs.calibration_job import calibrate_files
from steerable.jobs.contrast_job import contrast_file
from steerable.jobs.elicitation import passk
from steerable.store.errors import SteerableError, UsageError

pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm` sets it up")
pytestmark = pytest.mark.slow
OPTIONS = json.dumps({"enforce_eager": True, "max_model_len": 512, "gpu_memory_utilization": 0.1})
OWN = '{"additional_config": {"steering": {"lanes": -1}}}'
VLLM = {"engine": "vllm", "engine_options": OPTIONS}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    v = torch.randn(192, generator=torch.Generator().manual_seed(0))
    file = tmp_path_factory.mktemp("directions") / "deduction.safetensors"
    direction = st.Direction({st.Site("resid_post", 3): v / v.norm() * 4}, behaviour="deduction", model_id="pocket")
    direction.save(file)
    return file


def both(job, tmp_path, **settings):
    return [job(out=tmp_path / name, workers=1, **settings, **more) for name, more in (("a", {}), ("b", VLLM))]


def test_passk(tmp_path, file):
    settings = {"model": "pocket", "arms": {"v": file}, "limit": 6, "samples": 4, "max_new_tokens": 80, "ks": "1,4"}
    ours, theirs = both(passk, tmp_path, **settings)
    for name in ("base", "v"):
        a, b = (read_jsonl(tmp_path / folder / f"{name}.jsonl") for folder in "ab")
        assert len(a) == 24 and [chain["ids"] for chain in a] == [chain["ids"] for chain in b]
    assert ours["arms"]["v"]["counts"] == theirs["arms"]["v"]["counts"]
    assert theirs["settings"]["engine"] == "vllm"


def test_calibrate(tmp_path, file):
    settings = {"strengths": "0.5,1", "validation": 4, "samples": 1, "max_new_tokens": 40, "full_grid": True}
    ours, theirs = both(lambda **how: calibrate_files([file], **how), tmp_path, **settings)
    assert ours["grid"] == theirs["grid"] and ours["cost"] == theirs["cost"]


def test_contrast(tmp_path):
    pairs = [
        {"positive": f"{n} cats have {4 * n} legs. Wait, is it so?", "negative": f"{n} cats have {4 * n} legs. Done."}
        for n in range(2, 10)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    settings = {"ask": "2*w + 8 = 30", "layers": "3", "max_new_tokens": 40}
    ours, theirs = (
        contrast_file(tmp_path / "pairs.json", out=tmp_path / f"{name}.safetensors", **settings, **more)
        for name, more in (("a", {}), ("b", VLLM))
    )
    assert [answer.pop("report") is None for answer in ours["answers"]] == [False, True, False]
    assert [answer.pop("report") for answer in theirs["answers"]] == [None] * 3
    for answer in ours["answers"] + theirs["answers"]:
        del answer["steering"]  # it names the file
    assert ours["answers"] == theirs["answers"] and len({str(a["thinking"]) for a in ours["answers"]}) > 1


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"engine_options": OPTIONS}, UsageError, "give --engine vllm, or leave them out"),
        ({"engine": "vllm", "engine_options": "2"}, UsageError, "--engine-options is '2': expected a JSON object"),
        ({"engine": "vllm", "engine_options": '{"ranks": 2}'}, SteerableError, "unexpected keyword argument 'ranks'"),
        ({"engine": "vllm", "engine_options": '{"model": "x"}'}, UsageError, "--engine-options has 'model'"),
        ({"engine": "vllm", "engine_options": '{"additional_config": 5}'}, UsageError, "with one in it as 'steering'"),
        ({"engine": "vllm", "engine_options": OWN}, UsageError, "lanes of the steering settings"),
        ({"engine": "vllm", "arms": {"other": "pocket/model"}}, UsageError, "'other' is a model of its own"),
    ],
)
def test_refusals(tmp_path, file, settings, error, message):
    with pytest.raises(error, match=message):
        passk("pocket", out=tmp_path, limit=1, samples=1, **settings)
