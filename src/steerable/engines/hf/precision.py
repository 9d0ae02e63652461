"""What a model's number type can resolve: a small vector drowns in the rounding of a 16-bit stream.

A sum h + s v in bfloat16 is off by some 0.0015 ||h|| (2^-7 / sqrt(12) of each number, over its mantissa), and every
later block rounds the steered and the unsteered stream anew, so that their difference carries the errors of all of
them. On SmolLM2-135M-Instruct, 14 blocks behind random vectors, the effect on the log-probabilities has the cosines
0.5, 0.8, 0.93 and 0.98 with that in float32 at the doses ||s v|| / ||h|| 0.011, 0.027, 0.047 and 0.11: about a tenth of
the direction is lost at 6 times the type's epsilon.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steerable.models import loading as models
from steerable.models.sinks import norms_of
from steerable.models.taps import tap
from steerable.steering.site import Site
from steerable.steering.spec import Intervention
from steerable.store.errors import SteerableWarning

EPSILONS = 6.0  # the least relative dose that a type resolves, in units of its epsilon (0.047 in bfloat16)


def is_narrow(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type of a module's activations, as far as its parameters show it; quantised weights do not count."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1), torch.float32)


@contextmanager
def rounding_watched(
    model: nn.Module,
    norms: Mapping[Site, float],
    interventions: Sequence[Intervention],
    strength: float | Tensor | None,
) -> Iterator[None]:
    """Warn (SteerableWarning) where the relative dose of what is added lies under what the model's type resolves: at
    once where the norm of the site is in `norms`, else in the first forward pass, from the norms there.

    strength: of all interventions, as `steer` is given it; None: each has its own.
    """
    blocks = models.blocks(model)
    lengths: dict[Site, float] = {}  # of the smallest that is added at each site
    for i in interventions:
        if (length := _length(i, strength)) and is_narrow(dtype_of(blocks[i.site.layer])):
            lengths[i.site] = min(length, lengths.get(i.site, length))
    _warn({s: (length, norms[s]) for s, length in lengths.items() if s in norms}, blocks, stacklevel=6)
    with ExitStack() as measuring:
        if unknown := {site: length for site, length in lengths.items() if site not in norms}:
            measuring.enter_context(tap(model, {site: _Once(site, length, blocks) for site, length in unknown.items()}))
        yield


class _Once:
    """Measures the first activations that it is shown."""

    def __init__(self, site: Site, length: float, blocks: Any) -> None:
        self.site, self.length, self.blocks, self.is_done = site, length, blocks, False

    def __call__(self, h: Tensor) -> None:
        if not self.is_done:
            self.is_done = True
            norm = float(norms_of(h).median())
            _warn({self.site: (self.length, norm)} if norm > 0 else {}, self.blocks, stacklevel=3)


def _length(intervention: Intervention, strength: float | Tensor | None) -> float:
    """||s v|| of a shift, of several strengths the smallest that is not zero; 0 where nothing is added or the map says
    how much."""
    if (vector := intervention.vector) is None:
        return 0.0
    given = intervention.strength if strength is None else strength
    strengths = torch.as_tensor(given, dtype=torch.float64).abs().reshape(-1)
    strengths = strengths[strengths > 0]
    return float(strengths.min() * vector.norm()) if len(strengths) else 0.0


def _warn(doses: dict[Site, tuple[float, float]], blocks: Any, stacklevel: int) -> None:
    """doses: what is added and the norm of the stream, at each site; the smallest dose is told of."""
    if not doses:
        return
    site, (length, norm) = min(doses.items(), key=lambda item: item[1][0] / item[1][1])
    dtype = dtype_of(blocks[site.layer])
    least = EPSILONS * torch.finfo(dtype).eps
    if length / norm < least:
        warnings.warn(
            f"at {site} a vector of norm {length:.3g} is added to a stream of norm {norm:.3g}: this relative dose of "
            f"{length / norm:.2g} is under the {least:.2g} that {str(dtype).removeprefix('torch.')} resolves, and "
            "about a tenth of the effect's direction or more is rounding noise; load the model with dtype='float32' or "
            "steer more strongly",
            SteerableWarning,
            stacklevel=stacklevel,
        )
