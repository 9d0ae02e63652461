"""Where a vector matters: the effect of every layer x behaviour on the next token at span onsets.

Four metrics, each a number per (onset position i, layer l, vector u):

- `published`           |u^ . g|   with g = grad_{a_l(i)} 1/2 mean_v (log p_v)^2 and u^ = u / ||u||
- `published_rescaled`  |u . g|    the same with the vector as it is added, rescaled to the mean activation
- `fisher`              s^2 / 2 Var_{v ~ p} ((J_l u)_v), J_l = d logits(i) / d a_l(i): the second-order
                        term of KL(p || p after adding s u)
- `exact`               KL(p || p after adding s u to a_l(i)), by really adding it

`published` is what the code of Venhoff et al. 2025 (arXiv 2506.18167, section 3.3, Figure 3) computes. The
paper calls it a KL divergence, but the code's `kl_div(log p, log p)` without `log_target` has minus this
gradient, and a KL divergence from a distribution to itself has gradient zero, so its second order, `fisher`,
is the first term that says anything. The place of the published peak depends on the unit normalisation; hence
both forms. `exact` is what the others estimate (activation patching; Heimersheim & Nanda 2024, arXiv
2404.15255).

Cost. The loss is read at the very position whose activation is differentiated, so nothing flows through other
positions. One pass without gradients stores the keys and values of a chain; then all its onsets are
single-token *queries* in one row, each masked to its own past and itself. One backward over them serves all
layers and behaviours of both published metrics; `fisher` and `exact` take one such query for every (onset,
behaviour, layer), many to a pass. Long chains are read in pieces, and the longer the past, the fewer queries
share a pass: memory grows with a chain's length by its key/value cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from steerable.chains.windows import AlignedChain
from steerable.engines.memory import with_fewer_rows
from steerable.engines.pool import MapBlocks, Report, default_threads, loader, map_blocks
from steerable.models import loading as models
from steerable.models.copies import private_copy
from steerable.models.reading import CHUNK, Queries
from steerable.models.taps import tap, width_at
from steerable.steering.direction import Direction
from steerable.steering.float64 import wide
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import read_json, write_json

METRICS = ("published", "published_rescaled", "fisher", "exact")
ONSETS = ("other", "own", "all")


@dataclass(frozen=True)
class Attribution:
    """Effects of a set of directions.

    `effects[behaviour][metric]` is float64 [chains, layers]: the mean over a chain's onsets, NaN where the
    chain has none or the metric was not taken on it.
    """

    sites: tuple[Site, ...]
    effects: dict[str, dict[str, Tensor]]

    def mean(self, behaviour: str, metric: str) -> Tensor:
        """Mean over chains, float64 [layers]; NaN where nothing was measured."""
        return self._measured(behaviour, metric).mean(0)

    def std(self, behaviour: str, metric: str) -> Tensor:
        """Standard deviation over chains (not of the mean), float64 [layers]."""
        values = self._measured(behaviour, metric)
        return (values - values.mean(0)).square().mean(0).sqrt()

    def rank_correlation(self, behaviour: str, metric: str, reference: str = "exact") -> float:
        """Spearman correlation over layers of two mean curves, on the chains that have both."""
        a, b = self.effects[behaviour][metric], self.effects[behaviour][reference]
        both = ~(a.isnan().any(1) | b.isnan().any(1))
        return spearman(a[both].mean(0), b[both].mean(0))

    def peak(self, behaviour: str, metric: str = "exact", margin: int | None = None) -> int:
        """Layer of the largest mean effect, leaving out `margin` layers at either end.

        Default: an eighth of the depth, at most 4, the published "4 ... L-4" scaled to depth.
        """
        curve = self.mean(behaviour, metric)
        edge = min(4, round(len(curve) / 8)) if margin is None else margin
        inner = curve[edge : len(curve) - edge]
        if not len(inner) or inner.isnan().any():
            raise UsageError(
                f"no peak for {behaviour!r} by {metric!r}: of {len(curve)} layers, "
                f"those left without {edge} at either end hold no measurement"
            )
        return self.sites[edge + int(inner.argmax())].layer

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: {behaviour: {metric: {mean, std, chains}, "rank_correlation": {metric: rho}}}; missing
        is None."""
        result: dict[str, Any] = {}
        for behaviour, metrics in self.effects.items():
            entry: dict[str, Any] = {
                metric: {
                    "mean": _plain(self.mean(behaviour, metric)),
                    "std": _plain(self.std(behaviour, metric)),
                    "chains": len(self._measured(behaviour, metric)),
                }
                for metric in metrics
            }
            if "exact" in metrics:
                cheap = [metric for metric in metrics if metric != "exact"]
                rho = _plain(torch.tensor([self.rank_correlation(behaviour, m) for m in cheap], dtype=torch.float64))
                entry["rank_correlation"] = dict(zip(cheap, rho, strict=True))
            result[behaviour] = entry
        return result

    def _measured(self, behaviour: str, metric: str) -> Tensor:
        values = self.effects[behaviour][metric]
        return values[~values.isnan().any(1)]


def attribute(
    model: Any,
    chains: Sequence[AlignedChain],
    directions: Mapping[str, Direction],
    *,
    metrics: Sequence[str] = METRICS,
    onsets: str = "other",
    limit: int = 50,
    sample: int = 16,
    strength: float = 1.0,
    costly_onsets: int | None = None,
    max_queries: int = 512,
    chunk: int = CHUNK,
    workers: int = 1,
    spread: MapBlocks = map_blocks,
    keep: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Attribution:
    """Measure the effect of each direction, at each of its layers, on the next token at span onsets.

    The module says what the metrics are. Chains are measured one by one, on `workers` processes or wherever `spread`
    puts them, as in `span_means`; the result does not depend on that.

    Args:
        model: the model, or what wraps it.
        chains: annotated chains (`chains.windows.AlignedChain`).
        directions: {behaviour: Direction}; all must hold one vector [d] at the same sites.
        metrics: some of `METRICS`.
        onsets: for each behaviour, the spans with another label ("other", as published), with its "own" label, or
            "all".
        limit: how many chains that have spans are used, the first ones.
        sample: how many of those for `fisher` and `exact`, which cost a query for every layer and behaviour.
        strength: s, which scales the vector in `fisher` and `exact`.
        costly_onsets: most onsets of a chain for these two, evenly spread; None: all.
        max_queries: most single tokens in a forward pass.
        chunk: most tokens of a chain that are read in one.
        workers, spread: where the chains are measured.
        keep: a folder that takes what was measured on each chain, for the next call with the same arguments.
        progress: called with the number of chains measured, and of all.

    Returns:
        An `Attribution`: effects [chains, layers] by behaviour and metric, their means, peaks and correlations.

    Raises:
        UsageError: for unknown metrics or onsets, no usable chain, or directions that do not fit the model or each
            other.

    Example:
        >>> from steerable.chains.windows import AlignedChain, TokenSpan
        >>> chain = AlignedChain("task", 0, tuple(range(40, 60)), (TokenSpan("a", 4, 9), TokenSpan("b", 9, 15)))
        >>> st.attribute(model, [chain], {"a": direction}, metrics=["exact"]).mean("a", "exact").shape
        torch.Size([1])
    """
    if unknown := [m for m in metrics if m not in METRICS]:
        raise UsageError(f"unknown metric {unknown[0]!r}: expected some of {METRICS}")
    if onsets not in ONSETS:
        raise UsageError(f"unknown onsets {onsets!r}: expected one of {ONSETS}")
    model = models.unwrap_to_run(model)
    used = [chain for chain in chains if chain.spans][:limit]
    if not used:
        raise UsageError("attribution needs at least one chain with annotated spans, got none")
    if max_queries < 1 or (costly_onsets is not None and costly_onsets < 1):
        raise UsageError(f"max_queries ({max_queries}) and costly_onsets ({costly_onsets}) must be at least 1")
    sites, _ = _stack(directions, model)
    shape = (len(used), len(sites))
    effects = {b: {m: torch.full(shape, torch.nan, dtype=torch.float64) for m in metrics} for b in directions}
    files = [None if keep is None else keep / f"{c}.json" for c in range(len(used))]
    missing = [c for c, file in enumerate(files) if file is None or not file.exists()]
    done = 0

    def take(c: int, measured: Iterable[tuple[str, str, Any]]) -> None:
        nonlocal done
        for behaviour, metric, values in measured:
            effects[behaviour][metric][c] = torch.as_tensor(values, dtype=torch.float64)
        done += 1
        if progress is not None:
            progress(done, len(used))

    def store(place: int, measured: list[tuple[str, str, Tensor]]) -> None:
        c = missing[place]
        take(c, measured)
        if (file := files[c]) is not None and all(values.isfinite().all() for _, _, values in measured):
            write_json(file, [(behaviour, metric, values.tolist()) for behaviour, metric, values in measured])

    for c, file in enumerate(files):
        if file is not None and c not in missing:
            take(c, read_json(file, list))
    workers = max(1, min(workers, len(missing)))
    spread(
        _Measurement(dict(directions), tuple(metrics), onsets, strength, costly_onsets, max_queries, chunk),
        [(used[c], c < sample) for c in missing],
        setup=loader(model) if workers > 1 or spread is not map_blocks else tuple,
        workers=workers,
        threads=default_threads(model, workers),
        finished=store,
        context=(model, None),
        collect=False,
    )
    return Attribution(sites, effects)


@dataclass(frozen=True)
class _Measurement:
    """What is measured on each chain, in this process or in a worker; the fields are arguments of `attribute`."""

    directions: dict[str, Direction]
    metrics: tuple[str, ...]
    onsets: str
    strength: float
    costly_onsets: int | None
    max_queries: int
    chunk: int

    def __call__(self, loaded: Any, block: tuple[AlignedChain, bool], report: Report) -> list[tuple[str, str, Tensor]]:
        """(behaviour, metric, mean effect over the chain's onsets [L]) of one chain."""
        (chain, is_sampled), model = block, loaded[0]
        sites, vectors = _stack(self.directions, model)
        onsets = {b: [i for i, s in enumerate(chain.spans) if self._takes(s.label, b)] for b in self.directions}
        queries = Queries(model, chain.ids, [span.start - 1 for span in chain.spans], chunk=self.chunk)
        cheap = [m for m in self.metrics if m.startswith("published")]
        measured: list[tuple[str, str, Tensor]] = []
        if cheap:
            published = partial(_measure_published, queries, sites, vectors, onsets, cheap)
            measured += with_fewer_rows(self.max_queries, lambda most: list(published(most)))
        pairs = [(i, b) for b, places in onsets.items() for i in _evenly(places, self.costly_onsets)]
        for metric, measure in (("fisher", fisher), ("exact", exact)):
            if metric in self.metrics and is_sampled and pairs:
                index = torch.tensor([i for i, _ in pairs])
                added = torch.stack([self.strength * vectors[b] for _, b in pairs])  # [pairs, L, d]
                values = with_fewer_rows(self.max_queries, partial(measure, queries, sites, index, added))
                values = values.cpu().double()
                for behaviour in dict.fromkeys(b for _, b in pairs):
                    rows = [row for row, (_, b) in enumerate(pairs) if b == behaviour]
                    measured.append((behaviour, metric, values[rows].mean(0)))
        return measured

    def _takes(self, label: str, behaviour: str) -> bool:
        return self.onsets == "all" or (label == behaviour) == (self.onsets == "own")


def _evenly(places: list[int], most: int | None) -> list[int]:
    """At most `most` of the places, evenly spread."""
    if most is None or len(places) <= most:
        return places
    return [places[(2 * k + 1) * len(places) // (2 * most)] for k in range(most)]


def _measure_published(
    queries: Queries,
    sites: Sequence[Site],
    vectors: Mapping[str, Tensor],
    picked: Mapping[str, list[int]],
    metrics: Sequence[str],
    max_queries: int,
) -> Iterator[tuple[str, str, Tensor]]:
    stacked = torch.stack(list(vectors.values()))  # [behaviours, L, d]
    parts = []
    # Every query once; only the products with the vectors are kept.
    for index in torch.arange(len(queries)).split(queries.per_pass(max_queries)):
        gradients = published_gradients(queries, sites, index)
        parts.append(wide(torch.einsum("lqd,bld->bql", gradients, stacked.to(gradients)).abs()))
    products = torch.cat(parts, 1)
    for (behaviour, onsets), product in zip(picked.items(), products, strict=True):
        if onsets:
            raw = product[onsets].mean(0)
            norms = vectors[behaviour].norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
            unit = raw / wide(norms).to(raw.device)
            for metric in metrics:
                yield behaviour, metric, (unit if metric == "published" else raw).cpu()


def published_gradients(queries: Queries, sites: Sequence[Site], index: Tensor | None = None) -> Tensor:
    """Gradient of 1/2 mean_v (log p_v)^2 of each query (default: all) with respect to its own activation at each
    site: [L, Q, d], in one pass."""
    seen: dict[Site, Tensor] = {}

    def hold(site: Site) -> Callable[[Tensor], Tensor]:
        def fn(h: Tensor) -> Tensor:
            # The lowest site becomes the leaf: nothing below it is differentiated. Above, a view is a node of
            # its own that everything later reads, also at sites (resid_mid) whose value no module passes on.
            new = h.view_as(h) if h.requires_grad else h.detach().requires_grad_()
            seen.setdefault(site, new)  # a block may be run a second time, for its backward pass
            return new

        return fn

    queries = queries.lean()
    with torch.enable_grad(), tap(queries.model, {site: hold(site) for site in sites}):
        # Queries do not see each other, so the gradient of the sum is each query's own gradient.
        loss = _log_probs(queries.logits(index)).square().mean(-1).sum() / 2
        gradients = torch.autograd.grad(loss, [seen[site] for site in sites])
    return torch.stack([g[0].to(queries.device) for g in gradients])


def fisher(queries: Queries, sites: Sequence[Site], index: Tensor, added: Tensor, max_queries: int = 512) -> Tensor:
    """1/2 Var_p(J u) for every row and site, [N, L], by forward-mode differentiation.

    Row n is query `index[n]` with vector `added[n, l]` at `sites[l]` (`added` [N, L, d]).
    """

    def inject(h: Tensor, rows: Tensor, u: Tensor) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(h)
        tangent = torch.zeros_like(primal) if tangent is None else tangent.clone()
        tangent[0, rows] += u.to(tangent)
        return forward_ad.make_dual(primal, tangent)

    def measure(chunk: Tensor, run: Callable[[], Tensor]) -> Tensor:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            try:
                logits, tangent = forward_ad.unpack_dual(run())
            except NotImplementedError as error:
                reason = " ".join(str(error).split()).split(". ")[0]
                raise SteerableError(
                    f"this model has no forward-mode derivative, leave 'fisher' out ({reason})"
                ) from error
            p = _log_probs(logits).exp()
            change = tangent.to(p)
            return (p * (change - (p * change).sum(-1, keepdim=True)).square()).sum(-1) / 2

    # Of the kernels for attention and for mixtures of experts, only the plain ones have a forward-mode derivative.
    if getattr(models.text_config(queries.model), "_experts_implementation", None) is not None:
        queries = queries.on(private_copy(queries.model, _experts_implementation="eager"))
    # Plain attention holds scores, weights, the tangents of both, and what leads from one to the other.
    return _sweep(queries, sites, index, added, queries.per_pass(max_queries, 24), inject, measure)


def exact(queries: Queries, sites: Sequence[Site], index: Tensor, added: Tensor, max_queries: int = 512) -> Tensor:
    """KL(p || p_patched) for every row and site, [N, L]; arguments as for `fisher`."""

    def inject(h: Tensor, rows: Tensor, u: Tensor) -> Tensor:
        h = h.clone()
        h[0, rows] = (h[0, rows] + u.to(h.device)).to(h.dtype)  # u is float32 or wider, and so is the sum
        return h

    results = []
    size = queries.per_pass(max_queries)
    for begin in range(0, len(index), size):  # so that the unpatched distributions of so many queries are held
        part = slice(begin, begin + size)
        chosen = index[part].unique()  # sorted
        with torch.no_grad():
            base = _log_probs(queries.logits(chosen))

        def measure(asked: Tensor, run: Callable[[], Tensor], base: Tensor = base, chosen: Tensor = chosen) -> Tensor:
            before = base[torch.searchsorted(chosen, asked).to(base.device)]
            return (before.exp() * (before - _log_probs(run()))).sum(-1)

        results.append(_sweep(queries, sites, index[part], added[part], size, inject, measure))
    return torch.cat(results)


def _sweep(
    queries: Queries,
    sites: Sequence[Site],
    index: Tensor,
    added: Tensor,
    size: int,
    inject: Callable[..., Tensor],
    measure: Callable[[Tensor, Callable[[], Tensor]], Tensor],
) -> Tensor:
    """Every row of `index` at every site, `size` to a forward pass: [N, L] float64.

    `inject(h, rows, u)` puts `u` into the given tokens of `h` at a site; `measure(queries of the pass, run)`
    runs the pass and gives a number for each of its tokens.
    """
    added = added.to(queries.device)
    row = torch.arange(len(index)).repeat(len(sites))
    layer = torch.arange(len(sites)).repeat_interleave(len(index))
    result = torch.empty(len(row), dtype=torch.float64)
    for begin in range(0, len(row), size):
        part = slice(begin, begin + size)
        edits: dict[Site, Callable[[Tensor], Tensor]] = {}
        for at in layer[part].unique().tolist():
            tokens = (layer[part] == at).nonzero()[:, 0]
            edits[sites[at]] = partial(inject, rows=tokens, u=added[row[part][tokens], at])
        chosen = index[row[part]]
        with torch.no_grad(), tap(queries.model, edits):
            result[part] = measure(chosen, partial(queries.logits, chosen)).cpu().double()
    return result.view(len(sites), len(index)).T


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman rank correlation of two curves [n], ties at their mean rank; NaN if one is constant or has NaN."""
    from scipy.stats import rankdata

    if len(a) < 2 or a.isnan().any() or b.isnan().any():
        return float("nan")
    return float(
        torch.corrcoef(torch.tensor([rankdata(curve).tolist() for curve in (a, b)], dtype=torch.float64))[0, 1]
    )


def _log_probs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _stack(directions: Mapping[str, Direction], model: Any) -> tuple[tuple[Site, ...], dict[str, Tensor]]:
    """The common sites, sorted, and each behaviour's vectors [L, d] on the model's device."""
    if not directions:
        raise UsageError("attribution needs at least one direction, got none")
    sites = tuple(sorted(next(iter(directions.values())).vectors))
    vectors = {}
    for behaviour, direction in directions.items():
        if tuple(sorted(direction.vectors)) != sites:
            raise UsageError(f"all directions must hold the same sites, but {behaviour!r} holds others than the first")
        models.warn_of_other(model, direction.model_id, direction.model_revision)
        stacked = [direction.vectors[site].squeeze(0) for site in sites]
        if any(v.ndim != 1 for v in stacked):
            raise UsageError(f"attribution needs one vector a site, but {behaviour!r} holds a subspace")
        for site, v in zip(sites, stacked, strict=True):
            if len(v) != (width := width_at(model, site.kind, site.layer)):
                raise UsageError(
                    f"the {behaviour!r} vector at {site} has width {len(v)}, but the model has {width} there"
                )
        if len(widths := {len(v) for v in stacked}) > 1:
            raise UsageError(
                f"attribution needs vectors of one width, but {behaviour!r} has {sorted(widths)}: give one kind of site"
            )
        vectors[behaviour] = torch.stack(stacked).to(models.device(model.get_input_embeddings()))
    return sites, vectors


def _plain(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
