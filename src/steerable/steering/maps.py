"""Maps: what happens to the coordinates of an activation inside a subspace. They are the `phi` of the one formula

    h' = R( h,  h + g s V ( phi(V^T h) - V^T h ) )

with V orthonormal, g the gate, s the strength and R the identity or a rescaling to ||h||.

A map is a frozen dataclass whose fields are its parameters: numbers, and tuples of numbers for one a coordinate. It is
called with coordinates x [..., k] and returns as many. Inside a batch its fields are tensors that broadcast against x,
so that `__call__` uses torch operations only. A new map is written in the same way and named:

    @register_map("squash")
    @dataclass(frozen=True)
    class Squash:
        limit: float = 1.0

        def __call__(self, x):
            return self.limit * torch.tanh(x / self.limit)

It then works in `steer`, in text ("happy|squash(2)"), in direction files and in every engine. One that is linear may
say so by a method `linear`, and is then computed in fewer operations. Another package may name its maps as entry points
of the group `steerable.maps` instead.

Rows that are not orthonormal: coordinates are counted in rows. With W [k, d] the rows that were given, the part of h in
their span is c W, and a map acts on c; so an amount of 1 adds a row as it is, and `floor(0.5)` leaves at least half of
it. `fitted` writes such a map as one of the coordinates V^T h = R c, with W^T = V R (QR, the diagonal of R positive).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from steerable.steering.plain import Registry, call_text, made, numbers, read_call
from steerable.store.errors import UsageError
from steerable.store.text import plural

Map = Any
"""An instance of a registered map."""
Numbers = Any
"""A number, a tuple of numbers [k], or in a batch a tensor; tensors and lists are made tuples."""
Key = tuple[Any, ...]

MAPS = Registry("steerable.maps")
NAMED: dict[str, Callable[..., Map]] = {}
"""Maps with some of their parameters fixed, such as "ablate"."""


class Linear(NamedTuple):
    """A map as scale x + offset + ||x|| radial, in float64. scale: [k, k], or [k] of a diagonal. offset, radial: [k],
    radial None where the norm plays no part."""

    scale: Tensor
    offset: Tensor
    radial: Tensor | None = None


def register_map(name: str) -> Callable[[Any], Any]:
    """Make a frozen dataclass known as the map of this name; a decorator."""
    return MAPS.registering(name)


@register_map("shift")
@dataclass(frozen=True)
class Shift:
    """x + amount: activation addition."""

    amount: Numbers = 1.0

    def __post_init__(self) -> None:
        _store(self, amount=self.amount)

    def __call__(self, x: Tensor) -> Tensor:
        return x + _like(self.amount, x)

    @property
    def is_identity(self) -> bool:
        return not any(_flat(self.amount))

    def in_basis(self, frame: Tensor) -> Map:
        return Shift(frame @ _row(self.amount, frame))


@register_map("norm_shift")
@dataclass(frozen=True)
class NormShift:
    """x + share ||h|| along each row of length 1: each token is moved by the same share of its own norm.

    An addition moves long activations by less of themselves than short ones; this one does not: the relative
    displacement ||h' - h|| / ||h|| by one row, of whatever length, is strength * share. share: a number, or one a row.
    """

    share: Numbers = 0.1
    sees_activation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _store(self, share=self.share)

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        return x + _like(self.share, x) * torch.linalg.vector_norm(h, dim=-1, keepdim=True)

    @property
    def is_identity(self) -> bool:
        return not any(_flat(self.share))

    def in_basis(self, frame: Tensor) -> Map:
        return NormShift(frame @ (_row(self.share, frame) / frame.norm(dim=0)))


@register_map("clip")
@dataclass(frozen=True)
class Clip:
    """x limited to [lo, hi]: `ablate` is [0, 0], `set_to(c)` is [c, c], and `floor` and `ceiling` limit one side, as
    capping along the assistant axis and RAPTOR do."""

    lo: Numbers = -math.inf
    hi: Numbers = math.inf

    def __post_init__(self) -> None:
        _store(self, finite=False, lo=self.lo, hi=self.hi)
        lo, hi = torch.tensor(self.lo), torch.tensor(self.hi)
        if lo.dim() and hi.dim() and len(lo) != len(hi) or bool((lo > hi).any()):
            raise UsageError(f"clip needs lo <= hi, as many of the one as of the other, not {self.lo} and {self.hi}")
        if bool((lo == math.inf).any() or (hi == -math.inf).any()):
            raise UsageError(f"clip({self.lo}, {self.hi}) makes coordinates infinite: expected finite limits")

    @classmethod
    def ablate(cls) -> Clip:
        """Takes the subspace out of the activation."""
        return cls(0.0, 0.0)

    @classmethod
    def set_to(cls, value: Numbers) -> Clip:
        """Makes the coordinates equal to the value."""
        return cls(value, value)

    @classmethod
    def floor(cls, value: Numbers) -> Clip:
        """Raises coordinates that are below the value."""
        return cls(lo=value)

    @classmethod
    def ceiling(cls, value: Numbers) -> Clip:
        """Lowers coordinates that are above the value."""
        return cls(hi=value)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(x, _like(self.hi, x)), _like(self.lo, x))

    def linear(self, k: int) -> Linear | None:
        """Where nothing but one value is within the limits."""
        return Linear(torch.zeros(k, dtype=torch.float64), _all(self.lo, k)) if self.lo == self.hi else None

    @property
    def is_identity(self) -> bool:
        return set(_flat(self.lo)) == {-math.inf} and set(_flat(self.hi)) == {math.inf}

    def in_basis(self, frame: Tensor) -> Map:
        if self.lo == self.hi == 0:
            return self
        if self.lo == self.hi:
            return Clip.set_to(frame @ _row(self.lo, frame))
        if (scale := _diagonal(frame)) is None:
            return Framed(self, frame)
        return Clip(_row(self.lo, frame) * scale, _row(self.hi, frame) * scale)

    @property
    def text(self) -> str:
        if self.lo == self.hi:
            return "ablate" if self.lo == 0 else call_text("set", self.lo)
        if self.is_identity or -math.inf != self.lo and self.hi != math.inf:
            return call_text("clip", self.lo, self.hi)
        return call_text("floor", self.lo) if self.hi == math.inf else call_text("ceiling", self.hi)


NAMED |= {"ablate": Clip.ablate, "set": Clip.set_to, "floor": Clip.floor, "ceiling": Clip.ceiling}


@register_map("rotate")
@dataclass(frozen=True)
class Rotate:
    """The two coordinates turned by an angle (Selective Steering, arXiv 2601.19375) or, absolute, to an angle (Angular
    Steering, arXiv 2510.26243), their length kept.

    The plane is that of two rows, of whatever length: angles count from the first row towards the second.
    """

    degrees: float
    absolute: bool = False

    def __post_init__(self) -> None:
        _store(self, degrees=self.degrees)
        if not isinstance(self.degrees, float):
            raise UsageError(f"rotate needs one angle in degrees, not {self.degrees}")
        if not isinstance(self.absolute, bool):
            raise UsageError(f"rotate is absolute or not: expected True or False, not {self.absolute!r}")

    def check(self, k: int) -> None:
        if k != 2:
            raise UsageError(f"rotate needs a plane, which two rows [2, d] span, and got {k}")

    def __call__(self, x: Tensor) -> Tensor:
        angle = torch.atleast_1d(_like(self.degrees, x)).deg2rad()
        cos, sin = angle.cos(), angle.sin()
        if self.absolute:
            return torch.linalg.vector_norm(x, dim=-1, keepdim=True) * torch.cat([cos, sin], -1)
        a, b = x[..., :1], x[..., 1:]
        return torch.cat([cos * a - sin * b, sin * a + cos * b], -1)

    def linear(self, k: int) -> Linear:
        """In a plane; an absolute angle makes of x its norm."""
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        nothing = torch.zeros(k, dtype=torch.float64)
        if self.absolute:
            return Linear(nothing, nothing, torch.tensor([cos, sin], dtype=torch.float64))
        return Linear(torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64), nothing)

    @property
    def is_identity(self) -> bool:
        return not self.absolute and self.degrees % 360 == 0

    def in_basis(self, frame: Tensor) -> Map:
        return self

    @property
    def text(self) -> str:
        return call_text("rotate_to" if self.absolute else "rotate", self.degrees)


NAMED["rotate_to"] = lambda degrees: Rotate(degrees, absolute=True)


@register_map("affine")
@dataclass(frozen=True)
class Affine:
    """scale x + offset for coordinates in [lo, hi], and x for others: the transport maps of AcT (arXiv 2410.23054) and
    LinEAS (arXiv 2503.10679), with one-hot rows for a support of single neurons.

    scale: a number, one a coordinate [k], or a matrix [k, k].
    """

    scale: Numbers = 1.0
    offset: Numbers = 0.0
    lo: Numbers = -math.inf
    hi: Numbers = math.inf

    def __post_init__(self) -> None:
        _store(self, dims=2, scale=self.scale)
        _store(self, offset=self.offset)
        _store(self, finite=False, lo=self.lo, hi=self.hi)

    def check(self, k: int) -> None:
        if (scale := torch.tensor(self.scale)).dim() > 1 and scale.shape != (k, k):
            raise UsageError(f"the matrix of affine must be [{k}, {k}], not {list(scale.shape)}")

    def __call__(self, x: Tensor) -> Tensor:
        scale, k = _like(self.scale, x), x.shape[-1]
        new = x @ scale.mT if k > 1 and scale.dim() > 1 and scale.shape[-2:] == (k, k) else x * scale
        new = new + _like(self.offset, x)
        return torch.where((x >= _like(self.lo, x)) & (x <= _like(self.hi, x)), new, x)

    def linear(self, k: int) -> Linear | None:
        """Where there are no limits."""
        if set(_flat(self.lo)) != {-math.inf} or set(_flat(self.hi)) != {math.inf}:
            return None
        scale = torch.tensor(self.scale, dtype=torch.float64)
        return Linear(scale if scale.dim() == 2 else scale.expand(k), _all(self.offset, k))

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and not any(_flat(self.offset))

    def in_basis(self, frame: Tensor) -> Map:
        if (scale := _diagonal(frame)) is None or isinstance(self.scale, tuple) and isinstance(self.scale[0], tuple):
            return Framed(self, frame)
        return Affine(self.scale, *(_row(x, frame) * scale for x in (self.offset, self.lo, self.hi)))


@register_map("swap")
@dataclass(frozen=True)
class Swap:
    """The coordinates of a source activation in place of x: interchange interventions (DAS; CDAS, arXiv 2602.05234).

    source: coordinates [k] for all tokens, or [T, k], one line for each position of the sequence; positions from T on
    are left alone.
    """

    source: Numbers
    by_position: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        _store(self, dims=2, source=self.source)
        object.__setattr__(self, "by_position", torch.tensor(self.source).dim() == 2)

    def check(self, k: int) -> None:
        if torch.tensor(self.source).dim() == 0 or torch.tensor(self.source).shape[-1] != k:
            raise UsageError(f"swap needs {k} coordinates of the source, one a row, or such a list for each position")

    def __call__(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        source = _like(self.source, x)
        if not self.by_position:
            return source.expand_as(x)
        if position is None:
            position = torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1])
        length = source.shape[-2]
        at = position.clamp(0, length - 1)
        if source.dim() == 3:  # one source a row of the batch
            taken = source.expand(len(x), -1, -1).gather(1, at[..., None].expand(*at.shape, x.shape[-1]))
        else:
            taken = source[at]
        return torch.where((position < length)[..., None], taken, x)

    def linear(self, k: int) -> Linear | None:
        """Where the source is one for all tokens."""
        return None if self.by_position else Linear(torch.zeros(k, dtype=torch.float64), _all(self.source, k))

    def in_basis(self, frame: Tensor) -> Map:
        return Swap(torch.tensor(self.source, dtype=frame.dtype) @ frame.mT)


@register_map("framed")
@dataclass(frozen=True)
class Framed:
    """Another map, of the coordinates c with x = frame c: what `fitted` makes of one that cannot be written anew."""

    map: Map
    frame: Numbers

    def __post_init__(self) -> None:
        _store(self, dims=2, frame=self.frame)

    def check(self, k: int) -> None:
        frame = torch.tensor(self.frame)
        if frame.shape != (k, k) or not bool((frame.diagonal() != 0).all()):
            raise UsageError(f"the frame of a map is a triangular matrix [{k}, {k}], not {list(frame.shape)}")
        check_map(self.map, k)

    @property
    def text(self) -> str:
        raise UsageError("a framed map is what a basis makes of another one: give that map itself, with the rows")

    @property
    def by_position(self) -> bool:
        return getattr(self.map, "by_position", False)

    @property
    def sees_activation(self) -> bool:
        return getattr(self.map, "sees_activation", False)

    @property
    def is_identity(self) -> bool:
        return getattr(self.map, "is_identity", False)

    def __call__(self, x: Tensor, **context: Tensor) -> Tensor:
        frame = _like(self.frame, x)
        c = torch.linalg.solve_triangular(frame, x.mT if x.dim() > 1 else x[:, None], upper=True).mT
        c = c if x.dim() > 1 else c[0]
        return self.map(c, **context) @ frame.mT

    def in_basis(self, frame: Tensor) -> Map:
        return Framed(self.map, frame @ torch.tensor(self.frame, dtype=frame.dtype))


def check_map(map: Map, k: int) -> None:
    """Raises UsageError for what is no map, and for one that does not take k coordinates."""
    if not is_dataclass(map):
        raise UsageError(f"a map is a dataclass of `steering.maps`, not {map!r}")
    if (check := getattr(map, "check", None)) is not None:
        check(k)
    for f in fields(map):
        value = getattr(map, f.name)
        if isinstance(value, tuple) and value and isinstance(value[0], float) and len(value) != k:
            raise UsageError(f"the {f.name} of {map_text(map)} has {len(value)} numbers, but there are {k} rows")


def fitted(rows: Tensor, map: Map) -> tuple[Tensor, Map]:
    """An orthonormal basis [d, k], float64, of given rows [k, d], and the map of coordinates in it that does what `map`
    does with the rows. Raises UsageError for rows that are not independent, and where the map needs another k."""
    k = len(rows)
    check_map(map, k)
    wide = rows.detach().cpu().double()
    if not torch.isfinite(wide).all():
        raise UsageError("the vector holds NaN or infinite numbers")
    if isinstance(map, Shift):  # several rows add up to one
        wide, map = (_row(map.amount, wide) @ wide)[None], Shift(1.0)
    if len(wide) == 1:  # by hand, so that the basis times the norm rounds to the very row
        norm = wide.norm()
        if norm == 0 and isinstance(map, Shift):
            return torch.zeros_like(wide).T, Shift(0.0)
        basis, frame = (wide / norm.clamp_min(1e-300)).T, norm[None, None]
    else:
        basis, frame = torch.linalg.qr(wide.T)
        sign = torch.where(frame.diagonal() < 0, -1.0, 1.0)
        basis, frame = basis * sign, frame * sign[:, None]
    if len(wide) > wide.shape[1] or not bool(
        (frame.diagonal() > 1e-9 * wide.norm(dim=-1).max().clamp_min(1e-300)).all()
    ):
        what = f"the {k} rows are not independent" if k > 1 else "the vector is zero, or too long"
        raise UsageError(f"{what}: {map_text(map)} acts in the {k} {plural(k, 'dimension')} that they span")
    if not isinstance(map, Shift) and bool((frame - torch.eye(k, dtype=frame.dtype)).abs().max() < 1e-6):
        return basis, map  # orthonormal, as far as float32 tells
    return basis, map.in_basis(frame) if hasattr(map, "in_basis") else Framed(map, frame)


def parameters(map: Map) -> dict[str, Any]:
    """The numeric parameters of a map, by name: what differs between maps that are computed together."""
    return {f.name: v for f in fields(map) if isinstance(v := getattr(map, f.name), (float, tuple)) or is_dataclass(v)}


def kind(map: Map) -> Key:
    """Equal for maps that can be computed together: the same class, shapes and settings."""
    numeric = parameters(map)
    shapes = [(n, kind(v) if is_dataclass(v) else tuple(torch.tensor(v).shape)) for n, v in numeric.items()]
    fixed = [(f.name, getattr(map, f.name)) for f in fields(map) if f.name not in numeric]
    return (type(map), *shapes, *fixed)


def stacked(maps: Sequence[Map], dtype: torch.dtype, device: torch.device | str) -> Map:
    """Maps of one kind as one, whose parameters are tensors with a line for each: [n, 1, 1], [n, 1, k] or [n, a, b]."""
    result = object.__new__(type(maps[0]))
    numeric = parameters(maps[0])
    for f in fields(maps[0]):
        values = [getattr(map, f.name) for map in maps]
        if f.name not in numeric:
            value = values[0]
        elif is_dataclass(values[0]):
            value = stacked(values, dtype, device)
        else:
            value = torch.tensor(values, dtype=torch.float64)
            value = value.reshape(len(maps), *[1] * (3 - value.dim()), *value.shape[1:]).to(device, dtype)
        object.__setattr__(result, f.name, value)
    return result


def selected(map: Map, index: Tensor) -> Map:
    """The lines of a `stacked` map for each row of a batch."""
    result = object.__new__(type(map))
    for f in fields(map):
        value = getattr(map, f.name)
        if isinstance(value, Tensor):
            value = value[index.to(value.device)]
        elif is_dataclass(value):
            value = selected(value, index)
        object.__setattr__(result, f.name, value)
    return result


def called(map: Map, x: Tensor, h: Tensor, position: Tensor | None) -> Tensor:
    """The map of the coordinates x [..., k] of the activations h [..., d], with what else it asks for by its attributes
    `by_position` and `sees_activation`."""
    context: dict[str, Any] = {}
    if getattr(map, "by_position", False):
        context["position"] = position
    if getattr(map, "sees_activation", False):
        context["h"] = h
    return map(x, **context)


def is_map(name: str) -> bool:
    """Whether text may name a map so."""
    return name in NAMED or name != "framed" and MAPS.knows(name)


def parse_map(text: Map | str) -> Map:
    """A map from its text, such as "clip(-1, 2)" or "ablate"; a map is returned as it is. Raises UsageError."""
    if not isinstance(text, str):
        if not is_dataclass(text) or isinstance(text, type):
            raise UsageError(f"a map is a text like 'clip(-1, 2)' or a dataclass of `steering.maps`, not {text!r}")
        return text
    name, arguments = read_call(text)
    if not is_map(name):
        names = ", ".join(sorted({*NAMED, *MAPS} - {"framed"}))
        raise UsageError(f"unknown map {name!r}: expected one of {names}")
    return made(name, NAMED.get(name) or MAPS[name], arguments)


def map_text(map: Map) -> str:
    """A map as it is written behind `|`, for example "clip(-1, 2)"."""
    if (text := getattr(map, "text", None)) is not None:
        return str(text)
    settable = [f for f in fields(map) if f.init]
    while settable and getattr(map, settable[-1].name) == settable[-1].default:
        settable.pop()
    return call_text(MAPS.name_of(type(map)), *(getattr(map, f.name) for f in settable))


def _store(map: Map, dims: int = 1, finite: bool = True, **values: Any) -> None:
    """Keep parameters as numbers or nested tuples of them, with no more than `dims` dimensions."""
    for name, value in values.items():
        object.__setattr__(map, name, numbers(value))
        what = f"the {name} of {MAPS.name_of(type(map))}"
        try:
            tensor = torch.tensor(getattr(map, name), dtype=torch.float64)
        except ValueError:
            raise UsageError(f"{what} holds lists of unequal lengths") from None
        if tensor.dim() > dims:
            raise UsageError(f"{what} must be {'a number or a list' if dims == 1 else 'a matrix, a list or a number'}")
        if finite and not bool(tensor.isfinite().all()):
            raise UsageError(f"{what} must be finite")


def _flat(value: Any) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _like(value: Any, x: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=x.dtype, device=x.device)


def _row(value: Numbers, frame: Tensor) -> Tensor:
    return torch.tensor(value, dtype=frame.dtype).expand(len(frame))


def _all(value: Numbers, k: int) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).expand(k)


def _diagonal(frame: Tensor) -> Tensor | None:
    """The diagonal of a matrix that has nothing else, up to rounding."""
    diagonal = frame.diagonal()
    return diagonal if (frame - diagonal.diag()).abs().max() <= 1e-9 * diagonal.abs().max() else None
