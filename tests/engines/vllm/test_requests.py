"""What requests may say, the folder of directions, and presets: without vLLM."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import steerable as st
from steerable.engines.vllm.folder import Folder
from steerable.engines.vllm.kept import Kept
from steerable.engines.vllm.presets import Models, Presets, parse_presets
from steerable.engines.vllm.requests import asked, check_model, read_steering
from steerable.engines.vllm.settings import Settings
from steerable.steering.spec import to_json

D = 8


def direction(**more):
    return st.Direction({st.Site("resid_post", i): torch.arange(1.0, D + 1) + i for i in (1, 3)}, **more)


def as_json(**fields):
    """A steering with other fields."""
    return json.dumps([json.loads(to_json(direction().steering(1.0)))[0] | fields])


@pytest.fixture
def folder(tmp_path):
    direction(behaviour="happy", strength=0.5).save(tmp_path / "happy.safetensors")
    return Folder(str(tmp_path))


def test_forms_of_a_steering_are_the_same(folder):
    steering = tuple(direction().steering(0.25, [3], "thinking", map="ablate"))
    vectors = {"3": direction().at(3).tolist()}
    options = {"strength": 0.25, "where": "thinking", "map": "ablate"}
    for given in (
        steering,
        to_json(steering),
        "0.25 happy[3]|ablate@thinking",
        {"direction": "happy", "layers": [3], **options},
        [{"vectors": vectors, **options}],
        json.dumps({"vectors": vectors, **options}),
    ):
        assert read_steering(given, folder.load) == steering
    assert read_steering(steering[0], folder.load) == steering
    assert read_steering('[{"direction": "happy"}, {"direction": "happy", "strength": -1}]', folder.load) == (
        *direction().steering(0.5), *direction().steering(-1.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    "given, message",
    [
        ("0.5 sad", "no direction is known as 'sad': there are happy"),
        ("0.5 ../happy", "cannot name a direction"),
        ({"direction": "../happy"}, "cannot name a direction"),
        ({"direction": ["happy"]}, "cannot name a direction"),
        ({}, "this has both or neither"),
        ({"direction": "happy", "vectors": {"1": [1.0]}}, "both or neither"),
        ({"direction": "happy", "strenght": 2}, "unknown key 'strenght'"),
        ({"direction": "happy", "strength": "2"}, "is a number, not '2'"),
        ({"direction": "happy", "strength": True}, "is a number, not True"),
        ({"direction": "happy", "layers": [2]}, "no vector at layer 2"),
        ({"direction": "happy", "layers": "2"}, "layers are a list"),
        ({"direction": "happy", "rescale": 1}, "rescale is true or false"),
        ({"direction": "happy", "where": "nowhere"}, "is not a selector"),
        ({"vectors": {"1": ["a"]}}, "no list of numbers"),
        ({"vectors": {"1": [True, False]}}, "no list of numbers"),
        ({"vectors": {"1": [1.0], "resid_post.1": [2.0]}}, "have resid_post.1 twice"),
        ({"vectors": {"-1": [1.0]}}, "is not a site"),
        ("", "expected the name of a direction"),
        (as_json(strength=True), "one number as its strength, not True"),
        (as_json(strength="2"), "one number as its strength, not '2'"),
        (as_json(source={"model_id": 5}), "holds texts"),
        ({"vectors": [1.0]}, "an object of layers and numbers"),
        ('{"direction": "happy"', "no sound JSON"),
        ("+".join(["happy"] * 2000), "has 11999 characters: expected 10000 at most"),
        ([{"direction": "happy"}] * 101, "has 101 parts: expected 100 at most"),
        ("[1]", "holds interventions"),
        (3, "holds interventions"),
    ],
)
def test_what_is_no_steering_is_refused_in_a_sentence(folder, given, message):
    with pytest.raises(st.UsageError, match=message):
        read_steering(given, folder.load)


def test_without_a_folder_no_name_is_known():
    with pytest.raises(st.UsageError, match="has no folder of directions"):
        read_steering("0.5 happy")


@pytest.mark.parametrize(
    "steering, message",
    [
        (direction().steering(), "layers 0 to 2"),
        (direction().steering(layers=[1]), "started to steer layers 0"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(steering, message):
    settings = Settings(layers=(0,)) if "started" in message else Settings()
    with pytest.raises(st.UsageError, match=message):
        check_model(steering, "pocket", 3, D, settings)


def test_a_direction_of_another_model_is_refused():
    for name in ("pocket", "/somewhere/pocket", "owner/pocket", ""):
        check_model(direction(model_id=name).steering(), "/here/pocket", 4, D, Settings())
    with pytest.raises(st.UsageError, match="was made on 'owner/other', and the engine serves 'pocket'"):
        check_model(direction(model_id="owner/other").steering(), "/here/pocket", 4, D, Settings())
    with pytest.raises(st.UsageError, match="was made on 'one/pocket', and the engine serves 'another/pocket'"):
        check_model(direction(model_id="one/pocket").steering(), "another/pocket", 4, D, Settings())
    with pytest.raises(st.UsageError, match="width 8, but the model's width there is 9"):
        check_model(direction().steering(), "pocket", 4, 9, Settings())


def test_folder_takes_directions_in_and_nothing_else(folder, tmp_path):
    assert folder.names() == ["happy"]
    assert folder.put("sad", direction(behaviour="sad").to_bytes()) == folder.load("sad")
    folder.put("sad", direction(behaviour="very sad").to_bytes())
    assert folder.load("sad").behaviour == "very sad"  # the file's new content
    for name, content, message in (
        ("../out", direction().to_bytes(), "cannot name"),
        (".x", direction().to_bytes(), "cannot name"),
        ("x" * 101, direction().to_bytes(), "cannot name"),
        ("x", b"\x80\x04", "x.safetensors is not a sound"),
        ("x", b"x" * ((64 << 20) + 1), "64 MiB at most"),
    ):
        with pytest.raises(st.UsageError, match=message):
            folder.put(name, content)

    def refuse(direction):
        raise st.UsageError("not this one")

    with pytest.raises(st.UsageError, match="not this one"):
        folder.put("x", direction().to_bytes(), refuse)
    folder.remove("sad")
    with pytest.raises(st.UsageError, match="no direction is known"):
        folder.remove("sad")
    assert [path.name for path in tmp_path.iterdir()] == ["happy.safetensors"]


def test_a_file_that_is_none_can_be_removed(folder, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"xx")
    with pytest.raises(st.UsageError) as told:
        folder.load("broken")
    assert "broken.safetensors" in str(told.value) and str(tmp_path) not in str(told.value)
    folder.remove("broken")
    assert folder.names() == ["happy"]


def test_a_file_in_place_of_another_is_read(folder, tmp_path):
    """Also where it has the time of the other, as copies may."""
    file = tmp_path / "happy.safetensors"
    time = file.stat().st_mtime_ns
    assert asked("1 happy", folder)[0].vector.tolist() == direction().at(1).tolist()
    folder.put("happy", (2 * direction()).to_bytes())
    os.utime(file, ns=(time, time))
    assert asked("1 happy", folder)[0].vector.tolist() == (2 * direction()).at(1).tolist()
    folder.remove("happy")
    with pytest.raises(st.UsageError, match="no direction is known as 'happy'"):
        asked("1 happy", folder)


def test_directions_of_a_program_are_asked_anew(tmp_path):
    one, other = (Folder("", {"policy": n * direction()}) for n in (1, 3))
    for folder in (one, other, one):
        assert asked("1 policy", folder)[0].vector.tolist() == folder.load("policy").at(1).tolist()
    assert asked("1 policy", one) is asked("1 policy", one)  # kept as long as nothing changes


def test_writers_of_a_name_never_leave_half_a_file(folder):
    contents = [direction(behaviour=f"{n}", strength=n + 1.0).to_bytes() for n in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            list(threads.map(lambda content: folder.put("shared", content), contents))
            assert folder.load("shared").to_bytes() in contents


def test_kept_values_have_their_room():
    made = []
    kept = Kept(10, len)
    for key in ("aaaa", "bbbb", "aaaa", "cccc", "bbbb", "x" * 11, "x" * 11):
        assert kept.get(key, lambda key=key: made.append(key) or key) == key
    assert made == ["aaaa", "bbbb", "cccc", "bbbb", "x" * 11, "x" * 11]  # bbbb made room for cccc; the last has none
    assert kept.get("cccc", lambda: "new", is_fresh=lambda value: False) == "new" and kept.used == 7


def test_presets_are_models(folder):
    presets = Presets(folder, parse_presets(["merry=0.5 happy@thinking", "calm = -1 happy"]), ["pocket"])
    models = Models([SimpleNamespace(name="pocket", model_path="/p")], presets)
    assert [model.name for model in models] == ["pocket", "pocket:calm", "pocket:happy", "pocket:merry"]
    assert models[0].name == "pocket"
    assert presets.steering("pocket:calm") == "-1 happy"
    assert presets.steering("pocket") is None is presets.steering("") is presets.steering(None)
    with pytest.raises(st.UsageError, match="has no steering 'sad': there are calm, happy, merry"):
        presets.steering("pocket:sad")
    assert read_steering(presets.steering("pocket:happy"), folder.load) == tuple(direction().steering(0.5))
    # Names with a colon that are no presets: the model's own, an adapter's, another model's.
    presets = Presets(folder, {}, ["llama:happy"], lambda name: name == "sql:happy")
    assert [presets.steering(name) for name in ("llama:happy", "sql:happy", "other:happy")] == [None] * 3
    assert presets.steering("llama:happy:happy") == '"happy"'
    for wrong in ("merry", "=x", "x=", "a:b=c"):
        with pytest.raises(st.UsageError, match="expected a name and a steering"):
            parse_presets([wrong])
