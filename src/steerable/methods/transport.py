"""Maps of one distribution of activations to another, a coordinate at a time (AcT)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steerable.methods.rows import Activations, ordinary_groups, paired_sites
from steerable.models.sinks import Sinks
from steerable.steering.gates import Gate, parse_gate
from steerable.steering.maps import Affine
from steerable.steering.site import Site
from steerable.steering.spec import Intervention, Program
from steerable.store.errors import UsageError

_LEAST_DEVIATION = 1e-4


@dataclass(frozen=True, eq=False)
class AffineTransport:
    """T(h) = scale * h + offset for coordinates in [lo, hi], and h for others, at each site.

    scale, offset, lo, hi: {site: [d] float64}.

    Example:
        >>> source, target = torch.randn(50, 4), 2 * torch.randn(50, 4) + 1
        >>> transport = affine_transport(source, target, site="resid_post.2")
        >>> transport.steering(0.5)[0].strength
        0.5
    """

    scale: dict[Site, Tensor]
    offset: dict[Site, Tensor]
    lo: dict[Site, Tensor]
    hi: dict[Site, Tensor]

    def steering(
        self, strength: float = 1.0, layers: Iterable[int] | None = None, where: Gate | str = "all"
    ) -> Program:
        """h' = (1 - strength) h + strength T(h) at the tokens of `where`; 1 is the whole way to the target.

        layers: None: all. The basis at a site is one-hot, [d, k], for the k coordinates that T changes. Raises
        UsageError for layers without a map, and where T changes nothing.
        """
        chosen = {s.layer for s in self.scale} if layers is None else set(layers)
        if missing := sorted(chosen - {s.layer for s in self.scale}):
            raise UsageError(f"no map at layer {missing[0]}: there are {sorted({s.layer for s in self.scale})}")
        parts = []
        for s in self.scale:
            moved = ((self.scale[s] != 1) | (self.offset[s] != 0)).nonzero()[:, 0]
            if s.layer in chosen and len(moved):
                basis = torch.eye(len(self.scale[s]))[:, moved]
                phi = Affine(*(values[s][moved].tolist() for values in (self.scale, self.offset, self.lo, self.hi)))
                parts.append(Intervention(s, basis, phi, parse_gate(where), strength=strength))
        if not parts:
            raise UsageError("these maps change nothing at the layers that are chosen: source and target are the same")
        return Program(parts)


def affine_transport(
    source: Activations,
    target: Activations,
    *,
    site: Site | str | None = None,
    kind: Literal["linear", "mean", "gaussian"] = "linear",
    support: Literal["all", "source"] = "all",
    sinks: Sinks = "drop",
) -> AffineTransport:
    """T(h) = scale * h + offset, for each coordinate by itself, with offset = mean b - scale mean a.

    Activation transport, AcT (arXiv 2410.23054), of activations a of texts as they are to b as they should be. The
    optimal transport of one coordinate matches sorted values with sorted values:

        linear:    scale = sum_i a~(i) b~(i) / sum_i a~(i)^2, of the sorted and centred values; never negative
        gaussian:  scale = std b / std a
        mean:      scale = 1: the difference of means, as ITI adds it

    The text of the paper seems to divide by the target's sum, where code and least squares have the source's, as here.
    Coordinates whose source varies by no more than 1e-4 are shifted alone ("linear": the code adds noise against ties;
    a stable sort needs none) or, with "gaussian", left as they are, as in the code. It also fits each layer with the
    maps of those before it in place; that is for the caller to capture.

    Args:
        source: activations {site: [n, d]}, or one tensor [n, d] with `site`; float64 inside. In the paper the mean over
            a text's tokens. Steered is each token, which varies more.
        target: the same of the other texts; for "linear" as many rows, in any order.
        site: the site of activations that are given as tensors.
        kind: see above.
        support: "all", for bringing a concept in, or "source": coordinates outside of the source's range are left as
            they are, for taking one out.
        sinks: as in `contrasts.difference_of_means`. For "linear" quantiles are then matched if the counts differ.

    Returns:
        The maps, whose `steering(strength)` steers; strength 1 means the same at every site.

    Raises:
        UsageError: for another kind or support, single rows, unequal numbers of rows with "linear", NaN.

    Example:
        >>> a = torch.tensor([[0.0], [1.0], [2.0]])
        >>> transport = affine_transport(a, 3 * a.flip(0) + 1, site="resid_post.2")
        >>> float(transport.scale[Site("resid_post", 2)]), float(transport.offset[Site("resid_post", 2)])
        (3.0, 1.0)
    """
    if kind not in ("linear", "mean", "gaussian"):
        raise UsageError(f"unknown kind of transport {kind!r}: expected 'linear', 'mean' or 'gaussian'")
    if support not in ("all", "source"):
        raise UsageError(f"unknown support {support!r}: expected 'all' or 'source'")
    groups = paired_sites(source, target, site)
    for s, (a, b) in groups.items():
        if kind == "linear" and len(a) != len(b):
            raise UsageError(f"linear transport matches as many rows: {len(a)} of the source, {len(b)} of the target")
        if min(len(a), len(b)) < 2:
            raise UsageError(f"transport needs two activations of each kind at least, and one at {s} has a single one")
    scale, offset, lo, hi = {}, {}, {}, {}
    for s, (a, b) in ordinary_groups(groups, sinks)[0].items():
        scale[s] = _scale(a, b, kind)
        offset[s] = b.mean(0) - scale[s] * a.mean(0)
        if kind == "gaussian":
            offset[s] = offset[s].masked_fill(a.std(0) <= _LEAST_DEVIATION, 0.0)
        limits = (a.amin(0), a.amax(0)) if support == "source" else (-math.inf, math.inf)
        lo[s], hi[s] = (torch.as_tensor(x, dtype=torch.float64).expand(a.shape[1]) for x in limits)
    return AffineTransport(scale, offset, lo, hi)


def _scale(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """The factor of each coordinate, [d]."""
    one = torch.ones(a.shape[1], dtype=torch.float64)
    varies = a.std(0) > _LEAST_DEVIATION
    if kind == "mean":
        return one
    if kind == "gaussian":
        return torch.where(varies, b.std(0) / a.std(0).clamp_min(1e-300), one)
    a, b = a.sort(dim=0, stable=True).values, b.sort(dim=0, stable=True).values
    if len(a) != len(b):  # attention sinks were left out of one of them
        at = (torch.arange(len(a), dtype=torch.float64) + 0.5) / len(a)
        b = torch.quantile(b, at, dim=0)
    a, b = a - a.mean(0), b - b.mean(0)
    return torch.where(varies, (a * b).sum(0) / a.square().sum(0).clamp_min(1e-300), one)
