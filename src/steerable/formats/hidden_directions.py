"""hidden-directions: tables [L, d] of raw differences by `torch.save`, and their bakes.

- a table: row i is the mean difference at hidden_states[i + 1], so it is of block i's output, but for the last row,
  which was read behind the final norm. Beside it `<name>.screen.json`, or a `manifest.json` of the folder, tells what
  it is;
- a bake: `advocate_bias.pt` = {"base_model", "layer", "components", "bias": [d], ...}, the sum of rows of one layer
  times their strengths, which its loader makes the bias of that block's `mlp.down_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported, small_json, warn
from steerable.models.families import post_norm_in
from steerable.steering.direction import Direction
from steerable.steering.site import Site

_BAKE = "advocate_bias.pt"
_BAKE_KEYS = {"base_model", "layer", "components", "bias"}


def _about(source: Source) -> dict[str, Any]:
    """What the files beside a table say of it: its screen, its row of the folder's manifest."""
    screen = small_json(source.path.with_suffix(".screen.json")) or {}
    manifest = small_json(source.path.with_name("manifest.json")) or {}
    listed = manifest.get("directions")
    rows = [row for row in listed if isinstance(row, Mapping)] if isinstance(listed, list) else []
    row: Mapping[str, Any] = next((row for row in rows if row.get("name") == source.path.stem), {})
    about = {"recommended_layer": screen.get("best_layer") if "cos_agreement" in screen else None}
    about |= {key: row.get(key) for key in ("recommended_layer", "recommended_alpha") if key in row}
    about |= {"verdict": screen.get("verdict"), "model": manifest.get("model") if row else None}
    return {key: checks.plain(value) for key, value in about.items() if value is not None}


def _is_table(source: Source) -> bool | None:
    if not isinstance(source.torch, Tensor) or source.torch.dim() != 2:
        return False
    return bool(_about(source)) or None


def _read_table(source: Source, options: Options) -> Direction:
    table, about = checks.rows(source.torch, "its table"), _about(source)
    last = len(table) - 1
    advice = ", though its author's files recommend it" if about.get("recommended_layer") == last else ""
    warn(f"row {last}, the last, was read behind the final norm and is no vector of block {last}'s output{advice}")
    return imported(
        "hidden-directions",
        checks.at_blocks(table),
        f"row i is block i's output, but for row {last}, which is behind the final norm",
        method="difference of means at the last token",
        model_id=str(about.pop("model", "")),
        about=about,
    )


def _is_bake(source: Source) -> bool:
    if source.kind == "folder":
        return (source.path / _BAKE).is_file()
    return isinstance(source.torch, Mapping) and set(source.torch) >= _BAKE_KEYS


def _read_bake(source: Source, options: Options) -> Direction:
    content = Source(source.path / _BAKE).torch if source.kind == "folder" else source.torch
    bake: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    layer = checks.layer_number(bake.get("layer"), "its layer")
    model = str(checks.plain(bake.get("base_model")) or "")
    if family := post_norm_in(model):
        warn(
            f"in {family} models a norm stands behind the MLP: its bias is not what is added to block {layer}'s output"
        )
    return imported(
        "hidden-directions-bake",
        {Site("resid_post", layer): checks.vector(bake.get("bias"), "its bias")},
        f"a bias of block {layer}'s down_proj, which adds to that block's output (no norm behind it)",
        model_id=model,
        about={key: checks.plain(value) for key, value in bake.items() if key not in ("bias", "base_model", "layer")},
    )


FORMATS = (
    Format("hidden-directions", _is_table, _read_table),
    Format("hidden-directions-bake", _is_bake, _read_bake),
)
