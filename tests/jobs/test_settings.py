"""The settings: every wrong value is one sentence, and the rest of the package follows from the table."""

import pickle
import sys

import pytest
from pydantic import Field

from steerable.chains.windows import WINDOWS
from steerable.jobs.settings import Config, Settings
from steerable.store.errors import UsageError


def test_a_model_may_have_defaults_of_its_own():
    own = Config(model="smol-think")
    assert (own.limit, own.tried, own.budget, own.window) == (200, 2, 0.1, "onset") and own.patched == Config().patched
    assert Config(model="smol-think", limit=7) == own.replace(limit=7)
    assert Config(**own.to_dict()) == own and Config(model="pocket").limit == 300
    lengths = Config(model="smol-think", annotator="length")
    assert (lengths.window, lengths.samples, own.samples) == ("span", 2, 1)
    assert Config(model="smol-think", window="published").baseline == "overall"


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("limit", 0, "--limit is 0: expected 1 or more"),
        ("max_new_tokens", -5, "--max-new-tokens is -5: expected 1 or more"),
        ("limit", "12", "--limit is '12': expected a whole number"),
        ("limit", True, "--limit is True: expected a whole number"),
        ("limit", 1.5, "expected a whole number"),
        ("greedy", 1, "--greedy is 1: expected true or false"),
        ("model", None, "--model is None: expected text"),
        ("model", [], "expected text"),
        ("seed", -1, "--seed is -1: expected a whole number from 0"),
        ("seed", 2**32, "expected a whole number from 0"),
        ("engine", "vllm9", "expected one of transformers"),
        ("window", "middle", "expected one of published, span, onset"),
        ("baseline", "none", "expected one of pooled, overall"),
        ("layers", "-1", "expected one 0-based layer"),
        ("layers", "2,3", "expected one 0-based layer"),
        ("layers", "²", "expected one 0-based layer"),
        ("sweep", "0.5,x", "expected numbers separated by commas"),
        ("sweep", "nan", "expected numbers separated by commas"),
        ("sweep", "inf", "expected numbers separated by commas"),
        ("llm_prices", "2", "expected two prices"),
        ("llm_prices", "2,-8", "expected two prices"),
        ("annotator", "", "cannot be imported"),
        ("annotator", "nowhere:f", "cannot be imported"),
        ("annotator", "json:nothing", "cannot be imported"),
        ("annotator", "json:__name__", "is no function"),
        ("speed", 3, "unknown setting 'speed'"),
    ],
)
def test_wrong_values(setting, value, text):
    with pytest.raises(UsageError, match=text.replace("(", r"\(")) as caught:
        Config(**{setting: value})
    assert "\n" not in str(caught.value)


def test_round_trip():
    config = Config(model="there", greedy=True, layers="3", sweep="")
    assert Config(**config.to_dict()) == config
    assert config.subset("model greedy") == {"model": "there", "greedy": True}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("1.5, -0.5,0.5", [-0.5, 0.5, 1.5]),
        ("-1,0,1,2", [2.0]),  # always there
        ("0.5,0.50,0.50000001,-1.0000001", [0.5]),  # cells are named with six digits
    ],
)
def test_sweep(text, found):
    assert Config(sweep=text).strengths == found


def test_layer():
    assert Config().chosen_layer is None
    assert Config(layers="11").chosen_layer == 11


def test_annotator_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_own_annotator.py").write_text("def spans(chain): return []\n")
    (tmp_path / "my_broken_annotator.py").write_text("def spans(chain) return []\n")
    monkeypatch.chdir(tmp_path)
    assert Config(annotator="my_own_annotator:spans").annotate({}) == []
    with pytest.raises(UsageError, match="cannot be imported"):
        Config(annotator="my_broken_annotator:spans")


def test_nothing_that_a_file_names_is_imported(tmp_path, monkeypatch):
    (tmp_path / "strangers.py").write_text("import pathlib; pathlib.Path('ran').touch()\ndef spans(chain): return []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "strangers", raising=False)  # another test's
    values = Config(model="m").to_dict() | {"annotator": "strangers:spans", "trust_remote_code": True}
    config = Config(values, **values)
    for one in (config, config.quick(), config.replace(limit=3), pickle.loads(pickle.dumps(config))):
        with pytest.raises(UsageError, match="--annotator strangers:spans.*give the option yourself"):
            _ = one.annotate
        with pytest.raises(UsageError, match="--trust-remote-code, and what could run code"):
            one.check_own("trust_remote_code")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UsageError, match="unknown setting 'from_file'"):
        Config(from_file=[])
    known = Config(values, **values | {"annotator": "keywords"})
    assert known.annotate is not None  # one of ours
    assert Config(values.keys() - {"annotator"}, **values).annotate({}) == []
    assert (tmp_path / "ran").exists()


def test_quick_only_ever_makes_a_run_smaller():
    quick = Config().quick()
    for name in ("limit", "validation", "evaluation", "samples", "side_samples", "tried", "attributed", "patched"):
        assert getattr(quick, name) <= getattr(Config(), name)
    assert Config(limit=5).quick().limit == 5
    assert quick.quick() == quick


def test_lengths_need_several_chains_of_a_task():
    assert Config(annotator="length").quick().samples > 1
    for settings in ({"samples": 1}, {"greedy": True}):
        with pytest.raises(UsageError, match="give --samples 2 or more, and no --greedy"):
            Config(annotator="length", **settings)


def test_the_windows_are_those_of_the_library():
    for window in WINDOWS:
        assert Config(window=window).window == window
    for word in WINDOWS:
        assert word in Config.model_fields["window"].description


def test_a_table_of_ones_own():
    class Training(Settings):
        steps: int = Field(40, ge=1, description="Optimiser steps.")
        share: float = Field(0.5, gt=0, lt=1, description="A share.")

    assert Training(share=0.25).replace(steps=2).to_dict() == {"steps": 2, "share": 0.25}
    for values, text in (
        ({"steps": 0}, "--steps is 0: expected 1 or more"),
        ({"share": 1.0}, "--share is 1.0: expected a number above 0 and below 1"),
        ({"share": "x"}, "--share is 'x': expected a number"),
        ({"step": 1}, "unknown setting 'step': expected some of share, steps"),
    ):
        with pytest.raises(UsageError, match=text):
            Training(**values)
