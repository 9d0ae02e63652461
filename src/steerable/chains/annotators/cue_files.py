"""Labels from files, JSON or YAML: with cue words, which make an annotator, or with a text for a language model.

    {"unit": "sentence", "labels": {"doubt": {"starts": ["hmm"], "contains": ["not sure"]}}, "otherwise": "step"}

`label_sets/` holds the files that the library ships, the published one of SEAL among them. For a language model a file
is one object, label -> what it says of a stretch of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from steerable.chains.records import Record, is_label, read_bytes
from steerable.chains.segments import paragraphs, sentences
from steerable.store.errors import UsageError

LABEL_SETS = Path(__file__).with_name("label_sets")


def _label(text: str) -> str:
    if not is_label(text):
        raise ValueError("a label has up to 64 letters, digits, '-' and '_'")
    return text


Label = Annotated[str, AfterValidator(_label)]


class Cues(BaseModel):
    """Words that a unit of text begins with, and words that stand anywhere in it; case does not matter."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    starts: list[str] = []
    contains: list[str] = []


class CueAnnotator(BaseModel):
    """An annotator, chain -> spans: a unit has the first label whose cue it shows, else `otherwise`, else no span."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    cues: dict[Label, Cues] = Field(alias="labels", min_length=1)
    otherwise: Label | None = None
    unit: Literal["sentence", "paragraph"] = "sentence"
    #: What stands before the first blank line is no unit, nor is a text without one.
    skip_first: bool = False
    source: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that a span may have, `otherwise` first."""
        return tuple(dict.fromkeys([*filter(None, [self.otherwise]), *self.cues]))

    def label_of(self, text: str) -> str | None:
        """The label of one unit of text."""
        text = text.strip().lower()
        for label, cues in self.cues.items():
            starts, contains = (tuple(cue.lower() for cue in words) for words in (cues.starts, cues.contains))
            if text.startswith(starts) or any(cue in text for cue in contains):
                return label
        return self.otherwise

    def __call__(self, chain: Mapping[str, Any]) -> list[Record]:
        """The labelled units of a chain as span records, without the white space around them; they are not merged."""
        text = chain["thinking"]
        units = (paragraphs if self.unit == "paragraph" else sentences)(text)
        first = text.find("\n\n") if self.skip_first else -1
        about = {"task_id": chain["task_id"], "sample": chain["sample"]}
        return [
            {**about, "label": label, "start": unit.start, "end": unit.end}
            for unit in units
            if (not self.skip_first or 0 <= first < unit.start)
            and (label := self.label_of(text[unit.start : unit.end])) is not None
        ]


def read_cues(path: str | Path) -> CueAnnotator:
    """Read a cue file.

    Args:
        path: JSON or YAML with `labels` (label -> `starts` and `contains`, in the order in which they are tried), and
            perhaps `otherwise`, `unit` (`sentence` or `paragraph`), `skip_first` and `source`.

    Returns:
        An annotator with its `labels`.

    Raises:
        UsageError: a file that is missing, is neither or has another form.

    Example:
        >>> read_cues(LABEL_SETS / "seal.json").labels
        ('execution', 'reflection', 'transition')
    """
    expected = '{"labels": {"doubt": {"starts": ["hmm"], "contains": ["not sure"]}}, "otherwise": "step"}'
    return _read(path, TypeAdapter(CueAnnotator), "no file of cues", expected)


def read_labels(path: str | Path) -> dict[str, str]:
    """Read a file of labels for a language model: label -> what it says of a stretch of text.

    Raises:
        UsageError: a file that is missing, is neither JSON nor YAML or has another form.

    Example:
        >>> read_labels("labels.yaml")
        {'planning': 'it says what is to be done next', 'doing': 'it carries out a step'}
    """
    labels: TypeAdapter[dict[str, str]] = TypeAdapter(Annotated[dict[Label, str], Field(min_length=1)])
    return _read(path, labels, "no file of labels", '{"planning": "it says what is to be done next", ...}')


def _read(path: str | Path, form: TypeAdapter[Any], problem: str, expected: str) -> Any:
    data = read_bytes(path, f"JSON or YAML such as {expected}")
    try:
        return form.validate_python(yaml.safe_load(data), strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        why = f"{place}: {first['msg']}" if place else first["msg"]
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        why = " ".join(str(error).split())
    raise UsageError(f"{path} is {problem} ({why}): expected JSON or YAML such as {expected}")


#: SEAL's labels of thoughts. It reads and steers at the boundary token, the one before a span: the window `onset`.
seal = read_cues(LABEL_SETS / "seal.json")
SEAL_LABELS = seal.labels
