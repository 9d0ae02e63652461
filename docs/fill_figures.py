"""Fill the generated figures of README.md and docs/*.md, so that no number is typed by hand.

    python docs/fill_figures.py [RUN] [benchmarks/results]

RUN is a finished run folder, e.g. runs/pocket or runs/smol-think: its headline is copied to docs/figures.json or
docs/figures-smol-think.json, which are kept with the source. Without RUN the documents are filled again from these
copies. A figure is what stands between `<!-- figures: NAME -->` and `<!-- /figures -->`; `FIGURES` below tells how each
is made. What was not measured reads "not measured".
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from steerable.chains.records import STEERABLE
from steerable.chains.segments import sentences
from steerable.jobs.recipe_job import command
from steerable.jobs.settings import Config
from steerable.methods.recipes import RECIPES
from steerable.pages import words
from steerable.pages.cells import Setting, doses, effect, main_setting, measured, settings, unsteered
from steerable.store.files import write_atomic
from steerable.store.run_folder import read_json, sha256, write_json

DOCS = Path(__file__).parent
sys.path.append(str(DOCS))

import contrast_figures  # noqa: E402 - they lie beside this file
import recipe_figures  # noqa: E402
import training_figures  # noqa: E402

HEADLINES = {"pocket": DOCS / "figures.json", "smol-think": DOCS / "figures-smol-think.json"}
BENCHMARKS = DOCS.parent / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures: ([\w.-]+) -->)(.*?)(<!-- /figures -->)", re.DOTALL)
STEPS = (-1.0, 1.0)
_EXAMPLE = ("behaviour", "prompt", "unsteered", "minus", "plus")
_SHOWN = 6  # sentences of an example that are shown

Sources = Mapping[str, Any]
"""`run`, `think`: the headlines of the runs of pocket and smol-think (see `headline`), and each benchmark's JSON under
its file's stem."""


def headline(folder: Path) -> dict[str, Any]:
    """What the documents say of a run: report.json without curves, examples and the cells at other strengths."""
    report = read_json(folder / "report.json")
    timings = folder / "timings.json"
    return {
        "report_sha256": sha256(folder / "report.json"),
        "stages": read_json(timings)["stages"] if timings.exists() else None,
        **{key: report[key] for key in ("config", "versions", "model", "coverage")},
        "selection": {b: {k: v for k, v in s.items() if k != "candidates"} for b, s in report["selection"].items()},
        "cosines": report["cosines"],
        "rank_correlation": {b: e.get("rank_correlation") for b, e in report["attribution"].items()},
        "cells": [cell for cell in report["cells"] if cell["strength"] in (0, *STEPS)],
        "examples": [
            {key: e[key] if key in ("behaviour", "prompt") else e[key]["thinking"] for key in _EXAMPLE}
            for e in report["examples"]
        ],
        "second_annotators": [read_json(path) for path in sorted(folder.glob("second_annotator.*.json"))],
    }


def sources(benchmarks: Path = BENCHMARKS) -> dict[str, Any]:
    """Everything that figures are made of, as far as it is there."""
    found = {path.stem: read_json(path) for path in sorted(benchmarks.glob("*.json"))}
    run, think = (read_json(path) if path.exists() else {} for path in HEADLINES.values())
    return {**found, "run": run, "think": think}


def fill(text: str, given: Sources) -> str:
    """The document with all its figures made anew."""

    def made(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        if name not in FIGURES:
            raise SystemExit(f"there is no figure {name!r}: expected one of {', '.join(FIGURES)}")
        return start + FIGURES[name](given) + end

    return BLOCK.sub(made, text)


def documents() -> list[Path]:
    return [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


# --- what a run showed ---


def effects(given: Sources) -> str:
    """One row a behaviour: its share at 0, -1 and +1, and its controls; bold is what stands beyond both controls."""
    run = given["run"]
    head = ["behaviour", "steered at", "unsteered", "at −1", "at +1", "random −1 / +1", "shuffled −1 / +1"]
    rows = []
    for b, where in _settings(run):
        metric = f"fractions.{b}"
        base = measured(unsteered(run["cells"], b), metric)
        row = [words.short(b), f"{words.setting(where)}, window {run['selection'][b]['window']}", _share(base)]
        for strength in STEPS:
            done = effect(run["cells"], b, where, strength)
            bold = "**" if done.clear else ""
            row.append(f"{bold}{words.times(done.ratio)}{bold} {_share(done.fraction)}")
        for control in ("random", "shuffled"):
            found = doses(run["cells"], b, control, where)
            row.append(" / ".join(_share(measured(found.get(s, []), metric)) for s in STEPS))
        rows.append(row)
    return _table(head, rows)


def costs(given: Sources) -> str:
    """One row a behaviour and strength: what steering does to everything else."""
    run = given["run"]
    rows: list[list[str]] = []
    kinds = {"accuracy": "share", "loops": "share", "unclosed": "share", "tokens": "tokens", "kl": "nats per token"}
    head = ["vector", "strength", "accuracy", "loops", "unclosed", "tokens", "KL, nats a token"]
    for b, where in _settings(run):
        found = doses(run["cells"], b, None, where)
        if not rows:
            zero = (words.with_interval(measured(found[0.0], m), kind) for m, kind in kinds.items())
            rows.append(["unsteered", "0", *zero])
        for s in STEPS:
            cells = found.get(s, [])
            values = (words.with_interval(measured(cells, metric), kind) for metric, kind in kinds.items())
            rows.append([words.short(b), words.signed(s), *values])
    return _table(head, rows)


def other_settings(given: Sources) -> str:
    """One row a behaviour: the ratios of the main setting, of several layers, of thinking tokens only."""
    run, rows = given["run"], []
    for b, main in _settings(run):
        found = sorted(settings(run["cells"], b), key=lambda s: (s != main, s.where != "all"))
        ratios = [" / ".join(words.times(effect(run["cells"], b, s, x).ratio) for x in STEPS) for s in found[:3]]
        rows.append([words.short(b), *ratios, *["not measured"] * (3 - len(ratios))])
    return _table(["−1 / +1", "one layer", "several layers, 1/n each", "one layer, thinking only"], rows)


def about(given: Sources) -> str:
    """What was run, as one sentence."""
    run = given["run"]
    if not run:
        return words.MISSING
    config, cell = run["config"], unsteered(run["cells"], "")[0]
    stages = run["stages"] or {}
    took = f"; {sum(stages.values()) / 60:.1f} minutes on the machine that made it" if stages else ""
    decoding = "greedy decoding" if config["greedy"] else "decoding by the model's own generation_config"
    each = f"{words.number(cell['samples'])} chains" if cell["samples"] != 1 else "one chain"
    return (
        f"Model `{config['model']}`, vectors from {run['coverage']['chains']} chains, judged on {cell['tasks']} other "
        f"tasks with {each} each, {decoding}, seed {config['seed']}{took}. "
        "Shares are of the thinking tokens, with 95 % intervals of a bootstrap over tasks; a ratio is bold where the "
        "effect is beyond both controls."
    )


def ratios(strength: float, given: Sources) -> str:
    """The range of the ratios to the unsteered share, over behaviours."""
    run = given["run"]
    found = [effect(run["cells"], b, where, strength).ratio for b, where in _settings(run)]
    return _range([r for r in found if r is not None], words.times)


def beyond_controls(given: Sources) -> str:
    """How many effects at +-1 are beyond both controls, of how many."""
    run = given["run"]
    clear = [effect(run["cells"], b, where, s).clear for b, where in _settings(run) for s in STEPS]
    return f"{sum(clear)} of {len(clear)}" if clear else words.MISSING


def correlations(metric: str, given: Sources) -> str:
    """The range of a cheap metric's rank correlation with exact patching."""
    found = given["run"].get("rank_correlation") or {}
    return _range([r[metric] for r in found.values() if r and r.get(metric) is not None], _two)


def cosine(kind: str, name: str | None, given: Sources) -> str:
    """The range of a cosine over the steered behaviours: of two baselines (at the chosen window) or two windows."""
    run = given["run"]
    found = run.get("cosines", {}).get(kind, {})
    chosen = {b: name or run["selection"][b]["window"] for b in found if b in run["selection"]}
    return _range([found[b][key] for b, key in chosen.items() if found[b].get(key) is not None], _two)


def between(given: Sources) -> str:
    """The range of the cosines between vectors of different behaviours."""
    matrix = given["run"].get("cosines", {}).get("selected", {}).get("matrix", [])
    return _range([x for i, row in enumerate(matrix) for j, x in enumerate(row) if i != j], _two)


def of_think(make: Callable[[Sources], str], given: Sources) -> str:
    """A figure of the run of smol-think."""
    return make({**given, "run": given.get("think", {})})


def example(given: Sources) -> str:
    """What the model thinks about one task, unsteered, down and up: the first sentences."""
    found = next((e for e in given["run"].get("examples", ()) if e["behaviour"] == "backtracking"), None)
    if not found:
        return _table([], [])
    rows = []
    for name, text in (("unsteered", found["unsteered"]), ("−1", found["minus"]), ("+1", found["plus"])):
        parts = sentences(text)
        shown = " ".join(text[: parts[min(_SHOWN, len(parts)) - 1].end].split())
        rows.append([name, f"{shown}{' ...' if len(parts) > _SHOWN else ''}"])
    return f"“{' '.join(found['prompt'].split())}”{_table(['backtracking', 'the chain begins'], rows)}"


def second_annotators(given: Sources) -> str:
    """One row an effect: the share of the behaviour by the run's annotator and by those of `steerable reannotate`."""
    found = given.get("think", {}).get("second_annotators")
    if not found:
        return _table([], [])
    first, names = found[0]["annotators"][0], [one["annotators"][1] for one in found]
    rows = []
    for effects in zip(*(one["effects"] for one in found), strict=True):
        row = [words.short(effects[0]["behaviour"]), words.signed(effects[0]["strength"])]
        for name, effect_of in ((first, effects[0]), *zip(names, effects, strict=True)):
            shares, bold = effect_of["fractions"][name], "**" if effect_of["outside"][name] else ""
            shown = [words.percent(share[0]) if share else words.MISSING for share in shares.values()]
            row += [shown[0], f"{bold}{shown[1]}{bold}", " / ".join(shown[2:])]
        rows.append(row)
    kinds = [name.partition(":")[0] for name in (first, *names)]
    heads = (head for kind in kinds for head in (f"unsteered, by {kind}", "steered", "random / shuffled"))
    return _table(["behaviour", "strength", *heads], rows)


def _settings(run: Mapping[str, Any]) -> Iterable[tuple[str, Setting]]:
    for b in STEERABLE:
        if run and (where := main_setting(run["cells"], b, run["selection"].get(b))):
            yield b, where


# --- what the benchmarks and the model's measurement showed ---


def speed(given: Sources) -> str:
    """One row a benchmark: the measured ratio beside the aim."""
    jobs = {name: given.get(name, {}).get("jobs", {}) for name in ("extraction", "attribution")}
    steered = _generated(given, "pocket").get("steered_over_unsteered", {})
    rows = [
        *(
            (
                f"generation with `{model}`, tokens a second",
                "`model.generate` in batches of 64",
                _generated(given, model).get("engines", {}).get("ratio_wall"),
                aim,
            )
            for model, aim in (("pocket", "≥ 4"), ("smol-think", "≥ 2.5"))
        ),
        ("steered generation, one layer", "unsteered", steered.get("one layer"), "≤ 1.05"),
        ("steered generation, all layers", "unsteered", steered.get("all layers"), "≤ 1.05"),
        ("extraction, all layers and behaviours", "forward pass", _ratio(jobs["extraction"], "extraction"), "≤ 1.15"),
        (
            "attribution (published), all layers and behaviours",
            "one token forward and backward, and the prefix",
            _ratio(jobs["attribution"], "published, published_rescaled"),
            "≤ 1.5",
        ),
    ]
    shown = [[what, base, words.MISSING if x is None else f"×{x:.2f}", aim] for what, base, x, aim in rows]
    return _table(["what", "compared with", "measured", "aim"], shown)


def generation(given: Sources) -> str:
    """The tokens a second with each model that was measured, beside those of `model.generate`."""
    shown = []
    for model, row in given.get("generation", {}).get("models", {}).items():
        size, ratio = row["parameters"] / 1e6, row["engines"]["ratio_wall"]
        shown.append(f"×{ratio:.1f} with `{model}` ({size:.{0 if size >= 10 else 1}f} million parameters)")
    return ", ".join(shown) or words.MISSING


def _generated(given: Sources, model: str) -> Mapping[str, Any]:
    """What `benchmarks/generation.py` says of a model."""
    return given.get("generation", {}).get("models", {}).get(model, {})


def _ratio(jobs: Mapping[str, Any], name: str) -> float | None:
    return jobs.get(name, {}).get("ratio")


def peers(given: Sources) -> str:
    """One row a tool and extraction, at its best and at its default batch size; the same extractions together."""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in given.get("peers", {}).get("rows", []):
        if not row["job"].startswith("plain"):
            kinds = [kind for kind in ("best", "default") if row[kind]]
            found.setdefault((row["job"], row["tool"]), {}).update(dict.fromkeys(kinds, row))
    rows = []
    for (job, tool), of in sorted(found.items(), key=lambda item: (item[0][0], item[1]["best"]["ratio"])):
        best, default = of["best"], of["default"]
        spread = f"×{best['ratio']:.2f} ({best['lowest']:.2f}–{best['highest']:.2f})"
        memory = " / ".join(
            words.MISSING if r["mebibytes"] is None else f"{r['mebibytes']:.0f}" for r in (best, default)
        )
        batches = f"{best['setting']} / {default['setting']}"
        rows.append([job, tool.replace("_", "-"), batches, spread, f"×{default['ratio']:.2f}", memory])
    head = [
        "extraction, texts",
        "tool",
        "batch, best / default",
        "best batch",
        "default batch",
        "peak MiB, best / default",
    ]
    return _table(head, rows)


def long_chain(given: Sources) -> str:
    """One row a phase: what a long chain needs beside its generation."""
    found = given.get("long_chain", {}).get("phases", {})
    rows = [
        [name, f"{phase['peak_mib']:,.0f}", f"×{phase['ratio']:.2f}", f"{phase['seconds']:,.0f}"]
        for name, phase in found.items()
    ]
    return _table(["phase", "peak MiB", "beside generation", "seconds"], rows)


def memory(given: Sources) -> str:
    """One row a command: its peak beside its bar."""
    rows = [
        [f"`steerable {name}`", f"{row['peak_gib']:.2f}", f"{row['bar_gib']:.1f}"]
        for name, row in given.get("memory", {}).get("commands", {}).items()
    ]
    return _table(["command, with `--model smol`", "peak GiB", "aim, below"], rows)


def serving(given: Sources) -> str:
    """One row a setting of vLLM: tokens a second over those of the same engine without the plugin."""
    rows = [
        [f"{model}, {mode}", name, f"{statistics.median(row['wall']):.3f}", f"{statistics.median(row['cpu']):.3f}"]
        for model, modes in given.get("serving", {}).get("models", {}).items()
        for mode, about in modes.items()
        if mode != "chains"
        for name, row in about["rows"].items()
    ]
    return _table(["engine", "what steers", "throughput over unsteered", "the same by CPU seconds"], rows)


def serving_chains(given: Sources) -> str:
    """One row an engine: the chains of the main job."""
    rows = [
        [f"{model}, {made['chains']} chains", name, str(row["tokens"]), f"{row['tokens_per_second']:.0f}"]
        for model, modes in given.get("serving", {}).get("models", {}).items()
        for made in modes.get("chains", {}).values()
        for name, row in made["sides"].items()
    ]
    return _table(["model", "engine", "tokens", "tokens a second"], rows)


def parity(given: Sources) -> str:
    """One row a batch of vLLM: how far its steered texts are from the transformers engine's."""
    rows = []
    for name, row in given.get("parity", {}).get("rows", {}).items():
        equal = {True: "bit-equal", False: "not bit-equal", None: ""}[row.get("bit_equal")]
        texts = "" if row["texts"] is None else str(row["texts"])
        rows.append([name, texts, f"{row['difference']:.1e}".replace("-", words.MINUS), equal])
    head = ["model, engine and what the scheduler does", "texts", "largest difference", "unsteered texts"]
    return _table(head, rows)


def agreement(given: Sources) -> str:
    """One row a program: its conventions, and at each block how its log-probabilities agree with ours."""
    measured_there = given.get("agreement", {})
    blocks, rows = [str(block) for block in measured_there.get("blocks", ())], []
    for tool in measured_there.get("tools", ()):
        name, number = next(iter(tool["versions"].items()))
        about = [f"{tool['program']}, {name} {number}", tool["layers"], tool["strength"]]
        if "quantised" in tool:
            for kind in ("quantised", "float32"):
                at = [tool[kind]["blocks"][block]["cosine"] for block in blocks]
                shown = [f"cosine {cosine['mean']:.5f}, lowest {cosine['lowest']:.5f}" for cosine in at]
                rows.append([*about, *shown])
                about = ["the same on weights in float32", "", ""]
        else:
            at = [tool["blocks"][block] for block in blocks]
            rows.append([*about, *(f"{b['largest_difference']:.0e} ({b['of_the_largest']:.0e})" for b in at)])
    return _table(["program", "its layers", "strength there", *(f"block {block}" for block in blocks)], rows)


def llama_cpp(given: Sources) -> str:
    """How far llama.cpp's arithmetic is from ours without any vector, and what tells one block from the next."""
    measured_there = given.get("agreement", {})
    row = next((tool for tool in measured_there.get("tools", ()) if "quantised" in tool), None)
    if row is None:
        return words.MISSING
    quantised, wide = row["quantised"]["unsteered"], row["float32"]["unsteered"]
    earlier = [at["cosine_one_block_earlier"]["mean"] for at in row["quantised"]["blocks"].values()]
    return (
        f"Unsteered, its log-probabilities differ from ours by {quantised['mean']:.2f} on average and at most "
        f"{quantised['largest']:.2f} on the file as it is (the same likeliest token "
        f"after {quantised['same_first_token']} of {measured_there['prompts']} prompts), and by {wide['mean']:.0e} and "
        f"at most {wide['largest']:.0e} once its weights are written out in float32. With our vector one block earlier "
        f"the cosines would be {_range(earlier, _two)}."
    )


def taught(name: str, given: Sources) -> str:
    """A model that this project taught: pass@k by family, then everything else."""
    found = given.get(name)
    if not found:
        return _table([], [])
    passes = found["pass"]
    ks = [k for k, value in passes["mean"].items() if value]
    return _table(["pass@k", *passes], [[k, *(_share(passes[f][k]) for f in passes)] for k in ks]) + _table(
        ["over all sampled chains", ""],
        [
            ["closed and answered", _share(found["closed_and_answered"])],
            ["every number of the task copied", _share(found["copied"])],
            ["wrong equations", _share(found["wrong_equations"])],
            ["tokens a chain", words.with_interval(found["tokens"], "tokens")],
            *([f"{label} tokens", _share(value)] for label, value in found["fractions"].items()),
        ],
    )


def front_door(given: Sources) -> str:
    """A command, and one row a strength: what the model answers, by `benchmarks/front_door.py`."""
    found = given.get("front_door")
    if not found:
        return _table([], [])
    rows = []
    for strength, text in sorted(((a["strength"], a["answer"]) for a in found["answers"]), key=lambda row: row[0] != 0):
        two = text[: sentences(text)[1].end]
        rows.append([words.signed(strength) if strength else "unsteered", " ".join(two.split())])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    about = (
        "The first two sentences of each answer, decoded greedily; made by `python benchmarks/front_door.py` with "
        f"{versions}.\n"
    )
    return f"\n\n```bash\n{found['command']}\n```{_table(['strength', 'answer'], rows)}{about}"


# --- what the code says of itself ---


def options(given: Sources) -> str:
    """One row a setting of a run."""
    rows = []
    for name, setting in Config.model_fields.items():
        default = "" if setting.default is None else "off" if setting.default is False else f"`{setting.default}`"
        text = (setting.description or "").replace("<", "&lt;").replace("|", "\\|")
        rows.append([f"`--{name.replace('_', '-')}`", default, text])
    return _table(["option", "default", "meaning"], rows)


# --- writing ---


def _share(value: Any) -> str:
    return words.with_interval(value, "share")


def _two(value: float) -> str:
    return f"{value:.2f}".replace("-", words.MINUS)


def _range(values: list[float], shown: Callable[[float], str]) -> str:
    if not values:
        return words.MISSING
    low, high = shown(min(values)), shown(max(values))
    return low if low == high else f"{low} to {high}"


def recipes(given: Sources) -> str:
    """One row a recipe."""
    figures = recipe_figures.measured(given)
    rows = []
    for name, recipe in RECIPES.items():
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in recipe.papers)
        rows.append([f"`{name}`", papers, recipe.parts, f"`{command(name)}`", figures.get(name, words.MISSING)])
    return _table(["recipe", "arXiv", "parts", "command", "measured"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return f"\n\n_{words.MISSING}_\n\n"
    lines = [head, ["---"] * len(head), *rows]
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


FIGURES: dict[str, Callable[[Sources], str]] = {
    "recipes": recipes,
    "about": about,
    "effects": effects,
    "costs": costs,
    "settings": other_settings,
    "up": partial(ratios, 1.0),
    "down": partial(ratios, -1.0),
    "rank.published": partial(correlations, "published"),
    "rank.published_rescaled": partial(correlations, "published_rescaled"),
    "rank.fisher": partial(correlations, "fisher"),
    "baselines": partial(cosine, "overall_vs_pooled", None),
    "published-onset": partial(cosine, "windows", "published~onset"),
    "between": between,
    "speed": speed,
    "generation": generation,
    "peers": peers,
    "long_chain": long_chain,
    "memory": memory,
    "serving": serving,
    "serving.chains": serving_chains,
    "parity": parity,
    "agreement": agreement,
    "agreement.llama_cpp": llama_cpp,
    "pocket": partial(taught, "pocket"),
    "smol-think": partial(taught, "smol_think"),
    **{
        f"think.{name}": partial(of_think, make)
        for name, make in (("about", about), ("effects", effects), ("costs", costs), ("settings", other_settings))
    },
    "think.example": partial(of_think, example),
    "think.up": partial(of_think, partial(ratios, 1.0)),
    "think.down": partial(of_think, partial(ratios, -1.0)),
    "think.clear": partial(of_think, beyond_controls),
    "think.second": second_annotators,
    "front_door": front_door,
    "options": options,
    **contrast_figures.FIGURES,
    **recipe_figures.FIGURES,
    **training_figures.FIGURES,
}


def main(arguments: list[str]) -> None:
    folders = [Path(a) for a in arguments]
    run = next((f for f in folders if (f / "report.json").exists()), None)
    others = [f for f in folders if f != run]
    if len(others) > 1 or any(not f.is_dir() for f in others):
        raise SystemExit("usage: python docs/fill_figures.py [RUN] [benchmarks/results]; RUN holds a report.json")
    if run is not None:
        made = headline(run)
        if (name := made["config"]["model"]) not in HEADLINES:
            raise SystemExit(f"{run} is a run of {name}: expected one of {' or '.join(HEADLINES)}")
        write_json(HEADLINES[name], made)
    given = sources(others[0] if others else BENCHMARKS)
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = fill(old, given)
        if new != old:
            write_atomic(path, new)
        print(f"{path.relative_to(DOCS.parent)}: {'filled anew' if new != old else 'unchanged'}")


if __name__ == "__main__":
    main(sys.argv[1:])
