"""One prompt, answered unsteered and steered, side by side in the terminal: what people try first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from steerable import models
from steerable.chains.tasks import correct, make_tasks
from steerable.directions import Direction
from steerable.engines.hooks import steer as steering
from steerable.errors import UsageError
from steerable.pocket import language

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

    Returns `{"model", "prompt", "unsteered": {"thinking", "answer", "closed", "tokens"}, "steered": ... or null, "steering":
    what `Handle.report` says, or null}`; where a task was drawn, each answer also has `correct`.
    Raises UsageError for an unknown model, file, layer or selector.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}: expected 1 or more")
    direction = None if steer is None else Direction.load(steer)
    wanted = _layers(layers)
    loaded = models.load(model)
    tags = models.think_tags(loaded.tokenizer)
    task = None
    if prompt is None:
        if model != "pocket":
            raise UsageError("no prompt was given: write one after `steerable chat`, in quotes")
        task = make_tasks("pocket", 1, seed)[0]
        prompt = task["prompt"]
    screen = _Screen(prompt, steer is not None, known=models.model_id(loaded.model) == "pocket", quiet=quiet)

    def answer(side: int) -> dict[str, Any]:
        text, tokens = _stream(loaded, prompt, tags, seed, greedy, max_new_tokens, lambda t: screen.show(side, t))
        thinking, closed, rest = text.partition("</think>")
        said = {"thinking": thinking, "answer": rest.strip(), "closed": bool(closed), "tokens": tokens}
        return said | ({"correct": correct(task, rest)} if task else {})

    with screen:
        plain = answer(0)
        steered = report = None
        if direction is not None:
            with steering(
                loaded.model,
                direction,
                strength=strength,
                layers=wanted,
                where=where,
                tokenizer=loaded.tokenizer,
            ) as handle:
                steered = answer(1)
                report = handle.report()
        screen.close(plain, steered)
    return {"model": model, "prompt": prompt, "unsteered": plain, "steered": steered, "steering": report}


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--layers is {text!r}: expected layers separated by commas, e.g. 2,3") from None


def _stream(
    loaded: models.Loaded,
    prompt: str,
    tags: models.ThinkTags,
    seed: int,
    greedy: bool,
    max_new_tokens: int,
    show: Callable[[str], None],
) -> tuple[str, int]:
    """Generate, calling `show` with the whole text so far; returns the text (without `<think>`) and its length in tokens."""
    from transformers.generation.streamers import BaseStreamer

    model, tokenizer = loaded
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    ids: list[int] = []

    def text() -> str:
        kept = [i for i in ids if i not in tokenizer.all_special_ids]
        return tokenizer.decode(kept).removeprefix("<think>").lstrip("\n")

    class Streamer(BaseStreamer):
        """Passes on new tokens; the first call brings the prompt."""

        def __init__(self) -> None:
            self.prompt = True

        def put(self, value: Any) -> None:
            if not self.prompt:
                ids.extend(value.reshape(-1).tolist())
                show(text())
            self.prompt = False

        def end(self) -> None:
            pass

    torch.manual_seed(seed)
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} if greedy else {}
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=Streamer(), **options)
    return text(), len(ids)


class _Screen:
    """Two panels that grow as the text comes; plain text where the output is no terminal."""

    def __init__(self, prompt: str, two: bool, known: bool, quiet: bool):
        self.known, self.quiet, self.two = known, quiet, two
        self.console = Console(highlight=False)
        self.texts = ["", ""]
        self.live: Live | None = None
        if not quiet:
            self.console.print(Text(prompt.strip(), style="bold"), "\n")

    def __enter__(self) -> _Screen:
        if not self.quiet and self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=12, vertical_overflow="visible", transient=True)
            self.live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, side: int, text: str) -> None:
        self.texts[side] = text
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
            Panel(self._coloured(text), title=title, subtitle=note, width=width)
            for title, text, note in zip(titles, self.texts, notes, strict=False)
        ]
        return Columns(panels, padding=(0, 1)) if self.console.width >= 80 else Group(*panels)

    def _coloured(self, text: str) -> Text:
        shown = Text(text)
        if self.known:
            thinking = text.partition("</think>")[0]
            for span in language.annotate({"task_id": "", "sample": 0, "thinking": thinking}):
                shown.stylize(COLOURS[span["label"]], span["start"], span["end"])
        return shown


def _verdict(said: dict[str, Any]) -> str:
    mark = {True: ", right", False: ", wrong", None: ""}[said.get("correct")]
    return f"{said['tokens']} tokens{'' if said['closed'] else ', not closed'}{mark}"
