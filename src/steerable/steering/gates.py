"""Gates: which tokens an intervention touches, by the state of the running sequences and by activations.

`tokens` says what thinking, answer, boundary and the other kinds of tokens are.

A gate on activations (`when`, `probe`) compares each token's activation at a site with a threshold. It reads the
activation as it arrives there in the same forward pass, before anything is done at that site; what was done at earlier
sites is in it. The site is that of the intervention or an earlier one, so that the answer is known in time. `latched`
asks such a gate at the last token of the prompt alone, and holds the answer until the next prompt ends.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from keyword import iskeyword
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerable.steering.automaton import Automaton, break_automaton, break_steps
from steerable.steering.plain import Registry, call_text, is_index, made, number_text, value_of
from steerable.steering.site import Site
from steerable.steering.tokens import Tokens
from steerable.store.errors import UsageError
from steerable.store.text import one_line


@dataclass(frozen=True)
class Reading:
    """What a gate on activations compares: the coordinate of a token's activation along a vector, counted in vectors
    (<h, v> / <v, v>), or a probe's score, 1 / (1 + exp(-<h, v> - bias)).

    vectors: site, float32 bytes of v, bias. name: what text calls it.
    """

    name: str
    vectors: tuple[tuple[Site, bytes, float], ...]
    is_probe: bool = False

    def __post_init__(self) -> None:
        if not self.vectors:
            raise UsageError("a gate on activations needs a vector at one site at least")
        for site, content, bias in self.vectors:
            v = _vector(content)
            if not (bool(v.isfinite().all()) and bool(v.any()) and math.isfinite(bias)):
                raise UsageError(
                    f"a gate compares with one finite vector [d] other than zero and a finite bias, and {self.name!r} "
                    f"has none at {site}"
                )

    def at(self, site: Site) -> Reading:
        """For an intervention at a site: the reading there, or at the last site before it. Raises UsageError."""
        sites = [entry for entry in sorted(self.vectors) if entry[0] <= site]
        if not sites:
            raise UsageError(
                f"{self.name!r} is read at {min(self.vectors)[0]}, which comes after {site}: a gate reads the "
                "activation at the site of its intervention or at an earlier one"
            )
        return replace(self, vectors=(sites[-1],))

    @property
    def site(self) -> Site:
        return self.vectors[0][0]

    @property
    def width(self) -> int:
        return len(self.vectors[0][1]) // 4

    def weight(self) -> Tensor:
        """[d] float64: the reading is <h, weight> + bias."""
        v = _vector(self.vectors[0][1])
        return v if self.is_probe else v / (v @ v).clamp_min(1e-300)


def _vector(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, "<f4").astype("f8"))


_SIGNS: dict[str, tuple[float, bool]] = {">": (1.0, False), ">=": (1.0, True), "<": (-1.0, False), "<=": (-1.0, True)}


@dataclass(frozen=True)
class Gate:
    """A set of tokens. Called with `Tokens` it gives a bool mask [B, T]; combine with `&`, `|` and `~`.

    `str` gives text that `parse_gate` reads back. Gates on activations are asked with `opened`, which says where each
    of their parts `when` and `probe` is open.
    """

    op: str
    parts: tuple[Gate, ...] = ()
    args: tuple[Any, ...] | None = None

    def __and__(self, other: Gate) -> Gate:
        return Gate("&", (self, other))

    def __or__(self, other: Gate) -> Gate:
        return Gate("|", (self, other))

    def __invert__(self) -> Gate:
        return Gate("~", (self,))

    @property
    def name(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if self.op == "~":
            inner = str(self.parts[0])
            return f"~({inner})" if self.parts[0].op in "&|" else f"~{inner}"
        if self.op == "latched":
            return f"latched({self.parts[0]})"
        if self.op in ("&", "|"):
            left, right = self.parts
            # & binds tighter than |; both group to the left
            wrap_left = self.op == "&" and left.op == "|"
            wrap_right = right.op == "|" or right.op == self.op
            return f"{f'({left})' if wrap_left else left} {self.op} {f'({right})' if wrap_right else right}"
        if self.reads:
            reading, comparison, threshold = self.args or ()
            return f"{self.op}({quoted(reading.name)} {comparison} {number_text(threshold)})"
        return self.op if self.op == "boundary" else call_text(self.op, *(self.args or ()))

    def __call__(self, tokens: Tokens, opened: Callable[[Gate], Tensor] | None = None) -> Tensor:
        """The mask [B, T] of the selected tokens; padding is never selected."""
        match self.op:
            case "&":
                return self.parts[0](tokens, opened) & self.parts[1](tokens, opened)
            case "|":
                return self.parts[0](tokens, opened) | self.parts[1](tokens, opened)
            case "~":
                return tokens.valid & ~self.parts[0](tokens, opened)
            case "latched":
                held = tokens.latched(self, self.parts[0](tokens, opened))
                return tokens.valid & held & (tokens.last_prompt | ~tokens.prompt)
            case "boundary":
                return self._boundary(tokens) if tokens.boundary is None else tokens.boundary
            case "when" | "probe":
                if opened is None:
                    raise UsageError(f"{self} depends on activations: only a steered forward pass knows them")
                return tokens.valid & opened(self)
        return tokens.valid & GATES[self.op](tokens, *(self.args or ()))

    def _boundary(self, tokens: Tokens) -> Tensor:
        """For tokens of a state that does not follow paragraph breaks: sequences that begin with this call."""
        if self.breaks is None:
            raise UsageError("the selector 'boundary' needs the tokenizer: pass tokenizer= to steer")
        begins = (tokens.valid & (tokens.position == 0)).any(1)
        if (tokens.valid.any(1) & ~begins).any():
            raise UsageError(
                "the selector 'boundary' must follow sequences from their start: make the SequenceState with breaks="
            )
        return self.breaks.advance(torch.zeros_like(tokens.ids[:, 0]), tokens.ids, tokens.valid)[0] > 0

    @property
    def breaks(self) -> Automaton | None:
        """What finds paragraph breaks for the `boundary` in it; None where there is none or it is not resolved."""
        if self.op == "boundary":
            return None if self.args is None else break_automaton(self.args)
        return next((breaks for part in self.parts if (breaks := part.breaks) is not None), None)

    @property
    def reads(self) -> bool:
        """Whether this very gate compares activations."""
        return self.op in ("when", "probe")

    @property
    def readings(self) -> tuple[Gate, ...]:
        """The parts that compare activations."""
        return (self,) if self.reads else tuple(leaf for part in self.parts for leaf in part.readings)

    @property
    def latches(self) -> tuple[Gate, ...]:
        """The parts that are decided at the end of a prompt."""
        return (self,) * (self.op == "latched") + tuple(latch for part in self.parts for latch in part.latches)

    def uses(self, *ops: str) -> bool:
        """Whether one of these gates occurs in this one."""
        return self.op in ops or any(part.uses(*ops) for part in self.parts)

    def at(self, site: Site) -> Gate:
        """The gate of an intervention at a site: activations are read there, or at the last site before it that the
        gate knows. Raises UsageError where there is none."""
        if self.reads:
            reading, *rest = self.args or ()
            return replace(self, args=(reading.at(site), *rest))
        return replace(self, parts=tuple(part.at(site) for part in self.parts)) if self.parts else self

    def line(self) -> tuple[Tensor, float, bool]:
        """Of a gate on activations: weight [d] float64, bias, and whether equality opens it; it is open where
        <h, weight> + bias is more than 0."""
        reading, comparison, threshold = self.args or ()
        sign, equal = _SIGNS[comparison]
        return sign * reading.weight(), sign * (reading.vectors[0][2] - _linear(threshold, reading.is_probe)), equal


Selector = Gate


def _linear(threshold: float, is_probe: bool) -> float:
    """The threshold of what stands inside a probe's sigmoid."""
    return float(torch.tensor(threshold, dtype=torch.float64).logit()) if is_probe else threshold


def quoted(name: str) -> str:
    """A direction's name in text: as it is where it reads back so, else in quotes, as JSON writes it."""
    plain = all(part.isidentifier() and not iskeyword(part) for part in name.split("."))
    return name if plain else json.dumps(name, ensure_ascii=False)


GATES = Registry("steerable.gates")
"""Functions of `Tokens`, and of the arguments that are written behind the name, which give masks [B, T]."""


def register_gate(name: str) -> Callable[[Any], Any]:
    """Make a function `(tokens, *arguments) -> mask [B, T]` known as the gate of this name; a decorator. Packages may
    name theirs as entry points of the group `steerable.gates` instead."""
    return GATES.registering(name)


for _field in ("prompt", "thinking", "answer", "last_prompt"):
    GATES[_field] = lambda tokens, _field=_field: getattr(tokens, _field)
GATES["all"] = lambda tokens: tokens.valid
GATES["generated"] = lambda tokens: ~tokens.prompt


@register_gate("positions")
def _positions(tokens: Tokens, start: int, stop: int) -> Tensor:
    return (tokens.position >= start) & (tokens.position < stop)


@register_gate("tokens")
def _with_ids(tokens: Tokens, *ids: int) -> Tensor:
    return torch.isin(tokens.ids, _on(ids, tokens.ids.device))


@lru_cache(maxsize=64)
def _on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ids, device=device)


def tokens(*ids: int) -> Gate:
    """Tokens with one of these ids."""
    if not ids or not all(map(is_index, ids)):
        raise UsageError("tokens(...) needs one or more token ids, each 0 or more")
    return Gate("tokens", args=tuple(sorted(set(ids))))


def positions(start: int, stop: int) -> Gate:
    """Tokens start, ..., stop - 1 of each row, padding not counted."""
    if not (is_index(start) and is_index(stop) and start < stop):
        raise UsageError(f"positions({start}, {stop}) is empty: expected 0 <= start < stop")
    return Gate("positions", args=(start, stop))


def when(vectors: Any, comparison: str, threshold: float, name: str = "") -> Gate:
    """Tokens whose coordinate along a vector is on one side of a threshold.

    vectors: a Direction, or a mapping of sites to vectors [d]. An intervention at a site reads the vector of this site,
        or that of the last site before it. comparison: ">", ">=", "<" or "<=".
    threshold: in lengths of the vector: the coordinate is <h, v> / <v, v>, the projection itself where ||v|| = 1.
    """
    return _comparing("when", vectors, comparison, threshold, name, {})


def probe(
    weights: Any, comparison: str, threshold: float, bias: float | Mapping[Site, float] = 0.0, name: str = ""
) -> Gate:
    """Tokens of which a linear probe's score, 1 / (1 + exp(-<h, weight> - bias)), is on one side of a threshold.

    weights: as the vectors of `when`. threshold: strictly between 0 and 1. bias: one number, or one for each site.
    """
    if not 0 < threshold < 1:
        raise UsageError(f"a probe's threshold is a probability between 0 and 1, not {threshold}")
    return _comparing("probe", weights, comparison, threshold, name, bias)


def latched(gate: Gate) -> Gate:
    """A condition that is asked once for each prompt: open from the last token of the prompt on, over the whole answer,
    where the gate is open at that token. A further prompt of a conversation asks anew; within prompts it is shut.

    gate: one with `when` or `probe`, alone or combined: latched(when(a > 0.4) & ~when(b > 1)). Raises UsageError for a
        gate that reads no activation.
    """
    if not gate.readings:
        raise UsageError(
            f"latched({gate}) holds no condition on activations: expected one with when(...) or probe(...)"
        )
    return Gate("latched", (gate,))


def _comparing(op: str, vectors: Any, comparison: str, threshold: float, name: str, bias: Any) -> Gate:
    if comparison not in _SIGNS:
        raise UsageError(f"{comparison!r} is no comparison: expected one of {', '.join(_SIGNS)}")
    if not torch.isfinite(torch.tensor(float(threshold))):
        raise UsageError(f"the threshold of a gate must be a finite number, not {threshold}")
    entries = []
    for site, v in getattr(vectors, "vectors", vectors).items():
        flat = v.detach().to("cpu", torch.float32).reshape(-1)
        if v.numel() != v.shape[-1]:
            raise UsageError(f"a gate compares with one vector [d], and has {v.numel() // v.shape[-1]} at {site}")
        offset = bias.get(site, 0.0) if isinstance(bias, Mapping) else bias
        entries.append((site, flat.numpy().astype("<f4").tobytes(), float(offset)))
    name = name or getattr(vectors, "behaviour", "") or "direction"
    return Gate(op, args=(Reading(name, tuple(sorted(entries)), op == "probe"), comparison, float(threshold)))


class selectors:
    """The gates by name; see `Tokens` for what each field means."""

    all = Gate("all")
    prompt = Gate("prompt")
    generated = Gate("generated")
    thinking = Gate("thinking")
    answer = Gate("answer")
    last_prompt = Gate("last_prompt")
    boundary = Gate("boundary")  # needs `resolve`
    tokens = staticmethod(tokens)
    positions = staticmethod(positions)
    when = staticmethod(when)
    probe = staticmethod(probe)
    latched = staticmethod(latched)


_NAMES = ("all", "prompt", "generated", "thinking", "answer", "last_prompt", "boundary")


def resolve(gate: Gate, tokenizer: Any) -> Gate:
    """Fill in what a gate needs to know of the vocabulary: the tokens that `boundary` follows.

    Raises UsageError when no sequence of tokens spells a paragraph break, since the gate could never match.
    """
    if gate.op == "boundary" and gate.args is None:
        if not (steps := break_steps(tokenizer)):
            raise UsageError(
                "the selector 'boundary' never matches: no tokens of this vocabulary spell a paragraph break, two "
                "newlines with nothing but blanks between them"
            )
        return Gate("boundary", args=steps)
    return Gate(gate.op, tuple(resolve(part, tokenizer) for part in gate.parts), gate.args)


class GateError(UsageError):
    """A text that is no gate; `column` says where, from 0."""

    column = 0


def parse_gate(text: str | Gate, directions: Callable[[str], Any] | None = None) -> Gate:
    """Read the text of a gate, such as "thinking & ~boundary".

    Args:
        text: names, tokens(i, ...), positions(start, stop), when(name > 0.4), probe(name > 0.5), latched(...) around
            these two, and the gates of other packages, combined by & | ~ and parentheses; `~` binds tightest, then `&`,
            then `|`. A gate is returned.
        directions: gives the direction that a name in `when` or `probe` means.

    Returns:
        The gate; its `str` reads back as the same.

    Raises:
        UsageError: for a text that is none; it says the column.

    Example:
        >>> str(st.parse_selector("(answer | thinking) & ~positions(0, 4)"))
        '(answer | thinking) & ~positions(0, 4)'
    """
    if isinstance(text, Gate):
        return text
    if not isinstance(text, str):
        raise UsageError(f"a gate is a text like 'thinking & ~boundary' or a Gate, not {text!r}")
    line = re.sub(r"[\r\n]", " ", text.strip())
    try:
        return _gate(ast.parse(line, mode="eval").body, line, directions)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, _Misread):
            why, column = str(error), len(line.encode()[: error.column].decode())
        elif isinstance(error, SyntaxError):
            why, column = error.msg, (error.offset or len(line) + 1) - 1
        else:
            why, column = "it is nested too deeply", 0
        raised = GateError(
            f"{one_line(text, 80)!r} is not a selector ({why}): expected names among {', '.join(_NAMES)}, tokens(...), "
            "positions(a, b), when(name > x), combined with & | ~ and parentheses"
        )
        raised.column = column + len(text) - len(text.lstrip())
        raise raised from None


parse_selector = parse_gate


class _Misread(ValueError):
    """`column` counts bytes of UTF-8, as `ast` does."""

    def __init__(self, node: ast.expr, why: str) -> None:
        super().__init__(why)
        self.column = node.col_offset


def _gate(node: ast.expr, text: str, directions: Callable[[str], Any] | None) -> Gate:
    match node:
        case ast.Name() if node.id in _NAMES:
            return Gate(node.id)
        case ast.UnaryOp(op=ast.Invert()):
            return ~_gate(node.operand, text, directions)
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            left, right = (_gate(part, text, directions) for part in (node.left, node.right))
            return left & right if isinstance(node.op, ast.BitAnd) else left | right
        case ast.Call(func=ast.Name(id="when" | "probe" as op), args=[ast.Compare(ops=[_]) as compared], keywords=[]):
            return _comparison(op, compared, text, directions)
        case ast.Call(func=ast.Name(id="latched"), args=[inner], keywords=[]):
            try:
                return latched(_gate(inner, text, directions))
            except UsageError as error:
                raise _Misread(node, str(error)) from None
        case ast.Call(func=ast.Name(id="when" | "probe" as op)):
            raise _Misread(node, f"{op} compares a direction with a number: {op}(name > 0.4)")
        case ast.Call(func=ast.Name(), keywords=[]) if node.args:
            name = node.func.id  # type: ignore[attr-defined]
            try:
                arguments = tuple(map(value_of, node.args))
                if name in ("tokens", "positions"):
                    return made(name, tokens if name == "tokens" else positions, arguments)  # type: ignore[no-any-return]
            except (ValueError, UsageError) as error:
                raise _Misread(node, str(error)) from None
            if name not in _NAMES and GATES.knows(name):
                return Gate(name, args=arguments)
            raise _Misread(node, f"unknown name {name!r}" if name not in _NAMES else f"{name} takes no arguments")
        case ast.Name() if node.id not in ("tokens", "positions", "when", "probe") and GATES.knows(node.id):
            return Gate(node.id)
    raise _Misread(node, f"unknown name {node.id!r}" if isinstance(node, ast.Name) else "not a gate")


_COMPARISONS = {ast.Gt: ">", ast.GtE: ">=", ast.Lt: "<", ast.LtE: "<="}


def _comparison(op: str, node: ast.Compare, text: str, directions: Callable[[str], Any] | None) -> Gate:
    left, right = node.left, node.comparators[0]
    name = left.value if isinstance(left, ast.Constant) else ast.get_source_segment(text, left)
    if directions is None or not isinstance(name, str):
        raise _Misread(left, f"no direction is known as {name!r}")
    try:
        comparison, threshold = _COMPARISONS[type(node.ops[0])], float(value_of(right))
    except (KeyError, ValueError, TypeError):
        raise _Misread(node, f"{op} compares a direction with a number by >, >=, < or <=") from None
    direction = directions(name)
    if op == "when":
        return when(direction, comparison, threshold, name)
    bias = getattr(direction, "stats", {}).get("bias", 0.0)
    if isinstance(bias, Mapping):
        bias = {Site.parse(site): value for site, value in bias.items()}
    return probe(direction, comparison, threshold, bias, name)
