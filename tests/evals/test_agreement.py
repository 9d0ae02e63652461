"""Against scikit-learn on characters written out one by one, and closed forms."""

import io
import json
import random

import numpy as np
import pytest
from rich.console import Console
from sklearn import metrics

from steerable.chains.annotators.cue_files import SEAL_LABELS
from steerable.chains.records import LABELS, write_jsonl
from steerable.evals.agreement import (
    UNLABELLED,
    agreement_tables,
    cohen_kappa,
    measure_agreement,
    measure_agreement_of_files,
)
from steerable.store.errors import UsageError


def span(task, start, end, label, sample=0):
    return {"task_id": task, "sample": sample, "label": label, "start": start, "end": end}


def drawn(rng, chains, labels, noise=None):
    """Spans of all chains; with `noise`, a copy of those with borders and labels changed now and then."""
    spans = []
    for chain in chains:
        at = 0
        while at < len(chain["thinking"]) - 1:
            end = min(at + rng.randint(1, 12), len(chain["thinking"]))
            if rng.random() < 0.8:
                spans.append(span(chain["task_id"], at, end, rng.choice(labels), chain["sample"]))
            at = end
    if noise is None:
        return spans
    changed = []
    for old in noise:
        new = dict(old)
        if rng.random() < 0.2:
            new["label"] = rng.choice(labels)
        if rng.random() < 0.3:
            new["start"] = max(0, new["start"] - 2)
        if rng.random() < 0.9:
            changed.append(new)
    return changed


def written_out(chains, spans, labels):
    """The label of every visible character, by the plainest loop."""
    found = []
    for chain in chains:
        own = [UNLABELLED] * len(chain["thinking"])
        for s in spans:
            if (s["task_id"], s["sample"]) == (chain["task_id"], chain["sample"]):
                for i in range(s["start"], s["end"]):
                    own[i] = s["label"]
        found += [label for label, character in zip(own, chain["thinking"], strict=True) if not character.isspace()]
    return found


@pytest.fixture(scope="module", params=[LABELS, SEAL_LABELS, ("p", "q")], ids=["six", "seal", "other"])
def case(request):
    rng = random.Random(0)
    texts = ["".join(rng.choice("ab c\n\u2003é") for _ in range(rng.randint(20, 120))) for _ in range(12)]
    chains = [{"task_id": f"t{i // 2}", "sample": i % 2, "thinking": text} for i, text in enumerate(texts)]
    labels = list(request.param)
    a = drawn(rng, chains, labels)
    return chains, a, drawn(rng, chains, labels, noise=a), labels


def test_characters_equal_scikit_learn(case):
    chains, a, b, labels = case
    found = measure_agreement(chains, a, b)
    left, right = written_out(chains, a, labels), written_out(chains, b, labels)
    assert found.labels == tuple(labels)
    assert found.characters == len(left) and found.chains == 12 and found.tasks == 6
    assert (found.confusion == metrics.confusion_matrix(left, right, labels=[*labels, UNLABELLED])).all()
    assert found.kappa == pytest.approx(metrics.cohen_kappa_score(left, right))
    assert found.accuracy == pytest.approx(metrics.accuracy_score(left, right))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(left, right, labels=labels)
    for i, label in enumerate(labels):
        row = found.by_label[label]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision[i], recall[i], f1[i]))
        assert row["a"] == pytest.approx(left.count(label) / len(left))
        assert row["b"] == pytest.approx(right.count(label) / len(left))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(left, right, labels=labels, average="macro"))
    both = [(x, y) for x, y in zip(left, right, strict=True) if UNLABELLED not in (x, y)]
    assert found.kappa_both == pytest.approx(metrics.cohen_kappa_score(*zip(*both, strict=True)))
    covered = [1 - side.count(UNLABELLED) / len(left) for side in (left, right)]
    assert found.coverage == pytest.approx(covered)


def test_spans_equal_a_search_over_all_pairs(case):
    chains, a, b, labels = case
    found = measure_agreement(chains, a, b).spans
    matched = exact = 0
    for x in a:
        for y in b:
            if all(x[k] == y[k] for k in ("task_id", "sample", "label")):
                shared = set(range(x["start"], x["end"])) & set(range(y["start"], y["end"]))
                union = set(range(x["start"], x["end"])) | set(range(y["start"], y["end"]))
                if 2 * len(shared) > len(union):
                    matched += 1
                    exact += shared == union
                    break
    assert (found["a"], found["b"], found["matched"], found["exact"]) == (len(a), len(b), matched, exact)
    assert found["f1"] == pytest.approx(2 * matched / (len(a) + len(b)))
    units = []
    for x in a:
        chain = next(c for c in chains if (c["task_id"], c["sample"]) == (x["task_id"], x["sample"]))
        inside = written_out([chain | {"thinking": chain["thinking"][: x["end"]]}], _cut(b, x["end"]), labels)
        before = written_out([chain | {"thinking": chain["thinking"][: x["start"]]}], _cut(b, x["start"]), labels)
        inside = inside[len(before) :]
        if inside:
            units.append((x["label"], max([*labels, UNLABELLED], key=inside.count)))
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(*zip(*units, strict=True)))


def _cut(spans, end):
    return [s | {"end": min(s["end"], end)} for s in spans if s["start"] < end]


def test_identity_and_independence():
    rng = random.Random(1)
    chains = [{"task_id": f"t{i}", "sample": 0, "thinking": "x" * 200} for i in range(60)]
    a, b = drawn(rng, chains, list(LABELS)), drawn(rng, chains, list(LABELS))
    same = measure_agreement(chains, a, a)
    assert same.kappa == same.macro_f1 == same.accuracy == same.spans["f1"] == same.spans["kappa"] == 1
    assert same.kappa_interval == (1, 1) and same.spans["exact"] == len(a)
    other = measure_agreement(chains, a, b)
    assert abs(other.kappa) < 0.05
    low, high = other.kappa_interval
    assert low < other.kappa < high < 0.1
    assert other.kappa_interval == measure_agreement(chains, a, b).kappa_interval  # seeded
    turned = measure_agreement(chains, b, a)
    assert turned.kappa == pytest.approx(other.kappa) and (turned.confusion == other.confusion.T).all()


def test_the_interval_resamples_tasks_with_all_their_chains():
    # Half of the tasks agree wholly, half not at all; a resample's kappa depends on how many of each it drew.
    spans_a, spans_b = [], []
    for task in range(20):
        for sample in range(3):
            for i, label in enumerate(LABELS[:2]):
                spans_a.append(span(f"t{task}", 10 * i, 10 * i + 10, label, sample))
                other = label if task < 10 else LABELS[1 - i]
                spans_b.append(span(f"t{task}", 10 * i, 10 * i + 10, other, sample))
    found = measure_agreement(None, spans_a, spans_b)
    assert found.kappa == pytest.approx(0)
    # kappa = 2 * share - 1 and share ~ Binomial(20, 1/2) / 20, whose 2.5 % and 97.5 % points are 6/20 and 14/20
    assert found.kappa_interval == pytest.approx((-0.4, 0.4), abs=0.11)  # a task more or less
    one = measure_agreement(None, spans_a[:2], spans_b[:2])
    assert one.kappa_interval is None


def test_cohen_kappa_closed_form():
    assert cohen_kappa(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)  # the textbook's example
    assert cohen_kappa(np.zeros((2, 2))) is None
    assert cohen_kappa(np.array([[7, 0], [0, 0]])) is None  # one category only: chance agrees as well


def test_without_chains_only_labelled_characters_count():
    a, b = [span("t", 0, 10, LABELS[0]), span("t", 20, 30, LABELS[1])], [span("t", 5, 10, LABELS[0])]
    found = measure_agreement(None, a, b)
    assert found.characters == 20 and found.coverage == (1.0, 0.25) and found.accuracy == 0.25
    chains = [{"task_id": "t", "sample": 0, "thinking": "x" * 40}]
    assert measure_agreement(chains, a, b).characters == 40


def test_chains_of_one_side_are_left_out_and_counted():
    a = [span("t", 0, 10, LABELS[0]), span("u", 0, 10, LABELS[0]), span("u", 0, 10, LABELS[0], 1)]
    b = [span("t", 0, 10, LABELS[1]), span("v", 0, 10, LABELS[0])]
    found = measure_agreement(None, a, b)
    assert (found.chains, found.tasks, found.only_a, found.only_b, found.characters) == (1, 1, 2, 1, 10)
    assert found.accuracy == 0 and found.by_label["backtracking"]["f1"] is None


@pytest.mark.parametrize(
    "a, b, options, message",
    [
        ([("t", 0, 5, "p")], [("t", 0, 5, "q")], {}, "no label in common"),
        ([("t", 0, 5, "p")], [("u", 0, 5, "p")], {}, "no chain in common"),
        ([("t", 0, 5, "p")], [("t", 0, 5, "q")], {"labels": ["p"]}, "unknown label 'q'"),
        ([("t", 0, 99, "p")], [("t", 0, 5, "p")], {"chains": True}, "only 10 characters"),
        ([("t", 0, 5, "p"), ("x", 0, 5, "p")], [("t", 0, 5, "p")], {"chains": True}, "not among the chains"),
        ([("t", 5, 5, "p")], [("t", 0, 5, "p")], {}, "0 <= start < end"),
        ([("t", 0, 10**12, "p")], [("t", 0, 5, "p")], {}, "expected at most"),
    ],
)
def test_what_cannot_be_compared_is_said(a, b, options, message):
    chains = [{"task_id": "t", "sample": 0, "thinking": "0123456789"}] if options.pop("chains", None) else None
    with pytest.raises(UsageError, match=message):
        measure_agreement(chains, [span(*s) for s in a], [span(*s) for s in b], **options)


def test_files_json_and_tables(case, tmp_path):
    chains, a, b, labels = case
    whole = {"answer": "", "closed": True, "tokens": 1}
    paths = [
        write_jsonl(tmp_path / name, records)
        for name, records in (("a.jsonl", a), ("b.jsonl", b), ("chains.jsonl", [c | whole for c in chains]))
    ]
    found = measure_agreement_of_files(*paths)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["kappa"] == measure_agreement(chains, a, b).kappa and plain["confusion"] == found.confusion.tolist()
    labelled = {(s["task_id"], s["sample"], i) for s in a + b for i in range(s["start"], s["end"])}
    assert measure_agreement_of_files(*paths[:2]).characters == len(labelled)  # white space in spans counts as well
    console = Console(width=160, record=True, file=io.StringIO())
    for table in agreement_tables(found):
        console.print(table)
    shown = console.export_text()
    assert f"{found.kappa:.3f} [{found.kappa_interval[0]:.3f}, {found.kappa_interval[1]:.3f}]" in shown
    assert all(label in shown for label in (*labels, UNLABELLED))
