import errno
import os

import pytest

from steerable.chains.records import read_jsonl, write_jsonl
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import write_atomic

TASK = {"id": "a", "prompt": "é \u2028 ?", "extra": [1, {"b": None}]}
CHAIN = {"task_id": "a", "sample": 0, "thinking": "x", "answer": "", "closed": True, "tokens": 3}
SPAN = {"task_id": "a", "sample": 0, "label": "deduction", "start": 0, "end": 1}


@pytest.mark.parametrize(("kind", "record"), [("task", TASK), ("chain", CHAIN), ("span", SPAN)])
def test_round_trip_keeps_unknown_keys_and_bytes(tmp_path, kind, record):
    path = write_jsonl(tmp_path / "deep" / "r.jsonl", [record, {**record, "new": "\ud800"}])
    read = read_jsonl(path, kind)
    assert read[0] == record and read[1]["new"] == "\ud800"
    before = path.read_bytes()
    assert write_jsonl(path, read).read_bytes() == before
    assert os.listdir(path.parent) == ["r.jsonl"]


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", "task", "is empty"),
        (b"\n \n", "chain", "is empty"),
        (b'{"id":"a","prompt":"b"}\n\n{"id":', "task", "line 3 is not valid JSON"),
        (b'{"id":"a","prompt":"b","x":NaN}', "task", "line 1 is not valid JSON"),
        (b'{"id":"\xff"}', "task", "line 1 is not valid JSON"),
        (b"[1]", "task", "expected a JSON object"),
        (b'{"id":"a"}', "task", "no key 'prompt'"),
        (b'{"id":1,"prompt":"b"}', "task", "'id' is 1, expected text"),
        (b'{"task_id":"a","sample":true}', "chain", "'sample' is true, expected a whole number"),
        (b'{"task_id":"a","sample":0,"label":"b","start":3,"end":3}', "span", "0 <= start < end"),
    ],
)
def test_broken_files_are_refused_in_one_sentence(tmp_path, data, kind, message):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_jsonl(path, kind)
    assert "\n" not in str(caught.value) and "broken.jsonl" in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="cannot read"):
        read_jsonl(tmp_path)


def test_byte_order_mark_and_empty_span_file(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id":"a","prompt":"b"}\r\n')
    assert read_jsonl(path, "task") == [{"id": "a", "prompt": "b"}]
    path.write_bytes(b"")
    assert read_jsonl(path, "span") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold(tmp_path, value):
    with pytest.raises(SteerableError, match="cannot be written"):
        write_jsonl(tmp_path / "f.jsonl", [{"a": value}])
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "f.txt", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SteerableError, match="disk is full") as caught:
        write_atomic(path, "new")
    assert not isinstance(caught.value, UsageError)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f.txt"]


def test_interrupt_removes_the_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "f.txt", "new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [None, "12", [1, "2"], [True], [-1], [1.0], {}])
@pytest.mark.parametrize("key", ["ids", "prompt_ids"])
def test_ids_of_a_chain_are_whole_numbers(tmp_path, key, value):
    chain = {"task_id": "t", "sample": 0, "thinking": "a", "answer": "", "closed": True, "tokens": 1}
    path = write_jsonl(tmp_path / "c.jsonl", [chain | {key: [0, 5]}, chain | {key: value}])
    with pytest.raises(UsageError, match=f"line 2: '{key}' is .*, expected a list of token ids"):
        read_jsonl(path, "chain")
    assert read_jsonl(write_jsonl(path, [chain | {key: [0, 5]}, chain]), "chain")[0][key] == [0, 5]
