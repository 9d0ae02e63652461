import json
import math
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from steerable.steering.direction import FORMAT, Direction
from steerable.steering.gates import selectors, when
from steerable.steering.maps import Clip
from steerable.steering.schedule import Ramp
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, UsageError

A, B = Site("resid_post", 2), Site("resid_post", 10)


def make(**about):
    generator = torch.Generator().manual_seed(0)
    return Direction(
        **{
            "vectors": {B: torch.randn(6, generator=generator), A: torch.randn(6, generator=generator)},
            "model_id": "pocket",
            "model_revision": "abc",
            "behaviour": "backtracking",
            "method": "difference_of_means",
            "gate": "thinking & ~boundary",
            "strength": 0.1 + 0.2,
            "norms": {B: 12.5, A: 1 / 3},
            "stats": {"window": "onset", "n": [1, 2], "ünï": None},
            "data_sha256": "0" * 64,
            "created_by": "test",
            "licence": "Apache-2.0",
        }
        | about,
    )


def same(a, b):
    assert list(a.vectors) == list(b.vectors)
    assert all(torch.equal(a.vectors[s], b.vectors[s]) for s in a.vectors)
    assert {k: v for k, v in vars(a).items() if k != "vectors"} == {k: v for k, v in vars(b).items() if k != "vectors"}


def test_round_trip(tmp_path):
    direction = make()
    path = direction.save(tmp_path / "new" / "a.safetensors")
    same(Direction.load(path), direction)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    plain = load_file(path)  # any safetensors reader will do
    assert set(plain) == {"resid_post.2", "resid_post.10"} and plain["resid_post.2"].dtype == torch.float32


def test_matrices_round_trip(tmp_path):
    direction = Direction({A: torch.ones(2, 6)})
    same(Direction.load(direction.save(tmp_path / "a")), direction)


def test_equal_bytes(tmp_path):
    code = (
        "import sys, torch, steerable as st; s = st.Site.parse;"
        "d = st.Direction({s('mlp_out.1'): torch.ones(3), s('resid_post.0'): torch.ones(3)},"
        "stats={'b': 1, 'a': 2}, norms={s('resid_post.0'): 1.0, s('mlp_out.1'): 2.0});"
        "sys.stdout.buffer.write(d.to_bytes())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    site = Site.parse
    other_order = Direction(
        {site("resid_post.0"): torch.ones(3), site("mlp_out.1"): torch.ones(3)},
        stats={"a": 2, "b": 1},
        norms={site("mlp_out.1"): 2.0, site("resid_post.0"): 1.0},
    )
    assert output == other_order.to_bytes()  # another process, with another hash seed


def test_save_replaces_whole_or_not_at_all(tmp_path):
    path = make().save(tmp_path / "a")
    before = path.read_bytes()
    broken = make(stats={"bad": object()})
    with pytest.raises(UsageError, match="JSON"):
        broken.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(SteerableError, match="cannot write"):
        make().save(path / "below-a-file")


def write(path, tensors=None, **meta):
    tensors = {"resid_post.2": torch.ones(6)} if tensors is None else tensors
    full = {"format": FORMAT, "version": "1"} | meta
    save_file(tensors, path, {k: v for k, v in full.items() if v is not None})
    return path


def test_a_minimal_foreign_file(tmp_path):
    direction = Direction.load(write(tmp_path / "a"))
    assert direction.layers == [2] and direction.strength == 1.0 and direction.gate == "all"


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"format": None}, "no format"),
        ({"format": "pt"}, "expected"),
        ({"version": "3"}, "expected"),
        ({"colour": "red"}, "unknown metadata key 'colour'"),
        ({"map": "warp"}, "unknown map"),
        ({"gate": "always"}, "not a selector"),
        ({"gate": "all" + " & all" * 50_000}, "not a selector"),
        ({"k" * 50_000: ""}, "unknown metadata key"),
        ({"strength": "NaN"}, "NaN"),
        ({"strength": "1e999"}, "finite"),
        ({"strength": '"1"'}, "strength"),
        ({"strength": "true"}, "strength"),
        ({"norms": "[1]"}, "norms"),
        ({"norms": '{"resid_post.2": "x"}'}, "norms"),
        ({"norms": '{"nowhere.2": 1}'}, "unknown site"),
        ({"norms": '{"resid_post.2": -1}'}, "no norm negative"),
        ({"stats": "{"}, "sound"),
        ({"stats": "[" * 100_000}, "sound"),
    ],
)
def test_bad_metadata(tmp_path, meta, reason):
    with pytest.raises(SteerableError, match=reason) as error:
        Direction.load(write(tmp_path / "a", **meta))
    assert str(tmp_path / "a") in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"resid_post.2": torch.tensor([1.0, math.nan])}, "NaN"),
        ({"resid_post.2": torch.tensor([1.0, math.inf])}, "NaN or infinite"),
        ({"resid_post.2": torch.ones(2, 2, 2)}, "expected \\[d\\]"),
        ({"resid_post.2": torch.tensor(1.0)}, "expected \\[d\\]"),
        ({"resid_post.2": torch.ones(0)}, "expected \\[d\\]"),
        ({"resid_post.2": torch.ones(2, dtype=torch.int32)}, "float32"),
        ({"layer2": torch.ones(2)}, "not a site"),
        ({"resid_post.2": torch.ones(2), "resid_post.02": torch.zeros(2)}, "'resid_post.02' is not a site"),
        ({}, "one site at least"),
    ],
)
def test_bad_tensors(tmp_path, tensors, reason):
    with pytest.raises(SteerableError, match=reason):
        Direction.load(write(tmp_path / "a", tensors))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_no_pickle_is_run(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps({"resid_post.2": Bomb()}))
    with pytest.raises(SteerableError, match="not a sound safetensors file"):
        Direction.load(path)


def test_no_file(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match="there is no direction file"):
            Direction.load(path)


def test_a_huge_header_is_not_read(tmp_path):
    path, length = tmp_path / "a", 2**28
    with open(path, "wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(length + 8)  # a hole, which takes no room on the disk
    with pytest.raises(SteerableError, match="header too large"):
        Direction.load(path)


def test_damaged_files(tmp_path):
    """A flipped byte or a cut gives an error of ours or a sound direction, never anything else."""
    good, rng, path = make().to_bytes(), random.Random(0), tmp_path / "a"
    errors = 0
    for trial in range(600):
        data = bytearray(good)
        if trial % 5:
            header = 8 + int.from_bytes(good[:8], "little")
            data[rng.randrange(header if trial % 2 else len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            direction = Direction.load(path)
            assert all(torch.isfinite(v).all() for v in direction.vectors.values())
            json.dumps(direction.stats)
            direction.to_bytes()
        except SteerableError as error:
            errors += 1
            assert "\n" not in str(error)
    assert errors > 300


def test_views():
    direction = make()
    assert direction.layers == [2, 10] and torch.equal(direction.at(2), direction.at(A))
    assert direction.only([10]).layers == [10]
    assert torch.equal(direction.scaled(-2).at(2), direction.at(2) * -2)
    assert direction.rescaled_to().at(10).norm() == pytest.approx(12.5)
    assert direction.rescaled_to({A: 3.0, B: 4.0}).at(2).norm() == pytest.approx(3.0)
    for bad in (
        lambda: direction.at(3),
        lambda: direction.only([2, 3]),
        lambda: direction.rescaled_to({A: 1.0}),
    ):
        with pytest.raises(UsageError):
            bad()
    both = Direction({A: torch.ones(6), Site("mlp_out", 2): torch.ones(6)})
    with pytest.raises(UsageError, match="more than one"):
        both.at(2)
    with pytest.raises(UsageError, match="zero"):
        Direction({A: torch.zeros(6)}, norms={A: 1.0}).rescaled_to()


def test_random_like():
    direction = make()
    one, again, other = direction.random_like(0), direction.random_like(0), direction.random_like(1)
    same(one, again)
    for site, v in direction.vectors.items():
        assert one.vectors[site].norm() == pytest.approx(float(v.norm()), rel=1e-6)
        assert not torch.equal(one.vectors[site], other.vectors[site])


def test_cosine():
    direction = make()
    assert direction.cosine(direction.scaled(3)) == pytest.approx({A: 1.0, B: 1.0})
    assert direction.cosine(direction.scaled(-1).only([2])) == pytest.approx({A: -1.0})
    with pytest.raises(UsageError, match="no site in common"):
        direction.cosine(Direction({Site("mlp_out", 2): torch.ones(6)}))


def test_derived_directions_share_nothing():
    direction = make()
    copy = direction.scaled(1)
    copy.stats["new"] = 1
    copy.norms[A] = 0.0
    assert "new" not in direction.stats and direction.norms[A] == 1 / 3
    trained = torch.zeros(4)
    first = Direction({A: trained})
    trained += 1
    assert not first.at(A).any()


def test_the_residual_stream_has_one_width(tmp_path):
    with pytest.raises(UsageError, match="one width.*6 and 7"):
        Direction({A: torch.ones(6), B: torch.ones(7)})
    Direction({A: torch.ones(6), Site("mlp_act", 2): torch.ones(24)})  # neurons are others in number
    with pytest.raises(SteerableError, match="one width"):
        Direction.load(write(tmp_path / "a", {"resid_post.2": torch.ones(6), "mlp_out.3": torch.ones(7)}))


@pytest.mark.parametrize(
    "meta",
    [
        {"strength": "1" + "0" * 400},
        {"norms": '{"resid_post.2": 1' + "0" * 400 + "}"},
        {"stats": '{"a": "\\ud800"}'},
        {"stats": '{"a": 1e999}'},
    ],
)
def test_numbers_and_texts_that_cannot_be_written_again(tmp_path, meta):
    with pytest.raises(SteerableError, match="sound"):
        Direction.load(write(tmp_path / "a", **meta))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vectors": {"resid_post.2": torch.ones(2)}}, "for each Site"),
        ({"vectors": {A: [1.0, 2.0]}}, "is a list: expected a tensor"),
        ({"norms": {"resid_post.2": 1.0}}, "for each Site"),
        ({"model_id": None}, "model_id of a direction must be a text"),
        ({"strength": None}, "finite numbers"),
        ({"map": None}, "a map is a text"),
        ({"gate": None}, "a gate is a text"),
        ({"schedule": None}, "a schedule is a text"),
    ],
)
def test_bad_fields(change, reason):
    with pytest.raises(UsageError, match=reason):
        make(**change)


def test_equality_is_by_value():
    assert make() == make() and make() != make(strength=2.0) and make() != 1
    assert make(rescale=1) == make(rescale=True)


def test_unit_after_scaling():
    """A vector of another length is no longer as long as the mean activation."""
    direction = make(unit="mean activation")
    assert direction.only(direction.layers[:1]).unit == (-direction).unit == "mean activation"
    assert direction.scaled(2).unit == (-make(unit="calibrated")).unit == "raw"


def test_texts_must_be_unicode():
    with pytest.raises(UsageError, match="Unicode"):
        make(behaviour="\ud800").to_bytes()


def test_dose():
    """||s v|| / ||h|| at every site whose norm is known."""
    a, b = Site("resid_post", 1), Site("resid_post", 2)
    direction = Direction({a: torch.full((4,), 3.0), b: torch.ones(4)}, norms={a: 24.0}, strength=-2.0)
    assert direction.dose() == {a: 0.5} and direction.dose(1) == {a: 0.25} and direction.dose(0) == {a: 0.0}


def test_a_file_says_how_it_steers(tmp_path):
    """Map with parameters, gate, schedule, strength, rescale and unit go through the file, and steer."""
    happy = Direction({A: torch.ones(6)}, behaviour="happy")
    generator = torch.Generator().manual_seed(0)
    direction = Direction(
        {A: torch.randn(2, 6, generator=generator), B: torch.randn(2, 6, generator=generator)},
        map=Clip(-math.inf, (0.5, 0.25)),
        gate=when(happy, ">", 0.25) & selectors.thinking,
        schedule=Ramp(0, 1, 50),
        strength=-0.5,
        rescale=True,
        unit="calibrated",
    )
    path = direction.save(tmp_path / "a.safetensors")
    again = Direction.load(path)
    same(again, direction)
    assert again.to_bytes() == path.read_bytes() and again.steering() == direction.steering()
    assert (again.map, again.schedule) == ("ceiling([0.5, 0.25])", "ramp(0, 1, 50)")
    first, second = again.steering(2.0, where="all", map="ablate")
    assert (first.site, first.strength, str(first.gate), first.rescale) == (A, 2.0, "all", True)
    assert (
        first.map == Clip.ablate() and len(again.steering(layers=[10])) == len(again.steering(layers=np.int64(10))) == 1
    )
    torch.testing.assert_close(first.basis.T @ first.basis, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("steering", "reason"),
    [
        ('{"map": {"type": "warp"}}', "unknown map"),
        ('{"map": {"type": "shift", "colour": 1}}', "no parameter"),
        ('{"map": {"type": "clip", "lo": 2, "hi": 1}}', "lo <= hi"),
        ('{"map": {"type": "clip", "lo": "x"}}', "number"),
        ('{"map": "shift"}', "an object"),
        ('{"gate": "always"}', "not a selector"),
        ('{"gate": 3}', "gate"),
        ('{"map": {"type": "affine", "scale": [[1, 2], [3]]}}', "unequal"),
        ('{"map": {"type": "shift", "amount": "inf"}}', "finite"),
        ('{"map": {"type": "framed", "map": {"type": "shift"}, "frame": [[1]]}}', "framed"),
        ('{"map": {"type": "rotate", "degrees": 30, "absolute": "yes"}}', "True or False"),
        ('{"schedule": {"type": "ramp"}}', "not complete"),
        ('{"strength": "1"}', "strength"),
        ('{"strength": 1e999}', "finite"),
        ('{"rescale": 1}', "rescale"),
        ('{"colour": 1}', "unknown key 'colour'"),
        ("[]", "wrong type"),
    ],
)
def test_bad_steering_in_a_file(tmp_path, steering, reason):
    with pytest.raises(SteerableError, match=reason):
        Direction.load(write(tmp_path / "a", version="2", steering=steering))


def test_version_1_is_read(tmp_path):
    one = Direction.load(write(tmp_path / "a", map="shift", gate="thinking", strength="-0.5", behaviour="old"))
    assert (one.map, one.gate, one.strength, one.behaviour, one.unit) == ("shift", "thinking", -0.5, "old", "raw")
    again = Direction.load(one.save(tmp_path / "b"))
    same(again, one)
    assert load_file(tmp_path / "b").keys() == load_file(tmp_path / "a").keys()
    with pytest.raises(SteerableError, match="unknown metadata key 'map'"):
        Direction.load(write(tmp_path / "c", version="2", map="shift"))


def test_arithmetic():
    """What the two add at their own strengths, hand-computed; other directions are not added."""
    a, b = make(behaviour="a"), make(behaviour="b", strength=-2.0).scaled(3)
    total, difference = a + b, a - b
    for site, v in a.vectors.items():
        torch.testing.assert_close(total[site], 0.3 * v - 6 * v)
        torch.testing.assert_close(difference[site], 0.3 * v + 6 * v)
        assert torch.equal((-a)[site], -v) and torch.equal((2 * a)[site], v * 2) and torch.equal((a * 0.5)[site], v / 2)
    assert (total.strength, total.behaviour, difference.behaviour) == (1.0, "a + b", "a - b")
    assert total.gate == a.gate and total.norms == a.norms and total.model_id == "pocket" and total.unit == "raw"
    assert torch.equal(a[2], a.at(A)) and (2 * a).strength == a.strength
    for wrong, message in [
        (make(model_id="other"), "two models"),
        (make(gate="all"), "gate"),
        (make().only([2]), "sites"),
        (make(map="ablate"), "map is ablate"),
    ]:
        with pytest.raises(UsageError, match=message):
            a + wrong
    with pytest.raises(UsageError, match="finite|NaN"):
        a * math.inf
    for wrong in (lambda: a + 1, lambda: a * "2", lambda: list(a)):
        with pytest.raises(TypeError):
            wrong()


def test_a_part_or_a_control_is_not_calibrated():
    direction = make(unit="calibrated")
    assert direction.only([2]).unit == direction.random_like(0).unit == (direction * 2).unit == "raw"
    assert direction.only([2, 10]).unit == "calibrated"


def test_repr_is_one_line():
    text = repr(make(behaviour="a\nb", norms={A: 10.0, B: 20.0}))
    assert "\n" not in text and len(text) < 200
    assert "resid_post.2 ... resid_post.10 (2 sites)" in text and "dose" in text
    assert "dose" not in repr(make(map="ablate", norms={A: 10.0, B: 20.0}))  # the vectors' lengths play no part in it
    assert repr(Direction({A: torch.ones(6)})) == (
        "Direction(no behaviour, no method, no model: resid_post.2, raw, strength 1)"
    )


def test_plot():
    """What is drawn are the doses, or the norms where no activation's is known, and the separation of more layers."""
    from matplotlib import pyplot

    direction = make(stats={"separation": {"resid_post.1": -0.5, "resid_post.2": 1.5, "resid_post.10": 1.0}})
    ax = direction.plot()
    assert ax.lines[0].get_xydata().tolist() == [[s.layer, dose] for s, dose in direction.dose(1).items()]
    (twin,) = (other for other in ax.figure.axes if other is not ax)
    assert twin.lines[0].get_xydata().tolist() == [[1, -0.5], [2, 1.5], [10, 1.0]] and twin.get_ylim() == (-0.6, 1.6)
    assert ax.get_xlabel() == "layer" and ax.get_title() == "backtracking" and ax.get_ylabel().startswith("relative")
    unknown = Direction({A: torch.full((4,), 2.0), Site("attn_out", 2): torch.ones(4)})
    assert unknown.plot(twin) is twin  # onto axes that are there
    assert [line.get_ydata().tolist() for line in twin.lines[-2:]] == [[2.0], [4.0]] and len(ax.figure.axes) == 2
    pyplot.close("all")
