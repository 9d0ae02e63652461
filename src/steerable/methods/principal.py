"""Principal component analysis of contrasts."""

from __future__ import annotations

from typing import Any

import torch

from steerable.methods.mean_difference import Activations, ordinary_rows, paired_sites
from steerable.models import sinks as attention_sinks
from steerable.models.sinks import Sinks
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError


def pca(
    positive: Activations,
    negative: Activations | None = None,
    *,
    site: Site | str | None = None,
    centre: bool = True,
    sinks: Sinks = "drop",
    **about: Any,
) -> Direction:
    """The first principal component, a unit vector at each site.

    With `negative`: of the pairs' differences positive[i] - negative[i], each multiplied by alternating signs
    +1, -1, so that centring does not remove what the pairs have in common, and so that the order inside a
    pair does not count; the sign is chosen so that the positives project higher. Without: of the activations
    themselves, with the sign that makes their mean project positively. centre=False leaves the mean in.

    positive, negative: {site: [n, d]}, or [n, d] with `site`; float64 inside. `stats["explained"]` is the
    component's share of the variance at each site. sinks: as in `difference_of_means`; a pair goes as a whole.
    about: further fields of `Direction`.

    Zou et al. 2023, "Representation Engineering" (arXiv 2310.01405).
    """
    paired = negative is not None
    vectors, norms, explained = {}, {}, {}
    pairs = paired_sites(positive, positive if negative is None else negative, site)
    for where, (a, b) in pairs.items():
        if paired and len(a) != len(b):
            raise UsageError(f"pca needs pairs: {len(a)} positive and {len(b)} negative activations at {where}")
    groups, told = ordinary_rows(pairs if paired else {s: (a,) for s, (a, _) in pairs.items()}, sinks, paired)
    for where, group in groups.items():
        a, b = group[0], group[-1]
        signs = 1 - 2 * (torch.arange(len(a)) % 2)[:, None]
        data = (a - b) * signs if paired else a
        if centre:
            data = data - data.mean(0)
        _, singular, right = torch.linalg.svd(data, full_matrices=False)
        if not singular[0] > 0:
            raise UsageError(f"the activations at {where} do not vary, so they have no principal component")
        component = right[0]
        above = (a - b).mean(0) @ component if paired else a.mean(0) @ component
        vectors[where] = (component * (-1 if above < 0 else 1)).float()
        norms[where] = float((torch.cat([a, b]) if paired else a).norm(dim=1).mean())
        explained[str(where)] = float(singular[0] ** 2 / (singular**2).sum())
    left_out = attention_sinks.stats(getattr(positive, "sinks", {}), getattr(negative, "sinks", {}), told)
    stats = {"explained": explained, **left_out}
    return Direction(vectors, norms=norms, **{"method": "pca", "stats": stats, **about})
