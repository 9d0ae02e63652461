"""Every map over every kind of basis, alone and in a batch of many programs, against the formula."""

import math

import pytest
import torch

from steerable.engines.hf.changes import LinearChange, Mapped, Scaled
from steerable.engines.hf.programs import Passing, Table
from steerable.steering.maps import Affine, Clip, Rotate, Shift, Swap
from steerable.steering.site import Site
from steerable.steering.spec import Intervention

D, SITE = 12, Site("resid_post", 1)
H = torch.randn(6, 3, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def plane(seed=1, k=2):
    draws = torch.randn(D, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draws)[0]


def one_hot(*places):
    return torch.eye(D, dtype=torch.float64)[:, list(places)]


EYE = one_hot(*range(D))
ROW = tuple(torch.linspace(-1, 1, D).tolist())
CASES = {
    "shift": (plane(), Shift((1.0, -2.0)), None),
    "ablated plane": (plane(), Clip.ablate(), LinearChange),
    "ablated neurons": (one_hot(7, 2), Clip.ablate(), Scaled),
    "neurons set": (one_hot(7, 2), Clip.set_to((1.5, -0.5)), Scaled),
    "floor": (plane(), Clip.floor(0.1), Mapped),
    "floor of neurons": (one_hot(7, 2), Clip.floor((0.1, 0.2)), Mapped),
    "rotate": (plane(), Rotate(30), LinearChange),
    "rotate_to": (plane(), Rotate(200, absolute=True), LinearChange),
    "rotate neurons": (one_hot(7, 2), Rotate(200, absolute=True), LinearChange),
    "transport": (EYE, Affine(ROW, ROW[::-1]), Scaled),
    "transport of some": (one_hot(9, 0, 4), Affine((0.5, 2.0, -1.0), 0.3), Scaled),
    "transport within limits": (EYE, Affine(ROW, 0.5, lo=-0.5, hi=1.0), Mapped),
    "limits of some": (one_hot(9, 0, 4), Affine(2.0, 0.3, lo=-1.0, hi=0.5), Mapped),
    "matrix": (plane(), Affine(((0.5, 1.0), (-1.0, 0.25)), (0.1, 0.2)), LinearChange),
    "swap": (plane(), Swap((0.7, -0.2)), LinearChange),
}


def run(programs, h, index=None, strength=None):
    table = Table(programs)
    plan = table.plan(None if index is None else torch.tensor(index), strength, None)
    passing = Passing(plan, *h.shape[:2], None, None)
    for step in plan.steps[SITE]:
        h, _ = step.run(h, passing.chosen(step.window, h.device), passing)
    return h


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_alone(case, rescale):
    basis, map, form = CASES[case]
    one = Intervention(SITE, basis, map, strength=0.7, rescale=rescale)
    assert form is None or Table([(one,)]).groups[SITE][0].form is form
    torch.testing.assert_close(run([(one,)], H), one.apply(H), atol=1e-12, rtol=1e-12)
    strengths = torch.tensor([0.0, 0.5, -1.0, 2.0, 0.0, 1.0])
    new = run([(one,)], H, strength=strengths)
    for row, s in enumerate(strengths.tolist()):
        torch.testing.assert_close(new[row : row + 1], one.apply(H[row : row + 1], strength=s), atol=1e-12, rtol=1e-12)
    assert torch.equal(new[0], H[0]) and torch.equal(new[4], H[4])


@pytest.mark.parametrize("rescale", [False, True])
def test_each_row_by_another_program(rescale):
    """In one batch maps of one class meet over other bases, some of which are single coordinates."""
    ones = [
        Intervention(SITE, b, m, strength=0.1 * n + 0.3, rescale=rescale) for n, (b, m, _) in enumerate(CASES.values())
    ]
    others = [Intervention(SITE, plane(seed=n), i.map, strength=-0.4, rescale=rescale) for n, i in enumerate(ones[:5])]
    programs = [(i,) for i in ones + others]
    index = [*range(len(programs)), -1, 2, -1]
    h = torch.randn(len(index), 3, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    new = run(programs, h, index)
    for row, number in enumerate(index):
        before = h[row : row + 1]
        expected = before if number < 0 else programs[number][0].apply(before)
        torch.testing.assert_close(new[row : row + 1], expected, atol=1e-12, rtol=1e-12)
        assert number >= 0 or torch.equal(new[row], h[row])


def test_coordinates_that_do_not_move_keep_their_bits():
    h = H.float()
    new = run([(Intervention(SITE, one_hot(9, 0), Affine(2.0, 0.3)),)], h)
    still = [n for n in range(D) if n not in (0, 9)]
    assert torch.equal(new[..., still], h[..., still]) and not torch.equal(new[..., 9], h[..., 9])


@pytest.mark.parametrize("angle", [0.0, 30.0, 200.0])
def test_the_norm_is_kept(angle):
    one = Intervention(SITE, plane().float(), Rotate(angle, absolute=True))
    new = run([(one,)], H.float())
    torch.testing.assert_close(new.norm(dim=-1), H.float().norm(dim=-1), atol=0, rtol=1e-6)
    x = new @ one.basis
    torch.testing.assert_close(
        torch.atan2(x[..., 1], x[..., 0]).cos(), torch.full((6, 3), math.cos(math.radians(angle)))
    )


def test_what_single_coordinates_are():
    bases = one_hot(3, 1), plane(), -one_hot(3), (one_hot(2) + one_hot(4)) / math.sqrt(2)
    places = [Intervention(SITE, basis, Clip.ablate()).coordinates for basis in bases]
    assert places[0].tolist() == [3, 1] and places[1:] == [None, None, None]
