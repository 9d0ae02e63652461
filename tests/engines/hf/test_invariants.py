"""What every map does at every gate, rescaled or not: the formula, and the same alone, cached, padded and batched."""

import copy
import math
import random
import warnings
from dataclasses import dataclass, replace

import pytest
import torch

from steerable.engines.hf.hooks import Handle, steer
from steerable.models.taps import tap
from steerable.steering.direction import Direction
from steerable.steering.gates import GATES, parse_selector, probe, register_gate, selectors, when
from steerable.steering.maps import MAPS, Affine, Clip, NormShift, Rotate, Shift, Swap, fitted, register_map
from steerable.steering.schedule import Constant, PerLayer, PerRequest, Ramp, Until
from steerable.steering.site import Site
from steerable.steering.spec import Intervention, from_json, to_json
from steerable.steering.text import parse_steering
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

D = 32
SITE, BEFORE = Site("resid_post", 1), Site("mlp_out", 0)
PARITY = {"atol": 1e-5, "rtol": 1e-5}  # another order of additions
ROWS = [
    torch.tensor(row) for row in ([5, 1, 7, 3, 9, 2, 8, 4], [6, 7, 1, 11, 3, 2, 10, 12, 9, 7, 5], [9, 1, 4, 7, 7, 2])
]
PROMPTS = [3, 4, 2]
ALWAYS = Constant()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@register_map("crush")
@dataclass(frozen=True)
class Crush:
    """As another package would add it."""

    limit: float = 1.0

    def __call__(self, x):
        return self.limit * torch.tanh(x / self.limit)


@register_gate("nth")
def nth(tokens, n):
    return tokens.position % n == 0


PHI = {
    "shift": Shift(2.0),
    "norm shift": NormShift((0.3, -0.2)),
    "ablate": Clip.ablate(),
    "set": Clip.set_to((1.5, -0.5)),
    "floor": Clip.floor(0.1),
    "ceiling": Clip.ceiling((0.2, -0.3)),
    "rotate": Rotate(30),
    "rotate_to": Rotate(200, absolute=True),
    "affine": Affine((0.5, 2.0), 0.3, lo=-1.0, hi=0.5),
    "matrix": Affine(((0.5, 1.0), (-1.0, 0.25)), (0.1, 0.2)),
    "swap": Swap((0.7, -0.2)),
    "swap by position": Swap(((1.0, 2.0), (0.5, -0.5), (-1.0, 0.3), (0.2, 0.2))),
    "crush": Crush(0.4),
}
GATE = {
    "all": selectors.all,
    "tokens": selectors.thinking | selectors.positions(0, 2),
    "when": when({BEFORE: draw(D, seed=5)}, ">", 0.0) & ~selectors.tokens(7),
    "latched": selectors.latched(when({BEFORE: draw(D, seed=10)}, ">", 0.0) & ~selectors.tokens(7)),
    "probe here": probe({SITE: draw(D, seed=6)}, "<=", 0.4, bias=0.1),
}
GATE["nth"] = parse_selector("nth(2)")


def program(phi="shift", gate="all", rescale=False, strength=0.8, seed=1, schedule=ALWAYS):
    rows = draw(2, D, seed=seed)  # neither orthogonal nor of length 1
    basis, map = fitted(rows, PHI[phi])
    return (Intervention(SITE, basis, map, GATE[gate], schedule, strength, rescale),)


CASES = [
    pytest.param(phi, gate, rescale, id=f"{phi}-{gate}{'-rescaled' * rescale}")
    for phi in PHI
    for gate in GATE
    for rescale in (False, True)
    # every map at every kind of gate, and those of one kind once
    if gate in ("all", "tokens", "when") or phi in ("shift", "rotate")
]


def logits(model, row, **options):
    return model(row if row.dim() == 2 else row[None], **options).logits


def quietly(model, steering, tokenizer, **options):
    warnings.simplefilter("ignore", SteerableWarning)  # a gate may stay shut in a short row
    return steer(model, steering, tokenizer=tokenizer, **options)


def alone(model, steering, tokenizer, row, prompt, **options):
    with warnings.catch_warnings(), quietly(model, steering, tokenizer, **options) as handle:
        handle.prompt_lengths([prompt])
        return logits(model, row)[0]


def chosen_by_hand(gate, row, h, read):
    """Which tokens a gate of `GATE` means, from its definition. read: activations by site."""
    if gate == "all":
        return [True] * len(row)
    if gate == "nth":
        return [t % 2 == 0 for t in range(len(row))]
    if gate == "tokens":
        opened = row.tolist().index(1)
        closed = row.tolist().index(2)
        return [t < 2 or opened < t < closed for t in range(len(row))]
    if gate == "when":
        v = draw(D, seed=5).double()
        return [float(read[BEFORE][t] @ v) > 0 and int(row[t]) != 7 for t in range(len(row))]
    if gate == "latched":
        last = next(n for other, n in zip(ROWS, PROMPTS, strict=True) if torch.equal(row, other)) - 1
        opened = float(read[BEFORE][last] @ draw(D, seed=10).double()) > 0 and int(row[last]) != 7
        return [opened and t >= last for t in range(len(row))]
    v = draw(D, seed=6).double()
    return [1 / (1 + math.exp(-float(h[t] @ v) - 0.1)) <= 0.4 for t in range(len(row))]


def rows_by_hand(phi, c, t):
    """The map of coordinates c of the given rows, from its definition."""
    c = c.clone()
    match phi:
        case "shift":
            return c + 2.0
        case "ablate":
            return c * 0
        case "set":
            return torch.tensor([1.5, -0.5], dtype=c.dtype)
        case "floor":
            return c.clamp(min=0.1)
        case "ceiling":
            return torch.minimum(c, torch.tensor([0.2, -0.3], dtype=c.dtype))
        case "affine":
            new = c * torch.tensor([0.5, 2.0], dtype=c.dtype) + 0.3
            return torch.where((c >= -1) & (c <= 0.5), new, c)
        case "matrix":
            return torch.tensor([[0.5, 1.0], [-1.0, 0.25]], dtype=c.dtype) @ c + torch.tensor([0.1, 0.2], dtype=c.dtype)
        case "swap":
            return torch.tensor([0.7, -0.2], dtype=c.dtype)
        case "swap by position":
            source = [(1.0, 2.0), (0.5, -0.5), (-1.0, 0.3), (0.2, 0.2)]
            return torch.tensor(source[t], dtype=c.dtype) if t < 4 else c
        case "crush":
            return 0.4 * torch.tanh(c / 0.4)
    raise KeyError(phi)


def formula(phi, gate, rescale, row, h, read, strength=0.8, seed=1):
    """h' of one row [T, d] by the definition, token by token, from the rows that were given."""
    w = draw(2, D, seed=seed).double()
    new = h.clone()
    for t, here in enumerate(chosen_by_hand(gate, row, h, read)):
        if not here:
            continue
        c = torch.linalg.lstsq(w.T, h[t][:, None]).solution[:, 0]
        if phi.startswith("rotate"):
            first = w[0] / w[0].norm()
            second = w[1] - (w[1] @ first) * first
            second = second / second.norm()
            a, b = float(h[t] @ first), float(h[t] @ second)
            angle = math.radians(200) if phi == "rotate_to" else math.atan2(b, a) + math.radians(30)
            length = math.hypot(a, b)
            change = length * (math.cos(angle) * first + math.sin(angle) * second) - a * first - b * second
        elif phi == "norm shift":
            change = h[t].norm() * (0.3 * w[0] / w[0].norm() - 0.2 * w[1] / w[1].norm())
        else:
            change = (rows_by_hand(phi, c, t) - c) @ w
        new[t] = h[t] + strength * change
        if rescale:
            new[t] *= h[t].norm() / new[t].norm()
    return new


@pytest.fixture(scope="module")
def wide(tiny_llama):
    return copy.deepcopy(tiny_llama).double()


@pytest.mark.parametrize(("phi", "gate", "rescale"), CASES)
def test_the_formula(wide, tokenizer, phi, gate, rescale):
    """In float64, against the definition."""
    row, read, seen = ROWS[1], {}, {}
    taps = {BEFORE: lambda h: read.__setitem__(BEFORE, h[0]), SITE: lambda h: seen.__setitem__("h", h[0])}
    with tap(wide, taps):
        logits(wide, row)
    expected = formula(phi, gate, rescale, row, seen["h"], read)
    after = {SITE: lambda h: seen.__setitem__("new", h[0])}
    with warnings.catch_warnings(), quietly(wide, program(phi, gate, rescale), tokenizer) as handle, tap(wide, after):
        handle.prompt_lengths([PROMPTS[1]])
        logits(wide, row)
    torch.testing.assert_close(seen["new"], expected, atol=1e-9, rtol=1e-9)
    touched = handle.report()[str(SITE)]["tokens"]
    assert touched == sum(chosen_by_hand(gate, row, seen["h"], read))
    (one,) = program(phi, gate, rescale)
    mask = torch.tensor(chosen_by_hand(gate, row, seen["h"], read))[None]
    torch.testing.assert_close(one.apply(seen["h"][None], mask)[0], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("phi", "gate", "rescale"), CASES)
def test_nothing_is_changed_at_strength_zero_and_after(tiny_llama, tokenizer, phi, gate, rescale):
    plain = logits(tiny_llama, ROWS[0])
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_llama.modules())
    with steer(tiny_llama, program(phi, gate, rescale, strength=0.0), tokenizer=tokenizer) as handle:
        assert torch.equal(logits(tiny_llama, ROWS[0]), plain)
    assert all(site["tokens"] == 0 for site in handle.report().values())
    with pytest.raises(ZeroDivisionError), steer(tiny_llama, program(phi, gate, rescale), tokenizer=tokenizer):
        assert not torch.equal(logits(tiny_llama, ROWS[0]), plain)
        _ = 1 / 0
    assert torch.equal(logits(tiny_llama, ROWS[0]), plain)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_llama.modules())


@pytest.mark.parametrize(("phi", "gate", "rescale"), CASES)
def test_parity(tiny_llama, tokenizer, phi, gate, rescale):
    """Whole, with a cache, token by token, and padded on both sides."""
    steering = program(phi, gate, rescale)
    whole = [alone(tiny_llama, steering, tokenizer, row, n) for row, n in zip(ROWS, PROMPTS, strict=True)]
    row = ROWS[1]
    for chunks in ([4] + [1] * 7, [2, 2, 3, 4]):
        with warnings.catch_warnings(), quietly(tiny_llama, steering, tokenizer) as handle:
            handle.prompt_lengths([PROMPTS[1]])
            parts, cache, start = [], None, 0
            for length in chunks:
                out = tiny_llama(row[None, start : start + length], past_key_values=cache, use_cache=True)
                cache, start = out.past_key_values, start + length
                parts.append(out.logits[0])
        torch.testing.assert_close(torch.cat(parts), whole[1], **PARITY)
    for left in (True, False):
        with warnings.catch_warnings(), quietly(tiny_llama, steering, tokenizer) as handle:
            padded, places = batch(tiny_llama, handle, left)
        for got, part, expected in zip(padded, places, whole, strict=True):
            torch.testing.assert_close(got[part], expected, **PARITY)


def batch(model, handle, left):
    width = 13
    ids = torch.zeros(len(ROWS), width, dtype=torch.long)
    places = []
    for i, row in enumerate(ROWS):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, part] = row
        places.append(part)
    mask = (ids > 0).long()
    handle.prompt_lengths(PROMPTS)
    return model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits, places


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("gate", ["all", "tokens", "when"])
def test_sixteen_bits(tiny_llama, tokenizer, phi, gate):
    """The arithmetic is in float32, with one rounding at the end, and what is not touched keeps its bits."""
    model = copy.deepcopy(tiny_llama).bfloat16()
    plain, steered = {}, {}
    with tap(model, {SITE: lambda h: plain.__setitem__("h", h)}):
        logits(model, ROWS[1])
    (one,) = program(phi, gate, strength=0.7)
    with (
        warnings.catch_warnings(),
        quietly(model, (one,), tokenizer),
        tap(model, {SITE: lambda h: steered.__setitem__("h", h)}),
    ):
        logits(model, ROWS[1])
    h, new = plain["h"], steered["h"]
    assert new.dtype == torch.bfloat16
    changed = (new != h).any(-1)
    expected = one.apply(h.float()).bfloat16()
    assert bool(changed.any())
    torch.testing.assert_close(new[changed].float(), expected[changed].float(), atol=1e-6, rtol=1 / 128)


def mixed(seed):
    """Programs of every kind, of which some act at several sites and some twice at one."""
    rng = random.Random(seed)
    programs = [()]
    for number, phi in enumerate(PHI):
        steering = program(phi, rng.choice(list(GATE)), rng.random() < 0.5, rng.uniform(-1, 1), seed=number)
        if rng.random() < 0.5:
            steering += program(rng.choice(list(PHI)), "all", rng.random() < 0.5, 0.3, seed=number + 50)
        if rng.random() < 0.5:
            steering += (Intervention(Site("attn_out", 2), *fitted(draw(1, D, seed=number), Shift()), "generated"),)
        schedule = rng.choice([Constant(), Ramp(0, 1, 3), Until(2), Until((9, 7)), Until("close"), PerLayer((1, 0.5))])
        programs.append(tuple(replace(i, schedule=schedule) for i in steering))
    return programs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cached", [False, True])
def test_each_row_has_its_own_program(tiny_llama, tokenizer, seed, cached):
    """A batch of many programs equals each row by itself, and a row without one the unsteered model, bit for bit."""
    programs = mixed(seed)
    rng = random.Random(seed)
    index = torch.tensor([rng.randrange(-1, len(programs)) for _ in range(40)])
    ids = torch.stack([ROWS[1]] * len(index))
    ids[:, 6:] = torch.stack(
        [torch.randint(4, 12, (5,), generator=torch.Generator().manual_seed(n)) for n in range(40)]
    )
    ids[::3, 8] = 2
    plain = tiny_llama(ids).logits
    handle = Handle(tiny_llama, programs, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteerableWarning)
        with handle:
            handle.assign(index)
            handle.prompt_lengths([4] * len(index))
            if cached:
                parts, cache, start = [], None, 0
                for length in [4] + [1] * 7:
                    out = tiny_llama(ids[:, start : start + length], past_key_values=cache, use_cache=True)
                    cache, start = out.past_key_values, start + length
                    parts.append(out.logits)
                together = torch.cat(parts, 1)
            else:
                together = tiny_llama(ids).logits
        for row, number in enumerate(index.tolist()):
            if number < 0 or not programs[number]:
                if not cached:
                    assert torch.equal(together[row], plain[row])
                continue
            expected = alone(tiny_llama, programs[number], tokenizer, ids[row], 4)
            difference = together[row].log_softmax(-1) - expected.log_softmax(-1)
            assert float(difference.abs().max()) < 1e-5, (number, programs[number])


def test_shifts_of_many_rows(tiny_llama):
    """256 rows, 256 vectors and strengths: the table's line is added, and rows without one keep their bits."""
    programs = [(Intervention(SITE, *fitted(draw(1, D, seed=n), Shift()), strength=n / 100),) for n in range(256)]
    index = torch.arange(256)
    index[::7] = -1
    h = draw(256, 3, D, seed=9)
    seen = {}
    handle = Handle(tiny_llama, programs)
    ids = torch.randint(4, 60, (256, 3), generator=torch.Generator().manual_seed(3))
    with tap(tiny_llama, {SITE: lambda h: seen.__setitem__("h", h)}):
        tiny_llama(ids)
    h = seen["h"]
    with handle, tap(tiny_llama, {SITE: lambda h: seen.__setitem__("new", h)}):
        handle.assign(index)
        tiny_llama(ids)
    for row, number in enumerate(index.tolist()):
        added = 0 if number < 0 else number / 100 * draw(1, D, seed=number)
        assert torch.equal(seen["new"][row], h[row] + added), row
    assert handle.report()[str(SITE)]["tokens"] == 3 * int(((index >= 0) & (index > 0)).sum())


def test_assign_is_checked(tiny_llama):
    handle = Handle(tiny_llama, [program(), program("rotate")])
    with handle:
        for wrong in (torch.tensor([2]), torch.tensor([-2]), torch.tensor([[0]])):
            with pytest.raises(UsageError, match="one of 2 programs"):
                handle.assign(wrong)
        handle.assign(torch.tensor([0, 1]))
        with pytest.raises(SteerableError, match="assigned to 2 rows, but the batch has 1"):
            logits(tiny_llama, ROWS[0])
        handle.assign(torch.tensor([-1]))
        assert torch.equal(logits(tiny_llama, ROWS[0]), logits(tiny_llama, ROWS[0]))


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Constant(), [1] * 11),
        (PerLayer((0.25, 0.5)), [0.5] * 11),
        (Ramp(0.5, 1.5, 4), [0.5] * 5 + [0.75, 1.0, 1.25, 1.5, 1.5, 1.5]),
        (Until(2), [1] * 6 + [0] * 5),
        (Until((3, 2)), [1] * 6 + [0] * 5),
        (Until((7, 8)), [1] * 11),
        (Until("close"), [1] * 6 + [0] * 5),
        (PerRequest(0.5), [0.5] * 11),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_schedules(wide, tokenizer, schedule, factors, cached):
    """The prompt is four tokens long; 3, 2 and the closing tag (2) end at the sixth token."""
    row, seen = ROWS[1], {}
    assert row[4:6].tolist() == [3, 2] and PROMPTS[1] == 4
    with tap(wide, {SITE: lambda h: seen.__setitem__("h", h[0])}):
        logits(wide, row)
    steering, new = program(schedule=schedule, strength=2.0), []
    with steer(wide, steering, tokenizer=tokenizer) as handle, tap(wide, {SITE: lambda h: new.append(h[0])}):
        handle.prompt_lengths([4])
        if cached:
            cache = None
            for start, stop in [(0, 4), *((t, t + 1) for t in range(4, 11))]:
                cache = wide(row[None, start:stop], past_key_values=cache, use_cache=True).past_key_values
        else:
            logits(wide, row)
    vector = 2 * draw(2, D, seed=1).double().sum(0)
    expected = seen["h"] + 2 * torch.tensor(factors, dtype=torch.float64)[:, None] * vector
    torch.testing.assert_close(torch.cat(new), expected, atol=1e-9, rtol=1e-9)
    assert handle.report()[str(SITE)]["tokens"] == sum(f != 0 for f in factors)
    assert from_json(to_json(steering)) == steering


def test_a_factor_for_each_request(wide):
    steering, new, plain = program(schedule=PerRequest()), [], []
    ids = torch.stack([ROWS[0]] * 3)
    with tap(wide, {SITE: plain.append}):
        wide(ids)
    handle = Handle(wide, [steering])
    with handle, tap(wide, {SITE: new.append}):
        handle.assign(torch.zeros(3, dtype=torch.long), factor=torch.tensor([0.0, 1.0, -2.0]))
        wide(ids)
    vector = 0.8 * 2 * draw(2, D, seed=1).double().sum(0)
    expected = plain[0] + torch.tensor([0.0, 1.0, -2.0])[:, None, None] * vector
    torch.testing.assert_close(new[0], expected, atol=1e-9, rtol=1e-9)
    assert torch.equal(new[0][0], plain[0][0])


@pytest.mark.parametrize("map", [Clip(), Rotate(0), Rotate(360), Affine(), Shift(0.0)])
@pytest.mark.parametrize("rescale", [False, True])
def test_maps_that_change_nothing(tiny_llama, map, rescale):
    basis = torch.linalg.qr(draw(D, 2))[0]
    with steer(tiny_llama, Intervention(SITE, basis, map, rescale=rescale)) as handle:
        steered = logits(tiny_llama, ROWS[0])
    assert torch.equal(steered, logits(tiny_llama, ROWS[0])) and handle.report()[str(SITE)]["tokens"] == 0


def test_what_a_gate_reads(wide):
    """The activation as it arrives: neither what is done at the site, nor its own intervention, opens or shuts it."""
    v = draw(D, seed=5)
    first = Intervention(SITE, *fitted(v[None], Clip.set_to(100.0)))
    gated = Intervention(SITE, *fitted(draw(1, D, seed=3), Shift()), when({SITE: v}, ">", 50))
    with pytest.warns(SteerableWarning, match="touched none"), steer(wide, gated):
        logits(wide, ROWS[0])
    with steer(wide, [first, gated]) as handle:
        first_only = logits(wide, ROWS[0])
    with steer(wide, first):
        assert torch.equal(logits(wide, ROWS[0]), first_only)
    # what was done at an earlier site is seen
    earlier = Intervention(Site("resid_post", 0), *fitted(v[None], Clip.set_to(1e4)))
    with steer(wide, [earlier, gated]) as handle:
        logits(wide, ROWS[0])
    assert handle.report()[str(SITE)]["tokens"] == len(ROWS[0])
    with pytest.raises(UsageError, match="comes after resid_post.1"):
        Intervention(SITE, gated.basis, Shift(), when({Site("resid_post", 2): v}, ">", 0))


def test_the_report_says_what_was_given(tiny_llama, tokenizer):
    direction = Direction({SITE: draw(D)}, behaviour="happy")
    seen = []
    with tap(tiny_llama, {SITE: seen.append}):
        logits(tiny_llama, ROWS[0])
    norms = seen[0][0].double().norm(dim=-1)
    for rescale in (False, True):
        with steer(tiny_llama, direction, strength=0.5, rescale=rescale) as handle:
            logits(tiny_llama, ROWS[0])
        report = handle.report()
        assert report.steering == f"0.5 happy{'|rescale' * rescale}"
        given = float((0.5 * draw(D).double().norm() / norms).mean())
        assert report[str(SITE)]["dose"] == pytest.approx(given, rel=1e-3)
        assert (report[str(SITE)]["relative_change"] == pytest.approx(given, rel=1e-3)) != rescale


def test_text_steers(tiny_llama, tmp_path):
    """Names are files; what `steer` is given besides holds for them as well, and another model's are warned of."""
    path = Direction({SITE: draw(D), Site("resid_post", 2): draw(D)}, model_id="someone/else").save(tmp_path / "v")
    text = f'0.5 "{path}"[1]@positions(0, 3) - 1 "{path}"|ablate'
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteerableWarning)
        with steer(tiny_llama, text) as handle:
            one = logits(tiny_llama, ROWS[0])
        assert handle.report().steering == text
        with steer(tiny_llama, [parse_steering(text)[0], parse_steering(text)[1:]], layers=[1, 2]):
            assert torch.equal(logits(tiny_llama, ROWS[0]), one)
        with steer(tiny_llama, text, where="all", layers=2) as handle:
            logits(tiny_llama, ROWS[0])
        assert handle.report()["resid_post.2"]["tokens"] == len(ROWS[0]) and len(handle.report()) == 1
    tiny_llama.config._name_or_path = "this/one"
    try:
        with pytest.warns(SteerableWarning, match="made on 'someone/else'") as caught, steer(tiny_llama, text):
            logits(tiny_llama, ROWS[0])
    finally:
        tiny_llama.config._name_or_path = ""
    assert caught[0].filename == __file__ and len(caught) == 1


def test_additions_from_outside(tiny_llama, tmp_path):
    """A map and a gate that the package does not know, in a file, in text and in a batch."""
    path = Direction({SITE: draw(2, D)}, map="crush(0.25)", gate="nth(3)", behaviour="new").save(
        tmp_path / "new.safetensors"
    )
    direction = Direction.load(path)
    assert (direction.map, direction.gate) == ("crush(0.25)", "nth(3)") and direction.to_bytes() == path.read_bytes()
    with steer(tiny_llama, f'0.5 "{path}"') as handle:
        one = logits(tiny_llama, ROWS[0])
    assert handle.report()[str(SITE)]["tokens"] == 3
    with steer(tiny_llama, direction, strength=0.5):
        assert torch.equal(logits(tiny_llama, ROWS[0]), one)
    assert MAPS["crush"] is Crush and GATES["nth"] is nth
