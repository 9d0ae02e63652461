import pytest
import torch

from steerable.steering.direction import Direction
from steerable.steering.maps import Clip, NormShift, Rotate, Shift, map_text, parse_map
from steerable.steering.site import Site
from steerable.steering.spec import Intervention, from_json, shift, to_json
from steerable.store.errors import UsageError

SITE = Site("resid_post", 1)
H = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
V = torch.randn(8, generator=torch.Generator().manual_seed(1))
MASK = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) < 0.5


def plane():
    return torch.linalg.qr(torch.randn(8, 2, generator=torch.Generator().manual_seed(3)))[0]


def formula(h, basis, phi, s, rescale):
    """The formula, one token at a time, in float64."""
    out = torch.empty(h.shape, dtype=torch.float64)
    for index in torch.cartesian_prod(torch.arange(h.shape[0]), torch.arange(h.shape[1])):
        t = h[tuple(index)].double()
        x = basis.double().T @ t
        new = t + s * basis.double() @ (phi(x) - x)
        out[tuple(index)] = new * (t.norm() / new.norm()) if rescale else new
    return out


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("s", [0.7, -1.3])
@pytest.mark.parametrize("kind", ["shift", "clip"])
def test_formula(kind, s, rescale):
    if kind == "shift":
        intervention = shift(SITE, V, s, rescale=rescale)
        assert torch.equal(intervention.apply(H), H + s * V) or rescale
    else:
        intervention = Intervention(SITE, plane(), Clip(-0.2, 0.1), strength=s, rescale=rescale)
    expected = formula(H, intervention.basis, intervention.map, s, rescale)
    torch.testing.assert_close(intervention.apply(H).double(), expected, atol=1e-5, rtol=1e-5)
    if rescale:
        torch.testing.assert_close(intervention.apply(H).norm(dim=-1), H.norm(dim=-1))
    masked = intervention.apply(H, MASK)
    assert torch.equal(masked[~MASK], H[~MASK]) and torch.equal(masked[MASK], intervention.apply(H)[MASK])


def test_shift_is_phi():
    assert torch.equal(Shift(2.0)(torch.tensor([[1.0], [3.0]])), torch.tensor([[3.0], [5.0]]))


@pytest.mark.parametrize("rescale", [False, True])
def test_zero_is_the_same_object(rescale):
    intervention = shift(SITE, V, rescale=rescale)
    assert intervention.apply(H, strength=0.0) is H


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    """float32 arithmetic, one rounding at the end."""
    h, s = H.to(dtype), 0.3
    out = shift(SITE, V, s).apply(h)
    wide = torch.promote_types(dtype, torch.float32)
    assert out.dtype == dtype and torch.equal(out, (h.to(wide) + s * V.to(wide)).to(dtype))
    assert shift(SITE, V, s, rescale=True).apply(h).dtype == dtype
    assert Intervention(SITE, plane(), Clip(0, 0)).apply(h).dtype == dtype


def test_a_share_of_each_token_s_norm():
    """Whatever the vector's and the token's length, the displacement is strength times share of the token's norm."""
    (one,) = Direction({SITE: 7 * V}).steering(2.0, map="norm_shift(0.25)")
    moved = (one.apply(H) - H).norm(dim=-1)
    torch.testing.assert_close(moved, 0.5 * H.norm(dim=-1))
    torch.testing.assert_close(one.apply(100 * H), 100 * one.apply(H))
    assert from_json(to_json([one])) == (one,) and parse_map(map_text(parse_map("norm_shift(0.25)"))) == NormShift(0.25)


def test_relative_rotations_compose():
    """R(20) R(35) = R(55), and back again."""
    basis = torch.linalg.qr(plane().double())[0]
    first, second, both, back = (Intervention(SITE, basis, Rotate(a)) for a in (20.0, 35.0, 55.0, -55.0))
    h = H.double()
    torch.testing.assert_close(second.apply(first.apply(h)), both.apply(h), atol=1e-12, rtol=0)
    torch.testing.assert_close(back.apply(both.apply(h)), h, atol=1e-12, rtol=0)


@pytest.mark.parametrize("degrees", [30, 170])
def test_the_norm_is_kept(degrees):
    """To 1e-6 in float32, by both rotations and by rescaling; one of an activation a thousand times longer, too."""
    h = torch.cat([H, 1000 * H])
    kept = [Intervention(SITE, plane(), Rotate(degrees, absolute)) for absolute in (False, True)]
    kept += [shift(SITE, degrees * V, rescale=True), Intervention(SITE, plane(), Clip.ablate(), rescale=True)]
    for one in kept:
        torch.testing.assert_close(one.apply(h).norm(dim=-1), h.norm(dim=-1), rtol=1e-6, atol=0)


def test_gradient_passes():
    h = H.clone().requires_grad_()
    shift(SITE, V, 0.5).apply(h, MASK).sum().backward()
    assert torch.equal(h.grad, torch.ones_like(h))


@pytest.mark.parametrize("vector", [V[None], V])
def test_one_vector(vector):
    assert torch.equal(shift(SITE, vector).apply(H), H + V)


@pytest.mark.parametrize("vector", [torch.ones(2, 8), torch.tensor(1.0), V * float("nan"), V * float("inf")])
def test_bad_vectors(vector):
    with pytest.raises(UsageError):
        shift(SITE, vector)


def test_zero_vector_changes_nothing():
    assert torch.equal(shift(SITE, torch.zeros(8)).apply(H), H)
