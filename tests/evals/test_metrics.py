import pytest

from steerable.chains.records import LABELS
from steerable.evals.cells import differences, measure_cell, same_chains, values, wrong_way
from steerable.evals.intervals import unbounded
from steerable.evals.metrics import Measured, Metric, all_metrics, label_fractions, loops, measure, register_metric
from steerable.store.errors import SteerableError, UsageError


def span(label, start, end, task="t", sample=0):
    return {"task_id": task, "sample": sample, "label": label, "start": start, "end": end}


def words(text):
    offsets, at = [], 0
    for word in text.split(" "):
        offsets.append((at, at + len(word)))
        at += len(word) + 1
    return offsets


def test_fractions_are_counted_in_tokens_and_sum_to_one():
    offsets = words("aa bbbbbbbb cc dd ee")
    fractions, unlabelled = label_fractions([span("deduction", 0, 11), span("backtracking", 12, 14)], offsets)
    assert set(fractions) == set(LABELS)
    assert fractions["deduction"] == pytest.approx(2 / 3) and fractions["backtracking"] == pytest.approx(1 / 3)
    assert unlabelled == pytest.approx(2 / 5)


def test_a_token_on_a_border_belongs_to_the_label_with_most_of_it():
    # the second token is " wait": its space still belongs to the first span
    fractions, unlabelled = label_fractions(
        [span("deduction", 0, 4), span("backtracking", 4, 8)], [(0, 3), (3, 8), (8, 8)]
    )
    assert fractions["backtracking"] == fractions["deduction"] == 0.5
    assert unlabelled == pytest.approx(1 / 3)


def test_nothing_labelled_is_missing_not_zero():
    assert label_fractions([], words("a b")) == (None, 1.0)
    assert label_fractions([], []) == (None, 0.0)


@pytest.mark.parametrize("bad", [span("summarizing", 0, 1), span("deduction", 2, 2), span("deduction", -1, 2)])
def test_bad_spans(bad):
    with pytest.raises(SteerableError):
        label_fractions([bad], words("a b c"))


def test_loops():
    assert loops(list(range(30))) == 0 and loops([1] * 7) == 0 and loops([]) == 0
    assert loops([1] * 27) == pytest.approx(1 - 1 / 20)


@pytest.fixture
def chains():
    closed = {
        "task_id": "t",
        "sample": 0,
        "thinking": "w1 w2 w3 w4",
        "answer": "7",
        "closed": True,
        "tokens": 9,
    }
    return [
        closed,
        {**closed, "sample": 1, "closed": False, "answer": "7"},
        {**closed, "task_id": "u", "answer": "8"},
    ]


TASKS = [{"id": "t", "prompt": "?", "answer": "7"}, {"id": "u", "prompt": "??", "answer": "7"}]
SPANS = [span("deduction", 0, 5), span("backtracking", 6, 11), span("deduction", 0, 11, sample=1)]


def test_measure_and_cell(chains, tokenizer):
    measured = measure(TASKS, chains, SPANS, tokenizer)
    assert [m.correct for m in measured] == [True, False, False]  # unclosed: no answer
    assert [m.unclosed for m in measured] == [False, True, False]
    assert measured[2].fractions is None
    cell = measure_cell(measured)
    assert (cell["tasks"], cell["samples"], cell["dropped"]) == (2, 1.5, 1)
    assert cell["fractions"]["backtracking"] == unbounded(0.25)  # of one task
    assert cell["accuracy"] == [0.25, 0.0, 0.5] and values(measured, "fractions.deduction") == {"t": 0.75}
    assert sum(interval[0] for interval in cell["fractions"].values()) == pytest.approx(1)
    assert set(all_metrics()) < set(cell) and cell["kl"] is None
    assert measure_cell(measured) == cell  # seeded


def test_empty_cell_and_ungraded_tasks_measure_none(chains, tokenizer):
    empty = measure_cell(measure(TASKS, [], [], tokenizer))
    assert empty["tasks"] == 0 and empty["accuracy"] is None and set(empty["fractions"].values()) == {None}
    ungraded = measure([{"id": "t"}, {"id": "u"}], chains, [], tokenizer)
    assert measure_cell(ungraded)["accuracy"] is None


def drawn(task, right, backtracking):
    """A chain by its task, whether it is right, and its share of backtracking; the rest is deduction."""
    fractions = dict.fromkeys(LABELS, 0.0) | {"backtracking": backtracking, "deduction": 1 - backtracking}
    return Measured({}, {"task_id": task, "sample": 0, "tokens": 9, "closed": True}, [], fractions, 0.0, right, 0.0)


def test_differences_and_the_wrong_way_are_paired_by_task():
    before = [drawn("a", True, 0.1), drawn("b", True, 0.2), drawn("c", False, 0.4), drawn("d", False, 0.0)]
    after = [drawn("a", True, 0.3), drawn("b", False, 0.1), drawn("c", True, 0.4), drawn("e", False, 0.9)]
    pairs = same_chains(after, before)
    assert [m.task_id for m in pairs] == ["a", "b", "c"]
    change = differences(after, pairs)
    assert change["accuracy"][0] == 0 and change["accuracy"][1] < 0 < change["accuracy"][2]
    assert change["tokens"] == [0, 0, 0] and change["kl"] is None
    assert change["fractions"]["backtracking"][0] == pytest.approx(0.1 / 3)
    assert change["fractions"]["deduction"][0] == pytest.approx(-0.1 / 3)
    up, down = (wrong_way(after, pairs, "backtracking", s) for s in (0.5, -0.5))
    assert up["fraction"][0] == pytest.approx(1 / 3), "on b it fell"
    assert down["fraction"][0] == pytest.approx(1 / 3), "on a it rose; c, where nothing moved, is no wrong way"
    assert up["accuracy"] == down["accuracy"] == [pytest.approx(1 / 3), 0.0, 1.0], "b is answered worse"
    assert wrong_way(before, before, "backtracking", 0.0) == {"fraction": None, "accuracy": None}
    assert wrong_way([], [], "backtracking", 1.0) == {"fraction": None, "accuracy": None}


def test_missing_task_and_slow_tokenizer(chains, tokenizer):
    with pytest.raises(UsageError, match="no task 't'"):
        measure([], chains, [], tokenizer)
    with pytest.raises(UsageError, match="fast tokenizer"):
        measure(TASKS, chains, [], object())


def test_a_metric_from_outside_is_in_every_cell(chains, tokenizer, monkeypatch):
    monkeypatch.setattr("steerable.evals.metrics._TABLE", all_metrics())
    words = Metric("words", "Words", "number", lambda m: len(m.chain["thinking"].split()) if m.unclosed else None)
    register_metric(words)
    register_metric(words)  # again: nothing new
    measured = measure(TASKS, chains, SPANS, tokenizer)
    assert measure_cell(measured)["words"] == unbounded(4.0)  # of the unclosed chain alone: None is not zero
    assert differences(measured, measured)["words"] == unbounded(0.0)
    assert measure_cell(measured[:1])["words"] is None
    for name in ("tokens", "fractions"):
        with pytest.raises(UsageError, match=f"an entry '{name}' in every cell already"):
            register_metric(Metric(name, "", "number", len))


def test_an_installed_package_adds_a_metric(chains, tokenizer, install):
    code = (
        "from steerable.evals.metrics import Metric\n"
        "metric = Metric('hesitation', 'Hesitation', 'number', lambda m: m.chain['thinking'].count('w1'))\n"
    )
    install("hesitation", code, "[steerable.metrics]\nhesitation = hesitation:metric\n")
    assert measure_cell(measure(TASKS, chains, SPANS, tokenizer))["hesitation"] == [1.0, 1.0, 1.0]
    install("hesitation", code, "[steerable.metrics]\nhesitation = hesitation:nothing\n")
    with pytest.raises(SteerableError, match="'hesitation' of hesitation in steerable.metrics cannot be loaded"):
        all_metrics()


def test_without_annotation_nothing_is_unlabelled(chains, tokenizer):
    cell = measure_cell(measure(TASKS, chains, None, tokenizer))
    assert cell["unlabelled"] is None and cell["dropped"] == 3
