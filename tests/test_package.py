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


@pytest.mark.parametrize("first", ["", "import steerable.{0}; ", "import steerable as s; s.{0}; "])
def test_functions_named_like_their_module(first):
    code = "".join(
        f"{first.format(name)}import steerable as st; print(callable(st.{name}));"
        f"import steerable.{name} as m; print(type(m.{name}).__name__);"
        for name in ("capture", "lens")
    )
    assert run(code).split() == ["True", "function"] * 2
