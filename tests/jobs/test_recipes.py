"""The recipes against the published settings, and that they come with the package."""

import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from steerable.jobs.launcher import configurations
from steerable.jobs.training_settings import RLSettings, read_recipe, recipes

# name: steps, group, learning rate, beta; the size of the data, the epochs
PUBLISHED = {
    "gsm8k-v1": (174, 64, 5e-4, 0.01, 7473, 3),
    "math-v1": (174, 64, 5e-4, 0.01, 7500, 3),
    "gsm8k-deepscaler": (58, 64, 1e-3, 0.0, 7473, 1),
    "math-deepscaler": (58, 64, 1e-3, 0.0, 7500, 1),
    "deepscaler": (314, 16, 1e-3, 0.0, 40315, 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    steps, group, rate, beta, data, epochs = PUBLISHED[name]
    s = RLSettings(**read_recipe(name))
    assert (s.steps, s.group, s.learning_rate, s.beta, s.prompts) == (steps, group, rate, beta, 128)
    assert s.steps == epochs * math.floor(data / 128)
    assert 128 <= s.limit <= data and s.limit > 0.98 * data
    assert (s.method, s.temperature, s.clip, s.warmup, s.reward) == ("bias", 1.0, 2.0, 0.03, "correct")
    assert s.batch_size % s.micro_batch == 0 and s.batch_size // 8 % s.micro_batch == 0, "on 8 GPUs"
    assert s.system == "Please reason step by step, and put your final answer within \\boxed{}."
    assert s.model.startswith("Qwen/Qwen2.5-") and s.test and s.test != s.tasks
    assert s.max_new_tokens <= (4096 if name == "deepscaler" else 1024), "prompt and answer together"
    assert s.generation == "engine" and s.launcher is None, "those depend on the machine"


def test_every_recipe_is_checked_and_says_what_it_is():
    assert recipes().keys() == PUBLISHED.keys()
    for name, content in recipes().items():
        assert "arXiv" in content["about"] and "earning rates there" in content["about"], name


def test_configurations_of_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    found = configurations()
    assert found.keys() == {"multi_gpu", "deepspeed_zero2", "fsdp"}
    for path in found.values():
        assert load_config_from_file(str(path)).num_processes == 8
    content = yaml.safe_load(found["fsdp"].read_text())
    assert content["fsdp_config"]["fsdp_version"] == 2


@pytest.mark.slow
def test_they_come_with_the_package(tmp_path):
    pytest.importorskip("hatchling")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    for name in PUBLISHED:
        assert f"steerable/methods/train/recipes/{name}.json" in held
    for name in configurations():
        assert f"steerable/methods/train/recipes/accelerate/{name}.yaml" in held
