"""`steerable chat`: a prompt, lines, or a conversation, answered unsteered and steered side by side: what people try
first."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any

from steerable.chains.records import Record
from steerable.chains.tasks import make_tasks
from steerable.jobs.dialogue import Dialogue, read_part, read_strengths
from steerable.jobs.panels import Screen
from steerable.models import loading as models
from steerable.models.taught import TAUGHT
from steerable.steering.site import parse_layers
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import writable_target
from steerable.store.run_folder import write_json
from steerable.store.text import one_line

with suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  gives `input` its line editing and its history


def chat(
    prompt: str | None = None,
    *,
    model: str = "pocket",
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    steer: str | Path | Sequence[str | Path] | None = None,
    strength: float | str | None = None,
    layers: str | None = None,
    where: str | None = None,
    system: str = "",
    seed: int = 0,
    greedy: bool = False,
    max_new_tokens: int = 500,
    out: Path | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """One prompt, or a conversation, answered unsteered and steered side by side, streamed.

    Without a prompt it is a conversation: on a terminal until Ctrl-D (/help lists its commands), else each line of
    standard input is a turn. Where there is no input either, the bundled model gets a task of its own kind. All answers
    draw with the same seed, and nothing else in the process is drawn from. The bundled model's spans are coloured by
    behaviour.

    Args:
        prompt: The question.
        model: 'pocket', 'smol', 'smol-think', a folder, a .gguf file or a hub name.
        revision: Branch, tag or commit of a hub model.
        dtype: Weights' type, e.g. bfloat16; default: the checkpoint's.
        device: Device, e.g. cuda:0; default: CUDA, else MPS, else the CPU.
        steer: A direction file, or text like "0.5 a.safetensors@thinking - b"; several are added up. Default: the
            answer is unsteered.
        strength: Strength of a file, and the factor of all terms of a text; several, as in -1,0,1, are answered side by
            side (0 is unsteered). Default: what files and text say.
        layers: Layers of the file to use, e.g. 2,3; default: all in it.
        where: Tokens to steer, e.g. thinking; default: what the file says.
        system: System message; default: none.
        seed: Seed of the sampling and of the task.
        greedy: Greedy decoding; default: the model's own.
        max_new_tokens: Longest answer, thinking included.
        out: Also write the answers to this JSON file.
        display: Where the answers are shown, and what is typed is read; default: nowhere.

    Returns:
        `{"model", "prompt", "unsteered": {"thinking", "answer", "closed", "tokens"}, "steered": ... or null,
        "steering": what `Handle.report` says, or null, "steering_text": the text of what steered, or null}`; where a
        task was drawn, each answer also has `correct`. At several strengths `{"model", "prompt", "answers"}`, of a
        conversation `{"model", "turns"}`: the records of `Dialogue`.

    Raises:
        UsageError: an unknown model, file, layer or selector, before anything is generated.

    Example:
        >>> chat("2*w + 8 = 30", steer="runs/pocket/vectors/backtracking.safetensors", strength=-1)
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}: expected 1 or more")
    texts = [steer] if isinstance(steer, str | Path) else list(steer or ())
    if not texts and (strength, layers, where) != (None, None, None):
        raise UsageError("--strength, --layers and --where need a direction file: give one with --steer")
    strengths = None if strength is None else read_strengths(strength)
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty: write one in quotes")
    if out is not None:
        writable_target(out)
    parts = [read_part(text, parse_layers(layers), where) for text in texts]
    lines = None if prompt is not None or display is None else _typed(display)
    if prompt is None and lines is None and model not in TAUGHT:
        raise UsageError("no prompt was given: write one after `steerable chat`, in quotes")
    loaded = models.load(model, revision=revision, dtype=dtype, device=device)
    dialogue = Dialogue(loaded, system=system, seed=seed, greedy=greedy, max_new_tokens=max_new_tokens)
    dialogue.strengths = strengths
    dialogue.set_steering(parts)
    screen = Screen(models.model_id(loaded.model), quiet=display is None or display.quiet)
    result: dict[str, Any] = {"model": model}
    if lines is not None:
        result["turns"] = dialogue.turns
        try:
            Loop(dialogue, screen, is_terminal=sys.stdin.isatty()).run(lines)
        finally:
            if out is not None:
                write_json(out, result)
        return result
    task = make_tasks(model, 1, seed)[0] if prompt is None else None
    turn = answer(dialogue, screen, task["prompt"] if task else str(prompt), task)
    answers = turn["answers"]
    result["prompt"] = turn["prompt"]
    if strengths is not None and len(strengths) > 1:
        result["answers"] = answers
    else:
        keys = ("thinking", "answer", "closed", "tokens", "correct")
        plain, *steered = [{key: answer[key] for key in keys if key in answer} for answer in answers]
        result["unsteered"], result["steered"] = plain, steered[0] if steered else None
        result["steering"], result["steering_text"] = answers[-1]["report"], answers[-1]["steering"]
    if out is not None:
        write_json(out, result)
    return result


def answer(
    dialogue: Dialogue, screen: Screen, prompt: str, task: Record | None = None, is_typed: bool = False
) -> Record:
    """One turn, shown as it comes. is_typed: the prompt stands on the terminal already, and Ctrl-C ends the answer."""
    if not is_typed or task is not None:
        screen.say(f"{prompt.strip()}\n", "bold")
    with screen.growing([side.title for side in dialogue.sides]):
        turn = dialogue.answer(prompt, screen.show, task=task, stoppable=is_typed)
    screen.finish(turn["answers"])
    return turn


def _typed(display: Display) -> Iterator[str] | None:
    """The lines of standard input; None where there are none, and on a terminal that is shown no answer."""
    if sys.stdin is None:  # closed
        return None
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        return None if display.quiet else _asked()
    try:
        first = sys.stdin.readline()
    except OSError:  # closed
        return None
    return chain([first], sys.stdin) if first else None


def _asked() -> Iterator[str]:
    """What is typed on the terminal, until Ctrl-D."""
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\nCtrl-D or /quit ends the conversation")
        except EOFError:
            print()
            return


class Loop:
    """A conversation line by line. A line that begins with / is a command: a method below, by its name."""

    COMMANDS = ("strength", "steer", "system", "seed", "keep", "task", "report", "reset", "help", "quit")

    def __init__(self, dialogue: Dialogue, screen: Screen, is_terminal: bool) -> None:
        self.dialogue, self.screen, self.is_terminal = dialogue, screen, is_terminal
        self.is_over, self.tasks = False, 0

    def run(self, lines: Iterable[str]) -> None:
        """Answer every line, and do what the commands say. What is wrong with a line is one sentence on standard
        error."""
        if self.is_terminal:
            self.screen.say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the conversation", "dim")
            if self.screen.taught is not None:
                self.screen.say("this model answers single tasks: /task gives it one, /reset forgets it", "dim")
        for line in map(str.strip, lines):
            name, _, value = line.partition(" ")
            try:
                if name.removeprefix("/") in self.COMMANDS and name.startswith("/"):
                    getattr(self, name.removeprefix("/"))(value.strip())
                elif name.startswith("/"):
                    raise UsageError(f"there is no command {one_line(name, 40)}: /help lists them")
                elif line:
                    self._turn(line)
            except SteerableError as error:
                print(f"steerable: {one_line(str(error))}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
            if self.is_over:
                return

    def _turn(self, prompt: str, task: Record | None = None) -> None:
        turn = answer(self.dialogue, self.screen, prompt, task, is_typed=self.is_terminal)
        if turn["continued"] is None:
            self.screen.say("there is no answer to go on from: the next turn will not know of this one", "dim")
        elif len(turn["answers"]) > 1:
            titles = [answer["title"] for answer in turn["answers"]]
            continued = titles.pop(turn["continued"])
            others = ", ".join(f"/keep {title.removeprefix('strength ')}" for title in titles)
            self.screen.say(f"the conversation goes on from: {continued} ({others} to change that)", "dim")

    def strength(self, value: str) -> None:
        """/strength 0.5: beside the unsteered answer; /strength -1,0,1: one answer each (0 is unsteered)"""
        self.dialogue.set_strengths(value, "/strength")
        self._tell_sides()

    def steer(self, value: str) -> None:
        """/steer FILE or TEXT: steer by this from now on"""
        if not value:
            raise UsageError("/steer needs a direction file, or a text like 0.5 a.safetensors@thinking - b")
        self.dialogue.set_steering([read_part(value)])
        self._tell_sides()

    def system(self, value: str) -> None:
        """/system TEXT: the system message; without a text there is none"""
        self.dialogue.set_system(value)

    def seed(self, value: str) -> None:
        """/seed N: what the next answers draw with"""
        self.dialogue.set_seed(value, "/seed")

    def keep(self, value: str) -> None:
        """/keep unsteered, /keep steered, /keep -1: the answer that the conversation goes on from"""
        self.screen.say(f"the conversation goes on from: {self.dialogue.keep(value)}", "dim")

    def task(self, value: str) -> None:
        """/task: a new conversation with a task of the kind that pocket or smol-think was taught"""
        if self.screen.taught is None:
            raise UsageError("/task is for pocket and smol-think: type a question")
        self.tasks += 1
        task = make_tasks(models.model_id(self.dialogue.loaded.model), self.tasks, self.dialogue.seed)[-1]
        self.dialogue.reset()
        self._turn(task["prompt"], task)

    def report(self, value: str) -> None:
        """/report: what steering did to the last answers"""
        answers = self.dialogue.turns[-1]["answers"] if self.dialogue.turns else []
        reports = [answer["report"] for answer in answers if answer["report"]]
        if not reports:
            raise UsageError("nothing has been steered yet: /steer FILE, then a prompt")
        self.screen.say("\n\n".join(map(str, reports)))

    def reset(self, value: str) -> None:
        """/reset: begin a new conversation"""
        self.dialogue.reset()

    def help(self, value: str) -> None:
        """/help: this list"""
        for name in self.COMMANDS:
            self.screen.say(str(getattr(self, name).__doc__))

    def quit(self, value: str) -> None:
        """/quit, or Ctrl-D: end the conversation"""
        self.is_over = True

    def _tell_sides(self) -> None:
        titles = [side.title for side in self.dialogue.sides]
        self.screen.say(f"the next answers: {', '.join(titles)}", "dim")
