"""`steer --recipe`, `edit` and `ls recipes`: examples run on the bundled model, mistakes are one sentence."""

import json
import shlex
import shutil
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch
from sae_files import make_sae
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import steerable as st
from steerable import UsageError, WeightPatch
from steerable.jobs.recipe_job import _parameters, command
from steerable.methods.recipes import RECIPES
from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.steering.spec import Program

ROOT = Path(__file__).parents[2]
INSTEAD = {  # the bundled model knows arithmetic, and few words; and the run is a short one
    "seal": ("runs/pocket", "runs/short"),  # with more paragraphs
    "efficiency": ("--data runs/short", "--data runs/short --set layer=3"),
    "raptor": ("happy-sad", "questions-statements"),
    "selective": ("happy-sad", "questions-statements"),
    "vla-neurons": ("one,two,three,four,five,six,seven,eight,nine", "0,1,2,3,4,5,6,7,8,9"),
    "persona": ("--set persona", "--set prompts=2 --set max_new_tokens=4 --set persona"),
}


@pytest.fixture(scope="module")
def material(finished, made_once):
    """A folder with all that the examples name: runs, files, and a direction."""

    def make(folder):
        from steerable.jobs import main_job
        from steerable.jobs.recipe_job import steer_or_recipe

        shutil.copytree(finished, folder / "runs/pocket")
        few = {"limit": 16, "validation": 1, "evaluation": 1, "samples": 4, "max_new_tokens": 100}
        main_job.run(folder / "runs/short", stage="tasks", model="pocket", annotator="length", workers=1, **few)
        for stage in ("generate", "annotate"):
            main_job.run(folder / "runs/short", stage=stage, fresh=False, workers=1)
        write_files(folder)
        pairs = folder / "examples/contrasts/formal-casual.jsonl"
        steer_or_recipe(folder / "formal.safetensors", recipe="caa", data=pairs, model="pocket")

    return made_once("recipes", make)


def write_files(folder):
    """The files that the examples name."""
    shutil.copytree(ROOT / "examples/contrasts", folder / "examples/contrasts")
    roles = [("default", "How can I help?"), ("default", "It is 7."), ("pirate", "Arr, 7!"), ("ghost", "Boo")]
    steps = [("Button A gave 3.", 0.6, 1), ("Button B gave 5.", 0.2, 1), ("Button A gave 1.", 0.5, 2)]
    write(folder / "roles.jsonl", [dict(zip(("role", "text"), row, strict=True)) for row in roles])
    write(folder / "steps.jsonl", [dict(zip(("prompt", "entropy", "run"), row, strict=True)) for row in steps])
    make_sae(folder / "autoencoder", "blocks.3.hook_resid_post", features=200, width=192)


@pytest.fixture
def place(material, tmp_path, monkeypatch):
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with the files that the examples name, and a direction, but no run."""
    write_files(tmp_path)
    Direction({Site("resid_post", 3): torch.ones(192)}).save(tmp_path / "formal.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", RECIPES)
def test_the_example_runs(steerable, place, name):
    line = command(name).replace("--model smol", "--model pocket").replace(*INSTEAD.get(name, ("", "")))
    said = steerable(*shlex.split(line)[1:], "--json")
    assert said.code == 0, said.err
    made = json.loads(said.out)
    assert (made["recipe"], made["model"]) == (name, "pocket")
    if RECIPES[name].gives == "direction":
        direction = Direction.load(made["out"])
        assert [str(site) for site in direction.vectors] == made["sites"] and direction.strength == made["strength"]
        assert direction.model_id == "pocket" and direction.method
    elif RECIPES[name].gives == "steering":
        program = Program.load(made["out"])
        assert [str(part.site) for part in program] == made["sites"]
        assert program == Program.load(program.save(place / "again.json"))
    else:
        patch = WeightPatch.load(made["out"])
        assert list(patch.changes) == made["weights"] and patch.model_id == "pocket"


@pytest.mark.parametrize("off", ["off", "null"])
def test_a_part_of_a_recipe_can_be_switched_off(off):
    recipe = RECIPES["steer2edit"]
    assert _parameters("steer2edit", recipe, [f"rho_mlp={off}", "share=0.1"]) == {"rho_mlp": None, "share": 0.1}
    with pytest.raises(UsageError, match="alpha is 'off': expected a number"):
        _parameters("steer2edit", recipe, ["alpha=off"])


@pytest.mark.parametrize("name", ["assistant-axis", "linear-act"])
def test_chat_takes_a_steering_file(steerable, place, name):
    line = command(name).replace("--model smol", "--model pocket")
    steerable(*shlex.split(line)[1:])
    said = steerable("chat", "2 + 2 = ?", "--steer", f"{name}.json", "--layers", 4, "--max-new-tokens", 3, "--json")
    assert said.code == 0 and json.loads(said.out)["steered"]
    (place / "none.json").write_text("{}")
    for file in ("nothing.json", "none.json"):
        said = steerable("chat", "2 + 2 = ?", "--steer", file, "--max-new-tokens", 3)
        assert said.code == 2 and f"{file} is no steering file" in said.err and said.err.count("\n") == 1


def test_the_edited_model_is_the_patched_one(steerable, place):
    line = "edit --recipe laser --set share=0.5 --out p.safetensors --merge edited --json"
    said = steerable(*line.split())
    made = json.loads(said.out)
    assert (said.code, made["merged"], made["stats"]["rank"]) == (0, "edited", 96)
    import steerable as st

    (base, tokenizer), (edited, _) = st.load("pocket", device="cpu"), st.load("edited", device="cpu")
    inputs = tokenizer("2 + 2", return_tensors="pt")
    with torch.no_grad(), WeightPatch.load("p.safetensors").apply(base):
        torch.testing.assert_close(edited(**inputs).logits, base(**inputs).logits)


def test_chains_without_the_labels_are_labelled_by_seals_cues(steerable, place):
    """Pocket's chains have none of the labels; its words are not SEAL's, so that all thoughts are execution."""
    for _ in range(2):
        said = steerable("steer", "--recipe", "seal", "--data", "runs/pocket")
        assert said.code == 2 and "no span labelled reflection or transition begins behind" in said.err
        assert "those that do are labelled execution" in said.err
        # as another tool has them: without spans, and without splits of the tasks
        (place / "runs/pocket/spans.jsonl").unlink(missing_ok=True)
        tasks = [json.loads(line) for line in (place / "runs/pocket/tasks.jsonl").read_text().splitlines()]
        write(place / "runs/pocket/tasks.jsonl", [{"id": task["id"], "prompt": task["prompt"]} for task in tasks])


def test_ls_recipes(steerable):
    said = steerable("ls", "recipes")
    assert said.code == 0 and all(name in said.out for name in RECIPES)
    rows = json.loads(steerable("ls", "recipes", "--json").out)
    assert [row["recipe"] for row in rows] == list(RECIPES)
    shown = steerable("ls", "recipes", "seal").out
    assert "h' = h + alpha S at paragraph breaks" in shown and f"Example: {command('seal')}" in shown
    assert "expected one like seal" in steerable("ls", "recipes", "zeal").err
    assert rows[0]["command"] == command("seal") and rows[0]["papers"] == "arXiv 2504.07986"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("edit --recipe leser --out x", "unknown recipe 'leser': expected one like laser"),
        ("steer --recipe xyz --out x", "unknown recipe 'xyz': expected one of seal, efficiency"),
        ("steer --recipe laser", "the recipe laser gives a patch: use `steerable edit --recipe laser`"),
        ("edit --recipe caa --out x", "the recipe caa gives a direction: use `steerable steer --recipe caa`"),
        ("steer --recipe caa", "the recipe caa needs --data, a file: positive, negative"),
        ("edit --recipe laser --data runs/short --out x.safetensors", "the recipe laser takes no --data"),
        ("steer --recipe caa --data nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("steer --recipe seal --data .", "is no run folder"),
        ("steer --recipe caa --samples 3", "--samples is an option of the stage, not of a recipe"),
        ("steer --set layer=3", "--data and --set go with --recipe"),
        ("steer --recipe raptor --out a.safetensors", "gives a steering, whose file ends in .json"),
        ("steer --recipe caa --set depth=3", "the recipe caa takes layer, strength"),
        ("steer --recipe caa --set layer", "the recipe caa takes layer, strength"),
        ("steer --recipe caa --set layer=deep", "layer is 'deep': expected a whole number"),
        ("steer --recipe angular --set adaptive=3", "adaptive is '3': expected true or false"),
        ("steer --recipe persona --set keep=f", "keep is a function, which only Python can give"),
        ("steer --recipe cast --data examples/contrasts/happy-sad.jsonl", "the recipe cast needs --set direction=..."),
        ("steer --recipe caa --data examples/contrasts/happy-sad.jsonl --set layer=9", "there is no layer 9"),
        ("steer --recipe assistant-axis --data steps.jsonl", "record 1 has no 'role': expected role, text"),
        ("steer --recipe east --data steps.txt", "there is no file steps.txt with prompt, entropy, run"),
        ("steer --recipe sae --data runs/short --set feature=1", "runs/short is no folder of a sparse autoencoder"),
        ("steer --recipe sae --data autoencoder --set feature=200", "there is no feature 200"),
        ("steer --recipe sae --data autoencoder --set along=formal.safetensors", "the autoencoder reads resid_post.3"),
        ("edit --recipe thinkedit --data runs/short --out x.safetensors", "no chain has "),
        ("edit --recipe laser --out x", "--out is x: a patch's file ends in .safetensors"),
        ("edit --recipe laser --out x.safetensors --merge runs", "--merge is runs, which is there already"),
        ("edit --recipe laser --out x.safetensors --merge steps.jsonl", "steps.jsonl is a file: --merge must name a"),
        ("edit --recipe laser --out x.safetensors --set share=-3", "share is -3: expected a number above 0 and below"),
        (
            "edit --recipe steer2edit --data runs/short --set rho_attention=99 --set rho_mlp=off --out x.safetensors",
            "the recipe steer2edit changes no weight at these settings",
        ),
        ("steer --recipe seal --data steps.jsonl", "steps.jsonl is a file: --data must name a folder"),
    ],
)
def test_what_does_not_fit_is_one_sentence(steerable, place, line, text):
    before = {path.name for path in place.iterdir()}
    said = steerable(*shlex.split(line))
    assert said.code == 2 and said.out == "" and text in said.err
    assert said.err.startswith("steerable: ") and said.err.count("\n") == 1
    assert {path.name for path in place.iterdir()} == before


WRONG = {
    "": ["records.jsonl"],
    "pairs": ["", "nowhere.jsonl", "records.jsonl", "folder", "text.txt", "empty.jsonl", "broken.jsonl"],
    "roles": ["", "nowhere.jsonl", "records.jsonl", "folder", "text.txt", "empty.jsonl", "broken.jsonl"],
    "steps": ["", "nowhere.jsonl", "records.jsonl", "folder", "text.txt", "empty.jsonl", "broken.jsonl"],
    "thoughts": ["", "nowhere", "records.jsonl", "folder", "run"],
    "lengths": ["", "nowhere", "records.jsonl", "folder", "run"],
    "autoencoder": ["", "nowhere", "records.jsonl", "folder"],
}
"""What is given as --data that recipes cannot use, by the kind of data that they take."""


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_refuses_in_one_sentence_before_the_model_is_loaded(steerable, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", None)  # whoever calls it fails with a traceback
    Direction({Site("resid_post", 3): torch.ones(192)}).save(tmp_path / "formal.safetensors")
    for folder in ("folder", "run"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run/config.json").write_text('{"model": "pocket"}')
    (tmp_path / "records.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    for file in ("text.txt", "empty.jsonl"):
        (tmp_path / file).touch()
    before = sorted(tmp_path.rglob("*"))
    recipe = RECIPES[name]
    start = ["edit" if recipe.gives == "patch" else "steer", "--recipe", name, *chosen_settings(recipe.example)]
    start += ["--out", f"made{'.json' if recipe.gives == 'steering' else '.safetensors'}"]
    lines = [[*start, "--set", "depth=3"], [*start, "--set", "layer"], [*start[:-1], "made.txt"]]
    lines += [[*start, *(["--data", data] if data else [])] for data in WRONG[recipe.data]]
    if sets := chosen_settings(recipe.example):  # without what it needs
        lines += [["steer", "--recipe", name]] if "direction=" in sets[-1] or name in ("persona", "vla-neurons") else []
    for line in lines:
        said = steerable(*line)
        assert said.code == 2 and said.out == "", (line, said)
        assert said.err.startswith("steerable: ") and said.err.count("\n") == 1 and len(said.err) > 30, (line, said)
        assert sorted(tmp_path.rglob("*")) == before, line


def chosen_settings(example):
    """The --set options of an example."""
    words = shlex.split(example)
    return [part for flag, value in zip(words, words[1:], strict=False) if flag == "--set" for part in (flag, value)]


@pytest.mark.parametrize("name", ["seal", "efficiency"])
def test_a_model_without_a_think_block_is_refused(steerable, tmp_path, monkeypatch, tiny_llama, tokenizer, name):
    monkeypatch.chdir(tmp_path)
    text = tokenizer.backend_tokenizer.to_str().replace("<think>", "<a>").replace("</think>", "<b>")
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), chat_template=tokenizer.chat_template)
    plain.chat_template = plain.chat_template.replace(" <think>", "")
    for part in (tiny_llama, plain):
        part.save_pretrained(tmp_path / "model")
    write(tmp_path / "tasks.jsonl", [{"id": "a", "prompt": "w1", "split": "extraction", "answer": "w5"}])
    about = {"task_id": "a", "closed": True, "strength": 0.0, "control": None, "prompt_ids": [4, 8, 5]}
    chains = [{**about, "sample": n, "ids": [12] * (3 + n), "tokens": 3 + n} for n in (0, 1)]
    chains = [c | {"thinking": "w5" * c["tokens"], "answer": "w5", "thinking_tokens": c["tokens"]} for c in chains]
    write(tmp_path / "chains.jsonl", chains)
    write(tmp_path / "spans.jsonl", [{"task_id": "a", "sample": 0, "label": "execution", "start": 0, "end": 4}])
    (tmp_path / "config.json").write_text('{"model": "model"}')
    said = steerable("steer", "--recipe", name, "--data", ".", "--out", "made.safetensors")
    refusal = [line for line in said.err.splitlines() if "warning" not in line]  # it has no end token either
    assert said.code == 2 and len(refusal) == 1 and "has no think block" in refusal[0], said
    assert not (tmp_path / "made.safetensors").exists()


def test_what_was_made_for_another_model_is_refused(steerable, files):
    Direction({Site("resid_post", 3): torch.ones(32)}).save("narrow.safetensors")
    make_sae(files / "other", "blocks.3.hook_resid_post", features=20, width=64)
    pairs = "--data examples/contrasts/questions-statements.jsonl"
    for line, text in (
        (f"cast {pairs} --set direction=narrow.safetensors", "has width 32, but the model's width there is 192"),
        (f"guiding-giants {pairs} --set direction=narrow.safetensors", "has width 32"),
        ("sae --data other --set feature=1", "the autoencoder has width 64, that of some-model, and the model has 192"),
        ("vla-neurons --set words=zebra", "no neuron has 3 of these words"),
    ):
        said = steerable("steer", "--recipe", *shlex.split(line), "--model", "pocket")
        assert said.code == 2 and text in said.err and said.err.count("\n") == 1, said


def test_a_model_is_spread_over_the_devices(steerable, files, monkeypatch):
    asked, loaded = {}, st.load("pocket")
    monkeypatch.setattr(models, "load", lambda name, **options: asked.update(options) or loaded)
    said = steerable("edit", "--recipe", "laser", "--model", "pocket", "--device", "auto", "--out", "p.safetensors")
    assert said.code == 0 and asked["device_map"] == "auto" and "device" not in asked


LAYERED = [n for n, r in RECIPES.items() if "layer" in signature(r.function).parameters]


@pytest.mark.parametrize("name", [name for name in LAYERED if RECIPES[name].data not in ("thoughts", "lengths")])
def test_a_layer_that_the_model_does_not_have_is_refused(steerable, files, name):
    line = command(name).replace("--model smol", "--model pocket")
    said = steerable(*shlex.split(line)[1:], "--set", "layer=99")
    assert said.code == 2 and "no layer 99: the model has layers 0 to 5" in said.err and said.err.count("\n") == 1


def test_scikit_learn_is_asked_for_before_the_model(steerable, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for name, more in (("raptor", ""), ("guiding-giants", " --set direction=formal.safetensors")):
        line = f"steer --recipe {name} --data examples/contrasts/happy-sad.jsonl --model no/where{more}"
        assert "pip install 'steerable[probe]'" in steerable(*line.split()).err


def test_data_that_lack_something_are_one_sentence(steerable, place):
    write(place / "roles.jsonl", [{"role": "ghost", "text": "Boo"}])
    assert (
        "no record with the role 'default': the roles are ghost"
        in steerable("steer", "--recipe", "assistant-axis", "--data", "roles.jsonl").err
    )
    write(place / "steps.jsonl", [{"prompt": "A", "entropy": "high", "run": 1}])
    said = steerable("steer", "--recipe", "east", "--data", "steps.jsonl")
    assert "record 1 has the entropy 'high': expected a number" in said.err
    write(place / "steps.jsonl", [{"prompt": "A", "entropy": 1, "run": [1]}])
    said = steerable("steer", "--recipe", "east", "--data", "steps.jsonl")
    assert "record 1 has the run [1]: expected a name or a number" in said.err
    write(place / "same.jsonl", [{"positive": "So it is 7.", "negative": "So it is 7."}] * 4)
    said = steerable("steer", "--recipe", "caa", "--data", "same.jsonl")
    assert (
        said.code == 2
        and "the two sides are the same to the model" in said.err
        and not (place / "caa.safetensors").exists()
    )
    tasks = Path("runs/short/tasks.jsonl").read_text()
    (place / "runs/short/tasks.jsonl").write_text("".join(tasks.splitlines(keepends=True)[1:]))
    said = steerable("steer", "--recipe", "efficiency", "--data", "runs/short")
    assert said.code == 2 and "tasks.jsonl lacks the task" in said.err
    (place / "runs/short/tasks.jsonl").write_text(tasks)
    chains = [json.loads(line) | {"closed": False} for line in Path("runs/short/chains.jsonl").read_text().splitlines()]
    write(place / "runs/short/chains.jsonl", chains)
    said = steerable("steer", "--recipe", "efficiency", "--data", "runs/short")
    assert said.code == 2 and "holds no right chain that came to an end" in said.err
