"""Files of pairs in every form, and what is wrong with those that are none."""

import json

import pytest

from steerable.chains.text_pairs import read_pairs
from steerable.store.errors import UsageError

CHAT = [{"role": "user", "content": "How are you?"}]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_forms(tmp_path):
    rows = [{"positive": "yes", "negative": "no"}, {"positive": CHAT, "negative": "not now", "note": 1}]
    expected = (["yes", CHAT], ["no", "not now"])
    for path in (
        write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        write(tmp_path / "a.json", rows),
        write(tmp_path / "b.json", {"positive": expected[0], "negative": expected[1]}),
    ):
        assert read_pairs(path) == expected
    assert read_pairs(write(tmp_path / "a.csv", 'id,positive,negative\n1,"a, b",c\n')) == (["a, b"], ["c"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "yes", "ends in .jsonl"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"positive": "yes"}\n', "pair 1 has no 'negative'"),
        ("a.jsonl", '{"positive": NaN, "negative": "no"}\n', "line 1"),
        ("a.jsonl", '{"positive": null, "negative": "no"}\n', "pair 1, positive is 'None'"),
        ("a.jsonl", '{"positive": "yes", "negative": " "}\n', "pair 1, negative is empty"),
        ("a.jsonl", '{"positive": "\\ud800", "negative": "no"}\n', "no Unicode"),
        ("a.jsonl", '{"positive": [{"content": "yes"}], "negative": "no"}\n', "a role and a content"),
        ("a.json", {"positive": ["yes", "well"], "negative": ["no"]}, "2 positive and 1 negative"),
        ("a.json", {"positive": [], "negative": []}, "no pairs"),
        ("a.csv", "positive,other\nyes,no\n", "pair 1 has no 'negative'.*positive, other"),
        ("a.csv", "positive,negative\nyes\n", "number of fields"),
        ("a.csv", "positive,negative\n", "no pairs"),
        ("a.csv", "positive,positive,negative\na,b,c\n", "two columns 'positive'"),
    ],
)
def test_one_sentence_each(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError, match=message) as error:
        read_pairs(path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        read_pairs(tmp_path / "a.jsonl")
