"""The command line: every mistake is one sentence with the right exit code, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from steerable import __version__
from steerable.cli import app
from steerable.steering.direction import Direction
from steerable.steering.site import Site

STAGES = ["tasks", "generate", "annotate", "extract", "attribute", "select", "steer", "evaluate", "report"]
TABLE = ["run", *STAGES, "chat", "fetch", "contrast", "calibrate", "audit", "edit", "probe", "reannotate"]
TABLE += ["lens", "compose", "passk", "import", "export", "validate", "serve", "doctor"]
GROUPS = ["ls", "ls recipes", "train", "train rl", "train upft", "pocket", "pocket train", "pocket measure"]
GROUPS += ["smol", "smol train", "smol measure"]
COMMANDS = [*TABLE, *GROUPS]


def assert_refused(said, code, *texts):
    assert (said.code, said.out) == (code, "")
    assert said.err.startswith("steerable: ") and said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    for text in texts:
        assert text in said.err


# --- help ---


def test_help_is_quick_and_imports_nothing_heavy():
    """Processor time, so that a busy machine does not count against it; the first command is charged with the start."""
    code = (
        "import json, sys, time\n"
        "from steerable.cli import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    sys.argv, before = ['steerable', *command.split(), '--help'], time.process_time() if command else 0\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        assert not end.code\n"
        "    heavy = {'torch', 'transformers', 'reasoning_gym', 'rich'} & set(sys.modules)\n"
        "    print(command, sorted(heavy), time.process_time() - before < 1.5, file=sys.stderr)\n"
    )
    commands = ["", *COMMANDS]
    said = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True)
    assert said.returncode == 0 and said.stderr.splitlines() == [f"{command} [] True" for command in commands]
    shown = [line for line in said.stdout.splitlines() if line.startswith("Usage: ")]
    assert all(line.startswith(f"Usage: steerable {c}".rstrip()) for line, c in zip(shown, commands, strict=True))


def test_no_argument_is_help(steerable):
    assert steerable() == steerable("--help")


def test_the_table_of_commands():
    assert [c.name for c in app.registered_commands] == TABLE
    groups = {g.name: [c.name for c in g.typer_instance.registered_commands] for g in app.registered_groups}
    assert groups.pop("ls") == ["recipes"]
    assert groups == {"train": ["rl", "upft"], "pocket": ["train", "measure"], "smol": ["train", "measure"]}


def test_every_setting_is_an_option(steerable, monkeypatch):
    from steerable.jobs.settings import STAGES as TABLE_OF_STAGES
    from steerable.jobs.settings import Config

    monkeypatch.setenv("COLUMNS", "200")
    options = {"run": set(Config.model_fields)} | {stage.name: {*stage.options.split()} for stage in TABLE_OF_STAGES}
    for command, names in options.items():
        shown = steerable(command, "-h").out
        for field in Config.model_fields:  # a stage has those that it reads
            assert (f"\n  --{field.replace('_', '-')} " in shown) == (field in names), (command, field)
        assert "--json" in shown and "--out" in shown
    for command in ("calibrate", "audit"):  # as docs/serving.md says, and for a --run whose file may not ask for it
        shown = steerable(command, "-h").out
        assert all(f"\n  --{name} " in shown for name in ("engine", "engine-options", "trust-remote-code")), command
    assert_refused(steerable("annotate", "--model", "other"), 2, "No such option: --model")


def test_every_help_shows_an_example(steerable):
    for command in COMMANDS:
        shown = steerable(*command.split(), "-h").out
        if command not in ("ls", "train", "pocket", "smol"):
            assert f"Example: steerable {command}" in shown, command
            assert "  --json " in shown and not any(line.rstrip().endswith(">") for line in shown.splitlines())


def test_version_and_completion(steerable, monkeypatch):
    assert steerable("--version").out == f"steerable {__version__}\n"
    assert "--install-completion" in steerable("-h").out


def test_settings_from_a_file(steerable, tmp_path):
    """What could run code is never taken from it."""
    file, out = tmp_path / "settings.json", tmp_path / "run"
    file.write_text('{"limit": 0}')
    assert_refused(steerable("run", "--config", file, "--out", out), 2, "--limit is 0: expected 1 or more")
    assert_refused(steerable("run", "--config", file, "--limit", 3, "--seed", -1, "--out", out), 2, "--seed is -1")
    file.write_text('{"annotator": "strangers:spans", "trust_remote_code": true}')
    assert_refused(steerable("run", "--config", file, "--out", out), 2, "asks for --trust-remote-code")
    file.write_text("[]")
    assert_refused(steerable("run", "--config", file, "--out", out), 2, "holds no JSON object")
    assert_refused(steerable("run", "--config", tmp_path / "none", "--out", out), 2, "there is no")
    assert not out.exists()


def test_as_a_module():
    said = subprocess.run([sys.executable, "-m", "steerable", "dance"], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == "steerable: No such command 'dance'; see `steerable --help`\n"


# --- mistakes ---


def test_an_option_without_its_value_names_its_command(steerable):
    assert_refused(steerable("chat", "--strength"), 2, "requires an argument; see `steerable chat --help`")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("dance", "No such command 'dance'"),
        ("run --speed 3", "No such option: --speed"),
        ("run --limit many", "--limit"),
        ("run --limit", "--limit"),
        ("run extra", "extra"),
        ("pocket", "Missing command"),
        ("run --limit 0", "--limit is 0: expected 1 or more"),
        ("run --workers 0", "--workers is 0"),
        ("run --map rotate(30)", "rotate needs a plane"),
        ("run --map set([1,2])", "has 2 numbers, but there are 1 rows"),
        ("run --engine jax", "--engine is 'jax': expected one of transformers"),
        ("run --window wide", "--window is 'wide': expected one of published, span, onset"),
        ("run --baseline none", "--baseline is 'none'"),
        ("run --annotator nobody", "--annotator is 'nobody', which cannot be imported"),
        ("run --layers two", "--layers is 'two'"),
        ("run --layers 6", "--layers is 6, but pocket has layers 0 to 5"),
        ("select --layers 6", "--layers is 6, but pocket has layers 0 to 5"),
        ("run --seed -1", "--seed is -1"),
        ("run --sweep a", "--sweep is 'a'"),
        ("pocket measure --tasks 0", "--tasks is 0: expected 1 or more"),
        ("pocket measure --samples 0", "--samples is 0: expected 1 or more"),
        ("pocket measure --deep -1", "--deep is -1: expected 0 or more"),
        ("pocket measure --workers -1", "--workers is -1: expected 1 or more"),
        ("run --dtype int", "unknown dtype 'int'"),
        ("run --device moon", "cannot use the device 'moon'"),
        (
            "run --model {tmp}/nowhere",
            "nowhere'; give 'pocket', 'smol', 'smol-think', a folder, a .gguf file or a hub name",
        ),
        ("run --model {tmp}", "is not a loadable model folder"),
        ("run --model nobody/nothing", "'nobody/nothing' is neither a folder nor a known model"),
        *((stage, f"stage '{stage}' needs") for stage in STAGES[1:]),
    ],
)
def test_mistakes(steerable, tmp_path, monkeypatch, arguments, text):
    if "nobody/" in arguments:  # no network
        monkeypatch.setattr("steerable.models.loading.pin", lambda name, revision: (revision, False))
    words = arguments.format(tmp=tmp_path).split()
    out = tmp_path / "run"
    assert_refused(steerable(*words, *(["--out", out] if words[0] in ("run", *STAGES) else [])), 2, text)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "there is no file"),
        ("", "is empty: expected at least one JSON line"),
        ("\n\n", "is empty"),
        ('{"id":"a","prompt":"b"}\n{"id":"c","pro\n', "line 2 is not valid JSON"),
        ('{"id":"a","prompt":"b"}\n[1]\n', "line 2 holds list: expected a JSON object"),
        ('{"id":"a"}\n', "record 1 has no prompt"),
        ('{"id":"a","prompt":7}\n', "record 1"),
        ('{"id":"a","prompt":"b"}\n{"id":"a","prompt":"c"}\n', "two tasks with the id 'a'"),
        ('{"id":"a","prompt":"b"}\n', "gives only 1 more distinct task, but 24 were asked for"),
    ],
)
def test_task_files(steerable, tiny, tmp_path, content, text):
    path, out = tmp_path / "tasks.jsonl", tmp_path / "run"
    if content is not None:
        path.write_text(content)
    assert_refused(steerable("run", "--out", out, *tiny, "--tasks", path), 2, text)
    assert not out.exists()


def test_a_run_that_is_refused_does_not_touch_a_finished_one(steerable, finished, tiny, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "none.jsonl").write_text("")
    for wrong in (["--layers", "99"], ["--model", tmp_path]):
        assert_refused(steerable("run", "--out", copy, *tiny, *wrong), 2)
    for path in finished.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (copy / path.relative_to(finished)).read_bytes()


def test_out_is_a_file_or_cannot_be_written(steerable, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(steerable("run", "--out", tmp_path / "file"), 2, "is a file: --out must name a folder")
    assert_refused(steerable("tasks", "--limit", 1, "--out", tmp_path / "file/run"), 1, "cannot use")


def test_a_broken_config(steerable, finished, tmp_path):
    for content, text in (
        ("{", "is not valid JSON"),
        ("[]", "holds no settings"),
        ('{"speed": 1}', "unknown setting 'speed'"),
        ('{"limit": "1"}', "--limit is '1': expected a whole number"),
    ):
        (tmp_path / "config.json").write_text(content)
        assert_refused(steerable("annotate", "--out", tmp_path), 2, text)


def test_a_model_without_a_think_block(steerable, shared, tmp_path):
    folder = shared / "models/stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    said = steerable("run", "--model", folder, "--gate", "thinking", "--out", tmp_path / "run")
    assert_refused(said, 2, "has no think block: expected <think> and </think>")
    assert_refused(steerable("chat", "Hello?", "--model", folder), 2, "has no chat template")  # it need not think
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_chat_template(steerable, tiny_llama, tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    said = steerable("run", "--model", tmp_path / "model", "--out", tmp_path / "run")
    assert_refused(said, 2, "has no chat template")


def test_a_broken_model_file(steerable, tiny_llama, tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(
        steerable("run", "--model", tmp_path, "--out", tmp_path / "run"), 2, "is not a loadable model folder"
    )


# --- what is wrong with a direction ---


def direction(folder, width=192, layer=2, **more):
    vector = torch.ones(width) / 10
    return Direction({Site("resid_post", layer): vector}, model_id="pocket", **more).save(folder / "d.safetensors")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("--steer {tmp}/none.safetensors", 2, "there is no direction file"),
        ("--steer {tmp}/narrow", 2, "there is no direction file"),
        ("--steer {tmp}/text.safetensors", 1, "is not a sound safetensors file"),
        ("--steer {tmp}/narrow/d.safetensors", 2, "has width 64, but the model's width there is 192"),
        ("--steer {tmp}/deep/d.safetensors", 2, "layer"),
        ("--steer {tmp}/d.safetensors --layers 3", 2, "no vector at layer 3"),
        ("--steer {tmp}/d.safetensors --layers x", 2, "--layers is 'x'"),
        ("--steer {tmp}/d.safetensors --where nowhere", 2, "nowhere"),
        ("--steer {tmp}/d.safetensors --strength nan", 2, "--strength is"),
        ("--strength 1", 2, "need a direction file"),
        ("--max-new-tokens 0", 2, "--max-new-tokens is 0"),
        ("--seed -1", 2, "--seed is -1"),
    ],
)
def test_chat_refuses_before_it_says_anything(steerable, tmp_path, arguments, code, text):
    direction(tmp_path)
    (tmp_path / "text.safetensors").write_text("no vectors here")
    (tmp_path / "narrow").mkdir()
    direction(tmp_path / "narrow", width=64)
    (tmp_path / "deep").mkdir()
    direction(tmp_path / "deep", layer=6)
    said = steerable("chat", "What is 2 + 2?", *arguments.format(tmp=tmp_path).split())
    assert_refused(said, code, text)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_chat_about_nothing(steerable, prompt):
    assert_refused(steerable("chat", prompt, "--max-new-tokens", 2), 2, "the prompt is empty")


def test_a_direction_of_another_model_is_a_warning(steerable, tmp_path):
    Direction({Site("resid_post", 2): torch.ones(192)}, model_id="other").save(tmp_path / "d.safetensors")
    said = steerable("chat", "2 + 2?", "--max-new-tokens", 2, "--json", "--steer", tmp_path / "d.safetensors")
    assert said.code == 0 and json.loads(said.out)["steered"]
    assert said.err.startswith("steerable: warning: this direction was made on 'other'") and said.err.count("\n") == 1


# --- JSON ---


def test_json_is_one_document(steerable, finished, tiny, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    said = steerable("run", "--json", "--workers", 1, "--out", copy, *tiny)
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out) == json.loads((finished / "report.json").read_text())
    for stage in ("annotate", "extract", "report"):
        shutil.rmtree(copy / "stages")  # so that there is something to do
        said = steerable(stage, "--json", "--out", copy)
        assert (said.code, said.err, said.out.count("\n")) == (0, "", 1)
        assert json.loads(said.out) == {"out": str(copy), "stage": stage}


def test_without_json_the_report_is_named(steerable, finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    assert steerable("report", "--out", copy).out == f"The report is {copy / 'report.html'}\n"


def test_progress_goes_to_standard_error(steerable, finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    said = steerable("annotate", "--out", copy)
    assert (said.out, said.err) == ("", "annotate: was done already\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_the_output_is_full(tmp_path):
    command = [sys.executable, "-m", "steerable", "validate", direction(tmp_path), "--json"]
    with open("/dev/full", "w") as full:
        said = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert said.returncode == 1
    assert said.stderr == "steerable: the output: No space left on device\n"


@pytest.mark.slow
def test_real_processes_leave_standard_error_clean(finished, tmp_path):
    """Workers included: no progress bar of a library, no warning, no semaphore left over."""
    for name in ("config.json", "tasks.jsonl"):
        shutil.copy(finished / name, tmp_path / name)
    command = [sys.executable, "-m", "steerable", "generate", "--json", "--workers", "2", "--out", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")
    assert json.loads(said.stdout) == {"out": str(tmp_path), "stage": "generate"}
    assert (tmp_path / "chains.jsonl").read_bytes() == (finished / "chains.jsonl").read_bytes()


def test_vectors_go_out_and_come_back(steerable, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = finished / "vectors/candidates/onset.pooled/backtracking.safetensors"
    said = steerable("export", file, "--to", "llama.cpp", "--layers", "1,3", "--out", "b.gguf", "--json")
    assert json.loads(said.out)["layers"] == [1, 3]
    said = steerable("import", "b.gguf", "--json")
    assert json.loads(said.out)["out"] == "b.safetensors"
    before, after = Direction.load(file).only([1, 3]), Direction.load("b.safetensors")
    assert all(torch.equal(before.vectors[site], after.vectors[site]) for site in before.vectors)
    assert_refused(steerable("import", "b.gguf"), 2, "is there already")
    assert "is sound" in steerable("validate", "b.safetensors").out
    (tmp_path / "b.safetensors").write_bytes(b"no")
    assert_refused(steerable("validate", "b.safetensors"), 2)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("import nowhere.gguf", "there is no such file"),
        ("export nowhere.safetensors --to repeng --out x.gguf", "there is no direction file"),
        ("export {file} --to nothing --out x", "unknown format 'nothing': expected one of "),
        ("export {file} --to llama.cpp --out x", "block 0"),
        ("export {file} --to repeng --layers one --out x", "expected layers separated by commas"),
        ("validate nowhere", "there is no such file"),
    ],
)
def test_vector_files_that_cannot_be(steerable, finished, tmp_path, monkeypatch, command, text):
    monkeypatch.chdir(tmp_path)
    file = finished / "vectors/candidates/onset.pooled/backtracking.safetensors"
    assert_refused(steerable(*command.format(file=file).split()), 2, text)
    assert not list(tmp_path.iterdir())


# --- what is there already, and what a stranger's file asks for ---

WRITERS = (
    "run", *STAGES, "train rl", "train upft", "passk", "compose {file} --tasks pocket", "compose {file}",
    "pocket train", "pocket measure", "calibrate {file} --target accuracy", "audit {file}", "chat 2+2?", "lens {file}",
    "import {file}", "export {file} --to llama.cpp",
    "export {file} --to svec", "export {file} --to peft-beft --model-type llama", "export {file} --to checkpoint "
    "--model pocket", "probe",
)  # fmt: skip


READERS = (
    "run --tasks {file}.jsonl", "run --tasks {file}.json", "run --tasks {file}.csv", "validate {file}.jsonl",
    "annotate --agreement {file}.jsonl {file}.jsonl", "train rl --recipe {file}.json", "chat 2+2? --steer {file}.pt",
    "passk --exclude {file}.jsonl", "validate {file}.pt", "import {file}.pt", "lens {file}.pt",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a Git LFS pointer"])
@pytest.mark.parametrize("command", READERS)
def test_what_is_no_file_is_not_read(steerable, tmp_path, monkeypatch, command, kind):
    monkeypatch.chdir(tmp_path)
    for suffix in ("jsonl", "json", "csv", "pt"):
        path = tmp_path / f"there.{suffix}"
        if kind == "a FIFO":
            os.mkfifo(path)
        elif kind == "a device":
            path.symlink_to("/dev/zero")  # which never ends
        else:
            path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 7\n")
    said = steerable(*command.format(file=tmp_path / "there").split())
    assert_refused(said, 2, "there.")
    assert kind in said.err or "no regular file" in said.err


@pytest.mark.parametrize("command", WRITERS)
def test_out_that_is_no_file_is_left_alone(steerable, tmp_path, command):
    file = direction(tmp_path, width=192)
    os.mkfifo(tmp_path / "pipe")
    option = "--to" if command == "probe" else "--out"
    said = steerable(*command.format(file=file).split(), option, tmp_path / "pipe")
    assert_refused(said, 2, "pipe")
    assert "FIFO" in said.err or "is there already" in said.err
    assert (tmp_path / "pipe").is_fifo() and {p.name for p in tmp_path.iterdir()} == {"pipe", "d.safetensors"}


def test_out_that_is_a_link(steerable, tmp_path):
    file = direction(tmp_path, width=192)
    (tmp_path / "link").symlink_to("made")
    assert steerable("export", file, "--to", "svec", "--out", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "made").is_file()


@pytest.mark.parametrize("command", ["run", "generate", "report"])
def test_a_run_of_another_model_is_not_overwritten(steerable, finished, tiny, tmp_path, command):
    copy = shutil.copytree(finished, tmp_path / "run")
    options = tiny[1:] if command == "run" else []
    said = steerable(command, "--out", copy, *options, "--model", tmp_path / "other")
    assert_refused(said, 2, "results of another model, 'pocket' and not", "another --out, or --overwrite")
    for path in finished.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (copy / path.relative_to(finished)).read_bytes()
    said = steerable(command, "--out", copy, *options, "--model", tmp_path / "other", "--overwrite")
    assert_refused(
        said, 2, "give 'pocket', 'smol', 'smol-think', a folder, a .gguf file or a hub name"
    )  # it would have gone on


@pytest.mark.parametrize(
    "command", ["train rl", "train upft", "passk", "calibrate {file}", "compose {file} --tasks pocket"]
)
def test_a_run_is_not_overwritten_by_another_job(steerable, finished, tmp_path, command):
    copy = shutil.copytree(finished, tmp_path / "run")
    file = finished / "vectors/backtracking.safetensors"
    said = steerable(*command.format(file=file).split(), "--out", copy)
    assert_refused(said, 2, "holds what `steerable run` made")


def strangers(finished, folder, monkeypatch, **settings):
    """A run folder whose config.json asks for code that leaves a mark, which lies in the working folder."""
    copy = shutil.copytree(finished, folder / "run")
    config = json.loads((copy / "config.json").read_text()) | settings
    (copy / "config.json").write_text(json.dumps(config))
    (folder / "strangers.py").write_text(
        "import pathlib\npathlib.Path('ran').touch()\nfrom steerable.models.pocket.language import annotate as spans\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "strangers", raising=False)
    return copy


@pytest.mark.parametrize("command", [*STAGES, "probe"])
def test_nothing_that_a_config_names_is_imported(steerable, finished, tmp_path, monkeypatch, command):
    copy = strangers(finished, tmp_path, monkeypatch, annotator="strangers:spans")
    more = ["--to", "p.safetensors", "--folds", "3", "--layer", "2"] if command == "probe" else []
    said = steerable(command, "--out", copy, *more)
    assert not (tmp_path / "ran").exists()
    if command in ("annotate", "select", "evaluate"):
        assert_refused(said, 2, "config.json asks for --annotator strangers:spans", "give the option yourself")
    else:
        assert said.code == 0, said


def test_ones_own_annotator_is_given_again(steerable, finished, tmp_path, monkeypatch):
    copy = strangers(finished, tmp_path, monkeypatch, annotator="strangers:spans")
    assert steerable("annotate", "--out", copy, "--annotator", "strangers:spans").code == 0
    assert (tmp_path / "ran").exists()


def test_remote_code_and_keys_are_asked_for_again(steerable, finished, tmp_path, monkeypatch):
    copy = strangers(finished, tmp_path, monkeypatch, trust_remote_code=True)
    assert_refused(steerable("report", "--out", copy), 2, "asks for --trust-remote-code", "give the option yourself")
    config = json.loads((finished / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"annotator": "llm", "llm_url": "http://example.invalid/v1"}))
    assert_refused(steerable("annotate", "--out", copy), 2, "asks for --llm-url", "your key is never taken")
    (copy / "config.json").write_text(json.dumps(config | {"attention": "owner/kernel"}))
    assert_refused(steerable("report", "--out", copy), 2, "asks for --attention owner/kernel")
    (tmp_path / "recipe.json").write_text('{"trust_remote_code": true}')
    said = steerable("train", "rl", "--recipe", "recipe.json", "--out", "new")
    assert_refused(said, 2, "asks for trust_remote_code, which no file may")


def test_a_full_memory_is_one_sentence(steerable, monkeypatch):
    import torch

    from steerable.models import loading

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(loading, "load", full)
    assert_refused(steerable("chat", "2 + 2?"), 1, "the memory is full: give a narrower --dtype")
