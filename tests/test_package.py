import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import steerable


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    assert run("import steerable, sys; print('torch' in sys.modules or 'transformers' in sys.modules)") == "False\n"


def test_every_export_exists():
    for name in steerable.__all__:
        assert getattr(steerable, name) is not None and name in dir(steerable)
    with pytest.raises(AttributeError, match="nothing"):
        _ = steerable.nothing


def test_no_export_is_named_like_a_room():
    assert not {name for name in steerable.__all__ if importlib.util.find_spec(f"steerable.{name}")}


def test_the_pinned_transformers_is_in_the_range_of_those_that_work():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (pin,) = re.findall(r"^transformers==(\d+\.\d+)\.\*$", (root / "constraints.txt").read_text(), re.MULTILINE)
    (requirement,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    # the oldest and the newest with which the tests of models and engine were run
    assert all(version in requirement.specifier for version in ("5.16.1", f"{pin}.0", "5.24.0"))
    assert "6.0.0" not in requirement.specifier and "5.15.0" not in requirement.specifier
