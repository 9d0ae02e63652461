"""What `run --dry-run` says, beside what the run really did."""

import json

import pytest

from steerable.jobs.main_job import default_folder
from steerable.store.text import duration


def lines(*files):
    return sum(len(file.read_text().splitlines()) for file in files)


def test_it_counts_what_the_run_does(finished, tiny, steerable, tmp_path):
    said = steerable("run", *tiny, "--out", tmp_path / "run", "--dry-run", "--json")
    assert said.code == 0 and not (tmp_path / "run").exists()
    plan = json.loads(said.out)
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert stages["generate"]["chains"] == lines(finished / "chains.jsonl") == 24
    steered = [*(finished / "steered").glob("*.jsonl")]
    assert stages["steer"]["chains"] == lines(*steered) and stages["steer"]["cells"] == len(steered)
    rounds = json.loads((finished / "selection.json").read_text())["backtracking"]["rounds"]
    assert stages["select"]["cells"] == 1 + 2 * 4 * len(rounds[0]["candidates"])
    assert plan["seconds"] == pytest.approx(sum(stage["seconds"] for stage in plan["stages"]))
    assert plan["done"] == []
    assert 0 < plan["probe"]["tokens"] <= 60 and plan["memory_bytes"] > 9e6 and plan["cost"] is None


def test_it_says_what_is_done_already(finished, tiny, steerable):
    assert "done already: tasks, generate, annotate, extract, attribute, select, steer, evaluate, report" in " ".join(
        steerable("run", *tiny, "--out", finished, "--dry-run").out.split()
    )
    changed = steerable("run", *tiny, "--out", finished, "--annotator", "cues:seal", "--dry-run", "--json")
    assert json.loads(changed.out)["done"] == ["tasks", "generate"]


def test_a_label_that_the_annotator_does_not_have_is_refused_first(tiny, steerable, tmp_path):
    said = steerable("run", *tiny, "--out", tmp_path / "run", "--annotator", "cues:seal", "--behaviours", "doubt")
    assert said.code == 2 and "--behaviours has 'doubt', which is no label of --annotator cues:seal" in said.err
    assert not (tmp_path / "run").exists()


def test_it_steers_the_labels_of_the_annotator(tiny, steerable, tmp_path):
    said = steerable("run", *tiny, "--out", tmp_path / "run", "--annotator", "cues:seal", "--dry-run", "--json")
    stages = {stage["stage"]: stage for stage in json.loads(said.out)["stages"]}
    assert stages["select"]["cells"] == 1 + 2 * 3


def test_a_paid_annotator(tiny, steerable, tmp_path):
    options = ["run", *tiny, "--out", tmp_path / "run", "--annotator", "llm", "--dry-run"]
    assert "give --llm-prices for its cost" in " ".join(steerable(*options).out.split())
    plan = json.loads(steerable(*options, "--llm-prices", "2,8", "--json").out)
    read, written = plan["annotated_tokens"]
    assert plan["cost"] == pytest.approx((2 * read + 8 * written) / 1e6, rel=1e-3)
    assert written == pytest.approx(1.3 * sum(s["tokens"] for s in plan["stages"] if s["chains"]), rel=1e-3)


def test_words():
    assert [duration(s) for s in (0.2, 89, 600, 7200)] == ["1 s", "89 s", "10 min", "2.0 h"]
    names = ("pocket", "models/Qwen3-4B", "org/name", "a/model.Q4_1.gguf", "..")
    assert [str(default_folder(name)) for name in names] == [
        "runs/pocket", "runs/Qwen3-4B", "runs/name", "runs/model.Q4_1", "runs/model"
    ]  # fmt: skip
