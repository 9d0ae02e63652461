"""The notebooks of `examples/` run from their first cell to their last, and are stored without what a run leaves in
them."""

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_clean(path):
    """No outputs and no counters, ids that do not change, and bytes as Jupyter writes them."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.id for cell in notebook.cells] == [f"cell-{n:02}" for n in range(1, len(notebook.cells) + 1)]
    for cell in notebook.cells:
        assert not cell.metadata and cell.source.strip() == cell.source != ""
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
    assert notebook.cells[0].source.startswith("# ") and set(notebook.metadata) == {"kernelspec", "language_info"}
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n"


def execute(name, folder, monkeypatch):
    """All cells of a notebook in a copy of the examples, by this very Python; what they print, as one text."""
    from nbclient import NotebookClient

    shutil.copytree(EXAMPLES, folder / "examples")
    for variable in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(folder / "jupyter"))  # nothing of the user's
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = nbformat.read(folder / "examples" / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder / "examples"}})
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import sys; print(sys.executable)"))
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert text.startswith(f"{sys.executable}\n")
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    return text, figures


@pytest.mark.slow
@pytest.mark.skipif("STEERABLE_ALL" not in os.environ, reason="two minutes; set STEERABLE_ALL=1 to run it")
def test_make_a_vector(smol_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ASSETS_CACHE", str(smol_folder.parents[1]))
    text, figures = execute("make-a-vector", tmp_path, monkeypatch)
    assert "runs on smol: happy against sad" in text and "strength 1: " in text and figures == 2


@pytest.mark.slow
def test_make_a_vector_without_the_fetched_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "nothing"))
    text, figures = execute("make-a-vector", tmp_path, monkeypatch)
    assert "steerable fetch smol" in text and "doubtful against certain" in text and figures == 2


@pytest.mark.slow
def test_study_reasoning(tmp_path, monkeypatch):
    text, figures = execute("study-reasoning", tmp_path, monkeypatch)
    assert "backtracking, plus" in text and "rarer on" in text and figures == 2
    assert (tmp_path / "examples/runs/look/report.html").is_file()


@pytest.mark.slow
def test_train_by_rl(tmp_path, monkeypatch):
    text, figures = execute("train-by-rl", tmp_path, monkeypatch)
    assert "1152 numbers were trained in 6 steps" in text and "random" in text and figures == 2
