"""Another installed package adds an estimator, a map, a gate, a metric and a file format: nothing here is touched, and
they work in `steer`, in files, at the command line and in the main job."""

import json
import os
import subprocess
import sys

import pytest
import torch

import steerable as st
from steerable.methods.text_pairs import ESTIMATORS

PACKAGE = '''
from dataclasses import dataclass

import torch

from steerable.evals.metrics import Metric
from steerable.formats import Format
from steerable.formats.base import imported, writer
from steerable.steering.direction import Direction
from steerable.steering.site import Site


def medians(positive, negative):
    """An estimator: the difference of the coordinates' medians."""
    vectors = {site: positive[site].median(0).values - negative[site].median(0).values for site in positive}
    return Direction(vectors, method="medians")


@dataclass(frozen=True)
class Push:
    """A map: x + amount tanh(x)^2 + amount."""

    amount: float = 1.0

    def __call__(self, x):
        return x + self.amount * (1 + torch.tanh(x).square())


def every(tokens, n):
    """A gate: every n-th token."""
    return tokens.position % n == 0


waits = Metric("waits", "Waits", "number", lambda m: m.chain["thinking"].count("Wait"))


def _read(source, options):
    rows = [line.split(",") for line in source.path.read_text().splitlines()[1:]]
    vectors = {Site("resid_post", int(row[0])): torch.tensor([float(x) for x in row[1:]]) for row in rows}
    return imported("lines", vectors, "its first column is the block")


def _encode(vectors, direction, options):
    return "\\n".join(["block,...", *(",".join([str(b), *map(repr, v.tolist())]) for b, v in vectors.items())]).encode()


lines = Format(
    "lines", sniff=lambda source: source.head.startswith(b"block,..."), read=_read, write=writer(_encode),
    limits="It holds no strength.",
)
'''
ENTRY_POINTS = """
[steerable.maps]
push = bolted_on:Push
[steerable.gates]
every = bolted_on:every
[steerable.metrics]
waits = bolted_on:waits
[steerable.formats]
lines = bolted_on:lines
"""


@pytest.fixture
def bolted_on(install, tmp_path, monkeypatch):
    """The package is installed, and the working folder is empty."""
    install("bolted_on", PACKAGE, ENTRY_POINTS)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_steer(bolted_on):
    from bolted_on import Push

    model, tokenizer = st.load("pocket")
    vector = torch.nn.functional.normalize(torch.randn(192, generator=torch.Generator().manual_seed(1)), dim=0)
    st.Direction({st.Site("resid_post", 3): vector}, map="push(2)", gate="every(2)").save("push.safetensors")
    ids = tokenizer("2*w + 8 = 30", return_tensors="pt").input_ids
    blocks = st.capture(model, tokenizer, ["2*w + 8 = 30"], sites=["resid_post.3"], reduce="none")
    with st.steer(model, "0.5 push.safetensors", tokenizer=tokenizer) as handle, torch.no_grad():
        steered = model(ids, output_hidden_states=True).hidden_states[4][0]
    h = blocks[st.Site("resid_post", 3)]
    x = (h @ vector)[:, None]
    expected = h + 0.5 * (Push(2.0)(x) - x) * vector
    rows = torch.arange(len(h)) % 2 == 0
    torch.testing.assert_close(steered[rows], expected[rows], atol=1e-4, rtol=1e-4)
    assert torch.equal(steered[~rows], h[~rows])
    assert handle.report().steering == "0.5 push.safetensors"


def test_contrast(bolted_on, steerable):
    pairs = [{"positive": f"Wait, maybe {i} is wrong.", "negative": f"So {i} is right."} for i in range(3)]
    (bolted_on / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = ["pairs.jsonl", "--layers", "3", "--budget", "0.05", "--out", "v.safetensors"]
    said = steerable("contrast", *options, "--method", "bolted_on:medians")
    assert said.code == 0 and st.Direction.load("v.safetensors").method == "medians", said.err
    said = steerable("contrast", *options, "--method", "magic")
    assert said.code == 2 and "--method is 'magic'" in said.err and "difference_of_means, pca or module:f" in said.err
    assert all(name in steerable("contrast", "--help").out for name in (*ESTIMATORS, "module:function"))


@pytest.mark.slow
def test_main_job(bolted_on, tiny, steerable):
    """In a process of its own, which has the package from its start."""
    options = ["--estimator", "bolted_on:medians", "--map", "push(0.5)", "--gate", "every(2)"]
    command = [sys.executable, "-m", "steerable", "run", "--out", "run", "--workers", "1", *tiny, *options]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
    report = json.loads((bolted_on / "run/report.json").read_text())
    steered = [cell for cell in report["cells"] if cell["strength"] and not cell["name"].endswith(".thinking")]
    assert steered and {cell["where"] for cell in steered} == {"every(2)"}
    assert all(len(cell["waits"]) == 3 for cell in report["cells"])
    vectors = sorted((bolted_on / "run/vectors/candidates").rglob("*.safetensors"))
    about = json.loads(steerable("validate", vectors[0], "--json").out)
    assert about["map"] == "push(0.5)" and about["method"] == "medians"
    # and the selected vector leaves in the package's format, which another command reads
    (selected, *_) = sorted((bolted_on / "run/vectors").glob("*.safetensors"))
    vector = st.Direction.load(selected)
    vector.map = "shift"
    vector.save("v.safetensors")
    assert steerable("export", "v.safetensors", "--to", "lines", "--out", "v.lines").code == 0
    assert steerable("import", "v.lines", "--out", "back.safetensors").code == 0
    assert (bolted_on / "back.safetensors").is_file()


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--estimator", "bolted_on:nothing", "--estimator is 'bolted_on:nothing', which cannot be imported"),
        ("--map", "shove(1)", "shove"),
        ("--gate", "each(2)", "each"),
    ],
)
def test_what_is_not_there_is_refused(bolted_on, steerable, option, value, sentence):
    said = steerable("run", "--out", "none", option, value)
    assert said.code == 2 and sentence in said.err and "Traceback" not in said.err and not (bolted_on / "none").exists()
