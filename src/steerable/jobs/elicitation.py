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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steerable.chains.generation import Job, Prompting, generate_jobs
from steerable.chains.records import Record, read_jsonl, write_jsonl
from steerable.chains.tasks import correct
from steerable.engines.pool import Report, default_threads, default_workers, loader, map_blocks
from steerable.engines.sampling import Decoding, decoding_of, warn_if_endless
from steerable.evals.intervals import by_task, mean_interval
from steerable.evals.likelihood import perplexity, perplexity_ratio, surprisal
from steerable.evals.metrics import loops
from steerable.evals.passk import crossing, curve, difference, solved
from steerable.jobs.arms import BASE, Arm, check_arms, find_arms, fingerprint, opener, steering
from steerable.jobs.judged_tasks import draw
from steerable.models import loading as models
from steerable.models.loading import Loaded
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.files import write_atomic
from steerable.store.plurals import counted
from steerable.store.run_folder import RunFolder, read_json, sha256, write_json

_BLOCK = 256  # chains that are computed, and kept, as one piece: what a killed run may lose


def passk(
    model: str = "pocket",
    arms: Mapping[str, str | Path] | None = None,
    *,
    tasks: str = "auto",
    exclude: Sequence[str | Path] = (),
    limit: int = 100,
    samples: int = 64,
    ks: str | Sequence[int] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 500,
    system: str = "",
    template: str = "",
    seed: int = 0,
    out: str | Path = "runs/passk",
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Sample every arm and the base, and compare pass@k, solved tasks and perplexity under the base.

    model: the base: "pocket", a folder or a hub name. arms: {name: a direction file (steered at its own strength), a
    PEFT adapter folder (merged into the base) or a model folder}. tasks: a source as for `make_tasks`, with reference
    answers; auto: pocket for the bundled model, else reasoning-gym. exclude: files of tasks that must not be drawn:
    those that the arms were trained on. limit: how many tasks. samples: chains a task, the largest k. ks: default 1, 2,
    4, ... up to `samples`. temperature, top_p: in place of the base's own, for every arm (0.6 and 0.95 in Yue et al.
    2025). system, template: how tasks are put, as `chains.generation.Prompting`. workers: processes; changes no result.
    overwrite: replace the results of another base that the folder holds.

    Returns what it writes to `out`/passk.json: see docs/passk.md. Beside it are passk.html, tasks.jsonl and the chains
    of every arm; a killed call goes on from there. Raises UsageError, before anything is generated, for arms that
    do not fit the model, tasks without reference answers, and settings that make no sense.
    """
    wanted = _checked_ks(ks, samples)
    for flag, number in (("limit", limit), ("max-new-tokens", max_new_tokens), ("samples", samples)):
        if number < 1:
            raise UsageError(f"--{flag} is {number}: expected 1 or more")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed is {seed}: expected a whole number from 0 to {2**32 - 1}")
    source = ("pocket" if model == "pocket" else "reasoning-gym") if tasks == "auto" else tasks
    found = find_arms(model, arms or {})
    folder = RunFolder(out)
    folder.refuse_other("passk", model, overwrite=overwrite)
    base = models.load(model)
    decoding = _decoding(base, temperature, top_p)
    prompting = Prompting(system=system, template=template)
    prompting.ids(base.tokenizer, "")  # refuses what cannot be put to this model
    check_arms(found, base)
    warn_if_endless(base.model)
    with folder.locked(), Display(quiet) as display:
        drawn = draw(folder, source, limit, seed, exclude)
        settings = {
            "tasks": source, "limit": limit, "samples": samples, "ks": wanted, "decoding": asdict(decoding),
            "max_new_tokens": max_new_tokens, "system": system, "template": template, "seed": seed,
        }  # fmt: skip
        write_json(folder / "config.json", {"job": "passk", "model": model, **settings})
        common = {
            "decoding": asdict(decoding), "samples": samples, "max_new_tokens": max_new_tokens, "seed": seed,
            "system": system, "template": template, "base": fingerprint(found[0], base.model),
        }  # fmt: skip
        for arm in found:
            work = partial(
                _sample, folder / f"{arm.name}.jsonl", arm, base, drawn, samples, prompting, decoding, max_new_tokens,
                seed, workers, display,
            )  # fmt: skip
            content = common | {"kind": arm.kind, "content": fingerprint(arm)}
            folder.run_stage(arm.name, ["tasks.jsonl"], content, [f"{arm.name}.jsonl"], work)
        rows = {arm.name: _rows(folder / f"{arm.name}.jsonl") for arm in found}
        result = {
            "model": models.model_id(base.model) or model,
            "settings": settings,
            "versions": {name: version(name) for name in ("steerable", "torch", "transformers")}
            | {"python": platform.python_version()},
            "tasks_sha256": sha256(folder / "tasks.jsonl"),
            "arms": {
                arm.name: {"kind": arm.kind, "source": _portable(arm)}
                | summary(rows[arm.name], wanted)
                | ({} if arm.name == BASE else {"against_base": against(arm.name, rows[arm.name], rows[BASE], wanted)})
                for arm in found
            },
        }  # fmt: skip
        from steerable.pages.passk_page import render

        # JSON has text alone as keys: what is drawn and returned is what the file says.
        written = dict(read_json(write_json(folder / "passk.json", result)))
        write_atomic(folder / "passk.html", render(written))
    return written


def _checked_ks(ks: str | Sequence[int] | None, samples: int) -> list[int]:
    if ks is None:
        return [2**i for i in range(max(1, samples).bit_length()) if 2**i <= samples]
    try:
        found = sorted({int(k) for k in (ks.split(",") if isinstance(ks, str) else ks)})
    except (TypeError, ValueError):
        found = []
    if not found or found[0] < 1:
        raise UsageError(f"--ks is {ks!r}: expected whole numbers from 1 up, separated by commas, e.g. 1,8,64")
    if found[-1] > samples:
        raise UsageError(
            f"pass@{found[-1]} cannot be had from {counted(samples, 'sample')}: give --samples {found[-1]} or smaller "
            "--ks"
        )
    return found


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
    file: Path, arm: Arm, base: Loaded, tasks: list[Record], samples: int, prompting: Prompting, decoding: Decoding,
    max_new_tokens: int, seed: int, workers: int | None, display: Display, partial_results: Path,
) -> None:  # fmt: skip
    """One arm's chains, judged and scored under the base, as its file."""
    steered = steering(arm)
    job = Job(tasks, range(samples), steered, steered.strength if steered else 0.0, prompting=prompting)
    display.start(arm.name, len(tasks) * samples)
    chains = generate_jobs(
        base if arm.kind in ("base", "direction") else opener(arm, base)(),
        [job], seed=seed, max_new_tokens=max_new_tokens, block=_BLOCK, workers=workers, decoding=decoding,
        spread=partial(_spread, opener(arm, base)), keep=partial_results / "chains", progress=display.advance,
    )[0]  # fmt: skip
    pairs = [(chain["prompt_ids"], chain["ids"]) for chain in chains]
    nats = _score(base, pairs, partial_results / "nats", workers, arm.name, display)
    display.start(f"{arm.name}: judging", len(chains))
    judged: dict[tuple[str, str], bool | None] = {}
    by_id = {task["id"]: task for task in tasks}
    for chain, surprise in zip(chains, nats, strict=True):
        answer = chain["answer"] if chain["closed"] else ""  # what was not closed has no answer
        key = chain["task_id"], answer
        if key not in judged:
            judged[key] = correct(by_id[key[0]], answer)
        chain |= {"correct": judged[key], "loops": loops(chain["ids"]), "nats": surprise}
        display.advance(1)
    display.done()
    write_jsonl(file, chains)


def _spread(opens: Callable[[], Loaded], *arguments: Any, **options: Any) -> list[Any]:
    """`map_blocks` with workers that open the arm's own model; a merged one has no name but that of the base."""
    return map_blocks(*arguments, **options | {"setup": opens})


def _score(
    base: Loaded, pairs: list[tuple[list[int], list[int]]], keep: Path, workers: int | None, name: str, display: Display
) -> list[float]:  # fmt: skip
    """Nats of every chain's tokens under the unsteered base; `pairs` are (prompt, chain) as token ids."""
    blocks = [pairs[i : i + _BLOCK] for i in range(0, len(pairs), _BLOCK)]
    files = [keep / f"{i}.json" for i in range(len(blocks))]
    kept = {i: read_json(file) for i, file in enumerate(files) if file.exists()}
    missing = [i for i in range(len(blocks)) if i not in kept]
    display.start(f"{name}: perplexity", len(pairs))
    display.advance(sum(map(len, kept.values())))

    def store(place: int, nats: list[float]) -> None:
        kept[missing[place]] = nats
        write_json(files[missing[place]], nats)

    count = min(workers or default_workers(base.model), max(1, len(missing)))
    map_blocks(
        _score_block,
        [blocks[i] for i in missing],
        setup=loader(base.model),
        workers=count,
        threads=default_threads(base.model, count),
        report=lambda done: display.advance(*done),
        finished=store,
        context=base,
        collect=False,
    )
    return [nats for i in range(len(blocks)) for nats in kept[i]]


def _score_block(loaded: Loaded, block: list[tuple[list[int], list[int]]], report: Report) -> list[float]:
    prompts, texts = [prompt for prompt, _ in block], [text for _, text in block]
    return surprisal(loaded.model, prompts, texts, progress=lambda *done: report(done))


# --- what is compared ---

_KEPT = ("task_id", "correct", "tokens", "loops", "closed", "nats")


def _rows(file: Path) -> list[Record]:
    """What the comparison needs of a file of chains: not their text."""
    return [{key: chain[key] for key in _KEPT} for chain in read_jsonl(file, "chain")]


def counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """{task: (chains, right ones)} of judged chains (`task_id`, `correct`)."""
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        n, c = found.get(row["task_id"], (0, 0))
        found[row["task_id"]] = n + 1, c + bool(row["correct"])
    return found


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
    found, sets = crossing(mine, theirs, ks), solved(mine, theirs)
    created = [row for row in rows if row["task_id"] in set(sets["only_a"])]
    return {
        "difference": difference(mine, theirs, ks),
        "crossing": found.to_dict() | {"sentence": found.sentence(name, BASE)},
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
