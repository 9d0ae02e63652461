"""Annotators whose labels and cue words stand in a JSON file; the published one of SEAL is among them.

    {"unit": "sentence", "labels": {"doubt": {"starts": ["hmm"], "contains": ["not sure"]}}, "otherwise": "step"}

`label_sets/` holds the files that the library ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steerable.chains.records import Record, read_bytes
from steerable.chains.segments import paragraphs, sentences
from steerable.store.errors import UsageError

LABEL_SETS = Path(__file__).with_name("label_sets")


class Cues(BaseModel):
    """Words that a unit of text begins with, and words that stand anywhere in it; case does not matter."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    starts: list[str] = []
    contains: list[str] = []


class CueAnnotator(BaseModel):
    """An annotator, chain -> spans: a unit has the first label whose cue it shows, else `otherwise`, else no span."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    cues: dict[str, Cues] = Field(alias="labels", min_length=1)
    otherwise: str | None = None
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
        path: JSON with `labels` (label -> `starts` and `contains`, in the order in which they are tried), and perhaps
            `otherwise`, `unit` (`sentence` or `paragraph`), `skip_first` and `source`.

    Returns:
        An annotator with its `labels`.

    Raises:
        UsageError: a file that is missing, is no JSON or has another form.

    Example:
        >>> read_cues(LABEL_SETS / "seal.json").labels
        ('execution', 'reflection', 'transition')
    """
    data = read_bytes(path, 'JSON with "labels", each with its cue words')
    try:
        return CueAnnotator.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise UsageError(
            f"{path} is no file of cues ({f'{place}: ' if place else ''}{problem['msg']}): expected JSON such as "
            '{"labels": {"doubt": {"starts": ["hmm"], "contains": ["not sure"]}}, "otherwise": "step"}'
        ) from None


#: SEAL's labels of thoughts. It reads and steers at the boundary token, the one before a span: the window `onset`.
seal = read_cues(LABEL_SETS / "seal.json")
SEAL_LABELS = seal.labels
