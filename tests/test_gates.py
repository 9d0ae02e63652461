"""Selectors against a token-by-token oracle, under padding, chunks, row changes."""

import random

import pytest
import torch

from steerable.errors import UsageError
from steerable.gates import Selector, SequenceState, Tokens, parse_selector, resolve, selectors
from steerable.think import ThinkTags

OPEN, CLOSE = 1, 2
TAGS = ThinkTags((OPEN,), (CLOSE,))
FIELDS = ("valid", "prompt", "last_prompt", "thinking", "answer")


def oracle(row, prompt_length):
    """What each token of one unpadded row is."""
    result, phase = [], "before"
    for i, token in enumerate(row):
        phase = {OPEN: "thinking", CLOSE: "answer"}.get(token, phase)
        inside = token not in (OPEN, CLOSE)
        result.append(
            {
                "valid": True,
                "position": i,
                "prompt": i < prompt_length,
                "last_prompt": i == prompt_length - 1,
                "thinking": inside and phase == "thinking",
                "answer": inside and phase == "answer",
            }
        )
    return result


def random_rows(seed, rows=5):
    rng = random.Random(seed)
    texts = [[rng.choice([OPEN, CLOSE, 5, 6, 7, 8, 9]) for _ in range(rng.randint(3, 14))] for _ in range(rows)]
    return texts, [rng.randint(1, len(text) - 1) for text in texts]


def check(tokens, row, column, expected):
    assert {f: bool(getattr(tokens, f)[row, column]) for f in FIELDS} == {f: expected[f] for f in FIELDS}
    assert int(tokens.position[row, column]) == expected["position"]


@pytest.mark.parametrize("seed", range(20))
def test_left_padded_prompts_then_one_token_a_call(seed):
    texts, lengths = random_rows(seed)
    width = max(lengths)
    ids = torch.tensor([[0] * (width - n) + text[:n] for text, n in zip(texts, lengths, strict=True)])
    valid = torch.tensor([[False] * (width - n) + [True] * n for n in lengths])
    expected = [oracle(text, n) for text, n in zip(texts, lengths, strict=True)]
    state = SequenceState(TAGS)
    state.start(len(texts))
    tokens = state.advance(ids, valid)
    for r, n in enumerate(lengths):
        assert not any(getattr(tokens, f)[r, : width - n].any() for f in FIELDS)
        for i in range(n):
            check(tokens, r, width - n + i, expected[r][i])
    step = 0
    while any(n + step < len(text) for text, n in zip(texts, lengths, strict=True)):
        fed = [t[n + step] if n + step < len(t) else 5 for t, n in zip(texts, lengths, strict=True)]
        tokens = state.advance(torch.tensor(fed)[:, None])
        for r, n in enumerate(lengths):
            if n + step < len(texts[r]):
                check(tokens, r, 0, expected[r][n + step])
        step += 1


@pytest.mark.parametrize("seed", range(20))
def test_right_padded_chunks_with_known_prompts(seed):
    texts, lengths = random_rows(seed)
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    valid = torch.tensor([[True] * len(text) + [False] * (width - len(text)) for text in texts])
    state = SequenceState(TAGS)
    state.start(len(texts), prompt_lengths=torch.tensor(lengths))
    chunk = random.Random(seed).randint(1, 5)
    for start in range(0, width, chunk):
        part = slice(start, start + chunk)
        tokens = state.advance(ids[:, part], valid[:, part])
        for r, text in enumerate(texts):
            for i in range(start, min(start + chunk, len(text))):
                check(tokens, r, i - start, oracle(text, lengths[r])[i])


def test_rows_are_dropped_and_refilled():
    state = SequenceState(TAGS)
    state.start(3)
    state.advance(torch.tensor([[5, 1], [5, 2], [5, 5]]))
    state.select(torch.tensor([2, 0, 0]))
    tokens = state.advance(torch.tensor([[5], [5], [5]]))
    assert tokens.thinking[:, 0].tolist() == [False, True, True]
    state.reset_rows(torch.tensor([1]))
    tokens = state.advance(torch.tensor([[5], [5], [2]]), prompt=torch.tensor([False, True, False]))
    assert tokens.thinking[:, 0].tolist() == [False, False, False]
    assert tokens.position[:, 0].tolist() == [3, 0, 3]
    assert tokens.prompt[:, 0].tolist() == tokens.last_prompt[:, 0].tolist() == [False, True, False]


def test_prompt_may_be_given_for_each_token():
    state = SequenceState(None)
    state.start(1)
    tokens = state.advance(torch.tensor([[5, 6, 7]]), prompt=torch.tensor([[True, True, False]]))
    assert tokens.last_prompt.tolist() == [[False, True, False]]
    assert not tokens.thinking.any() and not tokens.answer.any()  # no tags are known


@pytest.fixture(scope="module")
def fed():
    """p p <think> | t t </think> a a, behind one column of padding; the bar ends the prompt."""
    ids = torch.tensor([[0, 5, 6, OPEN, 7, 3, CLOSE, 8, 9]])
    state = SequenceState(TAGS)
    state.start(1, prompt_lengths=torch.tensor([3]))
    return state.advance(ids, ids > 0)


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("all", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("prompt", [1, 2, 3]),
        ("generated", [4, 5, 6, 7, 8]),
        ("thinking", [4, 5]),
        ("answer", [7, 8]),
        ("last_prompt", [3]),
        ("boundary", [5]),
        ("tokens(7, 9)", [4, 8]),
        ("tokens(100)", []),
        ("positions(1, 4)", [2, 3, 4]),
        ("~prompt", [4, 5, 6, 7, 8]),
        ("thinking & ~boundary", [4]),
        ("thinking | answer & tokens(8)", [4, 5, 7]),
        ("(thinking | answer) & tokens(8)", [7]),
        ("~(thinking | prompt)", [6, 7, 8]),
        ("~~prompt", [1, 2, 3]),
    ],
)
def test_truth_table(fed, tokenizer, text, columns):
    selector = parse_selector(text)
    assert str(selector) == selector.name == text and parse_selector(str(selector)) == selector
    assert resolve(selector, tokenizer)(fed)[0].nonzero()[:, 0].tolist() == columns


def random_selector(rng, depth=4):
    op = rng.choice("&|~") if depth else ""
    if op == "~":
        return ~random_selector(rng, depth - 1)
    if op:
        left, right = random_selector(rng, depth - 1), random_selector(rng, depth - 1)
        return left & right if op == "&" else left | right
    leaves = [selectors.all, selectors.thinking, selectors.tokens(3, 1), selectors.positions(2, 5)]
    return rng.choice(leaves)


@pytest.mark.parametrize("seed", range(50))
def test_text_round_trip(seed):
    selector = random_selector(random.Random(seed))
    assert parse_selector(str(selector)) == selector


@pytest.mark.parametrize(
    "text",
    ["", "nothing", "all &", "& all", "(all", "all)", "all all", "~", "tokens", "tokens()", "tokens(a)"]
    + ["positions(3)", "positions(3, 3)", "positions(1, 2, 3)", "tokens(-1)", "all()", "thinking and answer"],
)
def test_bad_text(text):
    with pytest.raises(UsageError):
        parse_selector(text)


def test_boundary_needs_the_tokenizer(fed):
    with pytest.raises(UsageError, match="needs the tokenizer"):
        selectors.boundary(fed)


def test_boundary_that_never_matches():
    class Plain:
        def get_vocab(self):
            return {"a": 0, "\n": 1}

        def decode(self, ids):
            return "a\n"[ids[0]]

    with pytest.raises(UsageError, match="never matches"):
        resolve(~selectors.boundary, Plain())


def test_every_mask_leaves_out_padding():
    for seed in range(50):
        ids = torch.tensor([[0, 0, 5, OPEN, 3]])
        state = SequenceState(TAGS)
        state.start(1)
        tokens: Tokens = state.advance(ids, ids > 0)
        selector: Selector = random_selector(random.Random(seed))
        assert not selector(tokens)[0, :2].any()
