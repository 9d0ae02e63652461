"""The figures of the twelve contrasts and of the estimators, from contrasts.json and estimators.json in
benchmarks/results; `fill_figures.py` places them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from training_figures import table

from steerable.chains.segments import sentences
from steerable.pages import words

Sources = Mapping[str, Any]
STEPS = (-1, 0, 1)
ESTIMATORS = {  # of the paper index
    "means": "difference of means", "caa": "difference of means, last token (CAA)", "pca": "PCA of pairs",
    "joint": "PCA of all layers at once", "lat": "PCA of random pairs (LAT)", "lda": "LDA", "ridge": "ridge logistic",
    "linear-act": "Linear-AcT",
}  # fmt: skip


def trait(given: Sources) -> str:
    """One row a contrast: the trait by its measure at -1, 0, +1 and of the controls, loops, perplexity."""
    head = ["contrast", "measured", *map(words.signed, STEPS), "random / shuffled"]
    head += ["8-grams repeated, " + " / ".join(map(words.signed, STEPS)), "perplexity, −1 / +1"]
    rows = []
    for row in _rows(given):
        at = {told["strength"]: told for told in row["strengths"]}
        values = []
        for step in STEPS:
            bold = "**" if at[step].get("clear") else ""
            values.append(f"{bold}{_interval(at[step]['value'])}{bold}")
        rows.append(
            [
                row["name"],
                f"{row['measure']} ({row['pairs_told']} of {row['pairs']} pairs)",
                *values,
                " / ".join(words.number(control["value"][0]) for control in row["controls"].values()),
                " / ".join(words.percent(at[step]["loops"]) for step in STEPS),
                " / ".join(_times(at[step]["perplexity"]) for step in STEPS if step),
            ]
        )
    return table(head, rows)


def about(given: Sources) -> str:
    """How the table was made."""
    made = given.get("contrasts")
    if not made:
        return words.MISSING
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    minutes = sum(row["seconds"] for row in made["contrasts"]) / 60
    return (
        f"{made['questions']} questions, answers of {made['tokens']} tokens at temperature {made['temperature']}, "
        f"made by `python benchmarks/contrasts.py --budget {made['budget']}` with {versions}, in {minutes:.0f} minutes "
        "on one thread of a busy machine."
    )


def misses(given: Sources) -> str:
    """How many signs meet each of the three demands, and which do not, by how much."""
    rows = _rows(given)
    if not rows:
        return words.MISSING
    signs = [
        (f"{row['name']} at {words.signed(told['strength'])}", told)
        for row in rows
        for told in row["strengths"]
        if told["strength"]
    ]
    unclear = [f"{name} ({_differences(told)})" for name, told in signs if not told["clear"]]
    looping = [f"{name} ({words.percent(told['loops'])})" for name, told in signs if told["loops"] > 0.1]
    unlikely = [f"{name} ({_times(told['perplexity'])})" for name, told in signs if told["perplexity"][0] > 2]
    return (
        f"Of {len(signs)} steered settings {len(signs) - len(unclear)} move the trait beyond both controls"
        f"{_but(unclear)}; "
        f"{len(signs) - len(looping)} repeat an 8-gram in at most 10 % of the answers{_but(looping)}; "
        f"{len(signs) - len(unlikely)} at most double the perplexity{_but(unlikely)}."
    )


def examples(given: Sources) -> str:
    """One row a contrast: what is answered to one question at -1, 0 and +1."""
    rows = []
    for row in _rows(given):
        rows.append([row["name"], *(_two_sentences(row["example"]["answers"][str(step)]) for step in STEPS)])
    return table(["contrast", *map(words.signed, STEPS)], rows)


def question(given: Sources) -> str:
    """What the examples answer."""
    rows = _rows(given)
    return f"“{rows[0]['example']['question']}”" if rows else words.MISSING


def estimators(given: Sources) -> str:
    """One row an estimator, the strongest first: pooled effect, difference from the difference of means, loops, and the
    effect on each contrast."""
    made = given.get("estimators", {})
    head = ["estimator", "effect", "less the difference of means", "strongest", "8-grams repeated"]
    rows = [
        [
            told["name"],
            _interval(told["effect"]),
            _interval(told["less_base"]) if told["less_base"] else "",
            "" if told["control"] else words.percent(told["best"]),
            words.percent(told["loops"]),
            *(words.number(value) for value in told["contrasts"].values()),
        ]
        for told in sorted(made.get("estimators", []), key=lambda t: (t["control"], -t["effect"][0]))
    ]
    return table([*head, *made.get("contrasts", [])], rows)


def estimators_verdict(given: Sources) -> str:
    """Which estimators differ from the difference of means, and which from the controls."""
    if not (made := given.get("estimators")):
        return words.MISSING
    real = [told for told in made["estimators"] if not told["control"]]
    first = max(real, key=lambda told: told["effect"][0])
    better = [t["name"] for t in real if t["less_base"] and t["less_base"][1] > 0]
    worse = [t["name"] for t in real if t["less_base"] and t["less_base"][2] < 0]
    clear = [t["name"] for t in real if all(interval[1] > 0 for interval in t["less_controls"].values())]
    return (
        f"The largest effect is that of {first['name']}. Beyond the difference of means with the whole interval: "
        f"{', '.join(better) or 'none'}; below it: {', '.join(worse) or 'none'}. Beyond both controls: {len(clear)} of "
        f"{len(real)}{_but([t['name'] for t in real if t['name'] not in clear])}."
    )


def estimators_about(given: Sources) -> str:
    """How the table was made."""
    if not (made := given.get("estimators")):
        return words.MISSING
    return (
        f"{made['questions']} questions to each of {len(made['contrasts'])} contrasts, answers of {made['tokens']} "
        f"tokens, {made['budget']} nats a token, layers {made['layers'][0]} to {made['layers'][-1]}, torch "
        f"{made['versions']['torch']}, in {made['seconds'] / 60:.0f} minutes of one thread."
    )


def estimator(given: Sources, name: str) -> str:
    """The effect of one estimator."""
    for told in given.get("estimators", {}).get("estimators", []):
        if told["name"] == name:
            page, budget = "contrasts.md#which-estimator-steers-most", given["estimators"]["budget"]
            return f"[{_interval(told['effect'])} SD]({page}) at {budget} nats, on `smol`"
    return words.MISSING


def _rows(given: Sources) -> list[dict[str, Any]]:
    return given.get("contrasts", {}).get("contrasts", [])


def _but(names: list[str]) -> str:
    return f", all but {', '.join(names)}" if names else ""


def _differences(told: Mapping[str, Any]) -> str:
    return ", ".join(f"{_interval(interval)} against {name}" for name, interval in told["difference"].items())


def _interval(value: Any) -> str:
    mean, low, high = (words.number(x) for x in value)
    return f"{mean} ({low} to {high})"


def _times(interval: Any) -> str:
    return words.times(interval[0])


def _two_sentences(text: str) -> str:
    parts = sentences(text)[:2]
    return " ".join(text[: parts[-1].end].split()).replace("|", "\\|") if parts else ""


FIGURES: dict[str, Callable[[Sources], str]] = {
    "contrasts": trait,
    "contrasts.misses": misses,
    "contrasts.examples": examples,
    "contrasts.question": question,
    "contrasts.about": about,
    "estimators": estimators,
    "estimators.verdict": estimators_verdict,
    "estimators.about": estimators_about,
    **{f"estimator.{key}": partial(estimator, name=name) for key, name in ESTIMATORS.items()},
}
