"""Writes docs/scorers.md: what the scorers of reasoning-gym pay, and what `gym_score` pays, measured on every data set.

python docs/make_scorers.py
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerable.chains import gym
from steerable.chains.gym_scorers import COMPARISONS, GUARDS

PAGE = Path(__file__).with_name("scorers.md")
ITEMS = 5
Entry = Mapping[str, Any]

#: Six ways to write a right answer ...
WRITTEN: dict[str, Callable[[str], str]] = {
    "as it is": lambda answer: answer,
    "full stop": lambda answer: f"{answer}.",
    "white space": lambda answer: f" {answer} ",
    "newline": lambda answer: f"{answer}\n",
    "box": lambda answer: rf"\boxed{{{answer}}}",
    "bold": lambda answer: f"**{answer}**",
}
#: ... and six replies that hold none, unless "0" or "no" happens to be right.
EMPTY: dict[str, Callable[[Entry], str]] = {
    "nothing": lambda entry: "",
    "0": lambda entry: "0",
    "no": lambda entry: "no",
    "banana": lambda entry: "banana",
    "question": lambda entry: entry["question"],
    "10,000 digits": lambda entry: "7" * 10_000,
}
#: Constant replies beside the right answers of other items: a bug of a scorer may pay for one of them.
CONSTANTS = (
    "0",
    "1",
    "5",
    "0.5",
    "yes",
    "True",
    "A",
    "None",
    "[]",
    "{}",
    "nan",
    "1*2*3*4",
    "P \u2228 Q",
    "12:00",
    "banana",
)


@dataclass
class Row:
    """What a data set pays. Shares are means over its items; names of replies are keys of `WRITTEN` and `EMPTY`."""

    theirs: dict[str, list[float | str]] = field(default_factory=dict)
    """Of every kind of reply and item: the score of reasoning-gym, or the name of what it raised."""
    ours: dict[str, list[float | None]] = field(default_factory=dict)
    constant: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of every constant reply: the mean of reasoning-gym's score and of ours."""
    answers: list[str | None] = field(default_factory=list)
    """A right answer of every item, where one is known."""


def answer_of(entry: Entry) -> str | None:
    """A right answer: the entry's own, or the example that the five data sets without one give; rush_hour and boxnet
    give none."""
    if entry["answer"] is not None:
        return str(entry["answer"])
    found = entry["metadata"]
    if coloring := found.get("possible_answer"):
        return json.dumps(coloring)
    return found.get("example_answer") or found.get("example_correct_answer")


def families() -> list[str]:
    """All data sets but `composite`, which is made of others."""
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS.keys() - {"composite"})


def measure(family: str) -> Row:
    """Scores of the twelve kinds of replies and of constants, on `ITEMS` items."""
    import reasoning_gym

    with contextlib.redirect_stdout(io.StringIO()):  # some data sets and scorers print
        dataset = reasoning_gym.create_dataset(family, size=ITEMS, seed=1)
        made = [dataset[index] for index in range(ITEMS)]
        entries = [json.loads(json.dumps(entry)) for entry in made]  # as a task file brings them
        answers = [answer_of(entry) for entry in entries]
        row = Row(answers=answers)
        for name, write in WRITTEN.items():
            _score(row, name, dataset, made, [None if answer is None else write(answer) for answer in answers])
        for name, empty in EMPTY.items():
            _score(row, name, None if family in _SLOW else dataset, made, [empty(entry) for entry in entries])
        for reply in () if family in _SLOW else dict.fromkeys([*CONSTANTS, *filter(None, answers)]):
            theirs = [_raw(dataset, entry, reply) for entry in made]
            ours = [gym.gym_score(entry, reply) or 0.0 for entry in entries]
            row.constant[reply] = (_mean(theirs), _mean(ours))
    return row


def _score(row: Row, name: str, dataset: Any, made: list[Any], replies: list[str | None]) -> None:
    pairs = [(entry, reply) for entry, reply in zip(made, replies, strict=True) if reply is not None]
    row.theirs[name] = [] if dataset is None else [_raw(dataset, entry, reply) for entry, reply in pairs]
    row.ours[name] = [gym.gym_score(json.loads(json.dumps(entry)), reply) for entry, reply in pairs]


#: Their scorer needs up to 15 seconds for a wrong answer.
_SLOW = ("intermediate_integration",)


def _raw(dataset: Any, entry: Entry, reply: str) -> float | str:
    try:
        return float(dataset.score_answer(answer=reply, entry=copy.deepcopy(entry)))
    except Exception as error:
        return type(error).__name__


def _mean(scores: list[Any]) -> float:
    return sum(score for score in scores if not isinstance(score, str)) / max(1, len(scores))


def lines(rows: Mapping[str, Row]) -> Iterator[str]:
    """The table."""
    yield (
        "| data set | best constant reply: reasoning-gym | here | a right answer is not right for reasoning-gym with | "
        "replies without an answer that it pays | raises | judged by |"
    )
    yield "|---|---|---|---|---|---|---|"
    for family, row in rows.items():
        theirs, ours = (max(row.constant.items(), key=lambda pair: pair[1][k], default=("", (0, 0))) for k in (0, 1))
        judge = (
            "our comparison" if family in COMPARISONS else "its scorer, guarded" if family in GUARDS else "its scorer"
        )
        paid = {name: mean for name in EMPTY if (mean := _paid(row, name)) >= 0.005}
        raised = sorted({f"{name}: {s}" for name in EMPTY for s in row.theirs[name] if isinstance(s, str)})
        cells = [
            f"`{family}`",
            f"{_shown(theirs[0])} {theirs[1][0]:.2f}" if theirs[1][0] else "-",
            f"{_shown(ours[0])} {ours[1][1]:.2f}" if ours[1][1] else "-",
            ", ".join(_unpaid(row)) if any(row.answers) else "no answer is given",
            ", ".join(f"{name} {score:.2f}" for name, score in paid.items()),
            ", ".join(raised),
            judge,
        ]
        yield f"| {' | '.join(cells)} |"


def _shown(reply: str) -> str:
    return f"`{reply}`" if reply in CONSTANTS else "an answer"


def page(rows: Mapping[str, Row]) -> str:
    """The whole document."""
    paid = {name: sum(bool(_paid(row, name)) for row in rows.values()) for name in EMPTY}
    lost = {name: sum(name in _unpaid(row) for row in rows.values()) for name in WRITTEN}
    return TEXT.format(
        sets=len(rows),
        items=ITEMS,
        paid=", ".join(f"{name} by {count}" for name, count in paid.items()),
        lost=", ".join(f"{name}: {count}" for name, count in lost.items()),
        table="\n".join(lines(rows)),
    )


def _paid(row: Row, name: str) -> float:
    """What reasoning-gym pays on average for a reply that is no item's answer."""
    return 0.0 if name in row.answers else _mean(row.theirs[name])


def _unpaid(row: Row) -> list[str]:
    """The forms of a right answer that get less than full marks from reasoning-gym on some item."""
    return [name for name in WRITTEN if any(isinstance(score, str) or score < 1 for score in row.theirs[name])]


TEXT = """# The scorers of reasoning-gym

Written by `docs/make_scorers.py` from {items} items of each of the {sets} data sets that reasoning-gym 0.1.25 creates
(`composite` needs members), and checked by the tests.

A score that is to be a reward, or an accuracy, must not be had without an answer. So `gym_score` is 1 or 0:

- **Right** is the entry's own answer, or what gets full marks from the data set's scorer, as it stands or without a
  full stop, white space, a box, dollars, asterisks or back quotes around it.
- **Less than full marks is 0.** The scorers give 0.01 or 0.05 for any text, and much more for a constant that lies
  near: a board of dead cells has most cells of `game_of_life` right, `12:00` is never far from a time of day.
- **A scorer that raises, or that cannot be trusted with the reply, says `parse-error`.** So does a reply of more than
  4,000 characters (or four times the answer's, where that is more).
- Guards stand before the scorers that run a reply, or what a task file brings along, as Python (`countdown`,
  `puzzle24`, `polynomial_multiplication`, `number_sorting`) or that can be made to work without end
  (`propositional_logic`, `rubiks_cube`, `rush_hour`). Others that evaluate (`binary_matrix`, `spiral_matrix`,
  `string_insertion`, `n_queens`, `bitwise_arithmetic`, `simple_integration`, `intermediate_integration`) are replaced
  by a comparison.
- Four scorers give **full marks to a constant**: `coin_flip` to every beginning of the answer, so to `0`;
  `game_of_life_halting` to any text; `complex_arithmetic` to `nan`; `puzzle24` to `1*2*3*4`, as any four numbers do.
  Here they do not.

Replies without an answer that are paid by reasoning-gym, by so many data sets: {paid}.

Data sets in which some right answer gets less than full marks when it is written so: {lost}. Here every right answer
gets full marks in all six forms.

What remains is what a constant *answer* earns: the share of items that it solves. For `propositional_logic` that is
high, as `P \u2228 Q` follows from most premises. Reinforcement learning refuses tasks of which one constant reply is
right for more than 60 % (see [Training](training.md)).

Columns: the constant reply with the highest mean score, where the items' own answers are tried, too; which of
the six forms lose full marks on some item; mean scores of replies without an answer; what the scorer raises. Of
`rush_hour` and `boxnet` no right answer is given; `graph_color`, `propositional_logic` and `rubiks_cube` have an
example. `intermediate_integration` was not asked for wrong answers: its scorer may need 15 seconds for one.

{table}
"""


if __name__ == "__main__":
    PAGE.write_text(page({family: measure(family) for family in families()}))
