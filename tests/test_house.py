"""The plan of the house: every import goes down, and a reader guesses the room from the name (CONTRIBUTING)."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "steerable"
#: From the bottom to the top; a room imports from those before it.
ROOMS = [
    *("store", "steering", "models", "engines", "chains", "formats", "evals", "methods", "pages", "jobs"),
    *("studio", "serve", "cli"),
]
HALL = {"__init__", "__main__"}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(name: str, path: Path) -> set[str]:
    """The modules of the package that a module imports anywhere in it, functions and TYPE_CHECKING included."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                parts = [*package[: len(package) - node.level + 1], *parts]
            elif parts[:1] == ["steerable"]:
                parts = parts[1:]
            else:
                continue
            names = [".".join([*parts, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "steerable"]
        for full in names:
            while full and full not in MODULES:
                full = full.rpartition(".")[0]
            if full:
                found.add(full)
    return found - {name}


@cache
def graph() -> dict[str, set[str]]:
    return {name: imported(name, path) for name, path in MODULES.items() if name not in HALL}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_is_in_a_room():
    assert {room(name) for name in MODULES} - HALL - set(ROOMS) == set()
    flat = {name for name in MODULES if "." not in name and MODULES[name].name != "__init__.py"}
    assert flat - HALL == {"cli"}


def test_imports_go_down():
    climbs = {
        (name, other)
        for name, others in graph().items()
        for other in others
        if ROOMS.index(room(other)) > ROOMS.index(room(name))
    }
    assert climbs == set()


def test_there_are_no_circles():
    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for other in graph().get(todo.pop(), set()) - seen:
                seen.add(other)
                todo.append(other)
        return seen

    assert {name for name in graph() if name in reached(name)} == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_is_named_like_what_it_defines(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    assert name.rpartition(".")[2] not in defined


def test_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"(?m)^\| `(\w+)(?:/|\.py)`", text))
    assert {r for r in map(room, MODULES) if r not in HALL} <= rows
