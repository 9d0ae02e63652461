"""A realistic report of a run on a six-layer model: what the page is developed and tested against."""

from __future__ import annotations

import random
from typing import Any

import pytest

LABELS = (
    "initializing",
    "deduction",
    "adding-knowledge",
    "example-testing",
    "uncertainty-estimation",
    "backtracking",
)
STEERED = ("backtracking", "uncertainty-estimation", "example-testing", "adding-knowledge")
# behaviour: unsteered, at -1, at +1, layer
EFFECTS = {
    "backtracking": (0.053, 0.015, 0.206, 3),
    "uncertainty-estimation": (0.062, 0.026, 0.175, 3),
    "example-testing": (0.112, 0.066, 0.196, 2),
    "adding-knowledge": (0.083, 0.061, 0.230, 3),
}

PROMPT = (
    "Using the numbers 3, 5, 8, 11, create an expression that equals 24. You can only use each number once.\n"
    "Report the answer as the last line in the format: 24 = expression"
)
SENTENCES = {
    "initializing": "I need to reach 24 with 3, 5, 8 and 11, each used once. ",
    "deduction": "8 * 3 = 24, and then 5 and 11 are left over, which leaves 11 - 5 = 6. ",
    "adding-knowledge": "Multiplying by 1 changes nothing, and 24 is 8 times 3. ",
    "example-testing": "Let me test it: 11 + 5 + 8 = 24, that fits the target. ",
    "uncertainty-estimation": "Hmm, I am not sure that this can work. ",
    "backtracking": "Wait, that leaves a number; go back and try something else. ",
}
CHAINS = {
    "unsteered": "idduebdkdt",
    "plus": "idbbdbubbdbbdt",
    "minus": "iddkddt",
}
LETTER = dict(zip("idktub", LABELS, strict=True))


def _around(mean: float, width: float, top: float = 1.0) -> list[float]:
    return [round(mean, 5), round(max(mean - width, 0.0), 5), round(min(mean + 1.1 * width, top), 5)]


def _cell(behaviour: str | None, control: str | None, strength: float, layers: list[int], own: float) -> dict[str, Any]:
    rest = {label: EFFECTS[label][0] if label in EFFECTS else None for label in LABELS}
    if behaviour:
        rest[behaviour] = own
    spare = 1 - sum(share for share in rest.values() if share is not None)
    rest["initializing"], rest["deduction"] = 0.2 * spare, 0.8 * spare
    turn = 0.012 * (STEERED.index(behaviour) - 1.5) if behaviour and control is None and strength else 0.0
    hit = 0.0 if control is None and strength <= 0 else 0.05 * abs(strength)
    vector = 1.0 if control is None else 0.3
    return {
        "name": f"{behaviour or 'unsteered'}/{control or 'vector'}/{strength:+g}",
        "behaviour": behaviour,
        "control": control,
        "strength": strength,
        "layers": layers,
        "where": "all",
        "tasks": 50,
        "samples": 4,
        "fractions": {label: _around(share or 0.0, 0.008 + 0.09 * (share or 0.0)) for label, share in rest.items()},
        "accuracy": _around(0.62 + 2 * turn * strength - hit - 0.08 * max(strength, 0) * vector, 0.05),
        "tokens": _around(118 + (38 + 600 * turn) * strength * vector, 7, 1e9),
        "loops": _around(0.008 + (0.03 + turn) * max(strength, 0) * vector, 0.005),
        "unclosed": _around(0.015 + (0.05 + 2 * turn) * max(strength, 0) * vector, 0.012),
        "kl": None
        if strength == 0
        else _around(0.31 * strength * strength * (0.8 + 0.4 * vector + 10 * turn), 0.03, 1e9),
    }


def _cells() -> list[dict[str, Any]]:
    cells = [_cell(None, None, 0.0, [], 0.0)]
    for behaviour, (base, down, up, layer) in EFFECTS.items():
        for strength in (-1.0, -0.5, 0.5, 1.0):
            far = up - base if strength > 0 else base - down
            own = base + far * (abs(strength) ** 1.3) * (1 if strength > 0 else -1)
            cells.append(_cell(behaviour, None, strength, [layer], own))
            several = _cell(behaviour, None, strength, [2, 3, 4], base + 0.8 * (own - base))
            cells.append(several)
            cells.append({**_cell(behaviour, None, strength, [layer], base + 0.9 * (own - base)), "where": "thinking"})
            if abs(strength) == 1:
                cells.append(_cell(behaviour, "random", strength, [layer], base * (1.08 if strength > 0 else 0.97)))
                cells.append(_cell(behaviour, "shuffled", strength, [layer], base * (1.2 if strength > 0 else 0.9)))
    for cell in cells:
        cell["difference"] = _difference(cell, cells[0]) if cell["strength"] else None
        cell["wrong_way"] = {"fraction": [0.12, 0.04, 0.22], "accuracy": [0.3, 0.18, 0.42]} if cell["strength"] else {}
    return cells


def _difference(cell: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    def gap(after: list[float], before: list[float], width: float) -> list[float]:
        return [after[0] - before[0] + end for end in (0.0, -width, width)]

    shares = {label: gap(cell["fractions"][label], base["fractions"][label], 0.01) for label in LABELS}
    metrics = {"accuracy": 0.06, "tokens": 7.0, "loops": 0.004, "unclosed": 0.01}
    return {name: gap(cell[name], base[name], width) for name, width in metrics.items()} | {"fractions": shares}


def _chain(letters: str, correct: bool) -> dict[str, Any]:
    thinking, spans = "", []
    for letter in letters.replace("e", "t"):
        sentence = SENTENCES[LETTER[letter]]
        spans.append({"label": LETTER[letter], "start": len(thinking), "end": len(thinking) + len(sentence) - 1})
        thinking += sentence
    return {
        "thinking": thinking,
        "answer": "24 = 11 + 5 + 8" if correct else "I give up.",
        "correct": correct,
        "spans": spans,
    }


def _attribution(layers: int) -> dict[str, Any]:
    draw = random.Random(7)
    found: dict[str, Any] = {"rank_correlation": {}}
    for behaviour in STEERED:
        peak = EFFECTS[behaviour][3] * layers / 6
        exact = [2.0 ** (-(((i - peak) / (0.25 * layers)) ** 2)) * (0.9 + 0.2 * draw.random()) for i in range(layers)]
        metrics = {
            "published": [3.1 - 2.2 * i / layers + 0.3 * draw.random() for i in range(layers)],
            "published_rescaled": [0.4 + 5 * i / layers for i in range(layers)],
            "fisher": [0.21 * e * (0.85 + 0.3 * draw.random()) for e in exact],
            "exact": [0.19 * e for e in exact],
        }
        found[behaviour] = {
            name: {"mean": [round(m, 6) for m in means], "std": [round(0.25 * m, 6) for m in means]}
            for name, means in metrics.items()
        }
        found["rank_correlation"][behaviour] = {
            "published": -0.14,
            "published_rescaled": 0.26,
            "fisher": 0.94,
        }
    return found


def _selection() -> dict[str, Any]:
    chosen = {}
    for behaviour, (base, down, up, layer) in EFFECTS.items():
        candidates = [
            {
                "window": window,
                "baseline": "pooled",
                "layer": at,
                "fraction_up": round(base + (up - base) * power * (1 if at == layer else 0.8), 4),
                "fraction_down": round(base - (base - down) * power * (1 if at == layer else 0.8), 4),
                "accuracy": 0.55,
            }
            for window, power in (("published", 0.3), ("span", 0.35), ("onset", 1.0))
            for at in (2, 3)
        ]
        chosen[behaviour] = {
            "layer": layer,
            "layers": [2, 3, 4],
            "window": "onset",
            "baseline": "pooled",
            "rule": "highest exact effect among layers 1 to 4, window by the largest effect on 16 tasks",
            "candidates": candidates,
        }
    return chosen


def fake_report(layers: int = 6) -> dict[str, Any]:
    """A fresh copy, so that a test may change it."""
    matrix = [[1.0 if a == b else round(0.55 - 0.17 * abs(a - b), 3) for b in range(4)] for a in range(4)]
    windows = {"published": 0.41, "span": 0.72, "onset": 0.96}
    return {
        "config": {
            "model": "pocket",
            "tasks": 300,
            "seed": 0,
            "dtype": None,
            "attention": None,
            "window": None,
            "greedy": False,
            "strengths": [-1.0, -0.5, 0.0, 0.5, 1.0],
        },
        "versions": {"steerable": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.19.0"},
        "model": {
            "name": "pocket",
            "layers": layers,
            "width": 192,
            "parameters": 2703744,
            "sha256": "3f" * 32,
            "dtype": "float32",
            "device": "cpu",
            "attention": "sdpa",
        },
        "hashes": {
            "tasks.jsonl": "a1" * 32,
            "chains.jsonl": "b2" * 32,
            "vectors/backtracking.safetensors": "c3" * 32,
        },
        "coverage": {
            "chains": 300,
            "closed": 293,
            "annotated": 300,
            "coverage": 0.998,
            "spans": {label: 400 + 37 * i for i, label in enumerate(LABELS)},
            "dropped": 0,
        },
        "norms": {str(i): {"mean_norm": 44.0 + 31 * i, "norm_of_mean": 10.0 + 6.5 * i} for i in range(layers)},
        "cosines": {
            "selected": {"labels": list(STEERED), "layers": [EFFECTS[b][3] for b in STEERED], "matrix": matrix},
            "overall_vs_pooled": {b: dict(windows) for b in STEERED},
            "windows": {b: {"published~span": 0.91, "published~onset": 0.38, "span~onset": 0.33} for b in STEERED},
        },
        "attribution": _attribution(layers),
        "selection": _selection(),
        "cells": _cells(),
        "examples": [
            {
                "behaviour": behaviour,
                "task_id": f"countdown-9000{i}-{i}",
                "rule": "nearest to the means",
                "prompt": PROMPT,
                "unsteered": _chain(CHAINS["unsteered"], True),
                "plus": _chain(
                    CHAINS["plus"].replace("b", next(k for k, v in LETTER.items() if v == behaviour)), i != 1
                ),
                "minus": _chain(CHAINS["minus"], True),
            }
            for i, behaviour in enumerate(STEERED)
        ],
        "lens": {
            behaviour: {
                "layer": EFFECTS[behaviour][3],
                "top": [
                    ["wait", 3.1],
                    ["go", 2.9],
                    ["back", 2.8],
                    ["instead", 2.2],
                    ["no", 2.1],
                    ["other", 1.9],
                    ["drop", 1.7],
                ],
                "bottom": [
                    ["so", -2.6],
                    ["gives", -2.2],
                    ["equals", -2.0],
                    [" =", -1.9],
                    ["\n\n", -1.4],
                    ["done", -1.2],
                ],
            }
            for behaviour in STEERED
        },
    }


def fake_timings() -> dict[str, Any]:
    """As a run writes them beside the report."""
    return {
        "started": "2025-11-21T02:49:00Z",
        "seconds": {"tasks": 0.8, "generate": 71.2, "steer": 190.4, "report": 0.3},
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return fake_report()


@pytest.fixture
def report_of() -> Any:
    """The same of a model with so many layers."""
    return fake_report


@pytest.fixture
def timings() -> dict[str, Any]:
    return fake_timings()
