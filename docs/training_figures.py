"""The figures of training, from arms.json and training.json in benchmarks/results; `fill_figures.py` places them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from steerable.jobs.training_settings import RLSettings
from steerable.pages import words

Sources = Mapping[str, Any]
#: name in arms.json -> (words, what is trained)
NAMES = {
    "base": "base",
    "prefix": "first-token prefix, untrained",
    "bias": "**bias, all layers**",
    **{f"layer{i}": f"bias, layer {i} alone" for i in range(6)},
    "tinylora": "TinyLoRA",
    "adaptive": "rank-1 LoRA (adaptive)",
    "lora": "LoRA r = 4",
    "full": "full",
    "format": "bias, paid for form alone",
    "random-reward": "bias, random reward",
    "shuffled": "bias, layers exchanged",
    "random": "random vectors of equal norm",
}
HIGH = {"bias-high": "bias, all layers, at the highest validation accuracy"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the lines around it that a document needs."""
    if not rows:
        return f"\n\n_{words.MISSING}_\n\n"
    lines = [head, ["---"] * len(head), *rows]
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def arms(names: Mapping[str, str], given: Sources, source: str = "arms") -> str:
    """One row an arm: accuracy and recovered fraction, greedy and sampled, length and loops."""
    found = given.get(source, {}).get("arms", {})
    rows = []
    for name, shown in names.items():
        if name not in found:
            continue
        arm, greedy, sampled = found[name], found[name]["greedy"], found[name]["sampled"]
        rows.append(
            [
                shown,
                _count(arm.get("trainable_parameters")),
                str(arm["seeds"]),
                _share(sampled["accuracy"]),
                _share(greedy["accuracy"]),
                *(_recovered(decoded) for decoded in (sampled, greedy)),
                words.number(sampled["tokens"]),
                f"{words.percent(sampled['loops'])} / {words.percent(greedy['loops'])}",
            ]
        )
    head = ["arm", "numbers trained", "seeds", "right, sampled", "right, greedy", "R sampled", "R greedy",
            "tokens, sampled", "loops, sampled / greedy"]  # fmt: skip
    return table(head, rows)


def against(given: Sources, source: str = "arms") -> str:
    """Bias minus each control, paired over tasks and seeds."""
    found = given.get(source, {}).get("against", {})
    rows = [[NAMES[name], *(_points(by[d]) for d in ("sampled", "greedy"))] for name, by in found.items()]
    return table(["bias, all layers, minus", "sampled", "greedy"], rows)


def behaviours(given: Sources) -> str:
    """Shares of the six behaviours before and after, and the cosine of the vectors with the difference of means."""
    everything = given.get("arms", {})
    found, vectors = everything.get("arms", {}), everything.get("vectors", {})
    named = [name for name in ("base", "bias", "lora", "full") if name in found]
    rows = []
    for label in words.SHORT if named else ():
        cells = [_share(found[name]["sampled"]["fractions"][label]) for name in named]
        cosines = vectors.get("cosines", {}).get(label, {})
        # steered behaviours alone have vectors of the main job
        shown = [_two(cosines[layer]) for layer in sorted(cosines, key=int)]
        rows.append([words.short(label), *cells, ", ".join(shown) or "no vector"])
    cosine = "cosine of the trained vectors with its difference of means, layers 0 to 5"
    return table(["behaviour", *(NAMES[name].strip("*") for name in named), cosine], rows)


def chance(given: Sources) -> str:
    """The cosine that two random vectors stay below in 95 % of cases."""
    found = given.get("arms", {}).get("vectors", {}).get("cosine_by_chance")
    return words.MISSING if found is None else _two(found)


def tokens(given: Sources, source: str = "arms", last: int = 0) -> str:
    """What every layer's vector says; last: how many layers are shown, from the end, 0 for all."""
    found = given.get(source, {}).get("vectors", {})
    rows = [
        [layer, words.number(found["norms"][layer]), *(_words(read[end]) for end in ("top", "bottom"))]
        for layer, read in list(found.get("tokens", {}).items())[-last:]
    ]
    return table(["layer", "norm", "tokens that it boosts most", "tokens that it lowers most"], rows)


def passk(given: Sources) -> str:
    """pass@k of base and arms, and the verdict on each pair of curves."""
    found = given.get("arms", {}).get("passk", {})
    if not found:
        return table([], [])
    ks = list(found["base"]["passk"])
    rows = [[k, *(_share(arm["passk"][k]) for arm in found.values())] for k in ks]
    curves = table(["k", *found], rows)
    said = []
    for name, arm in found.items():
        if against_base := arm.get("against_base"):
            said.append(
                [
                    name,
                    against_base["crossing"]["sentence"],
                    f"{against_base['created']} / {against_base['lost']}",
                    words.with_interval(against_base["perplexity_ratio"]["correct"], "ratio"),
                ]
            )
    head = ["arm", "against the base", "tasks solved by it alone / by the base alone",
            "perplexity of its right solutions under the base, over that of the base's own"]  # fmt: skip
    return curves.rstrip("\n") + table(head, said)


def rates(given: Sources) -> str:
    """Validation accuracy at every learning rate that was tried; the best is bold."""
    found = given.get("arms", {}).get("rates", {})
    rows = []
    for method, by_rate in found.items():
        best = max(by_rate.values())
        cells = [
            f"**{rate}: {words.percent(x)}**" if x == best else f"{rate}: {words.percent(x)}"
            for rate, x in sorted(by_rate.items(), key=lambda item: float(item[0]))
        ]
        rows.append([method, ", ".join(cells)])
    return table(["method", "learning rate: right on the validation tasks, sampled"], rows)


def about(given: Sources) -> str:
    """What the arms share, as one sentence."""
    found = given.get("arms", {})
    if not found:
        return words.MISSING
    s = found["settings"]
    return (
        f"{s['steps']} steps of {s['prompts']} tasks × {s['group']} samples for every arm, the learning rate of each "
        f"method tuned on validation tasks, the last checkpoint judged on {found['tasks']} unseen tasks: once greedily "
        f"and {s['samples']} times sampled at temperature {words.number(s['temperature'])}. "
        "Intervals are 95 %, of a bootstrap over tasks and seeds; R = (arm − base) / (full − base), and – where the "
        "interval of full − base holds 0: nothing clear was gained to recover."
    )


def think_about(given: Sources) -> str:
    """What the arms of smol-think share, as one sentence."""
    found = given.get("think_arms", {})
    if not found:
        return words.MISSING
    s = found["settings"]
    lora = "LoRA was not run"
    if "lora" in found["arms"]:
        lora = "R = (arm − base) / (LoRA − base), and – where the interval of LoRA − base holds 0"
    return (
        f"{s['steps']} steps of {s['prompts']} tasks × {s['group']} samples for every arm and {len(found['seeds'])} "
        f"seeds; the last checkpoint is judged on {found['tasks']} unseen tasks: once greedily and {s['samples']} "
        "times sampled. "
        f"Intervals are 95 %, of a bootstrap over tasks and seeds; {lora}."
    )


def think_gain(given: Sources) -> str:
    """What the vectors gain over the untrained model, and over the random reward."""
    found = given.get("think_arms", {})
    if "against" not in found:
        return words.MISSING
    arm, lot = found["arms"]["bias"], found["against"]["random-reward"]["sampled"]
    return (
        f"{_points(arm['sampled']['gain'])} sampled and {_points(arm['greedy']['gain'])} greedily; sampled, "
        f"{_points(lot)} beyond vectors trained on a random reward"
    )


def cost(given: Sources) -> str:
    """One row a method: what a step takes and what the optimiser keeps."""
    found = given.get("training", {}).get("methods", {})
    rows = [
        [
            name,
            _count(method["trainable_parameters"]) if "trainable_parameters" in method else "",
            f"{method['optimizer_bytes']:,} bytes".replace(",", "\N{NARROW NO-BREAK SPACE}")
            if "optimizer_bytes" in method
            else "",
            *(f"{method['seconds'][part]:.2f} s" for part in ("generation", "reward", "update")),
        ]
        for name, method in found.items()
    ]
    return table(["method", "numbers trained", "optimiser's memory", "generation", "reward", "update"], rows)


def ratio(name: str, style: str, given: Sources) -> str:
    """One ratio of the cost benchmark."""
    found = given.get("training", {}).get(name)
    if found is None:
        return words.MISSING
    return f"{100 * found:.3f} %" if style == "percent" else f"×{found:.2f}"


def options(given: Sources) -> str:
    """One row a setting of `steerable train rl`."""
    rows = []
    for name, setting in RLSettings.model_fields.items():
        default = "" if setting.default in (None, "") else "off" if setting.default is False else f"`{setting.default}`"
        text = (setting.description or "").replace("<", "&lt;").replace("|", "\\|")
        rows.append([f"`--{name.replace('_', '-')}`", default, text])
    return table(["option", "default", "meaning"], rows)


def _share(value: Any) -> str:
    return words.with_interval(value, "share")


def _recovered(cell: Mapping[str, Any]) -> str:
    """Nothing for the arms that R is measured by, a dash where its denominator may be zero."""
    return "" if "recovered" not in cell else _share(cell["recovered"]) if cell["recovered"] else "–"


def _points(value: Sequence[float]) -> str:
    mean, low, high = (f"{100 * x:+.1f}".replace("-", words.MINUS) for x in value)
    return f"{mean} points ({low} to {high})"


def _two(value: float) -> str:
    return f"{value:.2f}".replace("-", words.MINUS)


def _count(value: int | None) -> str:
    return "0" if value is None else words.number(value)


def _words(tokens: Sequence[str]) -> str:
    return ", ".join(f"`{token.strip() or repr(token)[1:-1]}`".replace("|", "\\|") for token in tokens)


FIGURES: dict[str, Callable[[Sources], str]] = {
    "arms": partial(arms, NAMES),
    "arms.high": partial(arms, HIGH),
    "arms.about": about,
    "arms.against": against,
    "arms.behaviours": behaviours,
    "arms.chance": chance,
    "arms.tokens": tokens,
    "arms.passk": passk,
    "arms.rates": rates,
    "think.arms": partial(arms, NAMES, source="think_arms"),
    "think.arms.about": think_about,
    "think.arms.against": partial(against, source="think_arms"),
    "think.arms.gain": think_gain,
    "think.arms.tokens": partial(tokens, source="think_arms", last=8),
    "training.cost": cost,
    "training.update": partial(ratio, "update_bias_over_lora", "times"),
    "training.memory": partial(ratio, "optimizer_bias_over_full", "percent"),
    "training.rollouts": partial(ratio, "generate_over_engine", "times"),
    "training.options": options,
}
