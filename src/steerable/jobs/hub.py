"""Directions on the Hugging Face hub: a folder of direction files with a model card, uploaded or read.

The folder is the same locally and on the hub: `<behaviour>.safetensors` files and `README.md`. The card says what the
vectors are for, of which model, where, how strong, under which licence, and what steering with them did beside its
controls, taken from a run's report.json.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerable.steering.direction import Direction
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import write_atomic

CARD = "README.md"
TAGS = ("steering-vector", "activation-steering", "steerable")
_SUFFIX = ".safetensors"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")

Directions = Direction | Mapping[str, Direction]


def save_pretrained(
    directions: Directions,
    folder: str | Path,
    *,
    report: str | Path | Mapping[str, Any] | None = None,
    licence: str = "",
    repo_id: str = "",
) -> list[Path]:
    """Write direction files and a model card into a folder, and return their paths.

    directions: one, or several by file name (without suffix); one alone is named after its behaviour. report: a run's
    report.json (path or content), for the card's evaluation. licence: of the vectors, an SPDX name such as
    "Apache-2.0"; default what the directions say. repo_id: the hub's name for the folder, for the card.
    Raises UsageError for file names that the hub would not take and for no directions.
    """
    named = _named(directions)
    card = model_card(named, report=report, licence=licence, repo_id=repo_id)
    folder = Path(folder)
    paths = [direction.save(folder / f"{name}{_SUFFIX}") for name, direction in named.items()]
    return [*paths, write_atomic(folder / CARD, card)]


def push_to_hub(
    directions: Directions,
    repo_id: str,
    *,
    report: str | Path | Mapping[str, Any] | None = None,
    licence: str = "",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload steering vectors",
    create_pr: bool = False,
) -> str:
    """Create the repository where it does not exist and upload what `save_pretrained` writes. Returns the commit's URL.

    token: default the one of `hf auth login` or HF_TOKEN; it is never stored. Raises UsageError for a bad name or
    missing rights, SteerableError where the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    if not _REPO.fullmatch(repo_id):
        raise UsageError(f"{repo_id!r} is not the name of a hub repository: expected 'owner/name'")
    api = HfApi(token=token, library_name="steerable")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(directions, folder, report=report, licence=licence, repo_id=repo_id)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        except Exception as error:  # the hub's client and the network libraries below it have a class for everything
            raise _explained(error, repo_id) from error
    return str(getattr(done, "commit_url", None) or done)


def from_pretrained(
    repo_or_folder: str | Path,
    *,
    filename: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Direction:
    """Read one direction from a folder or a hub repository.

    filename: which, with or without suffix; needed where there are several. revision: branch, tag or commit.
    Raises UsageError where there is none, several, or no such repository; SteerableError where the hub cannot be
    reached or the file is not sound.
    """
    files = _files(repo_or_folder, revision, token)
    if filename is None and len(files) == 1:
        wanted = files[0]
    elif filename is None:
        raise UsageError(
            f"{repo_or_folder} holds {len(files)} direction files: give filename=, one of {', '.join(files)}"
        )
    else:
        wanted = filename if filename.endswith(_SUFFIX) else filename + _SUFFIX
        if wanted not in files:
            raise UsageError(f"{repo_or_folder} has no {wanted}: it holds {', '.join(files)}")
    return Direction.load(_local(repo_or_folder, wanted, revision, token))


def load_all(
    repo_or_folder: str | Path, *, revision: str | None = None, token: str | None = None
) -> dict[str, Direction]:
    """Every direction of a folder or a hub repository, by file name without suffix. Raises as `from_pretrained`."""
    files = _files(repo_or_folder, revision, token)
    return {f.removesuffix(_SUFFIX): Direction.load(_local(repo_or_folder, f, revision, token)) for f in files}


def model_card(
    directions: Directions,
    *,
    report: str | Path | Mapping[str, Any] | None = None,
    licence: str = "",
    repo_id: str = "",
) -> str:
    """The card's text: a YAML header as the hub demands it and Markdown. Raises UsageError for mixed licences."""
    from steerable.jobs import hub_card

    named = _named(directions)
    content = _report(report)
    return hub_card.text(named, content, _licence(named, licence), repo_id, TAGS)


def _named(directions: Directions) -> dict[str, Direction]:
    if isinstance(directions, Direction):
        directions = {_slug(directions.behaviour) or "direction": directions}
    if not directions:
        raise UsageError("there is no direction to save")
    for name in directions:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", name):
            raise UsageError(f"{name!r} cannot name a file on the hub: use letters, digits, '-', '_' and '.'")
    return dict(directions)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:80]


def _licence(named: Mapping[str, Direction], said: str) -> str:
    found = {d.licence for d in named.values() if d.licence}
    if said:
        return said
    if len(found) > 1:
        raise UsageError(f"the directions have different licences ({', '.join(sorted(found))}): give licence=")
    return next(iter(found), "")


def _report(report: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any]:
    import json

    if report is None or isinstance(report, Mapping):
        return report or {}
    path = Path(report)
    path = path / "report.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the report {path} ({str(error)[:80]}): expected a run's report.json") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no report: expected the report.json of a run")
    return content


def _files(where: str | Path, revision: str | None, token: str | None) -> list[str]:
    """Names of the direction files. Raises UsageError for none."""
    if Path(where).is_dir():
        names = [p.name for p in Path(where).iterdir() if p.is_file()]
    elif _REPO.fullmatch(str(where)):
        from huggingface_hub import HfApi

        try:
            names = HfApi(token=token, library_name="steerable").list_repo_files(str(where), revision=revision)
        except Exception as error:
            raise _explained(error, str(where)) from error
    else:
        raise UsageError(f"there is no folder {where}, and it is no hub name 'owner/name' either")
    files = sorted(name for name in names if name.endswith(_SUFFIX) and "/" not in name)
    if not files:
        raise UsageError(f"{where} holds no direction files (*{_SUFFIX})")
    return files


def _local(where: str | Path, name: str, revision: str | None, token: str | None) -> Path:
    if Path(where).is_dir():
        return Path(where) / name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(where), name, revision=revision, token=token, library_name="steerable"))
    except Exception as error:
        raise _explained(error, str(where)) from error


def _explained(error: Exception, repo_id: str) -> SteerableError:
    """The hub client's error as one of ours; a token in it is never repeated."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, SteerableError):
        return error
    reason = re.sub(r"hf_\w+", "hf_...", " ".join(str(error).split()))[:200]
    if isinstance(error, RevisionNotFoundError):
        return UsageError(f"{repo_id} has no such revision on the hub")
    if isinstance(error, RepositoryNotFoundError | GatedRepoError):
        return UsageError(f"there is no hub repository {repo_id}, or your token does not open it: `hf auth login`")
    if isinstance(error, EntryNotFoundError | HFValidationError):
        return UsageError(f"the hub does not know {repo_id} ({reason})")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return UsageError(f"the hub refused access to {repo_id}: log in with `hf auth login` or give token=")
    return SteerableError(f"the hub did not do what was asked for {repo_id} ({type(error).__name__}: {reason})")
