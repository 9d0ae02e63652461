"""What report.json says beside what the stages measured: which example, and what the model ran on."""

import pytest
import torch

from steerable.chains.records import write_jsonl
from steerable.jobs.report_content import _example, describe_model

TEXT = "ten chars!"
# task: number of characters of backtracking unsteered, up, down; which answers are right; whether all three end
CHAINS = {
    "wrong": ((2, 6, 1), (False, False, False), True),
    "two": ((2, 6, 1), (True, True, False), True),
    "open": ((2, 6, 1), (True, True, True), False),
    "against": ((2, 1, 6), (True, True, True), True),
    "far": ((0, 10, 0), (True, True, True), True),
    "near": ((2, 7, 1), (True, True, True), True),
}


@pytest.fixture
def folder(tmp_path):
    def write(tasks):
        for i, file in enumerate(("unsteered", "backtracking.+1", "backtracking.-1")):
            chains, spans = [], []
            for task in tasks:
                lengths, right, ends = CHAINS[task]
                key = {"task_id": task, "sample": 0}
                answer = "The answer is 7" if right[i] else "The answer is 8"
                chains.append(key | {"thinking": TEXT, "answer": answer, "closed": ends or i < 2, "tokens": 3})
                cut = lengths[i]
                ranges = [("backtracking", 0, cut), ("deduction", cut, len(TEXT))]
                spans += [key | {"label": b, "start": start, "end": end} for b, start, end in ranges if start < end]
            write_jsonl(tmp_path / f"steered/{file}.jsonl", chains)
            write_jsonl(tmp_path / f"steered_spans/{file}.jsonl", spans)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("tasks", "chosen"),
    [
        (["wrong", "two", "open", "against", "far", "near"], "near"),
        (["wrong", "two", "open", "against", "far"], "far"),
        (["wrong", "two", "open"], "two"),
        (["wrong", "open"], "wrong"),
        (["open"], None),
    ],
)
def test_the_example_is_chosen_by_its_rule(folder, tasks, chosen):
    records = {name: {"id": name, "prompt": "3 + 4?", "answer": "7"} for name in CHAINS}
    example = _example(folder(tasks), records, "backtracking", 1.0)
    assert (example and example["task_id"]) == chosen
    if example:
        assert [example[name]["correct"] for name in ("unsteered", "plus", "minus")] == list(CHAINS[chosen][1])
        assert "right answers" in example["rule"]


def test_the_model_is_described_as_it_ran(tiny_llama):
    about = describe_model(tiny_llama, "tiny", "abc", "bfloat16")
    assert {n: about[n] for n in ("dtype", "device", "attention", "generation", "generation_dtype", "threads")} == {
        "dtype": "float32",
        "device": "cpu",
        "attention": "sdpa",
        "generation": "slots",
        "generation_dtype": "bfloat16",
        "threads": torch.get_num_threads(),
    }
