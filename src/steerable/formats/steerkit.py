"""steerkit: `<name>.probe.safetensors` with `direction.<method>` [d] of unit norm, one layer a file, the rest in
metadata.

Layers 0 to L - 1 are blocks, -1 is the embeddings and L the final norm's output. `auto_alpha`, if any, is the
strength that its calibration chose and that its `steer` uses; `default_method` says which of the vectors. Its GGUF
files are read by `formats.gguf`.
"""

from __future__ import annotations

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def _sniff(source: Source) -> bool:
    return {"hook_site", "n_total_layers", "layer"} <= set(source.safetensors[0])


def _read(source: Source, options: Options) -> Direction:
    """The vector of `label`, by default that of `default_method`."""
    meta, tensors = source.safetensors
    if meta.get("kind") == "multinomial":
        raise UsageError(
            "it is a multinomial probe of steerkit's, a classifier: give the .probe.safetensors of one concept"
        )
    directions = {name.removeprefix("direction."): v for name, v in tensors.items() if name.startswith("direction.")}
    options.label = options.take("label") or meta.get("default_method")
    method = options.choose(sorted(directions), "direction")
    site = _site(meta)
    try:
        strength = checks.number(float(meta.get("auto_alpha") or 1.0), "its auto_alpha")
    except ValueError:
        raise UsageError(f"its auto_alpha is {meta['auto_alpha'][:30]!r}: expected a number") from None
    return imported(
        "steerkit",
        {site: checks.vector(directions[method], f"its direction.{method}")},
        f"its layer {meta['layer']} is {site}",
        method=method,
        behaviour=source.path.name.removesuffix(".safetensors").removesuffix(".probe"),
        model_id=meta.get("model_id", ""),
        strength=strength,
        about={key: checks.plain(meta.get(key)) for key in ("hook_name", "auto_alpha", "metrics_json")},
    )


def _site(meta: dict[str, str]) -> Site:
    if meta["layer"] == "-1":
        return Site("resid_pre", 0)
    layer, blocks = (checks.layer_number(meta[key], f"its {key}") for key in ("layer", "n_total_layers"))
    if layer >= blocks:
        raise UsageError(
            f"its layer {layer} of {blocks} blocks is behind the final norm, where the residual stream has ended: save "
            "the probe of a block"
        )
    if meta["hook_site"] not in SITES:
        raise UsageError(f"its hook_site is {meta['hook_site'][:30]!r}: expected one of {', '.join(SITES)}")
    return Site(meta["hook_site"], layer)


FORMATS = (Format("steerkit", _sniff, _read),)
