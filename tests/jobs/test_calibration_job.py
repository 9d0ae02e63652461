"""`steerable calibrate` on the bundled model: its figures against a recount, going on after a stop, refusals."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from killed import kill_once, lines

from steerable.chains.records import read_jsonl
from steerable.evals.intervals import simultaneous_intervals, student_interval
from steerable.jobs import calibration_grid
from steerable.jobs.calibration_job import calibrate_files
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, UsageError

FAST = {"strengths": "0.5,1", "layers": "2,3,4", "samples": 2, "validation": 24, "max_new_tokens": 40, "workers": 1}
FAST |= {"budget": 0.4, "accuracy": 1.0, "unclosed": 1.0}


@pytest.fixture(scope="module", autouse=True)
def anything_is_clear():
    """So few chains have no clear gain: here any gain above 0 is taken for one, so that there is a recommendation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            calibration_grid, "simultaneous_intervals", lambda gains, seed: simultaneous_intervals(gains, seed, 0.01)
        )
        patch.setattr(calibration_grid, "student_interval", lambda gains: student_interval(gains, 0.01))
        yield


@pytest.fixture(scope="module")
def file(finished, tmp_path_factory):
    source = finished / "vectors/candidates/onset.pooled/backtracking.safetensors"
    return shutil.copy(source, tmp_path_factory.mktemp("calibrate") / "backtracking.safetensors")


@pytest.fixture(scope="module")
def calibrated(file):
    out = file.parent / "out"
    return out, calibrate_files([file], full_grid=True, out=out, **FAST)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_the_grid_is_what_the_rows_say(calibrated):
    out, result = calibrated
    rows = read_jsonl(out / "measured.jsonl")
    base = {(row["task_id"], row["sample"]): row for row in rows if row["setting"] is None}
    assert len(base) == 48 and len(result["grid"]) == 8 and len(result["arms"]) == 4
    for setting in result["grid"]:
        key = {name: setting[name] for name in ("arm", "layers", "strength", "dose")}
        some = [row for row in rows if row["setting"] == key]
        assert len(some) == 2 * setting["tasks"] == 48
        assert setting["dropped"] == sum(row["target"] is None for row in some)
        gains = [row["target"] - base[row["task_id"], row["sample"]]["target"] for row in some]
        assert setting["gain"][0] == pytest.approx(mean(gains))
        for name in ("kl", "tokens", "loops", "accuracy", "unclosed"):
            assert setting[name][0] == pytest.approx(mean(row[name] for row in some)), name
        assert ("kl" in setting["broken"]) == (setting["kl"][0] > 0.4)


def test_strength_one_spends_the_budget_at_every_arm(calibrated):
    for arm in calibrated[1]["arms"]:
        about = arm["calibration"]
        assert max(about["kl"], about["kl_reversed"]) == pytest.approx(0.4, rel=0.05)


def test_the_search_costs_a_quarter_of_the_tokens(calibrated):
    out, result = calibrated
    rows = read_jsonl(out / "measured.jsonl")
    assert result["cost"]["grid"] == sum(row["tokens"] for row in rows)
    assert result["cost"]["share"] == result["cost"]["search"] / result["cost"]["grid"] <= 0.25
    assert [r["settings"] for r in result["rounds"]][0] == 8


def test_the_recommendation_is_written(calibrated, file):
    out, result = calibrated
    about, stats = result["recommended"], Direction.load(file).stats
    if about is None:  # so few chains may differ enough where another processor rounds otherwise
        assert "gain" in result["reason"] and "recommended" not in stats
        assert not (out / "recommended.safetensors").exists()
        return
    noted = stats["recommended"]
    assert noted["of"] == "backtracking" and noted["gain"] == about["gain"] and noted["layers"] == about["layers"]
    assert about["above_random"][0] == pytest.approx(about["gain"][0] - about["random"]["gain"][0])
    assert about["above_random"][1] > 0
    made = Direction.load(out / "recommended.safetensors")
    assert made.layers == about["layers"] and made.strength == about["strength"]
    assert max(made.dose().values()) == pytest.approx(about["dose"], rel=1e-4)
    if about["file_strength"] is not None:  # the same steering from the file that was given
        whole = Direction.load(file)
        for site, vector in made.vectors.items():
            expected = about["file_strength"] * whole.vectors[site]
            torch.testing.assert_close(made.strength * vector, expected, rtol=1e-4, atol=1e-6)
    page = (out / "calibrate.html").read_text()
    assert "Recommended" in page and "Pareto front" in page and page.count("<svg") > 4


def test_what_a_random_direction_does_as_well_is_not_recommended(file, tmp_path, monkeypatch):
    """And what an earlier calibration of the same aim recommended is taken out of the file, but not another's."""
    monkeypatch.setattr(calibration_grid, "simultaneous_intervals", lambda gains, seed: [[2.0, 1.0, 3.0]] * len(gains))
    monkeypatch.setattr(calibration_grid, "student_interval", lambda gains: [0.5, -1.0, 2.0])
    one = FAST | {"layers": "3", "strengths": "1", "validation": 8, "samples": 1, "max_new_tokens": 10}
    same, other = ({"of": of, "aim": "less", "model": "pocket"} for of in ("tokens", "loops"))
    for old, left in ((same, {}), (other, {"recommended": other})):
        mine = replace(Direction.load(file), stats={"recommended": old}).save(tmp_path / "mine.safetensors")
        result = calibrate_files([mine], full_grid=True, target="tokens", aim="less", out=tmp_path / "c", **one)
        assert result["recommended"] is None and Direction.load(mine).stats == left
        assert result["reason"].endswith(
            "has a gain of 2, of which 0.5 (-1 to 2) is beyond a random direction with the same dose: not clear of 0"
        )
        assert not (tmp_path / "c/recommended.safetensors").exists()


def test_it_goes_on_where_it_was_stopped(calibrated, file, tmp_path, monkeypatch):
    """Stopped after the first round's chains were written; what is there already is not written again."""
    out, result = calibrated
    original = calibration_grid.GridSearch._rows_of
    calls = []

    def stopped(self, chains, steering):
        calls.append(len(chains))
        if len(calls) == 10:  # in the second round: the unsteered chains, and eight settings, are measured
            raise KeyboardInterrupt
        return original(self, chains, steering)

    monkeypatch.setattr(calibration_grid.GridSearch, "_rows_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        calibrate_files([file], full_grid=True, out=tmp_path / "again", **FAST)
    monkeypatch.setattr(calibration_grid.GridSearch, "_rows_of", original)
    written = []
    generate = calibration_grid.generate_cells

    def counted(run, cells, tasks, keep):
        blocks = keep / "blocks"
        there = sum(len(read_jsonl(file, "chain")) for file in blocks.glob("*.jsonl")) if blocks.exists() else 0
        chains = generate(run, cells, tasks, keep)
        written.append(sum(map(len, chains.values())) - there)
        return chains

    monkeypatch.setattr(calibration_grid, "generate_cells", counted)
    assert calibrate_files([file], full_grid=True, out=tmp_path / "again", **FAST) == result
    assert written[:2] == [0, 0] and sum(written) > 0  # unsteered and first round were there
    for name in ("calibrate.json", "measured.jsonl", "recommended.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.slow
def test_it_goes_on_where_it_was_killed(calibrated, file, tmp_path):
    out, again = calibrated[0], tmp_path / "again"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    for chains in (8, 200):  # of the unsteered ones, of a later round
        kill_once(
            lambda n=chains: lines(again, "blocks/*.jsonl") >= n,
            "calibrate",
            file,
            *options,
            "--full-grid",
            "--out",
            again,
        )
        assert not (again / "calibrate.json").exists()
    calibrate_files([file], full_grid=True, out=again, **FAST)
    for name in ("calibrate.json", "measured.jsonl", "recommended.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    assert not list(again.rglob("*.tmp"))


def test_a_plan_counts_what_the_search_does(calibrated, file, steerable, tmp_path):
    out, result = calibrated
    rows = read_jsonl(out / "measured.jsonl")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    said = steerable("calibrate", file, *options, "--full-grid", "--out", tmp_path / "c", "--dry-run", "--json")
    assert said.code == 0 and not (tmp_path / "c").exists(), said.err
    plan = json.loads(said.out)
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert list(stages) == ["unsteered", "calibrate", "search", "control", "grid", "measure"] and plan["done"] == []
    assert stages["unsteered"]["chains"] == 48 and stages["search"]["cells"] == 8
    assert sum(stages[name]["chains"] for name in ("unsteered", "search", "grid")) == len(rows)
    assert plan["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()))
    assert calibrate_files([file], full_grid=True, out=out, dry_run=True, **FAST)["done"] == ["calibrate"]
    assert calibrate_files([file], out=out, dry_run=True, **FAST)["done"] == []


def test_of_a_run_folder(steerable, finished, file, tmp_path):
    """Its validation tasks are few, so that there is no search; less of a label is sought at negative strengths."""
    options = ["--run", finished, "--full-grid", "--layers", 3, "--strengths=-0.5,-1", "--samples", 1, "--workers", 1]
    said = steerable("calibrate", file, *options, "--aim", "less", "--out", tmp_path / "c", "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    tokens = sum(row["tokens"] for row in read_jsonl(tmp_path / "c/measured.jsonl"))
    assert result["rounds"] == [] and result["cost"] == {"search": None, "grid": tokens, "share": None}
    assert [row["strength"] for row in result["grid"]] == [-0.5, -1.0]
    asked = {t["id"] for t in read_jsonl(finished / "tasks.jsonl", "task") if t["split"] == "validation"}
    assert {t["id"] for t in read_jsonl(tmp_path / "c/tasks.jsonl", "task")} == asked
    assert result["settings"]["max_new_tokens"] == 60  # the run's


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target": "joy"}, "--target is 'joy', which --annotator pocket does not label: give --target one of"),
        ({"aim": "up"}, "--aim is 'up': expected more or less"),
        ({"strengths": "0,1"}, "--strengths is '0,1': expected numbers of one sign"),
        ({"strengths": "-1,1"}, "expected numbers of one sign"),
        ({"samples": 0}, "--samples is 0"),
        ({"loops": -1.0}, "the limit of loops is -1.0: expected 0 or more"),
        ({"layers": "9"}, "no vector at layer 9"),
        (
            {"validation": 5},
            "settings need 16 tasks or more for a search at a quarter of the grid's cost, and there are 5",
        ),
        ({"run": "nowhere"}, "is no run folder"),
    ],
)
def test_refused_before_anything_is_generated(file, tmp_path, options, text):
    with pytest.raises(UsageError, match=text.replace("(", r"\(")):
        calibrate_files([file], out=tmp_path / "c", **FAST | options)
    assert not (tmp_path / "c/tasks.jsonl").exists()


def test_files_that_do_not_fit(tmp_path):
    narrow = Direction({Site("resid_post", 2): torch.ones(64)}, behaviour="backtracking").save(
        tmp_path / "n.safetensors"
    )
    with pytest.raises(UsageError, match="width 64"):
        calibrate_files([narrow], out=tmp_path / "c", **FAST)
    ablating = Direction({Site("resid_post", 2): torch.ones(192)}, behaviour="backtracking", map="ablate")
    with pytest.raises(UsageError, match="only what is added has a dose"):
        calibrate_files([ablating.save(tmp_path / "a.safetensors")], out=tmp_path / "c", **FAST)
    zero = Direction({Site("resid_post", n): torch.full((192,), n - 3.0) for n in (2, 3, 4)}, behaviour="backtracking")
    with pytest.raises(UsageError, match="its vector at layer 3 is zero"):
        calibrate_files([zero.save(tmp_path / "z.safetensors")], out=tmp_path / "c", **FAST)
    with pytest.raises(UsageError, match="2 settings is too small"):  # layer 2 alone
        calibrate_files([zero.only([2, 3]).save(tmp_path / "z")], out=tmp_path / "c", **FAST | {"layers": None})
    with pytest.raises(UsageError, match="give one direction file at least"):
        calibrate_files([], out=tmp_path / "c")


def test_the_annotator_s_file_belongs_to_what_is_done(file, tmp_path):
    cues = tmp_path / "cues.yaml"
    cues.write_text('{"labels": {"backtracking": {"contains": ["w"]}}, "otherwise": "step"}')
    one = FAST | {"layers": "3", "strengths": "1", "validation": 1, "samples": 1, "full_grid": True}
    options = one | {"annotator": f"cues:{cues}", "out": tmp_path / "c"}
    calibrate_files([file], **options)
    assert calibrate_files([file], **options, dry_run=True)["done"] == ["calibrate"]
    cues.write_text('{"labels": {"backtracking": {"contains": ["x"]}}, "otherwise": "step"}')
    assert calibrate_files([file], **options, dry_run=True)["done"] == []
    with pytest.raises(SteerableError, match="kl is measured in none of 1 unsteered chain, so that no gain"):
        calibrate_files([file], out=tmp_path / "d", **one | {"target": "kl"})
