"""What every format of a vector file shares: the `Format` itself, the file, the caller's options, and the checks.

Nothing about a file is guessed. Where its content does not settle what is meant, `NeedsChoice` names the option that
does; what is not sound, or is no vector, raises UsageError with a clause that follows "cannot import FILE: ".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from steerable.formats.checks import MAX_LAYER, layer_number
from steerable.models.loading import Loaded
from steerable.models.sources import find
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store import torch_archive
from steerable.store.errors import SteerableWarning, UsageError
from steerable.store.files import check_header, refuse_stand_in, strict_json, write_atomic

#: No vector file is larger; what is, is a model or damaged. Bytes.
MAX_BYTES = 2 << 30
#: Files of records, which hold no vectors.
RECORDS = (".jsonl", ".ndjson")
#: How the names of the first member of archives begin that are not torch's.
_OTHER_ARCHIVES = (b"README.md", b"checksums.json", b"manifest.json")
#: `Format.strength` of a format that holds the strength, and of one that has no place for it.
HELD, FOLDED = "held", "folded"


class NeedsChoice(UsageError):
    """The file is sound, but one thing about it must be said. `option`: which (as a Python argument name)."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True)
class Format:
    """One kind of vector file. `register_format` adds one from outside the package (docs/formats.md shows it).

    sniff: whether a file is of this format; None: the content cannot tell, so that the caller must name the format.
    read: the file as a direction, whose `stats["imported"]` may say more about it (see `imported`).
    write: makes the file of a direction, by `write_atomic`.
    limits: one sentence on what the format cannot hold.
    strength: how to give the strength to the other tool; `HELD`: the file holds it; `FOLDED`: it has no place for it.
    general: it is the format of whatever no other format claims.
    additions_only: it cannot hold another map than `shift`, a schedule, or that the activation is rescaled.
    """

    name: str
    sniff: Callable[[Source], bool | None] = lambda source: False
    read: Callable[[Source, Options], Direction] | None = None
    write: Callable[[Direction, Path, WriteOptions], None] | None = None
    limits: str = ""
    strength: str = "give it where the file is used"
    general: bool = False
    additions_only: bool = True


class Source:
    """A file or folder that may hold vectors. Its content is loaded once, when first asked for, and never unpickled.

    kind: "folder", "gguf", "torch", "zip" (another archive), "safetensors", "json" or "" by the first bytes. Raises
    UsageError for what is not there, no regular file, a Git LFS pointer, or too large.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.head, self.kind = path, b"", "folder"
        if path.is_dir():
            return
        if not path.is_file():
            raise UsageError("it is no regular file" if path.exists() else "there is no such file")
        refuse_stand_in(path)
        self.size = path.stat().st_size
        if self.size > MAX_BYTES:
            raise UsageError(f"its {self.size / 2**30:.1f} GiB are too large for a vector file: that is a model")
        with open(path, "rb") as file:
            self.head = file.read(64)
        length = int.from_bytes(self.head[:8], "little")
        if self.head.startswith(b"GGUF"):
            self.kind = "gguf"
        elif self.head.startswith(torch_archive.MAGIC):
            self.kind = "zip" if self.head[30:].startswith(_OTHER_ARCHIVES) else "torch"
        elif self.head[8:9] == b"{" and 2 <= length <= self.size - 8:
            self.kind = "safetensors"
        else:
            is_json = path.suffix not in RECORDS and self.head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))
            self.kind = "json" if is_json else ""

    @cached_property
    def torch(self) -> Any:
        """What `torch.save` wrote; None for other files. Raises UsageError where it is not sound."""
        return torch_archive.load(self.path.read_bytes()) if self.kind == "torch" else None

    @cached_property
    def json(self) -> Any:
        """The value of a JSON file; None for other files. Raises UsageError where it is not sound."""
        try:
            return strict_json(self.path.read_bytes().decode("utf-8-sig")) if self.kind == "json" else None
        except ValueError as error:  # decoding errors are ValueErrors
            raise UsageError(f"it is not sound JSON ({str(error)[:80]})") from None

    @cached_property
    def safetensors(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Metadata and tensors; none for other files. Raises UsageError where it is not sound."""
        from safetensors import SafetensorError, safe_open

        if self.kind != "safetensors":
            return {}, {}
        try:
            check_header(self.path)
            with safe_open(str(self.path), framework="pt") as file:
                return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise UsageError(f"it is not a sound safetensors file ({str(error)[:120]})") from error


def small_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a small file; None where there is none, or not a sound one."""
    try:
        value = strict_json(path.read_bytes()) if path.is_file() and path.stat().st_size <= 1 << 20 else None
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@dataclass
class Options:
    """What the caller of `import_file` says about a file. `asked` remembers what a reader looked at, so that an option
    that means nothing for a format is refused instead of ignored."""

    format: str | None = None
    layer: int | None = None
    layers_from: int | None = None
    layout: str | None = None
    label: str | None = None
    site: str | None = None
    asked: set[str] = field(default_factory=set)

    def take(self, name: str) -> Any:
        """The value of an option, None where it was not given."""
        self.asked.add(name)
        return getattr(self, name)

    def need_layer(self, reason: str) -> int:
        """The layer. Raises NeedsChoice with the reason where it was not given."""
        if (layer := self.take("layer")) is None:
            raise NeedsChoice("layer", reason)
        return layer_number(layer, "--layer")

    def choose(self, names: Sequence[str], what: str, check: Callable[[], object] = lambda: None) -> str:
        """The name that `label` gives, or the only one; `check` runs before the caller is asked.

        Raises NeedsChoice, UsageError for a name that is not there.
        """
        label = self.take("label") or (names[0] if len(names) == 1 else None)
        listed = ", ".join(names)[:400]
        if label is None:
            check()
            raise NeedsChoice("label", f"it holds {len(names)} {what}s: give --label, one of {listed}")
        if label not in names:
            raise UsageError(f"it has no {what} {label!r}: expected one of {listed}")
        return str(label)

    def refuse_unused(self, format_name: str) -> None:
        """Raises UsageError for an option that was given but that this format has no use for."""
        for name in ("layers_from", "layout", "label", "site"):
            value = getattr(self, name)
            harmless = name == "layers_from" and value == 0  # it says what the format says
            if value is not None and name not in self.asked and not harmless:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value} means nothing for a {format_name} file: leave it out"
                )


@dataclass(frozen=True)
class WriteOptions:
    """What the caller of `export_file` says about the other tool's model; see there."""

    to: str
    model_type: str = ""
    n_layers: int | None = None
    blocks: str = "layers"
    model: str | Path | Loaded | None = None

    def count_blocks(self, vectors: Mapping[int, Tensor], *, or_those: bool = False) -> int:
        """The number of the model's blocks: `n_layers`, or what the config of `model` says.

        or_those: where neither is given, the number of vectors if the first blocks have one each. Raises UsageError
        for an unknown or too small number, and for a model of another width.
        """
        count = self.n_layers
        if count is None and self.model is not None:
            count = self._blocks_of_model(vectors)
        if count is None and or_those and sorted(vectors) == list(range(len(vectors))):
            count = len(vectors)
        if count is None:
            raise UsageError(
                f"a {self.to} file has a row for every block of the model: give --n-layers, the model's number of "
                "blocks, or --model"
            )
        if not max(vectors) < count <= MAX_LAYER:
            raise UsageError(f"--n-layers {count} does not fit: the direction has a vector for block {max(vectors)}")
        return count

    def _blocks_of_model(self, vectors: Mapping[int, Tensor]) -> int:
        if isinstance(self.model, Loaded):
            config = self.model.model.config
        else:
            from transformers import AutoConfig

            source = find(str(self.model))
            try:
                config = AutoConfig.from_pretrained(**source.arguments, trust_remote_code=False)
            except Exception as error:  # foreign files: the library that reads them raises what it likes
                reason = " ".join(str(error).split())[:160]
                raise UsageError(
                    f"--model {self.model} is not a loadable model ({reason}); give --n-layers instead"
                ) from error
        config = config.get_text_config()
        width = int(next(iter(vectors.values())).shape[-1])
        if width != config.hidden_size:
            raise UsageError(f"the vectors have width {width}, but --model {self.model} has {config.hidden_size}")
        return int(config.num_hidden_layers)


def warn(message: str) -> None:
    """Give a SteerableWarning; `import_file` and `export_file` return it, too."""
    warnings.warn(message, SteerableWarning, stacklevel=3)


# --- reading ---


def imported(
    format: str,
    vectors: Mapping[Site, Tensor],
    convention: str,
    *,
    about: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Direction:
    """The direction that a reader returns.

    convention: one sentence on how the file's layer numbers were read. about: what else the file says (JSON-able).
    fields: of `Direction`. Raises UsageError where the vectors differ in width.
    """
    widths = sorted({int(v.shape[-1]) for v in vectors.values()})
    if len(widths) > 1:
        raise UsageError(f"its vectors differ in width ({', '.join(map(str, widths))}): expected one width")
    facts = {key: value for key, value in (about or {}).items() if value not in (None, "", {})}
    record = {"format": format, "convention": convention, **facts}
    return Direction(dict(vectors), stats={"imported": record}, **fields)


# --- writing: a direction as plain additions ---


def warn_of_gate(direction: Direction, to: str) -> None:
    """Warn of a gate, which the format cannot hold."""
    if direction.gate != "all":
        warn(f"a {to} file cannot hold the gate '{direction.gate}': the vectors will be added at every token")


def one_vector(v: Tensor, site: Site, to: str) -> Tensor:
    """The vector [d] of a direction at one site. Raises UsageError for a subspace [k, d]."""
    if v.dim() == 2 and len(v) > 1:
        raise UsageError(f"a {to} file holds one vector a layer, the direction has {len(v)} at {site}")
    return v.reshape(-1)


def output_of_block(site: Site, to: str) -> int:
    """The block whose output is the stream at this site. Raises UsageError where there is none."""
    block = site.layer - (site.kind == "resid_pre")
    if site.kind not in ("resid_pre", "resid_post") or block < 0:
        raise UsageError(f"a {to} file holds vectors for the outputs of blocks, none for {site}")
    return block


def block_outputs(direction: Direction, to: str) -> dict[int, Tensor]:
    """The vectors as {block: [d]}, added to the output of that block, in the order of blocks.

    `resid_pre.k` becomes block k - 1: its output is the same stream. Raises UsageError where the direction is more
    than additions to the residual stream; warns of a gate.
    """
    vectors: dict[int, Tensor] = {}
    for site, v in direction.vectors.items():
        flat, block = one_vector(v, site, to), output_of_block(site, to)
        if block in vectors:
            raise UsageError(f"two vectors of this direction are for the output of block {block}: {to} holds one")
        vectors[block] = flat
    warn_of_gate(direction, to)
    return dict(sorted(vectors.items()))


Encoder = Callable[[dict[int, Tensor], Direction, WriteOptions], bytes]


def writer(encode: Encoder) -> Callable[[Direction, Path, WriteOptions], None]:
    """`Format.write` for a file of `block_outputs`, from what makes its bytes."""

    def write(direction: Direction, path: Path, options: WriteOptions) -> None:
        write_atomic(path, encode(block_outputs(direction, options.to), direction, options))

    return write
