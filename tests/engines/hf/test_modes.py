"""In which generation modes is a gate right: every mode against steering by definition, which knows the whole text.

`MODES` is the table of docs/generation-modes.md; `python tests/engines/hf/test_modes.py --write` writes it there.
"""

import copy
import re
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
)

sys.path.append(str(Path(__file__).parents[2]))
from conftest import slow
from tiny_families import VOCABULARY, tiny

from steerable.engines.hf.hooks import steer
from steerable.models import loading as models
from steerable.models.taps import tap
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.steering.think import set_think_tags
from steerable.store.errors import SteerableError, SteerableWarning

OPEN, CLOSE, BREAK = 1, 2, 3
SPOKEN = (OPEN, CLOSE, BREAK, 7, 8, 9)  # so few that beams open and close the block at different times
GATES = ("all", "prompt", "generated", "last_prompt", "thinking", "answer", "boundary", "positions(3, 9)")
NEW = 7
PAGE = Path(__file__).parents[3] / "docs" / "generation-modes.md"


def right_places(gate, row, prompt):
    """The places that a gate means, by its definition, of a text whose first `prompt` tokens are the prompt."""
    phase, thinking, answer = None, [], []
    for place, token in enumerate(row):
        if token in (OPEN, CLOSE):
            phase = token
        elif phase is not None:
            (thinking if phase == OPEN else answer).append(place)
    return {
        "all": list(range(len(row))),
        "prompt": list(range(prompt)),
        "generated": list(range(prompt, len(row))),
        "last_prompt": [prompt - 1],
        "last_prompt | generated": list(range(prompt - 1, len(row))),
        "thinking | generated": sorted({*thinking, *range(prompt, len(row))}),
        "thinking": thinking,
        "answer": answer,
        "boundary": [i for i, token in enumerate(row) if token == BREAK and BREAK not in row[max(0, i - 1) : i]],
        "positions(3, 9)": list(range(3, min(9, len(row)))),
    }[gate]


def by_definition(model, direction, row, places):
    """Logits [T, V] of one row whose activations are edited at these places."""

    def edit(vector):
        def fn(h):
            new = h.clone()
            new[:, places] += vector
            return new

        return fn

    with tap(model, {site: edit(vector) for site, vector in direction.vectors.items()}):
        return model(torch.tensor([list(row)])).logits[0]


@dataclass
class Case:
    model: object  # is steered
    twin: object  # the same weights, for the definition
    direction: Direction
    gate: str

    def logits(self, row, prompt):
        return by_definition(self.twin, self.direction, row, right_places(self.gate, row, prompt))

    def check_greedy(self, row, prompt, start=None):
        """Each token from `start` on is the likeliest one of those spoken."""
        start = prompt if start is None else start
        scores = self.logits(row, prompt)[start - 1 : len(row) - 1, SPOKEN]
        chosen = torch.tensor([SPOKEN.index(token) for token in row[start:]])
        lag = scores.amax(-1) - scores[torch.arange(len(chosen)), chosen]
        assert lag.max() < 1e-3, lag

    def log_probability(self, row, prompt):
        scores = self.logits(row, prompt).log_softmax(-1)[prompt - 1 : len(row) - 1]
        return float(scores[torch.arange(len(scores)), list(row[prompt:])].sum())

    def beam_search(self, prompt, beams, new=NEW):
        """The best rows and their log-probabilities, by reading every text from its start."""
        found = [(0.0, tuple(prompt))]
        for _ in range(new):
            longer = [
                (total + float(p[token]), (*row, token))
                for total, row in found
                for p in [self.logits(row, len(prompt))[-1].log_softmax(-1)]
                for token in SPOKEN
            ]
            found = sorted(longer, reverse=True)[:beams]
        return found


def prompts(rows=2, length=6, seed=0):
    ids = torch.randint(7, 12, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 2], ids[-1, 4] = OPEN, OPEN
    return ids


def options(**more):
    silent = [token for token in range(VOCABULARY) if token not in SPOKEN]
    usual = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return usual | {"suppress_tokens": silent} | more


def generate(case, ids, **more):
    return case.model.generate(ids, attention_mask=torch.ones_like(ids), **options(**more))


def greedy(**more):
    def mode(case, handle, rows=2):
        ids = prompts(rows)
        for row in generate(case, ids, **more).tolist():
            case.check_greedy(row, ids.shape[1])

    return mode


def sampling(case, handle):
    out = generate(case, prompts(), do_sample=True, top_k=0, num_return_sequences=3, output_logits=True,
                   return_dict_in_generate=True)  # fmt: skip
    for row, found in zip(out.sequences.tolist(), torch.stack(out.logits, 1), strict=True):
        torch.testing.assert_close(found, case.logits(row, 6)[5:-1], atol=1e-3, rtol=1e-3)


def beams(**more):
    def mode(case, handle):
        ids = prompts()
        out = generate(
            case, ids, num_beams=4, num_return_sequences=4, length_penalty=0.0, return_dict_in_generate=True,
            output_scores=True, **more,
        )  # fmt: skip
        for i, row in enumerate(out.sequences.tolist()):
            assert float(out.sequences_scores[i]) == pytest.approx(case.log_probability(row, 6), abs=1e-3)
        if not more.get("do_sample"):
            for i, prompt in enumerate(ids.tolist()):
                best = [total for total, _ in case.beam_search(prompt, 4)]
                assert out.sequences_scores[4 * i : 4 * i + 4].tolist() == pytest.approx(best, abs=1e-3)

    return mode


def speculative(**more):
    def mode(case, handle):
        for seed in range(3):
            ids = prompts(1, 9, seed)
            ids[0, 5:8] = ids[0, :3]  # so that there is something to look up
            for row in generate(case, ids, **more).tolist():
                case.check_greedy(row, 9)

    return mode


def assisted(case, handle):
    speculative(assistant_model=tiny("llama", seed=5))(case, handle)


def guidance(**more):
    def mode(case, handle):
        ids, negative = prompts(), prompts(seed=3)[:, :4]
        for given in (None, negative):
            kwargs = {} if given is None else {"negative_prompt_ids": given}
            rows = generate(case, ids, guidance_scale=1.7, **kwargs, **more).tolist()
            for i, row in enumerate(rows):
                start = [row[5]] if given is None else negative[i].tolist()
                plain = case.logits([*start, *row[6:]], len(start)).log_softmax(-1)[len(start) - 1 : -1]
                full = case.logits(row, 6).log_softmax(-1)[5:-1]
                scores = (plain + 1.7 * (full - plain))[:, SPOKEN]
                chosen = torch.tensor([SPOKEN.index(token) for token in row[6:]])
                assert (scores.amax(-1) - scores[torch.arange(NEW), chosen]).max() < 1e-3

    return mode


def chunked(size):
    def mode(case, handle):
        ids = prompts(length=9)
        for row in generate(case, ids, prefill_chunk_size=size).tolist():
            case.check_greedy(row, 9)

    return mode


def second_turn(case, handle):
    """What the second call feeds of its prompt is prompt; the first answer was fed as generated."""
    ids, more = prompts(), torch.tensor([[8, 9, 7], [7, OPEN, 8]])
    cache = DynamicCache(config=case.model.config)
    first = generate(case, ids, past_key_values=cache)
    both = torch.cat([first, more], 1)
    last = generate(case, both, past_key_values=cache)
    kept = ids.shape[1] + NEW - 1  # the last token was not yet fed
    for row in last.tolist():
        places = {
            "prompt": [*range(6), *range(kept, both.shape[1])],
            "generated": [*range(6, kept), *range(both.shape[1], len(row))],
            "last_prompt": [5, both.shape[1] - 1],
        }.get(case.gate, right_places(case.gate, row, 6))
        scores = by_definition(case.twin, case.direction, row, places)[both.shape[1] - 1 : -1, SPOKEN]
        chosen = torch.tensor([SPOKEN.index(token) for token in row[both.shape[1] :]])
        assert (scores.amax(-1) - scores[torch.arange(NEW), chosen]).max() < 1e-3


def shared_prefix(case, handle):
    """The cache of a prompt is copied for each text that goes on from it."""
    prompt = prompts(1)
    handle.prompt_lengths([6])
    cache = case.model(prompt[:, :5], past_key_values=DynamicCache(config=case.model.config)).past_key_values
    for token in (7, OPEN):
        text = torch.cat([prompt[:, :5], torch.tensor([[token]])], 1)
        handle.prompt_lengths([6])
        for row in generate(case, text, past_key_values=copy.deepcopy(cache)).tolist():
            case.check_greedy(row, 6)


def rows_by_hand(case, handle):
    """Rows of a cache that are repeated, dropped and reordered by hand, as contrastive search does."""
    prompt = prompts(1)
    cache = case.model(prompt, past_key_values=DynamicCache(config=case.model.config)).past_key_values
    cache.batch_repeat_interleave(4)
    rows = torch.cat([prompt.repeat(4, 1), torch.tensor([[OPEN], [CLOSE], [7], [BREAK]])], 1)
    case.model(rows[:, -1:], past_key_values=cache)
    for index in ([2, 0, 1, 3], [3, 1], [1, 1, 0]):
        cache.batch_select_indices(torch.tensor(index))
        rows = torch.cat([rows[index], torch.randint(7, 10, (len(index), 1))], 1)
        logits = case.model(rows[:, -1:], past_key_values=cache).logits[:, -1]
        for row, found in zip(rows.tolist(), logits, strict=True):
            torch.testing.assert_close(found, case.logits(row, 6)[-1], atol=1e-3, rtol=1e-3)


def pieces_by_hand(told):
    def mode(case, handle):
        row, cache = prompts(1, 9), DynamicCache(config=case.model.config)
        if told:
            handle.prompt_lengths([7])
        parts = [case.model(piece, past_key_values=cache).logits[0] for piece in row.split([4, 3, 1, 1], 1)]
        expected = case.logits(row[0].tolist(), 7)
        torch.testing.assert_close(torch.cat(parts), expected, atol=1e-3, rtol=1e-3)

    return mode


def embeddings(case, handle):
    ids = prompts()
    out = case.model.generate(inputs_embeds=case.model.get_input_embeddings()(ids), **options())
    for prompt, row in zip(ids.tolist(), out.tolist(), strict=True):
        case.check_greedy([*prompt, *row], 6)


def packed(case, handle):
    texts = [[7, 8, 9, 7, 8, 9], [8, 9, 7, 7]]
    out = case.model.generate_batch(
        texts,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
    )
    for text, result in zip(texts, out.values(), strict=True):
        row = [*text, *result.generated_tokens]
        scores = case.logits(row, len(text))[len(text) - 1 : -1]
        assert scores.argmax(-1).tolist() == result.generated_tokens or case.gate != "all"


class Words:
    """As much of a tokenizer as a streamer needs."""

    def decode(self, ids, **options):
        return "".join(f"{int(i)} " for i in ids)


def streamed(case, handle):
    ids, streamer = prompts(1), TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)

    def run():
        with handle.here():
            generate(case, ids, streamer=streamer)

    thread = threading.Thread(target=run)
    thread.start()
    new = [int(word) for text in streamer for word in text.split()]
    thread.join()
    case.check_greedy([*ids[0].tolist(), *new], 6)


LATER = ("prompt", "generated", "last_prompt")
EMBEDS = "a selector other than 'all' needs input_ids, but only inputs_embeds were given"
PACKED = (
    "`generate_batch` packs all sequences into one row, in which only the selector 'all' can be followed: use "
    "`generate`, or where='all'"
)
PIECES = (
    "3 tokens are fed behind a cache of 4, and nothing tells whether they are prompt or generated: say where each "
    "row's prompt ends by `handle.prompt_lengths([...])` before the call"
)

# name -> (mode, gates that are refused, the sentence)
MODES = {
    "greedy search": (greedy(), (), ""),
    "sampling": (sampling, (), ""),
    "a static cache": (greedy(cache_implementation="static"), (), ""),
    "`use_cache=False`": (greedy(use_cache=False), (), ""),
    "beam search": (beams(), (), ""),
    "beam search, static cache": (beams(cache_implementation="static"), (), ""),
    "beam search, `use_cache=False`": (beams(use_cache=False), (), ""),
    "beam search, sampling": (beams(do_sample=True, temperature=1.0, top_k=0), (), ""),
    "prompt lookup (`prompt_lookup_num_tokens`)": (speculative(prompt_lookup_num_tokens=3), (), ""),
    "assisted decoding (`assistant_model`)": (assisted, (), ""),
    "classifier-free guidance (`guidance_scale`)": (guidance(), (), ""),
    "guidance, `use_cache=False`": (guidance(use_cache=False), (), ""),
    "`prefill_chunk_size`": (chunked(4), (), ""),
    "a second turn on a kept cache": (second_turn, (), ""),
    "copies of a prompt's cache, with `handle.prompt_lengths`": (shared_prefix, (), ""),
    "rows of a cache moved by hand": (rows_by_hand, (), ""),
    "a text fed in pieces, with `handle.prompt_lengths`": (pieces_by_hand(True), (), ""),
    "a text fed in pieces, without": (pieces_by_hand(False), LATER, PIECES),
    "a thread of its own, in `handle.here()`": (streamed, (), ""),
    "`inputs_embeds`": (embeddings, GATES[1:], EMBEDS),
    "`generate_batch`": (packed, GATES[1:], PACKED),
}


@pytest.fixture(scope="module")
def twins():
    return tiny("llama", seed=1), tiny("llama", seed=1)


def direction_for(model):
    generator = torch.Generator().manual_seed(0)
    layers = range(models.n_layers(model))
    return Direction({Site("resid_post", i): torch.randn(models.width(model), generator=generator) for i in layers})


#: The costliest ones that differ little from another.
SLOW = {
    "beam search, static cache",
    "beam search, `use_cache=False`",
    "guidance, `use_cache=False`",
    "`generate_batch`",
}


EACH_MODE = [slow(name) if name in SLOW else name for name in MODES]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", EACH_MODE)
def test_mode(twins, tokenizer, name, gate):
    mode, refused, sentence = MODES[name]
    llama, twin = twins
    direction = direction_for(llama)

    def run():
        torch.manual_seed(0)
        with warnings.catch_warnings():  # a gate may stay shut
            warnings.simplefilter("ignore", SteerableWarning)
            with steer(llama, direction, where=gate, tokenizer=tokenizer) as handle:
                mode(Case(llama, twin, direction, gate), handle)

    if gate in refused:
        with pytest.raises(SteerableError, match=re.escape(sentence)):
            run()
    else:
        run()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def render():
    """The table of the page."""
    sentences = list(dict.fromkeys(sentence for _, _, sentence in MODES.values() if sentence))
    lines = ["| mode | " + " | ".join(f"`{gate}`" for gate in GATES) + " |", "|---" * (len(GATES) + 1) + "|"]
    for name, (_, refused, sentence) in MODES.items():
        cells = [f"refused ({sentences.index(sentence) + 1})" if gate in refused else "right" for gate in GATES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    numbered = [
        re.sub(r"[0-9]+ tokens are fed behind a cache of [0-9]+", "N tokens are fed behind a cache of M", text)
        for text in sentences
    ]
    return "\n".join([*lines, "", *(f"{i}. {text}." for i, text in enumerate(numbered, 1))])


def test_the_page():
    assert render() in PAGE.read_text(), "run `python tests/engines/hf/test_modes.py --write`"


def test_the_first_generated_token(twins, tokenizer):
    """It is predicted at the last prompt token: `generated` leaves its logits as they are, `last_prompt | generated`
    does not."""
    llama, twin = twins
    row, direction = prompts(1)[0].tolist(), direction_for(llama)
    plain = twin(torch.tensor([row])).logits[0, -1]
    out = {}
    for gate in ("generated", "last_prompt | generated"):
        with steer(llama, direction, where=gate, tokenizer=tokenizer):
            out[gate] = generate(
                Case(llama, twin, direction, gate), torch.tensor([row]), output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        Case(llama, twin, direction, gate).check_greedy(out[gate].sequences[0].tolist(), 6)
    torch.testing.assert_close(out["generated"].logits[0][0], plain, atol=1e-4, rtol=1e-4)
    assert (out["last_prompt | generated"].logits[0][0] - plain).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma3_text", "qwen2", "deepseek_v3"])
def test_families(name, tokenizer):
    """Learned positions, sliding windows in some or all layers, latent attention: beams and candidates."""
    llama, twin = tiny(name, seed=1), tiny(name, seed=1)
    direction = direction_for(llama)
    for mode in (beams(), speculative(prompt_lookup_num_tokens=3)):
        with steer(llama, direction, where="thinking | generated", tokenizer=tokenizer) as handle:
            mode(Case(llama, twin, direction, "thinking | generated"), handle)


@pytest.mark.parametrize("gate", ["prompt", "last_prompt", "generated"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_sizes_of_prefill_chunks(twins, tokenizer, size, gate):
    """The last chunk may be one token, as a decoding step is; also where no views are tracked."""
    llama, twin = twins
    direction = direction_for(llama)
    with torch.inference_mode(size == 2), steer(llama, direction, where=gate, tokenizer=tokenizer) as handle:
        chunked(size)(Case(llama, twin, direction, gate), handle)


def test_padded_beams(twins, tokenizer):
    llama, twin = twins
    direction, gate = direction_for(llama), "thinking | generated"
    ids = torch.cat([torch.tensor([[0, 0], [7, OPEN]]), prompts()], 1)
    with steer(llama, direction, where=gate, tokenizer=tokenizer):
        out = llama.generate(
            ids, attention_mask=(ids > 0).long(), num_beams=4, length_penalty=0.0, return_dict_in_generate=True,
            output_scores=True, **options(),
        )  # fmt: skip
    case = Case(llama, twin, direction, gate)
    for row, score, pad in zip(out.sequences.tolist(), out.sequences_scores.tolist(), (2, 0), strict=True):
        assert score == pytest.approx(case.log_probability(row[pad:], 8 - pad), abs=1e-3)


def test_a_second_turn_while_another_thread_runs_the_model(twins, tokenizer):
    """The other pass comes between the two hooks that read one pass's inputs."""
    llama, twin = twins
    direction = direction_for(llama)

    def run_elsewhere(module, args, kwargs):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=llama, args=(prompts(),))
            thread.start()
            thread.join()

    hook = llama.model.register_forward_pre_hook(run_elsewhere, with_kwargs=True)
    try:
        with steer(llama, direction, where="generated", tokenizer=tokenizer) as handle:
            second_turn(Case(llama, twin, direction, "generated"), handle)
    finally:
        hook.remove()


#: A tokenizer that spells breaks and think tags by several tokens each, some of which bring what stands beside them.
PIECES_OF_TEXT = ("<pad>", "<", "think", ">", "</", "\n", " ", "a", ".\n", "></")


@pytest.fixture(scope="module")
def spelling_tokenizer():
    words = [*PIECES_OF_TEXT, *(f"w{i}" for i in range(len(PIECES_OF_TEXT), VOCABULARY))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    inner.pre_tokenizer = Split(Regex("</|think|<|>|\n| "), "isolated")
    inner.decoder = Fuse()
    spelling = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="a")
    set_think_tags(spelling, ("<think>", "</think>"))
    return spelling


def spelled_places(gate, row, prompt):
    """As `right_places`, from the text that the tokens spell."""
    ends = [sum(len(PIECES_OF_TEXT[token]) for token in row[: i + 1]) for i in range(len(row))]
    text = "".join(PIECES_OF_TEXT[token] for token in row)

    def token_at(character):
        return next(i for i, end in enumerate(ends) if end > character)

    breaks = {token_at(m.start(1)) for m in re.finditer(r"\n *(\n)[ \n]*", text)}
    tags = {token_at(m.end() - 1): m.group() for m in re.finditer("</?think>", text)}
    phase, thinking = None, []
    for place in range(len(row)):
        if place in tags:
            phase = tags[place]
        elif phase == "<think>":
            thinking.append(place)
    return {"boundary": sorted(breaks), "thinking": thinking, "thinking | boundary": sorted({*thinking, *breaks})}[gate]


@pytest.mark.filterwarnings("ignore:steering touched none")
@pytest.mark.parametrize("gate", ["boundary", "thinking | boundary"])
@pytest.mark.parametrize("name", EACH_MODE)
def test_breaks_and_tags_of_several_tokens(twins, spelling_tokenizer, monkeypatch, name, gate):
    mode, refused, _ = MODES[name]
    if "boundary" in refused:
        return
    here = sys.modules[__name__]
    llama, twin = twins
    monkeypatch.setattr(here, "SPOKEN", tuple(range(1, len(PIECES_OF_TEXT))))
    monkeypatch.setattr(here, "right_places", spelled_places)
    monkeypatch.setattr(here, "OPEN", 3)  # completes the tag that the prompts have begun
    monkeypatch.setattr(here, "CLOSE", 4)
    monkeypatch.setattr(here, "BREAK", 5)

    def spelled_prompts(rows=2, length=6, seed=0):
        ids = torch.randint(1, len(PIECES_OF_TEXT), (rows, length), generator=torch.Generator().manual_seed(seed))
        ids[:, :3], ids[0, -1] = torch.tensor([1, 2, 3]), 5
        return ids

    monkeypatch.setattr(here, "prompts", spelled_prompts)
    torch.manual_seed(0)
    direction = direction_for(llama)
    with steer(llama, direction, where=gate, tokenizer=spelling_tokenizer) as handle:
        mode(Case(llama, twin, direction, gate), handle)


if __name__ == "__main__" and "--write" in sys.argv:
    text = PAGE.read_text()
    begin, end = "<!-- modes -->\n", "\n<!-- /modes -->"
    PAGE.write_text(text[: text.index(begin) + len(begin)] + render() + text[text.index(end) :])
