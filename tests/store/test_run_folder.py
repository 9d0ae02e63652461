"""What is finished is not done again; what is not is done from where it was; nothing is left over."""

import json

import pytest

from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.run_folder import RunFolder, read_json, sha256, write_json


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def stage(folder, text="made", settings=None, inputs=(), outputs=("out.txt",), work=None):
    """Run a stage that writes `text`; says whether there was anything to do."""

    def write(partial):
        for name in outputs:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    folder.root.mkdir(parents=True, exist_ok=True)
    return folder.run_stage("stage", inputs, settings or {}, outputs, work or write)


def test_a_finished_stage_is_not_done_again(folder):
    assert stage(folder) and not stage(folder)


def test_a_stage_is_done_again_when_its_settings_change(folder):
    stage(folder, settings={"seed": 0})
    assert stage(folder, settings={"seed": 1}) and not stage(folder, settings={"seed": 1})


def test_a_stage_is_done_again_when_an_input_changes(folder):
    folder.root.mkdir()
    (folder / "in").mkdir()
    (folder / "in/a").write_text("one")
    assert stage(folder, inputs=("in",)) and not stage(folder, inputs=("in",))
    (folder / "in/a").rename(folder / "in/b")
    assert stage(folder, inputs=("in",))


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_stage_is_done_again_when_its_output_is_damaged(folder, damage):
    stage(folder)
    if damage == "missing":
        (folder / "out.txt").unlink()
    else:
        (folder / "out.txt").write_text("edited")
    assert stage(folder) and (folder / "out.txt").read_text() == "made"


@pytest.mark.parametrize("stamp", ["", "{", "[]", "{}", '{"key": 1}', '{"key": null, "outputs": 3}', "null"])
def test_a_broken_stamp_counts_as_none(folder, stamp):
    stage(folder)
    (folder / "stages/stage.json").write_text(stamp)
    assert stage(folder)


def test_missing_input(folder):
    with pytest.raises(UsageError, match=r"needs .*in\.txt: run the stages before it"):
        stage(folder, inputs=("in.txt",))


def test_pieces_are_kept_until_the_stage_is_finished(folder):
    def stop(partial):
        write_json(partial / "piece.json", 1)
        raise KeyboardInterrupt

    def go_on(partial):
        assert read_json(partial / "piece.json") == 1
        (folder / "out.txt").write_text("made")

    with pytest.raises(KeyboardInterrupt):
        stage(folder, work=stop)
    assert not (folder / "stages").exists() and not (folder / "timings.json").exists()
    assert stage(folder, work=go_on)
    assert not (folder / ".partial").exists()


def test_pieces_of_other_settings_go(folder):
    folder.root.mkdir()
    write_json(folder.partial("stage", "a" * 64) / "piece.json", 1)
    write_json(folder.partial("later", "c" * 64) / "piece.json", 1)
    assert not (folder.partial("stage", "b" * 64) / "piece.json").exists()
    assert not any((folder / ".partial").glob("stage-*"))
    assert (folder.partial("later", "c" * 64) / "piece.json").exists()


@pytest.mark.parametrize("others", [("bias-2", "bias-", "bias-2-3"), ("[a]*", "a", "aa"), ("b+", "bb", "b.+")])
def test_pieces_of_a_stage_whose_name_begins_alike_stay(folder, others):
    """Stages are named after arms and files, which people name."""
    first, *rest = others = "bias", *others
    folder.root.mkdir()
    for name in others:
        write_json(folder.partial(name, "a" * 64) / "piece.json", 1)
    for name in others:
        folder.partial(name, "b" * 64)  # those of its other key go
        left = [other for other in others if (folder.partial(other, "a" * 64) / "piece.json").exists()]
        assert left == [other for other in others if other != name], name
        write_json(folder.partial(name, "a" * 64) / "piece.json", 1)
    (folder / "out").write_text("")
    folder.finish(first, "a" * 64, ["out"])
    assert all((folder.partial(other, "a" * 64) / "piece.json").exists() for other in rest)


def test_a_folder_of_an_earlier_release_is_said_to_be_one(folder):
    stage(folder)
    stamp = read_json(folder / "stages/stage.json")
    with folder.locked():
        pass  # no warning: an error here
    del stamp["hashes"]
    write_json(folder / "stages/stage.json", stamp)
    with pytest.warns(SteerableWarning, match="earlier release.*done again"), folder.locked():
        pass


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ({"model": "other"}, "results of another model, 'other' and not 'pocket'"),
        ({"model": "pocket", "revision": "v1"}, "results of another revision, 'v1' and not None"),
        ({"model": "pocket", "method": "bias"}, "what `steerable train rl` made"),
        ({"model": "pocket", "method": "bias", "prefix_tokens": 8}, "what `steerable train upft` made"),
        ({"model": "pocket", "job": "passk"}, "what `steerable passk` made"),
    ],
)
def test_what_another_job_or_model_left_is_not_overwritten(folder, held, text):
    write_json(folder / "config.json", held)
    with pytest.raises(UsageError, match=f"{text}.*another --out, or --overwrite"):
        folder.refuse_other("run", "pocket")
    folder.refuse_other("run", "pocket", overwrite=True)


def test_the_same_model_by_another_path(folder, monkeypatch):
    (folder / "m").mkdir(parents=True)
    monkeypatch.chdir(folder.root)
    write_json(folder / "config.json", {"model": "m"})
    folder.refuse_other("run", str(folder / "m"))
    write_json(folder / "config.json", {"model_type": "llama", "architectures": []})
    with pytest.raises(UsageError, match="is the folder of a model"):
        folder.refuse_other("run", "m", overwrite=True)


def test_killed_between_stamp_and_tidying(folder):
    stage(folder)
    stamp = read_json(folder / "stages/stage.json")
    write_json(folder.partial("stage", stamp["key"]) / "piece.json", 1)
    assert not stage(folder) and not (folder / ".partial").exists()


def test_strays_of_a_killed_process_go(folder):
    with folder.locked():
        (folder / "vectors").mkdir()
        (folder / "vectors/.a.safetensors.tmp").write_text("half")
        (folder / ".timings.json.tmp").write_text("half")
        (folder / ".base.tmp").mkdir()
        (folder / ".base.tmp/.config.json.tmp").write_text("half")
    with folder.locked():
        assert [path.name for path in folder.root.rglob("*") if path.is_file()] == [".lock"]


def test_one_process_at_a_time(folder):
    with folder.locked():
        with pytest.raises(SteerableError, match="another process is working in"), RunFolder(folder.root).locked():
            pass
        with pytest.raises(SteerableError):  # the failed try did not break the lock
            RunFolder(folder.root).locked().__enter__()
    with RunFolder(folder.root).locked():
        pass


def test_a_folder_in_which_nothing_was_done_goes_again(tmp_path):
    with pytest.raises(UsageError), RunFolder(tmp_path / "new").locked():
        raise UsageError("refused")
    with RunFolder(tmp_path / "used").locked():
        (tmp_path / "used/config.json").write_text("{}")
    (tmp_path / "made").mkdir()
    with RunFolder(tmp_path / "made").locked():
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "used"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file: --out must name a folder"):
        RunFolder(tmp_path / "file")
    with pytest.raises(SteerableError, match="cannot use"), RunFolder(tmp_path / "file/inside").locked():
        pass


@pytest.mark.parametrize("before", ["", "[]", '{"stages": 3}', '{"stages": {"other": 1}}'])
def test_times(folder, before):
    folder.root.mkdir()
    (folder / "timings.json").write_text(before)
    stage(folder)
    timings = read_json(folder / "timings.json")
    assert timings["stages"]["stage"] >= 0 and set(timings) == {"stages", "finished"}
    assert ("other" in timings["stages"]) == ("other" in before)


def test_json(tmp_path):
    path = write_json(tmp_path / "new/a.json", {"z": "é", "a": [1.5, None]})
    assert read_json(path) == {"z": "é", "a": [1.5, None]}
    assert json.loads(path.read_bytes())
    with pytest.raises(UsageError, match="run the stage that writes it first"):
        read_json(tmp_path / "none.json")
    path.write_text("{")
    with pytest.raises(UsageError, match=r"a\.json is not valid JSON"):
        read_json(path)


def test_hashes_of_folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/file").write_text("same")
    assert sha256(tmp_path / "one") == sha256(tmp_path / "two")
    (tmp_path / "two/sub/file").rename(tmp_path / "two/file")
    assert sha256(tmp_path / "one") != sha256(tmp_path / "two")
