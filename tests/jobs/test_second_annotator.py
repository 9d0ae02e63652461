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
    assert second_annotator._is_outside(shares, strength) is outside
    assert not second_annotator._is_outside(shares | {"shuffled": None}, strength)


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
