"""The text form of a steering, its JSON, and what they refuse."""

import json
import os
import pickle
import random
import subprocess
import sys

import pytest
import torch

from steerable.steering.direction import Direction
from steerable.steering.gates import probe, quoted, selectors, when
from steerable.steering.maps import Affine, Clip, Rotate, Shift, Swap
from steerable.steering.schedule import PerLayer, PerRequest, Ramp, Uniform, UniformCosine, Until
from steerable.steering.site import Site
from steerable.steering.spec import Intervention, Program, format_steering, from_json, scaled, shift, to_json
from steerable.steering.text import parse_steering
from steerable.store.errors import UsageError

SITES = [Site("resid_post", layer) for layer in (1, 2, 5)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(*shape, seed):
    return {site: draw(*shape, seed=seed + site.layer) for site in SITES}


KNOWN = {
    "happy": Direction(vectors(6, seed=1), strength=0.5, behaviour="happy"),
    "verbose": Direction(vectors(6, seed=20), gate="thinking & ~boundary", schedule="until(9)", rescale=True),
    "plane": Direction(vectors(2, 6, seed=30), map="rotate(30)", stats={"bias": 0.25}),
    "runs/a b-1.safetensors": Direction(vectors(6, seed=40), map="floor(0)"),
}


@pytest.mark.parametrize(
    "text",
    [
        "0.5 happy@thinking - 0.2 verbose@answer & ~boundary",
        "0.5 happy",
        "-1 happy[1, 5]|ablate@generated | prompt",
        "2 plane[2]|clip(-1, 2)|layers(1, 0.5)@when(happy > 0.4) & thinking",
        "1e-05 plane|rotate_to(200) + 3 plane",
        "1 happy|swap([0.5])|ramp(0, 1, 50) - 0.25 happy|until(close)@probe(happy <= 0.9) | ~tokens(3, 7)",
        '1 "runs/a b-1.safetensors"@~when("runs/a b-1.safetensors" >= -0.5)',
        "1 plane|affine([[1, 2], [3, 4]], 0.5, -1)|until([5, 7])|rescale",
        "1 verbose|constant|rescale(off)@all",
    ],
)
def test_canonical_text(text):
    steering = parse_steering(text, KNOWN)
    assert str(steering) == format_steering(steering) == text
    assert parse_steering(str(steering), KNOWN) == steering


def test_what_is_left_out_is_the_directions_own():
    assert str(parse_steering("happy - verbose", KNOWN)) == "0.5 happy - 1 verbose"
    (first, *_) = parse_steering("verbose", KNOWN)
    assert (str(first.gate), first.rescale, first.schedule) == ("thinking & ~boundary", True, Until(9))
    assert parse_steering("happy", KNOWN) == KNOWN["happy"].steering()
    plain, in_quotes = (parse_steering(f"2 {name}", lambda _: KNOWN["happy"]) for name in ("a/b-1", '"a/b-1"'))
    assert str(plain) == str(in_quotes) == '2 "a/b-1"'
    assert [i.site for i in parse_steering("happy[5, 1]", KNOWN)] == [SITES[0], SITES[2]]


def random_gate(rng, depth=3):
    op = rng.choice("&|~") if depth else ""
    if op == "~":
        return ~random_gate(rng, depth - 1)
    if op:
        left, right = random_gate(rng, depth - 1), random_gate(rng, depth - 1)
        return left & right if op == "&" else left | right
    name = rng.choice(["happy", "verbose", "runs/a b-1.safetensors"])
    comparison, threshold = rng.choice([">", ">=", "<", "<="]), rng.choice([0.0, 0.5, rng.random()])
    leaves = [
        selectors.all,
        selectors.boundary,
        selectors.tokens(3, rng.randrange(9)),
        selectors.positions(2, 5),
        when(KNOWN[name], comparison, threshold, name=name),
        probe(KNOWN[name], comparison, 0.25, name=name),
    ]
    return rng.choice(leaves)


def random_number(rng):
    return rng.choice([0.0, 1.0, -2.0, 0.1 + 0.2, rng.gauss(0, 1), 1e-7, 123456.0])


def random_map(rng, k):
    def each():
        return rng.choice([random_number(rng), tuple(random_number(rng) for _ in range(k))])

    maps = [Shift(each()), Clip.ablate(), Clip.set_to(each()), Clip.floor(each()), Clip.ceiling(each())]
    maps += [Clip(-3.0, rng.random()), Affine(each(), each()), Affine(each(), 0.5, lo=-1.0)]
    maps += [Swap(tuple(random_number(rng) for _ in range(k)))]
    maps += [Swap(tuple(tuple(random_number(rng) for _ in range(k)) for _ in range(3)))]
    if k == 2:
        maps += [Rotate(random_number(rng)), Rotate(200, absolute=True), Affine(((1.0, 2.0), (0.5, -1.0)))]
    return rng.choice(maps)


def random_program(rng):
    program = Program()
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(list(KNOWN))
        direction = KNOWN[name]
        schedules = [
            None,
            "constant",
            Until((5, 7)),
            Until("close"),
            Until(3),
            Ramp(0, rng.random(), 5),
            PerRequest(0.5),
            Uniform(0.25, 1.5),
            UniformCosine(0.25, 1.5),
        ]
        schedules += [PerLayer((1.0, rng.random()))]
        program += direction.steering(
            rng.choice([None, random_number(rng)]),
            rng.choice([None, [2], [1, 5]]),
            rng.choice([None, random_gate(rng)]),
            rng.choice([None, True, False]),
            map=rng.choice([None, random_map(rng, direction.at(1).dim())]),
            schedule=rng.choice(schedules),
            name=name if name.isidentifier() else f'"{name}"',
        )
    return program


@pytest.mark.parametrize("seed", range(150))
def test_random_programs(seed):
    """Text, JSON and pickle give the same program back, and equal programs have equal hashes."""
    program = random_program(random.Random(seed))
    text = format_steering(program)
    again = parse_steering(text, KNOWN)
    assert again == program and str(again) == text, text
    for copy in (from_json(to_json(program)), pickle.loads(pickle.dumps(program))):
        assert copy == program and hash(copy) == hash(program) and format_steering(copy) == text


@pytest.mark.parametrize(
    ("text", "column", "why"),
    [
        ("", 1, "expected the name"),
        ("0.5 ", 5, "expected the name"),
        ("0.5 hapy", 5, "no direction is known as 'hapy': there are happy"),
        ("0.5 happy@thinkin", 11, "unknown name 'thinkin'"),
        ("0.5 happy@thinking & (answer | thoughts)", 32, "unknown name 'thoughts'"),
        ("0.5 happy@", 11, "expected a gate"),
        ("0.5 happy|", 11, "expected a map"),
        ("0.5 happy 0.3 happy", 11, "expected \\+ or -"),
        ("0.5 happy|rotat(3)", 11, "unknown map 'rotat'"),
        ("0.5 happy + 1 happy|rotate(3)", 15, "rotate needs a plane"),
        ("happy|clip(3, 1)", 7, "lo <= hi"),
        ("happy|floor(x)", 7, "expected a number"),
        ("happy|floor(1, 2)", 7, "floor takes \\(value\\), not 2 values"),
        ("happy|rotate_to", 7, "rotate_to takes \\(degrees\\), not 0 values"),
        ("happy|set(inf)", 7, "infinite"),
        ("plane|affine([[1, 2], [3]])", 7, "lists of unequal lengths"),
        ("plane|clip([[1, 2]])", 7, "a number or a list"),
        ("plane|rotate(30, yes)", 7, "True or False"),
        ("happy|until(0)", 7, "a number of tokens"),
        (f"happy|ramp({10**400}, 1, 2)", 7, "too large"),
        ("happy|ablate|floor(1)", 14, "the map is given twice"),
        ("happy[3]", 1, "no vector at layer 3"),
        ("happy@when(nobody > 0.1)", 7, "no direction is known as 'nobody'"),
        ("happy@when(happy + 0.1)", 7, "compares a direction with a number"),
        ("happy@when(plane > 0.1)", 7, "one vector \\[d\\], and has 2"),
        ("happy@thinking &", 17, "invalid syntax"),
        ('happy@when("é" > 1) & ~nothing', 7, "no direction is known as 'é'"),
        ("happy@~é & é", 8, "unknown name 'é'"),
        ("happy@all & ~all & é & nothing", 20, "unknown name 'é'"),
        ("happy@positions(1)", 7, "positions takes \\(start, stop\\), not 1 value"),
        (f"happy@tokens({2**63})", 7, "token ids"),
        (f"happy|until({2**63})", 7, "a number of tokens"),
        ("happy@probe(happy > 1.5)", 7, "between 0 and 1"),
        ("1 happy - ", 11, "expected the name"),
        ("nan happy", 1, "no direction is known as 'nan'"),
        ("1 happy@" + "(" * 500 + "all" + ")" * 500, 9, "nested|parenthes"),
        ("1 happy|framed(ablate, 3)", 9, "unknown map"),
    ],
)
def test_errors_point_at_the_place(text, column, why):
    with pytest.raises(UsageError, match=why) as error:
        parse_steering(text, KNOWN)
    found = int(str(error.value).split(" at column ")[1].split(":")[0])
    assert "\n" not in str(error.value) and (found == column or len(text) > 500), str(error.value)


@pytest.mark.parametrize("name", ["None", "in", "a\nb", 'say "no"', "back\\slash", "1x", "a-b.c", "@home", "中", "0.5"])
def test_any_name(name):
    """A name reads back from the text of a term and from that of a gate, whatever it is; blanks may be new lines."""
    known = {name: KNOWN["happy"]}
    program = KNOWN["happy"].steering(2, where=when(KNOWN["happy"], ">", 0.5, name), name=quoted(name))
    assert parse_steering(str(program), known) == program and str(parse_steering(str(program), known)) == str(program)
    broken = str(program).replace(" ", "\n") if " " not in name else str(program)
    assert parse_steering(broken, known) == program


def test_names_are_files(tmp_path):
    KNOWN["happy"].save(tmp_path / "glad.safetensors")
    for name in (tmp_path / "glad.safetensors", tmp_path / "glad"):
        assert parse_steering(f'2 "{name}"') == KNOWN["happy"].steering(2)
    assert parse_steering("2 x", {"x": tmp_path / "glad.safetensors"}) == KNOWN["happy"].steering(2)
    assert parse_steering("2 x", lambda name: KNOWN["happy"]) == KNOWN["happy"].steering(2)
    for name in ("sad", ".", "x" * 5000, '"a\\u0000b"'):
        with pytest.raises(UsageError, match="column 3: there is no direction file"):
            parse_steering(f"2 {name}")


def test_equality_is_by_value():
    one, same, other = (shift(SITES[0], draw(6, seed=seed)) for seed in (0, 0, 1))
    assert one == same and hash(one) == hash(same) and one != other and len({one, same, other}) == 2
    for change in ({"strength": 2.0}, {"rescale": True}, {"where": "prompt"}):
        assert shift(SITES[0], draw(6), **change) != one
    assert scaled((one,), 2) == (shift(SITES[0], draw(6), 2.0),) and scaled((one,), 2) != (one,)


def test_another_process(tmp_path):
    """A description is whole: another process has the same interventions from its JSON."""
    program = random_program(random.Random(7))
    code = (
        "import sys, pickle; from steerable.steering.spec import from_json, to_json;"
        "text = sys.stdin.read(); one = from_json(text); assert to_json(one) == text; print(one)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=to_json(program), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(program)


def test_a_basis_of_coordinates_is_written_by_them():
    """A transport of all coordinates of a wide model stays a small file; what comes from others has a limit."""
    basis = torch.eye(600, dtype=torch.float64)[:, torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    steering = (Intervention(SITES[0], basis, Affine([0.5] * 600, [1.0] * 600)),)
    text = to_json(steering)
    assert len(text) < 20_000 and from_json(text) == Program(steering)
    assert torch.equal(from_json(text)[0].basis, basis)
    with pytest.raises(UsageError, match="have 360000 numbers: expected 1000 at most"):
        from_json(text, most=1000)


def reading(vector):
    return {"text": "when(a > 1)", "readings": [[["resid_post.0", vector, 0]]]}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda i: i.pop("map"), "no steering"),
        (lambda i: i["map"].update(type="warp"), "unknown map 'warp'"),
        (lambda i: i["map"].update(colour=1), "no parameter 'colour'"),
        (lambda i: i["basis"].update(shape=[3, 1]), "no steering"),
        (lambda i: i["basis"].update(float64="?"), "no steering"),
        (lambda i: i["basis"].update(shape=[10**30, 1]), "no steering"),
        (lambda i: i.update(basis={"shape": [6, 1], "coordinates": [6]}), "1 numbers from 0 to 5"),
        (lambda i: i.update(basis={"shape": [6, 2], "coordinates": [1]}), "2 numbers from 0 to 5"),
        (lambda i: i.update(basis={"shape": [6, 1], "coordinates": [True]}), "1 numbers from 0 to 5"),
        (lambda i: i["schedule"].update(type="per_request", default=10**400), "no steering"),
        (lambda i: i.update(site="nowhere.1"), "unknown site"),
        (lambda i: i.update(strength="many"), "one number"),
        (lambda i: i.update(strength=1e999), "no steering|finite"),
        (lambda i: i.update(gate="sometimes"), "not a selector"),
        (lambda i: i.update(gate={"text": "when(a > 1)", "readings": []}), "do not fit"),
        (lambda i: i.update(gate={"text": "all", "readings": [], "more": 1}), "unknown key 'more'"),
        (lambda i: i.update(gate=reading("AAAAAA==")), "other than zero"),
        (lambda i: i.update(gate=reading("AADAfw==")), "one finite vector"),
        (lambda i: i.update(site="resid_post.01"), "not a site"),
        (lambda i: i.update(colour=1), "unknown key 'colour'"),
        (lambda i: i.update(rescale="no"), "true or false"),
        (lambda i: i["source"].update(colour=1), "no steering"),
        (lambda i: i["schedule"].update(type="never"), "unknown schedule"),
        (lambda d: d.update(map={"type": "framed", "map": d["map"], "frame": [[1, 0], [0, 1]]}), r"matrix \[1, 1\]"),
        (lambda d: d.update(map={"type": "framed", "map": 3, "frame": [[1]]}), "a map is a dataclass"),
        (lambda d: d.update(map={"type": "clip", "lo": [0, 1], "hi": [2, 3]}), "has 2 numbers, but there are 1 rows"),
    ],
)
def test_bad_json(change, why):
    data = json.loads(to_json((shift(SITES[0], draw(6)),)))
    change(data[0])
    with pytest.raises(UsageError, match=why) as error:
        from_json(json.dumps(data))
    assert "\n" not in str(error.value)


def test_bad_interventions():
    for basis in (torch.ones(6), torch.zeros(0, 1), torch.full((6, 1), torch.nan)):
        with pytest.raises(UsageError):
            Intervention(SITES[0], basis, Clip.ablate())
    for basis in (2 * torch.eye(6)[:, :1], torch.tensor([[1.0, 0.6], [0.0, 0.8]])):
        assert Intervention(SITES[0], basis, Shift(2.0)).vector is not None
        with pytest.raises(UsageError, match="the columns of the basis at .* are not orthonormal"):
            Intervention(SITES[0], basis, Clip.ablate())
    with pytest.raises(UsageError, match="one number"):
        Intervention(SITES[0], torch.eye(6)[:, :1], Clip.ablate(), strength=torch.ones(3))
    with pytest.raises(UsageError, match="finite"):
        shift(SITES[0], torch.ones(6), float("inf"))


def test_entry_points_of_another_package(tmp_path):
    """An installed package's map and gate are found by their names, in text and in a direction file."""
    about = tmp_path / "other-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[steerable.maps]\nhalve = other:Halve\n[steerable.gates]\nodd = other:odd\n"
    )
    (tmp_path / "other.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Halve:\n    by: float = 2.0\n\n"
        "    def __call__(self, x):\n        return x / self.by\n\n\n"
        "def odd(tokens):\n    return tokens.position % 2 == 1\n"
    )
    code = (
        "import sys, torch, steerable as st; site = st.Site('resid_post', 1);"
        "d = st.Direction({site: torch.tensor([0.0, 3.0])}, map='halve(4)', gate='odd', behaviour='d');"
        "d = st.Direction.load(d.save(sys.argv[1]));"
        "(one,) = p = st.parse_steering('1 d|halve(8)@odd', {'d': d});"
        "print(p, d.map, d.gate, one.apply(torch.tensor([[[8.0, 6.0]]])).tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", code, str(tmp_path / "d.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "1 d|halve(8) halve(4) odd [[[8.0, 0.75]]]", done.stderr
