"""The figures of the model's card, on chains whose figures are known."""

from types import SimpleNamespace

import pytest

from steerable.chains import generation
from steerable.chains.records import LABELS
from steerable.jobs import taught_models as measure
from steerable.models import loading as models
from steerable.models.pocket import solver
from steerable.models.pocket.families import FAMILIES
from steerable.store.errors import UsageError


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("So 3 * 4 = 12.", (1, 0)),
        ("3 * 4 = 13", (1, 1)),
        ("Try 9 - 4 = 5. Then 5 + 5 = 11, so what?", (2, 1)),
        ("12 / 5 = 2.", (1, 1)),
        ("12 / 0 = 0.", (1, 1)),
        ("0 / 5 = 0.", (1, 0)),
        ("3 - 5 = -2.", (1, 0)),
        ("Test case: 28 / 2 = 14.\n\n2 + 2 = 5", (2, 1)),
        ("x = 4", (0, 0)),
        ("Okay, I need to find y in 6*y + 3 = 15.", (0, 0)),
        ("6 * y + 3 = 15 and 3 + 6 * y = 15", (0, 0)),
        ("5 - 2 + 3 = 6", (0, 0)),
        ("5 - 2 = 3 + 0", (0, 0)),
        ("1 + 1 = 2 = 2", (0, 0)),
        ("(1 + 2) * 3 = 9 and 2 * (1 + 2) = 6", (0, 0)),
        ("-3 + 5 = 2", (0, 0)),
        ("1.5 + 1 = 3 and 1 + 1 = 2.5", (0, 0)),
        ("a3 + 1 = 4, 3 + 1 = 4b", (0, 0)),
        ("The answer is 2 × 3.", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_equations(text, counts):
    assert measure.equations(text) == counts


def chain(task, sample, thinking, answer="6", closed=True):
    return {
        "task_id": task, "sample": sample, "thinking": thinking, "answer": answer, "closed": closed,
        "tokens": len(thinking.split()) + 3,
    }  # fmt: skip


def test_figures_of_known_chains(pocket_tokenizer):
    tasks = [{"id": f"t{i}", "prompt": f"{i}", "category": f"family {i % 2}", "answer": "6"} for i in range(4)]
    good, doubt = "So 2 * 3 = 6. The answer is 6.\n", "Maybe this is wrong. So 2 * 3 = 7.\n"
    chains = [
        *(chain("t0", s, good) for s in range(4)),
        *(chain("t1", s, good, "6" if s == 0 else "7") for s in range(4)),
        chain("t2", 0, doubt, closed=False),
        chain("t3", 0, "Bananas are yellow. " + good, " \n"),
    ]
    found = measure.figures(tasks, chains, pocket_tokenizer)
    assert (found["tasks"], found["chains"], found["families"], found["equations"]) == (4, 10, 2, 10)
    assert found["tokens_generated"] == sum(c["tokens"] for c in chains)
    assert found["pass_tasks"] == {"pass@1": 4, "pass@4": 2, "pass@8": 0, "pass@32": 0}
    assert found["pass"]["family 0"]["pass@1"][0] == 0.5
    assert found["pass"]["family 1"]["pass@1"][0] == 0.125
    assert found["pass"]["mean"]["pass@1"][0] == pytest.approx(1.25 / 4)
    assert found["pass"]["mean"]["pass@4"] == [1.0, 1.0, 1.0]
    assert found["pass"]["mean"]["pass@32"] is None
    # t2 did not close, and t3 closed without an answer
    assert found["closed_and_answered"][0] == 0.5
    assert found["wrong_equations"][0] == 0.25
    ink = len("".join(good.split()))
    assert found["coverage"][0] == pytest.approx((3 + ink / (ink + len("Bananasareyellow."))) / 4)
    assert set(found["fractions"]) == set(LABELS)
    assert sum(value[0] for value in found["fractions"].values()) == pytest.approx(1)
    assert 0.05 < found["fractions"]["uncertainty-estimation"][0] < 0.25
    low, high = found["pass"]["mean"]["pass@1"][1:]
    assert 0 <= low < 1.25 / 4 < high <= 1


def test_slices_change_nothing(pocket_tokenizer, monkeypatch):
    tasks = [{"id": "t", "prompt": "", "category": "f", "answer": "6"}]
    chains = [chain("t", s, "So 2 * 3 = 6. " * (s + 1)) for s in range(7)]
    whole = measure.figures(tasks, chains, pocket_tokenizer)
    monkeypatch.setattr(measure, "_SLICE", 3)
    assert measure.figures(tasks, chains, pocket_tokenizer) == whole


def test_targets_say_what_is_met():
    found = {
        "pass": {"mean": {"pass@1": [0.5, 0.4, 0.6], "pass@32": None}},
        "wrong_equations": [0.03, 0.02, 0.04],
        "closed_and_answered": [0.97, 0.96, 0.98],
        "fractions": dict.fromkeys(LABELS, [0.04, 0.03, 0.05]) | {"backtracking": [0.36, 0.3, 0.4]},
    }
    met = {target["what"]: target["met"] for target in measure.targets(found)}
    assert met == {
        "pass@1, mean of families": True,
        "pass@32, mean of families": None,
        "wrong equations": False,
        "closed and answered": True,
        "adding-knowledge": True,
        "example-testing": True,
        "uncertainty-estimation": True,
        "backtracking": False,
    }


@pytest.fixture
def writer_for_model(monkeypatch, pocket_tokenizer):
    """The writer of the training chains in the model's place."""

    def write(loaded, jobs, *, seed, workers, progress):
        made = []
        for job in jobs:
            made.append([])
            for task in job.tasks:
                for sample in job.samples:
                    request = generation.request_seed(seed, task["id"], sample)
                    written = solver.write_chain(task["category"], task["entry"], request)
                    text, answer = (written["thinking"], written["answer"]) if written else ("", "")
                    made[-1].append(chain(task["id"], sample, text, answer))
                    progress(1, 100)
        return made

    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="somewhere"))
    monkeypatch.setattr(models, "load", lambda name: models.Loaded(model, pocket_tokenizer))
    monkeypatch.setattr(measure, "generate_jobs", write)


def test_the_writer_keeps_every_promise_but_the_unsolvable(writer_for_model):
    found = measure.measure_pocket("writer", tasks=12, samples=32, deep=5)
    assert found["chains"] == 4 * (5 * 32 + 7 * measure.FEW)
    assert found["pass_tasks"] == {"pass@1": 48, "pass@4": 48, "pass@8": 20, "pass@32": 20}
    assert list(found["pass"]) == [*FAMILIES, "mean"]
    assert found["wrong_equations"][0] == 0 and found["megabytes"] is None
    assert found["coverage"][0] > 0.9  # an unsolvable task has no chain
    assert found["pass"]["mean"]["pass@32"][0] > 0.9
    text = measure.table(found)
    for part in ("12 unseen tasks in each of 4 families", "prime_factorization", "backtracking", "30% to 75%"):
        assert part in text
    assert "tasks a family       12" in text
    assert max(map(len, text.splitlines())) < 120


def test_few_samples_leave_figures_unmeasured(writer_for_model):
    found = measure.measure_pocket("writer", tasks=2, samples=2, deep=None)
    assert found["chains"] == 16 and found["pass"]["mean"]["pass@4"] is None
    assert "pass@4" not in measure.table(found) and "not measured" in measure.table(found)


@pytest.mark.slow
def test_more_tasks_than_a_family_has(writer_for_model):
    with pytest.raises(UsageError, match="prime_factorization gives only"):
        measure.measure_pocket("writer", tasks=400, samples=1)
