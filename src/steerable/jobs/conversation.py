"""One prompt, answered unsteered and steered, side by side in the terminal: what people try first."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from steerable.chains.generation import prompt_text, split_chain
from steerable.chains.records import Record
from steerable.chains.tasks import correct, make_tasks
from steerable.engines.base import Completion
from steerable.engines.transformers import Handle, check_length
from steerable.engines.transformers import steer as steering
from steerable.models import loading as models
from steerable.models.pocket import language
from steerable.steering.direction import Direction
from steerable.steering.site import parse_layers
from steerable.steering.think import think_tags
from steerable.store.errors import UsageError
from steerable.store.plurals import plural
from steerable.store.text import printable

# Colours that are told apart on dark and light terminals.
COLOURS = {
    "initializing": "dim",
    "deduction": "default",
    "adding-knowledge": "green",
    "example-testing": "cyan",
    "uncertainty-estimation": "yellow",
    "backtracking": "red",
}


def chat(
    prompt: str | None = None,
    *,
    model: str = "pocket",
    steer: str | Path | None = None,
    strength: float | None = None,
    layers: str | None = None,
    where: str | None = None,
    seed: int = 0,
    greedy: bool = False,
    max_new_tokens: int = 500,
    quiet: bool = False,
) -> dict[str, Any]:
    """Answer a prompt and, given a direction file, answer it again steered; both draw with the same seed.

    prompt: None asks the bundled model one of its own unseen tasks. quiet: nothing is printed.

    Returns `{"model", "prompt", "unsteered": {"thinking", "answer", "closed", "tokens"}, "steered": ... or null,
    "steering": what `Handle.report` says, or null}`; where a task was drawn, each answer also has `correct`.
    Raises UsageError for an unknown model, file, layer or selector, before anything is generated.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}: expected 1 or more")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed is {seed}: expected a whole number from 0 to {2**32 - 1}")
    if steer is None and (strength, layers, where) != (None, None, None):
        raise UsageError("--strength, --layers and --where need a direction file: give one with --steer")
    if strength is not None and not math.isfinite(strength):
        raise UsageError(f"--strength is {strength}: expected a finite number")
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty: write one in quotes")
    direction = None if steer is None else Direction.load(steer)
    wanted = parse_layers(layers)
    loaded = models.load(model)
    think_tags(loaded.tokenizer)
    task = None
    if prompt is None:
        if model != "pocket":
            raise UsageError("no prompt was given: write one after `steerable chat`, in quotes")
        task = make_tasks("pocket", 1, seed)[0]
        prompt = task["prompt"]
    text = prompt_text(loaded.tokenizer, prompt)

    def steered_model(direction: Direction) -> AbstractContextManager[Handle]:
        return steering(
            loaded.model, direction, strength=strength, layers=wanted, where=where, tokenizer=loaded.tokenizer
        )

    if direction is not None:
        with warnings.catch_warnings(action="ignore"), steered_model(direction):
            pass  # what does not fit this model is refused now, and not after the unsteered answer
    screen = _Screen(prompt, steer is not None, known=models.model_id(loaded.model) == "pocket", quiet=quiet)

    def answer(side: int) -> dict[str, Any]:
        said = _stream(loaded, text, seed, greedy, max_new_tokens, lambda said: screen.show(side, said))
        right = {"correct": correct(task, said["answer"] if said["closed"] else "")} if task else {}
        kept = {key: said[key] for key in ("thinking", "answer", "closed", "tokens")}
        return kept | {"answer": said["answer"].strip()} | right

    with screen:
        plain = answer(0)
        steered = report = None
        if direction is not None:
            with steered_model(direction) as handle:
                steered = answer(1)
                report = handle.report()
        screen.close(plain, steered)
    return {"model": model, "prompt": prompt, "unsteered": plain, "steered": steered, "steering": report}


def _stream(
    loaded: models.Loaded, text: str, seed: int, greedy: bool, max_new_tokens: int, show: Callable[[Record], None]
) -> Record:
    """Generate after `text`, calling `show` with the chain record so far at every token; returns the whole one."""
    from transformers.generation.streamers import BaseStreamer

    model, tokenizer = loaded
    tags = think_tags(tokenizer)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    stops = models.stop_ids(model)
    check_length(model, inputs["input_ids"].shape[1] + max_new_tokens)
    ids: list[int] = []

    def said() -> Record:
        return split_chain(tokenizer, tags, Completion(ids, finished=bool(ids) and ids[-1] in stops), endless=not stops)

    class Streamer(BaseStreamer):
        """Passes on new tokens; the first call brings the prompt."""

        def __init__(self) -> None:
            self.prompt = True

        def put(self, value: Any) -> None:
            if not self.prompt:
                ids.extend(value.reshape(-1).tolist())
                show(said())
            self.prompt = False

        def end(self) -> None:
            pass

    torch.manual_seed(seed)
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} if greedy else {}
    with torch.inference_mode():
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            streamer=Streamer(),
            **options,
        )
    return said()


class _Screen:
    """Two panels that grow as the text comes; plain text where the output is no terminal."""

    def __init__(self, prompt: str, two: bool, known: bool, quiet: bool):
        self.known, self.quiet, self.two = known, quiet, two
        self.console = Console(highlight=False)
        self.said: list[Record] = [{"thinking": "", "answer": ""}] * 2
        self.live: Live | None = None
        if not quiet:
            self.console.print(Text(printable(prompt.strip()), style="bold"), "\n")

    def __enter__(self) -> _Screen:
        if not self.quiet and self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=12, vertical_overflow="visible", transient=True)
            self.live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, side: int, said: Record) -> None:
        self.said[side] = said
        if self.live is not None:
            self.live.update(self._panels(["writing ...", "waiting ..." if side == 0 else "writing ..."]))

    def close(self, plain: dict[str, Any], steered: dict[str, Any] | None) -> None:
        """The final picture, with what became of each."""
        if self.live is not None:
            self.live.stop()
        if not self.quiet:
            self.console.print(self._panels([_verdict(said) for said in (plain, steered) if said]))
            if self.known:
                self.console.print(Text.assemble(*((f"{label}  ", colour) for label, colour in COLOURS.items())))

    def _panels(self, notes: list[str]) -> Any:
        titles = ["unsteered", "steered"] if self.two else ["answer"]
        width = self.console.width // len(titles) - 1 if self.console.width >= 80 else self.console.width
        panels = [
            Panel(self._coloured(said), title=title, subtitle=note, width=width)
            for title, said, note in zip(titles, self.said, notes, strict=False)
        ]
        return Columns(panels, padding=(0, 1)) if self.console.width >= 80 else Group(*panels)

    def _coloured(self, said: Record) -> Text:
        shown = Text(printable(said["thinking"]))  # as long as before: the spans' offsets stay true
        if self.known:
            for span in language.annotate({"task_id": "", "sample": 0, "thinking": said["thinking"]}):
                shown.stylize(COLOURS[span["label"]], span["start"], span["end"])
        shown.rstrip()
        answer = printable(said["answer"].strip())
        return shown.append(f"\n\n{answer}", style="bold") if answer else shown


def _verdict(said: dict[str, Any]) -> str:
    mark = {True: ", right", False: ", wrong", None: ""}[said.get("correct")]
    return f"{said['tokens']} {plural(said['tokens'], 'token')}{'' if said['closed'] else ', not closed'}{mark}"
