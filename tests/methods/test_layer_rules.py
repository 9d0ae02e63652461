"""The rules for layers against plain loops, and where none fulfils them."""

import pytest
import torch

from steerable.methods.layer_rules import accurate_layers, opposite_sign_layers, separated_layers, separation_along
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableWarning, UsageError

SITES = [Site(kind, layer) for layer in (1, 2, 3) for kind in ("attn_out", "mlp_out")]


def classes(shifts, gap=1.0, seed=0):
    """Two classes at +-gap along the first axis, moved along it by a shift that differs between sites."""
    g = torch.Generator().manual_seed(seed)
    a, b = {}, {}
    for s, shift in zip(SITES, shifts, strict=True):
        a[s], b[s] = (0.3 * torch.randn(30, 5, generator=g) for _ in range(2))
        a[s][:, 0] += gap + shift
        b[s][:, 0] += -gap + shift
    return a, b


def first_axis():
    return Direction({s: torch.eye(5)[:2] for s in SITES})


def test_opposite_signs_at_every_site_of_a_layer():
    a, b = classes([0, 0, 0, 3, -3, 3])  # the first layer's both sites, one of the second's, none of the third's
    assert opposite_sign_layers(first_axis(), a, b) == [1]
    with pytest.raises(UsageError, match="at no layer"):
        opposite_sign_layers(first_axis(), *classes([3] * 6))


def test_activations_count_with_unit_norm():
    """One long activation would turn the sign of the mean."""
    at = SITES[0]
    direction = Direction({at: torch.tensor([1.0, 0.0])})
    a = {at: torch.tensor([[1.0, 0.1], [1.0, 0.1], [-9.0, 1.0]])}
    assert opposite_sign_layers(direction, a, {at: torch.tensor([[-1.0, 0.5]])}) == [1]


def test_accurate():
    scores = dict(zip(map(str, SITES), [0.95, 0.99, 0.99, 0.9, 1.0, 0.91], strict=True))
    direction = Direction({s: torch.ones(4) for s in SITES}, stats={"accuracy": scores})
    assert accurate_layers(direction) == [1, 3]
    with pytest.raises(UsageError, match="the best on 0.95"):
        accurate_layers(direction, above=0.96)
    with pytest.raises(UsageError, match="no accuracy"):
        accurate_layers(first_axis())


def test_separation_is_d_prime():
    a, b = classes([0] * 6)
    direction = Direction({s: torch.ones(5) for s in SITES})
    scores = separation_along(direction, a, b)
    for s in SITES:
        x, y = a[s].double().sum(1).numpy(), b[s].double().sum(1).numpy()
        expected = (x.mean() - y.mean()) / ((x.var(ddof=1) + y.var(ddof=1)) / 2) ** 0.5
        assert scores[s] == pytest.approx(expected)
    assert separation_along(direction, b, a)[SITES[0]] == pytest.approx(-scores[SITES[0]])
    best = max(scores, key=scores.__getitem__).layer
    assert separated_layers(direction, a, b) == [best]
    assert separated_layers(direction, a, b, count=3) == [1, 2, 3]


def test_sinks_are_left_out():
    a, b = classes([0] * 6)
    expected = separation_along(first_axis(), {s: h[1:] for s, h in a.items()}, b)
    for h in a.values():
        h[0] *= 1e6
    with pytest.warns(SteerableWarning):
        assert separation_along(first_axis(), a, b) == pytest.approx(expected)


def test_errors():
    a, b = classes([0] * 6)
    with pytest.raises(UsageError, match="no activations at attn_out.1"):
        separation_along(first_axis(), {SITES[1]: a[SITES[1]]}, {SITES[1]: b[SITES[1]]})
    with pytest.raises(UsageError, match="5 and 2 dimensions"):
        separation_along(first_axis(), *({s: h[:, :2] for s, h in group.items()} for group in (a, b)))
    with pytest.raises(UsageError, match="single one"):
        separation_along(first_axis(), {s: h[:1] for s, h in a.items()}, b)
    with pytest.raises(UsageError, match="4 layers are asked for"):
        separated_layers(first_axis(), a, b, count=4)
