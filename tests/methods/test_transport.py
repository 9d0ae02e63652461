"""Affine transport: planted maps, least squares of sorted values, and what steering does."""

import numpy as np
import pytest
import torch

from steerable.methods.contrasts import difference_of_means
from steerable.methods.transport import affine_transport
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

SITE = Site("resid_post", 3)
SCALE, OFFSET = torch.tensor([2.0, 0.5, 3.0]).double(), torch.tensor([1.0, -2.0, 0.0]).double()


def source(n=40, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_planted_map_whatever_the_order_of_rows():
    a = source()
    b = (SCALE * a + OFFSET)[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    transport = affine_transport(a, b, site=SITE)
    torch.testing.assert_close(transport.scale[SITE], SCALE)
    torch.testing.assert_close(transport.offset[SITE], OFFSET)
    (whole,) = transport.steering()
    torch.testing.assert_close(whole.apply(a[None])[0].sort(0).values, b.sort(0).values)
    (half,) = transport.steering(0.5, layers=[3])
    torch.testing.assert_close(half.apply(a[None])[0], 0.5 * a + 0.5 * (SCALE * a + OFFSET))
    (none,) = transport.steering(0.0)
    assert torch.equal(none.apply(a[None]), a[None])


def test_distributions_are_matched_and_not_pairs():
    a = source()
    transport = affine_transport(a, -2 * a, site=SITE)
    assert bool((transport.scale[SITE] > 0).all())
    b = source(seed=3) ** 3
    transport = affine_transport(a, b, site=SITE)
    for j in range(3):
        slope, intercept = np.polyfit(np.sort(a[:, j]), np.sort(b[:, j]), 1)  # least squares of sorted values
        assert float(transport.scale[SITE][j]) == pytest.approx(slope)
        assert float(transport.offset[SITE][j]) == pytest.approx(intercept)


def test_mean_and_gaussian():
    a, b = source(), (SCALE * source(seed=2) + OFFSET)[:31]
    (moved,) = affine_transport(a, b, site=SITE, kind="mean").steering()
    u = difference_of_means(b, a, site=SITE).at(SITE)
    torch.testing.assert_close(moved.apply(a[None])[0], a + u, atol=1e-6, rtol=1e-6)
    (moved,) = affine_transport(a, b, site=SITE, kind="gaussian").steering()
    torch.testing.assert_close(moved.apply(a[None])[0].mean(0), b.mean(0))
    torch.testing.assert_close(moved.apply(a[None])[0].std(0), b.std(0))


def test_constant_coordinates():
    a, b = source(), source(seed=2)
    a[:, 1] = 4.0
    linear, gaussian = (affine_transport(a, b, site=SITE, kind=kind) for kind in ("linear", "gaussian"))
    assert linear.scale[SITE][1] == gaussian.scale[SITE][1] == 1
    assert float(linear.offset[SITE][1]) == pytest.approx(float(b[:, 1].mean()) - 4) and gaussian.offset[SITE][1] == 0
    (moved,) = gaussian.steering()
    assert moved.basis.shape == (3, 2)


def test_support_of_the_source():
    a = source()
    (moved,) = affine_transport(a, SCALE * a + OFFSET, site=SITE, support="source").steering()
    outside, inside = a.amax(0) + 0.1, a[0]
    h = torch.stack([outside, inside])[None]
    new = moved.apply(h)[0]
    torch.testing.assert_close(new[0], outside)
    torch.testing.assert_close(new[1], SCALE * inside + OFFSET)


def test_a_sink_is_left_out():
    a = source()
    b = SCALE * a + OFFSET
    expected = affine_transport(a, b, site=SITE)
    with_sink = torch.cat([a, 1e5 * torch.ones(1, 3).double()]), torch.cat([b, -1e5 * torch.ones(1, 3).double()])
    with pytest.warns(SteerableWarning):
        transport = affine_transport(*with_sink, site=SITE)
    torch.testing.assert_close(transport.scale[SITE], expected.scale[SITE])
    only_one = torch.cat([a, 1e5 * torch.ones(1, 3).double()]), torch.cat([b, b[:1]])
    with pytest.warns(SteerableWarning):  # quantiles are matched
        transport = affine_transport(*only_one, site=SITE)
    torch.testing.assert_close(transport.scale[SITE], SCALE, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (source(), source(9), {}, "as many rows"),
        (source(1), source(1), {}, "single one"),
        (source(), source(), {"kind": "cubic"}, "unknown kind"),
        (source(), source(), {"support": "some"}, "unknown support"),
    ],
)
def test_errors(a, b, options, message):
    with pytest.raises(UsageError, match=message):
        affine_transport(a, b, site=SITE, **options)


def test_nothing_to_steer():
    with pytest.raises(UsageError, match="change nothing"):
        affine_transport(source(), source(), site=SITE, kind="mean").steering()
    with pytest.raises(UsageError, match="no map at layer 5"):
        affine_transport(source(), source() + 1, site=SITE).steering(layers=[5])
