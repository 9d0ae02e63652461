"""`steerable audit`: is this vector to be trusted? Its receipts on one page, and one verdict with its reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from steerable.chains.records import Record
from steerable.chains.tasks import make_tasks
from steerable.chains.text_pairs import pairs_sha256, read_pairs
from steerable.engines.transformers import steer
from steerable.formats import import_file
from steerable.jobs import annotation
from steerable.jobs.audit_checks import DECISIVE, OF_DATA, Checks
from steerable.jobs.dry_run import estimate_audit
from steerable.jobs.dry_run import tables as plan_tables
from steerable.jobs.run import Run, load_model, open_run, recorded_settings
from steerable.jobs.settings import Config
from steerable.jobs.task_origin import known_tasks
from steerable.models import loading as models
from steerable.pages.audit_page import render, sentence, tables
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.files import sha256, write_atomic
from steerable.store.run_folder import RunFolder, read_json, write_json

_FIELDS = (
    "model revision dtype device quantization attention annotator seed max_new_tokens greedy generation_dtype rows "
    "block engine"
)


class _AnyRun(Run):
    """A model without a chat template will do: then what needs chains is not checked."""

    @cached_property
    def loaded(self) -> models.Loaded:
        return load_model(self.config)


def audit(
    file: Path,
    *,
    pairs: Path | None = None,
    lookalikes: Path | None = None,
    run: Path | None = None,
    strength: float | None = None,
    limit: int = 16,
    samples: int = 2,
    controls: int = 2,
    dry_run: bool = False,
    out: str | Path = "runs/audit",
    workers: int | None = None,
    overwrite: bool = False,
    display: Display | None = None,
    **settings: Annotated[Any, Config],
) -> dict[str, Any]:
    """Is this vector to be trusted? Its receipts: data, effect beside controls, side effects; and one verdict.

    With --pairs its effect is which text of a pair the model prefers, without them how much of its behaviour the
    annotator finds in chains. What cannot be checked is listed with the reason. Goes on where it was stopped.

    Args:
        file: A direction file.
        pairs: Pairs of texts that it should tell apart, as for `contrast`.
        lookalikes: Pairs of a text that shows the behaviour and one that only looks like it ("coffee", "coffin").
        run: A run folder whose model, evaluation tasks and annotator are taken; without it tasks are drawn that the
            file was not made on, as far as that is known.
        strength: The strength at which it is judged; default: the file's.
        limit: Tasks, where chains are judged.
        samples: Chains of each of them.
        controls: Random directions, and label-shuffled ones, of equal norm.
        dry_run: Do nothing, but say what would be done, how long it would take and what it would cost.
        out: The folder of the results.
        workers: Processes that generate; default: one a core for small models. Changes no result.
        overwrite: Let results of another model in --out be replaced; else that is refused.
        display: Where the answer is shown; default: nowhere.
        settings: Fields of `Config`.

    Returns:
        The content of audit.json: `verdict` (trusted, weak or not trusted), its `reasons`, and `checks`, each with its
        `status` (pass, warn, fail, shown or not checked), `figure`, `threshold` and values: see docs/calibrate.md. With
        `dry_run`, `dry_run.estimate_audit`.

    Raises:
        UsageError: A file that does not fit the model, or unsound settings.

    Example:
        steerable audit runs/pocket/vectors/backtracking.safetensors --model pocket
    """
    if min(limit, samples, controls) < 1:
        raise UsageError("--limit, --samples and --controls must be 1 or more")
    source = None if run is None else open_run(run)
    recorded = {} if source is None else recorded_settings(source.folder)
    config = Config(recorded.keys() - settings.keys(), **recorded | settings)
    direction = import_file(file)
    sides = None if pairs is None else read_pairs(pairs)
    alike = None if lookalikes is None else read_pairs(lookalikes)
    display = display or Display(quiet=True)
    job = _AnyRun(RunFolder(out), config, workers, display=display)
    job.folder.refuse_other("audit", config.model, config.revision, overwrite=overwrite)
    loaded = job.loaded
    with steer(loaded.model, direction, tokenizer=loaded.tokenizer, track=False):
        pass
    tasks: list[Record] = []
    if sides is None:
        if source is None:
            tasks = make_tasks(
                config.tasks, limit, config.seed, known_tasks(file, direction.stats),
                **annotation.writer(config, job.folder.root, dry_run),
            )  # fmt: skip
        else:
            tasks = source.tasks("evaluation")[:limit]
    reference = None if source is None else source.reference
    strength = direction.strength if strength is None else strength
    checks = Checks(job, direction, strength, sides, alike, tasks, reference, limit, samples, controls)
    key = {
        "file": str(file), "file_sha256": sha256(file), "strength": strength, "weights": job.weights,
        "pairs": None if sides is None else pairs_sha256(*sides),
        "lookalikes": None if alike is None else pairs_sha256(*alike),
        "tasks": tasks, "reference": reference, "limit": limit, "samples": samples, "controls": controls,
        **annotation.content(config), **config.subset(_FIELDS),
    }  # fmt: skip
    if dry_run:
        done = ["audit"] * job.folder.finished("audit", job.folder.key("audit", [], key))
        plan = estimate_audit(job, checks, done)
        display.show(*plan_tables(plan))
        return plan

    def work(partial: Path) -> None:
        made = checks.all(partial)
        verdict, reasons = judge(made)
        result = {
            "file": str(file), "model": models.model_id(loaded.model) or config.model,
            "behaviour": direction.behaviour, "method": direction.method, "sites": list(map(str, direction.vectors)),
            "strength": strength, "effect_of": checks.effect_of, "verdict": verdict, "reasons": reasons,
            "checks": made,
        }  # fmt: skip
        write_json(job.folder / "audit.json", result)

    with job.folder.locked():
        write_json(job.folder / "config.json", {"job": "audit", "model": config.model, "revision": config.revision})
        job.folder.run_stage("audit", [], key, ["audit.json"], work)
        result: dict[str, Any] = read_json(job.folder / "audit.json", dict)
        write_atomic(job.folder / "audit.html", render(result))
    display.show(*tables(result))
    display.tell(sentence(result), f"The page is {(job.folder / 'audit.html').resolve()}")
    return result


def judge(checks: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """The verdict of checks (`name`, `title`, `status`, `figure`), and its reasons.

    Example:
        >>> judge([{"name": "effect", "title": "Effect", "status": "fail", "figure": "0.1"}])
        ('not trusted', ['Effect: 0.1'])
    """
    status = {check["name"]: check["status"] for check in checks}
    failed = [c for c in checks if c["status"] == "fail"]
    decisive = [c for c in failed if c["name"] in DECISIVE]
    if decisive:
        return "not trusted", [f"{c['title']}: {c['figure']}" for c in decisive]
    doubts = failed + [c for c in checks if c["status"] == "warn"]
    if status.get("effect") != "pass":
        missing = [c for c in checks if c["name"] == "effect" and c["status"] == "not checked"]
        return "weak", [f"{c['title']}: {c['figure']}" for c in [*missing, *doubts]]
    if failed or any(c["name"] in DECISIVE for c in doubts):
        return "weak", [f"{c['title']}: {c['figure']}" for c in doubts]
    passed = [c for c in checks if c["name"] in DECISIVE and c["status"] == "pass"]
    if not any(c["name"] in OF_DATA for c in passed):
        return "weak", [f"{c['title']}: {c['figure']}" for c in checks if c["name"] in OF_DATA]
    return "trusted", [f"{c['title']}: {c['figure']}" for c in passed]
