"""Dictionaries of concepts in activations, by k-means or semi-nonnegative factors, and shifts between the concepts.

xl-vlms (arXiv 2501.03012) explains activations by K concepts, X ~ A U with A [n, K] how much of each concept a row
holds and U [K, d] the concepts; what a concept says is read by the logit lens. It steers by differences of concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.vq import ClusterError, kmeans2
from torch import Tensor

from steerable.methods.rows import column, ordinary_masks
from steerable.models.sinks import Sinks
from steerable.steering.site import Site
from steerable.store.errors import UsageError

_STARTS = 10
_ITERATIONS = 500
_TOLERANCE = 1e-7
_ANY = Site("resid_post", 0)  # what is said of rows names a site, and a dictionary is of one


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Concepts U [K, d] float32 and what each row holds of them, A [n, K] float32; the largest concept comes first.

    rows: [n] bool, which of the activations that were given were used; A has a row for each of these. error: the share
    of the squares that A U leaves over; for k-means that of the centres.
    """

    concepts: Tensor
    amounts: Tensor
    rows: Tensor
    error: float

    @property
    def assignment(self) -> Tensor:
        """The concept that each row holds most of, [n] int64."""
        return self.amounts.argmax(1)


def kmeans_dictionary(activations: Tensor, count: int = 20, *, seed: int = 0, sinks: Sinks = "drop") -> Dictionary:
    """U = the centres of clusters that minimise sum_i ||x_i - u_(i)||^2, and A_ik = 1 / (1 + ||x_i - u_k||).

    k-means (Lloyd 1982) from the starts of k-means++ (Arthur and Vassilvitskii 2007), the best of ten; the amounts are
    those of xl-vlms' code (arXiv 2501.03012), which fits to the first set of features alone.

    Args:
        activations: [n, d], float64 inside.
        count: K.
        seed: of the starts.
        sinks: as in `contrasts.difference_of_means`.

    Returns:
        The dictionary; the cluster with most rows comes first.

    Raises:
        UsageError: for another shape, NaN, and more concepts than different rows.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.5], [9.0, 9.0], [9.0, 8.0]])
        >>> kmeans_dictionary(x, 2).concepts
        tensor([[0.0000, 0.5000],
                [9.0000, 8.5000]])
    """
    x, rows = _checked(activations, count, sinks)
    centres, labels = _clusters(x.numpy(), count, seed)
    sizes = np.bincount(labels, minlength=count)
    u = torch.from_numpy(centres[np.argsort(-sizes, kind="stable")])
    distances = torch.cdist(x, u, compute_mode="donot_use_mm_for_euclid_dist")
    rest = float(distances.amin(1).square().sum() / x.square().sum())
    return Dictionary(u.float(), (1 / (1 + distances)).float(), rows, rest)


def snmf_dictionary(activations: Tensor, count: int = 20, *, seed: int = 0, sinks: Sinks = "drop") -> Dictionary:
    """X ~ A U, of least ||X - A U||^2 with A >= 0 and U of any sign.

    Semi-nonnegative matrix factorisation (Ding, Li and Jordan 2010, "Convex and semi-nonnegative matrix
    factorizations"), as in xl-vlms (arXiv 2501.03012). In turn, with [M]+ and [M]- the positive and the negative parts,

        U = (A^T A)^-1 A^T X
        A = A sqrt( ([X U^T]+ + A [U U^T]-) / ([X U^T]- + A [U U^T]+) )

    from k-means' clusters plus 0.2, as in the paper. A factor can go from a row of U to a column of A: here the row
    that holds most of a concept holds 1 of it, so that differences of concepts are in the model's own units.

    Args:
        activations: [n, d], float64 inside.
        count: K.
        seed: of the start.
        sinks: as in `contrasts.difference_of_means`.

    Returns:
        The dictionary; the concept that most rows hold most of comes first.

    Raises:
        UsageError: for another shape, NaN, and more concepts than different rows.

    Example:
        >>> snmf_dictionary(torch.randn(30, 4), 3).concepts.shape
        torch.Size([3, 4])
    """
    x, rows = _checked(activations, count, sinks)
    _, labels = _clusters(x.numpy(), count, seed)
    a = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), count).double() + 0.2
    u, error = _factors(x, a)
    for _ in range(_ITERATIONS):
        cross, gram = x @ u.T, u @ u.T
        above = cross.clamp_min(0) + a @ (-gram).clamp_min(0)
        below = (-cross).clamp_min(0) + a @ gram.clamp_min(0)
        a = a * (above / below.clamp_min(1e-300)).sqrt()
        before = error
        u, error = _factors(x, a)
        if before - error <= _TOLERANCE * error:
            break
    most = a.amax(0).clamp_min(1e-300)
    a, u = a / most, u * most[:, None]
    order = torch.bincount(a.argmax(1), minlength=count).argsort(descending=True, stable=True)
    return Dictionary(u[order].float(), a[:, order].float(), rows, error)


def shift_vectors(concepts: Tensor) -> Tensor:
    """S[i, j] = u_j - u_i, what takes concept i to concept j.

    xl-vlms' fine steering (arXiv 2501.03012), with the paper's sign; its code stores u_i - u_j under the same name.
    The mean over all pairs is zero, so it steers nothing.

    Args:
        concepts: U [K, d].

    Returns:
        [K, K, d], in the concepts' type.

    Raises:
        UsageError: for another shape.

    Example:
        >>> shift_vectors(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))[0, 1]
        tensor([ 2., -1.])
    """
    if concepts.dim() != 2:
        raise UsageError(f"concepts must be [K, d], not {list(concepts.shape)}")
    return concepts[None] - concepts[:, None]


def concept_shifts(before: Tensor, after: Tensor, assignment: Sequence[int] | Tensor, count: int) -> Tensor:
    """D_k = the mean of after_m - before_m over the rows m of concept k.

    xl-vlms (arXiv 2501.03012): how training moved each concept; u_k + alpha D_k predicts the trained model's concept,
    from the base model's at alpha 0.

    Args:
        before: activations [n, d] of one model, float64 inside.
        after: of the same rows in the other.
        assignment: [n], the concept of each row, as `Dictionary.assignment`.
        count: K.

    Returns:
        [K, d] float32.

    Raises:
        UsageError: for other shapes, and for a concept without a row.

    Example:
        >>> concept_shifts(torch.zeros(3, 2), torch.tensor([[1.0, 0], [3, 0], [0, 4]]), [0, 0, 1], 2)
        tensor([[2., 0.],
                [0., 4.]])
    """
    if before.dim() != 2 or before.shape != after.shape:
        raise UsageError(f"both must be activations [n, d] of the same rows, not {list(before.shape)}, "
                         f"{list(after.shape)}")  # fmt: skip
    concept = torch.tensor(column(assignment, {_ANY: before}, "assignment"))
    if bool((concept < 0).any() or (concept >= count).any()):
        raise UsageError(f"the assignment must name concepts from 0 to {count - 1}")
    sizes = torch.bincount(concept, minlength=count)
    if not bool((sizes > 0).all()):
        raise UsageError(f"concept {int(sizes.argmin())} has no row, so its shift is not known: use fewer concepts")
    moved = (after.double() - before.double()).cpu()
    sums = torch.zeros(count, moved.shape[1], dtype=torch.float64).index_add(0, concept, moved)
    return (sums / sizes[:, None]).float()


def _checked(activations: Tensor, count: int, sinks: Sinks) -> tuple[Tensor, Tensor]:
    """The rows that are used, float64, and which they are. Raises UsageError."""
    if activations.dim() != 2 or not len(activations):
        raise UsageError(f"a dictionary is made of activations [n, d], not of {list(activations.shape)}")
    x = activations.cpu().double()
    if not bool(x.isfinite().all()):
        raise UsageError("the activations hold NaN or infinite numbers")
    masks, _ = ordinary_masks({_ANY: x}, sinks, stacklevel=4)
    x = x[masks[_ANY]]
    different = len(x.unique(dim=0))
    if not 1 <= count <= different:
        raise UsageError(f"{count} concepts are asked for: expected 1 to {different}, the number of different rows")
    return x, masks[_ANY]


def _factors(x: Tensor, a: Tensor) -> tuple[Tensor, float]:
    """The U of least squares for A, and the share of the squares that A U leaves over."""
    u = torch.linalg.pinv(a) @ x
    return u, float((x - a @ u).square().sum() / x.square().sum())


def _clusters(x: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The centres [K, d] and the cluster of each row, the best of some starts. Raises UsageError."""
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for start in range(_STARTS):
        try:
            centres, labels = kmeans2(
                x, count, iter=_ITERATIONS, minit="++", missing="raise", seed=(seed + start) % 2**32
            )
        except ClusterError:  # a cluster lost its rows
            continue
        error = float(((x - centres[labels]) ** 2).sum())
        if best is None or error < best[0]:
            best = error, centres, labels
    if best is None:
        raise UsageError(f"no {count} clusters that all have rows were seen: ask for fewer concepts")
    return best[1], best[2]
