"""The documents are true: their snippets run, their links lead somewhere, their figures are those of the sources."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
import yaml

from steerable import SteerableWarning, __version__, cli
from steerable.evals import metrics
from steerable.jobs.settings import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")

# What is not executed, and why; a command is found by its beginning, the longest first.
NOT_RUN = {
    "make run": "sets up an environment and runs the whole job",
    ". .venv/bin/activate": "there is no environment in the folder of the test",
    "steerable run --quick": "takes a minute",
    "steerable run --model pocket --out runs/pocket": "takes minutes",
    "steerable run --annotator length": "takes minutes",
    "steerable run --model deepseek-ai/": "needs a model of the hub",
    "steerable run --model Qwen/": "needs a model of the hub",
    "steerable run --paper": "needs a model of the hub and a key",
    "export OPENAI_API_KEY": "is a key",
    "steerable fetch smol": "downloads",
    "steerable chat --model smol": "needs what `fetch` downloads",
    "steerable chat --model deepseek-ai/": "needs a model of the hub",
    "steerable chat --steer runs/short": "needs a run that takes minutes",
    "steerable run --model smol-think": "needs what `fetch` makes, and takes an hour",
    "steerable reannotate --annotator keywords --out runs/smol-think": "needs that run",
    "steerable probe --to probe.safetensors --out runs/smol-think": "needs that run",
    "steerable reannotate --annotator probe:probe.safetensors --out runs/smol-think": "needs that run",
    "steerable contrast --persona happy": "needs what `fetch` downloads",
    "steerable contrast examples": "needs what `fetch` downloads",
    "steerable calibrate runs/pocket": "takes minutes",
    "steerable audit runs/pocket": "takes minutes",
    "steerable steer --recipe seal": "needs more paragraphs than the run of the tests has",
    'steerable chat "2*w + 8 = 30" --steer seal': "needs what that makes",
    "steerable steer --recipe sae": "needs an autoencoder",
    "steerable pocket train": "takes up to hours",
    "steerable pocket measure --out": "takes minutes",
    "steerable train rl --model pocket --tasks": "takes minutes",
    "steerable train rl --recipe": "needs a model of the hub",
    "steerable train upft --model pocket": "takes minutes",
    "steerable serve": "serves until it is stopped",
    "steerable passk --model pocket --tasks reasoning-gym:countdown": "needs trained arms",
}
NEEDED = {"serving.md": "vllm"}
"""Packages that a page's snippets need and CI has not."""
SLOW = {"calibrate.md", "lens.md", "passk.md", "quickstart.md", "training.md"}
# Added to commands for the sake of time.
SHORTER = {"steerable chat": " --max-new-tokens 40", "steerable compose": " --limit 2 --max-new-tokens 40"}


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures = script("fill_figures")


def snippets(page, *languages):
    return [(kind, code) for kind, code in SNIPPET.findall(page.read_text()) if kind in languages]


def commands(code):
    """A shell snippet's commands, without comments, continued lines joined."""
    lines = code.replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True, posix=False)) for line in lines if line.strip()]


def reason_not_to_run(command):
    return next((why for start, why in NOT_RUN.items() if f"{command} ".startswith(start)), None)


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A folder as a reader's: `runs/pocket` is there, modules in it can be imported."""
    shutil.copytree(finished, tmp_path / "runs/pocket")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_annotator", raising=False)  # another test's module of that name
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setattr("steerable.chains.generation.default_workers", lambda model: 1)
    monkeypatch.setattr(metrics, "_TABLE", metrics._TABLE.copy())  # a page adds a row, which changes every run
    yield tmp_path
    sys.modules.pop("my_annotator", None)


@pytest.fixture
def shell(capfd, monkeypatch):
    """Runs one command; plain `steerable ...` in this process, which has imported everything already."""

    def run(command):
        command += next((more for start, more in SHORTER.items() if command.startswith(start)), "")
        words = shlex.split(command)
        capfd.readouterr()
        if words[0] != "steerable" or set("|<>;&$") & set(command):
            return subprocess.run(["bash", "-c", command], check=False).returncode, "".join(capfd.readouterr())
        monkeypatch.setattr(sys, "argv", words)
        try:
            cli.main()
            status = 0
        except SystemExit as stopped:
            status = stopped.code or 0
        return status, "".join(capfd.readouterr())

    return run


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.slow] if p.name in SLOW else [], id=p.name)
        for p in PAGES
        if snippets(p, "python", "bash", "console")
    ],
)
def test_snippets_run(page, place, shell):
    """All of a page in its order, in one namespace. A snippet that begins with `# name.py` is also that file."""
    if page.name in NEEDED:
        pytest.importorskip(NEEDED[page.name])
    namespace = {"__name__": page.stem}
    for kind, code in snippets(page, "python", "bash", "console"):
        if kind == "python":
            if named := re.match(r"# (\w+\.py)\n", code):
                (place / named[1]).write_text(code)
            with warnings.catch_warnings():
                warnings.simplefilter("error", SteerableWarning)
                exec(compile(code, f"{page.name}: {code[:40]!r}", "exec"), namespace)
        elif kind == "bash":
            for command in commands(code):
                if not reason_not_to_run(command):
                    status, printed = shell(command)
                    assert status == 0, f"{command}\n{printed}"
        else:
            for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
                command, _, expected = part.partition("\n")
                status, printed = shell(command)
                assert " ".join(expected.split()) in " ".join(printed.split()), f"{command}\n{printed}"
                assert status == (2 if expected.startswith("steerable: ") else 0)


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_what_is_not_run_is_there():
    found = [command for page in PAGES for _, code in snippets(page, "bash") for command in commands(code)]
    for start in NOT_RUN:
        assert any(f"{command} ".startswith(start) for command in found), start


def anchors(page):
    """GitHub's anchors of a page's headings."""
    text = SNIPPET.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(SNIPPET.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        # Pictures come with the figures of a published run.
        if target.suffix != ".svg" or figures.HEADLINES["pocket"].exists():
            assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_command_is_described():
    text = "".join(page.read_text() for page in PAGES)
    table = typer.main.get_command(cli.app).commands
    names = [
        f"{name} {sub}".strip() for name, command in table.items() for sub in getattr(command, "commands", {"": None})
    ]
    assert [n for n in names if f"`{n}`" not in text and f"steerable {n}" not in text] == []


def test_every_setting_is_described():
    text = (ROOT / "docs/pipeline.md").read_text()
    assert [f for f in Config.model_fields if f"`--{f.replace('_', '-')}`" not in text] == []


def test_every_key_of_the_report_is_described(finished):
    text = (ROOT / "docs/report.md").read_text()
    report = json.loads((finished / "report.json").read_text())
    keys = {
        *report,
        *report["model"],
        *report["coverage"],
        *report["cells"][0],
        *(k for e in report["examples"][:1] for k in e),
    }
    assert [key for key in sorted(keys) if f"`{key}`" not in text and f"`{key}:" not in text] == []


@pytest.mark.parametrize("page", figures.documents(), ids=lambda p: p.name)
def test_figures_are_those_of_the_sources(page):
    text = page.read_text()
    assert figures.fill(text, figures.sources()) == text, "run: python docs/fill_figures.py"


def test_the_published_run_of_smol_think_has_its_default_settings():
    """So that the README's command makes the README's figures."""
    published = json.loads(figures.HEADLINES["smol-think"].read_text())["config"]
    assert Config(model="smol-think").to_dict() == published


@pytest.mark.parametrize(("model", "end"), [("pocket", ""), ("smol-think", "-smol-think")])
def test_pictures_are_of_the_same_run_as_the_figures(model, end):
    if not figures.HEADLINES[model].exists():
        pytest.skip(f"no run of {model} is published: docs/fill_figures.py and docs/make_images.py make the figures")
    made_from = json.loads(figures.HEADLINES[model].read_text())["report_sha256"]
    for name in ("effect", "layers"):
        picture = ROOT / f"docs/images/{name}{end}.svg"
        assert made_from in picture.read_text(), f"run: python docs/make_images.py runs/{model}"


@pytest.mark.parametrize("decoding", ["sampled", "greedy"])
def test_no_share_of_a_gain_that_may_be_zero_is_recovered(decoding):
    """R = (arm - base) / (full - base) is shown where the denominator's interval is clear of zero, and nowhere else."""
    arms = {name: arm[decoding] for name, arm in figures.sources()["arms"]["arms"].items()}
    _, low, high = arms["full"]["gain"]
    recovered = [arm["recovered"] for arm in arms.values() if "recovered" in arm]
    assert len(recovered) > 10 and {r is None for r in recovered} == {low <= 0 <= high}
    assert figures.training_figures._recovered({"recovered": None}) == "–"


def test_figures_of_a_run(finished):
    run = json.loads(json.dumps(figures.headline(finished)))
    for cell in run["cells"]:
        if not cell["strength"]:  # with two tasks the shares may be zero, and then there is no ratio
            cell["fractions"] = {label: [0.2, 0.1, 0.3] for label in cell["fractions"]}
    given = {**figures.sources(), "run": run}
    filled = {name: make(given) for name, make in figures.FIGURES.items()}
    assert filled["effects"].count("\n| ") == filled["settings"].count("\n| ") == 6  # head, rule, four behaviours
    assert filled["costs"].count("\n| ") == 2 + 1 + 2 * 4
    assert "24 chains" in filled["about"] and "×" in filled["up"]
    made = {
        name: make
        for name, make in figures.FIGURES.items()
        if "options" not in name and name not in ("speed", "recipes")
    }
    nothing = {name: make({"run": {}}) for name, make in made.items()}
    assert {text.strip().strip("_") for text in nothing.values()} == {"not measured"}
    with pytest.raises(SystemExit, match="there is no figure 'nonsense'"):
        figures.fill("<!-- figures: nonsense --><!-- /figures -->", given)


def test_pictures_of_a_run(finished, tmp_path, monkeypatch):
    images = script("make_images")
    monkeypatch.setattr(images, "IMAGES", tmp_path)
    images.main(finished)
    for name in ("effect", "layers"):
        root = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        titles = {node.text for node in root.iter() if node.get("class") == "name"}
        assert titles == {"adding knowledge", "example testing", "uncertainty", "backtracking"}


def test_annotator_of_the_page_covers_the_bundled_model(finished):
    """The page's example is a plain function of a chain; here it is held against the exact annotator."""
    from steerable.chains.records import read_jsonl
    from steerable.models.pocket.language import annotate

    code = next(code for _, code in snippets(ROOT / "docs/annotators.md", "python"))
    namespace = {}
    exec(code, namespace)
    chains = read_jsonl(finished / "chains.jsonl", "chain")
    exact = {(i, s["start"]): s["label"] for i, chain in enumerate(chains) for s in annotate(chain)}
    found = {(i, s["start"]): s["label"] for i, chain in enumerate(chains) for s in namespace["annotate"](chain)}
    shared = exact.keys() & found.keys()
    assert len(shared) > 0.8 * len(exact)
    assert sum(exact[key] == found[key] for key in shared) > 0.7 * len(shared)
