"""One prompt, answered twice: the same seed, the same text where nothing steers, and a picture that fits; and
conversations, typed and read."""

import io
import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from steerable.chains.generation import prompt_ids, split_chain
from steerable.chains.records import LABELS
from steerable.engines.base import Completion
from steerable.jobs.conversation import chat
from steerable.jobs.dialogue import Dialogue, read_part
from steerable.jobs.panels import COLOURS, Screen
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
    assert set(said) == {"model", "prompt", "unsteered", "steered", "steering", "steering_text"}
    assert said["steered"] is said["steering"] is said["steering_text"] is None
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


def test_without_a_prompt_the_bundled_model_gets_a_task(monkeypatch):
    said = chat(max_new_tokens=20)
    assert said["prompt"] and said["unsteered"]["correct"] is False  # not closed: no answer
    with pytest.raises(UsageError, match="no prompt was given"):
        chat(model=str(pocket_path()))
    monkeypatch.setattr(sys, "stdin", None)  # as where it was closed
    with pytest.raises(UsageError, match="no prompt was given"):
        chat(model=str(pocket_path()), display=Display())


@pytest.mark.parametrize("columns", ["120", "60"])
def test_the_picture_without_a_terminal(capsys, monkeypatch, file, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    chat(PROMPT, steer=file, max_new_tokens=20, display=Display())
    shown = capsys.readouterr().out
    assert PROMPT in shown and " unsteered " in shown and " steered " in shown and "20 tokens, not closed" in shown
    assert max(map(len, shown.splitlines())) <= int(columns)
    assert "\x1b" not in shown


def test_an_answer_without_a_think_block_is_cut_off(capsys):
    screen = Screen("smol", quiet=False)
    with screen.growing(["answer"]):
        screen.show(0, "", "It was")
    screen.finish([{"tokens": 2, "closed": False, "thinking": "", "answer": "It was"}])
    assert "2 tokens, cut off" in capsys.readouterr().out


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
    said = chat(PROMPT, steer=f"0.5 {file}[3]@thinking", max_new_tokens=5)
    assert said["steering_text"] == f'0.5 "{file}"[3]@thinking'
    assert chat(PROMPT, steer=file.with_suffix(""), strength=2, max_new_tokens=20)["steered"] == answers[0]["steered"]
    with pytest.raises(UsageError, match="no vector at layer 5"):
        chat(PROMPT, steer=f"0.5 {file}", layers="3,5")
    thinking = said["steering"]
    assert list(thinking) == ["resid_post.3"]
    with pytest.raises(UsageError, match="cannot be read at column"):
        chat(PROMPT, steer=f"0.5 {file}@nowhere at all")


def test_several_files_are_added_up(file, pocket):
    """And a strength scales the whole: in the text form and as `--steer` given twice."""
    dialogue = Dialogue(pocket)
    dialogue.set_steering([read_part(f"0.5 {file}[2] - 0.2 {file}[3]@answer"), read_part(file, [3])])
    dialogue.set_strengths("-2")
    unsteered, steered = dialogue.sides
    assert unsteered.steering is None
    assert [(i.site.layer, i.strength, str(i.gate)) for i in steered.steering] == [
        (2, -1.0, "all"),
        (3, 0.4, "answer"),
        (3, -2.0, "all"),
    ]
    twice = chat(PROMPT, steer=[file, file], max_new_tokens=20)["steered"]
    assert twice == chat(PROMPT, steer=file, strength=2, max_new_tokens=20)["steered"]


def test_a_file_says_its_strength(tmp_path, pocket):
    direction = Direction({Site("resid_post", 2): torch.ones(192)}, model_id="pocket", strength=0.5)
    dialogue = Dialogue(pocket)
    dialogue.set_steering([read_part(direction.save(tmp_path / "d.safetensors"))])
    assert [i.strength for i in dialogue.sides[1].steering] == [0.5]
    dialogue.set_strengths(2)
    assert [i.strength for i in dialogue.sides[1].steering] == [2.0]


def test_several_strengths_equal_single_answers(file):
    """Though they are computed together: the texts, and what is reported of each."""
    together = chat(PROMPT, steer=file, strength="-1,0,2", seed=3, max_new_tokens=60)
    assert set(together) == {"model", "prompt", "answers"}
    assert [a["title"] for a in together["answers"]] == ["strength -1", "unsteered", "strength 2"]
    assert len({a["thinking"] for a in together["answers"]}) == 3
    for answer in together["answers"]:
        alone = chat(PROMPT, steer=file, strength=answer["strength"] or 1, seed=3, max_new_tokens=60)
        side = alone["steered" if answer["strength"] else "unsteered"]
        assert {key: answer[key] for key in side} == side
        if answer["strength"]:
            assert list(answer["report"]) == list(alone["steering"])
            for site, done in alone["steering"].items():
                assert answer["report"][site] == pytest.approx(done, rel=1e-4)
        else:
            assert answer["report"] is None


def test_an_answer_that_ends_first_is_reported_without_the_rest(file, pocket):
    """Rows wait for the longest; what they are fed meanwhile is nobody's."""
    dialogue = Dialogue(pocket, max_new_tokens=300)
    dialogue.set_steering([read_part(file)])
    dialogue.set_strengths("-1,0.5,1")
    turn = dialogue.answer(PROMPT, lambda *text: None)
    lengths = [answer["tokens"] for answer in turn["answers"]]
    assert len(set(lengths)) > 1
    fed = len(prompt_ids(pocket.tokenizer, PROMPT)) - 1  # the last token that is drawn is not fed
    for answer in turn["answers"]:
        assert answer["report"]["resid_post.2"]["tokens"] == fed + answer["tokens"]


@pytest.mark.parametrize("strength", ["", "a", "1,,2", "1,inf", "nan"])
def test_strengths_that_are_none(file, strength):
    with pytest.raises(UsageError, match=f"--strength is {strength!r}: expected a number, or several as in -1,0,1"):
        chat(PROMPT, steer=file, strength=strength)


# --- conversations ---


@pytest.fixture
def talk(monkeypatch, pocket, steerable):
    """`steerable chat` with these lines on standard input: what it said, and the prompts that the model was fed."""
    model, _ = pocket
    fed = []

    def note(module, args, kwargs):
        if (ids := kwargs["input_ids"]).shape[1] > 1:
            fed.append(ids.tolist())

    monkeypatch.setattr(models, "load", lambda *args, **options: pocket)
    hook = model.register_forward_pre_hook(note, with_kwargs=True)

    def call(*arguments, lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        fed.clear()
        return steerable("chat", *arguments), fed

    yield call
    hook.remove()


def test_each_line_is_a_turn_behind_those_before_it(talk, pocket, file, tmp_path):
    """The model is fed what the chat template makes of the conversation, in which the steered answer goes on."""
    tokenizer = pocket.tokenizer
    lines = ["Calculate 12 + 30.", "", "  And 7 + 7?  ", "/keep unsteered", "/system Be brief.", "Calculate 1 + 1."]
    out = tmp_path / "turns.json"
    said, fed = talk("--steer", file, "--strength", 0.1, "--json", "--out", out, lines=lines)
    assert said.code == 0 and said.err == ""
    document = json.loads(said.out)
    assert json.loads(out.read_text()) == document and set(document) == {"model", "turns"}
    turns = document["turns"]
    prompts = [lines[0], lines[2].strip(), lines[5]]
    assert [turn["prompt"] for turn in turns] == prompts
    assert [turn["history"] for turn in turns] == [[], [0], [0, 1]]
    assert [turn["continued"] for turn in turns] == [1, 0, 0]
    messages = []
    for number, turn in enumerate(turns):
        if number == 2:
            messages.insert(0, {"role": "system", "content": "Be brief."})
        messages.append({"role": "user", "content": turn["prompt"]})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert fed[number] == [tokenizer(text, add_special_tokens=False)["input_ids"]] * 2
        answer = turn["answers"][turn["continued"]]
        thinking = f"<think>\n{answer['thinking']}</think>"  # the template drops it
        messages.append({"role": "assistant", "content": thinking + answer["answer"]})
        assert answer["answer"] and answer["thinking"] not in text


def test_commands(talk, file, tmp_path):
    lines = ["/strength 1", "/report", "/steer", f"/steer {file}", "/strength -1,0,1", PROMPT, "/report", "/strength 2"]
    lines += ["/strength x", "/steer none.safetensors", "/seed -1", "/seed 4", "/keep steered", "/nothing", "/reset"]
    lines += [PROMPT, "/task", "/help", "/quit", PROMPT]
    said, fed = talk("--max-new-tokens", 12, "--out", tmp_path / "turns.json", lines=lines)
    assert said.code == 0
    errors = [
        "/strength needs a direction",
        "nothing has been steered yet",
        "/steer needs a direction file",
        "/strength is 'x': expected a number",
        "there is no direction file none.safetensors",
        "/seed is -1: expected a whole number",
        "there is no command /nothing",
    ]
    for error, line in zip(errors, said.err.splitlines(), strict=True):
        assert line.startswith(f"steerable: {error}")
    turns = json.loads((tmp_path / "turns.json").read_text())["turns"]
    assert [len(ids) for ids in fed] == [len(turn["answers"]) for turn in turns] == [3, 2, 2]
    assert [turn["seed"] for turn in turns] == [0, 4, 4]
    assert [turn["history"] for turn in turns] == [[], [], []]  # without answers, and behind /reset and /task
    assert turns[1]["answers"][1]["strength"] == 2 and "correct" in turns[2]["answers"][0]
    assert all(text in said.out for text in (" strength -1 ", " strength 1 ", "resid_post.2", "/seed N", "no answer"))


def test_a_conversation_beyond_what_the_model_reads(pocket):
    dialogue = Dialogue(pocket, max_new_tokens=300)
    dialogue.answer(PROMPT, lambda *text: None)
    assert dialogue.turns[0]["continued"] == 0
    with pytest.raises(UsageError, match="the conversation has 1... tokens, the model reads 1024: begin a new one"):
        dialogue.answer("1 " * 1100, lambda *text: None)
    assert len(dialogue.turns) == 1
    assert dialogue.answer("1 " * 960, lambda *text: None)["answers"][0]["tokens"] <= 1024 - 960


def test_a_template_that_takes_no_system_message(tokenizer, tiny_llama):
    tokenizer.chat_template, before = "{{ raise_exception('no roles') }}", tokenizer.chat_template
    try:
        with pytest.raises(UsageError, match="no roles"):
            Dialogue(models.Loaded(tiny_llama, tokenizer), system="Be brief.")
    finally:
        tokenizer.chat_template = before


class Terminal:
    """`steerable chat` in a terminal of its own."""

    CODE = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from steerable.cli import main; main()"

    def __init__(self, *arguments):
        import pty

        self.here, there = pty.openpty()
        environment = os.environ | {"COLUMNS": "130", "LINES": "40", "TERM": "xterm"}
        command = [sys.executable, "-c", self.CODE, "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=there, stdout=there, stderr=there, start_new_session=True, env=environment
        )
        os.close(there)
        self.unread = ""

    def type(self, text):
        os.write(self.here, text.encode())

    def until(self, text, seconds=90):
        """What is shown up to where this text is."""
        end = time.monotonic() + seconds
        while text not in self.unread:
            assert select.select([self.here], [], [], max(0, end - time.monotonic()))[0], self.unread
            try:
                self.unread += os.read(self.here, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                raise AssertionError(self.unread) from None
        shown, _, self.unread = self.unread.partition(text)
        return shown + text

    def interrupt(self, text):
        """Ctrl-C until this text is shown: what arrives just before CPython's readline waits is noticed with the next
        key only."""
        for _ in range(30):
            self.type("\x03")
            with suppress(AssertionError):
                return self.until(text, seconds=3)
        raise AssertionError(self.unread)


@pytest.mark.slow
def test_a_conversation_on_a_terminal(pocket, tmp_path):
    """Two turns, a command, Ctrl-C during an answer and at the prompt, the line before again, Ctrl-D."""
    endless = -pocket.model.get_input_embeddings().weight[0]  # away from the token that ends a text
    file = Direction({Site("resid_post", 5): endless}, model_id="pocket").save(tmp_path / "d.safetensors")
    out = tmp_path / "turns.json"
    terminal = Terminal("--steer", file, "--strength", "0.01", "--out", out, "--max-new-tokens", 20_000)
    try:
        terminal.until("/help lists the commands")
        terminal.until("> ")
        terminal.type(f"{PROMPT}\n")
        first = terminal.until("the conversation goes on from: steered (/keep unsteered to change that)")
        assert "\x1b[" in first and "writing ..." in first
        terminal.until("> ")
        terminal.type("/strength 1000\n")
        terminal.until("the next answers: unsteered, steered")
        terminal.until("> ")
        terminal.type("And 7 + 7?\n")
        terminal.until("We")  # the first word of the unsteered answer
        terminal.type("\x03")
        terminal.until("not closed")
        terminal.until("> ")
        terminal.type("half a line")
        terminal.until("half a line")
        terminal.interrupt("Ctrl-D or /quit ends the conversation")
        terminal.until("> ")
        terminal.type("\x1b[A\x1b[A\n")  # the history: the line before the last
        terminal.until("the next answers: unsteered, steered")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.here)
    turns = json.loads(out.read_text())["turns"]
    assert [turn["prompt"] for turn in turns] == [PROMPT, "And 7 + 7?"]
    assert turns[1]["history"] == [0]
    stopped = turns[1]["answers"][1]
    assert not stopped["closed"] and 0 < stopped["tokens"] < 20_000 and stopped["strength"] == 1000
