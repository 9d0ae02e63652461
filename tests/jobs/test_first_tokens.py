"""Training on own first tokens: the loss, what it has to learn from, what changes, and that a killed run goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_families import tiny as tiny_family

from steerable import Direction, Request, TransformersEngine
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.engines.sampling import Decoding
from steerable.jobs.first_tokens import train_prefixes, train_upft
from steerable.jobs.training_settings import UPFTSettings
from steerable.methods.train.loop import read_log
from steerable.methods.train.parameters import attach
from steerable.methods.train.prefixes import collate, examples, prefix_loss
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import RunFolder, read_json

pytest.importorskip("trl")
PROMPTS = [[7, 8, 9, 10, 11], [12], [13, 14, 15]]
SAID = [[20, 21, 22], [23, 24, 25, 26, 27], [28]]
TASKS = [{"id": f"t{i}", "prompt": f"w{i} w{i + 1}", "answer": f"w{i}"} for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama, tokenizer):
    """A model folder and a file of tasks."""
    import tiny_training

    root = tmp_path_factory.mktemp("upft")
    found = tiny_training.loaded(tiny_llama, tokenizer)
    found.model.save_pretrained(root / "model")
    found.tokenizer.save_pretrained(root / "model")
    write_jsonl(root / "tasks.jsonl", TASKS)
    return root


def small(folder: Path, **more):
    return {
        "model": str(folder / "model"), "tasks": str(folder / "tasks.jsonl"), "limit": 14, "evaluation": 4,
        "samples": 2, "max_new_tokens": 12, "prefix_tokens": 4, "batch": 4, "micro_batch": 2, "epochs": 2,
        "learning_rate": 0.05, "save_every": 3, "annotator": "none", "controls": False, "workers": 1,
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def run(folder):
    return train_upft(folder / "run", **small(folder))


def rows_of(prompts, solutions, k):
    pairs = zip(prompts, solutions, strict=True)
    return examples([{"prompt_ids": prompt, "ids": ids} for prompt, ids in pairs], k)


def naive(model, rows):
    """Every row by itself, with all logits: the sum of -log p of its labels, and how many there are."""
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for place, label in enumerate(row["labels"]):
            if label != -100:
                total, count = total - logits[place - 1, label], count + 1
    return total, count


def loss_of(model, rows, count=None):
    batch = collate(rows)
    labels = batch.pop("labels")
    return prefix_loss(model(**batch), labels, count)


# --- the loss ---


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_loss_is_that_of_every_row_alone(name):
    model = tiny_family(name)
    trained = attach(model, "bias")
    rows = rows_of(PROMPTS, SAID, 3)
    total, count = naive(model, rows)
    assert count == 3 + 3 + 1
    wanted = torch.autograd.grad(total / count, list(trained.parameters().values()))
    loss = loss_of(model, rows)
    torch.testing.assert_close(loss, total / count)
    for a, b in zip(torch.autograd.grad(loss, list(trained.parameters().values())), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # of a step's other rows only the number counts
    torch.testing.assert_close(loss_of(model, rows, 10), total / 10)


def test_only_the_last_logits_are_computed(tiny_llama):
    batch = collate(rows_of(PROMPTS[:1], SAID[:1], 3))
    assert batch["logits_to_keep"] == 4  # three labels and the last token, which predicts none
    batch = collate(rows_of(PROMPTS, SAID, 2))
    assert batch["input_ids"].shape == (3, 7) and batch["labels"][1].tolist() == [-100, 23, 24, *[-100] * 4]
    assert batch["logits_to_keep"] == 7  # the shortest prompt has one token


def test_no_token_after_the_first_k_counts():
    rows = rows_of(PROMPTS, SAID, 2)
    assert rows == rows_of(PROMPTS, [ids[:2] + [60] * len(ids[2:]) for ids in SAID], 2)
    assert [sum(label != -100 for label in row["labels"]) for row in rows] == [2, 2, 1]


# --- what there is to learn ---


def gradient(model, parameters, rows):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, rows), parameters)])


def test_at_temperature_1_the_expected_gradient_is_zero():
    model = tiny_family("llama")
    parameters = list(attach(model, "bias").parameters().values())
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    each = torch.stack([gradient(model, parameters, rows_of(PROMPTS[:1], [[y]], 1)) for y in range(64)])

    def expected(temperature):
        return float(((logits / temperature).softmax(-1)[:, None] * each).sum(0).norm())

    assert expected(1.0) < 1e-5 * float(each.norm(dim=1).mean())
    assert expected(0.6) > 0.05 * float(each.norm(dim=1).mean()) and expected(0.2) > expected(0.6)


def test_own_solutions_at_temperature_1_teach_little_but_noise():
    model = tiny_family("llama")
    parameters = list(attach(model, "bias").parameters().values())

    def mean_gradient(temperature):
        with torch.no_grad():
            requests = [Request(PROMPTS[0], seed, (), Decoding(temperature)) for seed in range(600)]
            said = TransformersEngine(model, rows=300).generate(requests, max_new_tokens=4)
        return float(gradient(model, parameters, rows_of(PROMPTS[:1] * 600, [c.ids for c in said], 4)).norm())

    assert mean_gradient(1.0) < 0.35 * mean_gradient(0.5)


# --- a run ---


def test_what_a_run_leaves(run):
    found = read_json(run / "report.json")
    assert found["bias"]["trainable_parameters"] == 4 * 32 and found["config"]["prefix_tokens"] == 4
    assert 0 <= found["base"]["greedy"]["accuracy"][0] <= 1 and found["bias"]["sampled"]["tokens"][0] > 0
    assert found["training"]["steps"] == 2 * 4 and len(found["training"]["curve"]["loss"]) == 8
    assert [row["step"] for row in read_log(run)] == list(range(1, 9))
    page = (run / "report.html").read_text()
    assert "trained for 8 steps on the first 4 tokens of own solutions, without a reward" in page
    assert "Training on own first tokens" in page and "nats a token" in page and 'id="lens"' in page
    direction = Direction.load(run / "bias.safetensors")
    assert direction.layers == [0, 1, 2, 3] and direction.method.startswith("UPFT, first 4 tokens")
    assert all(vector.norm() > 0 for vector in direction.vectors.values())


def test_the_solutions_are_the_beginnings_of_whole_ones(run, folder):
    from steerable.chains.generation import Job, generate_jobs
    from steerable.models import loading as models

    solutions = read_jsonl(run / "solutions.jsonl", "chain")
    tasks = [task for task in read_jsonl(run / "tasks.jsonl", "task") if task["split"] == "train"]
    assert [chain["task_id"] for chain in solutions] == [task["id"] for task in tasks] and len(tasks) == 14
    loaded = models.load(folder / "model")
    whole = generate_jobs(loaded, [Job(tasks)], decoding=Decoding(0.6), max_new_tokens=12, workers=1)[0]
    assert [chain["ids"] for chain in solutions] == [chain["ids"][:4] for chain in whole]


def test_the_likelihood_of_the_solutions_rises(run):
    losses = [row["loss"] for row in read_log(run)]
    assert sum(losses[4:]) < sum(losses[:4]) - 0.2


@pytest.mark.slow
def test_the_first_loss_is_that_of_the_solutions(run, folder):
    """The trainer's loss over two passes is the mean over the tokens of the whole step."""
    whole = train_upft(folder / "whole", **small(folder, epochs=1, batch=14, micro_batch=14))
    parts = train_upft(folder / "parts", **small(folder, epochs=1, batch=14, micro_batch=2))
    a, b = read_log(whole)[0], read_log(parts)[0]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
    s, root = UPFTSettings(**{k: v for k, v in small(folder).items() if k != "workers"}), RunFolder(whole)
    from steerable.chains.generation import Prompting
    from steerable.models import loading as models

    loaded = models.load(s.model)
    tasks = {task["id"]: task["prompt"] for task in read_jsonl(root / "tasks.jsonl", "task")}
    chains = read_jsonl(root / "solutions.jsonl", "chain")
    prompts = [Prompting().ids(loaded.tokenizer, tasks[chain["task_id"]]) for chain in chains]
    total, count = naive(loaded.model, rows_of(prompts, [chain["ids"] for chain in chains], 4))
    assert a["loss"] == pytest.approx(float(total) / count, rel=1e-4)


def test_only_the_vectors_change(run, folder):
    from steerable.models import loading as models

    loaded = models.load(folder / "model")
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    s = UPFTSettings(**{k: v for k, v in small(folder, layers="1,3").items() if k != "workers"})
    root = RunFolder(folder / "alone")
    for name in ("tasks.jsonl", "solutions.jsonl"):
        write_jsonl(root / name, read_jsonl(run / name))
    train_prefixes(root.root, s, loaded, Display(quiet=True))
    after = dict(loaded.model.named_parameters())
    biases = {f"model.layers.{layer}.mlp.down_proj.bias" for layer in (1, 3)}
    assert set(after) - set(before) == biases and all(after[name].any() for name in biases)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert Direction.load(root / "bias.safetensors").layers == [1, 3]


def test_other_solutions_in_the_same_folder_are_learnt_anew(run, folder):
    s = UPFTSettings(**{k: v for k, v in small(folder, epochs=1).items() if k != "workers"})
    root, solutions = RunFolder(folder / "solved"), read_jsonl(run / "solutions.jsonl")
    write_jsonl(root / "tasks.jsonl", read_jsonl(run / "tasks.jsonl"))

    def learnt(rows):
        from steerable.models import loading as models

        write_jsonl(root / "solutions.jsonl", rows)
        train_prefixes(root.root, s, models.load(folder / "model"), Display(quiet=True))
        return (root / "bias.safetensors").read_bytes()

    assert learnt(solutions) != learnt([chain | {"ids": chain["ids"][::-1]} for chain in solutions])


def test_a_finished_run_is_not_done_again(run, folder):
    names = ["tasks.jsonl", "solutions.jsonl", "bias.safetensors", "training.json", "chains/bias-greedy.jsonl"]
    before = {name: os.stat(run / name).st_mtime_ns for name in names}
    train_upft(run, **small(folder))
    assert before == {name: os.stat(run / name).st_mtime_ns for name in names}


KILLED = """
import json, os, signal, sys
from transformers import Trainer
from steerable.jobs.first_tokens import train_upft
step = Trainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
Trainer.training_step = training_step
train_upft(sys.argv[1], **json.loads(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(run, folder, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), json.dumps(small(folder))]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert len(read_log(tmp_path)) == 5 and not (tmp_path / "bias.safetensors").exists()
    train_upft(tmp_path, **small(folder))
    assert (tmp_path / "bias.safetensors").read_bytes() == (run / "bias.safetensors").read_bytes()
    for name in ("chains/bias-sampled.jsonl", "chains/base-greedy.jsonl", "solutions.jsonl"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes(), name
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert drop(read_log(tmp_path)) == drop(read_log(run))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "artefact"), [("lora", "adapter"), ("full", "model")])
def test_what_it_is_compared_with(folder, method, artefact):
    out = train_upft(folder / method, **small(folder, method=method, learning_rate=1e-3, epochs=1))
    found = read_json(out / "report.json")
    assert (out / artefact).is_dir() and found[method]["sampled"]["tokens"][0] > 0
    assert found["training"]["trainable_parameters"] > 4 * 32


def test_tasks_need_no_answers(folder, tmp_path):
    write_jsonl(tmp_path / "open.jsonl", [{k: v for k, v in task.items() if k != "answer"} for task in TASKS])
    out = train_upft(tmp_path / "run", **small(folder, tasks=str(tmp_path / "open.jsonl"), epochs=1))
    assert read_json(out / "report.json")["bias"]["greedy"]["accuracy"] is None
    assert "not measured" in (out / "report.html").read_text()


# --- mistakes ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prefix_tokens": 0}, "--prefix-tokens is 0: expected 1 or more"),
        ({"prefix_tokens": 13}, "expected no more than --max-new-tokens"),
        ({"prefix_temperature": -0.1}, "--prefix-temperature is -0.1"),
        ({"method": "tiny"}, "--method is 'tiny'"),
        ({"layers": "4"}, "layer 4 is out of range"),
        ({"reward": "correct"}, "unknown setting 'reward'"),
        ({"limit": 40}, "ask for fewer"),
        ({"max_new_tokens": 127}, "reads at most 128: lower --max-new-tokens to"),
    ],
)
def test_mistakes_are_one_sentence(folder, tmp_path, settings, said):
    with pytest.raises(UsageError, match=said):
        train_upft(tmp_path / "run", **small(folder, **settings))
    assert not (tmp_path / "run/solutions.jsonl").exists()


def test_a_loss_that_is_no_number_stops_the_training(folder, tmp_path):
    with pytest.raises(SteerableError, match="loss of step 5 is not a finite number.*lower --learning-rate"):
        train_upft(tmp_path, **small(folder, learning_rate=3e37))
    assert (tmp_path / "checkpoints/checkpoint-3/trained.safetensors").exists()


def test_a_batch_is_cut_into_equal_passes():
    assert UPFTSettings(batch=10, micro_batch=4).micro_batch == 2
    assert UPFTSettings(batch=10).micro_batch == 10
