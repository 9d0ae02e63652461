"""Programs lowered to tensor operations: the rows of a batch may each be steered by another one.

What is alike is computed together: at a site, all interventions with one kind of map form a group, and a row looks up
its vector, strength and parameters in the group's tables when the rows are assigned, not at each pass. Shifts, the
common case, are one addition; `changes.py` has the other maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerable.engines.hf.changes import Change, Mapped, Place, alike
from steerable.steering.gates import Gate, selectors
from steerable.steering.maps import Shift
from steerable.steering.schedule import PerRequest, Schedule
from steerable.steering.site import Site
from steerable.steering.spec import Intervention, Steering, rescaled
from steerable.steering.tokens import Tokens
from steerable.store.errors import SteerableError


class Table:
    """The interventions of all programs, by site and, where one program has several there, by their order."""

    def __init__(self, programs: Sequence[Steering]) -> None:
        self.groups: dict[Site, list[_Group]] = {}
        self.readings: dict[Site, _Readings] = {}
        levels: dict[tuple[Site, int], dict[Any, dict[int, Intervention]]] = {}
        for number, program in enumerate(programs):
            seen: dict[Site, int] = {}
            for i in program:
                level = seen[i.site] = seen.get(i.site, -1) + 1
                levels.setdefault((i.site, level), {}).setdefault((alike(i), i.rescale), {})[number] = i
        for (site, _), groups in sorted(levels.items(), key=lambda entry: entry[0]):
            made = [_Group(form, of, len(programs)) for ((form, *_), _), of in groups.items()]
            self.groups.setdefault(site, []).extend(made)
        leaves = dict.fromkeys(leaf for program in programs for i in program for leaf in i.gate.readings)
        for site in {leaf.args[0].site for leaf in leaves}:  # type: ignore[index]
            self.readings[site] = _Readings([leaf for leaf in leaves if leaf.args[0].site == site])  # type: ignore[index]
        self.sites = sorted({*self.groups, *self.readings})

    def plan(self, index: Tensor | None, strength: float | Tensor | None, factor: Tensor | None) -> Plan:
        """What the rows of the next passes go through. The arguments are those of `Handle.assign` and
        `Handle.set_strength`."""
        given = [x.detach().cpu() if isinstance(x, Tensor) else x for x in (index, strength, factor)]
        lengths = {name: len(x) for name, x in zip(_NAMES, given, strict=True) if isinstance(x, Tensor)}
        if len(set(lengths.values())) > 1:
            raise SteerableError("unequal numbers of rows: " + ", ".join(f"{n} of the {k}" for k, n in lengths.items()))
        plan = Plan(next(iter(lengths.items()), None))
        for site, groups in self.groups.items():
            steps = [step for group in groups if (step := group.step(plan, *given)) is not None]  # type: ignore[arg-type]
            if steps:
                plan.steps[site] = steps
        return plan


_NAMES = ("programs", "strength", "factor")


class Plan:
    """The steps of every site for one assignment of the rows."""

    def __init__(self, rows: tuple[str, int] | None) -> None:
        self.steps: dict[Site, list[Step]] = {}
        self.rows = rows
        self._windows: dict[Any, Window] = {}

    def window(self, window: Window) -> Window:
        """An equal window of another site, if there is one: what it selects is then computed once a pass."""
        return self._windows.setdefault(window.key, window)

    def check_rows(self, rows: int) -> None:
        """Raises SteerableError for a batch of another size than was assigned."""
        if self.rows is not None and self.rows[1] != rows:
            what = "the strength has" if self.rows[0] == "strength" else f"the {self.rows[0]} were assigned to"
            raise SteerableError(f"{what} {self.rows[1]} rows, but the batch has {rows}")


class _Readings:
    """The gates that read activations at one site."""

    def __init__(self, leaves: list[Gate]) -> None:
        self.leaves = {leaf: number for number, leaf in enumerate(leaves)}
        lines = [leaf.line() for leaf in leaves]
        self.weight = torch.stack([weight for weight, _, _ in lines], 1)
        self.bias = torch.tensor([bias for _, bias, _ in lines], dtype=torch.float64)
        self.equal = torch.tensor([equal for _, _, equal in lines])
        self._at: dict[Place, tuple[Tensor, Tensor, Tensor]] = {}

    def open(self, h: Tensor) -> Tensor:
        """Where each of them is open, [B, T, gates]."""
        wide = h.detach().to(torch.promote_types(h.dtype, torch.float32))
        place = (h.device, wide.dtype)
        if place not in self._at:
            weight, bias = (x.to(place[1]).to(place[0]) for x in (self.weight, self.bias))
            self._at[place] = weight, bias, self.equal.to(h.device)
        weight, bias, equal = self._at[place]
        score = wide @ weight + bias
        return (score > 0) | equal & (score == 0)


@dataclass
class Passing:
    """How one forward pass is steered: fixed when it begins, and the same when autograd repeats a part of it."""

    plan: Plan
    rows: int
    length: int
    valid: Tensor | None  # [B, T]; None: no padding
    tokens: Tokens | None  # None where no program asks what they are
    opened: dict[Site, tuple[_Readings, Tensor]] = field(default_factory=dict)
    _seen: dict[Any, Any] = field(default_factory=dict)

    def chosen(self, window: Window, device: torch.device) -> Chosen:
        """What a window selects of this pass."""
        key = (id(window), device)
        if key not in self._seen:
            chosen = window.choose(self, self.is_open).to(device)
            if window.reads:
                return chosen
            self._seen[key] = chosen
        return self._seen[key]  # type: ignore[no-any-return]

    def position(self, device: torch.device) -> Tensor | None:
        """[B, T] places of the tokens in their sequences."""
        return None if self.tokens is None else self.tokens.position.to(device)

    def is_open(self, leaf: Gate) -> Tensor:
        """Where a gate on activations is open in this pass, [B, T]."""
        site = leaf.args[0].site  # type: ignore[index]
        if site not in self.opened:
            raise SteerableError(f"the gate {leaf} reads {site}, which did not run before it was needed")
        readings, opened = self.opened[site]
        return opened[..., readings.leaves[leaf]].to(self.tokens.ids.device)  # type: ignore[union-attr]


@dataclass
class Chosen:
    """mask: [B, T] where something is done; None: everywhere. factor: [B, T] of the strength; None: 1. touched: [B, T]
    of tokens that count as touched; None: all. count: how many those are. is_shut: it is known that nothing is done."""

    mask: Tensor | None
    factor: Tensor | None
    touched: Tensor | None
    count: int | Tensor
    is_shut: bool = False

    def to(self, device: torch.device) -> Chosen:
        mask, factor, touched = (None if x is None else x.to(device) for x in (self.mask, self.factor, self.touched))
        return Chosen(mask, factor, touched, self.count, self.is_shut)


@dataclass(eq=False)
class Window:
    """Gates and schedules of the rows of a batch. gate, schedule: [B] the number of each row's; None: the first one.
    on: [B] rows that are steered at all; None: all."""

    gates: tuple[Gate, ...]
    schedules: tuple[Schedule | None, ...]
    gate: Tensor | None = None
    schedule: Tensor | None = None
    on: Tensor | None = None

    def __post_init__(self) -> None:
        rows = [None if x is None else bytes(x.numpy()) for x in (self.gate, self.schedule, self.on)]
        self.key = (self.gates, self.schedules, *rows)
        self.reads = any(gate.readings for gate in self.gates)

    def choose(self, current: Passing, is_open: Callable[[Gate], Tensor]) -> Chosen:
        tokens, factor = current.tokens, None
        mask: Tensor | None = None
        if tokens is not None:
            masks = [None if g == selectors.all else g(tokens, is_open) for g in self.gates]
            if self.gate is None:
                mask = masks[0]
            else:
                mask = _by_row([tokens.valid if m is None else m for m in masks], self.gate)
            if any(s is not None for s in self.schedules):
                one = torch.ones(tokens.ids.shape, device=tokens.ids.device)
                factors = [one if s is None else s.over(tokens) for s in self.schedules]
                factor = factors[0] if self.schedule is None else _by_row(factors, self.schedule)
                mask = factor != 0 if mask is None else mask & (factor != 0)
        touched = current.valid if mask is None else mask if current.valid is None else mask & current.valid
        if self.on is not None:
            on = self.on[:, None].expand(current.rows, current.length)
            touched = on if touched is None else touched & on.to(touched.device)
        count = current.rows * current.length if touched is None else touched.sum()
        is_shut = False
        if mask is not None and mask.device.type == "cpu":  # elsewhere the question would wait for the device
            is_shut = not bool(mask.any())
            mask = None if bool(mask.all()) else mask
        return Chosen(mask, factor, touched, count, is_shut)


def _by_row(choices: list[Tensor], number: Tensor) -> Tensor:
    number = number.to(choices[0].device)
    return torch.stack(choices)[number, torch.arange(len(number), device=number.device)]


class _Group:
    """Interventions at one site, one of each program that has one in the group, that are computed together."""

    def __init__(self, form: Any, of: dict[int, Intervention], programs: int) -> None:
        self.form = form
        self.items = list(dict.fromkeys(of.values()))
        number = {item: n for n, item in enumerate(self.items)}
        self.member = torch.full((programs,), -1)
        for program, item in of.items():
            self.member[program] = number[item]
        first = self.items[0]
        self.is_shift, self.rescale = isinstance(first.map, Shift), first.rescale
        self.layer = torch.tensor([i.schedule.at(i.site.layer) for i in self.items], dtype=torch.float64)
        for n, item in enumerate(self.items):
            if getattr(item.map, "is_identity", False):
                self.layer[n] = 0.0
        self.strength = torch.tensor([i.strength for i in self.items], dtype=torch.float64)
        asks = [i.schedule if isinstance(i.schedule, PerRequest) else None for i in self.items]
        self.asks = torch.tensor([s is not None for s in asks])
        self.default = torch.tensor([1.0 if s is None else s.default for s in asks], dtype=torch.float64)
        self.gates = list(dict.fromkeys(i.gate for i in self.items))
        schedules = [i.schedule if i.schedule.needs_tokens else None for i in self.items]
        self.schedules = list(dict.fromkeys(schedules))
        self.gate_of = torch.tensor([self.gates.index(i.gate) for i in self.items])
        self.schedule_of = torch.tensor([self.schedules.index(s) for s in schedules])
        self._tables: dict[Place, Any] = {}

    def step(
        self, plan: Plan, index: Tensor | None, strength: float | Tensor | None, factor: Tensor | None
    ) -> Step | None:
        """What this group does to the rows; None where that is nothing."""
        member = self.member[0] if index is None else torch.where(index >= 0, self.member[index.clamp(min=0)], -1)
        slot = member.clamp(min=0)
        base = self.strength[slot] if strength is None else torch.as_tensor(strength, dtype=torch.float64)
        asked = self.default[slot] if factor is None else torch.where(self.asks[slot], factor.double(), 1.0)
        s = base * self.layer[slot] * asked
        on = (member >= 0) & (s != 0)
        if not bool(on.any()):
            return None
        if on.dim() == 0:
            return Step(self, int(slot), float(s), None, plan.window(self._window(slot, None)))
        all_on = bool(on.all())
        used = slot.expand_as(on)[on].unique()
        if len(used) == 1:
            slot = used[0]
        rows = None if all_on else on
        same = all_on and bool((s == s[0]).all())
        return Step(
            self,
            int(slot) if slot.dim() == 0 else slot,
            float(s[0]) if same else s,
            rows,
            plan.window(self._window(slot, rows)),
        )

    def _window(self, slot: Tensor, on: Tensor | None) -> Window:
        def part(choices: list[Any], of: Tensor) -> tuple[tuple[Any, ...], Tensor | None]:
            number = of[slot]
            used = (number if number.dim() == 0 or on is None else number[on]).unique()
            if len(used) == 1:
                return (choices[int(used[0])],), None
            return tuple(choices), number

        gates, gate = part(self.gates, self.gate_of)
        schedules, schedule = part(self.schedules, self.schedule_of)
        return Window(gates, schedules, gate, schedule, on)

    def tables(self, place: Place) -> Any:
        """What `changes.py` makes of the items."""
        if place not in self._tables:
            self._tables[place] = self.form.of(self.items, place)
        return self._tables[place]


class Step:
    """A group's interventions in the rows of a batch. slot, strength: one for all rows, or [B]. on: [B] the rows that
    are steered; None: all."""

    def __init__(
        self, group: _Group, slot: int | Tensor, strength: float | Tensor, on: Tensor | None, window: Window
    ) -> None:
        self.group, self.slot, self.strength, self.on, self.window = group, slot, strength, on, window
        self._at: dict[Place, Any] = {}

    def run(self, h: Tensor, chosen: Chosen, current: Passing, measured: bool = False) -> tuple[Tensor, Tensor | None]:
        """The new h [B, T, d], and, where that is measured and h is rescaled, what rescaling took away again.

        The arithmetic is in float32 (float64 if h is); what is not selected keeps its bits.
        """
        wide = h.float() if h.dtype in (torch.bfloat16, torch.float16) else h
        if self.group.is_shift and not self.group.rescale:
            return self._shift(h, wide, chosen), None
        change, rows = self._prepared((wide.device, wide.dtype))
        mask, factor, position = chosen.mask, chosen.factor, current.position(h.device)
        before = h
        if rows is not None:
            mask, factor, position = (None if x is None else x[rows] for x in (mask, factor, position))
            before, wide = h[rows], wide[rows]
        added = change(wide, position)
        if factor is not None:
            added = factor[..., None].to(added.dtype) * added
        new, taken = wide + added, None
        if self.group.rescale:
            sum_, new = new, rescaled(new, wide)
            if self.group.form is Mapped:  # may leave a token as it is, which then keeps its bits
                new = torch.where((added != 0).any(-1, keepdim=True), new, wide)
            taken = sum_ - new if measured else None
        new = new.to(h.dtype)
        if mask is not None:
            new = torch.where(mask[..., None], new, before)
            taken = None if taken is None else torch.where(mask[..., None], taken, 0.0)
        if rows is None:
            return new, taken
        if taken is not None:
            taken = torch.zeros_like(h, dtype=taken.dtype).index_copy(0, rows, taken)
        return h.index_copy(0, rows, new), taken

    def _shift(self, h: Tensor, wide: Tensor, chosen: Chosen) -> Tensor:
        amount = self._prepared((wide.device, wide.dtype))
        if chosen.factor is not None:
            amount = chosen.factor[..., None].to(amount.dtype) * amount
        if chosen.mask is not None:
            amount = torch.where(chosen.mask[..., None], amount, -0.0)  # x + -0.0 is x, bit for bit
        new = wide + amount
        return new if wide is h else new.to(h.dtype)

    def _prepared(self, place: Place) -> Any:
        """What does not depend on h: of plain shifts the vectors times their strengths, [d] or [B, 1, d]; else the
        change of the rows that are steered, and which those are."""
        if place not in self._at:
            is_plain = self.group.is_shift and not self.group.rescale
            self._at[place] = self._amount(place) if is_plain else self._parameters(place)
        return self._at[place]

    def _amount(self, place: Place) -> Tensor:
        vectors = self.group.tables(place).vector
        vector = vectors[self.slot, 0] if isinstance(self.slot, int) else vectors[self.slot.to(place[0])]
        if isinstance(self.strength, float):
            return self.strength * vector  # type: ignore[no-any-return]
        amount = self.strength.to(place[1]).to(place[0])[:, None, None] * vector
        return amount if self.on is None else torch.where(self.on.to(place[0])[:, None, None], amount, -0.0)

    def _parameters(self, place: Place) -> tuple[Change, Tensor | None]:
        rows = None if self.on is None else self.on.nonzero()[:, 0]
        slot, s = (x if rows is None or not isinstance(x, Tensor) else x[rows] for x in (self.slot, self.strength))
        s = s.to(place[1]).to(place[0])[:, None, None] if isinstance(s, Tensor) else s
        slot = slot.to(place[0]) if isinstance(slot, Tensor) else slot
        return self.group.tables(place).at(slot, s), None if rows is None else rows.to(place[0])
