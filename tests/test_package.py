import subprocess
import sys

import pytest

import steerable


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    assert (
        run("import steerable, sys; print('torch' in sys.modules or 'transformers' in sys.modules)")
        == "False\n"
    )


def test_every_export_exists():
    for name in steerable.__all__:
        assert getattr(steerable, name) is not None and name in dir(steerable)
    with pytest.raises(AttributeError, match="nothing"):
        _ = steerable.nothing


@pytest.mark.parametrize("name", ["capture", "lens"])
@pytest.mark.parametrize(
    "first", ["", "import steerable.{0}; ", "import steerable as s; s.{0}; ", "import steerable.models; "]
)
def test_functions_named_like_their_module(name, first):
    code = (
        first.format(name)
        + "import steerable as st; print(callable(st.{0})); import steerable.{0} as m; print(m.{0})"
    )
    callable_, function = run(code.format(name)).splitlines()
    assert callable_ == "True" and function.startswith(f"<function {name}")
