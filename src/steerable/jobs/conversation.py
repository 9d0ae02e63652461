"""One prompt, answered unsteered and steered, side by side in the terminal: what people try first."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from tokenizers.decoders import DecodeStream

from steerable.chains.generation import prompt_ids, split_chain
from steerable.chains.records import Record
from steerable.chains.tasks import correct, make_tasks
from steerable.engines import transformers
from steerable.engines.base import Completion
from steerable.engines.sampling import Decoding, choose, decoding_of, mark
from steerable.jobs.settings import LARGEST_SEED
from steerable.models import loading as models
from steerable.models.loading import stop_ids
from steerable.models.pocket import language
from steerable.steering.direction import Direction
from steerable.steering.site import parse_layers
from steerable.steering.spec import Program
from steerable.steering.text import parse_steering
from steerable.steering.think import think_tags_if_any
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.files import file_target
from steerable.store.run_folder import write_json
from steerable.store.text import plural, printable

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
    out: Path | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """One prompt, unsteered and steered side by side, streamed, with the spans coloured by behaviour.

    Both answers draw with the same seed, and nothing else in the process is drawn from.

    Args:
        prompt: The question; default: a task of the model's own kind.
        model: 'pocket', 'smol', a folder, a .gguf file or a hub name.
        steer: A direction file, or text like "0.5 a.safetensors@thinking - b"; default: the answer is unsteered.
        strength: Default: what the file says.
        layers: Layers of the file to use, e.g. 2,3; default: all in it.
        where: Tokens to steer, e.g. thinking; default: what the file says.
        seed: Seed of the sampling and of the task.
        greedy: Greedy decoding; default: the model's own.
        max_new_tokens: Longest answer, thinking included.
        out: Also write the answers to this JSON file.
        display: Where the answers are shown; default: nowhere.

    Returns:
        `{"model", "prompt", "unsteered": {"thinking", "answer", "closed", "tokens"}, "steered": ... or null,
        "steering": what `Handle.report` says, or null}`; where a task was drawn, each answer also has `correct`.

    Raises:
        UsageError: an unknown model, file, layer or selector, before anything is generated.

    Example:
        >>> chat("2*w + 8 = 30", steer="runs/pocket/vectors/backtracking.safetensors", strength=-1)
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}: expected 1 or more")
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"--seed is {seed}: expected a whole number from 0 to {LARGEST_SEED}")
    if steer is None and (strength, layers, where) != (None, None, None):
        raise UsageError("--strength, --layers and --where need a direction file: give one with --steer")
    if strength is not None and not math.isfinite(strength):
        raise UsageError(f"--strength is {strength}: expected a finite number")
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty: write one in quotes")
    if out is not None:
        file_target(out)
    steering = () if steer is None else _read_steering(steer)
    options: Any = {"strength": strength, "layers": parse_layers(layers), "where": where}
    loaded = models.load(model)
    task = None
    if prompt is None:
        if model != "pocket":
            raise UsageError("no prompt was given: write one after `steerable chat`, in quotes")
        task = make_tasks("pocket", 1, seed)[0]
        prompt = task["prompt"]
    ids = prompt_ids(loaded.tokenizer, prompt)
    transformers.check_length(loaded.model, len(ids) + max_new_tokens)
    steered_model = partial(transformers.steer, loaded.model, steering, tokenizer=loaded.tokenizer, **options)
    if steer is not None:
        with warnings.catch_warnings(action="ignore"), steered_model():
            pass  # what does not fit this model is refused now, and not after the unsteered answer
    is_pocket = models.model_id(loaded.model) == "pocket"
    screen = _Screen(prompt, steer is not None, is_pocket, quiet=display is None or display.quiet)

    def answer(side: int) -> dict[str, Any]:
        chain = _stream(loaded, ids, seed, greedy, max_new_tokens, partial(screen.show, side))
        right = {"correct": correct(task, chain["answer"] if chain["closed"] else "")} if task else {}
        record = {key: chain[key] for key in ("thinking", "answer", "closed", "tokens")}
        return record | {"answer": chain["answer"].strip()} | right

    with screen:
        plain = answer(0)
        steered = report = None
        if steer is not None:
            with steered_model() as handle:
                steered = answer(1)
                report = handle.report()
        screen.close(plain, steered)
    result = {"model": model, "prompt": prompt, "unsteered": plain, "steered": steered, "steering": report}
    if out is not None:
        write_json(out, result)
    return result


def _read_steering(text: str | Path) -> Direction | Program:
    """A direction file by its path, or the text form of a steering."""
    if os.path.lexists(text) or not set(str(text)) & set(" @|["):
        return Direction.load(text)
    return parse_steering(str(text))


def _stream(
    loaded: models.Loaded, prompt: list[int], seed: int, greedy: bool, max_new_tokens: int, show: Callable[..., None]
) -> Record:
    """Generate after the prompt, calling `show` with thinking and answer so far at every token; returns the chain. A
    model without a think block answers only."""
    tags, ids = think_tags_if_any(loaded.tokenizer), []
    decoder, text = _decoder(loaded.tokenizer), ""
    stops = stop_ids(loaded.model)
    for token in _draw(loaded.model, prompt, seed, decoding_of(loaded.model, greedy=greedy or None), max_new_tokens):
        ids.append(token)
        if token in stops:
            break
        text += decoder(token)
        show(*(text.removeprefix(tags.texts[0]).partition(tags.texts[1])[::2] if tags else ("", text)))
    completion = Completion(ids, finished=bool(ids) and ids[-1] in stops)
    chain = split_chain(loaded.tokenizer, tags, completion, endless=not stops)
    chain["thinking"] = chain["thinking"] if tags else ""
    show(chain["thinking"], chain["answer"])
    return chain


def _decoder(tokenizer: Any) -> Callable[[int], str]:
    """A function that gives the text which each further token adds, without decoding those before it again."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return lambda token: str(tokenizer.decode([token]))
    stream = DecodeStream(skip_special_tokens=False)
    return lambda token: stream.step(backend, token) or ""


@torch.inference_mode()
def _draw(model: Any, prompt: list[int], seed: int, decoding: Decoding, max_new_tokens: int) -> Iterator[int]:
    """The tokens of one continuation, drawn by a generator of its own (`engines/sampling.py`)."""
    fed, seeds, cache = torch.tensor([prompt], device=model.device), torch.tensor([seed], device=model.device), None
    seen = None
    if decoding.repetition_penalty != 1:
        seen = mark(torch.zeros(1, models.vocabulary(model), dtype=torch.bool, device=model.device), fed)
    for n in range(max_new_tokens):
        output = model(input_ids=fed, past_key_values=cache, use_cache=True)
        token = choose(output.logits[:, -1], decoding, seeds, torch.full_like(seeds, n), seen)
        yield int(token)
        fed, cache = token[:, None], output.past_key_values
        if seen is not None:
            mark(seen, fed)


class _Screen:
    """Two panels that grow as the text comes; plain text where the output is no terminal."""

    def __init__(self, prompt: str, two: bool, is_pocket: bool, quiet: bool):
        self.is_pocket, self.quiet, self.two = is_pocket, quiet, two
        self.console = Console(highlight=False)
        self.answers = [("", ""), ("", "")]  # thinking and answer of either side
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

    def show(self, side: int, thinking: str, answer: str) -> None:
        """Replace what one side says."""
        self.answers[side] = thinking, answer
        if self.live is not None:
            self.live.update(self._panels(["writing ...", "waiting ..." if side == 0 else "writing ..."]))

    def close(self, plain: dict[str, Any], steered: dict[str, Any] | None) -> None:
        """The final picture, with what became of each."""
        if self.live is not None:
            self.live.stop()
        if not self.quiet:
            self.console.print(self._panels([_verdict(record) for record in (plain, steered) if record]))
            if self.is_pocket:
                self.console.print(Text.assemble(*((f"{label}  ", colour) for label, colour in COLOURS.items())))

    def _panels(self, notes: list[str]) -> Any:
        titles = ["unsteered", "steered"] if self.two else ["answer"]
        width = self.console.width // len(titles) - 1 if self.console.width >= 80 else self.console.width
        panels = [
            Panel(self._coloured(*answer), title=title, subtitle=note, width=width)
            for title, answer, note in zip(titles, self.answers, notes, strict=False)
        ]
        return Columns(panels, padding=(0, 1)) if self.console.width >= 80 else Group(*panels)

    def _coloured(self, thinking: str, answer: str) -> Text:
        text = Text(printable(thinking))  # as long as before: the spans' offsets stay true
        if self.is_pocket:
            for span in language.annotate({"task_id": "", "sample": 0, "thinking": thinking}):
                text.stylize(COLOURS[span["label"]], span["start"], span["end"])
        text.rstrip()
        answer = printable(answer.strip())
        return text.append("\n\n" if text else "").append(answer, style="bold") if answer else text


def _verdict(answer: dict[str, Any]) -> str:
    mark = {True: ", right", False: ", wrong", None: ""}[answer.get("correct")]
    return f"{answer['tokens']} {plural(answer['tokens'], 'token')}{'' if answer['closed'] else ', not closed'}{mark}"
