"""A training's run folder as one page: what was trained, what it changed, how it went, what the vectors say.

The page is a pure function of `report.json`, `log.jsonl` and `lens.json`; what is missing there reads "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerable.pages import words
from steerable.pages.cells import metrics_of
from steerable.pages.examples import columns, labels_in
from steerable.pages.figures import Panel, Point, Scale, Series, bars, curves, nice_scale, share_scale
from steerable.pages.html import render as render_template
from steerable.pages.lens_page import section as lens_section
from steerable.pages.words import Interval
from steerable.store.text import plural

Report = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]
DECODINGS = ("sampled", "greedy")
_MARKED = 40  # steps: with more of them the markers would hide the line
CURVES = {  # name in log.jsonl -> title, unit, what it is
    "reward": ("Reward", "", "mean of the rollouts: +1 for a paid answer, −1 for any other"),
    "accuracy": ("Right answers", "share", "share of the rollouts, on the training tasks"),
    "tokens": ("Length", "tokens", "new tokens a rollout"),
    "truncated": ("Cut off", "share", "share of the rollouts that reached the longest length"),
    "kl": ("Divergence", "nats", "KL to the untrained model, nats a token"),
    "entropy": ("Entropy", "nats", "of the next token, nats"),
    "flat_groups": ("Nothing to learn", "share", "share of the groups in which all rewards are equal"),
    "loss": ("Loss", "nats", "negative log likelihood of the own first tokens, nats a token"),
    "gradient_norm": ("Gradient", "", "norm, before clipping"),
}
PARTS = {"generation": "hue-2", "reward": "hue-4", "kl": "hue-0", "update": "hue-5"}  # of a step -> CSS class
_CHAINS = {"base": "Before", "trained": "After"}


def render(report: Report, log: Rows = (), lens: Mapping[str, Any] | None = None) -> str:
    """The page of a training; the same input gives the same bytes.

    Args:
        report: The content of report.json.
        log: The lines of log.jsonl, one a step.
        lens: The content of lens.json.
    """
    config, training = report["config"], report.get("training") or {}
    fractions = ((report.get("base") or {}).get("sampled") or {}).get("fractions") or {}
    labels = words.ordered(label for label in fractions if Interval.of(fractions[label]))
    examples = report.get("examples") or []
    spoken = words.ordered(labels_in(examples, _CHAINS))
    order = words.ordered([*labels, *spoken])
    seconds = training.get("seconds_per_step") or {}
    parts = sorted(seconds, key=lambda name: [*PARTS, name].index(name))
    return render_template(
        "training.html",
        kicker="Training on own first tokens" if "prefix_tokens" in config else "Reinforcement learning",
        report=report,
        config=config,
        settings=words.settings(config, report.get("model") or {}),
        tasks=Path(str(config["tasks"])).name if config.get("tasks") else "",
        headline=headline(report),
        decodings=DECODINGS,
        before_after=_before_after,
        interval_at=_interval_at,
        metrics=metrics_of(report, (report.get("base") or {}).values()),
        labels=labels,
        behaviours=[_behaviour(report, label, words.hue(label, order)) for label in labels],
        amplified=_amplified(report, labels),
        log=log,
        logged=_logged(log or _rows(training)),
        time=[(name, seconds[name] / sum(seconds.values())) for name in parts if sum(seconds.values())],
        parts=PARTS,
        lens=lens_section(lens) if lens else None,
        examples=[(example, columns(example, _CHAINS, order)) for example in examples],
        hues={label: words.hue(label, order) for label in spoken},
    )


# --- what it did ---


def _interval_at(tree: Mapping[str, Any] | None, *keys: str) -> Interval | None:
    """The interval that lies under some keys, None where one of them is missing."""
    for key in keys:
        tree = (tree or {}).get(key)
    return Interval.of(tree)


def _read(report: Report, arm: str, decoding: str, metric: str) -> Interval | None:
    """A metric of the "base", of what was "trained", or their "difference"."""
    arm = report["config"]["method"] if arm == "trained" else arm
    return _interval_at(report, arm, decoding, *metric.split("."))


def _before_after(report: Report, decoding: str, metric: str) -> list[Interval | None]:
    """A metric before, after, and the paired difference."""
    return [_read(report, arm, decoding, metric) for arm in ("base", "trained", "difference")]


def headline(report: Report) -> str:
    """One sentence: what was trained, how many numbers, and accuracy before and after by both decodings."""
    config, training = report["config"], report.get("training") or {}
    if tokens := config.get("prefix_tokens"):
        how = f"on the first {'token' if tokens == 1 else f'{tokens} tokens'} of own solutions, without a reward"
    else:
        paid = {"random": "rewards drawn by lot", "format": "readable answers"}
        how = f"by reinforcement learning on {paid.get(config.get('reward', ''), 'right answers')}"
    count, steps = training.get("trainable_parameters"), training.get("steps")
    numbers = f" ({words.number(count)} {plural(count, 'number')})" if count else ""
    duration = f" for {steps} {plural(steps, 'step')}" if steps else ""
    parts = []
    for decoding in DECODINGS:
        before, after, gap = _before_after(report, decoding, "accuracy")
        if before and after:
            shares = f"{words.percent(before.mean)} → {words.percent(after.mean)}"
            parts.append(f"{decoding} {shares}, {words.change(gap, 'share')}")
    judged = f" Right answers: {'; '.join(parts)}." if parts else ""
    return f"{words.capital(_trained(report))}{numbers}, trained{duration} {how}.{judged}"


def _trained(report: Report) -> str:
    """What was trained, in words."""
    config, layers = report["config"], (report.get("model") or {}).get("layers")
    where = "attention" if config.get("after") == "attention" else "MLP"
    if chosen := config.get("layers"):
        every = f"{plural(len(chosen.split(',')), 'layer')} {chosen}"
    else:
        every = "the one layer" if layers == 1 else f"each of the {layers} layers" if layers else "each of the layers"
    rank = config.get("rank")
    return {
        "bias": f"one vector after the {where} of {every}" + (f", of rank {rank} together" if rank else ""),
        "adaptive": f"an adapter of rank {rank or 1} on the {where}’s last projection in {every}",
        "lora": f"LoRA of rank {rank or 4} on the {where}’s last projection in {every}",
        "tinylora": "one small vector for all linear maps",
        "full": "every weight",
    }.get(config["method"], str(config["method"]))


def _behaviour(report: Report, label: str, hue: str) -> Panel:
    """Fraction of one behaviour before and after, by both decodings; every panel has its own scale."""
    groups, highest = [], [0.0]
    for decoding in DECODINGS:
        members = []
        for arm, name, css in (("base", "before", "unsteered"), ("trained", "after", f"vector {hue}")):
            if read := _read(report, arm, decoding, f"fractions.{label}"):
                tip = f"{decoding}, {name}: {words.with_interval(read, 'share')}"
                members.append((css, Point(0, *read, tip)))
                highest.append(read.high)
        groups.append((decoding, _ratio(report, decoding, label), members))
    name = words.short(label)
    figure = bars(groups, share_scale(highest), label=f"Fraction of {name} tokens, before and after")
    return Panel(name, figure, hue=hue)


def _ratio(report: Report, decoding: str, label: str, instead: str = "–") -> str:
    """The share after over that before; `instead` where there is no ratio."""
    before, after, _ = _before_after(report, decoding, f"fractions.{label}")
    ratio = words.ratio(after, before)
    return instead if ratio is None else words.times(ratio)


def _amplified(report: Report, labels: Sequence[str]) -> str:
    """Which behaviours the training amplified when sampling, by the paired intervals."""
    gaps = {label: gap for label in labels if (gap := _read(report, "difference", "sampled", f"fractions.{label}"))}
    if not gaps:
        return ""
    groups = {
        "amplified": [label for label, gap in gaps.items() if gap.low > 0],
        "reduced": [label for label, gap in gaps.items() if gap.high < 0],
    }
    parts = []
    for name, group in groups.items():
        ratios = {
            label: _ratio(report, "sampled", label, f"{words.points(gaps[label].mean)} points") for label in group
        }
        named = [f"{words.short(label)} ({ratio})" for label, ratio in ratios.items()]
        parts += [f"{name}: {', '.join(named)}"] if named else []
    if not parts:
        return "Sampled, no behaviour’s share changed beyond its 95% interval."
    return f"Sampled, beyond the 95% interval: {'; '.join(parts)}."


# --- how it went ---


def _rows(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that report.json itself keeps, where there is no log."""
    curve = training.get("curve") or {}
    return [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]


def _logged(rows: Rows) -> list[Panel]:
    """A panel for everything that was logged: steps as thin lines, and their running mean where there are many."""
    panels = []
    # The loss of reinforcement learning says nothing: its gradient is what counts, its value is near zero.
    hidden = {"loss"} if any("reward" in row for row in rows) else set()
    for name, (title, unit, note) in CURVES.items():
        values = [(row["step"], row[name]) for row in rows if row.get(name) is not None and math.isfinite(row[name])]
        if not values or name in hidden:
            continue
        write = words.percent if unit == "share" else words.number
        points = [Point(step, value, tip=f"step {step}: {write(value)}") for step, value in values]
        if len(points) > _MARKED:
            smooth = Series("running mean", "m-3", _smooth(points), "none")
            series = [Series(title, "raw", points, "none"), smooth]
        else:
            series = [Series(title, "m-3 dense", points)]
        if name == "reward":
            y = Scale(-1, 1, (-1, -0.5, 0, 0.5, 1))
        else:
            heights = [value for _, value in values]
            floor, is_share = 0.0 if min(heights) >= 0 else None, unit == "share"
            tick = words.percent_tick if is_share else words.number
            y = nice_scale(heights, tick, floor=floor, ceiling=1.0 if is_share else None)
        last = points[-1].x
        x = Scale(0, max(last, 1), [t for t in nice_scale([last]).ticks if t <= last and t == int(t)])
        panels.append(Panel(title, curves(series, x, y, label=f"{title} by step", height=150, x_title="step"), note))
    return panels


def _smooth(points: Sequence[Point]) -> list[Point]:
    """The mean over about a tenth of the steps around each."""
    half = max(1, len(points) // 20)
    smooth = []
    for i, point in enumerate(points):
        near = [p.y for p in points[max(0, i - half) : i + half + 1]]
        mean = sum(near) / len(near)
        smooth.append(Point(point.x, mean, tip=f"around step {point.x:g}: {words.number(mean)}"))
    return smooth
