import importlib.util
import subprocess
import sys

import pytest

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
