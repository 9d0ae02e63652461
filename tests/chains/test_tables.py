"""Task files and data sets in the formats that people really have."""

import csv
import json
from collections import Counter

import pytest

from steerable.chains import sources
from steerable.chains.judging import judge
from steerable.chains.records import write_jsonl
from steerable.chains.tables import parse_source, read_tasks, task_of
from steerable.chains.tasks import make_splits, make_tasks
from steerable.store.errors import SteerableError, UsageError

GSM8K = {"question": "2+2?", "answer": "It is 2+2=<<2+2=4>>4 and\n#### 1,004"}
MATH = {"problem": "1/2+1/2?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{\frac{2}{2}}$."}


def task(row, **columns):
    return task_of(row, columns, number=7, name="set", source="set.jsonl", where="set.jsonl, record 8")


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (
            GSM8K,
            {
                "id": "set-7",
                "prompt": "2+2?",
                "answer": "1,004",
                "category": "all",
                "solution": "It is 2+2=4 and\n#### 1,004",
            },
        ),
        (MATH, {"prompt": "1/2+1/2?", "category": "Algebra", "answer": r"\frac{2}{2}", "level": "Level 1"}),
        ({"Problem": "p?", "Answer": 25, "ID": "2024-I-1"}, {"id": "2024-I-1", "prompt": "p?", "answer": "25"}),
        (
            {"unique_id": "test/a/1.json", "problem": "p?", "answer": "3", "subject": "Algebra", "level": 2},
            {"id": "test/a/1.json", "category": "Algebra", "level": 2},
        ),
        ({"id": 3, "input": "p?", "target": 1.5}, {"id": "3", "answer": "1.5"}),
        ({"query": "p?", "label": "yes"}, {"answer": "yes"}),
        ({"question": "p?", "final_answer": ["$2$", "3"]}, {"answer": "2, 3"}),
        ({"problem": "p?", "solution": "A long proof without a mark.\nIt ends."}, {"answer": None}),
        ({"problem": "p?", "solution": "7"}, {"answer": "7"}),
        ({"question": "p?", "answer": None}, {"answer": None}),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p?"}]},
            {"prompt": "p?", "answer": None},
        ),
        (
            {"question": "Which?", "choices": ["red", "blue"], "answer": 1},
            {"prompt": "Which?\n\nA. red\nB. blue", "answer": "B"},
        ),
        (
            {"question": "Which?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"},
            {"prompt": "Which?\n\n1. red\n2. blue"},
        ),
        ({"prompt": "p?", "source": "a book", "extra": {"a": 1}}, {"source": "a book", "extra": {"a": 1}}),
        ({"prompt": "p?", "picture": b"\x00", "score": float("nan")}, {"picture": None, "score": None}),
    ],
)
def test_fields_as_people_name_them(row, wanted):
    found = task(row)
    assert {key: found.get(key) for key in wanted} == wanted
    json.dumps(found, allow_nan=False)


def test_columns_by_name():
    row = {"Body": "There are 3 sheep.", "Question": "How many?", "Equation": "3", "Answer": "4", "Type": "sub"}
    found = task(row, prompt="Body+Question", answer="Equation", category="", id="Answer")
    assert found["prompt"] == "There are 3 sheep.\nHow many?" and found["answer"] == "3"
    assert found["category"] == "all" and found["id"] == "4"
    with pytest.raises(UsageError, match="has no column 'Nothing': there are Body, Question"):
        task(row, prompt="Body+Nothing")
    with pytest.raises(UsageError, match=r"has no prompt.*set.jsonl\?prompt=COLUMN"):
        task({"text": "x"})


def test_source_options():
    assert parse_source("a.csv?prompt=Body+Question&split=test") == (
        "a.csv",
        {"prompt": "Body+Question", "split": "test"},
    )
    assert parse_source("what?.jsonl") == ("what?.jsonl", {})
    with pytest.raises(UsageError, match="'promt' in .* is no option"):
        parse_source("a.csv?promt=x")


@pytest.mark.parametrize(
    ("name", "n", "categories"),
    [("gsm8k/test.jsonl", 1319, 1), ("math/math500.jsonl", 500, 7), ("math/aime24.jsonl", 30, 1)]
    + [("math/math_train_rllm.json", 7474, 7)],
)
def test_published_sets_in_their_own_formats(name, n, categories, shared):
    groups = read_tasks(str(shared / "data" / name), 0)
    tasks = [task for group in groups.values() for task in group]
    assert len(tasks) == len({task["id"] for task in tasks}) == n and len(groups) == categories
    assert all(task["prompt"].strip() and "<<" not in task.get("solution", "") for task in tasks)
    assert sum("answer" in task for task in tasks) >= n - 4  # four of the training set of MATH have none


def test_splits_of_a_published_set(shared):
    path = str(shared / "data/math/math500.jsonl")
    tasks = make_splits(path, {"extraction": 70, "evaluation": 21}, seed=1)
    assert Counter(Counter((t["split"], t["category"]) for t in tasks).values()) == {10: 7, 3: 7}
    assert make_splits(path, {"extraction": 70, "evaluation": 21}, seed=1) == tasks
    assert make_splits(path, {"extraction": 70, "evaluation": 21}, seed=2) != tasks


def test_truthfulqa_is_any_csv(shared):
    tasks = make_tasks(str(shared / "data/truthfulqa/TruthfulQA.csv"), 20)
    assert all(task["answer"] == task["Best Answer"] if "Best Answer" in task else task["answer"] for task in tasks)
    assert len({task["category"] for task in tasks}) == 20


def test_splits_share_no_task_in_another_spelling(tmp_path):
    spellings = ["What is {} plus 1?", "what is  {} plus 1", "1. What is {} plus 1?", "\u201cWhat is {} plus 1?\u201d"]
    write_jsonl(
        tmp_path / "t.jsonl",
        [{"id": f"{i}-{k}", "prompt": text.format(i)} for i in range(20) for k, text in enumerate(spellings)],
    )
    source = str(tmp_path / "t.jsonl")
    for seed in range(3):
        tasks = make_splits(source, {"a": 10, "b": 6, "c": 4}, seed)
        assert {task["id"].split("-")[0] for task in tasks} == {str(i) for i in range(20)}
    with pytest.raises(UsageError, match="gives only 4 more distinct tasks, but 5 were asked for"):
        make_splits(source, {"a": 10, "b": 6, "c": 5})


@pytest.mark.parametrize("form", ["array", "object", "lines"])
def test_json(tmp_path, form):
    rows = [GSM8K, MATH]
    text = {"array": json.dumps(rows), "object": json.dumps({"version": 1, "data": rows})}
    path = tmp_path / "t.json"
    path.write_text(text.get(form) or "\n".join(map(json.dumps, rows)))
    assert {t["id"] for t in make_tasks(str(path), 2)} == {"t-0", "t-1"}


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_csv(tmp_path, suffix, delimiter):
    path = tmp_path / f"t.{suffix}"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([["Question", "Answer", "Type"], ['Say "a, b"\nnow?', "1,000", "x"], ["p?", "", "y"]])
    found = {task["category"]: task for task in make_tasks(str(path), 2)}
    assert found["x"]["prompt"] == 'Say "a, b"\nnow?' and judge(found["x"], "1000").score == 1
    assert "answer" not in found["y"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "question,answer\na,b,c\n", "line 2: the number of fields"),
        ("t.csv", "question,answer\na\n", "line 2: the number of fields"),
        ("t.csv", "question\n", "is empty"),
        ("t.csv", b"question\n\xff\n", "is no CSV file in UTF-8"),
        ("t.json", "[1, 2]", "holds no list of objects"),
        ("t.json", "{broken", "is not valid JSON"),
        ("t.jsonl", '{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', "two tasks with the id 'a'"),
        ("t.jsonl", '{"prompt": 5}', "record 1 has no prompt"),
        ("t.jsonl", "", "is empty"),
        ("t.parquet", "no parquet", "cannot read .* as a data set"),
        ("t.arrow", "no arrow", "cannot read .* as a data set"),
        ("t.txt", "x", "unknown task source"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        make_tasks(str(path), 1)


def test_missing_files(tmp_path):
    for name in ("t.csv", "t.json", "t.jsonl", "t.parquet", "t.arrow"):
        with pytest.raises(UsageError, match="there is no file"):
            make_tasks(str(tmp_path / name), 1)
    with pytest.raises(UsageError, match="is empty"):
        make_tasks(str(tmp_path), 1)


# --- local copies in the formats of `datasets` ---


@pytest.fixture
def rows():
    return [{"question": f"{i}+1?", "answer": f"#### {i + 1}", "note": None} for i in range(12)]


@pytest.fixture
def data():
    return pytest.importorskip("datasets")


@pytest.mark.parametrize("form", ["table", "splits", "parquet", "parquet folder", "jsonl folder", "arrow"])
def test_local_copies(form, rows, data, tmp_path, monkeypatch):
    monkeypatch.setattr(data.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = data.Dataset.from_list(rows)
    place = tmp_path / "gsm"
    if form == "table":
        table.save_to_disk(str(place))
    elif form == "splits":
        data.DatasetDict({"train": data.Dataset.from_list(rows[:2]), "test": table}).save_to_disk(str(place))
    elif form == "parquet":
        place = tmp_path / "gsm.parquet"
        table.to_parquet(str(place))
    elif form == "parquet folder":  # as a clone of a repository of the hub
        (place / "main").mkdir(parents=True)
        table.to_parquet(str(place / "main/test-00000-of-00001.parquet"))
        data.Dataset.from_list(rows[:3]).to_parquet(str(place / "main/train-00000-of-00001.parquet"))
        head = "configs:\n- config_name: main\n  data_files:\n"
        splits = "".join(f"  - split: {s}\n    path: main/{s}-*\n" for s in ("train", "test"))
        (place / "README.md").write_text(f"---\n{head}{splits}---\n# A set\n")
        assert len(make_tasks(f"{place}?split=train", 3)) == 3
        with pytest.raises(UsageError, match="has no split 'dev': name one of train, test"):
            make_tasks(f"{place}?split=dev", 3)
        with pytest.raises(UsageError, match="onfig"):
            make_tasks(f"{place}?config=nothing", 3)
    elif form == "jsonl folder":
        place.mkdir()
        write_jsonl(place / "train.jsonl", rows)
    else:
        table.save_to_disk(str(place))
        place = next(place.glob("*.arrow"))
    tasks = make_tasks(str(place), 12)
    assert {(t["prompt"], t["answer"]) for t in tasks} == {(f"{i}+1?", str(i + 1)) for i in range(12)}
    assert not any(form.startswith("parquet") for _ in (tmp_path / "cache").glob("**/*.arrow"))


def test_several_splits_need_a_name(rows, data, tmp_path):
    tables = {"train": data.Dataset.from_list(rows), "dev": data.Dataset.from_list(rows)}
    data.DatasetDict(tables).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UsageError, match="has no split 'test': name one of train, dev"):
        make_tasks(str(tmp_path / "d"), 1)


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("gsm8k", ("openai/gsm8k", "main", "test")),
        ("gsm8k:train", ("openai/gsm8k", "main", "train")),
        ("math500", ("HuggingFaceH4/MATH-500", None, "test")),
        ("hf:org/some.set", ("org/some.set", None, None)),
        ("hf:org/set:train", ("org/set", None, "train")),
        ("hf:org/set:hard", ("org/set", "hard", None)),
        ("hf:org/set:hard:train", ("org/set", "hard", "train")),
        ("hf:org/set?config=hard&split=train", ("org/set", "hard", "train")),
    ],
)
def test_names_of_the_hub(source, called, monkeypatch):
    found = []
    monkeypatch.setattr(sources, "_from_hub", lambda *a: found.append(a) or [GSM8K])
    assert make_tasks(source, 1)[0]["answer"] == "1,004"
    identity, options = found[0]
    assert (identity, options.get("config"), options.get("split")) == called


def test_without_a_network_one_sentence_says_what_to_do(data, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(data.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(data.config, "HF_DATASETS_CACHE", tmp_path)
    for source in ("gsm8k", "hf:nobody/nothing"):
        with pytest.raises(SteerableError, match="hub was not reached: connect once, or give the path of a local copy"):
            make_tasks(source, 1)
    with pytest.raises(UsageError, match="is no data set of the hub"):
        make_tasks("hf:a:b:c:d", 1)
