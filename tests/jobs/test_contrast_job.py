"""`steerable contrast` on the bundled model: the file it writes, its JSON, and what it refuses before loading."""

import json

import pytest

from steerable.evals.calibration import TOLERANCE
from steerable.steering.direction import Direction

PAIRS = [
    ("Wait, maybe that is wrong.", "So that is right."),
    ("Hmm, I doubt that this is correct.", "Then we know that this is correct."),
    ("Perhaps I made a mistake.", "The answer is 7."),
    ("I am not sure about the sign.", "Now add 3 and 4."),
]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "doubt.jsonl"
    path.write_text("".join(json.dumps({"positive": a, "negative": b}) + "\n" for a, b in PAIRS))
    return path


def test_a_file_of_pairs(steerable, pairs, tmp_path):
    out = tmp_path / "new" / "doubt.safetensors"
    options = ["--budget", 0.1, "--ask", "2*w + 8 = 30", "--max-new-tokens", 8]
    said = steerable("contrast", pairs, "--out", out, *options, "--json")
    assert said.code == 0, said.err
    document, direction = json.loads(said.out), Direction.load(out)
    assert document["behaviour"] == direction.behaviour == "doubt" and document["pairs"] == 4
    assert document["layers"] == direction.layers and document["unit"] == direction.unit == "calibrated"
    assert document["calibration"] == direction.stats["calibration"] and direction.model_id == "pocket"
    about = document["calibration"]
    assert max(about["kl"], about["kl_reversed"]) == pytest.approx(0.1, rel=TOLERANCE)
    assert [(a["strength"], a["tokens"]) for a in document["answers"]] == [(-1, 8), (0, 8), (1, 8)]
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_personas(steerable, tmp_path):
    """In words this time: progress on standard error, the direction and the next command on standard output."""
    out = tmp_path / "calm.safetensors"
    persona = ["--persona", "calm", "--opposite", "nervous", "--prompts", 6, "--layers", "2", "--reduce", "4"]
    said = steerable("contrast", *persona, "--budget", 0.2, "--out", out)
    assert said.code == 0, said.err
    assert "calm" in said.out and f"chat '2*w + 8 = 30' --model pocket --steer {out}" in said.out and "KL" in said.err
    direction = Direction.load(out)
    assert direction.layers == [2] and direction.behaviour == "calm" and direction.stats["reduce"] == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give a file of pairs, or"),
        (["PAIRS", "--persona", "happy", "--opposite", "sad"], "give a file of pairs, or"),
        (["--persona", "happy"], "belong together"),
        (["--persona", "happy", "--opposite", "happy"], "two kinds of person"),
        (["--persona", "happy", "--opposite", "sad", "--prompts", "1000"], "expected 1 to 120"),
        (["PAIRS", "--reduce", "most"], "expected mean, last"),
        (["PAIRS", "--layers", "two"], "layers separated by commas"),
        (["PAIRS", "--ask", " "], "--ask is empty"),
        (["PAIRS", "--engine", "llama"], "--engine is 'llama': expected transformers or vllm"),
        (["PAIRS", "--engine-options", "{}"], "give --engine vllm, or leave them out"),
        (["PAIRS", "--max-new-tokens", "0"], "expected 1 or more"),
        (["PAIRS", "--budget", "-1", "--model", "./nowhere"], "the budget is -1.0"),
        (["missing.jsonl"], "there is no file missing.jsonl"),
        (["PAIRS", "--model", "./nowhere"], "nowhere"),
    ],
)
def test_refusals(steerable, pairs, tmp_path, options, sentence):
    out = tmp_path / "a.safetensors"
    said = steerable("contrast", *[pairs if o == "PAIRS" else o for o in options], "--out", out)
    assert said.code == 2 and sentence in said.err and said.err.count("\n") == 1 and not said.out
    assert not out.exists()


def test_no_chat_is_suggested_to_a_model_without_a_chat_template(steerable, pairs, tmp_path, shared, stories):
    model = shared / "models/stories260K"
    said = steerable("contrast", pairs, "--model", model, "--out", tmp_path / "a.safetensors")
    assert said.code == 0, said.err
    assert "Direction(doubt" in said.out and "steerable chat" not in said.out


def test_nothing_is_written_where_the_budget_is_not_reached(steerable, pairs, tmp_path):
    said = steerable("contrast", pairs, "--out", pairs)
    assert said.code == 2 and "name another file" in said.err
    out = tmp_path / "a.safetensors"
    said = steerable("contrast", pairs, "--budget", 1000, "--out", out, "--json")
    assert said.code == 1 and "is not reached" in said.err and not out.exists() and not said.out
