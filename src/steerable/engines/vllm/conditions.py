"""Gates on activations in a compiled graph: conditions in rows, and what a gate comes to for each of their answers.

A condition is a part `when` or `probe` of a gate. At every layer the graph asks each row of conditions, and their
answers, as the bits of a number, choose one of the strengths that a token was given beforehand. So all that `&`, `|`,
`~`, `latched` and gates on tokens say is worked out before the pass, in gates without conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from steerable.steering.gates import Gate, selectors
from steerable.steering.tokens import Tokens

Condition = tuple[Gate, bool]
"""A part `when` or `probe`, and whether its answer at the end of the prompt holds from there on."""

_ALL, _NONE = selectors.all, ~selectors.all
_FROM_PROMPT_END = selectors.last_prompt | selectors.generated


def conditions_of(gate: Gate, is_latched: bool = False) -> tuple[Condition, ...]:
    """The conditions in a gate."""
    if gate.reads:
        return ((gate, is_latched),)
    is_latched |= gate.op == "latched"
    return tuple(condition for part in gate.parts for condition in conditions_of(part, is_latched))


def rows_of(gates: Iterable[tuple[int, Gate]], number: int) -> dict[Condition, int]:
    """The row of each condition in the gates of interventions at layers; more than `number` where that is not enough.

    An answer is needed from the layer where the activation is read to the last one that acts on it; conditions of one
    row follow each other. What a text calls the same keeps its row from layer to layer, and so its lane.
    """
    last: dict[Condition, int] = {}
    for layer, gate in gates:
        for condition in conditions_of(gate):
            last[condition] = max(last.get(condition, layer), layer)
    rows: dict[Condition, int] = {}
    row_of: dict[tuple[str, bool], int] = {}
    taken: list[tuple[int, bool]] = []  # of each row: up to which layer, and whether its conditions are latched
    for condition in sorted(last, key=layer_of):
        first, is_latched = layer_of(condition), condition[1]
        free = [n for n, (end, latched) in enumerate(taken) if end < first and latched == is_latched]
        row = row_of.get(name := (str(condition[0]), is_latched), -1)
        if row not in free:
            row = len(taken) if not free or len(taken) < number else free[0]
        rows[condition] = row_of[name] = row
        taken[row : row + 1] = [(last[condition], is_latched)]
    return rows


def layer_of(condition: Condition) -> int:
    """Where it reads the activation."""
    return condition[0].args[0].site.layer  # type: ignore[index,no-any-return]


def answered(gate: Gate, rows: Mapping[Condition, int], answers: int, is_latched: bool = False) -> Gate:
    """The gate on tokens that a gate comes to where the conditions of row k have the answer in bit k of `answers`. What
    it latches may hang on the last token of the prompt still (`decided`)."""
    if gate.reads:
        return _ALL if answers >> rows[gate, is_latched] & 1 else _NONE
    parts = [answered(part, rows, answers, is_latched or gate.op == "latched") for part in gate.parts]
    match gate.op:
        case "~":
            return {_ALL: _NONE, _NONE: _ALL}.get(parts[0], ~parts[0])
        case "&" | "|":
            neutral, final = (_ALL, _NONE) if gate.op == "&" else (_NONE, _ALL)
            rest = tuple(part for part in parts if part != neutral)
            if final in rest:
                return final
            return Gate(gate.op, rest) if len(rest) == 2 else rest[0] if rest else neutral
        case "latched":
            return {_ALL: _FROM_PROMPT_END, _NONE: _NONE}.get(parts[0], Gate("latched", tuple(parts)))
    return gate


def decided(gate: Gate, tokens: Tokens, prompt: int) -> Gate:
    """An answered gate without `latched`, for a text whose first tokens, [1, prompt or more], are known."""
    parts = tuple(decided(part, tokens, prompt) for part in gate.parts)
    if gate.op == "latched":
        return _FROM_PROMPT_END if bool(parts[0](tokens)[0, prompt - 1]) else _NONE
    return replace(gate, parts=parts) if parts else gate


def tensors_of(conditions: Iterable[Condition]) -> dict[str, Tensor]:
    """What a slot of conditions holds at their layers: the weight [d], and the limit: bias, whether a score of zero is
    open, and that there is a condition. Open is where <h, weight> + bias is more than zero."""
    tensors = {}
    for condition in conditions:
        weight, bias, equal = condition[0].line()
        tensors[f"{layer_of(condition)}.weight"] = weight.float()
        tensors[f"{layer_of(condition)}.limit"] = torch.tensor([bias, float(equal), 1.0])
    return tensors
