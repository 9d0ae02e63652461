"""A vector is not judged on the tasks that it was made on: not in its run folder, and not as a copy outside of it."""

import json
import shutil
from dataclasses import replace

import pytest

from steerable.chains.duplicates import SHORT, task_key
from steerable.chains.records import read_jsonl, write_jsonl
from steerable.jobs import additivity, audit_job, calibration_job, elicitation
from steerable.jobs.audit_job import audit
from steerable.jobs.calibration_job import calibrate_files
from steerable.jobs.task_origin import keys_in, keys_of, known_tasks
from steerable.steering.direction import Direction


@pytest.fixture(params=["in its run", "copied out", "copied without stats"])
def file(request, finished, tmp_path):
    inside = finished / "vectors/backtracking.safetensors"
    if request.param == "in its run":
        return inside
    made = Direction.load(inside)
    made = replace(made, stats={} if "without" in request.param else made.stats)
    return made.save(tmp_path / "copy.safetensors")


class Drawn(Exception):
    """Stops a command where the tasks are drawn."""


def drawn_by(monkeypatch, module, command):
    """The tasks that a command draws."""
    draw, tasks = module.make_tasks, []

    def stopped(*args, **more):
        tasks.extend(draw(*args, **more))
        raise Drawn

    monkeypatch.setattr(module, "make_tasks", stopped)
    with pytest.raises(Drawn):
        command()
    return tasks


@pytest.mark.parametrize("name", ["audit", "calibrate", "passk", "compose"])
def test_its_tasks_are_not_drawn_again(name, file, finished, tmp_path, monkeypatch):
    from steerable.jobs import arms

    out = tmp_path / "out"
    commands = {
        "audit": (audit_job, lambda: audit(file, model="pocket", limit=16, out=out)),
        "calibrate": (calibration_job, lambda: calibrate_files([file], model="pocket", validation=16, out=out)),
        "passk": (arms, lambda: elicitation.passk("pocket", {"arm": file}, limit=16, out=out)),
        "compose": (arms, lambda: additivity.compose([file], tasks="auto", limit=16, out=out)),
    }
    tasks = drawn_by(monkeypatch, *commands[name])
    served = [t for t in read_jsonl(finished / "tasks.jsonl", "task") if t["split"] != "evaluation"]
    again = keys_of(tasks) & keys_of(served)
    assert len(served) == 26 and len(tasks) == 16
    assert len(again) == (16 if file.name == "copy.safetensors" and not Direction.load(file).stats else 0)


def test_what_is_known_of_a_file(finished, tmp_path):
    tasks = read_jsonl(finished / "tasks.jsonl", "task")
    made = Direction.load(finished / "vectors/backtracking.safetensors")
    assert keys_in(made.stats) == keys_of(t for t in tasks if t["split"] != "evaluation")
    assert known_tasks(tmp_path / "none.safetensors", {}) == known_tasks("owner/model", {}) == set()
    assert additivity.combine([made, replace(made, stats={})]).stats["task_keys"] == made.stats["task_keys"]


def test_a_folder_of_tasks_without_settings_is_no_run(tmp_path):
    write_jsonl(tmp_path / "tasks.jsonl", [{"id": "a", "prompt": "What is 2 + 2?"}])
    file = tmp_path / "vectors/a.safetensors"
    file.parent.mkdir()
    shutil.copy(tmp_path / "tasks.jsonl", file)
    assert known_tasks(file, {}) == set()
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert known_tasks(file, {}) == {task_key("what is 2 + 2")[:SHORT]}
