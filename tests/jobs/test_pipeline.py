"""The main job end to end: killed, stopped, repeated, short of disk, it ends with the same bytes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

from steerable.chains.records import read_jsonl, write_jsonl
from steerable.evals.calibration import TOLERANCE
from steerable.jobs import main_job
from steerable.jobs.run import open_run
from steerable.jobs.settings import STAGES, Config, random_path
from steerable.models import loading as models
from steerable.steering.direction import Direction
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import RunFolder, read_json, write_json

# For every line of JSON [stage, file, standard error, *arguments], runs the command line in a process of its own and
# prints its id, and at the end its exit code. With a stage, the id comes when that file of that stage is to get its
# name, and the process waits there. The processes are forked from one that has done the imports.
NURSERY = """
import json, os, sys, time
from steerable import cli
from steerable.store import run_folder

def pause_at(stage, file):
    partial, replace = run_folder.RunFolder.partial, os.replace
    current = None

    def noting_partial(self, name, key):
        nonlocal current
        current = name
        return partial(self, name, key)

    def pausing_replace(source, target):
        if current == stage and str(target).endswith(file):
            print(os.getpid(), flush=True)
            time.sleep(600)
        replace(source, target)

    run_folder.RunFolder.partial, os.replace = noting_partial, pausing_replace

if __name__ == "__main__":  # a worker imports this file too
    from steerable.jobs import main_job
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

    for line in sys.stdin:
        stage, file, errors, *arguments = json.loads(line)
        if (child := os.fork()) == 0:
            os.setsid()
            os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666), 2)
            pause_at(stage, file) if stage else print(os.getpid(), flush=True)
            sys.argv = ["steerable", *arguments]
            try:
                cli.main()
                print("never came to", stage, file, flush=True)
            except SystemExit as end:
                os._exit(end.code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

#: Stage, which of its files is written but not yet in place when it is killed, and workers.
DEATHS = [
    ("tasks", "/tasks.jsonl", 1),
    ("generate", "/blocks/1.jsonl", 1),
    ("annotate", "/coverage.json", 1),  # spans are there
    ("extract", "/span.overall/backtracking.safetensors", 1),  # many vectors are there
    ("attribute", "/1.json", 1),  # the first chain was measured
    ("select", "/blocks/1.jsonl", 1),
    ("select", "/selection.json", 1),  # the vectors are there
    ("steer", "/blocks/1.jsonl", 2),
    ("evaluate", "/cells.json", 1),
    ("report", "/report.html", 1),  # report.json is there
    ("report", "/timings.json", 1),  # all the rest is there
]


def files(folder):
    """Everything in a run folder but what tells of times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.json"
    }


def assert_same(folder, other):
    ours, theirs = files(folder), files(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


class Nursery:
    """Command lines in processes that are forked from one."""

    def __init__(self, script):
        script.write_text(NURSERY)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, script], start_new_session=True, **pipes)

    def start(self, errors, arguments, stage="", file=""):
        """Its process group, as a terminal makes one; with a stage, when it has come there."""
        self.process.stdin.write(json.dumps([stage, file, str(errors), *map(str, arguments)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """The exit code of the last one, negative for a signal, once it has ended."""
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "nursery.py")
    yield nursery
    nursery.process.communicate(timeout=60)


def members(group):
    """The living processes of a process group."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(pid) for pid, pgid, state, *_ in rows if int(pgid) == group and not state.startswith("Z")]


def wait_until(condition, seconds=120):
    for _ in range(seconds * 50):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def assert_gone(group):
    for _ in range(3000):
        if not members(group):
            return
        time.sleep(0.02)
    raise AssertionError(f"left behind: {members(group)}")


@pytest.mark.slow
def test_killed_in_every_stage(finished, tiny, tiny_settings, tmp_path, nursery):
    """It ends with the bytes of an undisturbed run: so the same seed gives the same report, too."""
    out = tmp_path / "run"
    assert {stage for stage, *_ in DEATHS} == {stage.name for stage in STAGES}
    for stage, file, workers in DEATHS:
        arguments = ["run", "--workers", workers, "--out", out, *tiny]
        group = nursery.start(tmp_path / "errors", arguments, stage, file)
        assert len(members(group)) >= (workers + 1 if workers > 1 else 1)
        # Workers whose parent was killed end by themselves; a machine that fails takes all down at once.
        (os.kill if workers > 1 else os.killpg)(group, signal.SIGKILL)
        assert nursery.end() == -signal.SIGKILL
        assert_gone(group)
        assert (out / f"stages/{stage}.json").exists() == (file == "/timings.json")
    main_job.run(out, workers=1, **tiny_settings)
    assert_same(out, finished)


@pytest.mark.slow
def test_stopped_by_ctrl_c(finished, tiny, tmp_path, nursery, steerable):
    out, errors = tmp_path / "run", tmp_path / "errors"
    moments = (
        lambda group: len(members(group)) >= 3,  # the first worker is only starting
        lambda group: any(out.glob(".partial/generate-*/blocks/0.jsonl")),
    )
    for moment in moments:
        group = nursery.start(errors, ["run", "--workers", 2, "--out", out, *tiny])
        wait_until(lambda group=group, moment=moment: moment(group))
        os.killpg(group, signal.SIGINT)
        assert nursery.end() == 1  # and nothing else on standard output
        *progress, last = errors.read_text().splitlines()
        assert last == "steerable: stopped; what was finished is kept, and the same command goes on from there"
        assert_stages_alone(progress)
        assert_gone(group)
    assert any(out.glob(".partial/generate-*/blocks/0.jsonl")) and not any(out.rglob("*.tmp"))
    last = steerable("run", "--workers", 1, "--out", out, *tiny)
    assert last.code == 0
    assert_same(out, finished)  # also: two workers make the same bytes as one
    assert assert_stages_alone(last.err.splitlines()) == len(STAGES)


def assert_stages_alone(lines):
    """Nothing but the stages that are done, how many, and on a busy machine how far the others are."""
    done = [line for line in lines if not line.startswith("stage ")]
    assert all(line.endswith(("done", "was done already")) for line in done), lines
    return len(done)


def test_the_run_folder_is_what_the_design_says(finished):
    names = {"config.json", "tasks.jsonl", "chains.jsonl", "spans.jsonl", "attribution.json", "selection.json",
             "report.json", "report.html", "timings.json", "vectors", "steered", "stages"}  # fmt: skip
    assert names <= {path.name for path in finished.iterdir()}
    assert not (finished / ".partial").exists()
    assert [path.name for path in finished.rglob(".*")] == [".lock"]
    assert set(read_json(finished / "timings.json")["stages"]) == {stage.name for stage in STAGES}
    report = read_json(finished / "report.json")
    assert Config(**report["config"]) == Config(**read_json(finished / "config.json"))
    for cell in report["cells"]:
        assert sum(share[0] for share in cell["fractions"].values() if share) == pytest.approx(1)
        assert (finished / f"steered/{cell['name']}.jsonl").is_file()
    assert {cell["control"] for cell in report["cells"]} == {None, "random", "shuffled"}


def test_all_chains_keep_the_ids_that_were_generated(finished):
    from steerable.chains.generation import prompt_ids, split_chain
    from steerable.engines.base import Completion
    from steerable.engines.sampling import stop_ids
    from steerable.steering.think import think_tags

    model, tokenizer = models.load("pocket")
    tags, stops = think_tags(tokenizer), stop_ids(model)
    asked = {task["id"]: prompt_ids(tokenizer, task["prompt"]) for task in read_jsonl(finished / "tasks.jsonl")}
    paths = [finished / "chains.jsonl", *(finished / "steered").glob("*.jsonl")]
    chains = [chain for path in paths for chain in read_jsonl(path, "chain")]
    for chain in chains:
        assert chain["prompt_ids"] == asked[chain["task_id"]] and len(chain["ids"]) == chain["tokens"]
        said = split_chain(tokenizer, tags, Completion(chain["ids"], chain["ids"][-1] in stops))
        assert {key: chain[key] for key in said} == said
    assert len(chains) > 50


def test_the_cosines_are_those_of_the_saved_vectors(finished):
    found = read_json(finished / "report.json")["cosines"]["selected"]
    chosen = read_json(finished / "selection.json")
    assert found["labels"] == list(chosen) and found["layers"] == [chosen[b]["layer"] for b in chosen]
    vectors = []
    for behaviour in chosen:
        with safe_open(finished / f"vectors/{behaviour}.safetensors", framework="numpy") as file:
            (name,) = file.keys()
            assert name == f"resid_post.{chosen[behaviour]['layer']}"
            vectors.append(file.get_tensor(name).astype(float))
    wanted = [[a @ b / np.sqrt(a @ a * (b @ b)) for b in vectors] for a in vectors]
    np.testing.assert_allclose(found["matrix"], wanted, atol=1e-12)
    assert found["matrix"] == np.transpose(found["matrix"]).tolist()


@pytest.mark.slow
def test_an_older_folder_is_read_and_done_anew(copy, finished, tiny_settings):
    """Chains without ids are measured by their text; a run does not mix them with its own."""
    for path in [copy / "chains.jsonl", *(copy / "steered").glob("*.jsonl")]:
        kept = [{k: v for k, v in c.items() if k not in ("ids", "prompt_ids")} for c in read_jsonl(path)]
        write_jsonl(path, kept)
    aligned = open_run(copy).aligned()
    assert sum(len(chain.spans) for chain in aligned) > 0
    main_job.run(copy, stage="report", fresh=False)
    main_job.run(copy, workers=1, **tiny_settings)
    assert files(copy) == files(finished)


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def seconds(folder):
    return (folder / "timings.json").read_bytes()


def test_what_is_finished_is_not_done_again(copy, finished, tiny_settings):
    before = seconds(copy)
    main_job.run(copy, workers=1, **tiny_settings)
    assert seconds(copy) == before
    assert_same(copy, finished)


def test_a_finished_folder_needs_no_model(copy, finished, tiny_settings, monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(models, "load", load)
    main_job.run(copy, stage="report", fresh=False)
    main_job.run(copy, workers=1, **tiny_settings)
    assert_same(copy, finished)


def test_a_stage_alone_keeps_the_settings_of_the_folder(copy, finished):
    (copy / "spans.jsonl").unlink()
    main_job.run(copy, stage="annotate", fresh=False)
    assert_same(copy, finished)


@pytest.mark.parametrize(
    ("stage", "settings", "sentence"),
    [
        ("report", {"seed": 3}, "--seed changes nothing in stage 'report', as stage 'tasks' depends on it"),
        ("generate", {"limit": 2}, "--limit changes nothing in stage 'generate', as stage 'tasks' depends on it"),
        ("extract", {"greedy": True}, "--greedy changes nothing in stage 'extract', as stage 'generate' depends on it"),
    ],
)
def test_a_setting_that_only_earlier_stages_depend_on(copy, finished, stage, settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        main_job.run(copy, stage=stage, fresh=False, **settings)
    assert_same(copy, finished)


@pytest.mark.slow
def test_another_choice_leaves_nothing_of_the_former(copy):
    folder, stale = copy / "vectors/random", copy / "vectors/random/laughter.0.safetensors"
    former = {path.name for path in folder.iterdir()}
    shutil.copy(folder / min(former), stale)
    chosen = min({*range(6)} - {entry["layer"] for entry in read_json(copy / "selection.json").values()})
    main_job.run(copy, stage="select", fresh=False, workers=1, layers=str(chosen))
    assert {path.name for path in folder.iterdir()} == former
    assert {Direction.load(path).layers[0] for path in folder.iterdir()} == {chosen}
    assert {entry["layer"] for entry in read_json(copy / "selection.json").values()} == {chosen}


def test_a_window_that_was_not_attributed(copy):
    with pytest.raises(UsageError, match="lacks the window 'span': run `steerable attribute` with it"):
        main_job.run(copy, stage="select", fresh=False, window="span")


def test_a_model_that_cannot_be_attributed_is_refused_at_once(tmp_path, monkeypatch):
    model, tokenizer = models.load("pocket")
    model.config.layer_types = ["full_attention", "linear_attention"] * 3
    monkeypatch.setattr("steerable.jobs.run.load_model", lambda c: models.Loaded(model, tokenizer))
    with pytest.raises(UsageError, match="layer 1 .* has 'linear attention': .* go without it"):
        main_job.run(tmp_path / "run", quick=True)
    assert not (tmp_path / "run").exists()


def test_an_edited_task_file_is_read_again(tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    options = {"tasks": str(tasks), "limit": 1, "validation": 1, "evaluation": 1}
    for answer in ("4", "5", "5"):
        tasks.write_text("".join(f'{{"id":"t{i}","prompt":"2 + {i}?","answer":"{answer}"}}\n' for i in range(3)))
        main_job.run(tmp_path / "run", stage="tasks", fresh=False, **options)
        assert f'"answer":"{answer}"' in (tmp_path / "run/tasks.jsonl").read_text()
    with pytest.raises(UsageError, match="gives only"):
        main_job.run(tmp_path / "run", **options | {"limit": 9})
    assert read_json(tmp_path / "run/config.json")["limit"] == 1  # what is there was not made by what was refused


def test_an_edited_annotator_is_used_again(copy, tmp_path, monkeypatch):
    module = tmp_path / "edited_annotator.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for label in ("deduction", "backtracking"):
        module.write_text(f"def spans(chain): return [{{'label': '{label}', 'start': 0, 'end': 3}}]\n")
        sys.modules.pop("edited_annotator", None)
        main_job.run(copy, stage="annotate", fresh=False, annotator="edited_annotator:spans")
        span = json.loads((copy / "spans.jsonl").read_text().splitlines()[0])
        assert span["label"] == label and {"task_id", "sample"} <= span.keys()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("[]", "found no span in 24 chains"),
        ("[{'label': 'joy!', 'start': 0, 'end': 1}]", "gave an unsound span"),
        ("[{'label': 'deduction', 'start': 0, 'end': 10**6}]", "gave an unsound span"),
        ("[{'start': 0}]", "gave an unsound span"),
        ("1 / 0", r"failed on task .* \(ZeroDivisionError"),
    ],
)
def test_a_wrong_annotator(copy, tmp_path, monkeypatch, body, text):
    (tmp_path / "wrong_annotator.py").write_text(f"def spans(chain): return {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("wrong_annotator", None)
    before = (copy / "spans.jsonl").read_bytes()
    with pytest.raises(SteerableError, match=text):
        main_job.run(copy, stage="annotate", fresh=False, annotator="wrong_annotator:spans")
    assert (copy / "spans.jsonl").read_bytes() == before


@pytest.fixture
def annotator(tmp_path, monkeypatch):
    """`annotator(body)`: the option of an annotator whose function has this body; it may call `pocket(chain)`."""

    def make(body):
        (tmp_path / "own_annotator.py").write_text(
            f"from steerable.models.pocket.language import annotate as pocket\ndef spans(chain): {body}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop("own_annotator", None)
        return "--annotator=own_annotator:spans"

    return make


@pytest.mark.slow
def test_behaviours_without_a_span_stop_nothing(tiny, copy, annotator, steerable):
    """In a folder where they had spans: their vectors go too."""
    lacking = ["example-testing", "backtracking", "adding-knowledge"]
    option = annotator(f"return [span for span in pocket(chain) if span['label'] not in {lacking}]")
    out = copy
    assert all((out / f"vectors/{label}.safetensors").exists() for label in lacking)
    said = steerable("run", "--workers", 1, "--out", out, *tiny, option)
    assert said.code == 0, said.err
    report, page = read_json(out / "report.json"), (out / "report.html").read_text()
    for label in lacking:
        assert f"extract: 24 chains have 0 spans of {label}: the run goes on without it" in said.err
        assert report["missing"][label] == "in 24 chains 0 spans of it: at least 5 are needed"
        assert f"no vector for {label.replace('-', ' ')}, as in 24 chains 0 spans of it: at least 5 are needed" in page
        assert not (out / f"vectors/{label}.safetensors").exists()
    left = {"uncertainty-estimation", "backtracking", "example-testing", "adding-knowledge"} - {*lacking}
    selection = read_json(out / "selection.json")
    assert set(selection.pop("missing")) == {*lacking} and set(selection) == set(report["selection"]) == left
    assert {cell["behaviour"] for cell in report["cells"]} == left and set(report["missing"]) == {*lacking}
    before = (out / "timings.json").read_bytes()
    assert steerable("run", "--workers", 1, "--out", out, *tiny, option).code == 0
    assert (out / "timings.json").read_bytes() == before, "it is finished"


@pytest.mark.slow
def test_labels_of_ones_own_on_a_model_without_a_think_block(tmp_path, monkeypatch, steerable, tiny_llama, tokenizer):
    """From the annotation to the page: two labels that are steered, one that is not, one that is too rare."""
    model = tmp_path / "model"
    tiny_llama.save_pretrained(model)
    tokenizer.save_pretrained(model)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / file).write_text((model / file).read_text().replace(" <think>", " ").replace("think>", "thunk>"))
    (tmp_path / "halves.py").write_text(
        "def spans(chain):\n"
        "    n = len(chain['thinking'])\n"
        "    first, second = ('first', 'second') if chain['thinking'].count('w1') % 2 else ('second', 'first')\n"
        "    rest = [] if chain['task_id'] != 't0' else [{'label': 'rare', 'start': n - 2, 'end': n - 1}]\n"
        "    every = [{'label': first, 'start': 0, 'end': n // 3}, {'label': second, 'start': n // 3, 'end': n // 2},\n"
        "            {'label': 'rest', 'start': n // 2, 'end': n - 2}, *rest]\n"
        "    return [span for span in every if 0 <= span['start'] < span['end']]\n"
        "spans.labels = ('first', 'second', 'rest', 'rare')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("halves", None)
    tasks = [{"id": f"t{i}", "prompt": f"w{i} w{i + 1}", "answer": f"w{i}"} for i in range(28)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    out = tmp_path / "run"
    small = "--limit 24 --validation 2 --evaluation 2 --samples 1 --sweep= --tried 1 --controls 1 --window onset"
    small += " --max-new-tokens 40 --attributed 4 --patched 2 --compared 1 --workers 1 --annotator halves:spans"
    options = ["--model", model, "--tasks", tmp_path / "tasks.jsonl", *small.split(), "--out", out]
    said = steerable("run", *options, "--behaviours", "second,first,rare")
    assert said.code == 0, said.err
    assert "extract: 24 chains have 1 span of rare: the run goes on without it" in said.err
    report, page = read_json(out / "report.json"), (out / "report.html").read_text()
    assert set(report["selection"]) == {"first", "second"} and list(report["missing"]) == ["rare"]
    assert {cell["where"] for cell in report["cells"]} == {"all"}, "there is no think block to steer in"
    assert report["model"]["thinks"] is False and "thinking tokens" not in (out / "report.html").read_text()
    for cell in report["cells"]:
        assert list(cell["fractions"]) == ["first", "second", "rest", "rare"]
        assert cell["strength"] == 0 or 0 <= cell["wrong_way"]["fraction"][0] <= 1
    assert sorted(path.stem for path in (out / "vectors").glob("*.safetensors")) == ["first", "second"]
    assert "Fraction of second tokens" in page
    said = steerable("extract", "--out", out, "--behaviours", "first,third")
    assert said.code == 2 and "--behaviours has 'third', which is no label of --annotator halves:spans" in said.err


def test_tasks_that_nobody_can_answer(tmp_path, steerable):
    tasks = [{"id": f"t{i}", "prompt": f"Why is {i} so?", "answer": f"because of {i} " * 20} for i in range(12)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    sizes = ("--limit", 8, "--validation", 2, "--evaluation", 2)
    said = steerable("tasks", "--tasks", tmp_path / "tasks.jsonl", *sizes, "--out", tmp_path / "run")
    assert said.code == 0 and "the references of 12 of 12 tasks are met by no plain answer" in said.err


@pytest.mark.slow
def test_shorter_reasoning(tiny, tmp_path, steerable):
    out = tmp_path / "run"
    options = ("--annotator", "length", "--behaviours", "short", "--max-new-tokens", 300, "--limit", 30, "--samples", 4)
    said = steerable("run", *tiny, *options, "--window", "span", "--workers", 1, "--out", out)
    assert said.code == 0, said.err
    coverage, report = read_json(out / "coverage.json"), read_json(out / "report.json")
    assert coverage["chains"] == 120 and coverage["spans"]["short"] == coverage["spans"]["long"] >= 5
    assert list(report["selection"]) == ["short"] and report["selection"]["short"]["window"] == "span"
    lengths = [chain["thinking_tokens"] for chain in read_jsonl(out / "steered/unsteered.jsonl")]
    share = sum(length < coverage["reference"] for length in lengths) / len(lengths)
    assert report["cells"][0]["fractions"]["short"][0] == pytest.approx(share)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "return [span for span in pocket(chain) if span['label'] == 'deduction']",
            "24 chains have fewer than 5 spans of adding-knowledge and of example-testing and of "
            "uncertainty-estimation and of backtracking",
        ),
        ("return []", "the annotator 'own_annotator:spans' found no span in 24 chains"),
    ],
)
def test_no_behaviour_is_left(body, sentence, tiny, copy, annotator, steerable):
    said = steerable("run", "--workers", 1, "--out", copy, *tiny, annotator(body))
    assert said.code == 1 and said.err.splitlines()[-1].startswith("steerable: ")
    assert sentence in said.err


@pytest.mark.parametrize("silent", [24, 10])
def test_chains_without_a_think_block_are_no_fault_of_the_annotator(silent, copy, steerable):
    chains = [json.loads(line) for line in (copy / "chains.jsonl").read_text().splitlines()]
    for chain in chains[:silent]:
        chain |= {"thinking": "", "thinking_tokens": 0, "closed": False}
    (copy / "chains.jsonl").write_text("".join(json.dumps(chain) + "\n" for chain in chains))
    said = steerable("annotate", "--out", copy)
    if silent == 24:
        assert said.code == 1 and "annotator" not in said.err
        assert "the model wrote nothing in a think block in any of 24 chains" in said.err
    else:
        assert said.code == 0 and "annotate: 10 of 24 chains have no think block, and so no span" in said.err


@pytest.mark.slow
def test_a_full_disk(copy, finished, tiny, tiny_settings, steerable, monkeypatch):
    for name in ("spans.jsonl", "cells.json", "selection.json"):
        (copy / name).unlink()
    written = 0
    sync = os.fsync

    def full_after(limit):
        def fsync(handle):
            nonlocal written
            written += 1
            if written > limit:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        return fsync

    for limit in (0, 2, 10, 20):
        written = 0
        monkeypatch.setattr(os, "fsync", full_after(limit))
        said = steerable("run", "--workers", 1, "--json", "--out", copy, *tiny)
        assert (said.code, said.out) == (1, "")
        assert said.err.startswith("steerable: the disk is full: ") and said.err.count("\n") == 1
        assert not list(copy.rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", sync)
    main_job.run(copy, workers=1, **tiny_settings)
    assert_same(copy, finished)


def test_a_file_that_may_not_grow(tiny, tmp_path, steerable):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "run"
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        said = steerable("run", "--out", out, *tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said == (1, "", f"steerable: cannot write {out / 'tasks.jsonl'}: File too large\n")
    assert not out.exists()


def test_two_processes_in_one_folder(copy, tiny, steerable):
    with RunFolder(copy).locked():
        said = steerable("run", "--out", copy, *tiny)
    assert (said.code, said.out) == (1, "")
    assert said.err == f"steerable: another process is working in {copy}: wait for it or use another --out\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [("spans.jsonl", "line 3 is not valid JSON"), ("attribution.json", "is not valid JSON"), ("selection.json", "not")],
)
def test_a_damaged_input_is_named(copy, steerable, name, text):
    lines = (copy / name).read_text().splitlines()
    (copy / name).write_text("\n".join([*lines[:2], "{broken"]))
    stage = {"spans.jsonl": "extract", "attribution.json": "select", "selection.json": "steer"}[name]
    said = steerable(stage, "--out", copy)
    assert said.code == 2 and text in said.err and name in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        *(("selection.json", text, "holds no JSON object") for text in ("[]", "null", "3")),
        ("selection.json", "{}", "holds no behaviour"),
        ("selection.json", '{"../../../evil": {}}', "is unsound at '../../../evil'"),
        *((f"{name}.json", "[]", "holds no JSON object") for name in ("attribution", "cosines", "norms", "coverage")),
        ("attribution.json", "{}", "run `steerable select` again"),
        ("cells.json", "{}", "holds no JSON array"),
    ],
)
def test_json_of_another_shape_is_named(copy, steerable, name, text, sentence):
    (copy / name).write_text(text)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for stage in ("steer", "evaluate", "report") if name == "selection.json" else ("report",):
        said = steerable(stage, "--out", copy)
        assert said.code == 2 and sentence in said.err and name in said.err and said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [("window", "../../../../etc"), ("window", {}), ("baseline", 3), ("layer", "4"), ("layer", None), ("layers", []),
     ("layers", 3), ("strength", "1"), ("strength", None), ("strength", 0), ("candidates", 3), ("rule", None)],
)  # fmt: skip
def test_a_selection_that_select_did_not_write(copy, steerable, key, value):
    chosen = read_json(copy / "selection.json")
    behaviour = next(iter(chosen))
    chosen[behaviour][key] = value
    write_json(copy / "selection.json", chosen)
    for stage in ("steer", "evaluate", "report"):
        said = steerable(stage, "--out", copy)
        assert said.code == 2 and f"is unsound at {behaviour!r}" in said.err and said.err.count("\n") == 1


def test_the_windows_of_attribution_and_selection_differ(copy, steerable):
    chosen = next(iter(read_json(copy / "selection.json").values()))["window"]
    other = next(window for window in ("published", "onset") if window != chosen)
    assert steerable("attribute", "--window", other, "--out", copy).code == 0
    said = steerable("report", "--out", copy)
    assert said.code == 2 and "run `steerable select` again" in said.err and said.err.count("\n") == 1


def test_wrong_arguments_of_the_function(tmp_path):
    for wrong in ({"stage": "dance"}, {"workers": 0}, {"speed": 3}):
        with pytest.raises(UsageError):
            main_job.run(tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def scale_candidates(folder, factor):
    for path in (folder / "vectors/candidates").rglob("*.safetensors"):
        Direction.load(path).scaled(factor).save(path)


@pytest.mark.slow
def test_where_all_candidates_loop_it_is_said_and_a_weaker_strength_is_taken(copy, steerable):
    scale_candidates(copy, 100)
    said = steerable("select", "--out", copy, "--workers", "1", "--greedy", "--budget", "1000")
    assert "keeps its length: the budget of 1000 nats a token is not reached" in said.err
    assert said.code == 0 and "backtracking: none passed: at \N{PLUS-MINUS SIGN}1" in said.err
    selection = read_json(copy / "selection.json")
    for behaviour, chosen in selection.items():
        tried = chosen["candidates"]
        assert [c["strength"] for c in tried] == [1.0, 0.5, 0.25] and all(c["loops"] > 0.1 for c in tried)
        assert chosen["passed"] is False and chosen["rule"].startswith("none passed")
        assert min(c["loops"] for c in tried) == next(c["loops"] for c in tried if c["strength"] == chosen["strength"])
        direction = Direction.load(copy / f"vectors/{behaviour}.safetensors")
        assert chosen["dose"] is None and direction.unit == "raw" and min(direction.dose().values()) > 5
        assert direction.strength == chosen["strength"]
    for stage in ("steer", "evaluate", "report"):
        assert steerable(stage, "--out", copy, "--workers", "1").code == 0
    report, page = read_json(copy / "report.json"), (copy / "report.html").read_text()
    assert "none passed" in page and "the fewest repeated 8-grams" in page
    for cell in report["cells"]:
        if cell["control"] is None and cell["strength"]:
            assert abs(cell["strength"]) == selection[cell["behaviour"]]["strength"]


@pytest.mark.slow
def test_the_largest_strength_at_which_a_candidate_does_not_loop(copy, steerable):
    """Where no dose reaches the budget, vectors have the length that their method gave them: here four times what the
    bundled model takes."""
    scale_candidates(copy, 4)
    said = steerable("select", "--out", copy, "--workers", "1", "--budget", "1000")
    assert said.code == 0
    for chosen in read_json(copy / "selection.json").values():
        tried = {c["strength"]: c["loops"] - c["loops_unsteered"] for c in chosen["candidates"]}
        quiet = [s for s, loops in tried.items() if loops <= 0.1]
        assert chosen["passed"] == bool(quiet)
        if quiet:
            assert chosen["strength"] == max(quiet) == min(tried)


def test_the_dose_of_every_cell_is_told(finished):
    report, page = read_json(finished / "report.json"), (finished / "report.html").read_text()
    for cell in report["cells"]:
        assert set(cell["dose"]) == ({str(layer) for layer in cell["layers"]} if cell["strength"] else set())
    chosen = report["selection"]["backtracking"]
    direction = Direction.load(finished / "vectors/backtracking.safetensors")
    (dose,) = direction.dose().values()
    assert dose == pytest.approx(chosen["dose"]) and 0.1 < dose < 1 and direction.unit == "calibrated"
    (cell,) = (c for c in report["cells"] if c["name"] == "backtracking.+1")
    assert list(cell["dose"].values()) == [pytest.approx(dose)]
    assert ">Dose<" in page and f"dose {dose:.2g} of" in page and report["model"]["dtype"] == "float32"


def test_every_steered_cell_with_controls_has_the_differences_to_them(finished):
    """The estimate is the difference of the means, which are over the same two tasks."""
    cells, chosen = read_json(finished / "cells.json"), read_json(finished / "selection.json")
    for cell in cells:
        strength = chosen[cell["behaviour"]]["strength"]
        layers = [chosen[cell["behaviour"]]["layer"]]
        is_main = cell["control"] is None and abs(cell["strength"]) == strength and cell["layers"] == layers
        assert (cell["above_control"] is not None) == (is_main and cell["where"] == "all")
        for kind, (estimate, low, high) in (cell["above_control"] or {}).items():
            (control,) = (
                c
                for c in cells
                if (c["control"], c["behaviour"], c["strength"]) == (kind, cell["behaviour"], cell["strength"])
            )
            gap = cell["fractions"][cell["behaviour"]][0] - control["fractions"][cell["behaviour"]][0]
            assert estimate == pytest.approx(gap) and low <= estimate <= high
        assert cell["above_control"] is None or set(cell["above_control"]) == {"random", "shuffled"}


def test_strength_1_moves_the_model_by_the_budget(finished):
    """Chosen vectors and candidates, on unsteered chains of the validation tasks; the controls have the same dose, and
    every behaviour has random directions of its own."""
    selection, drawn = read_json(finished / "selection.json"), []
    for behaviour, chosen in selection.items():
        direction = Direction.load(finished / f"vectors/{behaviour}.safetensors")
        about = direction.stats["calibration"]
        assert max(about["kl"], about["kl_reversed"]) == pytest.approx(0.05, rel=TOLERANCE)
        assert about["dose"] == chosen["dose"] and all(c["dose"] > 0 for c in chosen["candidates"])
        drawn.append(Direction.load(finished / random_path(behaviour, 0)))
        assert drawn[-1].dose() == pytest.approx(direction.dose())
    lines = torch.stack([next(iter(d.vectors.values())).flatten() for d in drawn])
    cosines = torch.nn.functional.cosine_similarity(lines[:, None], lines[None], dim=-1)
    assert cosines.fill_diagonal_(0).abs().max() < 0.5 and len(drawn) == 4
    for cell in read_json(finished / "cells.json"):
        if cell["control"]:
            assert list(cell["dose"].values()) == [pytest.approx(selection[cell["behaviour"]]["dose"])]


def test_only_a_budget_that_is_not_reached_leaves_a_vector_its_length(copy, monkeypatch):
    """What else goes wrong while a candidate is calibrated ends the run."""

    def fails(*arguments, **options):
        raise SteerableError("the memory ran out")

    monkeypatch.setattr("steerable.jobs.validation.search", fails)
    with pytest.raises(SteerableError, match="the memory ran out"):
        main_job.run(copy, stage="select", fresh=False, workers=1, budget=0.1)


@pytest.mark.slow
def test_an_installed_metric_is_in_every_cell_of_the_report(copy, install):
    """Another package's entry point: the cells of a finished run are measured again."""
    before = read_json(copy / "cells.json")
    install(
        "hesitation",
        "from steerable.evals.metrics import Metric\n"
        "metric = Metric('hesitation', 'Hesitation', 'number', lambda m: m.chain['thinking'].count('Wait'))\n",
        "[steerable.metrics]\nhesitation = hesitation:metric\n",
    )
    for stage in ("evaluate", "report"):
        main_job.run(copy, stage=stage, fresh=False, workers=1)
    report = read_json(copy / "report.json")
    assert report["metrics"]["hesitation"]["title"] == "Hesitation"
    for cell in report["cells"]:
        assert len(cell.pop("hesitation")) == 3
        if cell["difference"]:
            assert len(cell["difference"].pop("hesitation")) == 3
    assert report["cells"] == before
    assert "Hesitation" in (copy / "report.html").read_text()
