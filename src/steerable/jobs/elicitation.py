"""`steerable passk`: does training elicit or create? A base and what was trained from it, at 1, 2, 4, ... tries.

Every arm answers the same tasks, equally often, with the same decoding; the draws are paired, since a chain's
randomness comes from the seed, the task and the number of the sample alone. Each arm's chains are one file of the
folder, with the sampled token ids, the judge's verdict and their nats under the base; what is finished is not done
again.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from steerable.chains.generation import Job
from steerable.chains.records import Record, read_jsonl, write_jsonl
from steerable.chains.tasks import correct
from steerable.engines.pool import default_threads, torch_threads
from steerable.engines.sampling import Decoding, decoding_of, warn_if_endless
from steerable.engines.vllm.engine import VllmEngine, parse_options
from steerable.evals.intervals import by_task, mean_interval
from steerable.evals.likelihood import perplexity, perplexity_ratio, surprisal
from steerable.evals.metrics import loops
from steerable.evals.passk import crossing, curve, difference, solved
from steerable.jobs import arms as comparison
from steerable.jobs.arms import (
    BASE,
    Arm,
    check_arms,
    draw_tasks,
    find_arms,
    fingerprint,
    job_of,
    parse_arms,
    source_of,
)
from steerable.jobs.training_settings import PasskSettings
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.pages.passk_page import findings, render, tables
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.files import write_atomic
from steerable.store.run_folder import RunFolder, read_json, sha256, write_json
from steerable.store.text import counted


def passk(
    model: str = "pocket",
    arms: Mapping[str, str | Path] | Sequence[str] = (),
    *,
    tasks: str = "auto",
    exclude: Sequence[str | Path] = (),
    ks: str | Sequence[int] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    out: str | Path = "runs/passk",
    workers: int | None = None,
    overwrite: bool = False,
    display: Display | None = None,
    **settings: Annotated[Any, PasskSettings],
) -> dict[str, Any]:
    """pass@k of a base and of what was trained from it: does training elicit or create?

    Goes on where it was stopped.

    Args:
        model: The base: 'pocket', 'smol', 'smol-think', a folder, a .gguf file or a hub name.
        arms: NAME=FILE to compare with it: a direction file (steered at its own strength), a PEFT adapter (merged into
            the base) or a model. Repeatable.
        tasks: As in `steerable run`, with reference answers; auto: pocket's own, else reasoning-gym.
        exclude: A .jsonl file of tasks not to draw: those of the training, where an arm lies outside of its run folder
            and does not know them. Repeatable.
        ks: The k of the curves, e.g. 1,8,64; default: powers of two.
        temperature: Default: the base's own (the paper's, Yue et al. 2025, is 0.6).
        top_p: Default: the base's own (the paper's is 0.95).
        out: The folder of chains, passk.json and passk.html.
        workers: Processes that generate; default: one a core for small models. Changes no result.
        overwrite: Let results of another base in --out be replaced; else that is refused.
        display: Where progress and tables are shown; default: nowhere.
        settings: The fields of `PasskSettings`.

    Returns:
        The content of passk.json: see docs/passk.md.

    Raises:
        UsageError: Arms do not fit the model, tasks have no reference answers, or a setting makes no sense; nothing
            was generated.

    Example:
        steerable passk --arm bias=runs/rl/bias.safetensors --samples 64 --out runs/passk
    """
    s = PasskSettings(**settings)
    engine_options = parse_options(s.engine, s.engine_options)
    chosen, source = _checked_ks(ks, s.samples), source_of(tasks, model)
    compared = find_arms(model, arms if isinstance(arms, Mapping) else parse_arms(arms or ()))
    others = [arm.name for arm in compared[1:] if arm.kind != "direction"]
    if s.engine == "vllm" and others:
        raise UsageError(
            f"arm {others[0]!r} is a model of its own, and an engine of vLLM has one model: leave out --engine, or "
            "compare directions alone"
        )
    display = display or Display(quiet=True)
    folder = RunFolder(out)
    folder.refuse_other("passk", model, overwrite=overwrite)
    base = models.load(model)
    decoding = _decoding(base, temperature, top_p)
    job_of(s).prompting.ids(base.tokenizer, "")  # refuses what cannot be put to this model
    check_arms(compared, base)
    warn_if_endless(base.model)
    how = {"decoding": asdict(decoding), **s.to_dict()}
    recorded = {"tasks": source, "ks": chosen, **how}
    with folder.locked():
        job = job_of(s, draw_tasks(folder, source, s, exclude, compared[1:]))
        write_json(folder / "config.json", {"job": "passk", "model": model, **recorded})
        options = s.subset("seed max_new_tokens") | {"decoding": decoding}

        @cache
        def spread() -> dict[str, Any]:
            if s.engine == "transformers":
                return {"workers": workers}
            fixed: dict[str, Any] = {"dtype": str(base.model.dtype).removeprefix("torch."), "seed": s.seed}
            return {"workers": 1, "engine": VllmEngine.start(model, **fixed | engine_options)}

        shared = how | {"base": fingerprint(compared[0], base.model)}
        shared.pop("engine_options")  # where it runs, and not what
        for arm in compared:
            key = shared | {"kind": arm.kind, "content": fingerprint(arm)}

            def work(keep: Path, arm: Arm = arm) -> None:
                _sample(folder / f"{arm.name}.jsonl", arm, base, job, options | spread(), display, keep)

            folder.run_stage(arm.name, ["tasks.jsonl"], key, [f"{arm.name}.jsonl"], work)
        rows = {arm.name: _rows(folder / f"{arm.name}.jsonl") for arm in compared}
        versions = {name: version(name) for name in ("steerable", "torch", "transformers")}
        result = {
            "model": models.model_id(base.model) or model,
            "settings": recorded,
            "versions": versions | {"python": platform.python_version()},
            "tasks_sha256": sha256(folder / "tasks.jsonl"),
            "arms": {
                arm.name: {"kind": arm.kind, "source": _portable(arm)}
                | summary(rows[arm.name], chosen)
                | ({} if arm.name == BASE else {"against_base": against(arm.name, rows[arm.name], rows[BASE], chosen)})
                for arm in compared
            },
        }
        # JSON has text alone as keys: what is drawn and returned is what the file says.
        written = dict(read_json(write_json(folder / "passk.json", result)))
        write_atomic(folder / "passk.html", render(written))
    display.show(*tables(written))
    display.tell(*findings(written), f"The page is {(folder / 'passk.html').resolve()}")
    return written


def _checked_ks(ks: str | Sequence[int] | None, samples: int) -> list[int]:
    if ks is None:
        return [2**i for i in range(max(1, samples).bit_length()) if 2**i <= samples]
    try:
        chosen = sorted({int(k) for k in (ks.split(",") if isinstance(ks, str) else ks)})
    except (TypeError, ValueError):
        chosen = []
    if not chosen or chosen[0] < 1:
        raise UsageError(f"--ks is {ks!r}: expected whole numbers from 1 up, separated by commas, e.g. 1,8,64")
    if (largest := chosen[-1]) > samples:
        raise UsageError(
            f"pass@{largest} cannot be had from {counted(samples, 'sample')}: give --samples {largest} or smaller --ks"
        )
    return chosen


def _decoding(base: Loaded, temperature: float | None, top_p: float | None) -> Decoding:
    decoding = decoding_of(base.model, greedy=None if temperature is None else False)
    if temperature is not None:
        if not 0 < temperature < float("inf"):
            raise UsageError(
                f"--temperature is {temperature}: expected more than 0, since equal samples tell nothing new"
            )
        decoding = replace(decoding, temperature=temperature)
    if decoding.greedy:
        raise UsageError(
            "this model's generation_config decodes greedily, so that all samples of a task would be the same: give "
            "--temperature, e.g. 0.6"
        )
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise UsageError(f"--top-p is {top_p}: expected a share above 0, up to 1")
        decoding = replace(decoding, top_p=top_p)
    return decoding


def _portable(arm: Arm) -> str:
    """The arm's source without the folders of this machine that lie above it."""
    path = Path(arm.source)
    return "/".join(path.parts[-2:]) if path.is_absolute() else arm.source


# --- one arm ---


def _sample(
    file: Path, arm: Arm, base: Loaded, job: Job, options: Mapping[str, Any], display: Display, keep: Path
) -> None:
    """One arm's chains, judged and scored under the base, as its file."""
    steering = comparison.steering(arm)
    job = replace(job, steering=steering, strength=steering[0].strength if steering else 0.0)
    chains = comparison.answer(arm, base, job, title=arm.name, display=display, keep=keep / "chains", **options)
    nats = _nats(base, chains, keep / "nats", f"{arm.name}: perplexity", display)
    display.start(f"{arm.name}: judging", len(chains))
    judged: dict[tuple[str, str], bool | None] = {}
    by_id = {task["id"]: task for task in job.tasks}
    for chain, surprise in zip(chains, nats, strict=True):
        answer = chain["answer"] if chain["closed"] else ""  # what was not closed has no answer
        key = chain["task_id"], answer
        if key not in judged:
            judged[key] = correct(by_id[key[0]], answer)
        chain |= {"correct": judged[key], "loops": loops(chain["ids"]), "nats": surprise}
        display.advance(1)
    display.done()
    write_jsonl(file, chains)


def _nats(base: Loaded, chains: Sequence[Record], keep: Path, title: str, display: Display) -> list[float]:
    """Nats of every chain's tokens under the unsteered base; every finished block is kept as a file."""
    nats: list[float] = []
    display.start(title, len(chains))
    with torch_threads(default_threads(base.model, 1)):
        for start in range(0, len(chains), comparison.BLOCK):
            block, file = chains[start : start + comparison.BLOCK], keep / f"{start // comparison.BLOCK}.json"
            if file.exists():
                display.advance(len(block))
            else:
                prompts, texts = ([chain[ids] for chain in block] for ids in ("prompt_ids", "ids"))
                write_json(file, surprisal(base.model, prompts, texts, progress=display.advance))
            nats += read_json(file)
    return nats


# --- what is compared ---

_COLUMNS = ("task_id", "correct", "tokens", "loops", "closed", "nats")


def _rows(file: Path) -> list[Record]:
    """What the comparison needs of a file of chains: not their text."""
    return [{key: chain[key] for key in _COLUMNS} for chain in read_jsonl(file, "chain")]


def counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """{task: (chains, right ones)} of judged chains (`task_id`, `correct`)."""
    by_id: dict[str, tuple[int, int]] = {}
    for row in rows:
        n, c = by_id.get(row["task_id"], (0, 0))
        by_id[row["task_id"]] = n + 1, c + bool(row["correct"])
    return by_id


def summary(rows: Sequence[Mapping[str, Any]], ks: Sequence[int]) -> dict[str, Any]:
    """One arm by itself, from its judged and scored chains; every figure is [mean, low, high] over tasks."""

    def mean(value: Callable[[Mapping[str, Any]], float]) -> Any:
        return mean_interval(by_task((row["task_id"], value(row)) for row in rows))

    return {
        "passk": curve(counts(rows), ks),
        "accuracy": mean(lambda row: float(row["correct"])),
        "tokens": mean(lambda row: row["tokens"]),
        "loops": mean(lambda row: row["loops"]),
        "unclosed": mean(lambda row: float(not row["closed"])),
        "perplexity": {"all": perplexity(_scored(rows)), "correct": perplexity(_scored(rows, right=True))},
        "solved": sum(c > 0 for _, c in counts(rows).values()),
        "counts": counts(rows),
    }


def against(
    name: str, rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], ks: Sequence[int]
) -> dict[str, Any]:
    """One arm beside the base, paired by task."""
    mine, theirs = counts(rows), counts(base)
    crossed, sets = crossing(mine, theirs, ks), solved(mine, theirs)
    created = [row for row in rows if row["task_id"] in set(sets["only_a"])]
    return {
        "difference": difference(mine, theirs, ks),
        "crossing": crossed.to_dict() | {"sentence": crossed.sentence(name, BASE)},
        "created": sets["only_a"],
        "lost": sets["only_b"],
        "both": sets["both"],
        "neither": sets["neither"],
        "perplexity_ratio": {
            "all": perplexity_ratio(_scored(rows), _scored(base)),
            "correct": perplexity_ratio(_scored(rows, right=True), _scored(base, right=True)),
        },
        "perplexity_created": perplexity(_scored(created, right=True)),
    }


def _scored(rows: Iterable[Mapping[str, Any]], right: bool = False) -> list[tuple[str, float, int]]:
    return [(row["task_id"], row["nats"], row["tokens"]) for row in rows if row["correct"] or not right]
