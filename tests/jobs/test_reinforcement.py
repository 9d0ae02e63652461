"""`steerable train rl` as a user meets it: what it leaves, killed runs that go on, mistakes of one sentence each."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny_families import tiny

from steerable import Direction
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.jobs import reinforcement
from steerable.jobs.reinforcement import train_rl
from steerable.jobs.training_settings import RLSettings, read_recipe, recipes
from steerable.methods.train.loop import read_log
from steerable.methods.train.rewards import is_verifiable
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import read_json

pytest.importorskip("trl")
#: Long enough for a few right answers, short enough for seconds.
SMALL = {
    "tasks": "reasoning-gym:gcd,simple_equations", "prompts": 4, "group": 4, "max_new_tokens": 60, "steps": 3,
    "save_every": 1, "limit": 12, "evaluation": 4, "samples": 2, "seed": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_rl(tmp_path_factory.mktemp("rl") / "run", workers=1, **SMALL)


@pytest.mark.slow
def test_the_report(run):
    found = read_json(run / "report.json")
    for arm in ("base", "bias"):
        for decoding in ("greedy", "sampled"):
            cell = found[arm][decoding]
            mean, low, high = cell["accuracy"]
            assert 0 <= low <= mean <= high <= 1
            assert cell["tokens"][0] > 0 and cell["loops"] is not None
    assert found["bias"]["trainable_parameters"] == 6 * 192
    assert found["base"]["sampled"]["samples"] == 2 and found["base"]["greedy"]["samples"] == 1
    before, after = (found[arm]["sampled"]["accuracy"][0] for arm in ("base", "bias"))
    assert found["difference"]["sampled"]["accuracy"][0] == pytest.approx(after - before)
    assert found["training"]["steps"] == 3 and found["training"]["optimizer_bytes"] in (0, 2 * 6 * 192 * 4 + 6 * 4)
    assert {"generation", "reward", "update"} <= set(found["training"]["seconds_per_step"])
    assert set(found["controls"]) == {"shuffled", "random", "prefix"} and found["controls"]["prefix"]["token"]
    for control in found["controls"].values():
        trained, other = (arm["sampled"]["accuracy"][0] for arm in (found["bias"], control))
        assert control["difference"]["sampled"]["accuracy"][0] == pytest.approx(trained - other)
    assert found["config"]["method"] == "bias" and found["versions"]["trl"]


@pytest.mark.slow
def test_what_lies_in_the_folder(run):
    for name in ("config.json", "tasks.jsonl", "log.jsonl", "bias.safetensors", "training.json", "report.html"):
        assert (run / name).is_file(), name
    assert [row["step"] for row in read_log(run)] == [1, 2, 3]
    assert len(list((run / "checkpoints").glob("checkpoint-*"))) == 2
    weights = sum(f.stat().st_size for f in (run / "checkpoints/checkpoint-3").glob("trained.safetensors"))
    assert weights < 10_000, "a checkpoint holds no copy of the model"
    direction = Direction.load(run / "bias.safetensors")
    assert direction.layers == list(range(6)) and direction.model_id == "pocket"
    assert direction.stats["training"]["steps"] == 3
    assert len(direction.stats["task_keys"]) == 12 * 8
    splits = [task["split"] for task in read_jsonl(run / "tasks.jsonl", "task")]
    assert (splits.count("train"), splits.count("evaluation")) == (12, 4)


@pytest.mark.slow
def test_labels_of_ones_own(run, tmp_path):
    """Another annotator labels the chains that are there; its labels are the report's and the page's."""
    copy_of = shutil.copytree(run, tmp_path / "run")
    cues = {"labels": {"doubt": {"contains": ["wait", "maybe", "perhaps"]}}, "otherwise": "step"}
    (tmp_path / "cues.json").write_text(json.dumps(cues))
    train_rl(copy_of, workers=1, **SMALL, annotator=f"cues:{tmp_path / 'cues.json'}")
    report = read_json(copy_of / "report.json")
    arms = [report["base"], report["bias"], *report["controls"].values(), report["difference"]]
    assert {tuple(arm[d]["fractions"]) for arm in arms for d in ("greedy", "sampled")} == {("step", "doubt")}
    assert report["base"]["sampled"]["fractions"]["step"][0] > 0.2 and ">step<" in (copy_of / "report.html").read_text()
    for name in ("base-sampled", "bias-greedy"):
        assert (copy_of / f"chains/{name}.jsonl").stat().st_mtime_ns == (
            run / f"chains/{name}.jsonl"
        ).stat().st_mtime_ns


def test_an_annotator_that_is_none(steerable, tmp_path):
    said = steerable("train", "rl", "--out", tmp_path / "run", "--annotator", "nobody")
    assert said.code == 2 and "--annotator is 'nobody'" in said.err and "none or module:function" in said.err
    (tmp_path / "recipe.json").write_text('{"annotator": "os:system"}')
    with pytest.raises(UsageError, match="asks for the annotator os:system, which no file may"):
        read_recipe(str(tmp_path / "recipe.json"))


@pytest.mark.slow
def test_tensorboard_is_written(run):
    pytest.importorskip("tensorboard")
    assert list((run / "tensorboard").glob("events*"))


def test_tasks_that_a_constant_reply_wins(tmp_path, steerable):
    tasks = [{"id": f"a{i}", "prompt": f"Is {i} small?", "answer": "no" if i % 8 else "yes"} for i in range(40)]
    write_jsonl(tmp_path / "tasks.jsonl", tasks)
    options = ("train", "rl", "--out", tmp_path / "run", "--tasks", tmp_path / "tasks.jsonl", "--limit", 32)
    said = steerable(*options, "--evaluation", 8, "--prompts", 4)
    assert said.code == 2 and said.err.count("\n") == 1
    assert "the constant reply 'no' is right for" in said.err and not (tmp_path / "run/tasks.jsonl").exists()


@pytest.mark.slow
def test_a_finished_run_is_not_done_again(run, monkeypatch):
    monkeypatch.setattr(reinforcement, "train_policy", lambda *args: pytest.fail("it trains again"))
    before = (run / "bias.safetensors").read_bytes()
    assert train_rl(run, workers=1, **SMALL) == run
    assert (run / "bias.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(run, tmp_path):
    out = tmp_path / "killed"
    options = [part for key, value in SMALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "steerable", "train", "rl", "--out", str(out), "--workers", "1", *options]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoint = out / "checkpoints/checkpoint-2/trainer_state.json"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "bias.safetensors").exists(), "it was killed in the middle"
    (out / "checkpoints/checkpoint-9").mkdir()  # half a checkpoint: without its last file
    (out / "checkpoints/checkpoint-9/optimizer.pt").write_bytes(b"half")
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 3, "rew')
    train_rl(out, workers=1, **SMALL)
    assert (out / "bias.safetensors").read_bytes() == (run / "bias.safetensors").read_bytes()
    assert [row["step"] for row in read_log(out)] == [1, 2, 3]
    assert read_json(out / "report.json")["bias"] == read_json(run / "report.json")["bias"]


@pytest.mark.slow
def test_another_training_in_the_same_folder_begins_anew(tmp_path):
    settings = SMALL | {"steps": 1, "max_new_tokens": 8, "evaluation": 2, "samples": 1}
    train_rl(tmp_path, workers=1, **settings)
    train_rl(tmp_path, workers=1, **settings | {"layers": "3"})
    assert Direction.load(tmp_path / "bias.safetensors").layers == [3]
    assert len(read_log(tmp_path)) == 1


@pytest.mark.slow
def test_the_system_message_and_own_files(tmp_path):
    tasks = [{"id": f"a{i}", "prompt": f"Solve for x: 2*x + {i} = {i + 4}", "answer": "2"} for i in range(6)]
    write_jsonl(tmp_path / "tasks.jsonl", tasks)
    write_jsonl(tmp_path / "test.jsonl", [{**tasks[0], "id": "b", "prompt": "Solve for x: 3*x + 1 = 7"}])
    run = train_rl(
        tmp_path / "run", workers=1, tasks=str(tmp_path / "tasks.jsonl"), test=str(tmp_path / "test.jsonl"), limit=6,
        evaluation=1, prompts=2, group=2, steps=1, max_new_tokens=8, samples=1, controls=False,
        template="<|user|>{prompt}<|assistant|>",
    )  # fmt: skip
    found = read_jsonl(run / "tasks.jsonl", "task")
    assert [t["split"] for t in found].count("train") == 6 and found[-1]["prompt"] == "Solve for x: 3*x + 1 = 7"


# --- mistakes ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "prefix"}, "--method is 'prefix': expected one of bias"),
        ({"reward": "kind"}, "--reward is 'kind'"),
        ({"group": 1}, "--group is 1: expected 2 or more"),
        ({"steps": 0}, "--steps is 0"),
        ({"limit": 3}, "--limit is 3: expected at least --prompts"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"layers": "7"}, "layer 7 is out of range"),
        ({"layers": "a"}, "expected layers separated by commas"),
        ({"after": "norm"}, "--after is 'norm'"),
        ({"max_new_tokens": 5000}, "--max-new-tokens is 5000"),
        ({"template": "no place"}, "--template has no {prompt}"),
        ({"colour": 1}, "unknown setting 'colour'"),
        ({"tasks": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "no/such-model-here"}, "no/such-model-here"),
        ({"beta": 0.1, "rank": 2}, "--beta with --rank"),
        ({"generation": "trt"}, "--generation is 'trt'"),
    ],
)
def test_settings_that_are_refused_write_nothing(tmp_path, settings, said):
    with pytest.raises(UsageError) as error:
        train_rl(tmp_path / "run", workers=1, **SMALL | settings)
    assert said in str(error.value)
    assert not (tmp_path / "run/config.json").exists()


def test_tasks_without_answers_are_refused(tmp_path):
    write_jsonl(tmp_path / "open.jsonl", [{"id": str(i), "prompt": f"Write a poem on {i}"} for i in range(20)])
    with pytest.raises(UsageError, match="0 tasks with an answer that can be checked"):
        train_rl(tmp_path / "run", workers=1, **SMALL | {"tasks": str(tmp_path / "open.jsonl")})


def test_references_that_nobody_can_match_are_left_out():
    assert is_verifiable({"prompt": "?", "answer": "12"})
    assert is_verifiable({"prompt": "?", "answer": "So it is\n#### 12"})
    assert not is_verifiable({"prompt": "?", "answer": ""})
    assert not is_verifiable({"prompt": "?"})


def test_a_long_task_is_refused_with_the_number_that_fits(tmp_path):
    tasks = [{"id": str(i), "prompt": f"{'x + ' * 300}{i}", "answer": "1"} for i in range(6)]
    write_jsonl(tmp_path / "long.jsonl", tasks)
    with pytest.raises(UsageError, match=r"reads at most 1024: lower --max-new-tokens to \d+"):
        train_rl(
            tmp_path / "run", workers=1,
            **SMALL | {"tasks": str(tmp_path / "long.jsonl"), "evaluation": 1, "limit": 4, "max_new_tokens": 900},
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore::steerable.SteerableWarning")
def test_the_last_token_needs_no_position(tmp_path, tokenizer):
    """6 + 4 tokens at 9 learned positions: no model reads the last one for anything."""
    model = tiny("gpt2", n_positions=9)
    model.generation_config.update(do_sample=True, eos_token_id=63, pad_token_id=0)
    model.save_pretrained(tmp_path / "model")
    spoken = copy.deepcopy(tokenizer)
    spoken.eos_token = "w56"
    spoken.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "tasks.jsonl", [{"id": str(i), "prompt": f"w{i} w2 w3", "answer": "7"} for i in range(8)])
    settings = SMALL | {"model": str(tmp_path / "model"), "tasks": str(tmp_path / "tasks.jsonl"), "steps": 1}
    settings |= {"limit": 4, "evaluation": 2, "controls": False, "annotator": "none"}
    with pytest.raises(UsageError, match="reads at most 9: lower --max-new-tokens to 4"):
        train_rl(tmp_path / "run", workers=1, **settings | {"max_new_tokens": 5})
    train_rl(tmp_path / "run", workers=1, **settings | {"max_new_tokens": 4})
    chains = read_jsonl(tmp_path / "run/chains/base-sampled.jsonl", "chain")
    assert max(len(chain["prompt_ids"]) + len(chain["ids"]) for chain in chains) == 10


@pytest.mark.slow
def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    import torch
    from trl import GRPOTrainer

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", full)
    with pytest.raises(SteerableError, match=r"lower --micro-batch \(now 16\).*goes on from it"):
        train_rl(tmp_path, workers=1, **SMALL)


def test_the_command_line_ends_with_the_right_codes(steerable, tmp_path):
    said = steerable("train", "rl", "--out", str(tmp_path / "x"), "--group", "1")
    assert said.code == 2 and said.err.startswith("steerable: --group is 1") and said.err.count("\n") == 1
    said = steerable("train", "rl", "--out", str(tmp_path / "x"), "--recipe", "nothing")
    assert said.code == 2 and "expected one, or" in said.err


@pytest.mark.slow
def test_json_is_the_report(steerable, run):
    options = [part for key, value in SMALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    said = steerable("train", "rl", "--out", str(run), "--workers", "1", *options, "--json")
    assert said.code == 0 and json.loads(said.out)["bias"]["trainable_parameters"] == 1152


# --- settings ---


def test_settings_go_through_a_dict():
    s = RLSettings(method="lora", layers="1,2", beta=0.01)
    assert RLSettings(**s.to_dict()) == s
    assert s.chosen_layers == [1, 2]
    assert RLSettings(prompts=3, group=3, micro_batch=64).micro_batch == 9
    assert RLSettings(prompts=8, group=8, micro_batch=48).micro_batch == 32


@pytest.mark.parametrize(
    ("vocabulary", "on_cpu", "given", "expected"),
    [
        (1328, True, {}, 64),  # of the bundled model: nothing changes
        (49152, True, {}, 4),  # 400 tokens of SmolLM2: six texts would fit, four divide 128
        (49152, False, {}, 32),
        (151936, False, {}, 16),
        (10**9, True, {}, 1),
        (151936, True, {"micro_batch": 32}, 32),  # what is asked for is done
    ],
)
def test_a_large_vocabulary_takes_fewer_texts_in_a_pass(vocabulary, on_cpu, given, expected):
    s = RLSettings(**given)
    s.fit_to_memory(vocabulary, on_cpu)
    assert s.micro_batch == expected and s.batch_size % s.micro_batch == 0


def test_every_recipe_is_sound():
    for name in recipes():
        assert RLSettings(**read_recipe(name)).steps > 0
