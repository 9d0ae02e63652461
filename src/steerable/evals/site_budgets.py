"""How far steering moves the activations at each site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerable.evals.passages import Passage, read_passages
from steerable.steering.site import Site
from steerable.steering.spec import Intervention, Steering


def site_budget(model: Any, passages: Sequence[Passage], steering: Steering) -> dict[str, dict[str, float]]:
    """How far each intervention moves the activations at its own site, as means over the passages' tokens.

        chord = ||h' - h|| / ||h||,   angle = arccos(<h, h'> / (||h|| ||h'||)),   norm = ||h'|| / ||h||

    A rotation by theta in the whole space has a chord of 2 sin(theta / 2) and keeps the norm; a shift by s v has the
    chord s ||v|| / ||h||. What interventions before it did to the stream is left out, and so are gates: it is the
    budget of a token that is steered. Attention sinks do not count.

    Returns:
        {site: {"chord", "angle" (degrees), "norm"}}.

    Example:
        >>> site_budget(model, [Passage.whole(chain["ids"])], direction.steering(1.0))["resid_post.3"]["chord"]
        0.21
    """
    by_site: dict[Site, list[Intervention]] = {}
    for one in steering:
        by_site.setdefault(one.site, []).append(one)

    def moved(site: Site, h: Tensor) -> Tensor:
        after = h[None].double()
        for one in by_site[site]:
            after = one.apply(after)
        before, after = h.double(), after[0]
        norms = before.norm(dim=1).clamp_min(1e-30), after.norm(dim=1).clamp_min(1e-30)
        cosine = ((before * after).sum(1) / norms[0] / norms[1]).clamp(-1, 1)
        chord = (after - before).norm(dim=1) / norms[0]
        return torch.stack([chord, torch.rad2deg(torch.acos(cosine)), norms[1] / norms[0]], 1)

    read = read_passages(model, passages, list(by_site), moved)
    return {
        str(site): dict(zip(("chord", "angle", "norm"), torch.cat(rows).mean(0).tolist(), strict=True))
        for site, rows in read.items()
    }
