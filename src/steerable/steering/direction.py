"""The artefact: a direction at one or more sites, with what is needed to use and judge it, and its file.

The file is safetensors: tensors "{site}.{layer}" float32 [d] or [k, d], metadata as strings (JSON where
nested). It is written here byte by byte, because the safetensors library orders metadata at random and equal
directions should have equal files; it is read with the safetensors library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from steerable.steering.gates import Gate, parse_gate, quoted
from steerable.steering.maps import MAPS, Map, Shift, fitted, map_text, parse_map
from steerable.steering.plain import decoded, encoded
from steerable.steering.schedule import SCHEDULES, Schedule, parse_schedule, schedule_text
from steerable.steering.site import Site
from steerable.steering.spec import Intervention, Program, Source, gate_from_json, gate_to_json
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import check_header, refuse_stand_in, strict_json, write_atomic
from steerable.store.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT, VERSION = "steerable.direction", "2"
UNITS = ("raw", "mean activation", "calibrated")
# what these sites hold has the width of the residual stream in every model
_STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
_ABOUT = ("data_sha256", "created_by", "licence")
_TEXT = ("model_id", "model_revision", "behaviour", "method", *_ABOUT)
_V1 = ("map", "gate", "strength")


@dataclass(eq=False, repr=False)
class Direction:
    """Vectors at sites of one model; equal where all fields are, and so the files' bytes.

    Directions that are added can be computed with: `-d` and `0.5 * d` have other vectors, `a + b` and `a - b` (of one
    model, at the same sites) what the two add at their own strengths, at strength 1. `d[3]` is `d.at(3)`.

    Attributes:
        vectors: {site: float32 [d]}, or [k, d] for a subspace.
        norms: {site: mean ||h||} of ordinary tokens (attention sinks left out), in the model's own units.
        map, gate, schedule, strength, rescale: how it steers by itself: see `steering`. map and schedule are texts
            ("ablate", "clip(-1, 2)"; "constant", "ramp(0, 1, 50)"), and so is a gate that does not read activations;
            all three may be given as objects as well. A map counts its coordinates in the rows of the vectors (`maps`).
        unit: what strength 1 is: "raw", the vector as its method made it; "mean activation", a vector with the norm of
            the mean activation; "calibrated", the dose at which a budget that `stats` states is reached.
        stats: anything JSON can hold.
        from_pairs: `st.contrast` as a constructor: `st.Direction.from_pairs(model, tokenizer, positive, negative)`.

    Example:
        >>> direction = st.Direction({st.Site("resid_post", 3): torch.ones(192)}, gate="thinking", strength=0.5)
        >>> str(direction.steering(where="answer"))
        '0.5 direction@answer'
        >>> (2 * direction - direction)[3][:2]
        tensor([0.5000, 0.5000])
    """

    vectors: dict[Site, Tensor]
    model_id: str = ""
    model_revision: str = ""
    behaviour: str = ""
    method: str = ""
    map: Map = "shift"
    gate: Gate | str = "all"
    schedule: Schedule | str = "constant"
    strength: float = 1.0
    rescale: bool = False
    unit: str = "raw"
    norms: dict[Site, float] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    data_sha256: str = ""
    created_by: str = ""
    licence: str = ""
    # How directions are made is nothing that this room knows: the package's `__init__`, above all rooms, puts it here.
    from_pairs: ClassVar[Callable[..., Direction]]

    def __post_init__(self) -> None:
        if odd := [site for site in (*self.vectors, *self.norms) if not isinstance(site, Site)]:
            raise UsageError(f"a direction's vectors and norms are given for each Site, not for {odd[0]!r}")
        if texts := [key for key in _TEXT if not isinstance(getattr(self, key), str)]:
            raise UsageError(f"the {texts[0]} of a direction must be a text, not {getattr(self, texts[0])!r}")
        self.vectors = {site: _checked(site, self.vectors[site]) for site in sorted(self.vectors)}
        self.rescale = bool(self.rescale)
        try:
            self.norms = {site: float(self.norms[site]) for site in sorted(self.norms)}
            self.strength = float(self.strength)
        except (TypeError, ValueError, OverflowError):
            raise UsageError("a direction's strength and norms must be finite numbers") from None
        if not self.vectors:
            raise UsageError("a direction needs a vector at one site at least")
        widths = {int(v.shape[-1]) for site, v in self.vectors.items() if site.kind in _STREAM}
        if len(widths) > 1:
            matches = " and ".join(map(str, sorted(widths)[:3]))
            raise UsageError(f"a direction's vectors must have one width, that of the residual stream, not {matches}")
        if self.unit not in UNITS:
            raise UsageError(f"unknown unit {self.unit!r}: expected one of {', '.join(UNITS)}")
        if not math.isfinite(self.strength) or not all(math.isfinite(n) and n >= 0 for n in self.norms.values()):
            raise UsageError("a direction's strength and norms must be finite numbers, and no norm negative")
        self.map = map_text(parse_map(self.map))
        self.schedule = schedule_text(parse_schedule(self.schedule))
        gate = parse_gate(self.gate)
        self.gate = gate if gate.readings else str(gate)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Direction) and self.to_bytes() == other.to_bytes()

    def __repr__(self) -> str:
        sites, is_added = list(self.vectors), isinstance(parse_map(self.map), Shift)
        doses = self.dose().values() if is_added else ()  # what another map does is no dose
        where = str(sites[0]) if len(sites) == 1 else f"{sites[0]} ... {sites[-1]} ({len(sites)} sites)"
        ends = dict.fromkeys(f"{dose:.2g}" for dose in (min(doses), max(doses))) if doses else {}
        dose = f", dose {' to '.join(ends)}" if ends else ""
        about = f"{self.behaviour or 'no behaviour'}, {self.method or 'no method'}, {self.model_id or 'no model'}"
        return one_line(f"Direction({about}: {where}, {self.unit}, strength {self.strength:g}{dose})")

    __iter__ = None  # with `__getitem__` alone it would count as a sequence

    def __getitem__(self, where: Site | int) -> Tensor:
        return self.at(where)

    def __neg__(self) -> Direction:
        return self * -1.0

    def __mul__(self, factor: Any) -> Direction:
        if not isinstance(factor, Real):
            return NotImplemented
        if not isinstance(parse_map(self.map), Shift):
            raise UsageError(f"only directions that are added can be computed with, and this one's map is {self.map}")
        return self.scaled(float(factor))

    __rmul__ = __mul__

    def __add__(self, other: Direction) -> Direction:
        return self._plus(other, "+") if isinstance(other, Direction) else NotImplemented

    def __sub__(self, other: Direction) -> Direction:
        return self._plus(-other, "-") if isinstance(other, Direction) else NotImplemented

    def _plus(self, other: Direction, sign: str) -> Direction:
        """One direction that adds at strength 1 what the two add at their own strengths. sign: what its names say."""
        a, b = self * self.strength, other * other.strength
        if a.model_id and b.model_id and a.model_id != b.model_id:
            raise UsageError(f"directions of two models cannot be added: {a.model_id!r} and {b.model_id!r}")
        shapes = [{str(site): tuple(v.shape) for site, v in d.vectors.items()} for d in (a, b)]
        differing = [key for key in ("map", "gate", "schedule", "rescale") if getattr(a, key) != getattr(b, key)]
        if shapes[0] != shapes[1] or differing:
            what = f"the {differing[0]}" if differing else "the sites or shapes of their vectors"
            raise UsageError(f"two directions cannot be added where {what} differ: steer with both, in a list")
        return Direction(
            {site: v + b.vectors[site] for site, v in a.vectors.items()},
            model_id=a.model_id or b.model_id,
            model_revision=a.model_revision if a.model_revision == b.model_revision else "",
            behaviour=f" {sign} ".join(d.behaviour or "unnamed" for d in (a, b)),
            method=f" {sign} ".join(d.method or "unknown" for d in (a, b)),
            map=a.map,
            gate=a.gate,
            schedule=a.schedule,
            rescale=a.rescale,
            norms={**b.norms, **a.norms},
            licence=a.licence if a.licence == b.licence else "",
        )

    @property
    def layers(self) -> list[int]:
        return sorted({site.layer for site in self.vectors})

    def at(self, where: Site | int) -> Tensor:
        """The vector at a site, or at a layer that has only one site. Raises UsageError."""
        matches = [v for site, v in self.vectors.items() if where in (site, site.layer)]
        if len(matches) != 1:
            sites = ", ".join(map(str, self.vectors))
            raise UsageError(f"{'no' if not matches else 'more than one'} vector at {where}: there are {sites}")
        return matches[0]

    def only(self, layers: Iterable[int]) -> Direction:
        """The same direction at these layers alone. Raises UsageError where it has no vector there."""
        chosen = set(layers)
        if missing := sorted(chosen - set(self.layers)):
            raise UsageError(f"no vector at layer {missing[0]}: this direction has layers {self.layers}")
        part = self._with({site: v for site, v in self.vectors.items() if site.layer in chosen})
        is_less = self.unit == "calibrated" and part.layers != self.layers
        return replace(part, unit="raw") if is_less else part

    def steering(
        self,
        strength: float | None = None,
        layers: int | Iterable[int] | None = None,
        where: Gate | str | None = None,
        rescale: bool | None = None,
        *,
        map: Map | str | None = None,
        schedule: Schedule | str | None = None,
        name: str = "",
    ) -> Program:
        """What this direction does to a run, for any engine: an intervention for each of its sites.

        strength, where (the gate), rescale, map, schedule: None takes what the direction says. layers: which of its
        layers; None: all. name: what the text form calls it. Raises UsageError for rows that are not independent, for
        what the map does not take, and for a layer that it does not have.

        Example: `direction.steering(0.5, layers=[3], where="thinking")`.
        """
        chosen = self if layers is None else self.only(layers if isinstance(layers, Iterable) else [layers])
        phi = parse_map(self.map if map is None else map)
        gate = parse_gate(self.gate if where is None else where)
        source = Source(
            name or quoted(self.behaviour or "direction"), map_text(phi) if map_text(phi) != self.map else "",
            tuple(self.layers), str(self.gate), str(self.schedule), self.rescale, self.model_id, self.model_revision,
        )  # fmt: skip
        return Program(
            Intervention(
                site,
                *fitted(v[None] if v.dim() == 1 else v, phi),
                gate,
                parse_schedule(self.schedule if schedule is None else schedule),
                self.strength if strength is None else strength,
                self.rescale if rescale is None else rescale,
                source,
            )
            for site, v in chosen.vectors.items()
        )

    def scaled(self, factor: float) -> Direction:
        unit = self.unit if factor == 1 or factor == -1 and self.unit == "mean activation" else "raw"
        return replace(self._with({site: v * factor for site, v in self.vectors.items()}), unit=unit)

    def dose(self, strength: float | None = None) -> dict[Site, float]:
        """The relative dose ||s v|| / ||h|| at each site whose norm is known, h being an ordinary token's activation.

        strength: None takes the direction's own. A fixed strength is another dose in every model; about 0.1 is mild,
        and at a dose near 1 the vector is as long as the activation that it is added to.
        """
        s = abs(self.strength if strength is None else float(strength))
        return {
            site: s * float(v.double().norm()) / n for site, v in self.vectors.items() if (n := self.norms.get(site))
        }

    def rescaled_to(self, norms: Mapping[Site, float] | None = None) -> Direction:
        """Each vector with the given norm at its site (default: `self.norms`). Raises UsageError for a zero
        vector."""
        target = self.norms if norms is None else norms
        scaled = {}
        for site, v in self.vectors.items():
            norm = float(v.double().norm())
            if site not in target or norm == 0:
                why = "its vector is zero" if norm == 0 else "no norm is given"
                raise UsageError(f"cannot rescale at {site}: {why}")
            scaled[site] = (v.double() * (target[site] / norm)).float()
        return replace(self._with(scaled), unit="raw")

    def random_like(self, seed: int) -> Direction:
        """The control: random vectors of the same norm, and so the same dose, at the same sites, drawn on the CPU from
        the seed."""
        generator = torch.Generator().manual_seed(seed)
        random = {}
        for site, v in self.vectors.items():
            r = torch.randn(v.shape, generator=generator, dtype=torch.float64)
            random[site] = (r / r.norm(dim=-1, keepdim=True) * v.double().norm(dim=-1, keepdim=True)).float()
        unit = "raw" if self.unit == "calibrated" else self.unit
        return replace(self._with(random), method=f"random({seed}) like {self.method}", unit=unit, stats={})

    def cosine(self, other: Direction) -> dict[Site, float]:
        """Cosine at each site that both have; [k, d] vectors are taken as one. A zero vector gives 0."""
        shared = [site for site in self.vectors if site in other.vectors]
        if not shared:
            raise UsageError("the two directions have no site in common")
        pairs = {site: (self.vectors[site].double(), other.vectors[site].double()) for site in shared}
        for site, (a, b) in pairs.items():
            if a.shape != b.shape:
                raise UsageError(f"the vectors at {site} differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
        return {site: float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300)) for site, (a, b) in pairs.items()}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the length of the vectors by layer; and how well held-out pairs were told apart, where `stats` say so.

        Args:
            ax: matplotlib's axes to draw on; None makes a figure.

        Returns:
            The axes, with the lengths ||v||, as shares of the activations' mean ||h|| where `norms` has it. d' of every
            layer that `st.contrast` looked at is drawn on a second vertical axis.

        Raises:
            UsageError: matplotlib is not installed.

        Example:
            >>> direction.plot().get_xlabel()
            'layer'
        """
        try:
            from matplotlib import pyplot
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise UsageError("plot draws with matplotlib, which is not installed: pip install matplotlib") from error
        if ax is None:
            _, ax = pyplot.subplots(layout="constrained")
        lengths = self.dose(1)
        label = "relative dose ||v|| / ||h||"
        if set(lengths) != set(self.vectors):
            lengths, label = {site: float(v.double().norm()) for site, v in self.vectors.items()}, "norm ||v||"
        separation = {Site.parse(name): score for name, score in self.stats.get("separation", {}).items()}
        _by_layer(ax, lengths, label, "o-", "C0")
        if separation:
            _by_layer(ax.twinx(), separation, "held-out separation d'", "s--", "C1")
        ax.set(xlabel="layer", title=self.behaviour or self.method)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return ax

    def _with(self, vectors: dict[Site, Tensor]) -> Direction:
        return replace(self, vectors=vectors, norms=dict(self.norms), stats=dict(self.stats))

    def to_bytes(self) -> bytes:
        """The file's bytes; equal directions give equal bytes."""
        meta = {key: getattr(self, key) for key in _TEXT} | {"format": FORMAT, "version": VERSION}
        meta["unit"] = self.unit
        meta["steering"] = _dumps(
            {
                "map": encoded(parse_map(self.map), MAPS),
                "gate": gate_to_json(parse_gate(self.gate)),
                "schedule": encoded(parse_schedule(self.schedule), SCHEDULES),
                "strength": self.strength,
                "rescale": self.rescale,
            }
        )
        meta["norms"] = _dumps({str(site): n for site, n in self.norms.items()})
        meta["stats"] = _dumps(self.stats)
        header: dict[str, Any] = {"__metadata__": meta}
        data = bytearray()
        for site, v in self.vectors.items():
            start = len(data)
            data += v.numpy().astype("<f4").tobytes()
            header[str(site)] = {"dtype": "F32", "shape": list(v.shape), "data_offsets": [start, len(data)]}
        text = _encoded(json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False))
        text += b" " * (-len(text) % 8)  # so that the data are aligned
        return len(text).to_bytes(8, "little") + text + bytes(data)

    def save(self, path: str | Path) -> Path:
        """Write the file whole or not at all. Raises SteerableError when that fails, a full disk included."""
        return write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read a direction file. Raises UsageError when there is none, SteerableError when it is not
        sound."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not os.path.isfile(path):
            why = ": it is no regular file" if os.path.exists(path) else ""
            raise UsageError(f"there is no direction file {one_line(str(path), 200)}{why}")
        refuse_stand_in(path)
        try:
            check_header(path)
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise SteerableError(
                f"{path} is not a sound safetensors file ({error}): expected one written by Direction.save"
            ) from error
        try:
            vectors = {Site.parse(name): tensor for name, tensor in tensors.items()}
            return cls(**_fields(meta), vectors=vectors)
        except (UsageError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            why = one_line(str(error), 400)
            raise SteerableError(f"{path} is not a sound direction file: {why}") from error


def _by_layer(ax: Axes, values: Mapping[Site, float], label: str, style: str, colour: str) -> None:
    """A line a kind of site, over the layers, from zero."""
    for kind in dict.fromkeys(site.kind for site in values):
        rows = [(site.layer, value) for site, value in values.items() if site.kind == kind]
        ax.plot(*zip(*rows, strict=True), style, color=colour, label=kind)
    ax.set_ylabel(label, color=colour)
    lowest, highest = min(0.0, *values.values()), max(0.0, *values.values())
    margin = (highest - lowest or 1.0) / 20
    ax.set_ylim(lowest - margin * (lowest < 0), highest + margin)


def _fields(meta: dict[str, str]) -> dict[str, Any]:
    """The dataclass fields in a file's metadata. Raises ValueError."""
    version = meta.get("version")
    if meta.get("format") != FORMAT or version not in ("1", VERSION):
        matches = f"{meta.get('format', 'no format')} {version or ''}".strip()
        raise ValueError(f"its metadata say {matches!r}, expected '{FORMAT} {VERSION}' or 1")
    here = _V1 if version == "1" else ("steering", "unit")
    if unknown := sorted(set(meta) - {*_TEXT, *here, "norms", "stats", "format", "version"}):
        raise ValueError(f"unknown metadata key {unknown[0]!r}")
    texts: dict[str, Any] = {key: meta[key] for key in (*_TEXT, "map", "gate", "unit") if key in meta}
    if version == "1" and texts.get("map", "shift") != "shift":
        raise ValueError(f"unknown map {texts['map']!r}: version 1 knows 'shift'")
    numbers = {key: _read(meta, key, kind) for key, kind in (("norms", dict), ("stats", dict)) if key in meta}
    if version == "1":
        steering = {"strength": _read(meta, "strength", (int, float))} if "strength" in meta else {}
    else:
        steering = _steering(_read(meta, "steering", dict)) if "steering" in meta else {}
    norms = numbers.get("norms", {})
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in norms.values()):
        raise ValueError("metadata 'norms' must map sites to numbers")
    return texts | numbers | steering | {"norms": {Site.parse(site): n for site, n in norms.items()}}


def _read(meta: dict[str, str], key: str, kind: Any) -> Any:
    value = strict_json(meta[key])
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could not be written again
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"metadata {key!r} has the wrong type {type(value).__name__}")
    return value


def _steering(data: dict[str, Any]) -> dict[str, Any]:
    readers: dict[str, Any] = {
        "map": lambda value: decoded(value, MAPS, "map"),
        "gate": gate_from_json,
        "schedule": lambda value: decoded(value, SCHEDULES, "schedule"),
    }
    kinds: dict[str, Any] = {"strength": (int, float), "rescale": bool}
    if unknown := sorted(set(data) - set(readers) - set(kinds)):
        raise ValueError(f"unknown key {unknown[0]!r} in the steering")
    for key, kind in kinds.items():
        if key in data and (not isinstance(data[key], kind) or kind is not bool and isinstance(data[key], bool)):
            raise ValueError(f"the {key} of the steering has the wrong type {type(data[key]).__name__}")
    return {key: readers[key](value) if key in readers else value for key, value in data.items()}


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"a direction's texts must be Unicode: {error.reason}") from error


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"a direction's norms and stats must be finite and JSON-able: {error}") from error


def _checked(site: Site, vector: Tensor) -> Tensor:
    if not isinstance(vector, Tensor):
        raise UsageError(f"the vector at {site} is a {type(vector).__name__}: expected a tensor [d] or [k, d]")
    if vector.dim() not in (1, 2) or vector.numel() == 0:
        raise UsageError(f"the vector at {site} has shape {tuple(vector.shape)}: expected [d] or [k, d]")
    if not vector.is_floating_point():
        raise UsageError(f"the vector at {site} has type {vector.dtype}: expected float32")
    vector = vector.detach().to("cpu", torch.float32, copy=True).contiguous()  # one that is trained goes on changing
    if not torch.isfinite(vector).all():
        raise UsageError(f"the vector at {site} holds NaN or infinite numbers")
    return vector
