"""A condition that is asked once for each prompt: where it holds all new tokens are steered, else none."""

import warnings

import pytest
import torch

from steerable.engines.base import Request
from steerable.engines.hf.engine import TransformersEngine
from steerable.engines.hf.hooks import Handle, steer
from steerable.engines.hf.scoring import score_tokens
from steerable.engines.sampling import Decoding
from steerable.evals.likelihood import kl
from steerable.models.taps import tap
from steerable.steering.direction import Direction
from steerable.steering.gates import latched, parse_selector, probe, when
from steerable.steering.site import Site
from steerable.steering.spec import from_json, to_json
from steerable.steering.tokens import SequenceState
from steerable.store.errors import SteerableWarning, UsageError

READ, SITE = Site("resid_post", 0), Site("resid_post", 2)
NEW = "last_prompt | generated"
PROMPTS = [[5, 1, 7], [6, 7, 1, 11], [9, 4], [8, 8, 8, 3, 2], [12, 30, 5], [40, 7], [22, 23, 24, 25, 26, 9], [31, 3]]


def draw(seed):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gate():
    return latched(when({READ: draw(1)}, ">", 0.0, "c"))


@pytest.fixture(scope="module")
def holds(tiny_llama):
    """`holds(ids)`: whether the condition holds at the last of these tokens."""

    def call(ids):
        read = []
        with torch.no_grad(), tap(tiny_llama, {READ: read.append}):
            tiny_llama(torch.tensor([ids]))
        return float(read[0][0, -1] @ draw(1)) > 0

    assert {call(prompt) for prompt in PROMPTS} == {True, False}
    return call


@pytest.fixture
def direction():
    return Direction({SITE: 3 * draw(2)})


def quietly(model, *steering, **options):
    warnings.simplefilter("ignore", SteerableWarning)  # the gate may stay shut
    return steer(model, *steering, **options)


def quiet_handle(model, programs, tokenizer):
    warnings.simplefilter("ignore", SteerableWarning)
    return Handle(model, programs, tokenizer, track=False)


@pytest.mark.parametrize("extra", [None, "generated"])
def test_the_engine(tiny_llama, tokenizer, gate, holds, direction, extra):
    """Eight prompts with three samples each, more than the rows: rows leave, close up and share their prompts."""
    engine = TransformersEngine(tiny_llama, tokenizer, rows=5)
    where = gate if extra is None else gate & parse_selector(extra)
    plain = direction.steering(where=NEW if extra is None else extra)

    def texts(steerings):
        requests = [
            Request(prompt, seed=10 * i + sample, steering=steering, decoding=Decoding(temperature=1.0))
            for i, (prompt, steering) in enumerate(zip(PROMPTS, steerings, strict=True))
            for sample in range(3)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SteerableWarning)
            return [list(completion.ids) for completion in engine.generate(requests, max_new_tokens=9)]

    got = texts([direction.steering(where=where)] * len(PROMPTS))
    assert got == texts([plain if holds(prompt) else () for prompt in PROMPTS])
    assert got != texts([()] * len(PROMPTS))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}, {"prefill_chunk_size": 2}]
)
def test_generate(tiny_llama, tokenizer, gate, holds, direction, options):
    for prompt in PROMPTS[:5]:
        made = []
        for where in (gate, NEW if holds(prompt) else None):
            with (
                warnings.catch_warnings(),
                quietly(tiny_llama, direction, where=where or "all", tokenizer=tokenizer) as h,
            ):
                h.set_strength(0 if where is None else 1)
                made.append(tiny_llama.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, **options))
        assert torch.equal(*made)


def test_a_padded_batch(tiny_llama, tokenizer, gate, holds, direction):
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = (ids > 0).long()
    with warnings.catch_warnings(), quietly(tiny_llama, direction, where=gate, tokenizer=tokenizer):
        together = tiny_llama.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, width:]
    for prompt, row in zip(PROMPTS, together, strict=True):
        with warnings.catch_warnings(), quietly(tiny_llama, direction, where=NEW, tokenizer=tokenizer) as handle:
            handle.set_strength(float(holds(prompt)))
            alone = tiny_llama.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, len(prompt) :]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_a_conversation_asks_again_and_a_rising_strength_finds_the_decision(
    tiny_llama, tokenizer, gate, holds, direction
):
    opened = next(prompt for prompt in PROMPTS if holds(prompt))
    shut = next(prompt for prompt in PROMPTS if not holds(opened + [3, 3] + prompt))
    with torch.no_grad(), warnings.catch_warnings(), quietly(tiny_llama, direction, where=gate) as handle:
        handle.set_strength(0)
        touched = []
        cache = None
        for length, piece in [
            (len(opened), opened),
            (None, [3]),
            (None, [3]),
            (len(opened) + 2 + len(shut), shut),
            (None, [3]),
        ]:
            if length is not None:
                handle.prompt_lengths([length])
            cache = tiny_llama(torch.tensor([piece]), past_key_values=cache, use_cache=True).past_key_values
            touched.append(handle.report()[str(SITE)]["tokens"])
            handle.set_strength(1)
    assert touched == [0, 1, 2, 2, 2]


def test_scores_in_pieces(tiny_llama, tokenizer, gate, holds, direction):
    """Both sides of a comparison hold decisions of their own, one of which the prompt's steering may change."""
    rows = [prompt + [3, 5, 8, 2, 9] for prompt in PROMPTS]
    starts = [len(prompt) for prompt in PROMPTS]
    first = Direction({Site("resid_pre", 0): 5 * draw(3)}).steering(where="prompt")
    for row, start in zip(rows, starts, strict=True):
        plain = direction.steering(where=NEW) if holds(row[:start]) else ()
        scores = []
        for steering in (plain, direction.steering(where=gate)):
            programs = [steering, first + direction.steering(where=gate)]
            for most in (2**25, 64 * 3):
                with warnings.catch_warnings(), quiet_handle(tiny_llama, programs, tokenizer) as handle:
                    scores += score_tokens(
                        tiny_llama, [row], [start], kl, handle=handle, passes=[[0], [1]], max_logits=most
                    )
        for other in scores[1:]:
            torch.testing.assert_close(other, scores[0], atol=1e-6, rtol=1e-4)


def test_text_and_files(gate, direction, tmp_path):
    vectors = {"c": {READ: draw(1)}, "b": {READ: draw(4)}}
    text = "~latched(when(c > 0) & ~probe(b >= 0.3)) & generated"
    both = parse_selector(text, vectors.__getitem__)
    assert str(both) == text and parse_selector(str(both), vectors.__getitem__) == both
    assert both.latches == (latched(when(vectors["c"], ">", 0, "c") & ~probe(vectors["b"], ">=", 0.3, name="b")),)
    saved = Direction(direction.vectors, gate=gate)
    assert Direction.load(saved.save(tmp_path / "d.safetensors")).gate == gate
    assert from_json(to_json(direction.steering(where=both))) == direction.steering(where=both)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("latched(thinking)", "latched\\(thinking\\) holds no condition on activations"),
        ("latched()", "not a gate"),
        ("latched", "unknown name 'latched'"),
    ],
)
def test_what_is_no_decision(text, why):
    with pytest.raises(UsageError, match=why):
        parse_selector(text)


def test_sequences_that_hold_no_decision(gate):
    state = SequenceState()
    state.start(1)
    tokens = state.advance(torch.tensor([[5, 6]]))
    with pytest.raises(UsageError, match="the sequences hold no decision on latched"):
        gate(tokens, lambda leaf: torch.ones(1, 2, dtype=torch.bool))
