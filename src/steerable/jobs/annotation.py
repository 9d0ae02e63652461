"""The annotator that a run names, applied to its chains: `pocket`, `keywords`, `llm`, `probe:<file>`, or a function of
the user's own. All of them keep the same promises, which are checked here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from steerable.chains.records import LABELS, Record
from steerable.jobs.settings import Config
from steerable.store.errors import SteerableError, UsageError

if TYPE_CHECKING:
    from steerable.chains.annotators.probe import Probe
    from steerable.chains.endpoint import Endpoint
    from steerable.jobs.run import Run
    from steerable.store.display import Display

Spans = list[Record]
SAMPLES = 10
"""Continuations at each boundary that `--stability` draws."""


class Annotated(NamedTuple):
    spans: list[Spans | None]
    """Of every chain; None where its annotation failed."""
    account: dict[str, Any]
    """What the annotator says of its work: a language model's losses and use of tokens; else nothing."""


def annotate(run: Run, chains: Sequence[Record], split: str) -> Annotated:
    """Annotate chains that answer tasks of this split.

    What a language model said is kept in the run folder's `replies` by content, so no text is paid for twice. Raises
    SteerableError for an annotator that breaks a promise.
    """
    function = run.config.annotate
    account: dict[str, Any] = {}
    found: Iterable[Spans | None]
    if run.config.annotator == "llm":
        found, account = _by_language_model(run, chains)
    elif function is None:
        found = _by_probe(run, chains, split)
    else:
        found = (_call(run, function, chain) for chain in chains)
    checked = [
        None if spans is None else _checked(run, chain, spans) for chain, spans in zip(chains, found, strict=True)
    ]
    return Annotated(checked, account)


def endpoint(config: Config) -> Endpoint:
    """The language model that annotates and writes tasks."""
    from urllib.parse import urlsplit

    from steerable.chains.endpoint import Endpoint

    if config.llm_url and urlsplit(config.llm_url).hostname not in ("localhost", "127.0.0.1", "::1"):
        config.check_own("llm_url")
    return Endpoint(
        config.llm_model,
        config.llm_url,
        concurrency=config.llm_concurrency,
        requests_per_minute=config.llm_rpm or None,
        tokens_per_minute=config.llm_tpm or None,
    )


def _call(run: Run, function: Callable[[Record], Iterable[Record]], chain: Record) -> Spans:
    try:
        return list(function(chain))
    except Exception as error:  # somebody else's function
        raise SteerableError(
            f"the annotator {run.config.annotator!r} failed on task {chain['task_id']!r} "
            f"({type(error).__name__}: {error}): expected spans with label, start and end"
        ) from error


def _checked(run: Run, chain: Record, spans: Spans) -> Spans:
    def is_sound(span: Any) -> bool:
        return span["label"] in LABELS and 0 <= span["start"] < span["end"] <= len(chain["thinking"])

    for span in spans:
        try:
            sound = is_sound(span)
        except (TypeError, KeyError):
            sound = False
        if not sound:
            raise SteerableError(
                f"the annotator {run.config.annotator!r} gave an unsound span {span} for task {chain['task_id']!r}: "
                f"expected one of the labels {', '.join(LABELS)} and offsets inside the thinking text"
            )
    return [{"task_id": chain["task_id"], "sample": chain["sample"], **span} for span in spans]


def _by_language_model(run: Run, chains: Sequence[Record]) -> tuple[list[Spans | None], dict[str, Any]]:
    from steerable.chains.annotators import llm

    run.display.start("annotating", len(chains))
    # A cell may hold a sample twice, steered by different vectors; a chain's text is what its replies are kept by.
    c = run.config
    found = llm.annotate(
        chains, endpoint(c), cache=run.folder / "replies", prices=c.prices, progress=run.display.advance
    )
    run.display.done()
    return list(found.spans), found.account


def _by_probe(run: Run, chains: Sequence[Record], split: str) -> list[Spans]:
    from steerable.chains.annotators.probe import Probe

    assert run.config.probe is not None
    probe = Probe.load(run.config.probe)
    if unknown := set(probe.labels) - set(LABELS):
        raise UsageError(
            f"the probe {run.config.probe} has the label {min(unknown)!r}: a run needs the labels {', '.join(LABELS)}"
        )
    # A cell may hold a sample twice, steered by different vectors: tell chains apart by their place.
    placed = [{**chain, "sample": place} for place, chain in enumerate(chains)]
    run.display.start("annotating", len(chains))
    found = probe.annotate(run.loaded, run.prompts(split), placed, progress=run.display.advance)
    run.display.done()
    spans: list[Spans] = [[] for _ in chains]
    for span in found:
        spans[span["sample"]].append({**span, "sample": chains[span["sample"]]["sample"]})
    return spans


def stable(run: Run, chains: Sequence[Record], found: Sequence[Spans | None], kept: Path) -> list[Spans | None]:
    """Only the spans that the model's own continuations agree with (`chains/annotators/stability.py`)."""
    from steerable.chains.annotators.stability import stable as filtered

    labeler = run.config.annotate
    if labeler is None:
        raise UsageError(
            f"--stability labels every continuation again, which --annotator {run.config.annotator} is too slow for: "
            "use pocket, keywords or a function of your own"
        )
    spans = [span for some in found for span in some or ()]
    run.display.start("re-sampling", SAMPLES * len(spans), "continuation")
    result = filtered(
        run.loaded,
        run.prompts("extraction"),
        chains,
        spans,
        lambda chain: _call(run, labeler, dict(chain)),
        samples=SAMPLES,
        threshold=run.config.stability,
        seed=run.config.seed,
        rows=run.config.rows,
        keep=kept / "continuations",
        progress=run.display.advance,
    )
    run.display.done()
    by_chain: dict[tuple[str, int], Spans] = {}
    for span in result.spans:
        by_chain.setdefault((span["task_id"], span["sample"]), []).append(span)
    return [
        None if some is None else by_chain.get((chain["task_id"], chain["sample"]), [])
        for chain, some in zip(chains, found, strict=True)
    ]


def sources(config: Config) -> list[Path]:
    """The files on which the annotator's answers depend."""
    if config.probe is not None:
        return [config.probe]
    if config.annotate is None:
        from steerable.chains.annotators import folding, llm, placement
        from steerable.chains.annotators import replies as parse

        return [Path(str(module.__file__)) for module in (folding, llm, parse, placement)]
    found = inspect.getsourcefile(inspect.unwrap(config.annotate))
    return [] if found is None else [Path(found)]


def train_probe(out: str | Path, *, layer: int | None = None, folds: int = 5, display: Display | None = None) -> Probe:
    """A probe from the annotated extraction chains of a run folder (`chains/annotators/probe.py`)."""
    from steerable.chains.annotators.probe import train_probe as train
    from steerable.chains.records import read_jsonl
    from steerable.jobs.run import open_run

    run = open_run(out, display)
    chains = read_jsonl(run.folder / "chains.jsonl", "chain")
    spans = read_jsonl(run.folder / "spans.jsonl", "span")
    run.display.start("reading", len(chains))
    return train(
        run.loaded,
        run.tasks("extraction"),
        chains,
        spans,
        layer=layer,
        folds=folds,
        seed=run.config.seed,
        progress=run.display.advance,
    )
