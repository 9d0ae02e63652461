"""Cue files: SEAL's, against an independent reading of its published lists, and files of a user's own."""

import json
import random
import re

import pytest

from steerable.chains.annotators.cue_files import LABEL_SETS, SEAL_LABELS, read_cues, read_labels, seal
from steerable.store.errors import UsageError


def chain(text):
    return {"task_id": "t", "sample": 3, "thinking": text}


# The published lists once more, as one expression each.
REFLECTION = r"(?i)\Await|verify|make sure|hold on|think again|'s correct|'s incorrect|let me check|seems right"
TRANSITION = r"(?i)\Aalternatively|think differenly|another (way|approach|method|solution|strategy|technique)"


@pytest.mark.parametrize(
    "thought, label",
    [
        ("Wait, no.", "reflection"),
        ("So wait.", "execution"),
        ("I should VERIFY it.", "reflection"),
        ("Another way is to verify.", "reflection"),
        ("Alternatively, wait.", "transition"),
        ("Or alternatively so.", "execution"),
        ("I'd think differenly.", "transition"),
        ("There's another technique.", "transition"),
        ("That's correct.", "reflection"),
        ("So 2.", "execution"),
    ],
)
def test_seal_labels(thought, label):
    assert seal.label_of(thought) == label


def test_seal_on_thoughts_by_an_independent_reading():
    rng = random.Random(2)
    cues = [
        "Wait",
        "wait,",
        "verify",
        "make sure",
        "hold on",
        "Alternatively",
        "another way",
        "another idea",
        "so",
        "x = 1",
    ]
    for _ in range(500):
        thoughts = [" ".join(rng.choice(cues) for _ in range(rng.randint(0, 3))) for _ in range(rng.randint(1, 6))]
        text = "\n\n".join(thoughts)
        wanted = [
            (t, "reflection" if re.search(REFLECTION, t) else "transition" if re.search(TRANSITION, t) else "execution")
            for t in (part.strip() for part in text.split("\n\n")[1:])
            if t
        ]
        # a text that begins with a boundary has no text before it
        spans = seal(chain(text))
        assert [(text[s["start"] : s["end"]], s["label"]) for s in spans] == wanted
        assert all(s["label"] in SEAL_LABELS for s in spans)
    assert seal(chain("Wait. No boundary, no thought.")) == []


def write(tmp_path, content):
    path = tmp_path / "cues.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_of_sentences(tmp_path):
    path = write(
        tmp_path, {"labels": {"doubt": {"starts": ["Hmm"], "contains": ["not sure"]}, "sum": {"contains": ["+"]}}}
    )
    annotator = read_cues(path)
    assert annotator.labels == ("doubt", "sum")
    spans = annotator(chain("HMM, 1 + 1? I am NOT sure. It is late.\nSo 1 + 1 = 2."))
    assert [(s["label"], s["start"], s["end"], s["task_id"], s["sample"]) for s in spans] == [
        *(("doubt", 0, 11, "t", 3), ("doubt", 12, 26, "t", 3), ("sum", 39, 52, "t", 3))
    ]
    assert annotator(chain("")) == []


def test_yaml(tmp_path):
    path = write(tmp_path, "labels:\n  doubt: {starts: [hmm]}\notherwise: step\nunit: paragraph\n")
    assert read_cues(path).labels == ("step", "doubt")
    assert read_labels(write(tmp_path, "doing: it carries out a step\n")) == {"doing": "it carries out a step"}
    for content in ("doing: [1]", "a b: c", "{}", "just words"):
        with pytest.raises(UsageError, match="is no file of labels .*: expected JSON or YAML such as"):
            read_labels(write(tmp_path, content))


@pytest.mark.parametrize("path", sorted(LABEL_SETS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files(path):
    annotator = read_cues(path)
    assert len(annotator.labels) >= 3 and "arXiv" in annotator.source
    words = [cue for cues in annotator.cues.values() for cue in (*cues.starts, *cues.contains)]
    for label, cues in annotator.cues.items():  # every cue can be met, and none belongs to two labels
        assert label in [annotator.label_of(cue + "x") for cue in cues.starts]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "expected the node content"),
        ({"labels": {"a/b": {"starts": ["c"]}}}, "up to 64 letters"),
        ({}, "labels"),
        ({"labels": {}}, "labels"),
        ({"labels": {"a": {"start": ["b"]}}}, "labels.a.start"),
        ({"labels": {"a": {"starts": "b"}}}, "labels.a.starts"),
        ({"labels": {"a": {}}, "unit": "word"}, "unit"),
    ],
)
def test_other_files_are_refused(tmp_path, content, complaint):
    with pytest.raises(UsageError, match=f"is no file of cues .*{complaint}.*: expected JSON or YAML such as"):
        read_cues(write(tmp_path, content))
    with pytest.raises(UsageError, match="there is no file"):
        read_cues(tmp_path / "none.json")
