"""What the recipes do and what they cost, and what the search of `calibrate` gives away: from recipes*.json,
everyday_recipes.json, overhead.json and calibrate.json in benchmarks/results; `fill_figures.py` places it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from training_figures import table

from steerable.methods.recipes import RECIPES
from steerable.pages import words

Sources = Mapping[str, Any]
_LESS, _MORE, _LOSS = 0.8, 0.05, -0.02  # the bars: thinking, accuracy, accuracy that may be lost


def reasoning(given: Sources, source: str = "recipes") -> str:
    """The unsteered model, then one row a recipe and aim, the shorter chains first."""
    result = given.get(source, {})
    if not result.get("rows"):
        return table([], [])
    base = result["unsteered"]
    shown = [["unsteered", "", _share(base["accuracy"]), words.with_interval(base["thinking"], "tokens"),
              words.percent(base["loops"][0]), words.percent(base["unclosed"][0]), *[""] * 4]]  # fmt: skip
    order = sorted(result["rows"], key=lambda r: (r["aim"], r["thinking_ratio"][0]))
    for row in order:
        shown.append(
            [
                f"`{row['recipe']}`",
                row["aim"],
                _change(row["accuracy_change"], _points),
                _change(row["thinking_ratio"], _cut),
                words.percent(row["loops"][0]),
                words.percent(row["unclosed"][0]),
                words.fixed(row["chosen"]["factor"]),
                words.fixed(row["kl_of_its_own_chains"], ".3f"),
                *(_control(row.get(kind)) for kind in ("random", "shuffled")),
            ]
        )
    head = ["recipe", "to be", "accuracy", "thinking", "loops", "unclosed", "dose", "KL of its chains"]
    return table([*head, "random", "shuffled"], shown)


def verdict(given: Sources, source: str = "recipes") -> str:
    """Which rows meet the two bars, and which others make chains shorter or longer."""
    rows = given.get(source, {}).get("rows", [])
    if not rows:
        return words.MISSING
    short = [r for r in rows if r["thinking_ratio"][0] <= _LESS and r["accuracy_change"][1] >= _LOSS]
    right = [r for r in rows if r["accuracy_change"][0] >= _MORE and r["accuracy_change"][1] > 0]
    others = [r for r in rows if r["thinking_ratio"][2] < 1 and r not in short]
    longer = [r for r in rows if r["thinking_ratio"][1] > 1]
    as_shuffled = [r for r in longer if r.get("shuffled") and r["shuffled"]["thinking_ratio"][1] > 1]
    return (
        f"Cut thinking by a fifth or more while the interval excludes a loss of more than 2 points: {_named(short)}. "
        f"Lift accuracy by 5 points or more, with an interval above 0: {_named(right)}. Others whose thinking is "
        f"shorter, with an interval below 0: {_named(others)}. Longer, with an interval above 0: {_named(longer)}; on "
        f"shuffled labels, too: {_named(as_shuffled)}."
    )


def again(given: Sources) -> str:
    """The rows that were measured on other tasks, too."""
    told = []
    for source in sorted(name for name in given if name.startswith("recipes_again_")):
        for row in given[source]["rows"]:
            thinking, accuracy = _change(row["thinking_ratio"], _cut), _change(row["accuracy_change"], _points)
            controls = [f"{kind} {_control(row[kind])}" for kind in ("random", "shuffled") if row.get(kind)]
            effect = f"thinking {thinking}, accuracy {accuracy} points; {', '.join(controls)}"
            told.append(f"`{row['recipe']}` to be {row['aim']}: {effect}")
    return ". ".join(told) + "." if told else words.MISSING


def grid(given: Sources) -> str:
    """One row a calibration: what its search cost of the full grid, and what it gave away."""
    rows = []
    for row in given.get("calibrate", {}).get("rows", []):
        lost = [words.fixed(value, ".3g") for value in (row["lost"] or [])]
        rows.append(
            [
                f"{words.short(row['target'])}, {row['aim']}",
                str(row["seed"]),
                words.percent(row["share"]) if row["share"] else words.MISSING,
                *(_setting(row[name]) for name in ("chosen", "best")),
                "yes" if row["is_recommended"] else "no",
                "–" if row["steps"] is None else str(row["steps"]),
                f"{lost[0]} ({lost[1]} to {lost[2]})" if lost else "–",
                words.fixed(row["step"], ".3g") if lost else "–",
            ]
        )
    head = ["target", "seed", "tokens of the search", "chosen", "best of the grid", "its gain is clear"]
    return table([*head, "steps between", "gain given up", "one step"], rows)


def grid_verdict(given: Sources) -> str:
    """How many calibrations kept both bars."""
    rows = given.get("calibrate", {}).get("rows", [])
    if not rows:
        return words.MISSING
    cheap = sum(row["share"] is not None and row["share"] <= 0.25 for row in rows)
    near = sum(row["steps"] is not None and row["steps"] <= 1 for row in rows)
    close = sum(bool(row["lost"]) and row["lost"][0] <= row["step"] for row in rows)
    clear = sum(row["is_recommended"] for row in rows)
    return (
        f"Of {len(rows)} calibrations {cheap} searched within a quarter of the grid's tokens; {near} chose the grid's "
        f"best setting or one a step from it, and {close} gave up no more gain than a step. {clear} had a gain that is "
        "clear on the tasks of the last round, and were recommended."
    )


def _setting(setting: Mapping[str, Any] | None) -> str:
    if setting is None:
        return "none"
    layers = setting["layers"]
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    return f"{where} at {words.fixed(setting['strength'], '+.2g')}"


def everyday(given: Sources) -> str:
    """One row a recipe that is not about reasoning."""
    rows = [
        [
            f"`{row['recipe']}`",
            row["measure"],
            *(words.fixed(row[name], ".3g") for name in ("unsteered", "steered", "random")),
            _deviations(row, "effect"),
            _deviations(row, "less_random"),
            words.percent(row["loops"]),
            words.fixed(row["factor"]),
            words.fixed(row["kl"], ".3f"),
        ]
        for row in given.get("everyday_recipes", {}).get("rows", [])
    ]
    head = ["recipe", "measure", "unsteered", "steered", "random", "effect", "less random", "loops", "dose", "KL"]
    return table(head, rows)


def everyday_about(given: Sources) -> str:
    if not (made := given.get("everyday_recipes")):
        return words.MISSING
    return (
        f"SmolLM2-135M-Instruct, {made['questions']} everyday questions, answers of {made['tokens']} tokens, a budget "
        f"of {made['budget']:g} nats a token; effects are in standard deviations (SD) of the unsteered answers, but "
        "for a measure that is the same for all of them; intervals are 95 %, over questions."
        + _autoencoder(made.get("autoencoder"))
    )


def _autoencoder(about: Mapping[str, Any] | None) -> str:
    if about is None:
        return ""
    return (
        f" The autoencoder of `sae` is a small one, since none is published for this model: TopK, k = {about['k']}, "
        f"{about['features']:,} features of what leaves block {about['layer']}, trained on {about['tokens']:,} tokens; "
        f"it explains {words.percent(about['explained'])} of the variance of others."
    )


def overhead(given: Sources) -> str:
    """One row a recipe: the time of a token beside unsteered ones, the dearest first."""
    rows = sorted(
        given.get("overhead", {}).get("settings", []), key=lambda row: (row["kind"] != "steering", -row["time"])
    )
    head = ["what steers", "model", "sites", "time a token", "middle half of the rounds"]
    return table(head, [
        [
            f"`{row['name']}`" if row["kind"] == "recipe" else row["name"],
            f"`{row['model']}`",
            "weights" if row["sites"] is None else str(row["sites"]),
            words.fixed(row["time"], ".3f"),
            " to ".join(words.fixed(end, ".3f") for end in row["quartiles"]),
        ]
        for row in rows
    ])  # fmt: skip


def overhead_about(given: Sources) -> str:
    """How the table was made, and which rows exceed the bars."""
    if not (made := given.get("overhead")):
        return words.MISSING
    over = [
        f"{row['name']} ({words.fixed(row['time'], '.3f')})"
        for row in made["settings"]
        if row["time"] > made["bars"][row["kind"]]
    ]
    bars = [words.fixed(made["bars"][kind]) for kind in ("steering", "recipe")]
    return (
        f"Medians of {made['rounds']} rounds, in each of which what is no recipe has {made['turns']['steering']} "
        f"turns; {made['rows']} chains of {made['tokens']} tokens, with torch {made['versions']['torch']}. A vector is "
        f"to cost at most {bars[0]}, a recipe at most {bars[1]}; above that: {', '.join(over) or 'none'}."
    )


def measured(given: Sources) -> dict[str, str]:
    """What the table of all recipes says of each that was measured."""
    figures: dict[str, list[str]] = {}
    for row in given.get("recipes", {}).get("rows", []):
        figures.setdefault(row["recipe"], []).append(f"to be {row['aim']}: {_figure(row)}")
    for row in given.get("everyday_recipes", {}).get("rows", []):
        figures[row["recipe"]] = [f"{row['measure']}: {_deviations(row, 'effect')}"]
    return {name: "; ".join(some) for name, some in figures.items()}


def of_recipe(given: Sources, name: str) -> str:
    """What was measured of one recipe."""
    told = measured(given).get(name)
    return words.MISSING if told is None else f"[{told}](recipes.md#the-table)"


def _figure(row: Mapping[str, Any]) -> str:
    return f"thinking {_cut(row['thinking_ratio'][0])}, accuracy {_points(row['accuracy_change'][0])} points"


def _deviations(row: Mapping[str, Any], name: str) -> str:
    mean, low, high = (words.fixed(value, "+.2f") for value in row[name])
    return f"{mean}{' SD' * (row['deviation'] > 0)} ({low} to {high})"


def _named(rows: list[Mapping[str, Any]]) -> str:
    return "; ".join(f"`{r['recipe']}` to be {r['aim']} ({_figure(r)})" for r in rows) or "none"


def _control(row: Mapping[str, Any] | None) -> str:
    return f"{_points(row['accuracy_change'][0])} / {_cut(row['thinking_ratio'][0])}" if row else "–"


def _change(interval: Any, shown: Callable[[float], str]) -> str:
    if interval is None:
        return words.MISSING
    mean, low, high = map(shown, interval)
    return f"{mean} ({low} to {high})"


def _points(share: float) -> str:
    return words.fixed(100 * share, "+.1f")


def _cut(ratio: float) -> str:
    return f"{words.fixed(100 * (ratio - 1), '+.0f')}%"


def _share(value: Any) -> str:
    return words.with_interval(value, "share")


FIGURES: dict[str, Callable[[Sources], str]] = {
    "recipes.reasoning": reasoning,
    "recipes.verdict": verdict,
    "recipes.again": again,
    "recipes.smol-think": partial(reasoning, source="recipes_smol-think"),
    "recipes.smol-think.verdict": partial(verdict, source="recipes_smol-think"),
    "calibrate.grid": grid,
    "calibrate.grid.verdict": grid_verdict,
    "recipes.everyday": everyday,
    "recipes.everyday.about": everyday_about,
    "recipes.overhead": overhead,
    "recipes.overhead.about": overhead_about,
    **{f"recipe.{name}": partial(of_recipe, name=name) for name in RECIPES},
}
