"""Texts of files and models that a terminal would obey reach neither a terminal nor a page."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from rich.table import Table
from vector_files import direction_of, torch_bytes, vectors

from steerable.store.display import Harmless
from steerable.store.text import counted, json_line, one_line, plural, printable

HOSTILE = "\x1b[31mred\x07\x00\r\x9b2J\x7f\u202etxt.\u2066\u2028\ud800\U000e0041<b>&\"'"
#: What no terminal may get: C0 but for line breaks and tabs, DEL, C1, overrides, separators, surrogates, tags.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")


def test_every_character_is_harmless_and_stays_in_its_place():
    every = "".join(map(chr, range(0x20000))) + "".join(map(chr, range(0xE0000, 0xE0100)))
    shown = printable(every)
    assert len(shown) == len(every) and not OBEYED.search(shown)
    changed = {a for a, b in zip(every, shown, strict=True) if a != b}
    assert all(OBEYED.match(character) or "\ufff9" <= character <= "\ufffb" for character in changed)
    harmless = "Ünïcode, 等一下, שלום, \u200fعربي, 👩\u200d🔬, a\tb\nc\u00a0d"
    assert printable(harmless) == harmless


def test_one_line():
    assert one_line("a\n\x1b b\u2028c \r\n d") == "a ␛ b�c ␍ d"
    long = one_line("begin " + "x" * 10_000 + " end")
    assert len(long) < 1500 and long.startswith("begin ") and long.endswith(" end")


def test_json_stays_json():
    value = {HOSTILE: [HOSTILE, 1.5, None, "等"]}
    line = json_line(value)
    assert json.loads(line) == value and "等" in line and not OBEYED.search(line)


def test_tables():
    out = io.StringIO()
    table = Table("head")
    table.add_row(HOSTILE.replace("\ud800", "") + "[/] [red]")
    Console(file=out, markup=False, width=100).print(Harmless(table))
    assert not OBEYED.search(out.getvalue()) and "[/] [red]" in out.getvalue()


# --- on the command line ---


def hostile_direction(folder):
    text = HOSTILE.replace("\ud800", "")
    direction = direction_of(vectors(1), behaviour=text + "\nsteerable: all is well", method=text, model_id=text)
    return direction.save(folder / "d.safetensors")


def hostile_mean_vectors(folder):
    means = {k: {"mean": torch.randn(3, 4), "count": 2} for k in ("overall", "a" + HOSTILE[:20], "b")}
    (folder / "m.pt").write_bytes(torch_bytes(means))
    return folder / "m.pt"


@pytest.mark.parametrize("make", [hostile_direction, hostile_mean_vectors])
def test_validate(steerable, tmp_path, make):
    said = steerable("validate", make(tmp_path))
    assert said.code == 0 and said.out.count("\n") == 1 and not OBEYED.search(said.out + said.err)
    said = steerable("validate", tmp_path)
    assert said.code == 0 and said.out.count("\n") == 1 and not OBEYED.search(said.out)
    said = steerable("validate", make(tmp_path), "--json")
    assert not OBEYED.search(said.out) and json.loads(said.out)["sound"] is True


def test_errors_and_warnings_that_quote_a_file(steerable, tmp_path):
    (tmp_path / "a.svec").write_text(json.dumps({"model_type": "x", "directions": {HOSTILE[:12]: [1.0]}}))
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "a\x1b[2J", "prompt": 3}, ensure_ascii=False) + "\n")
    (tmp_path / "u.jsonl").write_text('{"id": "\x1b"}\n')
    for name in ("a.svec", "t.jsonl", "u.jsonl", "no\x1b[31m file"):
        said = steerable("validate", tmp_path / name)
        assert said.code == 2 and said.err.count("\n") == 1 and not OBEYED.search(said.err), said
    hostile_direction(tmp_path)
    said = steerable("import", tmp_path / "d.safetensors", "--out", tmp_path / "e\x1b.safetensors")
    assert said.code == 0 and not OBEYED.search(said.out + said.err)


def test_what_a_model_says(steerable, tmp_path, monkeypatch):
    """The bundled model cannot be made to say it, so its tokenizer is: a decoder that writes an escape sequence."""
    from steerable.jobs import conversation as chat
    from steerable.models import loading as models

    loaded = models.load("pocket")
    decode = type(loaded.tokenizer).decode
    monkeypatch.setattr(type(loaded.tokenizer), "decode", lambda *a, **k: f"{HOSTILE[:-8]}{decode(*a, **k)}{HOSTILE}")
    chat.chat("What is \x1b[31m2 + 2?\u202e", max_new_tokens=4)
    said = steerable("chat", "What is \x1b[31m2 + 2?", "--max-new-tokens", 4)
    assert said.code == 0 and not OBEYED.search(said.out + said.err)
    said = steerable("chat", "2 + 2?", "--max-new-tokens", 4, "--json", "--out", tmp_path / "a.json")
    assert not OBEYED.search(said.out)
    assert json.loads(said.out) == json.loads((tmp_path / "a.json").read_text())


def test_progress(capsys):
    from steerable.store.display import Display

    with Display() as display:
        display.say(HOSTILE)
        display.start(HOSTILE, 3)
    assert not OBEYED.search(capsys.readouterr().err.replace("\r", ""))


# --- on pages ---


def test_pages(finished):
    from steerable.pages.run_page import render

    report = json.loads((finished / "report.json").read_text())
    chain = {
        "thinking": HOSTILE,
        "answer": HOSTILE,
        "correct": None,
        "spans": [{"label": HOSTILE, "start": 0, "end": 9}],
    }
    about = {"behaviour": "backtracking", "task_id": HOSTILE, "sample": 0, "prompt": HOSTILE}
    report["examples"] = [about | {"unsteered": chain, "plus": chain, "minus": None}]
    report["config"]["tasks"] = report["model"]["name"] = HOSTILE
    behaviour = next(iter(report["lens"]))
    report["lens"][behaviour]["top"][0][0] = HOSTILE
    page = render(report)
    page.encode()  # a lone surrogate could not be written
    assert not OBEYED.search(page) and "<b>&" not in page and "&lt;b&gt;&amp;" in page


def test_the_lens_page(finished):
    from steerable.jobs.lens_job import lens_file
    from steerable.pages.lens_page import page

    document = json.loads(json.dumps(lens_file(finished / "vectors/backtracking.safetensors")))
    document["direction"] |= {"behaviour": HOSTILE, "method": HOSTILE}
    document["vectors"][0]["tokens"][0]["top"][0][0] = HOSTILE
    assert not OBEYED.search(page(document)) and "<b>&" not in page(document)


def test_the_card():
    from steerable.jobs.publish import model_card

    text = HOSTILE.replace("\ud800", "") + '\n```\nimport os"); evil("'
    card = model_card(direction_of({1: torch.ones(4)}, behaviour=text, model_id=text, method=text))
    assert not OBEYED.search(card) and len(re.findall("^```", card, re.MULTILINE)) == 2
    code = card.split("```python\n")[1].split("\n```")[0]
    compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 steps"), (1, "1 step"), (1.0, "1.0 step"), (2, "2 steps"), (1024, "1,024 steps")]
)
def test_counts(count, said):
    assert counted(count, "step") == said


def test_other_plurals_and_verbs():
    assert [plural(n, "entry", "entries") for n in (1, 3)] == ["entry", "entries"]
    assert [plural(n, "step was", "steps were") for n in (1, 0)] == ["step was", "steps were"]
