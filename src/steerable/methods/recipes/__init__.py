"""The field's methods by name: each is one function that reads like its paper's method section.

A recipe is a composition of estimators, maps, gates, schedules and edits, and gives what `steer` takes (a Direction, or
a Program of interventions) or a WeightPatch. `RECIPES` says of each what data it takes and what it gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from steerable.methods.probes import check_scikit_learn
from steerable.methods.recipes.characters import assistant_axis, persona
from steerable.methods.recipes.edits import laser, steer2edit, thinkedit
from steerable.methods.recipes.exploration import east
from steerable.methods.recipes.features import sae
from steerable.methods.recipes.neurons import vla_neurons
from steerable.methods.recipes.pairs import caa, fractional, language, linear_act, repe, shift_vectors
from steerable.methods.recipes.probes import cast, guiding_giants, raptor
from steerable.methods.recipes.rotations import angular, selective
from steerable.methods.recipes.thoughts import efficiency, seal


class Recipe(NamedTuple):
    """A recipe: its function, its papers (arXiv), the data it takes, what it gives, its parts, and an example.

    data: "thoughts" or "lengths" (chains of a run folder), "pairs", "roles" or "steps" (a file), "autoencoder" (a
    folder), "" (none). gives: "direction", "steering" or "patch". example: the options behind `--recipe NAME`. check:
    raises UsageError where the recipe needs a library that is not installed.
    """

    function: Callable[..., Any]
    papers: tuple[str, ...]
    data: str
    gives: str
    parts: str
    example: str
    check: Callable[[], None] | None = None


_PAIRS = "--data examples/contrasts/{} --model smol"
RECIPES = {
    "seal": Recipe(
        seal, ("2504.07986",), "thoughts", "direction",
        "difference of means behind paragraph breaks, shift, gate `thinking & boundary`",
        "--data runs/pocket",
    ),
    "efficiency": Recipe(
        efficiency, ("2506.15647",), "lengths", "direction",
        "paired difference within problems, shift, gate `thinking`",
        "--data runs/short",
    ),
    "fractional": Recipe(
        fractional, ("2506.15882",), "pairs", "direction",
        "one component over all layers, shift with rescale, schedule `cosine`",
        _PAIRS.format("certain-doubtful.jsonl"),
    ),
    "thinkedit": Recipe(
        thinkedit, ("2503.22048",), "lengths", "patch",
        "difference of means, head scores, projection of heads",
        "--data runs/short --set short=50 --set long=60",
    ),
    "steer2edit": Recipe(
        steer2edit, ("2602.09870",), "lengths", "patch",
        "difference of means, elastic net of heads and neurons",
        "--data runs/short",
    ),
    "laser": Recipe(
        laser, ("2312.13558",), "", "patch",
        "truncated singular values of one matrix",
        "--model smol --set share=0.1",
    ),
    "east": Recipe(
        east, ("2406.00244",), "steps", "direction",
        "entropy-weighted mean within runs, shift, schedule `until`",
        "--data steps.jsonl --model smol",
    ),
    "angular": Recipe(
        angular, ("2510.26243",), "pairs", "direction",
        "plane of norms, absolute rotation, gate `when(b1 > 0)` if adaptive",
        _PAIRS.format("happy-sad.jsonl"),
    ),
    "selective": Recipe(
        selective, ("2601.19375",), "pairs", "direction",
        "plane of norms, relative rotation and back, layers of opposite sign",
        _PAIRS.format("happy-sad.jsonl"),
    ),
    "raptor": Recipe(
        raptor, ("2602.00158",), "pairs", "steering",
        "ridge logistic probe, floor at its probability, accurate layers",
        _PAIRS.format("happy-sad.jsonl"),
        check_scikit_learn,
    ),
    "assistant-axis": Recipe(
        assistant_axis, ("2601.10387",), "roles", "steering",
        "difference of macro means, floor or ceiling at a quantile",
        "--data roles.jsonl --model smol",
    ),
    "caa": Recipe(
        caa, ("2312.06681",), "pairs", "direction",
        "difference of means at the last token, shift",
        _PAIRS.format("formal-casual.jsonl"),
    ),
    "repe": Recipe(
        repe, ("2310.01405",), "pairs", "direction",
        "principal component of pairs, shift at a band of layers",
        _PAIRS.format("formal-casual.jsonl"),
    ),
    "cast": Recipe(
        cast, ("2409.05907",), "pairs", "direction",
        "principal component of pairs, any direction, gate `latched(when)`",
        _PAIRS.format("questions-statements.jsonl") + " --set direction=formal.safetensors",
    ),
    "guiding-giants": Recipe(
        guiding_giants, ("2505.20309",), "pairs", "direction",
        "ridge logistic probe, any direction, gate `latched(probe)`",
        _PAIRS.format("questions-statements.jsonl") + " --set direction=formal.safetensors",
        check_scikit_learn,
    ),
    "linear-act": Recipe(
        linear_act, ("2410.23054",), "pairs", "steering",
        "transport of each coordinate, affine, layer after layer",
        _PAIRS.format("happy-sad.jsonl"),
    ),
    "shift-vectors": Recipe(
        shift_vectors, ("2501.03012",), "pairs", "direction",
        "difference of means or of concepts, shift",
        _PAIRS.format("happy-sad.jsonl") + " --set concepts=4",
    ),
    "language": Recipe(
        language, ("2601.08331",), "pairs", "direction",
        "unit difference of means, shift",
        _PAIRS.format("french-english.jsonl"),
    ),
    "persona": Recipe(
        persona, ("2507.21509", "2509.04794"), "", "direction",
        "paired difference of replies, purification, shift",
        "--model smol --set persona=happy --set opposite=sad",
    ),
    "vla-neurons": Recipe(
        vla_neurons, ("2509.00328",), "", "direction",
        "neurons by the logit lens, set to a value",
        "--model smol --set words=one,two,three,four,five,six,seven,eight,nine",
    ),
    "sae": Recipe(
        sae, ("2309.08600", "2501.17148"), "autoencoder", "direction",
        "row of an autoencoder's decoder, shift",
        "--data autoencoder --model smol --set feature=123",
    ),
}  # fmt: skip
