"""The plane of rotations against NumPy, on planted planes, and what rotations in it keep."""

import numpy as np
import pytest
import torch

from steerable.methods.planes import plane_of_norms
from steerable.steering.site import Site
from steerable.store.errors import UsageError

SITES = [Site("resid_post", layer) for layer in range(6)]


def classes(d=10, seed=0, noise=0.05):
    """Directions of the sites that turn in the plane of the first two axes, and grow."""
    g = torch.Generator().manual_seed(seed)
    a, b = {}, {}
    for k, s in enumerate(SITES):
        angle = torch.tensor(0.15 * k)
        d_k = (k + 1) * (angle.cos() * torch.eye(d)[0] + angle.sin() * torch.eye(d)[1])
        a[s], b[s] = (sign * d_k + noise * torch.randn(20, d, generator=g) + 1 for sign in (1, -1))
    return a, b


def test_as_numpy():
    a, b = classes(noise=1.0)
    unit = np.stack([(a[s].double().mean(0) - b[s].double().mean(0)).numpy() for s in SITES])
    lengths = np.linalg.norm(unit, axis=1)
    unit /= lengths[:, None]
    component = np.linalg.eigh(np.cov(unit.T))[1][:, -1]
    for first, b1 in {
        "mean_cosine": unit[(unit @ unit.T).sum(1).argmax()],
        "norm": unit[lengths.argmax()],
        "mean": unit.mean(0) / np.linalg.norm(unit.mean(0)),
    }.items():
        b2 = component - (component @ b1) * b1
        b2 *= np.sign(max(unit @ b2, key=abs)) / np.linalg.norm(b2)
        direction = plane_of_norms(a, b, first=first)
        for s in SITES:
            np.testing.assert_allclose(direction.at(s).numpy(), np.stack([b1, b2]), atol=1e-6)
        assert direction.stats["first"] == ("" if first == "mean" else str(SITES[np.abs(unit @ b1 - 1).argmin()]))


def test_planted_plane_and_rotations():
    a, b = classes()
    direction = plane_of_norms(a, b)
    rows = direction.at(0).double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert rows[:, :2].norm() ** 2 == pytest.approx(2, abs=0.01)  # the plane of the first two axes
    h = torch.randn(1, 5, 10, generator=torch.Generator().manual_seed(1))
    for text in ("rotate(70)", "rotate_to(200)"):
        (turned,) = direction.steering(1.0, layers=3, map=text)
        new = turned.apply(h)
        torch.testing.assert_close(new.norm(dim=-1), h.norm(dim=-1), rtol=1e-6, atol=0)
        assert float((new - h).norm()) > 0.1


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda a: {SITES[0]: a[SITES[0]]}, {}, "two sites"),
        (lambda a: {**a, SITES[2]: torch.zeros(3, 10)}, {}, "same mean at resid_post.2"),
        (lambda a: dict.fromkeys(a, torch.ones(2, 10)), {}, "one line"),
        (lambda a: a, {"first": "random"}, "unknown first"),
    ],
)
def test_errors(change, options, message):
    a = change(classes()[0])
    with pytest.raises(UsageError, match=message):
        plane_of_norms(a, {s: torch.zeros(2, 10) for s in a}, **options)
