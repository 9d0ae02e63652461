"""calibrate.json as one HTML page, as tables for the terminal, and as a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from steerable.pages import words
from steerable.pages.figures import SHAPES, Panel, Point, Series, curves, nice_scale
from steerable.pages.html import render as render_template
from steerable.pages.words import Interval
from steerable.store.text import counted

Result = Mapping[str, Any]
_HUES = ("hue-2", "hue-5", "hue-3", "hue-4", "hue-0", "hue-1")
_COUNTS = ("tokens", "thinking")
_COLUMNS = {
    "gain": "Gain",
    "kl": "Divergence",
    "perplexity": "× perplexity",
    "accuracy": "Accuracy",
    "tokens": "Length",
    "loops": "Loops",
    "unclosed": "Unclosed",
}


def summary(result: Result) -> str:
    """The recommended setting in a sentence, or why there is none."""
    about, settings = result["recommended"], result["settings"]
    if about is None:
        return f"No setting is recommended: {result['reason']}."
    changed = words.change(about["gain"], _unit(result, "gain"))
    random = words.change(about["random"]["gain"], _unit(result, "gain"))
    tasks = counted(about["tasks"], "task")
    if dropped := about.get("dropped"):
        tasks += f" ({counted(dropped, 'chain')} of which nobody could read what is aimed at)"
    where = f"{about['arm']}, strength {words.signed(about['strength'])} (dose {words.number(about['dose'], 2)})"
    return (
        f"Recommended: {where}: {settings['aim']} {settings['target']} by {changed}, at a divergence of "
        f"{words.with_interval(about['kl'], '')} nats a token, over {tasks}; a random "
        f"direction with the same dose: {random}."
    )


def cost(result: Result) -> str:
    """What the search cost, and lost, in a sentence; empty where there was none."""
    paid = result["cost"]
    if paid["search"] is None:
        return ""
    said = f"The search wrote {words.number(paid['search'])} tokens"
    if paid["grid"] is None:
        return f"{said}; --full-grid shows what the whole grid would have cost, and chosen."
    said += f", {words.percent(paid['share'])} of the full grid's {words.number(paid['grid'])}"
    best = paid["best"]
    if paid["steps"] == 0:
        return f"{said}, and chose the full grid's setting."
    if best is None or paid["lost"] is None:
        chosen = "no setting" if best is None else f"{best['arm']} at {words.signed(best['strength'])}"
        return f"{said}; on the full grid {chosen} would be recommended."
    away = "in another arm" if paid["steps"] is None else f"{counted(paid['steps'], 'step')} away"
    lost, step = (words.change(value, _unit(result, "gain")) for value in (paid["lost"], [paid["step"]] * 3))
    return (
        f"{said}. The full grid's choice is {away}, {best['arm']} at {words.signed(best['strength'])}: the search's "
        f"gives away {lost}, where one step of the grid changes {step.partition(' (')[0]}."
    )


def render(result: Result) -> str:
    """Draw the content of calibrate.json as one page that needs no other file; equal input gives equal bytes."""
    signs = {
        arm["name"]: (f"slim {_HUES[i % len(_HUES)]}", SHAPES[(i // len(_HUES)) % len(SHAPES)])
        for i, arm in enumerate(result["arms"])
    }
    limits = result["settings"]["limits"]
    panels = [
        _panel(result, signs, "strength", "gain", "Gain against strength"),
        _panel(result, signs, "strength", "kl", "Divergence against strength", (0, limits["kl"])),
        _panel(result, signs, "dose", "gain", "Gain against dose"),
        _panel(result, signs, "strength", "accuracy", "Accuracy against strength"),
    ]
    return render_template(
        "calibration.html",
        result=result,
        summary=summary(result),
        cost=cost(result),
        legend=[(name, *sign) for name, sign in signs.items()] + [("Pareto front", "slim hue-any", "diamond")],
        pareto=_pareto(result, signs),
        panels=panels,
        rows=_rows(result),
        heads=["Arm", "Strength", "Dose", "Tasks", *_COLUMNS.values(), "Breaks"],
        laws=_laws(result),
        equal=[
            ("KL over whole chains", result["equal_kl"], "nats a token"),
            ("relative dose ‖s v‖ / ‖h‖", result["equal_dose"], ""),
        ],
        gain=lambda value: words.change(value, _unit(result, "gain")),
    )


def tables(result: Result) -> list[Any]:
    """The grid, and the arms at equal price, for a terminal."""
    heads = ["", "strength", "gain", "nats a token", "tasks", "breaks"]
    rows = (
        [
            row["arm"],
            words.signed(row["strength"]),
            words.change(row["gain"], _unit(result, "gain"), ""),
            words.number(row["kl"][0] if row["kl"] else None, 2),
            str(row["tasks"]),
            ", ".join(row["broken"]),
        ]
        for row in result["grid"]
    )
    made = [words.printed("settings", heads, rows)]
    if cost(result):
        made.append(cost(result))
    return made


def _unit(result: Result, name: str) -> str:
    if name in ("gain", "target"):
        if unit := result["settings"].get("unit"):
            return str(unit)
        name = result["settings"]["target"]
    return "tokens" if name in (*_COUNTS, "kl", "perplexity") else "share"


def _rows(result: Result) -> list[list[str]]:
    return [
        [
            row["arm"],
            words.signed(row["strength"]),
            words.number(row["dose"], 2),
            str(row["tasks"]) + (f" ({counted(dropped, 'chain')} unread)" if (dropped := row.get("dropped")) else ""),
            words.change(row["gain"], _unit(result, "gain"), ""),
            *(words.with_interval(row[name], _unit(result, name)) for name in _COLUMNS if name != "gain"),
            ", ".join(row["broken"]) or "none",
        ]
        for row in result["grid"]
    ]


def _laws(result: Result) -> list[list[str]]:
    made = []
    for arm in result["arms"]:
        row = [arm["name"]]
        for name in ("gain", "kl", "accuracy"):
            law = arm["law"][name]
            row += [words.MISSING] * 2 if law is None else [
                words.change(law["coefficient"], _unit(result, name), ""), words.fixed(law["r2"])
            ]  # fmt: skip
        made.append(row)
    return made


def _series(result: Result, signs: Mapping[str, tuple[str, str]], x: str, y: str) -> list[Series]:
    """A line an arm through its settings; x, y: names of what is on the axes."""
    series = []
    for arm in result["arms"]:
        points = [(row, Interval.of(row[y])) for row in result["grid"] if row["arm"] == arm["name"]]
        drawn = [
            Point(_number(row[x]), *read, f"{arm['name']}, {row['strength']:g}, {counted(row['tasks'], 'task')}")
            for row, read in points
            if read is not None and row[x] is not None
        ]
        css, marker = signs[arm["name"]]
        series.append(Series(arm["name"], css, sorted(drawn), marker, whiskers=len(result["arms"]) < 4))
    return series


def _number(value: float | Sequence[float]) -> float:
    return value[0] if isinstance(value, Sequence) else value


def _ends(series: Sequence[Series]) -> tuple[list[float], list[float]]:
    points = [point for one in series for point in one.points]
    return [p.x for p in points], [p.y for p in points]


def _pareto(result: Result, signs: Mapping[str, tuple[str, str]]) -> Markup:
    series = _series(result, signs, "kl", "gain")
    front = [result["grid"][i] for i in result["front"]]
    points = [Point(row["kl"][0], row["gain"][0], tip=f"{row['arm']}, strength {row['strength']:g}") for row in front]
    series.append(Series("Pareto front", "slim hue-any", points, "diamond", whiskers=False))
    xs, ys = _ends(series)
    limit = result["settings"]["limits"]["kl"]
    write = words.percent_tick if _unit(result, "gain") == "share" else words.number
    return curves(
        series,
        nice_scale([*xs, limit]),
        nice_scale([0.0, *ys], write, floor=None),
        label="Gain against divergence",
        marked=[(limit, "budget")],
        x_title="nats a token, over whole chains",
        height=340,
    )


def _panel(
    result: Result,
    signs: Mapping[str, tuple[str, str]],
    x: str,
    y: str,
    title: str,
    level: tuple[float, float] | None = None,
) -> Panel:
    series = _series(result, signs, x, y)
    xs, ys = _ends(series)
    if not ys:
        return Panel(title, None)
    write = words.percent_tick if _unit(result, y) == "share" else words.number
    drawing = curves(
        series,
        nice_scale([0.0, *xs], floor=None),
        nice_scale([0.0, *ys], write, floor=None),
        label=title,
        reference=None if level is None else Point(*level),
        x_title=x,
        height=240,
    )
    return Panel(title, drawing)
