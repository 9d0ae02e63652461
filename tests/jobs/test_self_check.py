"""`steerable doctor`: what it finds right, and that it notices an engine that does not steer."""

import json

import pytest
import torch

import steerable as st
from steerable.evals.parity import compare_engines, random_steerings
from steerable.jobs import self_check


def test_doctor_of_the_transformers_engine(steerable):
    document = json.loads(steerable("doctor", "pocket", "--json").out)
    assert document["ok"] and document["why"] == "" and document["versions"]["torch"] == torch.__version__
    assert [check["ok"] for check in document["checks"]] == [True] * 4
    assert 0 < document["checks"][0]["value"] < 2e-5


def test_a_block_to_paste(steerable):
    title, empty, *table, last, versions = steerable("doctor", "pocket", "--report").out.splitlines()
    assert title.startswith("**steerable doctor: all checks pass**, pocket in float32 by transformers on ")
    assert empty == last == "" and len(table) == 2 + 4 and all(row.count("|") == 5 for row in table)
    assert f"torch {torch.__version__}" in versions


class Unsteered(st.TransformersEngine):
    """An engine that drops the steering, as a stale graph would."""

    def logprobs(self, sequences):
        return super().logprobs([type(s)(s.prompt_ids, s.ids) for s in sequences])


def test_an_engine_that_does_not_steer_fails(steerable, monkeypatch):
    monkeypatch.setattr(self_check, "TransformersEngine", Unsteered)
    failed = steerable("doctor", "pocket", "--json")
    assert failed.code == 1 and not json.loads(failed.out)["ok"]
    assert "WRONG: log-probabilities differ" in failed.err and "WRONG: steerings that change something 0" in failed.err


def test_an_engine_that_mixes_requests_up_fails():
    class Mixed(st.TransformersEngine):
        def logprobs(self, sequences):
            steering = next((s.steering for s in sequences if s.steering), ())
            return super().logprobs([type(s)(s.prompt_ids, s.ids, steering) for s in sequences])

    steerings = random_steerings({st.Site("resid_post", 3): 10.0}, 192, False)
    checks = compare_engines(
        Mixed(*st.load("pocket")),
        st.TransformersEngine(*st.load("pocket")),
        [[5, 6, 7]],
        steerings,
        tokens=4,
        limit=2e-5,
    )
    assert [check.ok for check in checks][::2] == [False, False]


def test_what_doctor_does_not_know_is_refused():
    for options, message in (({"engine": "jax"}, "--engine is 'jax'"), ({"dtype": "int8"}, "--dtype is 'int8'")):
        with pytest.raises(st.UsageError, match=message):
            self_check.doctor(**options)
