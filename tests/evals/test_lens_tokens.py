"""Tokens as text: byte-level and SentencePiece-like vocabularies, parts of characters, unknown ids."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steerable.evals.lens_tokens import token_texts


def byte_level(*words):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelt = ["".join(p for p, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(w)) for w in words]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys([*alphabet, *spelt]))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def test_byte_level():
    words = [" wait", "Wait", "\n\n", "  ", "é", " 日"]
    tokenizer = byte_level(*words)
    texts = token_texts(tokenizer)
    assert len(texts) == len(tokenizer)
    for word in words:
        (index,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert texts[index] == word
    assert texts[tokenizer.convert_tokens_to_ids("<|end|>")] == "<|end|>"
    # a lone byte of a longer character has no text: it is shown as it stands in the vocabulary
    assert texts[tokenizer.convert_tokens_to_ids("æ")] == "æ" and not any("\ufffd" in text for text in texts)


def test_sentence_piece():
    pieces = ["<unk>", "▁wait", "wait", "▁", "▁▁", "<0x0A>"]
    inner = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert tokenizer.decode([1]) == "wait"  # the decoder drops the space, which tells two tokens apart
    assert token_texts(tokenizer) == ["<unk>", " wait", "wait", " ", "  ", "\n"]


def test_a_slow_tokenizer_and_holes():
    class Slow:
        is_fast = False

        def __len__(self):
            return 3

        def convert_ids_to_tokens(self, ids):
            return ["a", None, "c"]

        def decode(self, ids):
            return "abc"[ids[0]]

    assert token_texts(Slow()) == ["a", "<1>", "c"]
