"""The annotator that a run names, applied to chains: `pocket`, `keywords`, `llm`, `probe:FILE`, or a function of
the user's own. All of them keep the same promises, which are checked here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from steerable.chains.annotators import length, llm, marks, placement
from steerable.chains.annotators import probe as probes
from steerable.chains.annotators.length import length_pairs, length_spans
from steerable.chains.annotators.llm import LABEL_TEXTS
from steerable.chains.annotators.stability import stable
from steerable.chains.endpoint import Endpoint
from steerable.chains.records import LABELS, Record, by_chain, chain_key, is_label, read_jsonl
from steerable.jobs.run import open_run
from steerable.jobs.settings import ANNOTATORS, Annotator, Config
from steerable.models.loading import Loaded
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import sha256, writable_target
from steerable.store.text import counted

Spans = list[Record]
SAMPLES = 10
"""Continuations at each boundary that `--stability` draws."""


class Annotated(NamedTuple):
    """The spans of every chain, None where its annotation failed, and what the annotator says of its work: a language
    model's losses and use of tokens, else nothing."""

    spans: list[Spans | None]
    account: dict[str, Any]


def annotate(
    config: Config,
    chains: Sequence[Record],
    tasks: Sequence[Record],
    loaded: Loaded,
    *,
    replies: Path,
    display: Display,
    reference: float | None = None,
) -> Annotated:
    """Annotate chains that answer these tasks by the annotator that the settings name.

    reference: the length of a chain, in tokens of thinking, that tells `short` from `long`; None: chains of one task
    are compared. replies: a folder that keeps what a language model answered by content, so that no text is paid for
    twice. Raises SteerableError for an annotator that breaks a promise.
    """
    account: dict[str, Any] = {}
    per_chain: Iterable[Iterable[Record] | None]
    if config.annotator == "length":
        per_chain = length_pairs(tasks, chains) if reference is None else length_spans(chains, reference)
    elif (function := config.annotate) is not None:
        per_chain = (_call(config.annotator, function, chain) for chain in chains)
    else:
        display.start("annotating", len(chains))
        if config.probe is not None:
            per_chain = _by_probe(config.probe, chains, tasks, loaded, display)
        else:
            per_chain, account = llm.annotate(
                chains,
                endpoint(config),
                labels=config.label_texts or LABEL_TEXTS,
                cache=replies,
                prices=config.prices,
                progress=display.advance,
            )
        display.done()
    labels = labels_of(config)
    spans = [
        None if marked is None else [_checked(config.annotator, labels, chain, span) for span in marked]
        for chain, marked in zip(chains, per_chain, strict=True)
    ]
    return Annotated(spans, account)


def labels_of(config: Config) -> tuple[str, ...] | None:
    """The labels that the annotator may give, in order; None where it may give any."""
    if config.probe is not None:
        return probes.Probe.load(config.probe).labels
    if (texts := config.label_texts) is not None:
        return tuple(texts)
    if config.annotator == "length":
        return length.LABELS
    return LABELS if config.annotate is None else labels_of_function(config.annotator, config.annotate)


def labels_of_function(name: str, annotator: Annotator) -> tuple[str, ...] | None:
    """The same for a plain function, which says its labels by an attribute `labels`."""
    labels = LABELS if name in ANNOTATORS else getattr(annotator, "labels", None)
    if labels is not None and not (labels and all(map(is_label, labels))):
        raise UsageError(f"the annotator {name!r} has labels {labels!r}: expected letters, digits, '-' and '_' in each")
    return None if labels is None else tuple(labels)


def labels_among(declared: Sequence[str] | None, given: Collection[str]) -> list[str]:
    """The labels of a report: those declared; else the paper's where no other was given, else all that were."""
    return list(declared or (LABELS if set(given) <= set(LABELS) else sorted(set(given))))


def annotate_by(name: str, annotator: Annotator, chains: Iterable[Record]) -> Spans:
    """The spans of all chains by a plain function. Raises SteerableError where it fails or gives an unsound span."""
    labels = labels_of_function(name, annotator)
    return [_checked(name, labels, chain, span) for chain in chains for span in _call(name, annotator, chain)]


def endpoint(config: Config) -> Endpoint:
    """The language model that annotates and writes tasks."""
    if config.llm_url and urlsplit(config.llm_url).hostname not in ("localhost", "127.0.0.1", "::1"):
        config.check_own("llm_url")
    return Endpoint(
        config.llm_model,
        config.llm_url,
        concurrency=config.llm_concurrency,
        requests_per_minute=config.llm_rpm or None,
        tokens_per_minute=config.llm_tpm or None,
    )


def _call(name: str, function: Callable[[Record], Iterable[Record]], chain: Record) -> Spans:
    try:
        return list(function(chain))
    except Exception as error:  # somebody else's function
        raise SteerableError(
            f"the annotator {name!r} failed on task {chain['task_id']!r} "
            f"({type(error).__name__}: {error}): expected spans with label, start and end"
        ) from error


def _checked(name: str, labels: tuple[str, ...] | None, chain: Record, span: Any) -> Record:
    try:
        has_label = is_label(span["label"]) if labels is None else span["label"] in labels
        is_sound = has_label and 0 <= span["start"] < span["end"] <= len(chain["thinking"])
    except (TypeError, KeyError):
        is_sound = False
    if not is_sound:
        raise SteerableError(
            f"the annotator {name!r} gave an unsound span {span} for task {chain['task_id']!r}: "
            f"expected {_expected(labels)} and offsets inside the thinking text"
        )
    return {"task_id": chain["task_id"], "sample": chain["sample"], **span}


def _expected(labels: tuple[str, ...] | None) -> str:
    if labels is None:
        return "a label of letters, digits, '-' and '_'"
    return f"one of the labels {', '.join(labels)}"


def _by_probe(
    file: Path, chains: Sequence[Record], tasks: Sequence[Record], loaded: Loaded, display: Display
) -> list[Spans]:
    probe = probes.Probe.load(file)
    # A cell may hold a sample twice, steered by different vectors: tell chains apart by their place.
    placed = [{**chain, "sample": place} for place, chain in enumerate(chains)]
    spans: list[Spans] = [[] for _ in chains]
    for span in probe.annotate(loaded, tasks, placed, progress=display.advance):
        spans[span["sample"]].append({**span, "sample": chains[span["sample"]]["sample"]})
    return spans


def keep_stable(
    config: Config,
    chains: Sequence[Record],
    tasks: Sequence[Record],
    loaded: Loaded,
    spans: Sequence[Spans | None],
    *,
    continuations: Path,
    display: Display,
) -> list[Spans | None]:
    """Only the spans of each chain that the model's own continuations agree with (`chains/annotators/stability.py`).

    continuations: a folder that keeps what was drawn.
    """
    labeler = config.annotate
    if labeler is None:
        raise UsageError(
            f"--stability labels every continuation again, which --annotator {config.annotator} is too slow for: "
            "use pocket, keywords or a function of your own"
        )
    every = [span for marked in spans for span in marked or ()]
    display.start("re-sampling", SAMPLES * len(every), "continuation")
    filtered = stable(
        loaded,
        tasks,
        chains,
        every,
        lambda chain: _call(config.annotator, labeler, dict(chain)),
        samples=SAMPLES,
        threshold=config.stability,
        seed=config.seed,
        rows=config.rows,
        keep=continuations,
        progress=display.advance,
    )
    display.done()
    stable_spans = by_chain(filtered.spans)
    return [
        None if marked is None else stable_spans[chain_key(chain)] for chain, marked in zip(chains, spans, strict=True)
    ]


def sources(config: Config) -> list[Path]:
    """The files on which the annotator's answers depend."""
    if config.annotator == "length":
        return [Path(str(length.__file__))]
    files = [] if config.annotator_file is None else [config.annotator_file]
    function = config.annotate
    if function is None and config.probe is None:
        return [*files, *(Path(str(module.__file__)) for module in (llm, marks, placement))]
    return files if files or function is None else source_of(function)


def source_of(function: Callable[..., Any]) -> list[Path]:
    """The file of a function of the user's own, or of an object that is called as one; none for what has no file."""
    function = inspect.unwrap(function)
    for thing in (function, getattr(function, "func", None), type(function)):  # the second of a functools.partial
        with suppress(TypeError):
            if (file := inspect.getsourcefile(thing)) is not None:  # type: ignore[arg-type]
                return [Path(file)]
    return []


def content(config: Config) -> dict[str, Any]:
    """What the annotator's answers depend on beside its name: a part of the key of what is measured by them."""
    hashes = [sha256(source) for source in sources(config)]
    return {"annotator_sha256": hashes} | ({"llm_model": config.llm_model} if config.is_judged else {})


def writer(config: Config, folder: Path, dry_run: bool = False) -> dict[str, Any]:
    """Arguments of `make_tasks` and `make_splits` where a language model writes the tasks: the server that the settings
    name, and a folder that keeps what it wrote, so that the same command has the same tasks; nothing elsewhere. Raises
    UsageError for a dry run, which pays for nothing."""
    if config.tasks.partition(":")[0] != "llm":
        return {}
    if dry_run:
        raise UsageError(
            "--dry-run would have --tasks llm write tasks, which costs: name another source of tasks for the plan"
        )
    return {"endpoint": endpoint(config) if config.tasks == "llm" else None, "cache": folder / "replies"}


def train_probe(
    to: Path,
    *,
    out: Path = Path("runs/pocket"),
    layer: int | None = None,
    folds: int = 5,
    display: Display | None = None,
) -> dict[str, Any]:
    """Train a probe on the annotated chains of a run: an annotator that costs one forward pass a chain.

    Use it with --annotator probe:FILE, on this or another run of the same model.

    Args:
        to: The probe file to write (safetensors).
        out: The run folder: everything that the run reads and writes.
        layer: Layer whose states are read; default: cross-validated.
        folds: Folds of the cross-validation, grouped by task.
        display: Where progress and figures are shown; default: nowhere.

    Returns:
        `{"out", "layers", "scores"}`: the file, and how the probe does on held-out tasks.
    """
    writable_target(to)
    run = open_run(out, display)
    chains, spans = read_jsonl(run.folder / "chains.jsonl", "chain"), read_jsonl(run.folder / "spans.jsonl", "span")
    run.display.start("reading", len(chains))
    probe = probes.train_probe(
        run.loaded,
        run.tasks("extraction"),
        chains,
        spans,
        layer=layer,
        folds=folds,
        seed=run.config.seed,
        progress=run.display.advance,
    )
    probe.save(to)
    scores, layers = probe.scores, ", ".join(map(str, probe.layers))
    run.display.tell(
        f"{to}: layer {layers}, {counted(scores['sentences'], 'sentence')} of {counted(scores['tasks'], 'task')}; on "
        f"held-out tasks accuracy {scores['accuracy']:.3f} (the most frequent label alone: {scores['majority']:.3f}), "
        f"macro-F1 {scores['macro_f1']:.3f}, kappa {scores['kappa']:.3f}, calibration error {scores['ece']:.3f}"
    )
    return {"out": str(to), "layers": list(probe.layers), "scores": scores}
