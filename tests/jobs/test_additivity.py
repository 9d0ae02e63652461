"""The command on a tiny model: what it writes, against a recount; going on; what it refuses before it generates."""

import json

import pytest
import torch
from tiny_families import tiny

from steerable.chains.generation import generate_chains
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.chains.tasks import correct
from steerable.engines.transformers import steer
from steerable.jobs import additivity, arms
from steerable.models.loading import load
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

TASKS = 16
FAST = {"limit": TASKS, "max_new_tokens": 16, "workers": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A model folder, a sibling, one of another shape, single-layer files, and tasks that the pair 0+2 solves."""
    root = tmp_path_factory.mktemp("compose")
    for name, options in (("model", {}), ("sibling", {"seed": 5}), ("wide", {"hidden_size": 64})):
        model = tiny("llama", **options)
        with torch.no_grad():
            model.lm_head.weight[2] *= 6  # so that some chains close their thinking
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    generator = torch.Generator().manual_seed(0)
    for layer in range(4):
        vector = 3 * torch.randn(32, generator=generator)
        Direction({Site("resid_post", layer): vector}, model_id="model").save(root / f"layer{layer}.safetensors")
    loaded = load(root / "model")
    asked = [{"id": f"t{i}", "prompt": f"w{10 + i}", "answer": "w9"} for i in range(TASKS)]
    parts = [Direction.load(root / f"layer{i}.safetensors") for i in (0, 2)]
    with steer(loaded.model, parts):
        said = generate_chains(loaded, asked, max_new_tokens=16)
    for task, chain in zip(asked, said, strict=True):
        task["answer"] = chain["answer"] or "w9"
    write_jsonl(root / "tasks.jsonl", asked)
    return root


def files(place, *layers):
    return [place / f"layer{i}.safetensors" for i in layers]


def options(place, out):
    return FAST | {"model": str(place / "model"), "tasks": str(place / "tasks.jsonl"), "out": out}


@pytest.fixture(scope="module")
def composed(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "c"
    return out, additivity.compose(files(place, 0, 1, 2), to=str(place / "sibling"), **options(place, out))


def test_accuracies_are_those_of_the_chains(composed, place):
    out, result = composed
    tasks = {task["id"]: task for task in read_jsonl(out / "tasks.jsonl", "task")}
    names = ["base", "all", "random", "layer0", "layer1", "layer2", "layer0+layer1", "layer0+layer2", "layer1+layer2"]
    assert list(result["cells"]) == names

    def accuracy(name):
        chains = read_jsonl(out / f"chains/{name}.jsonl", "chain")
        assert len(chains) == TASKS
        return sum(c["closed"] and bool(correct(tasks[c["task_id"]], c["answer"])) for c in chains) / TASKS

    for name, cell in result["cells"].items():
        assert cell["accuracy"][0] == pytest.approx(accuracy(name)), name
    # the pair was measured as both vectors together, not as one of them
    assert accuracy("layer0+layer2") > max(accuracy("layer0"), accuracy("layer2"), accuracy("base"))
    for pair in result["pairs"]:
        a, b = pair["files"]
        best = max(accuracy(a), accuracy(b))
        assert pair["difference"][0] == pytest.approx(accuracy(f"{a}+{b}") - best)
        assert pair["room"][0] == pytest.approx(accuracy("all") - best)
        assert pair["adjacent"] == (pair["layers"][1] - pair["layers"][0] == 1)
    assert (result["pooled"]["adjacent"]["pairs"], result["pooled"]["apart"]["pairs"]) == (2, 1)


def test_the_sum_is_written_and_carried_over(composed, place):
    out, result = composed
    assert json.loads((out / "compose.json").read_text()) == result
    assert Direction.load(out / "combined.safetensors").layers == [0, 1, 2] == result["layers"]
    assert result["transfer"]["model"] == "sibling"
    assert set(result["transfer"]["cells"]) == {"base", "all", "random"}
    here, there = (
        [c["thinking"] for c in read_jsonl(out / f"chains/{name}.jsonl", "chain")] for name in ("all", "to.all")
    )
    assert here != there


def test_what_is_finished_is_not_done_again(composed, place, monkeypatch):
    out, result = composed

    def refuse(*arguments, **more):
        raise AssertionError("generated again")

    monkeypatch.setattr(arms, "generate_jobs", refuse)
    again = additivity.compose(files(place, 0, 1, 2), to=str(place / "sibling"), **options(place, out))
    assert again == result
    with pytest.raises(AssertionError, match="generated again"):  # another file, and the pairs with it, alone
        additivity.compose(files(place, 0, 1, 3), **options(place, out))


def test_two_files_have_one_pair_which_is_all(place, tmp_path):
    result = additivity.compose(files(place, 0, 2), pairs="all", **options(place, tmp_path / "two"))
    assert list(result["cells"]) == ["base", "all", "random", "layer0", "layer2"]
    (pair,) = result["pairs"]
    assert pair["gain"] is None and pair["room"] is None and pair["adjacent"] is False
    best = max(result["cells"][name]["accuracy"][0] for name in ("layer0", "layer2"))
    assert pair["difference"][0] == pytest.approx(result["cells"]["all"]["accuracy"][0] - best)
    assert additivity.tables(result)


def test_without_tasks_only_the_sum(place, tmp_path):
    done = additivity.compose(files(place, 0, 0), out=tmp_path / "sum.safetensors")
    one = Direction.load(place / "layer0.safetensors")
    assert torch.allclose(Direction.load(done["combined"]).at(0), 2 * one.at(0))
    assert list(done["files"]) == ["layer0", "layer0-2"]
    assert additivity.compose(files(place, 1), out=tmp_path)["combined"] == str(tmp_path / "combined.safetensors")


@pytest.mark.filterwarnings("ignore::steerable.SteerableWarning")
def test_refused_before_anything_is_generated(place, tmp_path, monkeypatch):
    def never(*arguments, **more):
        raise AssertionError("generated")

    monkeypatch.setattr(arms, "generate_jobs", never)
    given = options(place, tmp_path / "out")
    (tmp_path / "open.jsonl").write_text('{"id": "a", "prompt": "w1"}\n')
    for said, layers, more in (
        ("one direction file at least", (), {}),
        ("--pairs is 'some'", (0,), {"pairs": "some"}),
        ("--limit is 0", (0,), {"limit": 0}),
        ("no two of the files are of single, neighbouring layers", (0, 2), {"pairs": "adjacent"}),
        ("has 4 layers of width 64, the vectors' model 4 layers of width 32", (0,), {"to": str(place / "wide")}),
        ("is not a loadable model", (0,), {"to": str(place / "nothing")}),
        ("neither an answer nor an entry", (0,), {"tasks": str(tmp_path / "open.jsonl"), "limit": 1}),
        ("--to measures the vectors on another model", (0,), {"tasks": None, "to": "pocket"}),
        ("has no {prompt}", (0,), {"template": "Solve"}),
        ("width 32, but the model's width there is 64", (0,), {"model": str(place / "wide")}),
    ):
        with pytest.raises(UsageError, match=said):
            additivity.compose(files(place, *layers), **given | more)
