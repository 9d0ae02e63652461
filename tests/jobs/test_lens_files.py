"""The command: a direction file and chains in, a document and a page out."""

import json

import pytest
import torch
from tiny_families import tiny

from steerable.chains.records import write_jsonl
from steerable.jobs.lens_job import lens_file, stamped_lens, write_lens
from steerable.pages.lens_page import page, tables
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.display import Display
from steerable.store.errors import SteerableWarning, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model folder, a file of vectors, chains beside their tasks."""
    root = tmp_path_factory.mktemp("lens")
    tiny("llama").save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    generator = torch.Generator().manual_seed(1)
    vectors = {Site("resid_post", i): torch.randn(32, generator=generator) for i in range(4)}
    Direction(vectors, model_id="model").save(root / "v.safetensors")
    write_jsonl(root / "run/tasks.jsonl", [{"id": t, "prompt": "w9"} for t in "ab"])
    chain = {"sample": 0, "thinking": "w9 w10", "answer": " w11", "closed": True, "tokens": 4}
    write_jsonl(root / "run/chains.jsonl", [{"task_id": t, **chain} for t in "ab"])
    write_jsonl(root / "run/steered/x.jsonl", [{"task_id": "a", **chain}])
    return root


class Counting(Display):
    """Keeps what it is told."""

    def start(self, name, total, unit="chain"):
        self.total, self.finished = total, []

    def advance(self, finished, tokens=0, note=""):
        self.finished.append(finished)


def test_files(folder, tmp_path):
    display = Counting(quiet=True)
    document = lens_file(
        folder / "v.safetensors",
        model=str(folder / "model"),
        k=3,
        persistence=folder / "run/chains.jsonl",
        display=display,
    )
    assert document["persistence"]["sources"] == [0, 1, 2, 3] and document["persistence"]["texts"] == 2
    assert document["persistence"]["diff_vector"][2][2] == pytest.approx(1, abs=1e-4)
    assert sum(display.finished) == 2 == display.total
    json_file, html_file = write_lens(document, tmp_path / "out")
    assert json.loads(json_file.read_text()) == document and html_file.read_text() == page(document)
    assert "How long the shift persists" in html_file.read_text() and len(tables(document)) == 5
    (one,) = write_lens(document, tmp_path / "a.json")
    assert one.read_bytes() == json_file.read_bytes()
    (one,) = write_lens(document, tmp_path / "a.html")
    assert one.read_bytes() == html_file.read_bytes()


def test_the_same_call_gives_the_same_document(folder):
    first, second = (lens_file(folder / "v.safetensors", model=str(folder / "model"), layers="1,2") for _ in range(2))
    assert first == second and first["persistence"] is None and [v["layer"] for v in first["vectors"]] == [1, 2]


def test_tasks_of_chains_are_found_or_asked_for(folder, tmp_path):
    given = {"model": str(folder / "model"), "layers": "1"}
    document = lens_file(
        folder / "v.safetensors", persistence=folder / "run/steered/x.jsonl", **given
    )  # a folder above
    assert document["persistence"]["sources"] == [1] and document["persistence"]["texts"] == 1
    write_jsonl(tmp_path / "deep/er/chains.jsonl", [{"task_id": "c", "sample": 0, "thinking": "", "answer": "",
                                                    "closed": False, "tokens": 0}])  # fmt: skip
    stray = tmp_path / "deep/er/chains.jsonl"
    with pytest.raises(UsageError, match="no tasks.jsonl beside"):
        lens_file(folder / "v.safetensors", persistence=stray, **given)
    with pytest.raises(UsageError, match="lacks the task 'c'"):
        lens_file(folder / "v.safetensors", persistence=stray, tasks=folder / "run/tasks.jsonl", **given)
    with pytest.raises(UsageError, match="--limit is 0"):
        lens_file(folder / "v.safetensors", limit=0, **given)


def test_another_models_vectors_are_warned_of(folder, tmp_path):
    Direction({Site("resid_post", 0): torch.ones(32)}, model_id="other").save(tmp_path / "o.safetensors")
    with pytest.warns(SteerableWarning, match="made on 'other', the model is 'model'"):
        lens_file(tmp_path / "o.safetensors", model=str(folder / "model"))


def test_a_kept_document_is_of_the_vectors_that_are_there(tmp_path, tiny_llama, tokenizer):
    file, kept = tmp_path / "bias.safetensors", tmp_path / "lens.json"

    def save(seed):
        generator = torch.Generator().manual_seed(seed)
        Direction({Site("resid_post", i): torch.randn(32, generator=generator) for i in (1, 3)}).save(file)

    save(0)
    first = stamped_lens(tiny_llama, tokenizer, file, kept)
    assert json.loads(kept.read_text()) == first and first["file"] == "bias.safetensors"
    made = kept.stat().st_mtime_ns
    assert stamped_lens(tiny_llama, tokenizer, file, kept) == first and kept.stat().st_mtime_ns == made
    save(1)
    assert stamped_lens(tiny_llama, tokenizer, file, kept)["vectors"] != first["vectors"]
