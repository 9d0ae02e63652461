"""What is written replaces files alone, what is hashed is what `sha256sum` prints, and a pointer is called one."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess

import pytest
import torch

from steerable.chains.records import read_jsonl, write_jsonl
from steerable.formats import export_file, import_file, validate_file
from steerable.jobs.publish import save_pretrained
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import sha256, strict_json, writable_target, write_atomic
from steerable.store.run_folder import RunFolder, read_json, write_json

NODES = ("fifo", "socket", "device", "folder")


@pytest.fixture(autouse=True)
def no_hanging():
    """A FIFO that is opened for writing waits for a reader: for ever, but for this."""

    def stop(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def node(request, tmp_path, monkeypatch):
    """A node of the test's own, of the kind that is asked for; afterwards it is still of that kind, and alone."""
    place = tmp_path / "nodes"
    place.mkdir()
    path = place / "node"
    match request.param:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "socket":
            monkeypatch.chdir(place)  # the name of a socket is short
            with socket.socket(socket.AF_UNIX) as made:
                made.bind("node")
            monkeypatch.undo()
        case "device":
            try:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # another /dev/null
            except PermissionError:
                pytest.skip("only the superuser makes devices")
    before = path.lstat()
    yield path
    after = path.lstat()
    assert (after.st_mode, after.st_ino, after.st_rdev) == (before.st_mode, before.st_ino, before.st_rdev)
    assert [found.name for found in place.rglob("*")] == ["node"]


def direction():
    return Direction({Site("resid_post", i): torch.ones(4) * i for i in (1, 2)}, model_id="m")


WRITERS = {
    "write_atomic": lambda path: write_atomic(path, "text"),
    "write_json": lambda path: write_json(path, {}),
    "write_jsonl": lambda path: write_jsonl(path, [{"id": "a"}]),
    "Direction.save": lambda path: direction().save(path),
    **{
        to: lambda path, to=to: export_file(direction(), path, to, n_layers=4)
        for to in ("llama.cpp", "pt-blocks", "svec", "steering-lite", "lm-eval")
    },
}


@pytest.mark.parametrize("node", NODES, indirect=True)
@pytest.mark.parametrize("writer", WRITERS)
def test_only_files_are_replaced(node, writer):
    with pytest.raises(UsageError, match=r"node is a (FIFO|socket|device|folder): expected a regular file"):
        WRITERS[writer](node)


@pytest.mark.parametrize("node", [n for n in NODES if n != "folder"], indirect=True)
def test_where_a_folder_is_wanted(node):
    for write in (
        lambda: RunFolder(node),
        lambda: save_pretrained(direction(), node),
        lambda: export_file(direction(), node, "peft-beft", model_type="llama"),
        lambda: write_json(node / "deeper/a.json", {}),
    ):
        with pytest.raises(SteerableError, match="node is a (FIFO|socket|device)"):
            write()


@pytest.mark.parametrize("link", ["to a file", "to nothing", "to a link", "relative"])
def test_a_link_stays_and_its_file_is_written(tmp_path, link):
    real, path = tmp_path / "there/real", tmp_path / "here/link"
    path.parent.mkdir()
    if link != "to nothing":
        real.parent.mkdir()
        real.write_text("old")
    if link == "to a link":
        (tmp_path / "between").symlink_to(real)
    path.symlink_to({"to a link": tmp_path / "between", "relative": "../there/real"}.get(link, real))
    write_atomic(path, "new")
    assert path.is_symlink() and real.read_text() == "new" and not real.is_symlink()
    assert {found.name for found in tmp_path.rglob("*")} <= {"there", "real", "here", "link", "between"}


def test_links_that_lead_nowhere(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with pytest.raises(UsageError, match="link is a FIFO"):
        write_atomic(tmp_path / "link", "x")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SteerableError, match="loop"):
        write_atomic(tmp_path / "loop", "x")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match="file is a file and no folder"):
        write_atomic(tmp_path / "file/a", "x")
    assert (tmp_path / "file").read_text() == "kept" and (tmp_path / "link").is_symlink()


def test_what_lies_under_the_temporary_name_is_not_written_through(tmp_path):
    (tmp_path / "other").write_text("other")
    (tmp_path / ".a.tmp").symlink_to("other")
    os.mkfifo(tmp_path / ".b.tmp")
    for name in "ab":
        write_atomic(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new" and not (tmp_path / name).is_symlink()
    assert (tmp_path / "other").read_text() == "other"


def test_a_run_folder_behind_a_link(tmp_path):
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "victim").write_text("precious")
    with RunFolder(tmp_path / "link").locked():
        assert (tmp_path / "real/.lock").is_file() and (tmp_path / "link").is_symlink()
    (tmp_path / "real/.lock").unlink()
    (tmp_path / "real/.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(SteerableError, match="cannot use"), RunFolder(tmp_path / "link").locked():
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_pipes_in_a_run_folder_are_refused_and_not_waited_for(tmp_path):
    folder = RunFolder(tmp_path)
    for name in ("config.json", "out.txt", "in.txt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=r"config\.json is a FIFO"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UsageError, match=r"out\.txt is a FIFO"):
        folder.run_stage("stage", [], {}, ["out.txt"], lambda partial: None)
    with pytest.raises(UsageError, match=r"in\.txt is a FIFO"):
        folder.run_stage("stage", ["in.txt"], {}, ["other"], lambda partial: None)
    (tmp_path / "stages").mkdir()
    os.mkfifo(tmp_path / "stages/stage.json")
    with pytest.raises(UsageError, match=r"stage\.json is a FIFO"), folder.locked():
        pass


# --- hashes ---


def printed(folder, command):
    if shutil.which("sha256sum") is None:
        pytest.skip("this system has no sha256sum")
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True).stdout[:64]


def test_hashes_are_what_sha256sum_prints(tmp_path):
    for name in ("b.txt", "sub/a", "sub-2/a", "Z", "é"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 1000)
    assert sha256(tmp_path / "b.txt") == printed(tmp_path, "sha256sum b.txt")
    lines = "find * -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"
    assert sha256(tmp_path) == printed(tmp_path, lines)
    direction().save(tmp_path / "own.safetensors")
    export_file(direction(), tmp_path / "a.svec", "svec")
    assert import_file(tmp_path / "a.svec").stats["imported"]["sha256"] == printed(tmp_path, "sha256sum a.svec")


def test_the_hashes_of_a_run_are_those_of_its_files(finished):
    report = json.loads((finished / "report.json").read_text())
    for name, digest in report["hashes"].items():
        if (finished / name).is_file():
            assert digest == printed(finished, f"sha256sum {name}")
    vectors = [Direction.load(file) for file in sorted((finished / "vectors").glob("*.safetensors"))]
    assert {v.data_sha256 for v in vectors} == {printed(finished, "sha256sum chains.jsonl")}
    stamp = json.loads((finished / "stages/tasks.json").read_text())
    assert stamp["outputs"]["tasks.jsonl"] == printed(finished, "sha256sum tasks.jsonl")


# --- what is read ---


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]', "[" * 100_000]
)
def test_json_that_means_nothing_certain(tmp_path, text):
    with pytest.raises(ValueError):
        strict_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_what_json_cannot_hold_is_a_sentence(tmp_path):
    with pytest.raises(SteerableError, match="cannot be written as JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
    lone = json.loads('"\\ud800"')
    assert read_json(write_json(tmp_path / "a.json", lone)) == lone


def test_a_git_lfs_pointer_is_called_one(tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    for name in ("a.safetensors", "a.gguf", "a.pt", "a.svec", "direction.pt", "a.jsonl"):
        (tmp_path / name).write_text(pointer)
    folder = tmp_path / "easyedit"
    folder.mkdir()
    (folder / "layer_3.pt").write_text(pointer)
    reads = [(read, path) for path in [*tmp_path.glob("a.*"), folder] for read in (import_file, validate_file)]
    for read, path in [*reads, (Direction.load, tmp_path / "a.safetensors"), (read_jsonl, tmp_path / "a.jsonl")]:
        if read is import_file and path.suffix == ".jsonl":
            continue
        with pytest.raises(UsageError, match="is a Git LFS pointer.*git lfs pull"):
            read(path)


def test_a_model_of_pointers(tmp_path):
    from steerable.models import loading as models

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\n")
    with pytest.raises(UsageError, match=r"model\.safetensors is a Git LFS pointer"):
        models.load(tmp_path, device="cpu")


def test_a_folder_that_takes_no_file_is_refused_before_the_work(tmp_path):
    assert writable_target(tmp_path / "new/deep/file.json") == tmp_path / "new/deep/file.json"
    assert not list(tmp_path.iterdir())  # nothing was made
    if not os.path.isdir("/proc"):
        pytest.skip("no folder here takes no file, whoever asks: there is no /proc")
    with pytest.raises(SteerableError, match=r"^cannot write /proc/file\.json: "):
        writable_target("/proc/file.json")
