"""`accelerate launch` with two processes on a CPU: killed, gone on with, and what its errors say."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import TASKS, loaded

from steerable.chains.records import write_jsonl
from steerable.jobs import launcher
from steerable.jobs.reinforcement import arguments, main
from steerable.jobs.training import Training
from steerable.jobs.training_settings import RLSettings
from steerable.methods.train.loop import WEIGHTS, read_log, step_of
from steerable.steering.direction import Direction
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import RunFolder, read_json, write_json

pytest.importorskip("trl")

CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
mixed_precision: 'no'
use_cpu: false
"""


@pytest.fixture
def root(tmp_path, tiny_llama, tokenizer):
    """A run folder with tasks, and beside it a model and accelerate's configuration of two processes."""
    found = loaded(tiny_llama, tokenizer)
    found.model.save_pretrained(tmp_path / "model")
    found.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "two.yaml").write_text(CONFIG)
    folder = tmp_path / "run"
    folder.mkdir()
    write_jsonl(folder / "tasks.jsonl", [task | {"split": "train"} for task in TASKS])
    return folder


def configure(root, **given):
    small = {"prompts": 4, "group": 2, "steps": 3, "limit": 4, "max_new_tokens": 16, "save_every": 1, "seed": 5}
    s = RLSettings(model=str(root.parent / "model"), device="cpu", reward="random", learning_rate=0.1, **small | given)
    write_json(root / "config.json", s.to_dict())
    return s


def start(root, steps):
    """The launcher in a process of its own, which can be killed."""
    code = """import sys; from pathlib import Path
from steerable.store.display import Display; from steerable.jobs import launcher
launcher.launch(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Display(quiet=True))"""
    arguments = [str(root), str(root.parent / "two.yaml"), str(steps)]
    return subprocess.Popen([sys.executable, "-c", code, *arguments])


def workers(root):
    """Processes that train in the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"steerable.jobs.reinforcement" in words and str(root).encode() in words:
            found.append(int(entry.parent.name))
    return found


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_two_processes_killed_and_gone_on_with(root):
    s = configure(root, steps=50)
    process = start(root, s.steps)
    until(lambda: (root / "checkpoints/checkpoint-1/trainer_state.json").exists() or process.poll() is not None)
    assert process.poll() is None, (root / "launch.log").read_text()
    assert len(workers(root)) == 3, "accelerate's own, and two"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not workers(root))
    reached = max(step_of(path.parent) for path in root.glob("checkpoints/*/trainer_state.json"))
    assert 0 < reached < s.steps
    first = read_log(root)[:reached]

    launcher.launch(root, str(root.parent / "two.yaml"), s.steps, Display(quiet=True))
    rows = read_log(root)
    assert [row["step"] for row in rows] == list(range(1, s.steps + 1)), "each once, by the first process alone"
    assert rows[:reached] == first, "it went on"
    assert all(row["kl"] is not None and row["tokens_per_second"] > 0 for row in rows)
    vectors = Direction.load(root / "bias.safetensors").vectors
    assert [v.shape for v in vectors.values()] == [(32,)] * 4
    kept = load_file(root / f"checkpoints/checkpoint-{s.steps}" / WEIGHTS)
    assert all(torch.equal(v, kept[f"model.layers.{site.layer}.mlp.down_proj.bias"]) for site, v in vectors.items())
    summary = read_json(root / "training.json")
    assert summary["steps"] == s.steps and summary["trainable_parameters"] == 4 * 32
    assert not list(root.rglob(".*.tmp"))


@pytest.mark.slow
def test_what_a_worker_raises_is_raised_here(root):
    write_json(root / "config.json", configure(root).to_dict() | {"group": 1})
    with pytest.raises(UsageError, match=r"^--group is 1: expected 2 or more"):
        launcher.launch(root, str(root.parent / "two.yaml"), 1, Display(quiet=True))
    with pytest.raises(UsageError, match="expected a file.*deepspeed_zero2, fsdp, multi_gpu"):
        launcher.launch(root, "nowhere.yaml", 1, Display(quiet=True))


def test_rollouts_that_the_processes_cannot_share(root, monkeypatch, tiny_llama, tokenizer):
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: SimpleNamespace(num_processes=2))
    with pytest.raises(UsageError, match="9 rollouts a step .* cannot be shared by 2 processes .* divide each other"):
        s = configure(root, prompts=3, group=3)
        arguments(Training(RunFolder(root), s, loaded(tiny_llama, tokenizer)))


ELASTIC = """E1121 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: {code}) local_rank: 0
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
steerable.jobs.reinforcement FAILED
  exitcode  : {code} (pid: 10063)
"""


@pytest.mark.parametrize(
    ("raised", "printed", "kind", "text"),
    [
        (SteerableError("out of memory"), ELASTIC.format(code=1), SteerableError, "^out of memory$"),
        (UsageError("two\nlines"), ELASTIC.format(code=1), UsageError, "^two lines$"),
        (
            torch.AcceleratorError("CUDA error: bad\nand more"),
            ELASTIC.format(code=1),
            SteerableError,
            "failed: AcceleratorError: CUDA error: bad .*launch.log.*goes on",
        ),
        (None, ELASTIC.format(code=-9), SteerableError, "killed by signal 9 .*goes on"),
        (None, "nothing known\n", SteerableError, "ended with code 3"),
    ],
)
def test_errors_in_one_sentence(tmp_path, raised, printed, kind, text):
    (tmp_path / "launch.log").write_text(printed)
    if raised:
        launcher.report(tmp_path, raised)
        launcher.report(tmp_path, SteerableError("what the other processes say of it"))
    with pytest.raises(kind, match=text) as error:
        launcher.explain(tmp_path, 3)
    assert "\n" not in str(error.value)


def test_a_worker_that_is_started_by_hand(root, monkeypatch, capsys):
    monkeypatch.delenv(launcher.LAUNCHER, raising=False)
    monkeypatch.setattr(sys, "argv", ["reinforcement", str(root)])
    write_json(root / "config.json", configure(root).to_dict() | {"trust_remote_code": True})
    with pytest.raises(SystemExit, match="steerable: config.json asks for trust_remote_code, which no file may"):
        main()
