"""The arithmetic in the graph and the lowering to it, against the formula itself (`Intervention.apply`)."""

import pytest
import torch

import steerable as st
from steerable.engines.vllm.banks import KINDS, Bank, Tokens
from steerable.engines.vllm.lowering import from_wire, identity, lower, slot_of, to_wire
from steerable.engines.vllm.settings import Settings, settings_of, switched_on
from steerable.engines.vllm.slots import Slots
from steerable.steering.tokens import SequenceState

D, LAYER = 16, 2
SETTINGS = Settings(lanes=2, maps=2, gates=2)
MAPS = (
    "shift", "shift(0.5)", "ablate", "set(2)", "floor(0.5)", "ceiling(-0.5)", "clip(-0.3, 0.4)", "rotate(30)",
    "rotate_to(200)", "affine(1.5, 0.2)", "affine(0.5, 1, -1, 1)", "affine([[1, 2], [3, 4]], [1, 0])",
)  # fmt: skip


def direction(*rows, layer=LAYER, seed=0):
    vectors = torch.randn(*rows, D, generator=torch.Generator().manual_seed(seed))
    return st.Direction({st.Site("resid_post", layer): vectors})


def fed(n):
    """A text of n tokens."""
    state = SequenceState()
    state.start(1)
    return state.advance(torch.zeros(1, n, dtype=torch.long))


def steered(steering, hidden, residual=None, settings=SETTINGS, layers=(LAYER,)):
    """What layers that do nothing give, [n, d], one behind the other."""
    tokens = Tokens(settings, hidden.shape[-2], torch.device("cpu"))
    slots, banks = dict.fromkeys(KINDS, 9), {}
    for layer in layers:
        banks[layer] = Bank(settings, slots, D, tokens, banks.get(layer - 1))
    slots = {kind: Slots(banks, kind, 9) for kind in KINDS}
    slot, strength = torch.zeros_like(tokens.slot), torch.zeros_like(tokens.strength)
    text = fed(hidden.shape[-2])
    for lane in lower(steering, settings):
        held = slots["maps" if lane.number >= settings.lanes else "vectors"].hold({lane.digest: lane.content})
        slot[lane.number] = held[lane.digest]
        rows = strength.view(-1, settings.answers, strength.shape[1])[lane.number]
        rows.copy_(lane.strength * torch.cat([gate(text) for gate in lane.gates]))
        held = slots["gates"].hold({row.digest: row.content for row in lane.rows})
        for row in lane.rows:
            slot[settings.lanes + settings.maps + row.number] = held[row.digest]
    tokens.put(slot, strength)
    for bank in banks.values():
        hidden = bank(hidden, residual)
    return hidden


def opened(streams):
    """Where a gate on activations is open, of the activations by layer."""

    def is_open(leaf):
        reading, comparison, threshold = leaf.args
        v, score = torch.frombuffer(bytearray(reading.vectors[0][1]), dtype=torch.float32), streams[reading.site.layer]
        score = (score @ v + reading.vectors[0][2]).sigmoid() if reading.is_probe else score @ v / (v @ v)
        return {">": score > threshold, "<": score < threshold, ">=": score >= threshold}[comparison][None]

    return is_open


def expected(steering, stream):
    for i in steering:
        stream = i.apply(stream[None])[0]
    return stream


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("phi", MAPS)
def test_every_map_is_the_formula(phi, rescale):
    hidden, residual = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(9)).unbind()
    steering = direction(2).steering(0.7, map=phi, rescale=rescale)  # rows that are not orthogonal
    new = steered(steering, hidden, residual)
    assert close(new + residual, expected(steering, hidden + residual))
    assert close(steered(steering, hidden[None]), expected(steering, hidden)[None])  # one stream, [1, n, d]


@pytest.mark.parametrize("phi", ["shift", "ablate"])
def test_gates_read_the_stream_as_it_comes_to_a_layer(phi):
    hidden, residual = torch.randn(2, 40, D, generator=torch.Generator().manual_seed(9)).unbind()
    streams = {2: hidden + residual, 3: None}
    a, b = direction(seed=1), direction(seed=2)
    of = st.selectors.when(a, ">", 0.05), st.selectors.probe(b, "<", 0.4, 0.1), st.selectors.when(b, ">=", -0.1)
    some = st.selectors.positions(3, 30)
    for gate in (of[0], ~of[1], of[0] & of[1] & some, (of[0] | ~some) & ~of[2], of[0] | ~of[0], of[0] & ~of[0]):
        here, next_ = (
            direction(seed=3).steering(0.7, map=phi, where=gate),
            direction(seed=4, layer=3).steering(where=gate),
        )
        text = fed(40)
        mask = gate(text, opened(streams))
        streams[3] = here[0].apply(streams[2][None], mask)[0]
        assert close(steered(here, hidden, residual) + residual, streams[3])
        both = steered(here + next_, hidden, residual, layers=(2, 3))  # the gate of layer 3 reads layer 2
        assert close(both + residual, next_[0].apply(streams[3][None], mask)[0])
    own = {st.Site("resid_post", i): direction(seed=i).at(LAYER) for i in (2, 3)}  # each layer has its own condition
    both = [direction(seed=3, layer=i).steering(where=st.selectors.when(own, ">", 0.05)) for i in (2, 3)]
    for here in both:
        layer = here[0].site.layer
        streams[layer + 1] = here[0].apply(streams[layer][None], here[0].gate(text, opened(streams)))[0]
    new = steered(both[0] + both[1], hidden, residual, Settings(lanes=1, gates=1), (2, 3))
    assert close(new + residual, streams[4])


def test_several_act_in_their_order():
    hidden = torch.randn(5, D, generator=torch.Generator().manual_seed(9))
    a, b, c = (direction(seed=seed) for seed in (1, 2, 3))
    shift, ablate, turn = a.steering(0.5), b.steering(1.0, map="ablate"), direction(2).steering(-0.5, map="rotate(50)")
    for steering in (shift + ablate, ablate + shift, turn + ablate, shift + c.steering(2.0) + turn):
        assert close(steered(steering, hidden), expected(steering, hidden))


def test_additions_of_one_gate_are_one_lane():
    a, b = direction(seed=1), direction(seed=2, layer=5)
    both = a.steering(0.5) + b.steering(0.25) + a.steering(1.0)
    [lane] = lower(both, SETTINGS)
    slot = slot_of(lane.content)
    assert torch.allclose(lane.strength * slot[LAYER][0], 1.5 * a.at(LAYER))
    assert torch.allclose(lane.strength * slot[5][0], 0.25 * b.at(5))
    assert len(lower(a.steering(0.5, where="prompt") + b.steering(0.5), SETTINGS)) == 2
    # strengths differ, and the slot is the same
    assert lower(a.steering(0.1), SETTINGS)[0].digest == lower(a.steering(0.9), SETTINGS)[0].digest


def test_parts_of_any_size_are_added():
    """What is weaker than float32's smallest number beside another is lost, and leaves no NaN."""
    a, b = direction(seed=1), direction(seed=2)
    for tiny in (1e-39, 1e-46, -1e-300):
        [lane] = lower(a.steering(tiny) + b.steering(0.5), SETTINGS)
        assert torch.allclose(lane.strength * slot_of(lane.content)[LAYER][0], 0.5 * b.at(LAYER))
        [one, *_] = lower(a.steering(tiny, map="ablate"), SETTINGS)
        assert slot_of(one.content)[LAYER][1].isfinite().any()
    for large in (1e39, -1e300):
        for map in ("shift", "clip(-1, 1)"):
            with pytest.raises(st.UsageError, match="smaller"):
                lower(tuple(a.steering(large, map=map)), SETTINGS)


def test_nothing_keeps_the_bits():
    hidden = torch.randn(5, D, generator=torch.Generator().manual_seed(9))
    for steering in ((), direction().steering(0.0), direction(2).steering(map="rotate(360)")):
        assert lower(steering, SETTINGS) == ()
        assert torch.equal(steered(steering, hidden), hidden)
    low = hidden.bfloat16()
    assert torch.equal(steered((), low, low), low)


def test_wire_gives_back_the_lanes():
    a = direction(seed=1)
    steering = a.steering(0.5, where="thinking & ~boundary", schedule="ramp(0, 1, 5)") + a.steering(map="ablate")
    when = st.selectors.when
    steering += a.steering(where=st.selectors.latched(when(a, ">", 0.1) & st.selectors.tokens(3, 5)))
    lanes = lower(steering, SETTINGS)
    assert from_wire(to_wire(lanes, 7)) == (lanes, 7)
    others = [a.steering(0.5), a.steering(0.6), a.steering(0.5, where="prompt"), steering]
    others += [a.steering(0.5, where=when(direction(seed=seed), ">", 0.1)) for seed in (1, 2)]
    identities = {identity(lower(tuple(s), SETTINGS)) for s in others}
    assert len(identities) == 6 and identity(lanes) in identities


def test_slots_evict_what_was_not_used_for_longest():
    bank = Bank(Settings(), dict.fromkeys(KINDS, 3), D, Tokens(Settings(), 1, torch.device("cpu")))
    slots = Slots({LAYER: bank}, "vectors", 3)
    contents = [lower(direction(seed=seed).steering(), SETTINGS)[0] for seed in range(3)]
    contents = [(lane.digest, lane.content) for lane in contents]
    first, second = (slots.hold(dict([one])) for one in contents[:2])
    slots.hold(dict(contents[:1]))
    third = slots.hold(dict(contents[2:]))
    assert third.popitem()[1] == second.popitem()[1]
    assert torch.equal(bank.vectors[first.popitem()[1]], direction(seed=0).at(LAYER))


@pytest.mark.parametrize(
    "steering, message",
    [
        (direction(3).steering(map="ablate"), '"rank": 3'),
        (direction().steering(map="swap([1.0])"), "swap takes another run's activations"),
        (direction().steering(map="ablate") * 3, '"maps": 3'),
        ([direction().steering(where=f"positions(0, {n})")[0] for n in (1, 2, 3)], '"lanes": 3'),
        (
            direction().steering(
                where=st.selectors.when(st.Direction({st.Site("mlp_out", 1): torch.ones(D)}), ">", 0.1)
            ),
            "reads mlp_out.1",
        ),
        (
            sum(
                (direction().steering(where=st.selectors.when(direction(seed=n), ">", 0.1)) for n in (1, 2)),
                direction().steering(where=st.selectors.when(direction(), "<", 0.1)),
            ),
            '"gates": 3',
        ),
        ((st.Direction({st.Site("mlp_out", 1): torch.ones(D)})).steering(), "resid_post"),
    ],
)
def test_what_cannot_be_done_is_refused(steering, message):
    with pytest.raises(st.UsageError, match=message):
        lower(tuple(steering), SETTINGS)


def test_settings_are_checked():
    assert settings_of({}) is None and settings_of({"steering": {}}) == Settings() == settings_of({"steering": True})
    assert settings_of(switched_on({"steering": {"lanes": 1}, "other": 2})).lanes == 1
    for given, message in (
        ({"lane": 1}, "unknown key 'lane'"),
        ({"lanes": -1}, "lanes of the steering settings"),
        ({"gates": 9}, "a whole number up to 8"),
        ({"layers": []}, "list of layers"),
        ({"bank": "int8"}, "float32 or bfloat16"),
        ({"directions": "/nowhere"}, "is a folder"),
        ("yes", "are an object"),
    ):
        with pytest.raises(st.UsageError, match=message):
            settings_of({"steering": given})
