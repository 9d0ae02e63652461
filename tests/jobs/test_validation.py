"""What a candidate did on the validation tasks, beside the unsteered model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from steerable.evals.metrics import Measured
from steerable.jobs.settings import Config
from steerable.jobs.validation import Validation, outcome
from steerable.steering.direction import Direction
from steerable.steering.site import Site


def chain(task, share, correct=True, loops=0.0, sample=0, closed=True):
    about = {"task_id": task, "sample": sample, "closed": closed, "tokens": 9}
    fractions = None if share is None else {"backtracking": share, "deduction": 1 - share}
    return Measured({"id": task}, about, (), fractions, 0.0, correct, loops)


def test_a_candidate_is_judged_beside_the_unsteered_model_on_its_own_tasks():
    """It fell out after tasks a and b, on which the model without it is right and loops; others went on to c and d."""
    up, down = ([chain(t, share) for t in "ab"] for share in (0.4, 0.1))
    unsteered = [chain("a", 0.2, loops=0.3), chain("b", 0.4, loops=0.1), chain("a", 0.9, False, sample=1)]
    later = [chain(t, 0.9, correct=False, closed=False) for t in "cd"]
    found = outcome("backtracking", up, down, unsteered)
    assert found == outcome("backtracking", up, down, unsteered + later)
    assert found["tasks"] == 2 and found["accuracy_unsteered"] == 1.0 and found["unclosed_unsteered"] == 0.0
    assert found["fraction_unsteered"] == pytest.approx(0.3) and found["loops_unsteered"] == pytest.approx(0.2)


def test_the_difference_is_paired_by_task_and_dropped_chains_are_counted():
    """Task a has a labelled chain at both signs; the means of each sign are over other tasks."""
    up = [chain("a", 0.4), chain("b", 1.0), chain("c", None)]
    down = [chain("a", 0.1), chain("b", None), chain("c", None)]
    found = outcome("backtracking", up, down, up)
    assert found["fraction_difference"] == pytest.approx(0.3) and (found["chains"], found["dropped"]) == (3, 2)
    assert found["fraction_up"] == pytest.approx(0.7)
    assert outcome("backtracking", up[1:], down[1:], up)["fraction_difference"] is None


def test_a_selected_vector_steers_the_tokens_that_it_was_measured_on():
    whole = Direction({Site("resid_post", 2): torch.ones(4)}, norms={Site("resid_post", 2): 8.0})
    validation = Validation(SimpleNamespace(config=Config(gate="answer"), load=lambda path: whole), Path())
    candidate = {"window": "onset", "baseline": "pooled", "layer": 2}
    for about in (None, {"dose": 0.1}):
        validation.calibrations = {"doubt.onset.layer2": about}
        assert validation.direction("doubt", candidate).gate == "answer"
