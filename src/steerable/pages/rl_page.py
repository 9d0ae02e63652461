"""A training's run folder as one page: what was trained, what it changed, how it went, what the vectors say.

The page is a pure function of `report.json`, `log.jsonl` and `lens.json`; what is missing there reads "not measured".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steerable.evals.lens_tokens import visible
from steerable.pages import templates, words
from steerable.pages.cells import Interval
from steerable.pages.examples import Segment, segments, shares
from steerable.pages.figures import Point, Scale, Series, bars, curves, nice_scale
from steerable.pages.lens_page import section as lens_section
from steerable.pages.page import Table
from steerable.pages.panels import Panel
from steerable.store.errors import UsageError
from steerable.store.files import write_atomic
from steerable.store.plurals import plural
from steerable.store.run_folder import read_json, sha256, write_json

Report = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]
DECODINGS = ("sampled", "greedy")
_VECTORS = "bias.safetensors"
_MARKED = 40  # steps: with more of them the markers would hide the line
METRICS = {  # name in report.json -> title, style
    "accuracy": ("Right answers", "percent"),
    "tokens": ("New tokens a chain", "number"),
    "loops": ("Repeated 8-grams", "percent"),
    "unclosed": ("Think block never closed", "percent"),
}
CURVES = {  # name in log.jsonl -> title, style, what it is
    "reward": ("Reward", "number", "mean of the rollouts: +1 for a paid answer, −1 for any other"),
    "accuracy": ("Right answers", "percent", "share of the rollouts, on the training tasks"),
    "tokens": ("Length", "number", "new tokens a rollout"),
    "truncated": ("Cut off", "percent", "share of the rollouts that reached the longest length"),
    "kl": ("Divergence", "number", "KL to the untrained model, nats a token"),
    "entropy": ("Entropy", "number", "of the next token, nats"),
    "flat_groups": ("Nothing to learn", "percent", "share of the groups in which all rewards are equal"),
    "loss": ("Loss", "number", "negative log likelihood of the own first tokens, nats a token"),
    "gradient_norm": ("Gradient", "number", "norm, before clipping"),
}
CONTROLS = {  # name in report.json -> what it is
    "shuffled": "the same vectors, each in another layer",
    "random": "random vectors of equal norm",
    "prefix": "no vector; answers begin with “{token}”, which the last vector boosts",
}
PARTS = {  # of a step -> CSS class
    "generation": "hue-2",
    "reward": "hue-4",
    "kl": "hue-0",
    "update": "hue-5",
}


class Card(NamedTuple):
    """Accuracy before and after, by one decoding."""

    title: str
    note: str
    before: str
    after: str
    change: str
    verdict: str
    css: str


class Chain(NamedTuple):
    """One answer of an example."""

    title: str
    answer: str
    correct: bool | None
    segments: Sequence[Segment]
    shares: Sequence[tuple[str, float]]


def write_page(root: str | Path, loaded: Any = None) -> Path:
    """Draw the run folder of a training into `<root>/report.html`: its path.

    loaded: the untrained model; with it the trained vectors are read first, see `write_lens`. Raises UsageError where
    there is no readable report.json.
    """
    root = Path(root)
    report = read_json(root / "report.json")
    if not isinstance(report, dict) or not isinstance(report.get("config"), dict):
        raise UsageError(f"{root / 'report.json'} is not the report of a training")
    if loaded is not None and report["config"].get("method") == "bias":
        write_lens(root, loaded)
    return write_atomic(root / "report.html", render(report, _log(root), _lens(root)))


def write_lens(root: str | Path, loaded: Any) -> Path:
    """What the trained vectors of a run folder say, as `<root>/lens.json` (docs/lens.md), once for the same vectors.

    loaded: the untrained model and its tokenizer, a pair. Raises UsageError where the folder has no vectors, or the
    model is another.
    """
    from steerable.jobs.lens_document import read_direction
    from steerable.steering.direction import Direction

    root = Path(root)
    if _lens(root) is None:
        direction = Direction.load(root / _VECTORS)
        document = read_direction(loaded[0], loaded[1], direction)
        stamp = {"file": _VECTORS, "sha256": sha256(root / _VECTORS)}
        write_json(root / "lens.json", {**stamp, **document, "persistence": None})
    return root / "lens.json"


def render(report: Report, log: Rows = (), lens: Mapping[str, Any] | None = None) -> str:
    """The page. report: content of report.json. log: lines of log.jsonl. lens: content of lens.json. The same input
    gives the same bytes."""
    return templates.render("rl_page.html", **_view(report, log, lens))


def _log(root: Path) -> list[dict[str, Any]]:
    path, rows = root / "log.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # a killed process was writing it
            break
    return rows


def _lens(root: Path) -> Any:
    """The lens document, if it is of the vectors that lie there now."""
    if not (root / "lens.json").exists() or not (root / _VECTORS).exists():
        return None
    document = read_json(root / "lens.json")
    return document if document.get("sha256") == sha256(root / _VECTORS) else None


def _view(report: Report, log: Rows, lens: Mapping[str, Any] | None) -> dict[str, Any]:
    labels = [label for label in words.SHORT if _read(report, "base", "sampled", f"fractions.{label}")]
    examples = report.get("examples") or []
    return {
        "kicker": "Training on own first tokens" if "prefix_tokens" in report["config"] else "Reinforcement learning",
        "model": str((report.get("model") or {}).get("name") or "the model"),
        "facts": _facts(report),
        "headline": headline(report),
        "control": {"random": "rewards were drawn by lot", "format": "any readable answer was paid"}.get(
            report["config"].get("reward", "")
        ),
        "cards": [card for decoding in DECODINGS if (card := _card(report, decoding))],
        "changes": _changes(report),
        "controls": _controls(report),
        "behaviours": [_behaviour(report, label) for label in labels],
        "amplified": _amplified(report, labels),
        "behaviour_table": _behaviour_table(report, labels),
        "training": _training(log or _rows(report)),
        "time": _time(report),
        "costs": _costs(report, log),
        "reasons": _reasons(log),
        "lens": lens_section(lens) if lens else None,
        "examples": [_example(one) for one in examples],
        "labels": [label for label in words.SHORT if any(_says(one, label) for one in examples)],
        "hues": {label: words.hue(label) for label in words.SHORT},
        "tables": [
            (title, Table((), list(words.flat(found))))
            for title, found in (
                ("Configuration", {k: "default" if v in (None, "") else v for k, v in report["config"].items()}),
                ("Model", report.get("model")),
                ("Versions", report.get("versions")),
            )
        ],
    }


# --- what it did ---


def _read(report: Report, arm: str, decoding: str, metric: str) -> Interval | None:
    """A metric of one arm; `arm` is "base", or anything else for what was trained."""
    found: Any = report.get("base" if arm == "base" else report["config"]["method"])
    for key in (decoding, *metric.split(".")):
        found = (found or {}).get(key)
    return Interval(*found) if found else None


def _difference(report: Report, decoding: str, metric: str) -> Interval | None:
    found: Any = report.get("difference")
    for key in (decoding, *metric.split(".")):
        found = (found or {}).get(key)
    return Interval(*found) if found else None


def _change(read: Interval | None, style: str) -> str:
    """A difference with its interval; of shares in points."""
    if read is None:
        return words.MISSING
    if style == "percent":
        middle, low, high = (f"{100 * x:+.1f}".replace("-", words.MINUS) if x else "0" for x in read)
        return f"{middle} points ({low} to {high})"
    middle, low, high = (words.signed(x) for x in read)
    return f"{middle} ({low} to {high})"


def _verdict(read: Interval | None) -> tuple[str, str]:
    """In words, with the CSS class that colours them."""
    if read is None:
        return words.MISSING, ""
    if read.low <= 0 <= read.high:
        return "no clear difference", ""
    return ("a gain", "clear") if read.low > 0 else ("a loss", "unclear")


def what(report: Report) -> str:
    """What was trained, in words."""
    config, layers = report["config"], (report.get("model") or {}).get("layers")
    where = "attention" if config.get("after") == "attention" else "MLP"
    chosen, rank = config.get("layers"), config.get("rank")
    if chosen:
        every = f"{plural(len(chosen.split(',')), 'layer')} {chosen}"
    else:
        every = "the one layer" if layers == 1 else " ".join(f"each of the {layers or ''} layers".split())
    return {
        "bias": f"one vector after the {where} of {every}" + (f", of rank {rank} together" if rank else ""),
        "adaptive": f"an adapter of rank {rank or 1} on the {where}’s last projection in {every}",
        "lora": f"LoRA of rank {rank or 4} on the {where}’s last projection in {every}",
        "tinylora": "one small vector for all linear maps",
        "full": "every weight",
    }.get(config["method"], str(config["method"]))


def headline(report: Report) -> str:
    """One sentence: what was trained, how many numbers, and accuracy before and after by both decodings."""
    config, training = report["config"], report.get("training") or {}
    if "prefix_tokens" in config:
        tokens = config["prefix_tokens"]
        first = "token" if tokens == 1 else f"{tokens} tokens"
        how = f"on the first {first} of own solutions, without a reward"
    else:
        paid = {"random": "rewards drawn by lot", "format": "readable answers"}.get(
            config.get("reward", ""), "right answers"
        )
        how = f"by reinforcement learning on {paid}"
    count = training.get("trainable_parameters")
    numbers = f" ({words.number(count)} {plural(count, 'number')})" if count else ""
    steps = f" for {training['steps']} {plural(training['steps'], 'step')}" if training.get("steps") else ""
    said = what(report)
    parts = []
    for decoding in DECODINGS:
        before, after = (_read(report, arm, decoding, "accuracy") for arm in ("base", "trained"))
        if before and after:
            gap = _change(_difference(report, decoding, "accuracy"), "percent")
            parts.append(f"{decoding} {words.percent(before.mean)} → {words.percent(after.mean)}, {gap}")
    judged = f" Right answers: {'; '.join(parts)}." if parts else ""
    return f"{said[0].upper()}{said[1:]}{numbers}, trained{steps} {how}.{judged}"


def _facts(report: Report) -> list[str]:
    config, model = report["config"], report.get("model") or {}
    cell = (report.get("base") or {}).get("greedy") or {}
    facts = [f"{model['layers']} {plural(model['layers'], 'layer')}"] if model.get("layers") else []
    facts += [f"tasks of {Path(str(config['tasks'])).name}"] if config.get("tasks") else []
    if tasks := cell.get("tasks"):
        facts.append(f"judged on {tasks} unseen {plural(tasks, 'task')}")
    return [*facts, f"seed {config['seed']}"] if config.get("seed") is not None else facts


def _card(report: Report, decoding: str) -> Card | None:
    before, after = (_read(report, arm, decoding, "accuracy") for arm in ("base", "trained"))
    if before is None or after is None:
        return None
    gap = _difference(report, decoding, "accuracy")
    cell = report["base"][decoding]
    each = f"{cell['tasks']} {plural(cell['tasks'], 'task')}"
    if decoding == "sampled":
        temperature = report["config"].get("temperature", 1.0)
        chains = f"{cell['samples']:g} {plural(cell['samples'], 'chain')}"
        each = f"temperature {words.number(float(temperature))}, {chains} for each of {each}"
    return Card(
        decoding.capitalize(),
        each,
        words.percent(before.mean),
        words.percent(after.mean),
        _change(gap, "percent"),
        *_verdict(gap),
    )


def _changes(report: Report) -> Table:
    rows = []
    for metric, (title, style) in METRICS.items():
        for decoding in DECODINGS:
            before, after = (_read(report, arm, decoding, metric) for arm in ("base", "trained"))
            row = [f"{title}, {decoding}", *(words.with_interval(read, style) for read in (before, after))]
            rows.append([*row, _change(_difference(report, decoding, metric), style)])
    return Table(["", "Before", "After", "Difference"], rows)


def _controls(report: Report) -> Table | None:
    """Accuracy of the controls, and the trained vectors minus each of them, paired by task."""
    found = report.get("controls") or {}
    names = [name for name in CONTROLS if name in found]
    if not names:
        return None

    def cells(accuracy: Any, difference: Any) -> list[str]:
        read, gap = (Interval(*x) if x else None for x in (accuracy, difference))
        return [words.with_interval(read, "percent"), _change(gap, "percent")]

    rows = []
    for name in names:
        title = CONTROLS[name].format(token=visible(found[name].get("token", "")))
        row = [title]
        for decoding in DECODINGS:
            gap = (found[name].get("difference") or {}).get(decoding) or {}
            row += cells((found[name].get(decoding) or {}).get("accuracy"), gap.get("accuracy"))
        rows.append(row)
    head = [part for decoding in DECODINGS for part in (f"Right answers, {decoding}", "Trained minus it")]
    return Table(["", *head], rows)


def _behaviour(report: Report, label: str) -> Panel:
    """Fraction of one behaviour before and after, by both decodings; every panel has its own scale."""
    groups, highest = [], 0.0
    for decoding in DECODINGS:
        members = []
        for arm, css in (("base", "unsteered"), ("trained", f"vector {words.hue(label)}")):
            if read := _read(report, arm, decoding, f"fractions.{label}"):
                name = "before" if arm == "base" else "after"
                tip = f"{decoding}, {name}: {words.with_interval(read, 'percent')}"
                members.append((css, Point(0, read.mean, read.low, read.high, tip)))
                highest = max(highest, read.high)
        groups.append((decoding, _ratio(report, decoding, label), members))
    scale = nice_scale([highest], ceiling=1.0)
    figure = bars(groups, scale, words.percent_tick, label=f"Fraction of {words.short(label)} tokens, before and after")
    return Panel(words.short(label), figure, hue=words.hue(label))


def _ratio(report: Report, decoding: str, label: str) -> str:
    before, after = (_read(report, arm, decoding, f"fractions.{label}") for arm in ("base", "trained"))
    return words.times(after.mean / before.mean) if before and after and before.mean > 0 else ""


def _amplified(report: Report, labels: Sequence[str]) -> str:
    """Which behaviours the training amplified when sampling, by the paired intervals."""
    more: list[str] = []
    less: list[str] = []
    for label in labels:
        gap = _difference(report, "sampled", f"fractions.{label}")
        if gap and (gap.low > 0 or gap.high < 0):
            said = f"{words.short(label)} ({_ratio(report, 'sampled', label)})"
            (more if gap.low > 0 else less).append(said)
    if not any(_difference(report, "sampled", f"fractions.{label}") for label in labels):
        return ""
    if not more and not less:
        return "Sampled, no behaviour’s share changed beyond its 95% interval."
    parts = [f"amplified: {', '.join(more)}"] * bool(more) + [f"reduced: {', '.join(less)}"] * bool(less)
    return f"Sampled, beyond the 95% interval: {'; '.join(parts)}."


def _behaviour_table(report: Report, labels: Sequence[str]) -> Table:
    rows = []
    for label in labels:
        for decoding in DECODINGS:
            metric = f"fractions.{label}"
            reads = (_read(report, arm, decoding, metric) for arm in ("base", "trained"))
            row = [words.short(label), decoding, *(words.with_interval(read, "percent") for read in reads)]
            rows.append([*row, _change(_difference(report, decoding, metric), "percent")])
    return Table(["Behaviour", "Decoding", "Before", "After", "Difference"], rows)


# --- how it went ---


def _rows(report: Report) -> list[dict[str, Any]]:
    """The lines that report.json itself keeps, where there is no log."""
    curve = (report.get("training") or {}).get("curve") or {}
    return [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]


def _training(rows: Rows) -> list[Panel]:
    """A panel for everything that was logged: steps as thin lines, and their running mean where there are many."""
    panels = []
    # The loss of reinforcement learning says nothing: its gradient is what counts, its value is near zero.
    hidden = {"loss"} if any("reward" in row for row in rows) else set()
    for name, (title, style, note) in CURVES.items():
        found = [(row["step"], row[name]) for row in rows if _is_number(row.get(name)) and name not in hidden]
        if not found:
            continue
        write = words.percent if style == "percent" else words.number
        points = [Point(step, value, tip=f"step {step}: {write(value)}") for step, value in found]
        long = len(points) > _MARKED
        series = [Series(title, "m-3 dense" if not long else "raw", points, "none" if long else "circle")]
        if long:
            series.append(Series("running mean", "m-3", _smooth(points), "none"))
        values = [p.y for p in points]
        y = nice_scale(values, floor=0.0 if min(values) >= 0 else None, ceiling=1.0 if style == "percent" else None)
        if name == "reward":
            y = Scale(-1, 1, (-1, -0.5, 0, 0.5, 1))
        x = nice_scale([points[-1].x])
        x = Scale(0, max(points[-1].x, 1), [t for t in x.ticks if t <= points[-1].x and t == int(t)])
        tick = words.percent_tick if style == "percent" else words.number
        figure = curves(series, x, y, words.number, tick, label=f"{title} by step", height=150, x_title="step")
        panels.append(Panel(title, figure, note))
    return panels


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _smooth(points: Sequence[Point]) -> list[Point]:
    """The mean over about a tenth of the steps around each."""
    half = max(1, len(points) // 20)
    found = []
    for i, point in enumerate(points):
        near = [p.y for p in points[max(0, i - half) : i + half + 1]]
        mean = sum(near) / len(near)
        found.append(Point(point.x, mean, tip=f"around step {point.x:g}: {words.number(mean)}"))
    return found


def _time(report: Report) -> list[tuple[str, str, float, str]]:
    """The parts of a mean step: name, CSS class, share, seconds."""
    found = (report.get("training") or {}).get("seconds_per_step") or {}
    total = sum(found.values())
    names = [name for name in PARTS if name in found] + [name for name in found if name not in PARTS]
    return [(name, PARTS.get(name, "hue-1"), found[name] / total, words.number(found[name])) for name in names if total]


def _costs(report: Report, log: Rows) -> list[str]:
    training, said = report.get("training") or {}, []
    if seconds := training.get("seconds_per_step"):
        said.append(f"A step took {words.number(sum(seconds.values()))} s on average")
    if rates := sorted(row["tokens_per_second"] for row in log if row.get("tokens_per_second")):
        said.append(f"rollouts at {words.number(round(rates[len(rates) // 2]))} tokens a second (median)")
    if training.get("optimizer_bytes") is not None:
        said.append(f"the optimiser’s state is {_size(training['optimizer_bytes'])}")
    if skipped := training.get("steps_skipped"):
        steps = "all steps" if skipped == training.get("steps") else f"{skipped} {plural(skipped, 'step')}"
        said.append(f"{steps} {plural(skipped, 'was', 'were')} skipped, as all rewards were equal in every group")
    return said


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{words.number(count)} {unit}"
        count /= 1000
    return f"{words.number(count)} GB"


def _reasons(log: Rows) -> Table | None:
    """Why rollouts were paid or not: shares in the first tenth of the steps, the last, and all."""
    rows = [row["reasons"] for row in log if row.get("reasons")]
    if not rows:
        return None
    tenth = max(1, len(rows) // 10)

    def share(part: Rows, reason: str) -> str:
        return words.percent(sum(row.get(reason) or 0.0 for row in part) / len(part))

    head = ["", *(f"{end} step" if tenth == 1 else f"{end} {tenth} steps" for end in ("First", "Last")), "All"]
    names = dict.fromkeys(name for row in rows for name in row)
    table = [[name.replace("-", " "), *(share(p, name) for p in (rows[:tenth], rows[-tenth:], rows))] for name in names]
    return Table(head, table)


# --- examples ---


def _says(example: Mapping[str, Any], label: str) -> bool:
    chains = (example.get(key) or {} for key in ("base", "trained"))
    return any(span["label"] == label for chain in chains for span in chain.get("spans") or [])


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    chains = []
    for key, title in (("base", "Before"), ("trained", "After")):
        chain = example.get(key) or {}
        pieces = segments(chain.get("thinking") or "", chain.get("spans") or [])
        answer = (chain.get("answer") or "").strip()
        chains.append(Chain(title, answer, chain.get("correct"), pieces, shares(pieces, list(words.SHORT))))
    ends = ["right" if chain.correct else "wrong" for chain in chains]
    title = f"{ends[0]} before, {ends[1]} after" if ends[0] != ends[1] else f"{ends[0]} before and after"
    return {"title": title[0].upper() + title[1:], "task_id": example.get("task_id"), "prompt": example.get("prompt"),
            "chains": chains}  # fmt: skip
