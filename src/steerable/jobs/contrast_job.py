"""`steerable contrast`: from pairs of texts, or from two kinds of person, to a calibrated direction file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steerable.chains.everyday import QUESTIONS
from steerable.chains.text_pairs import read_pairs
from steerable.engines.vllm.engine import VllmEngine, check_engine, parse_options
from steerable.evals.calibration import BUDGET, check_budget
from steerable.jobs.conversation import answer
from steerable.jobs.dialogue import Dialogue, read_part
from steerable.jobs.panels import Screen
from steerable.methods.personas import check_persona, persona_pairs
from steerable.methods.text_pairs import ESTIMATORS, contrast
from steerable.models import loading as models
from steerable.steering.site import parse_layers
from steerable.store.display import Display
from steerable.store.errors import UsageError
from steerable.store.files import file_target, writable_target
from steerable.store.plugins import function_at
from steerable.store.text import one_line


def contrast_file(
    pairs: Path | None = None,
    *,
    model: str = "pocket",
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    out: Path,
    persona: str | None = None,
    opposite: str | None = None,
    prompts: int = 40,
    behaviour: str = "",
    method: str = "difference_of_means",
    layers: str | None = None,
    site: str = "resid_post",
    where: str = "all",
    reduce: str = "mean",
    budget: float | None = None,
    ask: str | None = None,
    max_new_tokens: int = 60,
    seed: int = 0,
    engine: str = "transformers",
    engine_options: str = "",
    display: Display | None = None,
) -> dict[str, Any]:
    """Pairs of texts, or two kinds of person, in; a direction out whose strength 1 means the same everywhere.

    The direction is taken at the layers that tell held-out pairs apart best, and made as long as moves the model by a
    stated KL divergence from itself. With --ask it answers at once, at strengths -1, 0 and 1.

    Args:
        pairs: A .jsonl, .json or .csv file with `positive` and `negative` in each record: texts, or chat messages.
        model: 'pocket', 'smol', 'smol-think', a folder, a .gguf file or a hub name.
        revision: Branch, tag or commit of a hub model.
        dtype: Weights' type, e.g. bfloat16; default: the checkpoint's.
        device: Device, e.g. cuda:0; default: CUDA, else MPS, else the CPU.
        out: The direction file to write.
        persona: Instead of a file: the kind of person at strength 1, e.g. happy; everyday questions are asked.
        opposite: The kind of person at strength -1, e.g. sad.
        prompts: How many questions are asked of a persona.
        behaviour: What the direction does; default: the persona, or the file's name.
        method: difference_of_means, pca, or module:function of your own, two groups of activations -> Direction.
        layers: Layers, e.g. 12,13; default: the band that tells held-out pairs apart best.
        site: The kind of site.
        where: Tokens of a text that are read.
        reduce: mean over them, last, or a number: the mean over so many last ones.
        budget: KL in nats a token at strength 1; default 0.4.
        ask: Also answer this prompt at strengths -1, 0 and 1.
        max_new_tokens: Longest answer to --ask.
        seed: Seed of the answers.
        engine: What writes the answers to --ask: transformers, or vllm (the extra steerable[vllm]).
        engine_options: With --engine vllm: options of vllm.LLM as JSON.
        display: Where progress and answers are shown; default: nowhere.

    Returns:
        `{"out", "model", "behaviour", "pairs", "layers", "unit", "separation", "calibration", "answers"}`, the last
        as `chat` at several strengths gives them, or null.

    Raises:
        UsageError: neither pairs nor a persona, a file or a method that is none, before the model is loaded.
        SteerableError: the budget is not reached. Nothing is written then.

    Example:
        >>> contrast_file(persona="happy", opposite="sad", model="smol", out="happy.safetensors", ask="How are you?")
    """
    display = display or Display(quiet=True)
    if (pairs is None) == (persona is None):
        raise UsageError("give a file of pairs, or --persona and --opposite")
    if (persona is None) != (opposite is None):
        raise UsageError("--persona and --opposite belong together, as in --persona happy --opposite sad")
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}: expected 1 or more")
    if ask is not None and not ask.strip():
        raise UsageError("--ask is empty: write a prompt in quotes")
    number = int(reduce) if reduce.isascii() and reduce.isdigit() else 0
    if reduce not in ("mean", "last") and not number:
        raise UsageError(f"--reduce is {reduce!r}: expected mean, last or a number of last tokens")
    if pairs is not None and file_target(out) == file_target(pairs):
        raise UsageError(f"--out is the file of pairs, {pairs}: name another file")
    check_engine(engine)
    options = parse_options(engine, engine_options)
    writable_target(out)
    check_budget(budget := BUDGET if budget is None else budget)
    names = f"{', '.join(ESTIMATORS)} or module:function, (positive, negative activations) -> Direction"
    estimator = ESTIMATORS.get(method) or function_at(method, "--method", names)
    chosen = parse_layers(layers)
    sides: Any = None if pairs is None else read_pairs(pairs)
    if persona is not None and opposite is not None:
        check_persona(persona, opposite, prompts)
    loaded = models.load(model, revision=revision, dtype=dtype, device=device)
    dialogue = None
    if ask is None and engine == "vllm":
        display.say("there is no --ask, so that --engine vllm has nothing to write: texts are read by transformers")
    if ask is not None:
        fixed: dict[str, Any] = {"dtype": str(loaded.model.dtype).removeprefix("torch."), "revision": revision}
        writer = VllmEngine.start(model, **fixed | options) if engine == "vllm" else None
        dialogue = Dialogue(loaded, seed=seed, max_new_tokens=max_new_tokens, engine=writer)
    if persona is not None and opposite is not None:
        sides = persona_pairs(loaded.tokenizer, persona, opposite, prompts)
    direction = contrast(
        *loaded,
        *sides,
        method=estimator,
        layers=chosen,
        site=site,
        where=where,
        reduce=number or reduce,  # type: ignore[arg-type]
        behaviour=behaviour or persona or one_line(pairs.stem if pairs else "", 100),
        budget=budget,
        progress=display.say,
    )
    direction.save(out)
    display.tell(f"{out}: {direction!r}")
    answers, name = None, models.model_id(loaded.model)
    if dialogue is not None and ask is not None:
        dialogue.set_steering([read_part(out)])
        dialogue.set_strengths("-1,0,1")
        screen = Screen(name, display.quiet)
        answers = answer(dialogue, screen, ask)["answers"]
    elif getattr(loaded.tokenizer, "chat_template", None):  # without one there is no chat
        prompt = "2*w + 8 = 30" if name == "pocket" else QUESTIONS[0]  # that one solves tasks, and knows nothing else
        display.tell(f"try: steerable chat {prompt!r} --model {model} --steer {out} --strength -1,0,1")
    return {
        "out": str(out),
        "model": model,
        "behaviour": direction.behaviour,
        "pairs": direction.stats["pairs"],
        "layers": direction.layers,
        "unit": direction.unit,
        "separation": direction.stats["separation"],
        "calibration": direction.stats["calibration"],
        "answers": answers,
    }
