"""Records as dictionaries from files, folders and the Hugging Face hub, whatever they hold (see `chains.tables`).

JSON lines, JSON and CSV are read with Python's own modules; everything else with the optional `datasets` library.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from steerable.chains.records import read_bytes, read_jsonl
from steerable.store.errors import SteerableError, UsageError

Row = Mapping[str, Any]

#: Short names of data sets on the hub: (id, configuration, split).
HUB: dict[str, tuple[str, str | None, str]] = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default", "train"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
}
_SPLITS = ("test", "train", "validation", "valid", "dev", "eval")
_HUB = re.compile(r"hf:(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<first>[^:\[\]]+))?(?::(?P<second>[^:\[\]]+))?")


def read_rows(place: str, options: Mapping[str, str]) -> tuple[Iterable[Row], str]:
    """The records of a source, and a short name for ids. `options` may give `config`, `split` and `revision`.

    UsageError for a source that is unknown, missing or not readable; SteerableError where the hub is not reached.
    """
    name, _, split = place.partition(":")
    path = Path(place)
    if name in HUB and not path.exists():
        identity, config, usual = HUB[name]
        return _from_hub(identity, {"split": split or usual, **({"config": config} if config else {}), **options}), name
    if place.startswith("hf:"):
        if not (match := _HUB.fullmatch(place)):
            raise UsageError(f"{place!r} is no data set of the hub: expected hf:<id>[:<config>][:<split>]")
        first, second = match["first"], match["second"]
        given = {"config": first, "split": second} if second else {"split" if first in _SPLITS else "config": first}
        chosen = {key: value for key, value in given.items() if value} | dict(options)
        return _from_hub(match["id"], chosen), match["id"].rpartition("/")[2]
    if path.is_dir():
        return _from_folder(path, options), path.name
    if (read := READERS.get(path.suffix.lower())) is None:
        raise UsageError(
            f"unknown task source {place!r}: expected pocket, smol-think, reasoning-gym, reasoning-gym:<family>,..., "
            f"llm, {', '.join(HUB)}, hf:<data set>, a folder, or a path ending in {', '.join(READERS)}"
        )
    if not path.exists():
        raise UsageError(f"there is no file {path}: expected one with a task in each record")
    return read(path), path.stem


# --- files ---


def _json(path: Path) -> list[Row]:
    """A JSON array of objects, an object that holds one (`{"data": [...]}`), or JSON lines in spite of the name."""
    try:
        rows = json.loads(read_bytes(path, "JSON"))
    except (ValueError, RecursionError):
        return list(read_jsonl(path))
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        rows = lists[0] if len(lists) == 1 else [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path} holds no list of objects: expected one JSON object a task")
    return rows


def _csv(path: Path) -> list[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        text = read_bytes(path, "CSV").decode()
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = reader.fieldnames or ()
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise UsageError(f"{path} has two columns {twice[0]!r}: expected a name of its own for each")
        rows: list[Row] = []
        for row in reader:
            if None in row or None in row.values():
                raise UsageError(
                    f"{path}, line {reader.line_num}: the number of fields is not that of the head line, "
                    f"which has {len(names)}"
                )
            rows.append(row)
        return rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no CSV file in UTF-8 ({error}): expected a head line with column names") from None


# --- the datasets library ---


def _parquet(path: Path) -> list[Row]:
    # Streamed, so that no copy is made in the cache of the library, which would outlive a change of the file.
    return _rows(path, lambda d: d.load_dataset("parquet", data_files=str(path), split="train", streaming=True))


#: By the end of a file's name.
READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": lambda path: _rows(path, lambda d: d.Dataset.from_file(str(path))),
}


def _from_folder(folder: Path, options: Mapping[str, str]) -> list[Row]:
    """A folder written by `save_to_disk`, or a copy of a data set's repository, or one with data files."""
    place, config = str(folder), options.get("config")
    if any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
        return _rows(folder, lambda d: _choose(d.load_from_disk(place), options, place))
    if not any(folder.iterdir()):
        raise UsageError(f"the folder {folder} is empty: expected a data set")
    return _rows(folder, lambda d: _choose(d.load_dataset(place, config, streaming=True), options, place), config)


def _from_hub(identity: str, options: Mapping[str, str]) -> Iterable[Row]:
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports every try of a server that is not there
    try:
        data = _datasets(f"the data set {identity}").load_dataset(
            identity, options.get("config"), revision=options.get("revision")
        )
        return _choose(data, options, identity)
    except UsageError:
        raise
    except ConnectionError as error:  # the library's own, for offline mode too
        raise SteerableError(
            f"the data set {identity} is not in the cache and the Hugging Face hub was not reached: connect once, or "
            "give the path of a local copy (a folder, .parquet or .jsonl file)"
        ) from error
    except Exception as error:
        raise UsageError(f"cannot load the data set {identity}: {_line(error)}") from error
    finally:
        logger.setLevel(level)


def _rows(path: Path, load: Callable[[Any], Iterable[Row]], config: str | None = None) -> list[Row]:
    datasets = _datasets(str(path))
    try:
        return [dict(row) for row in load(datasets)]
    except UsageError:
        raise
    except Exception as error:  # pyarrow's, fsspec's, the builders': they raise what they like
        hint = " (?config=... names a configuration)" if config is None and "onfig" in str(error) else ""
        raise UsageError(f"cannot read {path} as a data set: {_line(error)}{hint}") from error


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"reading {what} needs the datasets library: pip install 'steerable[data]', or give a .jsonl, .json or .csv"
        ) from None
    datasets.disable_progress_bars()
    return datasets


def _choose(data: Any, options: Mapping[str, str], name: str) -> Iterable[Row]:
    """The split that was asked for, or the only one, or `test`."""
    split = options.get("split")
    if not isinstance(data, dict):  # one table
        if split:
            raise UsageError(f"{name} is a single table, without splits: leave out the split {split!r}")
        return data  # type: ignore[no-any-return]
    if split is None:
        split = next(iter(data)) if len(data) == 1 else "test"
    if split not in data:
        raise UsageError(f"{name} has no split {split!r}: name one of {', '.join(data)} (?split=...)")
    return data[split]  # type: ignore[no-any-return]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
