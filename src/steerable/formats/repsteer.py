"""repsteer: a folder for one vector at one site, `manifest.json`, `tensors.safetensors` and `checksums.json`.

The manifest's {"site": {"component": "resid_post", "layer", ...}} counts blocks from 0. The vector "direction" [d] is
of unit norm where "normalization" is "l2"; the strength is given where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported, small_json
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import sha256

_MANIFEST, _TENSORS, _CHECKSUMS = "manifest.json", "tensors.safetensors", "checksums.json"
_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def _folder(source: Source) -> Path:
    return source.path if source.kind == "folder" else source.path.parent


def _manifest(source: Source) -> dict[str, Any]:
    return small_json(_folder(source) / _MANIFEST) or {}


def _sniff(source: Source) -> bool:
    if source.kind != "folder" and (source.kind != "safetensors" or source.path.name != _TENSORS):
        return False
    manifest = _manifest(source)
    return manifest.get("kind") == "artifact_bundle" or {"artifact_type", "schema_version"} <= set(manifest)


def _read(source: Source, options: Options) -> Direction:
    """Raises UsageError for a bundle, whatever is no direction, other sites and wrong checksums."""
    folder, manifest = _folder(source), _manifest(source)
    if "artifact_type" not in manifest:
        raise UsageError("it is a bundle of repsteer's: give one of the folders in its folder components")
    if (kind := manifest["artifact_type"]) != "direction":
        raise UsageError(f"it is a {str(kind)[:20]} of repsteer's: only a direction can be added as a vector")
    digests = (small_json(folder / _CHECKSUMS) or {}).get("files")
    for name in (_MANIFEST, _TENSORS):
        if not (folder / name).is_file() or not isinstance(digests, Mapping) or name not in digests:
            raise UsageError(f"it has no {name} or no checksum of it: give the whole folder as repsteer wrote it")
        content = Source(folder / name)  # refuses a Git LFS pointer, which has another checksum
        if sha256(content.path) != str(digests[name]).removeprefix("sha256:"):
            raise UsageError(f"the checksum of its {name} is wrong: the file is damaged or was changed")
    tensors = Source(folder / _TENSORS).safetensors[1]
    site = _site(manifest.get("site"))
    model: Mapping[str, Any] = one if isinstance(one := manifest.get("model"), Mapping) else {}
    return imported(
        "repsteer",
        {site: checks.vector(tensors.get("direction"), "its tensor 'direction'")},
        f"its site is {site.kind} of block {site.layer}",
        method=str(checks.plain(manifest.get("method")) or ""),
        model_id=str(checks.plain(model.get("id")) or ""),
        model_revision=str(checks.plain(model.get("revision")) or ""),
        about={key: checks.plain(manifest.get(key)) for key in ("normalization", "dataset_fingerprint", "seed")},
    )


def _site(value: Any) -> Site:
    site: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    kind = site.get("component")
    whole = site.get("unit") is None and not site.get("tensor_path") and site.get("io", "output") == "output"
    if kind not in _SITES or not whole or site.get("stream", "language") != "language":
        raise UsageError(f"its site is {str(dict(site))[:120]}: expected the whole width of {', '.join(_SITES)}")
    return Site(str(kind), checks.layer_number(site.get("layer"), "the layer of its site"))


FORMATS = (Format("repsteer", _sniff, _read),)
