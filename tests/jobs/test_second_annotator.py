"""The effects of a run under a second annotator."""

import json
import shutil

import pytest

from steerable.chains.records import read_jsonl
from steerable.jobs import second_annotator
from steerable.jobs.annotation import annotate_by
from steerable.jobs.second_annotator import reannotate
from steerable.store.errors import UsageError


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_the_same_annotator_by_another_name_sees_the_same(run, tiny_settings):
    result = reannotate(run, annotator="steerable.models.pocket.language:annotate")
    assert json.loads((run / "second_annotator.steerable.models.pocket.language.json").read_text()) == result
    first, second = result["annotators"]
    assert first == json.loads((run / "config.json").read_text())["annotator"]
    cells = json.loads((run / "cells.json").read_text())
    assert {e["behaviour"] for e in result["effects"]} == {c["behaviour"] for c in cells}
    for effect in result["effects"]:
        assert set(effect["fractions"][first]) == {"unsteered", "steered", "random", "shuffled"}
        if first == "pocket":
            for kind, share in effect["fractions"][first].items():
                assert share == pytest.approx(effect["fractions"][second][kind]), kind
            assert effect["outside"][first] == effect["outside"][second]
            for kind, gap in effect["above_control"][first].items():
                assert gap == pytest.approx(effect["above_control"][second][kind])


def test_another_annotator_reads_the_same_chains(run):
    """The oracle labels the steered cell's chains itself and counts letters."""
    result = reannotate(run)
    from steerable.chains.annotators.keyword_rules import keywords

    effect = result["effects"][0]
    cell = f"{effect['behaviour']}.{effect['strength']:+g}"
    chains = read_jsonl(run / f"steered/{cell}.jsonl", "chain")
    has_any = any(s["label"] == effect["behaviour"] for s in annotate_by("keywords", keywords, chains))
    assert (effect["fractions"]["keywords"]["steered"][0] > 0) == has_any
    assert "of" in second_annotator.summary(result) and second_annotator.table(result).row_count == 2 * len(
        result["effects"]
    )


@pytest.mark.parametrize(
    ("strength", "steered", "outside"),
    [
        (1, [0.5, 0.4, 0.6], True),
        (1, [0.5, 0.25, 0.6], False),
        (-1, [0.1, 0.0, 0.15], True),
        (-1, [0.1, 0, 0.25], False),
    ],
)
def test_outside_both_controls(strength, steered, outside):
    shares = {"steered": steered, "random": [0.25, 0.2, 0.3], "shuffled": [0.2, 0.18, 0.28]}
    assert second_annotator._is_outside(shares, None, strength) is outside
    assert not second_annotator._is_outside(shares | {"shuffled": None}, None, strength)


@pytest.mark.parametrize(
    ("strength", "random", "outside"),
    [
        (1, [0.2, 0.1, 0.3], True),
        (1, [0.2, 0.0, 0.3], False),
        (-1, [-0.2, -0.3, -0.1], True),
        (-1, [0.2, 0.1, 0.3], False),
    ],
)
def test_beyond_both_controls_by_paired_differences(strength, random, outside):
    above = {"random": random, "shuffled": [0.1 * strength, 0.01 * strength, 0.2 * strength]}
    assert second_annotator._is_outside({}, above, strength) is outside
    assert not second_annotator._is_outside({}, above | {"shuffled": None}, strength)


def test_an_older_run_is_read_by_its_own_rule(run):
    cells = json.loads((run / "cells.json").read_text())
    (run / "cells.json").write_text(json.dumps([{k: v for k, v in c.items() if k != "above_control"} for c in cells]))
    for effect in reannotate(run)["effects"]:
        assert set(effect["above_control"].values()) == {None}


def test_wrong_input(run, tmp_path):
    with pytest.raises(UsageError, match="is no run folder"):
        reannotate(tmp_path / "none")
    annotator = json.loads((run / "config.json").read_text())["annotator"]
    with pytest.raises(UsageError, match="the run itself was annotated by"):
        reannotate(run, annotator=annotator)
    with pytest.raises(UsageError, match="has no label"):
        reannotate(run, annotator="cues:seal")
    (run / "cells.json").unlink()
    with pytest.raises(UsageError, match="has no cells yet"):
        reannotate(run)


def test_a_cell_that_is_not_there_is_one_sentence():
    with pytest.raises(UsageError, match="no cell of doubt at strength -1, as selection.json says: run the stages"):
        second_annotator._row([], "doubt", -1.0, None, [3], "all")
