"""How a run is steered: one frozen description that every engine lowers, every file holds and every process can read.

    h' = R( h,  h + g s V ( phi(V^T h) - V^T h ) )

An `Intervention` is this formula at one site; a `Steering` is a tuple of them, which act in this order where they share
a site.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerable.steering.gates import Gate, Reading, parse_gate, selectors
from steerable.steering.maps import MAPS, Map, Shift, called, check_map, fitted
from steerable.steering.plain import decoded, encoded, number_text
from steerable.steering.schedule import SCHEDULES, Constant, Schedule, Uniform, schedule_text
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import strict_json, write_atomic
from steerable.store.text import one_line

_ORTHONORMAL = 0.02  # how far bases in bfloat16 are from it at most


@dataclass(frozen=True)
class Source:
    """Where an intervention came from: how text names its direction and, where it is not the direction's own, its map;
    and what that direction says by itself. Text (`format_steering`) gives the names and what differs.

    layers: all that the direction has; empty: not known. model_id, model_revision: the model that it was made on.
    """

    name: str = "direction"
    map: str = ""
    layers: tuple[int, ...] = ()
    gate: str = "all"
    schedule: str = "constant"
    rescale: bool = False
    model_id: str = ""
    model_revision: str = ""


@dataclass(frozen=True, eq=False)
class Intervention:
    """The formula at one site, as plain data: equal by value, hashable, and written as JSON by `to_json`.

    Attributes:
        site: where it acts.
        basis: V, [d, k] with orthonormal columns, on the CPU. `Direction.steering` takes any rows.
        map: phi, of coordinates [..., k] (`maps`).
        gate: g, the tokens that are touched (`gates`).
        schedule: the factor of the strength, by layer and token (`schedule`).
        strength: s.
        rescale: whether R restores the norm of h; else it is the identity.
        source: how text names it; no part of what it does.

    Raises:
        UsageError: for a basis, a strength or a gate that cannot be used.

    Example:
        >>> from steerable.steering.maps import Clip
        >>> ablation = st.Intervention(st.Site("resid_post", 3), torch.eye(192)[:, :2], Clip.ablate())
        >>> ablation.apply(torch.ones(1, 1, 192))[0, 0, :3]
        tensor([0., 0., 1.])
    """

    site: Site
    basis: Tensor
    map: Map
    gate: Gate = selectors.all
    schedule: Schedule = Constant()
    strength: float = 1.0
    rescale: bool = False
    source: Source = Source()

    def __post_init__(self) -> None:
        basis = self.basis.detach().to("cpu")
        if basis.dim() != 2 or basis.numel() == 0:
            raise UsageError(f"the basis at {self.site} must be [d, k], not {list(basis.shape)}")
        if not torch.isfinite(basis).all():
            raise UsageError(f"the vector at {self.site} holds NaN or infinite numbers")
        check_map(self.map, basis.shape[1])
        try:
            strength = float(self.strength)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UsageError(f"an intervention has one number as its strength, not {self.strength!r}") from None
        if not math.isfinite(strength):
            raise UsageError(f"the strength must be a finite number, not {self.strength}")
        for name, value in (("basis", basis), ("strength", strength), ("gate", parse_gate(self.gate).at(self.site))):
            object.__setattr__(self, name, value)
        if not isinstance(self.map, Shift) and self.coordinates is None:
            wide = basis.double()
            if bool((wide.T @ wide - torch.eye(wide.shape[1], dtype=wide.dtype)).abs().max() > _ORTHONORMAL):
                raise UsageError(
                    f"the columns of the basis at {self.site} are not orthonormal, which the map needs: give them as "
                    "the rows of a Direction, which takes any"
                )

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        at = self.coordinates  # a few numbers, where a transport of all coordinates has d^2
        basis = (self.basis.shape, at is None, (self.basis.double() if at is None else at).numpy().tobytes())
        return (self.site, basis, self.map, self.gate, self.schedule, self.strength, self.rescale)

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervention) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:  # without the hash, which is another in each process
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing at any token."""
        return self.strength == 0 or bool(getattr(self.map, "is_identity", False))

    @cached_property
    def coordinates(self) -> Tensor | None:
        """[k] the coordinates of h that the columns of the basis are, where each is a single one; else None."""
        at = self.basis.argmax(0)
        ones = torch.zeros_like(self.basis).scatter_(0, at[None], 1.0)
        return at if torch.equal(self.basis, ones) else None

    @property
    def vector(self) -> Tensor | None:
        """What a shift adds at strength 1, [d] float64; None for other maps."""
        if not isinstance(self.map, Shift):
            return None
        return self.basis.double() @ torch.tensor(self.map.amount, dtype=torch.float64).expand(self.basis.shape[1])

    def apply(
        self, h: Tensor, mask: Tensor | None = None, strength: float | None = None, position: Tensor | None = None
    ) -> Tensor:
        """The formula itself, for one intervention: the oracle of the engines.

        h: [B, T, d]. mask: [B, T] where the gate is open; None: everywhere. strength: instead of its own.
        position: [B, T] of the tokens in their sequences, for maps that differ between positions; None: 0, 1, ...
        The schedule is left out. The arithmetic is in float32 (float64 if h is); the result has h's type. Where nothing
        changes h is returned, or its numbers, bit for bit.
        """
        s = self.strength if strength is None else strength
        if s == 0 or getattr(self.map, "is_identity", False):
            return h
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        if (vector := self.vector) is not None:
            new = wide + s * vector.to(wide.device, wide.dtype)
        else:
            v = self.basis.to(wide.device, wide.dtype)
            x = wide @ v
            new = wide + s * ((called(self.map, x, wide, position) - x) @ v.T)
        if self.rescale:
            new = rescaled(new, wide)
        new = new.to(h.dtype)
        return new if mask is None else torch.where(mask[..., None], new, h)


Steering = tuple[Intervention, ...]
"""What steers a run. Interventions at one site act in this order."""


def steering_of(given: Any) -> Steering:
    """A steering as engines take it. Raises UsageError for what is none, an intervention or a direction alone, too."""
    parts = tuple(given) if isinstance(given, (tuple, list)) else (None,)
    if odd := [part for part in parts if not isinstance(part, Intervention)]:
        kind = type(given if odd == [None] else odd[0]).__name__
        raise UsageError(f"a steering holds interventions, as `direction.steering(0.5)` and text give them, no {kind}")
    return parts


def drawn(steering: Steering, seed: int) -> Steering:
    """A request's own steering: the strengths that its schedules draw are drawn (`schedule.Uniform`)."""
    return tuple(
        replace(i, strength=i.strength * i.schedule.drawn(seed), schedule=i.schedule.then)
        if isinstance(i.schedule, Uniform)
        else i
        for i in steering_of(steering)
    )


class Program(tuple[Intervention, ...]):
    """A Steering whose `str` is its text form; `save` keeps it as JSON, where no direction file can hold it."""

    def __str__(self) -> str:
        return format_steering(self)

    def __add__(self, other: Any) -> Program:
        return Program((*self, *other))

    def save(self, path: str | Path) -> Path:
        """Write `to_json`, whole or not at all. Raises SteerableError when that fails."""
        return write_atomic(path, f"{to_json(self)}\n")

    @classmethod
    def load(cls, path: str | Path) -> Program:
        """Read a file of `save`. Raises UsageError when there is none, or something else in it."""
        try:
            if program := from_json(Path(path).read_text(encoding="utf-8")):
                return program
            raise UsageError("it holds no intervention")
        except (OSError, UnicodeDecodeError, UsageError) as error:
            why = one_line(str(error), 200)
            raise UsageError(f"{path} is no steering file ({why}): give one that a recipe wrote") from None


def rescaled(new: Tensor, h: Tensor) -> Tensor:
    """Each activation of `new` with the norm that it has in `h`."""
    norm, before = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (new, h))
    return new * (before / norm.clamp_min(1e-30))


def shift(
    site: Site, vector: Tensor, strength: float = 1.0, where: Gate | str = selectors.all, rescale: bool = False
) -> Intervention:
    """Activation addition, h' = h + strength * vector at the tokens of `where`. vector: [d] or [1, d].

    Raises UsageError for another shape, and for NaN. Example: `shift(Site("attn_out", 2), torch.ones(64), 0.1)`.
    """
    row = vector[None] if vector.dim() == 1 else vector
    if row.dim() != 2 or len(row) != 1:
        raise UsageError(f"a shift at {site} needs one vector [d], not a tensor of shape {tuple(vector.shape)}")
    return Intervention(site, *fitted(row, Shift()), parse_gate(where), strength=strength, rescale=rescale)


def scaled(steering: Iterable[Intervention], factor: float) -> Program:
    """The same steering with each strength times a factor."""
    return Program(replace(i, strength=i.strength * factor) for i in steering)


def format_steering(steering: Sequence[Intervention]) -> str:
    """The text form, "0.5 happy@thinking - 0.2 verbose@answer & ~boundary"; `parse_steering` reads it back."""
    terms: list[tuple[Any, list[Site]]] = []
    for i in steering:
        term = (i.source, i.strength, str(i.gate), schedule_text(i.schedule), i.rescale)
        if terms and terms[-1][0] == term and terms[-1][1][-1] < i.site:
            terms[-1][1].append(i.site)
        else:
            terms.append((term, [i.site]))
    text = ""
    for (source, strength, gate, schedule, is_rescaled), sites in terms:
        sign = "- " if strength < 0 or math.copysign(1, strength) < 0 else "+ "
        text += f" {sign if text else sign.strip().removeprefix('+')}{number_text(abs(strength))} {source.name}"
        layers = sorted({site.layer for site in sites})
        text += f"[{', '.join(map(str, layers))}]" * (tuple(layers) != (source.layers or tuple(layers)))
        text += f"|{source.map}" * bool(source.map)
        text += f"|{schedule}" * (schedule != source.schedule)
        text += ("|rescale" if is_rescaled else "|rescale(off)") * (is_rescaled != source.rescale)
        text += f"@{gate}" * (gate != source.gate)
    return text.strip()


def gate_to_json(gate: Gate) -> Any:
    """A gate as JSON holds it: its text, and with it what its parts on activations read."""
    if not gate.readings:
        return str(gate)
    readings = [
        [[str(site), base64.b64encode(v).decode(), bias] for site, v, bias in leaf.args[0].vectors]  # type: ignore[index]
        for leaf in gate.readings
    ]
    return {"text": str(gate), "readings": readings}


def gate_from_json(data: Any) -> Gate:
    """The inverse of `gate_to_json`. Raises UsageError."""
    if isinstance(data, str):
        return parse_gate(data)
    try:
        if unknown := sorted(set(data) - {"text", "readings"}):
            raise UsageError(f"unknown key {unknown[0]!r} in a gate")
        waiting = [
            tuple((Site.parse(site), base64.b64decode(v, validate=True), float(bias)) for site, v, bias in entries)
            for entries in data["readings"]
        ]
        gate = parse_gate(data["text"], lambda name: {Site("resid_post", 0): torch.ones(1)})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"a gate must be a text, or a text with readings ({error})") from None
    if len(waiting) != len(gate.readings) or any(len(v) % 4 for entries in waiting for _, v, _ in entries):
        raise UsageError("the readings of a gate do not fit its text")
    return _with_readings(gate, iter(waiting))


def _with_readings(gate: Gate, waiting: Any) -> Gate:
    if not gate.reads:
        return replace(gate, parts=tuple(_with_readings(part, waiting) for part in gate.parts))
    reading, *rest = gate.args or ()
    return replace(gate, args=(Reading(reading.name, next(waiting), reading.is_probe), *rest))


def to_json(steering: Iterable[Intervention]) -> str:
    """A steering as JSON, its bases included, so that another process can do the same."""
    return json.dumps(
        [
            {
                "site": str(i.site),
                "basis": _basis_to_json(i),
                "map": encoded(i.map, MAPS),
                "gate": gate_to_json(i.gate),
                "schedule": encoded(i.schedule, SCHEDULES),
                "strength": i.strength,
                "rescale": i.rescale,
                "source": asdict(i.source),
            }
            for i in steering
        ],
        separators=(",", ":"),
        allow_nan=False,
    )


def _basis_to_json(intervention: Intervention) -> dict[str, Any]:
    """Its numbers, or the coordinates that it takes: a transport of all of them would be a file of d^2 numbers."""
    basis, coordinates = intervention.basis, intervention.coordinates
    if coordinates is not None:
        return {"shape": list(basis.shape), "coordinates": coordinates.tolist()}
    numbers = base64.b64encode(basis.double().numpy().astype("<f8").tobytes()).decode()
    return {"shape": list(basis.shape), "float64": numbers}


def _basis_from_json(data: dict[str, Any]) -> Tensor:
    d, k = data["shape"]
    if "coordinates" not in data:
        content = bytearray(base64.b64decode(data["float64"], validate=True))
        return torch.frombuffer(content, dtype=torch.float64).reshape(d, k)
    at = data["coordinates"]
    if len(at) != k or not all(type(n) is int and 0 <= n < d for n in at):
        raise ValueError(f"the coordinates of a basis [{d}, {k}] are {k} numbers from 0 to {d - 1}")
    return torch.zeros(d, k).scatter_(0, torch.tensor([at]), 1.0)


def from_json(text: str, most: int | None = None) -> Program:
    """The inverse of `to_json`. most: how many numbers the bases may have together, where the text comes from others; a
    short text can name a large basis by its coordinates. Raises UsageError for what is no steering."""
    try:
        entries = strict_json(text)
        numbers = sum(abs(math.prod(entry["basis"]["shape"])) for entry in entries)
        if most is not None and numbers > most:
            raise UsageError(f"the bases of the steering have {numbers} numbers: expected {most} at most")
        return Program(_intervention(entry) for entry in entries)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise UsageError(f"this JSON is no steering: {one_line(str(error), 200)}") from error


def _intervention(data: dict[str, Any]) -> Intervention:
    if unknown := sorted(set(data) - {f.name for f in fields(Intervention)}):
        raise UsageError(f"unknown key {unknown[0]!r} in an intervention")
    if not isinstance(data["rescale"], bool):
        raise UsageError(f"rescale is true or false, not {data['rescale']!r}")
    if isinstance(data["strength"], bool) or not isinstance(data["strength"], (int, float)):
        raise UsageError(f"an intervention has one number as its strength, not {data['strength']!r}")
    source = data.get("source", {})
    if not all(isinstance(source.get(name, ""), str) for name in ("name", "map", "model_id", "model_revision")):
        raise UsageError("the source of an intervention holds texts")
    return Intervention(
        Site.parse(data["site"]),
        _basis_from_json(data["basis"]),
        decoded(data["map"], MAPS, "map"),
        gate_from_json(data["gate"]),
        decoded(data["schedule"], SCHEDULES, "schedule"),
        data["strength"],
        data["rescale"],
        Source(**source | {"layers": tuple(source.get("layers", ()))}),
    )
