"""A format from outside the package works in every function and command, as the package's own do."""

import json
import sys
from pathlib import Path

import pytest
import torch
from vector_files import direction_of, vectors

from steerable.cli import main
from steerable.formats import Format, export_file, formats, import_file, register_format, validate_file
from steerable.formats import exchange as table
from steerable.formats.base import imported, writer
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.plugins import load_plugins

NUMBERS = """
import torch
from steerable.formats import Format
from steerable.formats.base import imported, writer
from steerable.steering.site import Site

HEAD = "block,numbers"

def read(source, options):
    rows = [line.split(",") for line in source.path.read_text().splitlines()[1:]]
    vectors = {Site("resid_post", int(row[0])): torch.tensor([float(x) for x in row[1:]]) for row in rows}
    return imported("numbers", vectors, "its first column is the block", about={"rows": len(rows)})

def encode(vectors, direction, options):
    rows = [",".join([str(block), *map(repr, v.tolist())]) for block, v in vectors.items()]
    return "\\n".join([HEAD, *rows]).encode()

FORMAT = Format(
    "numbers", sniff=lambda source: source.head.startswith(HEAD.encode()), read=read, write=writer(encode),
    limits="It holds no strength.",
)
"""


@pytest.fixture(autouse=True)
def fresh_table():
    for cached in (table._table, load_plugins):
        cached.cache_clear()
    yield
    for cached in (table._table, load_plugins):
        cached.cache_clear()


def by_function(tmp_path, monkeypatch):
    code: dict = {}
    exec(NUMBERS, code)
    register_format(code["FORMAT"])
    with pytest.raises(UsageError, match="there is a format 'numbers' already"):
        register_format(Format("numbers"))


def by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "numbers_plugin.py").write_text(NUMBERS)
    about = tmp_path / "numbers_plugin-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: numbers-plugin\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[steerable.formats]\nnumbers = numbers_plugin:FORMAT\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("add", [by_function, by_entry_point])
def test_a_format_from_outside(tmp_path, monkeypatch, capsys, direction, add):
    add(tmp_path, monkeypatch)
    assert "numbers" in formats()
    done = export_file(direction, tmp_path / "a", "numbers")
    assert done["layers"] == [1, 2, 3]
    again = import_file(tmp_path / "a")
    assert all(torch.equal(again.at(k), direction.at(k)) for k in (1, 2, 3))
    assert again.stats["imported"]["rows"] == 3 and validate_file(tmp_path / "a")["format"] == "numbers"
    with pytest.raises(UsageError, match="content is not svec: it looks like numbers"):
        import_file(tmp_path / "a", format="svec")
    direction.save(tmp_path / "own.safetensors")
    for command in (
        ["export", str(tmp_path / "own.safetensors"), "--to", "numbers", "--out", str(tmp_path / "b")],
        ["import", str(tmp_path / "b"), "--out", str(tmp_path / "c.safetensors")],
        ["validate", str(tmp_path / "b")],
    ):
        monkeypatch.setattr(sys, "argv", ["steerable", *command, "--json"])
        main()
        assert json.loads(capsys.readouterr().out)["layers"] == [1, 2, 3]
    assert Direction.load(tmp_path / "c.safetensors").vectors.keys() == direction.vectors.keys()


def test_names_of_the_package_are_taken():
    with pytest.raises(UsageError, match="there is a format 'svec' already"):
        register_format(
            Format("svec", read=lambda source, options: imported("x", {Site("resid_post", 0): torch.ones(2)}, ""))
        )


def test_what_can_only_be_written_is_not_read(tmp_path):
    register_format(
        Format("mine", sniff=lambda source: source.head.startswith(b"mine:"), write=writer(lambda *_: b"mine: 12"))
    )
    export_file(direction_of(vectors(1)), tmp_path / "a", "mine")
    with pytest.raises(UsageError, match="can be written only"):
        import_file(tmp_path / "a")


def test_the_document_names_every_format():
    text = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    assert [name for name in formats() if f"`{name}`" not in text] == ["steerable", "gguf"]
    assert all(format.limits.endswith(".") for format in formats().values() if format.write)
