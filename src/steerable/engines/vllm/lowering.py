"""A steering as the lanes of a batch: what a request sends to the workers, and what these put into their banks.

A lane is a slot and a strength for every token. What all additions of a lane do at a layer is one vector; a lane of
other maps has one map a layer, in the general form

    c = F^-1 V^T h,  y = M c + b + |c| r  where low <= c <= high, else c,  z = min(max(y, floor), ceiling)
    h' = R( h,  h + g V (F z - V^T h) )

whose numbers differ from map to map. The strength of a lane, its gate and its schedule are those of the request; how
strong its parts are against each other is in the slot. Slots are known by the hash of their content.

Gates on activations are rows of conditions (`conditions.py`), which have slots as lanes have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from steerable.engines.vllm.conditions import answered, conditions_of, rows_of, tensors_of
from steerable.engines.vllm.settings import Settings
from steerable.steering.gates import Gate
from steerable.steering.maps import Affine, Clip, Framed, Map, Rotate, Shift, Swap, map_text
from steerable.steering.plain import decoded, encoded
from steerable.steering.schedule import SCHEDULES, PerRequest, Schedule, check_drawn
from steerable.steering.spec import Intervention, Steering
from steerable.store.errors import UsageError
from steerable.store.text import plural

COLUMNS = 8
"""Columns of a map's numbers behind its three matrices: offset, radial, low, high, floor, ceiling, gain, rescale."""


@dataclass(frozen=True)
class Row:
    """One row of conditions of a request. digest, content: of its slot."""

    number: int
    is_latched: bool
    digest: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Lane:
    """What one lane does for a request.

    number: of the lane; those of additions come first. gates: one, on tokens, or one for each of the answers of the
    rows of conditions. digest, content: of the slot (`slot_of`). schedule: None where the strength is the same at all
    tokens.
    """

    number: int
    strength: float
    gates: tuple[Gate, ...]
    schedule: Schedule | None
    digest: str
    content: bytes = field(repr=False)
    rows: tuple[Row, ...] = ()


@dataclass
class _Filling:
    """What becomes one lane. parts: by layer, with the strength of each."""

    number: int
    rows: set[int] = field(default_factory=set)
    parts: dict[int, list[tuple[float, Intervention]]] = field(default_factory=dict)

    @property
    def strength(self) -> float:
        """Of the strongest part: the others are kept in the slot as shares of it, none above 1."""
        return max((strength for some in self.parts.values() for strength, _ in some), key=abs)


def lower(steering: Steering, settings: Settings) -> tuple[Lane, ...]:
    """The lanes of a steering; none where it changes nothing.

    Raises UsageError for what this engine does not do, or was not made ready for.
    """
    acting = [(i, factor) for i in steering if not i.is_identity and (factor := _factor(i)) != 0]
    check_drawn(i.schedule for i, _ in acting)
    for i, _ in acting:
        _check(i)
    rows = rows_of([(i.site.layer, i.gate) for i, _ in acting], settings.gates)
    _check_room(len(set(rows.values())), settings.gates, "gates", "conditions on activations at one layer")
    shifts: dict[Any, _Filling] = {}
    maps: list[tuple[Any, _Filling]] = []
    depth: dict[int, int] = {}  # lanes of maps in use at a layer
    for i, factor in acting:
        layer, conditions = i.site.layer, conditions_of(i.gate)
        answers = range(settings.answers if conditions else 1)
        key = tuple(answered(i.gate, rows, n) for n in answers), i.schedule if i.schedule.needs_tokens else None
        if isinstance(i.map, Shift) and not i.rescale and not depth.get(layer):
            filling = shifts.setdefault(key, _Filling(len(shifts)))
        else:  # what follows a map at its layer must not come before it
            number = depth.get(layer, 0)
            while number < len(maps) and maps[number][0] != key:
                number += 1
            if number == len(maps):
                maps.append((key, _Filling(settings.lanes + number)))
            depth[layer] = number + 1
            filling = maps[number][1]
        filling.parts.setdefault(layer, []).append((factor, i))
        filling.rows |= {rows[condition] for condition in conditions}
    _check_room(len(shifts), settings.lanes, "lanes", "additions with different gates or schedules")
    _check_room(len(maps), settings.maps, "maps", "maps behind each other, or with different gates or schedules")
    slots = {}
    for number in set(rows.values()):
        conditions = tuple(condition for condition, row in rows.items() if row == number)
        slots[number] = Row(number, conditions[0][1], *_slot(tensors_of(conditions)))
    fillings = [(key, f, _vectors(f)) for key, f in shifts.items()] + [(key, f, _maps(f, settings)) for key, f in maps]
    lanes = []
    for (gates, schedule), f, tensors in fillings:
        digest, content = _slot(tensors)
        there = tuple(slots[number] for number in sorted(f.rows))
        lanes.append(Lane(f.number, f.strength, gates, schedule, digest, content, there))
    return tuple(lanes)


def _factor(i: Intervention) -> float:
    """The strength, but for what differs between tokens."""
    return i.strength * i.schedule.at(i.site.layer) * (i.schedule.default if isinstance(i.schedule, PerRequest) else 1)


def _slot(tensors: Mapping[str, Tensor]) -> tuple[str, bytes]:
    """A slot's digest and content."""
    content = save({name: tensors[name].contiguous() for name in sorted(tensors)})
    return hashlib.sha256(content).hexdigest()[:32], content


def _check(i: Intervention) -> None:
    """Raises UsageError for an intervention of which vLLM can do nothing."""
    if i.site.kind != "resid_post":
        raise UsageError(
            f"vLLM is steered at the outputs of layers, resid_post, and this acts at {i.site}: use a direction made "
            "there, or the transformers engine"
        )
    for leaf in i.gate.readings:
        if (site := leaf.args[0].site).kind != "resid_post":  # type: ignore[index]
            raise UsageError(
                f"vLLM reads activations at the outputs of layers, resid_post, and {leaf} reads {site}: use a "
                "direction made there, or the transformers engine"
            )


def _check_room(used: int, there: int, name: str, what: str) -> None:
    if used > there:
        raise UsageError(
            f"this steering needs {used} {what}, and the engine was started for {there}: start it with "
            f'--additional-config \'{{"steering": {{"{name}": {used}}}}}\''
        )


def _vectors(filling: _Filling) -> dict[str, Tensor]:
    """[d] float32 of each layer. Raises UsageError where what is added has no place among such numbers."""
    vectors, whole = {}, filling.strength
    for layer, parts in filling.parts.items():
        v = torch.stack([strength / whole * i.vector.double() for strength, i in parts if i.vector is not None]).sum(0)
        if not torch.isfinite((whole * v).float()).all():
            raise UsageError(f"what is added at layer {layer} is no finite float32 number: take a smaller strength")
        vectors[str(layer)] = v.float()
    return vectors


def _maps(filling: _Filling, settings: Settings) -> dict[str, Tensor]:
    """Of each layer its basis [rank, d] and numbers [rank, 3 * rank + COLUMNS], float32."""
    tensors, rank, whole = {}, settings.rank, filling.strength
    if not torch.isfinite(torch.tensor(whole, dtype=torch.float32)):
        raise UsageError(f"the strength {whole:g} is too large a number for float32: take a smaller one")
    for layer, [(strength, i)] in filling.parts.items():
        d, k = i.basis.shape
        if k > rank:
            raise UsageError(
                f"{map_text(i.map)} at {i.site} acts in {k} {plural(k, 'dimension')}, and the engine was started for "
                f'{rank}: start it with --additional-config \'{{"steering": {{"rank": {k}}}}}\''
            )
        basis = torch.zeros(rank, d, dtype=torch.float64)
        basis[:k] = i.basis.double().T
        numbers = general(i.map, k, rank)
        numbers[:, -2], numbers[:, -1] = strength / whole, float(i.rescale)
        tensors[f"{layer}.basis"], tensors[f"{layer}.numbers"] = basis.float(), numbers.float()
    return tensors


def general(map: Map, k: int, rank: int) -> Tensor:
    """The numbers of a map in the general form, [rank, 3 * rank + COLUMNS] float64: the matrix M, the frame F, its
    inverse, and the other columns. Raises UsageError for maps that have no such form."""
    eye = torch.eye(rank, dtype=torch.float64)
    matrix, frame = eye.clone(), eye.clone()
    offset, radial = torch.zeros(2, rank, dtype=torch.float64)
    low = torch.full((rank,), -torch.inf, dtype=torch.float64)
    high, floor, ceiling = -low, low.clone(), -low
    if isinstance(map, Framed):
        frame[:k, :k] = torch.tensor(map.frame, dtype=torch.float64)
        map = map.map
    match map:
        case Shift(amount):
            offset[:k] = torch.tensor(amount, dtype=torch.float64)
        case Clip(lo, hi):
            floor[:k], ceiling[:k] = torch.tensor(lo, dtype=torch.float64), torch.tensor(hi, dtype=torch.float64)
        case Rotate(degrees, absolute):
            angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
            cos, sin = float(angle.cos()), float(angle.sin())
            turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
            matrix[:2, :2] = 0.0 if absolute else turn
            radial[:2] = turn[:, 0] if absolute else 0.0
        case Affine(scale, shift, lo, hi):
            given = torch.tensor(scale, dtype=torch.float64)
            matrix[:k, :k] = given if given.dim() == 2 else given.expand(k).diag()
            for column, value in ((offset, shift), (low, lo), (high, hi)):
                column[:k] = torch.tensor(value, dtype=torch.float64)
        case Swap():
            raise UsageError(
                "swap takes another run's activations, position by position, which vLLM does not do: use the "
                "transformers engine"
            )
        case _:
            raise UsageError(
                f"the map {map_text(map)} is none of shift, clip, rotate and affine, which vLLM computes: use the "
                "transformers engine"
            )
    rest = torch.zeros(2, rank, dtype=torch.float64)  # gain and rescale
    columns = torch.stack([offset, radial, low, high, floor, ceiling, *rest], 1)
    return torch.cat([matrix, frame, frame.inverse(), columns], 1)


def to_wire(lanes: Sequence[Lane], prompt_tokens: int | None, hangs_on_prompt: bool = True) -> dict[str, Any]:
    """Lanes as `SamplingParams.extra_args` carries them from process to process.

    prompt_tokens: how many of the tokens of the prompt count as prompt for the gates; None: all. hangs_on_prompt: see
        `prefixes`.
    """
    return {
        "hangs_on_prompt": hangs_on_prompt,
        "lanes": [
            [
                lane.number,
                lane.strength,
                [json.dumps(_plain(gate)) for gate in lane.gates],
                None if lane.schedule is None else json.dumps(encoded(lane.schedule, SCHEDULES)),
                lane.digest,
                lane.content,
                [[row.number, row.is_latched, row.digest, row.content] for row in lane.rows],
            ]
            for lane in lanes
        ],
        "prompt_tokens": prompt_tokens,
    }


def from_wire(wire: Mapping[str, Any]) -> tuple[tuple[Lane, ...], int | None]:
    """The inverse of `to_wire`."""
    lanes = []
    for number, strength, gates, schedule, digest, content, rows in wire["lanes"]:
        there = tuple(Row(*row) for row in rows)
        lanes.append(Lane(number, strength, tuple(map(_gate, gates)), _schedule(schedule), digest, content, there))
    return tuple(lanes), wire["prompt_tokens"]


def _plain(gate: Gate) -> list[Any]:
    return [gate.op, [_plain(part) for part in gate.parts], gate.args]


def _made(op: str, parts: list[Any], args: list[Any] | None) -> Gate:
    return Gate(op, tuple(_made(*part) for part in parts), _frozen(args))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@lru_cache(maxsize=256)
def _gate(text: str) -> Gate:
    return _made(*json.loads(text))


@lru_cache(maxsize=256)
def _schedule(text: str | None) -> Schedule | None:
    return None if text is None else decoded(json.loads(text), SCHEDULES, "schedule")  # type: ignore[no-any-return]


def identity(lanes: Sequence[Lane]) -> str:
    """A hash of all that these lanes do: equal for requests that are steered equally, another one for all others."""
    what = [
        (lane.number, lane.digest, lane.strength, [str(gate) for gate in lane.gates], repr(lane.schedule),
         [(row.number, row.is_latched, row.digest) for row in lane.rows])
        for lane in lanes
    ]  # fmt: skip
    return hashlib.sha256(repr(what).encode()).hexdigest()


def slot_of(content: bytes) -> dict[int, tuple[Tensor, ...]]:
    """What a slot holds at each layer: (vector,), (basis, numbers), or (limit, weight)."""
    slots: dict[int, tuple[Tensor, ...]] = {}
    for name, tensor in sorted(load(content).items()):  # basis before numbers, limit before weight
        layer = int(name.partition(".")[0])
        slots[layer] = (*slots.get(layer, ()), tensor)
    return slots
