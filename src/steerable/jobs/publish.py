"""Directions on the Hugging Face hub: a folder of direction files with a model card, uploaded or read.

The folder is the same locally and on the hub: `<behaviour>.safetensors` files and `README.md`. The card says what the
vectors are for, of which model, where, how strong, under which licence, and what steering with them did beside its
controls, taken from a run's report.json. Its text is `model_card.md` beside this file.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steerable.evals.intervals import TOO_FEW, is_bounded
from steerable.evals.metrics import all_metrics
from steerable.formats.exchange import layers_text
from steerable.pages.cells import CONTROLS, Cell, doses, measured, setting_of, unsteered
from steerable.steering.direction import Direction
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import write_atomic
from steerable.store.text import one_line

TAGS = ("steering-vector", "activation-steering", "steerable")
_SUFFIX = ".safetensors"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
#: SPDX names that the hub knows; others are "other" with their name beside.
_LICENCES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense", "openrail", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "gemma",
}  # fmt: skip

Directions = Direction | Mapping[str, Direction]
Report = str | Path | Mapping[str, Any] | None


def save_pretrained(
    directions: Directions, folder: str | Path, *, report: Report = None, licence: str = "", repo_id: str = ""
) -> list[Path]:
    """Write direction files and a model card into a folder.

    Args:
        directions: one, or several by file name without suffix; one alone is named after its behaviour.
        folder: made where it is not there.
        report: a run's report.json (path, folder of the run, or content), for the card's evaluation.
        licence: of the vectors, an SPDX name such as "Apache-2.0"; default what the directions say.
        repo_id: the hub's name for the folder, for the card.

    Returns:
        The paths that were written, the card last.

    Raises:
        UsageError: no directions, names that the hub would not take, different licences, or no such report.

    Example:
        >>> [path.suffix for path in st.save_pretrained(direction, "to-share", licence="Apache-2.0")]
        ['.safetensors', '.md']
    """
    named = _named(directions)
    card = model_card(named, report=report, licence=licence, repo_id=repo_id)
    paths = [direction.save(Path(folder) / f"{name}{_SUFFIX}") for name, direction in named.items()]
    return [*paths, write_atomic(Path(folder) / "README.md", card)]


def push_to_hub(
    directions: Directions,
    repo_id: str,
    *,
    report: Report = None,
    licence: str = "",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload steering vectors",
    create_pr: bool = False,
) -> str:
    """Create the hub repository where it does not exist and upload what `save_pretrained` writes.

    Args:
        directions, report, licence: as for `save_pretrained`.
        repo_id: "owner/name".
        private: whether a new repository is.
        revision: branch to commit to, made where it does not exist; default main.
        token: default the one of `hf auth login` or HF_TOKEN; it is never stored.
        commit_message, create_pr: of the commit; whether it is proposed as a pull request.

    Returns:
        The URL of the commit.

    Raises:
        UsageError: a bad name, or missing rights.
        SteerableError: the hub cannot be reached, or refuses.

    Example:
        >>> st.push_to_hub(direction, "me/backtracking", private=True)  # doctest: +SKIP
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
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        except Exception as error:  # the hub's client and the network libraries below it have a class for everything
            raise _explained(error, repo_id) from error
    return str(getattr(commit, "commit_url", None) or commit)


def from_pretrained(
    repo_or_folder: str | Path, *, filename: str | None = None, revision: str | None = None, token: str | None = None
) -> Direction:
    """Read one direction from a folder or a hub repository.

    Args:
        repo_or_folder: a folder, or "owner/name" on the hub.
        filename: which, with or without suffix; needed where there are several.
        revision: branch, tag or commit.
        token: default the one of `hf auth login` or HF_TOKEN.

    Returns:
        The direction.

    Raises:
        UsageError: there is none, several, or no such repository.
        SteerableError: the hub cannot be reached, or the file is not sound.

    Example:
        >>> st.from_pretrained("to-share").layers  # doctest: +SKIP
        [3]
    """
    files = _files(repo_or_folder, revision, token)
    if filename is None and len(files) > 1:
        raise UsageError(
            f"{repo_or_folder} holds {len(files)} direction files: give filename=, one of {', '.join(files)}"
        )
    name = files[0] if filename is None else filename.removesuffix(_SUFFIX) + _SUFFIX
    if name not in files:
        raise UsageError(f"{repo_or_folder} has no {name}: it holds {', '.join(files)}")
    return Direction.load(_local(repo_or_folder, name, revision, token))


def load_all(
    repo_or_folder: str | Path, *, revision: str | None = None, token: str | None = None
) -> dict[str, Direction]:
    """Every direction of a folder or a hub repository, by file name without suffix. Raises as `from_pretrained`."""
    files = _files(repo_or_folder, revision, token)
    return {f.removesuffix(_SUFFIX): Direction.load(_local(repo_or_folder, f, revision, token)) for f in files}


def _named(directions: Directions) -> dict[str, Direction]:
    if isinstance(directions, Direction):
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", directions.behaviour).strip("-._")[:80]
        directions = {slug or "direction": directions}
    if not directions:
        raise UsageError("there is no direction to save")
    for name in directions:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", name):
            raise UsageError(f"{name!r} cannot name a file on the hub: use letters, digits, '-', '_' and '.'")
    return dict(directions)


def _report(report: Report) -> Mapping[str, Any]:
    if report is None or isinstance(report, Mapping):
        return report or {}
    path = Path(report) / "report.json" if Path(report).is_dir() else Path(report)
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
    from huggingface_hub import errors

    if isinstance(error, SteerableError):
        return error
    reason = re.sub(r"hf_\w+", "hf_...", " ".join(str(error).split()))[:200]
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{repo_id} has no such revision on the hub")
    if isinstance(error, errors.RepositoryNotFoundError | errors.GatedRepoError):
        return UsageError(f"there is no hub repository {repo_id}, or your token does not open it: `hf auth login`")
    if isinstance(error, errors.EntryNotFoundError | errors.HFValidationError):
        return UsageError(f"the hub does not know {repo_id} ({reason})")
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return UsageError(f"the hub refused access to {repo_id}: log in with `hf auth login` or give token=")
    return SteerableError(f"the hub did not do what was asked for {repo_id} ({type(error).__name__}: {reason})")


# --- the card ---


def model_card(directions: Directions, *, report: Report = None, licence: str = "", repo_id: str = "") -> str:
    """The text of the model card, with the YAML header that the hub demands.

    Args:
        directions, report, licence, repo_id: as for `save_pretrained`.

    Raises:
        UsageError: the directions have different licences.
    """
    from huggingface_hub import ModelCard, ModelCardData

    named, content = _named(directions), _report(report)
    licences = {d.licence for d in named.values() if d.licence}
    if not licence and len(licences) > 1:
        raise UsageError(f"the directions have different licences ({', '.join(sorted(licences))}): give licence=")
    licence = licence or next(iter(licences), "")
    models = sorted({d.model_id for d in named.values() if _REPO.fullmatch(d.model_id)})
    fields: dict[str, Any] = {"tags": [*TAGS, *sorted({_tag(d.behaviour) for d in named.values() if d.behaviour})]}
    if models:
        fields |= {"base_model": models if len(models) > 1 else models[0], "base_model_relation": "adapter"}
    if licence.lower() in _LICENCES:
        fields["license"] = licence.lower()
    elif licence:
        fields |= {"license": "other", "license_name": _tag(licence)}
    cells = content.get("cells")
    cells = [cell for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else []
    first, direction = next(iter(named.items()))
    source = json.dumps(one_line(repo_id or "folder/or/owner/name"))
    config, hashes = (v if isinstance(v := content.get(key), Mapping) else {} for key in ("config", "hashes"))
    card = ModelCard.from_template(
        ModelCardData(library_name="steerable", **fields),
        template_path=str(Path(__file__).with_name("model_card.md")),
        title=", ".join(dict.fromkeys(_cell(d.behaviour) for d in named.values() if d.behaviour)) or "unnamed",
        vectors=[_vector_row(name, d) for name, d in named.items()],
        source=source + (f', filename="{first}"' if len(named) > 1 else ""),
        model=json.dumps(one_line(direction.model_id or "the/model")),
        strength=f"{direction.strength:g}",
        measured=bool(cells),
        tables=[table for d in named.values() for table in _tables(d, cells)],
        run_model=f"`{_cell(str(config['model']))}`" if config.get("model") else "the run's model",
        same_files=all(hashlib.sha256(d.to_bytes()).hexdigest() in hashes.values() for d in named.values()),
        origins=[(name, _origin(d)) for name, d in named.items()],
        licence_text=_cell(licence),
    )
    return str(card.content)


def _cell(text: str) -> str:
    """A text that stays in its cell of a Markdown table."""
    return one_line(text.replace("|", "\\|"))


def _tag(name: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-")[:60] or "other"


def _vector_row(name: str, d: Direction) -> list[str]:
    kinds = dict.fromkeys(site.kind for site in d.vectors)
    where = "; ".join(f"{kind} {layers_text(s.layer for s in d.vectors if s.kind == kind)}" for kind in kinds)
    model = d.model_id + (f" at {d.model_revision[:12]}" if d.model_revision else "")
    width = str(next(iter(d.vectors.values())).shape[-1])
    norms = _range([float(v.double().norm()) for v in d.vectors.values()])
    norms += f" / {_range([d.norms[site] for site in d.vectors if site in d.norms])}"
    cells = (
        f"`{name}{_SUFFIX}`",
        d.behaviour,
        model,
        where,
        width,
        f"`{d.map}`",
        f"{d.strength:g}",
        f"`{d.gate}`",
        norms,
    )
    return [_cell(text) for text in cells]


def _range(numbers: list[float]) -> str:
    if not numbers:
        return "not stated"
    return " to ".join(dict.fromkeys(f"{x:.3g}" for x in (min(numbers), max(numbers))))


def _origin(d: Direction) -> str:
    facts = {"method": d.method, "made by": d.created_by, "SHA-256 of the data": d.data_sha256}
    facts |= {key: d.stats[key] for key in ("window", "baseline", "spans", "chains") if key in d.stats}
    return "; ".join(f"{key}: {_cell(str(value))}" for key, value in facts.items() if value not in ("", None))


def _tables(d: Direction, cells: list[Cell]) -> Iterator[dict[str, Any]]:
    """A table for each setting in which the behaviour's vector was tried at this direction's layers."""
    tried = [c for c in cells if c.get("behaviour") == d.behaviour and c.get("strength")]
    for setting in dict.fromkeys(setting_of(c) for c in tried if set(c.get("layers") or ()) <= set(d.layers)):
        groups = [("none", 0.0, zero)] if (zero := unsteered(cells, d.behaviour)) else []
        for control in (None, *CONTROLS):
            by_strength = doses(cells, d.behaviour, control, setting)
            groups += [(control or "this one", s, group) for s, group in by_strength.items() if s]
        named_in_cells = {key for *_, group in groups for cell in group for key in cell}
        metrics = [metric for metric in all_metrics().values() if metric.name in named_in_cells]
        keys = [f"fractions.{d.behaviour}", *(metric.name for metric in metrics)]
        yield {
            "behaviour": _cell(d.behaviour),
            "layers": layers_text(setting.layers),
            "where": _cell(setting.where),
            "metrics": [metric.title.lower() for metric in metrics],
            "rows": [
                [what, f"{s:+g}", _chains(group), *(_mean(group, key) for key in keys)] for what, s, group in groups
            ],
        }


def _chains(cells: list[Cell]) -> str:
    """Tasks x samples of each cell."""
    return " + ".join(
        " x ".join(f"{n:g}" if isinstance(n := cell.get(key), int | float) else "?" for key in ("tasks", "samples"))
        for cell in cells
    )


def _mean(cells: list[Cell], metric: str) -> str:
    value = measured(cells, metric)
    if value is None:
        return "not measured"
    return f"{value.mean:.3g} ({f'{value.low:.3g} to {value.high:.3g}' if is_bounded(value) else TOO_FEW})"
