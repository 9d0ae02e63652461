"""A conversation with a model: every prompt is answered at several strengths of one steering at once, behind the turns
before it."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers.decoders import DecodeStream

from steerable.chains.generation import prompt_ids, split_chain
from steerable.chains.records import Record
from steerable.chains.tasks import correct
from steerable.engines import transformers
from steerable.engines.base import Completion, Engine, Request
from steerable.engines.sampling import Decoding, choose, decoding_of, mark
from steerable.jobs.settings import LARGEST_SEED
from steerable.models import loading as models
from steerable.models.caches import as_argument, given_cache
from steerable.steering.direction import Direction
from steerable.steering.gates import parse_gate, quoted
from steerable.steering.spec import Program, format_steering, scaled
from steerable.steering.text import named_direction, parse_steering
from steerable.steering.think import think_tags_if_any
from steerable.store.errors import SteerableError, UsageError
from steerable.store.text import one_line

Show = Callable[[int, str, str], None]
"""Called as `show(side, thinking, answer)` with what an answer is so far."""


class Side(NamedTuple):
    """One of the answers to a prompt. strength: None is what the steering says. steering: None where nothing steers."""

    title: str
    strength: float | None
    steering: Program | None


class Part(NamedTuple):
    """What steers at strength 1, and the strength that it says."""

    steering: Program
    strength: float


class Dialogue:
    """The turns so far, and how the next one is answered.

    A turn is a record `{"prompt", "system", "seed", "history", "answers", "continued"}`: `history` holds the numbers of
    the earlier turns that the model was shown, `continued` the number of the answer that later turns are shown, None
    where that one is empty. An answer is `{"title", "strength", "steering", "thinking", "answer", "closed", "tokens",
    "report"}`.
    """

    def __init__(
        self,
        loaded: models.Loaded,
        *,
        system: str = "",
        seed: int = 0,
        greedy: bool = False,
        max_new_tokens: int = 500,
        engine: Engine | None = None,
    ) -> None:
        """engine: writes the answers, which are shown whole and have no report; None: the loaded model, by tokens."""
        self.loaded, self.greedy, self.max_new_tokens, self.engine = loaded, greedy, max_new_tokens, engine
        self.turns: list[Record] = []
        self.strengths: tuple[float, ...] | None = None
        self._parts: tuple[Part, ...] = ()
        self._begin = 0  # the first turn of the present conversation
        self._keep = ""
        self.set_system(system)
        self.set_seed(seed)

    def set_system(self, text: str) -> None:
        """The system message of the next turns; empty: none. Raises UsageError where the chat template takes none."""
        prompt_ids(self.loaded.tokenizer, "?", system=text)
        self.system = text

    def set_seed(self, seed: int | str, option: str = "--seed") -> None:
        """The seed of the next answers. Raises UsageError."""
        if not str(seed).isdecimal() or int(seed) > LARGEST_SEED:
            raise UsageError(f"{option} is {one_line(str(seed), 40)}: expected a whole number from 0 to {LARGEST_SEED}")
        self.seed = int(seed)

    def set_strengths(self, strengths: float | str, option: str = "--strength") -> None:
        """One strength, which is compared with the unsteered answer, or several as text, "-1,0,1". Raises
        UsageError."""
        if not self._parts:
            raise UsageError(f"{option} needs a direction: say first what steers")
        self.strengths = read_strengths(strengths, option)

    def set_steering(self, parts: Sequence[Part]) -> None:
        """Steer by the sum of these from now on. Warns (SteerableWarning) about directions of another model. Raises
        UsageError for what does not fit this one."""
        model, tokenizer = self.loaded
        for part in parts:
            transformers.steer(model, part.steering, tokenizer=tokenizer)  # refuses what does not fit
        self._parts = tuple(parts)

    @property
    def sides(self) -> list[Side]:
        """What the next prompt is answered with."""
        if not self._parts:
            return [Side("answer", 0.0, None)]
        if self.strengths is None or len(self.strengths) == 1:
            strength = None if self.strengths is None else self.strengths[0]
            return [Side("unsteered", 0.0, None), Side("steered", strength, self._at(strength))]
        return [Side(f"strength {s:g}", s, self._at(s)) if s else Side("unsteered", 0.0, None) for s in self.strengths]

    def _at(self, strength: float | None) -> Program:
        parts = (scaled(part.steering, part.strength if strength is None else strength) for part in self._parts)
        return sum(parts, Program())

    def reset(self) -> None:
        """Begin a new conversation; the turns so far stay on record."""
        self._begin = len(self.turns)

    def keep(self, name: str) -> str:
        """Continue the answer with this title or strength, in the last turn and in later ones; returns its title.
        Raises UsageError where there is none."""
        titles = {f"{side.strength:g}": side.title for side in self.sides if side.strength is not None}
        titles |= {side.title: side.title for side in self.sides}
        if name not in titles:
            names = ", ".join(side.title.removeprefix("strength ") for side in self.sides)
            raise UsageError(f"there is no answer {one_line(name, 40)!r} to keep: expected one of {names}")
        self._keep = titles[name]
        for turn in self.turns[self._begin :][-1:]:
            turn["continued"] = self._continued(turn["answers"])
        return self._keep

    def _continued(self, answers: Sequence[Record]) -> int | None:
        """The answer that goes on: the one to keep, else the last one that is steered, else the last one."""
        order = sorted(enumerate(answers), key=lambda n: (n[1]["title"] == self._keep, n[1]["strength"] != 0, n[0]))
        number, answer = order[-1]
        return number if answer["answer"] else None

    def answer(
        self, prompt: str, show: Show, *, task: Mapping[str, Any] | None = None, stoppable: bool = False
    ) -> Record:
        """Answer a prompt and add the turn.

        show: called with each answer at every token. task: each answer is judged by it (`correct`). stoppable: Ctrl-C
        ends the answers and nothing else. Raises UsageError for a prompt beyond what the model can read.
        """
        model, tokenizer = self.loaded
        shown = [n for n in range(self._begin, len(self.turns)) if self.turns[n]["continued"] is not None]
        ids = prompt_ids(tokenizer, prompt, system=self.system, history=self._messages(shown))
        limit, most = self.max_new_tokens, transformers.positions(model)
        if shown and most is not None:
            limit = min(limit, most - len(ids))
            if limit < 1:
                raise UsageError(f"the conversation has {len(ids)} tokens, the model reads {most}: begin a new one")
        transformers.check_length(model, len(ids) + limit)
        sides = self.sides
        decoding = decoding_of(model, greedy=self.greedy or None)
        if self.engine is None:
            completions, reports = self._streamed(ids, sides, decoding, limit, show, stoppable)
        else:
            requests = [Request(ids, self.seed, side.steering or (), decoding) for side in sides]
            completions = self.engine.generate(requests, max_new_tokens=limit)
            reports = [None] * len(sides)
        chains = _split(self.loaded, completions)
        for row, chain in enumerate(chains):
            show(row, chain["thinking"], chain["answer"])
        answers = []
        for side, chain, report in zip(sides, chains, reports, strict=True):
            record = {"title": side.title, "strength": side.strength}
            record |= {"steering": None if side.steering is None else format_steering(side.steering)}
            record |= {key: chain[key] for key in ("thinking", "answer", "closed", "tokens")}
            if task is not None:
                record["correct"] = correct(task, chain["answer"] if chain["closed"] else "")
            answers.append(record | {"answer": chain["answer"].strip(), "report": report})
        turn = {"prompt": prompt, "system": self.system, "seed": self.seed, "history": shown}
        self.turns.append(turn | {"answers": answers, "continued": self._continued(answers)})
        return self.turns[-1]

    def _streamed(
        self, ids: list[int], sides: Sequence[Side], decoding: Decoding, limit: int, show: Show, stoppable: bool
    ) -> tuple[list[Completion], list[Record | None]]:
        """The answers of the loaded model, and a report of each that is steered."""
        model, tokenizer = self.loaded
        with ExitStack() as steered:
            handles: list[transformers.Handle | None] = []
            for row, side in enumerate(sides):
                if side.steering is None:
                    handles.append(None)
                    continue
                handle = steered.enter_context(transformers.steer(model, side.steering, tokenizer=tokenizer))
                handle.assign(torch.where(torch.arange(len(sides)) == row, 0, -1))  # a report for each row
                handles.append(handle)
            completions = _stream(self.loaded, ids, self.seed, decoding, limit, handles, show, stoppable)
            return completions, [None if handle is None else handle.report() for handle in handles]

    def _messages(self, numbers: Sequence[int]) -> list[dict[str, str]]:
        """Turns as a chat template takes them, without their think blocks, which templates drop as well."""
        messages = []
        for turn in (self.turns[n] for n in numbers):
            messages.append({"role": "user", "content": turn["prompt"]})
            messages.append({"role": "assistant", "content": turn["answers"][turn["continued"]]["answer"]})
        return messages


def read_strengths(strengths: float | str, option: str = "--strength") -> tuple[float, ...]:
    """One strength, or several as text, "-1,0,1", each once. Raises UsageError."""
    try:
        numbers = tuple(dict.fromkeys(float(part) for part in str(strengths).split(",")))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise UsageError(f"{option} is {one_line(str(strengths), 40)!r}: expected a number, or several as in -1,0,1")
    return numbers


def read_part(text: str | Path, layers: Sequence[int] | None = None, where: str | None = None) -> Part:
    """A direction file, whose strength is what it says, a steering file (.json), or a text like "0.5
    a.safetensors@thinking - b", whose strength is 1. layers, where: instead of theirs. Raises UsageError."""
    is_program = str(text).endswith(".json")
    if not is_program and (os.path.lexists(text) or not set(str(text)) & set(" @|[")):
        direction = Direction.load(text) if os.path.lexists(text) else named_direction(str(text))
        return Part(direction.steering(1.0, layers, where, name=quoted(str(text))), direction.strength)
    program = Program.load(text) if is_program else parse_steering(str(text))
    changes: dict[str, Any] = {} if where is None else {"gate": parse_gate(where)}
    having = sorted({i.site.layer for i in program})
    if missing := sorted({*(layers or ())} - {*having}):
        raise UsageError(f"no vector at layer {missing[0]}: {one_line(str(text), 200)!r} has layers {having}")
    return Part(Program(replace(i, **changes) for i in program if layers is None or i.site.layer in layers), 1.0)


def _stream(
    loaded: models.Loaded,
    prompt: list[int],
    seed: int,
    decoding: Decoding,
    limit: int,
    handles: Sequence[transformers.Handle | None],
    show: Show,
    stoppable: bool,
) -> list[Completion]:
    """As many answers as there are handles, each of which steers the row of its place alone."""
    model, tokenizer = loaded
    tags, stops = think_tags_if_any(tokenizer), models.stop_ids(model)
    rows = range(len(handles))
    ids: list[list[int]] = [[] for _ in rows]
    texts, decoders, live = ["" for _ in rows], [_decoder(tokenizer) for _ in rows], set(rows)
    try:
        for tokens in _draw(model, prompt, len(rows), seed, decoding, limit):
            for row in sorted(live):
                ids[row].append(tokens[row])
                if tokens[row] not in stops:
                    texts[row] += decoders[row](tokens[row])
                    parts = texts[row].removeprefix(tags.texts[0]).partition(tags.texts[1]) if tags else ("", "", "")
                    show(row, parts[0], parts[2] if tags else texts[row])
                    continue
                live.discard(row)
                if (handle := handles[row]) is not None:
                    handle.assign(torch.full((len(rows),), -1))  # what the others wait for is no part of its answer
            if not live:
                break
    except KeyboardInterrupt:
        if not stoppable:
            raise
    return [Completion(ids[row], finished=bool(ids[row]) and ids[row][-1] in stops) for row in rows]


def _split(loaded: models.Loaded, completions: Sequence[Completion]) -> list[Record]:
    """The chains of answers. A model without a think block answers only."""
    model, tokenizer = loaded
    tags, is_endless = think_tags_if_any(tokenizer), not models.stop_ids(model)
    chains = [split_chain(tokenizer, tags, completion, endless=is_endless) for completion in completions]
    return chains if tags else [chain | {"thinking": ""} for chain in chains]


def _decoder(tokenizer: Any) -> Callable[[int], str]:
    """A function that gives the text which each further token adds, without decoding those before it again."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return lambda token: str(tokenizer.decode([token]))
    stream = DecodeStream(skip_special_tokens=False)
    return lambda token: stream.step(backend, token) or ""


@torch.inference_mode()
def _draw(
    model: Any, prompt: list[int], rows: int, seed: int, decoding: Decoding, max_new_tokens: int
) -> Iterator[list[int]]:
    """The next token of each of several continuations, drawn with one seed by a generator of its own
    (`engines/sampling.py`)."""
    fed, cache, seen = torch.tensor([prompt] * rows, device=model.device), None, None
    seeds = torch.full((rows,), seed, device=model.device)
    if decoding.repetition_penalty != 1:
        seen = mark(torch.zeros(rows, models.vocabulary(model), dtype=torch.bool, device=model.device), fed)
    # of a long prompt the logits would take more memory than the model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for n in range(max_new_tokens):
        output = model(input_ids=fed, **as_argument(model, cache), use_cache=True, **last)
        logits = output.logits[:, -1]
        if not bool(logits.amax(-1).isfinite().all()):
            raise SteerableError("the model's logits are not finite: lower the strength or use a wider dtype")
        token = choose(logits, decoding, seeds, torch.full_like(seeds, n), seen)
        yield token.tolist()
        fed, cache = token[:, None], given_cache(output)
        if seen is not None:
            mark(seen, fed)
