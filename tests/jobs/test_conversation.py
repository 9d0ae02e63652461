"""One prompt, answered twice: the same seed, the same text where nothing steers, and a picture that fits."""

import pytest
import torch

from steerable.chains.generation import prompt_ids, split_chain
from steerable.chains.records import LABELS
from steerable.engines.base import Completion
from steerable.jobs.conversation import COLOURS, chat
from steerable.models import loading as models
from steerable.models.sources import pocket_path
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.steering.think import think_tags
from steerable.store.display import Display
from steerable.store.errors import UsageError

PROMPT = "Calculate 12 + 30."


@pytest.fixture(scope="module")
def pocket():
    return models.load("pocket")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    vectors = {Site("resid_post", layer): torch.randn(192, generator=generator) * 3 for layer in (2, 3)}
    return Direction(vectors, model_id="pocket").save(tmp_path_factory.mktemp("chat") / "d.safetensors")


def test_unsteered():
    said = chat(PROMPT, max_new_tokens=30)
    assert set(said) == {"model", "prompt", "unsteered", "steered", "steering"}
    assert said["steered"] is said["steering"] is None
    assert set(said["unsteered"]) == {"thinking", "answer", "closed", "tokens"}
    assert "<think>" not in said["unsteered"]["thinking"]


def test_greedy_is_what_generate_says(pocket):
    model, tokenizer = pocket
    ids = torch.tensor([prompt_ids(tokenizer, PROMPT)])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=300)[
        0, ids.shape[1] :
    ]
    completion = Completion(new.tolist(), int(new[-1]) == model.generation_config.eos_token_id)
    wanted = split_chain(tokenizer, think_tags(tokenizer), completion)
    said = chat(PROMPT, greedy=True, max_new_tokens=300)["unsteered"]
    assert said["thinking"] == wanted["thinking"] and said["answer"] == wanted["answer"].strip()
    assert (said["closed"], said["tokens"]) == (wanted["closed"], wanted["tokens"])


def test_steered(file):
    said = chat(PROMPT, steer=file, strength=2, max_new_tokens=30)
    assert said["steered"]["thinking"] != said["unsteered"]["thinking"]
    assert {site: report["tokens"] > 0 for site, report in said["steering"].items()} == {
        "resid_post.2": True,
        "resid_post.3": True,
    }
    assert list(chat(PROMPT, steer=file, layers="3", max_new_tokens=3)["steering"]) == ["resid_post.3"]


def test_strength_zero_says_the_same(file):
    said = chat(PROMPT, steer=file, strength=0, seed=5, max_new_tokens=40)
    assert said["steered"] == said["unsteered"]


def test_the_seed_decides():
    one, again, other = (chat(PROMPT, seed=seed, max_new_tokens=40)["unsteered"] for seed in (1, 1, 2))
    assert one == again != other


def test_without_a_prompt_the_bundled_model_gets_a_task():
    said = chat(max_new_tokens=20)
    assert said["prompt"] and said["unsteered"]["correct"] is False  # not closed: no answer
    with pytest.raises(UsageError, match="no prompt was given"):
        chat(model=str(pocket_path()))


@pytest.mark.parametrize("columns", ["120", "60"])
def test_the_picture_without_a_terminal(capsys, monkeypatch, file, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    chat(PROMPT, steer=file, max_new_tokens=20, display=Display())
    shown = capsys.readouterr().out
    assert PROMPT in shown and " unsteered " in shown and " steered " in shown and "20 tokens, not closed" in shown
    assert max(map(len, shown.splitlines())) <= int(columns)
    assert "\x1b" not in shown


def test_the_picture_is_coloured_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    chat(PROMPT, max_new_tokens=60, display=Display())
    assert "\x1b[" in capsys.readouterr().out


def test_quiet_says_nothing(capfd):
    chat(PROMPT, max_new_tokens=2)
    assert capfd.readouterr() == ("", "")


def test_every_behaviour_has_a_colour():
    assert tuple(COLOURS) == LABELS


def test_nothing_else_is_drawn_from():
    before = torch.random.get_rng_state()
    chat(PROMPT, max_new_tokens=5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_steering_as_text(file):
    answers = [
        chat(PROMPT, max_new_tokens=20, **how) for how in ({"steer": file, "strength": 2}, {"steer": f"2 {file}"})
    ]
    assert answers[0] == answers[1]
    thinking = chat(PROMPT, steer=f"0.5 {file}[3]@thinking", max_new_tokens=5)["steering"]
    assert list(thinking) == ["resid_post.3"]
    with pytest.raises(UsageError, match="cannot be read at column"):
        chat(PROMPT, steer=f"0.5 {file}@nowhere at all")
