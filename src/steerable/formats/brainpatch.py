"""BrainPatch: `<name>.brainpatch`, a ZIP of `manifest.json`, `vectors.safetensors`, `checksums.json` and maybe a
README.

Each of the manifest's interventions {"layer", "hook": "residual_post", "vector", "coefficient", "site"} adds
coefficient * vector to the output of a block, counted from 0, times a strength, by default `default_strength`. Site
"prompt" or "continuation" is the gate.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steerable.formats import checks
from steerable.formats.base import Format, Options, Source, imported
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import UsageError
from steerable.store.files import strict_json

_MANIFEST, _VECTORS, _CHECKSUMS = "manifest.json", "vectors.safetensors", "checksums.json"
_GATES = {"all": "all", "prompt": "prompt", "continuation": "generated"}
_MAX_MEMBER = 64 << 20  # bytes when unpacked: a vector for every layer of the largest models fits


def _sniff(source: Source) -> bool:
    if source.kind != "zip":
        return False
    try:
        with zipfile.ZipFile(source.path) as archive:
            return {_MANIFEST, _VECTORS} <= set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UsageError(f"it is not a sound ZIP archive ({str(error)[:80]})") from error


def _members(path: Path) -> dict[str, bytes]:
    """The three members that are read, with the checksums that one of them holds. Raises UsageError."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(archive.getinfo(name).file_size > _MAX_MEMBER for name in (_MANIFEST, _VECTORS, _CHECKSUMS)):
                raise UsageError("one of its members is too large for a patch")
            members = {name: archive.read(name) for name in (_MANIFEST, _VECTORS, _CHECKSUMS)}
            digests = strict_json(members[_CHECKSUMS])
    except KeyError as error:
        raise UsageError(f"its archive lacks a member ({str(error)[:80]}): the file is damaged") from None
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError, NotImplementedError, EOFError) as error:
        raise UsageError(f"it is not a sound archive of a patch ({str(error)[:80]})") from error
    for name in (_MANIFEST, _VECTORS):
        if not isinstance(digests, Mapping) or hashlib.sha256(members[name]).hexdigest() != digests.get(name):
            raise UsageError(f"the checksum of its {name} is wrong: the file is damaged or was changed")
    return members


def _read(source: Source, options: Options) -> Direction:
    """Raises UsageError for a schedule by tokens and for sites that differ."""
    members = _members(source.path)
    try:
        manifest = strict_json(members[_MANIFEST])
    except ValueError as error:
        raise UsageError(f"its {_MANIFEST} is not sound JSON ({str(error)[:80]})") from None
    if not isinstance(manifest, dict) or manifest.get("format_version") != "1.0":
        raise UsageError(f"its {_MANIFEST} is not of version 1.0 of the format")
    if manifest.get("schedule") is not None:
        raise UsageError("its strength follows a schedule of steps by token, which a direction cannot hold")
    entries = manifest.get("interventions")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise UsageError(f"its interventions are {checks.kind_of(entries)}: expected a list of objects")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _VECTORS
        path.write_bytes(members[_VECTORS])
        tensors = Source(path).safetensors[1]
    sums: dict[Site, Tensor] = {}
    for entry in entries:
        site, v = _term(entry, tensors)
        sums[site] = sums[site] + v if site in sums else v
    sites = {str(entry.get("site", "all")) for entry in entries}
    if len(sites) > 1 or not sites <= set(_GATES):
        raise UsageError(
            f"its interventions are for {', '.join(sorted(sites))[:80]}: expected one of {', '.join(_GATES)}"
        )
    model: Mapping[str, Any] = base if isinstance(base := manifest.get("base_model"), Mapping) else {}
    return imported(
        "brainpatch",
        {site: checks.vector(v, f"the vector of {site}") for site, v in sums.items()},
        "its layers are blocks",
        strength=checks.number(manifest.get("default_strength", 1.0), "its default_strength"),
        gate=_GATES[sites.pop()],
        behaviour=str(checks.plain(manifest.get("name", "")) or ""),
        model_id=str(checks.plain(model.get("model_id")) or ""),
        model_revision=str(checks.plain(model.get("revision")) or ""),
        licence=str(checks.plain(manifest.get("license")) or ""),
        about={key: checks.plain(manifest.get(key)) for key in ("description", "evidence_level", "max_abs_strength")},
    )


def _term(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Site, Tensor]:
    """coefficient * vector of one intervention, in float64, and where it is added."""
    if (hook := entry.get("hook", "residual_post")) != "residual_post":
        raise UsageError(f"its hook is {str(hook)[:30]!r}: expected 'residual_post', the output of a block")
    name = str(entry.get("vector"))
    v = checks.vector(tensors.get(name), f"its vector {name[:40]!r}")
    layer = checks.layer_number(entry.get("layer"), "the layer of an intervention")
    return Site("resid_post", layer), v.double() * checks.number(entry.get("coefficient", 1.0), "a coefficient")


FORMATS = (Format("brainpatch", _sniff, _read),)
