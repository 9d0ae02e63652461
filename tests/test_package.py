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


def test_no_newer_transformers_than_the_one_that_is_tested():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (pin,) = re.findall(r"^transformers==(\d+)\.(\d+)\.\*$", (root / "constraints.txt").read_text(), re.MULTILINE)
    (requirement,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    major, minor = map(int, pin)
    assert f"{major}.{minor}.9" in requirement.specifier and f"{major}.{minor + 1}.0" not in requirement.specifier
