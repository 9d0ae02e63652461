"""Selectors against a token-by-token oracle, under padding, chunks, row changes; breaks against the decoded text."""

import copy
import pickle
import random
import re

import pytest
import torch
from conftest import build
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vocabularies import REAL, real

import steerable as st
from steerable.engines.sampling import Decoding
from steerable.models.pocket.tokenizer import build_tokenizer
from steerable.steering.gates import Selector, parse_selector, resolve, selectors
from steerable.steering.think import ThinkTags
from steerable.steering.tokens import SequenceState, Tokens
from steerable.store.errors import UsageError

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


def test_rows_are_dropped_and_moved():
    state = SequenceState(TAGS)
    state.start(3)
    state.advance(torch.tensor([[5, 1], [5, 2], [5, 5]]))
    state.select(torch.tensor([2, 0, 0]))
    tokens = state.advance(torch.tensor([[5], [5], [5]]))
    assert tokens.thinking[:, 0].tolist() == [False, True, True]
    assert tokens.position[:, 0].tolist() == [2, 2, 2]
    tokens = state.advance(torch.tensor([[5], [5], [2]]), prompt=torch.tensor([False, True, False]))
    assert tokens.thinking[:, 0].tolist() == [False, True, False]
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


def test_every_mask_leaves_out_padding():
    for seed in range(50):
        ids = torch.tensor([[0, 0, 5, OPEN, 3]])
        state = SequenceState(TAGS)
        state.start(1)
        tokens: Tokens = state.advance(ids, ids > 0)
        selector: Selector = random_selector(random.Random(seed))
        assert not selector(tokens)[0, :2].any()


def breaks_of(tokenizer, ids):
    """Which tokens hold the second newline of a paragraph break, by the decoded text."""

    def length(stop):  # a prefix may end within a character
        return len(tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False).rstrip("\ufffd"))

    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    ends = [text.index("\n", found.start() + 1) for found in re.finditer(r"\n[ \t\r\f\v]*\n[ \t\r\f\v\n]*", text)]
    lengths = [length(stop) for stop in range(1, len(ids) + 1)]
    tokens = {next(i for i, reached in enumerate(lengths) if reached > end) for end in ends}
    return [i in tokens for i in range(len(ids))]


def followed(selector, rows, seed):
    """The masks of rows that are fed in pieces, padding anywhere; rows change places, are parted and joined."""
    rng = random.Random(seed)
    state = SequenceState(None, selector.breaks)
    state.start(len(rows), prompt_lengths=torch.tensor([len(row) // 2 for row in rows]))
    order, result = list(range(len(rows))), [[] for _ in rows]
    while any(len(result[i]) < len(rows[i]) for i in order):
        width = rng.choice([1, 1, 2, 5, 300])
        ids, valid = torch.zeros(len(order), width, dtype=torch.long), torch.zeros(len(order), width, dtype=torch.bool)
        for line, i in enumerate(order):
            columns = [column for column in range(width) if rng.random() < 0.8]
            for column, token in zip(columns, rows[i][len(result[i]) :], strict=False):
                ids[line, column], valid[line, column] = token, True
        mask = selector(state.advance(ids, valid))
        assert not mask[~valid].any()
        for line, i in enumerate(order):
            result[i] += mask[line][valid[line]].tolist()
        if rng.random() < 0.3:
            places = rng.sample(range(len(order)), len(order))
            parts = copy.copy(state), copy.copy(state)
            for part, chosen in zip(parts, (places[:1], places[1:]), strict=True):
                part.select(torch.tensor(chosen))
            state, order = parts[0].join(parts[1]), [order[place] for place in places]
    return result


BREAKS = [  # a text, and how many breaks it holds
    ("So it is.\n\nWait, no", 1),
    ("so\n\n", 1),
    ("so:\n\n1. it\n\n  2. no", 2),
    ("so\n \nwait", 1),
    ("so \n \t \nwait", 1),
    ("so\n\t\nwait", 1),
    ("so\r\n\r\nwait\r\nno", 1),
    ("so\n\n\nwait", 1),
    ("so\n\n\n\n\nwait\n\n\n \n\n等", 2),
    ("\n\nso", 1),
    ("so\nwait\n no\n", 0),
    ("so\r\rwait \t no", 0),
    ("等\n\n一下é\n\n🙂", 2),
    ("so\n" + " " * 700 + "\nwait", 1),
]


def tokenizer_of(request, name):
    return build_tokenizer(["So 12 is.\n\nWait, no."], minimum=1) if name == "pocket" else real(request, name)


@pytest.mark.parametrize("name", [*REAL, "pocket"])
def test_boundary_in_real_vocabularies(name, request):
    tokenizer = tokenizer_of(request, name)
    selector = resolve(parse_selector("boundary"), tokenizer)
    rows = [tokenizer(text)["input_ids"] for text, _ in BREAKS]
    expected = [breaks_of(tokenizer, row) for row in rows]
    assert [sum(row) for row in expected] == [count for _, count in BREAKS]
    for text, row, mask in zip(BREAKS, rows, expected, strict=True):
        state = SequenceState(None, selector.breaks)
        state.start(1)
        assert selector(state.advance(torch.tensor([row])))[0].tolist() == mask, text
    assert followed(selector, rows, seed=1) == expected


@pytest.mark.parametrize("name", [*REAL, "pocket"])
def test_boundary_in_random_tokens(name, request):
    """Tokens in an order that no tokenizer would give, but a model may."""
    tokenizer, rng = tokenizer_of(request, name), random.Random(name)
    selector = resolve(selectors.boundary, tokenizer)
    assert pickle.loads(pickle.dumps(selector)) == selector and hash(selector) and str(selector) == "boundary"
    texts = {i: tokenizer.decode([i]) for i in tokenizer.get_vocab().values()}
    white = [i for i, text in texts.items() if "\n" in text or not text.strip()]
    visible = [i for i in rng.sample(sorted(texts), 40) if "\ufffd" not in texts[i]]
    useful = (
        rng.sample(white, min(60, len(white))) + visible + tokenizer("\n", add_special_tokens=False)["input_ids"] * 9
    )
    rows = [rng.choices(useful, k=rng.randrange(1, 40)) for _ in range(6)]
    expected = [breaks_of(tokenizer, row) for row in rows]
    assert any(map(any, expected)) and followed(selector, rows, seed=2) == expected


def words(*entries):
    """A tokenizer of whole words, which are put together as they are."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token=entries[0]))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=entries[0])


@pytest.mark.parametrize(
    ("pieces", "columns"),
    [
        (["\n\nWait", "a"], [0]),  # in the middle of a token
        (["a\n", "\nb\n\n", "\n", "\nb"], [1]),  # two in one token, and the second goes on
        (["a\n", " ", "a", "\n", "\n"], [4]),
        (["\n\n\n\n", "\n", "a", "\n\n"], [0, 3]),
        (["a\n", "a\n", "\n", "\n"], [2]),
    ],
)
def test_where_a_break_stands(pieces, columns):
    tokenizer = words("<pad>", *dict.fromkeys(pieces))
    ids = [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    selector = resolve(selectors.boundary, tokenizer)
    assert [i for i, here in enumerate(breaks_of(tokenizer, ids)) if here] == columns
    assert [i for i, here in enumerate(followed(selector, [ids], 0)[0]) if here] == columns


SPELLED = ("<pad>", "\n", " ", "a", "b", ".\n", "c", "d")


@pytest.fixture(scope="module")
def spelled_breaks():
    """A model whose vocabulary spells a break by two tokens at least."""
    return build(LlamaConfig, LlamaForCausalLM, seed=3, vocab_size=len(SPELLED)), words(*SPELLED)


@pytest.mark.parametrize("where", ["boundary", "generated & boundary", "prompt & ~boundary"])
def test_steering_at_breaks(spelled_breaks, where):
    """Alone, padded, in a batch, with a cache and without, the same tokens are touched."""
    model, tokenizer = spelled_breaks
    rng = random.Random(0)
    rows = [rng.choices([1, 1, 2, 3, 5], k=n) for n in (12, 17, 9)]
    direction = st.Direction({st.Site("resid_post", 1): torch.ones(32)})
    prompts = [4, 9, 1]
    at = [breaks_of(tokenizer, row) for row in rows]
    chosen = {
        "boundary": lambda breaks, in_prompt: breaks,
        "generated & boundary": lambda breaks, in_prompt: breaks and not in_prompt,
        "prompt & ~boundary": lambda breaks, in_prompt: in_prompt and not breaks,
    }[where]
    wanted = sum(chosen(b, i < p) for row, p in zip(at, prompts, strict=True) for i, b in enumerate(row))
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = ids > 0
    with st.steer(model, direction, strength=2.0, where=where, tokenizer=tokenizer) as handle:
        alone = []
        for row, prompt in zip(rows, prompts, strict=True):
            handle.prompt_lengths([prompt])
            alone.append(model(torch.tensor([row])).logits[0])
        assert handle.report()["resid_post.1"]["tokens"] == wanted > 0
        handle.prompt_lengths(prompts)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = model(ids, attention_mask=mask.long(), position_ids=positions).logits
        for row, prompt, whole in zip(rows, prompts, alone, strict=True):
            handle.prompt_lengths([prompt])
            cache, parts = None, []
            for token in row:
                out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                cache, parts = out.past_key_values, [*parts, out.logits[0]]
            torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=1e-4)
        assert handle.report()["resid_post.1"]["tokens"] == 3 * wanted
    for line, whole in zip(batch, alone, strict=True):
        torch.testing.assert_close(line[-len(whole) :], whole, atol=1e-4, rtol=1e-4)


def test_generation_at_breaks(spelled_breaks):
    """Our engine, whose rows leave and enter, and transformers' own loop, row by row, write the same."""
    model, tokenizer = spelled_breaks
    rng = random.Random(1)
    prompts = [rng.choices([1, 1, 2, 3, 5], k=rng.randrange(2, 9)) for _ in range(7)]
    direction = st.Direction(
        {st.Site("resid_post", 2): 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))}
    )
    engine, greedy = st.TransformersEngine(model, tokenizer, rows=3), Decoding(0.0)
    steering = direction.steering(1.0, where="boundary")
    made = engine.generate([st.Request(prompt, 0, steering, greedy) for prompt in prompts], max_new_tokens=24)
    texts = [prompt + completion.ids for prompt, completion in zip(prompts, made, strict=True)]
    plain = engine.generate([st.Request(prompt, 0, (), greedy) for prompt in prompts], max_new_tokens=24)
    assert [c.ids for c in plain] != [c.ids for c in made]
    assert any(any(breaks_of(tokenizer, text[:-1])) for text in texts)
    with st.steer(model, direction, strength=1.0, where="boundary", tokenizer=tokenizer):
        options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([prompt])
            assert model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist() == text


def test_boundary_of_a_sequence_that_is_not_followed():
    """Without `breaks` a state does not know what came before: only sequences that begin are read."""
    tokenizer = words(*SPELLED)
    selector = resolve(selectors.boundary, tokenizer)
    state = SequenceState()
    state.start(2)
    ids = torch.tensor([[0, 0, 1, 1], [3, 1, 2, 1]])
    assert selector(state.advance(ids, ids > 0)).tolist() == [[False, False, False, True]] * 2
    with pytest.raises(UsageError, match="from their start"):
        selector(state.advance(torch.tensor([[1], [1]])))


@pytest.mark.parametrize("entries", [("a", "b"), ("a", " "), ("a\n", "b"), ("\nb", "a ")])
def test_boundary_that_never_matches(entries):
    with pytest.raises(UsageError, match="never matches: no tokens of this vocabulary spell a paragraph break"):
        resolve(~selectors.boundary, words("<pad>", *entries))
