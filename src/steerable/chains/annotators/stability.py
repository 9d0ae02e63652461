"""The stability filter: keep a span only where the model, asked again, begins the same behaviour there.

After a follow-up of SEAL (arXiv 2504.07986) named stability steering: a keyword at a boundary often says little about
what the model was about to do; of 541 keyword boundaries, 93.3 % did not show their label again. From the text up to
the boundary, N continuations are drawn, each is labelled by the same rule, and the span is kept if the share that
begins with its label reaches a threshold (10 continuations and 0.8, as published).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from steerable.chains.annotators.sentence_states import Prompts, prompt_texts
from steerable.chains.generation import request_seed
from steerable.chains.records import Record, chain_key, read_jsonl, write_jsonl
from steerable.chains.windows import align_chains
from steerable.engines.base import Request
from steerable.engines.sampling import decoding_of
from steerable.engines.transformers import TransformersEngine
from steerable.models.loading import Loaded, model_id, model_revision
from steerable.steering.think import think_tags
from steerable.store.errors import UsageError

Labeler = Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]]
Progress = Callable[[int, int], None]
"""Called as `progress(continuations, tokens)` with what was drawn since the last call."""


@dataclass(frozen=True)
class Stability:
    """spans: those that are kept, in their order, with `stability`, the share of continuations that begin with their
    label; spans of labels that were not tested are kept without it. dropped: the others, with theirs. untestable:
    spans without a token (dropped as well). counts: of each tested label, how many were `tested` and `kept`, and the
    mean `stability`."""

    spans: list[Record]
    dropped: list[Record]
    untestable: int
    counts: dict[str, dict[str, float]]


class _Boundary(NamedTuple):
    """A span (its place in the list) of a chain, where it starts, and the tokens before it."""

    span: int
    chain: Mapping[str, Any]
    start: int
    ids: tuple[int, ...]


def stable(
    loaded: Loaded,
    prompts: Prompts,
    chains: Sequence[Mapping[str, Any]],
    spans: Sequence[Mapping[str, Any]],
    labeler: Labeler,
    *,
    samples: int = 10,
    threshold: float = 0.8,
    labels: Collection[str] | None = None,
    temperature: float | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    rows: int | None = None,
    block: int = 64,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> Stability:
    """Filter spans by re-sampling their boundaries with the model that wrote the chains.

    Args:
        prompts: task records, or each task's text after the chat template.
        labeler: the annotator that made the spans; it reads the chain up to the boundary with the continuation behind
            it, and the label at the continuation's first visible character counts (none: disagreement).
        labels: test spans of these alone; default all.
        temperature: default what the model's `generation_config` samples with, 1 where it is greedy.
        max_new_tokens: should reach to the next boundary. A continuation ends where the think block does.
        rows: sequences computed together, as for the engine. block: boundaries in one piece of work.
        keep: a folder that takes every finished block and gives it back to a later call with the same model, texts and
            settings; another labeler or threshold may use the same continuations.

    A draw depends on the seed, the task, the sample, the boundary and its own number.

    Raises:
        UsageError: spans of a chain that is not given, spans beyond their text, settings out of range.
    """
    if samples < 1 or block < 1 or not 0 <= threshold <= 1:
        raise UsageError(
            f"samples ({samples}) and block ({block}) must be at least 1, the threshold ({threshold}) from 0 to 1"
        )
    if temperature is not None and temperature <= 0:
        raise UsageError(f"temperature is {temperature}: continuations must be sampled, expected more than 0")
    decoding = decoding_of(loaded.model, greedy=False)
    if temperature is not None:
        decoding = replace(decoding, temperature=temperature)
    tested = [i for i, span in enumerate(spans) if labels is None or span["label"] in labels]
    boundaries = _boundaries(loaded, prompts, chains, spans, tested)
    shares: dict[int, float] = {}
    for first in range(0, len(boundaries), block):
        part = boundaries[first : first + block]
        requests = [
            Request(b.ids, request_seed(seed, f"{b.chain['task_id']}/{b.chain['sample']}/{b.start}", n), (), decoding)
            for b in part
            for n in range(samples)
        ]
        texts = _continuations(loaded, requests, max_new_tokens, rows, keep, progress)
        for k, boundary in enumerate(part):
            label, drawn = spans[boundary.span]["label"], texts[k * samples : (k + 1) * samples]
            read = {text: label_after(boundary.chain, boundary.start, text, labeler) for text in set(drawn)}
            shares[boundary.span] = sum(read[text] == label for text in drawn) / samples
    stable: list[Record] = []
    dropped: list[Record] = []
    by_label: dict[str, list[float]] = {}
    for i, span in enumerate(spans):
        if i in shares:
            # A share of 8 in 10 must reach 0.8, whatever the rounding.
            (stable if shares[i] >= threshold - 1e-9 else dropped).append({**span, "stability": shares[i]})
            by_label.setdefault(span["label"], []).append(shares[i])
        elif labels is not None and span["label"] not in labels:
            stable.append(dict(span))
    counts = {
        label: {
            "tested": len(group),
            "kept": sum(share >= threshold - 1e-9 for share in group),
            "stability": sum(group) / len(group),
        }
        for label, group in sorted(by_label.items())
    }
    return Stability(stable, dropped, len(tested) - len(shares), counts)


def label_after(chain: Mapping[str, Any], start: int, continuation: str, labeler: Labeler) -> str | None:
    """The label that the labeler gives to a continuation's first visible character, if it stands at `start` in the
    chain instead of what does. The white space before it stays the chain's own: it is what made the boundary."""
    continuation = continuation.lstrip()
    if not continuation:
        return None
    other = {key: value for key, value in chain.items() if key not in ("ids", "prompt_ids")}  # it has other tokens
    spans = labeler({**other, "thinking": chain["thinking"][:start] + continuation})
    return next((str(span["label"]) for span in spans if span["start"] <= start < span["end"]), None)


def _boundaries(
    loaded: Loaded,
    prompts: Prompts,
    chains: Sequence[Mapping[str, Any]],
    spans: Sequence[Mapping[str, Any]],
    tested: Iterable[int],
) -> list[_Boundary]:
    """In the order of the chains, then of the text. The prefix is the chain's own tokens before the one that brings the
    span's first character: what the model had before it when it wrote the span."""
    texts = prompt_texts(loaded.tokenizer, prompts)
    by_chain: dict[tuple[str, int], list[int]] = {}
    for i in tested:
        by_chain.setdefault(chain_key(spans[i]), []).append(i)
    marked = []
    for chain in chains:
        numbers = by_chain.pop(chain_key(chain), [])
        for i in numbers:
            if not 0 <= spans[i]["start"] < spans[i]["end"] <= len(chain["thinking"]):
                raise UsageError(f"a span of task {chain['task_id']!r} reaches beyond its text: {dict(spans[i])}")
        # The label says which span it is: one without tokens gets no token range.
        marked.append([{"label": str(i), "start": spans[i]["start"], "end": spans[i]["end"]} for i in numbers])
    if by_chain:
        task, sample = next(iter(by_chain))
        raise UsageError(f"there are spans of task {task!r}, sample {sample}, but no such chain")
    return [
        _Boundary(int(span.label), chain, spans[int(span.label)]["start"], aligned.ids[: span.start])
        for chain, aligned in zip(chains, align_chains(loaded.tokenizer, texts, chains, marked), strict=True)
        for span in aligned.spans
    ]


def _continuations(
    loaded: Loaded,
    requests: Sequence[Request],
    max_new_tokens: int,
    rows: int | None,
    keep: Path | None,
    progress: Progress | None,
) -> list[str]:
    """What the model thinks next at each boundary, from the folder where it was drawn before."""
    model, tokenizer = loaded
    about = [model_id(model), model_revision(model), str(model.dtype)], max_new_tokens
    asked = [[list(r.prompt_ids), r.seed, r.decoding and asdict(r.decoding)] for r in requests]
    name = hashlib.sha256(json.dumps([*about, asked]).encode()).hexdigest()[:32]
    file = None if keep is None else keep / f"{name}.jsonl"
    if file is not None and file.exists():
        if progress is not None:
            progress(len(requests), 0)
        return [record["thinking"] for record in read_jsonl(file)]
    engine = TransformersEngine(model, tokenizer, rows=rows)
    completions = engine.generate(requests, max_new_tokens=max_new_tokens, progress=progress)
    inside = replace(think_tags(tokenizer), opened_by_template=True)  # the prefix has opened the think block
    texts = [inside.split(tokenizer, c.ids[:-1] if c.finished else c.ids).thinking for c in completions]
    if file is not None:
        write_jsonl(file, [{"thinking": text} for text in texts])
    return texts
