"""Where a model's files are: the bundled model's, the fetched one's, a folder's, a GGUF file, the hub's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from steerable.store.errors import UsageError
from steerable.store.files import sha256, sha256_of

_POCKET = Path(__file__).parent / "pocket" / "weights"
#: The LoRA adapter that makes `smol-think` of `smol`, in the format of PEFT.
SMOL_ADAPTER = Path(__file__).parent / "smol" / "adapter"
NAMES = "'pocket', 'smol', 'smol-think', a folder, a .gguf file or a hub name"


class Source(NamedTuple):
    """What transformers' loaders are to read: a folder or a hub name, and the GGUF file in it, if it is one."""

    place: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of any `from_pretrained`."""
        named = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {"pretrained_model_name_or_path": self.place} | named

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine by a path, so that no hub is asked."""
        return Path(self.place).exists()

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of a local file, or of the files in a local folder that say what a model is; None for the hub's."""
        place = Path(self.place)
        path = place if self.gguf_file is None else place / self.gguf_file
        if path.is_file():
            return sha256(path)
        if not place.is_dir():
            return None
        ends = ("safetensors", "bin", "json", "jinja", "model")
        return sha256_of({f.name: f for end in ends for f in place.glob(f"*.{end}")})

    def __str__(self) -> str:
        """The name under which `find` finds it again from any folder."""
        place = str(Path(self.place).resolve()) if self.is_local else self.place
        return place if self.gguf_file is None else f"{place}/{self.gguf_file}"


def pocket_path() -> Path:
    """Folder of the bundled model. Raises UsageError where this installation holds no weights."""
    if not is_whole(_POCKET):
        raise UsageError(
            f"the bundled model's weights are missing from {_POCKET}: "
            "reinstall steerable, or train them with `steerable pocket train`"
        )
    return _POCKET


def smol_path() -> Path:
    """Folder of the model that `steerable fetch smol` gets. Raises UsageError before it is there."""
    if not is_whole(folder := smol_target()):
        raise UsageError("the model 'smol' is not on this machine yet: get it with `steerable fetch smol`")
    return folder


def smol_target() -> Path:
    """Where that folder is or will be: in the cache of the Hugging Face libraries (HF_HOME, HF_ASSETS_CACHE)."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "steerable" / "smol"


def smol_think_path() -> Path:
    """Folder of the model that `steerable fetch smol-think` makes. Raises UsageError before it is there, and where it
    was made with another adapter than this installation's."""
    if not is_whole(folder := smol_think_target()):
        raise UsageError(
            "the model 'smol-think' (of this version) is not on this machine yet: get it with "
            "`steerable fetch smol-think`"
        )
    return folder


def smol_think_target() -> Path:
    """Where that folder is or will be; its parent is named by the adapter that is merged into it."""
    return smol_target().parent / f"adapter-{sha256(SMOL_ADAPTER / 'adapter_model.safetensors')[:12]}" / "smol-think"


def is_whole(folder: Path) -> bool:
    """Whether a named model's folder has its config and its weights."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors"))


def local_path(name: str | Path) -> Path:
    """The path that a model's name stands for: a folder, a file, or nothing there for a hub name."""
    paths = {"pocket": pocket_path, "smol": smol_path, "smol-think": smol_think_path}
    return paths[str(name)]() if str(name) in paths else Path(name)


def find(name: str | Path, gguf_file: str | None = None) -> Source:
    """What a model's name means.

    Args:
        name: "pocket", "smol", "smol-think", a folder, a GGUF file, a hub name, or a hub name with a GGUF file behind
            it (owner/model/file.gguf). A folder without a config.json, but with one GGUF file, means that file.
        gguf_file: the GGUF file to take from a folder or a hub repository.

    Raises:
        UsageError: a named model that is not there, no such GGUF file, several of them in a folder, a part of a split
            one, or no package to read them with.
    """
    path = local_path(name)
    if path.is_dir():
        if gguf_file is None and not (path / "config.json").exists():
            gguf_file = _only_gguf(path)
        if gguf_file is not None and not (path / gguf_file).is_file():
            raise UsageError(f"there is no file {gguf_file} in {path}{_listed(_ggufs(path))}")
        return Source(str(path), _readable(gguf_file))
    if gguf_file is not None:
        return Source(str(name), _readable(gguf_file))
    if path.suffix.lower() == ".gguf":
        parts = path.parts
        if path.is_file():
            return Source(str(path.parent), _readable(path.name))
        if path.is_absolute() or len(parts) < 3 or Path(*parts[:-1]).is_dir():  # no file of the hub, at any rate
            raise UsageError(f"there is no file {path}{_listed(_ggufs(path.parent))}")
        return Source("/".join(parts[:2]), _readable("/".join(parts[2:])))
    return Source(str(name))


def _ggufs(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.gguf"))


def _only_gguf(folder: Path) -> str | None:
    files = _ggufs(folder)
    if len(files) > 1:
        raise UsageError(f"{folder} holds several GGUF models: give one as the model{_listed(files)}")
    return files[0] if files else None


def _listed(files: list[str]) -> str:
    return f" ({', '.join(files[:8])}{', ...' if len(files) > 8 else ''})" if files else ""


def _readable(file: str | None) -> str | None:
    """The file, if transformers can be expected to read it."""
    if file is None:
        return None
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"{file} is a GGUF file, and reading it needs the library gguf: pip install gguf")
    stem = Path(file).stem
    if "-of-" in stem and stem.rpartition("-of-")[2].isdigit():
        raise UsageError(
            f"{file} is one part of a split GGUF model, of which transformers reads only whole files: join the parts "
            "with llama.cpp's `llama-gguf-split --merge`"
        )
    return file
