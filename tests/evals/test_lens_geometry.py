import math

import pytest
import torch

from steerable.evals.logit_lens import geometry, stable_rank
from steerable.store.errors import UsageError


@pytest.mark.parametrize(
    ("table", "rank"),
    [
        (torch.eye(4, 9) * 3, 4.0),
        (torch.outer(torch.tensor([1.0, -2, 5]), torch.arange(1.0, 7)), 1.0),
        (torch.diag(torch.tensor([2.0, 1.0])), 5 / 4),
        (torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]), 3 / 2),
        (torch.zeros(2, 5), None),
    ],
)
def test_stable_rank_of_known_tables(table, rank):
    assert stable_rank(table) == (None if rank is None else pytest.approx(rank))
    assert geometry(table)["stable_rank"] == (None if rank is None else pytest.approx(rank))


def test_norms_cosines_and_singular_values():
    v = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    v[2] = 0
    found = geometry(v)
    assert found["norms"] == pytest.approx([math.sqrt(sum(x * x for x in row)) for row in v.tolist()])
    for i in range(4):
        for j in range(4):
            if 2 in (i, j):
                assert found["cosines"][i][j] is None
            else:
                dot = sum(a * b for a, b in zip(v[i].tolist(), v[j].tolist(), strict=True))
                assert found["cosines"][i][j] == pytest.approx(dot / found["norms"][i] / found["norms"][j])
    # the squares of the singular values are the eigenvalues of the Gram matrix
    gram = torch.linalg.eigvalsh(v.double() @ v.double().T).flip(0).clamp_min(0).sqrt()
    assert found["singular_values"] == pytest.approx(gram.tolist(), abs=1e-6)


def test_random_vectors_lie_within_their_own_bounds():
    generator = torch.Generator().manual_seed(1)
    inside = cosines = 0
    for _ in range(40):
        found = geometry(torch.randn(5, 64, generator=generator))
        low, high = found["random_stable_rank"]
        inside += low <= found["stable_rank"] <= high
        cosines += abs(found["cosines"][0][1]) <= found["random_cosine"]
    assert inside >= 34 and cosines >= 34


def test_one_long_vector_has_a_stable_rank_near_one_whatever_it_says():
    found = geometry(torch.eye(3, 8) * torch.tensor([100.0, 1, 1])[:, None])
    assert found["stable_rank"] < 1.001 and found["random_stable_rank"][1] < 1.01


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(0, 4), torch.full((2, 2), torch.nan)])
def test_bad_tables(bad):
    with pytest.raises(UsageError, match="finite vectors"):
        geometry(bad)
