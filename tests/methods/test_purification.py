"""What is left of a direction without others: orthogonal to them in any order, and mixtures."""

import pytest
import torch

from steerable.methods.purification import contrast_mixed, orthogonalised
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

SITES = [Site("resid_post", 1), Site("resid_post", 2)]


def directions(count, d=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [Direction({s: torch.randn(d, generator=g) for s in SITES}, method="m") for _ in range(count)]


def test_orthogonal_to_each_in_any_order():
    v, *others = directions(4)
    pure = orthogonalised(v, others)
    for s in SITES:
        for other in others:
            assert abs(pure.cosine(other)[s]) < 1e-6
        rows = torch.stack([other.at(s) for other in others]).double()
        solution = torch.linalg.lstsq(rows.T, v.at(s).double()).solution  # the least squares remainder
        torch.testing.assert_close(pure.at(s), (v.at(s).double() - rows.T @ solution).float())
        torch.testing.assert_close(orthogonalised(v, others[::-1]).at(s), pure.at(s))
        repeated = orthogonalised(v, [*others, 3 * others[0]]).at(s)
        torch.testing.assert_close(repeated, pure.at(s))
    assert pure.method == "m, orthogonalised"


def test_identities():
    v, other = directions(2)
    assert orthogonalised(v, []) is v
    pure = orthogonalised(v, [other])
    for s in SITES:
        torch.testing.assert_close(orthogonalised(pure, [other]).at(s), pure.at(s), atol=1e-6, rtol=1e-6)
    plane = Direction({s: torch.stack([v.at(s), other.at(s)]) for s in SITES})
    with pytest.raises(UsageError, match="lies in the span"):
        orthogonalised(v, [plane])
    with pytest.raises(UsageError, match="no vector of 12 numbers at resid_post.2"):
        orthogonalised(v, [other.only([1])])


def test_mixture():
    (v,) = directions(1)
    g = torch.Generator().manual_seed(5)
    target, other = ({s: torch.randn(9, 12, generator=g) for s in SITES} for _ in range(2))
    mixed = contrast_mixed(v, target, other, weight=0.3)
    for s in SITES:
        parts = v.at(s).double(), target[s].double().mean(0) - other[s].double().mean(0)
        expected = sum(w * part / part.norm() for w, part in zip((0.3, 0.7), parts, strict=True))
        torch.testing.assert_close(mixed.at(s), (expected / expected.norm()).float())
    for s, u in contrast_mixed(v, target, other, weight=1).vectors.items():
        torch.testing.assert_close(u, v.at(s) / v.at(s).norm())
    with pytest.raises(UsageError, match="from 0 to 1"):
        contrast_mixed(v, target, other, weight=2)
    with pytest.raises(UsageError, match="cannot be mixed"):
        contrast_mixed(v, target, target)
    opposite = {s: other[s] - v.at(s) for s in SITES}
    with pytest.raises(UsageError, match="cancel"):
        contrast_mixed(v, opposite, other)
    with pytest.raises(UsageError, match="one width"):
        contrast_mixed(v, {SITES[0]: target[SITES[0]]}, {SITES[0]: other[SITES[0]]})
