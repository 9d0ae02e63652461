"""The writer of smol-think's chains: what it says is true, and its errors are those of haste and of giving up."""

import re
from collections import Counter

import pytest
import reasoning_gym

from steerable.chains.gym import gym_score
from steerable.chains.records import LABELS, STEERABLE
from steerable.jobs.taught_models import equations
from steerable.models.smol import language, writer
from steerable.models.smol.families import FAMILIES

CHAINS = 250


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def entries(family):
    dataset = reasoning_gym.create_dataset(family, size=10**6, seed=5, **FAMILIES[family])
    return [dataset[i] for i in range(CHAINS)]


@pytest.fixture(scope="module")
def written(family, entries):
    pairs = [(entry, writer.write_chain(family, entry, seed=i)) for i, entry in enumerate(entries)]
    return [(entry, chain) for entry, chain in pairs if chain]


def test_nearly_every_task_is_written_and_most_answers_are_right(written):
    assert len(written) > 0.98 * CHAINS
    right = sum(gym_score(entry, chain["answer"]) == 1.0 for entry, chain in written) / len(written)
    assert 0.55 < right < 0.9


def test_a_careful_and_patient_writer_is_always_right(family, entries, monkeypatch):
    monkeypatch.setattr(writer, "CARELESS", 0.0)
    monkeypatch.setattr(writer, "_TRIES", (2000,) * len(writer._TRIES))
    for i, entry in enumerate(entries[:120]):
        if chain := writer.write_chain(family, entry, seed=i):
            assert gym_score(entry, chain["answer"]) == 1.0, chain["thinking"]


def test_a_careless_one_errs_more_often(family, entries, monkeypatch):
    def right():
        chains = ((entry, writer.write_chain(family, entry, seed=i)) for i, entry in enumerate(entries))
        return sum(gym_score(entry, chain["answer"]) == 1.0 for entry, chain in chains if chain)

    monkeypatch.setattr(writer, "CARELESS", 0.0)
    careful = right()
    monkeypatch.setattr(writer, "CARELESS", 1.0)
    assert right() < careful


def test_equations_are_true_and_the_tasks_numbers_are_named(written):
    for entry, chain in written:
        assert equations(chain["thinking"])[1] == 0, chain["thinking"]
        assert set(re.findall(r"\d+", entry["question"])) <= set(re.findall(r"\d+", chain["thinking"]))


def test_the_annotator_knows_every_sentence(written):
    for _, chain in written:
        spans = language.annotate({"task_id": "t", "sample": 0, "thinking": chain["thinking"]})
        assert [span["label"] for span in spans] == chain["labels"]


def test_moods_stick_and_every_behaviour_has_room(written):
    labels = [chain["labels"] for _, chain in written]
    counts = Counter(label for row in labels for label in row)
    assert set(counts) == set(LABELS)
    for behaviour in STEERABLE:
        assert 0.04 < counts[behaviour] / counts.total() < 0.35
        chains = sum(behaviour in row for row in labels) / len(labels)
        # being in it predicts more of it: a chain that has it once has it more often than chance would have it
        again = sum(row.count(behaviour) > 1 for row in labels) / sum(behaviour in row for row in labels)
        assert again > chains


def test_a_chain_is_a_function_of_entry_and_seed(family, entries):
    one, two, other = (writer.write_chain(family, entries[0], seed=s) for s in (1, 1, 2))
    assert one == two != other


def test_what_cannot_be_solved_is_left_out():
    entry = {"metadata": {"equation": "4 - 0*x = 4", "variable": "x"}}
    assert writer.write_chain("simple_equations", entry, seed=0) is None
    same = {"question": "Bo likes tea. Bo likes jam. \nWho likes jam? Reply only with a name."}
    assert writer.write_chain("needle_haystack", same, seed=0) is None
