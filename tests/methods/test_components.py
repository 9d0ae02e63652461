"""Joint components and those of random pairs, against NumPy and planted directions."""

import numpy as np
import pytest
import torch

from steerable.methods.components import joint_pca, random_pair_pca
from steerable.methods.contrasts import pca
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

SITES = [Site("resid_post", 1), Site("resid_post", 4)]


def pairs(n=40, seed=0):
    """Differences with a mean, and at the second site a large variance across it."""
    g = torch.Generator().manual_seed(seed)
    base = [torch.randn(n, 6, generator=g, dtype=torch.float64) for _ in SITES]
    moved = [b + torch.eye(6)[0] * 2 + 0.1 * torch.randn(n, 6, generator=g) for b in base]
    moved[1] += 4 * torch.randn(n, 1, generator=g) * torch.eye(6)[1]
    return dict(zip(SITES, moved, strict=True)), dict(zip(SITES, base, strict=True))


def concatenated(direction):
    return torch.cat([direction.at(s) for s in SITES]).double().numpy()


def test_joint_pca_is_the_eigenvector_of_the_second_moment():
    a, b = pairs()
    data = torch.cat([a[s] - b[s] for s in SITES], 1).numpy()
    values, vectors = np.linalg.eigh(data.T @ data)
    expected = vectors[:, -1] * np.sign(vectors[:, -1] @ data.mean(0))
    direction = joint_pca(a, b)
    np.testing.assert_allclose(concatenated(direction), expected, atol=1e-6)
    assert direction.stats["explained"] == pytest.approx(values[-1] / values.sum())


def test_joint_is_not_layer_by_layer():
    """The layers share a small factor in the first and a large one in the second; the first alone has a larger one."""
    g = torch.Generator().manual_seed(0)
    shared, alone = torch.randn(2, 50, 1, generator=g) + 0.5
    axes = torch.eye(6)
    a = {SITES[0]: shared * axes[1] + 2 * alone * axes[0], SITES[1]: 9 * shared * axes[1]}
    b = {s: torch.zeros_like(h) for s, h in a.items()}
    assert abs(float(pca(a, b, centre=False).at(1)[0])) > 0.9
    part = joint_pca(a, b).at(1)
    assert abs(float(part[1] / part.norm())) > 0.9


def test_published_code():
    a, b = pairs()
    data = torch.cat([a[s] - b[s] for s in SITES], 1).numpy()
    mean = data.mean(0)
    component = np.linalg.svd(data - mean)[2][0]
    expected = component * np.sign(component @ mean) + mean
    np.testing.assert_allclose(concatenated(joint_pca(a, b, variant="code")), expected, atol=1e-5)


def test_one_layer_is_uncentred_pairwise_pca():
    a, b = ({SITES[0]: group[SITES[0]]} for group in pairs())
    torch.testing.assert_close(joint_pca(a, b).at(1), pca(a, b, centre=False).at(1))


def test_a_sink_anywhere_takes_the_pair_out_everywhere():
    a, b = pairs()
    rest = [{s: h[1:].clone() for s, h in group.items()} for group in (a, b)]
    a[SITES[1]][0] *= 1e5
    with pytest.warns(SteerableWarning):
        direction = joint_pca(a, b)
    assert direction.stats["pairs"] == 39
    np.testing.assert_allclose(concatenated(direction), concatenated(joint_pca(*rest)), atol=1e-6)


def test_random_pairs_find_the_planted_direction():
    g = torch.Generator().manual_seed(3)
    planted = torch.nn.functional.normalize(torch.randn(8, generator=g), dim=0)
    labels = torch.arange(60) % 3 == 0
    x = 5 + torch.where(labels, 3.0, -3.0)[:, None] * planted + 0.2 * torch.randn(60, 8, generator=g)
    direction = random_pair_pca(x, labels, site=SITES[0])
    assert float(direction.at(1) @ planted) > 0.99 and direction.at(1).norm() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(random_pair_pca(x, ~labels, site=SITES[0]).at(1), -direction.at(1))
    assert float((x @ random_pair_pca(x, site=SITES[0]).at(1)).mean()) > 0
    assert random_pair_pca(x, site=SITES[0], seed=1).to_bytes() == random_pair_pca(x, site=SITES[0], seed=1).to_bytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: joint_pca(torch.ones(3, 2), torch.zeros(2, 2), site=SITES[0]), "needs pairs"),
        (lambda: joint_pca(torch.ones(3, 2), torch.ones(3, 2), site=SITES[0]), "do not vary"),
        (lambda: joint_pca(torch.ones(3, 2), torch.zeros(3, 2), site=SITES[0], variant="best"), "unknown variant"),
        (lambda: random_pair_pca(torch.ones(3, 2), site=SITES[0]), "four activations"),
        (lambda: random_pair_pca(torch.ones(6, 2), site=SITES[0]), "do not vary"),
        (lambda: random_pair_pca(torch.randn(6, 2), [True] * 6, site=SITES[0]), "both kinds"),
        (lambda: random_pair_pca({s: torch.ones(5 + s.layer, 2) for s in SITES}), "same rows"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UsageError, match=message):
        call()
