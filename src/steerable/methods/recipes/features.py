"""A recipe on a feature of a sparse autoencoder."""

from __future__ import annotations

from typing import Any

from steerable.methods.recipes.reading import origin
from steerable.methods.sparse_autoencoders import SparseAutoencoder
from steerable.models import loading as models
from steerable.models.taps import check_site, width_at
from steerable.steering.direction import Direction
from steerable.store.errors import UsageError


def sae(
    model: Any,
    tokenizer: Any,
    autoencoder: SparseAutoencoder,
    *,
    feature: int | None = None,
    along: Direction | None = None,
    strength: float = 1.0,
) -> Direction:
    """h' = h + alpha w_i, with w_i what feature i of a sparse autoencoder adds to the activation, at every token.

    Sparse autoencoders, Cunningham et al. 2023 (arXiv 2309.08600), whose decoder's rows are directions; to steer with
    one is the SAE of AxBench (arXiv 2501.17148), which multiplies it by the largest activation of the feature on
    texts. The feature is chosen by number, as lists of features with descriptions give it, or as the one whose row is
    nearest to a direction. alpha counts in rows of the decoder: what it is worth in activations of the feature depends
    on the autoencoder's normalisation, and `stats["coefficient"]` says how.

    Data: an autoencoder of this model in the format of SAELens (`st.read_sae`).

    Args:
        model: the model that the autoencoder was trained on.
        tokenizer: not used, as no text is read.
        autoencoder: what `st.read_sae` gives.
        feature: i; None: the feature nearest to `along`.
        along: a direction at the autoencoder's site; the ten features nearest to it are listed in `stats["nearest"]`.
        strength: alpha.

    Returns:
        A Direction at the autoencoder's site.

    Raises:
        UsageError: an autoencoder of another width or of a site that the model does not have, no such feature, or
            neither a feature nor a direction.

    Example:
        >>> autoencoder = st.SparseAutoencoder(Site("resid_post", 3), torch.eye(192))
        >>> st.recipes.sae(model, tokenizer, autoencoder, feature=123).at(3).argmax()
        tensor(123)
        >>> direction = Direction({Site("resid_post", 3): torch.arange(192.0)})
        >>> st.recipes.sae(model, tokenizer, autoencoder, along=direction).stats["feature"]
        191
    """
    site = autoencoder.site
    check_site(model, site)
    width = autoencoder.decoder.shape[1]
    if width != (expected := width_at(model, site.kind, site.layer)):
        whose = f", that of {autoencoder.model_name}" if autoencoder.model_name else ""
        raise UsageError(f"the autoencoder has width {width}{whose}, and the model has {expected} at {site}")
    if feature is None and along is None:
        raise UsageError("give feature, the number of a feature, or along, a direction whose nearest feature is taken")
    if along is not None:
        models.warn_of_other(model, along.model_id, along.model_revision)
    nearest = autoencoder.nearest(along) if along is not None else []
    chosen = nearest[0][0] if feature is None else feature
    stats = {"feature": chosen, "trained_on": autoencoder.model_name, "coefficient": autoencoder.coefficient}
    if nearest:
        stats["nearest"] = [list(pair) for pair in nearest]
    about = origin(model, f"feature {chosen}")
    return autoencoder.direction(chosen, method="feature of an autoencoder", strength=strength, stats=stats, **about)
